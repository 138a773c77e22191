"""A gated MLP -> ``liger_fx::swiglu_mlp``, ``geglu_mlp``, ``geglu_exact_mlp``, by tiles of tokens.

Matches      The MLP of Llama-like decoders (SiLU), of Gemma (GELU's tanh approximation) and of T5
             (exact GELU), without biases, with gate and up as projections of their own, or as
             halves of one projection, the gate first (Phi-3, GLM).
Leaves alone MLPs with biases, adapters or quantised weights; inside an activation checkpoint those
             whose output the backward needs: the op computes gate and up again in its backward,
             and the checkpoint would run the whole op once more.
Numerics     Each product is rounded as in eager; weight gradients are summed over tiles in fp32.
             With the setting ``skip_padding`` a token whose gradient is exactly zero is left out of
             the backward: if it is inf or nan, eager's weight gradients are nan and these are not.
"""

import torch.nn.functional as F
from liger_fx.passes._norms import DTYPES, MAX_COLUMNS
from liger_fx.passes._rows import cast_as_autocast
from torch import fx

from liger_fx import ops
from liger_fx.canonical import fake, op_name, same_sizes
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite


def swiglu(x, w_gate, w_up, w_down):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def geglu(x, w_gate, w_up, w_down):
    gate = F.gelu(F.linear(x, w_gate), approximate="tanh")
    return F.linear(gate * F.linear(x, w_up), w_down)


def geglu_exact(x, w_gate, w_up, w_down):
    return F.linear(F.gelu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def swiglu_in_one(x, w_gate_up, w_down):
    halves = F.linear(x, w_gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(halves[0]) * halves[1], w_down)


def geglu_in_one(x, w_gate_up, w_down):
    halves = F.linear(x, w_gate_up).chunk(2, dim=-1)
    return F.linear(F.gelu(halves[0], approximate="tanh") * halves[1], w_down)


def geglu_exact_in_one(x, w_gate_up, w_down):
    halves = F.linear(x, w_gate_up).chunk(2, dim=-1)
    return F.linear(F.gelu(halves[0]) * halves[1], w_down)


def swiglu_with_biases(x, w_gate, b_gate, w_up, b_up, w_down, b_down):
    product = F.silu(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)
    return F.linear(product, w_down, b_down)


OPS = {
    "swiglu": ops.swiglu_mlp,
    "geglu": ops.geglu_mlp,
    "geglu_exact": ops.geglu_exact_mlp,
}


def check(match: Match, w_down, w_gate=None, w_up=None, w_gate_up=None):
    if w_gate_up is not None:
        if w_gate_up.dim() != 2 or str(w_gate_up.shape[0] % 2) != "0":  # of symbols as well
            raise Reject(f"the weight of gate and up is {list(w_gate_up.shape)}: it has no halves")
        w_gate, w_up = w_gate_up.chunk(2)
    if any(w.dim() != 2 for w in (w_gate, w_up, w_down)):
        raise Reject("a projection's weight is not 2-D")
    if not same_sizes(w_gate.shape, w_up.shape):
        raise Reject(f"the product broadcasts {list(w_gate.shape)} and {list(w_up.shape)}")
    dtypes = {str(fake(node).dtype) for node in match.nodes if op_name(node) == "linear"}
    if len(dtypes) > 1:
        raise Reject(f"the projections run in {' and '.join(sorted(dtypes))}; the op takes one")
    if match.output.dtype not in DTYPES:
        raise Reject(f"the output is {match.output.dtype}; the kernel computes in float32")
    columns = w_gate.shape[0]
    if isinstance(columns, int) and columns > MAX_COLUMNS:
        raise Reject(f"gates have {columns} elements; the kernel takes at most {MAX_COLUMNS}")
    if match.recomputed and not _only_returned(match.root):
        raise Reject(
            "the backward needs the MLP's output: in this checkpoint the op would run once more"
        )


def _only_returned(node: fx.Node) -> bool:
    """Is the value, or a sum with it, read by nothing in the graph?"""
    return all(
        user.op == "output"
        or (op_name(user) in ("add", "reshape", "cast") and _only_returned(user))
        for user in node.users
    )


def replace(match: Match, x, w_down, w_gate=None, w_up=None, w_gate_up=None):
    op = OPS[match.pattern.name.removesuffix("_in_one")]
    given = {"x": x, "w_gate": w_gate, "w_up": w_up, "w_gate_up": w_gate_up, "w_down": w_down}
    given = {name: proxy for name, proxy in given.items() if proxy is not None}
    cast = dict(zip(given, cast_as_autocast(match, match.output.dtype, given), strict=True))
    if w_gate_up is not None:
        halves = cast.pop("w_gate_up").chunk(2)
        cast |= {"w_gate": halves[0], "w_up": halves[1]}
    return op(
        *(cast[name] for name in ("x", "w_gate", "w_up", "w_down")),
        match.settings["tile_tokens"],
        match.settings["skip_padding"],
    )


tiled_mlp = Rewrite(
    name="tiled_mlp",
    patterns=[swiglu, geglu, geglu_exact, swiglu_in_one, geglu_in_one, geglu_exact_in_one],
    refuses=[(swiglu_with_biases, "the projections have biases; the op has none")],
    check=check,
    replace=replace,
    saved=["x", "w_gate", "w_up", "w_gate_up", "w_down"],
    settings={"tile_tokens": 0, "skip_padding": False},
)
