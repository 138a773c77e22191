"""Docstrings of this package, as Markdown.

They are plain text with a few habits: ``code``, ``name: text`` for parameters and attributes, a
label and a hanging indent for the parts of a module's docstring, simple tables of reStructuredText.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_PARAMETER = re.compile(r"([a-z_]+):\s")
_RULE = re.compile(r"=+(  +=+)+")


def as_markdown(docstring: str) -> str:
    """``docstring``, whose lines are not indented, as Markdown."""
    blocks = re.split(r"\n\s*\n", docstring)
    return "\n\n".join(_block(block).replace("``", "`") for block in blocks)


def _block(block: str) -> str:
    lines = block.splitlines()
    if _RULE.fullmatch(lines[0].strip()):
        return _table(lines)
    if hanging := _hanging(lines):
        return "\n\n".join(f"{label}\n:   {text}" for label, text in hanging)
    if _PARAMETER.match(lines[0]):
        return _parameters(block)
    return re.sub(r"::$", ":", block)


def _hanging(lines: list[str]) -> list[tuple[str, str]] | None:
    """Labels and texts of a block in which all continuation lines have one deep indent."""
    indents = {len(line) - len(line.lstrip()) for line in lines} - {0}
    if len(indents) != 1 or (indent := indents.pop()) < 8:
        return None
    found: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith(" "):
            label, text = found[-1]
            found[-1] = label, f"{text} {line.strip()}"
        else:
            found.append((line[:indent].strip(), line[indent:]))
    return found


def _parameters(block: str) -> str:
    """Sentences that begin with ``name:`` become items of a list, what is raised or returned a
    paragraph."""
    said = re.split(r"(?:(?<=[.)\]])\s+)(?=[a-z_]+:\s|Raises |Returns )", block)
    said = [" ".join(sentence.split()) for sentence in said]
    items = [_PARAMETER.sub(r"- **`\1`**: ", each) for each in said if _PARAMETER.match(each)]
    rest = [sentence for sentence in said if not _PARAMETER.match(sentence)]
    return "\n\n".join(["\n".join(items), *rest])


def _table(lines: list[str]) -> str:
    starts = [found.start() for found in re.finditer("=+", lines[0])]
    ends = [*starts[1:], None]
    rows: list[list[str]] = []
    for line in lines:
        if _RULE.fullmatch(line.strip()):
            continue
        cells = [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]
        if cells[0]:
            rows.append(cells)
        else:  # the row goes on
            rows[-1] = [" ".join((a, b)).strip() for a, b in zip(rows[-1], cells, strict=True)]
    if sum(bool(_RULE.fullmatch(line.strip())) for line in lines) < 3:  # no head
        rows.insert(0, [""] * len(starts))
    rows.insert(1, ["---"] * len(starts))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class AsMarkdown(Extension):
    """For mkdocstrings: each docstring as Markdown."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
