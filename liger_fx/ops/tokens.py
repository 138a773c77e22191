"""Which tokens count, known to the host: those that do not are left out of matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

# Share of tokens above which leaving out the others saves less than copying these costs.
_WORTH_A_COPY = 31 / 32


def valid_tokens(valid: Tensor) -> Tensor | None:
    """The indices, int64, of the tokens whose label counts, None for all of them. valid: bool [N].

    The host waits for their number, which decides how many chunks there are: work that is queued
    first to fill the wait, a chunk whatever the number, costs more than the wait.
    """
    return None if _capturing(valid) else _indices(valid)


def tokens_with_gradient(grad: Tensor) -> Tensor | None:
    """The indices, int64, of the rows of ``grad``, [tokens, H], that are not exactly zero.

    None stands for all rows; it is also returned where so few are zero that copying the others
    would cost more than leaving those out saves. A nan is not zero.

    Exactly zero are the rows of tokens that pad a sequence on its right, in every layer, and in the
    last layer the rows of all ignored labels. The host waits for the number of the others, and the
    GPU runs dry meanwhile: a caller asks only where a user said that batches are padded.
    """
    return None if _capturing(grad) else _indices(grad.any(1), at_most=_WORTH_A_COPY)


def _indices(mask: Tensor, at_most: float = 1.0) -> Tensor | None:
    """Where ``mask``, bool [N], is true; None if it is everywhere, or beyond a share of places."""
    count = _on_host(mask.sum())
    if count == mask.numel() or count > at_most * mask.numel():
        return None
    return torch.nonzero_static(mask, size=count).squeeze(1)


def _on_host(number: Tensor) -> int:
    if not number.is_cuda:
        return int(number)
    copy = torch.empty((), dtype=number.dtype, pin_memory=True)
    copy.copy_(number, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    copied.synchronize()
    return int(copy)


def _capturing(x: Tensor) -> bool:
    """While a CUDA graph is captured nothing may depend on the host: no token is left out then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
