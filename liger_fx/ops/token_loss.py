"""What a loss takes of a row of logits, and its gradient: in PyTorch, and by Liger's kernel.

For a row of logits ``l``, its label ``y``, class weights ``w`` (1 without) and V classes::

    z              = softcap tanh(l / (temperature softcap))        without softcap: l / temperature
    logsumexp    L = log sum_c exp(z[c])
    cross_entropy  = (1 - e) w[y] (L - z[y]) + e / V sum_c w[c] (L - z[c])        e: label smoothing
    entropy      H = -sum_c q[c] log q[c]                                             q = softmax(z)

the cross-entropy as `torch.nn.functional.cross_entropy` defines it, 0 where ``y`` is ignored.
``squared_logsumexp`` is ``L^2``, the z-loss of PaLM (Chowdhery et al., 2022, section 5). The
gradients over ``z`` are::

    dL / dz[c] = q[c]          dL^2 / dz[c] = 2 L q[c]          dH / dz[c] = -q[c] (log q[c] + H)

What is taken of two heads, a divergence, is in `liger_fx.ops.kl_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liger_fx.ops.library import liger_module

TAKES = ("cross_entropy", "entropy", "logsumexp", "squared_logsumexp")
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


@dataclass(frozen=True)
class TokenLoss:
    """``takes``: names of `TAKES`, in any order; or of `DIVERGENCES` with at most a cross-entropy,
    which then is one of the student without label smoothing, softcap or class weights.

    ignore_index: the label of tokens without a cross-entropy; None where all have one. softcap: 0
    means none. temperature: of all that is taken, but not of a cross-entropy beside a divergence.
    beta: of the Jensen-Shannon divergence. class_weight: fp32 [V] or None.
    """

    takes: tuple[str, ...] = ("cross_entropy",)
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    softcap: float = 0.0
    temperature: float = 1.0
    beta: float = 0.5
    class_weight: Tensor | None = None

    @property
    def only_labels(self) -> bool:
        """Is nothing taken of a token without a label?"""
        return self.takes == ("cross_entropy",)

    @property
    def known_to_liger(self) -> bool:
        """Does Liger's kernel compute it? With class weights and label smoothing that wants the sum
        of the weights from the host, which would have to wait for it."""
        one_of_both = not self.label_smoothing or self.class_weight is None
        return self.only_labels and self.temperature == 1.0 and one_of_both


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def check_labels(target: Tensor, vocab: int, ignore_index: int | None) -> None:
    """The kernels read the logit at the label without a look at the bounds. Raises IndexError on a
    CPU; on CUDA it is a device-side assertion, both as in eager."""
    legal = (target >= 0) & (target < vocab)
    if ignore_index is not None:
        legal |= target == ignore_index
    if target.is_cuda:
        torch._assert_async(
            legal.all(), f"a label is neither in [0, {vocab}) nor the ignored {ignore_index}"
        )
    elif not legal.all():
        raise IndexError(f"Target {int(target[~legal][0])} is out of bounds.")


def write_values(
    logits: Tensor,
    target: Tensor | None,
    values: Tensor,
    loss: TokenLoss,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    """Write ``values [takes, rows]``, and over ``logits [rows, V]`` the gradient of their sum
    weighted by ``weights [takes, rows]``, 1 without.

    logits: rows with unit stride. target: int64 [rows], None if no cross-entropy is taken. values:
    fp32 (on a CPU fp64 as well), contiguous. A cross-entropy of an ignored label is not written: it
    should be zero before. Without ``differentiate`` the logits stay as they are, but for the rows
    of ignored labels.
    """
    arguments = logits, target, values, loss, weights, differentiate
    if not logits.is_cuda or liger_module("cross_entropy") is None:
        write_values_torch(*arguments)
    elif target is not None and weights is None and loss.known_to_liger:
        write_cross_entropy_liger(logits, target, values[0], loss, differentiate)
    else:
        from liger_fx.ops.token_loss_triton import write_values_triton

        write_values_triton(*arguments)


def write_values_torch(
    logits: Tensor,
    target: Tensor | None,
    values: Tensor,
    loss: TokenLoss,
    weights: Tensor | None,
    differentiate: bool,
) -> None:
    z = logits.to(values.dtype, copy=not differentiate)
    if loss.temperature != 1.0:
        z = z.div_(loss.temperature)
    capped = torch.tanh(z / loss.softcap) if loss.softcap else None
    if capped is not None:
        z = capped * loss.softcap
    top = z.amax(1, keepdim=True)
    z = z.sub_(top)
    labels = None if target is None else _Labels(z, target, loss)
    with_entropy = "entropy" in loss.takes
    # Below -1e4 the exponential is 0 long before; 0 log 0 = 0.
    q = z.clamp_(min=-1e4).exp() if with_entropy else z.exp_()
    total = q.sum(1, keepdim=True)
    log_total = total.log()
    if with_entropy:
        q, z = q.div_(total), z.sub_(log_total)
    slope = torch.zeros_like(total)  # of the weighted sum in the log-sum-exp
    entropy = of_entropy = slope
    for i, taken in enumerate(loss.takes):
        weight = torch.ones_like(total) if weights is None else weights[i].unsqueeze(1)
        if taken == "cross_entropy" and labels is not None:
            value = labels.cross_entropy(log_total)
            slope = slope + labels.slope(weight)
        elif taken == "entropy":
            value = entropy = -(q * z).sum(1, keepdim=True)
            of_entropy = weight
        elif taken == "logsumexp":
            value = log_total + top
            slope = slope + weight
        else:
            value = (log_total + top).square()
            slope = slope + 2 * weight * (log_total + top)
        values[i] = value.squeeze(1)
    if not differentiate:
        return
    if with_entropy:
        z = z.add_(entropy).mul_(-of_entropy).add_(slope).mul_(q)
    else:
        z = q.mul_(slope / total)
    if labels is not None:
        labels.subtract_from(z)
    if capped is not None:
        z.mul_(capped.square_().neg_().add_(1.0))
    if loss.temperature != 1.0:
        z.div_(loss.temperature)
    if z.data_ptr() != logits.data_ptr():
        logits.copy_(z)


class _Labels:
    """What the cross-entropy needs of ``z [rows, V]``, less each row's largest, before another
    number takes its place. ``weight``, [rows, 1], is 0 where the label is ignored."""

    weight: Tensor

    def __init__(self, z: Tensor, target: Tensor, loss: TokenLoss) -> None:
        self.counts = target.new_ones(target.shape, dtype=torch.bool).unsqueeze(1)
        if loss.ignore_index is not None:
            self.counts = (target != loss.ignore_index).unsqueeze(1)
        self.label = target.unsqueeze(1).where(self.counts, 0)
        e, vocab = loss.label_smoothing, z.shape[1]
        self.class_weight = weight = (
            z.new_ones(vocab) if loss.class_weight is None else loss.class_weight.to(z.dtype)
        )
        self.each = e / vocab * weight  # by class
        self.of_label = (1 - e) * weight[self.label]
        self.of_all = self.each.sum()
        self.at_label = z.gather(1, self.label)
        # No matrix product: autocast outside would round it.
        self.at_all = (z * self.each).sum(1, keepdim=True) if e else 0.0
        self.smoothed = bool(e)

    def cross_entropy(self, log_total: Tensor) -> Tensor:
        at = self.of_label * self.at_label + self.at_all
        return ((self.of_label + self.of_all) * log_total - at).where(self.counts, 0.0)

    def slope(self, weight: Tensor) -> Tensor:
        """Of ``weight`` times the cross-entropy in the log-sum-exp."""
        self.weight = weight.where(self.counts, 0.0)
        return self.weight * (self.of_label + self.of_all)

    def subtract_from(self, gradient: Tensor) -> None:
        if self.smoothed:
            gradient.sub_(self.weight * self.each)
        gradient.scatter_add_(1, self.label, -self.weight * self.of_label)


def write_cross_entropy_liger(
    logits: Tensor, target: Tensor, losses: Tensor, loss: TokenLoss, differentiate: bool
) -> None:
    """The cross-entropy alone, by Liger's Triton kernel: ``losses [rows]``. ``reduction="sum"``
    keeps the number of tokens out of it."""
    liger = liger_module("cross_entropy")
    rows, vocab = logits.shape
    if not rows:
        return
    weight = loss.class_weight
    # Block and warps as Liger's own cross_entropy_forward chooses them.
    block = min(liger.MAX_FUSED_SIZE, 1 << (vocab - 1).bit_length())
    liger.liger_cross_entropy_kernel[(rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=target,
        Y_stride=target.stride(0),
        weight_ptr=None if weight is None else weight.contiguous(),
        loss_ptr=losses,
        z_loss_ptr=None,
        loss_stride=1,
        token_accuracy_ptr=None,
        token_accuracy_stride=0,
        predicted_tokens_ptr=None,
        predicted_tokens_stride=0,
        n_cols=vocab,
        n_non_ignore=1,
        sum_non_ignore_weight=1.0,
        weight_sum=0.0,  # only asked for with label smoothing
        ignore_index=-1 if loss.ignore_index is None else loss.ignore_index,
        lse_square_scale=0.0,
        label_smoothing=loss.label_smoothing,
        reduction="sum",
        softcap=loss.softcap or None,
        RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False,
        HAS_WEIGHT=weight is not None,
        HAS_SOFTCAPPING=bool(loss.softcap),
        HAS_GRADIENTS=differentiate,
        BLOCK_SIZE=block,
        num_warps=16 if liger.is_hip() else 32,
    )
