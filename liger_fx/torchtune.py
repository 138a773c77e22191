"""torchtune's recipes with liger_fx where torchtune's own ``compile=True`` cannot reach.

A stock recipe compiles each layer and the loss on their own and runs ``norm -> output`` eagerly
between them, so projection and cross-entropy never meet in a graph. Here the model instance
returns its hidden states, and the loss takes them through torchtune's own ``unembed`` first:
compiled as one region, the projection and the loss are one op.

The same holds for activation checkpointing: torchtune checkpoints *around* each compiled layer, so
the backward runs the whole compiled forward again. With the checkpoint inside the compiled layer
the partitioner recomputes only what the backward needs.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
import torchtune
from omegaconf import OmegaConf
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtune import rlhf, training, utils
from torchtune.modules import (
    TiedLinear,
    TransformerCrossAttentionLayer,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.loss import (
    CEWithChunkedOutputLoss,
    ForwardKLLoss,
    ReverseKLLoss,
    SymmetricKLLoss,
)

import liger_fx
from liger_fx import activations
from liger_fx.backend import compile_rewritten, environment, parse_options, publish, rewrite
from liger_fx.report import Report

log = utils.get_logger("INFO")  # torchtune's: what a recipe says, its user sees

LAYERS = (TransformerSelfAttentionLayer, TransformerCrossAttentionLayer)
# Where a chunked loss of torchtune's keeps the part that runs on one chunk, and is compiled.
CHUNK_LOSSES = ("compute_cross_entropy", "fkl_loss", "rkl_loss", "sym_kl_loss")

SAMPLED = (
    "the policy has logits while it generates, and the log-probabilities of what it sampled are "
    "taken of these, as in torchtune's recipe"
)
UNTOUCHED = "compile=False: nothing is rewritten, this is torchtune's recipe as it is"


class HeadNotFused(RuntimeError):
    """Projection and loss stay apart, as in torchtune's recipe; the message says why."""


class Head(nn.Module, abc.ABC):
    """What a loss takes of ``unembed(hidden)``, compiled as one region around one op.

    Where there is no such op (LoRA on the head, say) it runs as in the stock recipe, and the log
    says why. ``rewrite``: the name of the one that makes the op.
    """

    rewrite: str
    decoder: Any

    def __init__(self, decoder: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self._options = options or None
        # Not a submodule: its parameters are the model's.
        object.__setattr__(self, "decoder", _without_hooks(decoder))
        backend = functools.partial(_head_or_nothing, self.rewrite)
        self._region = torch.compile(self._outcome, backend=backend, options=self._options)
        self._fused = True
        owner, run = _owner(decoder), self._region_or_stock
        self._enter = _through(owner, run) if isinstance(owner, FSDPModule) else run

    def _region_or_stock(self, *args: Any) -> Any:
        if self._fused:
            try:
                return self._region(*args)
            except BackendCompilerFailed as failure:
                if not isinstance(failure.inner_exception, HeadNotFused):
                    raise
                utils.log_rank_zero(log, str(failure.inner_exception), logging.WARNING)
                self._fused = False
                self._compile_parts()
        return self._stock(*args)

    @abc.abstractmethod
    def _outcome(self, *args: Any, **kwargs: Any) -> Any:
        """What is computed of hidden states and labels, in torchtune's own words."""

    def _stock(self, *args: Any) -> Any:
        """The same as the stock recipe has it."""
        return self._outcome(*args)

    def _compile_parts(self) -> None:
        """Compile what torchtune compiles beside the layers."""


class HeadLoss(Head):
    """``loss_fn(unembed(hidden), labels)``, in the shapes in which a torchtune recipe calls a loss.

    hidden: [b, s, d], or [b * s, d] as a recipe flattens what the model returns. labels: [b, s] or
    [b * s], shifted already. Attributes of ``loss_fn``, ``ignore_index`` first, are its own.
    """

    rewrite = "linear_cross_entropy"

    def __init__(self, decoder: nn.Module, options: dict[str, Any], loss_fn: nn.Module) -> None:
        super().__init__(decoder, options)
        self.loss_fn = loss_fn

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if hidden.dim() == 2:  # one long sequence: torchtune's chunks run along dimension 1
            hidden, labels = hidden.unsqueeze(0), labels.unsqueeze(0)
        return self._enter(hidden, labels)

    def _outcome(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits: Any = self.decoder.unembed(hidden)
        if not isinstance(logits, list):
            labels = labels.reshape(-1)
            logits = logits.reshape(-1, logits.size(-1))
        return self.loss_fn(logits, labels)

    def _compile_parts(self) -> None:
        compile_loss(self.loss_fn, self._options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("loss_fn"), name)


class HeadLogProbs(Head):
    """torchtune's ``get_batch_log_probs(unembed(hidden), labels)``, and the mean of the logits of
    each sequence, which its DPO recipes log.

    hidden: [b, s, d]. labels: [b, s], not shifted. Returns `Scores` of b sequences.
    """

    rewrite = "linear_logprobs"

    def forward(self, hidden: Tensor, labels: Tensor) -> Scores:
        return Scores(*self._enter(hidden, labels))

    def _outcome(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = rlhf.get_batch_log_probs(self.decoder.unembed(hidden), labels)
        # The projection is linear: the mean of its values is its value of the mean.
        of_mean = self.decoder.output(self.decoder.norm(hidden).mean(1))
        return logprobs, of_mean.float().mean(-1).detach()


class HeadDistillation(Head):
    """The cross-entropy and the divergence that torchtune's distillation recipes take of the logits
    of a student and its teacher, as one region around one op.

    hidden: [b, s, d] of the student, taught: [b, s, e] of the teacher, or both as [b * s, ...].
    labels: [b, s] or [b * s], shifted already. Returns (class loss, distillation loss).

    Their gradients are one, of ``(1 - ratio) * class loss + ratio * distillation loss``, which is
    what the recipes differentiate: it is computed in the forward, where the op needs the weights.
    """

    rewrite = "linear_kl"
    teacher: Any
    whole: tuple[Any, Any]
    loss_fn: Any
    kd_loss_fn: Any

    def __init__(
        self,
        decoder: nn.Module,
        teacher: nn.Module,
        options: dict[str, Any],
        losses: tuple[nn.Module, nn.Module],
        ratio: float,
    ) -> None:
        super().__init__(decoder, options)
        object.__setattr__(self, "teacher", _without_hooks(teacher))
        self.whole = _unchunked(decoder), _unchunked(teacher)
        self.loss_fn, self.kd_loss_fn = losses
        self.ratio = ratio
        self._teachers_owner = _owner(teacher)

    def forward(self, hidden: Tensor, taught: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = (t.reshape(1, -1, t.shape[-1]) for t in (hidden, taught))  # one long sequence
        with _gathered(self._teachers_owner):
            class_loss, kd_loss = self._enter(*rows, labels.reshape(1, -1))
        return class_loss, kd_loss

    def _outcome(self, hidden: Tensor, taught: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = self.whole
        logits, labels = student.unembed(hidden).flatten(0, 1), labels.reshape(-1)
        with torch.no_grad():
            teacher_logits = teacher.unembed(taught).flatten(0, 1)
        valid = (labels != self.kd_loss_fn.ignore_index).sum()
        # torchtune's zero where no label is valid, without its branch.
        whole = _of_one_chunk(self.kd_loss_fn)
        kd_loss = whole(logits, teacher_logits, labels, normalize=False) / valid.clamp(min=1)
        if isinstance(self.loss_fn, CEWithChunkedOutputLoss):
            class_loss = self.loss_fn.compute_cross_entropy(logits, labels) / valid
        else:
            class_loss = self.loss_fn(logits, labels)
        total = (1 - self.ratio) * class_loss + self.ratio * kd_loss
        return self._carried(total, class_loss.detach(), kd_loss.detach())

    def _carried(self, total: Tensor, class_loss: Tensor, kd_loss: Tensor) -> tuple[Tensor, Tensor]:
        """Both values, with the gradient of ``total`` on the first, where that counts. Without a
        valid label the first is nan, and so is ``total``."""
        gradient = total - total.detach()
        if self.ratio < 1:
            return class_loss + gradient / (1 - self.ratio), kd_loss
        return class_loss, kd_loss + gradient

    def _stock(self, hidden: Tensor, taught: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits: Any = self.decoder.unembed(hidden)
        with torch.no_grad():
            teacher_logits: Any = self.teacher.unembed(taught)
        if not isinstance(logits, list):
            logits, labels = logits.flatten(0, 1), labels.flatten()
            teacher_logits = teacher_logits.flatten(0, 1)
        return self.loss_fn(logits, labels), self.kd_loss_fn(logits, teacher_logits, labels)

    def _compile_parts(self) -> None:
        for loss in (self.loss_fn, self.kd_loss_fn):
            compile_loss(loss, self._options)


def _of_one_chunk(loss_fn: Any) -> Any:
    """What a chunked divergence takes of each chunk, or else the divergence itself."""
    return next((getattr(loss_fn, n) for n in CHUNK_LOSSES if hasattr(loss_fn, n)), loss_fn)


@contextlib.contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Where FSDP shards it on its own, its weight is whole inside."""
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class Scores:
    """What a DPO recipe takes of the logits of some sequences, in the place of the logits.

    logprobs: [b], of each sequence. means: [b], the mean of its logits. A slice is of sequences.
    """

    logprobs: Tensor
    means: Tensor

    def __getitem__(self, sequences: slice) -> Scores:
        return Scores(self.logprobs[sequences], self.means[sequences])

    def detach(self) -> Scores:
        return self

    def mean(self) -> Tensor:
        """Of all logits, as the sequences are of one length."""
        return self.means.mean()


class HeadTokenLogProbs(Head):
    """torchtune's ``logits_to_logprobs(unembed(hidden), tokens, temperature)``.

    hidden: [b, s, d]. tokens: [b, s], what each position is to predict. temperature: positive.
    Returns [b, s], which may be written to.
    """

    rewrite = "linear_logprobs"

    def forward(self, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        # Slices of longer sequences have other strides; of copies, all share one graph.
        logprobs = self._enter(hidden.contiguous(), tokens.contiguous(), temperature)
        # The recipe writes to them, which autograd forbids where Inductor returns a view.
        return logprobs.clone()

    def _outcome(self, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        return rlhf.logits_to_logprobs(self.decoder.unembed(hidden), tokens, temperature)

    @contextlib.contextmanager
    def instead_of_logits(self, model: nn.Module) -> Iterator[None]:
        """Within it ``model``, of which this is the head, returns `Unprojected`."""
        decoder = _decoder_of(model)
        decoder.unembed = functools.partial(Unprojected, self)
        try:
            yield
        finally:
            del decoder.unembed


@dataclass(frozen=True)
class Unprojected:
    """What stands for the logits in a PPO recipe until it takes log-probabilities of them.

    hidden: [b, s, d], the head's input. A slice is of sequences and positions.
    """

    head: HeadTokenLogProbs
    hidden: Tensor

    def __getitem__(self, at: tuple[slice, slice]) -> Unprojected:
        sequences, positions = at
        return Unprojected(self.head, self.hidden[sequences, positions])


def fuse_head(
    model: nn.Module, loss_fn: nn.Module, options: Mapping[str, Any] | None = None
) -> HeadLoss:
    """Move the head of ``model`` into the loss, and compile both as one region.

    model: a torchtune TransformerDecoder or DeepFusionModel, sharded by FSDP2 or not; this instance
    then returns hidden states. loss_fn: the recipe's loss. Returns the loss to call as
    ``loss(hidden, labels)``. Raises TypeError for a model without torchtune's ``unembed``,
    ValueError for one whose head was moved before, HeadNotFused for a head that is parallel over
    its vocabulary.
    """
    decoder = _movable_head(model)
    head = HeadLoss(decoder, dict(options or {}), loss_fn)
    _leave_out_head(model, decoder)
    return head


def fuse_log_probs(model: nn.Module, options: Mapping[str, Any] | None = None) -> HeadLogProbs:
    """Move the head of ``model`` into the log-probabilities that preference losses take of it.

    As `fuse_head`; returns what to call as ``scores(hidden, labels)``.
    """
    decoder = _movable_head(model)
    head = HeadLogProbs(decoder, dict(options or {}))
    _leave_out_head(model, decoder)
    return head


def fuse_distillation(
    model: nn.Module,
    teacher: nn.Module,
    loss_fn: nn.Module,
    kd_loss_fn: nn.Module,
    ratio: float,
    options: Mapping[str, Any] | None = None,
) -> HeadDistillation:
    """Move the heads of ``model`` and ``teacher`` into the losses of a distillation.

    loss_fn: torchtune's chunked cross-entropy, or ``nn.CrossEntropyLoss``. kd_loss_fn: one of
    torchtune's six. ratio: what ``kd_loss_fn`` weighs, from 0 to 1. As `fuse_head`; returns what to
    call as ``losses(hidden, taught, labels)``. Raises HeadNotFused for other losses.
    """
    apart = "the projections and the losses are not fused, and run as in torchtune's recipe: "
    if not isinstance(loss_fn, CEWithChunkedOutputLoss | nn.CrossEntropyLoss):
        raise HeadNotFused(f"{apart}expected a cross-entropy, found {type(loss_fn).__name__}")
    if not isinstance(_of_one_chunk(kd_loss_fn), ForwardKLLoss | ReverseKLLoss | SymmetricKLLoss):
        raise HeadNotFused(
            f"{apart}expected one of torchtune's divergences, found {type(kd_loss_fn).__name__}"
        )
    decoder, teachers = _movable_head(model), _movable_head(teacher)
    head = HeadDistillation(decoder, teachers, dict(options or {}), (loss_fn, kd_loss_fn), ratio)
    _leave_out_head(model, decoder)
    _leave_out_head(teacher, teachers)
    return head


def _decoder_of(model: nn.Module) -> Any:
    decoder = getattr(model, "decoder", model)
    if not hasattr(decoder, "unembed"):
        raise TypeError(
            f"{type(model).__name__} has no unembed(): expected a torchtune TransformerDecoder or "
            "DeepFusionModel"
        )
    return decoder


def _movable_head(model: nn.Module) -> Any:
    decoder = _decoder_of(model)
    if decoder.unembed is _identity:
        raise ValueError("the head of this model has been moved into a loss already")
    _refuse_tensor_parallel(model, decoder)
    return decoder


def _leave_out_head(model: nn.Module, decoder: Any) -> None:
    decoder.unembed = _identity
    if isinstance(model, FSDPModule):
        # What the root itself holds, the head's norm and weight, must outlast the root's forward.
        model.set_reshard_after_forward(False, recurse=False)


def _identity(hidden: Tensor) -> Tensor:
    return hidden


def _without_hooks(decoder: nn.Module) -> Any:
    """A shallow copy on the same parameters whose projection runs without hooks, and in which the
    compiler may trace the chunks.

    The hooks are FSDP's and those by which torchtune exempts the projection from offloading: in a
    region of its own it is outside of both.
    """
    # FSDP2 gives its modules a class of its own, which cannot be copied.
    plain = next(kind for kind in type(decoder).__mro__ if not issubclass(kind, FSDPModule))
    shadow: Any = plain.__new__(plain)
    shadow.__dict__ |= decoder.__dict__
    shadow._modules = dict(decoder._modules)
    shadow._modules.pop("output", None)
    output: Any = decoder.output
    tied = isinstance(output, TiedLinear)
    bare = TiedLinear(output.tied_module) if tied else MethodType(type(output).forward, output)
    shadow.__dict__["output"] = bare
    chunked = inspect.unwrap(type(decoder).chunked_output)  # type: ignore[attr-defined, union-attr]
    shadow.__dict__["chunked_output"] = MethodType(chunked, shadow)
    return shadow


def _unchunked(decoder: nn.Module) -> Any:
    """The same whose ``unembed`` gives all logits as one tensor."""
    shadow = _without_hooks(decoder)
    shadow.num_output_chunks = 0
    return shadow


def _owner(decoder: nn.Module) -> Any:
    """The module that holds the weight of the projection."""
    output = decoder.output
    return output.tied_module if isinstance(output, TiedLinear) else output


def _through(owner: Any, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``loss`` as a call of ``owner``, whose hooks are FSDP's: they gather the weight before it and
    scatter its gradient. Inside of the region they would break its graph."""
    forward = owner.forward
    owner.forward = lambda *args: loss(*args) if len(args) > 1 else forward(*args)
    return lambda *args: owner(*args)


def _refuse_tensor_parallel(model: nn.Module, decoder: nn.Module) -> None:
    """FSDP2 shards over one dimension and gives the whole weight back; anything else does not."""
    for name, parameter in _owner(decoder).named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        if not isinstance(model, FSDPModule) or parameter.device_mesh.ndim > 1:
            raise HeadNotFused(
                f"the projection and the loss are not fused: output.{name} is a DTensor over the "
                f"mesh {parameter.device_mesh}, and the fused loss needs the whole weight on each "
                "rank. They run as in torchtune's recipe; without tensor parallelism they are fused"
            )


def _head_or_nothing(
    rewrite_name: str,
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of a head: where it does not become one op, the region is not worth it.

    Without gradients nothing is kept of the logits, and small ones may stay.
    """
    parsed = parse_options(options)
    report = rewrite(gm, parsed, example_inputs)
    made = rewrite_name in report.counts
    if not made and rewrite_name not in parsed.require and torch.is_grad_enabled():
        why = report.why_not(rewrite_name) or "what the loss does with the logits is not known"
        raise HeadNotFused(
            f"the projection and the loss are not fused, and run as in torchtune's recipe: {why}"
        )
    publish(report, parsed)
    return compile_rewritten(gm, example_inputs, parsed)


def compile_layers(
    model: nn.Module, options: Mapping[str, Any] | None = None, *, checkpoint_inside: bool = True
) -> None:
    """Compile each transformer layer, with its activation checkpoint inside if it has one."""
    checkpoints = {
        module._checkpoint_wrapped_module: module
        for module in model.modules()
        if isinstance(module, CheckpointWrapper)
    }
    for layer in list(_layers(model)):
        layer._compiled_call_impl = None  # the recipe may have compiled it without its checkpoint
        target = checkpoints.get(layer, layer) if checkpoint_inside else layer
        how: dict[str, Any] = {"backend": "liger_fx", "options": dict(options or {}) or None}
        if isinstance(target, FSDPModule):  # its hooks, which Dynamo does not trace, stay outside
            target.forward = torch.compile(target.forward, **how)
        else:
            target.compile(**how)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    decoder = getattr(model, "decoder", model)
    return (module for module in decoder.modules() if isinstance(module, LAYERS))


def compile_loss(loss_fn: nn.Module, options: Mapping[str, Any] | None = None) -> None:
    """Compile, in place, what torchtune compiles of a loss: all of it, or what runs on one chunk.

    In place, since five recipes drop what torchtune's function of this name returns.
    """
    how: dict[str, Any] = {"backend": "liger_fx", "options": dict(options or {}) or None}
    for name in CHUNK_LOSSES:
        if hasattr(loss_fn, name):
            setattr(loss_fn, name, torch.compile(getattr(loss_fn, name), **how))
            return
    loss_fn.forward = torch.compile(loss_fn.forward, **how)


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
    _output_dir: str

    def setup(self, cfg: Any) -> None:
        self._settings = flatten(cfg.get("liger_fx", {}) or {})
        memory_gib = self._settings.pop("memory_gib", None)
        parse_options(self._settings)  # a mistake should show now, not in the first step
        self._compiles = bool(cfg.get("compile", False))
        super().setup(cfg=cfg)  # type: ignore[misc]
        _check_ranks_agree(self._compiles, self._settings)
        if not self._compiles:
            utils.log_rank_zero(log, UNTOUCHED, logging.WARNING)
            return
        # Offloading packs what a checkpoint saves, flex attention breaks the graph of a layer,
        # which a checkpoint cannot hold, and AOTAutograd (torch 2.13) takes no DTensors in it:
        # there it stays around the layer, as torchtune puts it.
        inside = not (
            cfg.get("enable_activation_offloading")
            or _uses_flex_attention(cfg)
            or cfg.get("tensor_parallel_dim", 1) > 1
        )
        for value in list(vars(self).values()):
            if isinstance(value, nn.Module) and any(_layers(value)):
                compile_layers(value, self._settings, checkpoint_inside=inside)
        if memory_gib is not None:
            self._keep_within(float(memory_gib))
        self._compile_losses()
        # When the first loss is there, all there is has been compiled.
        self._waiting = self._loss_fn.register_forward_hook(self._report)

    def _keep_within(self, gib: float) -> None:
        """Raises ValueError where no layer can keep more, or nobody can tell what that takes."""
        trained = self._policy_model if hasattr(self, "_policy_model") else self._model  # PPO's
        checkpoints = activations.checkpoints_of(trained)
        if not checkpoints:
            raise ValueError(
                "liger_fx.memory_gib chooses how many checkpointed layers keep their activations: "
                "it needs enable_activation_checkpointing=True"
            )
        if self._device.type != "cuda":
            raise ValueError("liger_fx.memory_gib needs a GPU: elsewhere memory is not counted")
        optimizer = getattr(self, "_optimizer", None)
        if optimizer is None:
            raise ValueError(
                "liger_fx.memory_gib looks at the memory before each optimizer step: it does not "
                "go with optimizer_in_bwd=True"
            )
        budget = activations.MemoryBudget(
            checkpoints,
            int(gib * 2**30),
            functools.partial(_peak_of_all_ranks, self._device),
            functools.partial(utils.log_rank_zero, log),
        )
        optimizer.register_step_pre_hook(budget)

    @abc.abstractmethod
    def _compile_losses(self) -> None:
        """Fuse the losses with the heads whose logits they take, or say why not."""

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

    def _compile_losses(self) -> None:
        try:
            self._loss_fn = fuse_head(self._model, self._loss_fn, self._settings)
        except HeadNotFused as reason:
            utils.log_rank_zero(log, str(reason), logging.WARNING)
            compile_loss(self._loss_fn, self._settings)


class FusedDPORecipe(LayersRecipe):
    """The same for preference training: of each model the head is fused with the log-probabilities
    that the loss takes of its logits."""

    def _compile_losses(self) -> None:
        self._heads: dict[nn.Module, HeadLogProbs] = {}
        compile_loss(self._loss_fn, self._settings)
        try:
            if getattr(self, "_enable_activation_offloading", False):
                raise HeadNotFused("the projection is not fused: its values would be offloaded")
            for model in filter(None, (self._model, getattr(self, "_ref_model", None))):
                self._heads[model] = fuse_log_probs(model, self._settings)
        except HeadNotFused as reason:
            utils.log_rank_zero(log, str(reason), logging.WARNING)

    def concatenated_forward(self, model: nn.Module, batch: Any, *args: Any, **kwargs: Any) -> Any:
        head = self._heads.get(model) if self._compiles else None

        def scores(tokens: Tensor) -> Scores:
            hidden = model(tokens)
            found = head(hidden, batch[1].to(hidden.device))  # type: ignore[misc]
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

    def _compile_losses(self) -> None:
        compile_loss(self._loss_fn, self._settings)
        self._heads = {
            model: HeadTokenLogProbs(_movable_head(model), self._settings)
            for model in (self._policy_model, self._ref_policy_model)
        }
        utils.log_rank_zero(log, SAMPLED)

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

    def _compile_losses(self) -> None:
        losses = self._loss_fn, self._kd_loss_fn
        try:
            head = fuse_distillation(
                self._model, self._teacher_model, *losses, self._kd_ratio, self._settings
            )
        except HeadNotFused as reason:
            utils.log_rank_zero(log, str(reason), logging.WARNING)
            for loss in losses:
                compile_loss(loss, self._settings)
            return
        self._kd_loss_fn = _DistillationLoss(head)
        self._loss_fn = _ClassLoss(self._kd_loss_fn)

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


def _peak_of_all_ranks(device: torch.device) -> int:
    """Bytes allocated at most, on the rank that needs most."""
    peak = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    if utils.get_world_size_and_rank()[0] > 1:
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    return int(peak)


def _check_ranks_agree(compiles: bool, settings: Mapping[str, Any]) -> None:
    """Raises RuntimeError, on every rank, if one of them would compile something else."""
    world, _ = utils.get_world_size_and_rank()
    if world == 1:
        return
    mine = f"compile={compiles}, {parse_options(settings)}, {environment()}"
    ranks: list[Any] = [None] * world
    torch.distributed.all_gather_object(ranks, mine)
    if len(set(ranks)) > 1:
        others = "\n".join(f"  rank {rank}: {what}" for rank, what in enumerate(ranks))
        raise RuntimeError(
            "the ranks disagree about what is compiled. Give every node the same config, "
            f"LIGER_FX_* variables and versions:\n{others}"
        )


def _uses_flex_attention(cfg: Any) -> bool:
    """torchtune attends over packed sequences with flex attention where the GPU supports it."""
    from torchtune.utils._import_guard import _SUPPORTS_FLEX_ATTENTION

    datasets = [cfg.dataset] if isinstance(cfg.dataset, Mapping) else cfg.dataset
    return _SUPPORTS_FLEX_ATTENTION and any(d.get("packed", False) for d in datasets)


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
