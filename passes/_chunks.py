"""Tensors that the model cut into chunks: torchtune's losses project ``hidden.chunk(8, dim=1)`` one
by one, and cut the labels alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from liger_fx.canonical import View, fake, op_name


class Chunks(NamedTuple):
    """A tensor and how it is cut: ``whole.chunk(sections, dim)``, or split or tensor_split."""

    whole: fx.Node
    op: Any
    sections: Any
    dim: int


def whole_of(view: View, parts: list[Any]) -> Chunks | None:
    """What was cut along a leading dimension, if the parts are all its chunks, in order."""
    sources = set()
    for i, part in enumerate(parts):
        while isinstance(part, fx.Node) and op_name(part) == "reshape":
            part = view.resolve(part.args[0])
        if not isinstance(part, fx.Node) or op_name(part) != "getitem" or part.args[1] != i:
            return None
        sources.add(part.args[0])
    chunk = sources.pop() if len(sources) == 1 else None
    if not isinstance(chunk, fx.Node) or op_name(chunk) not in ("chunk", "tensor_split", "split"):
        return None
    if len(fake(chunk)) != len(parts):
        return None
    names = ("chunks", "indices_or_sections", "split_size", "split_size_or_sections")
    sections = next((chunk.kwargs[n] for n in names if n in chunk.kwargs), chunk.args[1:2])
    dim = chunk.args[2] if len(chunk.args) > 2 else chunk.kwargs.get("dim", 0)
    whole = view.expr(chunk).args[0]
    if not isinstance(dim, int) or not 0 <= dim < fake(whole).dim() - 1:
        return None
    return Chunks(whole, op_name(chunk), sections, dim)
