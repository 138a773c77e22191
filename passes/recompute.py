"""What is cheap to compute is not saved -> an activation checkpoint around it.

Matches      What a matrix product keeps for the gradient of its weight, where it is computed from
             values that the backward has anyway: a gated activation (the spellings of `swiglu` and
             `geglu`), GELU, squared ReLU, and the norms of `rms_norm` and `layer_norm`. A compiler
             saves them, since it writes them in the forward anyway; computed again they are one
             more output of a kernel that the backward has to run.
Leaves alone what an activation checkpoint recomputes, what anything but a matrix product reads,
             what only frozen weights meet, and what autocast copies for its readers.
Numerics     The same operations in the same order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from liger_fx.passes.geglu import geglu
from liger_fx.passes.layer_norm import layer_norm
from liger_fx.passes.rms_norm import rms_norm
from liger_fx.passes.swiglu import swiglu
from torch import fx

from liger_fx.bodies import checkpointed
from liger_fx.canonical import View, fake, op_name
from liger_fx.matcher import Match, Reject
from liger_fx.offload import in_checkpoint
from liger_fx.rewrite import Rewrite


def gelu(x):
    return F.gelu(x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def squared_relu(x):
    return F.relu(x).pow(2)


INPUTS = ("x", "gate", "up", "gate_up")
PRODUCTS = ("linear", "matmul", "mm", "addmm")


def saved_for_it_alone(
    view: View, matches: list[Match], reject: Callable[[fx.Node, str], None]
) -> list[Match]:
    """Those that the backward keeps, and of which it has all inputs."""
    return [match for match in matches if _is_saved(match) and _has_inputs(match)]


def _is_saved(match: Match) -> bool:
    """For the gradient of a weight, and for nothing else?"""
    readers = list(_readers(match.root))
    operands = {match.view.resolve(node) for reader in readers for node in reader.all_input_nodes}
    return all(map(_is_product, readers)) and any(map(_needs_gradient, operands - {match.root}))


def _has_inputs(match: Match) -> bool:
    """Does the backward keep the inputs anyway, for their own gradients?"""
    given = (match.bindings[name] for name in INPUTS if name in match.bindings)
    return all(map(_needs_gradient, given))


def check(match: Match) -> None:
    if in_checkpoint():
        raise Reject("the activation checkpoint around this graph saves nothing of it")
    products = filter(_is_product, _readers(match.root))
    if any(fake(node).dtype != match.output.dtype for node in products):
        raise Reject("what is saved is a copy of it, which autocast makes")


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads the value, through views of it."""
    for user in node.users:
        if op_name(user) == "reshape":
            yield from _readers(user)
        else:
            yield user


def _is_product(node: fx.Node) -> bool:
    return op_name(node) in PRODUCTS


def _needs_gradient(node: Any) -> bool:
    value = fake(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def replace(match: Match, **given: fx.Proxy):
    nodes = sorted(match.nodes, key=match.view.position.__getitem__)
    (of_any,) = [proxy for proxy in given.values() if isinstance(proxy, fx.Proxy)][:1]
    return checkpointed(nodes, of_any.tracer)


recompute = Rewrite(
    name="recompute",
    patterns=[
        *(pattern for of in (swiglu, geglu, rms_norm, layer_norm) for pattern in of.patterns),
        squared_relu,
        gelu,
        gelu_tanh,
    ],
    check=check,
    join=saved_for_it_alone,
    replace=replace,
    recomputed=False,
)
