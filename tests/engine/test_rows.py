"""Which tokens of a batch go through the layers, and where their hidden states are read."""

from __future__ import annotations

import pytest
import torch

from liger_fx import rows


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [b, s] of a small alphabet, and which of them are read; others are of any number."""
    generator = torch.Generator().manual_seed(seed)
    size, number = torch.randint(1, 9, (2,), generator=generator).tolist()
    tokens = torch.randint(2, (number, size), generator=generator)
    first, end = torch.randint(0, size + 1, (2, number, 1), generator=generator)
    place = torch.arange(size)
    return tokens, (place >= first % 2) & (place < end)


@pytest.mark.parametrize("seed", range(100))
def test_the_first_sequence_that_begins_alike(seed):
    tokens, read = batch(seed)
    told = torch.where(read, tokens, -1).tolist()
    found = rows.first_rows(read, tokens)
    for r, sequence in enumerate(told):
        for t in range(len(sequence)):
            alike = [other[: t + 1] == sequence[: t + 1] for other in told]
            assert found[r, t] == (alike.index(True) if read[r, t] else -1)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("unit", [1, 4, 128])
@pytest.mark.parametrize("seed", range(10))
def test_a_row_has_all_that_is_read(seed, unit, shares, monkeypatch):
    monkeypatch.setattr(rows, "UNIT", unit)
    tokens, read = batch(seed)
    first = rows.first_rows(read, tokens) if shares else rows.own_rows(read)
    number = int((read & (first == rows.own_rows(read))).sum())
    row = rows.Row.of(first)
    assert len(row.tokens) == min(tokens.numel(), max(1, -(-number // unit)) * unit)
    assert len(row.tokens.unique()) == len(row.tokens)
    members = row.members()
    for r, of in enumerate(members[:-1]):  # each sequence is there, in its order
        assert torch.equal(row.select(tokens)[0, of], tokens[r, read[r]])
    assert torch.equal(members[-1], ~members[:-1].any(0))
    # What a layer makes of a token's beginning, here its sum, is read where the token was.
    sums = torch.where(read, tokens + 1, 0).cumsum(1, dtype=torch.float64)[..., None]
    spread = row.spread(row.select(sums))
    assert torch.equal(spread, torch.where(read[..., None], sums, 0))
