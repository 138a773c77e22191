"""Matching patterns against the canonical view."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from liger_fx.canonical import WRITTEN_AS, View, fake, op_name
from liger_fx.pattern import Binding, Cast, Chain, Either, Guard, Op, Pattern, Term


class Reject(Exception):
    """Raised by a rewrite's ``check``: the match is not legal, and this is why."""


class BrokenGraph(RuntimeError):
    """A replacement left a graph that cannot run. Nothing can be done but to stop."""


@dataclass
class Match:
    """One place where a pattern fits.

    ``outputs`` are the nodes that a replacement stands in for, the root first; ``bindings`` maps
    each parameter of the pattern to a node or a literal, ``chains`` each wildcard to its nodes
    (outermost first) and ``sources`` to what lies below them, ``nodes`` holds what a replacement
    makes superfluous, the outputs among it.
    ``recomputed``: it lies in the body of an activation checkpoint. ``view``: of its graph.
    ``worth``: why the policy lets it be replaced. ``variant``: as `Rewrite.variant` says.
    """

    view: View
    pattern: Pattern
    outputs: tuple[fx.Node, ...]
    bindings: dict[str, Any]
    chains: dict[str, list[fx.Node]]
    sources: dict[str, fx.Node]
    nodes: set[fx.Node]
    settings: dict[str, Any] = field(default_factory=dict)
    recomputed: bool = False
    worth: str = ""
    variant: str = ""

    @property
    def root(self) -> fx.Node:
        return self.outputs[0]

    @property
    def values(self) -> dict[str, Any]:
        """The bindings as fake tensors and literals."""
        return {name: fake(value) for name, value in self.bindings.items()}

    @property
    def output(self) -> torch.Tensor:
        """The fake tensor that the matched subgraph computes, the first if it computes several."""
        value: torch.Tensor = fake(self.root)
        return value

    @property
    def first(self) -> fx.Node:
        """The first of the outputs in the graph: what replaces them all stands there."""
        return min(self.outputs)

    @property
    def spelling(self) -> str:
        """The name of its pattern, and its variant."""
        return ", ".join([self.pattern.name, *filter(None, [self.variant])])


class Miss(NamedTuple):
    """How far a pattern got: ``matched`` operations, then ``found`` in the place of ``wanted``."""

    matched: int = 0
    wanted: str = ""
    found: Any = None


# A pattern that got no further than these was not near anything.
_EVERYWHERE = frozenset({"add", "sub", "mul", "div", "neg", "cat", "getitem", "reshape", "cast"})
_EVERYWHERE |= {"sum", "linear", "matmul", "transpose", "scaled_dot_product_attention"}


def size(term: Term) -> int:
    """How many operations a term has, without what may be missing."""
    if isinstance(term, Op):
        return 1 + sum(map(size, term.args))
    if isinstance(term, Cast | Chain | Guard):
        return size(term.source)
    if isinstance(term, Either):
        return min(size(term.first), size(term.second))
    if isinstance(term, tuple | list):
        return sum(map(size, term))
    return 0


@dataclass
class _State:
    bindings: dict[str, Any]
    chains: dict[str, list[fx.Node]] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    dtypes: list[tuple[Binding | Op, torch.dtype]] = field(default_factory=list)  # what casts say
    values: dict[int, fx.Node] = field(default_factory=dict)  # by the identity of the operation
    matched: int = 0
    near: bool = False  # an operation was matched that tells something

    def copy(self) -> _State:
        return _State(*map(copy.copy, vars(self).values()))


class Matcher:
    """Tries one pattern at one root. After a failure, ``miss`` says where it was nearest; nothing
    has matched where it was nowhere near."""

    def __init__(self, view: View, pattern: Pattern) -> None:
        self.view = view
        self.pattern = pattern
        self.miss = Miss()

    def at(self, root: fx.Node) -> Match | None:
        """The match that ends in ``root``."""
        self.state = _State({})
        if not self._match(self.pattern.term, root) or not self._dtypes_agree():
            return None
        # An optional parameter that the pattern never uses binds nothing; the rest are all bound.
        state = self.state
        nodes = interior(self.view, root, state.bindings)
        outputs = (root, *(state.values[id(term)] for term in self.pattern.also))
        return Match(
            self.view, self.pattern, outputs, state.bindings, state.chains, state.sources, nodes
        )

    def _match(self, term: Term, value: Any) -> bool:
        if isinstance(term, Binding):
            return self._bind(term, value)
        if isinstance(term, Cast):
            return self._match_cast(term, value)
        if isinstance(term, Chain):
            return self._match_chain(term, value)
        if isinstance(term, Guard):
            holds = isinstance(fake(value), torch.Tensor) and term.holds(fake(value))
            return self._match(term.source, value) if holds else self._missed(term.wanted, value)
        if isinstance(term, Op):
            return self._match_op(term, value)
        if isinstance(term, Either):
            return self._match_either((term.first, value), (term.second, value))
        if isinstance(term, tuple | list):
            return self._match_all(tuple(term), value)
        if isinstance(term, slice) and isinstance(value, slice):
            return self._match_all(ends(term), ends(value))
        equal = not isinstance(value, fx.Node) and type(value) in _LITERALS and value == term
        return equal or self._missed(repr(term), value)

    def _match_all(self, terms: tuple[Term, ...], values: Any) -> bool:
        if not isinstance(values, tuple) or len(values) != len(terms):
            return self._missed(f"{len(terms)} values", values)
        return all(map(self._match, terms, values))

    def _match_either(self, first: tuple[Term, Any], second: tuple[Term, Any]) -> bool:
        before = self.state.copy()
        if self._match(*first):
            return True
        self.state = before
        return self._match(*second)

    def _bind(self, term: Binding, value: Any) -> bool:
        bound = self.state.bindings.setdefault(term.name, value)
        same = bound is value or self.view.same(bound, value)
        return same or self._missed(f"the same {term.name} as before", value)

    def _match_op(self, term: Op, value: Any) -> bool:
        expr = self.view.expr(value) if isinstance(value, fx.Node) else None
        if expr is None or expr.op != term.op or len(expr.args) != len(term.args):
            if term.op == "reshape":  # a reshape that does nothing may be missing from the graph
                return self._match(term.args[0], value)
            return self._missed(name_of(term.op), value)
        state = self.state
        if state.values.get(id(term)) is value:  # used twice, and matched already
            state.matched += size(term)
            return True
        state.matched += 1
        state.near |= term.op not in _EVERYWHERE
        state.values[id(term)] = value
        if term.commutative:
            return self._match_either((term.args, expr.args), (term.args, expr.args[::-1]))
        return self._match_all(term.args, expr.args)

    def _match_cast(self, term: Cast, value: Any) -> bool:
        if not isinstance(value, fx.Node) or not isinstance(fake(value), torch.Tensor):
            return self._missed("a tensor", value)
        dtype = fake(value).dtype
        if isinstance(term.dtype, Binding | Op):
            self.state.dtypes.append((term.dtype, dtype))
        elif term.dtype != dtype:
            return self._missed(f"a cast to {term.dtype}", value)
        expr = self.view.expr(value)
        if expr.op == "cast":
            return self._match_either((term.source, expr.args[0]), (term.source, value))
        return self._match(term.source, value)

    def _match_chain(self, term: Chain, value: Any) -> bool:
        state = self.state
        if id(term) in state.values:  # used twice: on one value
            same = self.view.same(state.values[id(term)], value)
            return same or self._missed(f"the same {term.name} as before", value)
        state.values[id(term)] = value
        passed: list[fx.Node] = []
        others: list[fx.Node] = []
        while isinstance(value, fx.Node) and (step := term.step(value)):
            source = value.args[0] if step is True else step
            passed.append(value)
            others += (node for node in data_inputs(value) if node is not source)
            value = self.view.resolve(source)
        state.chains[term.name] = [*state.chains.get(term.name, []), *passed]
        state.sources[term.name] = value
        for i, node in enumerate(others):
            state.bindings[f"{term.name}[{i}]"] = self.view.resolve(node)
        return self._match(term.source, value)

    def _dtypes_agree(self) -> bool:
        bindings, values = self.state.bindings, self.state.values
        return all(
            dtype == getattr(fake(node), "dtype", None)
            for term, dtype in self.state.dtypes
            for node in [bindings[term.name] if isinstance(term, Binding) else values[id(term)]]
        )

    def _missed(self, wanted: str, found: Any) -> bool:
        if self.state.near and self.state.matched > self.miss.matched:
            self.miss = Miss(self.state.matched, wanted, found)
        return False


_LITERALS = (int, float, bool, str, type(None), torch.dtype, type(Ellipsis))


def ends(value: slice) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


def root_ops(term: Term) -> set[Any]:
    """The canonical operations at which a match of ``term`` can end."""
    if isinstance(term, Op):
        return {term.op}
    if isinstance(term, Cast):
        return {"cast"} | root_ops(term.source)
    if isinstance(term, Either):
        return root_ops(term.first) | root_ops(term.second)
    raise TypeError(f"a pattern must end in an operation, not in {term!r}")


def candidates(view: View, pattern: Pattern) -> list[fx.Node]:
    ops = root_ops(pattern.term)
    found = [node for op in ops for node in view.calls.get(op, ())]
    others = {other for op in ops for other in WRITTEN_AS.get(op, ())} - ops
    found += [n for op in others for n in view.calls.get(op, ()) if view.expr(n).op in ops]
    return sorted((n for n in found if not view.does_nothing(n)), key=view.position.__getitem__)


def interior(view: View, root: fx.Node, bindings: dict[str, Any]) -> set[fx.Node]:
    """The nodes between the bindings and the root: what the match computes, and what nobody reads
    of it. Dynamo leaves a view, cast or size in the graph whose result is dropped."""
    bound = {value for value in bindings.values() if isinstance(value, fx.Node)}
    found: set[fx.Node] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        resolved = view.resolve(node)
        is_input = not isinstance(resolved, fx.Node) or resolved in bound
        is_input |= any(view.same(resolved, b) for b in bound)
        if node in found or (is_input and node is not root):
            continue
        found.add(node)
        todo += data_inputs(node)
    return found.union(*(_unread(node) for node in found - {root}))


def _unread(node: fx.Node) -> set[fx.Node]:
    """The users of ``node`` that are views, casts and sizes, if nobody uses those in the end."""
    dead: set[fx.Node] = set()
    for user in node.users:
        if op_name(user) in ("cast", "reshape", "getitem", "size"):
            below = _unread(user)
            if below >= set(user.users):
                dead |= {user} | below
    return dead


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose numbers, not only their shape or dtype, reach the output."""
    inputs = node.all_input_nodes
    if op_name(node) in ("cast", "reshape", "getitem"):
        inputs = inputs[:1]
    return [n for n in inputs if isinstance(fake(n), torch.Tensor | tuple | list)]


def name_of(op: Any) -> str:
    return op if isinstance(op, str) else getattr(op, "__name__", str(op))


def named(node: fx.Node) -> str:
    return f"`{name_of(op_name(node))}` ({node.name})"
