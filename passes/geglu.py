"""``gelu(gate) * up`` -> ``liger_fx::geglu`` or ``liger_fx::geglu_exact``.

Matches      GELU, exact (T5, ModernBERT) or in its tanh approximation (Gemma), times anything of
             its shape, in either order; gate and up as halves of one projection, the gate first.
Leaves alone what `swiglu` leaves alone.
Numerics     gelu(gate) in fp32, rounded to the dtype before the product, as in eager.
"""

import torch.nn.functional as F
from liger_fx.passes._gated import check_gated, check_halves, may_overwrite

from liger_fx import ops
from liger_fx.matcher import Match
from liger_fx.rewrite import Rewrite


def tanh_halves(gate_up):
    halves = gate_up.chunk(2, dim=-1)
    return F.gelu(halves[0], approximate="tanh") * halves[1]


def tanh(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def exact_halves(gate_up):
    halves = gate_up.chunk(2, dim=-1)
    return F.gelu(halves[0]) * halves[1]


def exact(gate, up):
    return F.gelu(gate) * up


OPS = {
    "tanh": ops.geglu,
    "tanh_halves": ops.geglu_gate_up,
    "exact": ops.geglu_exact,
    "exact_halves": ops.geglu_exact_gate_up,
}


def check(match: Match, gate=None, up=None, gate_up=None):
    if gate_up is None:
        check_gated(match, gate, up)
    else:
        check_halves(match, gate_up)


def replace(match: Match, gate=None, up=None, gate_up=None):
    given = {"gate": gate, "up": up} if gate_up is None else {"gate_up": gate_up}
    return OPS[match.pattern.name](*given.values(), may_overwrite(match, *given))


geglu = Rewrite(
    name="geglu",
    patterns=[tanh_halves, tanh, exact_halves, exact],
    check=check,
    replace=replace,
    saved=["gate", "up", "gate_up"],
)
