"""Which of torchtune's checkpointed layers keep their activations (`liger_fx.activations`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from liger_fx.activations import keeping


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
        kept: Callable[..., Any] = _without_checkpoint if outside else keeping
        wrapper.checkpoint_fn = kept if i >= first else recomputing  # type: ignore[assignment]


def _without_checkpoint(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


def checkpoints_of(model: nn.Module) -> list[CheckpointWrapper]:
    """The checkpointed layers of ``model``, in their order."""
    return [module for module in model.modules() if isinstance(module, CheckpointWrapper)]
