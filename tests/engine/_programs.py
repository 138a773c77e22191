"""Programs, and all that can be seen of one: how tests compare it, compiled, with eager.

`LikeEager` are the tests of a table of programs; below stand the inputs and the parts of a decoder
that the tables of test_soundness_*.py are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _util import relative_error
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import liger_fx

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Inputs = Callable[[], Sequence[Tensor]]
Place = str  # of a write: "before" a copy, "between" the copy and its use, or "after" the use


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


# -- the tests of a table --------------------------------------------------------------------------


class Table(dict[str, Program]):
    """Programs by their labels."""

    def add(self, label: str, fn: Callable[..., Any], inputs: Inputs) -> None:
        self[label] = Program(fn, inputs)


class LikeEager:
    """Programs that a rewrite must not change: each compiled with liger_fx, against plain eager.

    PROGRAMS: by labels, which start with the row of the table of soundness.md that they belong to.
    AUTO: rows whose rewrites the default policy makes as well. UNDER_INDUCTOR: labels of those that
    Inductor compiles. FIRING: programs beside them that are rewritten, and how often.
    """

    PROGRAMS: Mapping[str, Program]
    AUTO: Collection[str] = ()
    UNDER_INDUCTOR: Sequence[str] = ()
    FIRING: Mapping[str, tuple[Program, dict[str, int]]] = MappingProxyType({})

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        labels: dict[str, Collection[str]] = {
            "test_auto": [label for label in self.PROGRAMS if label.split()[0] in self.AUTO],
            "test_inductor": self.UNDER_INDUCTOR,
            "test_still_fires": self.FIRING,
        }
        chosen = labels.get(metafunc.function.__name__, self.PROGRAMS)
        metafunc.parametrize("label", chosen)

    @pytest.mark.slow  # without liger_fx: for the day on which `test_all` fails
    def test_aot_eager_alone_is_like_eager(self, label):
        """A program that this is not true of shows nothing about liger_fx."""
        program = self.PROGRAMS[label]
        alone = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
        program.run(alone).assert_like(program.run())

    @pytest.mark.parametrize("inner", ["eager", "aot_eager"])
    def test_all(self, label, inner):
        self.check(label, policy="all", inner=inner)

    def test_auto(self, label):
        self.check(label, policy="auto", inner="aot_eager")

    def test_inductor(self, label):
        self.check(label, policy="all", fallback_random=True)  # random numbers as in eager

    def test_still_fires(self, label):
        program, counts = self.FIRING[label]
        program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(program.run())
        (report,) = liger_fx.reports()
        assert report.counts == counts, report

    def check(self, label: str, **options: Any) -> None:
        program = self.PROGRAMS[label]
        program.run(with_liger_fx(**options)).assert_like(program.run())
        assert_no_internal_error()


def assert_no_internal_error() -> None:
    """Also where the values are right: a match that the engine fails at is one that it has not
    understood."""
    for report in liger_fx.reports():
        assert not getattr(report, "error", None), report
        assert not any(r.reason.startswith("internal error") for r in report.rejections), report


# -- inputs ----------------------------------------------------------------------------------------

B, S, H, V = 2, 5, 8, 13
HEADS, HALF = 3, 4
PAD = 3  # a class that stands for padding
EPS = 1e-6

BF16 = torch.bfloat16
checkpoint = functools.partial(torch_checkpoint, use_reentrant=False)


def some_labels() -> Tensor:
    labels = torch.randint(0, V, (B, S))
    labels[:, ::2] = PAD
    labels[0, 1] = -100
    return labels


def head_inputs() -> Sequence[Tensor]:
    return trained(B, S, H), trained(V, H), some_labels()


def head_inputs_sequence_first() -> Sequence[Tensor]:
    return trained(S, B, H), trained(V, H), some_labels()


def norm_inputs() -> Sequence[Tensor]:
    """Not trained: anything may be written to them."""
    return fixed(B, S, H, dtype=BF16), trained(H, dtype=BF16)


def trained_norm_inputs() -> Sequence[Tensor]:
    return trained(B, S, H, dtype=BF16), trained(H, dtype=BF16)


def residual_inputs() -> Sequence[Tensor]:
    return (*(trained(B, S, H, dtype=BF16) for _ in range(2)), trained(H, dtype=BF16))


def mlp_inputs() -> Sequence[Tensor]:
    return trained(B, S, H, dtype=BF16), trained(12, H), trained(12, H), trained(H, 12)


def rope_inputs() -> Sequence[Tensor]:
    """Queries, cos and sin; each half of the angles is of its own."""
    return trained(B, HEADS, S, 2 * HALF), fixed(1, 1, S, 2 * HALF), fixed(1, 1, S, 2 * HALF)


def repeated_rope_inputs() -> Sequence[Tensor]:
    q, cos, sin = rope_inputs()
    return q, cos[..., :HALF].repeat(1, 1, 1, 2), sin[..., :HALF].repeat(1, 1, 1, 2)


# -- parts of a decoder ----------------------------------------------------------------------------


def loss_of(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1))


def finish_norm(f: Tensor, w: Tensor) -> Tensor:
    """Hugging Face's, from the fp32 copy of the input on."""
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(w.dtype)


def norm(x: Tensor, w: Tensor) -> Tensor:
    return finish_norm(x.float(), w)


def gemma_norm(x: Tensor, w: Tensor) -> Tensor:
    f = x.float()
    normed = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + w.float())).to(x.dtype)


def torchtune_norm(x: Tensor, w: Tensor) -> Tensor:
    return torch.rms_norm(x.float(), (H,), w, EPS).to(x.dtype)


def layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (H,), w.float(), w.float(), EPS).to(x.dtype)


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q * cos + torch.cat((-q[..., HALF:], q[..., :HALF]), -1) * sin


def mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def same(x: Tensor) -> Tensor:
    """A tensor that may be written: an input may not if it is trained, and of one that is not AOT
    itself (torch 2.13) reads the new values in the backward where eager has kept a copy."""
    return x + 0


def set_pads(t: Tensor) -> None:
    t[t == PAD] = -100


def set_row(t: Tensor) -> None:
    t[0] = 0.5


@torch.library.custom_op("soundness::increase", mutates_args={"x"})
def increase(x: Tensor) -> None:
    x.add_(1)
