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


def t5(g, u):
    return F.gelu(g) * u


def written_out_default(g, u):
    return u * torch.nn.GELU(approximate="none")(g)


def gemma4(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def modernbert(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * up


def tanh(g, u):
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    return 0.5 * g * (1 + torch.tanh(inner)) * u


def erf(g, u):
    return 0.5 * g * (1 + torch.erf(g / math.sqrt(2))) * u


def in_halves(fn):
    return lambda gate_up: fn(*gate_up.chunk(2, dim=-1))


SPELLINGS = {  # by the op that each becomes, with the formula
    gate_first: ("geglu", tanh),
    up_first: ("geglu", tanh),
    t5: ("geglu_exact", erf),
    written_out_default: ("geglu_exact", erf),
    gemma4: ("geglu_gate_up", in_halves(tanh)),
    modernbert: ("geglu_exact_gate_up", in_halves(erf)),
}


def inputs_of(spelling, gate, up):
    return (torch.cat((gate, up), -1),) if "gate_up" in SPELLINGS[spelling][0] else (gate, up)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic, inputs):
    given = inputs_of(spelling, *(t.to(dtype) for t in inputs))
    for t in given if dynamic else ():
        torch._dynamo.mark_dynamic(t, 1)  # the width of a projection is a constant
    found = capture(spelling, *given)
    (report,) = found.reports
    assert report.counts == {"geglu": 1}
    assert report.rejections == [] and report.near_misses == []
    (op,) = (str(n.target) for n in found.graphs[0].graph.nodes if "liger_fx" in str(n.target))
    assert op == f"liger_fx.{SPELLINGS[spelling][0]}.default"


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


def test_refuses_inputs_that_are_not_contiguous(inputs):
    assert_expected_inline(
        refusal(gate_first, *(t.mT for t in inputs)),
        """gate or up is not contiguous: the kernel would need a copy""",
    )


def test_refuses_halves_in_the_other_order(inputs):
    def fn(gate_up):
        up, gate = gate_up.chunk(2, dim=-1)
        return F.gelu(gate) * up

    assert_expected_inline(refusal(fn, torch.cat(inputs, -1)), """gate and up share memory""")


def test_refuses_what_escapes(inputs):
    def fn(g, u):
        active = F.gelu(g)
        return active * u, active

    assert_expected_inline(
        refusal(fn, *inputs), """the value of `gelu` (active) is also returned"""
    )


def test_leaves_quick_gelu(inputs):  # CLIP
    (report,) = capture(lambda g, u: g * torch.sigmoid(1.702 * g) * u, *inputs).reports
    assert report.counts == {} and report.rejections == [] and report.near_misses == []


def test_leaves_a_gelu_without_a_gate(inputs):
    (report,) = capture(lambda g, u: F.gelu(g, approximate="tanh") + u, *inputs).reports
    assert report.counts == {} and report.rejections == []


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics(spelling, dtype):
    check_numerics(spelling, dtype, "aot_eager")


@pytest.mark.parametrize("spelling", [gate_first, modernbert])
def test_numerics_under_inductor(spelling):  # A5
    check_numerics(spelling, torch.float32, "inductor")


def check_numerics(spelling, dtype, inner):
    op, formula = SPELLINGS[spelling]
    shapes = [(40, 5, 514)] if "gate_up" in op else [(40, 5, 257)] * 2
    no_worse_than_eager(spelling, formula, shapes, "geglu", dtype, inner)
