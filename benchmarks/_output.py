"""What a benchmark leaves: a table, a picture and JSON, each with machine, versions and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]
Header = dict[str, Any]

PACKAGES = ("torch", "triton", "liger_kernel", "torchtune")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_header(device: torch.device, *others: str) -> Header:
    """Machine, versions, also of the packages ``others``, date and command: what a reader needs to
    repeat the numbers.

    To be called before measuring: packages may be replaced while a long run goes on.
    """
    on_gpu = device.type == "cuda"
    header = {
        "machine": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "versions": {name: _version(name) for name in (*PACKAGES, *others, "liger_fx")},
        "date": datetime.date.today().isoformat(),
        "command": f"python {shlex.join(sys.argv)}",
    }
    where, versions = header["machine"], _versions(header)
    print(f"{where}; {versions}; {header['date']}\n\n    {header['command']}\n", flush=True)
    return header


def write_json(path: Path | None, rows: Sequence[Row], header: Header) -> None:
    if path:
        path.write_text(json.dumps(header | {"rows": rows}, indent=1) + "\n")


# -- tables ----------------------------------------------------------------------------------------


class Column(NamedTuple):
    title: str
    key: str
    format: str = ""


def columns(text: str) -> list[Column]:
    """``"arm {arm} | peak GiB {peak_gib:.2f}"``: the title, key and format of each column."""
    cells = re.findall(r"([^|{]*){(\w+):?([^}]*)}", text)
    return [Column(title.strip(), key, form) for title, key, form in cells]


def markdown(rows: Sequence[Row], shown: Sequence[Column]) -> str:
    """A table of the rows that were measured, and a list of those that were not. A column without
    a value is left out."""
    measured = [row for row in rows if "error" not in row]
    shown = [c for c in shown if any(row.get(c.key) not in (None, "") for row in measured)] or shown
    head = [line(c.title for c in shown), line("---:" if c.format else "---" for c in shown)]
    body = [cells(row, shown) for row in measured]
    return "\n".join([*head, *body, "", *failures(rows, shown)]).rstrip() + "\n"


def cells(row: Row, shown: Sequence[Column]) -> str:
    return line(_cell(row.get(column.key), column.format) for column in shown)


def failures(rows: Sequence[Row], shown: Sequence[Column]) -> list[str]:
    """Each arm's error once, with the places where it holds, unless it holds in all of them."""
    keys = [column.key for column in shown]
    before = shown[: keys.index("arm")] if "arm" in keys else []

    def place(row: Row) -> str:
        return ", ".join(_cell(row[c.key], c.format) for c in before if c.key in row)

    every = {place(row) for row in rows}
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if "error" in row:
            found.setdefault((row["arm"], row["error"]), set()).add(place(row))
    return [
        f"- {arm}: {error}" + (f" ({'; '.join(sorted(at))})" if any(at) and at < every else "")
        for (arm, error), at in found.items()
    ]


def line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _cell(value: Any, form: str) -> str:
    if isinstance(value, list):
        return ", ".join(_cell(each, form) for each in value)
    return "-" if value is None else format(value, form)


# -- pictures --------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """Horizontal bars, for each group one of each series; a panel for each title.

    group, series and title are filled in from a row, as by `str.format`. Of several rows with the
    same three the least value is drawn. With several keys each row is as many bars: ``{key}`` names
    them.
    """

    axis: str  # what is measured, with its unit
    keys: str | dict[str, str]  # in a row; by name where there are several
    group: str
    format: str = ",.1f"
    series: str = "{arm}"
    title: str = ""
    reference: float | None = None  # where to draw a line: the value of what is compared with


class Bars(NamedTuple):
    """A panel that is filled in: values by series and group."""

    panel: Panel
    title: str
    groups: list[str]
    series: dict[str, dict[str, float]]


def bars(panel: Panel, rows: Sequence[Row]) -> list[Bars]:
    """One for each title. An arm that failed wherever it ran is a series without numbers."""
    keys = panel.keys if isinstance(panel.keys, dict) else {"": panel.keys}
    filled: dict[str, Bars] = {}
    for row, (name, key) in itertools.product(rows, keys.items()):
        if "error" in row or key not in row:
            continue
        title, group, series = (
            text.format(key=name, **row) for text in (panel.title, panel.group, panel.series)
        )
        made = filled.setdefault(title, Bars(panel, title, [], {}))
        if group not in made.groups:
            made.groups.append(group)
        values = made.series.setdefault(series, {})
        if row[key] is not None:
            values[group] = min(row[key], values.get(group, row[key]))
    if panel.series == "{arm}":
        for made, row in itertools.product(filled.values(), rows):
            made.series.setdefault(row["arm"], {})
    return list(filled.values())


# The arms of liger_fx stand out, the others do not compete with each other.
ACCENTS = ("#d9480f", "#f59f6c")
OTHERS = (
    *("#5b6b7f", "#8fa7c4", "#b9c3cf", "#3f6ea3", "#d5dbe2"),
    *("#1f3a5f", "#a8c0dc", "#8a8f98", "#2f3640"),
)


def draw(
    path: Path, title: str, panels: Sequence[Panel], rows: Sequence[Row], header: Header
) -> None:
    """The panels side by side, each axis from 0, machine and date in the title."""
    filled = [made for panel in panels for made in bars(panel, rows)]
    if not filled:
        return
    from matplotlib.figure import Figure

    most = max(len(made.groups) * (len(made.series) + 1) for made in filled)
    figure = Figure(figsize=(6.4 * len(filled), 1.6 + 0.22 * most), layout="constrained")
    origin = f"{header['machine']}, {header['date']}\n{_versions(header)}"
    figure.suptitle(f"{title}\n{origin}", fontsize=9)
    for axes, made in zip(figure.subplots(1, len(filled), squeeze=False)[0], filled, strict=True):
        _draw_bars(axes, made)
    entries = {
        label: bar
        for axes in figure.axes
        for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if len(entries) > 1:
        ncols = min(len(entries), 4 * len(filled))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=ncols)
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Any, made: Bars) -> None:
    height = 1 / (len(made.series) + 0.6)
    colours = {True: itertools.cycle(ACCENTS), False: itertools.cycle(OTHERS)}
    for i, (name, found) in enumerate(made.series.items()):
        values = [found.get(group) for group in made.groups]
        places = [group + i * height for group in range(len(values))]
        colour = next(colours[name.startswith("liger_fx")])
        widths = [value or 0.0 for value in values]
        drawn = axes.barh(places, widths, height, align="edge", color=colour, label=name)
        texts = ["no number" if v is None else format(v, made.panel.format) for v in values]
        axes.bar_label(drawn, texts, padding=3, fontsize=8)
    middle = len(made.series) * height / 2
    axes.set_yticks([group + middle for group in range(len(made.groups))], made.groups)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()  # the first group on top
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel(made.panel.axis)
    axes.set_title(made.title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if made.panel.reference is not None:
        axes.axvline(made.panel.reference, color="grey", linewidth=0.8, linestyle="--", zorder=0)


def _versions(header: Header) -> str:
    return ", ".join(f"{name} {version}" for name, version in header["versions"].items())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
