"""torchtune recipes, by config: what the recipes of `liger_fx.recipes` compile, on meta."""

from __future__ import annotations

import difflib
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
from torchtune import modules, training
from torchtune._recipe_registry import get_all_recipes
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.rlhf import loss as preference

from liger_fx.explaining.subject import (
    DTYPES,
    CannotExplain,
    Part,
    Request,
    Subject,
    kind_of,
)
from liger_fx.report import Place
from liger_fx.torchtune import fuse_distillation, fuse_head, fuse_log_probs
from liger_fx.torchtune.recipes import flatten

PREFERENCE = (preference.DPOLoss, preference.RSOLoss)


def subject(config: str, request: Request) -> Subject:
    """One layer of each kind, and the head with the loss, as the fused recipe of ``config``
    compiles them.

    config: a name that ``tune ls`` prints, or a YAML file. Raises CannotExplain for one that is
    unknown, for a recipe without one model and a loss (PPO), and for a model that cannot be built.
    """
    cfg = _load(config, request.overrides)
    dtype = DTYPES[request.dtype or cfg.get("dtype", "bf16")]
    model, loss = _build(cfg, "model", dtype), _build(cfg, "loss", dtype)
    parameters = sum(p.numel() for p in model.parameters())
    checkpointed = bool(request.checkpoint or cfg.get("enable_activation_checkpointing"))
    if checkpointed:
        training.set_activation_checkpointing(
            model, auto_wrap_policy={modules.TransformerSelfAttentionLayer}
        )
    options = flatten(OmegaConf.to_container(cfg.get("liger_fx", OmegaConf.create())))
    options.pop("memory_gib", None)
    decoder = getattr(model, "decoder", model)
    size = request.batch, request.seq, decoder.tok_embeddings.embedding_dim
    hidden = functools.partial(torch.empty, device="meta", dtype=dtype, requires_grad=True)
    layers = _layers(model)
    kinds: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        kinds.setdefault(kind_of(layer), []).append(name)
    parts = [
        Part(layers[names[0]], (hidden(size),), {}, functools.partial(_in_each, names))
        for names in kinds.values()
    ]
    head = _head(cfg, model, loss, hidden(size), dtype)
    return Subject(
        title=f"{config}: {type(model).__name__}, {parameters / 1e9:.2f} B parameters in "
        f"{str(dtype).removeprefix('torch.')}, "
        f"batch {request.batch} x {request.seq} tokens"
        f"{', activation checkpointing' if checkpointed else ''}",
        facts=_facts(cfg, len(parts), len(layers)),
        parts=[*parts, head],
        layers=list(layers),
        options=options,
    )


def _load(config: str, overrides: Mapping[str, Any]) -> Any:
    known = {c.name: c.file_path for recipe in get_all_recipes() for c in recipe.configs}
    path = Path(config)
    if not path.is_file():
        if config not in known:
            near = difflib.get_close_matches(config, known, n=6, cutoff=0.4)
            raise CannotExplain(
                f"no file, and no config of torchtune, is called {config!r}; near it are "
                f"{', '.join(near) or 'none'}. torchtune has {', '.join(sorted(known))}"
            )
        path = Path(torchtune.__file__).parent.parent / "recipes" / "configs" / known[config]
    cfg = OmegaConf.load(path)
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
    except Exception as error:  # whatever a component says of its arguments
        raise CannotExplain(f"`{key}:` cannot be built on meta: {error}") from error
    if isinstance(built, nn.Module):
        for module in built.modules():
            if hasattr(module, "rope_init"):  # scaled angles depend on values: not on meta
                module.rope_init()
                module.to("meta")
        if adapters := get_adapter_params(built):
            set_trainable_params(built, adapters)
    return built


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers, with their activation checkpoints, by name."""
    wrapped = (CheckpointWrapper, modules.TransformerSelfAttentionLayer)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, wrapped) and "_checkpoint_wrapped_module" not in name:
            found[name] = module
    return found


def _in_each(names: Sequence[str], place: Place) -> list[Place]:
    """The places in the layers of these names of a place in one of them."""
    return [Place(".".join(filter(None, (name, place.module))), place.source) for name in names]


def _head(cfg: Any, model: Any, loss: Any, hidden: torch.Tensor, dtype: torch.dtype) -> Part:
    """The region of the fused recipes from hidden states to the loss."""
    labels = torch.empty(hidden.shape[:2], dtype=torch.long, device="meta")
    inputs: tuple[Any, ...] = hidden, labels
    if "teacher_model" in cfg:
        teacher, divergence = _build(cfg, "teacher_model", dtype), _build(cfg, "kd_loss", dtype)
        taught = hidden.new_empty(*labels.shape, teacher.tok_embeddings.embedding_dim)
        head: Any = fuse_distillation(model, teacher, loss, divergence, cfg.get("kd_ratio", 0.5))
        rows = [t.flatten(0, 1).unsqueeze(0) for t in (hidden, taught, labels)]
        return Part(head._outcome, rows, {}, _as_named)
    if isinstance(loss, PREFERENCE):
        head = fuse_log_probs(model)
    else:
        chunks = getattr(loss, "num_output_chunks", None)
        if chunks is not None:
            model.set_num_output_chunks(chunks)
        head = fuse_head(model, loss)
    return Part(head._outcome, inputs, {}, _as_named)


def _as_named(place: Place) -> list[Place]:
    """The head's places; Dynamo names its modules from the head on."""
    return [Place(place.module.removeprefix("decoder."), place.source)]


def _facts(cfg: Any, kinds: int, layers: int) -> list[str]:
    facts = [
        f"Layers traced: {kinds} of {layers}, one of each kind, each on its own, and the head with "
        "the loss, as the recipes of liger_fx compile them; counts and bytes are for all layers."
    ]
    datasets = cfg.get("dataset") or []
    datasets = [datasets] if isinstance(datasets, Mapping) or "packed" in datasets else datasets
    if any(dataset.get("packed") for dataset in datasets):
        facts.append(
            "The data set is packed: on a GPU torchtune uses flex attention, which is not traced "
            "here."
        )
    if "teacher_model" in cfg or isinstance(cfg.loss, Mapping) and "rlhf" in str(cfg.loss):
        facts.append("The layers of a teacher or a reference model are not listed.")
    return facts
