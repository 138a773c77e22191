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


def exact(x, w, b):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * w + b


SPELLINGS = [torch_module, torchtune_fp32]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic, inputs):
    (report,) = capture(spelling, *(t.to(dtype) for t in inputs), dynamic=dynamic).reports
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


def test_refuses_a_norm_without_a_bias(inputs):
    x, w, _ = inputs
    assert_expected_inline(
        refusal(lambda x, w: F.layer_norm(x, (H,), w), x, w),
        """the norm lacks weight or bias; the kernel takes both""",
    )


def test_refuses_parameters_of_two_dtypes(inputs):
    x, w, b = inputs
    assert_expected_inline(
        refusal(torchtune_fp32, x, w, b.bfloat16()),
        """weight and bias are torch.float32 and torch.bfloat16""",
    )


def test_refuses_double_precision(inputs):
    assert_expected_inline(
        refusal(torch_module, *(t.double() for t in inputs)),
        """weight and bias are torch.float64 and torch.float64""",
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


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics(spelling, dtype):
    no_worse_than_eager(spelling, exact, SHAPES, "layer_norm", dtype)


def test_numerics_under_inductor():  # A2
    no_worse_than_eager(torch_module, exact, SHAPES, "layer_norm", inner="inductor")
