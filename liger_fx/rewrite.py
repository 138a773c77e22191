"""Rewrites: what they are made of, and how a list of them is applied to a graph."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

# As AOTAutograd does while it traces (torch/_functorch/aot_autograd.py).
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch.fx.proxy import GraphAppendingTracer

from liger_fx.bodies import skipped, with_bodies
from liger_fx.canonical import View, fake, same_sizes
from liger_fx.effects import bodies, known_writes, storage_key
from liger_fx.legality import Legality
from liger_fx.matcher import BrokenGraph, Match, Matcher, Miss, Reject, candidates, size
from liger_fx.ops.signatures import Misfit
from liger_fx.pattern import Pattern, traced
from liger_fx.report import (
    NearMiss,
    Place,
    Rejection,
    Replacement,
    Report,
    describe,
    internal_error,
)
from liger_fx.returned import ReturnedLogits

__all__ = ["Allow", "BrokenGraph", "Reject", "Rewrite", "rewrite_graph"]


Join = Callable[[View, list[Match], Callable[[fx.Node, str], None]], list[Match]]


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
    join: ``join(view, matches, reject)`` makes of matches that have been checked, and of what else
        is computed of the same values, those to replace, which ``check`` gets too;
        ``reject(node, reason)`` is for others.
    constants: names of bindings to which the replacement gives no gradient: what is computed of
        them may run without grad mode.
    saved: names of bindings that the op keeps for its backward, "output" among them if it keeps
        what it returns, or a function of the match that gives them. A match is refused if such a
        value is written to later. None: all of them.
    variant: ``variant(match)`` tells apart matches of one pattern that become different kernels.
    measured_apart: names of variants that do other work than the rest: under ``policy="auto"`` no
        measurement of the others decides about them, nor theirs about the others.
    settings: the options ``<name>.<setting>`` and their defaults.
    gain: why it is worth making on every device, under every inner compiler. Without one,
        ``policy="auto"`` and ``"measure"`` decide from measurements.
    save_ops: names of ops whose results activation checkpointing must keep rather than compute
        again, or a function of the settings that gives them: those that ``replace`` calls, and
        those that they consist of under autograd.
    """

    name: str
    patterns: Sequence[Callable[..., Any]]
    replace: Callable[..., Any]
    check: Callable[..., None] | None = None
    refuses: Sequence[tuple[Callable[..., Any], str]] = ()
    join: Join | None = None
    constants: Sequence[str] = ()
    saved: Sequence[str] | Callable[[Match], Sequence[str]] | None = None
    variant: Callable[[Match], str] | None = None
    measured_apart: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    gain: str | None = None
    save_ops: Sequence[str] | Callable[[Mapping[str, Any]], Sequence[str]] = ()

    def kept_ops(self, chosen: Mapping[str, Any]) -> Sequence[str]:
        """``save_ops`` under these settings, and the defaults of the others."""
        if not callable(self.save_ops):
            return self.save_ops
        return self.save_ops(self.settings | dict(chosen))


def kept_ops(rewrites: Sequence[Rewrite], settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The ``save_ops`` of all ``rewrites``. settings: as for `rewrite_graph`."""
    return [op for rewrite in rewrites for op in rewrite.kept_ops(settings.get(rewrite.name, {}))]


Allow = Callable[[Rewrite, Match], str]


def rewrite_graph(
    gm: fx.GraphModule,
    rewrites: Sequence[Rewrite],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    allow: Allow | None = None,
    strict: bool = False,
    returned: Sequence[ReturnedLogits] = (),
) -> Report:
    """Apply ``rewrites`` in order to ``gm``, in place, and to the bodies of its activation
    checkpoints and of its nested regions.

    gm: a graph as Dynamo gives it to a backend: every node carries ``meta["example_value"]``.
    settings: per rewrite name, settings that differ from its defaults. allow: called with each
    rewrite and match; returns why the match is worth replacing, or "", or raises `Reject`. strict:
    an exception in a rewrite or in ``allow`` is raised. Without ``strict`` the exception costs the
    one match, stands among the rejections, and is logged with its stack. returned: logits whose
    return may be disregarded, since the caller will `defer` them.

    Bodies of custom autograd functions, of flex attention and of ``cond`` are left alone. Raises
    ValueError for a graph without example values, BrokenGraph, a RuntimeError.
    """
    start = time.perf_counter()
    report = Report(nodes=len(gm.graph.nodes))
    counted = known_writes(gm)
    known = {graph: Legality(graph, again, counted, returned) for graph, again in with_bodies(gm)}
    for graph in known:
        _require_example_values(graph)
        for node in graph.graph.nodes:
            for body in filter(known.__contains__, bodies(node)):
                known[body].callers.append((functools.partial(_view_of, known, graph), node))
    for rewrite in rewrites:
        chosen = rewrite.settings | dict((settings or {}).get(rewrite.name, {}))
        _Application(rewrite, chosen, allow or (lambda *_: ""), strict, report, known).run()
    report.skipped = [(what, Place.of(node)) for what, node in skipped(gm)]
    report.seconds = time.perf_counter() - start
    return report


def _view_of(known: Mapping[fx.GraphModule, Legality], graph: fx.GraphModule) -> View:
    return known[graph].view


@dataclass
class _Application:
    """One rewrite over all graphs. known: what is known of each, until it changes."""

    rewrite: Rewrite
    settings: dict[str, Any]
    allow: Allow
    strict: bool
    report: Report
    known: dict[fx.GraphModule, Legality]
    best: NearMiss | None = None

    def run(self) -> None:
        touched: set[fx.GraphModule | None] = set()  # by a body that got further operands
        for gm, graph in list(self.known.items()):
            if gm in touched:
                graph = self._changed(gm)
            operands = graph.operands
            if self._run(graph):
                self._changed(gm)
            if graph.operands != operands:
                touched.update(call.graph.owning_module for _, call in graph.callers)
        named = {r.rewrite for r in (*self.report.replacements, *self.report.rejections)}
        if self.best is not None and self.rewrite.name not in named:
            self.report.near_misses.append(self.best)

    def _run(self, graph: Legality) -> bool:
        """Did it change the graph?"""
        matches: list[Match] = []
        with self._costs_only(None):
            matches = self._legal(graph)
        renamed: dict[fx.Node, fx.Node] = {}
        for match in matches:
            if not match.nodes & renamed.keys():  # else part of what has been replaced already
                self._apply(match, renamed)
        return bool(renamed)

    def _changed(self, gm: fx.GraphModule) -> Legality:
        try:
            gm.graph.lint()
            gm.recompile()
        except Exception as error:
            raise BrokenGraph(f"{self.rewrite.name} broke the graph: {error}") from error
        self.known[gm] = dataclasses.replace(self.known[gm])
        return self.known[gm]

    @contextlib.contextmanager
    def _costs_only(self, node: fx.Node | None) -> Iterator[None]:
        """A `Reject`, a `Misfit` or, unless ``strict``, any other exception inside costs what is
        inside."""
        try:
            yield
        except (Reject, Misfit) as reject:
            self._reject(node, str(reject))
        except Exception as error:
            logged = {r.reason for r in self.report.rejections}  # once for all layers
            failed = f"failed in {self.rewrite.name}"
            self._reject(node, internal_error(error, failed, self.strict, logged))

    def _legal(self, graph: Legality) -> list[Match]:
        matches = self._find(graph)
        if self.rewrite.join is not None:
            checked = [match for match in matches if self._is_checked(match)]
            matches = self.rewrite.join(graph.view, checked, self._reject)
        return [m for m in matches if self._is_legal(m, graph) and self._is_checked(m)]

    def _find(self, graph: Legality) -> list[Match]:
        view, found = graph.view, dict[fx.Node, Match]()
        for pattern in map(traced, self.rewrite.patterns):
            for node in candidates(view, pattern):
                if node not in found:
                    with self._costs_only(node):
                        matcher = Matcher(view, pattern)
                        match = matcher.at(node)
                        if match is None:
                            self._note_miss(pattern, matcher.miss, node)
                        else:
                            self._complete(match, graph)
                            found[node] = match
        self._refuse_twins(view, found)
        return sorted(_outermost(list(found.values())), key=lambda m: view.position[m.root])

    def _refuse_twins(self, view: View, found: Mapping[fx.Node, Match]) -> None:
        """Of those inside of others, and inside of what is ``found``, nothing is said."""
        twins: dict[fx.Node, tuple[Match, str]] = {}
        for function, reason in self.rewrite.refuses:
            twin = traced(function)
            for node in candidates(view, twin):
                if node in found or node in twins:
                    continue
                with self._costs_only(node):
                    if (match := Matcher(view, twin).at(node)) is not None:
                        twins[node] = match, reason
        matches = [*found.values(), *(match for match, _ in twins.values())]
        outermost = {match.root for match in _outermost(matches)}
        for node, (_, reason) in twins.items():
            if node in outermost:
                self._reject(node, reason)

    def _complete(self, match: Match, graph: Legality) -> None:
        match.settings, match.recomputed = self.settings, graph.recomputed
        if self.rewrite.variant is not None:
            match.variant = self.rewrite.variant(match)

    def _note_miss(self, pattern: Pattern, miss: Miss, node: fx.Node) -> None:
        if miss.matched > (self.best.matched if self.best else 0):
            reason = f"wanted {miss.wanted}, found {describe(miss.found)}"
            name, place = self.rewrite.name, Place.of(node)
            total = max(miss.matched, size(pattern.term))
            self.best = NearMiss(name, pattern.name, miss.matched, total, reason, place=place)

    def _is_legal(self, match: Match, graph: Legality) -> bool:
        with self._costs_only(match.root):
            match.worth = self.allow(self.rewrite, match)
            graph.check(match, self.rewrite)
            return True
        return False

    def _is_checked(self, match: Match) -> bool:
        check = self.rewrite.check
        with self._costs_only(match.root):
            if check is not None:
                check(match, **_wanted(check, match.values))
            return True
        return False

    def _apply(self, match: Match, renamed: dict[fx.Node, fx.Node]) -> None:
        """renamed: what has become of nodes that were replaced before."""
        news: list[fx.Node] = []
        with self._costs_only(match.root):
            place = Place.of(match.root)
            news = _record(match, self.rewrite.replace, renamed)
        if news:
            for old, new in zip(match.outputs, news, strict=True):
                old.replace_all_uses_with(new)
                renamed[old] = new
            _erase(match.nodes)
            made = Replacement(self.rewrite.name, match.spelling, match.worth, place=place)
            self.report.replacements.append(made)

    def _reject(self, node: fx.Node | None, reason: str) -> None:
        place = Place() if node is None else Place.of(node)
        self.report.rejections.append(Rejection(self.rewrite.name, reason, place=place))


def _outermost(matches: list[Match]) -> list[Match]:
    """Without the matches inside of others, such as the norm in ``x.float() -> norm -> to``."""
    inside = {node for match in matches for node in match.nodes - set(match.outputs)}
    return [match for match in matches if match.root not in inside]


def _require_example_values(gm: fx.GraphModule) -> None:
    computing = [node for node in gm.graph.nodes if node.op not in ("get_attr", "output")]
    if computing and not any("example_value" in node.meta for node in computing):
        raise ValueError(
            "the graph has no meta['example_value'] on its nodes; rewrite_graph takes graphs as "
            "torch.compile gives them to a backend"
        )


def _wanted(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """The bindings that ``function`` names among its parameters, after the match itself; all for
    one that takes any."""
    _, *parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return values
    return {p.name: values[p.name] for p in parameters if p.name in values}


_COPIED_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "recompute", "ac_graph_id")


class _Recorder(GraphAppendingTracer):
    """Records new nodes into a graph and evaluates each on fake tensors, in the fake mode and grad
    mode of ``like``, a node that they stand in for."""

    def __init__(self, graph: fx.Graph, like: fx.Node) -> None:
        super().__init__(graph)
        self.value = fake(like)
        self.meta = {key: like.meta[key] for key in _COPIED_META if key in like.meta}

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        gone = [n.name for n in node.all_input_nodes if n._erased]
        if gone:
            raise RuntimeError(f"the replacement reads {gone[0]}, which was replaced before")
        node.meta.update(self.meta)
        node.meta["example_value"] = self._evaluate(node)
        return node

    def _evaluate(self, node: fx.Node) -> Any:
        """A layer may be compiled in its first forward, under the hooks of a checkpoint or of
        offloading: these must not see what is saved here."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake)
        with (
            _disable_saved_tensors_hooks_during_tracing(),
            self.value.fake_mode,
            torch.set_grad_enabled(self.value.requires_grad),
        ):
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _record(
    match: Match, replace: Callable[..., Any], renamed: Mapping[fx.Node, fx.Node]
) -> list[fx.Node]:
    """The nodes of the replacement, recorded where the first output stands, one for each output.
    The rest of the graph does not know them yet; after an exception they are gone. renamed: what
    has become of nodes that were replaced before.
    """
    anchor, graph = match.first, match.first.graph
    before = anchor.prev
    like = next((node for node in match.outputs if fake(node).requires_grad), match.root)
    tracer = _Recorder(graph, like)
    proxies = {
        name: fx.Proxy(renamed.get(value, value), tracer) if isinstance(value, fx.Node) else value
        for name, value in match.bindings.items()
    }
    try:
        with graph.inserting_before(anchor):
            made = replace(match, **_wanted(replace, proxies))
            made = made if isinstance(made, tuple) else (made,)
            news = [_as_before(*pair) for pair in zip(made, match.outputs, strict=True)]
        for new, old in zip(news, match.outputs, strict=True):
            if before < new:  # views of the old value, and writes to them, are now of the new one
                new.meta["example_value"] = fake(old)
        return news
    except BaseException:
        while anchor.prev is not before:
            graph.erase_node(anchor.prev)
        raise


def _as_before(new: fx.Proxy, old: fx.Node) -> fx.Node:
    """``new``, without a gradient if ``old`` has none, and in its memory layout: a ``view`` further
    on may depend on it. Raises `Reject` where the layout cannot be had, or where a view in the
    place of a tensor of its own cannot be returned, RuntimeError if ``new`` is another kind of
    tensor, which is a mistake in the rewrite."""
    got, wanted = fake(new.node), fake(old)
    if got.dtype != wanted.dtype or not same_sizes(got.shape, wanted.shape):
        raise RuntimeError(
            f"the replacement of {old.name} is {got.dtype} {list(got.shape)}, "
            f"expected {wanted.dtype} {list(wanted.shape)}"
        )
    if got.requires_grad and not wanted.requires_grad:
        new = new.detach()
    if not _same_layout(got, wanted) and wanted.is_contiguous():
        new = new.contiguous()
    if not _same_layout(fake(new.node), wanted):
        raise Reject(
            f"{old.name} has the strides {list(wanted.stride())}; the op gives {list(got.stride())}"
        )
    if fake(new.node)._base is not None and wanted._base is None and _is_returned_twice(old):
        raise Reject(
            f"{old.name} and a view of it are returned: AOTAutograd cannot return both where the "
            "op gives a view as well"
        )
    return new.node


def _is_returned_twice(node: fx.Node) -> bool:
    """Does the graph return several tensors that lie in the memory of ``node``?"""
    returned = [storage_key(value) for value in node.graph.output_node().all_input_nodes]
    return returned.count(storage_key(node)) > 1


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Have two tensors of one shape the same strides, where a dimension has more than one step? Of
    symbols, two names of one stride can differ: Max(1, s0) and s0."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    same = all(str(size) == "1" or str(x) == str(y) for size, x, y in strides)
    return same or (a.is_contiguous() and b.is_contiguous())


def _erase(nodes: set[fx.Node]) -> None:
    """Erase the matched nodes, and the no-ops above the inputs that only they used."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node.users or node.op not in ("call_function", "call_method") or node.is_impure():
            continue
        if not node._erased:
            todo += node.all_input_nodes
            node.graph.erase_node(node)
