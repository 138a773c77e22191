"""A tiny language model and its data, for runs of Trainer and of what is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

VOCABULARY, LENGTH = 512, 16


def language_model(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    tiny = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**(tiny | config)))


def samples(count: int, *lengths: int) -> list[dict[str, list[int]]]:
    """Tokens of these lengths in turn, two samples of one length after another."""
    generator = torch.Generator().manual_seed(1)
    of = [(lengths or (LENGTH,))[i // 2 % max(len(lengths), 1)] for i in range(count)]
    draws = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in of]
    return [{"input_ids": draw.tolist()} for draw in draws]


def tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens are the words 3, 4, ..., padding, end and unknown."""
    words = ["<pad>", "<eos>", "<unk>", *map(str, range(3, VOCABULARY))]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def collator() -> DataCollatorForLanguageModeling:
    """Pads tokens to the longest of a batch, and labels with -100."""
    return DataCollatorForLanguageModeling(tokenizer(), mlm=False)


def settings(folder: Path, **further: Any) -> dict[str, Any]:
    return (
        dict(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            max_steps=4,
            # Adam would make a large step of a gradient that is noise.
            optim="sgd",
            learning_rate=0.5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )
        | further
    )


def arguments(folder: Path, **further: Any) -> TrainingArguments:
    return TrainingArguments(**settings(folder, **further))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
