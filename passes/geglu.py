"""``gelu(gate) * up`` with GELU's tanh approximation -> ``liger_fx::geglu``.

Matches      ``F.gelu(gate, approximate="tanh")`` times anything of its shape, in either order
             (Gemma).
Leaves alone the exact GELU (T5), for which Liger has no kernel; what `swiglu` leaves alone.
Numerics     gelu(gate) in fp32, rounded to the dtype before the product, as in eager.
"""

import torch.nn.functional as F
from liger_fx.passes._gated import check_gated, may_overwrite

from liger_fx import ops
from liger_fx.matcher import Match
from liger_fx.rewrite import Rewrite


def tanh(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def exact(gate, up):
    return F.gelu(gate) * up


def check(match: Match, gate, up):
    check_gated(match, gate, up)


def replace(match: Match, gate, up):
    return ops.geglu(gate, up, may_overwrite(match, "gate", "up"))


geglu = Rewrite(
    name="geglu",
    patterns=[tanh],
    refuses=[(exact, "GELU is exact here; Liger's kernel computes the tanh approximation")],
    check=check,
    replace=replace,
    saved=["gate", "up"],
)
