"""The rules that make a match legal: nobody may notice that it was replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

# Whose wrappers the values of torch.func are (torch/_functorch/pyfunctorch.py).
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from liger_fx.canonical import View, fake, first_argument, op_name, storage_key
from liger_fx.effects import without_grad
from liger_fx.frame import goes_on
from liger_fx.matcher import Match, Reject, data_inputs, interior, name_of, named
from liger_fx.returned import ReturnedLogits

if TYPE_CHECKING:
    from liger_fx.rewrite import Rewrite


@dataclass(eq=False)
class Legality:
    """The facts about one graph, until it changes, that decide whether a match may be replaced.

    recomputed: a checkpoint runs the graph again in its backward. counted: as for `Effects`.
    returned: as for `rewrite_graph`. callers: as for `View`.
    """

    gm: fx.GraphModule
    recomputed: bool
    counted: Mapping[int, int]
    returned: Sequence[ReturnedLogits] = ()
    callers: list[tuple[Callable[[], View], fx.Node]] = field(default_factory=list)

    @property
    def operands(self) -> int:
        """How many operands the calls of the graph have."""
        return sum(len(call.args) for _, call in self.callers)

    @functools.cached_property
    def view(self) -> View:
        return View(self.gm.graph, self.counted, self.callers)

    @functools.cached_property
    def without_grad(self) -> set[fx.Node]:
        return without_grad(self.gm.graph)

    @functools.cached_property
    def without_gradient(self) -> fx.Node | None:
        return next(filter(self._loses_gradient, self.view.position), None)

    @functools.cached_property
    def handed_on(self) -> set[int | None]:
        """The memory of what is returned to code of the compiled function after a graph break."""
        if not hasattr(self.gm, "compile_subgraph_reason"):
            return set()  # a body, whose values the graph around it knows
        returned = self.gm.graph.output_node().all_input_nodes
        return {storage_key(node) for node in returned if goes_on(self.gm, node)}

    def check(self, match: Match, rewrite: Rewrite) -> None:
        """Raise `Reject` if somebody could notice that the interior values are gone."""
        if self.without_gradient is not None:
            raise Reject(
                f"{self.without_gradient.name} is a view of a tensor with a gradient, and Dynamo "
                "says that it has none: what needs a gradient in this graph is not known"
            )
        saved = rewrite.saved(match) if callable(rewrite.saved) else rewrite.saved
        self._plain_tensors(match)
        # A rewrite with a gain takes a loss of logits, whose return may be deferred.
        self._no_escape(match, self.returned if rewrite.gain is not None else ())
        self._inputs_in_time(match)
        self._unwritten(match, saved)
        self._one_grad_mode(match, rewrite.constants)
        if rewrite.kept_ops(match.settings):
            self.check_kept(match)

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
            and node not in self.without_grad
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
            if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
                raise Reject(
                    f"{name} is a {type(value).__name__}; the kernels take plain tensors only"
                )

    def _no_escape(self, match: Match, returned: Sequence[ReturnedLogits]) -> None:
        for node in sorted(match.nodes - set(match.outputs)):
            for user in node.users:
                if user in match.nodes or _stays(node, match.nodes):
                    continue
                if _is_deferrable(node, user, match.nodes, returned):
                    continue
                user = _reader(user)
                if user.op == "output":
                    why = next((r.obstacle for r in returned if node in r.nodes), "")
                    why = why and f", and cannot be computed later: {why}"
                    raise Reject(f"the value of {named(node)} is also returned{why}")
                raise Reject(f"the value of {named(node)} is also used by {named(user)}")

    def _inputs_in_time(self, match: Match) -> None:
        position, first = self.view.position, match.first
        for name, value in match.bindings.items():
            if not isinstance(fake(value), torch.Tensor) or not isinstance(value, fx.Node):
                continue  # a number is resolved before it is recorded
            if position[value] >= position[first]:
                raise Reject(f"{name} ({value.name}) is computed only after {first.name}")

    def _unwritten(self, match: Match, saved: Sequence[str] | None) -> None:
        """Nothing may write to a value of the match while it is needed: from its first to its last
        use, since the replacement reads all of its inputs at the place of the first output; and to
        the end, if the backward reads it, where eager may have kept a copy (the cast of a residual
        stream, say)."""
        effects, first, last = self.view.effects, match.first, max(match.outputs)
        if effects.moves is not None:
            raise Reject(
                f"`{effects.moves.target}` ({effects.moves.name}) gives a tensor new memory"
            )
        names = {storage_key(v): v.name for v in match.bindings.values() if isinstance(v, fx.Node)}
        kept = self._kept(match, saved)
        outside = {n for node in match.nodes for n in node.all_input_nodes} - match.nodes
        seen = set(map(storage_key, outside.union(match.outputs)))
        for key, (value, uses) in self._uses(match).items():
            name = names.get(key, value.name)
            if key in effects.hidden:
                raise Reject(f"{name} is written by a call that does not say so")
            if key in kept and key in self.handed_on:
                raise Reject(f"the backward needs {kept[key]}, which later code may write to")
            for write in effects.writes.get(key, ()):
                if write in match.nodes:
                    continue
                by = named(write)
                if not write < min(uses) and write < max(uses):
                    raise Reject(
                        f"{name} is written in place by {by} before `{name_of(op_name(last))}`"
                    )
                if key in kept and not write < first:
                    raise Reject(f"the backward needs {kept[key]}, which {by} writes to later")
                if key not in seen and not write < first:
                    raise Reject(f"{name} is written by {by}, and eager's backward may read it")

    def _uses(self, match: Match) -> dict[int, tuple[fx.Node, list[fx.Node]]]:
        """Of each storage: the value that the match reads or makes first, and the nodes that read
        or make it."""
        uses: dict[int, tuple[fx.Node, list[fx.Node]]] = {}
        for node in sorted(match.nodes):
            for value in (*node.all_input_nodes, node):
                key = storage_key(value)
                if key is not None:
                    uses.setdefault(key, (value, [match.first]))[1].append(node)
        return uses

    def _kept(self, match: Match, saved: Sequence[str] | None) -> dict[int | None, str]:
        """The names of what the backward of the replacement reads, by storage."""
        if not any(getattr(fake(node), "requires_grad", False) for node in match.outputs):
            return {}
        kept = {storage_key(v): n for n, v in match.bindings.items() if saved is None or n in saved}
        if saved is None or "output" in saved:
            kept |= {storage_key(node): node.name for node in match.outputs}
        return kept

    def _one_grad_mode(self, match: Match, constants: Sequence[str]) -> None:
        """An output that is computed without gradients is a constant, whatever is on its way."""
        if not self.without_grad:
            return
        constant = self._computed_of({match.bindings.get(name) for name in constants}, match)
        for output in set(match.outputs) - self.without_grad:
            nodes = interior(self.view, output, match.bindings) | {match.first}
            if (nodes - constant) & self.without_grad:
                raise Reject("grad mode is switched in the middle of it")

    def _computed_of(self, constant: set[Any], match: Match) -> set[Any]:
        """These values, and what the match computes of nothing else."""
        for node in sorted(match.nodes):
            inputs = [self.view.resolve(value) for value in data_inputs(node)]
            if inputs and constant.issuperset(inputs):
                constant.add(node)
        return constant


def _is_deferrable(
    node: fx.Node, user: fx.Node, nodes: set[fx.Node], returned: Sequence[ReturnedLogits]
) -> bool:
    """Does ``user`` lead to nothing but a return of logits that can be computed when read?"""
    chains = [r for r in returned if node in r.nodes and not r.obstacle]
    if user.op == "output":
        return any(node is r.value for r in chains)
    return any(user in r.nodes for r in chains) and all(
        u in nodes or _is_deferrable(user, u, nodes, returned) for u in user.users
    )


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
