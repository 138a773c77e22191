"""``liger_fx::swiglu``, ``liger_fx::swiglu_gate_up``: ``silu(gate) * up`` (Shazeer 2020).

The second takes gate and up as the halves of one tensor, as a fused projection makes them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from liger_fx.ops.gated import Activation, gated
from liger_fx.ops.library import block_settings, differentiable, kernel, once_differentiable


def _silu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(x)
    value = x * sigmoid
    return value, sigmoid + value * (1 - sigmoid)


SILU = Activation(
    liger="swiglu",
    plain=F.silu,
    formula=_silu_and_slope,
    forward_kernel=lambda liger: liger._swiglu_forward_kernel,
    backward_kernel=lambda liger: liger._swiglu_backward_kernel,
    scalars=(1.0,),  # a factor on the gate
)
swiglu = gated("swiglu", SILU)


# -- gate and up in one tensor --------------------------------------------------------------------


def _forward_torch(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) * up).contiguous()


def _backward_torch(gate_up: Tensor, grad: Tensor) -> None:
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate, grad_up = SILU.gradients(gate, up, grad)
    gate.copy_(grad_gate)
    up.copy_(grad_up)


def _forward_liger(liger: Any, gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    rows = out.numel() // max(size, 1)
    if rows:
        block, warps = block_settings(size)
        liger._swiglu_fused_gate_up_forward_kernel[(rows,)](
            gate_up, out, 2 * size, size, ffn_size=size, BLOCK_SIZE=block, num_warps=warps
        )
    return out


def _on_a_copy_torch(gate_up: Tensor, grad: Tensor) -> Tensor:
    out = gate_up.clone(memory_format=torch.contiguous_format)
    _backward_torch(out, grad)
    return out


def _backward_liger(liger: Any, gate_up: Tensor, grad: Tensor) -> None:
    _launch_backward(liger, gate_up, gate_up, grad)


def _into_a_new_tensor(liger: Any, gate_up: Tensor, grad: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    out = torch.empty_like(gate_up)
    _launch_backward(liger, gate_up, out, grad)
    return out


def _launch_backward(liger: Any, gate_up: Tensor, out: Tensor, grad: Tensor) -> None:
    size = grad.shape[-1]
    rows = grad.numel() // max(size, 1)
    if not rows:
        return
    block, warps = block_settings(size)
    liger._swiglu_fused_gate_up_backward_kernel[(rows,)](
        *(grad.contiguous(), gate_up, out, 2 * size, size),
        ffn_size=size,
        BLOCK_SIZE=block,
        num_warps=warps,
    )


_forward = kernel(
    "swiglu_gate_up_forward(Tensor gate_up) -> Tensor",
    fake=lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
    plain=_forward_torch,
    cuda=_forward_liger,
    liger="swiglu",
)
_backward = kernel(
    "swiglu_gate_up_backward(Tensor gate_up, Tensor grad) -> Tensor",
    fake=lambda gate_up, grad: gate_up.new_empty(gate_up.shape),
    plain=_on_a_copy_torch,
    cuda=_into_a_new_tensor,
    liger="swiglu",
)
_backward_ = kernel(
    "swiglu_gate_up_backward_(Tensor(a!) gate_up, Tensor grad) -> ()",
    fake=lambda gate_up, grad: None,
    plain=_backward_torch,
    cuda=_backward_liger,
    liger="swiglu",
)


class _SwigluGateUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up, overwrite):
        ctx.save_for_backward(gate_up)
        ctx.overwrite = overwrite
        return _forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        if not ctx.overwrite:
            return _backward(gate_up, grad), None
        return auto_functionalized(_backward_, gate_up=gate_up.contiguous(), grad=grad)[1], None


def _swiglu_gate_up(gate_up: Tensor, overwrite: bool = False) -> Tensor:
    """``silu(gate) * up`` for ``gate_up [..., 2 I]``, the gate first. Returns [..., I], contiguous.

    gate_up: float32, bfloat16 or float16 (on a CPU float64 as well). overwrite: as in
    `liger_fx.ops.gated`. The backward is differentiable once.
    """
    return _SwigluGateUp.apply(gate_up, overwrite)


swiglu_gate_up = differentiable(
    "swiglu_gate_up(Tensor gate_up, bool overwrite=False) -> Tensor", _swiglu_gate_up
)
