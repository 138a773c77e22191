"""`liger_fx.huggingface.compile`: equal layers are compiled once, and nothing else changes."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _util import relative_error
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import liger_fx
from liger_fx import deferred
from liger_fx import offload as module_of_offload
from liger_fx.deferred import materialized
from liger_fx.offload import Offload

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from _trainer import language_model  # noqa: E402
from test_huggingface import (  # noqa: E402
    CASES,
    EVALUATIONS,
    OPTIONS,
    OwnLoss,
    Penalty,
    ZLoss,
    likelihood,
    run,
)
from test_masks_huggingface import BATCH, SEQ, SMALL, WINDOW, batch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from liger_fx import huggingface  # noqa: E402
from liger_fx.huggingface import compile as by_layers  # noqa: E402

integrations = pytest.mark.integrations
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[0])
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": dict(sliding_window=WINDOW),
    "gemma3_text": dict(
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "qwen3_moe": MOE,
    "gpt2": dict(n_embd=32, n_head=4, n_layer=4, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0),
    "olmo2": {},
    "opt": dict(ffn_dim=32, word_embed_proj_dim=32, dropout=0.0),
}
TWO_FORMS = {"gemma2", "gemma3_text", "qwen3_moe"}


def build(name: str = "llama", checkpoints: bool | None = None, **settings: Any) -> Any:
    """checkpoints: whether they are reentrant, None for none."""
    torch.manual_seed(0)
    sizes = SMALL | dict(num_hidden_layers=4) | MODELS.get(name, {}) | settings
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).train()
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    return model


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    liger_fx.clear_reports()
    counters.clear()
    return by_layers(model, **OPTIONS | options)


def gradients(model: nn.Module, given: dict[str, Any], bf16: bool = False) -> dict[str, Tensor]:
    """And the loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**given).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        if value.norm() > 1e-5 * largest:  # a gradient that is no sum of rounding errors
            assert relative_error(actual[name], value) <= tolerance, name


def cases():
    """Llama's all; of the others the rest are slow ones, since what differs lies in the layers."""
    kinds = {"": None, "checkpoints": False, "reentrant": True}
    for name, mode, kind in itertools.product(MODELS, ["without", "padded", "packed"], kinds):
        quick = name == "llama" or (mode, kind) in (("without", ""), ("padded", "checkpoints"))
        marks = [] if quick else [pytest.mark.slow]
        yield pytest.param(name, mode, kinds[kind], marks=marks, id=f"{name}-{mode}-{kind}")


@pytest.mark.parametrize(("name", "mode", "checkpoints"), cases())
def test_equals_eager_in_one_graph_a_form(name, mode, checkpoints):
    given, before = batch(mode), materialized()
    actual = gradients(compiled(build(name, checkpoints)), given)
    assert_equal(actual, gradients(build(name, checkpoints), given), 1e-5)
    head, *layers, norm = liger_fx.reports()
    assert len(layers) == 1 + (name in TWO_FORMS)
    assert sum(len(report.modules) for report in layers) == 4 and len(norm.modules) == 1
    assert counters["stats"]["unique_graphs"] == 1 + len(layers) and not counters["graph_break"]
    assert head.deferred and materialized() == before


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma2", dict(final_logit_softcapping=2.0)),
        ("cohere", dict(logit_scale=0.25)),
        ("granite", dict(logits_scaling=4.0)),
    ],
)
def test_heads_that_scale_or_cap_are_fused(name, settings, monkeypatch):
    given, before = batch("padded"), materialized()
    expected = gradients(build(name, **settings), given)
    monkeypatch.setattr(deferred, "_by_recomputing", None)
    actual = gradients(compiled(build(name, **settings)), given)
    assert_equal(actual, expected, 1e-5)
    assert materialized() == before


@pytest.mark.parametrize(
    "checkpoints",
    [pytest.param(None, marks=pytest.mark.slow), False],
    ids=["", "checkpoints"],
)
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_autocast(name, checkpoints):
    """No less exact than the whole model in one graph."""
    given = batch("padded")
    exact = gradients(build(name).double(), given)
    layers = gradients(compiled(build(name, checkpoints)), given, bf16=True)
    whole = build(name, checkpoints)
    whole.compile(backend=liger_fx.backend(**OPTIONS))
    one_graph = gradients(whole, given, bf16=True)
    errors = (sum(relative_error(f[n], exact[n]) for n in exact) for f in (layers, one_graph))
    assert next(errors) <= 1.1 * next(errors)


def test_every_rewrite_under_inductor():
    given = batch("without")
    model = compiled(build(tie_word_embeddings=True), inner="inductor", policy="all")
    actual = gradients(model, given)
    assert_equal(actual, gradients(build(tie_word_embeddings=True), given), 1e-5)


def test_report():
    gradients(compiled(build("gemma3_text"), policy="all"), batch("without"))
    said = str(liger_fx.Report.merged(liger_fx.reports()))
    assert_expected_inline(
        re.sub("graph of .* ms, ", "", said),
        """\
liger_fx: for lm_head, 4 x model.layers.*, model.norm
  attention     replaced  spelling heads_first  [self_attn at sdpa_attention.py:193 in sdpa_attention_forward]
  rope          replaced  2 x spelling halves_rounded, of a norm  [self_attn at modeling_gemma3.py:245 in apply_rotary_pos_emb]
  rope          replaced  2 x spelling halves_rounded, of a norm  [self_attn at modeling_gemma3.py:246 in apply_rotary_pos_emb]
  add_rms_norm  replaced  2 x spelling add_gemma  [pre_feedforward_layernorm at modeling_gemma3.py:148 in forward]
  rms_norm      replaced  2 x spelling gemma  [input_layernorm at modeling_gemma3.py:148 in forward]
  rms_norm      replaced  2 x spelling gemma  [self_attn.q_norm at modeling_gemma3.py:148 in forward]
  rms_norm      replaced  2 x spelling gemma  [self_attn.k_norm at modeling_gemma3.py:148 in forward]
  rms_norm      replaced  2 x spelling gemma  [post_attention_layernorm at modeling_gemma3.py:148 in forward]
  rms_norm      replaced  2 x spelling gemma  [post_feedforward_layernorm at modeling_gemma3.py:148 in forward]
  tiled_mlp     replaced  2 x spelling geglu  [mlp.down_proj at modeling_gemma3.py:131 in forward]
  rms_norm      replaced  spelling gemma  [modeling_gemma3.py:148 in forward]
  logits        deferred  they are returned: computed when read  [lm_head]""",
    )
    firsts = [str(report).splitlines()[0] for report in liger_fx.reports()]
    assert_expected_inline(
        re.sub("graph of .* ms, ", "", "\n".join(firsts)),
        """\
liger_fx: no graph, for lm_head
liger_fx: for 2 x model.layers.*
liger_fx: for 2 x model.layers.*
liger_fx: for model.norm""",
    )


@pytest.mark.parametrize(
    "options", [{"policy": ["rope"]}, {"disable": ["linear_cross_entropy"]}, {"logits": "keep"}]
)
def test_options_that_leave_the_head(options):
    model, given = compiled(build(), **options), batch("without")
    assert type(model(**given).logits) is Tensor
    reason = liger_fx.reports()[0].why_not("linear_cross_entropy")
    assert reason == "the options policy, disable or logits leave the head as it is"


@pytest.mark.parametrize("mode", ["padded", "packed"])
@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
def test_layers_read_the_mask(name, mode, monkeypatch):
    """The tensor that transformers has made, in each layer the same. On a CPU grouped heads keep it."""
    module = importlib.import_module("liger_fx.ops.attention")
    read, seen = [], []
    stock = module._read_mask
    monkeypatch.setattr(module, "_read_mask", lambda mask: read.append(mask) or stock(mask))
    for name_of in ("_attend", "_attend_backward"):  # which on a GPU ask for the plan
        attend = getattr(module, name_of)
        monkeypatch.setattr(
            module,
            name_of,
            lambda *a, attend=attend: seen.append(module._plan_of(a[-2])) or attend(*a),
        )
    grouped = dict(num_key_value_heads=4) if name != "gpt2" else {}
    given = batch(mode)
    actual = gradients(compiled(build(name, False, **grouped), policy=["attention"]), given)
    assert_equal(actual, gradients(build(name, False, **grouped), given), 1e-5)
    found = {made.pattern for report in liger_fx.reports() for made in report.replacements}
    assert found == {"masked, given mask"} and all(plan is not None for plan, _ in seen)
    assert len(seen) == 12 and len(read) == 1 + (name in TWO_FORMS)


def test_new_lengths_are_one_more_graph():
    model, expected = compiled(build()), build()
    for length in (16, 12, 9, 14):
        tokens = torch.randint(1, 64, (BATCH, length))
        given = dict(input_ids=tokens, labels=tokens, use_cache=False)
        assert_equal(gradients(model, given), gradients(expected, given), 1e-5)
    assert counters["stats"]["unique_graphs"] == 4  # of layers and norm


@pytest.mark.parametrize("use_cache", [False, True])
def test_evaluation_and_generation(use_cache):
    model, expected = compiled(build().eval()), build().eval()
    tokens = torch.randint(1, 64, (BATCH, SEQ))
    with torch.no_grad():
        found = [m(input_ids=tokens, labels=tokens, use_cache=use_cache) for m in (model, expected)]
    torch.testing.assert_close(found[0].loss, found[1].loss)
    torch.testing.assert_close(found[0].logits.materialize(), found[1].logits)
    settings = dict(max_new_tokens=5, do_sample=False, use_cache=use_cache)
    texts = [m.generate(tokens, **settings) for m in (model, expected)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("checkpoints", [None, False], ids=["", "checkpoints"])
def test_a_cache_in_training(checkpoints, caplog):
    """As a loop of one's own passes it by default; a layer with a checkpoint leaves it out."""
    torch._logging.warning_once.cache_clear()
    given = batch("without") | dict(use_cache=True)
    with caplog.at_level(logging.WARNING, "liger_fx"):
        actual = gradients(compiled(build(checkpoints=checkpoints)), given)
    assert_equal(actual, gradients(build(checkpoints=checkpoints), given), 1e-5)
    said = [r.getMessage() for r in caplog.records if r.name == "liger_fx"]
    assert any("use_cache=False" in text for text in said) == (checkpoints is None)
    assert len(liger_fx.reports()) == (2 if checkpoints is None else 3)


def test_a_loop_of_ones_own_has_no_cache():
    given = batch("without")
    del given["use_cache"]
    assert_equal(gradients(compiled(build()), given), gradients(build(), given), 1e-5)
    assert len(liger_fx.reports()) == 3


def test_weights_are_saved_as_ever(tmp_path):
    model = compiled(build())
    gradients(model, batch("without"))
    assert list(model.state_dict()) == list(build().state_dict())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_copy_has_weights_of_its_own():
    """As TRL copies a model to keep it as a reference."""
    given, model = batch("without"), compiled(build())
    twin = copy.deepcopy(model)
    expected = gradients(build(), given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal(gradients(twin, given), expected, 1e-5)


def test_hooks_of_one_layer():
    """Dynamo guards no hook that is not there: the graph of another layer would pass."""
    given, found = batch("without"), []
    for model in (compiled(build()), build()):
        gradients(model, given)
        model.model.layers[1].register_forward_hook(lambda module, args, out: out * 1.5)
        model.model.layers[2].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        found.append(gradients(model, given))
    assert_equal(*found, 1e-5)


def test_explain_sees_the_whole_model():
    report = liger_fx.explain(compiled(build()), kwargs=batch("without"), options={"policy": "all"})
    assert report.counts["rope"] == 8


def test_wants_layers():
    with pytest.raises(ValueError, match=r"Linear has no nn.ModuleList of layers"):
        by_layers(nn.Linear(2, 2))


def test_options_are_checked():
    with pytest.raises(ValueError, match="unknown"):
        by_layers(build(), polizy="all")


# -- Trainer ---------------------------------------------------------------------------------------

TRAINED = CASES | {
    "metrics": dict(compute_metrics=likelihood),
    "z-loss": dict(trainer=ZLoss),
    "logits are read": dict(trainer=Penalty),
    "loss of one's own": dict(trainer=OwnLoss),
    "label smoothing": dict(label_smoothing_factor=0.1),
    "loss alone": dict(prediction_loss_only=True),
    "reentrant": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
}


@integrations
@pytest.mark.parametrize("case", TRAINED)
def test_trainer(case, tmp_path):
    settings = dict(TRAINED[case])
    tolerance = settings.pop("tolerance", 1e-5)
    eager, fused = (run(tmp_path, by_layers=layers, **settings) for layers in (False, True))
    assert fused.losses == pytest.approx(eager.losses, rel=tolerance)
    assert fused.metrics == pytest.approx(eager.metrics, rel=tolerance)
    for name, update in fused.updates.items():
        assert relative_error(update, eager.updates[name]) <= 30 * tolerance, name
    if case != "logits are read":
        assert fused.read == (0, EVALUATIONS if "compute_metrics" in settings else 0)


@integrations
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "lm_head"]], ids=str)
@pytest.mark.parametrize("checkpoints", [False, True])
def test_lora(targets, checkpoints, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    # It raises where torchao is as old as torchtune wants it.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)

    def adapted() -> nn.Module:
        return peft.get_peft_model(language_model(), peft.LoraConfig(target_modules=targets, r=4))

    settings: Any = dict(model=adapted, gradient_checkpointing=checkpoints)
    eager, fused = (run(tmp_path, by_layers=layers, **settings) for layers in (False, True))
    assert fused.losses == pytest.approx(eager.losses, rel=2e-5)
    for name, update in fused.updates.items():
        assert relative_error(update, eager.updates[name]) <= 1e-3, name
    reason = liger_fx.reports()[0].why_not("linear_cross_entropy")
    assert (reason is not None) == ("lm_head" in targets)
    if "lm_head" in targets:
        with pytest.raises(liger_fx.RequirementError, match="cannot be deferred"):
            compiled(adapted(), require=["linear_cross_entropy"])


@pytest.mark.parametrize("dynamic", [None, True])
def test_graphs_for_batches_of_several_lengths(dynamic):
    """A layer's and the norm's: of the first batch, and for all lengths; or the latter alone."""
    model = compiled(build(), dynamic=dynamic)
    for length in (SEQ, 11, 13):
        given = {
            key: value[:, :length] if isinstance(value, Tensor) else value
            for key, value in batch("padded").items()
        }
        actual = gradients(model, given)
        assert_equal(actual, gradients(build(), given), 1e-5)
    assert counters["stats"]["unique_graphs"] == (2 if dynamic else 4)


# -- checkpoints around layers, and offloading -----------------------------------------------------


class OwnCheckpoint(nn.Module):
    """A layer whose ``__call__`` puts its checkpoint, as those of transformers before 5.23."""

    def __init__(self, around: Callable[..., Any]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self._gradient_checkpointing_func = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(super().__call__, **kwargs)
        return self._gradient_checkpointing_func(call, *args)

    def forward(self, hidden: Tensor, scale: float = 1.0) -> Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden * scale)))


class OwnCheckpoints(nn.Module):
    def __init__(self, around: Callable[..., Any] | None = None) -> None:
        super().__init__()
        around = around or functools.partial(checkpoint, use_reentrant=False)
        self.layers = nn.ModuleList(OwnCheckpoint(around) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, scale=2.0)
        return hidden


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_a_checkpoint_around_layers_goes_into_their_graph(offload, reentrant, monkeypatch):
    """The backward does not call a layer again: its graph computes again what the backward needs."""
    around = functools.partial(checkpoint, use_reentrant=reentrant)
    monkeypatch.setattr(huggingface, "Offload", functools.partial(Offload, least=1))
    calls = []
    run_region = huggingface._Form.__call__

    def counted(self, module, *args, **kwargs):
        calls.append(huggingface._held_checkpoint(module) is not None)
        return run_region(self, module, *args, **kwargs)

    monkeypatch.setattr(huggingface._Form, "__call__", counted)
    hidden, found = torch.randn(4, 16), []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = OwnCheckpoints(around)
        if compiles:
            by_layers(model, offload=offload, **OPTIONS)
        x = hidden.clone().requires_grad_()
        model(x).sin().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters())])
    assert calls == [True] * 3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def saved_elements(model: nn.Module) -> int:
    saved: list[int] = []
    pack = lambda x: saved.append(x.numel()) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(torch.randn(4, 16, requires_grad=True))
    return sum(saved)


def test_under_force_eager_checkpoints_are_around_layers():
    model = by_layers(OwnCheckpoints(), **OPTIONS)
    with torch.compiler.set_stance("force_eager"):
        assert saved_elements(model) == saved_elements(OwnCheckpoints())


def test_layers_that_are_not_compiled_have_their_checkpoints_around():
    model = by_layers(OwnCheckpoints(), **OPTIONS)
    for layer in model.layers:
        layer._compiled_call_impl = None
    assert saved_elements(model) == saved_elements(OwnCheckpoints())


def test_a_checkpoint_of_somebody_elses_stays_around_layers():
    """Nobody knows what else the function does."""
    calls = []

    def around(function: Callable[..., Any], *args: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=False)

    model = by_layers(OwnCheckpoints(around), **OPTIONS)
    model(torch.randn(4, 16)).sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("checkpoints", [None, False], ids=["", "checkpoints"])
def test_nothing_is_offloaded_in_other_checkpoints_around_layers(checkpoints, monkeypatch):
    """Whose settings nobody knows; they save the inputs themselves."""
    monkeypatch.setattr(huggingface, "Offload", functools.partial(Offload, least=1))
    monkeypatch.setattr(module_of_offload, "_Saved", None)
    found = []
    for prepare in (lambda model: model, functools.partial(compiled, offload=True)):
        model = prepare(build(checkpoints=checkpoints))

        def loss(tokens: Tensor, model: Any = model) -> Tensor:
            return model.model(tokens, use_cache=False).last_hidden_state.sin().sum()

        checkpoint(loss, batch("plain")["input_ids"], use_reentrant=False).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_equal(*found, 1e-5)


@pytest.mark.parametrize(
    ("name", "checkpoints"),
    [
        *(("llama", kind) for kind in (None, False, True)),
        pytest.param("gemma3_text", False, marks=pytest.mark.slow),
    ],
)
def test_offloading_changes_no_bit(name, checkpoints, monkeypatch):
    monkeypatch.setattr(huggingface, "Offload", functools.partial(Offload, least=1))
    actual, expected = (
        gradients(compiled(build(name, checkpoints), offload=offload), batch("padded"))
        for offload in (True, False)
    )
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


# -- layers that keep their activations ------------------------------------------------------------


def saved_and_gradients(model: nn.Module, given: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """Elements of activations that a forward keeps for the backward, and the gradients."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**given).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = [t for t in saved if t.is_floating_point() and t.dim() > 1]
    own = [t for t in activations if t.untyped_storage().data_ptr() not in weights]
    return sum(t.numel() for t in own), found | {"loss": loss.detach()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_keep_and_let_go(reentrant):
    given = batch("padded")
    model = compiled(build(checkpoints=reentrant), policy="all", inner="aot_eager")
    layers, sizes = model.model.layers, []
    expected = gradients(build(), given)
    for kept in (0, 1, 3, 0):
        huggingface._keep(layers, kept)
        size, found = saved_and_gradients(model, given)
        sizes.append(size)
        assert_equal(found, expected, 1e-5)
    of_a_layer = sizes[1] - sizes[0]
    assert of_a_layer > 0 and sizes == [sizes[0] + kept * of_a_layer for kept in (0, 1, 3, 0)]
    assert counters["stats"]["unique_graphs"] == 3  # a layer in both ways, and the last norm


@pytest.fixture
def gpu_of_100_gib(monkeypatch):
    """Whose peak is 10 GiB, and 2 for each layer that keeps."""
    kept: list[int] = [0]
    keep = huggingface._keep

    def counted(layers: Any, count: int) -> None:
        kept.append(count)
        keep(layers, count)

    monkeypatch.setattr(huggingface, "_keep", counted)
    monkeypatch.setattr(huggingface, "require_gpu", lambda device: None)
    monkeypatch.setattr(huggingface, "room_on_all_ranks", lambda device: 100 * 2**30)
    peak = lambda device: (10 + 2 * kept[-1]) * 2**30  # noqa: E731
    monkeypatch.setattr(huggingface, "peak_of_all_ranks", peak)
    return kept


@pytest.mark.parametrize(("gib", "wanted"), [(15, [0, 1, 2]), ("auto", [0, 1, 2, 4])])
def test_as_many_layers_keep_as_fit(gib, wanted, gpu_of_100_gib):
    model = compiled(build(checkpoints=False), memory_gib=gib)
    optimizer = torch.optim.AdamW(model.parameters())
    other = torch.optim.AdamW(build().parameters())  # of another model
    for _ in range(6):
        model(**batch("padded")).loss.backward()
        optimizer.step()
        other.step()
    assert list(dict.fromkeys(gpu_of_100_gib)) == wanted


def test_a_budget_wants_checkpoints_and_a_gpu():
    for checkpoints, reason in ((None, "has none: call model.gradient_ch"), (False, "needs a GPU")):
        model = compiled(build(checkpoints=checkpoints), memory_gib=15)
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(ValueError, match=reason):
            for _ in range(2):
                model(**batch("padded")).loss.backward()
                optimizer.step()
    with pytest.raises(ValueError, match="memory_gib is 'most', expected a number of GiB or auto"):
        compiled(build(), memory_gib="most")
    with pytest.raises(ValueError, match="offload takes them off it"):
        compiled(build(), memory_gib=15, offload=True)
