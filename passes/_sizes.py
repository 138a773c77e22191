"""Sizes that a graph computes of the tensors that a match reads, by the formulas of symbols."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from liger_fx.matcher import Reject


class Sizes:
    """Numbers; the dimensions of ``tensors``, by name; the number of ``tokens``, which are the
    leading dimensions of labels or hidden state; that times the ``classes``."""

    def __init__(self, tensors: Mapping[str, Any], tokens: Any, classes: Any) -> None:
        self._places: dict[str, tuple[str, tuple[int, ...]]] = {}
        shapes = {n: t.shape for n, t in tensors.items() if isinstance(t, torch.Tensor)}
        for name, shape in shapes.items():
            for dim, size in enumerate(shape):
                self._places.setdefault(_formula(size), (name, (dim,)))
        for name, last in (("target", 0), ("label", 0), ("hidden", 1)):
            leading = shapes.get(name, ())[: len(shapes.get(name, ())) - last]
            if leading:
                dims = tuple(range(len(leading)))
                self._places.setdefault(_formula(math.prod(leading)), (name, dims))
        self._tokens, self._classes = tokens, classes

    def known(self, size: Any) -> bool:
        return _constant(size) is not None or bool(self._factors(size))

    def record(self, size: Any, proxies: Mapping[str, Any]) -> Any:
        """The size, as a number or a proxy. Raises `Reject` for one that is not known."""
        constant = _constant(size)
        if constant is not None:
            return constant
        factors = self._factors(size)
        if not factors:
            raise Reject(f"the size {size} is not one of the head's tensors")
        product: Any = 1
        for factor in factors:
            number = _constant(factor)
            if number is not None:
                product = product * number
                continue
            name, dims = self._places[_formula(factor)]
            for dim in dims:
                size = proxies[name].size(dim)
                product = size if isinstance(product, int) and product == 1 else product * size
        return product

    def _factors(self, size: Any) -> list[Any]:
        if _formula(size) in self._places:
            return [size]
        if _formula(size) != _formula(self._tokens * self._classes):
            return []
        return [self._tokens, self._classes] if self.known(self._tokens) else []


def _constant(size: Any) -> int | None:
    """The number that ``size`` is, of symbols that a view has fixed as well."""
    return int(_formula(size)) if _formula(size).isdigit() else None


def _formula(size: Any) -> str:
    """Of the symbols: two that are as large today may differ tomorrow."""
    return str(size if isinstance(size, int) else size.node.expr.expand())
