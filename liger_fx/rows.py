"""A batch of [b, s] as one row of the tokens that have to go through the layers of a decoder.

Left out are tokens whose hidden states nobody reads, as padding, and tokens that are there twice:
no token attends to a later one, so two sequences with the same beginning have the same hidden
states in it. Answers to one prompt (DPO's pairs, GRPO's groups) begin so, and whatever a chat
template puts first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Tokens. Matrix products of aligned rows are faster, and memory of few sizes is used again.
UNIT = 128
# Part of a step. Attention over sequences of several lengths is flash attention, where a batch has
# cuDNN's; of sequences that share tokens it copies keys and values, and sums their gradients.
# With both costs zero, one H200 and torch 2.11, the arm liger_fx_unpad of
# ``benchmarks/huggingface_step.py --models llama3_2_1b`` had 1.02 and 1.08 of the speed of
# liger_fx_layers with ``--padded 0.06`` and ``0.12``; with ``--answers 2 --ignored 0.12 0.25 0.5``
# 0.95, 1.03 and 1.16, where the half of what is ignored is shared.
COST_OF_KERNEL = 1 / 32_768  # for each token of a sequence
COST_OF_SHARING = 1 / 32


class Row(NamedTuple):
    """Which tokens of [b, s] are in a row of n, a multiple of `UNIT` where there are so many.

    tokens: int64 [n], their places in [b * s]. The last may be of those that are left out; they
    make the number. first: int64 [b, s], of `first_rows` or `own_rows`. places: int64 [m], the
    tokens that are read, in [b * s]. source: int64 [m], the token of the row that has the hidden
    state of each; empty where these are the first m of the row.
    """

    tokens: Tensor
    first: Tensor
    places: Tensor
    source: Tensor

    @classmethod
    def if_worth(cls, read: Tensor, first: Tensor) -> Row | None:
        """The row of a batch, where it is faster than the batch. read: bool [b, s]. first: of
        `first_rows` or `own_rows`."""
        own = own_rows(read)
        different = int((read & (first == own)).sum())
        shares = different <= (1 - COST_OF_SHARING) * int(read.sum())
        row = cls.of(first if shares else own)
        left_out = 1 - len(row.tokens) / read.numel()
        cost = read.shape[1] * COST_OF_KERNEL + shares * COST_OF_SHARING
        return row if left_out > cost else None

    @classmethod
    def of(cls, first: Tensor) -> Row:
        size = first.shape[1]
        place = torch.arange(first.numel(), device=first.device)
        kept = first.flatten() == place // size
        number = int(kept.sum())
        more = max(1, -(-number // UNIT)) * UNIT - number
        tokens = torch.cat((place[kept], place[~kept][:more]))
        places = place[first.flatten() >= 0]
        source = places[:0]
        if number < len(places):
            at = torch.zeros_like(place).index_copy_(0, tokens, place[: len(tokens)])
            source = at[first.flatten()[places] * size + places % size]
        return cls(tokens, first, places, source)

    def members(self) -> Tensor:
        """bool [b + 1, n], which tokens of the row each sequence consists of, for
        `liger_fx.ops.sequence_plan`; the last consists of those that make the number."""
        size = self.first.shape[1]
        members = self.first[:, self.tokens % size] == self.tokens // size
        return torch.cat((members, ~members.any(0, keepdim=True)))

    def select(self, batch: Tensor) -> Tensor:
        """[b, s, ...] -> [1, n, ...]"""
        return batch.flatten(0, 1)[self.tokens][None]

    def spread(self, hidden: Tensor) -> Tensor:
        """[1, n, d] -> [b, s, d], with zeros for the tokens that nobody reads."""
        read = hidden[0, : len(self.places)]
        if self.source.numel():
            read = F.embedding(self.source, hidden[0])  # whose gradient is summed in fp32, in order
        rows = hidden.new_zeros(self.first.numel(), hidden.shape[-1])
        return rows.index_copy_(0, self.places, read).view(*self.first.shape, -1)


def own_rows(read: Tensor) -> Tensor:
    """As `first_rows`, where no token stands for another. read: bool [b, s]."""
    row = torch.arange(len(read), device=read.device).unsqueeze(1)
    return torch.where(read, row, -1)


def first_rows(read: Tensor, *alike: Tensor) -> Tensor:
    """For each token the first sequence that is the same up to it, its own at last.

    read: bool [b, s]. alike: int64 [b, s], what is the same in tokens that are read: their numbers,
    their positions. Returns int64 [b, s], -1 for tokens that are not read.
    """
    told = torch.stack([values.masked_fill(~read, -1) for values in alike], -1)
    # Sequences that begin alike are neighbors in any order of their bytes.
    bytes_of = [sequence.tobytes() for sequence in told.cpu().numpy()]
    order = torch.tensor(sorted(range(len(told)), key=bytes_of.__getitem__), device=read.device)
    same = (told[order[1:]] == told[order[:-1]]).all(-1).cumprod(1) != 0
    place = torch.arange(len(told), device=read.device).unsqueeze(1)
    # In the order: where the neighbors start that are the same up to a token.
    start = place.masked_fill(F.pad(same, (0, 0, 1, 0)), -1).cummax(0).values
    row = order.unsqueeze(1).expand_as(start)
    first = torch.full_like(start, len(told)).scatter_reduce_(0, start, row, "amin")
    first = torch.empty_like(start).index_copy_(0, order, first.gather(0, start))
    return torch.where(read, first, -1)


def why_not_shared(decoder: nn.Module) -> str:
    """Why two equal tokens of ``decoder`` may differ in their hidden states, or ""."""
    for name, module in decoder.named_modules():
        if not module.training:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p:
            return f"{name} drops at random"
        for attribute, value in _numbers_of(module):
            if value and ("drop" in attribute or "jitter" in attribute):
                return f"{name or 'the model'} has {attribute}={value}"
    return ""


def _numbers_of(module: nn.Module) -> Iterator[tuple[str, float]]:
    """Its attributes, and those of its configuration that are not of heads it does not have."""
    config = vars(module).get("config")
    given = {} if config is None else vars(config)
    of_config = ((n, v) for n, v in given.items() if not n.startswith(("classifier", "summary")))
    for name, value in itertools.chain(vars(module).items(), of_config):
        if isinstance(value, float):
            yield name, value
