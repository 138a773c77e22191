"""Divergence of rows of student logits from a teacher's, cross-entropy, and their gradient.

For a row of student logits ``s`` and of teacher logits ``t``, with ``q = softmax(s / T)`` and
``p = softmax(t / T)``, ``T`` the temperature. As torchtune defines them (ForwardKLLoss,
ReverseKLLoss)::

    forward    - sum_c p[c] log q[c]                    the part of KL(p || q) that depends on q
    reverse      sum_c q[c] (log q[c] - log p[c])       KL(q || p)

Classes with an infinite student logit are left out of the sum, for the reverse those with an
infinite teacher logit as well. With ``P`` the sum of ``p`` over the classes that are left, ``Q``
that of ``q``, and ``r`` the reverse, the gradients over ``s / T`` are::

    forward    q[c] P - p[c]                                           where c is left out: q[c] P
    reverse    q[c] (log q[c] - log p[c] + 1) - q[c] (r + Q)           where c is left out: the last

Eager's gradient of the reverse is nan in a row with a class that is left out (0 times infinity).

As Liger and TRL define the generalised Jensen-Shannon divergence (Agarwal et al., 2024, "On-policy
distillation of language models", eq. 1), with ``m = beta p + (1 - beta) q``::

    beta KL(p || m) + (1 - beta) KL(q || m)          KL(p || q) for beta 0, KL(q || p) for beta 1

Of the limits, 0 for either beta, the two take the Kullback-Leibler divergences' place. The
gradients are::

    beta 0     q[c] - p[c]
    else       w q[c] (log q[c] - log m[c] - KL(q || m))       w = 1 - beta, but for beta 1 w = 1

No class is left out, and ``0 log 0`` is 0: with a teacher of probability 0 as
``F.kl_div(log_q, p)`` has it. Where a probability is 0 ``log_target=True`` gives nan, and so does
``F.kl_div(log_q, p)`` where both are; here the class counts as 0. Where only the denominator is 0
the divergence is infinite, as in eager.

The gradient over ``s`` is that over ``s / T``, divided by ``T``. The cross-entropy is that of
``softmax(s)``, whatever the temperature, as in Hinton et al., 2015.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from liger_fx.ops.library import liger_module


@dataclass(frozen=True)
class Divergence:
    """Without ``beta``, ``forward`` times the forward and ``reverse`` times the reverse divergence
    of torchtune, whose SymmetricKLLoss has 1 as their sum; with it, from 0 to 1, the generalised
    Jensen-Shannon divergence. ``ignore_index``: the label of tokens without a cross-entropy."""

    ignore_index: int
    forward: float = 0.0
    reverse: float = 0.0
    beta: float | None = None
    temperature: float = 1.0


def write_losses(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    losses: Tensor,
    loss: Divergence,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    """Write ``losses [2, rows]``, the cross-entropy of each row and its divergence, and over the
    student's logits the gradient of the sum of both, weighted by ``weights [2]``.

    student, teacher: [rows, V], rows with unit stride. losses, weights: fp32 (on a CPU fp64 as
    well). weights: None for the divergence alone, and then there need not be a target. mask: bool
    [rows], whose divergence counts; None for that of all. Losses that are 0, of rows that do not
    count or the cross-entropy without weights, are not written: they should be zeros before.
    Without ``differentiate`` the logits stay as they are.
    """
    arguments = (student, teacher, target, mask, losses, loss, weights, differentiate)
    if student.is_cuda and liger_module("utils") is not None:  # Triton can be imported
        from liger_fx.ops.kl_triton import write_losses_triton

        write_losses_triton(*arguments)
    else:
        write_losses_torch(*arguments)


def write_losses_torch(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    losses: Tensor,
    loss: Divergence,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    wide, dtype = student.to(losses.dtype), student.dtype
    log_q = (wide / loss.temperature).log_softmax(1)
    log_p = (teacher.to(losses.dtype) / loss.temperature).log_softmax(1)
    if loss.beta is None:
        divergence, gradient = _of_finite_logits(student, teacher, log_q, log_p, loss)
    else:
        divergence, gradient = _jensen_shannon(log_q, log_p, loss.beta)
    gradient /= loss.temperature
    if weights is not None:
        gradient *= weights[1]
    if mask is not None:
        divergence, gradient = divergence.where(mask, 0.0), gradient.where(mask.unsqueeze(1), 0.0)
    losses[1] = divergence
    if weights is not None and target is not None:
        labelled = (target != loss.ignore_index).unsqueeze(1)
        label = target.unsqueeze(1).where(labelled, 0)
        log_q = wide.log_softmax(1) if loss.temperature != 1.0 else log_q
        losses[0] = -log_q.gather(1, label).where(labelled, 0.0).squeeze(1)
        of_label = log_q.exp().scatter_add_(1, label, -torch.ones_like(label, dtype=log_q.dtype))
        gradient += (weights[0] * of_label).where(labelled, 0.0)
    if differentiate:
        student.copy_(gradient.to(dtype))


def _of_finite_logits(
    student: Tensor, teacher: Tensor, log_q: Tensor, log_p: Tensor, loss: Divergence
) -> tuple[Tensor, Tensor]:
    """torchtune's divergences of each row, and the gradient over the logits behind ``log_q``."""
    q, p = log_q.exp(), log_p.exp()
    divergence, gradient = torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    kept = ~student.isinf()
    if loss.forward:
        divergence -= loss.forward * (p * log_q).where(kept, 0.0).sum(1)
        p = p.where(kept, 0.0)
        gradient += loss.forward * (q * p.sum(1, keepdim=True) - p)
    if loss.reverse:
        kept &= ~teacher.isinf()
        reverse = (q * (log_q - log_p)).where(kept, 0.0)
        total = reverse.sum(1, keepdim=True)
        divergence += loss.reverse * total.squeeze(1)
        kept_q = q.where(kept, 0.0)
        gradient += loss.reverse * (reverse + kept_q - q * (total + kept_q.sum(1, keepdim=True)))
    return divergence, gradient


def _jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    q, p = log_q.exp(), log_p.exp()
    if beta == 0.0:
        return _kl(p, log_p - log_q).sum(1), q - p
    if beta == 1.0:
        log_m, student_share = log_p, 1.0
    else:
        log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
        student_share = 1.0 - beta
    of_student = _kl(q, log_q - log_m)
    total = of_student.sum(1, keepdim=True)
    divergence = student_share * total.squeeze(1)
    if beta != 1.0:
        divergence += beta * _kl(p, log_p - log_m).sum(1)
    return divergence, student_share * (of_student - q * total)


def _kl(p: Tensor, log_ratio: Tensor) -> Tensor:
    return (p * log_ratio).where(p != 0.0, 0.0)
