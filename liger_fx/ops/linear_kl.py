"""``liger_fx::linear_kl``: the summed divergence of a student's projection from a teacher's, the
cross-entropy of the student, and their gradients.

As in `linear_cross_entropy`, the logits of a chunk of tokens exist once, and the gradients are
computed in the forward. Those of a weighted sum of both losses can be, since the weights are known
there: they depend on labels, not on losses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.chunked_head import (
    Head,
    Outcome,
    Wanted,
    add_gradients,
    allocate,
    chunk_size,
    kept_dtype,
    logits_buffer,
    project,
)
from liger_fx.ops.kl_loss import Divergence, write_losses
from liger_fx.ops.library import once_differentiable
from liger_fx.ops.linear_cross_entropy import scaled
from liger_fx.ops.token_loss import TokenLoss, check_labels, loss_dtype
from liger_fx.ops.tokens import valid_tokens


@torch.library.custom_op("liger_fx::linear_kl", mutates_args=())
def linear_kl(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ce_weight: Tensor | None,
    kl_weight: Tensor | None,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    forward: float,
    reverse: float,
    beta: float | None,
    temperature: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    chunk_tokens: int,
    accum_dtype: torch.dtype,
    skip_ignored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum over tokens of the divergence between ``input @ weight.T + bias`` and the teacher's
    logits, both over ``temperature`` (see `liger_fx.ops.kl_loss`). Without ``beta``: ``forward``
    times torchtune's forward and ``reverse`` times its reverse divergence. With it, from 0, KL from
    teacher to student, to 1, the other way round: the generalised Jensen-Shannon divergence.

    input: [..., H], weight: [V, H], bias: [V] or None, all float32, bfloat16 or float16 alike (on a
    CPU float64 as well). teacher_*: the same with a hidden size and a dtype of its own; it gets no
    gradient. mask: bool, as many as input has rows, the tokens whose divergence counts; None for
    all. ce_weight, kl_weight: [], floating point, without gradient: the loss is ``ce_weight`` times
    the cross-entropy of the logits, at temperature 1, against target, plus ``kl_weight`` times the
    divergence. target: integers, as many as input has rows; tokens with ``ignore_index`` have no
    cross-entropy. All three None: the divergence alone. *_grad, chunk_tokens, accum_dtype,
    skip_ignored: as for ``liger_fx::linear_cross_entropy``, with tokens of which neither loss
    counts as the ignored ones; the budget is for the logits of both heads.

    Returns (loss, sums, grad_input, grad_weight, grad_bias). loss: fp32 []; sums: fp32 [2], the
    cross-entropy (0 without weights) and the divergence, not differentiable. The gradients are the
    loss's, divided by the scale of the weights (with 1/n in them, they would be too small for
    float16); one that was not asked for is an empty tensor.

    On CUDA, with ``skip_ignored`` and a mask, the host waits once for the number of valid tokens
    (see `tokens.valid_tokens`).

    Raises ValueError for some of target and weights without the others, for a beta outside of
    [0, 1] and for a temperature that is not positive; with a target, as `chunked_head.run`,
    IndexError for a label out of range.
    """
    if len({given is None for given in (ce_weight, kl_weight, target)}) > 1:
        raise ValueError("expected all of ce_weight, kl_weight and target, or none; got some")
    if beta is not None and not 0.0 <= beta <= 1.0:
        raise ValueError(f"expected beta in [0, 1], got {beta}")
    if not temperature > 0.0:
        raise ValueError(f"expected a positive temperature, got {temperature}")
    outcome = _run(
        input.reshape(-1, input.shape[-1]),
        Head(weight, bias, TokenLoss(ignore_index)),
        teacher_input.reshape(-1, teacher_input.shape[-1]),
        Head(teacher_weight, teacher_bias, TokenLoss(ignore_index)),
        None if target is None else target.reshape(-1),
        None if mask is None else mask.reshape(-1),
        Divergence(ignore_index, forward, reverse, beta, temperature),
        _relative(ce_weight, kl_weight, loss_dtype(input.dtype)),
        Wanted(input_grad, weight_grad, bias_grad, accum_dtype),
        chunk_tokens,
        skip_ignored,
    )

    def parameter_gradient(gradient: Tensor | None) -> Tensor:
        return input.new_empty(0) if gradient is None else gradient.to(kept_dtype(weight.dtype))

    sums, grad_input = outcome.losses, outcome.grad_input
    loss = sums[1].clone()
    if ce_weight is not None and kl_weight is not None:
        loss = ce_weight.to(sums.dtype) * sums[0] + kl_weight.to(sums.dtype) * loss
    return (
        loss,
        sums,
        input.new_empty(0) if grad_input is None else grad_input.view(input.shape),
        parameter_gradient(outcome.grad_weight),
        parameter_gradient(outcome.grad_bias),
    )


def _relative(
    ce_weight: Tensor | None, kl_weight: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Both weights, [2], in units of `_scale`."""
    if ce_weight is None or kl_weight is None:
        return None
    return torch.stack([ce_weight, kl_weight]).to(dtype) / _scale(ce_weight, kl_weight).to(dtype)


def _scale(ce_weight: Tensor, kl_weight: Tensor) -> Tensor:
    """The power of two next to the larger weight: a product with it rounds nothing. One that is
    not finite is the mean's of no token, which has no gradient; that of the other loss stays."""
    larger = torch.maximum(*(w.abs().nan_to_num(0.0, posinf=0.0) for w in (ce_weight, kl_weight)))
    return torch.where(larger == 0, 1.0, larger.log2().floor().exp2())


def _run(
    x: Tensor,
    student: Head,
    teacher_x: Tensor,
    teacher: Head,
    target: Tensor | None,
    mask: Tensor | None,
    loss: Divergence,
    weights: Tensor | None,
    wanted: Wanted,
    chunk_tokens: int,
    skip_ignored: bool,
) -> Outcome:
    """The loop of `chunked_head.run` over two heads. The losses are sums, [2]."""
    if target is not None:
        check_labels(target, student.vocab, student.loss)
    valid = None
    if mask is not None and skip_ignored:
        valid = valid_tokens(mask if target is None else mask | (target != loss.ignore_index))
    tokens = x.shape[0] if valid is None else valid.numel()
    itemsize = x.element_size() + teacher_x.element_size()
    size = chunk_size(tokens, itemsize, x, student, wanted, chunk_tokens)
    accum = wanted.accum_dtype if size < tokens else kept_dtype(x.dtype)
    sums = torch.zeros(2, dtype=loss_dtype(x.dtype), device=x.device)
    outcome = replace(allocate(x, student, wanted, accum, tokens), losses=sums)
    logits = logits_buffer(min(size, tokens), student.vocab, x, x.dtype)
    teacher_logits = logits_buffer(min(size, tokens), teacher.vocab, teacher_x, teacher_x.dtype)
    # Autocast is still on inside an op that runs eagerly; here every dtype has been decided.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, tokens, size):
            rows: slice | Tensor = slice(start, min(start + size, tokens))
            rows = rows if valid is None else valid[rows]
            x_c = x[rows]
            y_c, mask_c = (None if t is None else t[rows] for t in (target, mask))
            s, t = logits[: x_c.shape[0]], teacher_logits[: x_c.shape[0]]
            project(x_c, student, s)
            project(teacher_x[rows], teacher, t)
            losses = sums.new_zeros(2, x_c.shape[0])
            write_losses(s, t, y_c, mask_c, losses, loss, weights, differentiate=bool(wanted))
            sums += losses.sum(1)
            add_gradients(outcome, rows, x_c, student.weight, s, first=start == 0)
    return outcome


@linear_kl.register_fake
def _(
    input, weight, bias, ce_weight, kl_weight, teacher_input, teacher_weight, teacher_bias, target,
    ignore_index, mask, forward, reverse, beta, temperature, input_grad, weight_grad, bias_grad,
    chunk_tokens, accum_dtype, skip_ignored,
):  # fmt: skip
    kept, wide = kept_dtype(weight.dtype), loss_dtype(input.dtype)
    return (
        input.new_empty((), dtype=wide),
        input.new_empty(2, dtype=wide),
        input.new_empty(input.shape) if input_grad else input.new_empty(0),
        weight.new_empty(weight.shape, dtype=kept) if weight_grad else input.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=kept) if bias_grad else input.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[3:5], *output[2:])
    ctx.dtype = inputs[0].dtype
    ctx.wanted = inputs[15:18]


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    ce_weight, kl_weight, *saved = ctx.saved_tensors
    gradients: list[Tensor | None] = [None, None, None]
    if grad_loss is not None:
        upstream = grad_loss
        if ce_weight is not None:
            upstream = upstream * _scale(ce_weight, kl_weight).to(upstream.dtype)
        for i, (gradient, wanted) in enumerate(zip(saved, ctx.wanted, strict=True)):
            if wanted:
                gradients[i] = scaled(gradient, upstream).to(ctx.dtype)
    return *gradients, *(None,) * 18


linear_kl.register_autograd(_backward, setup_context=_setup_context)
