"""The examples that train, run as their readers run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_example(name: str, folder: Path, **environ: str) -> str:
    """What the example prints when it is started in ``folder``."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        cwd=folder,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def trainer_losses() -> list[float]:
    """Of each step of the last run; what Trainer prints of them is rounded."""
    state = json.loads((ROOT / "build/trainer/output/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_huggingface_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    name = "huggingface_trainer.py"
    printed = run_example(name, tmp_path, LIGER_FX_INNER="eager")  # Inductor would take most of it
    losses = trainer_losses()
    assert printed.count("liger_fx: graph of") == 1
    assert "linear_cross_entropy  replaced" in printed and "refused" not in printed
    assert len(losses) == 10 and losses[-1] < losses[0] - 1
    assert "replaced" not in run_example(name, tmp_path, TORCH_COMPILE_DISABLE="1")
    assert trainer_losses() == pytest.approx(losses, rel=0, abs=1e-4)
