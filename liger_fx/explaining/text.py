"""An explanation as plain text."""

from __future__ import annotations

from liger_fx.explaining.explanation import Explanation


def as_text(explanation: Explanation) -> str:
    rows = [(r.kind, in_units(r.before), in_units(r.after)) for r in explanation.memory]
    lines = [explanation.subject.title, str(explanation.report)]
    if rows:
        table = [("memory", "without", "with liger_fx"), *rows]
        width = max(len(kind) for kind, *_ in table) + 2
        lines += [f"{kind:{width}}{before:>10}  {after:>13}" for kind, before, after in table]
    return "\n".join([*lines, *explanation.facts])


def in_units(size: int) -> str:
    """Bytes in the largest unit of which there is one, or nearly one."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1000 << (power - 10):
            return f"{size / (1 << power):.2f} {unit}"
    return f"{size} B" if size else "none"
