"""Which rewrites are made: by the table of measurements, and by measuring."""

from __future__ import annotations

import contextlib
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
from liger_fx.policy import Entry, Measurement, Row, own_path, pays

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


BUSY = policy.BUSY


@pytest.fixture(autouse=True)
def no_graph_is_small(monkeypatch):
    monkeypatch.setattr(policy, "BUSY", 0.0)


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
add_rms_norm: auto: not measured on sm90 or a GPU like it; policy='measure' measures it here [not on a GPU: decided as on sm90]
add_rms_norm: auto: not measured on sm90 or a GPU like it; policy='measure' measures it here [not on a GPU: decided as on sm90]
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
        """auto: not measured on sm90 or a GPU like it; policy='measure' measures it here [not on a GPU: decided as on sm90]""",
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


def test_lora_is_measured_apart(monkeypatch):
    """No row of a whole MLP's training decides about an MLP with adapters, nor the other way."""
    monkeypatch.setenv("LIGER_FX_INNER", "inductor")

    def project(x, weight, a, b):
        return F.linear(x, weight) + 2.0 * F.linear(F.linear(x, a), b)

    def lora(x, weight, a, b):
        return project(F.silu(project(x, weight, a, b)) * F.linear(x, weight), weight, a, b)

    def plain(x, weight, a, b):
        return F.linear(F.silu(F.linear(x, weight)) * F.linear(x, weight), weight)

    def made(*row):
        with table((*row, "inductor", False, 1.1, 1.0)):
            reports = [explained(f, [(N, H), (H, H), (2, H), (H, 2)]) for f in (lora, plain)]
        return [report.counts.get("tiled_mlp", 0) for report in reports]

    assert made("tiled_mlp:swiglu") == [0, 1]
    assert made("tiled_mlp:swiglu, LoRA") == [1, 0]
    assert made("tiled_mlp:geglu, LoRA") == [1, 0]


# -- small graphs ----------------------------------------------------------------------------------


LARGE = [(16_384, 2048), (2048,), (2048, 2048), (2048, 2048)]  # 137 GFLOP a product
SMALL = [(4096, 2048), *LARGE[1:]]  # 34


def wide_layer(x, weight, gate, up):
    x = x + torch.rms_norm(x + 1.0, weight.shape, weight, 1e-6)
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def wide_checkpoint(*args):
    return checkpoint(wide_layer, *args, use_reentrant=False)


@pytest.fixture
def all_pay(monkeypatch):
    monkeypatch.setattr(policy, "BUSY", BUSY)
    monkeypatch.setenv("LIGER_FX_INNER", "inductor")
    with table(*(("rms_norm", "inductor", inside, 1.1, 1.0) for inside in (False, True))):
        yield


@pytest.mark.parametrize("function", [wide_layer, wide_checkpoint])
def test_in_a_small_graph_nothing_pays(function, all_pay):
    assert explained(function, LARGE).counts == {"rms_norm": 1}
    report = explained(function, SMALL)
    assert report.counts == {}
    assert_expected_inline(
        evidence(report, "rms_norm"),
        """auto: products of 34 GFLOP in the mean, below 53: an op takes more of the host's time than it saves of the GPU's""",
    )


def test_heads_are_fused_in_small_graphs(all_pay):
    def loss(x, w, y):
        return F.cross_entropy(F.linear(x, w).float(), y)

    with torch.device("meta"):
        x, w = (torch.empty(n, H, requires_grad=True) for n in (N, 9))
        given = x, w, torch.empty(N, dtype=torch.int64)
        assert liger_fx.explain(loss, given).counts == {"linear_cross_entropy": 1}


def test_without_inductor_an_op_is_fewer_launches(all_pay, monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", "aot_eager")
    with table(("rms_norm", "aot_eager", False, 1.1, 1.0)):
        assert explained(wide_layer, SMALL).counts == {"rms_norm": 1}


def test_options_decide_about_small_graphs(all_pay, monkeypatch):
    monkeypatch.setenv("LIGER_FX_POLICY", "rms_norm")
    assert explained(wide_layer, SMALL).counts == {"rms_norm": 1}


def test_a_graph_without_products_is_not_small(all_pay):
    def norm(x, weight):
        return x + torch.rms_norm(x * 2, weight.shape, weight, 1e-6)

    assert explained(norm, SMALL[:2]).counts == {"rms_norm": 1}


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: F.linear(input=x, weight=w),
        lambda x, w: x @ w,
        lambda x, w: x.mm(w),
        lambda x, w: torch.addmm(x, x, w),
        lambda x, w: (x[None] @ w)[0],
        lambda x, w: torch.bmm(x[None], w[None])[0],
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_flops_of_a_product(product, dynamic):
    found = []

    def see(gm, _):
        found.append(policy._mean_product(gm))
        return gm.forward

    torch.compile(product, backend=see, dynamic=dynamic)(torch.randn(6, 4), torch.randn(4, 4))
    assert found == [2 * 6 * 4 * 4]


def test_adapters_do_not_make_a_graph_small(all_pay):
    def adapted(x, weight, gate, up, *adapters):
        for a, b in zip(adapters[::2], adapters[1::2], strict=True):
            gate = gate + b @ a
            x = x + F.linear(F.linear(x, a), b)
        return wide_layer(x, weight, gate, up)

    adapters = 4 * [(16, 2048), (2048, 16)]
    assert explained(adapted, LARGE + adapters).counts == {"rms_norm": 1}
    assert explained(adapted, SMALL + adapters).counts == {}


def test_the_head_does_not_make_a_graph_large(all_pay):
    def step(x, head, *layer):
        return wide_layer(x, *layer) @ head

    head = (2048, 128_256)
    assert explained(step, [LARGE[0], head, *LARGE[1:]]).counts == {"rms_norm": 1}
    assert explained(step, [SMALL[0], head, *SMALL[1:]]).counts == {}


def test_what_is_measured_without_layers_is_made_in_small_graphs(all_pay):
    """A table or a loss is one a step, whatever its layers are."""

    def embed(indices, weight, projection):
        return F.linear(F.embedding(indices, weight), projection)

    with torch.device("meta"):
        rows = torch.empty(50, H, dtype=torch.bfloat16, requires_grad=True)
        given = torch.empty(N, dtype=torch.int64), rows, torch.empty(H, H, dtype=torch.bfloat16)
    with table(("embedding", "inductor", False, 1.0, 0.9, "embedding")):
        assert liger_fx.explain(embed, given).counts == {"embedding": 1}


@pytest.mark.parametrize(("multiprocessors", "small"), [(132, True), (58, False)])
def test_a_gpu_of_fewer_multiprocessors_is_busy_with_less(multiprocessors, small, all_pay):
    with (
        on("sm89"),
        mock.patch.object(policy, "multiprocessors", lambda device: multiprocessors),
        mock.patch.object(policy, "device_of", lambda gm: torch.device("cuda", 0)),
        mock.patch.object(policy, "_mean_product", lambda gm: 34e9),
    ):
        assert bool(policy.too_small(mock.Mock())) is small


# -- another architecture --------------------------------------------------------------------------


@contextlib.contextmanager
def on(architecture):
    """A GPU is there, of this architecture."""
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch.object(policy, "architecture_of", lambda device: architecture),
    ):
        yield


def judged(architecture, name="rms_norm", spelling="torchtune", inner="inductor", own=None):
    with on(architecture):
        judge = policy.by_table(torch.device("cuda", 0), inner, "layers", own)
        (rewrite,) = (r for r in DEFAULT if r.name == name)
        return judge(rewrite, mock.Mock(recomputed=False, spelling=spelling))


@pytest.mark.parametrize("architecture", ["sm80", "sm86", "sm89", "sm100", "sm120"])
def test_an_architecture_without_rows_is_decided_as_the_nearest(architecture):
    with table(("rms_norm", "inductor", False, 1.02, 1.0)):
        pays_here, why = judged(architecture)
    assert pays_here
    assert why == (
        f"not measured on {architecture} (policy='measure' does), decided as on sm90 with a margin "
        "of 0.02: 1.020x the speed at worst (Llama, layers, sm90, 2026-11-24)"
    )


@pytest.mark.parametrize(
    ("speed", "memory", "there", "elsewhere"),
    [
        (1.02, 1.0, True, True),
        (1.01, 1.0, True, False),
        (0.995, 1.0, True, False),
        (1.001, 0.9, True, True),
        (0.99, 0.5, True, False),
    ],
)
def test_rows_of_another_architecture_need_a_margin(speed, memory, there, elsewhere):
    with table(("rms_norm", "inductor", False, speed, memory)):
        assert judged("sm90")[0] is there
        pays_elsewhere, why = judged("sm80")
    assert pays_elsewhere is elsewhere
    assert ("of the memory" in why) == (memory <= 0.9)


@pytest.mark.parametrize(
    ("architecture", "measured"),
    [
        ("sm75", "sm90"),  # Triton takes 8.0
        ("sm90", "sm75"),
        ("gfx942", "sm90"),
        ("sm90", "gfx942"),
        ("gfx1100", "gfx942"),  # wavefronts of 32 and of 64
    ],
)
def test_what_says_nothing_of_an_architecture(architecture, measured):
    with table(("rms_norm", "inductor", False, 2.0, 0.1), architecture=measured):
        assert judged(architecture) == (
            False,
            f"not measured on {architecture} or a GPU like it; policy='measure' measures it here",
        )


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [("sm86", "sm80"), ("sm89", "sm80"), ("sm100", "sm90"), ("sm121", "sm120"), ("sm90", "sm90")],
)
def test_the_nearest_is_of_the_same_generation(architecture, nearest):
    rows = {name: row("rms_norm", "torchtune", 1.1) for name in ("sm90", "sm120", "sm80")}
    with mock.patch.object(policy, "table", lambda: {a: entry(r) for a, r in rows.items()}):
        assert f"layers, {nearest}," in judged(architecture)[1]


def test_a_rewrite_without_rows_on_the_nearest_is_decided_by_the_next():
    own = {"sm80": entry(row("swiglu", "separate", 1.1))}
    with table(("rms_norm", "inductor", False, 1.1, 1.0)):
        assert judged("sm86", own=own)[1].startswith("not measured on sm86")
        assert "as on sm90" in judged("sm86", own=own)[1]
        assert "as on sm80" in judged("sm86", "swiglu", "separate", own=own)[1]


# -- a table of the user's own ---------------------------------------------------------------------


def row(rewrite, spelling, speed):
    return Row(speed, 1.0, rewrite, spelling, "inductor", False, "Llama", "layers")


def entry(*rows):
    return Entry("a machine", "torch 2", "2026-11-27", ["a command"], rows)


def test_the_users_own_table_decides_before_the_shipped_one():
    own = {"sm90": entry(row("rms_norm", "torchtune", 0.9))}
    with table(
        ("rms_norm:torchtune", "inductor", False, 1.1, 1.0),
        ("rms_norm:gemma", "inductor", False, 1.1, 1.0),
    ):
        assert judged("sm90", own=own) == (
            False,
            "0.900x the speed at worst (Llama, layers, your own table, sm90, 2026-11-27)",
        )
        assert judged("sm90", spelling="gemma", own=own)[0], "measured in its own spelling"
        assert not judged("sm90", spelling="olmo", own=own)[0]
        assert not judged("sm80", own=own)[0]


OWN = {
    "machine": "NVIDIA L4",
    "versions": "torch 2.13.0",
    "date": "2026-11-27",
    "commands": ["python -m liger_fx measure --write"],
    "rows": [
        {"speeds": [1.2, 0.9, 1.1], "memory": None, "form": "layers", "checkpoint": False}
        | {"rewrite": name, "spelling": spelling, "inner": "eager", "model": "Llama-3.2-1B"}
        for name, spelling in (("rms_norm", "torch_module"), ("swiglu", "separate"))
    ],
}


@pytest.fixture(params=["option", "variable", "cache"])
def own_file(request, tmp_path, monkeypatch):
    """Where a table of the user's own may be."""
    monkeypatch.setenv("LIGER_FX_INNER", "eager")
    file = tmp_path / "own.json"
    if request.param == "cache":
        monkeypatch.setattr(policy, "own_path", lambda: file)
    if request.param == "variable":
        monkeypatch.setenv("LIGER_FX_TABLE", str(file))
    return file, {"table": str(file)} if request.param == "option" else {}


def explained_with(options):
    with torch.device("meta"):
        arguments = [torch.empty(s, requires_grad=True) for s in SHAPES]
    return liger_fx.explain(layer, arguments, options=options)


def test_a_table_of_the_users_own_is_read(own_file):
    file, options = own_file
    file.write_text(json.dumps({"sm90": OWN}))
    report = explained_with(options)
    assert report.counts == {"rms_norm": 1, "swiglu": 1}
    assert evidence(report, "swiglu") == (
        "auto: 1.100x the speed at worst (Llama-3.2-1B, layers, your own table, sm90, 2026-11-27) "
        "[not on a GPU: decided as on sm90]"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        json.dumps({"sm90": {"rows": []}}),
        json.dumps({"sm90": OWN | {"rows": [{"speeds": [1.0]}]}}),
        json.dumps({"sm90": OWN | {"rows": [OWN["rows"][0] | {"speeds": []}]}}),
        json.dumps({"sm90": OWN | {"rows": [OWN["rows"][0] | {"speeds": ["fast"]}]}}),
        json.dumps({"sm90": OWN | {"rows": [OWN["rows"][0] | {"memory": "little"}]}}),
        json.dumps({"RTX 4090": OWN}),
    ],
)
def test_a_broken_table_of_the_users_own(own_file, text):
    file, options = own_file
    file.write_text(text)
    with pytest.raises(ValueError) as raised:
        explained_with(options)
    name = re.escape(str(file))
    assert re.fullmatch(
        rf"{name} cannot be read as a table of measurements \(.+\): make it anew with `python -m "
        rf"liger_fx measure --write {name}`, or (leave out the option `table`|delete it)",
        str(raised.value),
    )
    assert liger_fx.backend(policy="all", **options), "decides nothing there"


def test_the_users_cache_directory(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/a/cache")
    assert str(own_path()) == "/a/cache/liger_fx/measured.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(own_path()) == "/home/somebody/.cache/liger_fx/measured.json"


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"gone.json cannot be read .*FileNotFoundError"):
        liger_fx.backend(table=str(tmp_path / "gone.json"))
    assert liger_fx.backend(table="").own_table == {}


def test_the_compiler_gives_the_error_of_a_broken_table(tmp_path):
    (tmp_path / "own.json").write_text("{")
    options = {"table": str(tmp_path / "own.json"), "inner": "eager"}
    with pytest.raises(Exception, match="cannot be read as a table of measurements"):
        torch.compile(layer, backend="liger_fx", options=options)(*tensors())


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
