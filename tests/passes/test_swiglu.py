"""The rewrite ``swiglu``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _util import DEVICE, no_worse_than_eager, only, reasons, relative_error, show
from expecttest import assert_expected_inline
from liger_fx.passes import swiglu
from torch.utils.checkpoint import checkpoint

import liger_fx

capture = only(swiglu)
SIZE = 24


@pytest.fixture
def gate():
    return torch.randn(2, 5, SIZE, device=DEVICE, requires_grad=True)


@pytest.fixture
def up():
    return torch.randn(2, 5, SIZE, device=DEVICE, requires_grad=True)


def torchtune(g, u):
    return F.silu(g, inplace=False) * u


def huggingface(g, u):
    return F.silu(g) * u


def up_first(g, u):
    return u * torch.nn.functional.silu(g)


def multiplied_by_a_function(g, u):
    return torch.mul(u, F.silu(g))


SPELLINGS = [torchtune, huggingface, up_first, multiplied_by_a_function]


def exact(g, u):
    return g * torch.sigmoid(g) * u


def gate_and_up_in_one(gate_up):
    """Hugging Face's Phi-3."""
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


def gpt_oss(gate_up, alpha=1.702, limit=0.75):
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate = gate.clamp(min=None, max=limit)
    up = up.clamp(min=-limit, max=limit)
    glu = gate * torch.sigmoid(gate * alpha)
    return (up + 1) * glu


def minimax_m3(gate_up, alpha=1.702, limit=0.75):
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1.0) * (gate * torch.sigmoid(gate * alpha))


CLAMPED = [gpt_oss, minimax_m3]


# -- fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic, gate, up):
    (report,) = capture(spelling, gate.to(dtype), up.to(dtype), dynamic=dynamic).reports
    assert report.counts == {"swiglu": 1}, report
    assert report.rejections == [] and report.near_misses == []


def test_fires_graph(gate, up):
    assert_expected_inline(
        show(capture(torchtune, gate, up).graphs[0]),
        """\
def forward(self, L_g_: "f32[2, 5, 24]", L_u_: "f32[2, 5, 24]"):
    l_g_ = L_g_
    l_u_ = L_u_
    swiglu_default: "f32[2, 5, 24]" = torch.ops.liger_fx.swiglu.default(l_g_, l_u_, True)
    return (swiglu_default,)""",
    )


def test_gate_and_up_in_one_tensor_stay_there(gate, up):
    found = capture(gate_and_up_in_one, torch.cat((gate, up), -1))
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_gate_up_: "f32[2, 5, 48]"):
    l_gate_up_ = L_gate_up_
    swiglu_gate_up_default: "f32[2, 5, 24]" = torch.ops.liger_fx.swiglu_gate_up.default(l_gate_up_, True)
    return (swiglu_gate_up_default,)""",
    )


@pytest.mark.parametrize("spelling", CLAMPED)
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_fires_on_clamped_gates(spelling, dtype, dynamic, gate, up):
    both = torch.cat((gate, up), -1).to(dtype)
    if dynamic:
        torch._dynamo.mark_dynamic(both, 1)  # the width of a projection is a constant
    found = capture(spelling, both)
    assert found.reports[0].counts == {"swiglu": 1}
    assert relative_error(found.value, spelling(both)) < (1e-2 if dtype.itemsize == 2 else 1e-6)


def test_fires_graph_of_clamped_gates(gate, up):
    found = capture(gpt_oss, torch.cat((gate, up), -1))
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_gate_up_: "f32[2, 5, 48]"):
    l_gate_up_ = L_gate_up_
    clamped_swiglu_default: "f32[2, 5, 24]" = torch.ops.liger_fx.clamped_swiglu.default(l_gate_up_, 1.702, 0.75, True)
    return (clamped_swiglu_default,)""",
    )


def overwrites(fn, *args):
    (gm,) = capture(fn, *args).graphs
    (op,) = (n for n in gm.graph.nodes if "liger_fx" in str(n.target))
    return op.args[-1]


def test_gates_and_ups_that_others_read_are_not_overwritten(gate, up):
    """Inductor could run those readers after the kernel's backward."""
    both = torch.cat((gate, up), -1)
    assert overwrites(huggingface, gate, up)
    assert overwrites(lambda g, u: F.silu(g.view(-1)) * u.view(-1), gate, up)
    assert overwrites(gate_and_up_in_one, both)
    assert not overwrites(lambda g, u: F.silu(g) * u + g.sin(), gate, up)
    assert not overwrites(lambda g, u: (F.silu(g) * (v := u + 1), v), gate, up)
    assert not overwrites(lambda g, u: (F.silu((v := g + 1).view(-1)) * u.view(-1), v.mT), gate, up)
    assert not overwrites(lambda t: gate_and_up_in_one(t) + t.sum(), both)


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_halves_in_the_other_order(gate, up):
    def fn(gate_up):
        up, gate = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    assert_expected_inline(refusal(fn, torch.cat((gate, up), -1)), """gate and up share memory""")


def test_refuses_inputs_that_are_not_contiguous(gate, up):
    assert_expected_inline(
        refusal(huggingface, gate.mT, up.mT),
        """gate or up is not contiguous: the kernel would need a copy""",
    )


def test_refuses_one_tensor_as_gate_and_up(gate):
    assert_expected_inline(refusal(lambda g: F.silu(g) * g, gate), """gate and up share memory""")


def test_refuses_a_product_that_broadcasts(gate, up):
    assert_expected_inline(
        refusal(huggingface, gate, up[:, :1]),
        """the product broadcasts [2, 5, 24] and [2, 1, 24]""",
    )


def test_refuses_two_dtypes(gate, up):
    assert_expected_inline(
        refusal(huggingface, gate, up.bfloat16()),
        """gate is torch.float32, up is torch.bfloat16, expected one dtype""",
    )


def test_refuses_double_precision(gate, up):
    assert_expected_inline(
        refusal(huggingface, gate.double(), up.double()),
        """gate is torch.float64; the kernel computes in float32""",
    )
    both = torch.cat((gate, up), -1).double()
    assert_expected_inline(
        refusal(gate_and_up_in_one, both),
        """gate and up are torch.float64; the kernel computes in float32""",
    )


def test_refuses_halves_of_a_tensor_that_is_not_contiguous(gate, up):
    both = torch.cat((gate, up), 1).mT
    assert_expected_inline(
        refusal(gate_and_up_in_one, both),
        """the tensor of gate and up is not contiguous: the kernel would need a copy""",
    )


def test_refuses_halves_of_an_odd_number(gate):
    """Two elements and one: the product broadcasts."""
    assert_expected_inline(
        refusal(gate_and_up_in_one, gate[..., :3].contiguous()),
        """gate and up are 3 elements of one tensor, expected an even constant""",
    )
    assert_expected_inline(
        refusal(gpt_oss, gate[..., :3].contiguous()),
        """gate and up are 3 elements of one tensor, expected an even constant""",
    )


def test_refuses_halves_of_an_unknown_number(gate, up):
    (report,) = capture(gate_and_up_in_one, torch.cat((gate, up), -1), dynamic=True).reports
    assert report.counts == {} and "expected an even constant" in reasons(report)


def test_refuses_two_limits(gate, up):
    def fn(gate_up):
        gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-6.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.7))

    assert_expected_inline(
        refusal(fn, torch.cat((gate, up), -1)),
        """up is clamped to -6.0 and 7.0, expected one limit on both sides""",
    )


def test_refuses_a_limit_that_is_computed(gate, up):
    assert_expected_inline(
        refusal(gpt_oss, torch.cat((gate, up), -1), torch.tensor(1.7, device=DEVICE)),
        """the limits and the factor of the gate are not all constants""",
    )


def test_refuses_a_clamped_gate_that_escapes(gate, up):
    def fn(gate_up):
        gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.7)), gate

    assert_expected_inline(
        refusal(fn, torch.cat((gate, up), -1)),
        """the value of `clamp` (gate) is also returned""",
    )


def test_refuses_a_number(gate):
    assert_expected_inline(
        refusal(lambda g: F.silu(g) * 2.0, gate),
        """up is a number, 2.0; the kernel takes two tensors""",
    )


def test_refuses_rows_that_no_block_holds():
    gate, up = (torch.randn(1, 65537, device=DEVICE) for _ in range(2))
    assert_expected_inline(
        refusal(huggingface, gate, up),
        """a row has 65537 elements; the kernel takes at most 65536""",
    )


def test_refuses_an_activated_gate_that_escapes(gate, up):
    def fn(g, u):
        active = F.silu(g)
        return active * u, active

    assert_expected_inline(
        refusal(fn, gate, up), """the value of `silu` (active) is also returned"""
    )


# -- leaves alone ----------------------------------------------------------------------------------


def test_leaves_a_sigmoid_gate(gate, up):
    (report,) = capture(lambda g, u: torch.sigmoid(g) * u, gate, up).reports
    assert report.counts == {} and report.rejections == [] and report.near_misses == []


def test_leaves_gates_of_one_limit_and_ups_of_another(gate, up):
    def two_limits(gate_up):
        gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-6.0, 6.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.7))

    def swapped(gate_up):
        gate, up = gate_up[..., 1::2].clamp(max=7.0), gate_up[..., ::2].clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.7))

    def two_gates(gate_up):
        gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(up * 1.7))

    for fn in (two_limits, swapped, two_gates):
        (report,) = capture(fn, torch.cat((gate, up), -1)).reports
        assert report.counts == {} and report.rejections == []


def test_leaves_an_activation_in_place(gate, up):
    (report,) = capture(lambda g, u: F.silu(g + 0, inplace=True) * u, gate, up).reports
    assert report.counts == {} and report.rejections == []


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics(spelling, dtype):
    no_worse_than_eager(spelling, exact, [(40, 5, 257)] * 2, "swiglu", dtype)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_numerics_of_gate_and_up_in_one(inner):
    def reference(gate_up):
        return exact(*gate_up.chunk(2, -1))

    no_worse_than_eager(
        gate_and_up_in_one, reference, [(40, 5, 514)], "swiglu", torch.bfloat16, inner
    )


@pytest.mark.parametrize("spelling", CLAMPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics_of_clamped_gates(spelling, dtype):
    no_worse_than_eager(spelling, spelling, [(40, 5, 514)], "swiglu", dtype)


def test_numerics_of_clamped_gates_under_inductor():
    no_worse_than_eager(gpt_oss, gpt_oss, [(40, 5, 514)], "swiglu", torch.bfloat16, "inductor")


def test_clamped_gates_keep_nan_and_inf():
    both = torch.tensor(
        [[float("nan"), 1.0, 1.0, float("nan"), float("inf"), -float("inf"), -float("inf"), 2.0]],
        requires_grad=True,
    )
    options = {"policy": ["swiglu"], "inner": "aot_eager"}
    compiled = torch.compile(gpt_oss, backend="liger_fx", options=options)
    actual, expected = compiled(both), gpt_oss(both)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    for a, e in zip(
        torch.autograd.grad(actual.nansum(), both),
        torch.autograd.grad(expected.nansum(), both),
        strict=True,
    ):
        torch.testing.assert_close(a[:, 1:6], e[:, 1:6], equal_nan=True)


def mlp(x, w1, w2, w3):
    return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_the_backward_overwrites_is_its_own(inner, checkpointed, gate):  # A8
    weights = [torch.randn(SIZE, SIZE, device=DEVICE, requires_grad=True) for _ in range(3)]

    def mlp(x, w1, w2, w3):
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)

    def gate_is_saved_by_what_made_it(x, w1, w2, w3):  # tanh and exp need their results
        return F.linear(F.silu(F.linear(x, w1).tanh()) * F.linear(x, w3).exp(), w2)

    def layer(fn, *args):
        return checkpoint(fn, *args, use_reentrant=False) if checkpointed else fn(*args)

    def gate_and_up_are_read_elsewhere(x, w1, w2, w3):
        gate, up = F.linear(x, w1), F.linear(x, w3)
        return F.linear(F.silu(gate) * up, w2) + gate.sin() * up.cos()

    for fn in (mlp, gate_is_saved_by_what_made_it, gate_and_up_are_read_elsewhere):
        torch._dynamo.reset()
        options = {"policy": ["swiglu"], "inner": inner}
        compiled = torch.compile(
            lambda *t, f=fn: layer(f, *t), backend="liger_fx", options=options, fullgraph=True
        )
        inputs = (gate / 4, *weights)
        value = compiled(*inputs).sin().sum()
        assert liger_fx.reports()[-1].counts == {"swiglu": 1}
        expected = torch.autograd.grad(fn(*inputs).sin().sum(), inputs)
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        second = torch.autograd.grad(value, inputs)
        for a, b, e in zip(first, second, expected, strict=True):
            assert torch.equal(a, b)
            assert relative_error(a, e) < 1e-5
