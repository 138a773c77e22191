"""What torchtune's ``compile=True`` compiles, each on its own: the layers, and the losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import TransformerCrossAttentionLayer, TransformerSelfAttentionLayer

from liger_fx.offload import Offload

LAYERS = (TransformerSelfAttentionLayer, TransformerCrossAttentionLayer)
# Where a chunked loss of torchtune's keeps the part that runs on one chunk, and is compiled.
CHUNK_LOSSES = ("compute_cross_entropy", "fkl_loss", "rkl_loss", "sym_kl_loss")


def compile_layers(
    model: nn.Module,
    options: Mapping[str, Any] | None = None,
    *,
    checkpoint_inside: bool = True,
    offload: Offload | None = None,
) -> None:
    """Compile each transformer layer, with its activation checkpoint inside if it has one. offload:
    moves what the layers save, where the checkpoint is inside."""
    checkpoints = {
        module._checkpoint_wrapped_module: module
        for module in model.modules()
        if isinstance(module, CheckpointWrapper)
    }
    for layer in list(layers_of(model)):
        layer._compiled_call_impl = None  # the recipe may have compiled it without its checkpoint
        target = checkpoints.get(layer, layer) if checkpoint_inside else layer
        # The hooks of FSDP, which Dynamo does not trace, stay outside.
        sharded = isinstance(target, FSDPModule)
        compiled = torch.compile(target.forward if sharded else target._call_impl, **_how(options))
        if offload is not None:
            compiled = offload.around(compiled, target)
        setattr(target, "forward" if sharded else "_compiled_call_impl", compiled)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer layers of a torchtune model, of a vision model those of its decoder."""
    decoder = getattr(model, "decoder", model)
    return (module for module in decoder.modules() if isinstance(module, LAYERS))


def compile_loss(loss_fn: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Compile, in place, what torchtune compiles of a loss: all of it, or what runs on one chunk.

    In place, since five recipes drop what torchtune's function of this name returns.
    """
    part = next((name for name in CHUNK_LOSSES if hasattr(loss_fn, name)), "forward")
    setattr(loss_fn, part, torch.compile(getattr(loss_fn, part), **_how(options)))


def of_one_chunk(loss_fn: Any) -> Any:
    """What a chunked divergence takes of each chunk, or else the divergence itself."""
    return next((getattr(loss_fn, n) for n in CHUNK_LOSSES if hasattr(loss_fn, n)), loss_fn)


def _how(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"backend": "liger_fx", "options": dict(options or {}) or None}
