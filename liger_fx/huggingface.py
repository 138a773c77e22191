"""Hugging Face: ways in for those who do not compile the model themselves.

``model.compile(backend="liger_fx")`` needs nothing of this. Trainer's ``torch_compile_backend``
takes only the names that accelerate lists, so `LigerFxCallback` compiles in its place, and
`LigerFxPlugin` is for loops over an `accelerate.Accelerator`. Where head and loss are never in one
graph, as under FSDP2, `defer_logits` brings them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from liger_fx.deferred import DeferredLogits, Head
from liger_fx.dynamo import backend


class LigerFxCallback(TrainerCallback):
    """``Trainer(..., callbacks=[LigerFxCallback()])``: compiles the model with liger_fx, in place.

    options: as for `liger_fx.backend`. Raises OptionError, a ValueError.
    """

    def __init__(self, **options: Any) -> None:
        self._backend = backend(**options)

    def on_init_end(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        trained["model"].compile(backend=self._backend)

    def on_train_begin(self, args: Any, state: Any, control: Any, **trained: Any) -> None:
        # With ``model_init``, ``train()`` has made a new model.
        if trained["model"]._compiled_call_impl is None:
            trained["model"].compile(backend=self._backend)


@dataclass
class LigerFxPlugin(TorchDynamoPlugin):
    """``Accelerator(dynamo_plugin=LigerFxPlugin())``: the model is compiled with liger_fx.

    Takes the arguments of `accelerate.utils.TorchDynamoPlugin` but for ``backend``. options: as for
    ``options=`` of `torch.compile`.
    """

    def __post_init__(self) -> None:
        self.backend = "inductor"  # a name that accelerate knows
        super().__post_init__()

    def to_kwargs(self) -> dict[str, Any]:
        return dict(super().to_kwargs()) | {"backend": "liger_fx"}


def defer_logits(model: PreTrainedModel) -> PreTrainedModel:
    """Let the projection of a causal language model return `liger_fx.DeferredLogits`, and the
    model's own loss run on them, fused.

    For a model whose projection and loss are in no graph together: wrapped by FSDP2, compiled layer
    by layer, or not compiled. Before or after wrapping, in place. Returns ``model``. Raises
    ValueError if the output embedding is no plain ``nn.Linear``, as with LoRA on it.
    """
    projection = model.get_output_embeddings()
    if not isinstance(projection, nn.Linear) or type(projection).forward is not nn.Linear.forward:
        raise ValueError(
            f"the output embedding of {type(model).__name__} is {type(projection).__name__}, "
            "expected torch.nn.Linear; the logits of this model cannot be deferred"
        )

    # Neither may be traced: a graph would compute the logits that go into it.
    @torch.compiler.disable
    def forward(hidden: Tensor) -> Tensor:
        return _deferred(projection, hidden)

    projection.forward = forward  # type: ignore[method-assign]
    model.loss_function = torch.compiler.disable(model.loss_function)
    return model


def _deferred(projection: nn.Linear, hidden: Tensor) -> Tensor:
    parameters = [p for p in (projection.weight, projection.bias) if p is not None]
    if any(isinstance(tensor, DTensor) for tensor in (hidden, *parameters)):  # tensor parallelism
        return F.linear(hidden, *parameters)
    device = hidden.device.type
    under_autocast = torch.is_autocast_enabled(device)
    return DeferredLogits(
        Head(F.linear, tuple(parameters)),
        hidden,
        classes=projection.out_features,
        dtype=torch.get_autocast_dtype(device) if under_autocast else hidden.dtype,
        requires_grad=torch.is_grad_enabled()
        and any(t.requires_grad for t in (hidden, *parameters)),
    )
