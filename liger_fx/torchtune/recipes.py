"""Mixins for torchtune's recipe classes, and torchtune's own recipe modules with them in front."""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torchtune
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from torchtune import rlhf, training, utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.utils._import_guard import _SUPPORTS_FLEX_ATTENTION

import liger_fx
from liger_fx import activations
from liger_fx.dynamo import Backend
from liger_fx.inner import environment
from liger_fx.offload import Offload
from liger_fx.report import Report
from liger_fx.torchtune import checkpoints
from liger_fx.torchtune.heads import (
    CROSS_ENTROPIES,
    HeadDistillation,
    HeadLogProbs,
    HeadNotFused,
    HeadTokenLogProbs,
    Scores,
    Unprojected,
    fuse_distillation,
    fuse_head,
    fuse_log_probs,
    movable_head,
)
from liger_fx.torchtune.packing import attend_over_documents
from liger_fx.torchtune.parts import compile_layers, compile_loss, layers_of
from liger_fx.torchtune.unpadding import leave_out_padding, mask_of, may_share

log = utils.get_logger("INFO")  # torchtune's: what a recipe says, its user sees

SAMPLED = (
    "the policy has logits while it generates, and the log-probabilities of what it sampled are "
    "taken of these, as in torchtune's recipe"
)
PADDED = (
    "padding goes through the layers, and the prompt of a pair twice; liger_fx.unpad=True leaves "
    "padding out, also of the mean of the logits that is logged, and runs a prompt once"
)
UNTOUCHED = "compile=False: nothing is rewritten, this is torchtune's recipe as it is"


def load_recipe(name: str) -> ModuleType:
    """A copy of torchtune's own recipe module, from the installed package.

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


def entry_point(stock: ModuleType, recipe: type) -> Callable[[], None]:
    """The ``recipe_main`` of ``stock``, a module from `load_recipe`, which then runs ``recipe`` in
    place of the class of that name and leaves it to ``recipe`` to compile."""
    setattr(stock, recipe.__name__, recipe)
    ours = {"compile_model": lambda model, **_: None, "compile_loss": lambda loss, **_: loss}
    stock.training = SimpleNamespace(**vars(training) | ours)  # type: ignore[attr-defined]
    if hasattr(stock, "rlhf"):  # of the recipes that ask it for log-probabilities
        taken: dict[str, Any] = {
            "get_batch_log_probs": _log_probs,
            "logits_to_logprobs": _token_log_probs,
        }
        stock.rlhf = SimpleNamespace(**vars(rlhf) | taken)  # type: ignore[attr-defined]
    return stock.recipe_main


def _log_probs(logits: Tensor | Scores, labels: Tensor, **how: Any) -> Tensor:
    if isinstance(logits, Scores):
        if any(how.values()):
            raise ValueError(
                f"a fused head gives sums of log-probabilities, asked for {how}: use compile=False"
            )
        return logits.logprobs
    return rlhf.get_batch_log_probs(logits, labels, **how)


def _token_log_probs(
    logits: Tensor | Unprojected, sequences: Tensor, temperature: float = 1.0
) -> Tensor:
    if isinstance(logits, Unprojected):
        return logits.head(logits.hidden, sequences, temperature)
    return rlhf.logits_to_logprobs(logits, sequences, temperature)


class LayersRecipe(abc.ABC):
    """Mixed in before a torchtune recipe class: the same recipe with the layers of all its models
    compiled by liger_fx; a subclass says what becomes of its losses. Settings are config keys under
    ``liger_fx:``, the options of the backend."""

    _model: nn.Module
    _policy_model: nn.Module
    _loss_fn: Any
    _device: torch.device
    _dtype: torch.dtype
    _output_dir: str
    _unpads = True  # do padded batches go through the layers without their padding, if they can?
    _rows_of_sample = 1

    def setup(self, cfg: Any) -> None:
        self._settings = flatten(cfg.get("liger_fx", {}) or {})
        memory_gib = self._settings.pop("memory_gib", None)
        unpad = self._settings.pop("unpad", None)
        Backend(self._settings)  # a mistake should show now, not in the first step
        self._compiles = bool(cfg.get("compile", False))
        super().setup(cfg=cfg)  # type: ignore[misc]
        _check_ranks_agree(self._compiles, self._settings)
        if not self._compiles:
            utils.log_rank_zero(log, UNTOUCHED, logging.WARNING)
            return
        models = [m for m in vars(self).values() if isinstance(m, nn.Module) and any(layers_of(m))]
        # Flex attention breaks the graph of a layer, which a checkpoint cannot hold, and
        # AOTAutograd (torch 2.13) takes no DTensors in it: there the checkpoint stays around the
        # layer, as torchtune puts it, and what it saves is offloaded by torchtune.
        inside = not (
            self._uses_flex_attention(cfg, models) or cfg.get("tensor_parallel_dim", 1) > 1
        )
        self._offload = None
        if inside and cfg.get("enable_activation_offloading"):
            self._offload = Offload()
            self.activations_handling_ctx = contextlib.nullcontext()  # in the place of torchtune's
        # Attention over documents has kernels for a GPU; elsewhere it costs more than padding.
        on_gpu = self._device.type != "cpu"
        self._unpads = self._unpads and on_gpu if unpad is None else bool(unpad)
        of_labels = self._compile_losses()
        padded = _batches_are_padded(cfg, self._rows_of_sample)
        self._unpads = padded and self._unpads and self._leaves_out_padding(cfg, of_labels)
        goes_through = padded and not self._unpads
        if goes_through and not _chosen(self._settings, "tiled_mlp", "skip_padding"):
            self._settings["tiled_mlp.skip_padding"] = True
        for model in models:
            compile_layers(model, self._settings, checkpoint_inside=inside, offload=self._offload)
        if memory_gib is not None:
            self._keep_within(memory_gib)
        # When the first loss is there, all there is has been compiled.
        self._waiting = self._loss_fn.register_forward_hook(self._report)

    def _uses_flex_attention(self, cfg: Any, models: Sequence[nn.Module]) -> bool:
        """Packed sequences are attended over by their documents, where the models allow that."""
        if not _packs(cfg):
            return False
        reason = attend_over_documents(models, self._loaders(), self._dtype)
        if reason:
            how = "flex attention" if _SUPPORTS_FLEX_ATTENTION else "a mask of [s, s]"
            utils.log_rank_zero(log, f"packed data goes through {how}: {reason}", logging.WARNING)
        return bool(reason) and _SUPPORTS_FLEX_ATTENTION

    def _leaves_out_padding(self, cfg: Any, models: Sequence[nn.Module]) -> bool:
        """Do padded batches go through the layers without their padding?"""
        if not models:
            return False
        if cfg.get("tensor_parallel_dim", 1) > 1:
            reason = "the layers are parallel over their tensors"
        else:
            self._shares = may_share(models)
            reason = leave_out_padding(models, self._loaders(), self._dtype)
        kept = f"padding goes through the layers: {reason}"
        left_out = "the layers leave out what follows the last label of a sequence"
        if not reason and self._shares:
            left_out += ", and tokens that sequences begin with in common are there once"
        utils.log_rank_zero(log, kept if reason else left_out)
        return not reason

    def _loaders(self) -> list[DataLoader[Any]]:
        return [value for value in vars(self).values() if isinstance(value, DataLoader)]

    def _keep_within(self, gib: float | str) -> None:
        """gib: or "auto", for what the GPU has. Raises ValueError where no layer can keep more, or
        nobody can tell what that takes."""
        trained = self._policy_model if hasattr(self, "_policy_model") else self._model  # PPO's
        layers = checkpoints.checkpoints_of(trained)
        if not layers:
            raise ValueError(
                "liger_fx.memory_gib chooses how many checkpointed layers keep their activations: "
                "it needs enable_activation_checkpointing=True"
            )
        activations.require_gpu(self._device)
        if getattr(self, "_enable_activation_offloading", False):
            raise ValueError(
                "liger_fx.memory_gib keeps activations on the GPU, and "
                "enable_activation_offloading takes them off it: choose one of them"
            )
        optimizer = getattr(self, "_optimizer", None)
        if optimizer is None:
            raise ValueError(
                "liger_fx.memory_gib looks at the memory before each optimizer step: it does not "
                "go with optimizer_in_bwd=True"
            )
        budget = activations.bytes_of(gib)
        within = activations.MemoryBudget(
            functools.partial(checkpoints.keep, layers),
            len(layers),
            activations.room_on_all_ranks(self._device) if budget is None else budget,
            functools.partial(activations.peak_of_all_ranks, self._device),
            functools.partial(utils.log_rank_zero, log),
        )
        optimizer.register_step_pre_hook(within)

    @abc.abstractmethod
    def _compile_losses(self) -> Sequence[nn.Module]:
        """Fuse the losses with the heads whose logits they take, or say why not. Returns the models
        of whose hidden states only those of labelled tokens are read."""

    def _report(self, *_: Any) -> None:
        self._waiting.remove()
        utils.log_rank_zero(log, str(Report.merged(liger_fx.reports())))

    def cleanup(self) -> None:
        _, rank = utils.get_world_size_and_rank()
        super().cleanup()  # type: ignore[misc]
        if self._compiles and rank == 0:
            path = Path(self._output_dir) / "liger_fx_report.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("[" + ",\n".join(r.to_json() for r in liger_fx.reports()) + "]\n")


class FusedRecipe(LayersRecipe):
    """The same, with the head of ``_model`` fused with the loss."""

    def _compile_losses(self) -> Sequence[nn.Module]:
        of_labels = isinstance(self._loss_fn, CROSS_ENTROPIES)
        try:
            self._loss_fn = fuse_head(self._model, self._loss_fn, self._settings)
        except HeadNotFused as reason:
            utils.log_rank_zero(log, str(reason), logging.WARNING)
            compile_loss(self._loss_fn, self._settings)
            return []
        return [self._model] if of_labels else []


class FusedDPORecipe(LayersRecipe):
    """The same for preference training: of each model the head is fused with the log-probabilities
    that the loss takes of its logits.

    Its padding is left out where a config says so, ``liger_fx.unpad=True``: the recipe logs the
    mean of all logits, which is then that of the tokens up to each sequence's last label.
    """

    _unpads = False
    _rows_of_sample = 2

    def _compile_losses(self) -> Sequence[nn.Module]:
        self._heads: dict[nn.Module, HeadLogProbs] = {}
        compile_loss(self._loss_fn, self._settings)
        try:
            if getattr(self, "_enable_activation_offloading", False) and not self._offload:
                raise HeadNotFused("the projection is not fused: its values would be offloaded")
            for model in filter(None, (self._model, getattr(self, "_ref_model", None))):
                self._heads[model] = fuse_log_probs(model, self._settings)
        except HeadNotFused as reason:
            utils.log_rank_zero(log, str(reason), logging.WARNING)
        if self._heads and not self._unpads:
            utils.log_rank_zero(log, PADDED)
        return list(self._heads)

    def concatenated_forward(self, model: nn.Module, batch: Any, *args: Any, **kwargs: Any) -> Any:
        head = self._heads.get(model) if self._compiles else None

        def scores(tokens: Tensor) -> Scores:
            mask, read = None, None
            if self._unpads:
                on_host = batch[0].cpu(), batch[1].cpu()
                mask = mask_of(*on_host, CROSS_ENTROPY_IGNORE_IDX, self._shares)
            if mask is not None:
                read, mask = mask["places"], mask.to(tokens.device)
            hidden = model(tokens, mask=mask)
            found = head(hidden, batch[1].to(hidden.device))  # type: ignore[misc]
            if read is not None:
                found = found.of_tokens(read, tokens.shape)
            if isinstance(model, FSDPModule) and model is not self._model:
                model.reshard()  # a reference on its own: no backward will do it
            return found

        forward = super().concatenated_forward  # type: ignore[misc]
        return forward(scores if head else model, batch, *args, **kwargs)


class FusedPPORecipe(LayersRecipe):
    """The same for PPO: of the policy in training, and of its reference, the head is fused with the
    log-probabilities that the recipe takes of the logits.

    Tokens are sampled from logits: while it generates, the policy has them, and the
    log-probabilities of what it sampled are taken of these, as in torchtune's recipe.
    """

    _ref_policy_model: nn.Module

    def _compile_losses(self) -> Sequence[nn.Module]:
        compile_loss(self._loss_fn, self._settings)
        self._heads = {
            model: HeadTokenLogProbs(movable_head(model), self._settings)
            for model in (self._policy_model, self._ref_policy_model)
        }
        utils.log_rank_zero(log, SAMPLED)
        return []  # batches are of queries, and have no labels

    def generate_trajectory(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_logits(self._ref_policy_model):
            return super().generate_trajectory(*args, **kwargs)  # type: ignore[misc]

    def ppo_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_logits(self._policy_model):
            return super().ppo_step(*args, **kwargs)  # type: ignore[misc]

    def _without_logits(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        if not self._compiles:
            return contextlib.nullcontext()
        return self._heads[model].instead_of_logits(model)


class FusedKDRecipe(LayersRecipe):
    """The same for distillation: the heads of student and teacher are fused with both losses."""

    _teacher_model: nn.Module
    _kd_loss_fn: nn.Module
    _kd_ratio: float

    def _compile_losses(self) -> Sequence[nn.Module]:
        losses = self._loss_fn, self._kd_loss_fn
        try:
            head = fuse_distillation(
                self._model, self._teacher_model, *losses, self._kd_ratio, self._settings
            )
        except HeadNotFused as reason:
            utils.log_rank_zero(log, str(reason), logging.WARNING)
            for loss in losses:
                compile_loss(loss, self._settings)
            return []
        self._kd_loss_fn = _DistillationLoss(head)
        self._loss_fn = _ClassLoss(self._kd_loss_fn)
        return [self._model, self._teacher_model]

    def _loss_step(self, batch: Any) -> tuple[Tensor, Tensor]:
        losses = super()._loss_step(batch)  # type: ignore[misc]
        if isinstance(self._teacher_model, FSDPModule):
            self._teacher_model.reshard()  # no backward will do it
        return losses


class _DistillationLoss(nn.Module):
    """The first of the two losses that a distillation recipe asks for; both are computed."""

    class_loss: Tensor | None = None

    def __init__(self, head: HeadDistillation) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        self.class_loss, kd_loss = self.head(hidden, taught, labels)
        return kd_loss


class _ClassLoss(nn.Module):
    """The second: of the same hidden states and labels."""

    first: Any

    def __init__(self, first: _DistillationLoss) -> None:
        super().__init__()
        object.__setattr__(self, "first", first)  # not a submodule: the recipe holds both
        self.ignore_index = first.head.loss_fn.ignore_index

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        loss, self.first.class_loss = self.first.class_loss, None
        if loss is None:
            raise RuntimeError("the distillation loss of a step must be asked for first")
        return loss


class FusedQATRecipe(FusedRecipe):
    """The same for recipes whose stock form refuses ``compile=True``."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg=OmegaConf.merge(cfg, {"compile": False}))  # type: ignore[call-arg]


def _check_ranks_agree(compiles: bool, settings: Mapping[str, Any]) -> None:
    """Raises RuntimeError, on every rank, if one of them would compile something else."""
    world, _ = utils.get_world_size_and_rank()
    if world == 1:
        return
    mine = f"compile={compiles}, {Backend(settings).options}, {environment()}"
    ranks: list[Any] = [None] * world
    torch.distributed.all_gather_object(ranks, mine)
    if len(set(ranks)) > 1:
        others = "\n".join(f"  rank {rank}: {what}" for rank, what in enumerate(ranks))
        raise RuntimeError(
            "the ranks disagree about what is compiled. Give every node the same config, "
            f"LIGER_FX_* variables and versions:\n{others}"
        )


def _packs(cfg: Any) -> bool:
    """Does a data set of the config put several samples into one sequence?"""
    found = cfg.get("dataset") or []
    return any(d.get("packed", False) for d in ([found] if isinstance(found, Mapping) else found))


def _batches_are_padded(cfg: Any, rows_of_sample: int) -> bool:
    """Does torchtune pad the sequences of a batch to the length of its longest?

    It does unless the data set is packed, or a batch is a single sequence. False for a config
    without ``dataset``. The config decides, so the ranks agree.
    """
    rows = cfg.get("batch_size", 1) * rows_of_sample
    return cfg.get("dataset") is not None and rows > 1 and not _packs(cfg)


def _chosen(settings: Mapping[str, Any], rewrite: str, setting: str) -> bool:
    """Did the user set ``<rewrite>.<setting>``, in the config or by an environment variable?"""
    return setting in Backend(settings).options.settings.get(rewrite, {})


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
