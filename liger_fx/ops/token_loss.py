"""Cross-entropy of rows of logits and its gradient, on a CPU and by Liger's kernel.

For a row of logits ``l``, its label ``y``, class weights ``w`` (1 without) and V classes::

    z    = softcap * tanh(l / (temperature softcap))           without softcap: l / temperature
    loss = (1 - e) w[y] (lse(z) - z[y]) + e / V sum_c w[c] (lse(z) - z[c])     e: label smoothing

as `torch.nn.functional.cross_entropy` defines it, 0 where ``y == ignore_index``. With the entropy
of the row's distribution ``q = softmax(l / temperature)``, by a kernel of our own::

    H = -sum_c q[c] log q[c]            dH / dz[c] = -q[c] (log q[c] + H)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liger_fx.ops.library import liger_module


@dataclass(frozen=True)
class TokenLoss:
    """``softcap`` 0 means none. ``class_weight``: [V] or None. ``entropy``: a token has two values,
    loss and entropy; then there is no label smoothing, softcap or class weight."""

    ignore_index: int
    label_smoothing: float = 0.0
    softcap: float = 0.0
    temperature: float = 1.0
    class_weight: Tensor | None = None
    entropy: bool = False


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def check_labels(target: Tensor, vocab: int, loss: TokenLoss) -> None:
    """Liger's kernel reads the logit at the label without a look at the bounds. Raises IndexError
    on a CPU; on CUDA it is a device-side assertion, both as in eager."""
    legal = ((target >= 0) & (target < vocab)) | (target == loss.ignore_index)
    if target.is_cuda:
        torch._assert_async(
            legal.all(), f"a label is neither in [0, {vocab}) nor {loss.ignore_index}"
        )
    elif not legal.all():
        raise IndexError(f"Target {int(target[~legal][0])} is out of bounds.")


def write_losses(
    logits: Tensor,
    target: Tensor,
    losses: Tensor,
    loss: TokenLoss,
    differentiate: bool,
    factor: Tensor | None = None,
) -> None:
    """Write ``losses [rows]``, and over ``logits [rows, V]`` the gradient of their sum, or of the
    sum weighted by ``factor [rows, 1]``. With the entropy losses are [2, rows], and the factor,
    [2, rows, 1], is needed for the gradient.

    Without ``differentiate`` the logits stay as they are, but for the rows of ignored labels.
    Losses of ignored labels are not written: they should be zeros before.
    """
    has_triton = logits.is_cuda and liger_module("cross_entropy") is not None
    if loss.entropy and has_triton:
        from liger_fx.ops.entropy_triton import write_losses_and_entropies

        write_losses_and_entropies(logits, target, losses, loss, factor)
    elif loss.entropy:
        write_losses_and_entropies_torch(logits, target, losses, loss, factor)
    elif has_triton:
        if loss.temperature != 1.0:
            logits.div_(loss.temperature)
        write_losses_liger(logits, target, losses, loss, differentiate)
        if factor is not None and differentiate:
            logits.mul_(factor / loss.temperature)
        elif loss.temperature != 1.0 and differentiate:
            logits.div_(loss.temperature)
    else:
        write_losses_torch(logits, target, losses, loss, differentiate, factor)


def write_losses_torch(
    logits: Tensor,
    target: Tensor,
    losses: Tensor,
    loss: TokenLoss,
    differentiate: bool,
    factor: Tensor | None,
) -> None:
    valid = (target != loss.ignore_index).unsqueeze(1)
    label = target.unsqueeze(1).where(valid, 0)
    e, vocab = loss.label_smoothing, logits.shape[1]
    z = logits.to(losses.dtype, copy=not differentiate)
    if loss.temperature != 1.0:
        z = z.div_(loss.temperature)
    capped = torch.tanh(z / loss.softcap) if loss.softcap else None
    if capped is not None:
        z = capped * loss.softcap
    z = z.sub_(z.amax(1, keepdim=True))
    weight = None if loss.class_weight is None else loss.class_weight.to(z.dtype)
    at_label = z.gather(1, label)
    at_all = (
        0.0 if not e else z.mean(1, keepdim=True) if weight is None else z @ weight[:, None] / vocab
    )
    of_label = (1 - e) if weight is None else (1 - e) * weight[label]
    of_all = e if weight is None else e * weight.mean()
    z.exp_()
    total = z.sum(1, keepdim=True)
    value = (of_label + of_all) * total.log() - of_label * at_label - e * at_all
    losses.copy_(value.where(valid, 0.0).squeeze(1))
    if not differentiate:
        return
    z.mul_((of_label + of_all) / total)
    if e:
        z.sub_(e / vocab if weight is None else weight * (e / vocab))
    z.scatter_add_(1, label, -torch.ones_like(at_label) * of_label)
    if capped is not None:
        z.mul_(capped.square_().neg_().add_(1.0))
    z.mul_((valid if factor is None else valid * factor) / loss.temperature)
    if z.data_ptr() != logits.data_ptr():
        logits.copy_(z)


def write_losses_and_entropies_torch(
    logits: Tensor,
    target: Tensor,
    values: Tensor,
    loss: TokenLoss,
    factor: Tensor | None,
) -> None:
    valid = (target != loss.ignore_index).unsqueeze(1)
    label = target.unsqueeze(1).where(valid, 0)
    z = logits.to(values.dtype, copy=factor is None)
    if loss.temperature != 1.0:
        z = z.div_(loss.temperature)
    z = z.sub_(z.amax(1, keepdim=True))
    at_label = z.gather(1, label)
    q = z.clamp_(min=-1e4).exp()  # 0 log 0 = 0: the exponential is 0 long before
    total = q.sum(1, keepdim=True)
    q.div_(total)
    log_total = total.log_()
    logq = z.sub_(log_total)
    entropy = -(q * logq).sum(1, keepdim=True)
    values.copy_(torch.stack((log_total - at_label, entropy)).where(valid, 0.0).squeeze(2))
    if factor is None:
        return
    of_loss, of_entropy = factor.where(valid, 0.0)
    gradient = logq.add_(entropy).mul_(-of_entropy).add_(of_loss).mul_(q)
    gradient.scatter_add_(1, label, -of_loss.to(gradient.dtype)).div_(loss.temperature)
    if gradient.data_ptr() != logits.data_ptr():
        logits.copy_(gradient)


def write_losses_liger(
    logits: Tensor, target: Tensor, losses: Tensor, loss: TokenLoss, differentiate: bool
) -> None:
    """By Liger's Triton kernel. ``reduction="sum"`` keeps the number of tokens out of it."""
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
        ignore_index=loss.ignore_index,
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
