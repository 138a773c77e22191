"""What the tests share: capturing a Dynamo graph, rewriting it, showing it, comparing gradients."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from liger_fx.passes import DEFAULT
from torch import Tensor, fx

from liger_fx import Report, rewrite_graph

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

# Relative Frobenius error that a correct implementation stays below.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Capture:
    """A backend that rewrites each graph, keeps graph and report, and runs the graph eagerly."""

    def __init__(self, settings: dict[str, dict[str, Any]] | None = None) -> None:
        self.settings = settings
        self.graphs: list[fx.GraphModule] = []
        self.reports: list[Report] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.reports.append(rewrite_graph(gm, DEFAULT, self.settings))
        self.graphs.append(gm)
        return gm.forward


def capture(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Capture:
    """Trace ``fn(*args)`` into one graph and rewrite it."""
    torch._dynamo.reset()
    found = Capture()
    torch.compile(fn, backend=found, fullgraph=True, dynamic=dynamic)(*args)
    return found


def show(gm: fx.GraphModule) -> str:
    """The graph as readable code, without devices, comments and trailing clean-up."""
    text = gm.print_readable(print_output=False)
    text = re.sub(r", device = device\([^)]*\)", "", text)
    lines = [
        re.sub(r";  [\w ,=]+ = None$|\s+#.*$", "", line).rstrip() for line in text.splitlines()
    ]
    kept = [line for line in lines if line.strip() and not line.startswith("class ")]
    return "\n".join(line.removeprefix("    ") for line in kept)


def reasons(report: Report) -> str:
    return "\n".join(r.reason for r in report.rejections)


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
