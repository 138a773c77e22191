"""What would be rewritten in Llama-3 8B, on any machine: no kernel runs, no weight exists."""

import torch
from torchtune import training
from torchtune.models.llama3 import llama3_8b

import liger_fx


def loss_step(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(tokens)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


with torch.device("meta"), training.set_default_dtype(torch.bfloat16):
    model = llama3_8b()
    batch = torch.empty(2, 4096, dtype=torch.long)

print(liger_fx.explain(loss_step, [model, batch, batch]))
