"""LayerNorm -> ``liger_fx::layer_norm``.

Matches      ``F.layer_norm`` of the last dimension (nn.LayerNorm), also between casts of input and
             parameters (torchtune's Fp32LayerNorm).
Leaves alone norms of several dimensions, or without weight or bias; float64; outputs of another
             dtype than the input.
Numerics     Computed in fp32, rounded once, as torch does.
"""

import torch.nn.functional as F
from liger_fx.passes._norms import DTYPES, as_eager_reads, check_rows

from liger_fx import ops
from liger_fx.canonical import hint, specialise
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite


def fp32_layer_norm(x, normalized_shape, weight, bias, eps):
    return F.layer_norm(x.float(), normalized_shape, weight.float(), bias.float(), eps).to(x.dtype)


def torch_module(x, normalized_shape, weight, bias, eps):
    return F.layer_norm(x, normalized_shape, weight, bias, eps)


def check(match: Match, x, normalized_shape, weight, bias, eps):
    if len(normalized_shape) != 1:
        raise Reject(f"it normalises {len(normalized_shape)} dimensions; the kernel takes the last")
    if weight is None or bias is None:
        raise Reject("the norm lacks weight or bias; the kernel takes both")
    if weight.dtype not in DTYPES or weight.dtype != bias.dtype:
        raise Reject(f"weight and bias are {weight.dtype} and {bias.dtype}")
    if hint(eps) is None:
        raise Reject("eps is computed in the graph, expected a constant")
    check_rows(match, x)


def replace(match: Match, x, weight, bias):
    return ops.layer_norm(as_eager_reads(match, x), weight, bias, specialise(match.values["eps"]))


layer_norm = Rewrite(
    name="layer_norm",
    patterns=[fp32_layer_norm, torch_module],
    check=check,
    replace=replace,
    saved=["x", "weight"],
)
