"""Trace a `Subject` without kernels, rewrite its graphs, and measure both forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import fx

from liger_fx.canonical import fake, op_name
from liger_fx.dynamo import Backend, trace_without_kernels
from liger_fx.explaining.memory import (
    GATED,
    LOSS,
    Groups,
    all_matches,
    attention_masks,
    bytes_of_masks,
    for_measuring,
    held,
)
from liger_fx.explaining.subject import CannotExplain, Part, Subject
from liger_fx.matcher import name_of
from liger_fx.report import Place, Report
from liger_fx.returned import returning

KINDS = {
    LOSS: "logits, and what else projection and loss keep",
    GATED: "gate, up and their product",
}
HELD = (
    "Memory is what is held when the forward is done: what is returned, and what Inductor keeps "
    "for the backward. What an op needs while it runs, such as one chunk of logits, is not counted."
)


@dataclass(frozen=True)
class Row:
    """Bytes of one kind of tensors, without liger_fx and with it."""

    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class Example:
    """One rewrite: the lines of the graph that were replaced, and those that replace them."""

    rewrite: str
    place: Place
    before: Sequence[str]
    after: Sequence[str]


@dataclass
class Explanation:
    """report: of the whole model, each traced layer repeated for those that it stands for. facts:
    sentences on what was traced and measured."""

    subject: Subject
    report: Report
    facts: list[str]
    memory: list[Row] = field(default_factory=list)
    example: Example | None = None


def explain_subject(subject: Subject) -> Explanation:
    """Raises CannotExplain if a part of ``subject`` cannot be traced, OptionError, a ValueError.
    Without a measurement of memory, a fact says why."""
    backend = Backend(subject.options)
    graphs = [graph for part in subject.parts for graph in _trace(part, backend)]
    report = Report.merged([_everywhere(graph.report, graph.part.places) for graph in graphs])
    matched = {r.rewrite for r in report.replacements} | {r.rewrite for r in report.rejections}
    report.near_misses = [m for m in report.near_misses if m.rewrite not in matched]
    explanation = Explanation(subject, report, list(subject.facts))
    examples = list(chain.from_iterable(graph.examples for graph in graphs))
    order = [rewrite.name for rewrite in backend.rewrites]  # heads first
    examples.sort(key=lambda example: order.index(example.rewrite))
    explanation.example = examples[0] if examples else None
    try:
        explanation.memory = _memory(graphs)
        explanation.facts += [HELD] if explanation.memory else []
    except Exception as error:  # such as an op that a CPU does not have
        explanation.facts.append(f"Memory could not be measured: {_said(error)}")
    return explanation


def _said(error: Exception) -> str:
    """Two lines: the first of Dynamo's says no more than where it was."""
    return " ".join([type(error).__name__ + ":", *" ".join(str(error).split("\n")[:2]).split()])


# -- graphs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Graph:
    """A graph of ``part``. before, after: copies to measure. masks: their bytes in both."""

    part: Part
    report: Report
    before: fx.GraphModule
    after: fx.GraphModule
    groups: Groups
    masks: tuple[int, int]
    examples: Sequence[Example]


def _trace(part: Part, backend: Backend) -> list[_Graph]:
    graphs: list[_Graph] = []

    def look(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        matches = all_matches(gm, backend.rewrites)
        groups = Groups.of(gm, matches)
        lines = {(n, Place.of(m.root)): list(map(_line, sorted(m.nodes))) for n, m in matches}
        before, masks = for_measuring(gm, backend.rewrites), attention_masks(gm)
        bytes_before = bytes_of_masks(masks)
        report, deferrals = backend.rewrite(gm)
        new = groups.add_new(gm, report)
        examples = [
            Example(name, place, old, [_line(n) for n in new if Place.of(n) == place])
            for (name, place), times in Counter(
                (r.rewrite, r.place) for r in report.replacements
            ).items()
            if times == 1 and (old := lines.get((name, place)))
        ]
        after, bytes_after = for_measuring(gm, backend.rewrites), bytes_of_masks(masks)
        of_masks = bytes_before, bytes_after
        graphs.append(_Graph(part, report, before, after, groups, of_masks, examples))
        return returning(gm.forward, deferrals)

    try:
        trace_without_kernels(part.call, part.args, part.kwargs, look)
    except Exception as error:
        why = _said(error)
        raise CannotExplain(f"the model cannot be traced on meta tensors: {why}") from error
    return graphs


def _line(node: fx.Node) -> str:
    given = [*map(str, node.args), *(f"{name}={v}" for name, v in node.kwargs.items())]
    line = f"{node.name} = {name_of(op_name(node))}({', '.join(given)})"
    value = fake(node)
    if isinstance(value, torch.Tensor):
        line += f"  # {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return line


def _everywhere(report: Report, places: Callable[[Place], list[Place]]) -> Report:
    """``report`` with an entry for each place that a traced place stands for."""

    return replace(
        report,
        replacements=[replace(r, place=p) for r in report.replacements for p in places(r.place)],
        rejections=[replace(r, place=p) for r in report.rejections for p in places(r.place)],
        near_misses=[replace(m, place=places(m.place)[0]) for m in report.near_misses],
        skipped=[(what, p) for what, place in report.skipped for p in places(place)],
    )


# -- bytes -----------------------------------------------------------------------------------------


def _memory(graphs: Sequence[_Graph]) -> list[Row]:
    before, inside = _sizes(graphs, lambda graph: graph.before)
    after, inside_after = _sizes(graphs, lambda graph: graph.after)
    rows = [
        Row(
            kind + (", of one layer at a time" if group in inside else ""),
            before[group] + inside[group],
            after[group] + inside_after[group],
        )
        for group, kind in KINDS.items()
        if group in before | inside | after
    ]
    masks = [sum(graph.masks[form] for graph in graphs) for form in (0, 1)]
    return rows + ([Row("attention masks, as attention reads them", *masks)] if masks[0] else [])


def _sizes(
    graphs: Sequence[_Graph], form: Callable[[_Graph], fx.GraphModule]
) -> tuple[Counter[str], Counter[str]]:
    """By group: bytes outside of activation checkpoints, and most that one checkpoint's backward
    makes again."""
    outside, inside = Counter[str](), Counter[str]()
    for graph in graphs:
        recomputed = Counter[tuple[str, int]]()
        for tensor in held(form(graph), graph.groups):
            if tensor.checkpoint is not None:
                recomputed[tensor.group, tensor.checkpoint] += tensor.size
            else:
                outside[tensor.group] += tensor.size * len(graph.part.places(tensor.place))
        for (group, _), size in recomputed.items():
            inside[group] = max(inside[group], size)
    return outside, inside
