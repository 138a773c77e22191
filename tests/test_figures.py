"""Every figure in README.md and docs/ is a row of a file in benchmarks/results, rounded as shown.

A paragraph, an item of a list or a table is checked against the result files that it names, or else
against those of the nearest one in its section that names some: above it, then below. A link to
another section or page stands for all files that are named on that page.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]

# Figures that no file has, by the reason, of the paragraphs and tables that show the first of them.
BEFORE = "measured before rows were kept: "
UNKEPT = {
    BEFORE + "training_step.py, 16 x 2048 tokens, no checkpoints": """
        463.9 469.6 69,775 56.50 463.7 70,663 1.013 49.43 0.875 460.4 71,179 1.020 468.7 69,912 423.4
        77,392 1.107 419.0 78,203 1.119 70,644 398.1 82,302 1.165 392.3 83,521 1.182""",
    BEFORE + "matching_time.py": "0.12 0.35",
    BEFORE + "make demo": "0.88 2,324 9,347",
    "peaks without weights, gradients and optimizer state": "11.5 6.6 1.4 30.4 18.7 1.6 11.1",
}

Row = dict[str, Any]


# -- figures on a page -----------------------------------------------------------------------------


class Block(NamedTuple):
    """A paragraph, an item of a list or a table, and the result files it is checked against."""

    text: str
    files: frozenset[str]

    @property
    def is_table(self) -> bool:
        return self.text.startswith("|")


def blocks(page: Path) -> list[Block]:
    text = re.sub(r"^\s*```.*?^\s*```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    # A table may follow its paragraph at once; an item of a list is a paragraph.
    text = re.sub(r"\n(?=\|)(?<!\|\n)|\n(?=\s*(?:[-*]|\d+\.) )", "\n\n", text)
    found: list[Block] = []
    for section in re.split(r"^(?=##? )", text, flags=re.MULTILINE):
        texts = [each.strip() for each in re.split(r"\n\s*\n", section) if each.strip()]
        named = [files_named(each) for each in texts]
        for i, each in enumerate(texts):
            nearest = (files for files in [*named[i::-1], *named[i:]] if files)
            files = files_linked(each, page) or next(nearest, frozenset())
            found.append(Block(each, named[i] or files))
    return found


def files_named(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"(?:results/|liger_fx/)([\w.]+\.json)", text))


def files_linked(text: str, page: Path) -> frozenset[str]:
    """The files that pages name to which ``text`` links."""
    found: frozenset[str] = frozenset()
    for target, anchor in re.findall(r"\]\(([^)#\s]*\.md)?(#[^)]*)?\)", text):
        other = (page.parent / target).resolve() if target else page
        if (target or anchor) and other in PAGES:
            found |= files_named(other.read_text())
    return found


# Digits with a decimal point or thousands; no share, and no part of a name, a version or a date.
NUMBER = r"(?<![\w.,/^-])(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+)(?![\w,]*\d|\w|\.\d| ?%)"
VERSION = r"\b(?:torch|PyTorch|Python|CUDA) \d\.\d+|\d+\.\d+\.\d+"
# The unit of a number, as it stands behind it or in the head of its column.
UNITS = {
    "ms": r"ms\b",
    "us": r"µs\b",
    "s": r"s\b|seconds\b",
    "gib": r"(?:peak |extra )?GiB\b",
    "tokens_per_s": r"tokens/s\b|tokens a second\b",
    "speed": r"speed\b|times\b",
    "memory": r"memory\b|of (?:the|its|it|torchtune's|their)\b",
}


class Figure(NamedTuple):
    text: str
    unit: str | None

    def is_measured(self) -> bool:
        return self.unit is not None or "." in self.text


def unit_of(text: str) -> str | None:
    return next((u for u, words in UNITS.items() if re.match(rf"[ *]*(?:{words})", text)), None)


def figures(block: Block) -> Iterator[Figure]:
    """In a table all numbers; in prose those with a unit, and all with a decimal point where the
    prose names a result file."""
    if block.is_table:
        yield from itertools.chain(*table(block))
        return
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|" + VERSION, " ", block.text)
    for found in re.finditer(NUMBER, text):
        unit = unit_of(text[found.end() :])
        if unit or ("." in found[0] and files_named(block.text)):
            yield Figure(found[0], unit)


def table(block: Block) -> Iterator[list[Figure]]:
    """The figures of each line. A cell's unit stands in it or in the head of its column."""
    head, _, *lines = (cells(line) for line in block.text.splitlines())
    for line in lines:
        found = []
        for title, cell in zip(head, line, strict=True):
            for number in re.finditer(NUMBER, cell):
                unit = unit_of(cell[number.end() :]) or unit_of(title)
                found.append(Figure(number[0], unit))
        yield found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


# -- rows of result files --------------------------------------------------------------------------

PLACE = ("model", "loss", "ignored", "shape", "mask", "tokens", "hidden", "vocabulary", "batch")
PLACE += ("layers", "checkpoint", "inner", "form", "rewrite", "spelling")
# Units by the keys of a row; a value of any other key may stand for every unit.
KEYS = {
    "ms": r"ms|.*_ms",
    "s": r".*_s",
    "us": r".*_us|us_.*|forward|backward|eager",
    "gib": r".*gib.*",
    "tokens_per_s": "tokens_per_s|slowest|fastest",
    "speed": "speed|.*_ratio",
    "memory": "memory|.*_ratio",
}


class Value(NamedTuple):
    number: float
    units: frozenset[str]
    row: int  # whose it is


@functools.cache
def values(name: str) -> tuple[list[Row], list[Value]]:
    """The rows of a file; their numbers, and the ratios of rows that differ in their arm alone."""
    if name == "measured.json":
        found = json.loads((ROOT / "liger_fx" / name).read_text()).values()
        rows = [row for entry in found for row in entry["rows"]]
        rows = [row | {"speed": statistics.median(row["speeds"])} for row in rows]
    else:
        rows = json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]
    numbers = [
        Value(number, units_of(key), i)
        for i, row in enumerate(rows)
        for key, value in row.items()
        if key not in ("times", "kernels", "peak")
        for number in leaves(value)
    ]
    for (i, row), (_, base) in itertools.permutations(enumerate(rows), 2):
        if all(row.get(key) == base.get(key) for key in PLACE):
            if row.get("ms") and base.get("ms"):
                numbers.append(Value(base["ms"] / row["ms"], frozenset({"speed"}), i))
            if row.get("peak_gib") and base.get("peak_gib"):
                memory = row["peak_gib"] / base["peak_gib"]
                numbers.append(Value(memory, frozenset({"memory"}), i))
    return rows, numbers


def units_of(key: str) -> frozenset[str]:
    found = frozenset(unit for unit, pattern in KEYS.items() if re.fullmatch(pattern, key))
    return found or frozenset(UNITS)


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, list):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def shows(figure: Figure, value: Value) -> bool:
    """Whether the value is shown as the figure: rounded, a whole number to its zeros at the end."""
    digits = figure.text.replace(",", "")
    _, _, decimals = digits.partition(".")
    zeros = 0 if decimals else len(digits) - len(digits.rstrip("0"))
    off = abs(float(digits) - value.number)
    return off <= 0.501 * 10.0 ** (zeros - len(decimals)) and (
        figure.unit is None or figure.unit in value.units
    )


# -- tracing ---------------------------------------------------------------------------------------


def untraced(block: Block) -> list[str]:
    """Figures of a block that no row has."""
    if not block.is_table:
        return [each.text for each in figures(block) if not rows_that_show(each, block.files)]
    return [text for line in table(block) for text in _untraced(line, block.files)]


def _untraced(line: list[Figure], files: Iterable[str]) -> Iterator[str]:
    """Whole numbers without a unit say of which rows a line of a table is; if it shows several
    units, each once, all its figures are one row's."""
    one_row = len({figure.unit for figure in line} - {None}) == len(line) > 1
    rows: set[tuple[str, int]] | None = None
    for figure in sorted(line, key=Figure.is_measured):
        showing = rows_that_show(figure, files)
        showing = showing if rows is None else showing & rows
        if not showing:
            yield figure.text
        elif one_row or not figure.is_measured():
            rows = showing


def rows_that_show(figure: Figure, files: Iterable[str]) -> set[tuple[str, int]]:
    return {(f, value.row) for f in files for value in values(f)[1] if shows(figure, value)}


def reason(block: Block) -> str | None:
    """Why what is untraced in a block is not kept."""
    shown = {figure.text for figure in figures(block)}
    for why, texts in UNKEPT.items():
        first, *_ = listed = texts.split()
        if first in shown and set(untraced(block)) <= set(listed):
            return why
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_figure_is_a_row_of_a_result_file(page: Path) -> None:
    missing = {
        block.text.splitlines()[0][:90]: [sorted(block.files), untraced(block)]
        for block in blocks(page)
        if untraced(block) and not reason(block)
    }
    assert not missing, (
        "no row has these figures: name the file of benchmarks/results beside them, or list them "
        f"in UNKEPT with the reason\n{json.dumps(missing, indent=1, ensure_ascii=False)}"
    )


def test_what_is_not_kept_is_still_shown() -> None:
    found = {reason(block) for page in PAGES for block in blocks(page) if untraced(block)}
    assert UNKEPT.keys() <= found, f"to be removed: {UNKEPT.keys() - found}"


ROWS = "benchmarks/results/training_step.json\n\n| ms | tokens/s | speed | peak GiB |\n|---|---|---|---|"


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        (f"{ROWS}\n| 1116.4 | 58,703 | 1.000 | **29.87** |", []),
        (f"{ROWS}\n| 1116.5 | 58,703 | 1.000 | 29.87 |", ["1116.5"]),
        (f"{ROWS}\n| 1116.4 | 64,053 | 1.000 | 29.87 |", ["64,053"]),  # another row's
        (f"{ROWS}\n| 1116.4 | 58,703 | 29.87 | 29.87 |", ["29.87"]),  # no speed
        (f"{ROWS}\n| 1116 | 58,700 | 1.0 | 29.9 |", []),
        ("training_step.json: 1023.2 ms", ["1023.2"]),  # which of them is not said
        ("[rows](results/training_step.json): 1023.2 ms is 1.091 times the speed", []),
        ("[rows](results/training_step.json): 1023.2 ms is 1.092 times the speed", ["1.092"]),
        ("`results/training_step.json`, torch 2.11.0, 0.5 of the labels: 14.97 GiB", []),
        ("results/linear_cross_entropy.json\n\n| N | ms |\n|--|--|\n| 4,096 | 41.2 |", ["41.2"]),
        ("results/linear_cross_entropy.json\n\n| N | ms |\n|--|--|\n| 16,384 | 41.2 |", []),
    ],
)
def test_a_figure_that_is_not_the_row_is_found(text: str, missing: list[str], tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert [figure for block in blocks(page) for figure in untraced(block)] == missing
