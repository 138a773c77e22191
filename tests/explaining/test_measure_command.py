"""``python -m liger_fx measure``: what it prints, the table it writes, and errors."""

from __future__ import annotations

import json
import re
from unittest import mock

import pytest
import torch

import liger_fx
from liger_fx import own_table, policy
from liger_fx.__main__ import main
from liger_fx.own_table import Sizes

TINY = Sizes(16, 24, 2, 1, 8)
MADE = {"attention", "rope", "add_rms_norm", "rms_norm", "tiled_mlp", "swiglu"}


@pytest.fixture
def on_an_l4(monkeypatch, tmp_path):
    """A CPU that says so, with models that take no time and a cache directory of its own."""
    monkeypatch.setattr(policy, "own_path", lambda: tmp_path / "cache" / "measured.json")
    monkeypatch.setattr(own_table, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(own_table, "architecture_of", lambda device: "sm89")
    monkeypatch.setattr(own_table, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(own_table, "LOGITS", (4, 8))
    monkeypatch.setattr(own_table, "TABLE", (16, 8))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr("liger_fx.measure.SECONDS", 0.0)


TIMES = ["--batch", "2", "--seq", "8", "--runs", "1", "--inner", "eager"]


def measure(*arguments, code=0):
    assert main(["measure", *TIMES, *arguments]) == code


def test_the_table_is_written_where_auto_reads_it(on_an_l4, capsys):
    measure("--write")
    printed = capsys.readouterr().out
    assert f"rows are in {policy.own_path()}\n" in printed
    assert re.search(
        r"tiny, one layer, in checkpoints, eager\n(  \w+, \w+: \d+\.\d{3}x the speed\n)+", printed
    )
    found = policy.own_table("")["sm89"]
    assert (found.machine, len(found.commands)) == ("NVIDIA L4", 1)
    for recomputed in (True, False):
        rows = [row for row in found.rows if row.checkpoint == recomputed and row.model == "tiny"]
        assert {row.rewrite for row in rows} == MADE
        assert {(row.form, row.inner, row.memory) for row in rows} == {("layers", "eager", None)}
    (loss,) = (row for row in found.rows if row.form == "loss")
    assert (loss.rewrite, loss.spelling, loss.model) == ("cross_entropy", "upcast", "logits [4, 8]")
    assert liger_fx.backend().own_table.keys() == {"sm89"}


def test_nothing_is_written_unless_asked(on_an_l4, capsys):
    measure()
    assert "swiglu, separate" in capsys.readouterr().out
    assert not policy.own_path().exists()


def test_the_variable_names_the_file(on_an_l4, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGER_FX_TABLE", str(tmp_path / "a" / "file"))
    measure("--write")
    assert "sm89" in json.loads((tmp_path / "a" / "file").read_text())
    measure("--write", str(tmp_path / "other"))
    assert "sm89" in policy.own_table(str(tmp_path / "other"))


def test_other_architectures_stay(on_an_l4, tmp_path):
    shipped = json.loads((policy.files("liger_fx") / "measured.json").read_text())
    (tmp_path / "t").write_text(json.dumps(shipped | {"sm89": shipped["sm90"]}))
    measure("--write", str(tmp_path / "t"))
    written = json.loads((tmp_path / "t").read_text())
    assert written["sm90"] == shipped["sm90"] and written["sm89"]["machine"] == "NVIDIA L4"


def test_a_broken_table_is_made_anew(on_an_l4, tmp_path):
    (tmp_path / "t").write_text("{")
    measure("--write", str(tmp_path / "t"))
    assert policy.own_table(str(tmp_path / "t")).keys() == {"sm89"}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_memory_of_layers_is_what_they_leave(checkpoint, on_an_l4, monkeypatch):
    asked = []

    def compare(bench, base, form, one_of_many):
        asked.append(one_of_many)
        return policy.Measurement(1.0, 1.0)

    monkeypatch.setattr("liger_fx.measure._Bench.compare", compare)
    for form, model in (("layers", "tiny"), ("loss", "logits")):
        case = own_table.Case(model, form, checkpoint, "eager")
        own_table.measured(case, 2, 8, torch.device("cpu"))
    assert asked[:-1] == [not checkpoint] * (len(asked) - 1) and not asked[-1]


def test_several_runs_of_a_row_are_its_speeds(on_an_l4, tmp_path):
    measure("--write", str(tmp_path / "t"), "--runs", "3")
    rows = json.loads((tmp_path / "t").read_text())["sm89"]["rows"]
    assert all(len(row["speeds"]) == 3 for row in rows)
    assert len(rows) == 2 * len(MADE) + 2  # the loss and an embedding


def test_two_layers_are_a_step(on_an_l4):
    case = own_table.Case("tiny", "step", True, "aot_eager")
    rows = own_table.measured(case, 2, 8, torch.device("cpu"))
    assert {row.rewrite for row in rows} == MADE
    assert {(row.form, row.checkpoint) for row in rows} == {("step", True)}


def test_the_cases_are_of_all_the_kinds_in_the_shipped_table():
    found = {(case.inner, case.checkpoint, case.form) for case in own_table.cases()}
    rows = policy.table()["sm90"].rows
    assert {(row.inner, row.checkpoint, row.form) for row in rows} <= found


def test_variables_of_the_environment_change_no_row(on_an_l4, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGER_FX_DISABLE", "swiglu")
    monkeypatch.setenv("LIGER_FX_POLICY", "rope")
    measure("--write", str(tmp_path / "t"))
    assert {row.rewrite for row in policy.own_table(str(tmp_path / "t"))["sm89"].rows} > MADE


def test_what_fails_is_left_out(on_an_l4, tmp_path, capsys):
    measured = own_table.measured

    def short_of_memory(case, *rest):
        if case.checkpoint:
            raise torch.OutOfMemoryError("CUDA out of memory\nand what to do about it")
        return measured(case, *rest)

    with mock.patch.object(own_table, "measured", short_of_memory):
        measure("--write", str(tmp_path / "t"))
    assert "  not measured: OutOfMemoryError: CUDA out of memory\n" in capsys.readouterr().out
    assert not any(row.checkpoint for row in policy.own_table(str(tmp_path / "t"))["sm89"].rows)


def test_a_kernel_that_fails_is_named(on_an_l4, capsys):
    """Dynamo wraps what a backend raises."""
    failure = torch.OutOfMemoryError("CUDA out of memory\nand what to do about it")
    with mock.patch("liger_fx.measure._Bench.compare", side_effect=failure):
        measure(code=1)
    assert "  not measured: OutOfMemoryError: CUDA out of memory\n" in capsys.readouterr().out


def error(capsys, *arguments):
    measure(*arguments, code=1)
    return capsys.readouterr().err


def test_nothing_could_be_measured(on_an_l4, tmp_path, capsys):
    (tmp_path / "t").write_text("as before")
    with mock.patch.object(own_table, "measured", side_effect=torch.OutOfMemoryError("full")):
        said = error(capsys, "--write", str(tmp_path / "t"))
    assert said == "error: nothing could be measured; less --batch or --seq takes less memory\n"
    assert (tmp_path / "t").read_text() == "as before"


def test_a_file_that_cannot_be_written_is_found_before_measuring(on_an_l4, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with mock.patch.object(own_table, "run", side_effect=AssertionError):
        for path in (tmp_path, tmp_path / "file" / "t"):
            said = error(capsys, "--write", str(path))
            assert said == f"error: {path} cannot be written to: give --write another file\n"


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert error(capsys) == (
        "error: torch finds no GPU here, and the table is for GPUs: on a CPU policy='measure' "
        "decides\n"
    )
