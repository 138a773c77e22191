"""``liger_fx::embedding``: a lookup whose gradient torch's own kernel sums.

Inductor takes the backward of an embedding apart into atomic additions to an fp32 table over the
whole vocabulary, which it then rounds: for a table in 16 bits three times the memory of the
gradient, at the end of a backward, when all other gradients are there. torch's kernel for a GPU
sorts the tokens, sums the rows of each in fp32, and writes the rounded sums into the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.library import differentiable, kernel, once_differentiable

_sum_rows = torch.ops.aten.embedding_dense_backward.default

_backward = kernel(
    "embedding_backward(Tensor grad, Tensor indices, SymInt vocabulary, int padding_idx,"
    " bool scale_grad_by_freq) -> Tensor",
    fake=lambda grad, indices, vocabulary, *_: grad.new_empty(vocabulary, grad.shape[-1]),
    plain=_sum_rows,
    cuda=lambda _, *arguments: _sum_rows(*arguments),
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight, indices, padding_idx, scale_grad_by_freq):
        ctx.save_for_backward(indices)
        ctx.literals = (weight.shape[0], padding_idx, scale_grad_by_freq)
        # No operator of ours: a compiler may fuse the lookup with what follows.
        return torch.ops.aten.embedding(weight, indices, padding_idx, scale_grad_by_freq)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _backward(grad, *ctx.saved_tensors, *ctx.literals), None, None, None


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False
) -> Tensor:
    """Rows of ``weight``, as by ``torch.nn.functional.embedding``.

    weight: [V, H], floating point. indices: int64 or int32 [...], each within [0, V). padding_idx:
    the row that gets no gradient, -1 for none. scale_grad_by_freq: divide the gradient of a row by
    how often it was looked up. Returns [..., H]. The backward is differentiable once. Raises
    IndexError for an index out of range on a CPU; on CUDA that is a device-side assertion.
    """
    return _Embedding.apply(weight, indices, padding_idx, scale_grad_by_freq)


embedding = differentiable(
    "embedding(Tensor weight, Tensor indices, int padding_idx=-1, bool scale_grad_by_freq=False)"
    " -> Tensor",
    _embedding,
)
