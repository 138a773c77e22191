"""Graphs inside of a Dynamo graph: the bodies of higher-order operators.

``torch.utils.checkpoint`` becomes a ``tag_activation_checkpoint`` node and
``torch.compiler.nested_compile_region`` an ``invoke_subgraph`` node. Their bodies are matched like
any graph. An op that computes its gradients in the forward must not run again in the backward of a
checkpoint, so a selective-checkpointing policy keeps its outputs, by the mechanism of
``torch.utils.checkpoint.create_selective_checkpoint_contexts``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from liger_fx.canonical import View
from liger_fx.effects import bodies, fake

# Where tag_activation_checkpoint looks for the policy of a body (torch/_higher_order_ops/wrap.py).
_CONTEXT_FN = "_checkpoint_context_fn"

_ENTERED = (tag_activation_checkpoint, invoke_subgraph)


def with_bodies(
    gm: fx.GraphModule, recomputed: bool = False
) -> Iterator[tuple[fx.GraphModule, bool]]:
    """``gm`` and the bodies that are matched, at any depth, the innermost first, and whether a
    checkpoint runs the graph again."""
    again = {  # each once
        body: node.target is tag_activation_checkpoint
        for node in gm.graph.nodes
        if node.target in _ENTERED
        for body in bodies(node)
    }
    for body, in_checkpoint in again.items():
        yield from with_bodies(body, recomputed or in_checkpoint)
    yield gm, recomputed


def skipped(gm: fx.GraphModule) -> list[tuple[str, fx.Node]]:
    """The operators whose bodies are not matched: a sentence for the report, and the node."""
    return [
        (f"the body of `{node.target.name()}` is not looked into", node)
        for graph, _ in with_bodies(gm)
        for node in graph.graph.nodes
        if bodies(node) and node.target not in _ENTERED
    ]


def carry_in(view: View, source: View, node: fx.Node) -> fx.Node:
    """The value of ``node``, of the graph of ``source``, in the graph of ``view``: that graph
    itself, or a body in it, at any depth. A body gets the value as a further operand."""
    if view.graph is source.graph:
        return node
    placeholders = view.graph.find_nodes(op="placeholder")
    given = [carry_in(outer(), source, node) for outer, _ in view.callers]
    for placeholder in placeholders:
        at = placeholders.index(placeholder) - len(placeholders)
        if all(call.args[at] is g for (_, call), g in zip(view.callers, given, strict=True)):
            return placeholder
    for (_, call), operand in zip(view.callers, given, strict=True):
        call.args = (*call.args, operand)
    with view.graph.inserting_after(placeholders[-1]):
        placeholder = view.graph.placeholder(node.name)
    placeholder.meta["example_value"] = fake(node)
    return placeholder


def keep_in_checkpoints(gm: fx.GraphModule, op_names: Sequence[str]) -> None:
    """Let checkpoints that call one of these ops keep their outputs for the backward, and recompute
    the rest as before.

    A body with a policy of its own keeps its policy: whoever wrote it can name the ops.
    """
    for body, recomputed in with_bodies(gm):
        ops = (n.target for n in body.graph.nodes if isinstance(n.target, torch._ops.OpOverload))
        if recomputed and any(op.name() in op_names for op in ops):
            contexts = functools.partial(
                create_selective_checkpoint_contexts, [*map(_overload, op_names)]
            )
            body.meta.setdefault(_CONTEXT_FN, contexts)


def _overload(name: str) -> torch._ops.OpOverload:
    namespace, op = name.split("::")
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, namespace), op).default
    return overload


def checkpoint_eagerly(gm: fx.GraphModule) -> None:
    """Let ``gm`` run without a compiler: its checkpoints restore the state of the random generators
    for their recomputation. Dynamo's operator leaves that to AOTAutograd."""
    for graph, _ in with_bodies(gm):
        for node in graph.graph.nodes:
            if node.target is tag_activation_checkpoint:
                node.target = _checkpoint
        graph.recompile()


def _checkpoint(body: fx.GraphModule, *args: Any, **options: Any) -> Any:
    options = options | {"use_reentrant": False}
    if _CONTEXT_FN in body.meta:
        options["context_fn"] = body.meta[_CONTEXT_FN]
    return checkpoint(body, *args, **options)
