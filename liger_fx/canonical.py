"""A read-only canonical view of a Dynamo graph.

The same mathematics reaches a backend in many spellings: ``x.float()`` or
``x.to(torch.float32)``, ``F.silu(g)`` or ``F.silu(g, inplace=False)``, ``linear(x, w)`` or
``linear(x, w, None)``, ``view``, ``reshape`` or ``flatten``, casts and slices that do nothing.
`View` gives every node one `Expr`, whatever its spelling; the graph itself is never changed.

Rules, all decided from each node's ``example_value``:

- a view, cast or slice whose output equals its input is its input; a copy is so only if nothing in
  the graph ever writes to either of the two;
- ``float``, ``half``, ``type_as``, ``to(dtype)`` ... are ``cast``;
- ``view``, ``reshape``, ``flatten``, ``unsqueeze``, ``x[:, None]`` ... are ``reshape``;
- ``x[:, :, 0::2]`` is ``x[..., ::2]``;
- ``softmax(x, 2)`` of three dimensions is ``softmax(x, -1)``: the last dimension is -1, the others
  count from the front; both of a ``transpose`` count from the front, the smaller first;
- ``reshape`` and ``expand`` have no sizes: those are in the ``example_value``;
- ``x * x``, ``square(x)`` and ``x ** 2`` are ``pow``; ``x ** -0.5`` is ``rsqrt``;
- ``logsumexp(stack([a, b]), 0)`` is ``logaddexp(a, b)``;
- arguments of known functions are positional, with their defaults filled in;
- ``item()`` of a number that Dynamo has specialised (``dynamic=True``) is that number.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.operator_schemas import normalize_function

from liger_fx.effects import (
    Effects,
    fake,
    first_argument,
    inplace_flag,
    nodes_in,
    parameters,
    storage_key,
)

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
    "concat": "cat",
    "concatenate": "cat",
}
COMMUTATIVE = frozenset({"add", "mul", "logaddexp"})
SIZELESS = frozenset({"reshape", "expand"})  # operations whose sizes are not arguments


def op_name(node: fx.Node) -> Target:
    """The canonical operation of ``node``, without looking at its arguments.

    A method and the functions of the same name are one operation. An operation that works in place
    ends in ``_``, however it is told to. Other callables stand for themselves.
    """
    if node.op == "call_method":
        name: Target = _method_name(node)
    elif node.op == "call_function":
        name = _function_name(node.target)
    else:
        return node.op
    if not isinstance(name, str):
        return name
    if name in _CASTS:
        return "move" if _changes_device(node) else "cast"
    if name in _RESHAPES:
        return "reshape"
    return f"{name}_" if inplace_flag(node) else _ALIASES.get(name, name)


def _method_name(node: fx.Node) -> str:
    """Without the underscores of an operator, ``__eq__``."""
    return re.sub(r"^__(\w+)__$", r"\1", str(node.target))


@functools.cache
def _function_name(target: Callable[..., Any]) -> Target:
    name = getattr(target, "__name__", "")
    known = any(getattr(namespace, name, None) is target for namespace in _NAMESPACES)
    return name if known else target


def _changes_device(node: fx.Node) -> bool:
    before, after = fake(first_argument(node)), fake(node)
    tensors = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    return tensors and before.device != after.device


class View:
    """The canonical expressions of one graph. Nodes are looked at when they are asked for, once.

    effects: the writes in the graph. counted: as for `Effects`. callers: of a body, the calls of it
    and the views of the graphs they are in.
    """

    def __init__(
        self,
        graph: fx.Graph,
        counted: Mapping[int, int] | None = None,
        callers: Sequence[tuple[Callable[[], View], fx.Node]] = (),
    ) -> None:
        self.graph = graph
        self.callers = callers
        self.effects = Effects(graph, counted)
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
        while self.does_nothing(node):
            node = node.args[0]  # type: ignore[assignment]
        if node.op == "call_method" and node.target == "item":
            number = _specialised_number(fake(node))
            return node if number is None else number
        return node

    def operand(self, node: fx.Node) -> tuple[View, fx.Node] | None:
        """What a placeholder of a body is called with: the node, and the view of its graph. None if
        it is no placeholder of a body, or the calls differ."""
        if node.op != "placeholder" or not self.callers:
            return None
        given = self.graph.find_nodes(op="placeholder")
        at = given.index(node) - len(given)
        (outer, call), *others = self.callers
        if any(other.args[at] is not call.args[at] for _, other in others):
            return None
        operand = call.args[at]
        return (outer(), operand) if isinstance(operand, fx.Node) else None

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
            return Expr(op, (self.resolve(first_argument(node)), fake(node).dtype))
        if op == "getitem" and _only_inserts(node.args[1]):
            op = "reshape"
        if op in SIZELESS:
            return Expr(op, (self.resolve(first_argument(node)),))
        args = tuple(self.resolve(a) for a in positional(node))
        if op == "getitem" and isinstance(source := fake(args[0]), torch.Tensor):
            return Expr(op, (args[0], _index(args[1], source.dim())))
        if op == "logsumexp" and args[1:] == (0, False):
            stacked = self._stacked(args[0])
            if len(stacked) == 2:
                return Expr("logaddexp", stacked)
        return Expr(*as_power(op, _along(op, args, fake(node))))

    def _stacked(self, node: Any) -> tuple[Any, ...]:
        """What is stacked in the first dimension of ``node``; nothing if it is no such stack."""
        if not isinstance(node, fx.Node) or op_name(node) != "stack":
            return ()
        tensors, dim = (*positional(node), 0)[:2]
        return self.resolve(tensors) if dim == 0 else ()

    def does_nothing(self, node: fx.Node) -> bool:
        """Does the node's output always hold what its first argument holds?"""
        if op_name(node) not in ("cast", "reshape", "getitem") or not node.args:
            return False
        source = node.args[0]
        before, after = fake(source), fake(node)
        if not isinstance(source, fx.Node) or not isinstance(before, torch.Tensor):
            return False
        if not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
            return False
        if op_name(node) == "getitem" and not only_slices(node.args[1]):
            return False
        if not same_sizes(before.shape, after.shape):
            return False
        is_view = storage_key(node) == storage_key(source)
        return is_view or not (self.effects.written(node) or self.effects.written(source))

    def same(self, a: Any, b: Any) -> bool:
        """Do two resolved values always hold the same number? True for the same node, for equal
        literals, and for the same pure expression written twice (``x.float()`` and again
        ``x.float()``, as Dynamo does no common-subexpression elimination) of values that nothing in
        the graph ever writes to."""
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return a is b or self._repeats(a, b)
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(self.same, a, b))
        return type(a) is type(b) and bool(a == b)

    def _repeats(self, a: fx.Node, b: fx.Node) -> bool:
        ea, eb = self.expr(a), self.expr(b)
        if ea.op not in _REPEATABLE or ea.op != eb.op or not _same_shape(fake(a), fake(b)):
            return False
        values = (a, b, *nodes_in((ea.args, eb.args)))
        return not any(map(self.effects.written, values)) and self.same(ea.args, eb.args)


# Operations that another one may be written as, for some arguments.
WRITTEN_AS: dict[Target, tuple[str, ...]] = {
    "pow": ("square", "mul"),
    "rsqrt": ("pow",),
    "logaddexp": ("logsumexp",),
}


def as_power(op: Target, args: tuple[Any, ...]) -> tuple[Target, tuple[Any, ...]]:
    """``square(x)`` and ``x * x`` as ``pow(x, 2)``, ``pow(x, -0.5)`` as ``rsqrt(x)``; anything else
    as it is."""
    if op == "square" or (op == "mul" and len(args) == 2 and args[0] is args[1]):
        return "pow", (args[0], 2)
    if op == "pow" and args[1:] == (-0.5,):
        return "rsqrt", args[:1]
    return op, args


# Where the arguments name a dimension.
_DIM_AT: dict[Target, int] = {
    **dict.fromkeys(("cat", "stack", "unbind", "softmax", "log_softmax", "logsumexp"), 1),
    **dict.fromkeys(("mean", "sum", "gather"), 1),
    **dict.fromkeys(("chunk", "split"), 2),
}


def _along(op: Target, args: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
    """The arguments with the last dimension as -1 and others from the front; of ``transpose`` both
    from the front, the smaller first."""
    at = _DIM_AT.get(op, len(args))
    named = args[1:] if op == "transpose" else args[at : at + 1]
    if not named or not all(type(dim) is int for dim in named):
        return args
    value = output if isinstance(args[0], tuple) else fake(args[0])  # a list of tensors, or one
    if not isinstance(value, torch.Tensor):
        return args
    rank = max(value.dim(), 1)
    dims = sorted(dim % rank for dim in named)
    if op == "transpose":
        return args[0], *dims
    return *args[:at], -1 if dims[0] == rank - 1 else dims[0], *args[at + 1 :]


# Expressions that give the same value each time they are written; no random ones, no unknown ones.
_REPEATABLE = frozenset(
    {"cast", "reshape", "getitem", "chunk", "split", "transpose", "permute", "neg", *COMMUTATIVE}
)


def _same_shape(a: Any, b: Any) -> bool:
    """Are two values tensors of one shape, or both no tensors?"""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same_sizes(a.shape, b.shape)
    return isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Are two shapes or strides equal? Symbols are compared by name: asking whether s0 == s1 would
    add a guard to the user's graph."""
    return len(a) == len(b) and all(x is y or str(x) == str(y) for x, y in zip(a, b, strict=True))


def agreeing_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """As `same_sizes`, but sizes that are equal now may have other names: Dynamo then guards that
    they stay equal. Two inputs of one batch may name its size differently."""
    if same_sizes(a, b):
        return True
    pairs = list(zip(a, b, strict=False))
    alike = len(a) == len(b) and all(hint(x) == hint(y) is not None for x, y in pairs)
    return alike and all(bool(x == y) for x, y in pairs)


def only_slices(index: Any) -> bool:
    """An index of full or partial slices only; an index tensor of the same shape is no no-op."""
    items = index if isinstance(index, tuple | list) else (index,)
    return all(item is Ellipsis or isinstance(item, slice) for item in items)


def _only_inserts(index: Any) -> bool:
    """``x[:, :, None]``: dimensions of one element are added and nothing else."""
    items = index if isinstance(index, tuple | list) else (index,)
    added = [item for item in items if item is None]
    rest = [item for item in items if item is not None]
    return bool(added) and all(item is Ellipsis or item == slice(None) for item in rest)


def _index(index: Any, dims: int) -> Any:
    """An index of a tensor of ``dims`` dimensions, without what says nothing: a start of 0, a step
    of 1; and with an ellipsis for the whole dimensions in front, if all dimensions are named."""
    if not isinstance(index, tuple):
        return _without_defaults(index)
    items = tuple(map(_without_defaults, index))
    named = [item for item in items if isinstance(item, slice | int)]
    if len(named) != len(items) or len(items) != dims or items[0] != slice(None):
        return items
    return (Ellipsis, *itertools.dropwhile(lambda item: item == slice(None), items))


def _without_defaults(item: Any) -> Any:
    if not isinstance(item, slice):
        return item
    start = None if isinstance(item.start, int) and item.start == 0 else item.start
    return slice(start, item.stop, None if item.step == 1 else item.step)


def _specialised_number(value: Any) -> float | None:
    """The number itself, or the constant behind a Sym value that Dynamo has specialised: its
    expression has no free symbol left. None for a number that may vary."""
    if isinstance(value, torch.SymInt):
        return value.node.maybe_as_int()
    if isinstance(value, torch.SymFloat):
        return value.node.maybe_as_float()
    return value if isinstance(value, int | float) else None


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
    torch.cat: dict(tensors=None, dim=0),
    torch.stack: dict(tensors=None, dim=0),
    torch.chunk: dict(input=None, chunks=None, dim=0),
    torch.unbind: dict(input=None, dim=0),
    torch.log_softmax: dict(input=None, dim=None, dtype=None),  # as F.log_softmax
    torch.softmax: dict(input=None, dim=None, dtype=None),
    torch.logsumexp: dict(input=None, dim=None, keepdim=False),
    torch.clamp: dict(input=None, min=None, max=None),
    torch.sum: dict(input=None, dim=None, keepdim=False, dtype=None),
    torch.mean: dict(input=None, dim=None, keepdim=False, dtype=None),
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
        target = getattr(torch, _method_name(node), None)
    defaults = _SIGNATURES.get(target) or _defaults(target)
    if defaults is not None:
        found = defaults | dict(zip(defaults, args, strict=False)) | kwargs
        return tuple(v for name, v in found.items() if name not in ("inplace", "_stacklevel"))
    if kwargs and target is not None:
        try:
            normal = normalize_function(target, args, kwargs, normalize_to_only_use_kwargs=True)
        except RuntimeError:  # several schemas fit, as for torch.tensor(8.0)
            normal = None
        if normal is not None:
            return tuple(normal.kwargs.values())
    return args + tuple(kwargs[k] for k in sorted(kwargs))


@functools.cache
def _defaults(target: Any) -> dict[str, Any] | None:
    fixed = parameters(target)
    if fixed is None:
        return None
    return {p.name: None if p.default is p.empty else p.default for p in fixed}
