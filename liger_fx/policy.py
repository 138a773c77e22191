"""The policy: which matches are replaced, and on what evidence."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import fx

from liger_fx.canonical import fake
from liger_fx.matcher import Match, Reject
from liger_fx.options import Options
from liger_fx.report import Place
from liger_fx.rewrite import Allow, Rewrite

NOISE = 0.995  # as fast, within what such measurements repeat
SLOWEST = 0.98  # of what saves memory
SAVING = 0.90  # of the memory: worth a little time

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


Judge = Callable[[Rewrite, Match], tuple[bool, str]]  # is it worth it, and the evidence


def policy(options: Options, judge: Judge, judged: Collection[str]) -> Allow:
    """What `rewrite_graph` asks of each match.

    judge: decides where the options leave it to evidence. judged: names of the rewrites that it
    knows of; others come from the user, who wants them made.
    """

    def allow(rewrite: Rewrite, match: Match) -> str:
        if rewrite.name in options.disable:
            raise Reject("disabled by option")
        if not isinstance(options.policy, str) and rewrite.name not in options.policy:
            raise Reject("not in the policy's list")
        if not isinstance(options.policy, str) or options.policy == "all":
            return ""
        if rewrite.gain is not None:
            return f"{options.policy}: {rewrite.gain}"
        if rewrite.name not in judged and options.policy == "auto":
            return "auto: a rewrite of your own"
        pays_here, evidence = judge(rewrite, match)
        if not pays_here:
            raise Reject(f"{options.policy}: {evidence}")
        return f"{options.policy}: {evidence}"

    return allow


def device_of(gm: fx.GraphModule) -> torch.device:
    """The device that the graph computes on: the first that is no CPU."""
    devices = [
        value.device for node in gm.graph.nodes if isinstance(value := fake(node), torch.Tensor)
    ]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


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
    form. Each spelling has a kernel, or an eager form, of its own: its rows decide, and those of
    all spellings where it has none. So it is inside and outside of activation checkpoints."""
    if device.type not in ("cuda", "meta"):
        machine = "a CPU" if device.type == "cpu" else device.type
        left = f"not measured on {machine}; policy='measure' measures it on this one"
        return lambda rewrite, match: (False, left)
    present = device.type == "cuda" and torch.cuda.is_available()
    architecture = architecture_of(device) if present else DEFAULT_ARCHITECTURE
    entry = table().get(architecture)
    assumed = "" if present else f" [not on a GPU: decided as on {architecture}]"

    def judge(rewrite: Rewrite, match: Match) -> tuple[bool, str]:
        rows = [row for row in entry.rows if row.inner == inner] if entry else []
        rows = [row for row in rows if row.rewrite == rewrite.name]
        rows = [row for row in rows if row.form == form] or rows
        rows = [row for row in rows if row.spelling == match.spelling] or rows
        rows = [row for row in rows if row.checkpoint == match.recomputed]
        return pays(rows), _evidence(architecture, entry, rows) + assumed

    return judge


def architecture_of(device: torch.device) -> str:
    """``sm90``; on ROCm, which has capabilities of its own, ``gfx942``."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _evidence(architecture: str, entry: Entry | None, rows: Sequence[Row]) -> str:
    """The numbers that decided: the slowest, and the most memory saved if that is why."""
    if not rows or entry is None:
        return f"not measured on {architecture}; policy='measure' measures it on this GPU"
    slowest = min(rows, key=lambda row: row.speed)
    inside = ", in a checkpoint" if slowest.checkpoint else ""
    source = f"{slowest.model}, {slowest.form}{inside}, {architecture}, {entry.date}"
    text = f"{slowest.speed:.3f}x the speed at worst ({source})"
    smallest = min(rows, key=lambda row: row.memory or 1.0)
    if slowest.speed < NOISE and (smallest.memory or 1.0) <= SAVING:
        text += f", {smallest.memory:.2f} of the memory at best ({smallest.model}, {smallest.form})"
    return text
