"""The measurements that ``policy="auto"`` decides by, as tables."""

from __future__ import annotations

from collections.abc import Sequence

import results

from liger_fx import policy

PLACES = {
    "a layer, in a checkpoint": ("layers", True),
    "a layer": ("layers", False),
    "several layers, in checkpoints": ("step", True),
    "several layers": ("step", False),
}

Name = tuple[str, str]  # of a rewrite and of its pattern


def table(architecture: str, inner: str) -> str:
    """The speed with a rewrite over that without, from the worst to the best model, and the least
    memory; bold where ``auto`` makes it. inner: the compiler of the rewritten graph."""
    found: dict[Name, dict[tuple[str, bool], list[policy.Row]]] = {}
    for row in policy.table()[architecture].rows:
        if row.inner == inner:
            form = "layers" if row.form == "loss" else row.form
            places = found.setdefault((row.rewrite, row.spelling), {})
            places.setdefault((form, row.checkpoint), []).append(row)
    present = [title for title, at in PLACES.items() if any(at in row for row in found.values())]
    lines = [
        [f"`{rewrite}`, {spelling}", *(_cell(row.get(PLACES[title], [])) for title in present)]
        for (rewrite, spelling), row in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return results.markdown(["rewrite, pattern", *present], lines)


def _cell(rows: Sequence[policy.Row]) -> str:
    if not rows:
        return "\N{EN DASH}"
    speeds = sorted({f"{row.speed:.3f}" for row in (min(rows, key=_speed), max(rows, key=_speed))})
    text = " to ".join(speeds)
    memory = min(row.memory or 1.0 for row in rows)
    return (f"**{text}**" if policy.pays(rows) else text) + f"; {memory:.2f}"


def _speed(row: policy.Row) -> float:
    return row.speed


def origin(architecture: str) -> str:
    entry = policy.table()[architecture]
    commands = "\n".join(dict.fromkeys(entry.commands))
    return f"{entry.machine}; {entry.versions}; {entry.date}\n\n```\n{commands}\n```"
