"""From what is taken of each token to the sum in which it ends: steps that are linear in it.

A loss over tokens is a sum of values, each times a coefficient: a mask, a weight of the token, one
over a number of tokens, a share of several losses. `Walk` follows a value as far as the steps are
linear; `passes._transpose` goes back from the end and gives the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from liger_fx.passes._sizes import Sizes
from torch import fx

from liger_fx.canonical import View, fake, op_name, positional, same_sizes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # sums are computed in float32


@dataclass(frozen=True)
class Step:
    """``node``, linear in ``source``. ``others``: its other operands, resolved, by which it
    multiplies or divides, or which it adds: what coefficients need, and terms of another origin."""

    node: fx.Node
    source: fx.Node
    others: tuple[fx.Node, ...] = ()

    @property
    def op(self) -> str:
        return _op(self.node)

    @property
    def reduces(self) -> bool:
        return self.op in ("sum", "mean")

    @property
    def dims(self) -> list[int]:
        """Those of the source that are reduced."""
        return _dims(positional(self.node), fake(self.source).dim())

    @property
    def written(self) -> Any:
        """What the step writes to if it works in place, else nothing."""
        return self.node.args[0] if str(op_name(self.node)).endswith("_") else None

    @property
    def weighs_tokens(self) -> bool:
        """Do its other operands differ from token to token?"""
        values = map(fake, self.others)
        return any(isinstance(value, torch.Tensor) and value.dim() for value in values)

    @property
    def may_drop_tokens(self) -> bool:
        """Can it take the values of tokens times zero?"""
        zero = self.op == "mul" and (bool(self.others) or self.operand == 0)
        return self.weighs_tokens or zero

    @property
    def operand(self) -> Any:
        """The other one of two arguments, as the node has it."""
        left, right = self.node.args
        return right if left is self.source else left


def _op(node: fx.Node) -> str:
    return str(op_name(node)).rstrip("_")


def _dims(args: tuple[Any, ...], rank: int) -> list[int]:
    dim = args[1] if len(args) > 1 else None
    if dim in (None, (), []):
        return list(range(rank))
    return sorted(d % rank for d in (dim if isinstance(dim, tuple | list) else (dim,)))


def masked(node: fx.Node) -> tuple[Any, Any, Any, bool]:
    """Of a ``where`` or a ``masked_fill``: what is masked, what stands elsewhere, the mask, and
    whether it says what is kept."""
    args = positional(node)
    if _op(node) != "where":
        return args[0], args[2], args[1], False
    mask, first, second = args if node.op == "call_function" else (args[1], args[0], args[2])
    kept = isinstance(first, fx.Node)
    return (first, second, mask, True) if kept else (second, first, mask, False)


def readers(node: fx.Node) -> list[fx.Node]:
    """The users of ``node`` to which it gives no gradient, though it has one."""
    if not fake(node).requires_grad:
        return []
    values = ((user, fake(user)) for user in node.users)
    return [u for u, value in values if isinstance(value, torch.Tensor) and not value.requires_grad]


class Walk:
    """Steps after values. sizes: which a coefficient can be computed of. taken: nodes that are
    computed otherwise."""

    def __init__(self, view: View, sizes: Sizes, taken: Container[fx.Node]) -> None:
        self.view, self.sizes, self.taken = view, sizes, taken

    def steps(self, value: fx.Node, classes: bool) -> Iterator[Step]:
        """The steps from ``value`` on, each linear in the one before, as far as nobody else needs a
        gradient of what is passed. classes: the value has a dimension of classes, its last."""
        while (step := self._next(value, classes)) is not None:
            yield step
            value, classes = step.node, classes and not step.reduces

    def _next(self, source: fx.Node, classes: bool) -> Step | None:
        read = readers(source)
        users = [user for user in source.users if user not in read and user not in self.taken]
        if len(users) != 1:
            return None
        (node,) = users
        value, rule = fake(node), _RULES.get(_op(node))
        if not isinstance(value, torch.Tensor) or value.dtype not in _DTYPES or rule is None:
            return None
        others = rule(self, node, source, classes)
        return None if others is None else Step(node, source, others)

    # Rules: the other operands of a step; None if it is not linear in its source, or not known to
    # be. With ``classes`` these are treated alike.

    def _keeps(self, node: fx.Node, source: fx.Node, classes: bool) -> _Others:
        return () if node.args[0] is source else None

    def _reshapes(self, node: fx.Node, source: fx.Node, classes: bool) -> _Others:
        before, after = fake(source).shape, fake(node).shape
        if node.args[0] is not source or (classes and str(before[-1]) != str(after[-1])):
            return None
        return () if all(map(self.sizes.known, (*before, *after))) else None

    def _reduces(self, node: fx.Node, source: fx.Node, classes: bool) -> _Others:
        args = positional(node)
        shape, dims = fake(source).shape, _dims(args, fake(source).dim())
        if args[0] is not source or args[3:] not in ((), (None,)):  # another dtype
            return None
        if classes and len(shape) - 1 not in dims:
            return None
        if _op(node) == "mean" and not self.sizes.known(math.prod(shape[d] for d in dims)):
            return None
        return ()

    def _scales(self, node: fx.Node, source: fx.Node, classes: bool) -> _Others:
        if node.kwargs or len(node.args) != 2 or (_op(node) == "div" and node.args[1] is source):
            return None
        left, right = node.args
        if left is right:
            return None
        return self._factor(node, source, right if left is source else left, classes)

    def _masks(self, node: fx.Node, source: fx.Node, classes: bool) -> _Others:
        if len(positional(node)) != 3:
            return None
        chosen, other, mask, _ = masked(node)
        if chosen is not source or isinstance(other, fx.Node) or other != 0:
            return None
        return self._factor(node, source, mask, classes)

    def _factor(self, node: fx.Node, source: fx.Node, factor: Any, classes: bool) -> _Others:
        """What a step multiplies by: a number, or a tensor without gradient, never written."""
        factor = self.view.resolve(factor)
        if not isinstance(factor, fx.Node):
            return () if isinstance(factor, int | float) else None
        value = fake(factor)
        if isinstance(value, torch.Tensor):
            varies = classes and value.dim() > 0 and str(value.shape[-1]) != "1"
            known = not (value.requires_grad or value.is_complex() or varies)
            if not known or self.view.effects.written(factor):
                return None
            if not same_sizes(fake(node).shape, fake(source).shape):  # broadcast
                return None
        return (factor,)

    def _adds(self, node: fx.Node, source: fx.Node, classes: bool) -> _Others:
        """Scalars only: other terms, and what else is added up."""
        if node.kwargs or len(node.args) != 2 or fake(node).dim() or node.args[0] is node.args[1]:
            return None
        left, right = node.args
        other = self.view.resolve(right if left is source else left)
        if not isinstance(other, fx.Node):
            return () if isinstance(other, int | float) else None
        value = fake(other)
        return None if isinstance(value, torch.Tensor) and value.dim() else (other,)


_Others = tuple[fx.Node, ...] | None
_RULES: dict[str, Callable[[Walk, fx.Node, fx.Node, bool], _Others]] = {
    "cast": Walk._keeps,
    "neg": Walk._keeps,
    "reshape": Walk._reshapes,
    "sum": Walk._reduces,
    "mean": Walk._reduces,
    "mul": Walk._scales,
    "div": Walk._scales,
    "where": Walk._masks,
    "masked_fill": Walk._masks,
    "add": Walk._adds,
    "sub": Walk._adds,
}
