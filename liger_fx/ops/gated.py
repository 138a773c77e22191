"""Gated activations, ``act(gate) * up``: what `swiglu` and `geglu` share.

Liger's backward writes the gradients of gate and up over gate and up. There are two operators over
that kernel. ``<name>_backward`` lets it work on copies. ``<name>_backward_`` mutates; the backward
formula calls it through ``auto_functionalized``: functional in the graph; in eager mode on copies;
by Inductor in place where it finds the buffers dead, as under activation checkpointing, where they
have just been recomputed, and else on copies.

Inductor does not see all that is alive, though: pointwise code that reads a buffer is put off until
its result is needed, and may then run after the operator that overwrites the buffer, on the new
values, without a word (torch 2.13). So ``overwrite`` must be asked for, by who knows that nothing
else reads gate or up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from liger_fx.ops.library import block_settings, differentiable, kernel, once_differentiable


@dataclass(frozen=True)
class Activation:
    """An activation that gates, ``act(gate) * up``, on a CPU and by Liger's kernels.

    liger: the name of Liger's module. plain: in PyTorch. formula: x -> (act(x), act'(x)), in the
    dtype of x. *_kernel: pick Liger's kernel from its module. scalars: what the kernels take
    between the stride and the number of columns.

    The activation is rounded to the dtype of the gate before the product, as in eager.
    """

    liger: str
    plain: Callable[[Tensor], Tensor]
    formula: Callable[[Tensor], tuple[Tensor, Tensor]]
    forward_kernel: Callable[[Any], Any]
    backward_kernel: Callable[[Any], Any]
    scalars: tuple[float, ...] = ()

    def gradients(self, gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of gate and up, in fp32 or wider."""
        wide = torch.promote_types(gate.dtype, torch.float32)
        value, slope = self.formula(gate.to(wide))
        grad = grad.to(wide)
        return grad * slope * up, grad * value

    def launch_forward(self, module: Any, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """Write the product. All contiguous; ``out`` may be one of the two."""
        self._launch(self.forward_kernel(module), gate, up, out)

    def launch_backward(self, module: Any, gate: Tensor, up: Tensor, grad: Tensor) -> None:
        """Write the gradients of gate and up over them. All contiguous."""
        self._launch(self.backward_kernel(module), grad, gate, up)

    def _launch(self, liger_kernel: Any, *tensors: Tensor) -> None:
        columns = tensors[0].shape[-1]
        rows = tensors[0].numel() // max(columns, 1)
        if rows:
            block, warps = block_settings(columns)
            liger_kernel[(rows,)](
                *tensors, columns, *self.scalars, n_cols=columns, BLOCK_SIZE=block, num_warps=warps
            )


def gated(name: str, activation: Activation) -> torch._ops.OpOverload:
    """Register ``liger_fx::<name>(gate, up, overwrite=False)``: ``activation(gate) * up``.

    gate, up: of one shape and dtype, float32, bfloat16 or float16 (on a CPU float64 as well).
    overwrite: the backward may write over gate and up where the compiler finds them dead; nothing
    but this op may read them. The result is contiguous; the backward is differentiable once.
    """

    def forward_torch(gate: Tensor, up: Tensor) -> Tensor:
        return (activation.plain(gate) * up).contiguous()

    def backward_torch(gate: Tensor, up: Tensor, grad: Tensor) -> None:
        grad_gate, grad_up = activation.gradients(gate, up, grad)
        gate.copy_(grad_gate)
        up.copy_(grad_up)

    def forward_liger(module: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        activation.launch_forward(module, gate, up, out)
        return out

    def backward_liger(module: Any, gate: Tensor, up: Tensor, grad: Tensor) -> None:
        activation.launch_backward(module, gate, up, grad.contiguous())

    def on_copies(backward_in_place: Callable[..., None]) -> Callable[..., tuple[Tensor, Tensor]]:
        def backward(*args: Any) -> tuple[Tensor, Tensor]:
            *module, gate, up, grad = args
            gate, up = (t.clone(memory_format=torch.contiguous_format) for t in (gate, up))
            backward_in_place(*module, gate, up, grad)
            return gate, up

        return backward

    forward = kernel(
        f"{name}_forward(Tensor gate, Tensor up) -> Tensor",
        fake=lambda gate, up: gate.new_empty(gate.shape),
        plain=forward_torch,
        cuda=forward_liger,
        liger=activation.liger,
    )
    backward = kernel(
        f"{name}_backward(Tensor gate, Tensor up, Tensor grad) -> (Tensor, Tensor)",
        fake=lambda gate, up, grad: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
        plain=on_copies(backward_torch),
        cuda=on_copies(backward_liger),
        liger=activation.liger,
    )
    backward_ = kernel(
        f"{name}_backward_(Tensor(a!) gate, Tensor(b!) up, Tensor grad) -> ()",
        fake=lambda gate, up, grad: None,
        plain=backward_torch,
        cuda=backward_liger,
        liger=activation.liger,
    )

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate, up, overwrite):
            ctx.save_for_backward(gate, up)
            ctx.overwrite = overwrite
            return forward(gate, up)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:
            gate, up = ctx.saved_tensors
            if not ctx.overwrite:
                return *backward(gate, up, grad), None
            # An expanded tensor cannot be written over; the kernel takes contiguous ones.
            gate, up = gate.contiguous(), up.contiguous()
            return *auto_functionalized(backward_, gate=gate, up=up, grad=grad)[1:], None

    def op(gate: Tensor, up: Tensor, overwrite: bool = False) -> Tensor:
        return Gated.apply(gate, up, overwrite)

    return differentiable(f"{name}(Tensor gate, Tensor up, bool overwrite=False) -> Tensor", op)
