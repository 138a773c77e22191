"""Spend memory that is free on activations: checkpointed layers that recompute less.

A checkpoint keeps the input of a layer and computes all else again in the backward. A layer that
*keeps* holds on to the outputs of its matrix products and of its attention as well, and recomputes
only what is cheap: norms, rotations, activations, and what an op of ours computes again by design
(`liger_fx.ops.tiled_mlp`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "liger_fx::attention_forward",
    "liger_fx::swiglu_mlp_forward",
    "liger_fx::geglu_mlp_forward",
)


def _policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = isinstance(op, torch._ops.OpOverload) and op.name() in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# A checkpoint that keeps.
keeping = functools.partial(
    checkpoint,
    use_reentrant=False,
    context_fn=functools.partial(create_selective_checkpoint_contexts, _policy),
)


def without_checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In the place of a checkpoint."""
    return function(*args, **kwargs)


def keep_last(
    layers: Sequence[Any], count: int, name: str, kept: Callable[[Any], Callable[..., Any]]
) -> None:
    """Let the last ``count`` layers keep, and the others recompute.

    name: the attribute of a layer that holds its checkpoint, a function. kept: the one with which
    a layer keeps. May be called between two steps: a compiled layer is compiled again for the other
    way, once.
    """
    first = len(layers) - count
    for i, layer in enumerate(layers):
        recomputing = vars(layer).setdefault("_recomputing", getattr(layer, name))
        setattr(layer, name, kept(layer) if i >= first else recomputing)


class MemoryBudget:
    """As many layers keep as fit a budget: an optimizer's ``register_step_pre_hook``.

    keep: ``keep(count)`` lets so many of ``layers`` checkpointed layers, all of one size, keep.
    budget: bytes that may be allocated at once. peak: what was allocated at most, so far. say: gets
    a sentence when the number of layers is settled.

    After the first step, which has no optimizer state yet, one layer keeps, and from step to step
    up to twice as many, while there is room for what the last ones took: where something else sets
    the peak at first, a layer seems to take nothing. If a larger batch exceeds the budget later,
    layers are given up again.
    """

    def __init__(
        self,
        keep: Callable[[int], None],
        layers: int,
        budget: int,
        peak: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        self.keep, self.layers = keep, layers
        self.budget, self.peak, self.say = budget, peak, say
        self.kept = 0
        self._last: tuple[int, int] | None = None  # layers that kept, and the peak with them
        self._of_a_layer = 0  # bytes, the most that any took
        self._settled = False

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not optimizer.state:
            return
        peak = self.peak()
        if self._last is not None and self.kept > self._last[0]:
            kept, before = self._last
            self._of_a_layer = max(self._of_a_layer, (peak - before) // (self.kept - kept))
        self._last = self.kept, peak
        room = self.budget - peak
        fits = room // self._of_a_layer if self._of_a_layer else self.layers
        if room < 0:
            self._settle(max(0, self.kept + fits) if self._of_a_layer else 0, peak)
        elif not self._settled:
            more = min(fits, max(1, self.kept), self.layers - self.kept)
            self._keep(self.kept + more) if more else self._settle(self.kept, peak)

    def _settle(self, count: int, peak: int) -> None:
        """From here on there are only ever fewer."""
        self._keep(count)
        self._settled = True
        self.say(
            f"{self.kept} of {self.layers} layers keep their activations: a layer takes "
            f"{self._of_a_layer / 2**30:.2f} GiB, the peak was {peak / 2**30:.2f} of "
            f"{self.budget / 2**30:.2f} GiB"
        )

    def _keep(self, count: int) -> None:
        self.kept = count
        self.keep(count)


# -- bytes -----------------------------------------------------------------------------------------


def bytes_of(gib: float | str) -> int | None:
    """Of ``memory_gib``; None for "auto". Raises ValueError."""
    if gib == "auto":
        return None
    try:
        return int(float(gib) * 2**30)
    except ValueError:
        raise ValueError(f"memory_gib is {gib!r}, expected a number of GiB or auto") from None


def require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError("memory_gib needs a GPU: elsewhere memory is not counted")


def room_on_all_ranks(device: torch.device) -> int:
    """Bytes that this process may allocate, on the rank that has least: those of the GPU less what
    others hold, and a tenth for the allocator's gaps."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return _of_all_ranks(total - others - total // 10, device, dist.ReduceOp.MIN)


def peak_of_all_ranks(device: torch.device) -> int:
    """Bytes allocated at most, on the rank that needs most."""
    return _of_all_ranks(torch.cuda.max_memory_allocated(device), device, dist.ReduceOp.MAX)


def _of_all_ranks(number: int, device: torch.device, reduced: Any) -> int:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return number
    shared = torch.tensor(number, device=device)
    dist.all_reduce(shared, reduced)
    return int(shared)
