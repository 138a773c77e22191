"""Opaque, functional operators over Liger's kernels, one a file.

Each is registered with `torch.library` under ``liger_fx::``.
"""

from liger_fx.ops.linear_cross_entropy import linear_cross_entropy
from liger_fx.ops.linear_cross_entropy_per_token import (
    linear_cross_entropy_per_token,
    linear_cross_entropy_per_token_backward,
)

__all__ = [
    "linear_cross_entropy",
    "linear_cross_entropy_per_token",
    "linear_cross_entropy_per_token_backward",
]
