"""Softmax attention written out -> ``scaled_dot_product_attention`` under the same mask.

Matches      ``softmax(query @ key.mT * scale + mask) @ value`` on [b, h, s, d], as Hugging Face's
             ``attn_implementation="eager"``, nanoGPT without flash and GPT-2 have it. The mask is
             added, filled in by ``masked_fill``, or chosen by ``where``.
Becomes      ``scaled_dot_product_attention`` under that mask, which the rewrite `attention` reads
             next.
Leaves alone weights that are returned or used elsewhere; dropout, which would draw other random
             numbers; padding, since a query that sees no key gets NaN from softmax, or attends to
             all keys where the mask is finite, and the kernels give zeros; capped scores; attention
             without a mask; on a GPU float32.
Numerics     Those of PyTorch's kernels, which keep scores and weights in float32. In bf16 gradients
             of queries and keys are nearer to fp64, of values up to 1.4 times as far (CPU); in
             float32 gradients stay within 2e-6 of fp64, up to 2.4 times as far as written out.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from liger_fx.passes._rows import cast_as_autocast
from torch import fx

from liger_fx import masks
from liger_fx.canonical import fake, op_name, positional, same_sizes
from liger_fx.masks import Mask, Unreadable
from liger_fx.matcher import Match, Reject
from liger_fx.pattern import chain
from liger_fx.rewrite import Rewrite


def added(query, key, value, mask, i, j, dim, dtype):
    return _attended(_scores(query, key, i, j) + mask, value, dim, dtype)


def filled(query, key, value, hidden, number, i, j, dim, dtype):
    scores = _scores(query, key, i, j).masked_fill(hidden, number)
    return _attended(scores, value, dim, dtype)


def chosen(query, key, value, seen, number, i, j, dim, dtype):
    scores = torch.where(seen, _scores(query, key, i, j), number)
    return _attended(scores, value, dim, dtype)


def _scores(query, key, i, j):
    return scaled(torch.matmul(query, key.transpose(i, j)))


def _attended(scores, value, dim, dtype):
    return torch.matmul(weights(F.softmax(widened(scores), dim, dtype=dtype)), value)


def _widens(node: fx.Node) -> bool:
    if op_name(node) != "cast":
        return False
    before, after = fake(node.args[0]).dtype, fake(node).dtype
    return before.is_floating_point and torch.promote_types(before, after) == after


def _scales_or_widens(node: fx.Node) -> fx.Node | bool:
    """Also the scores that ``node`` multiplies or divides by a number."""
    if op_name(node) not in ("mul", "div") or _factor(node) is None:
        return _widens(node)
    return next(arg for arg in node.args if isinstance(arg, fx.Node))


def _factor(node: fx.Node) -> float | None:
    """What the scores are multiplied by; None if that is no number."""
    numbers = [arg for arg in node.args if isinstance(arg, int | float)]
    if len(node.args) != 2 or len(numbers) != 1 or node.kwargs:
        return None
    if op_name(node) == "mul":
        return numbers[0]
    return 1 / numbers[0] if node.args[1] is numbers[0] and numbers[0] else None


def _scale(match: Match) -> float:
    factors = map(_factor, match.chains["scaled"])
    return math.prod(factor for factor in factors if factor is not None)


def _casts_or_drops(node: fx.Node) -> bool:
    return op_name(node) in ("cast", "dropout")


scaled = chain("scaled", _scales_or_widens)
widened = chain("widened", _widens)
weights = chain("weights", _casts_or_drops)


def check(match: Match, query, key, value, i, j, dim, dtype, number=-math.inf) -> None:
    if any(tensor.dim() != 4 for tensor in (query, key, value)):
        raise Reject("queries, keys or values are not [batch, heads, tokens, elements]")
    if (i, j) != (2, 3) or dim != -1:
        raise Reject("softmax is not over the keys of scores of queries and transposed keys")
    if _scale(match) <= 0:
        raise Reject(f"scores are scaled by {_scale(match)}, for which the kernels give NaN")
    _check_shapes(match, query, key, value)
    _check_dtypes(match, dtype)
    _check_dropout(match)
    least = torch.finfo(fake(match.sources["widened"]).dtype).min
    if not isinstance(number, float) or number > least:
        raise Reject(f"keys are hidden by {number}; expected minus infinity or {least}")
    _check_mask(match)


def _check_shapes(match: Match, query: Any, key: Any, value: Any) -> None:
    alike = same_sizes(query.shape[:2], key.shape[:2])
    alike &= same_sizes(key.shape[:3], value.shape[:3])
    alike &= same_sizes(match.output.shape, [*query.shape[:3], value.shape[-1]])
    if not alike:
        raise Reject("queries, keys, values or the mask are broadcast over each other")


def _check_dtypes(match: Match, dtype: torch.dtype | None) -> None:
    output, scores = match.output.dtype, fake(match.sources["scaled"]).dtype
    if scores != output:
        raise Reject(f"scores are computed in {scores}, the output in {output}")
    if match.output.device.type == "cuda" and output not in (torch.bfloat16, torch.float16):
        raise Reject(f"attention runs in {output}; flash and cuDNN attention take bf16 and fp16")
    if dtype not in (None, output, torch.float32):
        raise Reject(f"softmax runs in {dtype}; the kernels compute it in float32")


def _check_dropout(match: Match) -> None:
    for node in match.chains["weights"]:
        if op_name(node) == "dropout":
            _, share, training = positional(node)
            if training and share:
                raise Reject(f"dropout of {share}: another kernel draws other random numbers")


def _check_mask(match: Match) -> None:
    name = next(name for name in ("mask", "hidden", "seen") if name in match.bindings)
    node, value = match.bindings[name], match.values[name]
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        raise Reject("the mask is not a tensor over queries and keys")
    if value.is_floating_point() != (name == "mask"):
        raise Reject(f"the mask {node.name} is {value.dtype}, and added to the scores")
    try:
        says = masks.read(match.view, node, hides=name == "hidden")
    except Unreadable as reason:
        raise Reject(str(reason)) from None
    queries, keys = match.values["query"].shape[2:3], match.values["key"].shape[2:3]
    itself = says.valid is None and same_sizes(queries, keys)
    if says != Mask() and not itself:
        raise Reject("a query may see no key: its softmax is NaN, the kernels give zeros")


def replace(match: Match, query, key, value, mask=None, hidden=None, seen=None):
    given = {"query": query, "key": key, "value": value}
    dtype = match.output.dtype
    query, key, value = cast_as_autocast(match, dtype, given)
    if mask is not None:
        (mask,) = cast_as_autocast(match, dtype, {"mask": mask})
    elif hidden is not None:
        mask = torch.logical_not(hidden)
    else:
        mask = seen
    return F.scaled_dot_product_attention(query, key, value, mask, scale=_scale(match))


softmax_attention = Rewrite(
    name="softmax_attention",
    patterns=[added, filled, chosen],
    check=check,
    replace=replace,
    constants=["mask", "hidden", "seen"],
    saved=["query", "key", "value", "mask", "hidden", "seen", "output"],
    gain="scores and weights, [b, h, s, s], are not stored",
)
