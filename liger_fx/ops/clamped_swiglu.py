"""``liger_fx::clamped_swiglu``: GPT-OSS's gate, ``g sigmoid(alpha g) (u + 1)``.

``g = min(gate, limit)`` and ``u = clamp(up, -limit, limit)``. Gate and up are neighbours or halves
of one tensor. Computed in fp32 and rounded once, by kernels of our own (`gated_triton`): Liger has
none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.library import differentiable, kernel, once_differentiable

# Whether the gradient passes where a value is at its limit. Eager's does not from torch 2.14 on
# (https://github.com/pytorch/pytorch/pull/191142); in bf16 such values are common.
PASSES_AT_THE_LIMIT = torch.__version__ < "2.14"

# -- plain PyTorch --------------------------------------------------------------------------------


def _gate_and_up(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _forward_torch(gate_up: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
    gate, up = _gate_and_up(_wide(gate_up), interleaved)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * (gate * torch.sigmoid(gate * alpha))).to(gate_up.dtype).contiguous()


def _backward_torch(
    grad: Tensor, gate_up: Tensor, alpha: float, limit: float, interleaved: bool
) -> Tensor:
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    gate, up = _gate_and_up(_wide(gate_up), interleaved)
    below = torch.le if PASSES_AT_THE_LIMIT else torch.lt
    free, kept = below(gate, limit), below(up.abs(), limit)
    gate, up, upstream = gate.clamp(max=limit), up.clamp(-limit, limit), _wide(grad)
    sigmoid = torch.sigmoid(gate * alpha)
    act = gate * sigmoid
    slope = sigmoid + act * (1 - sigmoid) * alpha
    grad_gate, grad_up = _gate_and_up(out, interleaved)
    grad_gate.copy_(torch.where(free, upstream * (up + 1) * slope, 0))
    grad_up.copy_(torch.where(kept, upstream * act, 0))
    return out


# -- Triton ---------------------------------------------------------------------------------------


def _rows(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return _gate_and_up(gate_up.view(-1, gate_up.shape[-1]), interleaved)


def _forward_triton(
    liger: Any, gate_up: Tensor, alpha: float, limit: float, interleaved: bool
) -> Tensor:
    from liger_fx.ops.gated_triton import product

    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    gate, up = _rows(gate_up, interleaved)
    product(gate, up, out.view(-1, out.shape[-1]), "clamped_silu", alpha, limit)
    return out


def _backward_triton(
    liger: Any, grad: Tensor, gate_up: Tensor, alpha: float, limit: float, interleaved: bool
) -> Tensor:
    from liger_fx.ops.gated_triton import gradients

    gate_up = gate_up.contiguous()
    out = torch.empty_like(gate_up)
    rows, upstream = _rows(gate_up, interleaved), grad.reshape(-1, grad.shape[-1]).contiguous()
    gradients(*rows, upstream, *_rows(out, interleaved), "clamped_silu", alpha, limit)
    return out


# -- the op ---------------------------------------------------------------------------------------

_forward = kernel(
    "clamped_swiglu_forward(Tensor gate_up, float alpha, float limit, bool interleaved) -> Tensor",
    fake=lambda gate_up, *_: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    plain=_forward_torch,
    cuda=_forward_triton,
    liger="swiglu",
)
_backward = kernel(
    "clamped_swiglu_backward(Tensor grad, Tensor gate_up, float alpha, float limit,"
    " bool interleaved) -> Tensor",
    fake=lambda grad, gate_up, *_: gate_up.new_empty(gate_up.shape),
    plain=_backward_torch,
    cuda=_backward_triton,
    liger="swiglu",
)


class _ClampedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up, alpha, limit, interleaved):
        ctx.save_for_backward(gate_up)
        ctx.literals = (alpha, limit, interleaved)
        return _forward(gate_up, alpha, limit, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        return _backward(grad, gate_up, *ctx.literals), None, None, None


def _clamped_swiglu(gate_up: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
    """The gate of GPT-OSS's experts for ``gate_up [..., 2 I]``.

    gate_up: float32, bfloat16 or float16 (on a CPU float64 as well). interleaved: gate and up are
    elements 2i and ``2i + 1``, else the first and the second half. limit: at least 0. Returns
    [..., I] in the dtype of gate_up, contiguous. The backward is differentiable once.
    """
    return _ClampedSwiglu.apply(gate_up, alpha, limit, interleaved)


clamped_swiglu = differentiable(
    "clamped_swiglu(Tensor gate_up, float alpha, float limit, bool interleaved) -> Tensor",
    _clamped_swiglu,
)
