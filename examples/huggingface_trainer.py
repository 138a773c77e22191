"""Hugging Face's Trainer, on docstrings: compile the model to the loss, without its logits.

`TrainingArguments(torch_compile_backend="liger_fx")` does not get that far: Trainer hands the name
to accelerate (1.15.0), which takes only the backends that it lists itself and raises a ValueError.
Nor could the loss be fused there, since the model returns the logits beside it. So the model is
compiled before Trainer gets it, and returns the loss alone while it is trained.
"""

import functools
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from docstrings import BOS, EOS, PAD, train_tokenizer, write_dataset

import liger_fx

LENGTH, VOCABULARY = 128, 8192
work = Path(__file__).resolve().parents[1] / "build" / "trainer"
text, vocabulary = work / "docstrings.jsonl", work / "tokenizer.json"
if not vocabulary.exists():  # written last
    work.mkdir(parents=True, exist_ok=True)
    write_dataset(text)
    train_tokenizer(text, vocabulary, VOCABULARY)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(vocabulary), pad_token=PAD)


def encode(line: str) -> dict[str, list[int]]:
    sample = json.loads(line)
    question = tokenizer.encode(BOS + sample["question"])
    answer = tokenizer.encode(sample["answer"] + EOS)
    labels = [-100] * len(question) + answer  # what is not trained on is not projected either
    return {"input_ids": (question + answer)[:LENGTH], "labels": labels[:LENGTH]}


torch.manual_seed(0)
sizes = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes))
forward = model.forward


@functools.wraps(forward)  # Trainer reads from its parameters which columns the model takes
def loss_alone(**batch: Any) -> dict[str, Any]:
    output = forward(**batch)
    return {"loss": output.loss} if model.training else output


model.forward = loss_alone
model.compile(backend="liger_fx")

with text.open() as lines:
    dataset = [encode(line) for line in islice(lines, 400)]
trainer = transformers.Trainer(
    model,
    transformers.TrainingArguments(
        output_dir=str(work / "output"),
        per_device_train_batch_size=8,
        max_steps=10,
        learning_rate=2e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    ),
    # One length for all batches keeps the compiled shapes static.
    transformers.DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=LENGTH),
    dataset,
)
trainer.train()
trainer.save_state()  # the log

for report in liger_fx.reports():
    print(report)
