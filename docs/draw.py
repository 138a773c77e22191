"""Draw training steps of Hugging Face models from ``benchmarks/results``.

``python docs/draw.py`` draws the picture of the README, ``docs/huggingface_step.png``. The site
draws one picture for each ``huggingface_step*.json``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from matplotlib.figure import Figure
from results import MODELS, Row, load, rows

BARS = {
    "eager": ("eager", "#b9c3cf"),
    "liger": ("Liger's patch, eager", "#8fa7c4"),
    "inductor": ("torch.compile, Inductor", "#5b6b7f"),
    "liger_fx": ("torch.compile, liger_fx", "#d9480f"),
}


def readme_rows() -> list[Row]:
    """Llama-3.2-1B with all labels. The run with attention under masks has no eager arm."""
    eager = rows("huggingface_step_llama", arm="eager", ignored=0.0)
    return eager + rows("huggingface_step_masks")


def draw(found: Sequence[Row], title: str, origin: str) -> bytes:
    """Time and peak memory of a step, a bar for each arm of `BARS`, as a PNG."""
    bars = [row for arm in BARS for row in found if row["arm"] == arm]
    figure = Figure(figsize=(7.6, 1.1 + 0.42 * len(bars)), layout="constrained")
    figure.suptitle(title, fontsize=11, weight="bold")
    figure.supxlabel(origin, fontsize=7, color="#666666", x=0.99, ha="right")
    panels = (("ms", "time of a step, ms", ",.0f"), ("peak_gib", "peak memory, GiB", ".1f"))
    for axes, (key, label, form) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        names = [BARS[row["arm"]][0] for row in bars]
        colours = [BARS[row["arm"]][1] for row in bars]
        drawn = axes.barh(names, [row[key] for row in bars], color=colours, height=0.7)
        axes.bar_label(drawn, [format(row[key], form) for row in bars], padding=4, fontsize=10)
        axes.set_title(label, fontsize=10)
        axes.margins(x=0.16)
        axes.set_xticks([])
        axes.tick_params(left=False, labelsize=10)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.axes[0].invert_yaxis()  # the first arm on top; both share the axis
    file = BytesIO()
    figure.savefig(file, dpi=170, format="png")
    return file.getvalue()


def pictures(name: str) -> dict[str, bytes]:
    """The bars of one file, for each model that has a row of liger_fx."""
    origin = _origin(name)
    found: dict[str, list[Row]] = {}
    share = min(row["ignored"] for row in rows(name))
    for row in rows(name, ignored=share):
        found.setdefault(row["model"], []).append(row)
    return {
        model: draw(of_model, f"A training step of {MODELS.get(model, model)}", origin)
        for model, of_model in found.items()
        if any(row["arm"] == "liger_fx" for row in of_model)
    }


def _origin(name: str) -> str:
    header = load(name)
    return f"{header['machine']}, torch {header['versions']['torch']}, {header['date']}"


if __name__ == "__main__":
    path = Path(__file__).with_name("huggingface_step.png")
    title = "A training step of Llama-3.2-1B, Hugging Face, 8 x 2048 tokens"
    path.write_bytes(draw(readme_rows(), title, _origin("huggingface_step_masks")))
    print(path)
