"""Models and loops as people write them by hand: what is found in each, and that losses and
gradients are eager's. What is not found is here too, with the reason that the report gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _util import relative_error
from torch import Tensor, nn

import liger_fx
from liger_fx.deferred import materialized

LAYERS, HIDDEN, HEADS, VOCABULARY, BATCH, LENGTH = 2, 32, 4, 200, 4, 24


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

    def forward(self, index: Tensor, targets: Tensor) -> Tensor:
        t = index.size(1)
        cos, sin = self.cos[:, :t], self.sin[:, :t]
        x = norm(self.tokens(index))
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(norm(x))[..., :VOCABULARY].float()
        logits = 15 * torch.tanh(logits / 15)
        flat = logits.view(-1, logits.size(-1))
        return F.cross_entropy(flat, targets.view(-1), ignore_index=-1)


# -- modded-nanogpt: as nanochat, and skips between layers, a mix with the embedding, another cap ----


class Modded(NanoChat):
    """Of one long sequence of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([[1.0, 0.1]] * LAYERS))
        self.skips = nn.Parameter(torch.ones(LAYERS // 2))

    def forward(self, index: Tensor, targets: Tensor) -> Tensor:
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
        logits = self.cap(self.head(norm(x)).float())
        targets = targets.flatten().clamp_min(0)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets, reduction="sum") / t

    def cap(self, logits: Tensor) -> Tensor:
        return 15 * torch.tanh(logits / 15)


class ModdedWithSigmoid(Modded):
    def cap(self, logits: Tensor) -> Tensor:
        return 23 * torch.sigmoid((logits + 5) / 7.5)


# -- their loop ------------------------------------------------------------------------------------


@dataclass
class Run:
    losses: list[float]  # of each batch, and of the evaluation
    gradients: dict[str, Tensor]  # of the last step


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The first labels of some sequences are ignored."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[tokens[:, 0] % 2 == 0, :4] = -1
    return tokens[:, :-1], targets


def loss_of(outputs: Any) -> Tensor:
    return outputs[1] if isinstance(outputs, tuple) else outputs


def train(make: Callable[[], nn.Module], backend: str | None, dtype: torch.dtype | None) -> Run:
    """Three steps of two batches each under autocast, if there is a dtype, and an evaluation."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = make()
    run: Any = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []

    def loss_on(number: int) -> Tensor:
        with contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            return loss_of(run(*batch(number)))

    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        for micro_step in range(2):
            loss = loss_on(2 * step + micro_step) / 2
            loss.backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        losses.append(loss_on(6).item())
    return Run(losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def assert_alike(ours: Run, eager: Run, tolerance: float) -> None:
    assert ours.losses == pytest.approx(eager.losses, rel=tolerance)
    assert ours.gradients.keys() == eager.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert relative_error(gradient, eager.gradients[name]) < 10 * tolerance, name


n = LAYERS
GPT = dict(linear_cross_entropy=1, layer_norm=2 * n + 1)
CHAT = dict(linear_cross_entropy=1, add_rms_norm=2 * n, rms_norm=2 * n + 2, rope=2 * n)
MODDED = dict(add_rms_norm=2 * n + 1, rms_norm=2 * n + 1, rope=2 * n)

# The model, what is found in it, and why what the names stand for is not.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, int], dict[str, str]]] = {
    "nanogpt": (NanoGPT, GPT, {}),
    "nanogpt_bias": (lambda: NanoGPT(bias=True), GPT, {}),
    # Its mask is a buffer, whose values no graph knows.
    "nanogpt_slow": (
        lambda: NanoGPT(flash=False),
        GPT,
        dict(softmax_attention="no kernel is made for a mask with"),
    ),
    "nanochat": (NanoChat, CHAT, {}),
    "modded": (Modded, MODDED | dict(linear_cross_entropy=1), {}),
    "modded_sigmoid": (
        ModdedWithSigmoid,
        MODDED | dict(cross_entropy=1),
        dict(linear_cross_entropy="wanted tanh, found 23"),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 3e-3)], ids=["fp32", "bf16"]
)
def test_models(case, dtype, tolerance):
    make, counts, reasons = CASES[case]
    before = materialized()
    assert_alike(train(make, "liger_fx", dtype), train(make, None, dtype), tolerance)
    report = liger_fx.reports()[0]
    assert report.counts == counts
    for name, reason in reasons.items():
        assert reason in report.why_not(name)
    assert len(report.deferred) == case.startswith("nanogpt") and materialized() == before


def test_generation_reads_its_logits():
    """nanoGPT's model, compiled for training, samples from the logits of the last position."""
    torch.manual_seed(0)
    model = NanoGPT()
    compiled = torch.compile(model, backend="liger_fx")
    loss_of(compiled(*batch(0))).backward()
    tokens = batch(1)[0][:1, :5]
    with torch.no_grad():
        logits, loss = compiled(tokens)
        assert loss is None
        torch.testing.assert_close(
            logits[:, -1, :].softmax(-1), model(tokens)[0][:, -1, :].softmax(-1)
        )


# -- Fabric and Lightning --------------------------------------------------------------------------

PRECISIONS = [("32-true", 1e-5), ("bf16-mixed", 3e-3)]


def with_fabric(way: str | None, precision: str) -> list[float]:
    """The loop of Fabric's documentation: the model is compiled before `setup`."""
    import lightning

    torch._dynamo.reset()
    torch.manual_seed(0)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    model = NanoGPT()
    if way == "in place":
        model.compile(backend="liger_fx")
    elif way == "function":
        model = torch.compile(model, backend="liger_fx")
    run, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        _, loss = run(*batch(step))
        fabric.backward(loss)
        fabric.clip_gradients(run, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.integrations
@pytest.mark.parametrize("way", ["in place", "function"])
@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_fabric(way, precision, tolerance):
    pytest.importorskip("lightning")
    before = materialized()
    ours = with_fabric(way, precision)
    assert ours == pytest.approx(with_fabric(None, precision), rel=tolerance)
    assert [report.counts for report in liger_fx.reports()] == [GPT]
    assert materialized() == before


def with_lightning(compiled: bool, precision: str, folder: Path) -> list[float]:
    """A module whose inner model is compiled in place, so that `training_step` may log."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = NanoGPT(), []

        def training_step(self, batch: Any, index: int) -> Tensor:
            _, loss = self.model(*batch)
            self.log("loss", loss, prog_bar=True)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Module()
    if compiled:
        module.model.compile(backend="liger_fx")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, torch.utils.data.DataLoader([batch(i) for i in range(6)], batch_size=None))
    return module.losses


@pytest.mark.integrations
@pytest.mark.parametrize(("precision", "tolerance"), PRECISIONS)
def test_lightning(precision, tolerance, tmp_path):
    pytest.importorskip("lightning")
    before = materialized()
    ours = with_lightning(True, precision, tmp_path)
    assert ours == pytest.approx(with_lightning(False, precision, tmp_path), rel=tolerance)
    assert [report.counts for report in liger_fx.reports()] == [GPT]
    assert materialized() == before
