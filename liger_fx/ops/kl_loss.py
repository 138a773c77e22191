"""Divergences of rows of student logits from a teacher's, and their gradient.

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

import torch
from torch import Tensor

from liger_fx.ops.library import liger_module
from liger_fx.ops.token_loss import TokenLoss


def write_divergences(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    values: Tensor,
    loss: TokenLoss,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    """As `token_loss.write_values`, of two heads: over the student's logits goes the gradient.

    student, teacher: [rows, V], rows with unit stride, the teacher's of a dtype of their own.
    """
    arguments = student, teacher, target, values, loss, weights, differentiate
    if student.is_cuda and liger_module("utils") is not None:  # Triton can be imported
        from liger_fx.ops.kl_triton import write_divergences_triton

        write_divergences_triton(*arguments)
    else:
        write_divergences_torch(*arguments)


def write_divergences_torch(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    values: Tensor,
    loss: TokenLoss,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    wide = student.to(values.dtype)
    log_q = (wide / loss.temperature).log_softmax(1)
    log_p = (teacher.to(values.dtype) / loss.temperature).log_softmax(1)
    gradient = torch.zeros_like(log_q)
    for i, taken in enumerate(loss.takes):
        weight = torch.ones_like(values[i]) if weights is None else weights[i]
        if taken == "cross_entropy" and target is not None:
            values[i], slope = _cross_entropy(wide.log_softmax(1), target, loss)
            if loss.ignore_index is not None:  # a weight of 1/0 without any label
                weight = weight.where(target != loss.ignore_index, 0.0)
        elif taken == "jensen_shannon":
            values[i], slope = _jensen_shannon(log_q, log_p, loss.beta)
        else:
            values[i], slope = _of_finite_logits(student, teacher, log_q, log_p, taken)
        if taken != "cross_entropy":
            slope = slope / loss.temperature
        gradient += slope * weight.unsqueeze(1)
    if differentiate:
        student.copy_(gradient)


def _cross_entropy(log_q: Tensor, target: Tensor, loss: TokenLoss) -> tuple[Tensor, Tensor]:
    label = target.unsqueeze(1)
    counts = torch.ones_like(label, dtype=torch.bool)
    if loss.ignore_index is not None:
        counts = label != loss.ignore_index
        label = label.where(counts, 0)
    gradient = log_q.exp().scatter_add_(1, label, -torch.ones_like(label, dtype=log_q.dtype))
    return -log_q.gather(1, label).where(counts, 0.0).squeeze(1), gradient.where(counts, 0.0)


def _of_finite_logits(
    student: Tensor, teacher: Tensor, log_q: Tensor, log_p: Tensor, direction: str
) -> tuple[Tensor, Tensor]:
    """torchtune's divergences of each row, and the gradient over the logits behind ``log_q``."""
    q, p = log_q.exp(), log_p.exp()
    kept = ~student.isinf()
    if direction == "forward_kl":
        p = p.where(kept, 0.0)
        return -(p * log_q).where(kept, 0.0).sum(1), q * p.sum(1, keepdim=True) - p
    kept &= ~teacher.isinf()
    reverse = (q * (log_q - log_p)).where(kept, 0.0)
    total = reverse.sum(1, keepdim=True)
    kept_q = q.where(kept, 0.0)
    gradient = reverse + kept_q - q * (total + kept_q.sum(1, keepdim=True))
    return total.squeeze(1), gradient


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
