"""``liger_fx::rope``, ``liger_fx::rope_interleaved``: rotary position embeddings (Su et al. 2021).

There are two conventions, never to be mixed up. Both turn pairs ``(a, b)`` of a head's elements: by
halves, element i with element ``i + R / 2`` (Hugging Face; torchtune's Phi-3 and Qwen2); or
neighbours, element 2i with element ``2i + 1`` (Meta's and torchtune's Llama, Mistral, Gemma).

- `rope`: the tables have a cosine and a sine for each of the two elements:
  ``(a cos1 - b sin1, b cos2 + a sin2)``. In models the two are equal, which makes it a rotation;
  nothing here relies on that. By halves, of neighbours (Cohere, GLM, GPT-J), or from one to the
  other (DeepSeek-V3);
- `rope_interleaved`: neighbours, in one table of cosines and sines. A pair has one angle:
  ``(a cos - b sin, b cos + a sin)``.

Both are linear in x, so the derivative is the transpose: the op itself with ``inverse`` set, any
number of times. The transpose of a rotation is the rotation backwards. The kernels are our own
(`rope_triton`): Liger's rotate in place, and would need a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.library import differentiable, kernel

# -- plain PyTorch --------------------------------------------------------------------------------


def _rotate(
    pair: Sequence[Tensor], cos: Sequence[Tensor], sin: Sequence[Tensor], inverse: bool
) -> tuple[Tensor, Tensor]:
    """In fp32 or wider. pair, cos, sin: those of the first and of the second element."""
    wide = torch.promote_types(pair[0].dtype, torch.float32)
    a, b, cos1, cos2, sin1, sin2 = (t.to(wide) for t in (*pair, *cos, *sin))
    if inverse:
        sin1, sin2 = -sin2, -sin1
    return a * cos1 - b * sin1, b * cos2 + a * sin2


def _rope_torch(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    from_pairs: bool,
    to_pairs: bool,
    heads_first: bool,
) -> Tensor:
    rotary, heads = cos.shape[-1], 1 if heads_first else 2
    out = _copy(x)
    pair, tables = _pair(x, rotary, from_pairs), (cos.unsqueeze(heads), sin.unsqueeze(heads))
    cos_pair, sin_pair = (_pair(t, rotary, from_pairs and to_pairs) for t in tables)
    rotated = _rotate(pair, cos_pair, sin_pair, inverse)
    for target, element in zip(_pair(out, rotary, to_pairs), rotated, strict=True):
        target.copy_(element)
    return out


def _pair(t: Tensor, rotary: int, pairs: bool) -> tuple[Tensor, Tensor]:
    """The first and the second elements of the pairs of ``t [..., rotary or more]``."""
    if pairs:
        return t[..., :rotary:2], t[..., 1:rotary:2]
    return t[..., : rotary // 2], t[..., rotary // 2 : rotary]


def _pairs_torch(x: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    cos, sin = angles.unsqueeze(2).unbind(-1)
    out = _copy(x)
    pair = x[..., ::2], x[..., 1::2]
    out[..., ::2], out[..., 1::2] = _rotate(pair, (cos, cos), (sin, sin), inverse)
    return out


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# -- Triton ---------------------------------------------------------------------------------------


def _rope_triton(
    liger: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    from_pairs: bool,
    to_pairs: bool,
    heads_first: bool,
) -> Tensor:
    from liger_fx.ops.rope_triton import rotate

    x, cos, sin = map(_rows_in_order, (x, cos, sin))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    both = (x.transpose(1, 2), out.transpose(1, 2)) if heads_first else (x, out)
    rotate(both[0], cos, sin, both[1], inverse, from_pairs, to_pairs)
    return out


def _pairs_triton(liger: Any, x: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    from liger_fx.ops.rope_triton import rotate_pairs

    x = _rows_in_order(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rotate_pairs(x, angles.float().contiguous(), out, inverse)  # in fp32 as the models do
    return out


def _rows_in_order(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# -- the ops --------------------------------------------------------------------------------------

_turn = kernel(
    "rope_forward(Tensor x, Tensor cos, Tensor sin, bool inverse, bool from_pairs, bool to_pairs,"
    " bool heads_first) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    plain=_rope_torch,
    cuda=_rope_triton,
    liger="rope",
)
_pairs = kernel(
    "rope_interleaved_forward(Tensor x, Tensor angles, bool inverse) -> Tensor",
    fake=lambda x, angles, inverse: x.new_empty(x.shape),
    plain=_pairs_torch,
    cuda=_pairs_triton,
    liger="llama4_rope",
)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, inverse, from_pairs, to_pairs, heads_first):
        ctx.save_for_backward(cos, sin)
        ctx.transposed = (not inverse, to_pairs, from_pairs, heads_first)
        return _turn(x, cos, sin, inverse, from_pairs, to_pairs, heads_first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return rope(grad, *ctx.saved_tensors, *ctx.transposed), *(None,) * 6


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, angles, inverse):
        ctx.save_for_backward(angles)
        ctx.inverse = inverse
        return _pairs(x, angles, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return rope_interleaved(grad, *ctx.saved_tensors, not ctx.inverse), None, None


def _rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    from_pairs: bool = False,
    to_pairs: bool = False,
    heads_first: bool = False,
) -> Tensor:
    """Rotate the first R elements of each head.

    x: [b, s, h, d] or, with ``heads_first``, [b, h, s, d], float32, bfloat16 or float16 (on a CPU
    float64 as well), in any layout. cos, sin: [1 or b, s, R] of a floating dtype, R even and at
    most d; they get no gradient. from_pairs: what is turned together are neighbours in x, else
    elements ``R / 2`` apart. to_pairs: so it is in the result. The tables have their elements as
    neighbours if both are so, else ``R / 2`` apart. inverse: turn each pair by the transpose, which
    with equal angles is backwards. Computed in fp32. Returns a contiguous tensor of x's shape and
    dtype.
    """
    return _Turn.apply(x, cos, sin, inverse, from_pairs, to_pairs, heads_first)


def _rope_interleaved(x: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    """Rotate neighbouring elements of each head.

    x: [b, s, h, d], d even, float32, bfloat16 or float16 (on a CPU float64 as well), in any layout.
    angles: [1 or b, s, d / 2, 2] of a floating dtype, cos and sin; they get no gradient. inverse:
    rotate backwards. Computed in fp32. Returns a contiguous tensor of x's shape and dtype.
    """
    return _Pairs.apply(x, angles, inverse)


rope = differentiable(
    "rope(Tensor x, Tensor cos, Tensor sin, bool inverse, bool from_pairs=False,"
    " bool to_pairs=False, bool heads_first=False) -> Tensor",
    _rope,
)
rope_interleaved = differentiable(
    "rope_interleaved(Tensor x, Tensor angles, bool inverse) -> Tensor", _rope_interleaved
)
