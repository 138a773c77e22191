"""The rewrite ``layer_norm``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _util import DEVICE, no_worse_than_eager, only, reasons, show
from expecttest import assert_expected_inline
from liger_fx.passes import layer_norm

capture = only(layer_norm)
H, EPS = 24, 1e-5
SHAPES = [(40, 5, 257), (257,), (257,)]


@pytest.fixture
def inputs():
    """x, weight and bias."""
    x = torch.randn(2, 5, H, device=DEVICE, requires_grad=True)
    return x, *(torch.rand(H, device=DEVICE, requires_grad=True) for _ in range(2))


def torch_module(x, w, b):
    return F.layer_norm(x, w.shape, w, b, EPS)


def torchtune_fp32(x, w, b):
    return F.layer_norm(x.float(), w.shape, w.float(), b.float(), EPS).type_as(x)


def without_bias(x, w):
    return F.layer_norm(x, w.shape, w, None, EPS)


def without_bias_in_fp32(x, w):
    return F.layer_norm(x.float(), w.shape, w.float(), None, EPS).to(x.dtype)


def cohere(x, w):
    dtype, x = x.dtype, x.to(torch.float32)
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    x = (x - mean) * torch.rsqrt(variance + EPS)
    return (w.to(torch.float32) * x).to(dtype)


def without_parameters(x):
    return F.layer_norm(x, (x.shape[-1],), eps=EPS)


def olmo(x):
    dtype = x.dtype
    return F.layer_norm(x.to(torch.float32), (x.shape[-1],), None, None, eps=EPS).to(dtype)


def exact(x, w=1.0, b=0.0):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * w + b


SPELLINGS = {  # how many of x, weight and bias each takes
    torch_module: 3,
    torchtune_fp32: 3,
    without_bias: 2,
    without_bias_in_fp32: 2,
    cohere: 2,
    without_parameters: 1,
    olmo: 1,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic, inputs):
    inputs = [t.to(dtype) for t in inputs[: SPELLINGS[spelling]]]
    (report,) = capture(spelling, *inputs, dynamic=dynamic).reports
    assert report.counts == {"layer_norm": 1}, report
    assert report.rejections == [] and report.near_misses == []


def test_fires_graph(inputs):
    found = capture(torchtune_fp32, *(t.bfloat16() for t in inputs))
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_x_: "bf16[2, 5, 24]", L_w_: "bf16[24]", L_b_: "bf16[24]"):
    l_x_ = L_x_
    l_w_ = L_w_
    l_b_ = L_b_
    layer_norm_default: "bf16[2, 5, 24]" = torch.ops.liger_fx.layer_norm.default(l_x_, l_w_, l_b_, 1e-05)
    return (layer_norm_default,)""",
    )


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_several_dimensions(inputs):
    x = inputs[0]
    w, b = (torch.rand(5, H, device=DEVICE) for _ in range(2))
    assert_expected_inline(
        refusal(lambda *t: F.layer_norm(t[0], (5, H), *t[1:]), x, w, b),
        """it normalises 2 dimensions; the kernel takes the last""",
    )


def test_refuses_a_bias_without_a_weight(inputs):
    x, _, b = inputs
    assert_expected_inline(
        refusal(lambda x, b: F.layer_norm(x, (H,), None, b), x, b),
        """the norm has a bias and no weight""",
    )


def test_refuses_weights_for_each_head(inputs):  # Cohere's norm of queries
    x, w, _ = inputs
    assert_expected_inline(
        refusal(cohere, x, torch.rand(5, H, device=DEVICE)),
        """the weight is [5, 24], expected [24]: the kernel reads one weight for each column""",
    )
    found = capture(cohere, x, w[:1])
    assert found.reports[0].counts == {} and "the weight is [1]" in reasons(found.reports[0])
    torch.testing.assert_close(found.value, cohere(x, w[:1]))


def test_refuses_parameters_of_two_dtypes(inputs):
    x, w, b = inputs
    assert_expected_inline(
        refusal(torchtune_fp32, x, w, b.bfloat16()),
        """weight and bias are torch.float32 and torch.bfloat16, expected one dtype""",
    )


def test_refuses_double_precision(inputs):
    assert_expected_inline(
        refusal(torch_module, *(t.double() for t in inputs)),
        """the weight is torch.float64; the kernel computes in float32""",
    )


def test_another_output_dtype_leaves_the_inner_norm(inputs):
    def fn(x, w, b):
        return F.layer_norm(x.float(), (H,), w, b, EPS).to(torch.float16)

    found = capture(fn, inputs[0].bfloat16(), *inputs[1:])
    assert found.reports[0].counts == {"layer_norm": 1}
    assert "to(torch.float16)" in show(found.graphs[0])


def test_leaves_a_group_norm(inputs):
    def fn(x, w, b):
        return F.group_norm(x.transpose(1, 2), 4, w, b)

    (report,) = capture(fn, *inputs).reports
    assert report.counts == {} and report.rejections == []


def test_leaves_a_variance_of_another_centre(inputs):
    def fn(x, w):
        f = x.float()
        variance = (f - f.amax(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
        normed = (f - f.mean(-1, keepdim=True)) * torch.rsqrt(variance + EPS)
        return (w.float() * normed).to(x.dtype)

    (report,) = capture(fn, *inputs[:2]).reports
    assert report.counts == {} and report.rejections == []


def test_leaves_an_unbiased_variance(inputs):
    def fn(x, w):
        centred = x - x.mean(-1, keepdim=True)
        return w * (centred * torch.rsqrt(x.var(-1, keepdim=True) + EPS))

    (report,) = capture(fn, *inputs[:2]).reports
    assert report.counts == {} and report.rejections == []


def test_refuses_a_centre_that_escapes(inputs):
    def fn(x, w):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)
        return w * normed, centred

    assert_expected_inline(
        refusal(fn, *inputs[:2]), """the value of `sub` (centred) is also returned"""
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics(spelling, dtype):
    no_worse_than_eager(spelling, exact, SHAPES[: SPELLINGS[spelling]], "layer_norm", dtype)


def test_numerics_under_inductor():  # A2
    no_worse_than_eager(torch_module, exact, SHAPES, "layer_norm", inner="inductor")
