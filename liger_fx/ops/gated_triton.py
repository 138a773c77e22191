"""Gated activations as Triton kernels: what Liger has no kernel for.

- ``act(gate) * up`` for the exact GELU, and for halves of one tensor that are gated by GELU.
- Its backward together with the product itself. Liger's backward leaves the product to its forward
  kernel: whoever has only gate and up, as the backward of a recomputed MLP has, would read both
  twice.
- GPT-OSS's gate, which clamps both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from liger_fx.ops.clamped_swiglu import PASSES_AT_THE_LIMIT

_BLOCK = 4096
_PASSES_AT_THE_LIMIT = tl.constexpr(PASSES_AT_THE_LIMIT)

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "clamped_silu": 3}


def product(
    gate: Tensor, up: Tensor, out: Tensor, activation: str, alpha: float = 0.0, limit: float = 0.0
) -> None:
    """Write ``act(gate) * up``.

    gate, up: [rows, columns] in any layout. out: the same, contiguous. activation: a key of
    `ACTIVATIONS`. Computed in fp32; SiLU and GELU are rounded to the dtype before the product, as
    in eager. "clamped_silu" is ``g sigmoid(alpha g) (u + 1)``, rounded once, with
    ``g = min(gate, limit)`` and u clamped to limit on both sides.
    """
    rows, columns = out.shape
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(columns))
        _product_kernel[(rows, triton.cdiv(columns, block))](
            *(gate, up, out, *gate.stride(), *up.stride(), columns, alpha, limit),
            ACTIVATION=ACTIVATIONS[activation],
            BLOCK=block,
            num_warps=_warps(block),
        )


def gradients(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor,
    activation: str,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> None:
    """Write the gradients of gate and up: those of `product`. All [rows, columns], grad contiguous;
    grad_gate and grad_up, which may be gate and up, in one layout."""
    rows, columns = grad.shape
    if grad.numel():
        block = min(_BLOCK, triton.next_power_of_2(columns))
        _gradients_kernel[(rows, triton.cdiv(columns, block))](
            *(gate, up, grad, grad_gate, grad_up, *gate.stride(), *up.stride()),
            *(*grad_gate.stride(), columns, alpha, limit),
            ACTIVATION=ACTIVATIONS[activation],
            BLOCK=block,
            num_warps=_warps(block),
        )


def gradients_and_product(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> None:
    """Write over gate and up their gradients, and over ``grad``, the product's, the product.

    All contiguous, of one shape and dtype. activation: a key of `ACTIVATIONS`, without a clamp.
    Computed in fp32; the activation is rounded to the dtype before the product, as in eager.
    """
    size = gate.numel()
    if size:
        grid = (triton.cdiv(size, _BLOCK),)
        _gradients_and_product_kernel[grid](
            gate, up, grad, size, ACTIVATION=ACTIVATIONS[activation], BLOCK=_BLOCK, num_warps=8
        )


def _warps(block: int) -> int:
    """16 elements to a thread."""
    return min(8, max(1, block // 512))


@triton.jit
def _product_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_row,
    gate_column,
    up_row,
    up_column,
    columns,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_ptr + row * gate_row + column * gate_column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_row + column * up_column, mask=inside, other=0.0)
    dtype = out_ptr.dtype.element_ty
    act, _, factor, _ = _parts(gate.to(tl.float32), up.to(tl.float32), alpha, limit, ACTIVATION)
    if ACTIVATION != 3:
        act = act.to(dtype).to(tl.float32)
    tl.store(out_ptr + row * columns + column, (act * factor).to(dtype), mask=inside)


@triton.jit
def _gradients_kernel(
    gate_ptr,
    up_ptr,
    grad_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    gate_row,
    gate_column,
    up_row,
    up_column,
    out_row,
    out_column,
    columns,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_ptr + row * gate_row + column * gate_column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_row + column * up_column, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    dtype = grad_gate_ptr.dtype.element_ty
    act, slope, factor, kept = _parts(
        gate.to(tl.float32), up.to(tl.float32), alpha, limit, ACTIVATION
    )
    if ACTIVATION != 3:
        act = act.to(dtype).to(tl.float32)
    target = row * out_row + column * out_column
    tl.store(grad_gate_ptr + target, (grad * factor * slope).to(dtype), mask=inside)
    tl.store(grad_up_ptr + target, tl.where(kept, grad * act, 0.0).to(dtype), mask=inside)


@triton.jit
def _gradients_and_product_kernel(
    gate_ptr, up_ptr, grad_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    act, slope, _, _ = _parts(gate, up, 0.0, 0.0, ACTIVATION)
    dtype = gate_ptr.dtype.element_ty
    act = act.to(dtype).to(tl.float32)
    tl.store(gate_ptr + offsets, (grad * up * slope).to(dtype), mask=inside)
    tl.store(up_ptr + offsets, (grad * act).to(dtype), mask=inside)
    tl.store(grad_ptr + offsets, (act * up).to(dtype), mask=inside)


@triton.jit
def _parts(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """(act, slope, factor, kept): the product is ``act * factor``, slope is the derivative of act
    by the gate, and ``kept`` where that of the factor by up is 1 and not 0. All in fp32."""
    factor, kept = up, up == up
    if ACTIVATION == 2:
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # sqrt(1 / 2)
        act = gate * cdf
        slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)  # sqrt(1 / 2 pi)
    else:
        # All are x sigmoid(u): u = x for SiLU, and 1 + tanh(t) = 2 sigmoid(2 t) for GELU.
        if ACTIVATION == 1:
            u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
            du = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
        elif ACTIVATION == 3:
            if _PASSES_AT_THE_LIMIT:
                free = gate <= limit
                kept = tl.abs(up) <= limit
            else:
                free = gate < limit
                kept = tl.abs(up) < limit
            gate = tl.where(gate > limit, limit, gate)  # nan stays nan
            u = alpha * gate
            du = alpha
            factor = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        else:
            u = gate
            du = 1.0
        sigmoid = tl.sigmoid(u)
        act = gate * sigmoid
        slope = sigmoid + act * (1.0 - sigmoid) * du
        if ACTIVATION == 3:
            slope = tl.where(free, slope, 0.0)
    return act, slope, factor, kept
