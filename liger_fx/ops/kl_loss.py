"""Divergence of rows of student logits from a teacher's, cross-entropy, and their gradient.

For a row of student logits ``s`` and of teacher logits ``t``, with ``q = softmax(s)`` and
``p = softmax(t)``::

    forward    - sum_c p[c] log q[c]                    the part of KL(p || q) that depends on q
    reverse      sum_c q[c] (log q[c] - log p[c])       KL(q || p)

as torchtune defines both (ForwardKLLoss, ReverseKLLoss): classes with an infinite student logit
are left out of the sum, for the reverse those with an infinite teacher logit as well. With ``P``
the sum of ``p`` over the classes that are left, ``Q`` that of ``q``, and ``r`` the reverse, the
gradients are::

    forward    q[c] P - p[c]                                           where c is left out: q[c] P
    reverse    q[c] (log q[c] - log p[c] + 1) - q[c] (r + Q)           where c is left out: the last

Eager's gradient of the reverse is nan in a row with a class that is left out (0 times infinity).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liger_fx.ops.library import liger_module


@dataclass(frozen=True)
class Divergence:
    """``forward`` times the forward and ``reverse`` times the reverse divergence; torchtune's
    SymmetricKLLoss has 1 as their sum. 0 where the label is ``ignore_index``."""

    ignore_index: int
    forward: float
    reverse: float


def write_losses(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    losses: Tensor,
    loss: Divergence,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    """Write ``losses [2, rows]``, the cross-entropy of each row and its divergence, and over the
    student's logits the gradient of the sum of both, weighted by ``weights [2]``.

    student, teacher: [rows, V], rows with unit stride. losses, weights: fp32 (on a CPU fp64 as
    well). weights: None for the divergence alone. Losses that are 0, of ignored labels or the
    cross-entropy without weights, are not written: they should be zeros before. Without
    ``differentiate`` the logits stay as they are.
    """
    arguments = (student, teacher, target, losses, loss, weights, differentiate)
    if student.is_cuda and liger_module("utils") is not None:  # Triton can be imported
        from liger_fx.ops.kl_triton import write_losses_triton

        write_losses_triton(*arguments)
    else:
        write_losses_torch(*arguments)


def write_losses_torch(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    losses: Tensor,
    loss: Divergence,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    valid = (target != loss.ignore_index).unsqueeze(1)
    log_q = student.to(losses.dtype).log_softmax(1)
    log_p = teacher.to(losses.dtype).log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    divergence, gradient = torch.zeros_like(losses[1]), torch.zeros_like(q)
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
    losses[1] = divergence.where(valid.squeeze(1), 0.0)
    if weights is not None:
        label = target.unsqueeze(1).where(valid, 0)
        losses[0] = -log_q.gather(1, label).where(valid, 0.0).squeeze(1)
        q.scatter_add_(1, label, -torch.ones_like(label, dtype=q.dtype))
        gradient = weights[0] * q + weights[1] * gradient
    if differentiate:
        student.copy_(gradient.where(valid, 0.0))
