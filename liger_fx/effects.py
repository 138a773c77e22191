"""What the nodes of a graph write to.

Unknown means written: a rewrite may only rely on a value that nothing is able to write to. The
sources, in this order:

- the schema of an operator (``torch.ops.lib.op.default``), or of all overloads of its packet
  (``torch.ops.lib.op``);
- the bodies of a higher-order operator; without a body it writes to all its tensors;
- PyTorch's conventions for its own functions and methods: a trailing underscore, ``inplace=True``,
  ``out=``, ``operator.setitem`` and ``operator.iadd`` with its like;
- any other callable writes to all its tensors.

Dynamo ran the program on fake tensors, which count their writes in ``_version``. Where they counted
more than the graph shows (``F.embedding(max_norm=...)`` writes to its weight), some write is hidden
and the whole storage counts as `Effects.hidden`.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

# Calls after which a tensor lies in other memory than a write before them went to.
_MOVES = frozenset({"set_", "set_data", "resize_", "resize_as_"})


def fake(node: Any) -> Any:
    """The ``example_value`` of a node; a literal stands for itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def nodes_in(arg: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(arg, found.append)
    return found


def storage_key(node: Any) -> int | None:
    """A number that all views of one memory share; None for a value that is no tensor."""
    value = fake(node)
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:  # a wrapper subclass (DTensor, NF4Tensor) has no storage of its own
        return id(value)


class Effects:
    """The writes in one graph, by storage.

    writes: the nodes of the graph that write to a storage, in order. hidden: storages with a write
    that no node shows. counted: `known_writes` of the graph that Dynamo made, of which this one may
    be a body.
    """

    def __init__(self, graph: fx.Graph, counted: Mapping[int, int] | None = None) -> None:
        self.writes: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            for written in _written_keys(node):
                self.writes.setdefault(written, []).append(node)
        if counted is None:
            counted = known_writes(graph.owning_module) if graph.owning_module else {}
        self.hidden = {
            key
            for node in graph.nodes
            if (key := storage_key(node)) is not None and _version(node) > counted.get(key, 0)
        }
        self.moves = next((node for node in graph.nodes if _name(node) in _MOVES), None)

    def written(self, node: fx.Node) -> bool:
        """May anything in the graph write to the memory of ``node``, at whatever time?"""
        key = storage_key(node)
        return self.moves is not None or key in self.writes or key in self.hidden


def known_writes(gm: fx.GraphModule) -> Counter[int]:
    """How many writes to each storage the nodes of ``gm`` and of all bodies show, by calls of
    PyTorch's own: these raise ``_version``, which an operator of somebody else's need not."""
    found: Counter[int] = Counter()
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op.startswith("call_") and _raises_version(node):
                found.update(_written_keys(node))
    return found


def _raises_version(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(node.target).startswith("aten.")
    return not _is_higher_order(node) and _is_known(node)


def _version(node: fx.Node) -> int:
    try:
        return fake(node)._version
    except (RuntimeError, NotImplementedError):  # an inference tensor does not count
        return 0


def _written_keys(node: fx.Node) -> set[int]:
    return {key for value in written_values(node) if (key := storage_key(value)) is not None}


def written_values(node: fx.Node) -> list[fx.Node]:
    """The arguments of ``node`` that the call may write to."""
    if not node.op.startswith("call_"):
        return []
    if _is_higher_order(node):
        return _written_by_bodies(node)
    if not _is_known(node):
        return node.all_input_nodes
    return list(dict.fromkeys(nodes_in(_written_arguments(node))))


def without_grad(graph: fx.Graph) -> set[fx.Node]:
    """The calls that run without grad mode."""
    found, grad = set(), torch.is_grad_enabled()
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad = bool(node.args[0])
        elif not grad and node.op.startswith("call_"):
            found.add(node)
    return found


# -- higher-order operators ------------------------------------------------------------------------


def _is_higher_order(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def bodies(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a higher-order operator is called with."""
    if not _is_higher_order(node) or node.graph.owning_module is None:
        return []
    named = (str(n.target) for n in node.all_input_nodes if n.op == "get_attr")
    found = (operator.attrgetter(name)(node.graph.owning_module) for name in named)
    return [module for module in found if isinstance(module, fx.GraphModule)]


def _written_by_bodies(node: fx.Node) -> list[fx.Node]:
    """The operands that a body writes to. Operand and placeholder have one fake value; where they
    have not, nobody can tell which operand is written."""
    inside = bodies(node)
    written = {key for body in inside for n in body.graph.nodes for key in _written_keys(n)}
    given = {
        storage_key(n) for body in inside for n in body.graph.nodes if n.op == "placeholder"
    } & written
    operands = node.all_input_nodes
    unclear = not inside or not given <= {storage_key(operand) for operand in operands}
    return [n for n in operands if unclear or storage_key(n) in given]


# -- functions, methods and operators --------------------------------------------------------------


def _is_known(node: fx.Node) -> bool:
    """Does the callable have a schema, or follow PyTorch's conventions?"""
    if node.op == "call_method":
        # Without a value it is no tensor's method, such as an entry of a context manager.
        return isinstance(fake(node.args[0]), torch.Tensor) and hasattr(torch.Tensor, node.target)  # type: ignore[arg-type]
    if node.op != "call_function":
        return False
    if _updates_statistics(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True
    owner = getattr(node.target, "__objclass__", node.target)  # of a method: torch.Tensor.add_
    package = (getattr(owner, "__module__", None) or "").split(".")[0]
    return package in ("torch", "operator", "_operator", "math", "builtins")


def _updates_statistics(node: fx.Node) -> bool:
    """Is it a batch or instance norm in training? Neither schema nor version shows its writes."""
    name, args, kwargs = _name(node), node.args, node.kwargs
    if "batch_norm" not in name and "instance_norm" not in name:
        return False
    given = args[5] if len(args) > 5 else name != "batch_norm"  # both have the flag there
    return kwargs.get("training", kwargs.get("use_input_stats", given)) is not False


def _written_arguments(node: fx.Node) -> list[Any]:
    if isinstance(node.target, torch._ops.OpOverload):
        return _by_schema([node.target], node)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        return _by_schema(_overloads(node.target), node)
    name, written = _name(node), [node.kwargs.get("out")]
    if _works_in_place(name) or inplace_flag(node):
        written.append(first_argument(node))
    packet = getattr(torch.ops.aten, name, None)
    if isinstance(packet, torch._ops.OpOverloadPacket):  # _fused_adam_ writes to several
        written += _by_schema(_overloads(packet), node)
    return written


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _by_schema(overloads: Iterable[torch._ops.OpOverload], node: fx.Node) -> list[Any]:
    """The union over ``overloads`` of the arguments that the schema says are written to."""
    return [
        node.kwargs.get(argument.name)
        if argument.kwarg_only or i >= len(node.args)
        else node.args[i]
        for overload in overloads
        for i, argument in enumerate(overload._schema.arguments)
        if argument.is_write
    ]


@functools.cache
def _overloads(packet: torch._ops.OpOverloadPacket) -> tuple[torch._ops.OpOverload, ...]:
    """The overloads that write to anything."""
    found = (getattr(packet, name) for name in packet.overloads())
    return tuple(overload for overload in found if overload._schema.is_mutable)


_IN_PLACE_OPERATORS = {"setitem", "delitem"}
_IN_PLACE_OPERATORS |= {  # iadd, as there is add; but not index, invert
    name
    for name in operator.__all__
    if name.startswith("i") and hasattr(operator, f"__{name[1:]}__")
}


def _works_in_place(name: str) -> bool:
    if name.startswith("__") and name.endswith("__"):
        return name[2:-2] in _IN_PLACE_OPERATORS
    if name in ("and_", "or_"):  # of `operator`, where the plain names are keywords
        return False
    return name.endswith("_") or name in _IN_PLACE_OPERATORS


def first_argument(node: fx.Node) -> Any:
    """The first argument, or ``input`` where it is given by its name."""
    return node.args[0] if node.args else node.kwargs.get("input")


def inplace_flag(node: fx.Node) -> bool:
    """Is the ``inplace`` flag of a function such as `torch.nn.functional.silu` set?"""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    names = [p.name for p in parameters(node.target) or ()] if node.op == "call_function" else []
    return "inplace" in names and node.args[names.index("inplace") :][:1] not in ((), (False,))


@functools.cache
def parameters(target: Any) -> tuple[inspect.Parameter, ...] | None:
    """The parameters of a callable with a fixed number of them; None for most builtins."""
    try:
        found = tuple(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None
    return None if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found) else found
