"""``liger_fx::geglu``: ``gelu(gate) * up`` with the tanh approximation of GELU (Shazeer 2020).

``gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`` (Hendrycks and Gimpel 2016). Liger
has no kernel for the exact GELU.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_fx.ops.gated import Activation, gated


def _gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (x + 0.044715 * x**3))
    half = 0.5 * (1 + tanh)
    inner = scale * (1 + 3 * 0.044715 * x**2)
    return x * half, half + 0.5 * x * (1 - tanh**2) * inner


GELU_TANH = Activation(
    liger="geglu",
    plain=functools.partial(F.gelu, approximate="tanh"),
    formula=_gelu_and_slope,
    forward_kernel=lambda liger: liger._geglu_tanh_forward_kernel,
    backward_kernel=lambda liger: liger._geglu_tanh_backward_kernel,
)
geglu = gated("geglu", GELU_TANH)
