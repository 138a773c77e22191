"""``liger_fx::cross_entropy``: the loss of each row of logits that exist already.

The formula is in `liger_fx.ops.token_loss`. Liger's kernel writes the gradient over the logits; the
logits of this op belong to somebody else. So the forward only reads them, and the backward lets
the kernel work on copies of some rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.library import differentiable, kernel, once_differentiable
from liger_fx.ops.token_loss import TokenLoss, check_labels, loss_dtype, write_values

_ROWS_BUDGET = 256 << 20  # bytes of fp32 gradients that wait for their rounding to 16 bits


def _forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    check_labels(target, logits.shape[1], ignore_index)
    losses = target.new_empty((1, *target.shape), dtype=loss_dtype(logits.dtype))
    # The kernel clears the rows of ignored labels even if it computes no gradient. These are not
    # ours to clear: another label stands in, and its loss is dropped.
    ignored = target == ignore_index
    loss = TokenLoss(label_smoothing=label_smoothing, class_weight=class_weight)
    labels = target.masked_fill(ignored, 0)
    write_values(_unit_stride(logits), labels, losses, loss, None, differentiate=False)
    return losses.squeeze_(0).masked_fill_(ignored, 0.0)


def _backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    loss = TokenLoss(
        ignore_index=ignore_index, label_smoothing=label_smoothing, class_weight=class_weight
    )
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    wide = loss_dtype(logits.dtype)
    # Rows without a label get no gradient even from an upstream that is not finite: 1 / 0 tokens.
    weights = grad.to(wide).masked_fill(target == ignore_index, 0.0).unsqueeze(0)
    unused = torch.empty_like(weights)
    rows, vocab = logits.shape
    step = rows if out.dtype == wide else max(1, _ROWS_BUDGET // (vocab * wide.itemsize))
    for start in range(0, rows, step or 1):
        part = slice(start, start + step)
        # The upstream gradient is multiplied in before the rounding, as autograd does.
        wide_rows = out[part] if out.dtype == wide else torch.empty_like(out[part], dtype=wide)
        wide_rows.copy_(logits[part])  # as contiguous rows, whatever the layout of the logits
        labels, each = target[part], weights[:, part]
        write_values(wide_rows, labels, unused[:, part], loss, each, differentiate=True)
        if out.dtype != wide:
            out[part] = wide_rows
    return out


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


_forward_op = kernel(
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? class_weight, int ignore_index,"
    " float label_smoothing) -> Tensor",
    fake=lambda logits, target, *_: logits.new_empty(target.shape, dtype=loss_dtype(logits.dtype)),
    plain=_forward,
    cuda=lambda liger, *args: _forward(*args),
    liger="cross_entropy",
)
_backward_op = kernel(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor? class_weight,"
    " int ignore_index, float label_smoothing) -> Tensor",
    fake=lambda grad, logits, *_: logits.new_empty(logits.shape),
    plain=_backward,
    cuda=lambda liger, *args: _backward(*args),
    liger="cross_entropy",
)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, target, class_weight, ignore_index, label_smoothing):
        ctx.save_for_backward(logits, target, class_weight)
        ctx.literals = (ignore_index, label_smoothing)
        return _forward_op(logits, target, class_weight, ignore_index, label_smoothing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _backward_op(grad, *ctx.saved_tensors, *ctx.literals), None, None, None, None


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The cross-entropy of each row; 0 for ignored labels.

    logits: [N, V], float32, bfloat16 or float16 (on a CPU float64 as well); never written to.
    target: int64 [N]. class_weight: fp32 [V] or None, without a gradient. Returns fp32 [N]. The
    backward is differentiable once. Raises IndexError for a label out of range on a CPU; on CUDA
    that is a device-side assertion.
    """
    return _CrossEntropy.apply(logits, target, class_weight, ignore_index, label_smoothing)


cross_entropy = differentiable(
    "cross_entropy(Tensor logits, Tensor target, Tensor? class_weight, int ignore_index,"
    " float label_smoothing) -> Tensor",
    _cross_entropy,
)
