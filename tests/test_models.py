"""In every family and mode: how often each rewrite fires, what is refused, and that value,
gradients, graphs, breaks and recompiles stay as they are without liger_fx."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from _models import (
    BATCH,
    FAMILIES,
    HALF,
    IN_PLACE,
    LENGTH,
    MODES,
    VOCAB,
    Law,
    Refused,
    Row,
    autocast_inside,
    autocast_outside,
    checkpoint_inside,
    dynamic,
    evaluation,
    model_in_place,
    packed,
    per_layer,
    second_length,
    whole_step,
)
from _util import DEVICE, relative_error
from expecttest import assert_expected_inline
from liger_fx.passes import DEFAULT
from torch import Tensor, nn
from torch._dynamo import utils as dynamo
from torchtune import training

import liger_fx
import liger_fx.dynamo
import liger_fx.inner
from liger_fx import DeferredLogits, Report
from liger_fx.deferred import materialized

ROWS = [*FAMILIES, *IN_PLACE, *MODES]


@pytest.fixture(autouse=True)
def every_rewrite(monkeypatch):
    for name, value in dict(POLICY="all", INNER="eager", STRICT="1").items():
        monkeypatch.setenv(f"LIGER_FX_{name}", value)


class Outcome(NamedTuple):
    value: Tensor
    logits: Tensor | None  # where the model returns them
    gradients: dict[str, Tensor]
    compiled: dict[str, object]  # what Dynamo had to do
    report: Report


def run(row: Row, layers: int, backend: str, dtype: torch.dtype = torch.float32) -> Outcome:
    """One step of a fresh model, with the same parameters each time."""
    pytest.importorskip(row.library)
    if row.family == "QAT" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 does not trace torchao's fake quantisation")
    torch._dynamo.reset()
    dynamo.counters.clear()
    dynamo.clear_compilation_metrics()
    before = len(liger_fx.reports())
    net = _built(row, layers, dtype)
    tokens = torch.randint(3, VOCAB, (BATCH, LENGTH), device=DEVICE)
    labels = tokens.clone()
    labels[:, :3] = -100
    outputs = row.mode(net, row.loss, backend)(tokens, labels)
    value, logits = getattr(outputs, "loss", outputs), getattr(outputs, "logits", None)
    if value.requires_grad:
        value.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    report = Report.merged(liger_fx.reports()[before:])
    return Outcome(value.detach(), logits, gradients, _compiled(), report)


def _built(row: Row, layers: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(layers)
    with training.set_default_dtype(dtype), torch.device(DEVICE):
        net = row.build(layers)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.05)
    return net


def _compiled() -> dict[str, object]:
    reasons = [metrics.recompile_reason for metrics in dynamo.get_compilation_metrics()]
    return dict(
        graphs=dynamo.counters["stats"]["unique_graphs"],
        breaks=dict(dynamo.counters["graph_break"]),
        recompiles=[reason for reason in reasons if reason],
    )


def run_eagerly(row: Row, layers: int, dtype: torch.dtype = torch.float32) -> Outcome:
    with torch.compiler.set_stance("force_eager"):
        return run(row, layers, "eager", dtype)


def assert_same(actual: Outcome, expected: Outcome, tolerance: float) -> None:
    assert actual.gradients.keys() == expected.gradients.keys()
    assert (actual.value - expected.value).norm() <= tolerance * expected.value.norm()
    norms = {name: gradient.norm() for name, gradient in expected.gradients.items()}
    whole = torch.stack(list(norms.values())).norm() if norms else 0.0
    for name, gradient in expected.gradients.items():
        # Of some, such as a key's bias, the gradient is 0 but for rounding.
        scale = max(norms[name], whole / 10)
        assert (actual.gradients[name] - gradient).norm() <= tolerance * scale, name


def laws(row: Row, layers: int) -> dict[str, int]:
    return _counted({n: cell(layers) for n, cell in row.cells.items() if isinstance(cell, Law)})


def counts(outcome: Outcome) -> dict[str, int]:
    return _counted(outcome.report.counts)


def _counted(counts: dict[str, int]) -> dict[str, int]:
    """On a GPU not attention: with grouped queries PyTorch may take another kernel, in fp32 one
    whose result has other strides."""
    return {n: k for n, k in counts.items() if DEVICE == "cpu" or n != "attention"}


_ON_A_GPU = ["attention"] if DEVICE != "cpu" else []


def assert_refused(row: Row, report: Report) -> None:
    """What the table says, and nothing else."""
    refused = {name: cell for name, cell in row.cells.items() if isinstance(cell, Refused)}
    assert {r.rewrite for r in report.rejections} <= {*refused, *_ON_A_GPU}
    for name, cell in refused.items():
        said = [r for r in (*report.rejections, *report.near_misses) if r.rewrite == name]
        assert said and all(cell.reason in r.reason for r in said), name


def assert_deferred(actual: Outcome, expected: Outcome, tolerance: float) -> None:
    """Logits that are eager's, and are computed here."""
    before = materialized()
    assert isinstance(actual.logits, DeferredLogits)
    assert actual.logits.dtype == expected.logits.dtype
    assert actual.logits.requires_grad
    assert relative_error(actual.logits.materialize(), expected.logits) <= tolerance
    assert materialized() == before + 1


# Modes that are an error unless they are one graph, which is called once.
ONE_CALL = [
    whole_step,
    checkpoint_inside,
    packed,
    autocast_outside,
    autocast_inside,
    dynamic,
    evaluation,
]
# Whose mode or cells other rows have as well.
SLOW = [
    "torchtune-gemma2-dynamic",
    "torchtune-phi3-second_length",
    "transformers-Llama-second_length",
]
# Their whole steps in fp32 are run; head and loss are those of Llama.
HEAD_OF_LLAMA = {
    "Mistral",
    "Qwen2",
    "Phi3",
    "Qwen3",
    "GLM",
    "Helium",
    "ERNIE 4.5",
    "OLMo",
    "OLMo 2",
}


def marked(row: Row, *slow_modes: Any):
    alike = row.family in HEAD_OF_LLAMA and row.mode in slow_modes
    marks = [pytest.mark.slow] if alike or str(row) in SLOW else []
    return pytest.param(row, id=str(row), marks=marks)


@pytest.mark.parametrize("row", [marked(row, model_in_place) for row in ROWS])
def test_step(row, monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", row.inner)
    expected = run_eagerly(row, layers=2)
    actual = run(row, 2, "liger_fx")
    assert counts(actual) == laws(row, layers=2)
    assert_refused(row, actual.report)
    assert_same(actual, expected, row.tolerance)
    in_place = row.mode is model_in_place
    assert len(actual.report.deferred) == (row.deferred(2) if in_place else 0)
    if in_place:
        assert_deferred(actual, expected, row.tolerance)
    assert actual.compiled["graphs"] == row.graphs
    if row.mode not in ONE_CALL:
        assert actual.compiled == run(row, 2, "eager").compiled


@pytest.mark.parametrize("row", [marked(row, whole_step) for row in FAMILIES])
def test_one_layer_in_bf16(row):
    actual = run(row, 1, "liger_fx", torch.bfloat16)
    found = counts(actual)
    tables = [m for m in _built(row, 1, torch.bfloat16).modules() if isinstance(m, nn.Embedding)]
    assert found.pop("embedding") == len(tables)  # in fp32 they are left alone
    assert found == laws(row, layers=1)
    assert_same(actual, run_eagerly(row, 1, torch.bfloat16), HALF)


OWN_LAWS = [row for row in MODES if row.cells not in [family.cells for family in FAMILIES]]


@pytest.mark.slow  # all of them have been run with two layers
@pytest.mark.parametrize("row", [r for r in OWN_LAWS if r.mode is not second_length], ids=str)
def test_another_depth(row):
    depth = 3 if row.mode is per_layer else 1  # a graph serves all layers, of gemma2 every other
    assert counts(run(row, depth, "liger_fx")) == laws(row, depth)


def test_step_under_inductor(monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", "inductor")
    (row,) = (r for r in MODES if r.family == "llama3" and r.mode is checkpoint_inside)
    actual = run(row, 1, "liger_fx")
    assert counts(actual) == laws(row, layers=1)
    assert_same(actual, run_eagerly(row, 1), row.tolerance)


# What others have as well.
ALIKE = {"llama3", "llama3_1", "llama3_2", "mistral", "phi3", "phi4", "qwen2"}
ALIKE |= {"qwen2_5", "qwen2_5 (tied)", "Gemma2"} | HEAD_OF_LLAMA - {"Qwen3", "GLM", "OLMo 2"}


def test_what_auto_decides_on_a_gpu(monkeypatch):
    """By the table that is shipped: a change of the policy alone may not change a line of this."""
    # Graphs of a CPU, since a GPU has no kernel that groups queries in fp32.
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", "cpu")
    for name, value in dict(POLICY="auto", INNER="inductor").items():
        monkeypatch.setenv(f"LIGER_FX_{name}", value)
    monkeypatch.setattr(liger_fx.dynamo, "device_of", lambda gm: torch.device("meta"))
    monkeypatch.setattr(liger_fx.policy, "BUSY", 0.0)  # as for models of their real sizes
    monkeypatch.setattr(liger_fx.inner, "compile_rewritten", lambda gm, *_: gm.forward)
    decided: dict[str, list[str]] = {}
    for row in FAMILIES:
        if row.family in ALIKE:
            continue
        found = run(row, 2, "liger_fx").report.counts
        made = ", ".join(f"{name} {n}" for name, n in sorted(found.items()))
        decided.setdefault(made or "nothing", []).append(row.family)
    assert_expected_inline(
        "\n".join(f"{made}: {', '.join(families)}" for made, families in decided.items()),
        """\
attention 2, linear_cross_entropy 1, rope 4: llama2, Llama, Qwen3, GLM, OLMo 2, Cohere, ModernBERT (decoder), nanochat, DeepSeek-V3, Qwen3-MoE, Llama 4 (text)
add_rms_norm 4, attention 2, linear_cross_entropy 1, rope 4: gemma, Gemma3 (text)
add_rms_norm 4, linear_cross_entropy 1, rope 4: gemma2
attention 4, rope 4: llama3_2_vision (decoder)
nothing: t5 (encoder), clip (text)
linear_cross_entropy 1, rope 4: GPT-OSS""",
    )


def test_every_rewrite_has_a_cell_in_every_row():
    for row in ROWS:
        assert list(row.cells) == [rewrite.name for rewrite in DEFAULT], row
