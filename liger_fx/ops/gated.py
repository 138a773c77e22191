"""Gated activations, ``act(gate) * up``: what `swiglu` and `geglu` share.

Gate and up are two tensors (`gated`), or the halves of one, as a fused projection makes them
(`gated_halves`). Liger's kernels compute them where it has some, else ours (`gated_triton`).

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
    """An activation that gates, ``act(gate) * up``, on a CPU and on a GPU.

    name: of `gated_triton.ACTIVATIONS`. plain: in PyTorch. formula: x -> (act(x), act'(x)), in the
    dtype of x. liger: the name of Liger's module: where it cannot be imported, no Triton kernel
    runs. *_kernel: pick Liger's kernel from its module; None where it has none, and ours runs.
    scalars: what Liger's take between the stride and the number of columns. halves_*: launch
    Liger's kernels for the halves of one tensor, ``(module, gate_up, out)`` and
    ``(module, gate_up, out, grad)``; None where it has none.

    The activation is rounded to the dtype of the gate before the product, as in eager.
    """

    name: str
    plain: Callable[[Tensor], Tensor]
    formula: Callable[[Tensor], tuple[Tensor, Tensor]]
    liger: str
    forward_kernel: Callable[[Any], Any] | None = None
    backward_kernel: Callable[[Any], Any] | None = None
    scalars: tuple[float, ...] = ()
    halves_forward: Callable[..., None] | None = None
    halves_backward: Callable[..., None] | None = None

    def gradients(self, gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of gate and up, in fp32 or wider."""
        wide = torch.promote_types(gate.dtype, torch.float32)
        value, slope = self.formula(gate.to(wide))
        grad = grad.to(wide)
        return grad * slope * up, grad * value

    def launch_forward(self, module: Any, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """Write the product. All contiguous; ``out`` may be one of the two."""
        if self.forward_kernel is None:
            self.launch_product(*(t.view(-1, t.shape[-1]) for t in (gate, up, out)))
        else:
            self._launch(self.forward_kernel(module), gate, up, out)

    def launch_backward(self, module: Any, gate: Tensor, up: Tensor, grad: Tensor) -> None:
        """Write the gradients of gate and up over them. All contiguous."""
        if self.backward_kernel is None:
            gate, up, grad = (t.view(-1, t.shape[-1]) for t in (gate, up, grad))
            self.launch_gradients(gate, up, grad, gate, up)
        else:
            self._launch(self.backward_kernel(module), grad, gate, up)

    def launch_product(self, gate: Tensor, up: Tensor, out: Tensor) -> None:
        """Our kernel, which takes [rows, columns] in any layout; out is contiguous."""
        from liger_fx.ops.gated_triton import product

        product(gate, up, out, self.name)

    def launch_gradients(
        self, gate: Tensor, up: Tensor, grad: Tensor, grad_gate: Tensor, grad_up: Tensor
    ) -> None:
        from liger_fx.ops.gated_triton import gradients

        gradients(gate, up, grad, grad_gate, grad_up, self.name)

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


def gated_halves(name: str, activation: Activation) -> torch._ops.OpOverload:
    """Register ``liger_fx::<name>(gate_up, overwrite=False)``: ``activation(gate) * up`` for
    ``gate_up [..., 2 I]``, the gate first.

    gate_up: float32, bfloat16 or float16 (on a CPU float64 as well). overwrite: as of `gated`.
    Returns [..., I], contiguous; the backward is differentiable once.
    """

    def forward_torch(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (activation.plain(gate) * up).contiguous()

    def backward_torch(gate_up: Tensor, grad: Tensor) -> None:
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate, grad_up = activation.gradients(gate, up, grad)
        gate.copy_(grad_gate)
        up.copy_(grad_up)

    def on_a_copy_torch(gate_up: Tensor, grad: Tensor) -> Tensor:
        out = gate_up.clone(memory_format=torch.contiguous_format)
        backward_torch(out, grad)
        return out

    def forward_triton(module: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        if activation.halves_forward is not None:
            activation.halves_forward(module, gate_up, out)
        else:
            activation.launch_product(*_halves(gate_up), out.view(-1, out.shape[-1]))
        return out

    def write_gradients(module: Any, gate_up: Tensor, out: Tensor, grad: Tensor) -> None:
        grad = grad.contiguous()
        if activation.halves_backward is not None:
            activation.halves_backward(module, gate_up, out, grad)
        else:
            grad = grad.view(-1, grad.shape[-1])
            activation.launch_gradients(*_halves(gate_up), grad, *_halves(out))

    def into_a_new_tensor(module: Any, gate_up: Tensor, grad: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        out = torch.empty_like(gate_up)
        write_gradients(module, gate_up, out, grad)
        return out

    forward = kernel(
        f"{name}_forward(Tensor gate_up) -> Tensor",
        fake=lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
        plain=forward_torch,
        cuda=forward_triton,
        liger=activation.liger,
    )
    backward = kernel(
        f"{name}_backward(Tensor gate_up, Tensor grad) -> Tensor",
        fake=lambda gate_up, grad: gate_up.new_empty(gate_up.shape),
        plain=on_a_copy_torch,
        cuda=into_a_new_tensor,
        liger=activation.liger,
    )
    backward_ = kernel(
        f"{name}_backward_(Tensor(a!) gate_up, Tensor grad) -> ()",
        fake=lambda gate_up, grad: None,
        plain=backward_torch,
        cuda=lambda module, gate_up, grad: write_gradients(module, gate_up, gate_up, grad),
        liger=activation.liger,
    )

    class GatedHalves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate_up, overwrite):
            ctx.save_for_backward(gate_up)
            ctx.overwrite = overwrite
            return forward(gate_up)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:
            (gate_up,) = ctx.saved_tensors
            if not ctx.overwrite:
                return backward(gate_up, grad), None
            return auto_functionalized(backward_, gate_up=gate_up.contiguous(), grad=grad)[1], None

    def op(gate_up: Tensor, overwrite: bool = False) -> Tensor:
        return GatedHalves.apply(gate_up, overwrite)

    return differentiable(f"{name}(Tensor gate_up, bool overwrite=False) -> Tensor", op)


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Of a contiguous tensor, [rows, I] each."""
    gate, up = gate_up.view(-1, gate_up.shape[-1]).chunk(2, dim=-1)
    return gate, up
