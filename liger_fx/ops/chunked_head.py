"""Projections and what a loss takes of them, over chunks of tokens: the loop of all head ops.

Tokens ``x [N, H]``, a head ``W [V, H]`` and an optional bias ``b [V]`` give the logits
``x W^T + b``; what is taken of each row, and its gradient, is in `liger_fx.ops.token_loss`, and of
two heads in `liger_fx.ops.kl_loss`. The gradient of the logits overwrites them, goes into the
gradients of ``x``, ``W`` and ``b``, and the next chunk takes their place: no tensor of
``tokens x V`` is larger than one chunk (the idea of Liger's FusedLinearCrossEntropy and of torch's
linear_cross_entropy).

Differences to Liger's own loop: tokens that change nothing are dropped before the projection;
chunks are sized by a memory budget, and a batch that one chunk can hold is not cut; the weight
gradient is accumulated in fp32 inside the GEMM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from liger_fx.ops.kl_loss import write_divergences
from liger_fx.ops.library import without_autocast
from liger_fx.ops.matmul import accumulate_mm
from liger_fx.ops.token_loss import TokenLoss, check_labels, loss_dtype, write_values
from liger_fx.ops.tokens import valid_tokens

# Bytes of logits a chunk may take. 1 GiB is 4096 tokens of Llama-3's vocabulary in bf16: beyond it
# the GEMMs gain nothing; below it each chunk's pass over the fp32 weight gradient begins to show.
LOGITS_BUDGET = {"cuda": 1 << 30, "cpu": 64 << 20}
_UNIT = 128  # tokens
_LEAST = 1024  # tokens: with fewer in a chunk, each pass over the weight's gradient shows


@dataclass(frozen=True)
class Head:
    """A projection of ``x [N, H]`` by ``weight [V, H]`` and ``bias [V]`` or None, of one dtype."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def logits(self, rows: slice | Tensor, out: Tensor) -> None:
        x = self.x[rows]
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)


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
    """values: fp32 [takes, N]. Gradients: None where not wanted; those of the parameters have the
    accumulation dtype."""

    values: Tensor
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
    head: Head,
    teacher: Head | None,
    target: Tensor | None,
    loss: TokenLoss,
    wanted: Wanted,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_tokens: int = 0,
    skip: bool = True,
    every_value: bool = False,
) -> Outcome:
    """What ``loss`` takes of all tokens, and the gradients of its weighted sum.

    target: int64 [N], None if no cross-entropy is taken. weights: fp32 [takes, N] or [takes, 1], 1
    without. mask: bool [N], whose values count; those of others are 0. chunk_tokens: 0 means by
    budget. skip: drop the tokens that do not count before the projection; those with weights of
    zero too, unless ``every_value`` is read. Raises IndexError for a label out of range on a CPU;
    on CUDA it is a device-side assertion, both as in eager.
    """
    x = head.x
    if target is not None:
        check_labels(target, head.vocab, loss.ignore_index)
    needed = _needed(target, loss, None if every_value else weights, mask) if skip else None
    outcome = allocate(head, loss, wanted)
    # The host waits here, and the GPU runs dry until the first product is queued: what can be done
    # before or after does not stand in between.
    valid = None if needed is None else valid_tokens(needed)
    tokens = x.shape[0] if valid is None else valid.numel()
    itemsize = x.element_size() + (0 if teacher is None else teacher.x.element_size())
    size = chunk_size(tokens, itemsize, head, wanted, chunk_tokens)
    buffers = [
        logits_buffer(min(size, tokens), h) for h in (head, teacher) if h is not None
    ]  # fmt: skip
    if weights is not None:
        weights = weights.expand(-1, x.shape[0])
    # Autocast is still on inside an op that runs eagerly; here every dtype has been decided.
    with without_autocast(x.device.type):
        for start in range(0, tokens, size):
            part: slice | Tensor = slice(start, min(start + size, tokens))
            rows = part if valid is None else valid[part]
            logits, *others = (buffer[: min(size, tokens - start)] for buffer in buffers)
            head.logits(rows, logits)
            if start == 0:
                # A sum over chunks has its own dtype; a single product is rounded by its GEMM.
                accum = wanted.accum_dtype if size < tokens else kept_dtype(x.dtype)
                allocate_sums(outcome, head, wanted, accum)
            values = outcome.values.new_zeros(len(loss.takes), logits.shape[0])
            labels = None if target is None else target[rows]
            weighed = None if weights is None else weights[:, rows]
            if teacher is None:
                write_values(logits, labels, values, loss, weighed, bool(wanted))
            else:
                teacher.logits(rows, others[0])
                write_divergences(logits, others[0], labels, values, loss, weighed, bool(wanted))
            if mask is not None and valid is None:
                uncounted = ~mask[rows]
                values.masked_fill_(uncounted, 0.0)
                logits.masked_fill_(uncounted.unsqueeze(1), 0.0)
            outcome.values[:, rows] = values
            add_gradients(outcome, rows, head, logits, first=start == 0)
    if not tokens:  # and so no chunk that writes them
        allocate_sums(outcome, head, wanted, kept_dtype(x.dtype))
        for total in (outcome.grad_weight, outcome.grad_bias):
            if total is not None:
                total.zero_()
    return outcome


def _needed(
    target: Tensor | None, loss: TokenLoss, weights: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """bool [N]: of which tokens anything counts; None where that is known to be of all."""
    labelled = None
    if target is not None and loss.ignore_index is not None:
        labelled = target != loss.ignore_index
    needed = labelled if loss.only_labels else None
    if weights is not None and weights.shape[1] != 1:
        each = weights != 0
        if labelled is not None:
            each[loss.takes.index("cross_entropy")] &= labelled
        needed = each.any(0)
    if mask is not None:
        needed = mask if needed is None else needed & mask
    return needed


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a parameter's gradient: a sum over tokens can exceed float16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def chunk_size(
    tokens: int, itemsize: int, head: Head, wanted: Wanted, chunk_tokens: int = 0
) -> int:
    """Tokens of a chunk: ``chunk_tokens`` if positive, or else by budget and as equal as they come;
    its logits take no more than the sum of the weight's gradient, with which they make the peak of
    a head's memory. itemsize: bytes for each logit."""
    if chunk_tokens > 0:
        return chunk_tokens
    most = chunk_tokens_for(head.vocab, itemsize, head.x.device.type)
    if wanted.weight:
        as_large = head.x.shape[1] * wanted.accum_dtype.itemsize // head.x.element_size()
        most = min(most, max(_LEAST, as_large // _UNIT * _UNIT))
    if tokens <= most or _fits_one_chunk(tokens, itemsize, head, wanted, most):
        return max(1, tokens)
    chunks = -(-tokens // most)
    return -(-tokens // chunks // _UNIT) * _UNIT


def _fits_one_chunk(tokens: int, itemsize: int, head: Head, wanted: Wanted, most: int) -> bool:
    """One chunk needs no sum of its own beside the gradient of the weight. So its logits may take
    what chunks of ``most`` tokens and that sum would, over the gradient, at their peak: before or
    after it is cast."""
    if not wanted.weight or wanted.accum_dtype == head.x.dtype:
        return False
    gradient = head.weight.numel() * head.x.element_size()
    total = head.weight.numel() * wanted.accum_dtype.itemsize
    of_token = head.vocab * itemsize
    return tokens * of_token <= total + max(0, most * of_token - gradient)


def allocate(head: Head, loss: TokenLoss, wanted: Wanted) -> Outcome:
    x = head.x
    return Outcome(
        values=x.new_zeros(len(loss.takes), x.shape[0], dtype=loss_dtype(x.dtype)),
        # Rows that no chunk visits are of tokens that do not count: their gradient is zero.
        grad_input=x.new_zeros(x.shape) if wanted.input else None,
        grad_weight=None,
        grad_bias=None,
    )


def allocate_sums(outcome: Outcome, head: Head, wanted: Wanted, accum: torch.dtype) -> None:
    """The gradients of the parameters, which the first chunk writes."""
    make = partial(torch.empty_like, dtype=accum, memory_format=torch.contiguous_format)
    if wanted.weight:
        outcome.grad_weight = make(head.weight)
    if wanted.bias and head.bias is not None:
        outcome.grad_bias = make(head.bias)


def logits_buffer(rows: int, head: Head) -> Tensor:
    x, vocab = head.x, head.vocab
    if x.device.type != "cuda":
        # Unpadded: a CPU's bf16 GEMM with AMX reads one element behind an odd row and multiplies it
        # by zero, which is NaN for what memory happens to hold (torch 2.13).
        return x.new_empty(rows, vocab)
    # Rows padded to 128 bytes: without, a vocabulary like 32001 misses the GEMMs for aligned rows.
    unit = 128 // x.element_size()
    padded = -(-vocab // unit) * unit
    return x.new_empty(rows, padded)[:, :vocab]


def add_gradients(
    outcome: Outcome, rows: slice | Tensor, head: Head, grad_logits: Tensor, first: bool
) -> None:
    """What a chunk gives to those gradients that are wanted; ``grad_logits`` is of its ``rows``.
    The ``first`` chunk writes the parameters' gradients."""
    if outcome.grad_input is not None:
        if isinstance(rows, slice):
            torch.mm(grad_logits, head.weight, out=outcome.grad_input[rows])
        else:
            outcome.grad_input.index_copy_(0, rows, grad_logits @ head.weight)
    if outcome.grad_weight is not None:
        accumulate_mm(outcome.grad_weight, grad_logits.t(), head.x[rows], first)
    if outcome.grad_bias is not None:
        total = grad_logits.sum(0, dtype=outcome.grad_bias.dtype)
        outcome.grad_bias.copy_(total) if first else outcome.grad_bias.add_(total)
