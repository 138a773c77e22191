"""The backend as a user meets it: by name, its options, its reports, its failures."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _op_checks import no_compile_caches
from _util import DEVICE, evidence, words
from torch._dynamo.utils import counters

import liger_fx
import liger_fx.dynamo
import liger_fx.inner
from liger_fx.ops import library

H, V, N = 8, 13, 12


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.output = torch.nn.Linear(H, V, bias=False)

    def forward(self, h, y):
        return F.cross_entropy(self.output(torch.tanh(h)), y)


@pytest.fixture
def model():
    return Model().to(DEVICE)


@pytest.fixture
def args():
    return torch.randn(N, H, device=DEVICE), torch.randint(0, V, (N,), device=DEVICE)


def run_python(code, **environ):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environ, capture_output=True, text=True
    )


def test_the_name_alone_works_and_listing_imports_nothing():
    done = run_python(
        "import sys, torch._dynamo\n"
        "before = set(sys.modules)\n"
        "assert 'liger_fx' in torch._dynamo.list_backends()\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'liger_fx', 'liger_kernel'}, new\n"  # torch itself looks for triton
        "f = torch.compile(lambda x: x.sin() + 1, backend='liger_fx', options={'inner': 'eager'})\n"
        "print(f(torch.zeros(2)))\n"
        "assert 'liger_kernel' not in sys.modules\n"
    )
    assert done.stdout.strip() == "tensor([1., 1.])", done.stderr


@pytest.mark.skipif(DEVICE != "cpu", reason="the warning is about a missing GPU")
def test_without_a_gpu_one_warning():
    done = run_python(
        "import torch\n"
        "for k in range(3):\n"
        "    f = torch.compile(lambda x: x + k, backend='liger_fx', options={'inner': 'eager'})\n"
        "    f(torch.zeros(2))\n"
    )
    assert done.stderr.count("Liger's Triton kernels need a GPU") == 1, done.stderr


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_of_inductor(mode, model, args):
    expected = model(*args)
    expected.backward()
    gradient = model.output.weight.grad.clone()
    compiled = torch.compile(model, backend="liger_fx", mode=mode, fullgraph=True)
    for _ in range(4):  # CUDA graphs: a warm-up, a recording, two replays
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(*args)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(model.output.weight.grad, gradient)


def test_options_reach_the_op(model, args):
    options = {"linear_cross_entropy.chunk_tokens": 5, "inner": "eager"}
    with mock.patch.object(sys.modules["liger_fx.ops.linear_loss"], "run") as run:
        run.side_effect = RuntimeError("seen")
        with pytest.raises(RuntimeError, match="seen"):
            torch.compile(model, backend="liger_fx", options=options)(*args)
    assert run.call_args.kwargs["chunk_tokens"] == 5


def test_environment_variables_reach_the_backend(model, args, monkeypatch):
    monkeypatch.setenv("LIGER_FX_DISABLE", "linear_cross_entropy")
    monkeypatch.setenv("LIGER_FX_INNER", "eager")
    torch.compile(model, backend="liger_fx")(*args)
    assert evidence(liger_fx.reports()[-1], "linear_cross_entropy") == "disabled by option"


def test_unknown_options_are_errors(model, args):
    unknown = "^unknown option 'chunk_tokens'; liger_fx knows policy"
    with pytest.raises(ValueError, match=unknown):
        torch.compile(model, backend="liger_fx", options={"chunk_tokens": 5})(*args)
    with pytest.raises(ValueError, match=unknown):
        liger_fx.backend(chunk_tokens=5)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_options_that_cannot_apply_are_errors(inner, model, args, monkeypatch):
    cannot = f"^max_autotune.* are Inductor options, given .* by mode=, but inner='{inner}'"
    with pytest.raises(ValueError, match=cannot):
        liger_fx.backend(mode="max-autotune", inner=inner)
    monkeypatch.setenv("LIGER_FX_INNER", inner)
    with pytest.raises(ValueError, match=cannot):
        torch.compile(model, backend="liger_fx", mode="max-autotune")(*args)


@pytest.mark.parametrize(
    ("policy", "count"), [("auto", 1), ("all", 1), (["linear_cross_entropy"], 1), ([], 0)]
)
def test_policy(policy, count, model, args):
    torch.compile(model, backend="liger_fx", options={"policy": policy, "inner": "eager"})(*args)
    report = liger_fx.reports()[-1]
    assert report.counts.get("linear_cross_entropy", 0) == count
    said = {"auto": "auto: the logits never exist", "all": ""}
    expected = said.get(str(policy), "" if count else "not in the policy's list")
    assert evidence(report, "linear_cross_entropy") == expected


def test_rows_of_the_report_that_are_the_same_in_each_layer_are_one():
    norms = torch.nn.Sequential(*(torch.nn.RMSNorm(H, eps=1e-6) for _ in range(3)))
    options = {"policy": "all", "inner": "eager"}
    torch.compile(norms, backend="liger_fx", options=options)(torch.randn(N, H))
    (_, row, _) = str(liger_fx.reports()[-1]).splitlines()
    assert row.split(" at ")[0] == "  rms_norm      replaced  3 x spelling torchtune  [fn.*"


def test_report_as_text_and_json(model, args, caplog):
    with caplog.at_level(logging.INFO, "liger_fx"):
        torch.compile(model, backend="liger_fx", options={"inner": "eager"})(*args)
    report = liger_fx.reports()[-1]
    assert "linear_cross_entropy replaced spelling plain" in words(str(report))
    assert json.loads(report.to_json())["counts"] == {"linear_cross_entropy": 1}
    assert caplog.messages.count("linear_cross_entropy 1") == 1
    assert report.nodes > 5 and 0 < report.seconds < 5


def test_a_graph_break_is_reported_where_it_is():
    def fn(h, w, y):
        logits = h @ w.T
        torch._dynamo.graph_break()
        return F.cross_entropy(logits, y)

    liger_fx.clear_reports()
    given = torch.randn(N, H), torch.randn(V, H), torch.randint(0, V, (N,))
    torch.compile(fn, backend="liger_fx", options={"inner": "eager"})(*given)
    ((why, place),) = liger_fx.Report.merged(liger_fx.reports()).breaks
    assert why == "Call to `torch._dynamo.graph_break()`"
    assert place.source.startswith("test_backend.py:") and place.source.endswith(" in fn")
    assert f"graph  breaks    {why}  [{place}]" in str(liger_fx.reports()[0])


def test_counters_of_torch(model, args):
    counters.clear()
    torch.compile(model, backend="liger_fx", options={"inner": "eager"})(*args)
    assert counters["liger_fx"]["linear_cross_entropy"] == 1


def test_explain_runs_no_kernel(model, args):
    calls = mock.Mock(side_effect=AssertionError("a kernel ran"))
    with mock.patch.object(sys.modules["liger_fx.ops.linear_loss"], "run", calls):
        report = liger_fx.explain(model, args)
    assert report.counts == {"linear_cross_entropy": 1}
    assert liger_fx.reports() == [], "nothing was compiled"


def test_explain_on_meta_tensors_and_over_graph_breaks(args):
    def step(model, h, y):
        logits = model.output(h)
        torch._dynamo.graph_break()
        return F.cross_entropy(logits, y)

    report = liger_fx.explain(step, [Model().to("meta"), *(a.to("meta") for a in args)])
    assert report.counts == {}
    (miss,) = report.near_misses
    assert "an input of this graph: what computes it was traced elsewhere" in miss.reason


def test_require(model, args):
    def required():
        return {"require": ["linear_cross_entropy"], "inner": "eager"}

    torch.compile(model, backend="liger_fx", options=required())(*args)

    def reads_logits(h, y):
        logits = model.output(h)
        return F.cross_entropy(logits, y), logits.argmax(-1)

    missing = "^required but not made: linear_cross_entropy"
    with pytest.raises(liger_fx.RequirementError, match=missing):
        torch.compile(reads_logits, backend="liger_fx", options=required())(*args)
    with pytest.raises(liger_fx.RequirementError, match=missing):
        torch.compile(reads_logits, backend=liger_fx.backend(**required()))(*args)
    # A graph that holds nothing like it, one layer say, is no failure.
    torch.compile(torch.sin, backend="liger_fx", options=required())(args[0])


@pytest.mark.parametrize("fails", [False, True])
def test_a_note_on_the_program_costs_nothing_if_it_fails(fails, model, args):
    """As the note on torchtune does beside a version of torchtune that liger_fx does not know."""
    note = mock.Mock(side_effect=ImportError if fails else None, return_value="a note")
    entry = mock.Mock(load=lambda: note)
    entry.name = "torch"
    with mock.patch.object(liger_fx.dynamo, "entry_points", lambda group: [entry]):
        torch.compile(model, backend="liger_fx", options={"inner": "eager"})(*args)
    report = liger_fx.reports()[-1]
    assert report.counts == {"linear_cross_entropy": 1} and report.rejections == []
    assert report.note == (None if fails else "a note")


def test_graphs_breaks_and_recompiles_are_those_of_any_backend(monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", "eager")

    def step(h, w, y):
        h = h.sin()
        torch._dynamo.graph_break()
        return F.cross_entropy(F.linear(h, w), y)

    counts = {}
    for backend in ("eager", "liger_fx"):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(step, backend=backend)
        for n in (5, 7, 9, 11):
            compiled(torch.randn(n, H), torch.randn(V, H), torch.randint(0, V, (n,)))
        counts[backend] = (
            counters["stats"]["unique_graphs"],
            sum(counters["graph_break"].values()),
        )
    assert counts["eager"] == counts["liger_fx"]


def test_one_compile_serves_all_layers():  # A39
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(H, H)

        def forward(self, h):
            return h + self.linear(h).sin()

    layers = torch.nn.ModuleList(Block() for _ in range(32))
    for layer in layers:
        layer.compile(backend="liger_fx", options={"inner": "eager"})
    h = torch.randn(N, H, requires_grad=True)
    for layer in layers:
        h = layer(h)
    assert len(liger_fx.reports()) == 1


CACHE_SCRIPT = """
import torch, torch.nn.functional as F, liger_fx.inner
from torch._dynamo.utils import counters

def hits(**options):
    torch._dynamo.reset()
    counters.clear()
    w = torch.ones(13, 8, requires_grad=True)
    loss = lambda h, y: F.cross_entropy(F.linear(h, w), y)
    f = torch.compile(loss, backend="liger_fx", options=options)
    f(torch.ones(12, 8), torch.zeros(12, dtype=torch.long)).backward()
    print(counters["aot_autograd"]["autograd_cache_hit"])

hits()
hits(**{"linear_cross_entropy.chunk_tokens": 4})
liger_fx.inner._FINGERPRINT = "another version"
hits()
"""


def test_compile_caches_hit_and_miss(tmp_path):  # A33, A34
    def runs(script):
        done = run_python(script, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        return done.stdout.split() or done.stderr

    assert runs(CACHE_SCRIPT) == ["0", "0", "0"], "each is compiled"
    assert runs(CACHE_SCRIPT) == ["1", "1", "1"], "another process finds them"


def test_inductor_is_told_how_to_lower_the_kernels(model, args, monkeypatch):
    """Where Inductor finds out by itself, torch 2.11 spells out all that an operator's arguments
    were computed from: a decoder without checkpoints does not get compiled in any time."""
    from torch._inductor import graph, lowering

    for op in library.kernels:
        monkeypatch.delitem(lowering.lowerings, op, raising=False)
    found_out = mock.Mock(wraps=lowering.make_fallback)
    monkeypatch.setattr(graph, "make_fallback", found_out)
    with no_compile_caches():
        torch.compile(model, backend="liger_fx")(*args).backward()
    assert torch.ops.liger_fx.linear_loss_kernel.default in lowering.lowerings
    assert not found_out.called


CHECKPOINT_SCRIPT = """
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

def attend(x):
    return F.scaled_dot_product_attention(x, x, x, is_causal=True).sin()

f = torch.compile(lambda x: checkpoint(attend, x, use_reentrant=False), backend="liger_fx")
torch.manual_seed(0)
x = torch.randn(1, 2, 64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
f(x).sum().backward()
expected, = torch.autograd.grad(attend(x).sum(), x)
torch.testing.assert_close(x.grad, expected, rtol=0.02, atol=0.01)  # Inductor rounds less often
print(*(counters["inductor"]["fxgraph_cache_" + what] for what in ("hit", "miss", "bypass")))
"""


@pytest.mark.gpu
def test_attention_in_a_checkpoint_is_cached(tmp_path):
    def run():
        done = run_python(CHECKPOINT_SCRIPT, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        return done.stdout.split() or done.stderr

    assert (run(), run()) == (["0", "2", "0"], ["2", "0", "0"])


@pytest.mark.parametrize(
    ("cacheable", "patches", "graphsafe"),
    [(False, {}, False), (False, {"triton.cudagraphs": True}, True), (True, {}, True)],
)
def test_which_random_state_is_kept(cacheable, patches, graphsafe):
    operator = torch._prims.rng_prims.graphsafe_run_with_rng_state
    with (
        mock.patch.object(operator, "_cacheable", cacheable),
        liger_fx.inner._cacheable_random_state(patches),
    ):
        assert torch._functorch.config.graphsafe_rng_functionalization == graphsafe


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_graph_obeys_the_memory_budget_of_torch(inner):
    torch.manual_seed(0)
    x = torch.randn(64, 32, device=DEVICE, requires_grad=True)
    weights = [torch.randn(3, 64, 32, device=DEVICE, requires_grad=True) for _ in range(2)]

    def layers(x, *weights):
        for gate, up, down in weights:
            x = x + (F.silu(x @ gate.T) * (x @ up.T)) @ down
        return x

    def bytes_and_gradients(budget):
        torch._dynamo.reset()
        options = {"policy": ["swiglu"], "inner": inner, "require": "swiglu"}
        compiled = torch.compile(layers, backend="liger_fx", options=options)
        kept = []

        def pack(tensor):
            kept.append(tensor.nbytes)
            return tensor

        with (
            torch._functorch.config.patch(activation_memory_budget=budget),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            total = compiled(x, *weights).sum()
        return sum(kept), torch.autograd.grad(total, [x, *weights])

    (all_bytes, expected), (fewer, found) = map(bytes_and_gradients, (1.0, 0.3))
    assert fewer < all_bytes
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
