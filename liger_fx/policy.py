"""The policy: which rewrites are made in a graph, where in it, and on what evidence."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import fx

from liger_fx.canonical import fake
from liger_fx.options import Options
from liger_fx.report import Place
from liger_fx.rewrite import Rewrite, Where

NOISE = 0.995  # as fast, within what such measurements repeat
SLOWEST = 0.98  # of what saves memory
SAVING = 0.90  # of the memory: worth a little time

NOWHERE: Mapping[str, Where] = {}

# Of an H100 or H200: what stands in where there is no GPU to ask.
DEFAULT_ARCHITECTURE = "sm90"


@dataclass(frozen=True)
class Measurement:
    """A graph with a rewrite against the same without it.

    speed: time without / time with. memory: peak with / peak without; None where it is not counted.
    """

    speed: float
    memory: float | None


@dataclass(frozen=True)
class Row(Measurement):
    """A `Measurement` as the table keeps it.

    spelling: the name of the rewrite's pattern. inner: that of `Options`. checkpoint: inside of an
    activation checkpoint. model: whose shapes. form: what was one graph, "layers" or the whole
    "step".
    """

    rewrite: str
    spelling: str
    inner: str
    checkpoint: bool
    model: str
    form: str


@dataclass(frozen=True)
class Entry:
    """What was measured on one architecture: on which machine, with which versions, when the last
    time, by which commands."""

    machine: str
    versions: str
    date: str
    commands: Sequence[str]
    rows: Sequence[Row]


@functools.cache
def table() -> dict[str, Entry]:
    """The measurements that liger_fx is shipped with, by architecture. ``benchmarks/rewrites.py``
    makes them; of several runs of it the median speed counts."""
    found = json.loads((files("liger_fx") / "measured.json").read_text())
    return {
        architecture: Entry(**entry | {"rows": [_row(**row) for row in entry["rows"]]})
        for architecture, entry in found.items()
    }


def _row(speeds: Sequence[float], **rest: Any) -> Row:
    return Row(speed=statistics.median(speeds), **rest)


def pays(measurements: Sequence[Measurement]) -> bool:
    """Never slower; or a little slower, and saving memory. Not without a measurement."""
    if not measurements:
        return False
    slowest = min(m.speed for m in measurements)
    smallest = min(m.memory or 1.0 for m in measurements)
    return slowest >= NOISE or (slowest >= SLOWEST and smallest <= SAVING)


class Verdict(NamedTuple):
    """where: by spelling, where to try the rewrite. why: a sentence for the report, or one for each
    spelling."""

    where: Mapping[str, Where]
    why: str | Mapping[str, str] | None


Judge = Callable[[Rewrite], Verdict]


@dataclass
class Policy:
    """chosen: rewrites to try. where: by name and spelling, in which parts of the graph. reasons:
    for each rewrite that the policy decided about, as in `Verdict`."""

    chosen: list[Rewrite] = field(default_factory=list)
    where: dict[str, Mapping[str, Where]] = field(default_factory=dict)
    reasons: dict[str, str | Mapping[str, str]] = field(default_factory=dict)

    def decisions(self, found: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """A sentence for each rewrite; none where it was decided by spelling, and there are none.
        found: by name, the spellings in the graph."""
        said = {name: _said(why, found.get(name, ())) for name, why in self.reasons.items()}
        return {name: sentence for name, sentence in said.items() if sentence}


def _said(why: str | Mapping[str, str], found: Sequence[str]) -> str:
    if isinstance(why, str):
        return why
    said = {name: why[name] for name in found}
    if len(set(said.values())) == 1:
        return said[found[0]]
    return "; ".join(f"in spelling {name} {sentence}" for name, sentence in said.items())


def decide(rewrites: Sequence[Rewrite], options: Options, judge: Judge) -> Policy:
    """Apply ``options`` to ``rewrites``. judge: decides where the options leave it to evidence."""
    policy = Policy()
    for rewrite in rewrites:
        where, why = _verdict(rewrite, options, judge)
        if any(where.values()):
            policy.chosen.append(rewrite)
            policy.where[rewrite.name] = where
        if why is not None:
            policy.reasons[rewrite.name] = why
    return policy


def _verdict(rewrite: Rewrite, options: Options, judge: Judge) -> Verdict:
    anywhere = rewrite.in_all_spellings(Where.ANYWHERE)
    if rewrite.name in options.disable:
        return Verdict(NOWHERE, "disabled by option")
    if options.policy == "all":
        return Verdict(anywhere, None)
    if not isinstance(options.policy, str):
        if rewrite.name in options.policy:
            return Verdict(anywhere, None)
        return Verdict(NOWHERE, "not in the policy's list")
    if rewrite.gain is not None:
        return Verdict(anywhere, f"{options.policy} always applies it: {rewrite.gain}")
    return judge(rewrite)


def device_of(gm: fx.GraphModule) -> torch.device:
    """The device the graph computes on: that of its first value on CUDA; meta tensors stand for a
    GPU's."""
    devices = [
        value.device for node in gm.graph.nodes if isinstance(value := fake(node), torch.Tensor)
    ]
    for kind in ("cuda", "meta"):
        for device in devices:
            if device.type == kind:
                return device
    return torch.device("cpu")


def form_of(gm: fx.GraphModule) -> str:
    """``step`` for a graph that goes through several layers of a model, else ``layers``: then it
    is one of them, or what is around them."""
    graphs = (m.graph for m in gm.modules() if isinstance(m, fx.GraphModule))
    places = {Place.of(node) for graph in graphs for node in graph.nodes}
    modules = {place.module for place in places}
    alike = {place.of_any_layer().module for place in places}
    return "step" if len(alike) < len(modules) else "layers"


# -- auto ------------------------------------------------------------------------------------------


def by_table(device: torch.device, inner: str, form: str) -> Judge:
    """``auto``: what `table` says of this device under this inner compiler, for graphs of this
    form and for each spelling where it knows of any."""
    if device.type == "cpu":
        left = "auto leaves it: not measured on a CPU; policy='measure' measures it on this one"
        return lambda rewrite: Verdict(NOWHERE, left)
    present = device.type == "cuda" and torch.cuda.is_available()
    architecture = architecture_of(device) if present else DEFAULT_ARCHITECTURE
    entry = table().get(architecture)
    assumed = f"not on a GPU: decided as on {architecture}"

    def judge(rewrite: Rewrite) -> Verdict:
        rows = [row for row in entry.rows if row.inner == inner] if entry else []
        rows = [row for row in rows if row.rewrite == rewrite.name]
        rows = [row for row in rows if row.form == form] or rows
        verdict = _by_spelling(rewrite, rows, functools.partial(_evidence, architecture, entry))
        return verdict if present else _with_note(verdict, assumed)

    return judge


def architecture_of(device: torch.device) -> str:
    """``sm90``; on ROCm, which has capabilities of its own, ``gfx942``."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


Evidence = Callable[[Sequence[Row]], str]


def _by_spelling(rewrite: Rewrite, rows: Sequence[Row], evidence: Evidence) -> Verdict:
    """Each spelling has a kernel, or an eager form, of its own: its own rows decide, and all of
    them where it has none."""
    names = [pattern.name for pattern in rewrite.spellings]
    measured = {name: [row for row in rows if row.spelling == name] for name in names}
    weighed = {name: _weigh(of_it or rows, evidence) for name, of_it in measured.items()}
    where = {name: place for name, (place, _) in weighed.items()}
    if len(set(where.values())) == 1:
        return Verdict(where, f"auto {_weigh(rows, evidence)[1]}")
    return Verdict(where, {name: f"auto {why}" for name, (_, why) in weighed.items()})


def _with_note(verdict: Verdict, note: str) -> Verdict:
    where, why = verdict
    if isinstance(why, Mapping):
        return Verdict(where, {name: f"{sentence} [{note}]" for name, sentence in why.items()})
    return Verdict(where, f"{why} [{note}]")


def _weigh(rows: Sequence[Row], evidence: Evidence) -> tuple[Where, str]:
    """Where the rows say that a rewrite pays, and that in words."""
    inside = [row for row in rows if row.checkpoint]
    outside = [row for row in rows if not row.checkpoint]
    if pays(inside) == pays(outside):
        if pays(inside):
            return Where.ANYWHERE, f"applies it: {evidence(rows)}"
        return Where(0), f"leaves it: {evidence(rows)}"
    if pays(inside):
        return Where.INSIDE, (
            f"applies it inside activation checkpoints only: {evidence(inside)}; outside: "
            f"{evidence(outside)}"
        )
    return Where.OUTSIDE, (
        f"applies it outside activation checkpoints only: {evidence(outside)}; inside: "
        f"{evidence(inside)}"
    )


def _evidence(architecture: str, entry: Entry | None, rows: Sequence[Row]) -> str:
    """The numbers that decided: the slowest, and the most memory saved if that is why."""
    if not rows or entry is None:
        return f"not measured on {architecture}; policy='measure' measures it on this GPU"
    slowest = min(rows, key=lambda row: row.speed)
    source = f"{slowest.model}, {slowest.form}, {architecture}, {entry.date}"
    text = f"{slowest.speed:.3f}x the speed at worst ({source})"
    smallest = min(rows, key=lambda row: row.memory or 1.0)
    if slowest.speed < NOISE and (smallest.memory or 1.0) <= SAVING:
        text += f", {smallest.memory:.2f} of the memory at best ({smallest.model}, {smallest.form})"
    return text


# -- measure ---------------------------------------------------------------------------------------


def by_measurement(measured: Mapping[str, Measurement], device: torch.device) -> Judge:
    """``measure``: what `liger_fx.measure` found out about this graph. A rewrite that it did not
    measure cannot be made here; it is tried, for the report to say why."""
    machine = "GPU" if device.type == "cuda" else "CPU"

    def judge(rewrite: Rewrite) -> Verdict:
        found = measured.get(rewrite.name)
        anywhere = rewrite.in_all_spellings(Where.ANYWHERE)
        if found is None:
            return Verdict(anywhere, None)
        memory = "" if found.memory is None else f", {found.memory:.2f} of the memory"
        numbers = f"{found.speed:.3f}x the speed{memory}, on this {machine}"
        if pays([found]):
            return Verdict(anywhere, f"measure applies it: {numbers}")
        return Verdict(NOWHERE, f"measure leaves it: {numbers}")

    return judge


def instead(judge: Judge, why: str) -> Judge:
    """``judge``, which stands in for ``measure``; why: nothing was measured."""

    return lambda rewrite: _with_note(judge(rewrite), f"not measured here: {why}")
