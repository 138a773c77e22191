"""Hugging Face's Trainer, on docstrings. The line for liger_fx is ``model.compile(...)``.

The model returns its logits beside the loss, and they are computed only if somebody reads them.
`TrainingArguments(torch_compile_backend="liger_fx")` raises a ValueError: accelerate (1.15.0) takes
only the backends that it lists. Where Trainer makes the model, add
``callbacks=[liger_fx.huggingface.LigerFxCallback()]``.
"""

import json
from itertools import islice
from pathlib import Path

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
