"""``liger_fx::add_rms_norm``: residual add and RMSNorm of the sum, in one pass.

::

    s = x + r                                      rounded to the dtype of x, as the model rounds it
    y = s / sqrt(mean(s^2) + eps) * (u + w)        see `liger_fx.ops.rms_norm`

Both are results: the sum goes on as the residual stream. Backward: the gradient of s through the
norm, plus its own, is the gradient of x and of r alike.

The sum lies in memory as eager's ``x + r`` does, and its norm as the sum. Megatron's layers, for
one, work on [s, b, h] and may see it as [b, s, h]: a ``view`` after them depends on the layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.library import (
    as_eager_leaves,
    as_rows,
    block_settings,
    column_sums,
    differentiable,
    empty_rows,
    empty_sum,
    kernel,
    once_differentiable,
    programs,
    row_pointer,
)
from liger_fx.ops.rms_norm import CASTINGS, normalise, normalise_backward, statistics_dtype

# -- plain PyTorch --------------------------------------------------------------------------------


def _forward_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.add(x, residual, out=empty_sum(x, residual))
    y, rstd = normalise(total, weight, eps, offset, casting)
    return y, total, rstd


def _backward_torch(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    casting: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = empty_rows(total)
    upstream, rows = as_rows(grad, like=grad_x), as_rows(total, like=grad_x)
    through, grad_weight = normalise_backward(upstream, rows, weight, rstd, offset, casting)
    if grad_total is not None:
        through = through + as_rows(grad_total, like=grad_x)
    as_rows(grad_x).copy_(through)
    grad_weight = grad_weight if weight_grad and grad_weight is not None else total.new_empty(0)
    return grad_x, grad_weight.to(weight.dtype)


# -- Liger's kernels ------------------------------------------------------------------------------


def _forward_liger(
    liger: Any,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    casting: str,
) -> tuple[Tensor, Tensor, Tensor]:
    total = empty_sum(x, residual)
    y = empty_rows(total)
    n_cols = x.shape[-1]
    n_rows = x.numel() // max(n_cols, 1)
    rstd = x.new_empty(n_rows, dtype=torch.float32)
    if not n_rows:
        return y, total, rstd
    block, warps = block_settings(n_cols)
    liger._fused_add_rms_norm_forward_kernel[(n_rows,)](
        *(*row_pointer(y), *row_pointer(total)),
        *(*row_pointer(x, like=total), *row_pointer(residual, like=total)),
        *(weight.contiguous(), 1, rstd, 1),
        *(n_cols, eps, offset, CASTINGS[casting]),
        BLOCK_SIZE=block,
        num_warps=warps,
        num_stages=2,  # as Liger launches it
    )
    return y, total, rstd


def _backward_liger(
    liger: Any,
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    casting: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = empty_rows(total)
    n_cols = total.shape[-1]
    n_rows = total.numel() // max(n_cols, 1)
    if not n_rows:
        return grad_x, weight.new_zeros(n_cols if weight_grad else 0)
    block, warps = block_settings(n_cols)
    count, each = programs(n_rows, total.device)
    partial = total.new_empty(count, n_cols, dtype=torch.float32) if weight_grad else None
    further = (None, n_cols) if grad_total is None else row_pointer(grad_total, like=grad_x)
    liger._fused_add_rms_norm_backward_kernel[(count,)](
        *(*row_pointer(grad, like=grad_x), *further),
        *(*row_pointer(grad_x), *row_pointer(total, like=grad_x)),
        *(liger.torch_to_triton_dtype[total.dtype], weight.contiguous(), 1),
        *(rstd, 1, partial, n_cols if weight_grad else 0),
        *(n_rows, n_cols, offset, each, CASTINGS[casting]),
        BLOCK_SIZE=block,
        num_warps=warps,
        num_stages=2,
        has_dS_out=grad_total is not None,
        COMPUTE_DW=weight_grad,
    )
    if partial is None:
        return grad_x, weight.new_empty(0)
    return grad_x, column_sums(partial, weight.dtype)


# -- the ops --------------------------------------------------------------------------------------


def _forward_fake(x, residual, weight, eps, offset, casting):
    rows = math.prod(x.shape[:-1])
    total = empty_sum(x, residual)
    return empty_rows(total), total, x.new_empty(rows, dtype=statistics_dtype(x.dtype))


def _backward_fake(grad, grad_total, total, weight, rstd, offset, casting, weight_grad):
    return empty_rows(total), weight.new_empty(weight.shape[0] if weight_grad else 0)


_forward = kernel(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps, float offset,"
    " str casting) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    plain=_forward_torch,
    cuda=_forward_liger,
    liger="fused_add_rms_norm",
)
_backward = kernel(
    "add_rms_norm_backward(Tensor grad, Tensor? grad_total, Tensor total, Tensor weight,"
    " Tensor rstd, float offset, str casting, bool weight_grad) -> (Tensor, Tensor)",
    fake=_backward_fake,
    plain=_backward_torch,
    cuda=_backward_liger,
    liger="fused_add_rms_norm",
)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, residual, weight, eps, offset, casting):
        y, total, rstd = _forward(x, residual, weight, eps, offset, casting)
        # The sum may go nowhere (the last norm of a decoder): then no zeros are made for it.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, rstd)
        ctx.literals = (offset, casting)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> Any:
        if grad is None:
            return grad_total, grad_total, None, None, None, None
        total, weight, rstd = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[2]
        grad_x, grad_weight = _backward(
            grad, grad_total, total, weight, rstd, *ctx.literals, weight_grad
        )
        grad_x = as_eager_leaves(grad_x, grad if grad_total is None else grad_total)
        return grad_x, grad_x, grad_weight if weight_grad else None, None, None, None


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum) of ``x`` and ``residual``, both [..., H].

    x, residual: of one shape and dtype, float32, bfloat16 or float16 (on a CPU float64 as well), in
    any layout. weight: [H] of a floating dtype. offset, casting: as in `rms_norm`. Both results are
    of x's shape and dtype, in the layout of eager's ``x + residual``; contiguous where that has no
    unit stride in H. The backward is differentiable once.
    """
    return _AddRMSNorm.apply(x, residual, weight, eps, offset, casting)


add_rms_norm = differentiable(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float offset, str casting)"
    " -> (Tensor, Tensor)",
    _add_rms_norm,
)
