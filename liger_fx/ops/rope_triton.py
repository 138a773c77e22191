"""Rotation of neighbouring elements, as one Triton kernel out of place.

Liger's kernel rotates in place, so that a copy has to be made first, and takes a program for each
head of each token: four passes over the tensor instead of two, by programs of 64 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def rotate_pairs(x: Tensor, angles: Tensor, out: Tensor, inverse: bool) -> None:
    """Write ``(a cos - b sin, b cos + a sin)`` of each pair of ``x`` into ``out``, in fp32.

    x: [b, s, h, d] with unit stride in d. angles: float32 [1 or b, s, d / 2, 2], contiguous. out:
    [b, s, h, d], contiguous. inverse: by the negative angles.
    """
    batch, seq, heads, size = x.shape
    if not x.numel():
        return
    heads_padded, size_padded = map(triton.next_power_of_2, (heads, size))
    _rotate_pairs_kernel[(batch * seq,)](
        *(x, angles, out, x.stride(0), x.stride(1), x.stride(2)),
        *(seq, angles.shape[0], heads),
        SIZE=size,
        HEADS_PADDED=heads_padded,
        SIZE_PADDED=size_padded,
        INVERSE=inverse,
        num_warps=min(8, max(1, heads_padded * size_padded // 256)),  # 8 elements to a thread
    )


@triton.jit
def _rotate_pairs_kernel(
    x_ptr,
    angles_ptr,
    out_ptr,
    batch_stride,
    seq_stride,
    head_stride,
    seq,
    tables,
    heads,
    SIZE: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    sequence, position = token // seq, token % seq
    head = tl.arange(0, HEADS_PADDED)[:, None]
    element = tl.arange(0, SIZE_PADDED)[None, :]
    inside = (head < heads) & (element < SIZE)

    x_ptr += sequence * batch_stride + position * seq_stride
    x = tl.load(x_ptr + head * head_stride + element, mask=inside, other=0.0).to(tl.float32)
    row = (sequence % tables) * seq + position  # one table for all sequences, or one for each
    angle = tl.load(angles_ptr + row * SIZE + element, mask=element < SIZE, other=0.0)
    # Whole rows are loaded, and the pairs taken apart in registers.
    a, b = tl.split(tl.reshape(x, (HEADS_PADDED, SIZE_PADDED // 2, 2)))
    cos, sin = tl.split(tl.reshape(angle, (1, SIZE_PADDED // 2, 2)))
    if INVERSE:
        sin = -sin
    rotated = tl.join(a * cos - b * sin, b * cos + a * sin)
    rotated = tl.reshape(rotated, (HEADS_PADDED, SIZE_PADDED)).to(out_ptr.dtype.element_ty)
    out_ptr += token * heads * SIZE
    tl.store(out_ptr + head * SIZE + element, rotated, mask=inside)
