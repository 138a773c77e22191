"""Hugging Face causal language models, by config, on the meta device."""

from __future__ import annotations

import difflib
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from liger_fx.explaining.subject import (
    DTYPES,
    CannotExplain,
    Part,
    Repeated,
    Request,
    Subject,
    cut_layers,
)


def subject(config: str, request: Request) -> Subject:
    """The training step ``model(input_ids, labels)``, as ``model.compile`` compiles it.

    config: a folder with config.json, such a file, a model type, or the name of an architecture.
    Raises CannotExplain for one that is unknown or cannot be built.
    """
    settings = _settings(config)
    unknown = "the config of {!r} has no setting {!r}; it has {}"
    model = _build(settings, request, unknown=unknown.format(config, "{}", "{}"))
    parameters = sum(p.numel() for p in model.parameters())
    layers = cut_layers(model, request.layers)
    model.train()
    if request.checkpoint:
        _checkpoint(model)
    tokens = torch.empty(request.batch, request.seq, dtype=torch.long, device="meta")
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if request.padding:
        inputs["attention_mask"] = torch.empty_like(tokens)
    padding = ", an attention mask for padding" if request.padding else ""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Subject(
        title=f"{type(model).__name__}, {parameters / 1e9:.2f} B parameters in {dtype}, "
        f"{request.step}{padding}",
        facts=[layers.fact()] if layers else [],
        parts=[Part(model, (), inputs, layers.places if layers else lambda place: [place])],
        layers=_names(layers),
        options={},
    )


def _names(layers: Repeated | None) -> list[str]:
    return [f"{layers.name}.{i}" for i in range(layers.count)] if layers else []


def _settings(config: str) -> dict[str, Any]:
    """The settings in a config.json, or no more than the model type."""
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            settings = json.loads(path.read_text())
        except ValueError as error:
            raise CannotExplain(f"{path} is not JSON: {error}") from error
        if "model_type" not in settings:
            raise CannotExplain(f"{path} has no model_type: expected a config of a model")
        return settings
    return {"model_type": _model_type(config)}


def _model_type(name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if name in KNOWN:
        return name
    of_architecture = {architecture: kind for kind, architecture in reversed(KNOWN.items())}
    if name in of_architecture:
        return of_architecture[name]
    near = difflib.get_close_matches(name, [*KNOWN, *of_architecture], n=6, cutoff=0.5)
    raise CannotExplain(
        f"no folder, config.json, model type or architecture of a causal language model is called "
        f"{name!r}; near it are {', '.join(near) or 'none'}. transformers knows "
        f"{', '.join(sorted(KNOWN))}"
    )


def _build(settings: dict[str, Any], request: Request, unknown: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    overridden = settings | request.overrides
    if overridden.get("quantization_config"):
        raise CannotExplain(
            "the config is of a quantised model, which cannot be built without its weights: "
            "--set quantization_config=null explains the same model without quantisation"
        )
    try:
        plain = AutoConfig.for_model(settings["model_type"]).to_dict()
        for name in request.overrides:
            if name not in plain and name not in settings:
                raise CannotExplain(unknown.format(name, ", ".join(sorted(plain))))
        config = AutoConfig.for_model(**overridden)
        dtype = DTYPES[request.dtype] if request.dtype else torch.bfloat16
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except CannotExplain:
        raise
    except Exception as error:  # whatever a model says of its config
        raise CannotExplain(
            f"transformers cannot build {settings['model_type']!r} from this config: {error}"
        ) from error


def _checkpoint(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise CannotExplain(f"--checkpoint: {error}") from error
