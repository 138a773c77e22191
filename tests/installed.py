"""What a stranger gets: ten steps of a small decoder with the installed package, against eager.

`make install-test` runs this in an environment of the wheel, torch and liger-kernel alone.
"""

from __future__ import annotations

import copy
import re
from importlib.metadata import metadata
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, LENGTH = 1024, 64, 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, 4, -1)).transpose(1, 3)
        heads = F.scaled_dot_product_attention(*qkv.unbind(2), is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        normed = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.layers(self.embedding(tokens)))
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def losses(model: nn.Module) -> Tensor:
    """Of ten steps on the same batch; half of the labels are ignored."""
    device = next(model.parameters()).device
    draws = torch.randint(VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    tokens, labels = draws[:, :-1].to(device), draws[:, 1:].to(device, copy=True)
    labels[:, : LENGTH // 2] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(tokens, labels)
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return torch.stack(values)


def train() -> None:
    torch.manual_seed(0)
    eager = Decoder().to("cuda" if torch.cuda.is_available() else "cpu")
    compiled = copy.deepcopy(eager)
    compiled.compile(backend="liger_fx", fullgraph=True)  # found by its entry point
    expected, actual = losses(eager), losses(compiled)

    import liger_fx

    (report,) = liger_fx.reports()
    print(report)
    print("eager   ", *(f"{value:.4f}" for value in expected.tolist()))
    print("liger_fx", *(f"{value:.4f}" for value in actual.tolist()))
    assert report.counts["linear_cross_entropy"] == 1
    assert expected[-1] < 0.9 * expected[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def check_metadata() -> None:
    import liger_fx

    installed = metadata("liger_fx")
    assert installed["Version"] == liger_fx.__version__
    assert (files("liger_fx") / "py.typed").is_file()
    relative = re.findall(r"\]\((?!https?:|mailto:|#)[^)]*\)", installed.get_payload())
    assert not relative, f"links that are dead on PyPI: {relative}"


if __name__ == "__main__":
    train()
    check_metadata()
