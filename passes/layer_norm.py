"""LayerNorm -> ``liger_fx::layer_norm``.

Matches      ``F.layer_norm`` of the last dimension (nn.LayerNorm), also between casts of input and
             parameters (torchtune's Fp32LayerNorm, OLMo); with weight and bias, without a bias, and
             without both; Cohere's, which is written out in fp32.
Leaves alone norms of several dimensions, or with a bias and no weight; weights for each head;
             float64; outputs of another dtype than the input.
Numerics     Computed in fp32, rounded once, as torch does.
"""

import torch
import torch.nn.functional as F
from liger_fx.passes._norms import DTYPES, as_eager_reads, check_rows

from liger_fx import ops
from liger_fx.canonical import hint, same_sizes, specialise
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite


def fp32_layer_norm(x, normalized_shape, weight, bias, eps):
    return F.layer_norm(x.float(), normalized_shape, weight.float(), bias.float(), eps).to(x.dtype)


def fp32_without_bias(x, normalized_shape, weight, eps):
    return F.layer_norm(x.float(), normalized_shape, weight.float(), None, eps).to(x.dtype)


def fp32_without_parameters(x, normalized_shape, eps):
    """OLMo's."""
    return F.layer_norm(x.float(), normalized_shape, None, None, eps).to(x.dtype)


def torch_module(x, normalized_shape, weight, bias, eps):
    return F.layer_norm(x, normalized_shape, weight, bias, eps)


def cohere(x, weight, eps):
    f = x.float()
    centred = f - f.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * normed).to(x.dtype)


def check(match: Match, x, eps, weight=None, bias=None, normalized_shape=None):
    if normalized_shape is not None and len(normalized_shape) != 1:
        raise Reject(f"it normalises {len(normalized_shape)} dimensions; the kernel takes the last")
    if weight is None and bias is not None:
        raise Reject("the norm has a bias and no weight")
    if weight is not None and not same_sizes(weight.shape, x.shape[-1:]):
        raise Reject(
            f"the weight is {list(weight.shape)}, expected {list(x.shape[-1:])}: the kernel reads "
            "one weight for each column"
        )
    if weight is not None and weight.dtype not in DTYPES:
        raise Reject(f"the weight is {weight.dtype}; the kernel computes in float32")
    if bias is not None and weight.dtype != bias.dtype:
        raise Reject(f"weight and bias are {weight.dtype} and {bias.dtype}, expected one dtype")
    if hint(eps) is None:
        raise Reject("eps is computed in the graph, expected a constant")
    check_rows(match, x)


def replace(match: Match, x, weight=None, bias=None):
    return ops.layer_norm(as_eager_reads(match, x), weight, bias, specialise(match.values["eps"]))


layer_norm = Rewrite(
    name="layer_norm",
    patterns=[
        fp32_layer_norm,
        fp32_without_bias,
        fp32_without_parameters,
        torch_module,
        cohere,
    ],
    check=check,
    replace=replace,
    saved=["x", "weight"],
)
