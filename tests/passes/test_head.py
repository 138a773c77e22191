"""All that is taken of one projection, and the sum in which it ends: ``passes/_head.py``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _spellings import B, S, T, V
from _util import DEVICE, capture, reasons, show
from liger_fx.passes import linear_cross_entropy, linear_kl, linear_logprobs

HEADS = [linear_kl, linear_cross_entropy, linear_logprobs]
SUM, APART = "linear_loss", "linear_token_losses"


def cross_entropy(logits, y, **how):
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), **how)


def logprobs(logits, y):
    return logits.log_softmax(-1).gather(-1, y.clamp(0).unsqueeze(-1)).squeeze(-1)


def entropy(logits):
    logp = F.log_softmax(logits, -1)
    return -(logp.exp() * logp).sum(-1)


# -- fires -----------------------------------------------------------------------------------------


def weighted(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    weights = torch.linspace(0, 2, B * S, device=h.device)
    return (losses * weights).sum() / weights.sum()


def masked(h, w, y):
    losses = cross_entropy(F.linear(h, w).float(), y.clamp(0), reduction="none")
    mask = (y != 3).view(-1).float()
    return (losses * mask).sum() / mask.sum().clamp(min=1)


def weighted_by_sequence(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none").view(B, S)
    lengths = (y != -100).sum(1, keepdim=True).clamp(min=1)
    return (losses / lengths).sum(1).mean()


def z_loss(h, w, y):
    logits = F.linear(h, w)
    return cross_entropy(logits, y) + 1e-2 * logits.logsumexp(-1).pow(2).mean()


def masked_z_loss(h, w, y):
    logits, counts = F.linear(h, w).view(-1, V), y.view(-1) != -100
    z = torch.square(torch.logsumexp(logits, dim=-1))
    z = torch.where(counts, z, 0.0).sum() / counts.sum().clamp(min=1)
    return F.cross_entropy(logits, y.view(-1)) + 1e-2 * z


def entropy_bonus(h, w, y):
    logits = F.linear(h, w)
    return cross_entropy(logits, y) - 0.1 * entropy(logits).mean()


def everything(h, w, y):
    logits = F.linear(h, w)
    lse = logits.logsumexp(-1)
    losses = cross_entropy(logits, y), lse.square().mean(), lse.mean(), entropy(logits).mean()
    return losses[0] + 0.1 * losses[1] - 0.2 * losses[2] + 0.3 * losses[3]


def class_weights_and_smoothing(h, w, y):
    weight = torch.linspace(0.5, 2, V, device=h.device)
    return cross_entropy(F.linear(h, w), y, weight=weight, label_smoothing=0.1)


def class_weights_beside_another(h, w, y):
    logits, weight = F.linear(h, w), torch.linspace(0.5, 2, V, device=h.device)
    return cross_entropy(logits, y, weight=weight) + 0.1 * logits.logsumexp(-1).mean()


def with_an_auxiliary_loss(h, w, y):
    logits = F.linear(h, w)
    return (cross_entropy(logits, y) + h.square().mean()) * 2 + logits.logsumexp(-1).mean()


def difference_from_a_number(h, w, y):
    return (1.0 - cross_entropy(F.linear(h, w), y)) / 2


def policy_gradient(h, w, y):
    advantages = torch.linspace(-1, 1, B * S, device=h.device).view(B, S)
    return -(logprobs(F.linear(h, w), y) * advantages * (y != -100)).mean()


def logged(h, w, y):
    logits = F.linear(h, w)
    loss = cross_entropy(logits, y, reduction="none")
    mean = (loss * (y.view(-1) > 4)).sum()
    total = mean + 0.1 * logits.logsumexp(-1).mean()
    with torch.no_grad():
        entropies = entropy(logits).mean()
    return total, loss.detach() * 2, mean.detach(), entropies


def two_projections(h, w, y):
    return cross_entropy(F.linear(h, w), y) + cross_entropy(F.linear(h.sin(), w), y)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "fn",
    [
        weighted, masked, weighted_by_sequence, z_loss, masked_z_loss, entropy_bonus, everything,
        class_weights_and_smoothing, class_weights_beside_another, with_an_auxiliary_loss,
        difference_from_a_number, policy_gradient, logged, two_projections,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_sums(fn, dynamic, hidden, weight, labels):
    check(fn, SUM, hidden, weight, labels, dynamic=dynamic)


def ratio(h, w, y):
    """As PPO and GRPO have it."""
    new = logprobs(F.linear(h, w), y)
    ratios = (new - new.detach() * 0.9).exp()
    return torch.min(ratios, ratios.clamp(0.8, 1.2)).mean()


def ratio_of_sequences(h, w, y):
    """As GSPO has it."""
    new, mask = logprobs(F.linear(h, w), y), (y != -100).float()
    old = torch.linspace(-3, -1, B * S, device=h.device).view(B, S)
    return (((new - old) * mask).sum(1) / mask.sum(1).clamp(min=1)).exp().mean()


def ratio_and_entropy(h, w, y):
    logits = F.linear(h, w)
    return (logprobs(logits, y).exp() + 0.1 * entropy(logits)).mean()


def focal(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def weights_with_gradient(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    return (losses * h.sigmoid().sum(-1).view(-1)).mean()


def mean_and_squared_mean(h, w, y):
    logits = F.linear(h, w)
    return cross_entropy(logits, y) ** 2 + logits.logsumexp(-1).mean()


def returned_with_its_gradient(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    return losses.mean(), losses


def terms_returned_apart(h, w, y):
    logits = F.linear(h, w)
    return cross_entropy(logits, y), logits.logsumexp(-1).square().mean()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "fn",
    [
        ratio, ratio_of_sequences, ratio_and_entropy, focal, weights_with_gradient,
        mean_and_squared_mean, returned_with_its_gradient, terms_returned_apart,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_values_of_tokens(fn, dynamic, hidden, weight, labels):
    check(fn, APART, hidden, weight, labels, dynamic=dynamic)


def check(fn, op, *tensors, dynamic=False):
    found = capture(fn, *tensors, rewrites=HEADS, dynamic=dynamic)
    assert sum(found.reports[0].counts.values()) >= 1, reasons(found.reports[0])
    code = show(found.graphs[0])
    assert f"liger_fx.{op}.default(" in code, code
    assert "nn.linear" not in code and "functional.linear" not in code, code
    compare(fn, found.value, *tensors)


def compare(fn, value, *tensors):
    expected = fn(*tensors)
    torch.testing.assert_close(value, expected)
    inputs = [t for t in tensors if t.requires_grad]
    torch.testing.assert_close(gradients(value, inputs), gradients(expected, inputs))


def gradients(values, inputs):
    """Of a sum in which every value, and every token of it, has another weight."""
    values = [v for v in (values if isinstance(values, tuple) else (values,)) if v.requires_grad]
    total = sum(
        (v * torch.linspace(1, 2, v.numel(), device=v.device).view(v.shape)).sum() * (i + 1)
        for i, v in enumerate(values)
    )
    return torch.autograd.grad(total, inputs, retain_graph=True)


# -- leaves alone, and what is not the sum's to change ---------------------------------------------


def added_in_place(h, w, y):
    """Somebody else's number, which is read later."""
    total = h.square().mean()
    kept = total.view(1)
    total += cross_entropy(F.linear(h, w), y)
    return total + kept.sum()


def added_in_place_to_both(h, w, y):
    logits, total = F.linear(h, w), h.square().mean() * 1
    kept = total.view(1)
    total += cross_entropy(logits, y) + logits.logsumexp(-1).mean()
    return total * 2 + kept.sum()


def written_after_it_is_logged(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    logged = losses.detach()
    doubled = losses * 2
    logged.mul_(0.5)
    return doubled.mean(), logged.clone()


def masked_in_place(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none") * 1
    losses.masked_fill_(y.view(-1) > 5, 0.0)
    return losses.sum(), losses.detach() + 1


def weights_written_before(h, w, y):
    weights = torch.ones(B * S, device=h.device)
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    weights.mul_(torch.arange(B * S, device=h.device))
    return (losses * weights).sum()


def broadcast_sum(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    return (losses + losses.mean()).sum()


def outer_product(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    return (losses[:, None] * torch.linspace(-1, 1, 5, device=h.device)).sum() + losses.sum()


def summed_in_double(h, w, y):
    return cross_entropy(F.linear(h, w), y, reduction="none").double().sum()


def nan_instead(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    return torch.where(y.view(-1) > 2, losses, 7.0).sum()


def over_its_own_mean(h, w, y):
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    return (losses / losses.detach().mean()).sum()


def inverse(h, w, y):
    return (2.0 / (1 + cross_entropy(F.linear(h, w), y, reduction="none"))).sum()


def flag(h, w, y):
    """A mask of one bool is none of tokens."""
    return cross_entropy(F.linear(h, w), y) ** 2 * (y > -200).all()


def unweighted_is_logged(h, w, y):
    """Of tokens with a weight of zero as well."""
    losses = cross_entropy(F.linear(h, w), y, reduction="none")
    keep = (y.view(-1) > 5).float()
    return (losses * keep).sum(), losses.detach().mean()


def logged_with_a_share_of_zero(h, w, y):
    """A share that a schedule begins with, of values whose tokens no label counts."""
    logits, share = F.linear(h, w), torch.zeros((), device=h.device)
    z = (logits.logsumexp(-1).square() * (torch.arange(S, device=h.device) < 4)).mean()
    return cross_entropy(logits, y) + share * z, z.detach()


def two_heads_of_one_weight(h, w, y):
    """Two models in one graph."""
    return z_loss(h, w, y) * 2 + z_loss(h.tanh(), w, y.roll(1)), masked(h.cos(), w, y)


AS_EAGER = [
    added_in_place, added_in_place_to_both, written_after_it_is_logged, masked_in_place,
    weights_written_before, broadcast_sum, outer_product,
    summed_in_double, nan_instead, over_its_own_mean, inverse, flag, unweighted_is_logged,
    logged_with_a_share_of_zero, two_heads_of_one_weight,
]  # fmt: skip


def cases():
    for fn in AS_EAGER:
        yield pytest.param(fn, "aot_eager", id=f"{fn.__name__}-aot_eager")
        marks = [] if fn in (added_in_place, nan_instead, flag) else [pytest.mark.slow]
        yield pytest.param(fn, "inductor", marks=marks, id=f"{fn.__name__}-inductor")


@pytest.mark.parametrize(("fn", "inner"), cases())
def test_as_eager(fn, inner, hidden, weight, labels):
    torch._dynamo.reset()
    options = {"inner": inner, "linear_cross_entropy.chunk_tokens": 5}
    compiled = torch.compile(fn, backend="liger_fx", options=options, fullgraph=True)
    compare(fn, compiled(hidden, weight, labels), hidden, weight, labels)


def test_evaluation(hidden, weight, labels):
    """Without gradients there is nothing to add up before the sum."""
    options = {"inner": "aot_eager", "linear_cross_entropy.chunk_tokens": 5}
    for fn in (everything, logged, masked_z_loss, with_an_auxiliary_loss):
        torch._dynamo.reset()
        compiled = torch.compile(fn, backend="liger_fx", options=options)
        with torch.no_grad():
            torch.testing.assert_close(compiled(hidden, weight, labels), fn(hidden, weight, labels))


# -- refuses ---------------------------------------------------------------------------------------


def teacher(h):
    generator = torch.Generator(h.device).manual_seed(0)
    hidden = torch.randn(B, S, T, device=h.device, generator=generator)
    return F.linear(hidden, torch.randn(V, T, device=h.device, generator=generator))


def divergence(logits, teacher):
    return F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="sum")


def divergence_and_z_loss(h, w, y, th, tw):
    logits = F.linear(h, w)
    return (
        divergence(logits, F.linear(th, tw))
        + logits.logsumexp(-1).square().mean()
        + (cross_entropy(logits, y))
    )


def two_teachers(h, w, y, th, tw):
    logits, log_q = F.linear(h, w), F.linear(h, w).log_softmax(-1)
    del logits
    a, b = F.linear(th, tw).log_softmax(-1), F.linear(th * 2, tw).log_softmax(-1)
    return sum(F.kl_div(log_q, p, reduction="sum", log_target=True) for p in (a, b))


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (divergence_and_z_loss, "the value of `linear` (logits) is also used by `logsumexp`"),
        (two_teachers, "jensen_shannon and jensen_shannon are taken of one projection"),
    ],
)
def test_refuses(fn, reason, hidden, weight, labels):
    tensors = torch.randn(B, S, T, device=DEVICE), torch.randn(V, T, device=DEVICE)
    found = capture(fn, hidden, weight, labels, *tensors, rewrites=HEADS)
    assert found.reports[0].counts == {}
    assert reason in reasons(found.reports[0])
    compare(fn, found.value, hidden, weight, labels, *tensors)
