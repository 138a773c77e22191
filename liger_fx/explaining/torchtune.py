"""torchtune recipes, by config: what the recipes of `liger_fx.recipes` compile, on meta."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtune import config as components
from torchtune import training
from torchtune._recipe_registry import get_all_recipes
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.rlhf.loss import DPOLoss, RSOLoss
from yaml import YAMLError

from liger_fx.explaining.subject import (
    DTYPES,
    CannotExplain,
    Part,
    Request,
    Subject,
    described,
    kinds_of,
    unknown,
)
from liger_fx.report import Place
from liger_fx.torchtune import fuse_distillation, fuse_head, fuse_log_probs
from liger_fx.torchtune.recipes import flatten


def subject(config: str, request: Request) -> Subject:
    """One layer of each kind, and the head with the loss, as the fused recipe of ``config``
    compiles them.

    config: a name that ``tune ls`` prints, or a YAML file. Raises CannotExplain for one that is
    unknown, for a recipe without one model and a loss (PPO), and for a model that cannot be built.
    """
    cfg = _load(config, request.overrides)
    wanted = request.dtype or cfg.get("dtype", "bf16")
    if wanted not in DTYPES:
        raise unknown("dtype", str(wanted), DTYPES)
    dtype = DTYPES[wanted]
    model, loss = _build(cfg, "model", dtype), _build(cfg, "loss", dtype)
    checkpoint = bool(request.checkpoint or cfg.get("enable_activation_checkpointing"))
    title = f"{config}: {described(model, dtype, request, checkpoint)}"
    if checkpoint:
        training.set_activation_checkpointing(
            model, auto_wrap_policy={TransformerSelfAttentionLayer}
        )
    layers = _layers(model)
    kinds: dict[str, list[str]] = {}
    for name, kind in zip(layers, kinds_of([*layers.values()]), strict=True):
        kinds.setdefault(kind, []).append(name)
    decoder = getattr(model, "decoder", model)
    if not hasattr(decoder, "tok_embeddings"):
        raise CannotExplain(f"expected a decoder of torchtune as `model:`, not {type(model)}")
    width = decoder.tok_embeddings.embedding_dim
    hidden = functools.partial(_hidden, request, dtype)
    parts = [
        Part(layers[names[0]], (hidden(width),), {}, functools.partial(_in_each, names))
        for names in kinds.values()
    ]
    options = flatten(cfg.get("liger_fx") or {})
    options.pop("memory_gib", None)
    try:
        head = _head(cfg, model, loss, hidden(width))
    except (TypeError, RuntimeError) as error:
        raise CannotExplain(f"the head and the loss cannot be explained: {error}") from error
    return Subject(title, _facts(cfg, len(kinds), len(layers)), [*parts, head], [*layers], options)


def _hidden(request: Request, dtype: torch.dtype, width: int) -> torch.Tensor:
    size = request.batch, request.seq, width
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=True)


def _load(config: str, overrides: Mapping[str, Any]) -> Any:
    known = {c.name: c.file_path for recipe in get_all_recipes() for c in recipe.configs}
    path = Path(config)
    if not path.is_file():
        if config not in known:
            raise unknown("YAML file or config of torchtune", config, known)
        path = Path(torchtune.__file__).parent.parent / "recipes" / "configs" / known[config]
    try:
        cfg = OmegaConf.load(path)
    except YAMLError as error:
        raise CannotExplain(f"{path} is not YAML: {error}") from error
    for key, value in overrides.items():
        OmegaConf.update(cfg, key, value)
    for key in ("model", "loss"):
        if key not in cfg:
            raise CannotExplain(
                f"{config} has no `{key}:`: expected a config of a recipe that trains one model"
            )
    return cfg


def _build(cfg: Any, key: str, dtype: torch.dtype) -> Any:
    try:
        with training.set_default_dtype(dtype), torch.device("meta"):
            built = components.instantiate(cfg[key])
        for module in built.modules():
            if hasattr(module, "rope_init"):  # scaled angles depend on values: not on meta
                module.rope_init()
                module.to("meta")
    except Exception as error:  # whatever a component says of its arguments
        raise CannotExplain(f"`{key}:` cannot be built on meta: {error}") from error
    if adapters := get_adapter_params(built):
        set_trainable_params(built, adapters)
    return built


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers, with their activation checkpoints, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CheckpointWrapper | TransformerSelfAttentionLayer)
        and "_checkpoint_wrapped_module" not in name
    }


def _in_each(names: Sequence[str], place: Place) -> list[Place]:
    """The places in the layers of these names of a place in one of them."""
    return [Place(".".join(filter(None, (name, place.module))), place.source) for name in names]


def _head(cfg: Any, model: Any, loss: Any, hidden: torch.Tensor) -> Part:
    """The region of the fused recipe from hidden states to the loss."""
    inputs = [hidden, torch.empty(hidden.shape[:2], dtype=torch.long, device="meta")]
    if "teacher_model" in cfg:
        teacher = _build(cfg, "teacher_model", hidden.dtype)
        divergence = _build(cfg, "kd_loss", hidden.dtype)
        width = teacher.tok_embeddings.embedding_dim
        inputs.insert(1, torch.empty(*hidden.shape[:2], width, dtype=hidden.dtype, device="meta"))
        head: Any = fuse_distillation(model, teacher, loss, divergence, cfg.get("kd_ratio", 0.5))
        inputs = [t.flatten(0, 1).unsqueeze(0) for t in inputs]
    elif isinstance(loss, DPOLoss | RSOLoss):
        head = fuse_log_probs(model)
    else:
        if hasattr(loss, "num_output_chunks"):
            model.set_num_output_chunks(loss.num_output_chunks)
        head = fuse_head(model, loss)
    return Part(head._outcome, inputs, {}, lambda place: [place])


def _facts(cfg: Any, kinds: int, layers: int) -> list[str]:
    facts = [
        f"Layers traced: {kinds} of {layers}, one of each kind, each on its own, and the head with "
        "the loss, as the recipes of liger_fx compile them; counts and bytes are for all layers."
    ]
    if "packed: true" in OmegaConf.to_yaml(cfg.get("dataset") or {}).lower():
        facts.append(
            "The data set is packed: the recipes attend over documents, which is not traced here."
        )
    if "teacher_model" in cfg or "rlhf" in cfg.loss._component_:
        facts.append("The layers of a teacher or a reference model are not listed.")
    return facts
