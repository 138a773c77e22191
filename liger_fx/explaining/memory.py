"""Bytes that a graph holds when its forward is done: what it returns and what the backward reads.

Inductor's own front half decides about both, on fake tensors: its decompositions, its passes over
the joint graph and its partitioner. It runs on a graph before and after it is rewritten. A tensor is counted in the group of the node
of Dynamo's graph that makes it, and once, however many views there are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from liger_fx.bodies import keep_in_checkpoints, with_bodies
from liger_fx.canonical import fake, op_name, positional
from liger_fx.matcher import Match
from liger_fx.report import Place, Report
from liger_fx.rewrite import Reject, Rewrite, rewrite_graph

LOSS, GATED, MASKS = "loss", "gated", "masks"
_GROUPS = {
    "linear_cross_entropy": LOSS,
    "linear_logprobs": LOSS,
    "linear_kl": LOSS,
    "cross_entropy": LOSS,
    "tiled_mlp": GATED,
    "swiglu": GATED,
    "geglu": GATED,
}
_INPUTS = ("gate", "up", "gate_up", "logits")  # bindings that count as part of a match


@dataclass(frozen=True)
class Held:
    """A tensor that outlives the forward. checkpoint: which of the graph's activation checkpoints
    makes it again in its backward, so that it exists while that backward runs; None outside."""

    group: str
    place: Place
    size: int
    checkpoint: int | None


_Key = tuple[str, str]  # a node's name and module: names repeat between a graph and its bodies


def _key(node: fx.Node) -> _Key:
    return node.name, Place.of(node).module


def all_matches(gm: fx.GraphModule, rewrites: Sequence[Rewrite]) -> list[tuple[str, Match]]:
    """Every match in ``gm``, by the name of its rewrite, whether legal or not; changes nothing."""
    found: list[tuple[str, Match]] = []

    def keep(rewrite: Rewrite, match: Match) -> str:
        found.append((rewrite.name, match))
        raise Reject("only looked at")

    rewrite_graph(gm, rewrites, allow=keep)
    return found


@dataclass
class Groups:
    """Which nodes of a graph, and of its bodies, belong to which group.

    masks: shapes of the masks that an attention node takes. PyTorch makes an additive mask of a
    boolean one inside of attention, which is counted by its shape.
    """

    members: dict[_Key, str] = field(default_factory=dict)
    masks: dict[_Key, torch.Size] = field(default_factory=dict)
    places: dict[Place, str] = field(default_factory=dict)
    known: set[_Key] = field(default_factory=set)

    @staticmethod
    def of(gm: fx.GraphModule, matches: Iterable[tuple[str, Match]]) -> Groups:
        """Of ``gm`` before it is rewritten."""
        groups = Groups(known=set(map(_key, _nodes(gm))))
        for name, match in matches:
            inputs = [match.bindings[i] for i in _INPUTS if i in match.bindings]
            made_here = not any(isinstance(n, fx.Node) and n.op == "placeholder" for n in inputs)
            if name in _GROUPS and made_here:
                # A gated MLP's own output is no activation of it.
                inside = match.nodes - {match.root} if name == "tiled_mlp" else match.nodes
                members = [n for n in (*inside, *inputs) if isinstance(n, fx.Node)]
                groups.members |= dict.fromkeys(map(_key, members), _GROUPS[name])
        groups._find_masks(gm)
        return groups

    def add_new(self, gm: fx.GraphModule, report: Report) -> None:
        """Count the nodes that stand in for a match as the match."""
        for made in report.replacements:
            if made.rewrite in _GROUPS:
                self.places[made.place] = _GROUPS[made.rewrite]
        for node in _nodes(gm):
            if self.is_new(node) and Place.of(node) in self.places:
                self.members[_key(node)] = self.places[Place.of(node)]
        self._find_masks(gm)

    def _find_masks(self, gm: fx.GraphModule) -> None:
        for node in _nodes(gm):
            if op_name(node) == "scaled_dot_product_attention":
                mask = positional(node)[3]
                if isinstance(mask, fx.Node):
                    shape = fake(mask).shape
                    self.masks |= {_key(node): shape, _key(mask): shape}

    def is_new(self, node: fx.Node) -> bool:
        """Did a rewrite make ``node``?"""
        return _key(node) not in self.known

    def group(self, key: _Key, shape: torch.Size) -> str | None:
        return MASKS if self.masks.get(key) == shape else self.members.get(key)


def _nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for graph, _ in with_bodies(gm) for node in graph.graph.nodes]


def for_measuring(gm: fx.GraphModule, rewrites: Sequence[Rewrite]) -> fx.GraphModule:
    """A copy of ``gm`` on the CPU: on meta tensors attention has no kernel that keeps little, and
    the gradient of a cross-entropy is missing."""
    gm = copy.deepcopy(gm)
    keep_in_checkpoints(gm, [name for rewrite in rewrites for name in rewrite.save_ops])
    for graph, _ in with_bodies(gm):
        for node in graph.graph.nodes:
            node.args = fx.node.map_aggregate(node.args, _on_cpu)  # type: ignore[assignment]
            node.kwargs = fx.node.map_aggregate(node.kwargs, _on_cpu)  # type: ignore[assignment]
        graph.recompile()
    return gm


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def held(gm: fx.GraphModule, groups: Groups) -> list[Held]:
    """What ``gm``, from `for_measuring`, holds of each group when its forward is done."""
    return [
        # A body comes first: the checkpoint around it leaves marks in it, which would count here.
        found
        for index, (graph, recomputed) in enumerate(with_bodies(gm))
        if recomputed or graph is gm
        for found in _held(graph, groups, index if recomputed else None)
    ]


def _held(gm: fx.GraphModule, groups: Groups, checkpoint: int | None) -> list[Held]:
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses import FakeTensorMode

    found: list[Held] = []

    def look(traced: fx.GraphModule, inputs: Any, is_backward: bool = False, **_: Any) -> Any:
        for maker in [] if is_backward else _makers_of_outputs(traced.graph):
            value, origin = maker.meta["val"], _origin(maker)
            if (group := groups.group(origin, value.shape)) is not None:
                size = value.untyped_storage().nbytes()
                found.append(Held(group, Place.of(maker), size, checkpoint))
        return traced.forward

    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode():
        compile_fx(
            gm,
            list(map(_empty, inputs)),
            inner_compile=look,
            config_patches={"force_disable_caches": True},  # a hit would not look
        )
    return found


def _makers_of_outputs(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that make the memory of the outputs, without that of the inputs."""
    makers: dict[int, fx.Node] = {}
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), torch.Tensor):
            makers.setdefault(_storage(node), node)
    outputs = graph.output_node().all_input_nodes
    kept = {_storage(n) for n in outputs if isinstance(n.meta.get("val"), torch.Tensor)}
    return [node for at, node in makers.items() if at in kept and node.op != "placeholder"]


def _origin(node: fx.Node) -> _Key:
    """The node of Dynamo's graph that ``node`` computes a part of. A node of the backward that runs
    in the forward has none, and counts as what it reads."""
    while not node.meta.get("from_node") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    origins = node.meta.get("from_node") or ()
    return origins[0].name if origins else "", Place.of(node).module


def _storage(node: fx.Node) -> int:
    return node.meta["val"].untyped_storage()._cdata


def _empty(node: fx.Node) -> Any:
    value = fake(node)
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return made.requires_grad_(value.requires_grad)
