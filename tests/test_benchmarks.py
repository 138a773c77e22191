"""The benchmarks on tiny shapes: what they print and what they write."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import re
import shlex
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = list(BENCHMARKS.glob("[a-z]*.py"))
sys.path.append(str(BENCHMARKS))

import _harness  # noqa: E402
import _measure  # noqa: E402
import _output  # noqa: E402
import _steps  # noqa: E402
import attention  # noqa: E402
import compile_time  # noqa: E402
import host_time  # noqa: E402
import huggingface_step  # noqa: E402
import linear_cross_entropy  # noqa: E402
import long_context  # noqa: E402
import matching_time  # noqa: E402
import model_coverage  # noqa: E402
import preference_and_distillation  # noqa: E402
import profile_step  # noqa: E402
import recipe_run  # noqa: E402
import rewrites  # noqa: E402
import training_step  # noqa: E402

from liger_fx import policy  # noqa: E402

Rows = list[dict[str, Any]]
Run = Callable[..., tuple[str, Rows]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a benchmark's command in this process. What it prints, and the rows it writes."""
    monkeypatch.setenv("LIGER_FX_INNER", "aot_eager")  # Inductor would take most of the time

    def call(script: ModuleType, *arguments: str) -> tuple[str, Rows]:
        path = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", [script.__file__, *arguments, "--json", str(path)])
        script.BENCHMARK.main()
        written = json.loads(path.read_text())
        assert list(written) == ["machine", "versions", "date", "command", "rows"]
        assert written["versions"]["torch"] == version("torch")
        assert " ".join(arguments) in written["command"]
        printed = capsys.readouterr().out
        assert written["machine"] in printed and written["date"] in printed
        return printed, written["rows"]

    return call


class ChildHere:
    """What would be a process of its own runs in this one: most of its time would be imports."""

    def __init__(self, case: dict[str, Any], environment: dict[str, str]) -> None:
        arguments = [*sys.argv, "--case", json.dumps(case)]
        script = sys.modules[Path(sys.argv[0]).stem]
        with (
            mock.patch.object(sys, "argv", arguments),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            script.BENCHMARK.main()
        lines = printed.getvalue().splitlines()
        self.rows = iter([case | json.loads(s[4:]) for s in lines if s.startswith("ROW ")])


@pytest.fixture
def children_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "Child", ChildHere)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pytest.importorskip("matplotlib")
    return tmp_path / "picture.png"


def table(printed: str, *starts: str) -> list[str]:
    """The cells of the last line that starts with these."""
    *_, line = (s for s in printed.splitlines() if s.startswith(f"| {' | '.join(starts)} |"))
    return line.strip("| ").split(" | ")


# -- the harness -----------------------------------------------------------------------------------

# What a child does, by its arm; a script that needs no imports of any weight.
CHILD = """
import json, os, signal, sys
arm = json.loads(sys.argv[sys.argv.index("--case") + 1])["arm"]
if arm == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
print("ROW " + json.dumps({"error": "out of memory"} if arm == "full" else {"compiled": True}))
sys.stdout.flush()
if arm == "full":
    sys.exit()
sys.stdin.readline()
if arm == "killed later":
    os.kill(os.getpid(), signal.SIGKILL)
print("anything")
print("ROW " + json.dumps({"threads": os.environ["TORCHINDUCTOR_COMPILE_THREADS"]}))
"""


def test_children_that_fail_are_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(_harness.os, "cpu_count", lambda: 8)
    cases = [{"arm": arm} for arm in ("well", "killed", "full", "killed later")]
    found = _harness.side_by_side(cases, 2, lambda case: dict(_harness.os.environ))
    assert [row for rows in found for row in rows] == [
        {"arm": "well", "threads": "4"},
        {"arm": "killed", "error": "failed: exit status -9"},
        {"arm": "full", "error": "out of memory"},
        {"arm": "killed later", "error": "failed: exit status -9"},
    ]
    assert _harness.fresh({"arm": "killed"}) == [
        {"arm": "killed", "error": "failed: exit status -9"}
    ]


def test_a_child_has_caches_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    found = _harness.with_caches("folder")
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "folder/inductor"
    assert found["TRITON_CACHE_DIR"] == "folder/triton"
    assert "TORCH_COMPILE_BACKEND" not in found


def recorded_commands() -> set[str]:
    """Those of result files, pages and docstrings: spans of code, and lines of blocks of code."""
    root = BENCHMARKS.parent
    recorded = [json.loads(f.read_text())["command"] for f in BENCHMARKS.glob("results/*.json")]
    found = [line for command in recorded for line in command.splitlines()]
    for script in SCRIPTS:
        text = script.read_text().replace("\\\n", " ")
        found += re.findall(r"^    (python .*)", text, re.MULTILINE)
    for page in (*root.glob("*.md"), *root.glob("docs/**/*.md")):
        prose, *code = re.split(r"^ *```.*$", page.read_text(), flags=re.MULTILINE)
        for block, text in zip(code[::2], code[1::2], strict=True):
            found += block.replace("\\\n", " ").splitlines()
            prose += text
        found += re.findall(r"`([^`]+)`", prose)
    commands = (re.search(r"\bpython\s+(?:benchmarks/)?(\w+\.py\b[^#|;&]*)", f) for f in found)
    return {" ".join(command[1].split()) for command in commands if command}


def test_recorded_commands_are_still_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrites.Show, "__call__", lambda *args: None)
    taken = set()
    for command in recorded_commands():
        script, *arguments = shlex.split(command)
        if (BENCHMARKS / script).exists() and "--help" not in arguments:
            sys.modules[script.removesuffix(".py")].BENCHMARK.options.parse_args(arguments)
            taken.add(script)
    assert taken == {script.name for script in SCRIPTS}


@pytest.mark.parametrize(
    "path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.stem
)
def test_rows_that_are_kept_are_those_of_today(path: Path) -> None:
    """Comparing the rows again changes no number, and tables and pictures can be made of them."""
    kept = json.loads(path.read_text())
    first = kept["command"].splitlines()[0]  # of several, whose rows are joined
    script, *arguments = shlex.split(first.partition("python ")[2])
    benchmark = sys.modules[Path(script).stem].BENCHMARK
    args = benchmark.options.parse_args(arguments)

    def numbers(rows: Rows) -> list[float]:
        return sorted(
            v for row in rows for k, v in row.items() if isinstance(v, float) and k in had
        )

    had = {key for row in kept["rows"] for key in row}
    before = numbers(kept["rows"])
    rows = benchmark.finish(kept["rows"], args)
    assert numbers(rows) == pytest.approx(before, rel=1e-9)
    lines = _output.markdown(rows, benchmark.columns).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(
        [row for row in rows if "error" not in row]
    )
    panels = benchmark.panels(args) if callable(benchmark.panels) else benchmark.panels
    assert all(_output.bars(panel, rows) for panel in panels)


# -- linear_cross_entropy --------------------------------------------------------------------------

SHAPE = ["--device", "cpu", "--shape", "1024", "32", "512", "--steps", "3"]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms that compile nothing: one as exact as Inductor, one inexact, one that needs too much."""

    def rounded(device: torch.device) -> linear_cross_entropy.Head:
        return lambda hidden, weight, labels: (
            1.5 * linear_cross_entropy.eager(hidden, weight, labels)
        )

    def too_large(device: torch.device) -> linear_cross_entropy.Head:
        raise torch.OutOfMemoryError("Tried to allocate 1 TiB")

    arms = {
        "inductor": lambda device: linear_cross_entropy.eager,
        "liger": rounded,
        "liger_fp32": too_large,
    }
    monkeypatch.setattr(linear_cross_entropy, "ARMS", linear_cross_entropy.ARMS | arms)


@pytest.mark.slow
def test_grid_compares_with_the_fastest_exact_peer(
    run: Run, stand_ins: None, picture: Path
) -> None:
    arms = ["inductor", "liger", "liger_fp32", "cut_cross_entropy", "liger_fx"]
    printed, rows = run(
        *(linear_cross_entropy, "--grid", *SHAPE, "--ignored", "0", "0.8", "--arms", *arms),
        *("--picture", str(picture)),
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    timed = {(row["arm"], row["ignored"]): row for row in rows if "ms" in row}
    assert timed.keys() == {(a, s) for a in ("inductor", "liger", "liger_fx") for s in (0, 0.8)}
    assert {row["arm"] for row in timed.values() if row["exact"]} == {"inductor", "liger_fx"}
    for share, shown in {0: "0%", 0.8: "80%"}.items():
        cells = table(printed, "1024", "32", "512", shown, "inductor")[4:]  # the summary's line
        peer, ours = timed["inductor", share]["ms"], timed["liger_fx", share]["ms"]
        assert cells[:4] == ["inductor", f"{peer:.1f}", f"{ours:.1f}", f"{peer / ours:.3f}"]
    assert "Less exact than Inductor: liger\n" in printed
    assert "- liger_fp32: out of memory\n- cut_cross_entropy: left out: " in printed


def test_errors_of_several_shares(run: Run, stand_ins: None) -> None:
    arms = ["eager", "liger", "liger_fx"]
    printed, rows = run(
        linear_cross_entropy, "--error", *SHAPE, "--ignored", "0", "0.5", "--arms", *arms
    )
    assert [(row["arm"], row["ignored"]) for row in rows] == [
        (a, s) for s in (0, 0.5) for a in arms
    ]
    for row in rows:
        assert row["weight_error"] > 0.4 if row["arm"] == "liger" else row["weight_error"] < 0.01
    assert table(printed, "1024", "32", "512", "50%", "eager")[-3:] == ["1.000"] * 3


def test_peers_are_exact_or_say_why_they_are_left_out(run: Run) -> None:
    peers = ["liger_scaled", "trl", "liger_cute", "quack", "quack_logits"]
    arms = ["eager", *(peer for peer in peers if peer != "trl" or find_spec("trl"))]
    _, rows = run(linear_cross_entropy, "--error", *SHAPE, "--ignored", "0", "0.5", "--arms", *arms)
    for row in rows:
        if row["arm"] in ("liger_cute", "quack", "quack_logits"):
            assert row["error"].startswith("left out: ") and "needs a GPU" in row["error"]
        else:
            assert row["loss_error"] < 1e-4 and row["hidden_error"] < 0.01 > row["weight_error"]


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(_measure.Unavailable, match=r"^some-package is not installed$"):
        _measure.needs_package("some_package", "some-package")


@pytest.mark.slow
def test_errors_are_those_of_the_first_shape(run: Run, stand_ins: None) -> None:
    second = ["--shape", "512", "32", "256", "--ignored", "0"]
    _, rows = run(linear_cross_entropy, "--grid", *SHAPE, *second, "--arms", "inductor", "liger_fx")
    assert [(row["tokens"], "ms" in row) for row in rows if row["arm"] == "inductor"] == [
        (1024, False),
        (1024, True),
        (512, True),
    ]


@pytest.mark.slow
def test_times_of_several_shares(run: Run, stand_ins: None, picture: Path) -> None:
    printed, rows = run(
        linear_cross_entropy, *SHAPE, "--arms", "inductor", "liger_fp32", "--picture", str(picture)
    )
    assert [row.get("error") for row in rows] == [None, "out of memory"] * 2
    assert rows[2]["valid_floor_ms"] == rows[0]["valid_floor_ms"] / 2
    assert len(rows[0]["times"]) == 3 and picture.exists()
    assert f"{rows[2]['ms']:.1f}" in table(printed, "1024", "32", "512", "50%", "inductor")


def test_a_chunker_that_chunks_nothing_is_no_result(run: Run) -> None:
    if not hasattr(torch._inductor.config, "auto_chunker"):
        pytest.skip("this torch has no auto-chunker")
    torch._inductor.metrics.num_auto_chunking = 0
    with pytest.raises(RuntimeError, match="nothing was chunked"):
        linear_cross_entropy.check_chunked()


# -- whole steps -----------------------------------------------------------------------------------

TINY = ["--model", "tiny", "--device", "cpu"]


def test_training_step(run: Run, children_here: None) -> None:
    arguments = ["--arms", "liger_fx_step", "--batch", "2", "--seq", "16", "--steps", "1"]
    printed, rows = run(training_step, *TINY, *arguments, "--warmup", "1")
    assert [(row["arm"], row["rewrites"]) for row in rows] == [
        ("liger_fx_step", "linear_cross_entropy 1")
    ]
    assert f"{rows[0]['ms']:.1f}" in table(printed, "0%", "liger_fx_step")


PADDED_ARMS = ["torchtune", "liger_fx_step", "liger_fx_recipe"]


def test_arms_of_liger_fx_are_told_of_padding(run: Run, children_here: None) -> None:
    args = Namespace(padded=0.4)
    assert _steps.padded_batches(args) == {"tiled_mlp.skip_padding": True}
    assert training_step.fused(args)["tiled_mlp.skip_padding"] is True
    assert _steps.padded_batches(Namespace(padded=0.0)) == {}
    arguments = ["--arms", *PADDED_ARMS, "--batch", "8", "--seq", "64", "--steps", "1"]
    _, rows = run(training_step, *TINY, *arguments, "--warmup", "1", "--padded", "0.4")
    assert [row["arm"] for row in rows] == PADDED_ARMS
    assert all("linear_cross_entropy" in row["rewrites"] for row in rows[1:])
    assert {round(row["loss"], 2) for row in rows} == {round(rows[0]["loss"], 2)}


@pytest.mark.parametrize("share", [0, 0.1, 0.5])
def test_padding_is_on_the_right_and_has_its_share(share: float) -> None:
    padded = _measure.padding(torch.zeros(8, 100), share)
    assert padded.float().mean().item() == pytest.approx(share, abs=0.01)
    assert (padded.int().diff(dim=1) >= 0).all()
    assert len(set(padded.sum(1).tolist())) == (8 if share else 1)


def test_preference_and_distillation(run: Run, children_here: None, picture: Path) -> None:
    """Heads and losses alone: both arms begin with the same loss, that of guessing."""
    arguments = ["--arms", "inductor", "liger_fx_recipe", "--layers", "0", "--steps", "1"]
    arguments += ["--batch", "2", "--seq", "16", "--picture", str(picture)]
    printed, rows = run(preference_and_distillation, *TINY, *arguments, "--warmup", "1")
    assert [(row["loss"], row["arm"], row["rewrites"]) for row in rows] == [
        ("dpo", "inductor", None),
        ("dpo", "liger_fx_recipe", "linear_logprobs 2"),
        ("grpo", "inductor", None),
        ("grpo", "liger_fx_recipe", "linear_logprobs 4"),  # of one process
        ("distillation", "inductor", None),
        ("distillation", "liger_fx_recipe", "linear_kl 1, linear_logprobs 4"),
    ]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert second["first_loss"] == pytest.approx(first["first_loss"], rel=1e-3)
    assert f"{rows[5]['ms']:.1f}" in table(printed, "distillation", "0%", "liger_fx_recipe")
    assert picture.exists()


def test_pairs_have_their_prompt_once(run: Run, children_here: None, capsys: Any) -> None:
    """The loss is that of the recipe that has it twice; other losses have no such arm."""
    arguments = ["--losses", "dpo", "grpo", "--arms", "liger_fx_recipe", "liger_fx_unpad"]
    arguments += ["--ignored", "0.5", "--batch", "4", "--seq", "256", "--layers", "1"]
    _, rows = run(preference_and_distillation, *TINY, *arguments, "--warmup", "1", "--steps", "1")
    twice, once, _, without = rows
    assert once["first_loss"] == pytest.approx(twice["first_loss"], rel=1e-3)
    assert "is an arm of dpo" in without["error"]


def test_answers_have_one_prompt() -> None:
    args = Namespace(model="tiny", batch=5, seq=16, device=torch.device("cpu"), answers=2)
    tokens = huggingface_step.tokens_of(args, 0.5)
    alike = [(a == b).int().cumprod(0).sum() for a, b in itertools.pairwise(tokens)]
    assert [count >= 8 for count in alike] == [True, False, True, False]
    assert (tokens[0] != tokens[1]).any()


def test_a_budget_is_spent_as_by_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "needs_cuda", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    args = Namespace(
        model="tiny", arm="liger_fx_budget", checkpoint=True, padded=0.0, gib=1.0, batch=2, seq=16,
        device=torch.device("cpu"), lr=1e-4,
    )  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr(training_step, "progress", said.append)
    train, tokens = training_step.prepare(args)
    for _ in range(4):
        train(tokens, tokens)
    assert any("keep" in text for text in said)


def test_attention(run: Run, picture: Path) -> None:
    small = ["--device", "cpu", "--shape", "2", "32", "4", "2", "16", "--laps", "2"]
    printed, rows = run(attention, *small, "--arms", "dense", "liger_fx", "--picture", str(picture))
    assert [row["mask"] for row in rows[::2]] == list(attention.MASKS)
    assert all(row["ms"] > 0 and "error" not in row for row in rows) and picture.exists()
    assert all(row["plan_ms"] for row in rows if row["arm"] == "liger_fx" and "p" in row["mask"][0])
    assert "documents" in printed


def measured(script: ModuleType, case: dict[str, Any], *arguments: str) -> Rows:
    """The rows of a case, of a script whose children wait for their turn."""
    args = script.BENCHMARK.options.parse_args(["--device", "cpu", *arguments])
    vars(args).update(case)
    with mock.patch.object(sys, "stdin", io.StringIO("\n")):
        first, *rows = script.measure(args)
    assert first == {"compiled": True}
    return rows


SMALL_STEP = ["--batch", "2", "--seq", "16", "--steps", "1"]
TINY_EAGER = {"model": "tiny", "arm": "eager"}


@pytest.mark.parametrize("data", [{"padded": 0.4}, {"packed": 6}])
def test_huggingface_step_of_collated_data(data: dict[str, Any]) -> None:
    args = Namespace(batch=2, seq=16, device="cpu", **({"padded": None, "packed": None} | data))
    (given,) = huggingface_step.collated(args).values()
    assert given.shape == (2, 16) and given.dtype == torch.int64
    (row,) = measured(huggingface_step, TINY_EAGER | data, *SMALL_STEP, "--warmup", "1")
    assert row["losses"][0] > 0


def test_huggingface_step(run: Run, picture: Path) -> None:
    """What processes of their own measure is what this one measures; an arm of none has a reason."""
    small = [*SMALL_STEP, "--warmup", "2", "--ignored", "0", "0.5"]
    eager = measured(huggingface_step, TINY_EAGER, *small)
    assert [(row["ignored"], row["compile_s"]) for row in eager] == [(0, None), (0.5, None)]

    arguments = ["--models", "tiny", "--arms", "liger_fx_loss", "liger", "--jobs", "2"]
    arguments += ["--device", "cpu", "--baseline", "liger_fx_loss", "--picture", str(picture)]
    printed, rows = run(huggingface_step, *small, *arguments)
    *rows, without = sorted(rows, key=lambda row: "error" in row)
    for row, reference in zip(rows, eager, strict=True):
        assert row["ignored"] == reference["ignored"] and row["graphs"] == row["speed"] == 1
        assert row["rewrites"] == "linear_cross_entropy 1"
        assert row["losses"] == pytest.approx(reference["losses"], rel=1e-3)
        assert row["losses"][0] - row["losses"][1] > 0.02
    assert rows[0]["compile_s"] > 0 and rows[1]["compile_s"] is None
    assert ", ".join(f"{loss:.4f}" for loss in rows[1]["losses"]) in table(printed, "tiny", "50%")
    assert without["error"] == "left out: Liger's patch needs a GPU"
    assert f"- liger: {without['error']} (tiny)" in printed and picture.exists()


def test_a_step_without_memory_while_others_compile() -> None:
    model = torch.nn.Linear(2, 1)
    loss = model(torch.ones(1, 2)).sum()
    loss.register_hook(mock.Mock(side_effect=torch.OutOfMemoryError))
    assert huggingface_step.compile_step(model, lambda: loss, torch.device("cpu")) is None
    seconds = huggingface_step.compile_step(
        model, lambda: model(torch.ones(1, 2)).sum(), torch.device("cpu")
    )
    assert seconds > 0 and model.weight.grad is None


@pytest.mark.slow
def test_compile_time_in_two_processes(run: Run) -> None:
    arguments = ["--arms", "liger_fx_step", "--layers", "1", "--batch", "2", "--seq", "16"]
    printed, (row,) = run(compile_time, *TINY, *arguments)
    assert row["cold_s"] > 0 and row["warm_s"] > 0
    assert (row["graphs"], row["rewrites"]) == (1, "linear_cross_entropy 1")
    assert row["fx_hits"] == row["aot_hits"] == 0  # aot_eager has no cache
    assert table(printed, "1", "liger_fx_step")[2] == f"{row['cold_s']:.1f}"


def test_compile_time_keeps_the_caches(
    run: Run, monkeypatch: pytest.MonkeyPatch, picture: Path
) -> None:
    """The second process finds what the first left, the next arm and depth nothing."""

    def child(case: dict[str, Any], environment: dict[str, str]) -> Namespace:
        if case == {"arm": "inductor_step", "layers": 4}:
            return Namespace(rows=[case | {"error": "out of memory"}])
        compiled = Path(environment["TRITON_CACHE_DIR"]).parent / "compiled"
        slower, first = 3 if case["arm"] == "inductor_step" else 1, not compiled.exists()
        compiled.touch()
        counts = dict.fromkeys(compile_time.COUNTED, 0) | {"fx_hits": 0 if first else 4}
        took = {"seconds": slower * (8 if first else 2), "rewrites": None}
        return Namespace(rows=[case | took | counts])

    monkeypatch.setattr(compile_time, "Child", child)
    arguments = ["--arms", "torchtune", "inductor_step", "--layers", "2", "4"]
    printed, rows = run(compile_time, *TINY, *arguments, "--picture", str(picture))
    assert [(r.get("cold_s"), r.get("warm_s"), r.get("fx_hits")) for r in rows] == [
        (8, 2, 4),
        (24, 6, 4),
        (8, 2, 4),
        (None, None, None),
    ]
    cells = ["2", "inductor_step", "24.0", "3.00", "6.0", "3.00", "0", "4"]
    assert table(printed, "2", "inductor_step")[:8] == cells
    assert "- inductor_step: cold: out of memory (4)" in printed and picture.exists()


def test_long_context_predicts_and_confirms(
    run: Run, monkeypatch: pytest.MonkeyPatch, picture: Path
) -> None:
    def child(case: dict[str, Any]) -> Rows:
        gib = {"torchtune": 0.25, "liger_fx_recipe": 0.125}[case["arm"]] * case["seq"] / 1000 + 8
        too_long = case["confirming"] and case["seq"] > 100_000
        return [case | ({"error": "out of memory"} if too_long else {"peak_gib": gib})]

    monkeypatch.setattr(long_context, "fresh", child)
    arguments = ["--arms", "torchtune", "liger_fx_recipe", "--lengths", "1000", "2000", "4000"]
    printed, (stock, ours) = run(
        long_context, *TINY, *arguments, "--gib", "24", "--confirm", "--picture", str(picture)
    )
    assert stock["gib_per_1k"] == pytest.approx(0.25) and stock["off_by_gib"] < 1e-9
    assert stock["predicted"] in (63_999, 64_000) and ours["predicted"] in (127_999, 128_000)
    assert stock["ran"] % 256 == 0 and 0.96 < stock["ran"] / 64_000 <= 0.97
    assert (stock["confirmed"], ours["confirmed"]) == ("yes", "out of memory")
    cells = table(printed, "liger_fx_recipe")
    assert cells[1:4] == ["0.1250", "0.500", "8.00"] and cells[6] == "2.00"
    assert picture.exists()


def test_lengths_at_which_something_else_sets_the_peak(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(case: dict[str, Any]) -> Rows:
        return [case | {"ms": 1.0, "peak_gib": max(10, case["seq"] / 400)}]

    monkeypatch.setattr(long_context, "fresh", child)
    arguments = ["--arms", "torchtune", "--lengths", "1000", "4000", "8000", "--gib", "24"]
    printed, (row,) = run(long_context, *TINY, *arguments)
    assert len(row["points"]) == 3
    assert f"- torchtune: failed: off a line by {row['off_by_gib']:.2f} GiB" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU does not count its memory")
def test_long_context_needs_a_gpu(run: Run, children_here: None) -> None:
    printed, (row,) = run(
        long_context, *TINY, "--arms", "torchtune", "--lengths", "8", "--gib", "1"
    )
    assert row["error"] == "left out: counting memory needs a GPU"
    assert "- torchtune: left out: counting memory needs a GPU" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU has no kernels to profile")
def test_profile_step_needs_a_gpu(run: Run, children_here: None) -> None:
    printed, (row,) = run(profile_step, *TINY, "--arms", "torchtune")
    assert row == {"arm": "torchtune", "error": "left out: profiling kernels needs a GPU"}
    assert row["error"] in printed


def test_recipe_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of whole recipes are tested in test_recipes.py."""

    def measure(args: Any, name: str, batch: int, folder: Path) -> dict[str, Any]:
        assert (folder / "w.pt").exists()
        row = {"arm": name, "batch": batch, "loss": 6.0, "slowest": 1.0, "fastest": 9.0}
        faster = 2 if name == "liger_fx recipe" else 1
        return row | {"tokens_per_s": faster * 1000.0, "peak_gib": 8.0 / faster}

    monkeypatch.setattr(recipe_run, "measure", measure)
    printed, rows = run(recipe_run, *TINY, "--batch", "2")
    assert [row["speed"] for row in rows] == [1, 1, 2]
    assert table(printed, "2", "liger_fx recipe")[5:8] == ["2.000", "4.00", "0.500"]


# -- what is found in the models of transformers ---------------------------------------------------


@pytest.mark.slow
def test_model_coverage(run: Run, picture: Path) -> None:
    pytest.importorskip("transformers")
    printed, (*rows, total) = run(
        model_coverage,
        "--models",
        "llama",
        "gpt2",
        "mamba",
        "--jobs",
        "2",
        "--picture",
        str(picture),
    )
    found = {row["arm"]: row for row in rows}
    llama, gpt2, mamba = (found[name] for name in ("llama", "gpt2", "mamba"))
    everything = {"norms": 5, "rope": 4, "gated": 2, "attention": 2, "heads": 1}
    assert llama["found"] == llama["wanted"] == everything and llama["left"] == {}
    # An MLP without a gate, no rotation, a head in a graph of its own.
    assert gpt2["wanted"] == {"norms": 5, "attention": 2, "heads": 1} and gpt2["heads"] == "0 of 1"
    assert "traced elsewhere" in gpt2["why"]
    assert mamba["gates"] == "0 of 2" and "expected one dtype" in mamba["why"]
    assert total["arm"] == "all 3" and total["heads"] == "2 of 3" and picture.exists()
    assert table(printed, "llama")[1:7] == ["5 of 5", "4 of 4", "2 of 2", "", "2 of 2", "1 of 1"]


def test_model_coverage_of_models_that_fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    _, (row, total) = run(model_coverage, "--models", "reformer")
    assert "cannot build this model" in row["error"] and total["arm"] == "all 0"
    monkeypatch.setattr(model_coverage, "measure", lambda model: time.sleep(60))
    _, (row, _) = run(model_coverage, "--models", "llama", "--seconds", "1")
    assert row["error"] == f"failed: ended by signal {signal.SIGALRM.value}"


# -- what liger_fx costs the host ------------------------------------------------------------------


def test_matching_time(run: Run, children_here: None, picture: Path) -> None:
    printed, (row,) = run(
        matching_time, "--layers", "1", "--inner", "eager", "--picture", str(picture)
    )
    assert row["nodes"] > 50 and 0 < row["matching_s"] < row["compile_s"]
    assert table(printed, "1")[1] == str(row["nodes"]) and picture.exists()


def test_host_time(run: Run, monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    monkeypatch.setattr(host_time, "without_kernels", object)  # tests share their process
    monkeypatch.setattr(
        host_time, "microseconds", partial(host_time.microseconds, calls=1, repeats=1)
    )
    printed, rows = run(host_time, "--picture", str(picture))
    assert {"rms_norm", "swiglu", "rope"} < {row["op"] for row in rows}
    (row,) = (row for row in rows if row["op"] == "swiglu")
    keys = ("forward", "backward", "eager")
    assert table(printed, "swiglu")[1:] == [f"{row[key]:.1f}" for key in keys]
    assert picture.exists()


# -- rewrites --------------------------------------------------------------------------------------


def test_a_measured_case_becomes_a_row_of_the_table():
    case = rewrites.case("tiny", "layers", True, "eager")
    rows = measured(rewrites, case, "--batch", "2", "--seq", "8", "--laps", "2")
    made = {row["rewrite"] for row in rows}
    assert made == {"attention", "rope", "add_rms_norm", "rms_norm", "swiglu"} | {"tiled_mlp"}
    for row in rows:
        assert row["speed"] == row["ms_without"] / row["ms_with"]
        row = case | row
        assert policy.Row(**{field.name: row[field.name] for field in fields(policy.Row)})


HEADS = "halves_rounded, of a norm"
ROW = {"rewrite": "rope", "spelling": "halves", "inner": "inductor"}
ROW |= {"checkpoint": True, "model": "tiny", "form": "layers"}


@pytest.mark.parametrize(
    ("model", "spellings"),
    [
        ("Qwen3-0.6B", {"rope": HEADS, "add_rms_norm": "add_huggingface"}),
        ("Gemma3-1B", {"rope": HEADS, "add_rms_norm": "add_gemma"}),
        ("LoRA", {"tiled_mlp": "swiglu, LoRA", "add_rms_norm": "add_torchtune, of a sum"}),
    ],
)
def test_layers_of_other_libraries_and_with_adapters(model, spellings, monkeypatch):
    small = dict(hidden_size=32, intermediate_size=64, head_dim=8)
    small |= dict(num_attention_heads=4, num_key_value_heads=2)
    for name in ("qwen3_0_6b", "gemma3_1b"):
        config = copy.deepcopy(huggingface_step.CONFIGS[name])
        vars(config).update(small)
        monkeypatch.setitem(huggingface_step.CONFIGS, name, config)
    tiny = partial(_steps.lora, "tiny", vocab_size=8, num_layers=2)
    monkeypatch.setitem(rewrites.MODELS, "LoRA", tiny)
    for form in ("layers", "step"):
        of_case = rewrites.case(model, form, True, "inductor") | {"batch": 2, "seq": 8}
        build = rewrites.decoder(Namespace(**of_case, device=torch.device("cpu")))
        assert rewrites.possible(build, ["embedding"]) == {}
        found = rewrites.possible(build, rewrites.JUDGED)
        assert {name: found[name] for name in spellings} == spellings


@pytest.mark.parametrize(
    ("form", "checkpoint", "counted"),
    [("layers", False, 3.0), ("step", False, 3.0), ("layers", True, 7.0), ("loss", False, 7.0)],
)
def test_memory_of_layers_is_what_they_leave(form, checkpoint, counted, monkeypatch):
    """A model of many layers without checkpoints has all of that at its peak."""
    x = torch.ones((), requires_grad=True)
    lap = rewrites.Lap(lambda x: x * 2, [x], x)
    allocated = iter([5 * rewrites.GIB, 8 * rewrites.GIB])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(rewrites, "run_laps", lambda *args: Namespace(peak_gib=7.0))
    args = Namespace(form=form, checkpoint=checkpoint, device=torch.device("cuda"))
    assert lap.gib(args) == counted


def test_a_run_is_added_to_those_before():
    """The latest run says which rows a case has; of rows with the same key, for several masks, the
    first is the first's."""
    before = [ROW | {"speeds": [0.9], "memory": 1.0}, ROW | {"speeds": [1.0], "spelling": "pairs"}]
    other = ROW | {"speeds": [1.3], "rewrite": "swiglu"}
    others = {"ms_with": 2.0, "arm": "a case"}
    new = [ROW | {"speed": 1.1, "memory": 0.8} | others]
    new.append(ROW | {"speed": 1.2, "memory": None, "inner": "eager"} | others)
    masks = [ROW | {"speeds": [0.5], "memory": 1.0}, ROW | {"speeds": [0.7], "memory": 1.0}]
    again = [ROW | {"speed": 0.6, "memory": 1.0}, ROW | {"speed": 0.8, "memory": 1.0}]
    speeds = [row["speeds"] for row in rewrites.with_speeds(masks, again)]
    assert speeds == [[0.5, 0.6], [0.7, 0.8]]
    assert rewrites.with_speeds([*before, other], new) == [
        ROW | {"speeds": [0.9, 1.1], "memory": 0.8},
        ROW | {"speeds": [1.2], "memory": None, "inner": "eager"},
        other,  # a rewrite that was not asked for
    ]


def test_the_median_of_the_runs_in_the_table_counts(monkeypatch, tmp_path):
    path = tmp_path / "measured.json"
    path.write_text("{}")
    monkeypatch.setattr(rewrites, "TABLE", path)
    monkeypatch.setattr(policy, "files", lambda package: tmp_path)
    monkeypatch.setattr(rewrites, "architecture_of", lambda device: "sm90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    gpu = torch.device("cuda")
    for speed in (0.9, 1.3, 1.0):
        row = ROW | {"speed": speed, "memory": 1.0}
        rewrites.write_table([row], gpu, rewrites.runs_before(gpu))
    found = policy.table.__wrapped__()["sm90"]
    assert found.rows == [policy.Row(**ROW, speed=1.0, memory=1.0)]
    assert (found.machine, len(found.commands)) == ("NVIDIA L4", 3)


def test_runs_with_other_versions_are_not_added(monkeypatch):
    monkeypatch.setattr(rewrites, "architecture_of", lambda device: "sm90")
    monkeypatch.setattr(rewrites, "versions", lambda: "torch 3.0")
    with pytest.raises(ValueError, match=r"it with torch 3\.0, only --write makes it anew"):
        rewrites.runs_before(torch.device("cuda"))


def test_rows_of_a_case_that_failed_or_was_not_run_stay():
    failed = {"error": "out of memory", "model": "tiny", "form": "layers"}
    before = [ROW | {"speeds": [0.9], "memory": 1.0}, ROW | {"speeds": [0.8], "inner": "eager"}]
    assert (
        rewrites.with_speeds(before, [failed | {"checkpoint": True, "inner": "inductor"}]) == before
    )


def test_the_table_as_text_is_the_table():
    entries = json.loads(rewrites.TABLE.read_text())
    assert rewrites.as_text(entries) == rewrites.TABLE.read_text()
