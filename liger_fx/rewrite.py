"""Rewrites: what they are made of, and how a list of them is applied to a graph."""

from __future__ import annotations

import copy
import enum
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

# As AOTAutograd does while it traces (torch/_functorch/aot_autograd.py).
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch.fx.proxy import GraphAppendingTracer

from liger_fx.canonical import View, fake, same_sizes
from liger_fx.checkpoint import checkpoint_bodies, save_in_checkpoint
from liger_fx.matcher import Legality, Match, Matcher, Miss, Reject, candidates
from liger_fx.pattern import Pattern
from liger_fx.report import NearMiss, Place, Rejection, Replacement, Report

__all__ = ["Reject", "Rewrite", "Where", "rewrite_graph"]


class Where(enum.Flag):
    """The parts of a graph in which a rewrite is made: the bodies of activation checkpoints
    (inside), and all that is in none (outside)."""

    OUTSIDE = enum.auto()
    INSIDE = enum.auto()
    ANYWHERE = OUTSIDE | INSIDE


@dataclass(frozen=True)
class Rewrite:
    """One rewrite, as data.

    name: a noun of the field, ``rms_norm``.
    patterns: functions in the words of the model, one for each spelling; parameter names are the
        bindings. The first that fits wins.
    replace: ``replace(match, **proxies)`` gets an `fx.Proxy` for each binding it names, and returns
        the proxy of the new value, or a tuple of them where the match has several outputs; all
        that it calls is recorded into the graph.
    check: ``check(match, **values)`` gets fake tensors and literals, and raises `Reject`.
    refuses: near twins, each a pattern and the reason for which it is left alone.
    also: further outputs of a match, beyond those of its pattern: nodes whose values ``replace``
        returns as well, after the others.
    companions: patterns of a value that some models compute beside the match, from values inside
        of it; parameters of the same name bind the same. The first that fits becomes the match's
        last output.
    combine: joins several matches into one where the model cut one computation into pieces.
    constants: names of bindings to which the replacement gives no gradient: what is computed of
        them may run without grad mode.
    settings: the options ``<name>.<setting>`` and their defaults.
    gain: why it is worth making on every device, under every inner compiler. Without one,
        ``policy="auto"`` and ``"measure"`` decide from measurements.
    save_ops: names of ops that activation checkpointing must keep rather than run again.
    """

    name: str
    patterns: Sequence[Callable[..., Any]]
    replace: Callable[..., fx.Proxy]
    check: Callable[..., None] | None = None
    refuses: Sequence[tuple[Callable[..., Any], str]] = ()
    also: Callable[[Match], Sequence[fx.Node]] | None = None
    companions: Sequence[Callable[..., Any]] = ()
    combine: Callable[[View, list[Match]], list[Match]] | None = None
    constants: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    gain: str | None = None
    save_ops: Sequence[str] = ()
    spellings: tuple[Pattern, ...] = field(init=False, repr=False)
    twins: tuple[tuple[Pattern, str], ...] = field(init=False, repr=False)
    beside: tuple[Pattern, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spellings", tuple(map(Pattern, self.patterns)))
        twins = tuple((Pattern(function), reason) for function, reason in self.refuses)
        object.__setattr__(self, "twins", twins)
        object.__setattr__(self, "beside", tuple(map(Pattern, self.companions)))

    def in_all_spellings(self, where: Where) -> dict[str, Where]:
        return {pattern.name: where for pattern in self.spellings}


def rewrite_graph(
    gm: fx.GraphModule,
    rewrites: Sequence[Rewrite],
    settings: dict[str, dict[str, Any]] | None = None,
    where: Mapping[str, Mapping[str, Where]] | None = None,
) -> Report:
    """Apply ``rewrites`` in order to ``gm``, in place, and to its activation-checkpoint bodies.

    gm: a graph as Dynamo gives it to a backend: every node carries ``meta["example_value"]``.
    settings: per rewrite name, settings that differ from its defaults. where: per rewrite name and
    spelling, where in ``gm`` to make it; a rewrite that is not named is made anywhere.

    Bodies of custom autograd functions and of flex attention are left alone. Raises ValueError for
    a graph without example values. If anything raises, ``gm`` is as it was.
    """
    start = time.perf_counter()
    report, undo = Report(nodes=len(gm.graph.nodes)), _Undo()
    try:
        for rewrite in rewrites:
            chosen = rewrite.settings | (settings or {}).get(rewrite.name, {})
            places = (where or {}).get(rewrite.name, rewrite.in_all_spellings(Where.ANYWHERE))
            _Application(rewrite, chosen, places, report, undo).run(gm)
    except BaseException:
        undo.restore()
        raise
    report.seconds = time.perf_counter() - start
    return report


class _Undo:
    """Copies of the graphs that are changed, taken just before."""

    def __init__(self) -> None:
        self.graphs: dict[fx.GraphModule, fx.Graph] = {}

    def remember(self, gm: fx.GraphModule) -> None:
        if gm not in self.graphs:
            self.graphs[gm] = copy.deepcopy(gm.graph)

    def restore(self) -> None:
        for gm, graph in self.graphs.items():
            gm.graph = graph  # recompiles


class _Application:
    """One rewrite over one graph and its checkpoint bodies."""

    def __init__(
        self,
        rewrite: Rewrite,
        settings: dict[str, Any],
        places: Mapping[str, Where],
        report: Report,
        undo: _Undo,
    ) -> None:
        self.rewrite = rewrite
        self.undo = undo
        self.settings = settings
        self.places = places
        self.report = report
        self.best: tuple[Miss, Place] | None = None
        self.seen = False  # a match was found, made or not

    def run(self, gm: fx.GraphModule) -> None:
        if self._anything_in(Where.INSIDE):
            self._bodies(gm)
        if self._anything_in(Where.OUTSIDE):
            self._graph(gm)
        if not self.seen and self.best is not None:
            miss, place = self.best
            self.report.near_misses.append(NearMiss.of(self.rewrite.name, miss, place))

    def _anything_in(self, part: Where) -> bool:
        return any(part in places for places in self.places.values())

    def _bodies(self, gm: fx.GraphModule) -> None:
        for body in checkpoint_bodies(gm):
            fired = len(self.report.replacements)
            self._bodies(body)
            self._graph(body, recomputed=True)
            if self.rewrite.save_ops and len(self.report.replacements) > fired:
                save_in_checkpoint(body, self.rewrite.save_ops)

    def _graph(self, gm: fx.GraphModule, *, recomputed: bool = False) -> None:
        _require_example_values(gm)
        view = View(gm.graph)
        found = self._find(view, recomputed)
        if not found:
            return
        self._note_spellings(found)
        part = Where.INSIDE if recomputed else Where.OUTSIDE
        found = [m for m in found if part in self.places.get(m.pattern.name, Where(0))]
        legality = Legality(view)
        matches = [match for match in found if self._is_legal(match, legality)]
        if self.rewrite.combine is not None:
            matches = [
                match
                for match in self.rewrite.combine(view, matches)
                if match in matches or self._is_legal(match, legality, checked=True)
            ]
        if matches:
            self.undo.remember(gm)
            renamed: dict[fx.Node, fx.Node] = {}
            for match in matches:
                self._apply(gm.graph, match, renamed)
            gm.graph.lint()
            gm.recompile()

    def _find(self, view: View, recomputed: bool) -> list[Match]:
        found: dict[fx.Node, Match] = {}
        for pattern in self.rewrite.spellings:
            for node in candidates(view, pattern):
                if node in found:
                    continue
                matcher = Matcher(view, pattern)
                match = matcher.at(node)
                if match is not None:
                    match.settings, match.recomputed = self.settings, recomputed
                    self._join_companion(view, match)
                    if self.rewrite.also is not None:
                        match.outputs += tuple(self.rewrite.also(match))
                        match.nodes.update(match.outputs)
                    found[node] = match
                else:
                    self._note_miss(matcher.miss, node)
        for twin, reason in self.rewrite.twins:
            for node in candidates(view, twin):
                if node not in found and Matcher(view, twin).at(node) is not None:
                    self._reject(node, reason)
        return sorted(_outermost(list(found.values())), key=lambda m: view.position[m.root])

    def _note_spellings(self, found: Sequence[Match]) -> None:
        self.seen = True
        names = self.report.spellings.setdefault(self.rewrite.name, [])
        names += dict.fromkeys(m.pattern.name for m in found if m.pattern.name not in names)

    def _join_companion(self, view: View, match: Match) -> None:
        for pattern in self.rewrite.beside:
            for node in candidates(view, pattern):
                other = Matcher(view, pattern).at(node, match.bindings)
                if other is not None and other.nodes & match.nodes:
                    match.join(other)
                    return

    def _note_miss(self, miss: Miss | None, node: fx.Node) -> None:
        if miss is None:
            return
        if self.best is None or miss.matched > self.best[0].matched:
            self.best = (miss, Place.of(node))

    def _is_legal(self, match: Match, legality: Legality, checked: bool = False) -> bool:
        try:
            legality.check(match, self.rewrite.constants)
            if self.rewrite.check is not None and not checked:
                self.rewrite.check(match, **_wanted(self.rewrite.check, match.values))
        except Reject as reject:
            self._reject(match.root, str(reject))
            return False
        return True

    def _apply(self, graph: fx.Graph, match: Match, renamed: dict[fx.Node, fx.Node]) -> None:
        if match.nodes & renamed.keys():
            return  # part of a match that has been replaced already
        place = Place.of(match.root)
        _substitute(graph, match, self.rewrite.replace, renamed)
        self.report.replacements.append(Replacement(self.rewrite.name, match.spelling, place))

    def _reject(self, node: fx.Node, reason: str) -> None:
        self.seen = True
        self.report.rejections.append(Rejection.at(self.rewrite.name, reason, Place.of(node)))


def _outermost(matches: list[Match]) -> list[Match]:
    """Without the matches inside of others, such as the norm in ``x.float() -> norm -> to``."""
    inside = {node for match in matches for node in match.nodes - set(match.outputs)}
    return [match for match in matches if match.root not in inside]


def _require_example_values(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op.startswith("call_") and "example_value" not in node.meta:
            continue  # a node without a value, such as _set_grad_enabled
        if node.op.startswith("call_"):
            return
    if any(node.op == "call_function" for node in gm.graph.nodes):
        raise ValueError(
            "the graph has no meta['example_value'] on its nodes; rewrite_graph takes graphs as "
            "torch.compile gives them to a backend"
        )


def _wanted(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """The bindings that ``function`` names among its parameters, after the match itself."""
    names = list(inspect.signature(function).parameters)[1:]
    return {name: values[name] for name in names if name in values}


_COPIED_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "recompute", "ac_graph_id")


def _substitute(
    graph: fx.Graph,
    match: Match,
    replace: Callable[..., Any],
    renamed: dict[fx.Node, fx.Node],
) -> None:
    """Record the replacement where the first output stands, give it metadata, erase what it made
    dead. The new nodes are added to ``renamed``."""
    tracer = GraphAppendingTracer(graph)
    proxies = {
        name: fx.Proxy(renamed.get(value, value), tracer) if isinstance(value, fx.Node) else value
        for name, value in match.bindings.items()
    }
    anchor = match.first
    before = anchor.prev
    like = next((node for node in match.outputs if fake(node).requires_grad), match.root)
    with graph.inserting_before(anchor):
        made = replace(match, **_wanted(replace, proxies))
        made = made if isinstance(made, tuple) else (made,)
        _annotate(before.next, anchor, like)
        news = [_like(new.node, old, anchor) for new, old in zip(made, match.outputs, strict=True)]
    for old, new in zip(match.outputs, news, strict=True):
        renamed[old] = new
        old.replace_all_uses_with(new)
    _erase(graph, match.nodes)


def _annotate(node: fx.Node, end: fx.Node, like: fx.Node) -> None:
    """Metadata for the nodes from ``node`` up to ``end``, as for ``like``."""
    meta = {key: like.meta[key] for key in _COPIED_META if key in like.meta}
    while node is not end:
        if "example_value" not in node.meta:
            node.meta.update(meta)
            node.meta["example_value"] = _evaluate(node, like)
        node = node.next


def _like(new: fx.Node, old: fx.Node, anchor: fx.Node) -> fx.Node:
    """``new``, without a gradient if ``old`` has none, and in its memory layout: a ``view`` further
    on may depend on it. Raises RuntimeError if it is another kind of tensor, which is a mistake in
    the rewrite."""
    got, wanted = fake(new), fake(old)
    if got.dtype != wanted.dtype or not same_sizes(got.shape, wanted.shape):
        raise RuntimeError(
            f"the replacement of {old.name} is {got.dtype} {list(got.shape)}, "
            f"expected {wanted.dtype} {list(wanted.shape)}"
        )
    if got.requires_grad and not wanted.requires_grad:
        new = new.graph.call_method("detach", (new,))
        _annotate(new, anchor, old)
    if not same_sizes(got.stride(), wanted.stride()) and wanted.is_contiguous():
        new = new.graph.call_method("contiguous", (new,))
        _annotate(new, anchor, old)
    return new


def _evaluate(node: fx.Node, like: fx.Node) -> Any:
    """The fake value of a new node, in the fake mode and grad mode of the node it stands in for.

    A layer may be compiled in its first forward, under the hooks of a checkpoint or of offloading:
    these must not see what is saved here.
    """
    value = fake(like)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake)
    with (
        _disable_saved_tensors_hooks_during_tracing(),
        value.fake_mode,
        torch.set_grad_enabled(value.requires_grad),
    ):
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _erase(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    """Erase the matched nodes, and the no-ops above the inputs that only they used."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node.users or node.op not in ("call_function", "call_method") or node.is_impure():
            continue
        if node._erased:
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        todo += inputs
