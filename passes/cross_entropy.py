"""``F.cross_entropy`` of logits that come from elsewhere -> ``liger_fx::cross_entropy``.

Matches      Logits [N, V] as a graph gets them, with an upcast or without: the compiled loss of a
             stock torchtune recipe, ``cross_entropy(chunk.float(), labels)``, and what
             `linear_cross_entropy` could not take. ``mean``, ``sum``, ``none``; any ignore_index;
             label smoothing; class weights.
Leaves alone probability targets; classes in another dimension than the last; float64.
Numerics     Computed in fp32; the gradient is rounded once. The logits are never written to.
             ``mean`` stays a division in the graph: 0 valid tokens give nan, as in eager.
"""

import torch
import torch.nn.functional as F
from liger_fx.passes._norms import DTYPES

from liger_fx import ops
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite


def upcast(logits, target, class_weight, ignore_index, reduction, label_smoothing):
    return F.cross_entropy(
        logits.float(), target, class_weight, None, ignore_index, None, reduction, label_smoothing
    )


def plain(logits, target, class_weight, ignore_index, reduction, label_smoothing):
    return F.cross_entropy(
        logits, target, class_weight, None, ignore_index, None, reduction, label_smoothing
    )


def check(match: Match, logits, target, ignore_index):
    if target.is_floating_point():
        raise Reject("the target is class probabilities, not class indices")
    if logits.dim() != 2 or target.dim() != 1:
        raise Reject(f"the logits are {logits.dim()}-D, expected 2-D [tokens, classes]")
    if logits.dtype not in DTYPES or match.output.dtype == torch.float64:
        raise Reject(f"the loss is computed in {match.output.dtype}; the kernel in float32")
    if not isinstance(ignore_index, int):
        raise Reject("ignore_index is computed in the graph, expected a constant")


def replace(match: Match, logits, target, class_weight, ignore_index, reduction, label_smoothing):
    wide = class_weight
    if class_weight is not None and match.values["class_weight"].dtype != torch.float32:
        wide = class_weight.float()
    loss = ops.cross_entropy(logits, target, wide, ignore_index, float(label_smoothing))
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / _denominator(target, wide, ignore_index)
    return loss if match.output.dtype == torch.float32 else loss.to(match.output.dtype)


def _denominator(target, class_weight, ignore_index):
    valid = target != ignore_index
    if class_weight is None:
        return valid.sum()
    return (class_weight[target.where(valid, 0)] * valid).sum()


cross_entropy = Rewrite(
    name="cross_entropy",
    patterns=[upcast, plain],
    check=check,
    replace=replace,
    saved=["logits", "target", "class_weight"],
)
