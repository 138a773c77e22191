"""Which of torchtune's checkpointed layers keep their activations (`liger_fx.activations`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from liger_fx.activations import keep_last, keeping, without_checkpoint


def keep(checkpoints: Sequence[CheckpointWrapper], count: int) -> None:
    """Let the last ``count`` of these checkpointed layers keep, and the others recompute."""
    keep_last(checkpoints, count, "checkpoint_fn", _kept)


def _kept(wrapper: CheckpointWrapper) -> Callable[..., Any]:
    """A checkpoint around a layer that was compiled without it cannot see the products inside: such
    a layer keeps by having no checkpoint."""
    outside = wrapper._checkpoint_wrapped_module._compiled_call_impl is not None
    return without_checkpoint if outside else keeping


def checkpoints_of(model: nn.Module) -> list[CheckpointWrapper]:
    """The checkpointed layers of ``model``, in their order."""
    return [module for module in model.modules() if isinstance(module, CheckpointWrapper)]
