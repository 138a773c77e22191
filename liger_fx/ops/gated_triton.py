"""The backward of ``act(gate) * up`` together with the product itself, as one Triton kernel.

Liger's backward leaves the product to its forward kernel: whoever has only gate and up, as the
backward of a recomputed MLP has, would read both twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def gradients_and_product(gate: Tensor, up: Tensor, grad: Tensor, gelu_tanh: bool) -> None:
    """Write over gate and up their gradients, and over ``grad``, the product's, the product.

    All contiguous, of one shape and dtype. ``gelu_tanh``: GELU in its tanh approximation, else
    SiLU. Computed in fp32; the activation is rounded to the dtype before the product, as in eager.
    """
    size = gate.numel()
    if size:
        grid = (triton.cdiv(size, _BLOCK),)
        _gated_gradients_kernel[grid](
            gate, up, grad, size, GELU_TANH=gelu_tanh, BLOCK=_BLOCK, num_warps=8
        )


@triton.jit
def _gated_gradients_kernel(
    gate_ptr, up_ptr, grad_ptr, size, GELU_TANH: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    # Both are x sigmoid(u): u = x for SiLU, and 1 + tanh(t) = 2 sigmoid(2 t) for GELU.
    if GELU_TANH:
        u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
        du = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    else:
        u = gate
        du = 1.0
    sigmoid = tl.sigmoid(u)
    act = gate * sigmoid
    slope = sigmoid + act * (1.0 - sigmoid) * du
    dtype = gate_ptr.dtype.element_ty
    act = act.to(dtype).to(tl.float32)
    tl.store(gate_ptr + offsets, (grad * up * slope).to(dtype), mask=inside)
    tl.store(up_ptr + offsets, (grad * act).to(dtype), mask=inside)
    tl.store(grad_ptr + offsets, (act * up).to(dtype), mask=inside)
