"""A Python function, in the words of a model, becomes a pattern over canonical expressions.

The function is traced once with `torch.fx.symbolic_trace`. Its parameters are the bindings: each
matches any value, or any literal, and the same one wherever it is used.

>>> def swiglu(gate, up):
...     return F.silu(gate) * up
>>> Pattern(swiglu)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from liger_fx.canonical import COMMUTATIVE, SIZELESS, Target, as_power, op_name, positional


@dataclass(frozen=True)
class Binding:
    """A parameter of the pattern function: matches anything, consistently."""

    name: str


@dataclass(frozen=True)
class Cast:
    """``x.float()``, ``x.to(other.dtype)``: also matches a value that has that dtype already,
    since a cast that does nothing may be missing from the graph."""

    source: Term
    dtype: torch.dtype | Binding | Op  # a term means: the dtype of its value


@dataclass(frozen=True)
class Op:
    """A canonical operation on terms."""

    op: Target
    args: tuple[Term, ...]

    @property
    def commutative(self) -> bool:
        return self.op in COMMUTATIVE and len(self.args) == 2


Step = Callable[[fx.Node], fx.Node | bool | None]


@dataclass(frozen=True)
class Chain:
    """Any number of nodes, none as well, that ``step`` lets pass (see `chain`)."""

    name: str
    step: Step
    source: Term


@dataclass(frozen=True)
class Guard:
    """``source``, if its value is ``wanted`` (see `guard`)."""

    wanted: str
    holds: Callable[[Any], bool]
    source: Term


@dataclass(frozen=True)
class Either:
    """``first`` or, where that does not fit, ``second`` (see `either`)."""

    first: Term
    second: Term


# Anything else is a literal, matched by equality.
Term = Binding | Cast | Op | Chain | Guard | Either | Any


def chain(name: str, step: Step) -> Callable[[Any], Any]:
    """A wildcard for patterns: ``rows = chain("rows", keeps_rows)``, then ``rows(x)``.

    It matches ``x`` below any number of nodes for which ``step(node)`` is true, or the input to go
    on with where that need not be the first. The nodes are the match's ``chains[name]``, outermost
    first; ``x`` is its ``sources[name]``; their other inputs are bound as ``name[0]`` and so on.
    """

    return _marked(functools.partial(Chain, name, step))


def guard(wanted: str, holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """A condition in patterns: ``scalar = guard("a scalar", lambda value: value.dim() == 0)``, then
    ``scalar(x)``.

    It matches ``x`` where ``holds(value)`` is true of its fake value. What tells two parts of a
    pattern apart that are computed alike has to be one; all else is for a rewrite's ``check``,
    which says why it refuses.
    """

    return _marked(functools.partial(Guard, wanted, holds))


def binding(name: str) -> Callable[[Any], Any]:
    """A parameter that the pattern function does not have: ``weight = binding("w_up")``, then
    ``weight(x)``. A part that several patterns share, or that is there several times, so brings its
    own; ``x`` may be any value of the pattern."""

    return _marked(lambda _: Binding(name))


def _marked(term: Callable[..., Term]) -> Callable[..., Any]:
    """A function whose calls in a pattern become ``term`` of their arguments."""

    def mark(x: fx.Proxy, *others: fx.Proxy) -> fx.Proxy:
        return x.tracer.create_proxy("call_function", mark, (x, *others), {})

    mark.term = term  # type: ignore[attr-defined]
    return mark


# ``either(x * scale, x)`` matches one of two values, tried in this order. What only the other one
# has binds nothing. The first that fits stays: it is not tried again if something else does not.
either = _marked(Either)


class Pattern:
    """One spelling: ``term`` is its root.

    A function that returns several values, ``return norm(s), s``, has its first as the root;
    ``also`` are the others: values on the way to the root that are outputs as well.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        terms: dict[fx.Node, Term] = {}
        for node in fx.symbolic_trace(function).graph.nodes:
            if node.op == "output":
                outputs = node.args[0]
                first, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
                self.term: Term = terms[first]
                self.also: tuple[Term, ...] = tuple(terms[value] for value in rest)
            else:
                terms[node] = _term(node, terms)


traced = functools.cache(Pattern)  # a function is traced once


def _term(node: fx.Node, terms: dict[fx.Node, Term]) -> Term:
    def sub(arg: Any) -> Any:
        return fx.node.map_aggregate(
            arg, lambda a: cast(Any, terms[a] if isinstance(a, fx.Node) else a)
        )

    if node.op == "placeholder":
        return Binding(str(node.target))
    if node.target is getattr and node.args[1] == "dtype":
        return sub(node.args[0])  # what a cast takes as well: ``x.type_as(y)``
    marked = getattr(node.target, "term", None)
    if marked is not None:
        return marked(*map(sub, node.args))
    op = op_name(node)
    if op == "cast":
        return Cast(sub(node.args[0]), _cast_dtype(node, sub))
    if op in SIZELESS:
        return Op(op, (sub(node.args[0]),))
    return Op(*as_power(op, tuple(sub(a) for a in positional(node))))


def _cast_dtype(node: fx.Node, sub: Callable[[Any], Term]) -> torch.dtype | Binding | Op:
    named = getattr(torch, str(node.target), None)
    if isinstance(named, torch.dtype):  # x.float(), x.half()
        return named
    wanted = sub(node.args[1] if len(node.args) > 1 else node.kwargs["dtype"])
    if not isinstance(wanted, torch.dtype | Binding | Op):
        raise TypeError(f"a pattern casts to a dtype or to that of a value, not to {wanted!r}")
    return wanted
