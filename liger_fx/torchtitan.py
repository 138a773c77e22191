"""torchtitan: head and loss as one op in the place of its loop over chunks, and layers compiled
with liger_fx.

    torchrun ... -m torchtitan.train ... --override.imports liger_fx.torchtitan.fused_loss

torchtitan projects chunk by chunk, with a loss and a backward for each, so that projection and loss
are in no graph together. `fused_loss` compiles both as one region around one op.

torchtitan itself compiles the layers, ``--compile.enable --compile.backend liger_fx``. It refuses
that name for models with flex attention, as all of its language models are. With
`attention_in_layers` among the overrides it takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import spmd_types
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import FlexAttention
from torchtitan.protocols.module import Module
from torchtitan.tools.logging import logger  # what a user of torchtitan sees

from liger_fx.dynamo import Backend
from liger_fx.report import Report

_HEADS = ("linear_cross_entropy", "linear_logprobs")


class HeadNotFused(RuntimeError):
    """Projection and loss stay apart, as torchtitan has them; the message says why."""


class FusedLoss(ChunkedLossWrapper):
    """``loss_fn(lm_head(hidden), labels, ...)`` as one region, compiled around one op.

    Where there is no such op (tensor parallelism, say) torchtitan's own loop over chunks runs, and
    the log says why. It also runs in validation, where nothing is kept of the logits of a chunk,
    and under torchtitan's type checker, whose types do not get through a compiled region.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        super().__init__(config, compile_config=compile_config)
        self._region = torch.compile(self._outcome, backend=Backend(accept=_one_op_or_nothing))
        self._fused = True

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """The projection; called by the trainer once the model is parallel."""
        super().set_lm_head(lm_head)
        self._project: Callable[[Tensor], Tensor] = lm_head.forward

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics, as of `ChunkedLossWrapper`. pred: [b, s, d], hidden states.
        labels: [b, s]."""
        if self._fused and pred.requires_grad and not spmd_types.is_type_checking():
            outcome = self._enter(pred, labels, global_valid_tokens, loss_inputs)
            if outcome is not None:
                return outcome
        return super().__call__(pred, labels, global_valid_tokens, **loss_inputs)

    def _enter(self, *args: Any) -> Any:
        """The region as a call of the head, whose hooks are FSDP's: they gather the weight before
        it and scatter its gradient."""
        lm_head: Any = self.lm_head
        of_instance = vars(lm_head).pop("forward", None)
        lm_head.forward = self._region_or_none
        try:
            return lm_head(*args)
        finally:
            del lm_head.forward
            if of_instance is not None:
                lm_head.forward = of_instance

    def _region_or_none(self, *args: Any) -> Any:
        try:
            return self._region(*args)
        except BackendCompilerFailed as failure:
            if not isinstance(failure.inner_exception, HeadNotFused):
                raise
            logger.warning("liger_fx: %s", failure.inner_exception)
            self._fused = False
            return None  # an error would keep FSDP's hooks from the end of their work

    def _outcome(
        self,
        hidden: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None,
        loss_inputs: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss_fn(self._project(hidden), labels, global_valid_tokens, **loss_inputs)


def _one_op_or_nothing(report: Report) -> None:
    """Raise `HeadNotFused` where the region does not become one op."""
    if not report.counts.keys() & {*_HEADS}:
        whys = filter(None, map(report.why_not, _HEADS))
        why = next(whys, "what the loss does with the logits is not known")
        raise HeadNotFused(f"the projection and the loss stay in torchtitan's chunks: {why}")


@override(
    target=ChunkedLossWrapper.Config,
    exact=True,
    description="Projection and loss as one op, without chunks",
)
def fused_loss(config: ChunkedLossWrapper.Config) -> FusedLoss.Config:
    """``--override.imports liger_fx.torchtitan.fused_loss``"""
    return derive(config, FusedLoss.Config)


class AttentionInLayer(Module):
    """Flex attention that Inductor lowers as a part of the layer's graph.

    torchtitan refuses flex attention in graphs of another backend than Inductor, since it would not
    become a kernel. liger_fx gives its graphs to Inductor, but has another name.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kernel_options = config.kernel_options

    forward = FlexAttention.forward


@override(
    target=FlexAttention.Config,
    exact=True,
    description="Flex attention under --compile.backend liger_fx",
)
def attention_in_layers(config: FlexAttention.Config) -> AttentionInLayer.Config:
    """``--override.imports liger_fx.torchtitan.attention_in_layers``"""
    return derive(config, AttentionInLayer.Config)
