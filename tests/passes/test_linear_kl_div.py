"""The rewrite ``linear_kl`` on `torch.nn.functional.kl_div` and what is built of it: Hinton's loss, the
generalised Jensen-Shannon divergence, masks, temperatures."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _kl_spellings import (
    HINTON,
    KL_DIVS,
    OF_KL_DIV,
    SOME_OF_KL_DIV,
    capture_kl,
    check_numerics,
    compiled,
    gkd,
    hinton,
    inputs,
    log_mixture,
    masked,
    outcome,
    refusal,
    spelling_name,
    teacher_logits,
)
from _spellings import H, T, V
from _util import DEVICE, capture, reasons, show
from expecttest import assert_expected_inline
from liger_fx.passes import linear_kl

import liger_fx

ONE_TOKEN_A_CHUNK = linear_kl.settings | {"chunk_tokens": 1}


# -- fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", OF_KL_DIV, ids=spelling_name)
def test_fires_once_on_every_use_of_kl_div(spelling, heads, labels):
    found = capture(spelling, *heads, labels)
    (report,) = found.reports
    assert report.counts == {"linear_kl": 1} and report.rejections == [], report
    torch.testing.assert_close(found.value, spelling(*heads, labels))


@pytest.mark.parametrize("spelling", SOME_OF_KL_DIV[1:4], ids=spelling_name)
def test_sizes_and_numbers_that_vary(spelling, heads, labels):
    found = capture(spelling, *heads, labels, dynamic=True)
    assert found.reports[0].counts == {"linear_kl": 1}
    torch.testing.assert_close(found.value, spelling(*heads, labels))


def filled(kl, mask):
    return kl.sum(-1).masked_fill(~mask, 0.0).sum() / mask.sum()


def chosen(kl, mask):
    return torch.where(mask.view(-1), kl.sum(-1).view(-1), 0).sum()


def multiplied_by_floats(kl, mask):
    return (mask.float() * kl.sum(dim=-1)).sum(-1).mean()


def of_each_class(kl, mask):
    return (4.0 * (kl * mask.unsqueeze(-1))).sum() / mask.sum()


def filled_in_place(kl, mask):
    return (kl / 2).masked_fill_(~mask[:, :, None], 0.0).sum(dim=(-1,)).sum()


def mean_of_all(kl, mask):
    return kl.mean()


REDUCTIONS = [filled, chosen, multiplied_by_floats, of_each_class, filled_in_place, mean_of_all]


def reduced(h, w, th, tw, y, reduction):
    kl = KL_DIVS["reverse_kl_div_of_logs"](F.linear(h, w), teacher_logits(th, tw), "none")
    return reduction(kl, y > 3)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda f: f.__name__)
def test_fires_on_every_reduction(reduction, heads, labels):
    fn = partial(reduced, reduction=reduction)
    found = capture(fn, *heads, labels)
    assert found.reports[0].counts == {"linear_kl": 1}
    actual = torch.autograd.grad(found.value, heads[:2])
    torch.testing.assert_close(found.value, fn(*heads, labels))
    torch.testing.assert_close(actual, torch.autograd.grad(fn(*heads, labels), heads[:2]))


def test_hinton_graph(heads, labels):
    assert_expected_inline(
        show(capture(hinton, *heads, labels).graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_th_: "f32[2, 6, 6]", L_tw_: "f32[13, 6]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_th_ = L_th_
    l_tw_ = L_tw_
    l_y_ = L_y_
    _set_grad_enabled = torch._C._set_grad_enabled(False)
    _set_grad_enabled_1 = torch._C._set_grad_enabled(True)
    getitem_2: "i64[2, 5]" = l_y_[(Ellipsis, slice(1, None, None))]
    contiguous_2: "i64[2, 5]" = getitem_2.contiguous()
    view_2: "i64[10]" = contiguous_2.view(-1)
    ne: "b8[10]" = view_2 != -100
    sum_1: "i64[]" = ne.sum()
    truediv_2: "f32[]" = 0.3 / sum_1
    float_1: "f32[]" = truediv_2.float()
    reshape: "f32[1]" = float_1.reshape(1)
    new_full: "f32[1]" = l_h_.new_full((1,), 0.27999999999999997, dtype = torch.float32)
    stack: "f32[2, 1]" = torch.stack([reshape, new_full])
    getitem_3: "f32[2, 5, 8]" = l_h_[(Ellipsis, slice(None, -1, None), slice(None, None, None))]
    getitem_4: "f32[2, 5, 6]" = l_th_[(Ellipsis, slice(None, -1, None), slice(None, None, None))]
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(getitem_3, l_w_, None, view_2, None, getitem_4, l_tw_, None, stack, ['cross_entropy', 'jensen_shannon'], -100, 0.0, 0.0, 2.0, 0.0, 0, torch.float32, True, False)
    getitem_5: "f32[]" = linear_loss_default[0]
    return (getitem_5,)""",
    )


def test_masked_jensen_shannon_graph(heads, labels):
    assert_expected_inline(
        show(capture(masked, *heads, labels).graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_th_: "f32[2, 6, 6]", L_tw_: "f32[13, 6]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_th_ = L_th_
    l_tw_ = L_tw_
    l_y_ = L_y_
    _set_grad_enabled = torch._C._set_grad_enabled(False)
    _set_grad_enabled_1 = torch._C._set_grad_enabled(True)
    mask: "b8[2, 6]" = l_y_ != -100
    ne_1: "b8[2, 6]" = mask != 0
    where: "f32[2, 6]" = torch.where(ne_1, mask, 0.0)
    unsqueeze: "f32[2, 6, 1]" = where.unsqueeze(2)
    expand: "f32[2, 6, 1]" = unsqueeze.expand((2, 6, 1))
    reshape: "f32[12]" = expand.reshape(-1)
    float_1: "f32[12]" = reshape.float()
    stack_1: "f32[1, 12]" = torch.stack([float_1])
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(l_h_, l_w_, None, None, None, l_th_, l_tw_, None, stack_1, ['jensen_shannon'], None, 0.0, 0.0, 1.0, 0.3, 0, torch.float32, True, False)
    getitem: "f32[]" = linear_loss_default[0]
    sum_3: "i64[]" = mask.sum()
    truediv: "f32[]" = getitem / sum_3
    return (truediv,)""",
    )


def test_the_loss_of_a_student_that_needs_no_gradient(heads, labels):
    """Evaluation of many tokens: the value is the same, whoever is the student."""
    with torch.no_grad():
        for spelling in OF_KL_DIV[1:6:2]:
            found = capture(
                spelling, *heads, labels, rewrites=[replace(linear_kl, settings=ONE_TOKEN_A_CHUNK)]
            )
            assert found.reports[0].counts == {"linear_kl": 1}
            torch.testing.assert_close(found.value, spelling(*heads, labels))


# -- refuses, leaves alone -------------------------------------------------------------------------


def with_kl(summed_up, temperatures=(1.0, 1.0), divergence="kl_div_of_logs"):
    def fn(h, w, th, tw, y):
        student, teacher = F.linear(h, w), teacher_logits(th, tw)
        student, teacher = (t / T for t, T in zip((student, teacher), temperatures, strict=True))
        return summed_up(KL_DIVS[divergence](student, teacher, "none"), y)

    return fn


def test_refuses_another_temperature_of_the_teacher(heads, labels):
    fn = with_kl(lambda kl, y: kl.sum(), (2.0, 1.0))
    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the teacher's logits have another temperature than the student's""",
    )


def test_refuses_a_temperature_that_is_not_positive(heads, labels):
    fn = with_kl(lambda kl, y: kl.sum(), (-1.0, -1.0))
    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the temperature or scale of the logits is computed or not positive, expected a constant""",
    )


def test_refuses_a_mask_of_classes(hidden, weight):
    """Even if there are as many as tokens."""
    teacher = torch.randn(1, V, T, device=DEVICE), torch.randn(V, T, device=DEVICE)
    fn = with_kl(lambda kl, y: (kl * (y > 3)).sum())
    student = torch.randn(1, V, H, device=DEVICE, requires_grad=True), weight
    assert_expected_inline(
        refusal(fn, *student, *teacher, torch.arange(V, device=DEVICE)),
        """the divergences of single classes leave the graph, or are added up by more than sum(), mean(), masks and weights of tokens; jsd[mask] ends the graph, jsd * mask does not""",
    )


PER_TOKEN = {
    "losses of tokens": lambda kl, y: kl.sum(-1),
    "squares": lambda kl, y: (kl.sum(-1) ** 2).sum(),
}


@pytest.mark.parametrize("ending", PER_TOKEN.values(), ids=PER_TOKEN)
def test_fires_on_losses_that_a_sum_does_not_weigh(ending, heads, labels):
    """Their backward projects again."""
    fn = with_kl(ending, divergence="jensen_shannon")
    check_alike(fn, heads, labels, "linear_token_losses")


WEIGHTED = {
    "weights of tokens": lambda kl, y: (kl.sum(-1) * y.float().abs()).sum(),
    "weights of classes alike": lambda kl, y: (kl * y.float().abs()[..., None]).mean(),
    "several masks": lambda kl, y: (kl.sum(-1) * (y > 3) * (y < 7)).sum(),
    "a mask of sequences": lambda kl, y: (kl.sum(-1) * (y[:, :1] > 3)).sum(),
    "a mean of sequences": lambda kl, y: (kl.sum(-1).sum(1) / (1 + y[:, 0].abs())).mean(),
    "a mean over something else": lambda kl, y: kl.sum(-1).view(y.shape[1], -1).sum(-1).mean(),
}


@pytest.mark.parametrize("ending", WEIGHTED.values(), ids=WEIGHTED)
def test_fires_on_weighted_sums(ending, heads, labels):
    fn = with_kl(ending, divergence="jensen_shannon")
    check_alike(fn, heads, labels, "linear_loss")


def check_alike(fn, heads, labels, op):
    found = capture_kl(fn, *heads, labels)
    assert found.reports[0].counts == {"linear_kl": 1}
    assert f"liger_fx.{op}.default(" in show(found.graphs[0])
    expected = fn(*heads, labels)
    torch.testing.assert_close(found.value, expected)
    actual = torch.autograd.grad(found.value.sum(), heads[:2])
    torch.testing.assert_close(actual, torch.autograd.grad(expected.sum(), heads[:2]))


def test_leaves_losses_of_classes_alone(heads, labels):
    fn = with_kl(lambda kl, y: (kl.sum(-1) * kl.sum(-1)).sum() + kl.square().sum())
    found = capture_kl(fn, *heads, labels)
    assert found.reports[0].counts == {}
    torch.testing.assert_close(found.value, fn(*heads, labels))


def test_refuses_a_softmax_over_something_else(heads, labels):
    def fn(h, w, th, tw, y):
        log_q, p = F.linear(h, w).log_softmax(1), teacher_logits(th, tw).softmax(1)
        return F.kl_div(log_q, p, reduction="sum")

    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the softmax is not over the vocabulary""",
    )


def test_refuses_a_mixture_of_other_weights(heads, labels):
    def fn(h, w, th, tw, y, share):
        log_q, log_p = F.linear(h, w).log_softmax(-1), teacher_logits(th, tw).log_softmax(-1)
        mixture = log_mixture(log_q, log_p, 0.3)
        of_teacher = F.kl_div(mixture, log_p, reduction="sum", log_target=True)
        of_student = F.kl_div(mixture, log_q, reduction="sum", log_target=True)
        return share * of_teacher + (1 - share) * of_student

    for share in (0.4, torch.tensor(0.3, device=DEVICE)):
        assert refusal(fn, *heads, labels, share) == (
            "the weights of both divergences are not those of the mixture, or no constants"
        )


def test_a_teacher_that_is_trained_by_another_loss(heads, labels):
    def fn(h, w, th, tw, y):
        log_q, log_p = F.linear(h, w).log_softmax(-1), F.linear(th, tw).log_softmax(-1).detach()
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) + tw.sum()

    h, w, th, tw = heads
    found = capture_kl(fn, h, w, th, tw.requires_grad_(), labels)
    assert found.reports[0].counts == {"linear_kl": 1}
    torch.testing.assert_close(found.value, fn(h, w, th, tw, labels))


def test_a_teacher_that_is_trained_is_none(heads, labels):
    def fn(h, w, th, tw, y):
        log_q, log_p = F.linear(h, w).log_softmax(-1), F.linear(th, tw).log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    h, w, th, tw = heads
    (report,) = capture_kl(fn, h, w, th, tw.requires_grad_(), labels).reports
    assert report.counts == {} and report.rejections == []
    assert_expected_inline(
        report.near_misses[0].reason,
        """wanted a value without gradient, found `log_softmax` (log_p)""",
    )


def test_a_choice_of_tokens_breaks_the_graph(heads, labels):
    """``jsd[mask]``, as TRL has it: its shape depends on data."""

    def fn(h, w, th, tw, y):
        log_q, log_p = F.linear(h, w).log_softmax(-1), teacher_logits(th, tw).log_softmax(-1)
        mask = y != -100
        return gkd(log_q, log_p, "none")[mask].sum() / mask.sum()

    torch._dynamo.reset()
    options = {"policy": ["linear_kl"], "inner": "eager"}
    value = torch.compile(fn, backend="liger_fx", options=options)(*heads, labels)
    torch.testing.assert_close(value, fn(*heads, labels))
    assert_expected_inline(
        reasons(liger_fx.Report.merged(liger_fx.reports())),
        """the divergences of single classes leave the graph, or are added up by more than sum(), mean(), masks and weights of tokens; jsd[mask] ends the graph, jsd * mask does not""",
    )


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SOME_OF_KL_DIV, ids=spelling_name)
def test_numerics_of_kl_div(spelling):
    for dtype, chunk_tokens in ((torch.float32, 7), (torch.bfloat16, 0)):
        check_numerics(spelling, inputs(dtype), **{"linear_kl.chunk_tokens": chunk_tokens})


def test_soft_labels_alone(heads, labels):
    """The cross-entropy is the mean of none, nan, and without gradient; that of the rest stays."""
    labels = torch.full_like(labels, -100)
    value, *gradients = outcome(compiled(HINTON), *heads, labels)
    expected, *rest = outcome(HINTON, *heads, labels)
    assert value.isnan() and expected.isnan() and all(g.isfinite().all() for g in rest)
    torch.testing.assert_close(gradients, rest)
