"""Gated activations, ``act(gate) * up``: what `swiglu` and `geglu` share.

Liger's backward writes the gradients of gate and up over gate and up. Here that kernel is an
operator that mutates, and the backward formula calls it through ``auto_functionalized``: functional
in the graph; in eager mode on copies; by Inductor in place where nothing else needs the buffers,
as under activation checkpointing, where they have just been recomputed, and else on copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from liger_fx.ops.library import block_settings, differentiable, kernel

Formula = Callable[[Tensor], tuple[Tensor, Tensor]]


def gated(
    name: str,
    liger: str,
    *,
    activation: Callable[[Tensor], Tensor],
    formula: Formula,
    forward_kernel: Callable[[Any], Any],
    backward_kernel: Callable[[Any], Any],
    scalars: tuple[float, ...] = (),
) -> torch._ops.OpOverload:
    """Register ``liger_fx::<name>(gate, up)``: ``activation(gate) * up``.

    gate, up: of one shape and dtype, float32, bfloat16 or float16 (on a CPU float64 as well). The
    activation is rounded to that dtype before the product, as in eager. The result is contiguous;
    the backward is differentiable once.

    activation: in plain PyTorch. formula: x -> (act(x), act'(x)), in the dtype of x. *_kernel: pick
    Liger's kernel from its module. scalars: what the kernels take between the stride and the number
    of columns.
    """

    def forward_torch(gate: Tensor, up: Tensor) -> Tensor:
        return (activation(gate) * up).contiguous()

    def backward_torch(gate: Tensor, up: Tensor, grad: Tensor) -> None:
        wide = torch.promote_types(gate.dtype, torch.float32)
        value, slope = formula(gate.to(wide))
        grad = grad.to(wide)
        grad_gate = grad * slope * up
        up.copy_(grad * value)
        gate.copy_(grad_gate)

    def launch(pick: Any, module: Any, tensors: tuple[Tensor, ...]) -> None:
        columns = tensors[0].shape[-1]
        rows = tensors[0].numel() // max(columns, 1)
        if rows:
            block, warps = block_settings(columns)
            pick(module)[(rows,)](
                *tensors, columns, *scalars, n_cols=columns, BLOCK_SIZE=block, num_warps=warps
            )

    def forward_liger(module: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        launch(forward_kernel, module, (gate, up, out))
        return out

    def backward_liger(module: Any, gate: Tensor, up: Tensor, grad: Tensor) -> None:
        launch(backward_kernel, module, (grad.contiguous(), gate, up))

    forward = kernel(
        f"{name}_forward(Tensor gate, Tensor up) -> Tensor",
        fake=lambda gate, up: gate.new_empty(gate.shape),
        cpu=forward_torch,
        cuda=forward_liger,
        liger=liger,
    )
    backward = kernel(
        f"{name}_backward_(Tensor(a!) gate, Tensor(b!) up, Tensor grad) -> ()",
        fake=lambda gate, up, grad: None,
        cpu=backward_torch,
        cuda=backward_liger,
        liger=liger,
    )

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate, up):
            ctx.save_for_backward(gate, up)
            return forward(gate, up)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:
            # An expanded tensor cannot be written over; the kernel takes contiguous ones.
            gate, up = (t.contiguous() for t in ctx.saved_tensors)
            return auto_functionalized(backward, gate=gate, up=up, grad=grad)[1:]

    def op(gate: Tensor, up: Tensor) -> Tensor:
        return Gated.apply(gate, up)

    return differentiable(f"{name}(Tensor gate, Tensor up) -> Tensor", op)
