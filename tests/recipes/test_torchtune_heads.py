"""torchtune's models in one graph, and the head region."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchtune
from _torchtune_models import FAMILIES, SIZES, B, S, V, assert_close, build, group_of_one
from _util import DEVICE, TOLERANCES, only, relative_error
from liger_fx.passes import linear_cross_entropy
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torchtune import modules, rlhf, training
from torchtune.config import instantiate
from torchtune.models import llama3
from torchtune.modules import loss
from torchtune.modules.loss import CEWithChunkedOutputLoss

import liger_fx
from liger_fx import Report
from liger_fx.torchtune import (
    HeadNotFused,
    HeadTokenLogProbs,
    Unprojected,
    compile_layers,
    fuse_distillation,
    fuse_head,
    fuse_log_probs,
)
from liger_fx.torchtune.recipes import _ClassLoss, _DistillationLoss, flatten

pytestmark = pytest.mark.usefixtures("head_alone")
capture = only(linear_cross_entropy)


@pytest.fixture
def batch():
    tokens = torch.randint(0, V, (B, S), device=DEVICE)
    labels = tokens.clone()
    labels[:, :5] = -100
    return tokens, labels


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


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_step_of_every_family(family, batch):
    net = build(family)
    step = recipe_step(net, torch.nn.CrossEntropyLoss())
    expected = loss_and_gradients(step, net, *batch)
    compiled = torch.compile(step, backend="liger_fx", options={"inner": "eager"}, fullgraph=True)
    assert_close(loss_and_gradients(compiled, net, *batch), expected)
    (report,) = liger_fx.reports()
    assert report.counts == {"linear_cross_entropy": 1}
    assert {r.reason for r in report.rejections} == {"not in the policy's list"}


@pytest.mark.parametrize(
    ("variant", "family"),
    [
        *itertools.product(["checkpointed", "bf16"], ["llama3_2", "gemma2", "phi3", "qwen2"]),
        # test_models.py has it for each rewrite and more models
        pytest.param("dynamic", "gemma2", marks=pytest.mark.slow),
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
    assert "LoRA on the head" in liger_fx.reports()[0].why_not("linear_cross_entropy")


def test_report_names_torchtunes_modules(batch):
    net = build("llama3")
    found = capture(recipe_step(net, torch.nn.CrossEntropyLoss()), *batch)
    (made,) = found.reports[0].replacements
    assert made.place.module == "loss_fn"
    assert made.place.source.startswith("test_torchtune_heads.py:")


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
