"""The rewrite ``linear_kl``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _kl_spellings import (
    HINTON,
    SPELLINGS,
    capture_kl,
    check_numerics,
    chunked,
    compiled,
    flat,
    inputs,
    mean,
    mixed,
    outcome,
    plain,
    refusal,
    spelling_name,
    teacher_logits,
)
from _spellings import B, H, S, V
from _util import DEVICE, capture, reasons, relative_error, show
from expecttest import assert_expected_inline
from liger_fx.passes import linear_cross_entropy, linear_kl
from torch.utils.checkpoint import checkpoint
from torchtune.modules.loss import ForwardKLLoss, ReverseKLLoss, SymmetricKLLoss

import liger_fx

spellings = pytest.mark.parametrize("spelling", SPELLINGS, ids=spelling_name)

# -- fires -----------------------------------------------------------------------------------------


@spellings
@pytest.mark.parametrize("dynamic", [False, True])
def test_fires_once_on_every_spelling(spelling, dynamic, heads, labels):
    found = capture(spelling, *heads, labels, dynamic=dynamic)
    (report,) = found.reports
    assert report.counts == {"linear_kl": 1}, report
    assert report.rejections == []
    torch.testing.assert_close(found.value, spelling(*heads, labels))


def test_fires_graph(heads, labels):
    found = capture(partial(mean, direction=(0.3, 0.7)), *heads, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_args_0_: "f32[2, 6, 8]", L_args_1_: "f32[13, 8]", L_args_2_: "f32[2, 6, 6]", L_args_3_: "f32[13, 6]", L_args_4_: "i64[2, 6]"):
    l_args_0_ = L_args_0_
    l_args_1_ = L_args_1_
    l_args_2_ = L_args_2_
    l_args_3_ = L_args_3_
    l_args_4_ = L_args_4_
    _set_grad_enabled = torch._C._set_grad_enabled(False)
    _set_grad_enabled_1 = torch._C._set_grad_enabled(True)
    reshape_2: "i64[12]" = l_args_4_.reshape(-1)
    ne: "b8[12]" = reshape_2 != -100
    mask: "i32[12]" = ne.int()
    ne_1: "b8[12]" = reshape_2 != -100
    mask_1: "i32[12]" = ne_1.int()
    ne_3: "b8[12]" = mask != 0
    mul_7: "f32[12]" = -0.3 * mask
    where: "f32[12]" = torch.where(ne_3, mul_7, 0.0)
    expand: "f32[12]" = where.expand((12,))
    reshape_3: "f32[12]" = expand.reshape((12,))
    expand_1: "f32[12]" = reshape_3.expand((12,))
    reshape_4: "f32[12]" = expand_1.reshape(-1)
    neg_2: "f32[12]" = -reshape_4
    ne_4: "b8[12]" = mask_1 != 0
    mul_8: "f32[12]" = -0.7 * mask_1
    where_1: "f32[12]" = torch.where(ne_4, mul_8, 0.0)
    expand_2: "f32[12]" = where_1.expand((12,))
    reshape_5: "f32[12]" = expand_2.reshape((12,))
    expand_3: "f32[12]" = reshape_5.expand((12,))
    reshape_6: "f32[12]" = expand_3.reshape(-1)
    neg_3: "f32[12]" = -reshape_6
    float_1: "f32[12]" = neg_2.float()
    float_2: "f32[12]" = neg_3.float()
    stack: "f32[2, 12]" = torch.stack([float_1, float_2])
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(l_args_0_, l_args_1_, None, None, None, l_args_2_, l_args_3_, None, stack, ['forward_kl', 'reverse_kl'], None, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem: "f32[]" = linear_loss_default[0]
    ne_2: "b8[2, 6]" = l_args_4_ != -100
    sum_5: "i64[]" = ne_2.sum()
    truediv: "f32[]" = getitem / sum_5
    return (truediv,)""",
    )


def test_chunked_graph(heads, labels):
    found = capture(chunked, *heads, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_th_: "f32[2, 6, 6]", L_tw_: "f32[13, 6]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_th_ = L_th_
    l_tw_ = L_tw_
    l_y_ = L_y_
    _set_grad_enabled = torch._C._set_grad_enabled(False)
    _set_grad_enabled_1 = torch._C._set_grad_enabled(True)
    ne: "b8[2, 6]" = l_y_ != -100
    mask: "i32[2, 6]" = ne.int()
    chunk_2 = l_y_.chunk(3, dim = 1)
    target_chunk: "i64[2, 2]" = chunk_2[0]
    target_chunk_1: "i64[2, 2]" = chunk_2[1]
    target_chunk_2: "i64[2, 2]" = chunk_2[2]
    label_chunk: "i64[4]" = target_chunk.reshape(-1)
    label_chunk_1: "i64[4]" = target_chunk_1.reshape(-1)
    label_chunk_2: "i64[4]" = target_chunk_2.reshape(-1)
    ne_1: "b8[4]" = label_chunk != -100
    mask_1: "i32[4]" = ne_1.int()
    ne_2: "b8[4]" = label_chunk_1 != -100
    mask_2: "i32[4]" = ne_2.int()
    ne_3: "b8[4]" = label_chunk_2 != -100
    mask_3: "i32[4]" = ne_3.int()
    ne_4: "b8[4]" = mask_1 != 0
    mul_9: "f32[4]" = -1.0 * mask_1
    where: "f32[4]" = torch.where(ne_4, mul_9, 0.0)
    expand: "f32[4]" = where.expand((4,))
    reshape_9: "f32[4]" = expand.reshape((4,))
    expand_1: "f32[4]" = reshape_9.expand((4,))
    reshape_10: "f32[4]" = expand_1.reshape(-1)
    neg_3: "f32[4]" = -reshape_10
    ne_5: "b8[4]" = mask_2 != 0
    mul_10: "f32[4]" = -1.0 * mask_2
    where_1: "f32[4]" = torch.where(ne_5, mul_10, 0.0)
    expand_2: "f32[4]" = where_1.expand((4,))
    reshape_11: "f32[4]" = expand_2.reshape((4,))
    expand_3: "f32[4]" = reshape_11.expand((4,))
    reshape_12: "f32[4]" = expand_3.reshape(-1)
    neg_4: "f32[4]" = -reshape_12
    ne_6: "b8[4]" = mask_3 != 0
    mul_11: "f32[4]" = -1.0 * mask_3
    where_2: "f32[4]" = torch.where(ne_6, mul_11, 0.0)
    expand_4: "f32[4]" = where_2.expand((4,))
    reshape_13: "f32[4]" = expand_4.reshape((4,))
    expand_5: "f32[4]" = reshape_13.expand((4,))
    reshape_14: "f32[4]" = expand_5.reshape(-1)
    neg_5: "f32[4]" = -reshape_14
    reshape_15: "f32[2, 2]" = neg_3.reshape([2, -1])
    reshape_16: "f32[2, 2]" = neg_4.reshape([2, -1])
    reshape_17: "f32[2, 2]" = neg_5.reshape([2, -1])
    cat: "f32[2, 6]" = torch.cat([reshape_15, reshape_16, reshape_17], 1)
    reshape_18: "f32[12]" = cat.reshape(-1)
    float_1: "f32[12]" = reshape_18.float()
    stack: "f32[1, 12]" = torch.stack([float_1])
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(l_h_, l_w_, None, None, None, l_th_, l_tw_, None, stack, ['reverse_kl'], None, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem_9: "f32[]" = linear_loss_default[0]
    view_6: "i32[12]" = mask.view(-1)
    sum_7: "i64[]" = torch.sum(view_6, dim = 0)
    truediv: "f32[]" = getitem_9 / sum_7
    return (truediv,)""",
    )


def test_mixed_graph(heads, labels):
    found = capture(mixed, *heads, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_th_: "f32[2, 6, 6]", L_tw_: "f32[13, 6]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_th_ = L_th_
    l_tw_ = L_tw_
    l_y_ = L_y_
    _set_grad_enabled = torch._C._set_grad_enabled(False)
    _set_grad_enabled_1 = torch._C._set_grad_enabled(True)
    y: "i64[12]" = l_y_.reshape(-1)
    ne: "b8[12]" = y != -100
    valid: "i64[]" = ne.sum()
    ne_1: "b8[12]" = y != -100
    mask: "i32[12]" = ne_1.int()
    ne_2: "b8[12]" = y != -100
    sum_4: "i64[]" = ne_2.sum()
    truediv_1: "f32[]" = 0.6 / sum_4
    truediv_2: "f32[]" = 0.4 / valid
    neg_1: "f32[]" = -truediv_2
    ne_3: "b8[12]" = mask != 0
    mul_4: "f32[12]" = neg_1 * mask
    where: "f32[12]" = torch.where(ne_3, mul_4, 0.0)
    expand: "f32[12]" = where.expand((12,))
    reshape_3: "f32[12]" = expand.reshape((12,))
    expand_1: "f32[12]" = reshape_3.expand((12,))
    reshape_4: "f32[12]" = expand_1.reshape(-1)
    neg_2: "f32[12]" = -reshape_4
    float_2: "f32[]" = truediv_1.float()
    reshape_5: "f32[1]" = float_2.reshape(1)
    expand_as: "f32[12]" = reshape_5.expand_as(neg_2)
    float_3: "f32[12]" = neg_2.float()
    stack: "f32[2, 12]" = torch.stack([expand_as, float_3])
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(l_h_, l_w_, None, y, None, l_th_, l_tw_, None, stack, ['cross_entropy', 'forward_kl'], -100, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem: "f32[]" = linear_loss_default[0]
    getitem_1: "f32[2, 12]" = linear_loss_default[1]
    getitem_2: "f32[12]" = getitem_1[0]
    sum_5: "f32[]" = getitem_2.sum()
    ne_4: "b8[12]" = y != -100
    sum_6: "i64[]" = ne_4.sum()
    truediv_3: "f32[]" = sum_5 / sum_6
    getitem_3: "f32[12]" = getitem_1[1]
    reshape_6: "f32[12]" = getitem_3.reshape((12,))
    neg_3: "f32[12]" = -reshape_6
    view_2: "f32[12]" = neg_3.view(-1)
    mul_5: "f32[12]" = view_2 * mask
    sum_7: "f32[]" = torch.sum(mul_5, dim = 0)
    neg_4: "f32[]" = -sum_7
    truediv_4: "f32[]" = neg_4 / valid
    detach: "f32[]" = truediv_3.detach()
    detach_1: "f32[]" = truediv_4.detach()
    return (getitem, detach, detach_1)""",
    )


def test_row_slices_move_to_both_hidden_states(heads, labels):
    def fn(h, w, th, tw, y):
        student = F.linear(h, w)[:, :-1].float()
        teacher = F.linear(th, tw).detach()[:, :-1]
        return ForwardKLLoss()(flat(student), flat(teacher), y[:, 1:], normalize=False)

    found = capture(fn, *heads, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_th_: "f32[2, 6, 6]", L_tw_: "f32[13, 6]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_th_ = L_th_
    l_tw_ = L_tw_
    l_y_ = L_y_
    _log_api_usage_once = torch._C._log_api_usage_once('python.nn_module')
    getitem_2: "i64[2, 5]" = l_y_[(slice(None, None, None), slice(1, None, None))]
    ne: "b8[2, 5]" = getitem_2 != -100
    mask: "i32[2, 5]" = ne.int()
    view_1: "i32[10]" = mask.view(-1)
    ne_1: "b8[10]" = view_1 != 0
    where: "f32[10]" = torch.where(ne_1, view_1, 0.0)
    expand: "f32[10]" = where.expand((10,))
    reshape_2: "f32[10]" = expand.reshape((10,))
    expand_1: "f32[10]" = reshape_2.expand((10,))
    reshape_3: "f32[10]" = expand_1.reshape(-1)
    neg_1: "f32[10]" = -reshape_3
    float_2: "f32[10]" = neg_1.float()
    stack: "f32[1, 10]" = torch.stack([float_2])
    getitem_3: "f32[2, 5, 8]" = l_h_[(slice(None, None, None), slice(None, -1, None))]
    getitem_4: "f32[2, 5, 6]" = l_th_[(slice(None, None, None), slice(None, -1, None))]
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(getitem_3, l_w_, None, None, None, getitem_4, l_tw_, None, stack, ['forward_kl'], None, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem_5: "f32[]" = linear_loss_default[0]
    neg: "f32[]" = -getitem_5
    return (neg,)""",
    )
    torch.testing.assert_close(found.value, fn(*heads, labels))


def test_a_teacher_whose_weight_requires_a_gradient(heads, labels):
    h, w, th, tw = heads
    assert capture(plain, h, w, th, tw.requires_grad_(), labels).reports[0].counts == {
        "linear_kl": 1
    }
    assert tw.grad is None
    compiled(plain)(h, w, th, tw, labels).backward()
    assert tw.grad is None and w.grad is not None


def test_a_teacher_without_no_grad(heads, labels):
    def fn(h, w, th, tw, y):
        student, teacher = flat(F.linear(h, w)), flat(F.linear(th, tw))
        return ReverseKLLoss()(student, teacher, y.view(-1), normalize=False)

    assert capture(fn, *heads, labels).reports[0].counts == {"linear_kl": 1}


def test_student_and_teacher_may_share_a_head(hidden, weight, labels):
    """The teacher is the student itself, seen through a dropout, say."""

    def fn(h, w, y):
        return plain(h, w, h * 0.9, w, y, (0.3, 0.7))

    assert capture(fn, hidden, weight, labels).reports[0].counts == {"linear_kl": 1}
    actual = outcome(compiled(fn), hidden, weight, labels)
    for a, e in zip(actual, outcome(fn, hidden, weight, labels), strict=True):
        torch.testing.assert_close(a, e)


def test_heads_with_a_bias(heads, labels):
    h, w, th, tw = heads
    bias = torch.randn(V, device=DEVICE, requires_grad=True)
    teacher_bias = torch.randn(V, device=DEVICE)

    def fn(h, w, bias, th, tw, teacher_bias, y):
        student = flat(F.linear(h, w, bias))
        teacher = flat(teacher_logits(th, tw, teacher_bias))
        return SymmetricKLLoss()(student, teacher, y.view(-1), normalize=False)

    arguments = (h, w, bias, th, tw, teacher_bias, labels)
    expected = torch.autograd.grad(fn(*arguments), (h, w, bias))
    actual = torch.autograd.grad(compiled(fn)(*arguments), (h, w, bias))
    torch.testing.assert_close(actual, expected)


def test_weights_that_are_computed(heads, labels):
    """Of labels, or given: whatever needs no gradient and is there before the losses."""

    def fn(h, w, th, tw, y, share):
        valid = (y != -100).sum()
        student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
        kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
        ce = F.cross_entropy(student, y.view(-1), reduction="sum")
        return (1 - share) * ce / valid + share * (kl / valid)

    arguments = (*heads, labels, torch.tensor(0.3, device=DEVICE))
    assert capture(fn, *arguments).reports[0].counts == {"linear_kl": 1}
    for a, e in zip(outcome(compiled(fn), *arguments), outcome(fn, *arguments), strict=True):
        torch.testing.assert_close(a, e)


def test_both_losses_are_logged_before_the_sum(heads, labels):
    def fn(h, w, th, tw, y):
        student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
        kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
        ce = F.cross_entropy(student, y.view(-1), reduction="sum")
        logged = ce.detach() + 10 * kl.detach()
        return ce + kl, logged

    found = capture(fn, *heads, labels)
    assert found.reports[0].counts == {"linear_kl": 1}
    torch.testing.assert_close(found.value, fn(*heads, labels))


def two_losses(h, w, th, tw, y):
    student = flat(F.linear(h, w))
    kl = ForwardKLLoss()(student, flat(teacher_logits(th, tw)), y.view(-1), normalize=False)
    return kl, F.cross_entropy(student, y.view(-1))


def cross_entropy_with_its_gradient(h, w, th, tw, y):
    total, ce, _ = mixed_with_gradients(h, w, th, tw, y)
    return total, ce


def divergence_with_its_gradient(h, w, th, tw, y):
    total, _, kl = mixed_with_gradients(h, w, th, tw, y)
    return total, kl


def weight_of_a_loss(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
    ce = F.cross_entropy(student, y.view(-1), reduction="sum")
    return ce + kl * (ce.detach() + 1)


def weight_after_what_is_logged(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
    ce = F.cross_entropy(student, y.view(-1), reduction="sum")
    logged = ce.detach()
    return ce + kl / (y != -100).sum(), logged


def trained_share(h, w, th, tw, y):
    return mixed_with_gradients(h, w, th, tw, y, kl_weight=h.mean())[0]


def other_ignore_index(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss(0)(student, teacher, y.view(-1), normalize=False)
    return F.cross_entropy(student, y.view(-1)) + kl


def other_labels(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
    return F.cross_entropy(student, y.view(-1).roll(1)) + kl


def difference(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
    return F.cross_entropy(student, y.view(-1)) - kl


def logged_without_grad_mode(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
    ce = F.cross_entropy(student, y.view(-1), reduction="sum")
    with torch.no_grad():
        logged = ce.detach() * 2
    return ce + kl, logged


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (two_losses, "linear_token_losses"),
        (cross_entropy_with_its_gradient, "linear_token_losses"),
        (divergence_with_its_gradient, "linear_token_losses"),
        (weight_of_a_loss, "linear_token_losses"),
        (weight_after_what_is_logged, "linear_token_losses"),
        (trained_share, "linear_token_losses"),
        (other_ignore_index, "linear_loss"),
        (other_labels, "linear_loss"),
        (difference, "linear_loss"),
        (logged_without_grad_mode, "linear_loss"),
    ],
)
def test_both_losses_whatever_becomes_of_them(fn, op, heads, labels):
    labels = labels.view(-1)  # else a view of it comes after the divergence
    found = capture(fn, *heads, labels)
    assert found.reports[0].counts == {"linear_kl": 1}
    assert f"liger_fx.{op}.default(" in show(found.graphs[0])
    expected = fn(*heads, labels)
    torch.testing.assert_close(found.value, expected)

    def gradients(values):
        values = values if isinstance(values, tuple) else (values,)
        total = sum((i + 1) * v for i, v in enumerate(values) if v.requires_grad)
        return torch.autograd.grad(total, heads[:2])

    torch.testing.assert_close(gradients(found.value), gradients(expected))


# -- refuses ---------------------------------------------------------------------------------------


FORWARD = ForwardKLLoss()


def distilled(loss=FORWARD, student=F.linear, teacher=teacher_logits):
    def fn(h, w, th, tw, y):
        return loss(flat(student(h, w)), flat(teacher(th, tw)), y.view(-1), normalize=False)

    return fn


def test_refuses_returned_logits(heads, labels):
    def fn(h, w, th, tw, y):
        student = flat(F.linear(h, w))
        kl = ForwardKLLoss()(student, flat(teacher_logits(th, tw)), y.view(-1), normalize=False)
        return kl, student

    assert_expected_inline(
        refusal(fn, *heads, labels), """the value of `reshape` (student) is also returned"""
    )


def test_refuses_returned_logits_of_the_teacher(heads, labels):
    def fn(h, w, th, tw, y):
        teacher = flat(teacher_logits(th, tw))
        kl = ForwardKLLoss()(flat(F.linear(h, w)), teacher, y.view(-1), normalize=False)
        return kl, teacher.argmax(-1)

    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the value of `reshape` (teacher) is also used by `argmax` (argmax)""",
    )


def mixed_with_gradients(h, w, th, tw, y, ce_weight=0.6, kl_weight=0.4):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
    ce = F.cross_entropy(student, y.view(-1), reduction="sum")
    return ce_weight * ce + kl_weight * kl, ce, kl


def test_refuses_a_teacher_that_is_trained(heads, labels):
    h, w, th, tw = heads
    fn = distilled(teacher=F.linear)
    assert_expected_inline(
        refusal(fn, h, w, th, tw.requires_grad_(), labels),
        """the teacher's logits require a gradient; the kernel gives them none""",
    )


def test_refuses_a_student_without_gradient_in_the_middle(heads, labels):
    fn = distilled(student=teacher_logits)
    assert_expected_inline(
        refusal(fn, *heads, labels), """grad mode is switched in the middle of it"""
    )


@pytest.mark.parametrize("loss", [ForwardKLLoss(), ReverseKLLoss()], ids=lambda f: type(f).__name__)
def test_refuses_a_lora_head(loss, heads, labels):
    a = torch.randn(V, H, device=DEVICE, requires_grad=True)
    fn = distilled(loss, student=lambda h, w: F.linear(h, w) + 2.0 * F.linear(h, a))
    assert reasons(capture(fn, *heads, labels).reports[0]).splitlines() == [
        "the logits are a sum (LoRA on the head?), not one projection"
    ]


def test_refuses_other_vocabularies_that_broadcast(heads, labels):
    h, w, th, tw = heads
    fn = distilled()
    assert_expected_inline(
        refusal(fn, h, w[:1], th, tw, labels),
        """the student's logits are [12, 1], the teacher's [12, 13]""",
    )


def test_refuses_double_precision(heads, labels):
    h, w, th, tw = heads
    fn = distilled()
    said = refusal(fn, h.double(), w.double(), th, tw, labels)
    assert_expected_inline(said, """the logits are torch.float64; the kernel computes in float32""")
    assert refusal(fn, h, w, th.double(), tw.double(), labels) == said


@pytest.mark.parametrize("how", [{"label_smoothing": 0.1}, {"weight": torch.rand(V)}])
def test_refuses_another_cross_entropy(how, heads, labels):
    how = {name: value.to(DEVICE) if name == "weight" else value for name, value in how.items()}

    def fn(h, w, th, tw, y):
        student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
        kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
        return F.cross_entropy(student, y.view(-1), **how) + kl

    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the cross-entropy beside a divergence has class weights, label smoothing, a softcap or a temperature; the kernel has not""",
    )


def test_refuses_losses_of_other_rows(heads, labels):
    def fn(h, w, th, tw, y):
        student, teacher = F.linear(h, w), teacher_logits(th, tw)
        y = y[:, 1:].reshape(-1)
        kl = ForwardKLLoss()(flat(student[:, 1:]), flat(teacher[:, 1:]), y, normalize=False)
        return F.cross_entropy(flat(student[:, :-1]), y) + kl

    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the cross_entropy and forward_kl are of different rows of the logits""",
    )


def test_refuses_where_nothing_would_be_saved(heads, labels):
    with torch.no_grad():
        assert_expected_inline(
            refusal(plain, *heads, labels),
            """no gradient is needed and the logits fit one chunk: nothing would be saved""",
        )


# -- leaves alone ----------------------------------------------------------------------------------


def softmax_in_fp64(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    p, log_q = teacher.softmax(-1, torch.float64), student.log_softmax(-1, torch.float64)
    products = torch.masked_fill(p * log_q, torch.isinf(student), 0)
    mask = (y.view(-1) != -100).int()
    return -torch.sum(torch.sum(products, dim=-1).view(-1) * mask, dim=0)


def products_written_in_place(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    p = F.softmax(teacher, dim=-1, dtype=torch.float32)
    log_q = F.log_softmax(student, dim=-1, dtype=torch.float32)
    products = torch.masked_fill(p * log_q, torch.isinf(student), 0)
    products[:, 0] = 0.0
    mask = (y.view(-1) != -100).int()
    return -torch.sum(torch.sum(products, dim=-1).view(-1) * mask.view(-1), dim=0)


@pytest.mark.parametrize(
    "fn",
    [softmax_in_fp64, products_written_in_place],
    ids=lambda f: f.__name__,
)
def test_leaves_near_twins_alone(fn, heads, labels):
    found = capture(fn, *heads, labels)
    assert "linear_kl" not in found.reports[0].counts
    torch.testing.assert_close(found.value, fn(*heads, labels))


def test_leaves_logits_that_are_inputs(heads, labels):
    logits = torch.randn(B * S, V, device=DEVICE, requires_grad=True)

    def fn(logits, th, tw, y):
        teacher = flat(teacher_logits(th, tw))
        return ForwardKLLoss()(logits, teacher, y.view(-1), normalize=False)

    (report,) = capture_kl(fn, logits, *heads[2:], labels).reports
    assert report.counts == {} and report.rejections == []
    assert "an input of this graph" in report.near_misses[0].reason


def test_leaves_a_plain_cross_entropy_to_its_own_rewrite(heads, labels):
    def fn(h, w, y):
        return F.cross_entropy(flat(F.linear(h, w)), y.view(-1)) + h.sum()

    (report,) = capture(fn, *heads[:2], labels, rewrites=[linear_kl, linear_cross_entropy]).reports
    assert report.counts == {"linear_cross_entropy": 1} and report.rejections == []


def test_chunks_in_another_order_stay_single(heads, labels):
    def fn(h, w, th, tw, y):
        total = 0.0
        chunks = zip(h.chunk(2, 1), th.chunk(2, 1)[::-1], y.chunk(2, 1), strict=True)
        for c, t, z in chunks:
            student, teacher = flat(F.linear(c, w)), flat(teacher_logits(t, tw))
            total += ReverseKLLoss()(student, teacher, z.reshape(-1), normalize=False)
        return total

    found = capture(fn, *heads, labels)
    assert found.reports[0].counts == {"linear_kl": 2}
    torch.testing.assert_close(found.value, fn(*heads, labels))


def test_mixed_losses_of_chunks_become_one_op(heads, labels):
    def fn(h, w, th, tw, y):
        chunks = zip(h.chunk(2, 1), th.chunk(2, 1), y.chunk(2, 1), strict=True)
        return sum(mixed_with_gradients(c, w, t, tw, z.reshape(-1))[0] for c, t, z in chunks)

    found = capture(fn, *heads, labels)
    assert found.reports[0].counts == {"linear_kl": 1}
    torch.testing.assert_close(found.value, fn(*heads, labels))


# -- numerics --------------------------------------------------------------------------------------


@spellings
@pytest.mark.parametrize(
    ("dtype", "chunk_tokens"), [(torch.float32, 7), (torch.bfloat16, 0), (torch.bfloat16, 7)]
)
def test_numerics(spelling, dtype, chunk_tokens):
    check_numerics(spelling, inputs(dtype), **{"linear_kl.chunk_tokens": chunk_tokens})


@pytest.mark.parametrize(
    "spelling", [SPELLINGS[2], SPELLINGS[4], SPELLINGS[7], HINTON], ids=spelling_name
)
def test_numerics_under_inductor(spelling):
    check_numerics(spelling, inputs(torch.float32), inner="inductor")


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "head"])
@pytest.mark.parametrize("spelling", [SPELLINGS[2], SPELLINGS[7]], ids=spelling_name)
def test_frozen_hidden_state_and_frozen_head(spelling, frozen):
    arguments = inputs(torch.float32)
    arguments[frozen].requires_grad_(False)
    check_numerics(spelling, arguments)


@pytest.mark.parametrize("spelling", [SPELLINGS[2], SPELLINGS[7]], ids=spelling_name)
def test_no_token_is_ignored(spelling):
    check_numerics(spelling, inputs(torch.float32, ignored=0))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("spelling", [SPELLINGS[0], SPELLINGS[4], SPELLINGS[7]], ids=spelling_name)
def test_every_token_is_ignored(spelling, inner):
    """The value is eager's, 0 or nan; gradients are 0 (eager's are nan where they are over n)."""
    arguments = inputs(torch.float32, ignored=37)
    *values, grad_hidden, grad_weight = outcome(compiled(spelling, inner), *arguments)
    expected = spelling(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(values, [v.detach() for v in expected], equal_nan=True)
    assert grad_hidden.abs().sum() == 0 and grad_weight.abs().sum() == 0


@pytest.mark.parametrize("spelling", [SPELLINGS[2], SPELLINGS[7], HINTON], ids=spelling_name)
def test_dynamic_shapes_compile_once(spelling):
    fn = compiled(spelling)
    for tokens in (37, 23, 51, 40):
        arguments = inputs(torch.float32, tokens=tokens)
        expected = outcome(spelling, *arguments)
        for a, e in zip(outcome(fn, *arguments), expected, strict=True):
            torch.testing.assert_close(a, e)
    assert len(liger_fx.reports()) <= 2
    assert liger_fx.reports()[-1].counts == {"linear_kl": 1}


def test_sizes_of_other_symbols(heads, labels):
    """Of labels and hidden states; that they agree is a guard of the user's."""
    for tensor in (*heads[::2], labels):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        found = capture(mixed, *heads, labels)
    assert found.reports[0].counts == {"linear_kl": 1}
    torch.testing.assert_close(found.value, mixed(*heads, labels))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("spelling", [SPELLINGS[2], SPELLINGS[7]], ids=spelling_name)
def test_autocast_computes_as_autocast_does(spelling, inside):
    arguments = inputs(torch.float32)

    def fn(*arguments):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=inside):
            return spelling(*arguments)

    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not inside):
        eager = outcome(fn, *arguments)
        actual = outcome(compiled(fn), *arguments)
    assert liger_fx.reports()[-1].counts == {"linear_kl": 1}
    for a, e in zip(actual, eager, strict=True):
        assert a.dtype == e.dtype
        assert relative_error(a, e) < 5e-3


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_checkpointing_runs_the_op_once(inner, heads, labels, monkeypatch):
    calls = 0
    module = sys.modules["liger_fx.ops.linear_loss"]
    run = module.run

    def counted(*args, **named):
        nonlocal calls
        calls += 1
        return run(*args, **named)

    monkeypatch.setattr(module, "run", counted)

    def fn(h, w, *others):
        return checkpoint(lambda h, w: mixed(h.sin(), w, *others), h, w, use_reentrant=False)

    actual = outcome(compiled(fn, inner), *heads, labels)
    assert liger_fx.reports()[-1].counts == {"linear_kl": 1}
    assert calls == 1
    for a, e in zip(actual, outcome(fn, *heads, labels), strict=True):
        torch.testing.assert_close(a, e)


def test_saves_the_gradients_and_nothing_else(heads, labels):
    def saved(h, w, spelling):
        torch._dynamo.reset()
        fn = torch.compile(spelling, backend="liger_fx", fullgraph=True)
        loss = fn(h, w, *heads[2:], labels)
        loss = loss[0] if isinstance(loss, tuple) else loss
        return sorted(tuple(t.shape) for t in loss.grad_fn.saved_tensors)

    h, w = heads[:2]
    assert saved(h, w, plain) == [(), (B, S, H), (V, H)]
    assert saved(h, w.detach(), plain) == [(), (B, S, H)]
    assert [shape for shape in saved(h, w, mixed) if shape] == [(B, S, H), (V, H)]


def test_infinite_logits(heads, labels):
    """A bias of -inf takes a class out of the vocabulary."""
    h, w, th, tw = heads
    bias = torch.zeros(V, device=DEVICE)
    bias[3] = -torch.inf

    def fn(h, w, th, tw, y):
        student = flat(F.linear(h, w, bias))
        teacher = flat(teacher_logits(th, tw, bias))
        return ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)

    labels = labels.where(labels != 3, 4)
    actual = outcome(compiled(fn), h, w, th, tw, labels)
    for a, e in zip(actual, outcome(fn, h, w, th, tw, labels), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, e)
