"""Losses of distillation as libraries and users write them, and what is to come out of each.

h, th: hidden states of student and teacher; w, tw: the weights of their heads; y: labels.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from _op_checks import alike
from _util import DEVICE, TOLERANCES, only, reasons, relative_error
from liger_fx.passes import linear_kl
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
LOSSES = {
    (1.0, 0.0): (ForwardKLLoss(), ForwardKLWithChunkedOutputLoss),
    (0.0, 1.0): (ReverseKLLoss(), ReverseKLWithChunkedOutputLoss(3)),
    (0.3, 0.7): (SymmetricKLLoss(0.3), SymmetricKLWithChunkedOutputLoss(3, 0.3)),
}
DIRECTIONS = list(LOSSES)


def name_of(direction):
    return {(1.0, 0.0): "forward", (0.0, 1.0): "reverse"}.get(direction, "symmetric")


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


# -- F.kl_div and what is built of it --------------------------------------------------------------


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


# -- what is expected ------------------------------------------------------------------------------


def forward_and_reverse_kl(student, teacher, target, forward, reverse):
    """Of finite logits, in their own dtype."""
    log_q, log_p = student.log_softmax(1), teacher.log_softmax(1)
    per_token = -forward * (log_p.exp() * log_q).sum(1)
    per_token = per_token + reverse * (log_q.exp() * (log_q - log_p)).sum(1)
    return per_token[target != -100].sum()


def exact(h, w, th, tw, y, direction, normalise=True, mix=False):
    student, teacher = flat(F.linear(h, w)), flat(F.linear(th, tw))
    valid = (y != -100).sum() if normalise else 1
    kl = forward_and_reverse_kl(student, teacher, y.reshape(-1), *direction) / valid
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


def reference(spelling):
    if "divergence" in spelling.keywords:
        return spelling
    mix = spelling.func in (mixed, mixed_sums)
    return partial(exact, **spelling.keywords, normalise=spelling.func is not plain, mix=mix)


def refusal(fn, *args, **options):
    found = capture_kl(fn, *args, **options)
    assert found.reports[0].counts == {}
    return reasons(found.reports[0])


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
