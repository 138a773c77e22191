"""``liger_fx::rms_norm``: root mean square normalisation.

Over the last dimension, with ``u`` the offset::

    y = x / sqrt(mean(x^2) + eps) * (u + w)

(Zhang and Sennrich 2019). Statistics are fp32. The casting says where rounding happens, in Liger's
words: "gemma" computes all in fp32 and rounds once, at the end; "llama" rounds the normalised value
to the input's dtype before it is multiplied by the weight.
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
    kernel,
    once_differentiable,
    programs,
    row_pointer,
)

CASTINGS = {"llama": 0, "gemma": 1}  # Liger's numbers for them


# -- plain PyTorch --------------------------------------------------------------------------------


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def normalise(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """(y, 1 / rms as [rows])."""
    wide = x.to(statistics_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd
    if casting == "llama":
        y = y.to(x.dtype)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + offset)
    out = empty_rows(x).copy_(y)
    return out, as_rows(rstd, like=out).flatten()


def normalise_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, casting: str
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the weight, in the dtype of the statistics. grad, x: [rows, H].

    With n = x rstd and m = grad (u + w): dx = rstd (m - n mean(m n)), dw = sum over rows (grad n).
    """
    wide = rstd.dtype
    upstream, rstd = grad.to(wide), rstd.unsqueeze(1)
    normed = x.to(wide) * rstd
    scaled = upstream if weight is None else upstream * (weight.to(wide) + offset)
    grad_x = rstd * (scaled - normed * (scaled * normed).mean(1, keepdim=True))
    if weight is None:
        return grad_x, None
    if casting == "llama":
        normed = normed.to(x.dtype)
    return grad_x, (upstream * normed).sum(0)


def _backward_torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    casting: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    out = empty_rows(x)
    upstream, rows = as_rows(grad, like=out), as_rows(x, like=out)
    grad_x, grad_weight = normalise_backward(upstream, rows, weight, rstd, offset, casting)
    as_rows(out).copy_(grad_x)
    if not weight_grad or weight is None or grad_weight is None:
        return out, x.new_empty(0)
    return out, grad_weight.to(weight.dtype)


# -- Liger's kernels ------------------------------------------------------------------------------


def _by_blocks(block: int, rows: int) -> bool:
    """Liger's own choice: short and many rows go 16 at a time."""
    return block <= 256 and rows >= 4096 * 8


def _forward_liger(
    liger: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    y = empty_rows(x)
    n_cols = x.shape[-1]
    n_rows = x.numel() // max(n_cols, 1)
    rstd = x.new_empty(n_rows, dtype=torch.float32)
    if not n_rows:
        return y, rstd
    block, warps = block_settings(n_cols)
    weight = None if weight is None else weight.contiguous()
    pointers = (*row_pointer(y), *row_pointer(x, like=y), weight, 1, rstd, 1)
    scalars = (n_cols, eps, offset, CASTINGS[casting], weight is not None)
    if _by_blocks(block, n_rows):
        grid = (-(-n_rows // 16),)
        liger._block_rms_norm_forward_kernel[grid](
            *pointers, n_rows, *scalars, BLOCK_SIZE=block, BLOCK_ROW=16, num_warps=warps
        )
    else:
        liger._rms_norm_forward_kernel[(n_rows,)](
            *pointers, *scalars, BLOCK_SIZE=block, num_warps=warps
        )
    return y, rstd


def _backward_liger(
    liger: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
    casting: str,
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = empty_rows(x)
    n_cols = x.shape[-1]
    n_rows = x.numel() // max(n_cols, 1)
    weight_grad = weight_grad and weight is not None
    weight = None if weight is None else weight.contiguous()
    if not n_rows:
        wanted = weight if weight_grad else None
        return grad_x, x.new_empty(0) if wanted is None else wanted.new_zeros(n_cols)
    block, warps = block_settings(n_cols)
    count, each = programs(n_rows, x.device)
    partial = x.new_empty(count, n_cols, dtype=torch.float32) if weight_grad else None
    pointers = (
        *(*row_pointer(grad, like=grad_x), *row_pointer(grad_x), *row_pointer(x, like=grad_x)),
        *(liger.torch_to_triton_dtype[x.dtype], weight, 1),
        *(rstd, 1, partial, n_cols if weight_grad else 0),
    )
    options = {
        "casting_mode": CASTINGS[casting],
        "elementwise_affine": weight is not None,
        "BLOCK_SIZE": block,
        "COMPUTE_DW": weight_grad,
        "num_warps": warps,
    }
    if _by_blocks(block, n_rows):
        liger._block_rms_norm_backward_kernel[(count,)](
            *pointers, n_rows, n_cols, offset, BLOCK_ROW=16, **options
        )
    else:
        liger._rms_norm_backward_kernel[(count,)](
            *pointers, n_rows, n_cols, offset, each, **options
        )
    if partial is None or weight is None:
        return grad_x, x.new_empty(0)
    return grad_x, column_sums(partial, weight.dtype)


# -- the ops --------------------------------------------------------------------------------------


def _forward_fake(x, weight, eps, offset, casting):
    rows = math.prod(x.shape[:-1])
    return empty_rows(x), x.new_empty(rows, dtype=statistics_dtype(x.dtype))


def _backward_fake(grad, x, weight, rstd, offset, casting, weight_grad):
    weight_grad = weight_grad and weight is not None
    return empty_rows(x), weight.new_empty(weight.shape) if weight_grad else x.new_empty(0)


_forward = kernel(
    "rms_norm_forward(Tensor x, Tensor? weight, float eps, float offset, str casting)"
    " -> (Tensor, Tensor)",
    fake=_forward_fake,
    plain=normalise,
    cuda=_forward_liger,
    liger="rms_norm",
)
_backward = kernel(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, float offset,"
    " str casting, bool weight_grad) -> (Tensor, Tensor)",
    fake=_backward_fake,
    plain=_backward_torch,
    cuda=_backward_liger,
    liger="rms_norm",
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps, offset, casting):
        y, rstd = _forward(x, weight, eps, offset, casting)
        ctx.save_for_backward(x, weight, rstd)
        ctx.literals = (offset, casting)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[1]
        grad_x, grad_weight = _backward(grad, x, weight, rstd, *ctx.literals, weight_grad)
        grad_x = as_eager_leaves(grad_x, grad)
        return grad_x, grad_weight if weight_grad else None, None, None, None


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str) -> Tensor:
    """RMSNorm of ``x [..., H]`` over its last dimension.

    x: float32, bfloat16 or float16 (on a CPU float64 as well), in any layout. weight: [H] of a
    floating dtype, or None. offset: added to the weight, 1 for Gemma. casting: "gemma" or "llama".
    Returns a tensor of x's shape and dtype. The backward is differentiable once.
    """
    return _RMSNorm.apply(x, weight, eps, offset, casting)


rms_norm = differentiable(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, str casting) -> Tensor", _rms_norm
)
