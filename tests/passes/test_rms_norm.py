"""The rewrite ``rms_norm``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _norm_spellings import (
    EPS,
    SPELLINGS,
    H,
    exact,
    gemma4,
    gpt_oss,
    huggingface,
    lit_gpt,
    meta_llama,
    olmo,
    torchtune,
    torchtune_gemma,
)
from _util import DEVICE, no_worse_than_eager, only, reasons, show
from expecttest import assert_expected_inline
from liger_fx.passes import rms_norm
from torch.utils.checkpoint import checkpoint

import liger_fx

capture = only(rms_norm)
SHAPES = [(40, 5, 257), (257,)]


@pytest.fixture
def x():
    return torch.randn(2, 5, H, device=DEVICE, requires_grad=True)


@pytest.fixture
def w():
    return torch.rand(H, device=DEVICE, requires_grad=True)


# -- fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic, x, w):
    (report,) = capture(spelling, x.to(dtype), w.to(dtype), dynamic=dynamic).reports
    assert report.counts == {"rms_norm": 1}, report
    assert report.rejections == [] and report.near_misses == []


def test_fires_graph(x, w):
    found = capture(torchtune, x.bfloat16(), w.bfloat16())
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_x_: "bf16[2, 5, 24]", L_w_: "bf16[24]"):
    l_x_ = L_x_
    l_w_ = L_w_
    rms_norm_default: "bf16[2, 5, 24]" = torch.ops.liger_fx.rms_norm.default(l_x_, l_w_, 1e-05, 0.0, 'gemma')
    return (rms_norm_default,)""",
    )


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_each_spelling_keeps_its_rounding(spelling, x, w):
    (gm,) = capture(spelling, x.bfloat16(), w.bfloat16()).graphs
    (op,) = (n for n in gm.graph.nodes if "liger_fx" in str(n.target))
    eps, offset, casting = op.args[2:]
    assert eps == (EPS if spelling.__name__ != "no_eps" else torch.finfo(torch.float32).eps)
    assert offset == (1.0 if spelling is torchtune_gemma else 0.0)
    llama = ("huggingface", "meta_llama", "lit_gpt")
    assert casting == ("llama" if spelling.__name__ in llama else "gemma")


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_bf16_results_are_those_of_eager_bit_for_bit(spelling, x, w):  # A11
    x, w = x.detach().bfloat16(), w.detach().bfloat16()
    options = {"policy": "all", "inner": "eager"}
    actual = torch.compile(spelling, backend="liger_fx", options=options)(x, w)
    assert (actual == spelling(x, w)).float().mean() > (0.999 if DEVICE == "cuda" else 0.9999)


def test_without_a_weight(x):
    def hand_written(x):
        f = x.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x)

    def builtin(x):
        return torch.rms_norm(x, (H,), eps=EPS)

    for fn in (hand_written, builtin, deepseek_v4):
        assert capture(fn, x.bfloat16()).reports[0].counts == {"rms_norm": 1}


def deepseek_v4(x):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_without_weights_are_two(dtype, x):  # nanochat's first
    def norm(x):
        f = x.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x)

    def fn(x):
        first = norm(x)
        return first.sin() + norm(first)

    found = capture(fn, x.to(dtype))
    assert found.reports[0].counts == {"rms_norm": 2} and found.reports[0].rejections == []


def test_queries_and_keys_in_four_dimensions(w):
    q = torch.randn(2, 5, 3, H, device=DEVICE)

    def before_transposing(q, w):
        return huggingface(q, w).transpose(1, 2)

    def after_transposing(q, w):
        return huggingface(q.transpose(1, 2), w)

    for fn in (before_transposing, after_transposing):
        found = capture(fn, q, w)
        assert found.reports[0].counts == {"rms_norm": 1}
        assert "contiguous" not in show(found.graphs[0])


def test_the_layout_of_the_replaced_value_is_kept(w):
    q = torch.randn(2, 5, 3, H, device=DEVICE)

    def fn(q, w):  # torch.rms_norm's result is contiguous, whatever its input; view depends on it
        return torchtune(q.transpose(1, 2), w).view(2, -1)

    found = capture(fn, q, w)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_q_: "f32[2, 5, 3, 24]", L_w_: "f32[24]"):
    l_q_ = L_q_
    l_w_ = L_w_
    transpose: "f32[2, 3, 5, 24]" = l_q_.transpose(1, 2)
    contiguous: "f32[2, 3, 5, 24]" = transpose.contiguous()
    rms_norm_default: "f32[2, 3, 5, 24]" = torch.ops.liger_fx.rms_norm.default(contiguous, l_w_, 1e-05, 0.0, 'gemma')
    to: "f32[2, 3, 5, 24]" = rms_norm_default.to(torch.float32)
    view: "f32[2, 360]" = to.view(2, -1)
    return (view,)""",
    )
    torch.testing.assert_close(found.value, fn(q, w))


def test_an_upcast_that_has_other_users_stays_for_them(x, w):
    def fn(x, w):
        f = x.float()
        return torch.rms_norm(f, (H,), w, EPS).to(x.dtype), f.sum()

    found = capture(fn, x.bfloat16(), w)
    assert found.reports[0].counts == {"rms_norm": 1}
    assert "f.sum()" in show(found.graphs[0])


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args, **kwargs):
    (report,) = capture(fn, *args, **kwargs).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_several_dimensions(x):
    w = torch.rand(5, H, device=DEVICE)
    text = refusal(lambda x, w: torch.rms_norm(x, (5, H), w, EPS), x, w)
    assert_expected_inline(text, """it normalises 2 dimensions; the kernel takes the last""")


def test_refuses_a_weight_of_two_dimensions(x):
    w = torch.rand(5, H, device=DEVICE)
    assert_expected_inline(
        refusal(huggingface, x, w), """the weight is 2-D, expected 1-D [columns]"""
    )


HAND_WRITTEN = [torchtune_gemma, huggingface, meta_llama, lit_gpt, olmo, gpt_oss, gemma4]


@pytest.mark.parametrize("spelling", HAND_WRITTEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_refuses_a_weight_that_broadcasts(spelling, dynamic, x, w):
    """One weight for all columns, and one column for all weights. torch.rms_norm takes neither."""
    found = capture(spelling, x, w[:1], dynamic=dynamic)
    assert found.reports[0].counts == {} and "the weight is [1]" in reasons(found.reports[0])
    torch.testing.assert_close(found.value, spelling(x, w[:1]))
    found = capture(spelling, x[..., :1], w, dynamic=dynamic)
    assert found.reports[0].counts == {} and "expected [1]" in reasons(found.reports[0])
    torch.testing.assert_close(found.value, spelling(x[..., :1], w))


def test_says_how_long_the_weight_should_be(x, w):
    assert_expected_inline(
        refusal(huggingface, x, w[:1]),
        """the weight is [1], expected [24]: the product broadcasts, the kernel reads one weight for each column""",
    )


def test_refuses_double_precision(x, w):
    def fn(x, w):
        return torch.rms_norm(x, (H,), w, EPS)

    assert_expected_inline(
        refusal(fn, x.double(), w.double()),
        """the weight is torch.float64; the kernel computes in float32""",
    )


def test_refuses_another_output_dtype(x, w):
    assert_expected_inline(
        refusal(huggingface, x.bfloat16(), w),
        """the output is torch.float32, the input torch.bfloat16; the kernel writes the input's dtype (autocast, or a weight of another dtype?)""",
    )


def test_refuses_an_eps_that_is_no_constant(x, w):
    def fn(x, w, eps):
        f = x.float()
        return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    eps = torch.tensor(1e-5, device=DEVICE)
    assert_expected_inline(
        refusal(fn, x, w, eps), """eps is computed in the graph, expected a constant"""
    )


def test_refuses_rows_that_no_block_holds(w):
    x, w = torch.randn(1, 65537, device=DEVICE), torch.rand(65537, device=DEVICE)
    assert_expected_inline(
        refusal(huggingface, x, w), """a row has 65537 elements; the kernel takes at most 65536"""
    )


def test_refuses_a_normalised_value_that_escapes(x, w):
    def fn(x, w):
        f = x.float()
        normed = (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return w * normed, normed

    (report,) = capture(fn, x.bfloat16(), w.bfloat16()).reports
    assert_expected_inline(reasons(report), """the value of `cast` (normed) is also returned""")


def test_refuses_an_input_written_in_between(x, w):
    def fn(x, w):
        x = x * 1.0
        f = x.float()
        scale = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
        x.mul_(2.0)
        return w * (x * scale)

    with torch.no_grad():
        assert_expected_inline(
            refusal(fn, x.detach(), w.detach()),
            """x is written in place by `mul_` (mul_) before `mul`""",
        )


def test_refuses_dtensors(x, w):  # A24
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh(DEVICE, (2,))
        x = distribute_tensor(x.detach(), mesh, [Shard(1)])
        w = distribute_tensor(w.detach(), mesh, [Replicate()])
        assert_expected_inline(
            refusal(huggingface, x, w),
            """weight is a DTensor; the kernels take plain tensors only""",
        )
    finally:
        torch.distributed.destroy_process_group()


# -- leaves alone ----------------------------------------------------------------------------------


def test_leaves_a_norm_of_another_dimension(x, w):
    def fn(x, w):
        f = x.float()
        return w * (f * torch.rsqrt(f.pow(2).mean(1, keepdim=True) + EPS)).to(x.dtype)

    (report,) = capture(fn, x, w).reports
    assert report.counts == {} and report.rejections == []
    assert_expected_inline(report.near_misses[0].reason, """wanted -1, found 1""")


def test_leaves_a_norm_whose_eps_is_outside_of_the_root(x, w):
    def fn(x, w):
        f = x.float()
        return w * (f / (f.pow(2).mean(-1, keepdim=True).sqrt() + EPS)).to(x.dtype)

    (report,) = capture(fn, x, w).reports
    assert report.counts == {} and report.rejections == []


def test_leaves_a_statistic_of_another_value(x, w):
    def fn(x, w):
        f = x.float()
        return w * (f.sin() * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)

    (report,) = capture(fn, x, w).reports
    assert report.counts == {} and report.rejections == []


def test_leaves_another_root(x, w):
    def fn(x, w):
        f = x.float()
        return w * (f * torch.pow(f.pow(2).mean(-1, keepdim=True) + EPS, -0.25)).to(x.dtype)

    (report,) = capture(fn, x, w).reports
    assert report.counts == {} and report.rejections == []


def test_leaves_half_precision_statistics(x, w):
    def fn(x, w):  # no upcast: the squares are rounded to bf16
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))

    (report,) = capture(fn, x.bfloat16(), w.bfloat16()).reports
    assert report.counts == {} and report.rejections == []


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics(spelling, dtype):
    no_worse_than_eager(spelling, exact(spelling), SHAPES, "rms_norm", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics_without_a_weight(dtype):
    def exact(x):
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()

    no_worse_than_eager(deepseek_v4, exact, SHAPES[:1], "rms_norm", dtype)


@pytest.mark.parametrize("spelling", [torchtune, huggingface], ids=lambda f: f.__name__)
def test_numerics_under_inductor(spelling):  # A2
    no_worse_than_eager(spelling, exact(spelling), SHAPES, "rms_norm", torch.bfloat16, "inductor")


def test_an_eps_that_changes_is_not_baked_in(x, w):
    class Norm(torch.nn.Module):
        eps = 1e-5

        def forward(self, x, w):
            f = x.float()
            return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    norm, options = Norm(), {"policy": "all", "inner": "eager"}
    compiled = torch.compile(norm, backend="liger_fx", options=options, dynamic=True)
    for eps in (1e-5, 0.5):
        norm.eps = eps
        torch.testing.assert_close(compiled(x, w), norm(x, w))
        assert liger_fx.reports()[-1].counts == {"rms_norm": 1}


def test_a_shared_gradient_is_not_overwritten(x, w):  # A7: Gemma2's norm after the MLP
    def fn(x, w):
        return x + torchtune_gemma(torch.tanh(torchtune_gemma(x, w)), w)

    def reference(x, w):
        norm = exact(torchtune_gemma)
        return x + norm(torch.tanh(norm(x, w)), w)

    compiled = torch.compile(fn, backend="liger_fx", options={"policy": "all"}, fullgraph=True)
    (actual,) = torch.autograd.grad(compiled(x, w).sin().sum(), [x])
    assert liger_fx.reports()[-1].counts == {"rms_norm": 2}
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    (expected,) = torch.autograd.grad(reference(*wide).sin().sum(), wide[:1])
    torch.testing.assert_close(actual, expected.float())


def test_many_norms_are_one_graph_and_one_compile(x, w):  # A39
    layers = [torch.nn.RMSNorm(H, eps=EPS, device=DEVICE) for _ in range(12)]
    for layer in layers:
        layer.compile(backend="liger_fx", options={"policy": "all", "inner": "eager"})
        x = layer(x)
    x.sum().backward()
    assert len(liger_fx.reports()) <= 2  # with and without a gradient of the input


def test_the_gradient_lies_in_memory_as_in_eager():
    """The backward of dropout gives other strides than its fake does, where they differ; the view in
    the backward of the projection then raises."""

    def fn(x, weight):
        def layer(h):
            return torch.rms_norm(F.dropout(h, 0.5), (H,), weight, EPS)

        h = x * 2
        h.add_(F.linear(x.detach().contiguous(), square))
        return checkpoint(layer, h, use_reentrant=False).sin().sum()

    made = torch.randn(5, 2, H, device=DEVICE).transpose(0, 1)
    square = torch.randn(H, H, device=DEVICE, requires_grad=True)
    found = []
    for backend, options in (
        ("aot_eager", None),
        ("liger_fx", {"policy": "all", "inner": "aot_eager"}),
    ):
        torch._dynamo.reset()
        torch.manual_seed(1)
        x, weight = made.clone().requires_grad_(), torch.ones(H, device=DEVICE, requires_grad=True)
        compiled = torch.compile(fn, backend=backend, options=options)
        found.append(torch.autograd.grad(compiled(x, weight), (x, weight, square)))
    assert liger_fx.reports()[-1].counts == {"rms_norm": 1}
    torch.testing.assert_close(*found)
