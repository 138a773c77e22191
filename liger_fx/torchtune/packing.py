"""Attention over packed data, by documents in the place of a mask.

torchtune gives a packed batch a block mask for flex attention, which breaks the graph of a layer,
or a mask of [s, s]. Here a batch has the number of each token's document. Before the layers run
`liger_fx.ops.document_plan` turns these into where documents start, once for all layers, and each
attention is ``liger_fx::attention``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchtune.data import padded_collate_packed
from torchtune.modules import MultiHeadAttention, TransformerDecoder
from torchtune.modules.attention_utils import _get_document_ids_from_seq_lens

from liger_fx import ops
from liger_fx.ops.attention import MAX_HEAD_SIZE


class Documents(NamedTuple):
    """What `document_plan` and `sequence_plan` of `liger_fx.ops` return, in the place of a mask."""

    segments: Tensor
    rows: Tensor
    after: Tensor
    facts: Tensor


def attend_over_documents(
    models: Sequence[nn.Module], loaders: Sequence[DataLoader[Any]], dtype: torch.dtype
) -> str:
    """Let ``models`` take batches of packed data without a mask, and ``loaders`` make them.

    dtype: of the models' parameters. Returns why nothing was changed, or "". A batch's ``mask`` is
    int64 [b, s] afterwards.
    """
    reason = let_attend(models, dtype)
    if reason:
        return reason
    for model in models:
        for decoder in model.modules():
            if isinstance(decoder, TransformerDecoder):
                decoder.register_forward_pre_hook(_plan, with_kwargs=True)
    for loader in loaders:
        if loader.collate_fn is padded_collate_packed:
            loader.collate_fn = collate_documents
    return ""


def let_attend(models: Sequence[nn.Module], dtype: torch.dtype) -> str:
    """Let the attentions of ``models`` take `Documents` for a mask. Returns why not, or ""."""
    found = [module for model in models for module in _attentions(model)]
    reason = next(filter(None, (_unfit(module, dtype) for module in found)), "")
    if not reason:
        for module in found:
            module._attention_call = functools.partial(_attend, module._attention_call)  # type: ignore[assignment, arg-type]
    return reason


def collate_documents(batch: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """As torchtune's ``padded_collate_packed``, with the documents of the tokens as ``mask``."""
    names = ("tokens", "labels", "input_pos")
    stacked = {name: torch.stack([sample[name] for sample in batch]) for name in names}
    lengths = [sample["seq_lens"] for sample in batch]
    return stacked | {"mask": _get_document_ids_from_seq_lens(lengths)}


def _attentions(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if type(m).__name__.endswith("Attention"))


def _unfit(module: nn.Module, dtype: torch.dtype) -> str:
    """Why an attention cannot be ``liger_fx::attention``; empty if it can."""
    if not isinstance(module, MultiHeadAttention):
        return f"{type(module).__name__} is an attention of its own"
    if module.attn_dropout > 0.0 or not module.is_causal:
        return "attention has dropout, or is not causal"
    if module.head_dim % 8 or module.head_dim > MAX_HEAD_SIZE:
        return f"heads have {module.head_dim} elements"
    on_gpu = next(module.parameters()).device.type != "cpu"
    if on_gpu and dtype not in (torch.bfloat16, torch.float16):
        return f"attention runs in {dtype}"
    return ""


def _plan(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mask = kwargs.get("mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kwargs = kwargs | {"mask": Documents(*ops.document_plan(mask))}
    return args, kwargs


def _attend(
    stock: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Any,
    dropout_p: float,
    is_causal: bool,
) -> Tensor:
    if isinstance(mask, Documents):
        return ops.attention(query, key, value, *mask, None, query.shape[-1] ** -0.5)
    return stock(query, key, value, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
