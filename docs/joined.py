"""Tables whose lines join several rows of ``benchmarks/results``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from results import Row, load, markdown, rows

_HEAD_ARMS = {"inductor": "Inductor", "liger_fp32_large": "Liger, fp32 sums, large chunks"}


def head_grid(name: str) -> str:
    """Projection and cross-entropy against the fastest exact peer, a line for each shape."""
    cells: dict[tuple[int, int, int], dict[float, list[Row]]] = {}
    for row in rows(name):
        if "ms" in row:
            shape = row["tokens"], row["hidden"], row["vocabulary"]
            cells.setdefault(shape, {}).setdefault(row["ignored"], []).append(row)
    lines = [(*_shape(shape), *_against_peer(found)) for shape, found in sorted(cells.items())]
    titles = ["tokens x hidden x vocabulary", "peer", "ms", "GiB", "liger_fx ms", "GiB"]
    titles += ["speed", "50 % ignored", "80 % ignored"]
    return markdown(titles, lines, ["---", "---", *["---:"] * 7])


def _shape(shape: tuple[int, int, int]) -> Iterator[str]:
    yield " x ".join(f"{size:,}" for size in shape)


def _against_peer(found: dict[float, list[Row]]) -> Iterator[str]:
    speeds = []
    for ignored, of_share in sorted(found.items()):
        ours = next(row for row in of_share if row["arm"] == "liger_fx")
        exact = [row for row in of_share if row["exact"] and row is not ours]
        peer = min(exact, key=lambda row: row["ms"])
        speeds.append(f"{peer['ms'] / ours['ms']:.2f}")
        if ignored == 0:
            yield _HEAD_ARMS.get(peer["arm"], peer["arm"])
            for row in (peer, ours):
                yield f"{row['ms']:.1f}"
                yield f"{row['extra_gib']:.2f}"
    yield from speeds


def head_errors() -> str:
    lines = [
        (row["arm"], f"{row['hidden_ratio']:.2f}", f"{row['weight_ratio']:.2f}")
        for row in rows("linear_cross_entropy", ignored=0.0)
        if "hidden_ratio" in row
    ]
    return markdown(["arm", "hidden state", "weight"], lines, ["---", "---:", "---:"])


def head_peers() -> str:
    """A line for each of the newest peers, ms and GiB in each cell; "" where not measured."""
    found = rows("linear_cross_entropy_peers")
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in found:
        if "ms" in row:
            cell = row["tokens"], row["hidden"], row["ignored"]
            cells.setdefault(cell, {})[row["arm"]] = f"{row['ms']:.1f} / {row['extra_gib']:.2f}"
    lines = [
        (
            row["arm"],
            f"{row['hidden_ratio']:.2f}",
            f"{row['weight_ratio']:.2f}",
            *(of_cell.get(row["arm"], "") for of_cell in cells.values()),
        )
        for row in found
        if "hidden_ratio" in row and row["ignored"] == 0
    ]
    titles = ["arm", "error of hidden state", "of weight"]
    titles += [f"{n:,} x {h:,}, {ignored:.0%} ignored" for n, h, ignored in cells]
    return markdown(titles, lines, ["---", *["---:"] * (len(titles) - 1)])


def attention_masks() -> str:
    """A line for each shape and mask: ms of each arm, and GiB and the plan of liger_fx."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows("attention"):
        found.setdefault((row["shape"], row["mask"]), {})[row["arm"]] = row
    arms = list(dict.fromkeys(arm for of_mask in found.values() for arm in of_mask))
    lines = []
    for (shape, mask), of_mask in found.items():
        times = [f"{of_mask[arm]['ms']:.2f}" if arm in of_mask else "" for arm in arms]
        ours, plan = of_mask["liger_fx"], of_mask["liger_fx"]["plan_ms"]
        memory = f"{of_mask['dense']['extra_gib']:.2f}", f"{ours['extra_gib']:.2f}"
        lines.append((shape, mask, *times, "" if plan is None else f"{plan:.2f}", *memory))
    titles = ["batch x tokens x heads x key heads x elements", "mask", *(f"{a}, ms" for a in arms)]
    titles += ["plan, ms", "dense, GiB", "liger_fx, GiB"]
    return markdown(titles, lines, ["---", "---", *["---:"] * (len(titles) - 2)])


def long_context() -> str:
    found = rows("long_context")
    lengths = [point["seq"] for point in found[0]["points"]]
    lines = [
        (
            row["arm"].replace("_recipe", " recipe"),
            *(f"{point['peak_gib']:.2f}" for point in row["points"]),
            f"{row['gib_per_1k']:.3f}",
            f"{round(row['predicted'], -3):,}",
        )
        for row in found
    ]
    titles = ["", *(f"{length:,} tokens, GiB" for length in lengths), "GiB a thousand tokens"]
    return markdown([*titles, "tokens that fill the card"], lines)


def profile() -> str:
    """Milliseconds of a step by kind of kernel."""
    titles = {"ms": "step", "GEMM": "GEMM", "attention": "attention", "loss": "cross-entropy"}
    titles |= {"Inductor": "Inductor's kernels", "liger_fx": "other ops of liger_fx"}
    titles |= {"optimizer": "optimizer", "copies": "copies", "other": "other", "idle": "idle"}
    found = rows("profile_step")
    lines = [
        (title, *(f"{row[key]:.1f}" if key in row else "0" for row in found))
        for key, title in titles.items()
    ]
    arms = [f"{row['arm'].replace('_recipe', ' recipe')}, ms" for row in found]
    return markdown(["", *arms], lines, ["---", *["---:"] * len(arms)])


_COUNTED = {
    "norms": "norms",
    "rope": "rotations",
    "gated": "gated MLPs",
    "gates": "other gates",
    "attention": "attentions",
    "heads": "heads with their loss",
}


def model_coverage() -> str:
    """What is found in all causal language models of transformers, of how much there is."""
    (total,) = (row for row in rows("model_coverage") if "models" in row)
    lines = [
        (title, f"{total['found'].get(kind, 0):,}", f"{total['wanted'][kind]:,}", share)
        for kind, title in _COUNTED.items()
        for share in [f"{total[f'{kind}_share']:.1%}"]
    ]
    return markdown(["", "found", "of", ""], lines, ["---", "---:", "---:", "---:"])


def models_with_something_left() -> str:
    """A line for each model in which something is left: what, and why."""
    lines = [
        (row["arm"], *(row[kind] for kind in _COUNTED), row["why"])
        for row in rows("model_coverage")
        if row.get("why")
    ]
    return markdown(["model", *_COUNTED.values(), "left, and why"], lines)


def models_not_traced() -> str:
    """A line for each model that cannot be built from its default config, or not traced."""
    found = load("model_coverage")["rows"]
    lines = [(row["arm"], row["error"]) for row in found if "error" in row]
    return markdown(["model", "why"], lines)
