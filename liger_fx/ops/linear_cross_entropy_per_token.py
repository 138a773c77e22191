"""``liger_fx::linear_cross_entropy_per_token``: the loss of each token, ``reduction="none"``, and
if asked for the entropy of its distribution.

Each token's gradient depends on its own upstream value, which is unknown in the forward. So the
forward computes losses only and saves its inputs; the backward projects again, chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.chunked_head import Head, Wanted, run
from liger_fx.ops.library import once_differentiable, require_fit
from liger_fx.ops.token_loss import TokenLoss, loss_dtype


@torch.library.custom_op("liger_fx::linear_cross_entropy_per_token", mutates_args=())
def linear_cross_entropy_per_token(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    temperature: float,
    chunk_tokens: int,
    accum_dtype: torch.dtype,
    skip_ignored: bool,
    entropy: bool = False,
) -> Tensor:
    """The cross-entropy of each row of ``(input @ weight.T + bias) / temperature``; 0 for ignored
    labels.

    Other arguments as for ``liger_fx::linear_cross_entropy``. Returns fp32 of target's shape; with
    ``entropy`` [2, *target's shape], the losses and the entropy of each row's softmax, 0 for
    ignored labels as well. Raises ValueError for an entropy with a softcap or label smoothing.
    """
    if entropy and (softcap or label_smoothing):
        raise ValueError(
            f"the entropy is computed without softcap ({softcap}) and label smoothing "
            f"({label_smoothing}): pass 0 for both"
        )
    loss = TokenLoss(ignore_index, label_smoothing, softcap, temperature, entropy=entropy)
    outcome = run(
        input.reshape(-1, input.shape[-1]),
        target.reshape(-1),
        Head(weight, bias, loss),
        Wanted(),
        chunk_tokens=chunk_tokens,
        skip_ignored=skip_ignored,
    )
    # No view: what a custom function returns may be written in place only if it is none.
    shape = (*outcome.losses.shape[:-1], *target.shape)
    return torch.ops.aten._unsafe_view(outcome.losses, shape)


@linear_cross_entropy_per_token.register_fake
def _(
    input, weight, bias, target, ignore_index, label_smoothing, softcap, temperature,
    chunk_tokens, accum_dtype, skip_ignored, entropy=False,
):  # fmt: skip
    require_fit(input, "cross_entropy")
    shape = (2, *target.shape) if entropy else target.shape
    return input.new_empty(shape, dtype=loss_dtype(input.dtype))


@torch.library.custom_op("liger_fx::linear_cross_entropy_per_token_backward", mutates_args=())
def linear_cross_entropy_per_token_backward(
    grad_losses: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    temperature: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    chunk_tokens: int,
    accum_dtype: torch.dtype,
    skip_ignored: bool,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(grad_losses * losses)`` over input, weight and bias, in their dtypes;
    an empty tensor for each that is not asked for."""
    loss = TokenLoss(ignore_index, label_smoothing, softcap, temperature, entropy=entropy)
    outcome = run(
        input.reshape(-1, input.shape[-1]),
        target.reshape(-1),
        Head(weight, bias, loss),
        Wanted(input_grad, weight_grad, bias_grad, accum_dtype),
        upstream=grad_losses.reshape((2, -1) if entropy else -1),
        chunk_tokens=chunk_tokens,
        skip_ignored=skip_ignored,
    )

    def gradient(value: Tensor | None, shape: torch.Size) -> Tensor:
        return input.new_empty(0) if value is None else value.to(weight.dtype).view(shape)

    return (
        gradient(outcome.grad_input, input.shape),
        gradient(outcome.grad_weight, weight.shape),
        gradient(outcome.grad_bias, weight.shape[:1]),
    )


@linear_cross_entropy_per_token_backward.register_fake
def _(
    grad_losses, input, weight, bias, target, ignore_index, label_smoothing, softcap, temperature,
    input_grad, weight_grad, bias_grad, chunk_tokens, accum_dtype, skip_ignored, entropy=False,
):  # fmt: skip
    return (
        input.new_empty(input.shape) if input_grad else input.new_empty(0),
        weight.new_empty(weight.shape) if weight_grad else input.new_empty(0),
        weight.new_empty(weight.shape[0]) if bias_grad else input.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.literals = inputs[4:]


@once_differentiable
def _backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    loss, chunking = ctx.literals[:4], ctx.literals[4:]
    needed = ctx.needs_input_grad[:3]
    gradients = torch.ops.liger_fx.linear_cross_entropy_per_token_backward(
        grad_losses, *ctx.saved_tensors, *loss, *needed, *chunking
    )
    kept = (g if need else None for g, need in zip(gradients, needed, strict=True))
    return *kept, *(None,) * 9


linear_cross_entropy_per_token.register_autograd(_backward, setup_context=_setup_context)
