"""An activation that a projection reads -> the same in an activation checkpoint of its own.

Matches      The gated activations of `swiglu` and `geglu`, in all spellings, that no kernel
             computes; GELU, exact or by the tanh approximation, and squared ReLU.
Leaves alone activations that a checkpoint recomputes, that anything but a matrix product reads,
             or whose readers' weights are frozen; those of inputs that have no gradient.
Numerics     The same operations in the same order.
"""

import torch.nn.functional as F
from liger_fx.passes._recompute import recompute
from liger_fx.passes.geglu import geglu
from liger_fx.passes.swiglu import swiglu


def gelu(x):
    return F.gelu(x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def squared_relu(x):
    return F.relu(x).pow(2)


recompute_activation = recompute(
    "activation", [*swiglu.patterns, *geglu.patterns, squared_relu, gelu, gelu_tanh]
)
