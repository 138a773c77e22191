"""The transpose of linear steps, applied to a number: what their end takes each value times."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from liger_fx.passes._sizes import Sizes
from liger_fx.passes._sums import Step, masked
from torch import fx

from liger_fx.canonical import fake, positional

Number = Any  # a number, or the proxy of a tensor or of a number


class Transpose:
    """Records coefficients. proxies: of the tensors of ``sizes``, by name. operand: the proxy, or
    the number, of another operand of a step."""

    def __init__(
        self, sizes: Sizes, proxies: Mapping[str, Any], operand: Callable[[fx.Node], Any]
    ) -> None:
        self._sizes, self._proxies, self._operand = sizes, proxies, operand

    def apply(self, steps: Sequence[Step], classes: bool = False, number: Number = 1.0) -> Number:
        """What ``number`` times the end of ``steps`` takes each element of their first source
        times: a number, or a tensor that can be expanded to the source. With ``classes``, the last
        dimension of the source, that of the tensor is 1."""
        first = next((i for i, step in enumerate(steps) if step.reduces), len(steps))
        for i, step in reversed([*enumerate(steps)]):
            rule = getattr(self, f"_{step.op}", self._keep)
            number = rule(step, number, classes and i <= first)
        return number

    def size(self, size: Any) -> Any:
        return self._sizes.record(size, self._proxies)

    def shape(self, sizes: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(map(self.size, sizes))

    def of(self, value: Any) -> Any:
        """An operand, in a dtype in which products are not rounded more than in float32."""
        if not isinstance(value, fx.Node):
            return value
        operand, like = self._operand(value), fake(value)
        narrow = isinstance(like, torch.Tensor) and like.dtype in (torch.float16, torch.bfloat16)
        return operand.float() if narrow else operand

    def _keep(self, step: Step, number: Number, classes: bool) -> Number:
        return number

    def _neg(self, step: Step, number: Number, classes: bool) -> Number:
        return -number

    def _sub(self, step: Step, number: Number, classes: bool) -> Number:
        return number if step.node.args[0] is step.source else -number

    def _mul(self, step: Step, number: Number, classes: bool) -> Number:
        factor = self.of(step.operand)
        if dims_of(factor) and not fake(factor.node).is_floating_point():
            # What a mask leaves out stays out, whatever the sum is divided by: 1/0 without tokens.
            return torch.where(factor != 0, times(number, factor), 0.0)
        return times(number, factor)

    def _div(self, step: Step, number: Number, classes: bool) -> Number:
        return number / self.of(step.operand)

    def _where(self, step: Step, number: Number, classes: bool) -> Number:
        _, _, mask, kept = masked(step.node)
        pair = (number, 0.0) if kept else (0.0, number)
        return torch.where(self._operand(mask), *pair)

    _masked_fill = _where

    def _mean(self, step: Step, number: Number, classes: bool) -> Number:
        shape = fake(step.source).shape
        number = number / self.size(math.prod(shape[dim] for dim in step.dims))
        return self._sum(step, number, classes)

    def _sum(self, step: Step, number: Number, classes: bool) -> Number:
        keepdim = (*positional(step.node), None, False)[2]
        if dims_of(number) and not keepdim:
            for dim in step.dims:
                number = number.unsqueeze(dim)
        return number

    def _reshape(self, step: Step, number: Number, classes: bool) -> Number:
        if not dims_of(number):
            return number
        before, after = list(fake(step.source).shape), list(fake(step.node).shape)
        if classes:
            before[-1] = after[-1] = 1
        return number.expand(self.shape(after)).reshape(self.shape(before))


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
