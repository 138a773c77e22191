"""What is taken of the logits of a projection, and the match of all of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from liger_fx.passes._rows import kept_rows
from liger_fx.passes._sizes import Sizes
from liger_fx.passes._sums import Step
from torch import fx

from liger_fx.canonical import fake
from liger_fx.effects import without_grad
from liger_fx.matcher import Match


@dataclass(frozen=True)
class Taken:
    """What a pattern takes of each row of logits: ``sign`` times ``name``, one of what
    `liger_fx.ops.token_loss` computes. check: raises `Reject` for what the op does not compute.
    beta: of a Jensen-Shannon divergence."""

    pattern: Callable[..., Any]
    name: str
    check: Callable[[Match], None]
    sign: float = 1.0
    beta: Callable[[Match], float] = lambda match: 0.5


@dataclass(eq=False)
class Term:
    """A value and the steps that follow it, first those that end in a value of each token."""

    taken: Taken
    match: Match
    inner: list[Step] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    read: list[fx.Node] = field(default_factory=list)  # for its number alone, without a gradient

    @property
    def path(self) -> list[fx.Node]:
        """The nodes from the start to the end."""
        return [self.start, *(step.node for step in self.steps)]

    @property
    def root(self) -> fx.Node:
        return self.match.root

    @property
    def start(self) -> fx.Node:
        """The first node without a dimension of classes."""
        return self.inner[-1].node if self.inner else self.root

    @property
    def has_teacher(self) -> bool:
        return "teacher_rows" in self.match.sources

    @property
    def has_classes(self) -> bool:
        return self.match.bindings.get("kl_reduction") == "none"

    @property
    def tokens(self) -> torch.Tensor:
        """A fake tensor of the shape of the tokens: the kept logits', without the classes."""
        return kept_rows(self.match)[..., 0]


@dataclass(eq=False)
class Head(Match):
    """All that is taken of one projection, in ``chunks`` of terms. ``summed``: the first output is
    the sum of everything; the others, or all without it, are values of single tokens."""

    chunks: list[list[Term]] = field(default_factory=list)
    summed: bool = False
    every_value: bool = False
    along: int = 0  # the dimension of the chunks

    @property
    def terms(self) -> list[Term]:
        return self.chunks[0]

    @property
    def first(self) -> fx.Node:
        """The node before which the op stands: the first of the outputs, or the first one at which
        all is known that the op reads, if that is before any output is used."""
        first = min(self.outputs)
        read = [value for value in self.bindings.values() if isinstance(value, fx.Node)]
        if all(node < first for node in read):
            return first
        users = {user for node in self.outputs for user in node.users}
        last = min(users - self.nodes, default=first)
        off = without_grad(self.view.graph) - {*self.outputs}
        at = max(read).next
        while at < last and (at in off or at.target is torch._C._set_grad_enabled):
            at = at.next
        return min(at, last)

    @property
    def spelling(self) -> str:
        return ", ".join(term.match.pattern.name for term in self.terms)

    @functools.cached_property
    def sizes(self) -> Sizes:
        return sizes_of(self.bindings, self.terms[0].match)


def sizes_of(bindings: dict[str, Any], match: Match) -> Sizes:
    logits = kept_rows(match)
    values = {name: fake(value) for name, value in bindings.items()}
    return Sizes(values, math.prod(logits.shape[:-1]), logits.shape[-1])
