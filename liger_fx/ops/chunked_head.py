"""Projection and cross-entropy over chunks of tokens: the loop that both head ops share.

Tokens ``x [N, H]``, a head ``W [V, H]`` and an optional bias ``b [V]`` give the logits
``x W^T + b``; their loss is that of `liger_fx.ops.token_loss`. The gradient of the logits
overwrites them, goes into the gradients of ``x``, ``W`` and ``b``, and the next chunk takes their
place: no tensor of ``tokens x V`` is larger than one chunk (the idea of Liger's
FusedLinearCrossEntropy and of torch's linear_cross_entropy).

Differences to Liger's own loop: ignored tokens are dropped before the projection; nothing waits for
the host in a way that idles the GPU; chunks are sized by a memory budget; the weight gradient is
accumulated in fp32 inside the GEMM.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from liger_fx.ops.matmul import accumulate_mm
from liger_fx.ops.token_loss import TokenLoss, check_labels, loss_dtype, write_losses

# Bytes of logits a chunk may take. 1 GiB is 4096 tokens of Llama-3's vocabulary in bf16: beyond it
# the GEMMs gain nothing; below it each chunk's pass over the fp32 weight gradient begins to show.
LOGITS_BUDGET = {"cuda": 1 << 30, "cpu": 64 << 20}
_MIN_CHUNK = 128


@dataclass(frozen=True)
class Head:
    """A projection and its loss. ``weight`` is [V, H], ``bias`` [V] or None, of the input's
    dtype."""

    weight: Tensor
    bias: Tensor | None
    loss: TokenLoss

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute, and the dtype in which those of the parameters are summed."""

    input: bool = False
    weight: bool = False
    bias: bool = False
    accum_dtype: torch.dtype = torch.float32

    def __bool__(self) -> bool:
        return self.input or self.weight or self.bias


@dataclass
class Outcome:
    """losses: fp32 [N], [2, N] with the entropies. Gradients: None where not wanted; those of the
    parameters have the accumulation dtype."""

    losses: Tensor
    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def chunk_tokens_for(vocab: int, itemsize: int, device_type: str) -> int:
    """The number of tokens whose logits fit the budget, a multiple of 128."""
    budget = LOGITS_BUDGET.get(device_type, LOGITS_BUDGET["cpu"])
    return max(_MIN_CHUNK, budget // (vocab * itemsize) // _MIN_CHUNK * _MIN_CHUNK)


def run(
    x: Tensor,
    target: Tensor,
    head: Head,
    wanted: Wanted,
    *,
    upstream: Tensor | None = None,
    chunk_tokens: int = 0,
    skip_ignored: bool = True,
) -> Outcome:
    """Losses and gradients of all tokens.

    x: [N, H]. target: int64 [N]. upstream: fp32 as the losses, the gradient of each, 1 without.
    chunk_tokens: 0 means by budget. Raises IndexError for a label out of range on a CPU; on CUDA it
    is a device-side assertion, both as in eager.
    """
    check_labels(target, head.vocab, head.loss)
    tokens, size = target.numel(), chunk_tokens
    if size <= 0:
        size = chunk_tokens_for(head.vocab, x.element_size(), x.device.type)
    size = max(1, min(size, tokens))
    skip_ignored = skip_ignored and not _capturing(x)
    first_size = _first_chunk(tokens, size) if skip_ignored and x.is_cuda else size
    # If one chunk holds all there is to sum up, no accumulator is needed.
    accum = wanted.accum_dtype if first_size < tokens else x.dtype
    outcome = _allocate(x, head, wanted, accum, tokens)
    # Our own kernel, that of the entropy, scales in fp32 whatever it reads and writes.
    exact = (upstream is not None and not head.loss.entropy) or head.loss.temperature != 1.0
    logits = _logits_buffer(size, head.vocab, x, exact)
    first = True
    # Autocast is still on inside an op that runs eagerly; here every dtype has been decided.
    with torch.autocast(x.device.type, enabled=False):
        for rows in token_chunks(target, head.loss.ignore_index, size, first_size, skip_ignored):
            _one_chunk(x, target, rows, head, upstream, logits, outcome, first)
            first = False
    return outcome


def _allocate(x: Tensor, head: Head, wanted: Wanted, accum: torch.dtype, tokens: int) -> Outcome:
    # Parameter gradients are written by the first chunk and need zeros only if there is none.
    def accumulator(like: Tensor) -> Tensor:
        make = torch.empty_like if tokens else torch.zeros_like
        return make(like, dtype=accum, memory_format=torch.contiguous_format)

    values = (2, tokens) if head.loss.entropy else (tokens,)
    return Outcome(
        losses=torch.zeros(values, dtype=loss_dtype(x.dtype), device=x.device),
        # Rows that no chunk visits are ignored tokens: their gradient is zero.
        grad_input=x.new_zeros(x.shape) if wanted.input else None,
        grad_weight=accumulator(head.weight) if wanted.weight else None,
        grad_bias=accumulator(head.bias) if wanted.bias and head.bias is not None else None,
    )


def _logits_buffer(rows: int, vocab: int, x: Tensor, exact: bool) -> Tensor:
    # Scaled in place, 16-bit logits, or their gradients, would be rounded twice.
    dtype = torch.float32 if exact and x.is_cuda else x.dtype
    # Rows padded to 128 bytes: without, a vocabulary like 32001 misses the GEMMs for aligned rows.
    unit = 128 // dtype.itemsize
    padded = -(-vocab // unit) * unit
    return x.new_empty(rows, padded, dtype=dtype)[:, :vocab]


def _one_chunk(
    x: Tensor,
    target: Tensor,
    rows: slice | Tensor,
    head: Head,
    upstream: Tensor | None,
    buffer: Tensor,
    outcome: Outcome,
    first: bool,
) -> None:
    x_c, y_c = x[rows], target[rows]
    factor = None if upstream is None else upstream[..., rows].unsqueeze(-1)
    logits = buffer[: y_c.numel()]
    _project(x_c, head, logits)

    differentiate = any(
        g is not None for g in (outcome.grad_input, outcome.grad_weight, outcome.grad_bias)
    )
    losses = outcome.losses.new_zeros(*outcome.losses.shape[:-1], y_c.numel())
    write_losses(logits, y_c, losses, head.loss, differentiate, factor)
    outcome.losses[..., rows] = losses
    if not differentiate:
        return
    logits = logits.to(x.dtype)
    if outcome.grad_input is not None:
        if isinstance(rows, slice):
            torch.mm(logits, head.weight, out=outcome.grad_input[rows])
        else:
            outcome.grad_input.index_copy_(0, rows, logits @ head.weight)
    if outcome.grad_weight is not None:
        accumulate_mm(outcome.grad_weight, logits.t(), x_c, first)
    if outcome.grad_bias is not None:
        total = logits.sum(0, dtype=outcome.grad_bias.dtype)
        outcome.grad_bias.copy_(total) if first else outcome.grad_bias.add_(total)


def _project(x: Tensor, head: Head, out: Tensor) -> None:
    if out.dtype != x.dtype:
        torch.mm(x, head.weight.t(), out_dtype=out.dtype, out=out)
        if head.bias is not None:
            out.add_(head.bias)
    elif head.bias is None:
        torch.mm(x, head.weight.t(), out=out)
    else:
        torch.addmm(head.bias, x, head.weight.t(), out=out)


# -- which tokens ----------------------------------------------------------------------


def token_chunks(
    target: Tensor, ignore_index: int, size: int, first_size: int, skip_ignored: bool
) -> Iterator[slice | Tensor]:
    """Chunks of at most ``size`` tokens, as slices or index tensors; without ignored tokens if
    ``skip_ignored``. Always at least one chunk, unless there is no token at all.

    On CUDA the number of valid tokens is needed on the host. Its copy is started first and waited
    for only after the first chunk's work has been queued, so the GPU is busy while the host learns
    it.
    """
    tokens = target.numel()
    if not skip_ignored:
        yield from _slices(0, tokens, size)
    elif target.is_cuda:
        yield from _valid_chunks_cuda(target, ignore_index, size, first_size)
    else:
        yield from _valid_chunks_cpu(target, ignore_index, size)


def _capturing(x: Tensor) -> bool:
    """While a CUDA graph is captured nothing may depend on the host: no token is skipped then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _first_chunk(tokens: int, size: int) -> int:
    """The first chunk's work is done whatever the count: a small one where few may be valid."""
    return size if tokens >= 4 * size else min(size, max(_MIN_CHUNK, tokens // 8))


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))


def _valid_chunks_cpu(target: Tensor, ignore_index: int, size: int) -> Iterator[slice | Tensor]:
    valid = (target != ignore_index).nonzero().squeeze(1)
    if valid.numel() in (0, target.numel()):
        # Of an all-ignored batch one chunk is run, so that the gradients are written (as zeros).
        yield from _slices(0, target.numel() if valid.numel() else min(size, target.numel()), size)
        return
    for part in _slices(0, valid.numel(), size):
        yield valid[part]


def _valid_chunks_cuda(
    target: Tensor, ignore_index: int, size: int, first_size: int
) -> Iterator[slice | Tensor]:
    tokens = target.numel()
    if tokens == 0:
        return
    ignored = target == ignore_index
    count = torch.empty((), dtype=torch.int64, pin_memory=True)
    count.copy_(tokens - ignored.sum(), non_blocking=True)
    counted = torch.cuda.Event()
    counted.record()
    order = torch.sort(ignored, stable=True).indices  # valid tokens first, in their order
    yield order[:first_size]
    if first_size >= tokens:
        return
    counted.synchronize()
    valid = int(count)
    for part in _slices(first_size, valid, size):
        yield part if valid == tokens else order[part]
