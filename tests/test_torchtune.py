"""torchtune's models in one graph, the head region, and the recipe."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import itertools
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torchtune
from _recipe_parts import Losses, model
from _util import DEVICE, TOLERANCES, only, relative_error, words
from liger_fx.passes import linear_cross_entropy
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torchtune import modules, rlhf, training
from torchtune.config import instantiate
from torchtune.models import gemma, gemma2, llama2, llama3, llama3_2, mistral, phi3, qwen2
from torchtune.modules import loss
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.rlhf.loss import PPOLoss

import liger_fx
from liger_fx import Report
from liger_fx.advice import advice
from liger_fx.torchtune import (
    FusedRecipe,
    HeadNotFused,
    HeadTokenLogProbs,
    LayersRecipe,
    Unprojected,
    compile_layers,
    fuse_distillation,
    fuse_head,
    fuse_log_probs,
    load_recipe,
)
from liger_fx.torchtune.recipes import (
    _check_ranks_agree,
    _ClassLoss,
    _DistillationLoss,
    flatten,
)

capture = only(linear_cross_entropy)

V, B, S = 131, 2, 16
SIZES: dict[str, Any] = dict(
    vocab_size=V, num_layers=1, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=32,
    intermediate_dim=48,
)  # fmt: skip
FAMILIES = {
    "llama2": llama2.llama2,
    "llama3": llama3.llama3,
    "llama3_2": llama3_2.llama3_2,
    "mistral": mistral.mistral,
    "gemma": functools.partial(gemma.gemma, head_dim=8),
    "gemma2": functools.partial(
        gemma2.gemma2,
        head_dim=8,
        hidden_capping_value=50.0,
        final_capping_value=30.0,
        sliding_window_size=8,
    ),
    "phi3": phi3.phi3,
    "qwen2": qwen2.qwen2,
    "qwen2_tied": functools.partial(qwen2.qwen2, tie_word_embeddings=True),
}


@pytest.fixture(autouse=True)
def head_alone(monkeypatch):
    """On every device, whatever else auto applies there."""
    monkeypatch.setenv("LIGER_FX_POLICY", "linear_cross_entropy,linear_logprobs,linear_kl")


@pytest.fixture
def batch():
    tokens = torch.randint(0, V, (B, S), device=DEVICE)
    labels = tokens.clone()
    labels[:, :5] = -100
    return tokens, labels


def build(
    family: str, dtype: torch.dtype = torch.float32, *, num_layers: int = 1
) -> torch.nn.Module:
    with training.set_default_dtype(dtype), torch.device(DEVICE):
        built = FAMILIES[family](**SIZES | {"num_layers": num_layers})
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return built


def checkpointed(net: torch.nn.Module) -> torch.nn.Module:
    policy = {modules.TransformerSelfAttentionLayer}
    training.set_activation_checkpointing(net, auto_wrap_policy=policy)
    return net


def recipe_step(net, loss_fn):
    """``_loss_step`` of torchtune's recipes."""
    ignore = torch.full((B, 1), -100, device=DEVICE)

    def step(tokens, labels):
        logits = net(tokens)
        labels = torch.hstack((labels[..., 1:], ignore[: labels.shape[0]]))
        if not isinstance(logits, list):
            labels = labels.reshape(-1)
            logits = logits.reshape(-1, logits.size(-1))
        return loss_fn(logits, labels)

    return step


def loss_and_gradients(step, net, *args):
    net.zero_grad()
    loss = step(*args)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


def assert_close(actual, expected, dtype=torch.float32):
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 10 * TOLERANCES[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_step_of_every_family(family, batch):
    net = build(family)
    step = recipe_step(net, torch.nn.CrossEntropyLoss())
    expected = loss_and_gradients(step, net, *batch)
    compiled = torch.compile(step, backend="liger_fx", options={"inner": "eager"}, fullgraph=True)
    assert_close(loss_and_gradients(compiled, net, *batch), expected)
    (report,) = liger_fx.reports()
    assert report.counts == {"linear_cross_entropy": 1}
    assert report.rejections == []


@pytest.mark.parametrize(
    ("variant", "family"),
    [
        *itertools.product(["checkpointed", "bf16"], ["llama3_2", "gemma2", "phi3", "qwen2"]),
        ("dynamic", "gemma2"),  # test_models.py has it for each rewrite and more models
    ],
)
def test_whole_step_variants(variant, family, batch):
    dtype = torch.bfloat16 if variant == "bf16" else torch.float32
    net = build(family, dtype)
    step = recipe_step(net, torch.nn.CrossEntropyLoss())
    expected = loss_and_gradients(step, net, *batch)
    if variant == "checkpointed":
        checkpointed(net)
    if variant == "dynamic":
        for values in batch:
            torch._dynamo.mark_dynamic(values, 1)
    compiled = torch.compile(step, backend="liger_fx", options={"inner": "aot_eager"})
    assert_close(loss_and_gradients(compiled, net, *batch), expected, dtype)
    (report,) = liger_fx.reports()
    assert report.counts == {"linear_cross_entropy": 1}


def test_lora_on_the_head_is_refused_and_trained(batch):  # A21
    net = llama3.lora_llama3(
        lora_attn_modules=["q_proj"], apply_lora_to_output=True, lora_rank=4, lora_alpha=8,
        **SIZES,
    ).to(DEVICE)  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    step = recipe_step(net, torch.nn.CrossEntropyLoss())
    expected = loss_and_gradients(step, net, *batch)
    compiled = torch.compile(step, backend="liger_fx", options={"inner": "eager"})
    assert_close(loss_and_gradients(compiled, net, *batch), expected)
    (rejection,) = liger_fx.reports()[0].rejections
    assert "LoRA on the head" in rejection.reason


def test_report_names_torchtunes_modules(batch):
    net = build("llama3")
    found = capture(recipe_step(net, torch.nn.CrossEntropyLoss()), *batch)
    (made,) = found.reports[0].replacements
    assert made.place.module == "loss_fn"
    assert made.place.source.startswith("test_torchtune.py:")


# -- the head region -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "llama3_2", "gemma2", "qwen2"])
@pytest.mark.parametrize("chunked", [True, False])
def test_head_region_follows_the_stock_step(family, chunked, batch):
    net = build(family)
    loss_fn = CEWithChunkedOutputLoss() if chunked else torch.nn.CrossEntropyLoss()
    if chunked:
        net.set_num_output_chunks(loss_fn.num_output_chunks)
    expected = loss_and_gradients(recipe_step(net, loss_fn), net, *batch)
    keys = list(net.state_dict())
    head = fuse_head(net, loss_fn, {"inner": "eager"})
    assert_close(loss_and_gradients(recipe_step(net, head), net, *batch), expected)
    assert head.ignore_index == -100
    assert list(net.state_dict()) == keys
    assert len(list(net.parameters())) == len(expected) - 1
    (report,) = liger_fx.reports()
    assert report.counts == {"linear_cross_entropy": 1}


@contextlib.contextmanager
def group_of_one():
    """FSDP2 shards, gathers and hooks in it as it does in a larger one."""
    backend = "cuda:nccl,cpu:gloo" if DEVICE == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        if torch.distributed.is_initialized():  # a recipe's clean-up ends it
            torch.distributed.destroy_process_group()


@pytest.fixture
def process_group():
    with group_of_one():
        yield


@pytest.mark.parametrize(
    ("family", "sharded", "frozen"),
    [
        *itertools.product(["llama3", "llama3_2"], [None, ["tok_embeddings", "output"]], [False]),
        ("llama3", ["tok_embeddings", "output"], True),
        ("llama3_2", None, True),
    ],
    ids=[
        "untied-root",
        "untied-own",
        "tied-root",
        "tied-own",
        "frozen-untied-own",
        "frozen-tied-root",
    ],
)
def test_head_region_under_fsdp2(family, sharded, frozen, batch, process_group):
    net = build(family, num_layers=2)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith("layers"))
    reference = copy.deepcopy(net)
    loss_fn = CEWithChunkedOutputLoss()
    reference.set_num_output_chunks(loss_fn.num_output_chunks)
    expected = gradients_of(recipe_step(reference, loss_fn), reference, batch)

    net.set_num_output_chunks(loss_fn.num_output_chunks)
    conditions = [functools.partial(training.get_shard_conditions, names_to_match=sharded)]
    training.shard_model(checkpointed(net), conditions, cpu_offload=False)
    keys = list(net.state_dict())
    compile_layers(net, {"inner": "aot_eager"})
    step = recipe_step(net, fuse_head(net, loss_fn, {"inner": "aot_eager"}))
    for _ in range(2):  # the second time, the gathered weights are others
        assert_close(gradients_of(step, net, batch), expected)
    assert list(net.state_dict()) == keys
    assert Report.merged(liger_fx.reports()).counts["linear_cross_entropy"] == 1
    # Behind frozen embeddings the first layer's input needs no gradient: a graph of its own.
    assert len(liger_fx.reports()) == 2 + frozen


def gradients_of(step, net, batch):
    net.zero_grad()
    loss = step(*batch)
    loss.backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [loss.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)]


def test_tensor_parallel_head_is_refused(process_group):
    net = build("llama3")
    mesh = torch.distributed.init_device_mesh(DEVICE, (1,), mesh_dim_names=("tp",))
    parallelize_module(net, mesh, {"output": ColwiseParallel()})
    with pytest.raises(HeadNotFused, match=r"output.weight is a DTensor over the mesh .*tp=1"):
        fuse_head(net, torch.nn.CrossEntropyLoss())
    assert net.unembed.__func__ is type(net).unembed


def test_head_that_is_not_one_op_runs_as_the_recipe_has_it(batch, caplog):
    net = build("llama3")
    loss_fn = CEWithChunkedOutputLoss()
    net.set_num_output_chunks(loss_fn.num_output_chunks)
    expected = loss_and_gradients(recipe_step(net, loss_fn), net, *batch)
    head = fuse_head(net, loss_fn, {"inner": "eager", "policy": ["rope"]})
    for _ in range(2):
        assert_close(loss_and_gradients(recipe_step(net, head), net, *batch), expected)
    assert caplog.text.count("the projection and the loss are not fused") == 1
    assert "not in the policy's list" in caplog.text


@pytest.mark.parametrize("family", ["llama3", "llama3_2", "gemma2", "phi3"])
def test_log_probs_of_a_head_follow_the_stock_ones(family, batch):
    net = build(family)
    tokens, labels = batch

    def outcome(logprobs):
        net.zero_grad()
        (logprobs * torch.tensor([1.0, -0.5], device=DEVICE)).sum().backward()
        return [logprobs.detach(), *(p.grad.clone() for p in net.parameters())]

    logits = net(tokens)
    expected = outcome(rlhf.get_batch_log_probs(logits, labels))
    head = fuse_log_probs(net, {"inner": "aot_eager", "policy": "all"})
    for _ in range(2):
        scores = head(net(tokens), labels)
        assert_close(outcome(scores.logprobs), expected)
    assert relative_error(scores.means, logits.mean((1, 2))) < 1e-4  # of values around zero
    assert relative_error(scores[1:].detach().mean(), logits[1:].mean()) < 1e-4
    assert Report.merged(liger_fx.reports()).counts["linear_logprobs"] == 1


def test_log_probs_with_lora_on_the_head(batch, caplog):
    net = llama3.lora_llama3(
        lora_attn_modules=["q_proj"], apply_lora_to_output=True, lora_rank=4, lora_alpha=8,
        **SIZES,
    ).to(DEVICE)  # fmt: skip
    logits = net(batch[0])
    expected = rlhf.get_batch_log_probs(logits, batch[1])
    scores = fuse_log_probs(net, {"inner": "eager"})(net(batch[0]), batch[1])
    assert relative_error(scores.logprobs, expected) < TOLERANCES[torch.float32]
    assert relative_error(scores.means, logits.mean((1, 2))) < 1e-4
    assert "the logits are a sum (LoRA on the head?), not one projection" in caplog.text


def teacher():
    """Wider than its student, deeper, of the same vocabulary, and frozen."""
    with torch.device(DEVICE):
        net = llama3.llama3(**SIZES | dict(num_layers=2, embed_dim=64))
    for parameter in net.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return net.requires_grad_(False)


def distilled(net, taught_by, losses, batch, ratio):
    """A step of torchtune's distillation recipes: both losses, and the student's gradients."""
    net.zero_grad()
    tokens, labels = batch
    hidden = net(tokens)
    with torch.no_grad():
        taught = taught_by(tokens)
    class_loss, kd_loss = losses(hidden, taught, labels)
    ((1 - ratio) * class_loss + ratio * kd_loss).backward()
    return [class_loss.detach(), kd_loss.detach(), *(p.grad.clone() for p in net.parameters())]


def stock_losses(loss_fn, kd_loss_fn):
    def losses(logits, teacher_logits, labels):
        if not isinstance(logits, list):
            logits, teacher_logits = logits.flatten(0, 1), teacher_logits.flatten(0, 1)
            labels = labels.flatten()
        return loss_fn(logits, labels), kd_loss_fn(logits, teacher_logits, labels)

    return losses


DIVERGENCES = {
    "forward": loss.ForwardKLLoss,
    "forward_chunked": loss.ForwardKLWithChunkedOutputLoss,
    "reverse": loss.ReverseKLLoss,
    "symmetric_chunked": functools.partial(loss.SymmetricKLWithChunkedOutputLoss, sym_kd_ratio=0.3),
}


def distillation(divergence, family="llama3_2"):
    """Student, teacher, and the two losses of a recipe."""
    kd_loss_fn = DIVERGENCES[divergence]()
    net, taught_by = build(family), teacher()
    if "chunked" not in divergence:
        return net, taught_by, torch.nn.CrossEntropyLoss(), kd_loss_fn
    for decoder in (net, taught_by):
        decoder.set_num_output_chunks(kd_loss_fn.num_output_chunks)
    return net, taught_by, CEWithChunkedOutputLoss(), kd_loss_fn


@pytest.mark.parametrize("family", ["llama3", "llama3_2"], ids=["untied", "tied"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distillation_follows_the_stock_losses(divergence, family, batch):
    net, taught_by, *losses = distillation(divergence, family)
    ratio = 1.0 if family == "llama3" else 0.3  # either may carry the gradient
    expected = distilled(net, taught_by, stock_losses(*losses), batch, ratio)
    fused = fuse_distillation(net, taught_by, *losses, ratio, {"inner": "aot_eager"})
    for _ in range(2):
        assert_close(distilled(net, taught_by, fused, batch, ratio), expected)
    (report,) = liger_fx.reports()
    assert report.counts == {"linear_kl": 1}


def test_distillation_without_a_valid_label(batch):
    tokens, labels = batch[0], torch.full_like(batch[1], -100)
    net, taught_by, *losses = distillation("forward_chunked")
    expected = stock_losses(*losses)(net(tokens), taught_by(tokens), labels)
    fused = fuse_distillation(net, taught_by, *losses, 0.5, {"inner": "aot_eager"})
    class_loss, kd_loss = fused(net(tokens), taught_by(tokens), labels)
    assert class_loss.isnan() and expected[0].isnan()
    assert kd_loss == expected[1] == 0


@pytest.mark.parametrize("divergence", ["forward_chunked", "reverse"])
def test_distillation_with_lora_on_the_head(divergence, batch, caplog):
    net, taught_by, *losses = distillation(divergence, "llama3")
    net.output = modules.peft.LoRALinear(32, V, rank=2, alpha=4.0).to(DEVICE)
    torch.nn.init.normal_(net.output.lora_b.weight)
    expected = distilled(net, taught_by, stock_losses(*losses), batch, 0.5)
    fused = fuse_distillation(net, taught_by, *losses, 0.5, {"inner": "aot_eager"})
    for _ in range(2):
        assert_close(distilled(net, taught_by, fused, batch, 0.5), expected)
    assert caplog.text.count("run as in torchtune's recipe: the logits are a sum (LoRA on") == 1


def test_distillation_says_which_losses_it_takes():
    net, taught_by, loss_fn, kd_loss_fn = distillation("forward")
    with pytest.raises(HeadNotFused, match="expected one of torchtune's divergences, found L1Loss"):
        fuse_distillation(net, taught_by, loss_fn, torch.nn.L1Loss(), 0.5)
    with pytest.raises(HeadNotFused, match="expected a cross-entropy, found L1Loss"):
        fuse_distillation(net, taught_by, torch.nn.L1Loss(), kd_loss_fn, 0.5)
    assert net.unembed(torch.zeros(1, 1, 32, device=DEVICE)).shape[-1] == V  # as it was


def test_the_second_loss_of_a_distillation_needs_the_first(batch):
    net, taught_by, *losses = distillation("reverse")
    head = fuse_distillation(net, taught_by, *losses, 0.5, {"inner": "aot_eager"})
    first = _DistillationLoss(head)
    second = _ClassLoss(first)
    assert second.ignore_index == -100
    hidden = net(batch[0])
    first(hidden, taught_by(batch[0]), batch[1])
    assert second(hidden, batch[1]).dim() == 0
    with pytest.raises(RuntimeError, match="must be asked for first"):
        second(hidden, batch[1])


def answers(recipe, net, tokens, *, prompt=6, temperature=0.7):
    """What torchtune's PPO recipe takes of a model's logits, and writes to."""
    logits = recipe.stock.rlhf.truncate_sequence_for_logprobs(net(tokens), prompt)
    logprobs = recipe.stock.rlhf.logits_to_logprobs(logits, tokens[:, prompt:], temperature)
    logprobs[:, -2:] = 1.0
    return logprobs


def of_answers(net, logprobs):
    net.zero_grad()
    (logprobs * torch.linspace(-1, 2, S - 6, device=DEVICE)).sum().backward()
    return [logprobs.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.fixture
def ppo():
    return importlib.import_module("liger_fx.recipes.ppo_full_finetune_single_device")


@pytest.mark.parametrize(
    ("family", "inner"),
    [
        ("llama3", "eager"),
        ("llama3_2", "aot_eager"),
        ("gemma2", "aot_eager"),
        ("llama3", "inductor"),
    ],
)
def test_token_log_probs_follow_the_stock_ones(family, inner, batch, ppo):
    net = build(family)
    expected = of_answers(net, answers(ppo, net, batch[0]))
    head = HeadTokenLogProbs(net, {"inner": inner})
    with head.instead_of_logits(net):
        for _ in range(2):
            assert_close(of_answers(net, answers(ppo, net, batch[0])), expected)
        with torch.no_grad():
            assert_close([answers(ppo, net, batch[0])], expected[:1])
    assert [r.counts for r in liger_fx.reports()] == 2 * [{"linear_logprobs": 1}]


def test_logits_are_replaced_only_where_it_says_so(batch):
    net = build("llama3")
    head = HeadTokenLogProbs(net, {})
    keys = list(net.state_dict())
    with pytest.raises(KeyError), head.instead_of_logits(net):
        found = net(batch[0])
        assert isinstance(found, Unprojected) and found.head is head
        assert found[1:, 3:-1].hidden.equal(found.hidden[1:, 3:-1])
        with pytest.raises(ValueError, match="too many values"):
            found[:, 3:-1, :5]
        raise KeyError("a step that fails")
    assert net(batch[0]).shape == (B, S, V)
    assert list(net.state_dict()) == keys


def test_token_log_probs_with_lora_on_the_head(batch, ppo, caplog):
    net = llama3.lora_llama3(
        lora_attn_modules=["q_proj"], apply_lora_to_output=True, lora_rank=4, lora_alpha=8,
        **SIZES,
    ).to(DEVICE)  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    expected = of_answers(net, answers(ppo, net, batch[0]))
    with HeadTokenLogProbs(net, {"inner": "eager"}).instead_of_logits(net):
        for _ in range(2):
            assert_close(of_answers(net, answers(ppo, net, batch[0])), expected)
    assert caplog.text.count("the logits are a sum (LoRA on the head?), not one projection") == 1


def test_head_region_of_one_model_leaves_another_alone(batch):
    net, other = build("llama3"), build("llama3")
    fuse_head(net, torch.nn.CrossEntropyLoss(), {"inner": "eager"})
    assert other(batch[0]).shape == (B, S, V)
    assert net(batch[0]).shape == (B, S, SIZES["embed_dim"])


def test_head_is_moved_once():
    net = build("llama3")
    fuse_head(net, torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="moved into a loss already"):
        fuse_head(net, torch.nn.CrossEntropyLoss())


def test_head_region_needs_a_torchtune_model():
    with pytest.raises(TypeError, match=r"Linear has no unembed\(\): expected a torchtune"):
        fuse_head(torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss())


def test_layers_compile_with_their_checkpoint_inside(batch):
    net = checkpointed(build("llama3", num_layers=2))
    training.compile_model(net, verbose=False)  # as a recipe has done it before
    reference = build("llama3", num_layers=2)
    reference.load_state_dict(net.state_dict())
    compile_layers(net, {"inner": "aot_eager"})
    for layer in net.layers:
        assert layer._compiled_call_impl is not None
        assert layer._checkpoint_wrapped_module._compiled_call_impl is None

    def loss(model):
        return lambda tokens: model(tokens).square().mean()

    expected = loss_and_gradients(loss(reference), reference, batch[0])
    assert_close(loss_and_gradients(loss(net), net, batch[0]), expected)
    assert len(liger_fx.reports()) == 1, "one graph for all layers"


def test_nested_settings_are_dotted_options():
    nested = OmegaConf.create(
        {"policy": ["linear_cross_entropy"], "linear_cross_entropy": {"chunk_tokens": 64}}
    )
    assert flatten(nested) == {
        "policy": ["linear_cross_entropy"],
        "linear_cross_entropy.chunk_tokens": 64,
    }


def built_in_configs():
    folder = Path(torchtune.__file__).parent.parent / "recipes" / "configs"
    return [pytest.param(p, id=p.stem) for p in sorted(folder.rglob("*full_single_device.yaml"))]


class FirstLayer(torch.nn.ModuleList):
    """Of a model's 30 layers, the one that a test of its head needs."""

    def __init__(self, modules=None):
        super().__init__(itertools.islice(modules, 1) if modules is not None else None)


@pytest.mark.parametrize("path", built_in_configs())
def test_every_built_in_config_has_a_head_to_move(path):
    config = OmegaConf.load(path)
    if "vision" in config.model._component_:
        pytest.importorskip("torchvision")
    with torch.device("meta"), mock.patch.object(torch.nn, "ModuleList", FirstLayer):
        net = instantiate(config.model)
    head = fuse_head(net, instantiate(config.loss))
    assert head.ignore_index == -100
    assert flatten(config.get("liger_fx", {})) == {}


# -- the recipe ------------------------------------------------------------------------------------


def test_stock_recipe_is_loaded_by_its_place():
    assert load_recipe("full_finetune_single_device").FullFinetuneRecipeSingleDevice
    with pytest.raises(ImportError, match=r"liger_fx needs torchtune 0\.6\.1"):
        load_recipe("no_such_recipe")


@pytest.mark.parametrize("found", ["0.5.0", "none"])
def test_another_torchtune_is_refused(found, monkeypatch):
    monkeypatch.delitem(sys.modules, "liger_fx.recipes", raising=False)

    def version(name):
        if found == "none":
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"made for torchtune 0.6.1, installed is {found}: pip"):
        importlib.import_module("liger_fx.recipes")


def test_dotted_recipe_lists_the_paths():
    """``tune run a.b`` runs ``a``: tune takes the rest for a suffix."""
    with pytest.raises(SystemExit) as listed:
        runpy.run_module("liger_fx.recipes", run_name="__main__")
    folder = Path(torchtune.__file__).parent.parent / "recipes"
    trainers = {p.stem for p in folder.glob("*.py") if "self._optimizer" in p.read_text()}
    lines = str(listed.value).splitlines()
    assert lines[0].startswith("Write the recipe as a path, `tune run liger_fx/recipes/<recipe>")
    assert {line.strip() for line in lines[1:]} == {f"liger_fx/recipes/{t}" for t in trainers}


def test_every_recipe_module_is_torchtunes_with_ours_in_front():
    for path in Path(liger_fx.recipes.__file__).parent.glob("[a-z]*.py"):
        ours = importlib.import_module(f"liger_fx.recipes.{path.stem}")
        (recipe,) = (
            c for c in vars(ours).values() if getattr(c, "__module__", "") == ours.__name__
        )
        assert issubclass(recipe, LayersRecipe)
        assert getattr(ours.stock, recipe.__name__) is recipe
        assert ours.recipe_main is ours.stock.recipe_main


def ranks(monkeypatch, *, other):
    """Two ranks, of which the other one compiles ``other``."""

    def gather(everybody, mine):
        everybody[:] = [mine, other(mine)]

    monkeypatch.setattr(liger_fx.torchtune.recipes.utils, "get_world_size_and_rank", lambda: (2, 0))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


def test_ranks_that_disagree_all_raise(monkeypatch):
    settings = {"policy": "all"}
    ranks(monkeypatch, other=lambda mine: mine)
    _check_ranks_agree(True, settings)
    ranks(monkeypatch, other=lambda mine: mine.replace("policy='all'", "policy='auto'"))
    with pytest.raises(RuntimeError, match="the ranks disagree about what is compiled") as error:
        _check_ranks_agree(True, settings)
    _, zero, one = str(error.value).splitlines()
    assert "rank 0" in zero and "policy='all'" in zero and "torch=" in zero
    assert "rank 1" in one and "policy='auto'" in one


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("full_finetune_single_device", "`tune run liger_fx/recipes/full_finetune_single_device`"),
        ("full_dpo_distributed", "makes them one"),
        ("ppo_full_finetune_single_device", "makes them one"),
        ("knowledge_distillation_single_device", "makes them one"),
        ("eleuther_eval", None),
    ],
)
def test_advice_in_a_stock_recipe(recipe, says, monkeypatch):
    path = Path(torchtune.__file__).parent.parent / "recipes" / f"{recipe}.py"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
    advice.cache_clear()
    found = advice()
    advice.cache_clear()
    assert found is None if says is None else says in found


def test_no_advice_elsewhere(monkeypatch):
    assert advice() is None
    ours = Path(liger_fx.__file__).parent / "recipes" / "full_finetune_single_device.py"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ours), raising=False)
    advice.cache_clear()
    assert advice() is None


def recipe_on(device, *, checkpointed, optimizer=True):
    """What a torchtune recipe has set up when it is asked to keep within a budget."""
    recipe = object.__new__(FusedRecipe)
    recipe._model, recipe._device = model(), torch.device(device)
    if checkpointed:
        training.set_activation_checkpointing(
            recipe._model, auto_wrap_policy={modules.TransformerSelfAttentionLayer}
        )
    if optimizer:
        recipe._optimizer = torch.optim.AdamW(recipe._model.parameters())
    return recipe


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            functools.partial(recipe_on, "cuda", checkpointed=False),
            "needs enable_activation_checkpointing=Tr",
        ),
        (
            functools.partial(recipe_on, "cpu", checkpointed=True),
            "needs a GPU: elsewhere memory is not count",
        ),
        (
            functools.partial(recipe_on, "cuda", checkpointed=True, optimizer=False),
            "optimizer_in_bwd=True",
        ),
    ],
)
def test_a_memory_budget_says_what_it_needs(recipe, says):
    with pytest.raises(ValueError, match=says):
        recipe()._keep_within(20.0)


def test_a_memory_budget_looks_before_each_optimizer_step():
    recipe = recipe_on("cuda", checkpointed=True)
    recipe._keep_within(20.0)
    (budget,) = recipe._optimizer._optimizer_step_pre_hooks.values()
    assert budget.budget == 20 * 2**30 and len(budget.checkpoints) == 2


def ppo_recipe(recipe_class, *, compiles=True, **settings):
    """What torchtune's PPO recipe has set up when it begins to train."""
    torch.manual_seed(0)
    recipe = object.__new__(recipe_class)
    recipe._policy_model, recipe._ref_policy_model = build("llama3_2"), build("llama3")
    with torch.device(DEVICE):
        recipe._value_model, recipe._reward_model = (
            llama2.llama2_classifier(num_classes=1, **SIZES) for _ in range(2)
        )
    recipe._loss_fn = PPOLoss()
    recipe._rng = torch.Generator(DEVICE).manual_seed(0)
    recipe._tokenizer = SimpleNamespace(pad_id=0)
    recipe._stop_token_ids = torch.arange(20, device=DEVICE)
    recipe._temperature, recipe._top_k, recipe._max_generated_tokens = 0.7, None, 5
    recipe._min_response_length, recipe._penalise_no_eos, recipe._reward_penalty = 2, True, -3
    recipe.enable_kv_cache, recipe._gradient_accumulation_steps = False, 1
    recipe.cache_ctx_manager = lambda *_, **__: contextlib.nullcontext()
    recipe._compiles, recipe._settings = compiles, {"inner": "aot_eager"} | settings
    if compiles and issubclass(recipe_class, LayersRecipe):
        recipe._compile_losses()
    return recipe


def ppo_steps(recipe):
    """Of prompts of two lengths, some of them padded: trajectories, statistics, gradients."""
    generator = torch.Generator().manual_seed(1)
    for length in (9, 6):
        prompt = torch.randint(1, V, (B, length), generator=generator)
        prompt[0, :3] = 0
        with torch.no_grad():
            trajectory = recipe.generate_trajectory(prompt.to(DEVICE))
        yield from trajectory
        others = [torch.randn(B, 5, generator=generator).to(DEVICE) for _ in range(2)]
        yield from recipe.ppo_step(trajectory, *others, length)
        yield from (p.grad.clone() for p in recipe._policy_model.parameters())


@pytest.mark.parametrize("compiles", [True, False])
def test_ppo_step_follows_the_stock_recipe(compiles, ppo, caplog):
    stock = load_recipe("ppo_full_finetune_single_device").PPOFullFinetuneRecipeSingleDevice
    fused = ppo.PPOFullFinetuneRecipeSingleDevice
    expected = list(ppo_steps(ppo_recipe(stock)))
    actual = list(ppo_steps(ppo_recipe(fused, compiles=compiles)))
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a, e, rtol=1e-3, atol=1e-5) if compiles else torch.equal(a, e)
    # The reference's, without gradients, and the policy's: one graph for both lengths of prompts.
    counts = [r.counts for r in liger_fx.reports() if "linear_logprobs" in r.counts]
    assert counts == (2 * [{"linear_logprobs": 1}] if compiles else [])
    assert ("the policy has logits while it generates" in caplog.text) == compiles
    assert "not fused" not in caplog.text


def test_ppo_without_the_rewrite_follows_the_stock_recipe(ppo, caplog):
    stock = load_recipe("ppo_full_finetune_single_device").PPOFullFinetuneRecipeSingleDevice
    fused = ppo.PPOFullFinetuneRecipeSingleDevice
    actual = ppo_steps(ppo_recipe(fused, disable=["linear_logprobs"]))
    for a, e in zip(actual, ppo_steps(ppo_recipe(stock)), strict=True):
        assert torch.allclose(a, e, rtol=1e-3, atol=1e-5)
    assert caplog.text.count("the projection and the loss are not fused") == 1
    assert "disabled by option" in caplog.text


def recipe_config(folder, **overrides):
    source = folder / "initial"
    if not source.exists():
        source.mkdir()
        torch.manual_seed(0)
        torch.save(model().state_dict(), source / "model.pt")
    config = {
        "output_dir": str(folder / "out"),
        "tokenizer": {"_component_": "_recipe_parts.Tokenizer"},
        "dataset": {"_component_": "_recipe_parts.Examples", "packed": False},
        "model": {"_component_": "_recipe_parts.model"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
            "checkpoint_dir": str(source),
            "checkpoint_files": ["model.pt"],
            "recipe_checkpoint": None,
            "output_dir": "${output_dir}",
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2},
        "optimizer_in_bwd": False,
        "metric_logger": {"_component_": "_recipe_parts.Losses"},
        "seed": 7, "shuffle": True, "batch_size": 4, "epochs": 1, "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 2, "clip_grad_norm": None, "compile": True,
        "enable_activation_checkpointing": True, "enable_activation_offloading": False,
        "device": DEVICE, "dtype": "fp32", "log_every_n_steps": 1,
        "log_peak_memory_stats": False, "liger_fx": {"inner": "aot_eager"},
    }  # fmt: skip
    return OmegaConf.merge(config, overrides)


def run_recipe(recipe_class, config):
    recipe = recipe_class(cfg=config)
    recipe.setup(cfg=config)
    recipe.train()
    recipe.cleanup()
    return Losses.runs[-1]


@pytest.fixture
def recipes():
    ours = importlib.import_module("liger_fx.recipes.full_finetune_single_device")
    stock = load_recipe("full_finetune_single_device")
    return ours.FullFinetuneRecipeSingleDevice, stock.FullFinetuneRecipeSingleDevice


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"loss": {"_component_": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1}},
        {"loss": {"_component_": "_recipe_parts.FocalLoss"}},
        {"optimizer_in_bwd": True, "gradient_accumulation_steps": 1},
        {"enable_activation_checkpointing": False, "clip_grad_norm": 1.0},
    ],
    ids=["chunked_loss", "plain_loss", "own_loss", "optimizer_in_bwd", "no_checkpointing"],
)
def test_recipe_follows_the_stock_recipe(overrides, recipes, tmp_path):
    fused, stock = recipes
    ours = run_recipe(fused, recipe_config(tmp_path, **overrides))
    saved = load_saved(tmp_path)
    theirs = run_recipe(stock, recipe_config(tmp_path, **overrides, compile=False))
    assert len(ours) == len(theirs) >= 2
    assert ours == pytest.approx(theirs, rel=1e-5)

    expected = load_saved(tmp_path)
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert saved[name].dtype == tensor.dtype and saved[name].shape == tensor.shape
        torch.testing.assert_close(saved[name], tensor, rtol=1e-3, atol=1e-4)


PACKED = {"dataset": {"_component_": "_recipe_parts.packed_examples", "packed": True}}


@pytest.mark.parametrize(
    "overrides",
    [
        PACKED,
        pytest.param({"enable_activation_offloading": True}, marks=pytest.mark.gpu),
        pytest.param({"liger_fx": {"inner": "inductor"}}, marks=pytest.mark.gpu),
        pytest.param(PACKED | {"liger_fx": {"inner": "inductor"}}, marks=pytest.mark.gpu),
    ],
    ids=["packed", "offloading", "inductor", "packed_inductor"],
)
def test_recipe_follows_the_stock_losses(overrides, recipes, tmp_path):
    fused, stock = recipes
    ours = run_recipe(fused, recipe_config(tmp_path, **overrides))
    theirs = run_recipe(stock, recipe_config(tmp_path, **overrides, compile=False))
    assert ours == pytest.approx(theirs, rel=1e-4)
    counts = [r.counts for r in liger_fx.reports() if r.counts]
    assert counts and all(c == {"linear_cross_entropy": 1} for c in counts)


LORA = {
    "model": {
        "_component_": "_recipe_parts.lora_model",
        "lora_attn_modules": ["q_proj", "v_proj"],
        "apply_lora_to_mlp": True,
        "lora_rank": 4,
        "lora_alpha": 8,
    },
    "lr_scheduler": {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "num_warmup_steps": 1,
    },
    "save_adapter_weights_only": False,
    "liger_fx": {"inner": "inductor" if DEVICE == "cuda" else "aot_eager", "policy": "all"},
}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"custom_sharded_layers": ["tok_embeddings", "output"]},
        PACKED,
        pytest.param({"fsdp_cpu_offload": True}, marks=pytest.mark.gpu),
        pytest.param({"enable_activation_offloading": True}, marks=pytest.mark.gpu),
    ],
    ids=["plain", "sharded_head", "packed", "cpu_offload", "offloading"],
)
def test_lora_under_fsdp2_follows_the_stock_losses(overrides, monkeypatch, tmp_path):
    name, recipe = "lora_finetune_distributed", "LoRAFinetuneRecipeDistributed"
    fused, stock = importlib.import_module(f"liger_fx.recipes.{name}"), load_recipe(name)
    if DEVICE == "cpu":  # the recipe asks a GPU for its memory whatever the device is
        for unneeded in ("get_memory_stats", "log_memory_stats", "cleanup_before_training"):
            for module in (training, fused.stock.training):
                monkeypatch.setattr(module, unneeded, lambda *_, **__: None)
    with group_of_one():
        ours = run_recipe(getattr(fused, recipe), recipe_config(tmp_path, **LORA, **overrides))
    # torchtune's form cannot shard a tied head on its own: there, as it shards by default.
    default = {k: v for k, v in overrides.items() if k != "custom_sharded_layers"}
    with group_of_one():
        config = recipe_config(tmp_path, **LORA, **default, compile=False)
        theirs = run_recipe(getattr(stock, recipe), config)
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert Report.merged(liger_fx.reports()).counts["linear_cross_entropy"] == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recipe_with_every_rewrite_follows_the_stock_losses(checkpointing, recipes, tmp_path):
    overrides = {"enable_activation_checkpointing": checkpointing}
    settings = {"policy": "all"}
    ours = run_recipe(recipes[0], recipe_config(tmp_path, **overrides, liger_fx=settings))
    theirs = run_recipe(recipes[1], recipe_config(tmp_path, **overrides, compile=False))
    assert ours == pytest.approx(theirs, rel=1e-4)
    layer = {"rope": 2, "add_rms_norm": 1, "rms_norm": 1, "tiled_mlp": 1}
    if DEVICE == "cpu":  # a GPU has no kernel for it in fp32
        layer["grouped_query_attention"] = 1
    head = {"linear_cross_entropy": 1, "rms_norm": 1}
    counts = [r.counts for r in liger_fx.reports() if r.counts]
    assert layer in counts and head in counts and all(c in (layer, head) for c in counts)


def test_stock_recipe_with_the_backend_by_name(recipes, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "liger_fx")
    monkeypatch.setenv("LIGER_FX_INNER", "eager")
    config = recipe_config(tmp_path)
    del config["liger_fx"]
    compiled = run_recipe(recipes[1], config)
    assert compiled == pytest.approx(run_recipe(recipes[1], config | {"compile": False}), rel=1e-5)
    misses = {m.reason for r in liger_fx.reports() for m in r.near_misses}
    assert misses == {
        "wanted linear, found `l_logits_`, an input of this graph: what computes it was traced "
        "elsewhere, or runs eagerly"
    }


def load_saved(folder):
    (path,) = (folder / "out").glob("epoch_0/*model*.bin")
    return torch.load(path, weights_only=True)


def test_recipe_reports(recipes, tmp_path, caplog):
    run_recipe(recipes[0], recipe_config(tmp_path))
    assert words(caplog.text).count("linear_cross_entropy replaced") == 1
    reports = json.loads((tmp_path / "out" / "liger_fx_report.json").read_text())
    assert [r["counts"] for r in reports if r["counts"]] == [{"linear_cross_entropy": 1}]


def test_loss_that_needs_the_logits_runs_as_in_the_stock_recipe(recipes, tmp_path, caplog):
    overrides = {"loss": {"_component_": "_recipe_parts.ZLoss"}}
    ours = run_recipe(recipes[0], recipe_config(tmp_path, **overrides))
    theirs = run_recipe(recipes[1], recipe_config(tmp_path, **overrides, compile=False))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert caplog.text.count("the projection and the loss are not fused") == 1
    assert "is also used by `logsumexp`" in caplog.text


def test_recipe_without_compile_is_the_stock_recipe(recipes, tmp_path, caplog):
    run_recipe(recipes[0], recipe_config(tmp_path, compile=False))
    assert "compile=False: nothing is rewritten" in caplog.text
    assert liger_fx.reports() == []


def test_recipe_takes_its_settings_from_the_config(recipes, tmp_path, caplog):
    settings = {"inner": "eager", "disable": ["linear_cross_entropy"]}
    run_recipe(recipes[0], recipe_config(tmp_path, liger_fx=settings))
    assert (
        "the projection and the loss are not fused, and run as in torchtune's recipe: "
        in caplog.text
    )
    assert "disabled by option" in caplog.text
    assert all(
        r.decisions["linear_cross_entropy"] == "disabled by option" for r in liger_fx.reports()
    )
    with pytest.raises(ValueError, match="unknown option 'linear_cross_entropy"):
        run_recipe(
            recipes[0], recipe_config(tmp_path, liger_fx={"linear_cross_entropy": {"tokens": 1}})
        )
    with pytest.raises(ValueError, match=r"liger_fx\.memory_gib"):
        run_recipe(recipes[0], recipe_config(tmp_path, liger_fx={"memory_gib": 20}))
