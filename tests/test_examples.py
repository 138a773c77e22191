"""The examples, run as their readers run them. `test_matcher.py` runs custom_rewrite.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _recipes import SMALL, environment, prepare
from _util import words

ROOT = Path(__file__).resolve().parents[1]


def run_example(name: str, folder: Path, *arguments: str, **environ: str) -> str:
    """What the example prints when it is started in ``folder``."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        cwd=folder,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_whole_step(tmp_path: Path) -> None:
    printed = run_example("whole_step.py", tmp_path, LIGER_FX_INNER="aot_eager")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", printed)]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.5
    assert "linear_cross_entropy replaced" in words(printed)


@pytest.mark.slow
def test_explain(tmp_path: Path) -> None:
    said = words(run_example("explain.py", tmp_path))
    assert "linear_cross_entropy replaced" in said and "attention replaced 32 x" in said


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    printed = run_example("finetune_docstrings.py", tmp_path, "--steps", "6", "--device", "cpu")
    assert "Rewrites made      linear_cross_entropy 1" in printed
    assert (tmp_path / "build/demo/curves.png").exists()


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
    assert "linear_cross_entropy replaced" in words(printed)
    assert printed.count("refused") <= 1  # in one line, what is not measured on a CPU
    assert len(losses) == 10 and losses[-1] < losses[0] - 1


@pytest.mark.integrations
def test_lightning_module(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("transformers")
    printed = run_example("lightning_module.py", tmp_path, LIGER_FX_INNER="aot_eager")
    eager = run_example("lightning_module.py", tmp_path, TORCH_COMPILE_DISABLE="1")
    assert "replaced" not in eager
    assert lightning_loss(printed) == pytest.approx(lightning_loss(eager), rel=1e-4)
    assert printed.count("liger_fx: graph of") == 1
    assert "linear_cross_entropy replaced" in words(printed)


def lightning_loss(printed: str) -> float:
    return float(printed.split("loss ")[1].split()[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What makes the demo's configuration small: data, weights and sizes of the recipe tests."""
    data = prepare(tmp_path_factory.mktemp("data"))
    sizes = [f"model.{name}={size}" for name, size in SMALL.items()]
    return [
        f"dataset.data_files={data / 'instruct.jsonl'}",
        f"tokenizer.path={data / 'tokenizer.json'}",
        "tokenizer.max_seq_len=96",
        f"checkpointer.checkpoint_dir={data / 'checkpoints' / 'tied'}",
        "checkpointer.checkpoint_files=[model.pt]",
        *sizes,
        "batch_size=4",
        "max_steps_per_epoch=2",
        "liger_fx.linear_cross_entropy.chunk_tokens=16",
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("stock_recipe", "`tune run liger_fx/recipes/full_finetune_single_device`"),
        # What it runs, recipes/test_recipes.py does as well.
        pytest.param("fused_recipe", "linear_cross_entropy replaced", marks=pytest.mark.slow),
        ("lora_recipe", "linear_cross_entropy replaced"),
        pytest.param("distributed_recipe", "linear_cross_entropy replaced", marks=pytest.mark.slow),
    ],
)
def test_recipe_scripts(name: str, says: str, small: list[str], tmp_path: Path) -> None:
    variables = {"LIGER_FX_INNER": "aot_eager", "DEVICE": "cpu"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if name == "distributed_recipe" and not torch.cuda.is_available():
        # Python runs a module of this name when it starts, torchrun's workers among it.
        (tmp_path / "sitecustomize.py").write_text("import _recipes; _recipes.answer_for_a_gpu()")
        variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    done = subprocess.run(
        ["sh", f"examples/{name}.sh", *small, f"output_dir={tmp_path / 'out'}"],
        cwd=ROOT,
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = words(done.stdout + done.stderr)
    assert says in said
    assert ("makes them one" in said) == (name == "stock_recipe")  # advice
    steps = (tmp_path / "out" / "steps.jsonl").read_text().splitlines()
    assert len(steps) == 2
