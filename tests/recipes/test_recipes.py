"""Each torchtune recipe through ``tune run``: stock under Inductor, stock with liger_fx as the
backend, and liger_fx's own form of it, must train alike and leave the same checkpoint.

Few of these run by default; ``pytest -m recipes`` runs the others, in 40 minutes on two cores.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _recipes import PACKED, Run, config, prepare, run
from _util import words

TOLERANCE = 1e-3  # of every logged metric, relative; fp32

# The whole catalogue, also where `auto` would leave a rewrite on a CPU.
EVERY_REWRITE = {"LIGER_FX_POLICY": "all"}

FUSED = "linear_cross_entropy replaced"
LOGPROBS = "linear_logprobs replaced"
OF_TWO_MODELS = f"{LOGPROBS} 2 x"  # of PPO's policy in a step, and of its reference
DISTILLED = "linear_kl replaced"
APART = "runs the output projection eagerly, outside of what it compiles"


@dataclass(frozen=True)
class Case:
    """A recipe with some settings. says: what the log of its fused form holds. baseline: config of
    the stock run. inner: what compiles both. weights_apart: how far saved weights may lie from the
    stock run's, relative."""

    recipe: str
    name: str
    weights: str = "tied"
    settings: Mapping[str, Any] = field(default_factory=dict)
    says: str = FUSED
    baseline: Mapping[str, Any] = field(default_factory=lambda: {"compile": True})
    inner: str = "inductor"
    weights_apart: float = 1e-3

    def __str__(self) -> str:
        return f"{self.recipe}-{self.name}"


def cases(recipe: str, **variants: Mapping[str, Any]) -> list[Case]:
    return [Case(recipe, name, **rest) for name, rest in variants.items()]


def settings(**settings: Any) -> dict[str, Any]:
    return {"settings": settings}


def kl(name: str) -> dict[str, str]:
    return {"_component_": f"torchtune.modules.loss.{name}"}


PLAIN_LOSS = {"_component_": "torch.nn.CrossEntropyLoss"}
SHARDED_HEAD = {"custom_sharded_layers": ["tok_embeddings", "output"]}
ON_ONE = dict(
    accumulation=settings(gradient_accumulation_steps=4, clip_grad_norm=1.0),
    plain_loss=settings(loss=PLAIN_LOSS),
    no_checkpoints=settings(enable_activation_checkpointing=False),
    packed=settings(**PACKED),
)
LORA_HEAD = {
    "weights": "untied",
    "settings": {"model": {"apply_lora_to_output": True}},
    "says": "the logits are a sum (LoRA on the head?), not one projection",
}
ADAPTERS = dict(
    dora=settings(model={"use_dora": True}),
    qlora={"weights": "tied_wide", **settings(model={"quantize_base": True})},
    lora_on_the_head=LORA_HEAD,
)
# torchtune's own form refuses compile=True. Fake quantisation rounds: what differs in the last bit
# may fall into the next step of the grid, so the weights of two runs drift apart.
QAT = {"baseline": {"compile": False}, "weights_apart": 2e-2}

# Inductor, which takes as long for its kernels as all else here does, compiles the recipe by name.
QUICK = [
    *cases("full_finetune_single_device", aot_eager={"inner": "aot_eager"}),
]
REST = [
    *cases("lora_dpo_single_device", aot_eager={"says": LOGPROBS, "inner": "aot_eager"}),
    *cases(
        "full_finetune_single_device",
        default={},
        untied={"weights": "untied"},
        optimizer_in_bwd=settings(optimizer_in_bwd=True),
        varying_lengths=settings(tokenizer={"pad": False}),
        **ON_ONE,
    ),
    *cases(
        "full_finetune_distributed",
        default={},
        untied_sharded={"weights": "untied", "settings": SHARDED_HEAD},
        optimizer_in_bwd=settings(optimizer_in_bwd=True),
        selective=settings(enable_activation_checkpointing=False, ac_mode="selective", ac_option=1),
        no_reshard=settings(fsdp_reshard_after_forward=False),
        **ON_ONE,
    ),
    *cases("lora_finetune_single_device", default={}, **ON_ONE, **ADAPTERS),
    *cases(
        "lora_finetune_distributed",
        default={},
        untied_sharded={"weights": "untied", "settings": SHARDED_HEAD},
        **ADAPTERS,
    ),
    *cases("qat_distributed", default=QAT),
    *cases("qat_lora_finetune_distributed", default=QAT),
    *cases(
        "full_dpo_distributed",
        default={"says": LOGPROBS},
        accumulation={"says": LOGPROBS, **settings(gradient_accumulation_steps=4)},
        untied_sharded={"weights": "untied", "says": LOGPROBS, **settings(**SHARDED_HEAD)},
    ),
    *cases(
        "lora_dpo_single_device",
        default={"says": LOGPROBS},
        varying_lengths={"says": LOGPROBS, **settings(tokenizer={"pad": False})},
        smoothing={"says": LOGPROBS, **settings(loss={"label_smoothing": 0.1})},
        lora_on_the_head=LORA_HEAD,
    ),
    *cases("lora_dpo_distributed", default={"says": LOGPROBS}),
    *cases(
        "ppo_full_finetune_single_device",
        default={"says": OF_TWO_MODELS},
        optimizer_in_bwd={
            "weights": "untied",
            "says": OF_TWO_MODELS,
            **settings(optimizer_in_bwd=True, ppo_epochs=2, temperature=1.0),
        },
        no_cache={
            "weights": "untied",
            "says": OF_TWO_MODELS,
            **settings(
                enable_kv_cache=False,
                gradient_accumulation_steps=2,
                enable_activation_checkpointing=False,
            ),
        },
    ),
    *cases(
        "knowledge_distillation_single_device",
        default={"says": DISTILLED},
        plain_losses={"says": DISTILLED, **settings(loss=PLAIN_LOSS, kd_loss=kl("ReverseKLLoss"))},
        symmetric={
            "says": DISTILLED,
            **settings(kd_loss=kl("SymmetricKLWithChunkedOutputLoss"), kd_ratio=0.9),
        },
        accumulation={"says": DISTILLED, **settings(gradient_accumulation_steps=4)},
        packed={"says": DISTILLED, **settings(**PACKED)},
        lora_on_the_head=LORA_HEAD,
    ),
    *cases(
        "knowledge_distillation_distributed",
        default={"says": DISTILLED},
        untied_sharded={"weights": "untied", "says": DISTILLED, **settings(**SHARDED_HEAD)},
    ),
]


def parameters(chosen: Sequence[Case], rest: Sequence[Case]) -> Any:
    marked = [pytest.param(case, marks=pytest.mark.recipes, id=str(case)) for case in rest]
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=str(case)) for case in chosen] + marked
    )


class Recipes:
    """Runs cases in one folder; of each, the stock run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = prepare(folder / "data")
        self.stock = functools.cache(self._stock)

    def run(self, case: Case, settings: Mapping[str, Any], **how: Any) -> Run:
        whole = {**case.settings, **settings}
        path = config(case.recipe, self.data, self.folder, weights=case.weights, **whole)
        return run(case.recipe, path, **how)

    def _stock(self, name: str) -> Run:
        case = CASES[name]
        return self.run(case, case.baseline, backend=case.inner)


CASES = {str(case): case for case in [*QUICK, *REST]}


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    return Recipes(tmp_path_factory.mktemp("recipes"))


@parameters(QUICK, REST)
def test_fused_recipe_trains_as_the_stock_one(case, recipes):
    environ = {**EVERY_REWRITE, "LIGER_FX_INNER": case.inner}
    # As on a GPU; but for DPO, whose recipes log the mean of all logits.
    as_on_gpu = {"compile": True, "liger_fx": {"unpad": "dpo" not in case.recipe}}
    fused = recipes.run(case, as_on_gpu, fused=True, env=environ)
    assert case.says in words(fused.output)
    assert_alike(fused, recipes.stock(str(case)), case.weights_apart)


PREFERENCE = [
    Case(recipe, "unpadded", says="the layers leave out what follows the last label", inner=inner)
    for recipe, inner in (
        ("lora_dpo_single_device", "inductor"),
        ("full_dpo_distributed", "aot_eager"),
    )
]


@parameters([], PREFERENCE)
def test_preference_without_padding(case, recipes):
    """The mean of the logits, which is logged, is of fewer tokens then."""
    without = {"compile": True, "liger_fx": {"unpad": True}}
    environ = {**EVERY_REWRITE, "LIGER_FX_INNER": case.inner}
    fused = recipes.run(case, without, fused=True, env=environ)
    stock = recipes.run(case, case.baseline, backend=case.inner)
    assert case.says in words(fused.output)
    for run_ in (fused, stock):
        for metrics in run_.metrics:
            for name in [name for name in metrics if name.startswith("logits/")]:
                del metrics[name]
    assert_alike(fused, stock, case.weights_apart)


# Of the recipes that compile at all in their stock form, the default and what changes the layers.
BY_NAME = [
    case for case in REST if case.baseline["compile"] and case.name in ("default", "dora", "qlora")
]


@parameters([], [*QUICK[:1], *BY_NAME])  # test_examples.py runs one
def test_stock_recipe_with_the_backend_by_name(case, recipes):
    ours = recipes.run(case, {"compile": True}, backend="liger_fx", env=EVERY_REWRITE)
    # lora_dpo_distributed does not look at `compile`.
    assert (APART in ours.output) == (case.recipe != "lora_dpo_distributed")
    assert_alike(ours, recipes.stock(str(case)), case.weights_apart)


RESUMED = [
    "full_finetune_single_device",
    "lora_finetune_single_device",
    "full_finetune_distributed",
]


@parameters([], [Case(r, n) for r in RESUMED for n in ("stock_to_fused", "fused_to_stock")])
def test_run_goes_on_in_the_other_form(case, recipes):
    """From what a run of one form saved, both forms go on alike."""
    two_epochs = {"epochs": 2, "max_steps_per_epoch": 5, "compile": True}
    stock = {"backend": "aot_eager"}
    fused = {"fused": True, "env": {**EVERY_REWRITE, "LIGER_FX_INNER": "aot_eager"}}
    first, second = (stock, fused) if case.name == "stock_to_fused" else (fused, stock)
    whole = recipes.run(case, two_epochs, **first)
    same, other = (recipes.run(case, two_epochs, **form, resume=whole) for form in (first, second))
    assert len(same.metrics) == 5
    assert_alike(other, same, 1e-3)


def assert_alike(actual: Run, expected: Run, weights_apart: float) -> None:
    assert len(actual.metrics) == len(expected.metrics) > 0
    for ours, theirs in zip(actual.metrics, expected.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-5)
    assert_same_weights(actual, expected, weights_apart)


def assert_same_weights(actual: Run, expected: Run, weights_apart: float) -> None:
    saved, wanted = actual.checkpoint(), expected.checkpoint()
    assert saved.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert saved[name].dtype == tensor.dtype and saved[name].shape == tensor.shape, name
        apart = (saved[name].double() - tensor.double()).norm()
        assert apart <= weights_apart * tensor.double().norm() + 1e-6, name
