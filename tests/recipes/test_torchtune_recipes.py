"""What torchtune's recipes get: loading, settings, agreement of ranks, and steps on one device."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchtune
from _recipe_parts import Losses, model
from _torchtune_models import SIZES, B, V, build, group_of_one
from _util import DEVICE, words
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader
from torchtune import modules, training
from torchtune.data import padded_collate_sft
from torchtune.models import llama2
from torchtune.rlhf.loss import PPOLoss

import liger_fx
from liger_fx import Report
from liger_fx.torchtune import FusedRecipe, LayersRecipe, load_recipe
from liger_fx.torchtune.advice import advice
from liger_fx.torchtune.recipes import _check_ranks_agree

pytestmark = pytest.mark.usefixtures("head_alone")


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


UNPACKED = {"dataset": {"packed": False}, "batch_size": 4}


class SetUp:
    """A stock recipe that sets up a loss, and batches as ``collate_fn`` makes them."""

    def setup(self, cfg):
        self._loss_fn, self._dtype = nn.CrossEntropyLoss(), torch.float32
        self._device = torch.device(cfg.get("device", "cuda"))
        self._dataloader = DataLoader([], collate_fn=functools.partial(padded_collate_sft))


class Layers(LayersRecipe, SetUp):
    """Without a model whose hidden states only a loss of labels reads."""

    def _compile_losses(self):
        return []


def settings_of(cfg, recipe=Layers):
    """The options that the layers are compiled with."""
    made = recipe()
    made.setup(OmegaConf.create(cfg | {"compile": True}))
    return made._settings


@pytest.mark.parametrize(
    ("cfg", "padded"),
    [
        (UNPACKED, True),
        ({"dataset": {}, "batch_size": 2}, True),
        ({"dataset": [{}, {"packed": False}], "batch_size": 2}, True),
        ({"dataset": {"packed": True}, "batch_size": 4}, False),
        ({"dataset": [{"packed": True}, {"packed": True}], "batch_size": 4}, False),
        ({"dataset": {"packed": False}, "batch_size": 1}, False),
        ({"dataset": {}}, False),
        ({"batch_size": 4}, False),
    ],
)
def test_padding_is_skipped_where_torchtune_pads(cfg, padded):
    assert settings_of(cfg) == ({"tiled_mlp.skip_padding": True} if padded else {})


@pytest.mark.parametrize("chosen", [False, True])
def test_what_the_user_says_of_padding_stands(chosen, monkeypatch):
    nested = {"liger_fx": {"tiled_mlp": {"skip_padding": chosen, "tile_tokens": 64}}}
    expected = {"tiled_mlp.skip_padding": chosen, "tiled_mlp.tile_tokens": 64}
    assert settings_of(UNPACKED | nested) == expected
    monkeypatch.setenv("LIGER_FX_TILED_MLP_SKIP_PADDING", str(chosen))
    assert settings_of(UNPACKED) == {}  # the variable is read where the backend compiles


class WithLabels(Layers):
    def setup(self, cfg):
        self._model = model()
        super().setup(cfg)

    def _compile_losses(self):
        return [self._model]


LEFT_OUT = (
    "the layers leave out what follows the last label of a sequence, and tokens that sequences "
    "begin with in common are there once"
)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, LEFT_OUT),
        ({"device": "cpu", "liger_fx": {"unpad": True}}, LEFT_OUT),
        ({"device": "cpu"}, None),
        ({"liger_fx": {"unpad": False}}, None),
        (
            {"tensor_parallel_dim": 2},
            "padding goes through the layers: the layers are parallel over their tensors",
        ),
    ],
)
def test_padding_is_left_out_where_a_loss_reads_labelled_tokens(changed, says, monkeypatch):
    said = []
    monkeypatch.setattr(
        "liger_fx.torchtune.recipes.utils.log_rank_zero", lambda log, text, *_: said.append(text)
    )
    left_out = settings_of(UNPACKED | changed, WithLabels) == {}
    assert left_out == (says == LEFT_OUT)
    assert said == ([says] if says else [])


def recipe_on(device, *, checkpointed, optimizer=True, offloads=False):
    """What a torchtune recipe has set up when it is asked to keep within a budget."""
    recipe = object.__new__(FusedRecipe)
    recipe._enable_activation_offloading = offloads
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
        (
            functools.partial(recipe_on, "cuda", checkpointed=True, offloads=True),
            "enable_activation_offloading takes them off it: choose one of them",
        ),
    ],
)
def test_a_memory_budget_says_what_it_needs(recipe, says):
    with pytest.raises(ValueError, match=says):
        recipe()._keep_within(20.0)


def test_a_memory_budget_is_a_number_or_auto():
    with pytest.raises(ValueError, match="memory_gib is 'most', expected a number of GiB or auto"):
        recipe_on("cuda", checkpointed=True)._keep_within("most")


@pytest.mark.parametrize("gib", [20.0, 0])
def test_a_memory_budget_looks_before_each_optimizer_step(gib):
    recipe = recipe_on("cuda", checkpointed=True)
    recipe._keep_within(gib)
    (budget,) = recipe._optimizer._optimizer_step_pre_hooks.values()
    assert budget.budget == gib * 2**30 and budget.layers == 2


def test_a_memory_budget_of_what_the_gpu_has(monkeypatch):
    """80 GiB, of which others hold 10."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20 * 2**30)
    recipe = recipe_on("cuda", checkpointed=True)
    recipe._keep_within("auto")
    (budget,) = recipe._optimizer._optimizer_step_pre_hooks.values()
    assert budget.budget == 62 * 2**30


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
        layer["attention"] = 1
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
    overrides = {"loss": {"_component_": "_recipe_parts.WithWeightDecayOfLogits"}}
    ours = run_recipe(recipes[0], recipe_config(tmp_path, **overrides))
    theirs = run_recipe(recipes[1], recipe_config(tmp_path, **overrides, compile=False))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert caplog.text.count("the projection and the loss are not fused") == 1
    assert "is also used by `square`" in caplog.text


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
    assert not any("linear_cross_entropy" in r.counts for r in liger_fx.reports())
    with pytest.raises(ValueError, match="unknown option 'linear_cross_entropy"):
        run_recipe(
            recipes[0], recipe_config(tmp_path, liger_fx={"linear_cross_entropy": {"tokens": 1}})
        )
    with pytest.raises(ValueError, match="memory_gib"):
        run_recipe(recipes[0], recipe_config(tmp_path, liger_fx={"memory_gib": 20}))
