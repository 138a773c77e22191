"""Trace a `Subject` without kernels, rewrite its graphs, and measure both forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from liger_fx.bodies import with_bodies
from liger_fx.canonical import fake, op_name
from liger_fx.dynamo import Backend, trace_without_kernels
from liger_fx.explaining.memory import (
    GATED,
    LOSS,
    MASKS,
    Groups,
    Held,
    all_matches,
    for_measuring,
    held,
)
from liger_fx.explaining.subject import CannotExplain, Part, Subject
from liger_fx.matcher import name_of
from liger_fx.report import Place, Report

KINDS = {
    LOSS: "logits, and what else projection and loss keep",
    GATED: "gate, up and their product",
    MASKS: "attention masks",
}
HELD = (
    "Memory is what is held when the forward is done: what is returned, and what Inductor keeps for "
    "the backward. What an op needs while it runs, such as one chunk of logits, is not counted."
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
    """report: of the whole model, each traced layer repeated for those that it stands for."""

    subject: Subject
    report: Report = field(default_factory=Report)
    memory: list[Row] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    example: Example | None = None


def explain_subject(subject: Subject) -> Explanation:
    """Raises CannotExplain if a part of ``subject`` cannot be traced, OptionError, a ValueError.
    Without a measurement of memory, a fact says why."""
    backend = Backend(subject.options)
    explanation = Explanation(subject, facts=list(subject.facts))
    traced = [(part, graph) for part in subject.parts for graph in _trace(part, backend)]
    reports = [_everywhere(graph.report, part.places) for part, graph in traced]
    explanation.report = _without_known(Report.merged(reports))
    explanation.example = next((graph.example for _, graph in traced if graph.example), None)
    try:
        explanation.memory = _memory(traced)
        explanation.facts += [HELD] if explanation.memory else []
    except Exception as error:  # Inductor's front half has limits of its own on fake tensors
        explanation.facts.append(f"Memory could not be measured: {first_line(error)}")
    return explanation


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _memory(traced: Sequence[tuple[Part, _Graph]]) -> list[Row]:
    before, after = _Bytes(), _Bytes()
    for part, graph in traced:
        before.add(held(graph.before, graph.groups), part)
        after.add(held(graph.after, graph.groups), part)
    return [
        Row(kind + before.how(group), before.of(group), after.of(group))
        for group, kind in KINDS.items()
        if before.of(group) or after.of(group)
    ]


class _Bytes:
    """Sums over the parts of a model, by group."""

    def __init__(self) -> None:
        self.kept: dict[str, int] = {}
        self.in_a_checkpoint: dict[str, int] = {}

    def add(self, tensors: Sequence[Held], part: Part) -> None:
        layers: dict[tuple[str, int], int] = {}
        for tensor in tensors:
            group, size = tensor.group, tensor.size
            if tensor.checkpoint is None:
                # All layers share a mask.
                times = 1 if group == MASKS else len(part.places(tensor.place))
                self.kept[group] = self.kept.get(group, 0) + times * size
            elif group != MASKS:
                layer = group, tensor.checkpoint
                layers[layer] = layers.get(layer, 0) + size
        for (group, _), size in layers.items():
            self.in_a_checkpoint[group] = max(self.in_a_checkpoint.get(group, 0), size)

    def of(self, group: str) -> int:
        return self.kept.get(group, 0) + self.in_a_checkpoint.get(group, 0)

    def how(self, group: str) -> str:
        return ", of one layer at a time" if self.in_a_checkpoint.get(group) else ""


@dataclass(frozen=True)
class _Graph:
    report: Report
    before: fx.GraphModule
    after: fx.GraphModule
    groups: Groups
    example: Example | None


def _trace(part: Part, backend: Backend) -> list[_Graph]:
    graphs: list[_Graph] = []

    def look(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        matches = all_matches(gm, backend.rewrites)
        groups = Groups.of(gm, matches)
        texts = [(n, Place.of(m.root), list(map(_line, sorted(m.nodes)))) for n, m in matches]
        before = for_measuring(gm, backend.rewrites)
        report = backend.rewrite(gm)
        groups.add_new(gm, report)
        after = for_measuring(gm, backend.rewrites)
        graphs.append(_Graph(report, before, after, groups, _example(gm, report, texts, groups)))
        return gm.forward

    try:
        trace_without_kernels(part.call, part.args, part.kwargs, look)
    except Exception as error:
        raise CannotExplain(
            f"the model cannot be traced on meta tensors: {first_line(error)}"
        ) from error
    return graphs


def _example(
    gm: fx.GraphModule,
    report: Report,
    texts: Sequence[tuple[str, Place, list[str]]],
    groups: Groups,
) -> Example | None:
    """The first rewrite that was made, with its lines before and after."""
    for made in report.replacements:
        for name, place, before in texts:
            if (name, place) == (made.rewrite, made.place):
                after = [
                    _line(node)
                    for graph, _ in with_bodies(gm)
                    for node in graph.graph.nodes
                    if Place.of(node) == place and groups.is_new(node)
                ]
                return Example(name, place, before, after)
    return None


def _line(node: fx.Node) -> str:
    value = fake(node)
    given = [*map(str, node.args), *(f"{name}={v}" for name, v in node.kwargs.items())]
    line = f"{node.name} = {name_of(op_name(node))}({', '.join(given)})"
    if isinstance(value, torch.Tensor):
        line += f"  # {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return line


def _everywhere(report: Report, places: Callable[[Place], list[Place]]) -> Report:
    """``report`` with an entry for each place that a traced place stands for."""
    return dataclasses.replace(
        report,
        replacements=[
            dataclasses.replace(made, place=place)
            for made in report.replacements
            for place in places(made.place)
        ],
        rejections=[
            dataclasses.replace(left, module=place.module)
            for left in report.rejections
            for place in places(Place(left.module, left.source))
        ],
        near_misses=[
            dataclasses.replace(miss, module=places(Place(miss.module, miss.source))[0].module)
            for miss in report.near_misses
        ],
        skipped=[(what, place) for what, traced in report.skipped for place in places(traced)],
    )


def _without_known(report: Report) -> Report:
    """``report`` without the near misses of rewrites that match in another graph."""
    matched = {r.rewrite for r in (*report.replacements, *report.rejections)}
    report.near_misses = [m for m in report.near_misses if m.rewrite not in matched]
    return report
