"""Matching patterns against the canonical view, and the rules that make a match legal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

# Whose wrappers the values of torch.func are (torch/_functorch/pyfunctorch.py).
from torch._C._functorch import is_functorch_wrapped_tensor

from liger_fx.canonical import View, fake, first_argument, op_name, storage_key
from liger_fx.pattern import Binding, Cast, Chain, Guard, Op, Pattern, Term


class Reject(Exception):
    """Raised by a rewrite's ``check``: the match is not legal, and this is why."""


@dataclass
class Match:
    """One place where a pattern fits.

    ``outputs`` are the nodes that a replacement stands in for, the root first; ``bindings`` maps
    each parameter of the pattern to a node or a literal, ``chains`` each wildcard to its nodes
    (outermost first) and ``sources`` to what lies below them, ``nodes`` holds what a replacement
    makes superfluous, the outputs among it. ``companion``: the pattern of its last output, if that
    was found beside it (`Rewrite`).
    ``recomputed``: it lies in the body of an activation checkpoint. ``view``: of its graph.
    ``worth``: why the policy lets it be replaced.
    """

    view: View
    pattern: Pattern
    outputs: tuple[fx.Node, ...]
    bindings: dict[str, Any]
    chains: dict[str, list[fx.Node]]
    sources: dict[str, fx.Node]
    nodes: set[fx.Node]
    settings: dict[str, Any] = field(default_factory=dict)
    companion: Pattern | None = None
    recomputed: bool = False
    worth: str = ""

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
        return fake(self.root)

    @property
    def first(self) -> fx.Node:
        """The first of the outputs in the graph: what replaces them all stands there."""
        return min(self.outputs)

    @property
    def spelling(self) -> str:
        """The names of its patterns."""
        return ", ".join(p.name for p in (self.pattern, self.companion) if p is not None)

    def join(self, other: Match) -> None:
        """Add what ``other``, matched with the same bindings and more, computes besides."""
        self.companion = other.pattern
        self.outputs += other.outputs
        self.bindings = other.bindings
        self.chains = self.chains | other.chains
        self.sources = self.sources | other.sources
        self.nodes |= other.nodes


@dataclass(frozen=True)
class Miss:
    """How far a pattern got: ``matched`` of ``total`` operations, then ``found`` for ``wanted``."""

    pattern: Pattern
    matched: int
    total: int
    wanted: str
    found: fx.Node | Any


# A pattern that got no further than these was not near anything.
_EVERYWHERE = frozenset({"add", "sub", "mul", "div", "neg", "cat", "getitem", "reshape", "cast"})
_EVERYWHERE |= {"linear", "transpose", "scaled_dot_product_attention"}


def size(term: Term) -> int:
    """How many operations a term has."""
    if isinstance(term, Op):
        return 1 + sum(map(size, term.args))
    if isinstance(term, Cast | Chain | Guard):
        return size(term.source)
    if isinstance(term, tuple | list):
        return sum(map(size, term))
    return 0


@dataclass
class _State:
    bindings: dict[str, Any] = field(default_factory=dict)
    chains: dict[str, list[fx.Node]] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    dtypes: list[tuple[Binding | Op, torch.dtype]] = field(default_factory=list)  # what casts say
    values: dict[int, fx.Node] = field(default_factory=dict)  # by the identity of the operation
    matched: int = 0
    near: bool = False  # an operation was matched that tells something

    def copy(self) -> _State:
        return _State(
            dict(self.bindings),
            dict(self.chains),
            dict(self.sources),
            list(self.dtypes),
            dict(self.values),
            self.matched,
            self.near,
        )


class Matcher:
    """Tries one pattern at one root. After a failure, ``miss`` says where it was nearest."""

    def __init__(self, view: View, pattern: Pattern) -> None:
        self.view = view
        self.pattern = pattern
        self.miss: Miss | None = None

    def at(self, root: fx.Node, bindings: dict[str, Any] | None = None) -> Match | None:
        """The match that ends in ``root``. bindings: what some parameters are to be."""
        state = self._match(self.pattern.term, root, _State(dict(bindings or {})))
        if state is None or not self._dtypes_agree(state):
            return None
        # An optional parameter that the pattern never uses binds nothing; the rest are all bound.
        nodes = interior(self.view, root, state.bindings)
        outputs = (root, *(state.values[id(term)] for term in self.pattern.also))
        return Match(
            self.view, self.pattern, outputs, state.bindings, state.chains, state.sources, nodes
        )

    def _match(self, term: Term, value: Any, state: _State) -> _State | None:
        if isinstance(term, Binding):
            return self._bind(term, value, state)
        if isinstance(term, Cast):
            return self._match_cast(term, value, state)
        if isinstance(term, Chain):
            return self._match_chain(term, value, state)
        if isinstance(term, Guard):
            if not isinstance(fake(value), torch.Tensor) or not term.holds(fake(value)):
                return self._missed(term.wanted, value, state)
            return self._match(term.source, value, state)
        if isinstance(term, Op):
            return self._match_op(term, value, state)
        if isinstance(term, tuple | list):
            return self._match_all(tuple(term), value, state)
        if isinstance(term, slice) and isinstance(value, slice):
            return self._match_all(_ends(term), _ends(value), state)
        if not isinstance(value, fx.Node) and type(value) in _LITERALS and value == term:
            return state
        return self._missed(repr(term), value, state)

    def _bind(self, term: Binding, value: Any, state: _State) -> _State | None:
        if term.name not in state.bindings:
            state.bindings[term.name] = value
        elif not self.view.same(state.bindings[term.name], value):
            return self._missed(f"the same {term.name} as before", value, state)
        return state

    def _match_op(self, term: Op, value: Any, state: _State) -> _State | None:
        expr = self.view.expr(value) if isinstance(value, fx.Node) else None
        if expr is None or expr.op != term.op or len(expr.args) != len(term.args):
            if term.op == "reshape":  # a reshape that does nothing may be missing from the graph
                return self._match(term.args[0], value, state)
            return self._missed(name_of(term.op), value, state)
        if state.values.get(id(term)) is value:  # used twice, and matched already
            state.matched += size(term)
            return state
        state.matched += 1
        state.near |= term.op not in _EVERYWHERE
        state.values[id(term)] = value
        if term.commutative:
            swapped = self._match_all(term.args, expr.args, state.copy())
            return swapped or self._match_all(term.args, expr.args[::-1], state)
        return self._match_all(term.args, expr.args, state)

    def _match_all(self, terms: tuple[Term, ...], values: Any, state: _State) -> _State | None:
        if not isinstance(values, tuple) or len(values) != len(terms):
            return self._missed(f"{len(terms)} values", values, state)
        current: _State | None = state
        for term, value in zip(terms, values, strict=True):
            if current is None:
                return None
            current = self._match(term, value, current)
        return current

    def _match_cast(self, term: Cast, value: Any, state: _State) -> _State | None:
        if not isinstance(value, fx.Node) or not isinstance(fake(value), torch.Tensor):
            return self._missed("a tensor", value, state)
        dtype = fake(value).dtype
        if isinstance(term.dtype, Binding | Op):
            state.dtypes.append((term.dtype, dtype))
        elif term.dtype != dtype:
            return self._missed(f"a cast to {term.dtype}", value, state)
        expr = self.view.expr(value)
        if expr.op == "cast":
            through = self._match(term.source, expr.args[0], state.copy())
            if through is not None:
                return through
        return self._match(term.source, value, state)

    def _match_chain(self, term: Chain, value: Any, state: _State) -> _State | None:
        if id(term) in state.values:  # used twice: on one value
            same = self.view.same(state.values[id(term)], value)
            return state if same else self._missed(f"the same {term.name} as before", value, state)
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
        return self._match(term.source, value, state)

    def _dtypes_agree(self, state: _State) -> bool:
        for term, dtype in state.dtypes:
            node = (
                state.bindings[term.name] if isinstance(term, Binding) else state.values[id(term)]
            )
            if not isinstance(fake(node), torch.Tensor) or fake(node).dtype != dtype:
                return False
        return True

    def _missed(self, wanted: str, found: Any, state: _State) -> _State | None:
        if state.near and (self.miss is None or state.matched > self.miss.matched):
            total = size(self.pattern.term)
            self.miss = Miss(self.pattern, state.matched, total, wanted, found)
        return None


_LITERALS = (int, float, bool, str, type(None), torch.dtype, type(Ellipsis))


def _ends(value: slice) -> tuple[Any, Any, Any]:
    return value.start, value.stop, value.step


def root_ops(term: Term) -> set[Any]:
    """The canonical operations at which a match of ``term`` can end."""
    if isinstance(term, Op):
        return {term.op}
    if isinstance(term, Cast):
        return {"cast"} | root_ops(term.source)
    raise TypeError(f"a pattern must end in an operation, not in {term!r}")


def candidates(view: View, pattern: Pattern) -> list[fx.Node]:
    found = [node for op in root_ops(pattern.term) for node in view.calls.get(op, ())]
    return sorted((n for n in found if not view.does_nothing(n)), key=view.position.__getitem__)


def interior(view: View, root: fx.Node, bindings: dict[str, Any]) -> set[fx.Node]:
    """The nodes between the bindings and the root: what the match computes, and what nobody reads
    of it. Dynamo leaves a view or cast in the graph whose result is dropped."""
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
    """The users of ``node`` that are views and casts, if nobody uses those in the end."""
    dead: set[fx.Node] = set()
    for user in node.users:
        if op_name(user) in ("cast", "reshape", "getitem"):
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


# -- legality -------------------------------------------------------------------------------------

_GRAD_MODE = {torch._C._set_grad_enabled}


class Legality:
    """The facts about one graph that decide whether a match may be replaced at all."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.grad_mode = [node for node in view.position if node.target in _GRAD_MODE]
        self.without_gradient = next(filter(self._loses_gradient, view.position), None)

    def check(
        self, match: Match, constants: Sequence[str] = (), saved: Sequence[str] | None = None
    ) -> None:
        """Raise `Reject` if somebody could notice that the interior values are gone.

        constants: names of bindings to which the replacement gives no gradient. saved: names of
        bindings that the replacement keeps for its backward, "output" among them for what it
        returns; None for all.
        """
        if self.without_gradient is not None:
            raise Reject(
                f"{self.without_gradient.name} is a view of a tensor with a gradient, and Dynamo "
                "says that it has none: what needs a gradient in this graph is not known"
            )
        self._plain_tensors(match)
        self._no_escape(match)
        self._inputs_in_time(match)
        self._no_mutation(match)
        self._saved_unwritten(match, saved)
        self._one_grad_mode(match, constants)

    def _loses_gradient(self, node: fx.Node) -> bool:
        """Is the node a view without a gradient of a value with one? Dynamo's fake tensors forget
        the gradient of a view that is written without grad mode (torch 2.13, ``dynamic=True``)."""
        before, after = fake(first_argument(node)), fake(node)
        return (
            isinstance(before, torch.Tensor)
            and isinstance(after, torch.Tensor)
            and before.requires_grad
            and not after.requires_grad
            and after.is_floating_point()
            and storage_key(before) == storage_key(after)
            and op_name(node) != "detach"
            and bool(self._grad_mode(node))
        )

    def check_kept(self, match: Match) -> None:
        """Raise `Reject` if a checkpoint that keeps the result of ``match`` gives other gradients
        than one that computes the result again: where the body writes to what it was given."""
        if not match.recomputed:
            return
        given = (node for node in self.view.position if node.op == "placeholder")
        written = next(filter(self.view.effects.written, given), None)
        if written is not None:
            raise Reject(f"{written.name} is written by the checkpoint, which runs twice on it")

    def _plain_tensors(self, match: Match) -> None:
        for node in match.nodes:
            for value in map(fake, (node, *node.all_input_nodes)):
                if isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value):
                    raise Reject("it runs inside of torch.func, for which the ops have no rules")
        for name, value in match.values.items():
            if isinstance(value, torch.Tensor) and _is_wrapper(value):
                raise Reject(
                    f"{name} is a {type(value).__name__}; the kernels take plain tensors only"
                )

    def _no_escape(self, match: Match) -> None:
        for node in sorted(match.nodes - set(match.outputs)):
            for user in node.users:
                if user in match.nodes or _stays(node, match.nodes):
                    continue
                what, user = name_of(op_name(node)), _reader(user)
                if user.op == "output":
                    raise Reject(f"the value of `{what}` ({node.name}) is also returned")
                raise Reject(
                    f"the value of `{what}` ({node.name}) is also used by "
                    f"`{name_of(op_name(user))}` ({user.name})"
                )

    def _inputs_in_time(self, match: Match) -> None:
        position, first = self.view.position, match.first
        for name, value in match.bindings.items():
            if not isinstance(fake(value), torch.Tensor) or not isinstance(value, fx.Node):
                continue  # a number is resolved before it is recorded
            if position[value] >= position[first]:
                raise Reject(f"{name} ({value.name}) is computed only after {first.name}")

    def _no_mutation(self, match: Match) -> None:
        """Nothing may write to a value of the match between the first and the last time that the
        match makes or reads the value. The replacement reads all of its inputs at the place of the
        first output."""
        effects, position = self.view.effects, self.view.position
        if effects.moves is not None:
            raise Reject(
                f"`{effects.moves.target}` ({effects.moves.name}) gives a tensor new memory"
            )
        names = {storage_key(v): v.name for v in match.bindings.values() if isinstance(v, fx.Node)}
        for key, (value, uses) in self._uses(match).items():
            name = names.get(key, value.name)
            if key in effects.hidden:
                raise Reject(f"{name} is written by a call that does not say so")
            uses.append(match.first)
            for write in effects.writes.get(key, ()):
                between = position[min(uses)] <= position[write] < position[max(uses)]
                if between and write not in match.nodes:
                    raise Reject(
                        f"{name} is written in place by `{name_of(op_name(write))}` ({write.name}) "
                        f"before `{name_of(op_name(max(match.outputs)))}`"
                    )

    def _uses(self, match: Match) -> dict[int, tuple[fx.Node, list[fx.Node]]]:
        """Of each storage: the value that the match reads or makes first, and the nodes of the
        match that read or make it."""
        uses: dict[int, tuple[fx.Node, list[fx.Node]]] = {}
        for node in sorted(match.nodes):
            for value in (*node.all_input_nodes, node):
                key = storage_key(value)
                if key is not None:
                    uses.setdefault(key, (value, []))[1].append(node)
        return uses

    def _saved_unwritten(self, match: Match, saved: Sequence[str] | None) -> None:
        """Nothing may write to a value that the backward of the replacement reads: autograd would
        raise, where eager kept a copy (the cast of a residual stream, say)."""
        if not any(getattr(fake(node), "requires_grad", False) for node in match.outputs):
            return
        kept = {name: v for name, v in match.bindings.items() if saved is None or name in saved}
        if saved is None or "output" in saved:
            kept |= {node.name: node for node in match.outputs}
        for name, value in kept.items():
            for write in self.view.effects.writes.get(storage_key(value) or 0, ()):
                if write not in match.nodes and not write < match.first:
                    raise Reject(
                        f"the backward needs {name}, which `{name_of(op_name(write))}` "
                        f"({write.name}) writes to later"
                    )

    def _one_grad_mode(self, match: Match, constants: Sequence[str]) -> None:
        """An output that is computed without gradients is a constant, whatever is on its way."""
        if not self.grad_mode:
            return
        constant = self._computed_of({match.bindings.get(name) for name in constants}, match)
        for output in filter(self._grad_mode, match.outputs):
            nodes = interior(self.view, output, match.bindings) | {match.first}
            if not all(map(self._grad_mode, nodes - constant)):
                raise Reject("grad mode is switched in the middle of it")

    def _computed_of(self, constant: set[Any], match: Match) -> set[Any]:
        """These values, and what the match computes of nothing else."""
        for node in sorted(match.nodes):
            inputs = [self.view.resolve(value) for value in data_inputs(node)]
            if inputs and constant.issuperset(inputs):
                constant.add(node)
        return constant

    def _grad_mode(self, node: fx.Node) -> Any:
        """Is grad mode on where the node runs?"""
        before = [s for s in self.grad_mode if self.view.position[s] < self.view.position[node]]
        return before[-1].args[0] if before else torch.is_grad_enabled()


def _reader(user: fx.Node) -> fx.Node:
    """Whoever computes with a value that ``user`` may only hand on."""
    while op_name(user) in ("cast", "detach", "reshape") and len(user.users) == 1:
        user = next(iter(user.users))
    return user


def _stays(node: fx.Node, nodes: set[fx.Node]) -> bool:
    """Is the node a view or a cast of an input of the match? It stays for whoever else uses it."""
    if op_name(node) not in ("reshape", "getitem", "cast"):
        return False
    return all(n not in nodes or _stays(n, nodes) for n in data_inputs(node))


def _is_wrapper(value: torch.Tensor) -> bool:
    """A DTensor, an NF4Tensor ...: a tensor that stands for other tensors."""
    return hasattr(type(value), "__tensor_flatten__") or hasattr(value, "__tensor_flatten__")
