"""Residual add + RMSNorm of the sum -> ``liger_fx::add_rms_norm``, which returns both.

Matches      ``s = x + r`` and any spelling of `_norms` over ``s``, but DeepSeek-V4's, whoever else
             uses ``s``: the norms before attention, before the MLP and at the end of a decoder.
Leaves alone sums with broadcasting; what `rms_norm` leaves alone. A norm without an add in this
             graph is `rms_norm`'s.
Numerics     The sum is rounded to its dtype before its norm, as the model rounds it. Of two dtypes
             (autocast) the narrower is cast first, as torch does. Without a weight the kernel gets
             ones, by which a product is exact.
"""

from typing import Any

from liger_fx.passes import _norms
from torch import fx

from liger_fx import ops
from liger_fx.canonical import fake, op_name, same_sizes
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite

OF_A_SUM = "of a sum"


def add_torchtune(x, residual, normalized_shape, weight, eps):
    total = x + residual
    return _norms.torchtune(total, normalized_shape, weight, eps), total


def add_torch_module(x, residual, normalized_shape, weight, eps):
    total = x + residual
    return _norms.torch_module(total, normalized_shape, weight, eps), total


def add_gemma(x, residual, weight, eps):
    total = x + residual
    return _norms.gemma(total, weight, eps), total


def add_huggingface(x, residual, weight, eps):
    total = x + residual
    return _norms.huggingface(total, weight, eps), total


def add_olmo(x, residual, weight, eps):
    total = x + residual
    return _norms.olmo(total, weight, eps), total


def add_olmo_promoted(x, residual, weight, eps):
    total = x + residual
    return _norms.olmo_promoted(total, weight, eps), total


def add_unweighted(x, residual, eps):
    total = x + residual
    return _norms.unweighted(total, eps), total


def check(match: Match, x, residual, eps, weight=None, normalized_shape=None):
    for operand in (x, residual):
        if not hasattr(operand, "shape"):
            raise Reject(f"a number, {operand!r}, is added; the kernel adds two tensors")
    if not same_sizes(x.shape, residual.shape):
        raise Reject(f"the sum broadcasts {list(x.shape)} and {list(residual.shape)}")
    _norms.check_norm(match, fake(match.outputs[1]), weight, eps, normalized_shape)


def variant(match: Match) -> str:
    """Inductor computes a sum together with the sum of it that is normed, where the op does not:
    an adapter's and its projection's, or those of parallel branches."""
    operands = (match.bindings[name] for name in ("x", "residual"))
    return OF_A_SUM if any(_is_sum_for(match, operand) for operand in operands) else ""


def _is_sum_for(match: Match, value: Any) -> bool:
    """Is it a sum that nothing beside the match reads?"""
    if not isinstance(value, fx.Node) or op_name(value) != "add":
        return False
    return all(user in match.nodes for user in value.users)


def replace(match: Match, x, residual, weight=None):
    dtype = fake(match.outputs[1]).dtype
    x = x if match.values["x"].dtype == dtype else x.to(dtype)
    residual = residual if match.values["residual"].dtype == dtype else residual.to(dtype)
    if weight is None:
        weight = x.new_ones(x.size(-1))
    both = ops.add_rms_norm(x, residual, weight, *_norms.literals(match))
    return both[0], both[1]


add_rms_norm = Rewrite(
    name="add_rms_norm",
    patterns=[
        add_torchtune,
        add_torch_module,
        add_gemma,
        add_huggingface,
        add_olmo,
        add_olmo_promoted,
        add_unweighted,
    ],
    check=check,
    replace=replace,
    variant=variant,
    measured_apart=[OF_A_SUM],
    saved=["weight", "output"],
)
