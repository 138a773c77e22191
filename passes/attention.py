"""Attention -> the kernel made for its mask, with keys and values that are not repeated.

Matches      ``scaled_dot_product_attention`` under a mask of which every part is known (see
             `liger_fx.masks`): causal, in a window, over documents (packed sequences), beside
             padding; or that is an input of the graph. And over heads repeated by unsqueeze, expand
             and reshape: torchtune and Hugging Face on [b, h, s, d], torchtitan on [b, s, h, d].
Becomes      ``scaled_dot_product_attention(is_causal=True, enable_gqa=True)``, or
             ``liger_fx::attention`` where that has no word for the mask, or may run in cuDNN: what
             ran under a mask did not, and cuDNN's gradient is wrong for some layouts (torch 2.11).
             For an input ``liger_fx::masked_attention``, which reads the values when it runs. In an
             activation checkpoint on a GPU all causal attention is the op.
Leaves alone masks with an unknown part; masks that are not causal; dropout under a mask that
             PyTorch has no word for; on a GPU float32 that is not plainly causal, and sizes that no
             fused kernel takes; heads repeated in another order.
Numerics     PyTorch's own kernels under another name. The gradient of a key is summed over its
             queries by the kernel: on a CPU in the dtype of the key.
"""

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from liger_fx.passes._rows import cast_as_autocast
from torch import fx

from liger_fx import masks, ops
from liger_fx.bodies import carry_in
from liger_fx.canonical import (
    View,
    agreeing_sizes,
    fake,
    op_name,
    positional,
    same_sizes,
    specialise,
)
from liger_fx.masks import Mask, Source, Unreadable
from liger_fx.matcher import Match, Reject, data_inputs
from liger_fx.ops.attention import MAX_HEAD_SIZE
from liger_fx.pattern import guard
from liger_fx.rewrite import Rewrite

GIVEN = "given mask"  # its values say what it is
_OPS = [
    f"liger_fx::{op}{part}" for op in ("attention", "masked_attention") for part in ("", "_forward")
]
_PLAN = "liger_fx_plan"  # in the meta of the nodes that make one


def heads_first(query, key, value, mask, dropout_p, is_causal, scale):
    """[b, h, s, d]"""
    return F.scaled_dot_product_attention(
        query, _repeated(key), _repeated(value), mask, dropout_p, is_causal, scale=scale
    )


def heads_second(query, key, value, mask, dropout_p, is_causal, scale):
    """[b, s, h, d], transposed afterwards."""
    key, value = _repeated(key).transpose(1, 2), _repeated(value).transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale
    )


def masked(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa):
    """As it is, under a mask."""
    return F.scaled_dot_product_attention(
        query, key, value, _given(mask), dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def plain(query, key, value, dropout_p, is_causal, scale, enable_gqa):
    """As it is, without a mask."""
    return F.scaled_dot_product_attention(
        query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def planned(query, key, value, segments, rows, after, facts, window, scale):
    """``liger_fx::attention``, as the recipes call it for packed data."""
    return ops.attention(
        query, _repeated(key), _repeated(value), segments, rows, after, facts, window, scale
    )


def _repeated(x):
    return x.reshape(-1).expand(-1).reshape(-1)  # `check` looks at the shapes


_given = guard("a mask", lambda value: True)


def check(match: Match, query, key, value, mask=None):
    if match.pattern.name == "plain":  # of which `join` says nothing where it stays
        return
    _check_heads(match, query, key, value)
    if match.pattern.name == "planned":
        return
    says = _predicates(match)
    if says is None:
        return
    scale = match.values["scale"]
    if mask is not None and scale is not None and specialise(scale) <= 0:
        raise Reject(f"scores are scaled by {scale}, for which the kernels give NaN")
    if says == GIVEN or _needs_op(says):
        _check_op(match, says, query, key, value)
    elif mask is None:
        _require(_ungrouped(match))
    elif not says.causal and _becomes_cudnn(match):
        raise Reject("the mask hides no key; the kernel is for causal attention")


def _check_heads(match: Match, query: Any, key: Any, value: Any) -> None:
    keys = positional(match.root)[1:3]
    wanted = fake(keys[0]).shape
    if query.dim() != 4 or not same_sizes(query.shape[:2], wanted[:2]):
        repeated = "" if match.pattern.name == "masked" else "repeated "
        if repeated or query.dim() != 4 or not match.values["enable_gqa"]:
            shapes = f"queries are {list(query.shape)}, {repeated}keys {list(wanted)}"
            raise Reject(f"{shapes}: other heads")
    if match.pattern.name == "masked":
        out = [*query.shape[:3], value.shape[-1]]
        alike = key.dim() == value.dim() == 4 and same_sizes(key.shape[:3], value.shape[:3])
        alike = alike and same_sizes(query.shape[:1], key.shape[:1])
        if not alike or not same_sizes(match.output.shape, out):
            raise Reject("queries, keys, values or the mask are broadcast over each other")
        return
    heads = 2 if match.pattern.name == "heads_second" else 1
    for name, node in zip(("key", "value"), keys, strict=True):
        _check_repeat(name, match.values[name], node, heads)
    if not same_sizes(key.shape[heads : heads + 1], value.shape[heads : heads + 1]):
        raise Reject(f"keys have {key.shape[heads]} heads, values {value.shape[heads]}")


def _check_repeat(name: str, source: torch.Tensor, repeated: Any, heads: int) -> None:
    """Raise `Reject` unless each head of [b, h, s, d] stands r times in a row."""
    expand = repeated
    while op_name(expand) != "expand":
        expand = data_inputs(expand)[0]
    before, after = fake(data_inputs(expand)[0]), fake(expand)
    at = heads + 1  # of the new dimension
    one_by_one = (
        source.dim() == 4
        and after.dim() == 5
        and before.shape[at] == 1
        and same_sizes(_without(before, at), source.shape)
        and same_sizes(_without(after, at), source.shape)
        and same_sizes(_as_consumed(repeated, heads), _merged(after, heads))
    )
    if not one_by_one:
        raise Reject(f"the {name} heads are not repeated one by one, in order")


def _without(value: torch.Tensor, dim: int) -> list[Any]:
    return [*value.shape[:dim], *value.shape[dim + 1 :]]


def _merged(value: torch.Tensor, heads: int) -> list[Any]:
    sizes = _without(value, heads + 1)
    sizes[heads] = value.shape[heads] * value.shape[heads + 1]
    return sizes


def _as_consumed(repeated: fx.Node, heads: int) -> list[Any]:
    """The shape of the repeated heads before they are transposed."""
    sizes = list(fake(repeated).shape)
    if heads == 2:
        sizes[1], sizes[2] = sizes[2], sizes[1]
    return sizes


# -- what the mask says ----------------------------------------------------------------------------


def _predicates(match: Match) -> Any:
    """What the mask says, a `Mask` without what is true of every key. `GIVEN` for an input of the
    graph, None for a mask that stays as it is where keys are grouped, which only a CPU's kernel can
    do. Raises `Reject`."""
    if match.values.get("mask") is None:
        return Mask(causal=bool(match.values["is_causal"]))
    try:
        says = masks.read(match.view, match.bindings["mask"])
    except Unreadable as reason:
        if match.pattern.name != "masked" and match.output.device.type == "cpu":
            return None
        if _is_given(match):
            return GIVEN
        raise Reject(str(reason)) from None
    query, key = (fake(node) for node in positional(match.root)[:2])
    if says == Mask():
        return says
    if not says.causal:
        raise Reject("the mask is not causal; the kernels for windows, documents and padding are")
    if not same_sizes(query.shape[2:3], key.shape[2:3]):
        raise Reject(f"there are {query.shape[2]} queries for {key.shape[2]} keys")
    size = query.shape[2]
    if says.window is not None and isinstance(size, int) and says.window >= size:
        says = Mask(says.causal, None, says.documents, says.valid)
    return says


def _is_given(match: Match) -> bool:
    """Is the mask an input of the graph, as where layers are compiled one by one?"""
    view, node = match.view, match.bindings["mask"]
    query, key = (fake(operand) for operand in positional(match.root)[:2])
    value, size = fake(node), query.shape[2:3]
    wanted = [*query.shape[:1], 1, *size, *size]
    fits = value.dtype == torch.bool and value.dim() == 4 and same_sizes(value.shape, wanted)
    while (outside := view.operand(node)) is not None:
        if view.effects.written(node):
            return False
        view, node = outside
    own = node.op == "placeholder" and not view.effects.written(node)
    return own and fits and same_sizes(key.shape[2:3], size)


def _needs_op(says: Mask) -> bool:
    return says != Mask() and says != Mask(causal=True)


def _becomes_cudnn(match: Match) -> bool:
    """May cuDNN run without the mask, and a gradient be asked of it?"""
    return (
        _on_gpu(match.values["query"])
        and match.values.get("mask") is not None
        and match.output.requires_grad
        and _op_takes(match)
    )


def _on_gpu(tensor: torch.Tensor) -> bool:
    """Or is it explained as if it were?"""
    return tensor.device.type in ("cuda", "meta")


def _is_op_in_checkpoint(match: Match, says: Mask) -> bool:
    """Is it an op because a checkpoint computes it again? A checkpoint can name an op, and keep the
    output. To torch attention on a GPU is random, with dropout or without, and in a checkpoint it
    runs under an operator that puts the generator's state back, which takes the host as long as
    the rest of a small layer."""
    gains = match.settings["keep_in_checkpoints"] or _on_gpu(match.values["query"])
    return match.recomputed and gains and says.causal and _op_takes(match)


def join(view: View, matches: list[Match], reject: Any) -> list[Match]:
    """Attention without a mask or repeated heads has its kernel already, but for a checkpoint."""
    return [
        match for match in matches if match.pattern.name != "plain" or _gains_in_checkpoint(match)
    ]


def _gains_in_checkpoint(match: Match) -> bool:
    query, key, value = (match.values[name] for name in ("query", "key", "value"))
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return False
    batch, heads, size, _ = query.shape
    grouped = match.values["enable_gqa"] or same_sizes([heads], key.shape[1:2])
    return (
        grouped
        and same_sizes([batch, size], [key.shape[0], key.shape[2]])
        and same_sizes(key.shape[:3], value.shape[:3])
        and _is_op_in_checkpoint(match, _predicates(match))
    )


def _op_takes(match: Match) -> bool:
    query, value = match.values["query"], match.values["value"]
    if match.values["dropout_p"] not in (0, 0.0):
        return False
    if not _on_gpu(query):
        return same_sizes(query.shape[-1:], value.shape[-1:])
    return not query.shape[-1] % 8 and not _no_flash(match.output.dtype, query, value)


def _check_op(match: Match, says: Mask, query: Any, key: Any, value: Any) -> None:
    if says != GIVEN and says.documents is not None and says.valid is not None:
        raise Reject("the mask tells of documents and of padding; no kernel takes both")
    if match.values["dropout_p"] not in (0, 0.0):
        raise Reject("dropout; the kernels for windows, documents and padding drop nothing")
    size = query.shape[-1]
    varies = isinstance(size, torch.SymInt) and size.node.expr.free_symbols
    if match.values["scale"] is None and varies:
        raise Reject(f"the size of a head, {size}, may vary, and with it the scale")
    for source in () if says == GIVEN else filter(None, (says.documents, says.valid)):
        given = list(fake(source.node).shape)
        wanted = [query.shape[0], query.shape[2]]
        if not agreeing_sizes(given if len(given) > 1 else [1, *given], wanted):
            raise Reject(f"{source.node.name} is {given}, where queries are {wanted}")
    if _on_gpu(query):
        _require(_no_flash(match.output.dtype, query, value))
        if query.shape[-1] % 8:
            raise Reject(f"heads have {query.shape[-1]} elements; the kernels take multiples of 8")
    elif not same_sizes(query.shape[-1:], value.shape[-1:]):
        raise Reject(f"keys have {query.shape[-1]} elements, values {value.shape[-1]}")


def _require(reason: str) -> None:
    if reason:
        raise Reject(reason)


def _ungrouped(match: Match) -> str:
    """Why PyTorch would fall back to attention that stores all scores, if keys were grouped."""
    query, value = match.values["query"], match.values["value"]
    if query.device.type == "cpu":
        return ""
    return _no_flash(match.output.dtype, query, value)


def _no_flash(dtype: torch.dtype, query: torch.Tensor, value: torch.Tensor) -> str:
    """Why neither flash nor cuDNN attention runs; empty if one does."""
    cuda = torch.backends.cuda
    if dtype not in (torch.bfloat16, torch.float16):
        return f"attention runs in {dtype}; flash and cuDNN attention take bf16 and fp16"
    if not same_sizes(query.shape[-1:], value.shape[-1:]):
        return f"keys have {query.shape[-1]} elements, values {value.shape[-1]}"
    if query.shape[-1] > MAX_HEAD_SIZE:
        return f"heads have {query.shape[-1]} elements; flash attention takes {MAX_HEAD_SIZE}"
    if not cuda.flash_sdp_enabled() and not cuda.cudnn_sdp_enabled():
        return "flash and cuDNN attention are switched off"
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "this GPU has no flash attention, which takes compute capability 8.0"
    return ""


# -- the replacement -------------------------------------------------------------------------------


def replace(
    match: Match,
    query,
    key,
    value,
    scale,
    mask=None,
    dropout_p=0.0,
    is_causal=False,
    segments=None,
    rows=None,
    after=None,
    facts=None,
    window=None,
):
    if match.pattern.name == "planned":
        return ops.attention(query, key, value, segments, rows, after, facts, window, scale)
    given = {"query": query, "key": key, "value": value}
    query, key, value = cast_as_autocast(match, match.output.dtype, given)
    if match.pattern.name == "heads_second":
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    says = _predicates(match)
    if says == GIVEN:
        return ops.masked_attention(query, key, value, mask, _scale(match, scale))
    if says is not None and (
        _needs_op(says) or _becomes_cudnn(match) or _is_op_in_checkpoint(match, says)
    ):
        plan = _plan(match, says, query.tracer)
        return ops.attention(query, key, value, *plan, says.window, _scale(match, scale))
    if says is not None:
        mask, is_causal = None, says.causal
    grouped = match.values.get("enable_gqa", True)
    if match.pattern.name != "masked" and _ungrouped(match):
        grouped = False
        key, value = (fx.Proxy(node, query.tracer) for node in positional(match.root)[1:3])
    options = {"enable_gqa": True} if grouped else {}
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, **options
    )


def _scale(match: Match, scale: Any) -> Any:
    return int(match.values["query"].shape[-1]) ** -0.5 if scale is None else scale


def _plan(match: Match, says: Mask, tracer: Any) -> tuple[Any, ...]:
    """segments, rows, after and facts, computed once where documents or padding are known."""
    if says.documents is not None:
        found = _computed(ops.document_plan, says.documents)
    elif says.valid is not None:
        found = _computed(ops.padding_plan, says.valid)
    else:
        return (None,) * 4
    source = says.documents or says.valid
    assert source is not None
    inside = (carry_in(match.view, source.view, node) for node in found)
    return tuple(fx.Proxy(node, tracer) for node in inside)


def _computed(op: Callable[..., Any], source: Source) -> list[fx.Node]:
    """The outputs of ``op`` on the source, as nodes of its graph: those that are there already, or
    new ones right after the source."""
    graph, node = source.view.graph, source.node
    call = next((user for user in node.users if _PLAN in user.meta and user.target is op), None)
    if call is None:
        after = node
        while after.next.op == "placeholder":
            after = after.next
        with graph.inserting_after(after):
            call = graph.call_function(op, (node,))
        with fake(node).fake_mode, torch.no_grad():
            call.meta["example_value"] = op(fake(node))
        call.meta[_PLAN] = True  # a user's own call may stand further down
    found = {user.args[1]: user for user in call.users}
    for i, value in enumerate(fake(call)):
        if i not in found:
            with graph.inserting_after(call):
                found[i] = graph.call_function(getitem, (call, i))
            found[i].meta["example_value"] = value
    return [found[i] for i in range(4)]


def variant(match: Match) -> str:
    """What the mask says, if one is given and can be read."""
    if match.values.get("mask") is None:
        return ""
    try:
        says = _predicates(match)
    except Reject:
        return ""  # `check` says so
    return "" if says is None else str(says)


def saved(match: Match) -> list[str]:
    """A mask that is read is not kept: later code may do with it as it likes."""
    stays = match.pattern.name != "planned" and _predicates(match) in (None, GIVEN)
    return ["query", "key", "value", "output", *["mask"] * stays]


attention = Rewrite(
    name="attention",
    patterns=[heads_first, heads_second, masked, planned, plain],
    check=check,
    join=join,
    replace=replace,
    variant=variant,
    saved=saved,
    settings={"keep_in_checkpoints": False},
    save_ops=lambda settings: _OPS if settings["keep_in_checkpoints"] else (),
)
