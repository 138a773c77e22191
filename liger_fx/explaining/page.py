"""An explanation as a page: one file, no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from string import Template

from liger_fx.explaining.explanation import Example, Explanation, Row
from liger_fx.explaining.text import in_units

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>liger_fx: $title</title>
<style>
:root { color-scheme: light dark; --text: #1c2024; --soft: #60646c; --page: #fff; --card: #f4f5f7;
  --line: #d9dce1; --made: #18794e; --left: #946800; --before: #b0b4ba; }
@media (prefers-color-scheme: dark) { :root { --text: #edeef0; --soft: #a5abb3; --page: #111317;
  --card: #1b1e24; --line: #363a42; --made: #4cc38a; --left: #f1c95c; --before: #6b727c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, li, summary { overflow-wrap: anywhere; } .soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem .9rem; margin: .6rem 0; }
.card h3 { font-size: 1rem; margin: 0 0 .3rem; }
.card ul { list-style: none; margin: 0; padding: 0; } .card li { margin: .2rem 0; }
.made { color: var(--made); } .left { color: var(--left); }
.bar { display: grid; grid-template-columns: 4.5rem 1fr 6rem; gap: .5rem; align-items: center; }
.bar i { display: block; height: .8rem; border-radius: 2px; background: var(--before); }
.bar.after i { background: var(--made); }
.bar b { font-weight: 400; text-align: right; white-space: nowrap; }
pre { overflow-x: auto; font-size: .8rem; background: var(--card); padding: .6rem;
  border: 1px solid var(--line); border-radius: 6px; }
details > summary { cursor: pointer; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
$memory
<h2>Layers</h2>
$layers
$example
<h2>Report</h2>
<details><summary>Every rewrite, with its evidence</summary><pre>$report</pre></details>
$facts
</body>
</html>
""")


def as_page(explanation: Explanation) -> str:
    """A self-contained HTML page."""
    return _PAGE.substitute(
        title=escape(explanation.subject.title),
        summary=escape(explanation.report.summary()),
        memory=_memory(explanation.memory),
        layers="\n".join(_cards(explanation)),
        example=_example(explanation.example),
        report=escape(str(explanation.report)),
        facts="\n".join(f'<p class="soft">{escape(fact)}</p>' for fact in explanation.facts),
    )


def _memory(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    most = max(max(row.before, row.after) for row in rows)
    cards = [
        f'<div class="card"><h3>{escape(row.kind)}</h3>'
        f"{_bar('without', row.before, most)}{_bar('with', row.after, most, 'after')}</div>"
        for row in rows
    ]
    return "\n".join(["<h2>Memory</h2>", *cards])


def _bar(label: str, size: int, most: int, kind: str = "") -> str:
    width = 100 * size / most
    return (
        f'<div class="bar {kind}"><span>{label}</span><i style="width: {width:.1f}%"></i>'
        f"<b>{in_units(size)}</b></div>"
    )


@dataclass(frozen=True)
class _Entry:
    """A rewrite at a module, made or left alone; module: its name within the layer."""

    made: bool
    rewrite: str
    module: str
    why: str

    def html(self, times: int) -> str:
        kind, word = ("made", "replaced") if self.made else ("left", "left alone")
        times_text = f"{times} x " if times > 1 else ""
        where = f" at {escape(self.module)}" if self.module else ""
        line = f'{times_text}<b>{self.rewrite}</b> <span class="{kind}">{word}</span>{where}'
        if not self.why:
            return f"<li>{line}</li>"
        return f"<li><details><summary>{line}</summary>{escape(self.why)}</details></li>"


def _cards(explanation: Explanation) -> list[str]:
    """A card for each run of layers in which the same was done, and one for all around them."""
    layers = {name: list[_Entry]() for name in (*explanation.subject.layers, "")}
    report = explanation.report
    found = [(True, r.rewrite, r.place.module, r.worth) for r in report.replacements]
    found += [(False, r.rewrite, r.module, r.reason) for r in report.rejections]
    found += [(False, m.rewrite, m.module, f"no match: {m.reason}") for m in report.near_misses]
    for made, rewrite, module, why in found:
        layer = next((name for name in layers if module.startswith(f"{name}.")), "")
        inside = module.removeprefix(f"{layer}.") if layer else module
        layers[layer].append(_Entry(made, rewrite, inside, why))
    around = layers.pop("")
    cards = []
    for entries, run in groupby(layers, key=lambda name: layers[name]):
        names = list(run)
        title = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} layers)"
        cards.append(_card(title, entries))
    return [*cards, _card("around the layers", around)]


def _card(title: str, entries: Sequence[_Entry]) -> str:
    lines = [entry.html(entries.count(entry)) for entry in dict.fromkeys(entries)]
    content = "\n".join(lines) or "<li>nothing to replace</li>"
    return f'<div class="card"><h3>{escape(title)}</h3><ul>{content}</ul></div>'


def _example(example: Example | None) -> str:
    if example is None:
        return ""
    before, after = (escape("\n".join(lines)) for lines in (example.before, example.after))
    return (
        f"<h2>One rewrite: {escape(example.rewrite)}</h2>\n"
        f'<p class="soft">{escape(str(example.place))}</p>\n'
        f"<p>before</p><pre>{before}</pre>\n<p>after</p><pre>{after}</pre>"
    )
