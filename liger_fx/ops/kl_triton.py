"""Losses and gradient of rows of student and teacher logits, as one Triton kernel.

Liger's kernels for divergences take the log-probabilities of both heads: from logits, that would be
several passes over tensors of ``tokens x V``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_fx.ops.kl_loss import Divergence

_BLOCK = 4096


def write_losses_triton(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    losses: Tensor,
    loss: Divergence,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    """As `kl_loss.write_losses`; computed in fp32. ``losses`` is contiguous."""
    rows, vocab = student.shape
    if not rows:
        return
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    with torch.cuda.device_of(student):
        _divergence_kernel[(rows,)](
            student,
            student.stride(0),
            teacher,
            teacher.stride(0),
            target.contiguous(),
            losses,
            rows,
            weights,
            vocab,
            loss.ignore_index,
            loss.forward,
            loss.reverse,
            FORWARD=bool(loss.forward),
            REVERSE=bool(loss.reverse),
            CROSS_ENTROPY=weights is not None,
            DIFFERENTIATE=differentiate,
            BLOCK=block,
            num_warps=max(1, block // 512),
        )


@triton.jit
def _divergence_kernel(
    student_ptr,
    student_stride,
    teacher_ptr,
    teacher_stride,
    target_ptr,
    losses_ptr,
    rows,
    weights_ptr,
    vocab,
    ignore_index,
    forward,
    reverse,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    dtype = student_ptr.dtype.element_ty
    label = tl.load(target_ptr + row)
    if label == ignore_index:
        if DIFFERENTIATE:
            for start in range(0, vocab, BLOCK):
                offsets = start + tl.arange(0, BLOCK)
                tl.store(student_ptr + offsets, tl.zeros([BLOCK], dtype), mask=offsets < vocab)
        return

    if CROSS_ENTROPY:  # before any thread writes there; the sums below wait for all of them
        at_label = tl.load(student_ptr + label).to(tl.float32)

    # One pass: maximum and sum of exponentials of both; of the classes that are left, the sums of
    # p and p s (forward), of q and q (s - t) (reverse). All of them, s and t too, are relative to
    # the maximum so far: of a confident row the logits are large and the loss is small.
    infinity = float("inf")
    s_max = -infinity
    t_max = -infinity
    s_base = 0.0
    t_base = 0.0
    s_sum = 0.0
    t_sum = 0.0
    p_kept = 0.0
    p_s = 0.0
    q_kept = 0.0
    q_s_t = 0.0
    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocab
        s = tl.load(student_ptr + offsets, mask=inside, other=-infinity).to(tl.float32)
        t = tl.load(teacher_ptr + offsets, mask=inside, other=-infinity).to(tl.float32)
        new_s_max = tl.maximum(s_max, tl.max(s, 0))
        new_t_max = tl.maximum(t_max, tl.max(t, 0))
        # Nothing but -inf so far: the difference to it would be nan.
        new_s_base = tl.where(new_s_max == -infinity, 0.0, new_s_max)
        new_t_base = tl.where(new_t_max == -infinity, 0.0, new_t_max)
        s_scale = tl.exp(s_max - new_s_base)
        t_scale = tl.exp(t_max - new_t_base)
        s_shift = s_base - new_s_base
        t_shift = t_base - new_t_base
        s_max, t_max, s_base, t_base = new_s_max, new_t_max, new_s_base, new_t_base
        kept = tl.abs(s) != infinity
        kept_by_both = kept & (tl.abs(t) != infinity)
        s -= s_base
        t -= t_base
        q = tl.exp(s)
        p = tl.exp(t)
        s_sum = s_sum * s_scale + tl.sum(q, 0)
        t_sum = t_sum * t_scale + tl.sum(p, 0)
        if FORWARD:
            p_s = (p_s + p_kept * s_shift) * t_scale + tl.sum(tl.where(kept, p * s, 0.0), 0)
            p_kept = p_kept * t_scale + tl.sum(tl.where(kept, p, 0.0), 0)
        if REVERSE:
            q_s_t = (q_s_t + q_kept * (s_shift - t_shift)) * s_scale
            q_s_t += tl.sum(tl.where(kept_by_both, q * (s - t), 0.0), 0)
            q_kept = q_kept * s_scale + tl.sum(tl.where(kept_by_both, q, 0.0), 0)
    s_log = tl.log(s_sum)
    t_log = tl.log(t_sum)
    s_lse = s_max + s_log
    t_lse = t_max + t_log

    divergence = 0.0
    if FORWARD:
        p_kept /= t_sum
        # With no class left the sum is 0, whatever the log-sum-exp.
        total = tl.where(s_max == -infinity, 0.0, s_log * p_kept - p_s / t_sum)
        divergence += forward * total
    if REVERSE:
        q_kept /= s_sum
        nothing_left = (s_max == -infinity) | (q_kept == 0.0)
        total = tl.where(nothing_left, 0.0, q_s_t / s_sum - (s_log - t_log) * q_kept)
        divergence += reverse * total
    tl.store(losses_ptr + rows + row, divergence)
    divergence_weight = 1.0
    label_weight = 0.0
    if CROSS_ENTROPY:
        label_weight = tl.load(weights_ptr).to(tl.float32)
        divergence_weight = tl.load(weights_ptr + 1).to(tl.float32)
        tl.store(losses_ptr + row, s_log - (at_label - s_max))
    if not DIFFERENTIATE:
        return

    forward *= divergence_weight
    reverse *= divergence_weight
    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocab
        s = tl.load(student_ptr + offsets, mask=inside, other=-infinity).to(tl.float32)
        t = tl.load(teacher_ptr + offsets, mask=inside, other=-infinity).to(tl.float32)
        q = tl.exp(s - s_lse)
        kept = tl.abs(s) != infinity
        gradient = tl.zeros([BLOCK], tl.float32)
        if FORWARD:
            p = tl.exp(t - t_lse)
            gradient += forward * (q * p_kept - tl.where(kept, p, 0.0))
        if REVERSE:
            kept = kept & (tl.abs(t) != infinity)
            slope = tl.where(kept, (s - s_lse) - (t - t_lse) + 1.0, 0.0)
            gradient += reverse * q * (slope - (total + q_kept))
        if CROSS_ENTROPY:
            gradient += label_weight * tl.where(offsets == label, q - 1.0, q)
        tl.store(student_ptr + offsets, gradient.to(dtype), mask=inside)
