"""What a benchmark's command does: read its options, measure each case, show and keep the rows."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import Unavailable, reason
from _output import Column, Panel, Row, cells, draw, markdown, print_header, progress, write_json

Args = argparse.Namespace
_ROW = "ROW "


@dataclass
class Benchmark:
    """A script's command: what it takes, what it measures, what it shows.

    run: yields rows as they are measured. measure: the rows of one case, in a process of its own;
    ``args`` have the case's values. finish: rows as they are shown and kept. title: of the picture,
    filled in from ``args``. text: what is printed, if it is not the table of ``columns`` alone.
    packages: whose versions are kept beside those of all benchmarks.
    """

    options: argparse.ArgumentParser
    run: Callable[[Args], Iterable[list[Row]]]
    columns: Sequence[Column]
    title: str
    panels: Callable[[Args], Sequence[Panel]] | Sequence[Panel]
    measure: Callable[[Args], Iterable[Row]] | None = None
    finish: Callable[[list[Row], Args], list[Row]] = lambda rows, args: rows
    text: Callable[[list[Row], Args], str] | None = None
    packages: Sequence[str] = ()

    def main(self) -> None:
        args = self.options.parse_args()
        if args.case is not None:
            vars(args).update(args.case)
            return self._measure_case(args)
        header = print_header(args.device, *self.packages)
        rows: list[Row] = []
        for measured in self.run(args):
            rows += measured
            # A run that is cut off keeps what it has.
            write_json(args.json, self.finish(rows, args), header)
            for row in measured:
                progress(f"{cells(row, self.columns)} {row.get('error', '')}")
        rows = self.finish(rows, args)
        print(self.text(rows, args) if self.text else markdown(rows, self.columns))
        if args.picture:
            panels = self.panels(args) if callable(self.panels) else self.panels
            draw(args.picture, self.title.format_map(vars(args)), panels, rows, header)

    def _measure_case(self, args: Args) -> None:
        """Print each row for the parent, or what went wrong."""
        assert self.measure
        try:
            for row in self.measure(args):
                print(_ROW + json.dumps(row), flush=True)
        except Exception as error:
            if not isinstance(error, Unavailable):
                traceback.print_exc()
            print(_ROW + json.dumps({"error": reason(error)}), flush=True)


# -- options ---------------------------------------------------------------------------------------

HELP = {
    "batch": "sequences",
    "ignored": "shares of labels",
    "padded": "share of tokens, on the right of sequences",
    "warmup": "steps before those that are timed",
    "jobs": "cases that compile at a time",
    "tflops": "the device's matrix products",
}


def options(
    description: str | None, device: str = "cuda", **defaults: Any
) -> argparse.ArgumentParser:
    """A parser with an option for each of ``defaults`` and those of all benchmarks. An option's
    type is that of its default; a dictionary is what `add_argument` gets."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        how = {"help": HELP.get(name)} | _as_argument(default)
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    parser.add_argument("--device", type=torch.device, default=torch.device(device))
    parser.add_argument("--json", type=Path, help="write every row")
    parser.add_argument("--picture", type=_picture, metavar="FILE.png", help="draw the result")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser


def several(choices: Iterable[str], default: Sequence[str] = ()) -> dict[str, Any]:
    """An option that takes some of ``choices``; all of them by default."""
    return {"choices": choices, "nargs": "+", "default": list(default or choices)}


def _as_argument(default: Any) -> dict[str, Any]:
    if isinstance(default, dict):
        return default
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction, "default": default}
    if isinstance(default, list):
        return {"type": type(default[0]), "nargs": "+", "default": default}
    return {"type": type(default), "default": default}


def _picture(path: str) -> Path:
    """An argument's value. What is missing to draw it is said before a long run, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise argparse.ArgumentTypeError("matplotlib is not installed") from error
    return Path(path)


# -- processes -------------------------------------------------------------------------------------


class Child:
    """This command in a process of its own, for one case, whose rows it prints."""

    def __init__(self, case: Row, environment: dict[str, str]) -> None:
        self.case = case
        self.process = subprocess.Popen(
            [sys.executable, *sys.argv, "--case", json.dumps(case)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.rows = self._rows()

    def _rows(self) -> Iterator[Row]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(_ROW):
                yield self.case | json.loads(line[len(_ROW) :])
        if self.process.wait():
            yield self.case | {"error": f"failed: exit status {self.process.returncode}"}

    def go_on(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the rows say how it ended
            print(file=self.process.stdin, flush=True)


def fresh(case: Row) -> list[Row]:
    """The rows of one case, from a process that starts with nothing compiled and no memory in use:
    the first call's time is that of a cold compile."""
    with tempfile.TemporaryDirectory() as caches:
        return list(Child(case, with_caches(caches)).rows)


def with_caches(folder: str | Path) -> dict[str, str]:
    """The environment of a process that keeps its compiled code in ``folder``."""
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
    }
    # torchtune would compile every arm with this backend.
    return {k: v for k, v in os.environ.items() if k != "TORCH_COMPILE_BACKEND"} | caches


def side_by_side(
    cases: Sequence[Row], jobs: int, environment: Callable[[Row], dict[str, str]]
) -> Iterator[list[Row]]:
    """Compile all cases, ``jobs`` at a time, each in a process of its own; when the last has
    compiled, time them one by one.

    `Benchmark.measure` yields a first row when it has compiled, and then waits for a line.
    """
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}

    def compiled(case: Row) -> tuple[Child, Row]:
        child = Child(case, environment(case) | threads)
        first = next(child.rows, case | {"error": "failed: ended while compiling"})
        progress(f"{', '.join(map(str, case.values()))}: {first.get('error', 'compiled')}")
        return child, first

    with ThreadPoolExecutor(jobs) as pool:
        children = list(pool.map(compiled, cases))
    for child, first in children:
        if "error" not in first:
            child.go_on()
        yield [first] * ("error" in first) + list(child.rows)


# -- comparing -------------------------------------------------------------------------------------


def compared(rows: Sequence[Row], baseline: str, by: Sequence[str], **ratios: str) -> list[Row]:
    """Rows in groups, each of which has the same values of ``by``, with what they are of the
    group's row of the arm ``baseline``: ``memory="peak_gib"`` is the row's value over that of the
    baseline, ``speed="1/ms"`` the other way round."""

    def group(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in by)

    groups = list(dict.fromkeys(map(group, rows)))
    bases = {group(row): row for row in rows if row["arm"] == baseline}
    for row in rows:
        base = bases.get(group(row), {})
        for name, of in ratios.items():
            key = of.removeprefix("1/")
            over, under = (row, base) if key == of else (base, row)
            if key in row and key in base:
                row[name] = row[key] and over[key] / under[key]  # a CPU counts no memory
    return sorted(rows, key=lambda row: groups.index(group(row)))
