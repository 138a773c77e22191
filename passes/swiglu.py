"""``silu(gate) * up`` -> ``liger_fx::swiglu``.

Matches      SiLU times anything of its shape, in either order (all Llama-like MLPs, LoRA's sums in
             between as well); gate and up as halves of one projection, the gate first (Hugging
             Face's Phi-3), which stay where they are: ``liger_fx::swiglu_gate_up``. GPT-OSS's gate,
             ``(up + 1) * gate * sigmoid(alpha * gate)`` of clamped values, interleaved or in
             halves: ``liger_fx::clamped_swiglu``.
Leaves alone gates and ups that are no contiguous tensors of one shape and dtype, or share memory.
Numerics     silu(gate) in fp32, rounded to the dtype before the product, as in eager. GPT-OSS's is
             rounded once, and not after each step.
"""

import torch
import torch.nn.functional as F
from liger_fx.passes._gated import check_gated, check_halves, may_overwrite

from liger_fx import ops
from liger_fx.canonical import hint, specialise
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite


def gate_up_halves(gate_up):
    halves = gate_up.chunk(2, dim=-1)
    return F.silu(halves[0]) * halves[1]


def separate(gate, up):
    return F.silu(gate) * up


def clamped(gate_up, alpha, limit, least):
    """GPT-OSS's."""
    return _clamped(gate_up[..., ::2], gate_up[..., 1::2], alpha, limit, least)


def clamped_halves(gate_up, alpha, limit, least):
    """MiniMax M3's."""
    halves = gate_up.chunk(2, dim=-1)
    return _clamped(halves[0], halves[1], alpha, limit, least)


def _clamped(gate, up, alpha, limit, least):
    gate = gate.clamp(None, limit)
    return (up.clamp(least, limit) + 1) * (gate * torch.sigmoid(gate * alpha))


def check(match: Match, gate=None, up=None, gate_up=None, alpha=None, limit=None, least=None):
    if gate_up is None:
        check_gated(match, gate, up)
        return
    check_halves(match, gate_up)
    if alpha is not None:
        numbers = [hint(number) for number in (alpha, limit, least)]
        if None in numbers:
            raise Reject("the limits and the factor of the gate are not all constants")
        if limit < 0 or least != -limit:
            raise Reject(f"up is clamped to {least} and {limit}, expected one limit on both sides")


def replace(match: Match, gate=None, up=None, gate_up=None):
    if match.pattern.name.startswith("clamped"):
        numbers = [specialise(match.values[name]) for name in ("alpha", "limit")]
        return ops.clamped_swiglu(gate_up, *numbers, match.pattern.name == "clamped")
    if gate_up is None:
        return ops.swiglu(gate, up, may_overwrite(match, "gate", "up"))
    return ops.swiglu_gate_up(gate_up, may_overwrite(match, "gate_up"))


swiglu = Rewrite(
    name="swiglu",
    patterns=[gate_up_halves, separate, clamped, clamped_halves],
    check=check,
    replace=replace,
    saved=["gate", "up", "gate_up"],
)
