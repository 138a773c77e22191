"""Bytes that a graph holds when its forward is done: what it returns and what the backward reads.

Inductor's own front half decides about both, on fake tensors: its decompositions, its passes over
the joint graph and its partitioner. It runs on a graph before and after it is rewritten. A tensor
is counted once, however many views there are, in the group of the node of Dynamo's graph that makes
it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from liger_fx.bodies import keep_in_checkpoints, with_bodies
from liger_fx.canonical import fake, op_name, positional
from liger_fx.matcher import Match
from liger_fx.report import Place, Report
from liger_fx.rewrite import Reject, Rewrite, rewrite_graph

KINDS = LOSS, GATED = (
    "logits, and what else projection and loss keep",
    "gate, up and their product",
)
_GROUPS = dict.fromkeys(
    ("linear_cross_entropy", "linear_logprobs", "linear_kl", "cross_entropy"), LOSS
) | dict.fromkeys(("tiled_mlp", "swiglu", "geglu"), GATED)
_INPUTS = ("gate", "up", "gate_up", "logits")  # bindings that count as part of a match

Key = tuple[str, str]  # a node's name and module: names repeat between a graph and its bodies
Groups = dict[Key, str]  # which of KINDS a node makes


class Held(NamedTuple):
    """A tensor that outlives the forward. checkpoint: which of the graph's activation checkpoints
    makes it again in its backward, so that it exists while that backward runs; None outside."""

    group: str
    place: Place
    size: int
    checkpoint: int | None


def all_matches(gm: fx.GraphModule, rewrites: Sequence[Rewrite]) -> list[tuple[str, Match]]:
    """Every match in ``gm``, legal or not, with the name of its rewrite. Changes nothing."""
    found: list[tuple[str, Match]] = []

    def keep(rewrite: Rewrite, match: Match) -> str:
        found.append((rewrite.name, match))
        raise Reject("only looked at")

    rewrite_graph(gm, rewrites, allow=keep)
    return found


def all_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of ``gm`` and of its bodies."""
    return [node for graph, _ in with_bodies(gm) for node in graph.graph.nodes]


def groups_of(matches: Iterable[tuple[str, Match]]) -> Groups:
    groups: Groups = {}
    for name, match in matches:
        inputs = [match.bindings[i] for i in _INPUTS if i in match.bindings]
        nodes = {node for node in inputs if isinstance(node, fx.Node)} | match.nodes
        if name == "tiled_mlp":
            nodes.remove(match.root)  # the MLP's output is none of its activations
        # What another graph makes is held by it.
        if name in _GROUPS and all(node.op != "placeholder" for node in nodes):
            groups |= dict.fromkeys(map(key, nodes), _GROUPS[name])
    return groups


def groups_of_new(nodes: Iterable[fx.Node], report: Report) -> Groups:
    """Of the nodes that rewrites made: they count as the match that they stand in for."""
    places = {r.place: _GROUPS[r.rewrite] for r in report.replacements if r.rewrite in _GROUPS}
    return {key(n): places[Place.of(n)] for n in nodes if Place.of(n) in places}


def key(node: fx.Node) -> Key:
    return node.name, Place.of(node).module


def attention_masks(gm: fx.GraphModule) -> dict[fx.Node, tuple[int, int]]:
    """The masks of ``scaled_dot_product_attention``: the memory of each, and its bytes when a
    kernel reads it, which of a boolean mask makes one in the dtype of the queries."""
    masks: dict[fx.Node, tuple[int, int]] = {}
    for node in all_nodes(gm):
        if op_name(node) == "scaled_dot_product_attention":
            query, _, _, mask, *_ = positional(node)
            if isinstance(mask, fx.Node):
                value = fake(mask)
                boolean = value.dtype == torch.bool
                read = value.numel() * (fake(query).itemsize if boolean else value.itemsize)
                masks[mask] = value.untyped_storage()._cdata, read
    return masks


def bytes_of_masks(masks: Mapping[fx.Node, tuple[int, int]]) -> int:
    """Of those that are still read. Layers share a mask."""
    return sum(dict(memory for node, memory in masks.items() if node.users).values())


def for_measuring(gm: fx.GraphModule, kept: Sequence[str]) -> fx.GraphModule:
    """A copy of ``gm`` on the CPU, whose checkpoints keep what the ops ``kept`` return: on meta
    tensors attention has no kernel that keeps little, and the gradient of a cross-entropy is
    missing."""
    gm = copy.deepcopy(gm)
    keep_in_checkpoints(gm, kept)
    for graph, _ in with_bodies(gm):
        for node in graph.graph.nodes:
            node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), _on_cpu)  # type: ignore[misc,assignment]
        graph.recompile()
    return gm


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def held(gm: fx.GraphModule, groups: Groups) -> list[Held]:
    """What ``gm``, from `for_measuring`, holds of each group when its forward is done, and what the
    body of each of its checkpoints holds when it is run again."""
    # A body comes first: the checkpoint around it leaves marks in it, which would count here.
    forms = [(form, i if again else None) for i, (form, again) in enumerate(with_bodies(gm))]
    return [
        Held(group, Place.of(maker), maker.meta["val"].untyped_storage().nbytes(), checkpoint)
        for form, checkpoint in forms
        if checkpoint is not None or form is gm
        for maker in _makers_of_outputs(_forward(form))
        if (group := groups.get(_origin(maker))) is not None
    ]


def _forward(gm: fx.GraphModule) -> fx.Graph:
    """The forward that Inductor makes of ``gm``: it returns what the backward reads as well."""
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses import FakeTensorMode

    found: list[fx.Graph] = []

    def keep(traced: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        found.append(traced.graph)
        return traced.forward

    uncached = {"force_disable_caches": True}  # a cache would not call `keep`
    with FakeTensorMode():
        inputs = [_empty(node) for node in gm.graph.find_nodes(op="placeholder")]
        compile_fx(gm, inputs, inner_compile=keep, config_patches=uncached)  # type: ignore[arg-type]
    return found[0]


def _empty(node: fx.Node) -> Any:
    value = fake(node)
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return made.requires_grad_(value.requires_grad)


def _makers_of_outputs(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that make the memory of the outputs, without that of the inputs."""
    tensors = [node for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    makers: dict[int, fx.Node] = {}
    for node in tensors:
        makers.setdefault(_storage(node), node)
    outputs = graph.output_node().all_input_nodes
    kept = dict.fromkeys(makers[_storage(node)] for node in outputs if node in set(tensors))
    return [node for node in kept if node.op != "placeholder"]


def _storage(node: fx.Node) -> int:
    return node.meta["val"].untyped_storage()._cdata


def _origin(node: fx.Node) -> Key:
    """The node of Dynamo's graph that ``node`` computes a part of. A node of the backward that runs
    in the forward has none, and counts as what it reads."""
    while not node.meta.get("from_node") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    origins = node.meta.get("from_node") or ()
    return origins[0].name if origins else "", Place.of(node).module
