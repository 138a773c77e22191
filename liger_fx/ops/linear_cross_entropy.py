"""``liger_fx::linear_cross_entropy``: the summed loss of a projection, and its gradients.

The gradients are those of the *sum* over tokens, computed in the forward (design: the logits of a
chunk exist once). The backward multiplies them by the upstream gradient, out of place: right for
any upstream value, a second time, and without looking at it on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.chunked_head import Head, Wanted, kept_dtype, run
from liger_fx.ops.library import once_differentiable, require_fit
from liger_fx.ops.token_loss import TokenLoss, loss_dtype


@torch.library.custom_op("liger_fx::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    chunk_tokens: int,
    accum_dtype: torch.dtype,
    skip_ignored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the cross-entropy of ``input @ weight.T + bias`` against ``target``.

    input: [..., H], weight: [V, H], bias: [V] or None, all float32, bfloat16 or float16 alike (on a
    CPU float64 as well). target: int64, as many labels as input has rows.
    softcap: 0 for none. *_grad: which gradients to compute; they are decided from the graph, since
    ``requires_grad`` says nothing inside an op. chunk_tokens: 0 chooses by memory budget.

    Returns (loss, grad_input, grad_weight, grad_bias): loss is fp32 []; a gradient that was not
    asked for is an empty tensor. Parameter gradients have their parameter's dtype, fp32 for float16
    (a sum over tokens can exceed float16's range).

    On CUDA, with ``skip_ignored``, the host waits once for the number of valid tokens (see
    `tokens.valid_tokens`).
    """
    head = Head(weight, bias, TokenLoss(ignore_index, label_smoothing, softcap))
    outcome = run(
        input.reshape(-1, input.shape[-1]),
        target.reshape(-1),
        head,
        Wanted(input_grad, weight_grad, bias_grad, accum_dtype),
        chunk_tokens=chunk_tokens,
        skip_ignored=skip_ignored,
    )
    kept = kept_dtype(weight.dtype)

    def parameter_gradient(gradient: Tensor | None) -> Tensor:
        return input.new_empty(0) if gradient is None else gradient.to(kept)

    grad_input = outcome.grad_input
    return (
        outcome.losses.sum(),
        input.new_empty(0) if grad_input is None else grad_input.view(input.shape),
        parameter_gradient(outcome.grad_weight),
        parameter_gradient(outcome.grad_bias),
    )


@linear_cross_entropy.register_fake
def _(
    input, weight, bias, target, ignore_index, label_smoothing, softcap,
    input_grad, weight_grad, bias_grad, chunk_tokens, accum_dtype, skip_ignored,
):  # fmt: skip
    require_fit(input, "cross_entropy")
    kept = kept_dtype(weight.dtype)
    return (
        input.new_empty((), dtype=loss_dtype(input.dtype)),
        input.new_empty(input.shape) if input_grad else input.new_empty(0),
        weight.new_empty(weight.shape, dtype=kept) if weight_grad else input.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=kept) if bias_grad else input.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Without this, autograd would make zeros of the size of each unused output for the backward.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype
    ctx.wanted = inputs[7:10]


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None, None, None]
    if grad_loss is not None:
        for i, (gradient, wanted) in enumerate(zip(ctx.saved_tensors, ctx.wanted, strict=True)):
            if wanted:
                gradients[i] = scaled(gradient, grad_loss).to(ctx.dtype)
    grad_input, grad_weight, grad_bias = gradients
    return grad_input, grad_weight, grad_bias, *(None,) * 10


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    # In fp32: a bf16 product would round the upstream gradient, say 1/n, first.
    scale = upstream.to(torch.promote_types(gradient.dtype, torch.float32))
    # 0 stays 0 whatever the upstream: with no valid token that is 1/0, and eager's gradients are 0.
    return torch.where(gradient == 0, 0.0, gradient.to(scale.dtype) * scale)


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
