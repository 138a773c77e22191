"""torchtune's recipes with liger_fx where torchtune's own ``compile=True`` cannot reach.

A stock recipe compiles each layer and the loss on their own and runs ``norm -> output`` eagerly
between them, so projection and cross-entropy never meet in a graph. Here the model instance
returns its hidden states, and the loss takes them through torchtune's own ``unembed`` first:
compiled as one region, the projection and the loss are one op.

The same holds for activation checkpointing: torchtune checkpoints *around* each compiled layer, so
the backward runs the whole compiled forward again. With the checkpoint inside the compiled layer
the partitioner recomputes only what the backward needs.
"""

from __future__ import annotations

from liger_fx.torchtune.heads import (
    Head,
    HeadDistillation,
    HeadLogProbs,
    HeadLoss,
    HeadNotFused,
    HeadTokenLogProbs,
    Scores,
    Unprojected,
    fuse_distillation,
    fuse_head,
    fuse_log_probs,
)
from liger_fx.torchtune.parts import compile_layers, compile_loss
from liger_fx.torchtune.recipes import (
    FusedDPORecipe,
    FusedKDRecipe,
    FusedPPORecipe,
    FusedQATRecipe,
    FusedRecipe,
    LayersRecipe,
    entry_point,
    load_recipe,
)

__all__ = [
    "FusedDPORecipe",
    "FusedKDRecipe",
    "FusedPPORecipe",
    "FusedQATRecipe",
    "FusedRecipe",
    "Head",
    "HeadDistillation",
    "HeadLogProbs",
    "HeadLoss",
    "HeadNotFused",
    "HeadTokenLogProbs",
    "LayersRecipe",
    "Scores",
    "Unprojected",
    "compile_layers",
    "compile_loss",
    "entry_point",
    "fuse_distillation",
    "fuse_head",
    "fuse_log_probs",
    "load_recipe",
]
