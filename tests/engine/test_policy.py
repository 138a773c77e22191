"""Which rewrites are made: by the table of measurements, and by measuring."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from unittest import mock

import _norm_spellings
import pytest
import torch
import torch.nn.functional as F
from _util import CUDA, DEVICE, evidence
from expecttest import assert_expected_inline
from liger_fx.passes import DEFAULT
from torch.utils.checkpoint import checkpoint

import liger_fx
import liger_fx.inner
import liger_fx.measure
from liger_fx import policy
from liger_fx.policy import Entry, Measurement, Row, pays

N, H = 12, 8
SHAPES = [(N, H), (H,), (H, H), (H, H)]


def layer(x, weight, gate, up):
    x = x + torch.rms_norm(x + 1.0, (H,), weight, 1e-6)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def checkpointed(*args):
    return checkpoint(layer, *args, use_reentrant=False)


def both(*args):
    """The same inside of a checkpoint and after it."""
    return layer(checkpointed(*args), *args[1:])


def tensors():
    return [torch.randn(shape, device=DEVICE).requires_grad_() for shape in SHAPES]


def explained(fn, arguments=SHAPES):
    with torch.device("meta"):  # stands for a GPU
        return liger_fx.explain(fn, [torch.empty(s, requires_grad=True) for s in arguments])


# -- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "worth_it"),
    [
        ([], False),
        ([(1.2, 1.5)], True),
        ([(0.995, None)], True),
        ([(0.994, None)], False),
        ([(1.1, 1.0), (0.99, 1.0)], False),  # the slowest decides
        ([(1.1, 0.9), (0.98, 1.0)], True),  # the most memory saved is worth 2 %
        ([(0.98, 0.91)], False),
        ([(1.1, 0.5), (0.979, 0.5)], False),
    ],
)
def test_rule(measured, worth_it):
    assert pays([Measurement(*numbers) for numbers in measured]) is worth_it


# -- auto ------------------------------------------------------------------------------------------


def table(*rows, architecture=policy.DEFAULT_ARCHITECTURE):
    """rows: (rewrite, inner, checkpoint, speed, memory), and a form other than "layers"; the
    spelling after a colon."""
    made = [
        Row(speed, memory, name, spelling, inner, inside, "Llama", *(form or ["layers"]))
        for named, inner, inside, speed, memory, *form in rows
        for name, _, spelling in [named.partition(":")]
    ]
    entry = Entry("a machine", "torch 2", "2026-11-24", "a command", made)
    return mock.patch.object(policy, "table", lambda: {architecture: entry})


@pytest.fixture
def both_forms_measured(monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", "inductor")
    with table(
        ("rms_norm", "inductor", True, 0.97, 1.0),
        ("rms_norm", "inductor", False, 1.02, 1.0),
        ("rms_norm", "eager", False, 0.5, 1.0),
        ("rms_norm", "aot_eager", False, 1.2, 1.0),
        ("swiglu", "inductor", True, 0.993, 0.85),
        ("swiglu", "inductor", False, 0.993, 1.01),
    ):
        yield


def test_inside_or_outside_of_checkpoints(both_forms_measured):
    report = explained(both)
    assert report.counts == {"rms_norm": 1, "swiglu": 1}
    assert explained(layer).counts == {"rms_norm": 1}
    assert explained(checkpointed).counts == {"swiglu": 1}
    made = [f"{r.rewrite}: {r.worth}" for r in report.replacements]
    refused = [f"{r.rewrite}: {r.reason}" for r in report.rejections]
    assert_expected_inline(
        "\n".join([*made, *refused]),
        """\
rms_norm: auto: 1.020x the speed at worst (Llama, layers, sm90, 2026-11-24) [not on a GPU: decided as on sm90]
swiglu: auto: 0.993x the speed at worst (Llama, layers, in a checkpoint, sm90, 2026-11-24), 0.85 of the memory at best (Llama, layers) [not on a GPU: decided as on sm90]
add_rms_norm: auto: not measured on sm90; policy='measure' measures it on this GPU [not on a GPU: decided as on sm90]
add_rms_norm: auto: not measured on sm90; policy='measure' measures it on this GPU [not on a GPU: decided as on sm90]
rms_norm: auto: 0.970x the speed at worst (Llama, layers, in a checkpoint, sm90, 2026-11-24) [not on a GPU: decided as on sm90]
swiglu: auto: 0.993x the speed at worst (Llama, layers, sm90, 2026-11-24) [not on a GPU: decided as on sm90]""",
    )


def test_the_table_is_kept_by_compiler(both_forms_measured, monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", "aot_eager")
    assert explained(layer).counts == {"rms_norm": 1}
    monkeypatch.setenv("LIGER_FX_INNER", "eager")
    report = explained(layer)
    assert report.counts == {}
    assert_expected_inline(
        evidence(report, "rms_norm"),
        """auto: 0.500x the speed at worst (Llama, layers, sm90, 2026-11-24) [not on a GPU: decided as on sm90]""",
    )
    assert_expected_inline(
        evidence(report, "swiglu"),
        """auto: not measured on sm90; policy='measure' measures it on this GPU [not on a GPU: decided as on sm90]""",
    )


def test_the_table_is_kept_by_spelling(monkeypatch):
    """What was not measured in its own spelling is as slow as the slowest."""
    monkeypatch.setenv("LIGER_FX_INNER", "inductor")
    torchtune, gemma, huggingface = (
        lambda x, weight, norm=norm: x + norm((x * 2).bfloat16(), weight)
        for norm in (
            _norm_spellings.torchtune,
            _norm_spellings.torchtune_gemma,
            _norm_spellings.huggingface,
        )
    )
    functions = torchtune, gemma, huggingface, lambda *x: torchtune(*x) + gemma(*x), torch.add
    with table(
        ("rms_norm:torchtune", "inductor", False, 1.1, 1.0),
        ("rms_norm:gemma", "inductor", False, 0.9, 1.0),
    ):
        reports = [explained(function, [(N, H), (H,)]) for function in functions]
    assert [report.counts.get("rms_norm", 0) for report in reports] == [1, 0, 0, 1, 0]
    assert reports[1].near_misses == []
    assert_expected_inline(
        "\n".join(evidence(report, "rms_norm") for report in reports[:-1]),
        """\
auto: 1.100x the speed at worst (Llama, layers, sm90, 2026-11-24) [not on a GPU: decided as on sm90]
auto: 0.900x the speed at worst (Llama, layers, sm90, 2026-11-24) [not on a GPU: decided as on sm90]
auto: 0.900x the speed at worst (Llama, layers, sm90, 2026-11-24) [not on a GPU: decided as on sm90]
auto: 1.100x the speed at worst (Llama, layers, sm90, 2026-11-24) [not on a GPU: decided as on sm90]""",
    )


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.RMSNorm(H)

    def forward(self, x):
        return x + self.norm(x * 2)


@pytest.mark.parametrize(("layers", "count"), [(1, 0), (2, 2)])
def test_the_table_is_kept_by_form(layers, count, monkeypatch):
    """A graph of several layers is a step."""
    monkeypatch.setenv("LIGER_FX_INNER", "inductor")
    with table(
        ("rms_norm", "inductor", False, 0.9, 1.0),
        ("rms_norm", "inductor", False, 1.1, 1.0, "step"),
    ):
        stack = torch.nn.Sequential(*(Normed() for _ in range(layers))).to("meta")
        report = explained(stack, [(N, H)])
    assert report.counts.get("rms_norm", 0) == count
    assert ("step" if count else "layers") in evidence(report, "rms_norm")


def test_an_architecture_without_measurements():
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
        mock.patch("torch.version.hip", None),
    ):
        judge = policy.by_table(torch.device("cuda", 0), "inductor", "layers")
        (swiglu,) = (r for r in DEFAULT if r.name == "swiglu")
        match = mock.Mock(recomputed=False)
        match.pattern.name = "separate"
        pays_here, why = judge(swiglu, match)
    assert not pays_here
    assert_expected_inline(
        why, """not measured on sm80; policy='measure' measures it on this GPU"""
    )


@pytest.mark.skipif(CUDA, reason="about CPUs")
def test_on_a_cpu_only_what_always_gains():
    torch.compile(layer, backend="liger_fx", options={"inner": "eager"})(*tensors())
    report = liger_fx.reports()[-1]
    assert report.counts == {}
    assert_expected_inline(
        evidence(report, "swiglu"),
        """auto: not measured on a CPU; policy='measure' measures it on this one""",
    )


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_the_table_that_is_shipped(inner, monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", inner)
    known = {rewrite.name: rewrite for rewrite in DEFAULT}
    for entry in policy.table().values():
        assert all(row.rewrite in known and not known[row.rewrite].gain for row in entry.rows)
    report = explained(both)
    for name in ("rms_norm", "swiglu"):
        assert evidence(report, name).startswith("auto: ")


# -- measure ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is remembered yet. What Inductor keeps beside it, compiled headers, takes long."""
    monkeypatch.setattr(liger_fx.measure, "cache_dir", lambda: str(tmp_path))
    return tmp_path / "liger_fx"


@pytest.fixture
def compiles():
    """Counts the calls of the inner compiler."""
    inner = liger_fx.inner.compile_rewritten
    with mock.patch.object(liger_fx.inner, "compile_rewritten", side_effect=inner) as counted:
        yield counted


def measured(fn, *args, inner="eager", **options):
    torch._dynamo.reset()
    options = {"policy": "measure", "inner": inner, **options}
    value = torch.compile(fn, backend="liger_fx", options=options)(*args)
    return value, liger_fx.reports()[-1]


@pytest.mark.parametrize(
    ("inner", "fn"),
    [
        ("eager", layer),
        ("eager", checkpointed),
        ("aot_eager", checkpointed),
        ("inductor", layer),
    ],
)
def test_measures_once_and_remembers(inner, fn, compiles, cache):
    args = tensors()
    value, report = measured(fn, *args, inner=inner, strict=True)
    torch.testing.assert_close(value, fn(*args))
    assert compiles.call_count == 4, "without, with rms_norm, with swiglu; the graph itself"
    (remembered,) = cache.iterdir()
    assert json.loads(remembered.read_text()).keys() == {"rms_norm", "swiglu"}
    for name in ("rms_norm", "swiglu"):
        assert re.match(r"measure: \d\.\d{3}x the speed", evidence(report, name))
    assert report.why_not("add_rms_norm")

    _, again = measured(fn, *args, inner=inner, strict=True)
    assert compiles.call_count == 5, "the graph itself"
    assert again.rejections == report.rejections
    assert again.replacements == report.replacements


def test_what_is_measured_decides(cache):
    measured(layer, *tensors())
    (remembered,) = cache.iterdir()
    fast, slow = {"speed": 1.25, "memory": 1.0}, {"speed": 0.8, "memory": None}
    remembered.write_text(json.dumps({"rms_norm": fast, "swiglu": slow}))
    _, report = measured(layer, *tensors())
    assert report.counts == {"rms_norm": 1}
    machine = "GPU" if CUDA else "CPU"
    assert evidence(report, "rms_norm") == (
        f"measure: 1.250x the speed, 1.00 of the memory, on this {machine}"
    )
    assert evidence(report, "swiglu") == f"measure: 0.800x the speed, on this {machine}"


def test_another_shape_setting_or_compiler_is_another_question(cache):
    wider = [torch.randn(s, device=DEVICE) for s in [(2 * N, H), *SHAPES[1:]]]
    for i, (args, options) in enumerate(
        [
            (tensors(), {}),
            (wider, {}),
            (tensors(), {"linear_cross_entropy.chunk_tokens": 4}),
            (tensors(), {"disable": ["swiglu"]}),
            (tensors(), {"inner": "aot_eager"}),
        ],
        start=1,
    ):
        measured(layer, *args, **options)
        assert len(list(cache.iterdir())) == i


SCRIPT = """
import sys, torch
sys.path[:0] = {path!r}
from test_policy import layer, liger_fx, tensors
f = torch.compile(layer, backend="liger_fx", options=dict(policy="measure", inner="eager"))
f(*tensors())
print(liger_fx.reports()[-1].to_json())
"""


def test_another_process_reads_the_answer(cache):
    _, report = measured(layer, *tensors())
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(path=sys.path)],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache.parent)},
        capture_output=True,
        text=True,
    )
    there = json.loads(run.stdout[run.stdout.index("{") :])
    assert [made["worth"] for made in there["replacements"]] == [
        made.worth for made in report.replacements
    ]
    assert len(list(cache.iterdir())) == 1


def test_a_graph_without_rewrites_is_not_compiled_twice(compiles):
    measured(torch.sin, tensors()[0])
    assert compiles.call_count == 1


def counts_calls(x, weight, gate, up, counter, cache):
    """Like a layer that generates: writes to its cache at a position that goes on."""
    counter.add_(1)
    cache[counter] = layer(x, weight, gate, up)[0]
    return cache.sum()


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inputs_are_written_to_once(inner):
    args = [*(t.detach() for t in tensors())]
    counter, cache = torch.zeros(1, dtype=torch.long, device=DEVICE), torch.zeros(3, H).to(DEVICE)
    _, report = measured(counts_calls, *args, counter, cache, inner=inner, strict=True)
    assert "the speed" in evidence(report, "swiglu")
    assert counter.item() == 1 and cache[1].any() and not cache[2].any()


def test_gradients_are_left_alone():
    args = tensors()
    gradient = torch.ones_like(args[1])
    args[1].grad = gradient.clone()
    seen = []
    args[2].register_hook(seen.append)
    measured(layer, *args, strict=True)
    assert torch.equal(args[1].grad, gradient)
    assert seen == [] and all(arg.grad is None for arg in args if arg is not args[1])


def test_random_numbers_go_on():
    def drops(*args):
        return F.dropout(layer(*args), 0.5)

    args = tensors()
    torch.manual_seed(1)
    expected = drops(*args)
    torch.manual_seed(1)
    value, report = measured(drops, *args, strict=True)
    torch.testing.assert_close(value, expected)
    assert "the speed" in evidence(report, "swiglu")


def test_hooks_on_saved_tensors_see_the_call_only():
    packed = []

    def pack(x):
        packed.append(x)
        return x

    args = tensors()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _, report = measured(layer, *args, strict=True)
        assert "the speed" in evidence(report, "swiglu")
        first = len(packed)
        torch.compile(layer, backend="liger_fx", options={"policy": "measure", "inner": "eager"})(
            *args
        )
    assert 0 < first == len(packed) - first


def test_autocast_and_no_grad_are_as_in_the_call():
    states = []
    inner = liger_fx.inner.compile_rewritten

    def spy(gm, *rest):
        call = inner(gm, *rest)

        def watched(*args):
            states.append((torch.is_grad_enabled(), torch.is_autocast_enabled(DEVICE)))
            return call(*args)

        return watched

    with (
        mock.patch.object(liger_fx.inner, "compile_rewritten", spy),
        torch.no_grad(),
        torch.autocast(DEVICE, torch.bfloat16),
    ):
        _, report = measured(layer, *tensors(), strict=True)
    assert "the speed" in evidence(report, "swiglu")
    assert set(states) == {(False, True)} and len(states) > 10


def test_sizes_that_vary(cache):
    compiled = torch.compile(
        layer, backend="liger_fx", options={"policy": "measure", "inner": "aot_eager"}, dynamic=True
    )
    for rows in (N, N + 5):
        x, *weights = tensors()
        x = torch.randn(rows, H, device=DEVICE, requires_grad=True)
        torch.testing.assert_close(compiled(x, *weights), layer(x, *weights))
    (report,) = liger_fx.reports()
    assert "the speed" in evidence(report, "swiglu")
    assert len(list(cache.iterdir())) == 1


@pytest.fixture
def out_of_memory():
    failure = torch.OutOfMemoryError("CUDA out of memory\nand what to do about it")
    with mock.patch.object(liger_fx.measure._Bench, "compare", side_effect=failure):
        yield


def test_a_failure_leaves_it_to_the_table(out_of_memory, cache):
    args = tensors()
    value, report = measured(layer, *args)
    torch.testing.assert_close(value, layer(*args))
    assert not cache.exists()
    said = evidence(report, "swiglu")
    assert said.startswith("measure: not measured on a CPU")
    assert said.endswith(" [not measured here: OutOfMemoryError: CUDA out of memory]")


def test_strict_raises_the_failure(out_of_memory):
    with pytest.raises(Exception, match="CUDA out of memory"):
        measured(layer, *tensors(), strict=True)


def test_one_of_several_processes_takes_what_is_remembered(compiles):
    with mock.patch.object(liger_fx.measure, "_processes", return_value=2):
        _, alone = measured(layer, *tensors(), strict=True)
    assert compiles.call_count == 1
    said = "[not measured here: each of several processes could get an answer of its own]"
    assert evidence(alone, "swiglu").endswith(said)
    measured(layer, *tensors())
    with mock.patch.object(liger_fx.measure, "_processes", return_value=2):
        _, together = measured(layer, *tensors())
    assert "the speed" in evidence(together, "swiglu")


def test_explaining_measures_nothing(compiles, monkeypatch):
    monkeypatch.setenv("LIGER_FX_POLICY", "measure")
    monkeypatch.setenv("LIGER_FX_INNER", "eager")
    report = explained(layer)
    assert compiles.call_count == 0
    said = "[not measured here: nothing runs while a function is explained]"
    assert evidence(report, "swiglu").endswith(said)


def test_an_unknown_policy():
    with pytest.raises(Exception, match=r"no rewrite 'fastest'.*; or one of auto, measure, all"):
        torch.compile(layer, backend="liger_fx", options={"policy": "fastest"})(*tensors())
