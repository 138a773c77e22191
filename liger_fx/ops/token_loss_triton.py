"""The loss of each row of logits, its entropy where asked for, their gradient: one Triton kernel.

Liger's cross-entropy kernel knows neither entropy nor temperature, and its gradient is that of the
plain sum: the factor of a row would have to be multiplied in by a second pass, after the first has
rounded. This one reads a row twice, as that one does: for the sums, and for the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from liger_fx.ops.token_loss import TokenLoss

_MAX_BLOCK = 4096


def write_losses_triton(
    logits: Tensor,
    target: Tensor,
    values: Tensor,
    loss: TokenLoss,
    differentiate: bool,
    factor: Tensor | None,
) -> None:
    """As `token_loss.write_losses`, for a loss that is ``plain``. For an ignored label the gradient
    is 0; no value is written.

    logits: [rows, V] with unit stride in V. target: int64 [rows]. values: fp32 [rows], contiguous,
    or [2, rows] with the entropies. factor: fp32 [rows, 1] or [2, rows, 1]. The formula is in
    `token_loss`.
    """
    rows, vocab = logits.shape
    if rows:
        _token_loss_kernel[(rows,)](
            *(logits, target, values, None if factor is None else factor.contiguous()),
            *(logits.stride(0), target.stride(0), rows, vocab),
            *(loss.ignore_index, loss.temperature),
            ENTROPY=loss.entropy,
            DIFFERENTIATE=differentiate,
            BLOCK=min(_MAX_BLOCK, triton.next_power_of_2(vocab)),
            num_warps=8,
        )


@triton.jit
def _token_loss_kernel(
    logits_ptr,
    target_ptr,
    values_ptr,
    factor_ptr,
    row_stride,
    target_stride,
    rows,
    vocab,
    ignore_index,
    temperature,
    ENTROPY: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    label = tl.load(target_ptr + row * target_stride)
    column = tl.arange(0, BLOCK)
    if label == ignore_index:
        if DIFFERENTIATE:
            for start in range(0, vocab, BLOCK):
                tl.store(logits_ptr + start + column, 0.0, mask=start + column < vocab)
        return

    # Before anyone may write the gradient over it: the reductions that follow are barriers.
    at_label = tl.load(logits_ptr + label).to(tl.float32) / temperature

    # Of q[c] = exp(z[c] - top) / total, total and the sum of exp(z[c] - top) (z[c] - top), both
    # rescaled whenever the largest so far changes. It is finite at first: no inf - inf.
    top = -3.4028234663852886e38
    total = 0.0
    moment = 0.0
    for start in range(0, vocab, BLOCK):
        inside = start + column < vocab
        z = tl.load(logits_ptr + start + column, mask=inside, other=float("-inf"))
        z = z.to(tl.float32) / temperature
        new = tl.maximum(top, tl.max(z))
        scale = tl.exp(top - new)
        e = tl.exp(z - new)
        if ENTROPY:
            moment = scale * (moment + (top - new) * total)
            moment += tl.sum(tl.where(e > 0, e * (z - new), 0.0))  # 0 log 0 = 0
        total = scale * total + tl.sum(e)
        top = new
    log_total = tl.log(total)
    tl.store(values_ptr + row, log_total - (at_label - top))
    if ENTROPY:
        entropy = log_total - moment / total
        tl.store(values_ptr + rows + row, entropy)

    if DIFFERENTIATE:
        of_loss = 1.0
        if factor_ptr is not None:
            of_loss = tl.load(factor_ptr + row)
        if ENTROPY:
            of_entropy = tl.load(factor_ptr + rows + row)
        for start in range(0, vocab, BLOCK):
            inside = start + column < vocab
            z = tl.load(logits_ptr + start + column, mask=inside, other=0.0)
            logq = z.to(tl.float32) / temperature - top - log_total
            q = tl.exp(logq)
            gradient = q * of_loss
            if ENTROPY:
                gradient -= tl.where(q > 0, q * of_entropy * (logq + entropy), 0.0)
            gradient -= tl.where(start + column == label, of_loss, 0.0)
            gradient = (gradient / temperature).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + start + column, gradient, mask=inside)
