"""Models and loops as people write them by hand: what is found in each, and that losses and
gradients are eager's. What is not found is here too, with the reason that the report gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _util import relative_error
from torch import Tensor, nn

import liger_fx
from liger_fx import Report
from liger_fx.deferred import materialized

LAYERS, HIDDEN, HEADS, VOCABULARY, BATCH, LENGTH = 2, 32, 4, 200, 4, 24
STEPS = 3


@pytest.fixture(autouse=True)
def every_rewrite(monkeypatch):
    for name, value in dict(POLICY="all", INNER="aot_eager", STRICT="1").items():
        monkeypatch.setenv(f"LIGER_FX_{name}", value)


# -- nanoGPT: GPT-2 with learned positions, exact GELU, a tied head, logits returned -----------------


class LayerNorm(nn.Module):
    """With a bias or without."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))
        self.bias = nn.Parameter(torch.zeros(HIDDEN)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class GPTBlock(nn.Module):
    def __init__(self, bias: bool, flash: bool, dropout: float) -> None:
        super().__init__()
        self.flash, self.dropout = flash, dropout
        self.norm_1, self.norm_2 = LayerNorm(bias), LayerNorm(bias)
        self.attention = nn.Linear(HIDDEN, 3 * HIDDEN, bias=bias)
        self.projection = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=bias)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias=bias)
        self.register_buffer("seen", torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, -1))

    def attend(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.attention(x).split(c, dim=2)
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
        if self.flash:
            dropout = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
            scores = scores.masked_fill(self.seen[:, :, :t, :t] == 0, float("-inf"))
            y = F.dropout(F.softmax(scores, dim=-1), self.dropout, self.training) @ v
        return self.projection(y.transpose(1, 2).contiguous().view(b, t, c))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attend(self.norm_1(x)), self.dropout, self.training)
        update = self.down(F.gelu(self.up(self.norm_2(x))))
        return x + F.dropout(update, self.dropout, self.training)


class NanoGPT(nn.Module):
    def __init__(self, bias: bool = False, flash: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(GPTBlock(bias, flash, dropout) for _ in range(LAYERS))
        self.norm = LayerNorm(bias)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, index: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Any]:
        position = torch.arange(index.size(1), dtype=torch.long, device=index.device)
        x = self.tokens(index) + self.positions(position)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, [-1], :]), None
        logits = self.head(x)
        flat = logits.view(-1, logits.size(-1))
        return logits, F.cross_entropy(flat, targets.view(-1), ignore_index=-1)


# -- nanochat: norms without weights, ReLU², rotary halves, grouped heads, a padded capped head ------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[3] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos], 3)


class ChatBlock(nn.Module):
    groups = 2

    def __init__(self) -> None:
        super().__init__()
        width = HIDDEN // HEADS
        self.q = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k = nn.Linear(HIDDEN, self.groups * width, bias=False)
        self.v = nn.Linear(HIDDEN, self.groups * width, bias=False)
        self.projection = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN, bias=False)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = (p(x).view(b, t, -1, c // HEADS) for p in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k = norm(q), norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.projection(y.transpose(1, 2).contiguous().view(b, t, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(norm(x), cos, sin)
        return x + self.down(F.relu(self.up(norm(x))).square())


class NanoChat(nn.Module):
    padded = 256

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(self.padded, HIDDEN)
        self.blocks = nn.ModuleList(ChatBlock() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, self.padded, bias=False)
        width = HIDDEN // HEADS
        frequency = 1.0 / 10000 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        angle = torch.outer(torch.arange(4 * LENGTH, dtype=torch.float32), frequency)
        self.register_buffer("cos", angle.cos()[None, :, None, :], persistent=False)
        self.register_buffer("sin", angle.sin()[None, :, None, :], persistent=False)

    def forward(self, index: Tensor, targets: Tensor | None = None) -> Tensor:
        t = index.size(1)
        cos, sin = self.cos[:, :t], self.sin[:, :t]
        x = norm(self.tokens(index))
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(norm(x))[..., :VOCABULARY].float()
        logits = 15 * torch.tanh(logits / 15)
        if targets is None:
            return logits
        flat = logits.view(-1, logits.size(-1))
        return F.cross_entropy(flat, targets.view(-1), ignore_index=-1)


# -- modded-nanogpt: as nanochat, and skips between layers, a mix with the embedding, another cap ----


class Modded(NanoChat):
    """One long sequence of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([[1.0, 0.1]] * LAYERS))
        self.skips = nn.Parameter(torch.ones(LAYERS // 2))

    def forward(self, index: Tensor, targets: Tensor | None = None) -> Tensor:
        t = index.numel()
        cos, sin = self.cos[:, :t], self.sin[:, :t]
        x = start = norm(self.tokens(index.flatten())[None])
        saved: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i >= LAYERS - len(self.skips):
                x = x + self.skips[i - LAYERS // 2] * saved.pop()
            x = block(self.mix[i, 0] * x + self.mix[i, 1] * start, cos, sin)
            if i < LAYERS // 2:
                saved.append(x)
        logits = self.head(norm(x)).float()
        logits = self.cap(logits)
        flat = logits.view(-1, logits.size(-1))
        return F.cross_entropy(flat, targets.flatten(), reduction="sum")

    def cap(self, logits: Tensor) -> Tensor:
        return 23 * torch.sigmoid((logits + 5) / 7.5)


class ModdedWithTanh(Modded):
    def cap(self, logits: Tensor) -> Tensor:
        return 15 * torch.tanh(logits / 15)


# -- their loop ------------------------------------------------------------------------------------

Outcome = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[:, :4] = torch.where(tokens[:, :1] % 2 == 0, -1, targets[:, :4])
    return tokens[:, :-1], targets


def loss_of(outputs: Any) -> Tensor:
    return outputs[1] if isinstance(outputs, tuple) else outputs


def train(
    make: Callable[[], nn.Module], backend: str | None, dtype: torch.dtype | None = None
) -> Outcome:
    """Losses, gradients of the last step, and what the parameters became. Two batches a step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    run: Any = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        for micro_step in range(2):
            tokens, targets = batch(2 * step + micro_step)
            if isinstance(model, Modded):
                targets = targets.clamp_min(0)
            cast = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
            with cast:
                loss = loss_of(run(tokens, targets)) / 2
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, {name: p.detach() for name, p in model.named_parameters()}


CASES = {
    "nanogpt": NanoGPT,
    "nanogpt_bias": lambda: NanoGPT(bias=True),
    "nanogpt_slow": lambda: NanoGPT(flash=False),
    "nanochat": NanoChat,
    "modded": Modded,
    "modded_tanh": ModdedWithTanh,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_x(case, dtype):
    eager = train(CASES[case], None, dtype)
    liger_fx.clear_reports()
    before = materialized()
    ours = train(CASES[case], "liger_fx", dtype)
    print(case, dtype, len(liger_fx.reports()), materialized()-before)
    print("\n".join(map(str, liger_fx.reports())))
    print(eager[0], ours[0])
    for name in eager[1]:
        print(name, relative_error(ours[1][name], eager[1][name]))
