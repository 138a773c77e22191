"""The rewrite ``geglu``: fires, refuses, leaves alone, numerics. What it shares with ``swiglu`` is
tested there."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from _util import DEVICE, no_worse_than_eager, only, reasons, show
from expecttest import assert_expected_inline
from liger_fx.passes import geglu

capture = only(geglu)


@pytest.fixture
def inputs():
    """gate and up."""
    return [torch.randn(2, 5, 24, device=DEVICE, requires_grad=True) for _ in range(2)]


def gate_first(g, u):
    return F.gelu(g, approximate="tanh") * u


def up_first(g, u):
    return u * F.gelu(g, approximate="tanh")


def exact(g, u):
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    return 0.5 * g * (1 + torch.tanh(inner)) * u


@pytest.mark.parametrize("spelling", [gate_first, up_first])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fires_once_on_every_spelling(spelling, dynamic, inputs):
    (report,) = capture(spelling, *inputs, dynamic=dynamic).reports
    assert report.counts == {"geglu": 1}
    assert report.rejections == [] and report.near_misses == []


def test_fires_graph(inputs):
    found = capture(gate_first, *(t.bfloat16() for t in inputs))
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_g_: "bf16[2, 5, 24]", L_u_: "bf16[2, 5, 24]"):
    l_g_ = L_g_
    l_u_ = L_u_
    geglu_default: "bf16[2, 5, 24]" = torch.ops.liger_fx.geglu.default(l_g_, l_u_, True)
    return (geglu_default,)""",
    )


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_the_exact_gelu(inputs):  # T5: nn.GELU() is traced with its default written out
    refused = capture(lambda g, u: F.gelu(g, approximate="none") * u, *inputs).reports[0]
    assert len(refused.rejections) == 1
    assert_expected_inline(
        refusal(lambda g, u: F.gelu(g) * u, *inputs),
        """GELU is exact here; Liger's kernel computes the tanh approximation""",
    )


def test_refuses_inputs_that_are_not_contiguous(inputs):
    assert_expected_inline(
        refusal(gate_first, *(t.mT for t in inputs)),
        """gate or up is not contiguous: the kernel would need a copy""",
    )


def test_leaves_quick_gelu(inputs):  # CLIP
    (report,) = capture(lambda g, u: g * torch.sigmoid(1.702 * g) * u, *inputs).reports
    assert report.counts == {} and report.rejections == [] and report.near_misses == []


def test_leaves_a_gelu_without_a_gate(inputs):
    (report,) = capture(lambda g, u: F.gelu(g, approximate="tanh") + u, *inputs).reports
    assert report.counts == {} and report.rejections == []


@pytest.mark.parametrize("spelling", [gate_first, up_first])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics(spelling, dtype):
    no_worse_than_eager(spelling, exact, [(40, 5, 257)] * 2, "geglu", dtype)


def test_numerics_under_inductor():  # A5
    no_worse_than_eager(gate_first, exact, [(40, 5, 257)] * 2, "geglu", inner="inductor")
