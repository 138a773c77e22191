"""What the benchmarks share: clocks, memory, fresh processes, tables, pictures."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

IGNORE = -100
GIB = 2**30

Row = dict[str, Any]
Header = dict[str, Any]
_ROW = "ROW "


class Unavailable(Exception):
    """An arm that cannot run here, and why."""


def needs_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        raise Unavailable(f"{what} needs a GPU")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def lap_times(call: Callable[[], object], device: torch.device, laps: int) -> list[float]:
    """Milliseconds of each of ``laps`` calls in a row.

    Events and no synchronisation in between: the host may run ahead, as it does in training.
    """
    if device.type != "cuda":
        return [1e3 * seconds(call, device) for _ in range(laps)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(laps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory allocated at once since `reset_peak`; None on a CPU, which does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def labels_like(tokens: torch.Tensor, ignored: float, period: int) -> torch.Tensor:
    """``tokens`` with the first ``ignored`` share of every ``period`` ignored: the prompts."""
    position = torch.arange(tokens.shape[-1], device=tokens.device) % period
    return tokens.masked_fill(position < round(ignored * period), IGNORE)


def padding(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Which of ``tokens``, [sequences, length], pad a sequence on its right, bool: the ``share`` of
    all, at most half. Lengths are spread evenly below the whole one, in random order."""
    sequences, length = tokens.shape
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(0))
    shares = 2 * share * (order + 0.5) / sequences
    lengths = (length * (1 - shares)).round().to(tokens.device)
    return torch.arange(length, device=tokens.device) >= lengths[:, None]


def run_arm(measure: Callable[[], Iterable[Row]]) -> None:
    """The child's side of `in_fresh_process`: print each row for the parent, or what went wrong."""
    try:
        for row in measure():
            print(_ROW + json.dumps(row), flush=True)
    except Exception as error:
        if not isinstance(error, Unavailable):
            traceback.print_exc()
        print(_ROW + json.dumps({"error": reason(error)}), flush=True)


def reason(error: Exception) -> str:
    """Why an arm has no number, in a line. Out of memory is a result like others."""
    if isinstance(error, Unavailable):
        return f"left out: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]


def in_fresh_process(*arguments: str) -> list[Row]:
    """The rows of this script, called again with ``arguments`` added and nothing compiled yet.

    A process of its own starts with no memory in use; the first call's time is that of a cold
    compile.
    """
    with tempfile.TemporaryDirectory() as caches:
        return in_process(Path(caches), *arguments)


def in_process(caches: Path, *arguments: str) -> list[Row]:
    """The same, with the compiled code that is in ``caches``; what it compiles is left there."""
    command = [sys.executable, *sys.argv, *arguments]
    environment = os.environ | caches_in(caches)
    environment.pop("TORCH_COMPILE_BACKEND", None)  # torchtune would compile every arm with it
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(s[len(_ROW) :]) for s in done.stdout.splitlines() if s.startswith(_ROW)]
    if done.returncode:
        rows.append({"error": f"failed: exit status {done.returncode}"})
    return rows


def caches_in(folder: Path) -> dict[str, str]:
    """Variables of the environment of a process that keeps its compiled code in ``folder``."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }


class Child:
    """A process of this script that compiles, waits for its turn, and is timed: what compiles at
    the same time as others is timed alone. Its first row says that it has compiled."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = name
        self.command = [sys.executable, *sys.argv, *arguments]

    def compile(self, environment: dict[str, str], jobs: int) -> None:
        """Start it, one of ``jobs`` that share the processors, and return when it has compiled, or
        failed."""
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.process = subprocess.Popen(
            self.command,
            env=environment | {"TORCHINDUCTOR_COMPILE_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = next(self._read(), {"error": "failed: ended while compiling"})
        progress(f"{self.name}: {self.first.get('error', 'compiled')}")

    def time(self) -> list[Row]:
        if "error" in self.first:
            rows = [self.first]
        else:
            print(file=self.process.stdin, flush=True)
            rows = list(self._read())
        self.process.communicate()
        if self.process.returncode:
            rows.append({"error": f"failed: exit status {self.process.returncode}"})
        return [{"arm": self.name} | row for row in rows]

    def _read(self) -> Iterator[Row]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(_ROW):
                yield json.loads(line[len(_ROW) :])


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write every row")
    parser.add_argument("--picture", type=_picture, metavar="FILE.png", help="draw the result")


def print_header(device: torch.device, *others: str) -> Header:
    """Machine, versions, also of the packages ``others``, date and command: what a reader needs to
    repeat the numbers.

    To be called before measuring: packages may be replaced while a long run goes on.
    """
    on_gpu = device.type == "cuda"
    packages = ("torch", "triton", "liger_kernel", "torchtune", *others, "liger_fx")
    header = {
        "machine": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "versions": {name: _version(name) for name in packages},
        "date": datetime.date.today().isoformat(),
        "command": f"python {shlex.join(sys.argv)}",
    }
    where, versions = header["machine"], _versions(header)
    print(f"{where}; {versions}; {header['date']}\n\n    {header['command']}\n", flush=True)
    return header


class Column(NamedTuple):
    title: str
    key: str
    format: str = ""


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table of the rows that were measured, and a list of those that were not."""
    lines = [_line(c.title for c in columns), _line("---:" if c.format else "---" for c in columns)]
    lines += [_line(_cell(row, c) for c in columns) for row in rows if "error" not in row]
    failed = dict.fromkeys(f"- {row['arm']}: {row['error']}" for row in rows if "error" in row)
    lines += ["", *failed]
    return "\n".join(lines).rstrip() + "\n"


def write_json(path: Path | None, rows: Sequence[Row], header: Header) -> None:
    if path:
        path.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")


class Panel(NamedTuple):
    """Horizontal bars: for each group one of each series, None where there is no number."""

    axis: str  # what is measured, with its unit
    groups: Sequence[str]
    series: dict[str, Sequence[float | None]]
    format: str = ",.1f"
    reference: float | None = None  # where to draw a line: the value of what is compared with
    title: str = ""


# The arms of liger_fx stand out, the others do not compete with each other.
ACCENTS = ("#d9480f", "#f59f6c")
OTHERS = (
    *("#5b6b7f", "#8fa7c4", "#b9c3cf", "#3f6ea3", "#d5dbe2"),
    *("#1f3a5f", "#a8c0dc", "#8a8f98", "#2f3640"),
)


def draw(path: Path | None, title: str, panels: Sequence[Panel], header: Header) -> None:
    """The panels side by side, each axis from 0, machine and date in the title."""
    if not path:
        return
    from matplotlib.figure import Figure

    bars = max(len(panel.groups) * (len(panel.series) + 1) for panel in panels)
    size = (6.4 * len(panels), 1.6 + 0.22 * bars)
    figure = Figure(figsize=size, layout="constrained")
    origin = f"{header['machine']}, {header['date']}\n{_versions(header)}"
    figure.suptitle(f"{title}\n{origin}", fontsize=9)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_bars(axes, panel)
    entries = {label: bar for axes in figure.axes for bar, label in _legend(axes)}
    if len(entries) > 1:
        columns = min(len(entries), 4 * len(panels))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Any, panel: Panel) -> None:
    height = 1 / (len(panel.series) + 0.6)
    colours = {True: cycle(ACCENTS), False: cycle(OTHERS)}
    for i, (name, values) in enumerate(panel.series.items()):
        colour = next(colours[name.startswith("liger_fx")])
        places = [group + i * height for group in range(len(panel.groups))]
        widths = [value or 0.0 for value in values]
        bars = axes.barh(places, widths, height, align="edge", color=colour, label=name)
        texts = ["no number" if v is None else format(v, panel.format) for v in values]
        axes.bar_label(bars, texts, padding=3, fontsize=8)
    middle = len(panel.series) * height / 2
    axes.set_yticks([group + middle for group in range(len(panel.groups))], panel.groups)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()  # the first group on top
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel(panel.axis)
    axes.set_title(panel.title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.reference is not None:
        axes.axvline(panel.reference, color="grey", linewidth=0.8, linestyle="--", zorder=0)


def _legend(axes: Any) -> Iterable[tuple[Any, str]]:
    return zip(*axes.get_legend_handles_labels(), strict=True)


def _picture(path: str) -> Path:
    """An argument's value. What is missing to draw it is said before a long run, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise argparse.ArgumentTypeError("matplotlib is not installed") from error
    return Path(path)


def _versions(header: Header) -> str:
    return ", ".join(f"{name} {version}" for name, version in header["versions"].items())


def _cell(row: Row, column: Column) -> str:
    value = row.get(column.key)
    return "-" if value is None else format(value, column.format)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
