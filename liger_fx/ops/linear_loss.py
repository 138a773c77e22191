"""``liger_fx::linear_loss`` and ``liger_fx::linear_token_losses``: what a loss takes of a
projection, without its logits.

Each token's gradient is that of its values times their upstream gradients. Where these are known
before the projection runs, as they are for a sum of losses over tokens, the gradients are computed
in the forward, while the logits of a chunk exist: `linear_loss`. Its backward multiplies them by
the upstream gradient of the sum, out of place: right for any upstream value, a second time, and
without looking at it on the host. Else the forward computes values only, and the backward projects
again, chunk by chunk: `linear_token_losses`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.chunked_head import Head, Wanted, kept_dtype, run
from liger_fx.ops.library import differentiable, kernel, once_differentiable, require_fit
from liger_fx.ops.token_loss import DIVERGENCES, TAKES, TokenLoss, loss_dtype

# Tensors and literals of all three operators, in this order.
_TENSORS = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor? target, Tensor? class_weight,"
    " Tensor? teacher_input, Tensor? teacher_weight, Tensor? teacher_bias,"
)
_LITERALS = (
    " str[] takes, int? ignore_index, float label_smoothing, float softcap, float temperature,"
    " float beta,"
)
_CHUNKING = " int chunk_tokens, ScalarType accum_dtype, bool skip_ignored"


def _values_and_gradients(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    class_weight: Tensor | None,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    takes: Sequence[str],
    ignore_index: int | None,
    label_smoothing: float,
    softcap: float,
    temperature: float,
    beta: float,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    chunk_tokens: int,
    accum_dtype: torch.dtype,
    skip_ignored: bool,
    every_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values fp32 [takes, N] and the gradients of their sum weighted by ``weights``, [takes, N] or
    [takes, 1]: an empty tensor for each that is not asked for. Parameter gradients have their
    parameter's dtype, fp32 for float16 (a sum over tokens can exceed float16's range)."""
    teacher = None
    if teacher_input is not None and teacher_weight is not None:
        rows = teacher_input.reshape(-1, teacher_input.shape[-1])
        teacher = Head(rows, teacher_weight, teacher_bias)
    outcome = run(
        Head(input.reshape(-1, input.shape[-1]), weight, bias),
        teacher,
        None if target is None else target.reshape(-1),
        TokenLoss(
            *(tuple(takes), ignore_index, label_smoothing, softcap, temperature, beta),
            class_weight,
        ),
        Wanted(input_grad, weight_grad, bias_grad, accum_dtype),
        weights=weights,
        mask=None if mask is None else mask.reshape(-1),
        chunk_tokens=chunk_tokens,
        skip=skip_ignored,
        every_value=every_value,
    )

    def parameter_gradient(gradient: Tensor | None) -> Tensor:
        return input.new_empty(0) if gradient is None else gradient.to(kept_dtype(weight.dtype))

    grad_input = outcome.grad_input
    return (
        outcome.values,
        input.new_empty(0) if grad_input is None else grad_input.view(input.shape),
        parameter_gradient(outcome.grad_weight),
        parameter_gradient(outcome.grad_bias),
    )


def _fake(input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_fit(input, "cross_entropy")
    takes, (input_grad, weight_grad, bias_grad) = rest[8], rest[14:17]
    kept, rows = kept_dtype(weight.dtype), math.prod(input.shape[:-1])
    return (
        input.new_empty((len(takes), rows), dtype=loss_dtype(input.dtype)),
        input.new_empty(input.shape) if input_grad else input.new_empty(0),
        weight.new_empty(weight.shape, dtype=kept) if weight_grad else input.new_empty(0),
        weight.new_empty(weight.shape[0], dtype=kept) if bias_grad else input.new_empty(0),
    )


linear_loss_kernel = kernel(
    f"linear_loss_kernel({_TENSORS} Tensor? weights, Tensor? mask,{_LITERALS}"
    f" bool input_grad, bool weight_grad, bool bias_grad,{_CHUNKING}, bool every_value)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    plain=_values_and_gradients,
    cuda=lambda _, *args: _values_and_gradients(*args),
)


class _Sum(torch.autograd.Function):
    """Of values weighted by ``weights``, which have been divided by a power of two: the upstream
    gradient is multiplied by it."""

    @staticmethod
    def forward(ctx: Any, wanted: Any, every_value: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
        tensors, weights, literals, chunking = _parts(arguments)
        values, *gradients = linear_loss_kernel(
            *tensors, weights, None, *literals, *wanted, *chunking, every_value
        )
        total = values.sum() if weights is None else (weights * values).sum()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(values)
        ctx.save_for_backward(*(g for g, want in zip(gradients, wanted, strict=True) if want))
        ctx.wanted, ctx.dtype = wanted, tensors[0].dtype
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        gradients = [
            scaled(next(saved), grad_total).to(ctx.dtype)
            if want and grad_total is not None
            else None
            for want in ctx.wanted
        ]
        return None, None, *gradients, *(None,) * (_ARGUMENTS - 3)


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    # In fp32: a bf16 product would round the upstream gradient, say 1/n, first.
    scale = upstream.to(torch.promote_types(gradient.dtype, torch.float32))
    # 0 stays 0 whatever the upstream: with no valid token that is 1/0, and eager's gradients are 0.
    return torch.where(gradient == 0, 0.0, gradient.to(scale.dtype) * scale)


def _scale_by_triton(_: Any, gradient: Tensor, upstream: Tensor) -> Tensor:
    from liger_fx.ops.token_loss_triton import write_scaled

    gradient = gradient.contiguous()
    made = torch.empty_like(gradient)
    write_scaled(gradient, upstream, made)
    return made


# `scaled`, in the dtype of the gradient, for whoever has no compiler that makes one kernel of it.
# Step by step the gradient of a head's weight would be in memory four times over, in fp32. Liger's
# element_mul_kernel writes over its input, which a second backward needs.
scaled_kernel = kernel(
    "scaled(Tensor gradient, Tensor upstream) -> Tensor",
    fake=lambda gradient, _: torch.empty_like(gradient),
    plain=lambda gradient, upstream: scaled(gradient, upstream).to(gradient.dtype),
    cuda=_scale_by_triton,
)


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor | None, *arguments: Any) -> Tensor:
        tensors, _, literals, chunking = _parts(arguments)
        ctx.save_for_backward(*tensors, mask)
        ctx.literals, ctx.chunking = literals, chunking
        none = (False, False, False)
        values: Tensor = linear_loss_kernel(
            *tensors, None, mask, *literals, *none, *chunking, True
        )[0]
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        made = linear_loss_kernel(
            *(*tensors, grad_values, mask), *ctx.literals, *wanted, *ctx.chunking, False
        )  # fmt: skip
        dtype = tensors[0].dtype
        gradients = (g.to(dtype) if w else None for g, w in zip(made[1:], wanted, strict=True))
        return None, *gradients, *(None,) * (_ARGUMENTS - 3)


_ARGUMENTS = 18  # 8 tensors, the weights of their values, 6 literals of what is taken, 3 of chunks


def _parts(arguments: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    return arguments[:8], arguments[8], arguments[9:15], arguments[15:]


def _linear_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The sum over tokens of what is taken of the logits ``input @ weight.T + bias``, weighted by
    ``weights``, and the values that were summed.

    input: [..., H], weight: [V, H], bias: [V] or None, all float32, bfloat16 or float16 alike (on a
    CPU float64 as well). target: int64, as many labels as input has rows; None if no cross-entropy
    is taken. class_weight: [V] or None, without gradient. teacher_*: the same as of the student,
    with a hidden size and a dtype of its own, for a divergence; it gets no gradient. weights:
    floating point [takes, N] or [takes, 1], without gradient: what each token's values are taken
    times; None for 1. takes, ignore_index, label_smoothing, softcap, temperature, beta: as for
    `liger_fx.ops.token_loss.TokenLoss`. chunk_tokens: 0 chooses by memory budget. accum_dtype: of
    the sums of parameter gradients over chunks. skip_ignored: do not project tokens whose weights
    are zero, or of which a cross-entropy alone is taken and whose label is ignored. every_value:
    the values are read, of tokens with weights of zero too.

    Returns (total, values): fp32 [], differentiable once, and fp32 [takes, N], not differentiable;
    0 for tokens that are not projected.

    On CUDA, with ``skip_ignored``, the host waits once for the number of tokens that count, where
    labels or weights may exclude some (see `tokens.valid_tokens`).

    Raises ValueError for takes that do not go together, a beta outside of [0, 1] and a temperature
    that is not positive; as `chunked_head.run`, IndexError for a label out of range.
    """
    *arguments, every_value = arguments  # type: ignore[assignment]
    _check(arguments)
    tensors, weights, literals, chunking = _parts(arguments)
    scale = None
    if weights is not None:
        wide = weights.detach().to(loss_dtype(tensors[0].dtype))
        scale = _power_of_two(wide)
        weights = wide / scale
    grad_mode = torch.is_grad_enabled()
    wanted = tuple(grad_mode and t is not None and t.requires_grad for t in tensors[:3])
    total, values = _Sum.apply(wanted, every_value, *tensors, weights, *literals, *chunking)
    return total if scale is None else total * scale, values


def _power_of_two(weights: Tensor) -> Tensor:
    """The one next to the largest weight: a product with it rounds nothing, and a gradient without
    1/n in it is not too small for float16. A weight that is not finite is the mean's of no token,
    which has no gradient; those of other values stay."""
    if not weights.numel():
        return weights.new_ones(())
    largest = weights.abs().nan_to_num(0.0, posinf=0.0).amax()
    return torch.where(largest == 0, 1.0, largest.log2().floor().exp2())


def _linear_token_losses(*arguments: Any) -> Tensor:
    """What is taken of each row of the logits ``input @ weight.T + bias``: fp32 [takes, N],
    differentiable once.

    mask: bool, as many as input has rows, the tokens whose values are read; None for all. All other
    arguments, and errors, as for ``liger_fx::linear_loss``. The backward projects again, the tokens
    whose upstream gradients are not all zero.
    """
    *tensors, mask = arguments[:9]
    arguments = (*tensors, None, *arguments[9:])
    _check(arguments)
    values: Tensor = _Values.apply(mask, *arguments)
    return values


def _check(arguments: Sequence[Any]) -> None:
    tensors, _, (takes, _, *of_labels, temperature, beta), _ = _parts(arguments)
    target, teacher = tensors[3], tensors[5]
    known = {*DIVERGENCES, "cross_entropy"} if teacher is not None else {*TAKES}
    if not takes or len({*takes}) < len(takes) or not known.issuperset(takes):
        raise ValueError(f"expected some of {sorted(known)}, each once, got {list(takes)}")
    if (teacher is None) != (tensors[6] is None):
        raise ValueError("expected teacher_input and teacher_weight, or neither")
    if "jensen_shannon" in takes and {"forward_kl", "reverse_kl"} & {*takes}:
        raise ValueError(f"expected torchtune's divergences or jensen_shannon, got {list(takes)}")
    if teacher is not None and (any(of_labels) or tensors[4] is not None):
        raise ValueError(
            "label smoothing, softcap and class weights are not computed beside a divergence; pass "
            "0, 0 and None"
        )
    if ("cross_entropy" in takes) != (target is not None):
        raise ValueError("expected a target if a cross-entropy is taken, and only then")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"expected beta in [0, 1], got {beta}")
    if not temperature > 0.0:
        raise ValueError(f"expected a positive temperature, got {temperature}")


linear_loss = differentiable(
    f"linear_loss({_TENSORS} Tensor? weights,{_LITERALS}{_CHUNKING}, bool every_value)"
    " -> (Tensor, Tensor)",
    _linear_loss,
)
linear_token_losses = differentiable(
    f"linear_token_losses({_TENSORS} Tensor? mask,{_LITERALS}{_CHUNKING}) -> Tensor",
    _linear_token_losses,
)
