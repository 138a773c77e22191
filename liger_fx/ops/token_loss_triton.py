"""What a loss takes of each row of logits, and the gradient of a weighted sum of it: one Triton
kernel. And one that multiplies such gradients by the upstream one.

Liger's cross-entropy kernel knows neither entropy nor temperature, and its gradient is that of the
plain sum: the weight of a token would have to be multiplied in by a second pass, after the first
has rounded. This one reads a row twice, as that one does: for the sums, and for the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from liger_fx.ops.token_loss import TAKES, TokenLoss

_MAX_BLOCK = 4096


def write_values_triton(
    logits: Tensor,
    target: Tensor | None,
    values: Tensor,
    loss: TokenLoss,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    """As `token_loss.write_values`; computed in fp32. Of an ignored label no cross-entropy is
    written, and no gradient comes from it."""
    rows, vocab = logits.shape
    if not rows:
        return
    cross_entropy, entropy, logsumexp, squared = (
        loss.takes.index(taken) if taken in loss.takes else -1 for taken in TAKES
    )
    weight = loss.class_weight
    _token_loss_kernel[(rows,)](
        *(logits, target, None if weight is None else weight.contiguous(), values),
        None if weights is None else weights.contiguous(),
        *(logits.stride(0), 0 if target is None else target.stride(0), rows, vocab),
        *(loss.ignore_index or 0, loss.label_smoothing, loss.softcap, loss.temperature),
        CROSS_ENTROPY=cross_entropy,
        ENTROPY=entropy,
        LOGSUMEXP=logsumexp,
        SQUARED=squared,
        IGNORES=loss.ignore_index is not None,
        SMOOTHED=bool(loss.label_smoothing),
        SOFTCAPPED=bool(loss.softcap),
        DIFFERENTIATE=differentiate,
        BLOCK=min(_MAX_BLOCK, triton.next_power_of_2(vocab)),
        num_warps=8,
    )


def write_scaled(gradient: Tensor, upstream: Tensor, out: Tensor) -> None:
    """Write ``gradient`` times ``upstream``, of one element; 0 stays 0. gradient, out: contiguous,
    of one dtype. Computed in fp32."""
    if out.numel():
        grid = (triton.cdiv(out.numel(), _MAX_BLOCK),)
        _scale_kernel[grid](gradient, upstream, out, out.numel(), BLOCK=_MAX_BLOCK, num_warps=8)


@triton.jit
def _scale_kernel(gradient_ptr, upstream_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gradient = tl.load(gradient_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    product = gradient * tl.load(upstream_ptr).to(tl.float32)
    product = tl.where(gradient == 0.0, 0.0, product)
    tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _token_loss_kernel(
    logits_ptr,
    target_ptr,
    class_weight_ptr,
    values_ptr,
    weights_ptr,
    row_stride,
    target_stride,
    rows,
    vocab,
    ignore_index,
    label_smoothing,
    softcap,
    temperature,
    CROSS_ENTROPY: tl.constexpr,  # the index of its values and weights; -1: not taken
    ENTROPY: tl.constexpr,
    LOGSUMEXP: tl.constexpr,
    SQUARED: tl.constexpr,
    IGNORES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    values_ptr += row
    column = tl.arange(0, BLOCK)
    if CROSS_ENTROPY >= 0:
        label = tl.load(target_ptr + row * target_stride)
        counts = label == label
        if IGNORES:
            counts = label != ignore_index
            if ENTROPY < 0 and LOGSUMEXP < 0 and SQUARED < 0 and not counts:
                if DIFFERENTIATE:
                    for start in range(0, vocab, BLOCK):
                        tl.store(logits_ptr + start + column, 0.0, mask=start + column < vocab)
                return
        # Before anyone may write the gradient over it: the reductions that follow are barriers.
        at_label = tl.load(logits_ptr + label, mask=counts, other=0.0).to(tl.float32) / temperature
        if SOFTCAPPED:
            at_label = softcap * _tanh(at_label / softcap)
        of_label = 1.0 - label_smoothing
        if class_weight_ptr is not None:
            of_label *= tl.load(class_weight_ptr + label, mask=counts, other=0.0).to(tl.float32)

    # Of q[c] = exp(z[c] - top) / total, total and the sum of exp(z[c] - top) (z[c] - top), both
    # rescaled whenever the largest so far changes. It is finite at first: no inf - inf.
    top = -3.4028234663852886e38
    total = 0.0
    moment = 0.0
    of_classes = 0.0  # sums of the class weights, 1 without, and of their products with z
    at_classes = 0.0
    for start in range(0, vocab, BLOCK):
        inside = start + column < vocab
        z = tl.load(logits_ptr + start + column, mask=inside, other=float("-inf"))
        z = z.to(tl.float32) / temperature
        if SOFTCAPPED:
            z = tl.where(inside, softcap * _tanh(z / softcap), float("-inf"))
        new = tl.maximum(top, tl.max(z))
        scale = tl.exp(top - new)
        e = tl.exp(z - new)
        if ENTROPY >= 0:
            moment = scale * (moment + (top - new) * total)
            moment += tl.sum(tl.where(e > 0, e * (z - new), 0.0))  # 0 log 0 = 0
        if SMOOTHED:
            weight = tl.where(inside, 1.0, 0.0)
            if class_weight_ptr is not None:
                weight = tl.load(class_weight_ptr + start + column, mask=inside, other=0.0)
                weight = weight.to(tl.float32)
            of_classes += tl.sum(weight)
            at_classes += tl.sum(tl.where(inside, weight * z, 0.0))
        total = scale * total + tl.sum(e)
        top = new
    log_total = tl.log(total)
    logsumexp = log_total + top

    slope = 0.0  # of the weighted sum in the log-sum-exp
    if CROSS_ENTROPY >= 0:
        each = label_smoothing / vocab
        loss = of_label * (log_total - (at_label - top))
        if SMOOTHED:
            loss += each * (of_classes * log_total - (at_classes - of_classes * top))
        tl.store(values_ptr + CROSS_ENTROPY * rows, loss, mask=counts)
        of_loss = weight_at(weights_ptr, CROSS_ENTROPY * rows + row)
        of_loss = tl.where(counts, of_loss, 0.0)
        slope += of_loss * (of_label + each * of_classes)
    if ENTROPY >= 0:
        entropy = log_total - moment / total
        tl.store(values_ptr + ENTROPY * rows, entropy)
        of_entropy = weight_at(weights_ptr, ENTROPY * rows + row)
    if LOGSUMEXP >= 0:
        tl.store(values_ptr + LOGSUMEXP * rows, logsumexp)
        slope += weight_at(weights_ptr, LOGSUMEXP * rows + row)
    if SQUARED >= 0:
        tl.store(values_ptr + SQUARED * rows, logsumexp * logsumexp)
        slope += 2.0 * logsumexp * weight_at(weights_ptr, SQUARED * rows + row)

    if DIFFERENTIATE:
        for start in range(0, vocab, BLOCK):
            inside = start + column < vocab
            z = tl.load(logits_ptr + start + column, mask=inside, other=0.0)
            z = z.to(tl.float32) / temperature
            if SOFTCAPPED:
                capped = _tanh(z / softcap)
                z = softcap * capped
            logq = z - top - log_total
            q = tl.exp(logq)
            gradient = q * slope
            if ENTROPY >= 0:
                gradient -= tl.where(q > 0, q * of_entropy * (logq + entropy), 0.0)
            if CROSS_ENTROPY >= 0:
                if SMOOTHED:
                    weight = of_loss * each
                    if class_weight_ptr is not None:
                        of_class = tl.load(
                            class_weight_ptr + start + column, mask=inside, other=0.0
                        )
                        gradient -= weight * of_class.to(tl.float32)
                    else:
                        gradient -= weight
                gradient -= tl.where(start + column == label, of_loss * of_label, 0.0)
            if SOFTCAPPED:
                gradient *= 1.0 - capped * capped
            gradient = (gradient / temperature).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + start + column, gradient, mask=inside)


@triton.jit
def weight_at(weights_ptr, at):
    """What a value is taken times in the sum: 1 without weights."""
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + at).to(tl.float32)
    return weight


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
