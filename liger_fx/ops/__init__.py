"""Opaque, functional operators over Liger's kernels.

Each is registered with `torch.library` under ``liger_fx::``.
"""

from liger_fx.ops.add_rms_norm import add_rms_norm
from liger_fx.ops.attention import (
    attention,
    document_plan,
    masked_attention,
    padding_plan,
    sequence_plan,
)
from liger_fx.ops.chunked_head import fits_one_chunk
from liger_fx.ops.clamped_swiglu import clamped_swiglu
from liger_fx.ops.cross_entropy import cross_entropy
from liger_fx.ops.embedding import embedding
from liger_fx.ops.geglu import geglu, geglu_exact, geglu_exact_gate_up, geglu_gate_up
from liger_fx.ops.layer_norm import layer_norm
from liger_fx.ops.linear_loss import linear_loss, linear_token_losses
from liger_fx.ops.rms_norm import rms_norm
from liger_fx.ops.rope import rope, rope_interleaved
from liger_fx.ops.swiglu import swiglu, swiglu_gate_up
from liger_fx.ops.tiled_mlp import geglu_exact_mlp, geglu_mlp, swiglu_mlp
from liger_fx.ops.token_loss import DIVERGENCES, TAKES

__all__ = [
    "DIVERGENCES",
    "TAKES",
    "add_rms_norm",
    "attention",
    "clamped_swiglu",
    "cross_entropy",
    "document_plan",
    "embedding",
    "fits_one_chunk",
    "geglu",
    "geglu_exact",
    "geglu_exact_gate_up",
    "geglu_exact_mlp",
    "geglu_gate_up",
    "geglu_mlp",
    "layer_norm",
    "linear_loss",
    "linear_token_losses",
    "masked_attention",
    "padding_plan",
    "rms_norm",
    "rope",
    "rope_interleaved",
    "sequence_plan",
    "swiglu",
    "swiglu_gate_up",
    "swiglu_mlp",
]
