"""What is cheap to compute is not saved: what `recompute_norm` and `recompute_activation` share.

A matrix product keeps its input for the gradient of its weight. Where that input is computed from
values that the backward has anyway, it becomes an activation checkpoint of its own: the input is no
longer saved, and computed again it is one more output of a kernel that the backward has to run.
Selective recomputation, as Megatron-LM has it for layer norms and activations.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from liger_fx.bodies import checkpointed
from liger_fx.canonical import View, fake, op_name
from liger_fx.matcher import Match, Reject
from liger_fx.offload import in_checkpoint
from liger_fx.rewrite import Rewrite

PRODUCTS = ("linear", "matmul", "mm", "addmm")


def saved_for_it_alone(
    view: View, matches: list[Match], reject: Callable[[fx.Node, str], None]
) -> list[Match]:
    """Those that the backward keeps, and of which it has all inputs."""
    return [match for match in matches if _is_saved(match) and _has_inputs(match)]


def _is_saved(match: Match) -> bool:
    """For the gradient of a weight, and for nothing else?"""
    pairs = list(_readers(match.root, match.view))
    weights = (other for read, by in pairs for other in by.all_input_nodes if other is not read)
    return all(_is_product(by) for _, by in pairs) and any(map(_needs_gradient, weights))


def _has_inputs(match: Match) -> bool:
    """Does the backward keep the inputs anyway, for their own gradients?"""
    given = map(fake, (match.root, *match.bindings.values()))
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    return all(value.requires_grad or value.dim() < 2 for value in tensors)


def check(match: Match) -> None:
    if in_checkpoint():
        raise Reject("the activation checkpoint around this graph saves nothing of it")
    products = (by for _, by in _readers(match.root, match.view) if _is_product(by))
    if any(fake(product).dtype != match.output.dtype for product in products):
        raise Reject("what is saved is a copy of it, which autocast makes")


def _readers(node: fx.Node, view: View) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The value, or a view of it, and what reads it."""
    for user in node.users:
        if op_name(user) == "reshape" or view.does_nothing(user):
            yield from _readers(user, view)
        else:
            yield node, user


def _is_product(node: fx.Node) -> bool:
    return op_name(node) in PRODUCTS


def _needs_gradient(node: Any) -> bool:
    value = fake(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def replace(match: Match, **given: Any):
    nodes = sorted(match.nodes, key=match.view.position.__getitem__)
    tracer = next(value.tracer for value in given.values() if isinstance(value, fx.Proxy))
    return checkpointed(nodes, match.root, tracer)


def recompute(what: str, patterns: Sequence[Callable[..., Any]]) -> Rewrite:
    """The rewrite ``recompute_<what>``. patterns: what is recomputed. It is looked for where no
    checkpoint recomputes it anyway."""
    return Rewrite(
        name=f"recompute_{what}",
        patterns=patterns,
        check=check,
        join=saved_for_it_alone,
        replace=replace,
        recomputed=False,
        near_misses=False,
    )
