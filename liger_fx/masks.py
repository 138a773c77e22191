"""What an attention mask says, read from the nodes that compute it.

A mask is a function of four indices: batch ``b``, head ``h``, query ``q`` and key ``k``. `read`
computes one element of it with symbols in the place of the indices. Index vectors become arithmetic
on these symbols, and the element a conjunction of comparisons:

==================  ===========================  =============================================
predicate           element of the mask          meaning
==================  ===========================  =============================================
causal              ``k <= q``                   a query sees no later key
window W            ``q - k < W``                a query sees the last W keys, its own included
documents D         ``D[b, q] == D[b, k]``       query and key lie in one document
valid M             ``M[b, k]``                  the key is no padding
==================  ===========================  =============================================

Nothing is evaluated on examples, so a predicate holds for all data and sizes. A node that no rule
knows is a function of its indices about which nothing is known. Additive masks, zero where a key is
seen and minus infinity elsewhere, are read as boolean ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import fx

from liger_fx.canonical import View, fake, first_argument, op_name, positional, same_sizes
from liger_fx.frame import PART, is_part

AXES = B, H, Q, K = sympy.symbols("b h q k", integer=True, nonnegative=True)
Index = tuple[sympy.Expr, ...]


class Unreadable(Exception):
    """The mask is no conjunction of known predicates, or nobody can tell: this is why."""


@dataclass(frozen=True)
class Source:
    """A node and the view of its graph: inside of a body, the graph around it may hold the node."""

    view: View
    node: fx.Node


@dataclass(frozen=True)
class Mask:
    """The predicates that hold of the keys a query sees, all of them.

    window: how many keys. documents: int [b, s], never decreasing along s. valid: bool or int
    [b, s], zero for padding.
    """

    causal: bool = False
    window: int | None = None
    documents: Source | None = None
    valid: Source | None = None

    def __str__(self) -> str:
        parts = [
            "causal" if self.causal else "",
            f"window {self.window}" if self.window is not None else "",
            "documents" if self.documents else "",
            "padding" if self.valid else "",
        ]
        return ", ".join(filter(None, parts)) or "no mask"


_known: WeakKeyDictionary[View, dict[tuple[fx.Node, bool], Mask | str]] = WeakKeyDictionary()


def read(view: View, node: fx.Node, hides: bool = False) -> Mask:
    """The mask that ``node``, broadcast to [b, h, q, k], computes. hides: ``node`` is true where a
    key is hidden. Raises Unreadable."""
    while (outside := view.operand(node)) is not None:  # where it is computed once for all layers
        _require_unwritten(view, node)
        view, node = outside
    known = _known.setdefault(view, {})
    if (node, hides) not in known:
        try:
            known[node, hides] = _read(view, node, hides)
        except Unreadable as reason:
            known[node, hides] = str(reason)
    mask = known[node, hides]
    if isinstance(mask, str):
        raise Unreadable(mask)
    return mask


def _require_unwritten(view: View, node: fx.Node) -> None:
    if view.effects.written(node):
        raise Unreadable(f"{node.name} is written in place")


def _read(view: View, node: fx.Node, hides: bool) -> Mask:
    reader = _Reader()
    value = fake(node)
    if value.requires_grad:
        raise Unreadable(f"the mask {node.name} is trained")
    element = reader.element(view, node, _broadcast(value, AXES))
    if hides and _is_boolean(element):
        element = sympy.Not(element)
    least = -math.inf
    if isinstance(element, _Bias):
        least, element = element.least, element.seen
    if not isinstance(element, sympy.logic.boolalg.Boolean):
        raise Unreadable(f"the mask {node.name} is {value.dtype}, and not zero or minus infinity")
    mask = _Conjunction(reader, sympy.And.make_args(element)).mask()
    if least > -math.inf and least > torch.finfo(value.dtype).min:
        raise Unreadable(f"{node.name} hides keys by {least}, not the least of {value.dtype}")
    if least > -math.inf and mask.valid is not None:
        raise Unreadable(
            f"{node.name} is finite for padding: a query that sees no key attends to all of them"
        )
    return mask


# -- elements --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Bias:
    """An element of an additive mask: 0 where ``seen``, else ``least``. That is minus infinity, or
    the least number of a dtype, which leaves a key the weight zero beside any key that is seen."""

    seen: sympy.Basic
    least: float = -math.inf


@dataclass(frozen=True)
class _Indicator:
    """An element of a mask in numbers: 1 where ``holds``, else 0."""

    holds: sympy.Basic


_MOST_NEGATIVE = {torch.finfo(d).min for d in (torch.float32, torch.float16, torch.bfloat16)}


class _Reader:
    """Computes elements. sources: what the unknown functions in them read."""

    def __init__(self) -> None:
        self.sources: dict[Any, Source] = {}

    def element(self, view: View, arg: Any, index: Index) -> Any:
        """``arg[index]``: a sympy integer or Boolean, or a `_Bias`; a function of the indices for a
        value of which nothing is known."""
        node = view.resolve(arg)
        value = fake(node)
        if not isinstance(value, torch.Tensor):
            return _number(value)
        _require_unwritten(view, node)
        outside = view.operand(node)
        if outside is not None:
            return self.element(*outside, index)
        rule = _RULES.get(op_name(node))
        known = rule(self, view, node, index) if rule is not None else None
        return self._unknown(view, node, index) if known is None else known

    def operands(self, view: View, node: fx.Node, index: Index) -> list[Any]:
        """The elements of the inputs of an elementwise operation."""
        return [self.broadcast(view, arg, index) for arg in positional(node)]

    def broadcast(self, view: View, arg: Any, index: Index) -> Any:
        value = fake(arg)
        if not isinstance(value, torch.Tensor):
            return _number(value)
        return self.element(view, arg, _broadcast(value, index))

    def _unknown(self, view: View, node: fx.Node, index: Index) -> Any:
        same = (f for f, s in self.sources.items() if s.view is view and view.same(s.node, node))
        function = next(same, None)
        if function is None:
            # Of a float nothing may follow from its being no integer; small integers may overflow.
            exact = fake(node).dtype in (torch.bool, *_INTEGERS)
            function = sympy.Function(self._name(node), integer=True if exact else None)
            self.sources[function] = Source(view, node)
        element = function(*index)
        return sympy.Ne(element, 0) if fake(node).dtype == torch.bool else element

    def _name(self, node: fx.Node) -> str:
        """Two graphs may have nodes of one name."""
        taken = {str(function) for function in self.sources}
        return node.name if node.name not in taken else f"{node.name}_{len(taken)}"


def _broadcast(value: torch.Tensor, index: Index) -> Index:
    """The part of ``index`` that a value of fewer or of single dimensions is read at."""
    if value.dim() > len(index):
        raise Unreadable(f"the mask has {value.dim()} dimensions, expected at most {len(index)}")
    kept = index[len(index) - value.dim() :]
    return tuple(
        sympy.Integer(0) if _is_one(n) else i for n, i in zip(value.shape, kept, strict=True)
    )


def _is_one(size: Any) -> bool:
    return str(size) == "1"


def _number(value: Any) -> Any:
    """A literal or a size in the graph, as sympy has it; None for anything else."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int | float):
        return sympy.Integer(int(value)) if float(value).is_integer() else sympy.sympify(value)
    return value.node.expr if isinstance(value, torch.SymInt) else None


def _is_boolean(*elements: Any) -> bool:
    return all(isinstance(e, sympy.logic.boolalg.Boolean) for e in elements)


def _is_integer(*elements: Any) -> bool:
    return all(isinstance(e, sympy.Expr) and e.is_integer for e in elements)


def _as_bias(element: Any) -> _Bias | None:
    if isinstance(element, _Bias):
        return element
    if element == 0:
        return _Bias(sympy.true)
    if element == -sympy.oo:
        return _Bias(sympy.false)
    if isinstance(element, sympy.Number) and float(element) in _MOST_NEGATIVE:
        return _Bias(sympy.false, float(element))
    return None


def _as_indicator(element: Any) -> _Indicator | None:
    if isinstance(element, _Indicator):
        return element
    return _Indicator(sympy.true if element == 1 else sympy.false) if element in (0, 1) else None


# -- rules: the element of a node at an index; None where nothing is known -------------------------

Rule = Callable[[_Reader, View, fx.Node, Index], Any]


def _compare(relation: Callable[..., Any]) -> Rule:
    def rule(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
        a, b = reader.operands(view, node, index)[:2]
        if isinstance(a, _Indicator) and b in (0, 1):
            at_one, at_zero = relation(1, b), relation(0, b)
            return _if(a.holds, sympy.sympify(at_one), sympy.sympify(at_zero))
        return relation(a, b) if _is_integer(a, b) else None

    return rule


def _logic(connective: Callable[..., Any]) -> Rule:
    def rule(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
        elements = reader.operands(view, node, index)
        return connective(*elements) if _is_boolean(*elements) else None

    return rule


def _subtract(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    a, b = reader.operands(view, node, index)[:2]
    if node.kwargs:  # alpha
        return None
    if a == 1 and isinstance(b, _Indicator):
        return _Indicator(sympy.Not(b.holds))
    return a - b if _is_integer(a, b) else None


def _negate(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    (element,) = reader.operands(view, node, index)
    return -element if _is_integer(element) else None


def _add(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    elements = reader.operands(view, node, index)[:2]
    if node.kwargs:
        return None
    if _is_integer(*elements):
        return sympy.Add(*elements)
    a, b = map(_as_bias, elements)
    return _Bias(sympy.And(a.seen, b.seen), max(a.least, b.least)) if a and b else None


def _multiply(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    elements = reader.operands(view, node, index)
    if _is_boolean(*elements):
        return sympy.And(*elements)
    if all(isinstance(e, _Indicator) for e in elements):
        return _Indicator(sympy.And(*(e.holds for e in elements)))
    a, b = elements if isinstance(elements[0], _Indicator) else elements[::-1]
    if isinstance(a, _Indicator):  # minus infinity times zero would be no number
        b = _as_bias(b)
        return _Bias(sympy.Not(a.holds), b.least) if b and b.least > -math.inf else None
    return sympy.Mul(*elements) if _is_integer(*elements) else None


def _choose(condition: Any, then: Any, otherwise: Any) -> Any:
    if not _is_boolean(condition):
        return None
    if _is_boolean(then, otherwise):
        return _if(condition, then, otherwise)
    one, other = _as_indicator(then), _as_indicator(otherwise)
    if one and other:
        return _Indicator(_if(condition, one.holds, other.holds))
    a, b = _as_bias(then), _as_bias(otherwise)
    if a is None or b is None:
        return None
    return _Bias(_if(condition, a.seen, b.seen), max(a.least, b.least))


def _if(condition: Any, then: Any, otherwise: Any) -> Any:
    return sympy.Or(sympy.And(condition, then), sympy.And(sympy.Not(condition), otherwise))


def _where(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    elements = reader.operands(view, node, index)
    return _choose(*elements) if len(elements) == 3 else None


def _masked_fill(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    otherwise, condition, then = reader.operands(view, node, index)
    return _choose(condition, then, otherwise)


def _triangle(inside: Callable[..., Any]) -> Rule:
    def rule(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
        source, diagonal = (*positional(node), 0)[:2]
        above = _number(fake(diagonal))
        element = reader.element(view, source, index)
        nothing = sympy.false if _is_boolean(element) else sympy.Integer(0)
        if len(index) < 2 or above is None:
            return None
        return _choose(inside(index[-1] - index[-2], above), element, nothing)

    return rule


def _constant(number: Any) -> Rule:
    """A tensor that is full of one number; None: of the number that the call is given."""

    def rule(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
        given = number
        if number is None:
            rest = [arg for arg in node.args[1:] if _is_number(arg)]
            given = rest[0] if rest else node.kwargs.get("fill_value")
            given = given if _is_number(given) else None
        dtype = fake(node).dtype
        if given is None or (dtype == torch.bool and given not in (0, 1)):
            return None
        return _number(bool(given) if dtype == torch.bool else given)

    return rule


def _is_number(arg: Any) -> bool:
    return isinstance(arg, int | float)


def _scalar(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    return _number(node.args[0]) if node.args and _is_number(node.args[0]) else None


def _arange(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    numbers = [_number(fake(arg)) for arg in node.args]
    if fake(node).dtype not in _INTEGERS or not numbers or None in numbers:
        return None
    if any(name in node.kwargs for name in ("start", "end", "step")):
        return None
    start = sympy.Integer(0) if len(numbers) == 1 else numbers[0]
    step = numbers[2] if len(numbers) == 3 else sympy.Integer(1)
    return start + step * index[0]


_INTEGERS = (torch.int32, torch.int64)


def _cast(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    element = reader.element(view, first_argument(node), index)
    before, after = fake(first_argument(node)).dtype, fake(node).dtype
    if before == after or (before in _INTEGERS and after in _INTEGERS):
        return element
    if isinstance(element, _Bias) and after.is_floating_point:
        return element
    if isinstance(element, _Indicator):
        return element.holds if after == torch.bool else element
    if _is_boolean(element):
        return _Indicator(element)
    return sympy.Ne(element, 0) if before in _INTEGERS and after == torch.bool else None


def _same_element(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    return reader.element(view, first_argument(node), index)


def _expand(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    return reader.broadcast(view, first_argument(node), index)


def _reshape(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    """Only dimensions of one element come or go."""
    source = first_argument(node)
    if fake(source).dtype != fake(node).dtype:  # view(dtype) reads the bytes anew
        return None
    before, after = fake(source).shape, fake(node).shape
    kept = [(n, i) for n, i in zip(after, index, strict=True) if not _is_one(n)]
    if not same_sizes([n for n in before if not _is_one(n)], [n for n, _ in kept]):
        return None
    rest = iter(i for _, i in kept)
    at = tuple(sympy.Integer(0) if _is_one(n) else next(rest) for n in before)
    return reader.element(view, source, at)


def _transpose(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    source, *dims = positional(node)
    order = list(range(len(index)))
    if op_name(node) == "permute":
        order = list(dims[0] if isinstance(dims[0], tuple | list) else dims)
    else:
        i, j = dims
        order[i], order[j] = order[j], order[i]
    at = list(index)
    for new, old in enumerate(order):
        at[old] = index[new]
    return reader.element(view, source, tuple(at))


def _getitem(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    source, items = node.args
    shape = fake(source).shape
    items = list(items) if isinstance(items, tuple | list) else [items]
    if any(isinstance(fake(item), torch.Tensor) for item in items):
        at = _gathered(reader, view, items, len(shape), index)
    else:
        at = _sliced(items, shape, index)
    return None if at is None else reader.element(view, source, at)


def _gathered(
    reader: _Reader, view: View, items: list[Any], dims: int, index: Index
) -> Index | None:
    """Tensors index the first dimensions: ``positions[batch, query]``."""
    if not all(isinstance(fake(item), torch.Tensor) for item in items):
        return None
    longest = max(fake(item).dim() for item in items)
    at = [reader.broadcast(view, item, index[:longest]) for item in items]
    # A negative element would count from the end.
    if not all(_is_integer(i) and i.is_nonnegative for i in at):
        return None
    return (*at, *index[longest:]) if len(at) + len(index) - longest == dims else None


def _sliced(items: list[Any], shape: Sequence[Any], index: Index) -> Index | None:
    if any(item is Ellipsis for item in items):
        at = next(i for i, item in enumerate(items) if item is Ellipsis)
        missing = len(shape) - sum(item is not None for item in items) + 1
        items[at : at + 1] = [slice(None)] * missing
    sizes, rest, found = iter(shape), iter(index), list[sympy.Expr]()
    for item in items:
        if item is None:
            next(rest)
            continue
        size = _number(next(sizes))
        start = item.start if isinstance(item, slice) else item
        offset = _number(fake(0 if start is None else start))
        if not _is_integer(offset) or not (offset.is_nonnegative or offset.is_negative):
            return None
        offset = offset if offset.is_nonnegative else size + offset
        if isinstance(item, slice):
            if item.step not in (None, 1):
                return None
            offset = offset + next(rest)
        found.append(offset)
    return (*found, *rest)


def _difference(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    """``diff(x, prepend=p, dim=-1)``, where it is one number at every index."""
    source, prepend = first_argument(node), node.kwargs.get("prepend")
    last = node.kwargs.get("dim", -1) in (-1, len(index) - 1)
    if len(node.args) > 1 or not last or not isinstance(prepend, fx.Node):
        return None
    if not node.kwargs.keys() <= {"prepend", "dim"} or not _is_one(fake(prepend).shape[-1]):
        return None
    *lead, i = index
    zero = sympy.Integer(0)
    here, before = (reader.element(view, source, (*lead, at)) for at in (i, i - 1))
    first = reader.element(view, source, (*lead, zero))
    steps = {
        here - before,
        first - reader.element(view, prepend, _broadcast(fake(prepend), (*lead, zero))),
    }
    step = steps.pop()
    return step if not steps and step.is_number else None


def _sum_so_far(reader: _Reader, view: View, node: fx.Node, index: Index) -> Any:
    """Zero, where nothing is summed anywhere."""
    anywhere = sympy.symbols(f"i:{len(index)}", integer=True, nonnegative=True)
    summed = reader.element(view, first_argument(node), anywhere)
    return sympy.Integer(0) if summed in (0, sympy.false) else None


_RULES: dict[Any, Rule] = {
    **dict.fromkeys(("and_", "and", "logical_and", "bitwise_and"), _logic(sympy.And)),
    **dict.fromkeys(("or_", "or", "logical_or", "bitwise_or"), _logic(sympy.Or)),
    **dict.fromkeys(("invert", "inv", "logical_not", "bitwise_not"), _logic(sympy.Not)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _constant(0)),
    **dict.fromkeys(("full", "full_like", "new_full"), _constant(None)),
    **dict.fromkeys(("tensor", "scalar_tensor"), _scalar),
    **dict.fromkeys(("clone", "detach"), _same_element),
    **dict.fromkeys(("cast", "move"), _cast),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("transpose", "swapaxes", "permute"), _transpose),
    "le": _compare(sympy.Le),
    "lt": _compare(sympy.Lt),
    "ge": _compare(sympy.Ge),
    "gt": _compare(sympy.Gt),
    "eq": _compare(sympy.Eq),
    "ne": _compare(sympy.Ne),
    "add": _add,
    "sub": _subtract,
    "neg": _negate,
    "mul": _multiply,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(lambda ahead, diagonal: sympy.Le(ahead, diagonal)),
    "triu": _triangle(lambda ahead, diagonal: sympy.Ge(ahead, diagonal)),
    "arange": _arange,
    "reshape": _reshape,
    "getitem": _getitem,
    "diff": _difference,
    "cumsum": _sum_so_far,
}


# -- predicates ------------------------------------------------------------------------------------


class _Conjunction:
    """Tells what each part of a conjunction is."""

    def __init__(self, reader: _Reader, parts: Sequence[Any]) -> None:
        self.reader = reader
        self.causal = False
        self.window: int | None = None
        self.documents: Source | None = None
        self.valid: Source | None = None
        # Documents first: what is said of positions holds inside of one.
        for part in sorted(parts, key=lambda p: not isinstance(p, sympy.Eq)):
            if part != sympy.true:
                self._add(part)

    def mask(self) -> Mask:
        return Mask(self.causal, self.window, self.documents, self.valid)

    def _add(self, part: Any) -> None:
        source = self._read_at(part, K) if isinstance(part, sympy.Ne) else None
        if source is not None and self.valid in (None, source):
            self.valid = source
            return
        documents = self._documents(part)
        if documents is not None and self.documents in (None, documents):
            self.documents = documents
            return
        bound = _bound(part) or self._bound_in_documents(part)
        if bound is None:
            raise Unreadable(self._reason(part))
        ahead, limit = bound
        if ahead and limit == 0:
            self.causal = True
        elif not ahead and limit >= 0:
            self.window = min(limit + 1, self.window or limit + 1)
        else:
            raise Unreadable(self._reason(part))

    def _read_at(self, part: Any, axis: sympy.Symbol) -> Source | None:
        """What ``part``, ``source(b, axis) != 0``, reads."""
        if part.rhs != 0 or part.lhs.func not in self.reader.sources:
            return None
        return self._source(part.lhs, axis)

    def _source(self, call: Any, axis: sympy.Symbol) -> Source | None:
        return self.reader.sources[call.func] if call.args in _ROWS[axis] else None

    def _documents(self, part: Any) -> Source | None:
        if not isinstance(part, sympy.Eq):
            return None
        a, b = part.args if part.lhs.has(Q) else part.args[::-1]
        if a.func != b.func or a.func not in self.reader.sources:
            return None
        source = self._source(a, Q)
        if source is None or self._source(b, K) != source:
            return None
        if not _never_decreases(source):
            raise Unreadable(f"nothing says that the documents in {source.node.name} are in order")
        return source

    def _bound_in_documents(self, part: Any) -> tuple[bool, int] | None:
        """A bound on positions, which follow each other inside of a document."""
        if self.documents is None:
            return None
        positions = _positions(self.documents)
        if positions is None:
            return None
        at = _broadcast(fake(positions), (B, Q))
        here = self.reader.element(self.documents.view, positions, at)
        calls = {c for c in part.atoms(sympy.Function) if c.func in self.reader.sources}
        if not calls <= {here, here.subs(Q, K)}:
            return None
        return _bound(part.subs({here: Q, here.subs(Q, K): K}))

    def _reason(self, part: Any) -> str:
        calls = {c for c in part.atoms(sympy.Function) if c.func in self.reader.sources}
        sources = [self.reader.sources[c.func] for c in calls]
        names = ", ".join(sorted({source.node.name for source in sources}))
        given = [s.view.graph.owning_module for s in sources if s.node.op == "placeholder"]
        elsewhere = f": {PART}" if any(map(is_part, given)) else ""
        if calls and part in {sympy.Ne(c, 0) for c in calls}:
            return f"nothing is known of what {names} lets a query see{elsewhere}"
        return f"no kernel is made for a mask with {part}" + (
            f", where nothing is known of {names}{elsewhere}" if names else ""
        )


# Where a value of one element for each token is read.
_ROWS = {axis: [(B, axis), (sympy.Integer(0), axis), (axis,)] for axis in (Q, K)}


def _bound(part: Any) -> tuple[bool, int] | None:
    """``k - q <= limit`` as (True, limit), ``q - k <= limit`` as (False, limit)."""
    if not isinstance(part, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        return None
    excess = part.lhs - part.rhs if isinstance(part, sympy.Le | sympy.Lt) else part.rhs - part.lhs
    if isinstance(part, sympy.Lt | sympy.Gt):  # of integers
        excess = excess + 1
    for ahead, distance in ((True, K - Q), (False, Q - K)):
        limit = distance - excess
        if limit.is_Integer:
            return ahead, int(limit)
    return None


def _never_decreases(documents: Source) -> bool:
    """Are the documents numbered by a sum over the starts of documents so far?"""
    view, node = documents.view, documents.node
    if op_name(node) != "cumsum" or fake(node).dtype not in _INTEGERS:  # an int8 may overflow
        return False
    source = view.resolve(first_argument(node))
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    while isinstance(source, fx.Node) and op_name(source) == "cast":
        source = view.resolve(first_argument(source))
    return fake(source).dtype == torch.bool and dim in (-1, fake(node).dim() - 1)


def _positions(documents: Source) -> fx.Node | None:
    """The positions P of ``cumsum(diff(P, prepend=P[:, :1] - 1) != 1)``: inside of a document each
    is the one before plus one."""
    view = documents.view
    starts = view.resolve(first_argument(documents.node))
    if op_name(starts) != "ne" or positional(starts)[1] != 1:
        return None
    steps = view.resolve(positional(starts)[0])
    if not isinstance(steps, fx.Node) or op_name(steps) != "diff":
        return None
    source, value = first_argument(steps), fake(steps)
    along = steps.kwargs.get("dim", -1) in (-1, value.dim() - 1)
    plain = len(steps.args) == 1 and steps.kwargs.keys() <= {"input", "prepend", "dim"}
    one_more = same_sizes(value.shape, fake(source).shape)  # by one element in front
    return source if along and plain and one_more and value.dim() <= 2 else None
