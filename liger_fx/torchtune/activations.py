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
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
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


_keeping = functools.partial(
    checkpoint,
    use_reentrant=False,
    context_fn=functools.partial(create_selective_checkpoint_contexts, _policy),
)


def _without_checkpoint(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


def keep(checkpoints: Sequence[CheckpointWrapper], count: int) -> None:
    """Let the last ``count`` of these checkpointed layers keep, and the others recompute.

    May be called between two steps: a compiled layer is compiled again for the other way, once. A
    checkpoint around a layer that was compiled without it cannot see the products inside; such a
    layer keeps by having no checkpoint.
    """
    first = len(checkpoints) - count
    for i, wrapper in enumerate(checkpoints):
        recomputing = vars(wrapper).setdefault("_recomputing", wrapper.checkpoint_fn)
        outside = wrapper._checkpoint_wrapped_module._compiled_call_impl is not None
        keeping: Callable[..., Any] = _without_checkpoint if outside else _keeping
        wrapper.checkpoint_fn = keeping if i >= first else recomputing  # type: ignore[assignment]


def checkpoints_of(model: nn.Module) -> list[CheckpointWrapper]:
    """The checkpointed layers of ``model``, in their order."""
    return [module for module in model.modules() if isinstance(module, CheckpointWrapper)]


class MemoryBudget:
    """As many layers keep as fit a budget: an optimizer's ``register_step_pre_hook``.

    checkpoints: layers as torchtune wraps them, all of one size. budget: bytes that may be
    allocated at once. peak: what was allocated at most, so far. say: gets a sentence when the
    number of layers is settled.

    After the first step, which has no optimizer state yet, one layer keeps, and from step to step
    up to twice as many, while there is room for what the last ones took: where something else sets
    the peak at first, a layer seems to take nothing. If a larger batch exceeds the budget later,
    layers are given up again.
    """

    def __init__(
        self,
        checkpoints: Sequence[CheckpointWrapper],
        budget: int,
        peak: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        self.checkpoints, self.budget, self.peak, self.say = checkpoints, budget, peak, say
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
        fits = room // self._of_a_layer if self._of_a_layer else len(self.checkpoints)
        if room < 0:
            self._settle(max(0, self.kept + fits) if self._of_a_layer else 0, peak)
        elif not self._settled:
            more = min(fits, max(1, self.kept), len(self.checkpoints) - self.kept)
            self._keep(self.kept + more) if more else self._settle(self.kept, peak)

    def _settle(self, count: int, peak: int) -> None:
        """From here on there are only ever fewer."""
        self._keep(count)
        self._settled = True
        self.say(
            f"{self.kept} of {len(self.checkpoints)} layers keep their activations: a layer takes "
            f"{self._of_a_layer / 2**30:.2f} GiB, the peak was {peak / 2**30:.2f} of "
            f"{self.budget / 2**30:.2f} GiB"
        )

    def _keep(self, count: int) -> None:
        self.kept = count
        keep(self.checkpoints, count)
