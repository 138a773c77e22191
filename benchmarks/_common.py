"""What the benchmarks share: clocks, memory, fresh processes, tables."""

from __future__ import annotations

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
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

IGNORE = -100
GIB = 2**30

Row = dict[str, Any]
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


def run_arm(measure: Callable[[], Iterable[Row]]) -> None:
    """The child's side of `in_fresh_process`: print each row for the parent, or what went wrong."""
    try:
        for row in measure():
            print(_ROW + json.dumps(row), flush=True)
    except Unavailable as why:
        print(_ROW + json.dumps({"error": f"left out: {why}"}), flush=True)
    except Exception as error:
        traceback.print_exc()
        first_line = f"{type(error).__name__}: {error}".splitlines()[0]
        print(_ROW + json.dumps({"error": f"failed: {first_line}"}), flush=True)


def in_fresh_process(*arguments: str) -> list[Row]:
    """The rows of this script, called again with ``arguments`` added.

    A process of its own starts with no memory in use, and its own cache folders with nothing
    compiled: the first call's time is that of a cold compile.
    """
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        environment.pop("TORCH_COMPILE_BACKEND", None)  # torchtune would compile every arm with it
        command = [sys.executable, *sys.argv, *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(s[len(_ROW) :]) for s in done.stdout.splitlines() if s.startswith(_ROW)]
    if done.returncode:
        rows.append({"error": f"failed: exit status {done.returncode}"})
    return rows


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_header(device: torch.device) -> None:
    """Machine, versions and the command: what a reader needs to repeat the numbers.

    To be called before measuring: packages may be replaced while a long run goes on.
    """
    on_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}"
    packages = ("torch", "triton", "liger_kernel", "torchtune", "liger_fx")
    versions = ", ".join(f"{name} {_version(name)}" for name in packages)
    print(f"{machine}; {versions}\n\n    python {shlex.join(sys.argv)}\n", flush=True)


class Column(NamedTuple):
    title: str
    key: str
    format: str = ""


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A table of the rows that were measured, and a list of those that were not."""
    lines = [_line(c.title for c in columns), _line("---:" if c.format else "---" for c in columns)]
    lines += [_line(_cell(row, c) for c in columns) for row in rows if "error" not in row]
    lines += ["", *(f"- {row['arm']}: {row['error']}" for row in rows if "error" in row)]
    return "\n".join(lines).rstrip() + "\n"


def write_json(path: Path | None, rows: Sequence[Row]) -> None:
    if path:
        path.write_text(json.dumps(rows, indent=1) + "\n")


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
