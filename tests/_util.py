"""What the tests share: capturing a Dynamo graph, rewriting it, showing it, comparing gradients."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from liger_fx.passes import DEFAULT
from torch import Tensor, fx

import liger_fx
from liger_fx import Report, Rewrite, rewrite_graph

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

# Relative Frobenius error that a correct implementation stays below.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


# For all that Inductor has no part in: the C++ that it makes for a CPU takes seconds to compile.
aot_compiled = functools.partial(torch.compile, backend="liger_fx", options={"inner": "aot_eager"})


class Capture:
    """A backend that rewrites each graph, keeps graph and report, and runs the graph eagerly.
    ``value`` is what that gave."""

    value: Any

    def __init__(self, rewrites: Sequence[Rewrite] = DEFAULT) -> None:
        self.rewrites = rewrites
        self.graphs: list[fx.GraphModule] = []
        self.reports: list[Report] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.reports.append(rewrite_graph(gm, self.rewrites, strict=True))
        self.graphs.append(gm)
        return gm.forward


def capture(
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    rewrites: Sequence[Rewrite] = DEFAULT,
) -> Capture:
    """Trace ``fn(*args)`` into one graph and rewrite it."""
    torch._dynamo.reset()
    found = Capture(rewrites)
    found.value = torch.compile(fn, backend=found, fullgraph=True, dynamic=dynamic)(*args)
    return found


def only(*rewrites: Rewrite) -> Callable[..., Capture]:
    """`capture` with these rewrites alone, whatever else there is to find."""
    return functools.partial(capture, rewrites=rewrites)


def show(gm: fx.GraphModule) -> str:
    """The graph as readable code, without devices, comments and trailing clean-up."""
    text = gm.print_readable(print_output=False)
    text = re.sub(r", device = device\([^)]*\)", "", text)
    text = re.sub(r"(\w+)\.__eq__\(([^()]*)\)", r"\1 == \2", text)  # as torch 2.11 records it
    lines = [
        re.sub(r";  [\w ,=]+ = None$|\s+#.*$", "", line).rstrip() for line in text.splitlines()
    ]
    kept = [line for line in lines if line.strip() and not line.startswith("class ")]
    return "\n".join(line.removeprefix("    ") for line in kept)


def reasons(report: Report) -> str:
    return "\n".join(r.reason for r in report.rejections)


def evidence(report: Report, rewrite: str) -> str:
    """What the policy says of the first match of ``rewrite``, made or not."""
    said = [r.worth for r in report.replacements if r.rewrite == rewrite]
    said += [r.reason for r in report.rejections if r.rewrite == rewrite]
    return said[0]


def words(text: str) -> str:
    """A report or a log without its columns, whose width the longest name decides."""
    return " ".join(text.split())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if not torch.isfinite(actual).all():
        return float("inf")
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def gradients(fn: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The value of ``fn`` and its gradients over the tensors that require one."""
    value = fn(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    return value.detach(), *torch.autograd.grad(value, wanted)


def no_worse_than_eager(
    spelling: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    rewrite: str,
    dtype: torch.dtype = torch.float32,
    inner: str = "aot_eager",
) -> None:
    """Value and gradients of ``spelling`` on random inputs of these shapes, compiled with one
    rewrite, against ``exact`` in fp64. Shapes should be large: an error is a random number too."""
    torch._dynamo.reset()
    options = {"policy": [rewrite], "inner": inner}
    compiled = torch.compile(spelling, backend="liger_fx", options=options, fullgraph=True)
    tensors = [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected, eager, actual = (
        _value_and_gradients(f, t)
        for f, t in ((exact, wide), (spelling, tensors), (compiled, tensors))
    )
    assert liger_fx.reports()[-1].counts == {rewrite: 1}
    for a, b, e in zip(actual, eager, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        slack = 3e-7 if a.numel() > 1 else TOLERANCES[dtype]
        assert relative_error(a, e) <= 1.1 * relative_error(b, e) + slack


def _value_and_gradients(fn: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    value = fn(*tensors)
    return value.detach(), *torch.autograd.grad(_weighted(value), tensors)


def _weighted(value: Tensor) -> Tensor:
    """A number that depends on each element in its own way."""
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64, device=value.device)
    return (value.double() * weights.view(value.shape)).sum()
