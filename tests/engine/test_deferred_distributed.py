"""Deferred logits as outputs of DDP and FSDP2, in two processes: losses, gradients, no logits made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from liger_fx.deferred import DeferredLogits, Head, materialized

B, S, H, V = 2, 6, 8, 16
STEPS = 3


class Deferring(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        kind = dict(classes=V, dtype=hidden.dtype, requires_grad=torch.is_grad_enabled())
        return DeferredLogits(Head(F.linear, (self.weight,)), hidden, **kind)


class Decoder(nn.Module):
    def __init__(self, projection: type[nn.Linear], tied: bool) -> None:
        super().__init__()
        self.embed, self.body, self.norm = nn.Embedding(V, H), nn.Linear(H, H), nn.LayerNorm(H)
        self.head = projection(H, V, bias=False)
        self.unused = nn.Linear(2, 2)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(self.body(self.embed(tokens)).tanh()))}


def ddp(**settings: Any) -> Callable[[Decoder], nn.Module]:
    def wrap(model: Decoder) -> nn.Module:
        if not settings:
            model.unused = nn.Identity()
        return DistributedDataParallel(model, **settings)

    return wrap


def fsdp(model: Decoder) -> nn.Module:
    """As accelerate does it: a unit for the norm and the head, unless the root holds the head."""
    fully_shard(model.body)
    if model.head.weight is not model.embed.weight:
        fully_shard([model.norm, model.head], reshard_after_forward=False)
    return fully_shard(model, reshard_after_forward=False)


WRAPPERS = {
    "ddp": ddp(),
    "unused": ddp(find_unused_parameters=True),
    "static": ddp(static_graph=True),
    "fsdp": fsdp,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": lambda logits, labels: F.cross_entropy(
        logits.float().view(-1, V), labels.view(-1)
    ),
    "chunks": lambda logits, labels: (
        logits.logsumexp(-1) - logits.float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    ).mean(),
    "read": lambda logits, labels: logits.cos().mean(),
}


def _train(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients = [], {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        tokens = torch.randint(V, (B, S), generator=generator)
        loss = loss_of(model(tokens)["logits"], tokens.roll(-1, 1))
        loss.backward()
        losses.append(loss.detach())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                whole = getattr(parameter.grad, "full_tensor", parameter.grad.clone)()
                gradients[f"{name} {step}"] = whole
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def _rank(rank: int, store: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for wrapper, wrap in WRAPPERS.items():
        for tied in (False, True):
            for name, loss_of in LOSSES.items():
                outcomes = []
                before = materialized()
                for projection in (nn.Linear, Deferring):
                    torch.manual_seed(0)
                    outcomes.append(_train(wrap(Decoder(projection, tied)), loss_of))
                case = f"{wrapper}, {name}, tied={tied}"
                assert materialized() - before == (STEPS if name == "read" else 0), case
                torch.testing.assert_close(*outcomes, msg=lambda text, case=case: f"{case}: {text}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes(tmp_path: Path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path / "store"),), nprocs=2)
