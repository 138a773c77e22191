"""A gated MLP -> ``liger_fx::swiglu_mlp``, ``geglu_mlp``, ``geglu_exact_mlp``, by tiles of tokens.

Matches      The MLP of Llama-like decoders (SiLU), of Gemma (GELU's tanh approximation) and of T5
             (exact GELU), without biases, with gate and up as projections of their own, or as
             halves of one projection, the gate first (Phi-3, GLM). Any of gate, up and down may
             have a LoRA adapter (torchtune, PEFT), in the dtype of its weight or a wider one.
Leaves alone MLPs with biases or quantised weights; adapters with dropout, DoRA, and adapters on
             gate and up in one projection; inside an activation checkpoint those whose output the
             backward needs: the op computes gate and up again in its backward, and the checkpoint
             would run the whole op once more.
Numerics     Each product is rounded as in eager, that of an adapter's B only in its sum with that
             of the weight. Weight gradients are summed over tiles in fp32.
             With the setting ``skip_padding`` a token whose gradient is exactly zero is left out of
             the backward: if it is inf or nan, eager's weight gradients are nan and these are not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from liger_fx.passes._norms import DTYPES, MAX_COLUMNS
from liger_fx.passes._rows import cast_as_autocast
from torch import fx

from liger_fx import ops
from liger_fx.canonical import fake, hint, op_name, same_sizes, specialise
from liger_fx.matcher import Match, Reject
from liger_fx.pattern import binding, chain, either
from liger_fx.rewrite import Rewrite

# -- a projection; its bindings are named after it: w_gate, a_gate, b_gate, scale_gate -------------


def projection(x, name):
    """With or without an adapter."""
    base = F.linear(x, _bound("w", name, x))
    return either(_with_adapter(base, _adapter(x, name), name), base)


def _bound(what, name, x):
    return binding(f"{what}_{name}")(x)


def _adapter(x, name, bias=None, dropout=lambda x: x):
    """PEFT casts the input to the dtype of the adapter."""
    casts = chain(f"casts_{name}", lambda node: op_name(node) == "cast")
    inner = F.linear(dropout(either(x, casts(x))), _bound("a", name, x))
    return F.linear(inner, _bound("b", name, x), bias)


def _with_adapter(base, adapter, name):
    """PEFT casts the sum to the dtype of the base."""
    scaled = _bound("scale", name, adapter) * adapter
    return (base + either(scaled, adapter)).to(base.dtype)


def swiglu(x):
    return projection(F.silu(projection(x, "gate")) * projection(x, "up"), "down")


def geglu(x):
    gate = F.gelu(projection(x, "gate"), approximate="tanh")
    return projection(gate * projection(x, "up"), "down")


def geglu_exact(x):
    return projection(F.gelu(projection(x, "gate")) * projection(x, "up"), "down")


def swiglu_in_one(x):
    halves = projection(x, "gate_up").chunk(2, dim=-1)
    return projection(F.silu(halves[0]) * halves[1], "down")


def geglu_in_one(x):
    halves = projection(x, "gate_up").chunk(2, dim=-1)
    return projection(F.gelu(halves[0], approximate="tanh") * halves[1], "down")


def geglu_exact_in_one(x):
    halves = projection(x, "gate_up").chunk(2, dim=-1)
    return projection(F.gelu(halves[0]) * halves[1], "down")


# -- near twins ------------------------------------------------------------------------------------


def with_biases(x, name):
    base = F.linear(x, _bound("w", name, x), _bound("bias", name, x))
    return either(_with_adapter(base, _adapter(x, name, _bound("bias_b", name, x)), name), base)


def with_dropout(x, name):
    base = F.linear(x, _bound("w", name, x))
    adapter = _adapter(x, name, dropout=lambda x: F.dropout(x, _bound("p", name, x)))
    return either(_with_adapter(base, adapter, name), projection(x, name))


def dora(x, name):
    base, adapter = F.linear(x, _bound("w", name, x)), _adapter(x, name)
    of_base, of_adapter = (_bound(f"magnitude_of_{part}", name, x) for part in ("base", "adapter"))
    added = of_base * base + of_adapter * adapter * _bound("scale", name, x)
    return either(added + base, projection(x, name))


def with_another_base(x, name):
    base = _bound("base", name, x)
    return either(_with_adapter(base, _adapter(x, name), name), projection(x, name))


def _twin(project: Callable[..., Any]) -> Callable[..., Any]:
    def mlp(x):
        gate = project(x, "gate")
        active = either(F.silu(gate), either(F.gelu(gate, approximate="tanh"), F.gelu(gate)))
        return project(active * project(x, "up"), "down")

    return mlp


# -- what is replaced ------------------------------------------------------------------------------

PROJECTIONS = ("gate", "up", "gate_up", "down")
LORA = "LoRA"  # most weights are frozen then: the op's own work is more of the whole

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
    dtypes = _dtypes(match, *(f"w_{name}" for name in PROJECTIONS))
    if len(dtypes) > 1:
        raise Reject(f"the projections run in {_listed(dtypes)}; the op takes one")
    if match.output.dtype not in DTYPES:
        raise Reject(f"the output is {match.output.dtype}; the kernel computes in float32")
    columns = w_gate.shape[0]
    if isinstance(columns, int) and columns > MAX_COLUMNS:
        raise Reject(f"gates have {columns} elements; the kernel takes at most {MAX_COLUMNS}")
    if match.recomputed and not _only_returned(match.root):
        raise Reject(
            "the backward needs the MLP's output: in this checkpoint the op would run once more"
        )
    for name in _adapted(match):
        _check_adapter(match, name)


def _adapted(match: Match) -> list[str]:
    """The projections that have an adapter."""
    return [name for name in PROJECTIONS if f"a_{name}" in match.bindings]


def _dtypes(match: Match, *names: str) -> set[torch.dtype]:
    """In which the projections by these weights run: under autocast not in those of the weights."""
    weights = [match.bindings[name] for name in names if name in match.bindings]
    linears = (node for node in match.nodes if op_name(node) == "linear")
    return {fake(node).dtype for node in linears if match.view.expr(node).args[1] in weights}


def _listed(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(map(str, dtypes)))


def _check_adapter(match: Match, name: str) -> None:
    values, dtype = match.values, match.output.dtype
    weight, a, b = (values[f"{factor}_{name}"] for factor in "wab")
    if name == "gate_up":
        raise Reject("the adapter of gate and up is one; the op takes one for each")
    if a.dim() != 2 or b.dim() != 2 or not same_sizes(b.shape[:1], weight.shape[:1]):
        raise Reject(
            f"the factors of the adapter of {name} are {list(a.shape)} and {list(b.shape)}, "
            f"expected 2-D, with the rows of its weight {list(weight.shape)} in the second"
        )
    if hint(values.get(f"scale_{name}", 1.0)) is None:
        raise Reject(f"the scale of the adapter of {name} is computed, expected a constant")
    dtypes = _dtypes(match, f"a_{name}", f"b_{name}")
    if len(dtypes) > 1 or not _holds(max(dtypes, key=lambda d: d.itemsize), dtype):
        raise Reject(
            f"the adapter of {name} runs in {_listed(dtypes)}, its projection in {dtype}; the op "
            "takes one dtype that holds the other's numbers"
        )
    (wide,) = dtypes
    if wide not in DTYPES:
        raise Reject(f"the adapter of {name} runs in {wide}; the kernel computes in float32")
    for node in match.chains.get(f"casts_{name}", ()):
        before, after = fake(node.args[0]).dtype, fake(node).dtype
        if not _holds(after, before):
            raise Reject(f"the adapter of {name} reads its input rounded to {after}")
    if wide != dtype and values["x"].dtype != dtype:
        raise Reject(
            f"the adapter of {name} runs in {wide} and reads an input in {values['x'].dtype}, "
            f"which its projection reads in {dtype}"
        )


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Is every number of the one dtype one of the other?"""
    return torch.promote_types(wide, narrow) == wide


def _only_returned(node: fx.Node) -> bool:
    """Is the value, or a sum with it, read by nothing in the graph?"""
    return all(
        user.op == "output"
        or (op_name(user) in ("add", "reshape", "cast") and _only_returned(user))
        for user in node.users
    )


def replace(match: Match, **given):
    op = OPS[match.pattern.name.removesuffix("_in_one")]
    names = ("x", *(f"w_{name}" for name in PROJECTIONS))
    plain = {name: given[name] for name in names if name in given}
    cast = dict(zip(plain, cast_as_autocast(match, match.output.dtype, plain), strict=True))
    if "w_gate_up" in cast:
        halves = cast.pop("w_gate_up").chunk(2)
        cast |= {"w_gate": halves[0], "w_up": halves[1]}
    adapters: dict[str, Any] = {}
    for name in _adapted(match):
        factors = {factor: given[factor] for factor in (f"a_{name}", f"b_{name}")}
        (dtype,) = _dtypes(match, *factors)
        adapters |= dict(zip(factors, cast_as_autocast(match, dtype, factors), strict=True))
        adapters[f"scale_{name}"] = specialise(match.values.get(f"scale_{name}", 1.0))
    return op(
        *(cast[name] for name in ("x", "w_gate", "w_up", "w_down")),
        match.settings["tile_tokens"],
        match.settings["skip_padding"],
        **adapters,
    )


tiled_mlp = Rewrite(
    name="tiled_mlp",
    patterns=[swiglu, geglu, geglu_exact, swiglu_in_one, geglu_in_one, geglu_exact_in_one],
    refuses=[
        (_twin(with_biases), "the projections have biases; the op has none"),
        (_twin(with_dropout), "dropout before an adapter; the op has none"),
        (_twin(dora), "DoRA scales each row of the sum; the op has no such scale"),
        (
            _twin(with_another_base),
            "what an adapter is added to is no plain projection (quantised weights?)",
        ),
    ],
    check=check,
    replace=replace,
    variant=lambda match: LORA if _adapted(match) else "",
    measured_apart=[LORA],
    saved=["x", *(f"{factor}_{name}" for factor in "wab" for name in PROJECTIONS)],
    settings={"tile_tokens": 0, "skip_padding": False},
)
