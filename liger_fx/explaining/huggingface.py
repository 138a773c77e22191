"""Hugging Face causal language models, by config, on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from liger_fx.explaining.subject import (
    DTYPES,
    CannotExplain,
    Part,
    Request,
    Subject,
    cut_layers,
    described,
    unknown,
)


def subject(config: str, request: Request) -> Subject:
    """The training step ``model(input_ids, labels)``, as ``model.compile`` compiles it.

    config: a folder with config.json, such a file, a model type, or the name of an architecture.
    Raises CannotExplain for one that is unknown or cannot be built.
    """
    dtype, settings = DTYPES[request.dtype or "bf16"], _settings(config)
    model = _build(settings, request, dtype)
    title = described(model, dtype, request, request.checkpoint)
    layers = cut_layers(model, request.layers)
    model.train()
    tokens = torch.empty(request.batch, request.seq, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if request.padding:
        inputs["attention_mask"] = torch.empty_like(tokens)
    return Subject(
        title=title + (", attention mask for padding" if request.padding else ""),
        facts=[fact for fact in (layers and layers.fact(), _defaults(settings)) if fact],
        parts=[Part(model, (), inputs, layers.places if layers else lambda place: [place])],
        layers=layers.names if layers else [],
        options={},
    )


def _defaults(settings: dict[str, Any]) -> str:
    if settings.keys() != {"model_type"}:
        return ""
    return (
        f"The sizes are transformers' defaults for {settings['model_type']}, but for what --set "
        "says: give --hf a folder with config.json to explain another model."
    )


def _settings(config: str) -> dict[str, Any]:
    """The settings in a config.json, or no more than the model type."""
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        return {"model_type": _model_type(config)}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CannotExplain(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise CannotExplain(f"{path} has no model_type: expected the config of a model")
    return settings


def _model_type(name: str) -> str:
    architectures = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for model_type, architecture in architectures.items():
        if name in (model_type, architecture):
            return model_type
    what = "folder, config.json, model type or architecture of a causal language model"
    raise unknown(what, name, {*architectures, *architectures.values()})


def _build(settings: dict[str, Any], request: Request, dtype: torch.dtype) -> Any:
    overridden = settings | dict(request.overrides)
    if overridden.get("quantization_config"):
        raise CannotExplain(
            "the config is of a quantised model, which cannot be built without its weights: "
            "--set quantization_config=null explains the same model without quantisation"
        )
    try:
        known = AutoConfig.for_model(settings["model_type"]).to_dict() | settings
        for name in request.overrides.keys() - known:
            raise unknown("setting of this config", name, known)
        with torch.device("meta"):
            config = AutoConfig.for_model(**overridden)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if request.checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model
    except CannotExplain:
        raise
    except Exception as error:  # whatever a model says of its config
        raise CannotExplain(f"transformers cannot build this model: {error}") from error
