"""``liger_fx::layer_norm``: layer normalisation over the last dimension.

``y = (x - mean(x)) / sqrt(var(x) + eps) * w + b`` (Ba et al. 2016), computed in fp32 and rounded
once, at the end, as `torch.nn.functional.layer_norm` does. Without w or b, ones or zeros stand in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.library import (
    as_rows,
    block_settings,
    column_sums,
    differentiable,
    empty_rows,
    kernel,
    once_differentiable,
    programs,
    row_pointer,
)
from liger_fx.ops.rms_norm import statistics_dtype

# -- plain PyTorch --------------------------------------------------------------------------------


def _forward_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = statistics_dtype(x.dtype)
    y = empty_rows(x)
    rows = as_rows(x, like=y).to(wide)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    out, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], weight, bias, eps)
    as_rows(y).copy_(out)
    return y, mean.flatten(), rstd.flatten()


def _backward_torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    wide, grad_x = mean.dtype, empty_rows(x)
    rows, upstream = as_rows(x, like=grad_x), as_rows(grad, like=grad_x).to(wide)
    normed = (rows.to(wide) - mean.unsqueeze(1)) * rstd.unsqueeze(1)
    scaled = upstream if weight is None else upstream * weight.to(wide)
    through = scaled - scaled.mean(1, keepdim=True)
    through -= normed * (scaled * normed).mean(1, keepdim=True)
    as_rows(grad_x).copy_(through * rstd.unsqueeze(1))
    gradients = _empty_gradients(x, weight, weight_grad, bias_grad)
    for gradient, of_rows in zip(gradients, (upstream * normed, upstream), strict=True):
        if gradient.numel():
            gradient.copy_(of_rows.sum(0))
    return grad_x, *gradients


def _empty_gradients(
    x: Tensor, weight: Tensor | None, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """Room for the gradients of weight and bias; none for those that nobody needs."""
    like = x if weight is None else weight
    for_weight, for_bias = (x.shape[-1] if want else 0 for want in (weight_grad, bias_grad))
    return like.new_empty(for_weight), like.new_empty(for_bias)


# -- Liger's kernels ------------------------------------------------------------------------------


def _forward_liger(
    liger: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_rows(x)
    n_cols = x.shape[-1]
    n_rows = x.numel() // max(n_cols, 1)
    mean, rstd = (x.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    if not n_rows:
        return y, mean, rstd
    block, warps = block_settings(n_cols)
    weight = x.new_ones(n_cols) if weight is None else weight.contiguous()
    bias = torch.zeros_like(weight) if bias is None else bias.contiguous()
    liger._layer_norm_forward_kernel[(n_rows,)](
        *(*row_pointer(y), *row_pointer(x, like=y)),
        *(weight, 1, bias, 1, mean, 1, rstd, 1),
        *(n_cols, eps),
        BLOCK_SIZE=block,
        num_warps=warps,
    )
    return y, mean, rstd


def _backward_liger(
    liger: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    grad_x = empty_rows(x)
    n_cols = x.shape[-1]
    n_rows = x.numel() // max(n_cols, 1)
    gradients = _empty_gradients(x, weight, weight_grad, bias_grad)
    if not n_rows:
        return grad_x, *(gradient.zero_() for gradient in gradients)
    block, warps = block_settings(n_cols)
    count, each = programs(n_rows, x.device)
    partial = [
        x.new_empty(count, n_cols, dtype=torch.float32) if g.numel() else None for g in gradients
    ]
    weight = x.new_ones(n_cols) if weight is None else weight.contiguous()
    liger._layer_norm_backward_kernel[(count,)](
        *(*row_pointer(x, like=grad_x), weight, mean, 1, rstd, 1),
        *(*row_pointer(grad_x), partial[0], n_cols, partial[1], n_cols),
        *row_pointer(grad, like=grad_x),
        *(n_rows, n_cols),
        rows_per_program=each,
        BLOCK_SIZE=block,
        COMPUTE_DW=weight_grad,
        COMPUTE_DB=bias_grad,
        num_warps=warps,
    )
    sums = (
        g if p is None else column_sums(p, g.dtype) for g, p in zip(gradients, partial, strict=True)
    )
    return grad_x, *sums


# -- the ops --------------------------------------------------------------------------------------


def _forward_fake(x, weight, bias, eps):
    wide, rows = statistics_dtype(x.dtype), math.prod(x.shape[:-1])
    return empty_rows(x), x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _backward_fake(grad, x, weight, mean, rstd, weight_grad, bias_grad):
    return empty_rows(x), *_empty_gradients(x, weight, weight_grad, bias_grad)


_forward = kernel(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    plain=_forward_torch,
    cuda=_forward_liger,
    liger="layer_norm",
)
_backward = kernel(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor rstd,"
    " bool weight_grad, bool bias_grad) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    plain=_backward_torch,
    cuda=_backward_liger,
    liger="layer_norm",
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, eps):
        y, mean, rstd = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        wanted = ctx.needs_input_grad[:3]
        gradients = _backward(grad, *ctx.saved_tensors, *wanted[1:])
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of ``x [..., H]`` over its last dimension.

    x: float32, bfloat16 or float16 (on a CPU float64 as well), in any layout. weight, bias: [H] of
    one floating dtype, or None; a bias without a weight has the dtype of x. Returns a tensor of x's
    shape and dtype. The backward is differentiable once.
    """
    return _LayerNorm.apply(x, weight, bias, eps)


layer_norm = differentiable(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor", _layer_norm
)
