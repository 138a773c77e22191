"""The loss and the entropy of each row of logits, and their gradient, as one Triton kernel.

Liger's cross-entropy kernel knows no entropy. This one reads a row twice, as that one does: for the
sums, and for the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from liger_fx.ops.token_loss import TokenLoss

_MAX_BLOCK = 4096


def write_losses_and_entropies(
    logits: Tensor,
    target: Tensor,
    values: Tensor,
    loss: TokenLoss,
    factor: Tensor | None,
) -> None:
    """Write the losses and entropies of the rows and, with a factor, over the logits the gradient
    of their sum weighted by it. For an ignored label the gradient is 0; no value is written.

    logits: [rows, V] with unit stride in V. target: int64 [rows]. values: fp32 [2, rows],
    contiguous. factor: fp32 [2, rows, 1]. The formula is in `token_loss`.
    """
    rows, vocab = logits.shape
    if rows:
        _kernel[(rows,)](
            *(logits, target, values, values if factor is None else factor.contiguous()),
            *(logits.stride(0), target.stride(0), rows, vocab),
            *(loss.ignore_index, loss.temperature),
            DIFFERENTIATE=factor is not None,
            BLOCK=min(_MAX_BLOCK, triton.next_power_of_2(vocab)),
            num_warps=8,
        )


@triton.jit
def _kernel(
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
        moment = scale * (moment + (top - new) * total)
        total = scale * total
        e = tl.exp(z - new)
        moment += tl.sum(tl.where(e > 0, e * (z - new), 0.0))  # 0 log 0 = 0
        total += tl.sum(e)
        top = new
    log_total = tl.log(total)
    entropy = log_total - moment / total
    tl.store(values_ptr + row, log_total - (at_label - top))
    tl.store(values_ptr + rows + row, entropy)

    if DIFFERENTIATE:
        of_loss = tl.load(factor_ptr + row)
        of_entropy = tl.load(factor_ptr + rows + row)
        for start in range(0, vocab, BLOCK):
            inside = start + column < vocab
            z = tl.load(logits_ptr + start + column, mask=inside, other=0.0)
            logq = z.to(tl.float32) / temperature - top - log_total
            q = tl.exp(logq)
            gradient = tl.where(q > 0, q * (of_loss - of_entropy * (logq + entropy)), q)
            gradient -= tl.where(start + column == label, of_loss, 0.0)
            gradient = (gradient / temperature).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + start + column, gradient, mask=inside)
