"""From what is taken of each token to the sum that it ends in: linear steps, and their transpose.

A loss over tokens is a sum of values, each times a coefficient: a mask, a weight of the token, one
over a number of tokens, a share of several losses. `walk` follows a value through steps that are
linear in it, as far as these go; `coefficient` goes back from the end and gives the number that the
end takes each value times: the transpose of the steps, applied to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from liger_fx.canonical import View, fake, op_name, positional, same_sizes
from liger_fx.matcher import Reject

Number = Any  # a number, or the proxy of a tensor


@dataclass(frozen=True)
class Step:
    """``node``, linear in ``source``. ``others``: its other operands, resolved, by which it
    multiplies or divides, or which it adds: what coefficients need, and terms of another origin."""

    node: fx.Node
    source: fx.Node
    others: tuple[fx.Node, ...] = ()

    @property
    def op(self) -> str:
        return str(op_name(self.node)).rstrip("_")

    @property
    def in_place(self) -> bool:
        return str(op_name(self.node)).endswith("_")

    @property
    def written(self) -> Any:
        """What the step writes to if it works in place."""
        return self.node.args[0]

    @property
    def weighs_tokens(self) -> bool:
        """Do its other operands differ from token to token?"""
        values = map(fake, self.others)
        return any(isinstance(value, torch.Tensor) and value.dim() for value in values)

    @property
    def added(self) -> Any:
        """What the step adds to its source; None if it adds nothing."""
        if self.op not in ("add", "sub"):
            return None
        return next((arg for arg in self.node.args if arg is not self.source), None)


class Sizes:
    """The sizes that a graph can compute of the tensors that a match reads: numbers, dimensions of
    these tensors, the product of the leading ones of a hidden state, and that times the classes."""

    def __init__(self, tensors: Mapping[str, Any], tokens: Any, classes: Any) -> None:
        self._places: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    self._places.setdefault(_formula(size), (name, (dim,)))
        labels = next((n for n in ("target", "label") if n in tensors), None)
        for name in filter(None, (labels, "hidden")):
            shape = tensors[name].shape[:-1] if name == "hidden" else tensors[name].shape
            product = math.prod(shape)
            self._places.setdefault(_formula(product), (name, tuple(range(len(shape)))))
        self._tokens, self._classes = tokens, classes

    def known(self, size: Any) -> bool:
        return _constant(size) is not None or bool(self._factors(size))

    def _factors(self, size: Any) -> list[Any]:
        if _formula(size) in self._places:
            return [size]
        if _formula(size) == _formula(self._tokens * self._classes):
            tokens = [self._tokens] if self.known(self._tokens) else []
            return [*tokens, self._classes] if tokens else []
        return []

    def record(self, size: Any, proxies: Mapping[str, Any]) -> Any:
        """The size, as a number or a proxy. Raises `Reject` for one that is not known."""
        constant = _constant(size)
        if constant is not None:
            return constant
        if not self.known(size):
            raise Reject(f"the size {size} is not one of the head's tensors")
        product: Any = 1
        for factor in self._factors(size):
            if isinstance(factor, int):
                product = product * factor
                continue
            name, dims = self._places[_formula(factor)]
            for dim in dims:
                product = product * proxies[name].size(dim)
        return product


def _constant(size: Any) -> int | None:
    """The number that ``size`` is, of symbols that a view has fixed as well."""
    return int(_formula(size)) if _formula(size).isdigit() else None


def _formula(size: Any) -> str:
    """Of the symbols: two that are as large today may differ tomorrow."""
    return str(size if isinstance(size, int) else size.node.expr.expand())


def walk(
    view: View, value: fx.Node, sizes: Sizes, classes: bool, taken: Container[fx.Node]
) -> Iterator[Step]:
    """The steps from ``value`` on, each linear in the one before, as far as nobody else needs a
    gradient of what is passed. classes: the value has a dimension of classes, its last. taken:
    nodes that are computed otherwise."""
    while (step := _next(view, value, sizes, classes, taken)) is not None:
        yield step
        if step.op in ("sum", "mean"):
            classes = False
        value = step.node


def readers(node: fx.Node) -> list[fx.Node]:
    """The users of ``node`` to which it gives no gradient, though it has one."""
    if not fake(node).requires_grad:
        return []
    return [user for user in node.users if _has_no_gradient(user)]


def _has_no_gradient(user: fx.Node) -> bool:
    value = fake(user)
    return isinstance(value, torch.Tensor) and not value.requires_grad


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # sums are computed in float32


def _next(
    view: View, source: fx.Node, sizes: Sizes, classes: bool, taken: Container[fx.Node]
) -> Step | None:
    read = readers(source)
    users = [user for user in source.users if user not in read and user not in taken]
    if len(users) != 1:
        return None
    (node,) = users
    value = fake(node)
    if not isinstance(value, torch.Tensor) or value.dtype not in _DTYPES:
        return None
    rule = _RULES.get(str(op_name(node)).rstrip("_"))
    args = positional(node)
    if rule is None or sum(arg is source for arg in node.all_input_nodes) != 1:
        return None
    others = rule(view, node, source, args, sizes, classes)
    return None if others is None else Step(node, source, others)


_Others = tuple[fx.Node, ...] | None  # None: the step is not linear, or not known to be


def _keeps(view: View, node: fx.Node, source: fx.Node, args: Any, sizes: Sizes, c: bool) -> _Others:
    return () if args[0] is source else None


def _reshapes(
    view: View, node: fx.Node, source: fx.Node, args: Any, sizes: Sizes, c: bool
) -> _Others:
    before, after = fake(source).shape, fake(node).shape
    if node.args[0] is not source or (c and str(before[-1]) != str(after[-1])):
        return None
    return () if all(map(sizes.known, (*before, *after))) else None


def _reduces(
    view: View, node: fx.Node, source: fx.Node, args: Any, sizes: Sizes, c: bool
) -> _Others:
    _, dim, keepdim, dtype = (*args, None, False, None)[:4]
    dims = _dims(dim, fake(source).dim())
    if args[0] is not source or dtype is not None or (c and fake(source).dim() - 1 not in dims):
        return None
    counts = [fake(source).shape[d] for d in dims]
    whole = math.prod(counts)
    if str(op_name(node)) == "mean" and not (sizes.known(whole) or all(map(sizes.known, counts))):
        return None
    return ()


def _dims(dim: Any, rank: int) -> list[int]:
    if dim is None or dim == () or dim == []:
        return list(range(rank))
    return sorted(d % rank for d in (dim if isinstance(dim, tuple | list) else (dim,)))


def _scales(
    view: View, node: fx.Node, source: fx.Node, args: Any, sizes: Sizes, c: bool
) -> _Others:
    if len(args) < 2 or node.kwargs or (op_name(node) in ("div", "div_") and args[0] is not source):
        return None
    return _factor(view, node, source, args[1] if args[0] is source else args[0], c)


def _factor(view: View, node: fx.Node, source: fx.Node, factor: Any, classes: bool) -> _Others:
    """What a step multiplies by: the same for all classes, without gradient, never written."""
    factor = view.resolve(factor)
    if not isinstance(factor, fx.Node):
        return () if isinstance(factor, int | float) else None
    value = fake(factor)
    if isinstance(value, torch.Tensor):
        varies = classes and value.dim() > 0 and str(value.shape[-1]) != "1"
        if value.requires_grad or varies or view.effects.written(factor):
            return None
        if value.is_complex() or not same_sizes(fake(node).shape, fake(source).shape):
            return None
    return (factor,)


def _masks(view: View, node: fx.Node, source: fx.Node, args: Any, sizes: Sizes, c: bool) -> _Others:
    if len(args) != 3:
        return None
    chosen, other, mask = _masked(node, args)
    if chosen is not source or isinstance(other, fx.Node) or other != 0:
        return None
    return _factor(view, node, source, mask, c)


def _masked(node: fx.Node, args: Any) -> tuple[Any, Any, Any]:
    """(what is masked, what stands where it is not kept, the mask)"""
    if op_name(node) == "where":
        mask, kept, other = args if node.op == "call_function" else (args[1], args[0], args[2])
        return (kept, other, mask) if isinstance(kept, fx.Node) else (other, kept, mask)
    return args[0], args[2], args[1]


def _adds(view: View, node: fx.Node, source: fx.Node, args: Any, sizes: Sizes, c: bool) -> _Others:
    if node.kwargs or len(node.args) != 2 or fake(node).dim():
        return None
    other = view.resolve(node.args[1] if node.args[0] is source else node.args[0])
    if isinstance(other, fx.Node):
        value = fake(other)
        if isinstance(value, torch.Tensor) and value.dim():
            return None
        return (other,)
    return () if isinstance(other, int | float) else None


_RULES: dict[str, Callable[..., _Others]] = {
    "cast": _keeps,
    "neg": _keeps,
    "reshape": _reshapes,
    "sum": _reduces,
    "mean": _reduces,
    "mul": _scales,
    "div": _scales,
    "where": _masks,
    "masked_fill": _masks,
    "add": _adds,
    "sub": _adds,
}


# -- coefficients ----------------------------------------------------------------------------------


class Transpose:
    """Records coefficients. proxies: of the tensors of ``sizes``, by name; operand: the proxy, or
    the number, of another operand of a step."""

    def __init__(
        self, sizes: Sizes, proxies: Mapping[str, Any], operand: Callable[[fx.Node], Any]
    ) -> None:
        self._sizes, self._proxies, self._operand = sizes, proxies, operand

    def coefficient(self, steps: list[Step], classes: bool = False, number: Number = 1.0) -> Number:
        """What ``number`` times the end of ``steps`` takes each element of their first source
        times: a number, or a tensor that can be expanded to it. With ``classes`` its last dimension
        is 1."""
        levels = [classes and not any(s.op in ("sum", "mean") for s in steps[:i]) for i in
                  range(len(steps))]  # fmt: skip
        for step, of_classes in zip(reversed(steps), reversed(levels), strict=True):
            number = getattr(self, f"_{step.op}", self._keep)(step, number, of_classes)
        return number

    def _keep(self, step: Step, number: Number, classes: bool) -> Number:
        return number

    def _neg(self, step: Step, number: Number, classes: bool) -> Number:
        return -number

    def _sub(self, step: Step, number: Number, classes: bool) -> Number:
        return number if step.node.args[0] is step.source else -number

    def _mul(self, step: Step, number: Number, classes: bool) -> Number:
        other = self._other(step)
        if (
            dims_of(other) and not fake(other.node).is_floating_point()
        ):  # what is left out stays out, whatever it is divided by: 1/0
            return torch.where(other != 0, times(number, other), 0.0)
        return times(number, other)

    def _div(self, step: Step, number: Number, classes: bool) -> Number:
        return number / self._other(step)

    def _other(self, step: Step) -> Any:
        args = step.node.args
        return self.of(args[1] if args[0] is step.source else args[0])

    def of(self, value: Any) -> Any:
        """The proxy of an operand, in a dtype that products keep; a number as it is."""
        if not isinstance(value, fx.Node):
            return value
        operand, like = self._operand(value), fake(value)
        narrow = isinstance(like, torch.Tensor) and like.dtype in (torch.float16, torch.bfloat16)
        return operand.float() if narrow else operand

    def _where(self, step: Step, number: Number, classes: bool) -> Number:
        args = positional(step.node)
        _, _, mask = _masked(step.node, args)
        kept = op_name(step.node) == "where" and args[2] is not step.source
        pair = (number, 0.0) if kept else (0.0, number)
        return torch.where(self._operand(mask), *pair)

    _masked_fill = _where

    def _mean(self, step: Step, number: Number, classes: bool) -> Number:
        shape = fake(step.source).shape
        counts = [shape[d] for d in self._reduced(step)]
        whole = math.prod(counts)
        for count in [whole] if self._sizes.known(whole) else counts:
            number = number / self.size(count)
        return self._sum(step, number, classes)

    def _sum(self, step: Step, number: Number, classes: bool) -> Number:
        keepdim = (*positional(step.node), None, False)[2]
        if dims_of(number) and not keepdim:
            for dim in self._reduced(step):
                number = number.unsqueeze(dim)
        return number

    def _reduced(self, step: Step) -> list[int]:
        return _dims(positional(step.node)[1], fake(step.source).dim())

    def _reshape(self, step: Step, number: Number, classes: bool) -> Number:
        if not dims_of(number):
            return number
        before, after = list(fake(step.source).shape), list(fake(step.node).shape)
        if classes:
            before[-1] = after[-1] = 1
        return number.expand(self.shape(after)).reshape(self.shape(before))

    def shape(self, sizes: Any) -> tuple[Any, ...]:
        return tuple(map(self.size, sizes))

    def size(self, size: Any) -> Any:
        return self._sizes.record(size, self._proxies)


def times(a: Number, b: Number) -> Number:
    """The product, without the factors of 1 that a graph need not compute."""
    if isinstance(a, int | float) and a == 1:
        return b
    if isinstance(b, int | float) and b == 1:
        return a
    return a * b


def is_tensor(number: Number) -> bool:
    return isinstance(number, fx.Proxy) and isinstance(fake(number.node), torch.Tensor)


def dims_of(number: Number) -> int:
    """The number of dimensions of a coefficient; 0 for a number."""
    return fake(number.node).dim() if is_tensor(number) else 0
