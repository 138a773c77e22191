"""Tables and single figures from the rows in ``benchmarks/results``.

The pages of the site name a file and columns; the figures come from the file. ``python
docs/results.py`` prints the table of the README.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"

Row = dict[str, Any]

# key: title and format
COLUMNS = {
    "model": ("model", ""),
    "arm": ("", ""),
    "ignored": ("labels ignored", ".0%"),
    "loss": ("step", ""),
    "layers": ("layers", "d"),
    "ms": ("ms", ",.1f"),
    "tokens_per_s": ("tokens/s", ",.0f"),
    "speed": ("speed", ".3f"),
    "peak_gib": ("peak GiB", ".2f"),
    "memory": ("memory", ".3f"),
    "cold_s": ("first process, s", ".1f"),
    "warm_s": ("second process, s", ".1f"),
    "compile_s": ("cold compile, s", ".0f"),
    "losses": ("first losses", ".2f"),
}

# Arms in the order of tables, and their names
ARMS = {
    "eager": "eager",
    "liger": "Liger's patch, eager",
    "liger_compiled": "Liger's patch, compiled",
    "inductor": "Inductor",
    "inductor_loss": "Inductor, loss alone returned",
    "liger_fx": "**liger_fx**",
    "liger_fx_loss": "**liger_fx, loss alone returned**",
    "liger_fx_keep": "**liger_fx, attention kept in checkpoints**",
    "liger_fx_layers": "**liger_fx, layer by layer**",
    "liger_fx_offload": "**liger_fx, offloading**",
    "liger_fx_recompute": "**liger_fx, torch's budget of 0.8**",
    "liger_fx_unpad": "**liger_fx, `unpad=True`**",
    "liger_fx_recipe": "**liger_fx recipe**",
    "liger_fx recipe": "**liger_fx recipe**",
    "liger_fx_budget": "**liger_fx, memory budget**",
    "liger_fx_step": "**liger_fx, one graph**",
    "inductor_step": "Inductor, one graph",
    "liger_by_hand": "stock layers, Liger's fused loss",
    "dense": "dense mask",
}

MODELS = {
    "llama3_2_1b": "Llama-3.2-1B",
    "qwen3_0_6b": "Qwen3-0.6B",
    "gemma3_1b": "Gemma3-1B",
}

PACKAGES = {"liger_kernel": "liger-kernel"}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows(name: str, **where: Any) -> list[Row]:
    """The rows of a file, of those that were measured, that have the values of ``where``."""
    return [
        row
        for row in load(name)["rows"]
        if "error" not in row and all(row.get(key) == value for key, value in where.items())
    ]


def figure(name: str, key: str, form: str = "", **where: Any) -> str:
    """One figure. Raises ValueError unless exactly one row has the values of ``where``."""
    found = rows(name, **where)
    if len(found) != 1:
        raise ValueError(f"{name}.json has {len(found)} rows with {where}, expected one")
    return format(found[0][key], form or COLUMNS[key][1])


def ratio(name: str, key: str, of: Row, to: Row, form: str = ".2f") -> str:
    """A figure of the row ``of`` over that of the row ``to``."""
    one, other = (float(figure(name, key, ".17g", **where)) for where in (of, to))
    return format(one / other, form)


def table(name: str, keys: str, arms: Sequence[str] = (), **where: Any) -> str:
    """The rows of a file as Markdown. keys: columns, by the names of `COLUMNS`. arms: those to
    show, in this order; none for all of them, in the order of the file."""
    columns = keys.split()
    found = rows(name, **where)
    if arms:
        found = [row for arm in arms for row in found if row["arm"] == arm]
    return markdown(
        [COLUMNS[key][0] for key in columns],
        [[cell(row, key) for key in columns] for row in found],
        ["---:" if COLUMNS[key][1] else "---" for key in columns],
    )


def cell(row: Row, key: str) -> str:
    value = row.get(key)
    if value is None:
        return "\N{EN DASH}"
    if key == "arm":
        return ARMS.get(value, value)
    if key == "model":
        return MODELS.get(value, value)
    form = COLUMNS[key][1]
    if isinstance(value, list):
        return ", ".join(format(one, form) for one in value)
    return format(value, form)


def markdown(
    titles: Sequence[str], lines: Iterable[Sequence[str]], rules: Sequence[str] | None = None
) -> str:
    every = [titles, rules or ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


class Compared(NamedTuple):
    """A line of the README's table: two arms of a file, among the rows with ``where``."""

    step: str
    against: str
    file: str
    arm: str
    baseline: str
    where: Row


_PATCH = "Liger's patch, eager"
_TUNED = "torchtune, compiled"
_ONE_GRAPH = ("huggingface_step_h200", "liger_fx")
_RECIPE = ("liger_fx_recipe", "torchtune")

SUMMARY = [
    Compared("Llama-3.2-1B", "Inductor", *_ONE_GRAPH, "inductor", dict(model="llama3_2_1b")),
    Compared("Llama-3.2-1B", _PATCH, *_ONE_GRAPH, "liger", dict(model="llama3_2_1b")),
    Compared("Qwen3-0.6B", _PATCH, *_ONE_GRAPH, "liger", dict(model="qwen3_0_6b")),
    Compared(
        "Llama-3.2-1B, 40 % padding",
        _PATCH,
        "huggingface_step_padded",
        "liger_fx_unpad",
        "liger",
        {},
    ),
    Compared(
        "Llama-3.2-1B, 8 answers to a prompt",
        _PATCH,
        "huggingface_step_answers",
        "liger_fx_unpad",
        "liger",
        dict(model="llama3_2_1b"),
    ),
    Compared("torchtune recipe", _TUNED, "training_step", *_RECIPE, dict(ignored=0.0)),
    Compared(
        *("FSDP2, two GPUs, packed", _TUNED, "recipe_packed_two_gpus"),
        *("liger_fx recipe", "torchtune", {}),
    ),
    Compared("DPO, prompts once", _TUNED, "preference_pairs", "liger_fx_unpad", "torchtune", {}),
]


def summary() -> str:
    """The table of the README: speed and peak memory of training steps, of those without."""
    lines = []
    for line in SUMMARY:
        of, to = (line.where | {"arm": arm} for arm in (line.arm, line.baseline))
        speed, memory = (ratio(line.file, key, of, to) for key in ("tokens_per_s", "peak_gib"))
        machine = load(line.file)["machine"].removeprefix("NVIDIA ").split()[0]
        lines.append((line.step, line.against, speed, memory, machine))
    return markdown(["training step", "against", "speed", "memory", "GPU"], lines)


def origin(name: str) -> str:
    """Machine, versions, date and command of a file: a caption under its table."""
    found = load(name)
    versions = ", ".join(
        f"{PACKAGES.get(package, package)} {version}"
        for package, version in found["versions"].items()
        if version != "absent" and package != "liger_fx"
    )
    # Some rows were made inside of benchmarks/.
    command = found["command"].replace("python benchmarks/", "python ")
    command = command.replace("python ", "python benchmarks/")
    where = f"{found['machine']}; {versions}; {found['date']}"
    return f"{where} ([rows]({{results}}{name}.json))\n\n``` {{ .sh .wrap }}\n{command}\n```"


if __name__ == "__main__":
    print(summary())
