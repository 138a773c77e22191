"""What the recipe tests name in a torchtune config: a tokenizer and a data set, both synthetic."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 97
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64,
    max_seq_len=128, intermediate_dim=48,
)  # fmt: skip


class Tokenizer:
    pad_id = 0
    max_seq_len = 32


class Examples(torch.utils.data.Dataset):
    """Sequences of 24 tokens, a different share of each masked."""

    def __init__(self, tokenizer: Tokenizer, packed: bool = False, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(1, VOCAB, (count, 24), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        tokens = self.tokens[i].tolist()
        masked = i % 12
        return {"tokens": tokens, "labels": [-100] * masked + tokens[masked:]}


def packed_examples(tokenizer: Tokenizer, packed: bool) -> torch.utils.data.Dataset:
    from torchtune.datasets import PackedDataset

    return PackedDataset(Examples(tokenizer, count=96), max_seq_len=128)


def model(**overrides: Any) -> torch.nn.Module:
    from torchtune.models.llama3_2 import llama3_2

    return llama3_2(**SIZES | overrides)


def lora_model(**overrides: Any) -> torch.nn.Module:
    from torchtune.models.llama3_2 import lora_llama3_2

    return lora_llama3_2(**SIZES | overrides)


class FocalLoss(torch.nn.Module):
    """A loss of a user's own, on the cross-entropy of each token."""

    ignore_index = -100

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return ((1 - torch.exp(-each)) ** 2 * each).sum() / (labels != self.ignore_index).sum()


class WithWeightDecayOfLogits(torch.nn.Module):
    """One that needs the logits."""

    ignore_index = -100

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        penalty = logits.square().mean()
        return torch.nn.functional.cross_entropy(logits, labels) + 1e-4 * penalty


class Losses:
    """A metric logger that keeps the losses of the run."""

    runs: list[list[float]] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.runs.append([])

    def log_config(self, config: Any) -> None:
        pass

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        self.runs[-1].append(float(payload["loss"]))

    def close(self) -> None:
        pass
