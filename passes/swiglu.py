"""``silu(gate) * up`` -> ``liger_fx::swiglu``.

Matches      SiLU times anything of its shape, in either order (all Llama-like MLPs, LoRA's sums in
             between as well); gate and up as halves of one projection, the gate first (Hugging
             Face's Phi-3), which stay where they are: ``liger_fx::swiglu_gate_up``.
Leaves alone gates and ups that are no contiguous tensors of one shape and dtype, or share memory.
Numerics     silu(gate) in fp32, rounded to the dtype before the product, as in eager.
"""

import torch.nn.functional as F
from liger_fx.passes._gated import check_gated, may_overwrite
from liger_fx.passes._norms import DTYPES, check_columns

from liger_fx import ops
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite


def gate_up_halves(gate_up):
    halves = gate_up.chunk(2, dim=-1)
    return F.silu(halves[0]) * halves[1]


def separate(gate, up):
    return F.silu(gate) * up


def check(match: Match, gate=None, up=None, gate_up=None):
    if gate_up is None:
        check_gated(match, gate, up)
        return
    check_columns(match.output)
    if gate_up.dtype not in DTYPES:
        raise Reject(f"gate and up are {gate_up.dtype}; the kernel computes in float32")
    if not gate_up.is_contiguous():
        raise Reject("the tensor of gate and up is not contiguous: the kernel would need a copy")


def replace(match: Match, gate=None, up=None, gate_up=None):
    if gate_up is None:
        return ops.swiglu(gate, up, may_overwrite(match, "gate", "up"))
    return ops.swiglu_gate_up(gate_up, may_overwrite(match, "gate_up"))


swiglu = Rewrite(
    name="swiglu",
    patterns=[gate_up_halves, separate],
    check=check,
    replace=replace,
    saved=["gate", "up", "gate_up"],
)
