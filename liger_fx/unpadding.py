"""A causal language model of transformers whose layers see no padding, and shared beginnings once.

A batch of [b, s] goes through the layers as one row of its valid tokens, one sequence behind the
other, each attending to its own by ``liger_fx::attention``. Where sequences begin with the same
tokens, as the answers to one prompt, these are in the row once (`liger_fx.rows`). Behind the last
layer the hidden states are [b, s, d] again, with zeros for padding. So values and gradients are
those of the batch wherever nothing reads what the model says of padding; sums over tokens may be in
another order.
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
from liger_fx.ops.attention import MAX_HEAD_SIZE
from liger_fx.rows import Row, first_rows, own_rows, why_not_shared

log = logging.getLogger("liger_fx")

PLAN = "liger_fx_plan"  # the keyword that brings a plan of `ops.sequence_plan` to the attentions
IMPLEMENTATION = "liger_fx"  # of attention, as transformers names it
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
    hooks = _Hooks(decoder.config)
    model.register_forward_pre_hook(hooks.see_labels, with_kwargs=True)
    decoder.register_forward_pre_hook(hooks.enter, with_kwargs=True)
    decoder.register_forward_hook(hooks.leave)


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
    """Attention as transformers calls it: over sequences where it is told of them, else ``sdpa``.

    query, key, value: [b, h, s, d]. attention_mask: int8 [1, 1, s, sequences] says in which
    sequences a token is, others are as for ``sdpa``. Returns [b, s, h, d].
    """
    plan = kwargs.pop(PLAN, None)
    if attention_mask is not None and _tells_sequences(attention_mask, query):
        query, key, value = _as_autocast(query, key, value)
        if plan is not None and dropout == 0.0 and _takes(query, value):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            out = ops.attention(query, key, value, *plan, sliding_window, scale)
            return out.transpose(1, 2), None
        attention_mask = _dense(attention_mask, sliding_window)
    kwargs |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _tells_sequences(mask: Tensor, query: Tensor) -> bool:
    """No mask of transformers is of this dtype, and PyTorch takes none."""
    return mask.dtype == torch.int8 and mask.shape[:3] == (1, 1, query.shape[2])


def _as_autocast(*heads: Tensor) -> Sequence[Tensor]:
    device = heads[0].device.type
    if not torch.is_autocast_enabled(device):
        return heads
    return [x.to(torch.get_autocast_dtype(device)) for x in heads]


def _takes(query: Tensor, value: Tensor) -> bool:
    """Is there a kernel of sequences for these?"""
    size = query.shape[-1]
    if size != value.shape[-1]:
        return False
    fast = query.dtype in (torch.bfloat16, torch.float16) and size <= MAX_HEAD_SIZE
    return query.device.type == "cpu" or (fast and size % 8 == 0)


def _has_kernel(device: torch.device) -> bool:
    """Flash attention takes compute capability 8.0."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _dense(members: Tensor, window: int | None) -> Tensor:
    """bool [1, 1, s, s]: which keys a query sees. members: int8 [1, 1, s, sequences]."""
    inside = members[0, 0].T != 0
    of_query = inside.byte().argmax(0)
    place = inside.cumsum(1)[of_query]  # of each key in the query's sequence
    ahead = place - place.diagonal().unsqueeze(1)
    seen = inside[of_query] & (ahead <= 0)
    return (seen if window is None else seen & (ahead > -window))[None, None]


class _Hooks:
    """Of a decoder: the tokens it has to see as one row, and [b, s] afterwards."""

    def __init__(self, config: Any) -> None:
        self.windows = getattr(config, "sliding_window", None) is not None
        self.labels: Tensor | None = None
        self.is_read = True  # the call of the model that the decoder is called in
        self.row: Row | None = None

    def see_labels(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = _named(model, args, kwargs)
        self.is_read, self.labels = given is not None, (given or {}).get("labels")

    def enter(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self.row, given = None, _named(decoder, args, kwargs)
        if given is None or not self.is_read or torch.compiler.is_compiling():
            return args, kwargs
        shape = _shape_of_batch(given, decoder.config)
        if shape is None:
            return args, kwargs
        valid = _valid(given, shape)
        reason = self._why_padded(valid) or _noise(decoder)
        if reason:
            torch._logging.warning_once(log, f"liger_fx: padding stays in a batch: {reason}")
            return args, kwargs
        self.row = Row.if_worth(valid, _first_rows(valid, given, decoder))
        if self.row is None:
            return args, kwargs
        log.debug("liger_fx: layers see %d of %d tokens", len(self.row.tokens), valid.numel())
        return (), given | self._as_row(self.row, given)

    def _why_padded(self, valid: Tensor) -> str:
        """Why padding stays, or "". Waits for the device."""
        runs = F.pad(valid[:, 1:] & ~valid[:, :-1], (1, 0)).sum(1) + valid[:, 0]
        facts = torch.stack((runs.amax() > 1, _labelled(valid, self.labels)))
        holes, labelled = facts.tolist()
        if labelled:
            return "labels that are not ignored are of padding, or predicted at padding"
        if holes and self.windows:
            return "attention is in a window, and padding is between valid tokens"
        return ""

    def _as_row(self, row: Row, given: dict[str, Any]) -> dict[str, Any]:
        names = ("input_ids", "inputs_embeds")
        made: dict[str, Any] = {n: row.select(given[n]) for n in names if given.get(n) is not None}
        members = row.members()
        if _has_kernel(row.tokens.device):
            made[PLAN] = ops.sequence_plan(members)
        return made | {
            # transformers passes four dimensions on.
            "attention_mask": members.T[None, None].to(torch.int8),
            "position_ids": row.select(_positions(given, row.first.shape)),
        }

    def leave(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        row, self.row = self.row, None
        if row is not None:
            output["last_hidden_state"] = row.spread(output.last_hidden_state)
        return output


def _valid(given: dict[str, Any], shape: torch.Size) -> Tensor:
    """bool [b, s]"""
    mask, inputs = given.get("attention_mask"), _inputs(given)
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=inputs.device)
    return mask != 0


def _inputs(given: dict[str, Any]) -> Tensor:
    return given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]


def _positions(given: dict[str, Any], shape: torch.Size) -> Tensor:
    """int64 [b, s]"""
    positions = given.get("position_ids")
    if positions is None:
        positions = torch.arange(shape[1], device=_inputs(given).device)
    return positions.expand(shape)


def _first_rows(valid: Tensor, given: dict[str, Any], decoder: nn.Module) -> Tensor:
    if len(valid) == 1 or given.get("inputs_embeds") is not None:  # nobody knows which are equal
        return own_rows(valid)
    alike, positions = [given["input_ids"]], given.get("position_ids")
    if positions is not None and positions.shape == valid.shape:
        alike.append(positions)
    own, first = own_rows(valid), first_rows(valid, *alike)
    reason = "" if torch.equal(first, own) else why_not_shared(decoder)
    if reason:
        text = f"liger_fx: sequences do not share the tokens that they begin with: {reason}"
        torch._logging.warning_once(log, text)
    return own if reason else first


def _noise(decoder: Any) -> str:
    """Why the embeddings of a token depend on the size of a batch, or ""."""
    if decoder.training and hasattr(decoder.get_input_embeddings(), "neftune_noise_alpha"):
        return "NEFTune scales its noise by the size of a batch"
    return ""


def _named(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by their names; None if ``forward`` has no name for one of them."""
    signature = inspect.signature(module.forward)
    given = signature.bind_partial(*args).arguments
    kinds = {signature.parameters[name].kind for name in given}
    return None if inspect.Parameter.VAR_POSITIONAL in kinds else given | kwargs


def _shape_of_batch(given: dict[str, Any], config: Any) -> torch.Size | None:
    """[b, s] of a batch that has nothing else of that size but known things; else None."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if given.get("inputs_embeds") is None and given.get("input_ids") is None:
        return None
    shape = _inputs(given).shape[:2]
    known = (
        shape.numel() > 0
        # Without a mask positions may tell of several sequences in a row.
        and (
            positions is None if mask is None else isinstance(mask, Tensor) and mask.shape == shape
        )
        and (positions is None or positions.dim() <= 2)
        and given.get("past_key_values") is None
        and given.get("return_dict") is not False
        and not any(given.get(name, getattr(config, name, False)) for name in _RETURNED)
        and not any(isinstance(v, Tensor) and v.dim() and k not in _ROWS for k, v in given.items())
    )
    return shape if known else None


def _labelled(valid: Tensor, labels: Tensor | None) -> Tensor:
    """Is a label of a token of padding, or of the token behind one, not ignored?"""
    if labels is None or labels.shape != valid.shape:
        return valid.new_zeros(())
    read = labels != -100  # what transformers ignores
    return (read & ~valid).any() | (read[:, 1:] & ~valid[:, :-1]).any()
