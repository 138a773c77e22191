"""``liger_fx::geglu``, ``geglu_exact``: ``gelu(gate) * up`` (Shazeer 2020).

``gelu(x) = x / 2 (1 + erf(x / sqrt(2)))`` is the exact GELU, for which Liger has no kernel, and
``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`` its tanh approximation (Hendrycks and Gimpel
2016). ``<name>_gate_up`` takes gate and up as the halves of one tensor.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from liger_fx.ops.gated import Activation, gated, gated_halves


def _gelu_tanh_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (x + 0.044715 * x**3))
    half = 0.5 * (1 + tanh)
    inner = scale * (1 + 3 * 0.044715 * x**2)
    return x * half, half + 0.5 * x * (1 - tanh**2) * inner


def _gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * cdf, cdf + x * torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


GELU_TANH = Activation(
    name="gelu_tanh",
    plain=functools.partial(F.gelu, approximate="tanh"),
    formula=_gelu_tanh_and_slope,
    liger="geglu",
    forward_kernel=lambda liger: liger._geglu_tanh_forward_kernel,
    backward_kernel=lambda liger: liger._geglu_tanh_backward_kernel,
)
GELU = Activation(name="gelu", plain=F.gelu, formula=_gelu_and_slope, liger="geglu")

geglu = gated("geglu", GELU_TANH)
geglu_gate_up = gated_halves("geglu_gate_up", GELU_TANH)
geglu_exact = gated("geglu_exact", GELU)
geglu_exact_gate_up = gated_halves("geglu_exact_gate_up", GELU)
