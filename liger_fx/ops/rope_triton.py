"""Rotation of pairs of elements, out of place: a Triton kernel for each form of the tables.

Liger's kernels rotate in place, so that a copy has to be made first: four passes over the tensor
instead of two. For neighbouring elements Liger also takes a program for each head of each token.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    inverse: bool,
    from_pairs: bool,
    to_pairs: bool,
) -> None:
    """Rotate the pairs of the first R elements of ``x`` into ``out``, in fp32.

    A pair is elements i and ``i + R / 2`` of x, or 2i and ``2i + 1`` with ``from_pairs``; so it is
    of ``out`` with ``to_pairs``. Its elements, a and b, each have a cosine and a sine, where the
    tables have the pair: ``(a cos1 - b sin1, b cos2 + a sin2)``. Tables are in pairs if both x and
    ``out`` are. The elements after the first R are copied.

    x: [b, s, h, d] with unit stride in d. cos, sin: [1 or b, s, R] with unit stride in R, of any
    floating dtype. out: [b, s, h, d] in the dtype of x, with unit stride in d. inverse: write the
    transpose, ``(a cos1 + b sin2, b cos2 - a sin1)``.
    """
    batch, seq, heads, size = x.shape
    if not x.numel():
        return
    rotary = cos.shape[-1]
    heads_padded = triton.next_power_of_2(heads)
    half_padded = triton.next_power_of_2(rotary // 2)
    rest_padded = triton.next_power_of_2(size - rotary) if size > rotary else 0
    _rotate_kernel[(batch * seq,)](
        *(x, cos, sin, out, x.stride(0), x.stride(1), x.stride(2)),
        *(out.stride(0), out.stride(1), out.stride(2)),
        *(_batch_stride(cos), cos.stride(1), _batch_stride(sin), sin.stride(1)),
        *(seq, heads),
        SIZE=size,
        HALF=rotary // 2,
        HEADS_PADDED=heads_padded,
        HALF_PADDED=half_padded,
        REST_PADDED=rest_padded,
        INVERSE=inverse,
        FROM_PAIRS=from_pairs,
        TO_PAIRS=to_pairs,
        num_warps=_warps(heads_padded * 2 * half_padded),
    )


def rotate_pairs(x: Tensor, angles: Tensor, out: Tensor, inverse: bool) -> None:
    """Rotate elements 2i and ``2i + 1`` of ``x`` into ``out``, in fp32.

    A pair has one cosine and one sine: ``(a cos - b sin, b cos + a sin)``.

    x: [b, s, h, d] with unit stride in d. angles: float32 [1 or b, s, d / 2, 2], contiguous. out:
    [b, s, h, d] in the dtype of x, contiguous. inverse: by the negative angles.
    """
    batch, seq, heads, size = x.shape
    if not x.numel():
        return
    heads_padded, size_padded = map(triton.next_power_of_2, (heads, size))
    _rotate_pairs_kernel[(batch * seq,)](
        *(x, angles, out, x.stride(0), x.stride(1), x.stride(2)),
        *(_batch_stride(angles), seq, heads),
        SIZE=size,
        HEADS_PADDED=heads_padded,
        SIZE_PADDED=size_padded,
        INVERSE=inverse,
        num_warps=_warps(heads_padded * size_padded),
    )


def _batch_stride(table: Tensor) -> int:
    """One table for all sequences, or one for each."""
    return 0 if table.shape[0] == 1 else table.stride(0)


def _warps(elements: int) -> int:
    """8 elements to a thread."""
    return min(8, max(1, elements // 256))


@triton.jit
def _rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    batch_stride,
    seq_stride,
    head_stride,
    out_batch_stride,
    out_seq_stride,
    out_head_stride,
    cos_batch_stride,
    cos_seq_stride,
    sin_batch_stride,
    sin_seq_stride,
    seq,
    heads,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INVERSE: tl.constexpr,
    FROM_PAIRS: tl.constexpr,
    TO_PAIRS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    sequence, position = token // seq, token % seq
    x_ptr += sequence * batch_stride + position * seq_stride
    out_ptr += sequence * out_batch_stride + position * out_seq_stride
    cos_ptr += sequence * cos_batch_stride + position * cos_seq_stride
    sin_ptr += sequence * sin_batch_stride + position * sin_seq_stride

    head = tl.arange(0, HEADS_PADDED)[:, None]
    known = tl.arange(0, 1)[:, None] == 0  # the one row of a table
    a, b = _load_pair(x_ptr + head * head_stride, head < heads, HALF, HALF_PADDED, FROM_PAIRS)
    # Models repeat the left half on the right. Nothing guarantees it, so both halves are read.
    in_pairs: tl.constexpr = FROM_PAIRS and TO_PAIRS
    cos1, cos2 = _load_pair(cos_ptr, known, HALF, HALF_PADDED, in_pairs)
    sin1, sin2 = _load_pair(sin_ptr, known, HALF, HALF_PADDED, in_pairs)
    if INVERSE:
        sin1, sin2 = -sin2, -sin1
    first, second = a * cos1 - b * sin1, b * cos2 + a * sin2
    target = out_ptr + head * out_head_stride
    if TO_PAIRS:
        element = tl.arange(0, 2 * HALF_PADDED)[None, :]
        inside = (head < heads) & (element < 2 * HALF)
        row = tl.reshape(tl.join(first, second), (HEADS_PADDED, 2 * HALF_PADDED))
        tl.store(target + element, row.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        pair = tl.arange(0, HALF_PADDED)[None, :]
        inside = (head < heads) & (pair < HALF)
        tl.store(target + pair, first.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(target + pair + HALF, second.to(out_ptr.dtype.element_ty), mask=inside)

    if REST_PADDED:
        element = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
        inside = (head < heads) & (element < SIZE)
        rest = tl.load(x_ptr + head * head_stride + element, mask=inside)
        tl.store(target + element, rest, mask=inside)


@triton.jit
def _load_pair(rows, known, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, PAIRS: tl.constexpr):
    """The first and the second element of each pair, in fp32, [rows, HALF_PADDED]. rows: pointers
    to the rows that are ``known``, [rows, 1]."""
    if PAIRS:  # whole rows are loaded, and the pairs taken apart in registers
        element = tl.arange(0, 2 * HALF_PADDED)[None, :]
        row = tl.load(rows + element, mask=known & (element < 2 * HALF), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(row, (row.shape[0], HALF_PADDED, 2)))
    else:
        pair = tl.arange(0, HALF_PADDED)[None, :]
        inside = known & (pair < HALF)
        first = tl.load(rows + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(rows + pair + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _rotate_pairs_kernel(
    x_ptr,
    angles_ptr,
    out_ptr,
    batch_stride,
    seq_stride,
    head_stride,
    angles_batch_stride,
    seq,
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
    angles_ptr += sequence * angles_batch_stride + position * SIZE
    angle = tl.load(angles_ptr + element, mask=element < SIZE, other=0.0)
    # Whole rows are loaded, and the pairs taken apart in registers.
    a, b = tl.split(tl.reshape(x, (HEADS_PADDED, SIZE_PADDED // 2, 2)))
    cos, sin = tl.split(tl.reshape(angle, (1, SIZE_PADDED // 2, 2)))
    if INVERSE:
        sin = -sin
    rotated = tl.join(a * cos - b * sin, b * cos + a * sin)
    rotated = tl.reshape(rotated, (HEADS_PADDED, SIZE_PADDED)).to(out_ptr.dtype.element_ty)
    out_ptr += token * heads * SIZE
    tl.store(out_ptr + head * SIZE + element, rotated, mask=inside)
