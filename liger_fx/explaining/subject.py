"""What is explained: the parts of a model that are compiled, and where in the model they stand."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from liger_fx.report import Place

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MOST_TRACED = 8  # layers, unless the user asks for more


class CannotExplain(ValueError):
    """The model cannot be built or traced; the message says why and what to do."""


def unknown(what: str, name: str, known: Iterable[str]) -> CannotExplain:
    """The error for a name that is none of ``known``."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=6, cutoff=0.5)
    return CannotExplain(
        f"no {what} is called {name!r}; near it: {', '.join(near) or 'none'}. "
        f"Known: {', '.join(known)}"
    )


def described(model: nn.Module, dtype: torch.dtype, request: Request, checkpoint: bool) -> str:
    """A title: class and size of ``model``, and what it is trained on."""
    parameters = sum(p.numel() for p in model.parameters())
    title = f"{type(model).__name__}, {parameters:,} parameters, "
    title += f"{str(dtype).removeprefix('torch.')}, batch {request.batch} x {request.seq} tokens"
    return title + (", activation checkpointing" if checkpoint else "")


@dataclass(frozen=True)
class Request:
    """What the user asks for. dtype: a key of `DTYPES`, None for that of the config. layers: how
    many to trace, None for as few as show every kind. overrides: settings of the config."""

    batch: int
    seq: int
    checkpoint: bool
    padding: bool
    dtype: str | None
    layers: int | None
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """A function that is compiled on its own, with meta tensors as arguments.

    places: the places in the model that one place of the traced function stands for.
    """

    call: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    places: Callable[[Place], list[Place]]


@dataclass(frozen=True)
class Subject:
    """A model. layers: the names of all its layers. facts: sentences on what was traced. options:
    those of the backend."""

    title: str
    facts: Sequence[str]
    parts: Sequence[Part]
    layers: Sequence[str]
    options: Mapping[str, Any]


def kinds_of(layers: Sequence[nn.Module]) -> list[str]:
    """A text for each layer, equal for those that are built alike: modules, parameters and plain
    attributes. An attribute that differs in every layer is the layer's index, and left out."""
    attributes = [
        {
            (name, attribute): value
            for name, module in layer.named_modules()
            for attribute, value in vars(module).items()
            if isinstance(value, str | int | float | None)
        }
        for layer in layers
    ]
    indices = {key for key in attributes[0] if len({a.get(key) for a in attributes}) == len(layers)}
    return [
        repr(
            (
                [(name, type(module)) for name, module in layer.named_modules()],
                [(name, p.shape, p.dtype) for name, p in layer.named_parameters()],
                {key: value for key, value in found.items() if key not in indices},
            )
        )
        for layer, found in zip(layers, attributes, strict=True)
    ]


@dataclass(frozen=True)
class Repeated:
    """The decoder layers of a model, of which only the first are traced.

    name: of the module list, ``model.layers``. stand_ins: for each traced layer the indices of the
    layers that it stands for, its own among them. The first layer stands for itself alone where
    more are traced: nothing is added to what it reads.
    """

    name: str
    stand_ins: Sequence[Sequence[int]]
    known: bool  # each layer is built like the one that stands for it

    @property
    def count(self) -> int:
        return sum(map(len, self.stand_ins))

    @property
    def names(self) -> list[str]:
        return [f"{self.name}.{index}" for index in range(self.count)]

    def places(self, place: Place) -> list[Place]:
        """Where in the model what stands at ``place`` in the traced layers is."""
        found = re.search(rf"(?<!\w){re.escape(self.name)}\.(\d+)(?!\w)", place.module)
        if found is None:
            return [place]
        before, after = place.module[: found.start(1)], place.module[found.end(1) :]
        indices = self.stand_ins[int(found[1])]
        return [Place(f"{before}{index}{after}", place.source) for index in indices]

    def fact(self) -> str:
        if len(self.stand_ins) == self.count:
            return f"Layers traced: all {self.count}."
        fact = f"Layers traced: {len(self.stand_ins)} of {self.count}"
        if self.known:
            return f"{fact}; the others are built alike, and counts and bytes are for all of them."
        return (
            f"{fact}; some of the others are built differently, and counts and bytes take them for "
            "like the last: trace more with --layers."
        )


def cut_layers(model: nn.Module, traced: int | None) -> Repeated | None:
    """Remove, in place, the layers of ``model`` that need no tracing; None for a model without a
    list of layers."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists:
        return None
    name, layers = max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))
    kinds = kinds_of(list(layers))
    kept = min(len(kinds), traced or _enough(kinds))
    later = range(min(1, kept - 1), kept)  # those that may stand for others
    stand_ins = [[index] for index in range(kept)]
    known = True
    for index in range(kept, len(kinds)):
        alike = [i for i in later if kinds[i] == kinds[index]]
        known &= bool(alike)
        stand_ins[alike[-1] if alike else later[-1]].append(index)
    del layers[kept:]
    return Repeated(name, stand_ins, known)


def _enough(kinds: Sequence[str]) -> int:
    """The number of layers that show every kind, the first layer not counted."""
    counts = range(2, MOST_TRACED)
    return next((n for n in counts if set(kinds[1:n]) >= set(kinds[1:])), MOST_TRACED)
