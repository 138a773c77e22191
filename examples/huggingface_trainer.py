"""Hugging Face's Trainer on docstrings: compile its step from the batch to the loss.

Compiling the model alone, as `TrainingArguments(torch_compile=True)` does, fuses no loss: the model
returns the logits, so they have to exist. Nor does `torch_compile_backend` take this backend:
accelerate looks the name up in a list of its own and raises a ValueError (1.15.0). Trainer's
`compute_loss` keeps nothing but the loss while it trains, and is one graph.
"""

import json
import os
from itertools import islice
from pathlib import Path

os.environ["TORCHAO_FORCE_SKIP_LOADING_SO_FILES"] = "1"  # no warning about kernels not used here

import torch
from docstrings import BOS, EOS, PAD, train_tokenizer, write_dataset
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import liger_fx

LENGTH, VOCABULARY = 128, 8192
work = Path(__file__).resolve().parents[1] / "build" / "trainer"
text, vocabulary = work / "docstrings.jsonl", work / "tokenizer.json"
if not vocabulary.exists():  # written last
    work.mkdir(parents=True, exist_ok=True)
    write_dataset(text)
    train_tokenizer(text, vocabulary, VOCABULARY)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(vocabulary), pad_token=PAD)


def encode(line: str) -> dict[str, list[int]]:
    sample = json.loads(line)
    question = tokenizer.encode(BOS + sample["question"])
    answer = tokenizer.encode(sample["answer"] + EOS)
    labels = [-100] * len(question) + answer  # what is not trained on is not projected either
    return {"input_ids": (question + answer)[:LENGTH], "labels": labels[:LENGTH]}


with text.open() as lines:
    dataset = [encode(line) for line in islice(lines, 400)]
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
)
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=str(work / "output"),
        per_device_train_batch_size=8,
        max_steps=20,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    # One length for all batches keeps the compiled shapes static.
    DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=LENGTH),
    dataset,
)
trainer.compute_loss = torch.compile(trainer.compute_loss, backend="liger_fx", fullgraph=True)
trainer.train()

for entry in trainer.state.log_history[:-1]:  # the last sums up the run
    print(f"step {entry['step']:2}  loss {entry['loss']:.5f}")
for report in liger_fx.reports():
    print(report)
