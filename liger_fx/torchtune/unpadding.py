"""Layers without the padding of a batch, and with shared beginnings once, as one row of tokens.

torchtune pads the sequences of a batch to the length of the longest. No token attends to a later
one, so tokens behind the last label of a sequence, padding or not, influence no loss. Tokens that
sequences begin with in common, as a pair of answers with its prompt, have the same hidden states in
each (`liger_fx.rows`). Here the ``mask`` of a batch says which tokens are left. Only these go
through the layers, one sequence behind the other in a single row, each attending to its own, as in
packed data (`liger_fx.torchtune.packing`). Behind the layers hidden states are [b, s, d] again,
with zeros for tokens that no loss reads, whose labels it ignores as before.

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
from liger_fx.rows import Row, first_rows, own_rows, why_not_shared
from liger_fx.torchtune.packing import Documents, let_attend


def leave_out_padding(
    models: Sequence[nn.Module], loaders: Sequence[DataLoader[Any]], dtype: torch.dtype
) -> str:
    """Let the layers of ``models`` run without padding, on batches that ``loaders`` prepare so.

    models: they return hidden states, of which a loss reads the rows of labelled tokens only.
    dtype: of their parameters. Returns why nothing was changed, or "". A batch's ``mask`` is of
    `mask_of` afterwards; a batch that is as fast as it is has none. Of preference data the recipe
    makes the mask.
    """
    reason = next(filter(None, map(_unfit_loader, loaders)), "")
    reason = reason or next(filter(None, map(_unfit_model, models)), "")
    reason = reason or let_attend(models, dtype)
    if reason:
        return reason
    for model in models:
        _Hooks(model)
    shares = may_share(models)
    for loader in loaders:
        collate: Any = loader.collate_fn
        if collate.func is padded_collate_dpo:  # its batches have no place for a mask
            continue
        ignored = collate.keywords.get("ignore_idx", CROSS_ENTROPY_IGNORE_IDX)
        loader.collate_fn = _Collate(collate, ignored, shares)
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
    shares: bool

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collate(samples)
        mask = mask_of(batch["tokens"], batch["labels"], self.ignore_index, self.shares)
        return batch if mask is None else batch | {"mask": mask}


def may_share(models: Sequence[nn.Module]) -> bool:
    """Have equal tokens the same hidden states in all of ``models``?"""
    return not any(map(why_not_shared, models))


class RowMask(dict[str, Tensor]):
    """The fields of a `Row`, as the ``mask`` of a batch: torchtune's recipes move a batch by
    ``batch_to_device``, which takes dicts, or call ``to`` of each of its values."""

    def to(self, device: torch.device | str) -> RowMask:
        return RowMask({name: tensor.to(device) for name, tensor in self.items()})


def mask_of(tokens: Tensor, labels: Tensor, ignore_index: int, shares: bool) -> RowMask | None:
    """What a decoder with the hooks of `leave_out_padding` takes for the ``mask`` of a batch; None
    where the batch goes through the layers as it is.

    tokens, labels: int64 [b, s] on the host, labels not shifted: each is predicted at the token
    before it. shares: may sequences share the tokens that they begin with?
    """
    token = torch.arange(labels.shape[1])
    read = token < torch.where(labels != ignore_index, token, 0).amax(1, keepdim=True)
    first = first_rows(read, tokens) if shares else own_rows(read)
    row = Row.if_worth(read, first)
    return None if row is None else RowMask(row._asdict())


class _Hooks:
    """Of a decoder: its tokens as one row where a batch says so, and [b, s] afterwards."""

    def __init__(self, decoder: Any) -> None:
        self.row: Row | None = None
        decoder.register_forward_pre_hook(self._enter, with_kwargs=True)
        decoder.tok_embeddings.register_forward_pre_hook(self._select)
        decoder.tok_embeddings.register_forward_hook(self._mark)
        decoder.register_forward_hook(self._leave)

    def _enter(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        mask = kwargs.get("mask")
        self.row = Row(**mask) if isinstance(mask, RowMask) else None
        if self.row is not None:
            plan = Documents(*ops.sequence_plan(self.row.members()))
            position = (self.row.tokens % self.row.first.shape[1])[None]
            _mark_number(1, plan.segments, plan.rows, position)
            _mark_number(plan.after.dim() - 1, plan.after)
            kwargs = kwargs | {"mask": plan, "input_pos": position}
        return args, kwargs

    def _select(self, embedding: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return args if self.row is None else (self.row.select(args[0]),)

    def _mark(self, embedding: nn.Module, args: Any, hidden: Tensor) -> None:
        if self.row is not None:
            _mark_number(1, hidden)

    def _leave(self, decoder: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        # A tied embedding is called again by the loss, whose head it is.
        row, self.row = self.row, None
        return hidden if row is None else row.spread(hidden)


def _mark_number(dimension: int, *rows: Tensor) -> None:
    """The dimension is the number of tokens, which is another one in each batch. One graph is for
    all batches then; otherwise the first batch would get a graph of its own."""
    for tensor in rows:
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
