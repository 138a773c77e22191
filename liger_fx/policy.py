"""The policy: which matches are replaced, and on what evidence."""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

from liger_fx.bodies import with_bodies
from liger_fx.canonical import fake, hint, op_name
from liger_fx.matcher import Match, Reject
from liger_fx.ops.library import multiprocessors
from liger_fx.options import OptionError, Options
from liger_fx.report import Place
from liger_fx.rewrite import Allow, Rewrite

NOISE = 0.995  # as fast, within what such measurements repeat
SLOWEST = 0.98  # of what saves memory
SAVING = 0.90  # of the memory: worth a little time
MARGIN = 0.02  # of the speed, on another architecture than the one measured: what rows differ by

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
    return _entries((files("liger_fx") / "measured.json").read_text())


def own_path() -> Path:
    """Where ``python -m liger_fx measure --write`` puts the table of the user's own GPU."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "liger_fx" / "measured.json"


def own_table(path: str) -> dict[str, Entry]:
    """What the user has measured, by architecture. path: of the file; "" for `own_path`, if there
    is such a file. Raises OptionError for a file that cannot be read or is no such table."""
    file = Path(path) if path else own_path()
    if not path and not os.path.exists(file):
        return {}
    try:
        found = _entries(file.read_text(encoding="utf-8"))
        for architecture in found:
            _version(architecture)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(
            f"{file} cannot be read as a table of measurements ({type(error).__name__}: {error}): "
            f"make it anew with `python -m liger_fx measure --write {file}`, or "
            + ("leave out the option `table`" if path else "delete it")
        ) from error
    return found


def _entries(text: str) -> dict[str, Entry]:
    return {
        architecture: Entry(**entry | {"rows": [_row(**row) for row in entry["rows"]]})
        for architecture, entry in json.loads(text).items()
    }


def _row(speeds: Sequence[float], memory: float | None, **rest: Any) -> Row:
    known = None if memory is None else float(memory)
    return Row(statistics.median(map(float, speeds)), known, **rest)


def pays(measurements: Sequence[Measurement], margin: float = 0.0) -> bool:
    """Never slower; or a little slower, and saving memory. Not without a measurement. margin: added
    to the speeds that are asked for."""
    if not measurements:
        return False
    slowest = min(m.speed for m in measurements)
    smallest = min(m.memory or 1.0 for m in measurements)
    return slowest >= NOISE + margin or (slowest >= SLOWEST + margin and smallest <= SAVING)


# FLOPs of a matrix product, in the mean, for each multiprocessor of the GPU. With smaller ones the
# GPU waits for the host, and an op that is called from Python costs the host more than a kernel of
# the compiler's. Layer by layer, with checkpoints, on one H200 (ms, least of 9 laps): 2,048 tokens
# of Qwen3-0.6B (70e6) 72 without rewrites, 124 with those that pay at 16,384; 8,192 (280e6) 96 and
# 128; 16,384 (560e6) 180 and 182; of Llama-3.2-1B 4,096 (540e6) 72 and 72, 8,192 148 and 141:
# huggingface_step.py --arms liger_fx_layers --batch 1, under LIGER_FX_POLICY=linear_cross_entropy,
# without and with ",attention,add_rms_norm,tiled_mlp".
BUSY = 400e6
_H100 = 132  # its multiprocessors

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


def too_small(gm: fx.GraphModule) -> str:
    """Why no rewrite makes this graph faster, though the measurements of large ones say so: its
    matrix products do not keep the GPU busy. "" where they do, or where there are none."""
    device, flops = device_of(gm), _mean_product(gm)
    present = device.type == "cuda" and torch.cuda.is_available()
    enough = BUSY * (multiprocessors(device) if present else _H100)
    if flops is None or flops >= enough:
        return ""
    return (
        f"products of {flops / 1e9:.2g} GFLOP in the mean, below {enough / 1e9:.2g}: an op takes "
        "more of the host's time than it saves of the GPU's"
    )


def _mean_product(gm: fx.GraphModule) -> float | None:
    """FLOPs of a matrix product of the forward; None without one of a known size. Adapters and
    routers, which are thin, do not count, nor does the head, which `explain` traces with two layers
    of all."""
    nodes = (node for graph, _ in with_bodies(gm) for node in graph.graph.nodes)
    found = [sizes for node in nodes if (sizes := _sizes_of_product(node))]
    wide = [sizes for sizes in found if min(sizes[-2:]) >= _THIN] or found
    flops = [2.0 * math.prod(sizes) for sizes in wide]
    if not flops:
        return None
    most = _HEAD * statistics.median(flops)
    return statistics.fmean(each for each in flops if each <= most)


_THIN = 128
_HEAD = 16  # times the median product of a step; no layer's is


def _sizes_of_product(node: fx.Node) -> list[float]:
    """[..., n, k] of a product [..., k] x [k, n], whose result is [..., n]; empty for other nodes,
    and for sizes that only the data know."""
    name = op_name(node)
    if name not in _PRODUCTS:
        return []
    given = [*node.args, *node.kwargs.values()]
    out, factor = fake(node), fake(given[_PRODUCTS[name]])
    if not isinstance(out, torch.Tensor) or not isinstance(factor, torch.Tensor):
        return []
    sizes = [hint(size) for size in (*out.shape, *factor.shape[-1:])]
    known = [float(size) for size in sizes if size is not None]
    return known if len(known) == len(sizes) >= 2 else []


# The argument whose last dimension is summed over.
_PRODUCTS: dict[Any, int] = dict.fromkeys(("linear", "matmul", "mm", "bmm"), 0)
_PRODUCTS |= dict.fromkeys(("addmm", "baddbmm"), 1)


def by_table(
    device: torch.device,
    inner: str,
    form: str,
    own: Mapping[str, Entry] | None = None,
    small: str = "",
) -> Judge:
    """``auto``: what is measured for this device under this inner compiler, for graphs of this
    form, in the user's ``own`` table and in `table`; else what is measured on the nearest
    architecture, with a margin. Each variant has a kernel, or an eager form, of its own: its rows
    decide, and those of all variants where it has none, but for `Rewrite.measured_apart`. So it is
    inside and outside of activation checkpoints. small: as `too_small` says: then Inductor's
    layers are left to it."""
    if device.type not in ("cuda", "meta"):
        machine = "a CPU" if device.type == "cpu" else device.type
        left = f"not measured on {machine}; policy='measure' measures it on this one"
        return lambda rewrite, match: (False, left)
    present = device.type == "cuda" and torch.cuda.is_available()
    architecture = architecture_of(device) if present else DEFAULT_ARCHITECTURE
    grounds = _grounds(architecture, own or {})
    left = f"not measured on {architecture} or a GPU like it; policy='measure' measures it here"
    assumed = "" if present else f" [not on a GPU: decided as on {architecture}]"

    def judge(rewrite: Rewrite, match: Match) -> tuple[bool, str]:
        known = [
            (ground, rows)
            for ground in grounds
            if (rows := _rows(ground.entry, rewrite, match, inner, form))
        ]
        if not known:
            return False, left + assumed
        ground, rows = min(
            known, key=lambda each: (each[0].distance, each[1][0].spelling != match.spelling)
        )
        # Other rows are of what is made once a step. Without Inductor an op is fewer launches.
        if small and inner == "inductor" and rows[0].form in ("layers", "step"):
            return False, small
        margin = MARGIN if ground.distance else 0.0
        guess = _guess(architecture, ground) if ground.distance else ""
        return pays(rows, margin), guess + _evidence(ground, rows, margin) + assumed

    return judge


def _rows(entry: Entry, rewrite: Rewrite, match: Match, inner: str, form: str) -> list[Row]:
    rows = [row for row in entry.rows if row.inner == inner and row.rewrite == rewrite.name]
    rows = [row for row in rows if _apart(rewrite, row.spelling) == _apart(rewrite, match.spelling)]
    rows = [row for row in rows if row.form == form] or rows
    rows = [row for row in rows if row.spelling == match.spelling] or rows
    return [row for row in rows if row.checkpoint == match.recomputed]


def _apart(rewrite: Rewrite, spelling: str) -> list[str]:
    return [name for name in rewrite.measured_apart if spelling.endswith(f", {name}")]


def architecture_of(device: torch.device) -> str:
    """``sm90``; on ROCm, which has capabilities of its own, ``gfx942``."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


class Ground(NamedTuple):
    """What may decide about an architecture: the entry of ``measured_on``, which is ``distance``
    away from it."""

    distance: int
    measured_on: str
    entry: Entry
    source: str  # of the entry, as it stands in a report


def _grounds(architecture: str, own: Mapping[str, Entry]) -> list[Ground]:
    """The user's own entries before those that liger_fx is shipped with."""
    return [
        Ground(distance, name, entry, source)
        for entries, source in ((own, "your own table, "), (table(), ""))
        for name, entry in entries.items()
        if (distance := _distance(architecture, name)) is not None
    ]


def _distance(one: str, other: str) -> int | None:
    """How far apart two architectures are: generations first. None where a measurement on one says
    nothing of the other: it is of another vendor, of another generation of AMD's, whose wavefronts
    may have another width, or too old for Triton, which takes compute capability 8.0."""
    if one == other:
        return 0
    (vendor, generation, minor), (vendor_2, generation_2, minor_2) = _version(one), _version(other)
    apart = abs(generation - generation_2)
    if vendor != vendor_2 or (vendor == "gfx" and apart):
        return None
    if vendor == "sm" and min(generation, generation_2) < 8:
        return None
    return 256 * apart + abs(minor - minor_2)


def _version(architecture: str) -> tuple[str, int, int]:
    """``sm86``: "sm", 8, 6. ``gfx942``: "gfx", 9, 0x42. Raises ValueError for another name."""
    for vendor, digits in (("sm", 1), ("gfx", 2)):
        number = architecture.removeprefix(vendor)
        if number != architecture:
            return vendor, int(number[:-digits]), int(number[-digits:], 16)
    raise ValueError(f"expected an architecture such as sm90 or gfx942, not {architecture!r}")


def _guess(architecture: str, ground: Ground) -> str:
    return (
        f"not measured on {architecture} (policy='measure' does), decided as on "
        f"{ground.measured_on} with a margin of {MARGIN}: "
    )


def _evidence(ground: Ground, rows: Sequence[Row], margin: float) -> str:
    """The numbers that decided: the slowest, and the most memory saved if that is why."""
    slowest = min(rows, key=lambda row: row.speed)
    inside = ", in a checkpoint" if slowest.checkpoint else ""
    where = f"{ground.source}{ground.measured_on}, {ground.entry.date}"
    text = f"{slowest.speed:.3f}x the speed at worst "
    text += f"({slowest.model}, {slowest.form}{inside}, {where})"
    smallest = min(rows, key=lambda row: row.memory or 1.0)
    if slowest.speed < NOISE + margin and (smallest.memory or 1.0) <= SAVING:
        text += f", {smallest.memory:.2f} of the memory at best ({smallest.model}, {smallest.form})"
    return text
