"""The rewrite ``linear_kl``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _op_checks import alike
from _spellings import B, H, S, V
from _util import DEVICE, TOLERANCES, capture, only, reasons, relative_error, show
from expecttest import assert_expected_inline
from liger_fx.passes import linear_cross_entropy, linear_kl
from test_op_linear_kl import divergence
from torch.utils.checkpoint import checkpoint
from torchtune.modules.loss import (
    ForwardKLLoss,
    ForwardKLWithChunkedOutputLoss,
    ReverseKLLoss,
    ReverseKLWithChunkedOutputLoss,
    SymmetricKLLoss,
    SymmetricKLWithChunkedOutputLoss,
)

import liger_fx

capture_kl = only(linear_kl)
T = 6  # the teacher's hidden size
LOSSES = {
    (1.0, 0.0): (ForwardKLLoss(), ForwardKLWithChunkedOutputLoss),
    (0.0, 1.0): (ReverseKLLoss(), ReverseKLWithChunkedOutputLoss(3)),
    (0.3, 0.7): (SymmetricKLLoss(0.3), SymmetricKLWithChunkedOutputLoss(3, 0.3)),
}
DIRECTIONS = list(LOSSES)


def name_of(direction):
    return {(1.0, 0.0): "forward", (0.0, 1.0): "reverse"}.get(direction, "symmetric")


ONE_TOKEN_A_CHUNK = linear_kl.settings | {"chunk_tokens": 1}


@pytest.fixture
def heads(hidden, weight):
    """Hidden states and weights of student and teacher."""
    teacher = torch.randn(B, S, T, device=DEVICE), torch.randn(V, T, device=DEVICE)
    return hidden, weight, *teacher


def teacher_logits(th, tw, bias=None):
    with torch.no_grad():
        return F.linear(th, tw, bias)


def flat(logits):
    return logits.reshape(-1, logits.size(-1))


def plain(h, w, th, tw, y, direction=(1.0, 0.0)):
    """The sum over tokens."""
    student = F.linear(h, w)
    loss, _ = LOSSES[direction]
    return loss(flat(student), flat(teacher_logits(th, tw)), y.reshape(-1), normalize=False)


def mean(h, w, th, tw, y, direction=(1.0, 0.0)):
    return plain(h, w, th, tw, y, direction) / (y != -100).sum()


def chunked(h, w, th, tw, y, direction=(0.0, 1.0)):
    _, loss = LOSSES[direction]
    student = [F.linear(c, w) for c in h.chunk(3, dim=1)]
    with torch.no_grad():
        teacher = [F.linear(c, tw) for c in th.chunk(3, dim=1)]
    return loss(student, teacher, y)


def mixed(h, w, th, tw, y, direction=(1.0, 0.0)):
    """The loss of torchtune's recipes for distillation, and what they log of it."""
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    y = y.reshape(-1)
    valid = (y != -100).sum()
    kl = LOSSES[direction][0](student, teacher, y, normalize=False) / valid
    ce = F.cross_entropy(student.float(), y)
    return (1 - 0.4) * ce + 0.4 * kl, ce.detach(), kl.detach()


def mixed_sums(h, w, th, tw, y, direction=(1.0, 0.0)):
    """The other way round, scaled at the end."""
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    y = y.reshape(-1)
    valid = (y != -100).sum()
    ce = F.cross_entropy(student, y, reduction="sum")
    kl = LOSSES[direction][0](student, teacher, y, normalize=False)
    return kl * 0.4 / valid + ce / valid * 0.6, ce.detach() / valid, kl.detach() / valid


# -- F.kl_div and what is built of it


def log_mixture(log_q, log_p, beta):
    """As Liger writes it."""
    shifted = [log_q + math.log(1 - beta), log_p + math.log(beta)]
    return torch.logsumexp(torch.stack(shifted, dim=0), dim=0)


def gkd(log_q, log_p, reduction):
    """As TRL's GKDTrainer writes it, for a beta of 0.3."""
    beta = torch.tensor(0.3, dtype=log_q.dtype, device=log_q.device)
    mixture = torch.logsumexp(
        torch.stack([log_q + torch.log1p(-beta), log_p + torch.log(beta)]), dim=0
    )
    of_teacher = F.kl_div(mixture, log_p, reduction=reduction, log_target=True)
    of_student = F.kl_div(mixture, log_q, reduction=reduction, log_target=True)
    return beta * of_teacher + (1 - beta) * of_student


def of_log_sums(log_q, log_p, reduction, beta=0.1):
    """The student's divergence first, the mixture's the other way round."""
    mixture = torch.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    of_student = F.kl_div(mixture, log_q, reduction=reduction, log_target=True)
    of_teacher = F.kl_div(mixture, log_p, reduction=reduction, log_target=True)
    return (1 - beta) * of_student + of_teacher * beta


KL_DIVS = {
    "kl_div": lambda s, t, r: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction=r),
    "kl_div_of_logs": lambda s, t, r: F.kl_div(
        torch.nn.LogSoftmax(-1)(s), F.log_softmax(t, dim=-1).detach(), reduction=r, log_target=True
    ),
    "reverse_kl_div": lambda s, t, r: F.kl_div(t.log_softmax(-1), s.softmax(-1), reduction=r),
    "reverse_kl_div_of_logs": lambda s, t, r: F.kl_div(
        F.log_softmax(t, -1), F.log_softmax(s, -1), reduction=r, log_target=True
    ),
    "jensen_shannon": lambda s, t, r: gkd(s.log_softmax(-1), t.log_softmax(-1), r),
    "jensen_shannon_of_log_sums": lambda s, t, r: of_log_sums(
        s.log_softmax(-1), t.log_softmax(-1), r
    ),
}


def masked(h, w, th, tw, y, divergence="jensen_shannon"):
    """Over the tokens that have a label."""
    loss = KL_DIVS[divergence](F.linear(h, w), teacher_logits(th, tw), "none").sum(-1)
    mask = y != -100
    return (loss * mask).sum() / mask.sum()


def averaged(h, w, th, tw, y, divergence="jensen_shannon"):
    """Over all tokens, at a temperature."""
    student, teacher = F.linear(h, w) / 0.7, teacher_logits(th, tw) / 0.7
    return KL_DIVS[divergence](student, teacher, "none").sum(dim=-1).mean()


def by_batch(h, w, th, tw, y, divergence="jensen_shannon"):
    return KL_DIVS[divergence](F.linear(h, w), teacher_logits(th, tw), "batchmean")


def hinton(h, w, th, tw, y, divergence="kl_div", T=2.0, share=0.3):
    """Next-token losses: hard labels at temperature 1, soft ones of every token at T."""
    student = F.linear(h, w)[..., :-1, :].contiguous().view(-1, w.size(0))
    teacher = teacher_logits(th, tw)[..., :-1, :].contiguous().view(-1, w.size(0))
    ce = F.cross_entropy(student, y[..., 1:].contiguous().view(-1))
    kd = KL_DIVS[divergence](student / T, teacher / T, "batchmean") * T**2
    return share * ce + (1 - share) * kd


def hugging_face(h, w, th, tw, y, divergence="kl_div"):
    """The model's own loss, of labels that it shifts itself, and soft ones of other tokens."""
    student, teacher = F.linear(h, w), teacher_logits(th, tw)
    shifted = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    logits = student.to(torch.promote_types(student.dtype, torch.float32)).view(-1, w.size(0))
    ce = F.cross_entropy(logits, shifted.view(-1), reduction="sum") / (shifted != -100).sum()
    kd = KL_DIVS[divergence](student / 2.0, teacher / 2.0, "none").sum(-1)
    mask = y > 3
    return ce + 0.5 * 2.0**2 * ((kd * mask).sum() / mask.sum())


def exact(h, w, th, tw, y, direction, normalise=True, mix=False):
    student, teacher = flat(F.linear(h, w)), flat(F.linear(th, tw))
    valid = (y != -100).sum() if normalise else 1
    kl = divergence(student, teacher, y.reshape(-1), *direction) / valid
    if not mix:
        return kl
    ce = F.cross_entropy(student, y.reshape(-1), reduction="sum") / valid
    return 0.6 * ce + 0.4 * kl, ce, kl


def outcome(fn, h, w, *others):
    """Values, and gradients of the first over those of h and w that require one."""
    values = fn(h, w, *others)
    values = values if isinstance(values, tuple) else (values,)
    wanted = [t for t in (h, w) if t.requires_grad]
    return [v.detach() for v in values] + list(torch.autograd.grad(values[0] * 1.7, wanted))


def compiled(fn, inner="aot_eager", **options):
    torch._dynamo.reset()
    options |= {"require": "linear_kl", "inner": inner}
    return torch.compile(fn, backend="liger_fx", options=options, fullgraph=True)


SPELLINGS = [
    *(partial(plain, direction=d) for d in DIRECTIONS),
    *(partial(chunked, direction=d) for d in DIRECTIONS[1:]),
    *(partial(mixed, direction=d) for d in DIRECTIONS),
    *(partial(mixed_sums, direction=d) for d in DIRECTIONS),
]


ENDINGS = (masked, averaged, by_batch, hinton, hugging_face)
OF_KL_DIV = [partial(fn, divergence=name) for fn in ENDINGS for name in KL_DIVS]
SOME_OF_KL_DIV = [
    partial(masked, divergence="kl_div"),
    partial(averaged, divergence="jensen_shannon_of_log_sums"),
    partial(by_batch, divergence="reverse_kl_div"),
    partial(hinton, divergence="reverse_kl_div_of_logs"),
    partial(hugging_face, divergence="jensen_shannon"),
]
HINTON = partial(hinton, divergence="kl_div")


def spelling_name(spelling):
    named = spelling.keywords
    which = name_of(named["direction"]) if "direction" in named else named["divergence"]
    return f"{spelling.func.__name__}-{which}"


spellings = pytest.mark.parametrize("spelling", SPELLINGS, ids=spelling_name)


def reference(spelling):
    if "divergence" in spelling.keywords:
        return spelling
    mix = spelling.func in (mixed, mixed_sums)
    return partial(exact, **spelling.keywords, normalise=spelling.func is not plain, mix=mix)


# -- fires -----------------------------------------------------------------------------------------


@spellings
@pytest.mark.parametrize("dynamic", [False, True])
def test_fires_once_on_every_spelling(spelling, dynamic, heads, labels):
    found = capture(spelling, *heads, labels, dynamic=dynamic)
    (report,) = found.reports
    assert report.counts == {"linear_kl": 1}, report
    assert report.rejections == []
    torch.testing.assert_close(found.value, spelling(*heads, labels))


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
    getitem_3: "f32[2, 5, 8]" = l_h_[(Ellipsis, slice(None, -1, None), slice(None, None, None))]
    getitem_4: "f32[2, 5, 6]" = l_th_[(Ellipsis, slice(None, -1, None), slice(None, None, None))]
    ne: "b8[10]" = view_2 != -100
    sum_1: "i64[]" = ne.sum()
    new_ones: "f32[]" = l_h_.new_ones((), dtype = torch.float32)
    truediv_2: "f32[]" = new_ones / sum_1
    mul_3: "f32[]" = truediv_2 * 0.3
    truediv_3: "f32[]" = new_ones / 10
    mul_4: "f32[]" = truediv_3 * 4.0
    mul_5: "f32[]" = mul_4 * 0.7
    linear_kl_default = torch.ops.liger_fx.linear_kl.default(getitem_3, l_w_, None, mul_3, mul_5, getitem_4, l_tw_, None, view_2, -100, None, 0.0, 0.0, 0.0, 2.0, True, True, False, 0, torch.float32, True)
    getitem_5: "f32[]" = linear_kl_default[0]
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
    linear_kl_default = torch.ops.liger_fx.linear_kl.default(l_h_, l_w_, None, None, None, l_th_, l_tw_, None, None, -100, mask, 0.0, 0.0, 0.3, 1.0, True, True, False, 0, torch.float32, True)
    getitem: "f32[]" = linear_kl_default[0]
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
    ne_3: "b8[12]" = reshape_2 != -100
    linear_kl_default = torch.ops.liger_fx.linear_kl.default(l_args_0_, l_args_1_, None, None, None, l_args_2_, l_args_3_, None, None, -100, ne_3, 0.3, 0.7, None, 1.0, True, True, False, 0, torch.float32, True)
    getitem: "f32[]" = linear_kl_default[0]
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
    ne_4: "b8[2, 6]" = l_y_ != -100
    linear_kl_default = torch.ops.liger_fx.linear_kl.default(l_h_, l_w_, None, None, None, l_th_, l_tw_, None, None, -100, ne_4, 0.0, 1.0, None, 1.0, True, True, False, 0, torch.float32, True)
    getitem_9: "f32[]" = linear_kl_default[0]
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
    ne_2: "b8[12]" = y != -100
    sum_4: "i64[]" = ne_2.sum()
    new_ones: "f32[]" = l_h_.new_ones((), dtype = torch.float32)
    truediv_1: "f32[]" = new_ones / sum_4
    mul_4: "f32[]" = truediv_1 * 0.6
    truediv_2: "f32[]" = new_ones / valid
    mul_5: "f32[]" = truediv_2 * 0.4
    linear_kl_default = torch.ops.liger_fx.linear_kl.default(l_h_, l_w_, None, mul_4, mul_5, l_th_, l_tw_, None, y, -100, ne_2, 1.0, 0.0, None, 1.0, True, True, False, 0, torch.float32, True)
    getitem: "f32[]" = linear_kl_default[0]
    getitem_1: "f32[2]" = linear_kl_default[1]
    getitem_2: "f32[]" = getitem_1[0]
    truediv_3: "f32[]" = getitem_2 / sum_4
    getitem_3: "f32[2]" = linear_kl_default[1]
    getitem_4: "f32[]" = getitem_3[1]
    truediv_4: "f32[]" = getitem_4 / valid
    return (getitem, truediv_3, truediv_4)""",
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
    getitem_3: "f32[2, 5, 8]" = l_h_[(slice(None, None, None), slice(None, -1, None))]
    getitem_4: "f32[2, 5, 6]" = l_th_[(slice(None, None, None), slice(None, -1, None))]
    ne_1: "b8[2, 5]" = getitem_2 != -100
    linear_kl_default = torch.ops.liger_fx.linear_kl.default(getitem_3, l_w_, None, None, None, getitem_4, l_tw_, None, None, -100, ne_1, 1.0, 0.0, None, 1.0, True, True, False, 0, torch.float32, True)
    getitem_5: "f32[]" = linear_kl_default[0]
    return (getitem_5,)""",
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


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args, **options):
    found = capture_kl(fn, *args, **options)
    assert found.reports[0].counts == {}
    return reasons(found.reports[0])


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


def test_refuses_losses_that_are_not_added_up(heads, labels):
    def fn(h, w, th, tw, y):
        student = flat(F.linear(h, w))
        kl = ForwardKLLoss()(student, flat(teacher_logits(th, tw)), y.view(-1), normalize=False)
        return kl, F.cross_entropy(student, y.view(-1))

    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the value of `reshape` (student) is also used by `cross_entropy` (cross_entropy)""",
    )


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_refuses_a_loss_that_is_used_with_its_gradient(loss, heads, labels):
    def fn(h, w, th, tw, y):
        total, ce, kl = mixed_with_gradients(h, w, th, tw, y)
        return total, ce if loss == "ce" else kl

    said = refusal(fn, *heads, labels)
    if loss == "ce":
        assert_expected_inline(said, """the value of `cross_entropy` (ce) is also returned""")
    else:
        assert_expected_inline(said, """the value of `neg` (kl) is also returned""")


def mixed_with_gradients(h, w, th, tw, y, ce_weight=0.6, kl_weight=0.4):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
    ce = F.cross_entropy(student, y.view(-1), reduction="sum")
    return ce_weight * ce + kl_weight * kl, ce, kl


def test_refuses_a_weight_with_a_gradient(heads, labels):
    def fn(h, w, th, tw, y, share):
        return mixed_with_gradients(h, w, th, tw, y, kl_weight=share)[0]

    share = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    assert_expected_inline(
        refusal(fn, *heads, labels, share),
        """a weight of the sum requires a gradient; the kernel gives it none""",
    )


def test_refuses_a_weight_that_depends_on_a_loss(heads, labels):
    def fn(h, w, th, tw, y):
        student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
        kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
        ce = F.cross_entropy(student, y.view(-1), reduction="sum")
        return ce + kl * (ce.detach() + 1)

    assert_expected_inline(
        refusal(fn, *heads, labels), """kl_weight[0] (add) is computed only after detach"""
    )


def test_refuses_a_weight_that_comes_after_what_is_logged(heads, labels):
    def fn(h, w, th, tw, y):
        student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
        kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
        ce = F.cross_entropy(student, y.view(-1), reduction="sum")
        logged = ce.detach()
        return ce + kl / (y != -100).sum(), logged

    assert_expected_inline(
        refusal(fn, *heads, labels), """kl_weight[0] (sum_3) is computed only after logged"""
    )


def test_refuses_losses_logged_without_grad_mode(heads, labels):
    def fn(h, w, th, tw, y):
        student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
        kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
        ce = F.cross_entropy(student, y.view(-1), reduction="sum")
        with torch.no_grad():
            logged = ce.detach() * 2
        return ce + kl, logged

    assert_expected_inline(
        refusal(fn, *heads, labels), """grad mode is switched in the middle of it"""
    )


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


def test_refuses_one_label_for_all(heads):
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert_expected_inline(
        refusal(distilled(), *heads, one), """there are 1 labels for logits [12, 13]"""
    )


def test_refuses_double_precision(heads, labels):
    h, w, th, tw = heads
    fn = distilled()
    said = refusal(fn, h.double(), w.double(), th, tw, labels)
    assert_expected_inline(said, """the logits are torch.float64; the kernel computes in float32""")
    assert refusal(fn, h, w, th.double(), tw.double(), labels) == said


def test_refuses_an_ignore_index_that_is_no_constant(heads, labels):
    def fn(h, w, th, tw, y, i):
        student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
        return ForwardKLLoss(i)(student, teacher, y.view(-1), normalize=False)

    assert_expected_inline(
        refusal(fn, *heads, labels, 7, dynamic=True),
        """ignore_index is computed in the graph, expected a constant""",
    )


@pytest.mark.parametrize("how", [{"label_smoothing": 0.1}, {"weight": torch.rand(V)}])
def test_refuses_another_cross_entropy(how, heads, labels):
    how = {name: value.to(DEVICE) if name == "weight" else value for name, value in how.items()}

    def fn(h, w, th, tw, y):
        student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
        kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
        return F.cross_entropy(student, y.view(-1), **how) + kl

    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the cross-entropy has class weights or label smoothing; the kernel has not""",
    )


def test_refuses_losses_of_other_rows(heads, labels):
    def fn(h, w, th, tw, y):
        student, teacher = F.linear(h, w), teacher_logits(th, tw)
        y = y[:, 1:].reshape(-1)
        kl = ForwardKLLoss()(flat(student[:, 1:]), flat(teacher[:, 1:]), y, normalize=False)
        return F.cross_entropy(flat(student[:, :-1]), y) + kl

    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the cross-entropy and the divergence are of other rows of the logits""",
    )


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
        """the temperature is computed or not positive, expected a constant""",
    )


def test_refuses_weights_of_tokens(heads, labels):
    fn = with_kl(lambda kl, y: (kl.sum(-1) * y.float().abs()).sum())
    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the losses are multiplied by torch.float32, expected a mask of bools""",
    )


def test_refuses_several_masks(heads, labels):
    fn = with_kl(lambda kl, y: (kl.sum(-1) * (y > 3) * (y < 7)).sum())
    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the losses have several masks, expected one""",
    )


def test_refuses_a_mask_of_sequences(heads, labels):
    fn = with_kl(lambda kl, y: (kl.sum(-1) * (y[:, :1] > 3)).sum())
    assert_expected_inline(refusal(fn, *heads, labels), """the mask is not one of tokens""")


def test_refuses_a_mask_of_classes(hidden, weight):
    """Even if there are as many as tokens."""
    teacher = torch.randn(1, V, T, device=DEVICE), torch.randn(V, T, device=DEVICE)
    fn = with_kl(lambda kl, y: (kl * (y > 3)).sum())
    student = torch.randn(1, V, H, device=DEVICE, requires_grad=True), weight
    assert_expected_inline(
        refusal(fn, *student, *teacher, torch.arange(V, device=DEVICE)),
        """the mask is not one of tokens""",
    )


def test_refuses_a_mask_that_is_written_to(heads, labels):
    def summed_up(kl, y):
        mask = y > 3
        masked = kl.sum(-1) * mask.float()
        mask.fill_(True)
        return masked.sum(), mask

    assert_expected_inline(
        refusal(with_kl(summed_up), *heads, labels),
        """mask, the mask, is written in place""",
    )


def test_refuses_a_mean_over_something_else(heads, labels):
    fn = with_kl(lambda kl, y: kl.sum(-1).view(y.shape[1], -1).sum(-1).mean())
    assert capture_kl(fn, *heads, labels).reports[0].counts == {"linear_kl": 1}
    assert_expected_inline(
        refusal(fn, *heads, labels, dynamic=True),
        """the mean is over a size that varies, neither sequences, tokens nor classes""",
    )


def test_leaves_squares_of_losses_alone(heads, labels):
    fn = with_kl(lambda kl, y: (kl.sum(-1) * kl.sum(-1)).sum() + kl.square().sum())
    found = capture_kl(fn, *heads, labels)
    assert found.reports[0].counts == {}
    torch.testing.assert_close(found.value, fn(*heads, labels))

    def squared(kl, y):
        tokens = kl.sum(-1)
        return (tokens * tokens).sum()

    assert capture_kl(with_kl(squared), *heads, labels).reports[0].counts == {}


def test_refuses_losses_of_tokens(heads, labels):
    fn = with_kl(lambda kl, y: kl.sum(-1), divergence="jensen_shannon")
    assert_expected_inline(
        refusal(fn, *heads, labels),
        """the divergences of single classes or tokens leave the graph, or are added up by more than sum(), mean() and a mask; jsd[mask] ends the graph, jsd * mask does not""",
    )


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
        """the divergences of single classes or tokens leave the graph, or are added up by more than sum(), mean() and a mask; jsd[mask] ends the graph, jsd * mask does not""",
    )


def test_refuses_where_nothing_would_be_saved(heads, labels):
    with torch.no_grad():
        assert_expected_inline(
            refusal(plain, *heads, labels),
            """no gradient is needed and the logits fit one chunk: nothing would be saved""",
        )


# -- leaves alone ----------------------------------------------------------------------------------


def other_labels(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
    return F.cross_entropy(student, y.view(-1).roll(1)) + kl


def other_ignore_index(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss(0)(student, teacher, y.view(-1), normalize=False)
    return F.cross_entropy(student, y.view(-1)) + kl


def difference(h, w, th, tw, y):
    student, teacher = flat(F.linear(h, w)), flat(teacher_logits(th, tw))
    kl = ForwardKLLoss()(student, teacher, y.view(-1), normalize=False)
    return F.cross_entropy(student, y.view(-1)) - kl


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
    [other_labels, other_ignore_index, difference, softmax_in_fp64, products_written_in_place],
    ids=lambda f: f.__name__,
)
def test_leaves_near_twins_alone(fn, heads, labels):
    labels = labels.clamp_min(0) if fn is other_ignore_index else labels
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


def test_mixed_losses_of_chunks_stay_single(heads, labels):
    def fn(h, w, th, tw, y):
        chunks = zip(h.chunk(2, 1), th.chunk(2, 1), y.chunk(2, 1), strict=True)
        return sum(mixed_with_gradients(c, w, t, tw, z.reshape(-1))[0] for c, t, z in chunks)

    found = capture(fn, *heads, labels)
    assert found.reports[0].counts == {"linear_kl": 2}
    torch.testing.assert_close(found.value, fn(*heads, labels))


# -- numerics --------------------------------------------------------------------------------------


def inputs(dtype, ignored=5, tokens=37, seed=1):
    """Odd sizes; ``ignored`` labels of each of three sequences."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)

    h, w = made(3, tokens, 48), made(157, 48, scale=0.2)
    th, tw = made(3, tokens, 31), made(157, 31, scale=0.2)
    y = torch.randint(0, 157, (3, tokens), generator=generator)
    y[:, :ignored] = -100
    return h.requires_grad_(), w.requires_grad_(), th, tw, y.to(DEVICE)


def in_fp64(h, w, th, tw, y):
    wide = (alike(t, t.double()) for t in (h, w, th, tw))
    return *wide, y


def check_numerics(spelling, arguments, **how):
    dtype = arguments[0].dtype
    expected = outcome(reference(spelling), *in_fp64(*arguments))
    eager = outcome(spelling, *arguments)
    fn = compiled(spelling, **how)
    values = len(eager) - sum(t.requires_grad for t in arguments[:2])
    for _ in range(2):
        actual = outcome(fn, *arguments)
        for i, (a, b, e) in enumerate(zip(actual, eager, expected, strict=True)):
            assert a.dtype == b.dtype and a.shape == b.shape
            slack = TOLERANCES[dtype] if i < values else 3e-7
            # The upstream gradient, 1.7 times 1/n, scales gradients that are rounded already.
            assert relative_error(a, e) <= 1.25 * relative_error(b, e) + slack
    assert liger_fx.reports()[-1].counts == {"linear_kl": 1}


@spellings
@pytest.mark.parametrize(
    ("dtype", "chunk_tokens"), [(torch.float32, 7), (torch.bfloat16, 0), (torch.bfloat16, 7)]
)
def test_numerics(spelling, dtype, chunk_tokens):
    check_numerics(spelling, inputs(dtype), **{"linear_kl.chunk_tokens": chunk_tokens})


@pytest.mark.parametrize("spelling", SOME_OF_KL_DIV, ids=spelling_name)
def test_numerics_of_kl_div(spelling):
    for dtype, chunk_tokens in ((torch.float32, 7), (torch.bfloat16, 0)):
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


def test_soft_labels_alone(heads, labels):
    """The cross-entropy is the mean of none, nan, and without gradient; that of the rest stays."""
    labels = torch.full_like(labels, -100)
    value, *gradients = outcome(compiled(HINTON), *heads, labels)
    expected, *rest = outcome(HINTON, *heads, labels)
    assert value.isnan() and expected.isnan() and all(g.isfinite().all() for g in rest)
    torch.testing.assert_close(gradients, rest)


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
    module = sys.modules["liger_fx.ops.linear_kl"]
    run = module._run

    def counted(*args):
        nonlocal calls
        calls += 1
        return run(*args)

    monkeypatch.setattr(module, "_run", counted)

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
    assert saved(h, w, plain) == [(B, S, H), (V, H)]
    assert saved(h, w.detach(), plain) == [(B, S, H)]
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
