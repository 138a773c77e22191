"""The rewrite ``cross_entropy``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _util import DEVICE, gradients, no_worse_than_eager, only, reasons, show
from expecttest import assert_expected_inline
from liger_fx.passes import cross_entropy, linear_cross_entropy

import liger_fx

capture = only(cross_entropy)
N, V = 40, 61


@pytest.fixture
def logits():
    return torch.randn(N, V, device=DEVICE, requires_grad=True)


@pytest.fixture
def labels():
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(0))
    labels[:7] = -100
    return labels.to(DEVICE)


def torchtune(logits, y):
    """nn.CrossEntropyLoss: the recipe casts and flattens before."""
    return F.cross_entropy(logits, y, weight=None, ignore_index=-100, reduction="mean")


def torchtune_chunk(logits, y):
    """A chunk of CEWithChunkedOutputLoss."""
    return F.cross_entropy(logits.float(), y, ignore_index=-100, reduction="sum")


def smoothed(logits, y):
    return F.cross_entropy(logits.float(), y, label_smoothing=0.1)


def per_token(logits, y):
    return F.cross_entropy(logits.float(), y, reduction="none")


def other_ignore_index(logits, y):
    return F.cross_entropy(logits.float(), y.clamp_min(0), ignore_index=0)


def class_weights(logits, y):
    return F.cross_entropy(logits.float(), y, torch.linspace(0.5, 2, V, device=y.device))


SPELLINGS = [
    torchtune,
    torchtune_chunk,
    smoothed,
    per_token,
    other_ignore_index,
    class_weights,
]


# -- fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic, logits, labels):
    (report,) = capture(spelling, logits.to(dtype), labels, dynamic=dynamic).reports
    assert report.counts == {"cross_entropy": 1}, report
    assert report.rejections == [] and report.near_misses == []


def test_fires_graph(logits, labels):
    found = capture(torchtune_chunk, logits.bfloat16(), labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_logits_: "bf16[40, 61]", L_y_: "i64[40]"):
    l_logits_ = L_logits_
    l_y_ = L_y_
    cross_entropy_default: "f32[40]" = torch.ops.liger_fx.cross_entropy.default(l_logits_, l_y_, None, -100, 0.0)
    sum_1: "f32[]" = cross_entropy_default.sum()
    return (sum_1,)""",
    )


def test_fires_graph_of_a_weighted_mean(logits, labels):
    found = capture(class_weights, logits, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_logits_: "f32[40, 61]", L_y_: "i64[40]"):
    l_logits_ = L_logits_
    l_y_ = L_y_
    linspace: "f32[61]" = torch.linspace(0.5, 2, 61)
    cross_entropy_default: "f32[40]" = torch.ops.liger_fx.cross_entropy.default(l_logits_, l_y_, linspace, -100, 0.0)
    sum_1: "f32[]" = cross_entropy_default.sum()
    ne: "b8[40]" = l_y_ != -100
    where: "i64[40]" = l_y_.where(ne, 0)
    getitem: "f32[40]" = linspace[where]
    mul: "f32[40]" = getitem * ne
    sum_2: "f32[]" = mul.sum()
    truediv: "f32[]" = sum_1 / sum_2
    return (truediv,)""",
    )


def test_takes_what_linear_cross_entropy_could_not(logits, labels):
    hidden = torch.randn(N, 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, 8, device=DEVICE, requires_grad=True)

    def fn(h, w, y):
        logits = F.linear(h, w)
        return F.cross_entropy(logits.float(), y), logits

    (report,) = only(linear_cross_entropy, cross_entropy)(fn, hidden, weight, labels).reports
    assert report.counts == {"cross_entropy": 1}
    assert_expected_inline(reasons(report), """the value of `linear` (logits) is also returned""")


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args, **kwargs):
    (report,) = capture(fn, *args, **kwargs).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_probability_targets(logits):
    target = torch.rand(N, V, device=DEVICE)
    assert_expected_inline(
        refusal(F.cross_entropy, logits, target),
        """the target is class probabilities, not class indices""",
    )


def test_refuses_logits_of_three_dimensions(labels):
    logits = torch.randn(2, V, N, device=DEVICE)
    assert_expected_inline(
        refusal(F.cross_entropy, logits, labels.expand(2, N)),
        """the logits are 3-D, expected 2-D [tokens, classes]""",
    )


def test_refuses_double_precision(logits, labels):
    assert_expected_inline(
        refusal(F.cross_entropy, logits.double(), labels),
        """the loss is computed in torch.float64; the kernel in float32""",
    )


def test_refuses_an_ignore_index_that_is_no_constant(logits, labels):
    def fn(logits, y, i):
        return F.cross_entropy(logits, y, ignore_index=i)

    assert_expected_inline(
        refusal(fn, logits, labels.clamp_min(0), 7, dynamic=True),
        """ignore_index is computed in the graph, expected a constant""",
    )


# -- leaves alone ----------------------------------------------------------------------------------


def test_leaves_the_likelihood_of_log_probabilities(logits, labels):
    (report,) = capture(lambda x, y: F.nll_loss(x.log_softmax(-1), y), logits, labels).reports
    assert report.counts == {} and report.rejections == [] and report.near_misses == []


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics(spelling, dtype, labels):
    check_numerics(spelling, dtype, "aot_eager", labels)


def test_numerics_under_inductor(labels):
    check_numerics(torchtune_chunk, torch.bfloat16, "inductor", labels)


def check_numerics(spelling, dtype, inner, labels):
    def exact(logits):
        e = 0.1 if spelling is smoothed else 0.0
        y = labels.clamp_min(0) if spelling is other_ignore_index else labels
        valid = y != (0 if spelling is other_ignore_index else -100)
        w = torch.linspace(0.5, 2, V, device=DEVICE, dtype=torch.float64)
        w = w if spelling is class_weights else torch.ones_like(w)
        logp = logits.log_softmax(-1)
        of_label = -logp.gather(1, y.where(valid, 0)[:, None]).squeeze(1)
        w = w[y.where(valid, 0)] * valid
        losses = ((1 - e) * of_label - e * logp.mean(-1)) * w
        if spelling is per_token:
            return losses
        return losses.sum() if spelling is torchtune_chunk else losses.sum() / w.sum()

    no_worse_than_eager(
        lambda x: spelling(x, labels), exact, [(N, V)], "cross_entropy", dtype, inner
    )


def compiled(fn, inner="aot_eager"):
    torch._dynamo.reset()
    options = {"policy": ["cross_entropy"], "inner": inner}
    return torch.compile(fn, backend="liger_fx", options=options, fullgraph=True)


def test_a_label_smoothing_that_changes_is_not_baked_in(logits, labels):
    def fn(x, y, e):
        return F.cross_entropy(x, y, label_smoothing=e)

    options = {"policy": "all", "inner": "eager"}
    dynamic = torch.compile(fn, backend="liger_fx", options=options, dynamic=True)
    for e in (0.1, 0.2):
        torch.testing.assert_close(dynamic(logits, labels, e), fn(logits, labels, e))
    assert liger_fx.reports()[-1].counts == {"cross_entropy": 1}


@pytest.mark.parametrize("spelling", [torchtune, torchtune_chunk, per_token])
def test_all_labels_ignored_behaves_as_eager(spelling, logits, labels):  # A15
    nothing = torch.full_like(labels, -100)

    def total(fn):
        return lambda x: fn(x, nothing).sum()

    expected = gradients(total(spelling), logits)
    for a, e in zip(gradients(total(compiled(spelling)), logits), expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)  # the mean is nan, its gradient zero


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_logits_that_others_have_saved_stay_whole(inner, logits, labels):  # A6
    def fn(x, y):
        probabilities = x.softmax(-1)  # saves its result, which is what the loss gets
        return torchtune(probabilities * 5, y) + torchtune(probabilities, y), probabilities

    def run(f):
        x = logits.detach().clone().requires_grad_()
        value, seen = f(x, labels)
        before = seen.detach().clone()
        (gradient,) = torch.autograd.grad(value, x)
        assert torch.equal(seen, before) and torch.equal(x, logits)
        return value, gradient

    for a, e in zip(run(compiled(fn, inner)), run(fn), strict=True):
        torch.testing.assert_close(a, e)
    assert liger_fx.reports()[-1].counts == {"cross_entropy": 2}
