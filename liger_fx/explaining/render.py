"""An explanation to read: plain text, or a page of one file without scripts."""

from __future__ import annotations

from xml.etree import ElementTree

from liger_fx.explaining.explanation import Explanation, Row

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: auto; padding: 1rem; }
td, th { padding: .1rem 1rem .1rem 0; text-align: left; vertical-align: top; }
meter { width: min(16rem, 40vw); } pre, table { display: block; overflow-x: auto; }
"""
_WITHOUT, _WITH = "without liger_fx", "with liger_fx"


def as_text(explained: Explanation) -> str:
    lines = [explained.title, explained.summary]
    if explained.memory:
        sizes = [(kind, in_units(a), in_units(b)) for kind, a, b in explained.memory]
        lines += ["", *_table([("memory", _WITHOUT, _WITH), *sizes], indent="")]
    for layers, rows in explained.layers.items():
        lines += ["", layers, *_table([_cells(row) for row in rows] or [("nothing to replace",)])]
    return "\n".join([*lines, "", *explained.facts])


def _cells(row: Row) -> tuple[str, ...]:
    times = f"{row.times} x " if row.times > 1 else ""
    return row.verdict, times + row.rewrite, str(row.place), row.why


def _table(rows: list[tuple[str, ...]], indent: str = "  ") -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return [(indent + line).rstrip() for line in padded]


def as_html(explained: Explanation) -> str:
    body = [_tag("h1", explained.title), _tag("p", explained.summary)]
    most = max((size for _, *sizes in explained.memory for size in sizes), default=0)
    if most:
        body.append(_tag("h2", "Memory"))
    for kind, *sizes in explained.memory if most else ():
        bars = [
            _row(form, _tag("meter", value=str(size), max=str(most)), in_units(size))
            for form, size in zip((_WITHOUT, _WITH), sizes, strict=True)
        ]
        body += [_tag("h3", kind), _tag("table", *bars)]
    body.append(_tag("h2", "Layers"))
    for layers, rows in explained.layers.items():
        cells = [_row(*_cells(row)) for row in rows] or [_row("nothing to replace")]
        body += [_tag("h3", layers), _tag("table", *cells)]
    if example := explained.example:
        body += [
            _tag("h2", f"One rewrite: {example.rewrite}"),
            _tag("p", str(example.place)),
            *(_tag("h3", "before"), _tag("pre", "\n".join(example.before))),
            *(_tag("h3", "after"), _tag("pre", "\n".join(example.after))),
        ]
    head = _tag("meta", charset="utf-8"), _tag("title", explained.title), _tag("style", _STYLE)
    facts = [_tag("p", fact) for fact in explained.facts]
    page = _tag("html", _tag("head", *head), _tag("body", *body, *facts), lang="en")
    return "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html")


def _row(*cells: str | ElementTree.Element) -> ElementTree.Element:
    return _tag("tr", *(_tag("td", cell) for cell in cells))


def _tag(name: str, *content: str | ElementTree.Element, **attributes: str) -> ElementTree.Element:
    """content: elements, or one text."""
    made = ElementTree.Element(name, attributes)
    for part in content:
        if isinstance(part, str):
            made.text = part
        else:
            made.append(part)
    return made


def in_units(size: int) -> str:
    """Bytes in the largest unit of which there is one, or nearly one."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1000 << (power - 10):
            return f"{size / (1 << power):.2f} {unit}"
    return f"{size} B" if size else "none"
