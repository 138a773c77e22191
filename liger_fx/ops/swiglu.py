"""``liger_fx::swiglu``, ``liger_fx::swiglu_gate_up``: ``silu(gate) * up`` (Shazeer 2020).

The second takes gate and up as the halves of one tensor, as a fused projection makes them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_fx.ops.gated import Activation, gated, gated_halves
from liger_fx.ops.library import block_settings


def _silu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(x)
    value = x * sigmoid
    return value, sigmoid + value * (1 - sigmoid)


def _halves_forward(liger: Any, gate_up: Tensor, out: Tensor) -> None:
    size = out.shape[-1]
    rows = out.numel() // max(size, 1)
    if rows:
        block, warps = block_settings(size)
        liger._swiglu_fused_gate_up_forward_kernel[(rows,)](
            gate_up, out, 2 * size, size, ffn_size=size, BLOCK_SIZE=block, num_warps=warps
        )


def _halves_backward(liger: Any, gate_up: Tensor, out: Tensor, grad: Tensor) -> None:
    size = grad.shape[-1]
    rows = grad.numel() // max(size, 1)
    if rows:
        block, warps = block_settings(size)
        liger._swiglu_fused_gate_up_backward_kernel[(rows,)](
            *(grad, gate_up, out, 2 * size, size),
            ffn_size=size,
            BLOCK_SIZE=block,
            num_warps=warps,
        )


SILU = Activation(
    name="silu",
    plain=F.silu,
    formula=_silu_and_slope,
    liger="swiglu",
    forward_kernel=lambda liger: liger._swiglu_forward_kernel,
    backward_kernel=lambda liger: liger._swiglu_backward_kernel,
    scalars=(1.0,),  # a factor on the gate
    halves_forward=_halves_forward,
    halves_backward=_halves_backward,
)
swiglu = gated("swiglu", SILU)
swiglu_gate_up = gated_halves("swiglu_gate_up", SILU)
