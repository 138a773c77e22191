"""Trace a `Subject` without kernels, rewrite its graphs, and measure both forms."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import fx

from liger_fx.canonical import fake, op_name
from liger_fx.dynamo import Backend, trace_without_kernels
from liger_fx.explaining import memory
from liger_fx.explaining.subject import CannotExplain, Part, Subject
from liger_fx.matcher import name_of
from liger_fx.report import Place, Report
from liger_fx.returned import returning
from liger_fx.rewrite import kept_ops

_HELD = (
    "Memory is what is held when the forward is done: what is returned, and what Inductor keeps "
    "for the backward. What an op needs while it runs, such as one chunk of logits, is not counted."
)
_AUTO = (
    'The policy "auto" replaces what was never slower in the measurements of liger_fx; '
    "LIGER_FX_POLICY=all replaces whatever can be replaced."
)


class Row(NamedTuple):
    """What was done about one rewrite at one place, ``times`` times in a layer."""

    verdict: str
    rewrite: str
    place: Place
    why: str
    times: int = 1


class Example(NamedTuple):
    """One rewrite: the lines of the graph that were replaced, and those that replace them."""

    rewrite: str
    place: Place
    before: Sequence[str]
    after: Sequence[str]


@dataclass(frozen=True)
class Explanation:
    """layers: the rows of each run of layers in which the same was done, and of what is around
    them. memory: a kind of tensors, its bytes without liger_fx and with it. facts: sentences on
    what was traced and measured."""

    title: str
    summary: str
    layers: dict[str, list[Row]]
    memory: list[tuple[str, int, int]]
    example: Example | None
    facts: list[str]


def explain_subject(subject: Subject) -> Explanation:
    """Raises CannotExplain if a part of ``subject`` cannot be traced, OptionError, a ValueError.
    Without a measurement of memory, a fact says why."""
    backend = Backend(subject.options)
    graphs = [graph for part in subject.parts for graph in _trace(part, backend)]
    order = [rewrite.name for rewrite in backend.rewrites]  # heads first
    examples = [example for graph in graphs for example in graph.examples]
    rows = [row for graph in graphs for row in _rows(graph)]
    tried = {row.rewrite for row in rows if row.verdict != _NEAR}
    rows = [row for row in rows if row.verdict != _NEAR or row.rewrite not in tried]
    # What the policy says of this machine in every row is said once.
    assumed = {note for row in rows for note in re.findall(r" \[(not on a GPU: [^]]*)\]", row.why)}
    rows = [row._replace(why=re.sub(r" \[not on a GPU: [^]]*\]", "", row.why)) for row in rows]
    facts = [*subject.facts, *(f"{note[0].upper()}{note[1:]}." for note in sorted(assumed))]
    facts += [_AUTO] if any("auto: " in row.why for row in rows) else []
    try:
        sizes = _memory(graphs)
        facts += [_HELD] if sizes else []
    except Exception as error:  # such as an op that a CPU does not have
        sizes = []
        facts.append(f"Memory could not be measured: {_said(error)}")
    return Explanation(
        title=subject.title,
        summary=_summary(rows),
        layers=_by_layers(rows, subject.layers),
        memory=sizes,
        example=min(examples, key=lambda e: order.index(e.rewrite), default=None),
        facts=facts,
    )


def _said(error: Exception) -> str:
    """Two lines: the first of Dynamo's says no more than where it was."""
    return " ".join([type(error).__name__ + ":", *" ".join(str(error).split("\n")[:2]).split()])


# -- rows ------------------------------------------------------------------------------------------

_MADE, _LEFT, _NEAR = "replaced", "left alone", "no match"


def _rows(graph: _Graph) -> Iterator[Row]:
    """A row for each place in the model that a place of the traced graph stands for."""
    report, found = graph.report, list[Row]()
    for made in report.replacements:
        found.append(Row(_MADE, made.rewrite, made.place, made.worth))
    for left in report.rejections:
        found.append(Row(_LEFT, left.rewrite, left.place, left.reason))
    for near in report.near_misses:
        why = f"{near.matched} of {near.total} operations match: {near.reason}"
        found.append(Row(_NEAR, near.rewrite, near.place, why))
    for what, place in report.skipped:
        found.append(Row("skipped", "", place, what))
    for place in report.deferred:
        found.append(Row("deferred", "logits", place, "returned: computed when they are read"))
    for row in found:
        for place in graph.part.places(row.place):
            yield row._replace(place=place)


def _summary(rows: Sequence[Row]) -> str:
    said = []
    for verdict in (_MADE, _LEFT):
        counts = Counter(row.rewrite for row in rows if row.verdict == verdict)
        said += [f"{verdict}: {', '.join(f'{n} x {name}' for name, n in counts.items())}"] * bool(
            counts
        )
    return "; ".join(said) or "nothing to replace"


def _by_layers(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[Row]]:
    layers = {name: Counter[Row]() for name in (*names, "")}
    for row in rows:
        module = row.place.module
        layer = next((name for name in names if f"{module}.".startswith(f"{name}.")), "")
        inside = module[len(layer) :].strip(".")
        layers[layer][row._replace(place=Place(inside, row.place.source))] += 1
    around = layers.pop("")
    found = {}
    for counts, run in groupby(layers, key=lambda name: layers[name]):
        first, *others = run
        title = f"{first} to {others[-1]} ({1 + len(others)} layers)" if others else first
        found[title] = counts
    found["around the layers" if names else "the model"] = around
    return {
        title: [row._replace(times=times) for row, times in counts.items()]
        for title, counts in found.items()
    }


# -- graphs ----------------------------------------------------------------------------------------


class _Graph(NamedTuple):
    """A graph of ``part``. forms: copies to measure, before and after. masks: their bytes."""

    part: Part
    report: Report
    forms: tuple[fx.GraphModule, fx.GraphModule]
    groups: memory.Groups
    masks: tuple[int, int]
    examples: Sequence[Example]


def _trace(part: Part, backend: Backend) -> list[_Graph]:
    graphs: list[_Graph] = []
    kept = kept_ops(backend.rewrites, backend.options.settings)

    def look(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        matches = memory.all_matches(gm, backend.rewrites)
        groups, known = memory.groups_of(matches), set(map(memory.key, memory.all_nodes(gm)))
        lines = {(n, Place.of(m.root)): list(map(_line, sorted(m.nodes))) for n, m in matches}
        before, masks = memory.for_measuring(gm, kept), memory.attention_masks(gm)
        bytes_before = memory.bytes_of_masks(masks)
        report, deferrals = backend.rewrite(gm)
        new = [node for node in memory.all_nodes(gm) if memory.key(node) not in known]
        groups |= memory.groups_of_new(new, report)
        counts = Counter((r.rewrite, r.place) for r in report.replacements)
        examples = [
            Example(*at, lines[at], [_line(n) for n in new if Place.of(n) == at[1]])
            for at, times in counts.items()
            if times == 1 and lines.get(at)
        ]
        forms = before, memory.for_measuring(gm, kept)
        sizes = bytes_before, memory.bytes_of_masks(masks)
        graphs.append(_Graph(part, report, forms, groups, sizes, examples))
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


# -- bytes -----------------------------------------------------------------------------------------


def _memory(graphs: Sequence[_Graph]) -> list[tuple[str, int, int]]:
    """What is held outside of activation checkpoints, and the most that one of them makes again."""
    outside, inside = (Counter[str](), Counter[str]()), (Counter[str](), Counter[str]())
    for graph in graphs:
        for form, kept, again in zip(graph.forms, outside, inside, strict=True):
            recomputed = Counter[tuple[str, int]]()
            for tensor in memory.held(form, graph.groups):
                if tensor.checkpoint is not None:
                    recomputed[tensor.group, tensor.checkpoint] += tensor.size
                else:
                    kept[tensor.group] += tensor.size * len(graph.part.places(tensor.place))
            for (group, _), size in recomputed.items():
                again[group] = max(again[group], size)
    rows = []
    for kind in memory.KINDS:
        sizes = [kept[kind] + again[kind] for kept, again in zip(outside, inside, strict=True)]
        if any(kind in found for found in (*outside, *inside)):
            of_one = any(kind in again for again in inside)
            rows.append((kind + ", of one layer at a time" * of_one, sizes[0], sizes[1]))
    before, after = (sum(graph.masks[form] for graph in graphs) for form in (0, 1))
    return rows + ([("attention masks, as attention reads them", before, after)] if before else [])
