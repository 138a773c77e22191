"""A loss that the model computes in chunks of its hidden state is one loss.

torchtune's CEWithChunkedOutputLoss projects ``hidden.chunk(8, dim=1)`` one by one, takes the summed
cross-entropy of each against ``labels.chunk(8, dim=1)``, and adds the eight numbers up. Eight ops
would keep eight weight gradients; the matches are merged into one, over the whole hidden state.
Its losses of distillation do so with the hidden state of a teacher as well.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any, NamedTuple

from torch import fx

from liger_fx.canonical import View, fake, op_name
from liger_fx.matcher import Match, interior

_HIDDEN = ("hidden", "teacher_hidden")  # cut as the target is; all else is common to the chunks


def merge_chunked_losses(view: View, matches: list[Match]) -> list[Match]:
    """Replace each group of matches that are the terms of one sum by a single match."""
    by_root = {match.root: match for match in matches}
    merged: list[Match] = []
    for node in reversed(view.position):  # a sum comes after its terms: the whole sum first
        if op_name(node) not in ("add", "add_"):
            continue
        terms = _terms(node, by_root.keys())
        if len(terms) > 1 and all(term in by_root for term in terms):
            whole = _merge(view, node, [by_root[term] for term in terms])
            if whole is not None:
                merged.append(whole)
                for term in terms:
                    del by_root[term]
    return sorted([*merged, *by_root.values()], key=lambda m: view.position[m.root])


def _terms(node: fx.Node, losses: Container[fx.Node]) -> list[fx.Node]:
    """``((0.0 + a) + b) + c`` -> [a, b, c], where each may be a sum itself; [] if anything else
    uses a term or a partial sum."""
    terms: list[fx.Node] = []
    while (
        isinstance(node, fx.Node)
        and node not in losses
        and op_name(node) in ("add", "add_")
        and not node.kwargs
    ):
        left, right = node.args
        if not isinstance(right, fx.Node) or len(right.users) != 1:
            return []
        terms.append(right)
        if isinstance(left, fx.Node) and len(left.users) != 1:
            return []
        node = left  # type: ignore[assignment]
    if isinstance(node, fx.Node):
        terms.append(node)
    elif node != 0:
        return []
    return terms[::-1]


def _merge(view: View, root: fx.Node, parts: list[Match]) -> Match | None:
    first = parts[0]
    if "target" not in first.bindings or any(
        first.bindings.get(name, "sum") != "sum" for name in ("reduction", "kl_reduction")
    ):
        return None
    if any(len(part.outputs) > 1 for part in parts):
        return None
    cut = [name for name in (*_HIDDEN, "target") if name in first.bindings]
    for part in parts[1:]:
        if part.pattern is not first.pattern:
            return None
        for name in first.bindings.keys() - cut:
            if not view.same(first.bindings[name], part.bindings[name]):
                return None
    chunks = {name: _whole(view, [part.bindings[name] for part in parts]) for name in cut}
    wholes = {name: chunk.whole for name, chunk in chunks.items() if chunk is not None}
    target = chunks.pop("target")
    if target is None or not all(c and _rows_agree(c, target) for c in chunks.values()):
        return None
    # Slices of the rows of one chunk are not slices of the whole.
    passed = [node for part in parts for nodes in part.chains.values() for node in nodes]
    if any(op_name(node) not in ("cast", "reshape", "detach") for node in passed):
        return None
    bindings = first.bindings | wholes
    nodes = interior(view, root, bindings)
    return replace(first, outputs=(root,), bindings=bindings, nodes=nodes)


class _Chunks(NamedTuple):
    """A tensor and how it is cut: ``whole.chunk(sections, dim)``, or split or tensor_split."""

    whole: fx.Node
    op: Any
    sections: Any
    dim: Any


def _rows_agree(hidden: _Chunks, target: _Chunks) -> bool:
    """Are [.., H] and [..] cut alike, along one of the leading dimensions?"""
    leading = fake(hidden.whole).shape[:-1]
    return (
        hidden[1:] == target[1:]
        and isinstance(hidden.dim, int)
        and 0 <= hidden.dim < len(leading)
        and [str(size) for size in leading] == [str(size) for size in fake(target.whole).shape]
    )


def _whole(view: View, parts: list[Any]) -> _Chunks | None:
    """What was cut, if the parts are all its chunks, in order."""
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
    return _Chunks(view.expr(chunk).args[0], op_name(chunk), sections, dim)
