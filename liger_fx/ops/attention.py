"""``liger_fx::attention``: causal attention in a window, over documents or beside padding.

The mask is not a tensor of [s, s] but what it says. A *plan*, made once for all layers by
`document_plan`, `padding_plan` or `sequence_plan`, tells which of PyTorch's kernels computes it:

==============  ===================================================================================
every token     cuDNN or flash attention, as PyTorch chooses; in a window flash. Padding at the end
                of a row hides no key from a valid query, which sees none that is later
segments        flash attention over sequences of several lengths ("varlen"): documents, or the runs
                of valid tokens and the padding before them
shared          the same over sequences that have tokens in common. A token is a query once. Each of
                its sequences has a copy of its key and value, whose gradients are summed in fp32
dense           the mask itself, as PyTorch would run it: padding between valid tokens, or after
                valid tokens in a window
==============  ===================================================================================

The queries of the padding at the end of a row see all valid keys of that row. A second call over
these queries alone computes them; its backward does nothing where their gradient is zero, as it is
where padding has no labels. So all rows of the output are those of ``scaled_dot_product_attention``
under the mask. A query that sees no key gets zeros, as PyTorch's kernels give.

Making a plan waits for the device once, since the host has to know which kernels to launch.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import (
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from liger_fx.ops.library import differentiable, kernel, once_differentiable

aten = torch.ops.aten

MAX_HEAD_SIZE = 256  # of PyTorch's flash attention


class Kind(enum.IntEnum):
    """Which kernel computes the queries that are no padding at the end of a row."""

    EVERY_TOKEN = 0
    SEGMENTS = 1
    DENSE = 2
    SHARED = 3


class Row(enum.IntEnum):
    """A token is valid, or it is padding: with a valid token before it, or without."""

    VALID = 0
    AFTER = 1
    BEFORE = 2


# -- plans -----------------------------------------------------------------------------------------


# A plan is four tensors. segments: int32 [1, 2 or 3, n], where segments start and where the last
# ends; if they share tokens, those of the queries, then those of the keys; with padding also those
# of the queries and of the keys of the second call. rows: int8 [b, s], of `Row`. after: int64, the
# tokens of the second call; or for keys that are copies int64 [3, copies]: the token of each, the
# copies in the order of their tokens, and where in this order those of a token start. facts: int64
# [4] on the host.
Plan = tuple[Tensor, Tensor, Tensor, Tensor]
# A kernel takes the four, or None for each, then the window and the scale; or a mask and the scale.
# Both return these.
Forward = tuple[Tensor, Tensor]  # the output, and the logsumexp of each row of scores
Gradients = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values


def _facts(kind: Kind, segments: Any, longest: Any, after: Any) -> Tensor:
    """segments: their number. longest: tokens of a segment. after: tokens of the second call."""
    return torch.tensor([kind, segments, longest, after])


def _plan_documents(documents: Tensor) -> Plan:
    documents = documents.reshape(-1, documents.shape[-1])
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = starts.flatten()
    tokens = starts.numel()
    number = starts.cumsum(0)
    # The last but one element ends the last document; the last takes the tokens that start none.
    segments = number.new_full((tokens + 2,), tokens, dtype=torch.int32)
    at = torch.where(starts, number - 1, tokens + 1)
    segments.scatter_(0, at, torch.arange(tokens, device=at.device, dtype=torch.int32))
    segments = segments[:-1].clone()
    count, longest = torch.stack((number[-1], segments.diff().amax())).tolist()
    kind = Kind.EVERY_TOKEN if count == documents.shape[0] else Kind.SEGMENTS
    rows = torch.zeros_like(documents, dtype=torch.int8, memory_format=torch.contiguous_format)
    return segments[None], rows, number.new_empty(0), _facts(kind, count, longest, 0)


def _plan_padding(valid: Tensor) -> Plan:
    size = valid.shape[-1]
    valid = valid.reshape(-1, size) != 0
    batch, device = len(valid), valid.device
    token = torch.arange(size, device=device)
    end = torch.where(valid, token + 1, 0).amax(1, keepdim=True)
    first = torch.where(valid, token, end).amin(1, keepdim=True)
    inside = (token >= first) & (token < end)
    rows = torch.where(token < first, Row.BEFORE, torch.where(valid, Row.VALID, Row.AFTER))
    offsets = size * torch.arange(batch, device=device).unsqueeze(1)
    last = offsets[-1] + size
    bounds = torch.cat(((offsets + torch.cat((0 * first, first, end), 1)).flatten(), last))
    # In the second call segments of keys alone come before, between and after those of the runs.
    runs = (offsets + torch.cat((first, end), 1)).flatten()
    of_keys = torch.cat((0 * last, runs, last.expand(batch)))
    ends = (size - end).flatten().cumsum(0)
    of_queries = torch.cat((F.pad(ends, (1, 0)).repeat_interleave(2), ends[-1:].expand(batch - 1)))
    segments = torch.stack((bounds, of_queries, of_keys)).to(torch.int32)
    # In order, those after a run first: as many as the host is told.
    after = torch.argsort((token < end).flatten(), stable=True)
    facts = (inside != valid).any(), (first > 0).any(), segments[0].diff().amax(), ends[-1]
    holes, before, longest, tokens = torch.stack([fact.long() for fact in facts]).tolist()
    kind = Kind.DENSE if holes else Kind.SEGMENTS if before else Kind.EVERY_TOKEN
    return segments, rows.to(torch.int8), after, _facts(kind, 3 * batch, longest, tokens)


def sequence_plan(members: Tensor) -> Plan:
    """The plan of sequences that may have tokens in common, as rows that begin with one prompt.

    members: bool [sequences, b * s], which tokens a sequence consists of, in their order. A token
    is a query in the first of its sequences, and has one at least; there it stands behind the
    tokens that are in an earlier one as well. Outside of a graph only, since the number of keys
    depends on values. Waits for the device.
    """
    tokens = members.shape[1]
    queries = torch.zeros_like(members[:, 0], dtype=torch.int64)
    first = members.byte().argmax(0)
    queries = queries.index_add_(0, first, torch.ones_like(first))
    members, queries = members[queries > 0], queries[queries > 0]  # of others nothing is asked
    keys = members.sum(1)
    segments = F.pad(torch.stack((queries, keys)).cumsum(1), (1, 0)).int()
    copies, longest = torch.stack((keys.sum(), keys.amax())).tolist()
    rows = torch.zeros_like(first[None], dtype=torch.int8)
    if copies == tokens:
        return segments[:1], rows, first[:0], _facts(Kind.SEGMENTS, len(members), longest, 0)
    token = members.nonzero()[:, 1]
    starts = F.pad(members.sum(0).cumsum(0), (1, copies - tokens - 1))
    after = torch.stack((token, torch.argsort(token, stable=True), starts))
    return segments, rows, after, _facts(Kind.SHARED, len(members), longest, 0)


# Layers share a mask, and reading it waits for the device. By memory, since autograd hands another
# tensor to a backward; as long as a weak reference exists, no other memory gets the same address.
_of_masks: dict[Any, tuple[StorageWeakRef, tuple[Plan | None, int | None]]] = {}


def _plan_of(mask: Tensor) -> tuple[Plan | None, int | None]:
    """The plan and the window that the values of a mask are; no plan if there is none. mask: bool
    [b, 1, s, s], true where a key is seen."""
    if mask.is_inference():  # it may be written to, and nobody counts
        return _read_mask(mask)
    memory = StorageWeakRef(mask.untyped_storage())
    key = memory.cdata, mask.storage_offset(), mask.shape, mask.stride(), mask._version
    if key not in _of_masks:
        for old in [old for old, (of, _) in _of_masks.items() if of.expired()]:
            del _of_masks[old]
        _of_masks[key] = memory, _read_mask(mask)
    return _of_masks[key][1]


def _read_mask(mask: Tensor) -> tuple[Plan | None, int | None]:
    """Two diagonals say which keys are padding and where documents start: a valid token sees
    itself, and the one before if that is of its document. All else follows, or the mask is another.
    """
    token = torch.arange(mask.shape[-1], device=mask.device)
    ahead = token - token.unsqueeze(1)
    valid = mask[:, 0].diagonal(0, 1, 2)
    starts = F.pad(~mask[:, 0].diagonal(-1, 1, 2), (1, 0))
    documents, padded = starts.cumsum(-1), ~valid.all()
    one_document = documents[:, None, :, None] == documents[:, None, None, :]
    seen = (ahead <= 0) & (one_document | padded) & valid[:, None, None, :]
    window = mask.sum(-1).amax()
    whole, windowed = (seen == mask).all(), ((seen & (ahead > -window)) == mask).all()
    facts = torch.stack([fact.long() for fact in (padded, whole, windowed, window)]).tolist()
    if not facts[1] and not facts[2]:
        return None, None
    plan = _plan_padding(valid) if facts[0] else _plan_documents(documents)
    return plan, None if facts[1] else facts[3]


def _fake_plan(tokens: Tensor, of_padding: bool) -> Plan:
    size, number = tokens.shape[-1], tokens.numel()
    batch = number // size
    return (
        tokens.new_empty((3, 3 * batch + 1) if of_padding else (1, number + 1), dtype=torch.int32),
        tokens.new_empty((batch, size), dtype=torch.int8),
        tokens.new_empty(number if of_padding else 0, dtype=torch.int64),
        torch.empty(4, dtype=torch.int64, device="cpu"),
    )


# -- plain PyTorch ---------------------------------------------------------------------------------


def _seen(query: Tensor, plan: Sequence[Tensor | None], window: int | None) -> Tensor:
    """The mask of a plan that tells of no documents: bool, [1 or b, 1, s, s]."""
    seen, rows = band(query.shape[2], window, query.device), plan[1]
    return seen if rows is None else seen & (rows == Row.VALID)[:, None, None, :]


def band(size: int, window: int | None, device: torch.device) -> Tensor:
    """bool [1, 1, size, size]: no later keys, and those of the window."""
    token = torch.arange(size, device=device)
    ahead = token - token.unsqueeze(1)
    return ((ahead <= 0) & (ahead > -_window(window, size)))[None, None]


def _parts(
    query: Tensor, plan: Sequence[Tensor | None], window: int | None
) -> Iterator[tuple[Any, Any, Tensor]]:
    """What sees one another, as indices of queries and of keys in [b, h, s, d], and the mask of the
    two: each sequence by itself, or else everything."""
    segments, _, after, facts = plan
    if segments is None or after is None or facts is None or len(segments) > 2:
        yield ..., ..., _seen(query, plan, window)
        return
    size, shared = query.shape[2], facts[0] == Kind.SHARED
    bounds = (itertools.pairwise(of[: facts[1] + 1].tolist()) for of in segments)
    for (start, end), *of_keys in zip(*bounds, strict=True):
        if start == end:
            continue
        row, first = divmod(start, size)
        queries = keys = slice(row, row + 1), slice(None), slice(first, first + end - start)
        seen = band(end - start, window, query.device)
        if shared:
            ((first, last),) = of_keys
            keys = *queries[:2], after[0, first:last] - row * size
            seen = band(last - first, window, query.device)[..., start - end :, :]
        yield queries, keys, seen


def _window(window: int | None, size: int) -> int:
    return size if window is None else min(window, size)


def _forward_torch(query: Tensor, key: Tensor, value: Tensor, *given: Any) -> Forward:
    *plan, window, scale = given
    out = _empty_heads(query)
    for at, keys, seen in _parts(query, plan, window):
        out[at] = _attend(query[at], key[keys], value[keys], seen, scale)
    return out, _empty_logsumexp(query, plan)


def _masked_forward_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Forward:
    out = _attend(query, key, value, mask, scale)
    return _sequence_first(out), _empty_logsumexp(query, [mask])


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    key, value = (_repeated(x, query) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, seen, scale=scale)


def _backward_torch(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *given: Any
) -> Gradients:
    *plan, window, scale = given
    grads = [_empty_heads(x).zero_() for x in (query, key, value)]
    for at, keys, seen in _parts(query, plan, window):
        found = _attend_backward(grad[at], query[at], key[keys], value[keys], seen, scale)
        for into, where, made in zip(grads, (at, keys, keys), found, strict=True):
            into[where] += made
    return tuple(grads)  # type: ignore[return-value]


def _masked_backward_torch(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor,
    scale: float,
) -> Gradients:
    found = _attend_backward(grad, query, key, value, mask, scale)
    return tuple(map(_sequence_first, found))  # type: ignore[return-value]


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float
) -> list[Tensor]:
    """Row by row of the batch, since it keeps the scores of one."""
    hidden = ~seen.expand(len(query), -1, -1, -1)
    wide = torch.promote_types(query.dtype, torch.float32)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    for i in range(len(query)):
        g, q = grad[i].to(wide), query[i].to(wide)
        k, v = (_repeated(x[i : i + 1], query)[0].to(wide) for x in (key, value))
        scores = (q @ k.mT * scale).masked_fill_(hidden[i], -math.inf)
        weights = scores.softmax(-1).masked_fill_(hidden[i], 0.0)  # also where no key is seen
        of_weights = g @ v.mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        found = of_scores @ k, of_scores.mT @ q, weights.mT @ g
        for into, made in zip(grads, found, strict=True):
            into[i] = made.unflatten(0, (into.shape[1], -1)).sum(1)
    return grads


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values, each head once for all its queries."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _sequence_first(x: Tensor) -> Tensor:
    """[b, h, s, d], in memory as [b, s, h, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_heads(x: Tensor) -> Tensor:
    batch, heads, size, elements = x.shape
    return x.new_empty((batch, size, heads, elements)).transpose(1, 2)


def _empty_logsumexp(query: Tensor, plan: Sequence[Tensor | None]) -> Tensor:
    """One number for each row of scores; with a plan another for the second call."""
    calls = 1 if plan[0] is None else 2
    return query.new_zeros((calls, *query.shape[:3]), dtype=torch.float32)


# -- CUDA ------------------------------------------------------------------------------------------


def _forward_cuda(_: Any, query: Tensor, key: Tensor, value: Tensor, *given: Any) -> Forward:
    return _forward_of(_Call.planned(query, *given), query, key, value)


def _masked_forward_cuda(_: Any, query: Tensor, key: Tensor, value: Tensor, *given: Any) -> Forward:
    return _forward_of(_Call.masked(query, *given), query, key, value)


def _backward_cuda(_: Any, grad: Tensor, query: Tensor, *given: Any) -> Gradients:
    *saved, segments, rows, after, facts, window, scale = given
    call = _Call.planned(query, segments, rows, after, facts, window, scale)
    return _backward_of(call, grad, query, *saved)


def _masked_backward_cuda(_: Any, grad: Tensor, query: Tensor, *given: Any) -> Gradients:
    *saved, mask, scale = given
    return _backward_of(_Call.masked(query, mask, scale), grad, query, *saved)


def _forward_of(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> Forward:
    given = call.plan if call.mask is None else [call.mask]
    if not query.numel():  # for which PyTorch's attention has no kernel on CUDA
        return _sequence_first(query), _empty_logsumexp(query, given)
    out, found = call.forward(query, key, value)
    if given[0] is None:
        return _sequence_first(out), found.contiguous().unsqueeze(0)
    lse = _empty_logsumexp(query, given)
    lse[0] = found
    if call.hides_rows:
        out = out * (call.rows != Row.BEFORE)
    out = _sequence_first(out)
    if call.after is not None:
        of_after, second = _after_forward(call, query, key, value)
        lse[1].view(-1)[: second.numel()] = second.flatten()
        _as_tokens(out).index_copy_(0, call.after, of_after)
    return out, lse


def _backward_of(
    call: _Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    if not query.numel():
        return tuple(_sequence_first(torch.zeros_like(x)) for x in (query, key, value))  # type: ignore[return-value]
    # Always in one layout: PyTorch keeps cuDNN's plan of a backward for shapes whatever the strides
    # of ``grad``, and what a plan for other strides gives is wrong (torch 2.11, H100).
    grad = _sequence_first(grad)
    padded = call.after is not None or call.hides_rows
    own = grad * (call.rows == Row.VALID) if padded else grad
    found = map(_sequence_first, call.backward(own, query, key, value, out, lse[0]))
    of_query, of_key, of_value = found
    if call.after is not None:
        second = lse[1].view(-1)[: query.shape[1] * len(call.after)]
        after = _after_backward(call, grad, query, key, value, out, second)
        _as_tokens(of_query).index_copy_(0, call.after, after[0])
        of_key += _as_heads(after[1], key)
        of_value += _as_heads(after[2], value)
    return of_query, of_key, of_value


class _Call:
    """A plan, as the host sees it.

    after: the tokens of the second call, None without one. copies: of keys and values, None where
    each is there once. rows: [b, 1, s, 1], to broadcast.
    hides_rows: there are queries that see no key, and the kernel does not know. mask: the one that
    was given.
    """

    mask: Tensor | None = None

    @staticmethod
    def planned(query: Tensor, *given: Any) -> _Call:
        *plan, window, scale = given
        return _Call(query, plan, window, scale)

    @staticmethod
    def masked(query: Tensor, mask: Tensor, scale: float) -> _Call:
        plan, window = _plan_of(mask)
        call = _Call(query, plan or [None] * 4, window, scale)
        call.mask = mask
        if plan is None:
            call.take(Kind.DENSE)
        return call

    def __init__(
        self, query: Tensor, plan: Sequence[Tensor | None], window: int | None, scale: float
    ) -> None:
        size = query.shape[2]
        self.plan, self.scale = plan, scale
        self.window = None if _window(window, size) == size else window
        self.kind, self.after, self.hides_rows = Kind.EVERY_TOKEN, None, False
        segments, rows, after, facts = plan
        if segments is not None and rows is not None and after is not None and facts is not None:
            kind, count, longest, tokens = facts.tolist()
            in_window = tokens and self.window is not None  # what they see depends on the query
            self.kind = Kind.DENSE if in_window else Kind(kind)
            self.segments, self.rows = segments[:, : count + 1], rows[:, None, :, None]
            # One token is another kernel, which does not take segments.
            self.longest = max(longest, 2)
            self.hides_rows = self.kind == Kind.SEGMENTS and len(segments) > 1
            self.after = after[:tokens] if tokens and self.kind != Kind.DENSE else None
            self.copies = after if self.kind == Kind.SHARED else None
        self.take(self.kind)

    def take(self, kind: Kind) -> None:
        self.kind = kind
        self.forward, self.backward = (functools.partial(f, self) for f in _KERNELS[kind])

    @property
    def window_sizes(self) -> dict[str, int]:
        if self.window is None:
            return {}
        return {"window_size_left": self.window - 1, "window_size_right": 0}


def _every_token_forward(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> Forward:
    if call.window is not None:
        size = query.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, None, None, size, size, 0.0, True, False, scale=call.scale, **call.window_sizes
        )
        return out.transpose(1, 2), lse
    if _is_cudnn(query, key, value, call.scale):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False, scale=call.scale
        )
        return out, lse.view(query.shape[:3])
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, False, scale=call.scale
    )
    return out, lse


def _every_token_backward(
    call: _Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    size, seed = query.shape[2], _no_seed(query)
    if call.window is None and _is_cudnn(query, key, value, call.scale):
        return aten._scaled_dot_product_cudnn_attention_backward(
            *(grad, query, key, value, out, lse.unsqueeze(-1), seed, seed),
            *(None, None, None, size, size, 0.0, True),
            scale=call.scale,
        )
    grad, query, key, value, out = (x.transpose(1, 2) for x in (grad, query, key, value, out))
    found = aten._flash_attention_backward(
        *(grad, query, key, value, out, lse, None, None, size, size, 0.0, True, seed, seed),
        scale=call.scale,
        **call.window_sizes,
    )
    return tuple(x.transpose(1, 2) for x in found)  # type: ignore[return-value]


def _is_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """What PyTorch takes for training with these tensors."""
    grouped = query.shape[1] != key.shape[1]
    q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=scale, enable_gqa=grouped)
    return choice == SDPBackend.CUDNN_ATTENTION.value


def _segments_forward(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> Forward:
    q, k, v = map(_as_tokens, (query, key, value))
    if call.copies is not None:
        k, v = k[call.copies[0]], v[call.copies[0]]
    of_queries, longest = call.segments[0], call.longest
    of_keys = of_queries if call.copies is None else call.segments[1]
    out, lse, *_ = aten._flash_attention_forward(
        *(q, k, v, of_queries, of_keys, longest, longest, 0.0, True, False),
        scale=call.scale,
        **call.window_sizes,
    )
    batch, heads, size, _ = query.shape
    return _as_heads(out, query), lse.view(heads, batch, size).transpose(0, 1)


def _segments_backward(
    call: _Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    g, q, k, v, o = map(_as_tokens, (grad, query, key, value, out))
    if call.copies is not None:
        k, v = k[call.copies[0]], v[call.copies[0]]
    of_queries, longest = call.segments[0], call.longest
    of_keys = of_queries if call.copies is None else call.segments[1]
    # Rows of one token are a view that the kernel would misread.
    of_rows = lse.transpose(0, 1).reshape(query.shape[1], -1).contiguous()
    seed = _no_seed(query)
    of_query, *others = aten._flash_attention_backward(
        *(g, q, k, v, o, of_rows, of_queries, of_keys, longest, longest, 0.0, True, seed, seed),
        scale=call.scale,
        **call.window_sizes,
    )
    if call.copies is not None:
        others = [_summed(x, call.copies, len(q)) for x in others]
    return tuple(_as_heads(x, query) for x in (of_query, *others))  # type: ignore[return-value]


def _summed(of_copies: Tensor, copies: Tensor, tokens: int) -> Tensor:
    """The gradients of copies, [copies, h, d], summed for each token, [tokens, h, d]: in fp32 and
    always in the same order, as PyTorch sums the rows of a bag of embeddings."""
    _, order, starts = copies
    bags = order, starts[: tokens + 1], False, 0, False, None, True
    total, *_ = aten._embedding_bag_forward_only(of_copies.flatten(1), *bags)
    return total.view(tokens, *of_copies.shape[1:])


def _after_forward(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> Forward:
    """The queries of the padding after a run, over all of the run: [tokens, h, d], [h, tokens]."""
    q, k, v = map(_as_tokens, (query, key, value))
    _, of_queries, of_keys = call.segments
    lengths = of_queries, of_keys, call.longest, 2 * call.longest
    out, lse, *_ = aten._flash_attention_forward(
        q[call.after], k, v, *lengths, 0.0, False, False, scale=call.scale
    )
    return out, lse


def _after_backward(
    call: _Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    """Without a gradient no segment has queries: the kernel is done at once."""
    g, q, o = (_as_tokens(x)[call.after] for x in (grad, query, out))
    k, v = _as_tokens(key), _as_tokens(value)
    _, of_queries, of_keys = call.segments
    used, seed = (g != 0).any(), _no_seed(query)
    # The keys between two runs are padding after the one and before the other.
    lengths = of_queries * used, of_keys, call.longest, 2 * call.longest
    of_query, of_key, of_value = aten._flash_attention_backward(
        *(g, q, k, v, o, lse.view(query.shape[1], -1), *lengths, 0.0, False, seed, seed),
        scale=call.scale,
    )
    return torch.where(used, of_query, 0.0), of_key, of_value


def _no_seed(query: Tensor) -> Tensor:
    """The state of a random generator, for kernels that drop nothing."""
    return torch.empty(2, dtype=torch.uint64, device=query.device)


def _as_tokens(x: Tensor) -> Tensor:
    """[b, h, s, d] -> [b * s, h, d]"""
    return x.transpose(1, 2).flatten(0, 1)


def _as_heads(x: Tensor, query: Tensor) -> Tensor:
    return x.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def _dense_forward(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> Forward:
    key, value = (_repeated(x, query) for x in (key, value))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, _bias(call, query), True, 0.0, False, scale=call.scale
    )
    return out, lse[..., : query.shape[2]]


def _dense_backward(
    call: _Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    k, v = (_repeated(x, query) for x in (key, value))
    lse = F.pad(lse, (0, -query.shape[2] % 32), value=math.inf)  # as the kernel gave it
    seed = torch.zeros((), dtype=torch.int64, device=query.device)
    of_query, *others, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(grad, query, k, v, _bias(call, query), out, lse, seed, seed),
        *(0.0, [True, True, True, False], False),
        scale=call.scale,
    )
    of_key, of_value = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in others)
    return of_query, of_key, of_value


def _bias(call: _Call, query: Tensor) -> Tensor:
    """[b, h, s, s], zero or minus infinity; the rows as far apart as the kernel wants them."""
    seen = _seen(query, call.plan, call.window) if call.mask is None else call.mask
    size = query.shape[2]
    padded = query.new_full((*seen.shape[:3], -(-size // 16) * 16), -math.inf)
    padded[..., :size].masked_fill_(seen, 0.0)
    return padded[..., :size].expand(*query.shape[:3], -1)


_KERNELS: dict[Kind, tuple[Callable[..., Any], Callable[..., Any]]] = {
    Kind.EVERY_TOKEN: (_every_token_forward, _every_token_backward),
    Kind.SEGMENTS: (_segments_forward, _segments_backward),
    Kind.DENSE: (_dense_forward, _dense_backward),
    Kind.SHARED: (_segments_forward, _segments_backward),
}

# -- the ops ---------------------------------------------------------------------------------------

document_plan = kernel(
    "document_plan(Tensor documents) -> (Tensor segments, Tensor rows, Tensor after, Tensor facts)",
    fake=lambda documents: _fake_plan(documents, of_padding=False),
    plain=_plan_documents,
    cuda=lambda _, documents: _plan_documents(documents),
)
padding_plan = kernel(
    "padding_plan(Tensor valid) -> (Tensor segments, Tensor rows, Tensor after, Tensor facts)",
    fake=lambda valid: _fake_plan(valid, of_padding=True),
    plain=_plan_padding,
    cuda=lambda _, valid: _plan_padding(valid),
)

_PLAN = "Tensor? segments, Tensor? rows, Tensor? after, Tensor? facts, SymInt? window, float scale"


_forward = kernel(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_PLAN}) -> (Tensor, Tensor)",
    fake=lambda query, key, value, *plan: (_empty_heads(query), _empty_logsumexp(query, plan)),
    plain=_forward_torch,
    cuda=_forward_cuda,
)
_backward = kernel(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor logsumexp, {_PLAN}) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, query, key, value, *rest: tuple(map(_empty_heads, (query, key, value))),
    plain=_backward_torch,
    cuda=_backward_cuda,
)


_masked_forward = kernel(
    "masked_attention_forward(Tensor query, Tensor key, Tensor value, Tensor mask, float scale)"
    " -> (Tensor, Tensor)",
    fake=lambda query, key, value, mask, scale: (
        _empty_heads(query),
        _empty_logsumexp(query, [mask]),
    ),
    plain=_masked_forward_torch,
    cuda=_masked_forward_cuda,
    waits=True,
)
_masked_backward = kernel(
    "masked_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor mask, float scale) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, query, key, value, *rest: tuple(map(_empty_heads, (query, key, value))),
    plain=_masked_backward_torch,
    cuda=_masked_backward_cuda,
    waits=True,
)


@register_flop_formula(
    [torch.ops.liger_fx.attention_forward, torch.ops.liger_fx.masked_attention_forward]
)
def _forward_flops(
    query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    repeated = [(*query[:2], *x[2:]) for x in (key, value)]
    return sdpa_flop_count(query, *repeated)


@register_flop_formula(
    [torch.ops.liger_fx.attention_backward, torch.ops.liger_fx.masked_attention_backward]
)
def _backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    repeated = [(*query[:2], *x[2:]) for x in (key, value)]
    return sdpa_backward_flop_count(grad, query, *repeated)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, *given):
        *plan, window, scale = given
        out, lse = _forward(query, key, value, *given)
        ctx.save_for_backward(query, key, value, out, lse, *plan)
        ctx.how = window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_backward(grad, *ctx.saved_tensors, *ctx.how), *[None] * 6


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None,
    rows: Tensor | None,
    after: Tensor | None,
    facts: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """Causal attention (Vaswani et al. 2017; flash: Dao 2023) under a plan.

    query: [b, h, s, d], bfloat16 or float16, d a multiple of 8 and at most 256; elsewhere than on
    CUDA any floating dtype. key, value: [b, h / r, s, d], each head for r queries in a row.
    segments, rows, after, facts: of `document_plan`, `padding_plan` or `sequence_plan`; None where
    every token is valid and of one document. window: a query sees so many keys, its own included;
    None for all.
    scale: of the scores. Returns [b, h, s, d], in memory as [b, s, h, d]; zeros for a query that
    sees no key.
    """
    return _Attention.apply(query, key, value, segments, rows, after, facts, window, scale)


attention = differentiable(
    f"attention(Tensor query, Tensor key, Tensor value, {_PLAN}) -> Tensor", _attention
)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, mask, scale):
        out, lse = _masked_forward(query, key, value, mask, scale)
        ctx.save_for_backward(query, key, value, out, lse, mask)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_masked_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


def _attention_under_mask(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention under a mask whose values say which kernel of `attention` computes it.

    query, key, value, scale: as for `attention`. mask: bool [b, 1, s, s], true where a query sees a
    key, read once for all layers that share the tensor: reading waits for the device. Where its
    values are none of a plan, attention runs under the mask itself. Returns as `attention` does.
    """
    return _MaskedAttention.apply(query, key, value, mask, scale)


masked_attention = differentiable(
    "masked_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor",
    _attention_under_mask,
)
