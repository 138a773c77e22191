"""Losses and gradient of rows of student and teacher logits, as one Triton kernel.

Liger's kernels for divergences take the log-probabilities of both heads: from logits, that would be
several passes over tensors of ``tokens x V``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from liger_fx.ops.token_loss import TokenLoss
from liger_fx.ops.token_loss_triton import weight_at

_BLOCK = 4096


def write_divergences_triton(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    values: Tensor,
    loss: TokenLoss,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    """As `kl_loss.write_divergences`; computed in fp32."""
    rows, vocab = student.shape
    if not rows:
        return
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    beta = loss.beta

    def at(taken: str) -> int:
        return loss.takes.index(taken) if taken in loss.takes else -1

    mixture = at("jensen_shannon")
    finite = mixture < 0
    forward = at("forward_kl") if finite else mixture if beta == 0.0 else -1
    reverse = at("reverse_kl") if finite else mixture if beta == 1.0 else -1
    with torch.cuda.device_of(student):
        _divergence_kernel[(rows,)](
            *(student, student.stride(0), teacher, teacher.stride(0)),
            None if target is None else target.contiguous(),
            *(values, None if weights is None else weights.contiguous(), rows, vocab),
            *(loss.ignore_index or 0, beta, 1.0 / loss.temperature),
            CROSS_ENTROPY=at("cross_entropy"),
            FORWARD=forward,
            REVERSE=reverse,
            MIXTURE=mixture if 0.0 < beta < 1.0 else -1,
            IGNORES=loss.ignore_index is not None,
            FINITE=finite,
            TEMPERED=loss.temperature != 1.0,
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
    values_ptr,
    weights_ptr,
    rows,
    vocab,
    ignore_index,
    beta,
    sharpness,  # 1 / temperature
    CROSS_ENTROPY: tl.constexpr,  # the index of its values and weights; -1: not taken
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    MIXTURE: tl.constexpr,
    IGNORES: tl.constexpr,
    FINITE: tl.constexpr,  # torchtune's: of the classes with finite logits, no teacher's entropy
    TEMPERED: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    dtype = student_ptr.dtype.element_ty
    if CROSS_ENTROPY >= 0:
        label = tl.load(target_ptr + row)
        labelled = label == label
        if IGNORES:
            labelled = label != ignore_index
        # Before any thread writes there; the sums below wait for all of them.
        at_label = tl.load(student_ptr + label, mask=labelled, other=0.0).to(tl.float32)

    # One pass: maximum and sum of exponentials of both; of the classes that are left, the sums of
    # p and p log (1 / q) or p log (p / q) (forward), of q and q log (q / p) (reverse). All of them,
    # s and t too, are relative to the maximum so far: of a confident row the logits are large and
    # the loss is small.
    infinity = float("inf")
    s_max = -infinity
    t_max = -infinity
    s_base = 0.0
    t_base = 0.0
    s_sum = 0.0
    t_sum = 0.0
    plain_sum = 0.0  # of the student's exponentials at temperature 1
    p_kept = 0.0
    p_ratio = 0.0
    q_kept = 0.0
    q_ratio = 0.0
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
        s_scale = tl.exp((s_max - new_s_base) * sharpness)
        t_scale = tl.exp((t_max - new_t_base) * sharpness)
        s_shift = (s_base - new_s_base) * sharpness
        t_shift = (t_base - new_t_base) * sharpness
        if CROSS_ENTROPY >= 0 and TEMPERED:
            plain_sum *= tl.exp(s_max - new_s_base)
            plain_sum += tl.sum(tl.exp(s - new_s_base), 0)
        s_max, t_max, s_base, t_base = new_s_max, new_t_max, new_s_base, new_t_base
        s_kept = tl.abs(s) != infinity if FINITE else s != -infinity
        t_kept = tl.abs(t) != infinity if FINITE else t != -infinity
        s = (s - s_base) * sharpness
        t = (t - t_base) * sharpness
        q = tl.exp(s)
        p = tl.exp(t)
        s_sum = s_sum * s_scale + tl.sum(q, 0)
        t_sum = t_sum * t_scale + tl.sum(p, 0)
        if FORWARD >= 0:
            kept = s_kept if FINITE else t_kept
            ratio = -s if FINITE else t - s
            p_ratio += p_kept * (-s_shift if FINITE else t_shift - s_shift)
            p_ratio = p_ratio * t_scale + tl.sum(tl.where(kept, p * ratio, 0.0), 0)
            p_kept = p_kept * t_scale + tl.sum(tl.where(kept, p, 0.0), 0)
        if REVERSE >= 0:
            kept = (s_kept & t_kept) if FINITE else s_kept
            q_ratio = (q_ratio + q_kept * (s_shift - t_shift)) * s_scale
            q_ratio += tl.sum(tl.where(kept, q * (s - t), 0.0), 0)
            q_kept = q_kept * s_scale + tl.sum(tl.where(kept, q, 0.0), 0)
    s_log = tl.log(s_sum)
    t_log = tl.log(t_sum)

    values_ptr += row
    if FORWARD >= 0:
        p_kept /= t_sum
        total = p_ratio / t_sum + (s_log if FINITE else s_log - t_log) * p_kept
        if FINITE:  # with no class left the sum is 0, whatever the log-sum-exp
            total = tl.where(s_max == -infinity, 0.0, total)
        tl.store(values_ptr + FORWARD * rows, total)
        forward = sharpness * weight_at(weights_ptr, FORWARD * rows + row)
    if REVERSE >= 0:
        q_kept /= s_sum
        total = q_ratio / s_sum - (s_log - t_log) * q_kept
        if FINITE:
            total = tl.where((s_max == -infinity) | (q_kept == 0.0), 0.0, total)
        tl.store(values_ptr + REVERSE * rows, total)
        reverse = sharpness * weight_at(weights_ptr, REVERSE * rows + row)
    if MIXTURE >= 0:  # whose probabilities need both sums: a pass of its own
        total = 0.0
        of_teacher = 0.0
        for start in range(0, vocab, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < vocab
            s = tl.load(student_ptr + offsets, mask=inside, other=-infinity).to(tl.float32)
            t = tl.load(teacher_ptr + offsets, mask=inside, other=-infinity).to(tl.float32)
            log_q = (s - s_max) * sharpness - s_log
            log_p = (t - t_max) * sharpness - t_log
            larger, log_mixture = _mixture(log_q, log_p, beta)
            of_q = tl.exp(log_q) * ((log_q - larger) - log_mixture)
            of_p = tl.exp(log_p) * ((log_p - larger) - log_mixture)
            total += tl.sum(tl.where(s == -infinity, 0.0, of_q), 0)
            of_teacher += tl.sum(tl.where(t == -infinity, 0.0, of_p), 0)
        tl.store(values_ptr + MIXTURE * rows, (1.0 - beta) * total + beta * of_teacher)
        mixture = sharpness * (1.0 - beta) * weight_at(weights_ptr, MIXTURE * rows + row)
    if CROSS_ENTROPY >= 0:
        plain_log = tl.log(plain_sum) if TEMPERED else s_log
        cross_entropy = plain_log - (at_label - s_max)
        tl.store(values_ptr + CROSS_ENTROPY * rows, cross_entropy, mask=labelled)
        of_label = weight_at(weights_ptr, CROSS_ENTROPY * rows + row)
        of_label = tl.where(labelled, of_label, 0.0)
    if not DIFFERENTIATE:
        return

    for start in range(0, vocab, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < vocab
        s = tl.load(student_ptr + offsets, mask=inside, other=-infinity).to(tl.float32)
        t = tl.load(teacher_ptr + offsets, mask=inside, other=-infinity).to(tl.float32)
        log_q = (s - s_max) * sharpness - s_log
        log_p = (t - t_max) * sharpness - t_log
        q = tl.exp(log_q)
        gradient = tl.zeros([BLOCK], tl.float32)
        if FORWARD >= 0:
            p = tl.exp(log_p)
            kept = tl.abs(s) != infinity
            gradient += forward * (q * p_kept - (tl.where(kept, p, 0.0) if FINITE else p))
        if REVERSE >= 0:
            kept = s != -infinity
            if FINITE:
                kept = (tl.abs(s) != infinity) & (tl.abs(t) != infinity)
            slope = tl.where(kept, log_q - log_p + 1.0, 0.0)
            gradient += reverse * q * (slope - (total + q_kept))
        if MIXTURE >= 0:
            larger, log_mixture = _mixture(log_q, log_p, beta)
            slope = tl.where(s == -infinity, 0.0, (log_q - larger) - log_mixture)
            gradient += mixture * q * (slope - total)
        if CROSS_ENTROPY >= 0:
            if TEMPERED:
                q = tl.exp(s - s_max - plain_log)
            gradient += of_label * tl.where(offsets == label, q - 1.0, q)
        tl.store(student_ptr + offsets, gradient.to(dtype), mask=inside)


@triton.jit
def _mixture(log_q, log_p, beta):
    """The larger of both, and what the logarithm of ``beta p + (1 - beta) q`` exceeds it by."""
    larger = tl.maximum(log_q, log_p)
    return larger, tl.log((1.0 - beta) * tl.exp(log_q - larger) + beta * tl.exp(log_p - larger))
