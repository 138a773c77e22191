"""Layers without the padding of a batch: one row of tokens in the place of [b, s].

torchtune pads the sequences of a batch to the length of the longest. No token attends to a later
one, so tokens behind the last label of a sequence, padding or not, influence no loss. Here the
``mask`` of a batch is the places of all other tokens. Only these go through the layers, one
sequence behind the other in a single row, each attending to its own, as in packed data
(`liger_fx.torchtune.packing`). Behind the layers zeros stand for the tokens that were left out: the
loss gets hidden states of [b, s, d], and ignores their labels as before.

Values and gradients are those of the padded batch; sums over tokens may be in another order. Where
a token that is left out would become inf or nan, the padded batch is nan, and this one may not be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_dpo, padded_collate_sft
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from liger_fx import ops
from liger_fx.torchtune.packing import Documents, let_attend

# Tokens. Matrix products of aligned rows are faster, and memory of few sizes is used again.
UNIT = 128


def leave_out_padding(
    models: Sequence[nn.Module], loaders: Sequence[DataLoader[Any]], dtype: torch.dtype
) -> str:
    """Let the layers of ``models`` run without padding, on batches that ``loaders`` prepare so.

    models: they return hidden states, of which a loss reads the rows of labelled tokens only.
    dtype: of their parameters. Returns why nothing was changed, or "". A batch's ``mask`` is int64
    [n] afterwards, of `tokens_before_last_label`; a batch without padding has none. Of preference
    data the recipe makes the mask.
    """
    reason = next(filter(None, map(_unfit_loader, loaders)), "")
    reason = reason or next(filter(None, map(_unfit_model, models)), "")
    reason = reason or let_attend(models, dtype)
    if reason:
        return reason
    for model in models:
        _Row(model)
    for loader in loaders:
        collate: Any = loader.collate_fn
        if collate.func is padded_collate_dpo:  # its batches have no place for a mask
            continue
        ignored = collate.keywords.get("ignore_idx", CROSS_ENTROPY_IGNORE_IDX)
        loader.collate_fn = _Collate(collate, ignored)
    return ""


def _unfit_loader(loader: DataLoader[Any]) -> str:
    collate = loader.collate_fn
    if isinstance(collate, partial) and collate.func in (padded_collate_sft, padded_collate_dpo):
        return ""
    named = getattr(collate, "func", collate)
    return f"batches are made by {getattr(named, '__name__', named)}, not by padded_collate_sft"


def _unfit_model(model: nn.Module) -> str:
    if not isinstance(model, TransformerDecoder):
        return f"{type(model).__name__} is no TransformerDecoder"
    if model.output_hidden_states:
        return "the model returns hidden states of its layers as well"
    layers = [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in model.layers]
    other = [m for m in layers if not isinstance(m, TransformerSelfAttentionLayer)]
    return f"{type(other[0]).__name__} is a layer of its own" if other else ""


@dataclass(frozen=True)
class _Collate:
    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    ignore_index: int

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.collate(samples)
        tokens = tokens_before_last_label(batch["labels"], self.ignore_index)
        return batch if tokens.numel() == batch["labels"].numel() else batch | {"mask": tokens}


def tokens_before_last_label(labels: Tensor, ignore_index: int) -> Tensor:
    """The tokens that may influence a loss, where each label is predicted at the token before it.

    labels: int64 [b, s], not shifted. Returns int64 [n], ascending: places in the flattened
    [b * s]. As many tokens behind the last labels are among them as make n a multiple of `UNIT`, if
    there are so many.
    """
    size = labels.shape[1]
    token = torch.arange(size)
    lengths = torch.where(labels != ignore_index, token, 0).amax(1)
    room = size - lengths
    wanted = max(UNIT, -(-int(lengths.sum()) // UNIT) * UNIT) - lengths.sum()
    lengths += torch.minimum((wanted - (room.cumsum(0) - room)).clamp(min=0), room)
    return (token < lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)


class _Row:
    """Hooks of a decoder: its tokens as one row where a batch says so, and [b, s] afterwards."""

    def __init__(self, decoder: Any) -> None:
        self.kept: Tensor | None = None
        self.shape: torch.Size | None = None
        decoder.register_forward_pre_hook(self._enter, with_kwargs=True)
        decoder.tok_embeddings.register_forward_pre_hook(self._select)
        decoder.tok_embeddings.register_forward_hook(self._mark)
        decoder.register_forward_hook(self._leave)

    def _enter(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask = kwargs.get("mask")
        self.kept = mask if isinstance(mask, Tensor) and mask.dim() == 1 else None
        if self.kept is not None:
            self.shape = (args[0] if args else kwargs["tokens"]).shape
            sequence, position = self.kept // self.shape[1], self.kept % self.shape[1]
            plan, position = Documents(*ops.document_plan(sequence[None])), position[None]
            _mark_number(plan.segments, plan.rows, position)
            kwargs = kwargs | {"mask": plan, "input_pos": position}
        return args, kwargs

    def _select(self, embedding: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return args if self.kept is None else (args[0].flatten()[self.kept][None],)

    def _mark(self, embedding: nn.Module, args: Any, hidden: Tensor) -> None:
        if self.kept is not None:
            _mark_number(hidden)

    def _leave(self, decoder: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        # A tied embedding is called again by the loss, whose head it is.
        kept, self.kept = self.kept, None
        if kept is None or self.shape is None:
            return hidden
        rows = hidden.new_zeros(self.shape.numel(), hidden.shape[-1])
        return rows.index_copy_(0, kept, hidden[0]).view(*self.shape, -1)


def _mark_number(*rows: Tensor) -> None:
    """Dimension 1 is the number of tokens, which is another one in each batch. One graph is for all
    batches then; otherwise the first batch would get a graph of its own."""
    for tensor in rows:
        torch._dynamo.maybe_mark_dynamic(tensor, 1)
