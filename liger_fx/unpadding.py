"""A causal language model of transformers without the padding of its batches.

A batch of [b, s] with an attention mask goes through the layers as one row of its valid tokens, one
sequence behind the other, each attending to its own by ``liger_fx::attention``. Behind the last
layer the hidden states are [b, s, d] again, with zeros for padding. So values and gradients are
those of the padded batch wherever nothing reads what the model says of padding; sums over tokens
may be in another order.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from liger_fx import ops
from liger_fx.ops.attention import MAX_HEAD_SIZE, band

log = logging.getLogger("liger_fx")

PLAN = "liger_fx_plan"  # the keyword that brings a plan of `ops.document_plan` to the attentions
IMPLEMENTATION = "liger_fx"  # of attention, as transformers names it
UNIT = 128  # tokens: products of aligned rows are faster, and memory of few sizes is used again
KINDS = {"full_attention", "sliding_attention"}  # of layers

_ROWS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}  # what is known of [b, s]
_RETURNED = ("output_hidden_states", "output_attentions", "output_router_logits")


def leave_out_padding(model: nn.Module, language_model: PreTrainedModel) -> None:
    """Let the decoder of ``language_model`` run without padding.

    model: what is called with the labels, ``language_model`` or a wrapper of it. Raises ValueError
    for a model whose tokens do not only meet in causal attention of PyTorch's kind.
    """
    decoder = language_model.get_decoder()
    reason = _unfit(language_model, decoder)
    if reason:
        raise ValueError(
            f"padding cannot be left out of {type(language_model).__name__}: {reason}; "
            "compile it without unpad=True, or train on packed sequences"
        )
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    decoder.config._attn_implementation = IMPLEMENTATION
    row = _Row(decoder.config)
    model.register_forward_pre_hook(row.see_labels, with_kwargs=True)
    decoder.register_forward_pre_hook(row.enter, with_kwargs=True)
    decoder.register_forward_hook(row.leave)


def _unfit(model: Any, decoder: Any) -> str:
    if decoder is model or not isinstance(decoder, PreTrainedModel):
        return "it has no decoder below its head"
    config = decoder.config
    if config.is_encoder_decoder:
        return "it has an encoder"
    if config._attn_implementation != "sdpa":
        return f"its attention is {config._attn_implementation!r}, expected 'sdpa'"
    if not (decoder._supports_attention_backend and decoder._supports_flash_attn):
        return "its attention is not called through transformers' AttentionInterface"
    other = set(getattr(config, "layer_types", None) or ()) - KINDS
    if other:
        return f"layers of kind {', '.join(sorted(other))} let tokens meet elsewhere"
    for name, module in decoder.named_children():
        if "attention_mask" in inspect.signature(module.forward).parameters:
            return f"{name} reads the mask of a batch"
        if getattr(module, "rope_type", None) in ("dynamic", "longrope"):
            return f"the angles of {name} depend on the length of a batch"
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Conv1d):
            return f"tokens meet in the convolution {name}"
        if getattr(module, "is_causal", True) is False:
            return f"{name} is not causal"
    return ""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: over documents where it is told of them, else ``sdpa``.

    query, key, value: [b, h, s, d]. attention_mask: int64 [1, 1, s, 1] says which document a token
    is of, others are as for ``sdpa``. Returns [b, s, h, d].
    """
    plan = kwargs.pop(PLAN, None)
    if attention_mask is not None and _tells_documents(attention_mask):
        query, key, value = _as_autocast(query, key, value)
        if plan is not None and dropout == 0.0 and _takes(query, value):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            out = ops.attention(query, key, value, *plan, sliding_window, scale)
            return out.transpose(1, 2), None
        attention_mask = _dense(attention_mask, sliding_window)
    kwargs |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _tells_documents(mask: Tensor) -> bool:
    return mask.dtype == torch.int64 and mask.shape[-1] == 1


def _as_autocast(*heads: Tensor) -> Sequence[Tensor]:
    device = heads[0].device.type
    if not torch.is_autocast_enabled(device):
        return heads
    return [x.to(torch.get_autocast_dtype(device)) for x in heads]


def _takes(query: Tensor, value: Tensor) -> bool:
    """Is there a kernel of documents for these?"""
    size = query.shape[-1]
    if size != value.shape[-1]:
        return False
    fast = query.dtype in (torch.bfloat16, torch.float16) and size <= MAX_HEAD_SIZE
    return query.device.type == "cpu" or (fast and size % 8 == 0)


def _has_kernel(device: torch.device) -> bool:
    """Flash attention takes compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _dense(documents: Tensor, window: int | None) -> Tensor:
    """bool [1, 1, s, s]: which keys a query sees."""
    same = documents == documents.transpose(2, 3)
    return same & band(documents.shape[2], window, documents.device)


class _Row:
    """Hooks of a decoder: its valid tokens as one row, and [b, s] afterwards."""

    def __init__(self, config: Any) -> None:
        self.windows = getattr(config, "sliding_window", None) is not None
        self.labels: Tensor | None = None
        self.is_read = True  # the call of the model that the decoder is called in
        self.kept: Tensor | None = None
        self.shape = torch.Size()

    def see_labels(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = _named(model, args, kwargs)
        self.is_read, self.labels = given is not None, (given or {}).get("labels")

    def enter(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self.kept, given = None, _named(decoder, args, kwargs)
        if given is None or not self.is_read or torch.compiler.is_compiling():
            return args, kwargs
        if not _is_padded(given, decoder.config):
            return args, kwargs
        self.shape = given["attention_mask"].shape
        valid = given["attention_mask"] != 0
        reason, tokens = self._read(valid, self.labels)
        if reason:
            torch._logging.warning_once(log, f"liger_fx: padding stays in a batch: {reason}")
        elif -(-tokens // UNIT) * UNIT < valid.numel():
            log.debug("liger_fx: layers see %d of %d tokens", tokens, valid.numel())
            return (), given | self._as_row(valid, tokens, given)
        return args, kwargs

    def _read(self, valid: Tensor, labels: Tensor | None) -> tuple[str, int]:
        """Why padding stays, or how many tokens are valid. Waits for the device, once."""
        starts = F.pad(valid[:, 1:] & ~valid[:, :-1], (1, 0)).sum(1) + valid[:, 0]
        facts = [valid.sum(), starts.amax(), _labelled(valid, labels)]
        tokens, runs, labelled = torch.stack([fact.long() for fact in facts]).tolist()
        if labelled:
            return "labels that are not ignored are of padding, or predicted at padding", 0
        if runs > 1 and self.windows:
            return "attention is in a window, and padding is between valid tokens", 0
        return "", max(tokens, 1)

    def _as_row(self, valid: Tensor, tokens: int, given: dict[str, Any]) -> dict[str, Any]:
        """Valid tokens, and behind them, as a document of its own, as much padding as makes a
        multiple of `UNIT`."""
        batch, size = valid.shape
        valid = valid.flatten()
        order = torch.argsort(~valid, stable=True)[: -(-tokens // UNIT) * UNIT]
        sequence = torch.where(valid[order], order // size, batch)
        self.kept = order[:tokens]
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(size, device=valid.device)
        row = {
            name: given[name].flatten(0, 1)[order][None]
            for name in ("input_ids", "inputs_embeds")
            if given.get(name) is not None
        }
        if _has_kernel(valid.device):
            row[PLAN] = ops.document_plan(sequence[None])
        return row | {
            "attention_mask": sequence.view(1, 1, -1, 1),  # transformers passes four dimensions on
            "position_ids": positions.expand(batch, size).flatten()[order][None],
        }

    def leave(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        kept, self.kept = self.kept, None
        if kept is not None:
            hidden = output.last_hidden_state
            rows = hidden.new_zeros(self.shape.numel(), hidden.shape[-1])
            rows = rows.index_copy(0, kept, hidden[0, : len(kept)])
            output["last_hidden_state"] = rows.view(*self.shape, -1)
        return output


def _named(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by their names; None if ``forward`` has no name for one of them."""
    signature = inspect.signature(module.forward)
    given = signature.bind_partial(*args).arguments
    kinds = {signature.parameters[name].kind for name in given}
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else given | kwargs


def _is_padded(given: dict[str, Any], config: Any) -> bool:
    """Is it a batch with a mask of its tokens, and with nothing else of [b, s] but known things?"""
    mask = given.get("attention_mask")
    inputs = (
        given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    )
    positions = given.get("position_ids")
    return (
        isinstance(mask, Tensor)
        and mask.dim() == 2
        and inputs is not None
        and inputs.shape[:2] == mask.shape
        and (positions is None or positions.dim() <= 2)
        and given.get("past_key_values") is None
        and given.get("return_dict") is not False
        and not any(given.get(name, getattr(config, name, False)) for name in _RETURNED)
        and not any(isinstance(v, Tensor) and v.dim() and k not in _ROWS for k, v in given.items())
    )


def _labelled(valid: Tensor, labels: Tensor | None) -> Tensor:
    """Is a label of a token of padding, or of the token behind one, not ignored?"""
    if labels is None or labels.shape != valid.shape:
        return valid.new_zeros(())
    read = labels != -100  # what transformers ignores
    return (read & ~valid).any() | (read[:, 1:] & ~valid[:, :-1]).any()
