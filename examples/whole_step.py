"""Your own training loop: compile the step from the tokens to the loss as one graph."""

import torch
from torchtune.models.llama3 import llama3

import liger_fx

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
with torch.device(device):
    model = llama3(
        vocab_size=8192, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=128, max_seq_len=128
    )
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_step(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(tokens)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


compiled = torch.compile(loss_step, backend="liger_fx", fullgraph=True)
sequence = torch.randint(8192, (4, 129), device=device)
tokens, labels = sequence[:, :-1], sequence[:, 1:].clone()
labels[:, :64] = -100  # a prompt: what is not trained on is not projected either

for step in range(5):
    loss = compiled(tokens, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}  loss {loss.item():.4f}")

print(liger_fx.reports()[-1])
