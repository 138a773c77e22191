"""A LightningModule, compiled: its graph is that of training_step, from the tokens to the loss."""

import lightning
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

import liger_fx

VOCABULARY, LENGTH = 8192, 128


class LanguageModel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4)
        config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
        self.model = transformers.LlamaForCausalLM(config)

    # torch 2.13 raises an error when it traces LightningModule.log.
    log = torch.compiler.disable(lightning.LightningModule.log)

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        loss = self.model(tokens, labels=tokens).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


torch.manual_seed(0)
tokens = torch.randint(64, (48, LENGTH))
trainer = lightning.Trainer(
    max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(torch.compile(LanguageModel(), backend="liger_fx"), DataLoader(tokens, batch_size=8))
print(f"loss {trainer.callback_metrics['loss']:.4f}")
for report in liger_fx.reports():
    print(report)
