"""The head region: torchtune's final norm, projection and loss in one compiled graph.

A stock torchtune recipe compiles each layer and the loss on their own and runs ``norm -> output``
eagerly between them, so projection and cross-entropy never meet in a graph. Here the model instance
returns its hidden states, and the loss takes them through torchtune's own ``unembed`` first:
compiled as one region, the projection and the loss are one op.

The same holds for activation checkpointing: torchtune checkpoints *around* each compiled layer, so
the backward runs the whole compiled forward again. With the checkpoint inside the compiled layer
the partitioner recomputes only what the backward needs.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import torchtune
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtune import utils
from torchtune.modules import TransformerCrossAttentionLayer, TransformerSelfAttentionLayer

import liger_fx
from liger_fx.backend import parse_options
from liger_fx.report import Report

log = utils.get_logger("INFO")  # torchtune's: what a recipe says, its user sees


class HeadLoss(nn.Module):
    """``loss_fn(unembed(hidden), labels)``, in the shapes in which a torchtune recipe calls a loss.

    hidden: [b, s, d], or [b * s, d] as a recipe flattens what the model returns. labels: [b, s] or
    [b * s], shifted already. Attributes of ``loss_fn``, ``ignore_index`` first, are its own.
    """

    def __init__(self, decoder: nn.Module, loss_fn: nn.Module) -> None:
        super().__init__()
        self.loss_fn = loss_fn
        self.unembed = decoder.unembed

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if hidden.dim() == 2:  # one long sequence: torchtune's chunks run along dimension 1
            hidden, labels = hidden.unsqueeze(0), labels.unsqueeze(0)
        logits: Any = self.unembed(hidden)  # type: ignore[operator]
        if not isinstance(logits, list):
            labels = labels.reshape(-1)
            logits = logits.reshape(-1, logits.size(-1))
        return self.loss_fn(logits, labels)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("loss_fn"), name)


def fuse_head(
    model: nn.Module, loss_fn: nn.Module, options: Mapping[str, Any] | None = None
) -> HeadLoss:
    """Move the head of ``model`` into the loss, and compile both as one region.

    model: a torchtune TransformerDecoder or DeepFusionModel; this instance then returns hidden
    states. loss_fn: the recipe's loss. Returns the loss to call as ``loss(hidden, labels)``.
    Raises TypeError for a model without torchtune's ``unembed``, ValueError for one whose head was
    moved before.
    """
    decoder = getattr(model, "decoder", model)
    if not hasattr(decoder, "unembed"):
        raise TypeError(
            f"{type(model).__name__} has no unembed(): expected a torchtune TransformerDecoder or "
            "DeepFusionModel"
        )
    if decoder.unembed is _identity:
        raise ValueError("the head of this model has been moved into a loss already")
    # torchtune keeps the compiler out of its chunked projection; inside the region it is traced.
    chunked = inspect.unwrap(type(decoder).chunked_output)  # type: ignore[attr-defined, union-attr]
    decoder.chunked_output = MethodType(chunked, decoder)
    head = HeadLoss(decoder, loss_fn)
    decoder.unembed = _identity
    head.compile(backend="liger_fx", options=dict(options or {}) or None)
    return head


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def compile_layers(
    model: nn.Module, options: Mapping[str, Any] | None = None, *, checkpoint_inside: bool = True
) -> None:
    """Compile each transformer layer, with its activation checkpoint inside if it has one."""
    decoder = getattr(model, "decoder", model)
    kinds = (TransformerSelfAttentionLayer, TransformerCrossAttentionLayer)
    layers = [module for module in decoder.modules() if isinstance(module, kinds)]
    checkpoints = {
        module._checkpoint_wrapped_module: module
        for module in decoder.modules()
        if isinstance(module, CheckpointWrapper)
    }
    for layer in layers:
        layer._compiled_call_impl = None  # the recipe may have compiled it without its checkpoint
        target = checkpoints.get(layer, layer) if checkpoint_inside else layer
        target.compile(backend="liger_fx", options=dict(options or {}) or None)


def load_recipe(name: str) -> ModuleType:
    """torchtune's own recipe module, from the installed package.

    By its file: ``recipes`` is a name that a user's project may well have too.
    """
    path = Path(torchtune.__file__).parent.parent / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"liger_fx.recipes._stock_{name}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ImportError(
            f"torchtune's recipe {name} is not at {path}; liger_fx needs torchtune 0.6.1"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FusedRecipe:
    """Mixed in before a torchtune recipe class: the same recipe with layers and head compiled by
    liger_fx. Settings are config keys under ``liger_fx:``, the options of the backend."""

    _model: nn.Module
    _loss_fn: Any
    _compile: bool
    _reported = False

    def setup(self, cfg: Any) -> None:
        self._settings = flatten(cfg.get("liger_fx", {}) or {})
        parse_options(self._settings)  # a mistake should show now, not in the first step
        super().setup(cfg=cfg)  # type: ignore[misc]
        if not self._compile:
            log.warning("compile=False: nothing is rewritten, this is torchtune's recipe as it is")
            return
        offloading = getattr(self, "_enable_activation_offloading", False)
        if offloading:
            _drop_hooks(self._model)
        # Offloading packs what a checkpoint saves, and flex attention breaks the graph of a layer,
        # which a checkpoint cannot hold: there it stays around the layer, as torchtune puts it.
        inside = not offloading and not _uses_flex_attention(cfg)
        compile_layers(self._model, self._settings, checkpoint_inside=inside)
        self._loss_fn = fuse_head(self._model, self._loss_fn, self._settings)

    def _loss_step(self, batch: Any) -> Tensor:
        loss = super()._loss_step(batch)  # type: ignore[misc]
        if self._compile and not self._reported:  # the first step has compiled all there is
            self._reported = True
            whole = Report.merged(liger_fx.reports())
            fused = "linear_cross_entropy" in whole.counts
            if fused:
                log.info("%s", whole)
            else:
                log.warning("projection and loss were not fused\n%s", whole)
        return loss

    def cleanup(self) -> None:
        super().cleanup()  # type: ignore[misc]
        if self._compile:
            path = Path(self._output_dir) / "liger_fx_report.json"  # type: ignore[attr-defined]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("[" + ",\n".join(r.to_json() for r in liger_fx.reports()) + "]\n")


def _uses_flex_attention(cfg: Any) -> bool:
    """torchtune attends over packed sequences with flex attention where the GPU supports it."""
    from torchtune.utils._import_guard import _SUPPORTS_FLEX_ATTENTION

    datasets = [cfg.dataset] if isinstance(cfg.dataset, Mapping) else cfg.dataset
    return _SUPPORTS_FLEX_ATTENTION and any(d.get("packed", False) for d in datasets)


def _drop_hooks(model: nn.Module) -> None:
    """torchtune exempts the output projection from offloading by hooks on it. In the head region
    it is outside of the offloading context, and the hooks would break the graph."""
    output = getattr(model, "output", None)
    output = getattr(output, "linear", output)
    if isinstance(output, nn.Module):
        output._forward_pre_hooks.clear()
        output._forward_hooks.clear()


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``: nested config keys are dotted options."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if _is_list(value) else value
    return flat


def _is_list(value: Any) -> bool:
    return not isinstance(value, str) and hasattr(value, "__iter__")
