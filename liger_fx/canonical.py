"""A read-only canonical view of a Dynamo graph.

The same mathematics reaches a backend in many spellings: ``x.float()`` or
``x.to(torch.float32)``, ``F.silu(g)`` or ``F.silu(g, inplace=False)``, ``linear(x, w)`` or
``linear(x, w, None)``, ``view``, ``reshape`` or ``flatten``, casts and slices that do nothing.
`View` gives every node one `Expr`, whatever its spelling; the graph itself is never changed.

Rules, all decided from each node's ``example_value``:

- a view, cast, slice or device move whose output equals its input is its input;
- ``float``, ``half``, ``type_as``, ``to(dtype)`` ... are ``cast``;
- ``view``, ``reshape``, ``flatten``, ``unsqueeze``, ``x[:, None]`` ... are ``reshape``;
- ``reshape`` and ``expand`` have no sizes: those are in the ``example_value``;
- ``x * x``, ``square(x)`` and ``x ** 2`` are ``pow``;
- ``logsumexp(stack([a, b]), 0)`` is ``logaddexp(a, b)``;
- arguments of known functions are positional, with their defaults filled in;
- ``item()`` of a number that Dynamo has specialised (``dynamic=True``) is that number.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.operator_schemas import normalize_function

Target = Callable[..., Any] | str


@dataclass(frozen=True)
class Expr:
    """What a node computes: an operation by its canonical name (or the callable itself, where
    the alphabet has no name for it) and its arguments, nodes already resolved."""

    op: Target
    args: tuple[Any, ...]


_CASTS = {"float", "half", "bfloat16", "double", "to", "type", "type_as"}
_RESHAPES = {"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "contiguous"}
_RESHAPES |= {"squeeze", "unsqueeze"}
_NAMESPACES = (torch, F, operator)  # a function of these is known by its name
_ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "itruediv": "div_",
}
COMMUTATIVE = frozenset({"add", "mul", "logaddexp"})
SIZELESS = frozenset({"reshape", "expand"})  # operations whose sizes are not arguments


def op_name(node: fx.Node) -> Target:
    """The canonical operation of ``node``, without looking at its arguments.

    A method and the functions of the same name are one operation; one that works in place ends in
    ``_``, however it is told to. Other callables stand for themselves.
    """
    if node.op == "call_method":
        name: Target = str(node.target)
    elif node.op == "call_function":
        name = _function_name(node.target)
    else:
        return node.op
    if not isinstance(name, str):
        return name
    if name in _CASTS:
        return "cast"
    if name in _RESHAPES:
        return "reshape"
    return f"{name}_" if _inplace_flag(node) else _ALIASES.get(name, name)


@functools.cache
def _function_name(target: Callable[..., Any]) -> Target:
    name = getattr(target, "__name__", "")
    known = any(getattr(namespace, name, None) is target for namespace in _NAMESPACES)
    return name if known else target


def fake(node: Any) -> Any:
    """The ``example_value`` of a node; a literal stands for itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


class View:
    """The canonical expressions of one graph. Nodes are looked at when they are asked for, once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self._exprs: dict[fx.Node, Expr] = {}
        self._resolved: dict[fx.Node, Any] = {}

    @functools.cached_property
    def calls(self) -> dict[Target, list[fx.Node]]:
        """The calls in the graph, by their `op_name`."""
        found: dict[Target, list[fx.Node]] = {}
        for node in self.position:
            if node.op.startswith("call_"):
                found.setdefault(op_name(node), []).append(node)
        return found

    def resolve(self, arg: Any) -> Any:
        """The node that really produces the value ``arg``, or the literal that it is.

        Steps over nodes that do nothing; goes into tuples, lists and slices.
        """
        if isinstance(arg, fx.Node):
            if arg not in self._resolved:
                self._resolved[arg] = self._resolve_node(arg)
            return self._resolved[arg]
        if isinstance(arg, tuple | list):
            return tuple(self.resolve(a) for a in arg)
        if isinstance(arg, slice):
            return slice(self.resolve(arg.start), self.resolve(arg.stop), self.resolve(arg.step))
        return arg

    def _resolve_node(self, node: fx.Node) -> Any:
        # A loop, not recursion: a chain of no-ops may be as long as the graph.
        while does_nothing(node):
            node = node.args[0]  # type: ignore[assignment]
        if node.op == "call_method" and node.target == "item":
            number = _specialised_number(fake(node))
            return node if number is None else number
        return node

    def expr(self, node: fx.Node) -> Expr:
        """The canonical expression of a node that `resolve` returned."""
        if node not in self._exprs:
            self._exprs[node] = self._canonical(node)
        return self._exprs[node]

    def _canonical(self, node: fx.Node) -> Expr:
        op = op_name(node)
        if node.op not in ("call_function", "call_method"):
            return Expr(op, (node,))
        if op == "cast":
            return Expr(op, (self.resolve(_first(node)), fake(node).dtype))
        if op == "getitem" and _only_inserts(node.args[1]):
            op = "reshape"
        if op in SIZELESS:
            return Expr(op, (self.resolve(_first(node)),))
        args = tuple(self.resolve(a) for a in positional(node))
        if op == "logsumexp" and args[1:] == (0, False):
            stacked = self._stacked(args[0])
            if len(stacked) == 2:
                return Expr("logaddexp", stacked)
        return Expr(*as_power(op, args))

    def _stacked(self, node: Any) -> tuple[Any, ...]:
        """What is stacked in the first dimension of ``node``; nothing if it is no such stack."""
        if not isinstance(node, fx.Node) or op_name(node) != "stack":
            return ()
        tensors, dim = (*positional(node), 0)[:2]
        return self.resolve(tensors) if dim == 0 else ()

    def same(self, a: Any, b: Any) -> bool:
        """Do two resolved values always hold the same number? True for the same node, for equal
        literals, and for the same pure expression written twice (``x.float()`` and again
        ``x.float()``): Dynamo does no common-subexpression elimination."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a is b:
                return True
            ea, eb = self.expr(a), self.expr(b)
            pure = ea.op in _REPEATABLE and ea.op == eb.op and len(ea.args) == len(eb.args)
            if not pure or _shape(a) != _shape(b):
                return False
            return all(self.same(x, y) for x, y in zip(ea.args, eb.args, strict=True))
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(self.same, a, b))
        return type(a) is type(b) and bool(a == b)


def _first(node: fx.Node) -> Any:
    """The first argument, or ``input`` where it is given by its name."""
    return node.args[0] if node.args else node.kwargs.get("input")


def as_power(op: Target, args: tuple[Any, ...]) -> tuple[Target, tuple[Any, ...]]:
    """``square(x)`` and ``x * x`` as ``pow(x, 2)``; anything else as it is."""
    if op == "square" or (op == "mul" and len(args) == 2 and args[0] is args[1]):
        return "pow", (args[0], 2)
    return op, args


# Expressions that give the same value each time they are written; no random ones, no unknown ones.
_REPEATABLE = frozenset(
    {"cast", "reshape", "getitem", "chunk", "split", "transpose", "permute", "neg", *COMMUTATIVE}
)


def _shape(node: fx.Node) -> Any:
    value = fake(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def does_nothing(node: fx.Node) -> bool:
    """Is the node's output its first argument, element for element?"""
    op = op_name(node)
    if op not in ("cast", "reshape", "getitem") or not node.args:
        return False
    source = node.args[0]
    before, after = fake(source), fake(node)
    if not isinstance(source, fx.Node) or not isinstance(before, torch.Tensor):
        return False
    if not isinstance(after, torch.Tensor):
        return False
    if before.dtype != after.dtype or before.device != after.device:
        return False
    if op == "getitem" and not _only_slices(node.args[1]):
        return False
    return same_sizes(before.shape, after.shape)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Are two shapes or strides equal? Symbols are compared by name: asking whether s0 == s1 would
    add a guard to the user's graph."""
    return len(a) == len(b) and all(x is y or str(x) == str(y) for x, y in zip(a, b, strict=True))


def _only_slices(index: Any) -> bool:
    """An index of full or partial slices only; an index tensor of the same shape is no no-op."""
    items = index if isinstance(index, tuple | list) else (index,)
    return all(item is Ellipsis or isinstance(item, slice) for item in items)


def _only_inserts(index: Any) -> bool:
    """``x[:, :, None]``: dimensions of one element are added and nothing else."""
    items = index if isinstance(index, tuple | list) else (index,)
    added = [item for item in items if item is None]
    rest = [item for item in items if item is not None]
    return bool(added) and all(item is Ellipsis or item == slice(None) for item in rest)


def _specialised_number(value: Any) -> float | int | bool | None:
    """The number itself, or the constant behind a Sym value that Dynamo has specialised: its
    expression has no free symbol left. None for a number that may vary."""
    if isinstance(value, int | float | bool):
        return value
    if not isinstance(value, torch.SymInt | torch.SymFloat) or value.node.expr.free_symbols:
        return None
    node = value.node
    return node.maybe_as_float() if isinstance(value, torch.SymFloat) else node.maybe_as_int()


# Builtins without a signature to read: parameters and defaults.
_SIGNATURES: dict[Any, dict[str, Any]] = {
    F.linear: dict(input=None, weight=None, bias=None),
    F.gelu: dict(input=None, approximate="none"),
    F.scaled_dot_product_attention: dict(
        query=None,
        key=None,
        value=None,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    ),
    torch.log_softmax: dict(input=None, dim=None, dtype=None),  # as F.log_softmax
    torch.softmax: dict(input=None, dim=None, dtype=None),
    torch.logsumexp: dict(input=None, dim=None, keepdim=False),
    torch.sum: dict(input=None, dim=None, keepdim=False, dtype=None),
    torch.gather: dict(input=None, dim=None, index=None),
    torch.rms_norm: dict(input=None, normalized_shape=None, weight=None, eps=None),
}


def hint(value: Any) -> float | int | None:
    """The number that ``value`` is in this compilation, whether or not it may vary; None for a
    tensor, and for what only the data know."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, torch.SymInt | torch.SymFloat) and value.node.has_hint():
        return value.node.hint
    return None


def specialise(value: float | torch.SymFloat) -> float:
    """The number itself. If it may vary (a module's ``eps`` under ``dynamic=True``), Dynamo guards
    on it, and compiles again should it ever change."""
    return float(value)


def positional(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a call in the order of its signature, defaults filled in, without the
    ``inplace`` flag (see `op_name`) and the ``_stacklevel`` of a softmax's warning.

    Falls back to the arguments as written, keywords last and sorted by name, where a builtin
    publishes no signature, or several that fit.
    """
    args, kwargs = tuple(node.args), dict(node.kwargs)
    # transpose, chunk, mean ... have their twin in torch.*, with the same parameters.
    target: Any = node.target
    if node.op == "call_method":
        target = getattr(torch, str(node.target), None)
    if target in _SIGNATURES:
        named = dict(zip(_SIGNATURES[target], args, strict=False)) | kwargs
        return tuple((_SIGNATURES[target] | named).values())
    parameters = _parameters(target)
    if parameters is not None:
        named = dict(zip((p.name for p in parameters), args, strict=False)) | kwargs
        return tuple(
            named.get(p.name, None if p.default is p.empty else p.default)
            for p in parameters
            if p.name not in ("inplace", "_stacklevel")
        )
    if kwargs and target is not None:
        try:
            normal = normalize_function(target, args, kwargs, normalize_to_only_use_kwargs=True)
        except RuntimeError:  # several schemas fit, as for torch.tensor(8.0)
            normal = None
        if normal is not None:
            return tuple(normal.kwargs.values())
    return args + tuple(kwargs[k] for k in sorted(kwargs))


@functools.cache
def _parameters(target: Any) -> tuple[inspect.Parameter, ...] | None:
    """The parameters of a callable with a fixed number of them; None for most builtins."""
    try:
        parameters = tuple(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None
    variadic = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    return None if variadic else parameters


def _inplace_flag(node: fx.Node) -> bool:
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is True
    parameters = _parameters(node.target) if node.op == "call_function" else None
    names = [p.name for p in parameters or ()]
    return "inplace" in names and node.args[names.index("inplace") :][:1] == (True,)


# -- mutation -------------------------------------------------------------------------------------


def mutated_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The tensor arguments that ``node`` writes to."""
    if node.op not in ("call_function", "call_method"):
        return
    for value in [*_written(node), node.kwargs.get("out")]:
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, fx.Node) and isinstance(fake(item), torch.Tensor):
                yield item


def _written(node: fx.Node) -> list[Any]:
    schema = getattr(node.target, "_schema", None)
    if isinstance(node.target, torch._ops.OpOverload) and schema is not None:
        named = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        return [named.get(name) for name in written]
    name = op_name(node)
    if not isinstance(name, str):
        name = getattr(name, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    # Of operators, `ior` and its like have no alias: they are not in any pattern.
    in_place |= name in ("setitem", "delitem", "__setitem__") or node.target in _OTHER_INPLACE
    return [_first(node)] if in_place else []


_OTHER_INPLACE = {
    getattr(operator, f"i{name}")
    for name in [
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "concat",
    ]
}


def storage_key(node: fx.Node) -> int | None:
    """Nodes with the same key are views of the same memory."""
    value = fake(node)
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return value.untyped_storage()._cdata
    except NotImplementedError:  # a wrapper subclass (DTensor, NF4Tensor) has no storage of its own
        return id(value)
