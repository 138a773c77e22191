"""``liger_fx::rope``, ``liger_fx::rope_interleaved``: rotary position embeddings (Su et al. 2021).

There are two conventions, never to be mixed up. Both turn pairs ``(a, b)`` of a head's elements:

- `rope`: element i with element ``i + R / 2`` (Hugging Face; torchtune's Phi-3 and Qwen2). The
  tables have a cosine and a sine for each of the two elements, in their left and right halves:
  ``(a cos1 - b sin1, b cos2 + a sin2)``. In models the halves are equal, which makes it a rotation;
  nothing here relies on that;
- `rope_interleaved`: element 2i with element ``2i + 1`` (Meta's and torchtune's Llama, Mistral,
  Gemma). A pair has one angle: ``(a cos - b sin, b cos + a sin)``.

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


def _halves_torch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    rotary = cos.shape[-1]
    half = rotary // 2
    out = _copy(x)
    pair, cos_pair, sin_pair = (
        (t[..., :half], t[..., half:rotary]) for t in (x, cos.unsqueeze(2), sin.unsqueeze(2))
    )
    out[..., :half], out[..., half:rotary] = _rotate(pair, cos_pair, sin_pair, inverse)
    return out


def _pairs_torch(x: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    cos, sin = angles.unsqueeze(2).unbind(-1)
    out = _copy(x)
    pair = x[..., ::2], x[..., 1::2]
    out[..., ::2], out[..., 1::2] = _rotate(pair, (cos, cos), (sin, sin), inverse)
    return out


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# -- Triton ---------------------------------------------------------------------------------------


def _halves_triton(liger: Any, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    from liger_fx.ops.rope_triton import rotate_halves

    x, cos, sin = map(_rows_in_order, (x, cos, sin))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rotate_halves(x, cos, sin, out, inverse)
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

_halves = kernel(
    "rope_forward(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    fake=lambda x, cos, sin, inverse: x.new_empty(x.shape),
    plain=_halves_torch,
    cuda=_halves_triton,
    liger="rope",
)
_pairs = kernel(
    "rope_interleaved_forward(Tensor x, Tensor angles, bool inverse) -> Tensor",
    fake=lambda x, angles, inverse: x.new_empty(x.shape),
    plain=_pairs_torch,
    cuda=_pairs_triton,
    liger="llama4_rope",
)


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return _halves(x, cos, sin, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return rope(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, angles, inverse):
        ctx.save_for_backward(angles)
        ctx.inverse = inverse
        return _pairs(x, angles, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return rope_interleaved(grad, *ctx.saved_tensors, not ctx.inverse), None, None


def _rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotate the first R elements of each head by halves.

    x: [b, s, h, d], float32, bfloat16 or float16 (on a CPU float64 as well), in any layout. cos,
    sin: [1 or b, s, R] of a floating dtype, R even and at most d: the left half is for elements
    before ``R / 2``, the right half for those after. They get no gradient. inverse: apply the
    transpose, which with equal halves rotates backwards. Computed in fp32. Returns a contiguous
    tensor of x's shape and dtype.
    """
    return _Halves.apply(x, cos, sin, inverse)


def _rope_interleaved(x: Tensor, angles: Tensor, inverse: bool) -> Tensor:
    """Rotate neighbouring elements of each head.

    x: [b, s, h, d], d even, float32, bfloat16 or float16 (on a CPU float64 as well), in any layout.
    angles: [1 or b, s, d / 2, 2] of a floating dtype, cos and sin; they get no gradient. inverse:
    rotate backwards. Computed in fp32. Returns a contiguous tensor of x's shape and dtype.
    """
    return _Pairs.apply(x, angles, inverse)


rope = differentiable("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor", _rope)
rope_interleaved = differentiable(
    "rope_interleaved(Tensor x, Tensor angles, bool inverse) -> Tensor", _rope_interleaved
)
