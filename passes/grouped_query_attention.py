"""Attention over repeated keys and values -> ``scaled_dot_product_attention(enable_gqa=True)``.

Matches      ``scaled_dot_product_attention`` over heads repeated by unsqueeze, expand and reshape:
             torchtune and Hugging Face on [b, h, s, d], torchtitan on [b, s, h, d].
Leaves alone heads repeated in another order; on a GPU attention with a mask or in float32 (the
             kernels for these want as many keys as queries), and sizes that no fused kernel takes.
Numerics     The same kernel of PyTorch's, which reads each key for all its queries and sums the
             gradient of a key over them itself: on a CPU in the dtype of the key.
"""

from typing import Any

import torch
import torch.nn.functional as F
from liger_fx.passes._rows import cast_as_autocast
from torch import fx

from liger_fx.canonical import fake, op_name, positional, same_sizes
from liger_fx.matcher import Match, Reject, data_inputs
from liger_fx.rewrite import Rewrite

MAX_HEAD_SIZE = 256  # of PyTorch's flash attention


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


def _repeated(x):
    return x.reshape(-1).expand(-1).reshape(-1)  # `check` looks at the shapes


def check(match: Match, query, key, value, mask, dropout_p, is_causal, scale):
    heads = 1 if match.pattern.name == "heads_first" else 2
    operands = dict(zip(("key", "value"), positional(match.root)[1:3], strict=True))
    for name, node in operands.items():
        _check_repeat(name, match.values[name], node, heads)
    wanted = fake(operands["key"]).shape
    if query.dim() != 4 or not same_sizes(query.shape[1:2], wanted[1:2]):
        raise Reject(f"queries are {list(query.shape)}, repeated keys {list(wanted)}: other heads")
    if not same_sizes(key.shape[heads : heads + 1], value.shape[heads : heads + 1]):
        raise Reject(f"keys have {key.shape[heads]} heads, values {value.shape[heads]}")
    if query.device.type != "cpu":
        _check_kernel(match.output.dtype, query, value, mask)


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


def _check_kernel(dtype: torch.dtype, query: torch.Tensor, value: torch.Tensor, mask: Any) -> None:
    """Raise `Reject` where PyTorch would fall back to attention that stores all scores."""
    if mask is not None:
        raise Reject("a mask is given; the kernels for masks want as many keys as queries")
    if dtype not in (torch.bfloat16, torch.float16):
        raise Reject(f"attention runs in {dtype}; kernels that group queries take bf16 and fp16")
    if not same_sizes(query.shape[-1:], value.shape[-1:]):
        raise Reject(f"keys have {query.shape[-1]} elements, values {value.shape[-1]}")
    if query.shape[-1] > MAX_HEAD_SIZE:
        raise Reject(f"heads have {query.shape[-1]} elements; the kernels take {MAX_HEAD_SIZE}")
    cuda = torch.backends.cuda
    if not cuda.flash_sdp_enabled() and not cuda.cudnn_sdp_enabled():
        raise Reject("flash and cuDNN attention, which group queries, are switched off")
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        raise Reject("this GPU has no kernel that groups queries; it takes compute capability 8.0")


def replace(match: Match, query, key, value, mask, dropout_p, is_causal, scale):
    given = {"query": query, "key": key, "value": value}
    query, key, value = cast_as_autocast(match, match.output.dtype, given)
    if match.pattern.name == "heads_second":
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=True
    )


grouped_query_attention = Rewrite(
    name="grouped_query_attention",
    patterns=[heads_first, heads_second],
    check=check,
    replace=replace,
    saved=["query", "key", "value", "mask", "output"],
)
