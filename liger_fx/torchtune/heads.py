"""A decoder's head as one region with what is taken of its logits, compiled around one op."""

from __future__ import annotations

import abc
import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtune import rlhf, utils
from torchtune.modules import TiedLinear
from torchtune.modules.loss import (
    CEWithChunkedOutputLoss,
    ForwardKLLoss,
    ReverseKLLoss,
    SymmetricKLLoss,
)

from liger_fx.dynamo import Backend
from liger_fx.report import Report
from liger_fx.torchtune.parts import compile_loss, of_one_chunk

log = utils.get_logger("INFO")  # torchtune's: what a recipe says, its user sees

CROSS_ENTROPIES = CEWithChunkedOutputLoss, nn.CrossEntropyLoss


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
        self._backend = Backend(self._options, accept=self._one_op_or_nothing)
        self._region = torch.compile(self._outcome, backend=self._backend)
        self._fused = True
        owner, run = _owner(decoder), self._region_or_stock
        self._enter = _through(owner, run) if isinstance(owner, FSDPModule) else run

    def _one_op_or_nothing(self, report: Report) -> None:
        """Raise `HeadNotFused` where the region does not become one op, and is not worth it.

        Without gradients nothing is kept of the logits, and small ones may stay.
        """
        made, required = self.rewrite in report.counts, self._backend.options.require
        if not made and self.rewrite not in required and torch.is_grad_enabled():
            why = report.why_not(self.rewrite) or "what the loss does with the logits is not known"
            apart = "the projection and the loss are not fused, and run as in torchtune's recipe"
            raise HeadNotFused(f"{apart}: {why}")

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
        whole = of_one_chunk(self.kd_loss_fn)
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

    def of_tokens(self, kept: Tensor, shape: torch.Size) -> Scores:
        """The means of the ``kept`` tokens alone, where hidden states of all others are zeros.
        kept: int64 [n] on the host, places in the flattened ``shape``, [b, s]."""
        rows = torch.bincount(kept // shape[1], minlength=shape[0]).clamp(min=1)
        return Scores(self.logprobs, self.means * (shape[1] / rows).to(self.means.device))

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
    decoder = movable_head(model)
    head = HeadLoss(decoder, dict(options or {}), loss_fn)
    _leave_out_head(model, decoder)
    return head


def fuse_log_probs(model: nn.Module, options: Mapping[str, Any] | None = None) -> HeadLogProbs:
    """Move the head of ``model`` into the log-probabilities that preference losses take of it.

    As `fuse_head`; returns what to call as ``scores(hidden, labels)``.
    """
    decoder = movable_head(model)
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
    if not isinstance(loss_fn, CROSS_ENTROPIES):
        raise HeadNotFused(f"{apart}expected a cross-entropy, found {type(loss_fn).__name__}")
    if not isinstance(of_one_chunk(kd_loss_fn), ForwardKLLoss | ReverseKLLoss | SymmetricKLLoss):
        raise HeadNotFused(
            f"{apart}expected one of torchtune's divergences, found {type(kd_loss_fn).__name__}"
        )
    decoder, teachers = movable_head(model), movable_head(teacher)
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


def movable_head(model: nn.Module) -> Any:
    """The decoder of ``model``, whose head may be moved; raises as `fuse_head` does."""
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
