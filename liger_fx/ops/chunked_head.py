"""Projection and cross-entropy over chunks of tokens: the loop that both head ops share.

Tokens ``x [N, H]``, a head ``W [V, H]`` and an optional bias ``b [V]`` give the logits
``x W^T + b``; their loss is that of `liger_fx.ops.token_loss`. The gradient of the logits
overwrites them, goes into the gradients of ``x``, ``W`` and ``b``, and the next chunk takes their
place: no tensor of ``tokens x V`` is larger than one chunk (the idea of Liger's
FusedLinearCrossEntropy and of torch's linear_cross_entropy).

Differences to Liger's own loop: ignored tokens are dropped before the projection; chunks are sized
by a memory budget, and a batch that one chunk can hold is not cut; the weight gradient is
accumulated in fp32 inside the GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from liger_fx.ops.matmul import accumulate_mm
from liger_fx.ops.token_loss import TokenLoss, check_labels, loss_dtype, write_losses
from liger_fx.ops.tokens import valid_tokens

# Bytes of logits a chunk may take. 1 GiB is 4096 tokens of Llama-3's vocabulary in bf16: beyond it
# the GEMMs gain nothing; below it each chunk's pass over the fp32 weight gradient begins to show.
LOGITS_BUDGET = {"cuda": 1 << 30, "cpu": 64 << 20}
_UNIT = 128  # tokens


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
    return max(_UNIT, _budget(device_type) // (vocab * itemsize) // _UNIT * _UNIT)


def fits_one_chunk(
    tokens: int, vocab: int, itemsize: int, device_type: str, chunk_tokens: int = 0
) -> bool:
    """Would the logits of so many tokens exist as a whole? itemsize: bytes of all logits of a token
    and class. chunk_tokens: the setting, 0 for what the budget takes."""
    return tokens <= (chunk_tokens or chunk_tokens_for(vocab, itemsize, device_type))


def _budget(device_type: str) -> int:
    return LOGITS_BUDGET.get(device_type, LOGITS_BUDGET["cpu"])


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
    valid = valid_tokens(target != head.loss.ignore_index) if skip_ignored else None
    tokens = target.numel() if valid is None else valid.numel()
    scaled = upstream is not None or head.loss.temperature != 1.0
    dtype = x.dtype
    if scaled and x.is_cuda and not head.loss.plain:
        # Scaled in place, 16-bit logits, or their gradients, would be rounded twice. Of what is
        # plain our own kernel takes care: it scales in fp32 whatever it reads and writes.
        dtype = torch.float32
    itemsize = dtype.itemsize + (dtype != x.dtype) * x.element_size()  # the gradient is cast back
    size = chunk_size(tokens, itemsize, x, head, wanted, chunk_tokens)
    # A sum over chunks is kept in its own dtype; a single product is rounded once, by its GEMM.
    accum = wanted.accum_dtype if size < tokens else kept_dtype(x.dtype)
    outcome = allocate(x, head, wanted, accum, tokens)
    logits = logits_buffer(min(size, tokens), head.vocab, x, dtype)
    # Autocast is still on inside an op that runs eagerly; here every dtype has been decided.
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, tokens, size):
            rows: slice | Tensor = slice(start, min(start + size, tokens))
            rows = rows if valid is None else valid[rows]
            _one_chunk(x, target, rows, head, upstream, logits, outcome, first=start == 0)
    return outcome


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a parameter's gradient: a sum over tokens can exceed float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_size(
    tokens: int, itemsize: int, x: Tensor, head: Head, wanted: Wanted, chunk_tokens: int = 0
) -> int:
    """Tokens of a chunk: ``chunk_tokens`` if positive, or else by budget and as equal as they come.
    itemsize: bytes for each logit."""
    if chunk_tokens > 0:
        return chunk_tokens
    most = chunk_tokens_for(head.vocab, itemsize, x.device.type)
    if tokens <= most or _fits_one_chunk(tokens, itemsize, x, head, wanted):
        return max(1, tokens)
    chunks = -(-tokens // most)
    return -(-tokens // chunks // _UNIT) * _UNIT


def _fits_one_chunk(tokens: int, itemsize: int, x: Tensor, head: Head, wanted: Wanted) -> bool:
    """One chunk needs no sum of its own beside the gradient of the weight. So its logits may take
    what chunks and that sum would, over the gradient, at their peak: before or after it is cast."""
    if not wanted.weight or wanted.accum_dtype == x.dtype:
        return False
    gradient = head.weight.numel() * x.element_size()
    total = head.weight.numel() * wanted.accum_dtype.itemsize
    allowed = total + max(0, _budget(x.device.type) - gradient)
    return tokens * head.vocab * itemsize <= allowed


def allocate(x: Tensor, head: Head, wanted: Wanted, accum: torch.dtype, tokens: int) -> Outcome:
    # Parameter gradients are written by the first chunk and need zeros only if there is none.
    def accumulator(like: Tensor) -> Tensor:
        make = torch.empty_like if tokens else torch.zeros_like
        return make(like, dtype=accum, memory_format=torch.contiguous_format)

    values = (2, x.shape[0]) if head.loss.entropy else (x.shape[0],)
    return Outcome(
        losses=torch.zeros(values, dtype=loss_dtype(x.dtype), device=x.device),
        # Rows that no chunk visits are ignored tokens: their gradient is zero.
        grad_input=x.new_zeros(x.shape) if wanted.input else None,
        grad_weight=accumulator(head.weight) if wanted.weight else None,
        grad_bias=accumulator(head.bias) if wanted.bias and head.bias is not None else None,
    )


def logits_buffer(rows: int, vocab: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.device.type != "cuda":
        # Unpadded: a CPU's bf16 GEMM with AMX reads one element behind an odd row and multiplies it
        # by zero, which is NaN for what memory happens to hold (torch 2.13).
        return x.new_empty(rows, vocab, dtype=dtype)
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
    project(x_c, head, logits)

    differentiate = any(
        g is not None for g in (outcome.grad_input, outcome.grad_weight, outcome.grad_bias)
    )
    losses = outcome.losses.new_zeros(*outcome.losses.shape[:-1], y_c.numel())
    write_losses(logits, y_c, losses, head.loss, differentiate, factor)
    outcome.losses[..., rows] = losses
    if not differentiate:
        return
    add_gradients(outcome, rows, x_c, head.weight, logits.to(x.dtype), first)


def add_gradients(
    outcome: Outcome,
    rows: slice | Tensor,
    x: Tensor,
    weight: Tensor,
    grad_logits: Tensor,
    first: bool,
) -> None:
    """What a chunk gives to those gradients that are wanted; ``x`` and ``grad_logits`` are its
    own ``rows``. The ``first`` chunk writes the parameters' gradients."""
    if outcome.grad_input is not None:
        if isinstance(rows, slice):
            torch.mm(grad_logits, weight, out=outcome.grad_input[rows])
        else:
            outcome.grad_input.index_copy_(0, rows, grad_logits @ weight)
    if outcome.grad_weight is not None:
        accumulate_mm(outcome.grad_weight, grad_logits.t(), x, first)
    if outcome.grad_bias is not None:
        total = grad_logits.sum(0, dtype=outcome.grad_bias.dtype)
        outcome.grad_bias.copy_(total) if first else outcome.grad_bias.add_(total)


def project(x: Tensor, head: Head, out: Tensor) -> None:
    if out.dtype != x.dtype:
        torch.mm(x, head.weight.t(), out_dtype=out.dtype, out=out)
        if head.bias is not None:
            out.add_(head.bias)
    elif head.bias is None:
        torch.mm(x, head.weight.t(), out=out)
    else:
        torch.addmm(head.bias, x, head.weight.t(), out=out)
