"""A program, and all that can be seen of it: how tests compare one that is compiled with eager."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _util import relative_error
from torch import Tensor
from torch.utils._pytree import tree_leaves

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Inputs = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Program:
    """fn: of tensors, to a tensor or several. inputs: makes the tensors, always the same."""

    fn: Callable[..., Any]
    inputs: Inputs

    def run(self, compile: Callable[..., Any] = lambda fn: fn) -> Outcome:
        """Forward and backward; ``compile`` makes something faster of the function."""
        torch._dynamo.reset()
        torch.manual_seed(0)
        inputs = self.inputs()
        torch.manual_seed(1)
        outputs = [t for t in tree_leaves(compile(self.fn)(*inputs)) if isinstance(t, Tensor)]
        differentiable = [t for t in outputs if t.requires_grad]
        trained = [t for t in inputs if t.requires_grad]
        gradients: Sequence[Tensor | None] = [None] * len(trained)
        if differentiable:
            seeds = [torch.linspace(-1, 2, t.numel()).view(t.shape).to(t) for t in differentiable]
            gradients = torch.autograd.grad(differentiable, trained, seeds, allow_unused=True)
        values = {f"output {i}": t for i, t in enumerate(outputs)}
        values |= {f"gradient {i}": g for i, g in enumerate(gradients) if g is not None}
        values |= {f"input {i} afterwards": t for i, t in enumerate(inputs)}
        facts = {f"output {i}": (t.stride(), t.requires_grad) for i, t in enumerate(outputs)}
        return Outcome({name: t.detach().clone() for name, t in values.items()}, facts)


@dataclass(frozen=True)
class Outcome:
    """values: outputs, gradients, and what the inputs hold afterwards. facts: strides of each
    output, and whether it requires a gradient."""

    values: dict[str, Tensor]
    facts: dict[str, tuple[tuple[int, ...], bool]]

    def assert_like(self, expected: Outcome) -> None:
        assert self.values.keys() == expected.values.keys()
        # Inductor may leave out a rounding to bf16 on the way to a value in fp32.
        tolerance = max(TOLERANCES.get(t.dtype, 0.0) for t in expected.values.values())
        for name, value in expected.values.items():
            actual = self.values[name]
            assert (actual.dtype, actual.shape) == (value.dtype, value.shape), name
            if value.is_floating_point():
                error = relative_error(actual, value)
                assert error <= tolerance, f"{name}: relative error {error:.2g}"
            else:
                assert torch.equal(actual, value), name
        assert self.facts == expected.facts, "(strides, requires_grad) of the outputs"


def with_liger_fx(**options: Any) -> Callable[..., Any]:
    return functools.partial(torch.compile, backend="liger_fx", fullgraph=True, options=options)


def trained(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def fixed(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)
