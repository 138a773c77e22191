"""The rewrite ``add_rms_norm``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _norm_spellings import SPELLINGS, H, exact, huggingface, torchtune
from _op_checks import assert_all_close
from _util import DEVICE, gradients, no_worse_than_eager, only, reasons, show
from expecttest import assert_expected_inline
from liger_fx.passes import add_rms_norm, rms_norm
from torch.utils.checkpoint import checkpoint

import liger_fx

capture = only(add_rms_norm)
SHAPES = [(40, 5, 257), (40, 5, 257), (257,)]


@pytest.fixture
def inputs():
    """x, residual and weight."""
    x, r = (torch.randn(2, 5, H, device=DEVICE, requires_grad=True) for _ in range(2))
    return x, r, torch.rand(H, device=DEVICE, requires_grad=True)


def after(norm, order=(0, 1)):
    """A function that adds, in this order, norms the sum, and uses both."""

    def fn(*inputs):
        total = inputs[order[0]] + inputs[order[1]]
        return norm(total, inputs[2]).sin() + total

    return fn


# -- fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic, inputs):
    found = capture(after(spelling), *(t.to(dtype) for t in inputs), dynamic=dynamic)
    assert found.reports[0].counts == {"add_rms_norm": 1}, found.reports[0]
    assert "rsqrt" not in show(found.graphs[0])


def test_a_sum_of_a_sum_is_measured_apart(inputs):
    """Where Inductor would compute both in one kernel: not where the first is read again."""

    def fn(x, adapter, residual, weight, again):
        branch = x.sin() + adapter
        total = branch + residual
        return torchtune(total, weight) * total + (branch.cos() if again else 0)

    x, residual, weight = inputs
    for again, spelling in ((False, "add_torchtune, of a sum"), (True, "add_torchtune")):
        found = capture(fn, x, x.cos(), residual, weight, again)
        assert [made.pattern for made in found.reports[0].replacements] == [spelling]


def test_fires_graph(inputs):
    found = capture(after(torchtune), *(t.bfloat16() for t in inputs))
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_inputs_0_: "bf16[2, 5, 24]", L_inputs_1_: "bf16[2, 5, 24]", L_inputs_2_: "bf16[24]"):
    l_inputs_0_ = L_inputs_0_
    l_inputs_1_ = L_inputs_1_
    l_inputs_2_ = L_inputs_2_
    add_rms_norm_default = torch.ops.liger_fx.add_rms_norm.default(l_inputs_0_, l_inputs_1_, l_inputs_2_, 1e-05, 0.0, 'gemma')
    getitem: "bf16[2, 5, 24]" = add_rms_norm_default[0]
    getitem_1: "bf16[2, 5, 24]" = add_rms_norm_default[1]
    sin: "bf16[2, 5, 24]" = getitem.sin()
    add_1: "bf16[2, 5, 24]" = sin + getitem_1
    return (add_1,)""",
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_fires_in_either_order(order, inputs):
    fn = after(huggingface, order)
    found = capture(fn, *inputs)
    assert found.reports[0].counts == {"add_rms_norm": 1}
    torch.testing.assert_close(found.value, fn(*inputs))


def test_fires_where_the_sum_goes_nowhere_else(inputs):  # the last norm of a decoder
    def fn(x, r, w):
        return torchtune(x + r, w)

    assert capture(fn, *inputs).reports[0].counts == {"add_rms_norm": 1}


def test_fires_where_the_sum_is_returned(inputs):  # the last sum of a layer's graph
    def fn(x, r, w):
        total = x + r
        return torchtune(total, w), total

    assert capture(fn, *inputs).reports[0].counts == {"add_rms_norm": 1}


def test_sums_that_feed_each_other(inputs):
    def fn(x, r, w):
        first = x + r
        second = first + torchtune(first, w)
        return second + torchtune(second, w)

    found = capture(fn, *inputs)
    assert found.reports[0].counts == {"add_rms_norm": 2}
    torch.testing.assert_close(found.value, fn(*inputs))


def test_what_uses_the_sum_before_the_norm_gets_it(inputs):
    def fn(x, r, w):
        total = x + r
        early = total.cos()
        return torchtune(total, w) + early

    found = capture(fn, *inputs)
    assert found.reports[0].counts == {"add_rms_norm": 1}
    torch.testing.assert_close(found.value, fn(*inputs))


def test_a_sum_of_two_dtypes_is_cast_as_torch_does(inputs):  # autocast
    x, r, w = inputs
    found = capture(after(torchtune), x.bfloat16(), r, w)
    assert found.reports[0].counts == {"add_rms_norm": 1}
    torch.testing.assert_close(found.value, after(torchtune)(x.bfloat16(), r, w))


def unweighted(x, _):
    """nanochat's."""
    return F.rms_norm(x, (x.size(-1),))


def unweighted_torchtune(x, _):
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


def unweighted_huggingface(x, _):
    f = x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x)


UNWEIGHTED = [unweighted, unweighted_torchtune, unweighted_huggingface]


@pytest.mark.parametrize("norm", UNWEIGHTED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_without_a_weight(norm, dynamic, inputs):
    x, r = (t.bfloat16() for t in inputs[:2])
    found = capture(after(norm), x, r, None, dynamic=dynamic)
    assert found.reports[0].counts == {"add_rms_norm": 1}
    torch.testing.assert_close(found.value, after(norm)(x, r, None))


def test_without_a_weight_of_a_sum_of_two_dtypes(inputs):
    x, r = inputs[0].bfloat16(), inputs[1]
    found = capture(after(unweighted), x, r, None)
    assert found.reports[0].counts == {"add_rms_norm": 1}
    torch.testing.assert_close(found.value, after(unweighted)(x, r, None))


def test_is_tried_before_rms_norm(inputs):
    (report,) = only(add_rms_norm, rms_norm)(after(torchtune), *inputs).reports
    assert report.counts == {"add_rms_norm": 1}


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_a_sum_that_broadcasts(inputs):
    x, _, w = inputs
    assert_expected_inline(
        refusal(after(torchtune), x, x[0, 0], w), """the sum broadcasts [2, 5, 24] and [24]"""
    )


def test_refuses_a_weight_that_broadcasts(inputs):
    x, r, w = inputs
    assert_expected_inline(
        refusal(after(huggingface), x, r, w[:1]),
        """the weight is [1], expected [24]: the product broadcasts, the kernel reads one weight for each column""",
    )


def test_refuses_a_number(inputs):
    x, _, w = inputs
    assert_expected_inline(
        refusal(lambda x, w: torchtune(x + 1.0, w), x, w),
        """a number, 1.0, is added; the kernel adds two tensors""",
    )


def test_refuses_what_rms_norm_refuses(inputs):
    x, r, w = (t.double() for t in inputs)
    assert_expected_inline(
        refusal(lambda x, r, w: torch.rms_norm(x + r, (H,), w, 1e-5), x, r, w),
        """the weight is torch.float64; the kernel computes in float32""",
    )


def test_refuses_a_weight_that_is_computed_after_the_sum(inputs):
    def fn(x, r, w):
        total = x + r
        return torchtune(total, w * total.mean())

    assert_expected_inline(refusal(fn, *inputs), """weight (mul) is computed only after total""")


# -- leaves alone ----------------------------------------------------------------------------------


def test_leaves_a_difference(inputs):
    (report,) = capture(lambda x, r, w: torchtune(x - r, w), *inputs).reports
    assert report.counts == {} and report.rejections == []
    assert_expected_inline(report.near_misses[0].reason, """wanted add, found `sub` (sub)""")


def test_leaves_a_sum_in_place(inputs):
    def fn(x, r, w):
        x = x.clone()
        x += r
        return torchtune(x, w) + x

    (report,) = capture(fn, *inputs).reports
    assert report.counts == {} and report.rejections == []


def test_refuses_a_weight_that_is_written_after_the_sum(inputs):
    """The op would stand at the sum, and read the weight as it was."""

    def fn(x, residual, weight):
        weight = weight.clone()
        total = x + residual
        weight[0] = 0.0
        return torchtune(total, weight).sin() + total

    found = capture(fn, *inputs)
    assert found.reports[0].counts == {}
    assert "is written in place by `setitem` (setitem)" in reasons(found.reports[0])


def test_a_sum_that_is_written_to_afterwards(inputs):
    def fn(x, r, w):
        total = x + r
        normed = torchtune(total, w)
        total.mul_(2.0)
        return normed + total

    x, r, w = (t.detach() for t in inputs)
    found = capture(fn, x, r, w)
    assert found.reports[0].counts == {"add_rms_norm": 1}
    torch.testing.assert_close(found.value, fn(x, r, w))


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics(spelling, dtype):
    no_worse_than_eager(after(spelling), after(exact(spelling)), SHAPES, "add_rms_norm", dtype)


@pytest.mark.parametrize("norm", UNWEIGHTED[1:], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics_without_a_weight(dtype, norm):
    def fn(x, r):
        return after(norm)(x, r, None)

    def reference(x, r):
        return F.rms_norm(x + r, x.shape[-1:], eps=1e-5).sin() + x + r

    no_worse_than_eager(fn, reference, SHAPES[:2], "add_rms_norm", dtype)


def test_numerics_under_inductor():
    fn, reference = after(torchtune), after(exact(torchtune))
    no_worse_than_eager(fn, reference, SHAPES, "add_rms_norm", torch.bfloat16, "inductor")


def megatron(x, r, w):
    """Its layers work on [s, b, h]: here these are seen as [b, s, h], and as rows again."""
    total = x.transpose(0, 1) + r.transpose(0, 1)
    normed = huggingface(total, w)
    return normed.transpose(0, 1).view(-1, H).sin(), total.transpose(0, 1).view(-1, H)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_views_of_the_results_see_eagers_layout(inner, dynamic, inputs):
    def loss(fn):
        return lambda *t: sum(out.cos().sum() for out in fn(*t))

    options = {"policy": ["add_rms_norm"], "inner": inner}
    compiled = torch.compile(
        megatron, backend="liger_fx", options=options, dynamic=dynamic, fullgraph=True
    )
    assert_all_close(gradients(loss(compiled), *inputs), gradients(loss(megatron), *inputs))
    assert liger_fx.reports()[-1].counts == {"add_rms_norm": 1}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_checkpointed_layers_save_no_more_than_before(inner, inputs):  # A37
    x, r, w = inputs
    weight = torch.randn(H, H, device=DEVICE, requires_grad=True)

    def layer(x, r, w, weight):
        total = x + r
        return total + F.linear(torchtune(total, w), weight).sin()

    def saved(backend, **kwargs):
        torch._dynamo.reset()
        fn = torch.compile(
            lambda *t: checkpoint(layer, *t, use_reentrant=False), backend=backend, **kwargs
        )
        out = fn(x, r, w, weight)
        return sum(t.numel() for t in out.grad_fn.saved_tensors)

    plain = saved(inner)
    assert saved("liger_fx", options={"policy": "all", "inner": inner}) <= plain
    assert liger_fx.reports()[-1].counts == {"add_rms_norm": 1}
