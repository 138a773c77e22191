"""``liger_fx::attention``: causal attention in a window, over documents or beside padding.

The mask is not a tensor of [s, s] but what it says. A *plan*, made once for all layers by
`document_plan` or `padding_plan`, tells which of PyTorch's kernels computes it:

==============  ===================================================================================
every token     no token is hidden: cuDNN or flash attention, as PyTorch chooses; in a window flash
documents       flash attention over sequences of several lengths ("varlen"), one for each document
padding         the same, a run of valid tokens and the padding before and after it being sequences
                of their own; the rows of padding after a run see all of the run, in a second call
dense           the mask itself, as PyTorch would run it: padding between valid tokens, or in a
                window
==============  ===================================================================================

All rows of the output are those of ``scaled_dot_product_attention`` under the mask, the rows of
padding included; a query that sees no key gets zeros, as PyTorch's kernels give. Making a plan waits
for the device once, since the host has to know which kernel to launch.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import (
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from liger_fx.ops.library import differentiable, kernel, once_differentiable

aten = torch.ops.aten


class Kind(enum.IntEnum):
    """What the host knows of a plan."""

    EVERY_TOKEN = 0
    DOCUMENTS = 1
    PADDING = 2
    DENSE = 3


class Row(enum.IntEnum):
    """Which keys a query sees: those of its own segment up to itself, all of the segment before, or
    none. Only keys of the first kind are seen by queries of other kinds."""

    VALID = 0
    AFTER = 1
    BEFORE = 2


# -- plans -----------------------------------------------------------------------------------------


def _plan(kind: Kind, segments: int, longest: int, after: bool = False) -> Tensor:
    """What the host knows, on the host. longest: tokens. after: are there rows `Row.AFTER`?"""
    return torch.tensor([kind, segments, longest, after])


def _plan_documents(documents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    kind = Kind.EVERY_TOKEN if count == documents.shape[0] else Kind.DOCUMENTS
    rows = torch.zeros_like(documents, dtype=torch.int8, memory_format=torch.contiguous_format)
    return segments, rows, _plan(kind, count, longest)


def _plan_padding(valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = valid.shape[-1]
    valid = valid.reshape(-1, size) != 0
    token = torch.arange(size, device=valid.device)
    first = torch.where(valid, token, size).amin(1, keepdim=True)
    end = torch.where(valid, token + 1, 0).amax(1, keepdim=True)
    end = torch.where(first == size, size, end)  # where nothing is valid, all is before
    inside = (token >= first) & (token < end)
    rows = torch.where(token < first, Row.BEFORE, torch.where(valid, Row.VALID, Row.AFTER))
    offsets = size * torch.arange(len(valid), device=valid.device).unsqueeze(1)
    bounds = offsets + torch.cat((torch.zeros_like(first), first, end), 1)
    segments = torch.cat((bounds.flatten(), offsets[-1] + size)).to(torch.int32)
    facts = (inside != valid).any(), (~valid).any(), (token >= end).any(), segments.diff().amax()
    holes, hidden, after, longest = torch.stack([fact.long() for fact in facts]).tolist()
    kind = Kind.DENSE if holes else Kind.PADDING if hidden else Kind.EVERY_TOKEN
    return segments, rows.to(torch.int8), _plan(kind, 3 * len(valid), longest, bool(after))


def _fake_plan(tokens: Tensor, segments: Any) -> tuple[Tensor, Tensor, Tensor]:
    size = tokens.shape[-1]
    return (
        tokens.new_empty((segments,), dtype=torch.int32),
        tokens.new_empty((tokens.numel() // size, size), dtype=torch.int8),
        torch.empty(4, dtype=torch.int64, device="cpu"),
    )


# -- plain PyTorch ---------------------------------------------------------------------------------


def _seen(
    query: Tensor, segments: Tensor | None, rows: Tensor | None, plan: Tensor | None, window: Any
) -> Tensor:
    """The mask itself: bool, [1 or b, 1, s, s]."""
    size = query.shape[2]
    token = torch.arange(size, device=query.device)
    ahead = token - token.unsqueeze(1)
    seen = ((ahead <= 0) & (ahead > -_window(window, size)))[None, None]
    if segments is None or rows is None or plan is None:
        return seen
    kind, count, *_ = plan.tolist()
    if kind == Kind.DOCUMENTS:
        every = torch.arange(rows.numel(), device=rows.device, dtype=torch.int32)
        document = torch.bucketize(every, segments[: count + 1], right=True).view_as(rows)
        return seen & (document[:, None, :, None] == document[:, None, None, :])
    return seen & (rows == Row.VALID)[:, None, None, :]


def _window(window: int | None, size: int) -> int:
    return size if window is None else min(window, size)


def _forward_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None,
    rows: Tensor | None,
    plan: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    seen = _seen(query, segments, rows, plan, window)
    key, value = (_repeated(x, query) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
    return _sequence_first(out), _no_logsumexp(query, plan)


def _backward_torch(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    segments: Tensor | None,
    rows: Tensor | None,
    plan: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row of the batch, since it keeps the scores of one."""
    hidden = ~_seen(query, segments, rows, plan, window).expand(len(query), -1, -1, -1)
    wide = torch.promote_types(query.dtype, torch.float32)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    for i in range(len(query)):
        g, q = grad[i].to(wide), query[i].to(wide)
        k, v = (_repeated(x[i : i + 1], query)[0].to(wide) for x in (key, value))
        scores = (q @ k.mT * scale).masked_fill_(hidden[i], float("-inf"))
        weights = scores.softmax(-1).masked_fill_(hidden[i], 0.0)  # also where no key is seen
        of_weights = g @ v.mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        found = of_scores @ k, of_scores.mT @ q, weights.mT @ g
        for into, given in zip(grads, found, strict=True):
            into[i] = given.unflatten(0, (into.shape[1], -1)).sum(1)
    return tuple(map(_sequence_first, grads))  # type: ignore[return-value]


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values, each head once for all its queries."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _sequence_first(x: Tensor) -> Tensor:
    """[b, h, s, d], in memory as [b, s, h, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _no_logsumexp(query: Tensor, plan: Tensor | None) -> Tensor:
    """One number for a row of scores, two with a plan: of the row's own segment, and of that
    before."""
    return query.new_zeros((1 if plan is None else 2, *query.shape[:3]), dtype=torch.float32)


# -- CUDA ------------------------------------------------------------------------------------------


def _forward_cuda(
    _: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None,
    rows: Tensor | None,
    plan: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    logsumexp = _no_logsumexp(query, plan)
    call = _Call(query, segments, rows, plan, window, scale)
    if call.kind == Kind.DENSE:
        out = _dense_forward(call, query, key, value)[0]
    elif call.kind == Kind.EVERY_TOKEN:
        out, logsumexp[0] = _every_token_forward(call, query, key, value)
    else:
        out, logsumexp[0] = _segments_forward(call, query, key, value)
        if call.kind == Kind.PADDING:
            out = out * (call.rows == Row.VALID)
        if call.after:
            of_before, logsumexp[1] = _segments_forward(call, query, key, value, before=True)
            out = torch.where(call.rows == Row.AFTER, of_before, out)
    return _sequence_first(out), logsumexp


def _backward_cuda(
    _: Any,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    segments: Tensor | None,
    rows: Tensor | None,
    plan: Tensor | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(query, segments, rows, plan, window, scale)
    given = query, key, value, out
    if call.kind == Kind.DENSE:
        found = _dense_backward(call, grad, query, key, value)
    elif call.kind == Kind.EVERY_TOKEN:
        found = _every_token_backward(call, grad, *given, logsumexp[0])
    elif call.kind == Kind.DOCUMENTS:
        found = _segments_backward(call, grad, *given, logsumexp[0])
    else:
        own = grad * (call.rows == Row.VALID)
        found = _segments_backward(call, own, *given, logsumexp[0])
        if call.after:
            rest = grad * (call.rows == Row.AFTER)
            of_before = _segments_backward(call, rest, *given, logsumexp[1], before=True)
            found = tuple(a + b for a, b in zip(found, of_before, strict=True))
    return tuple(map(_sequence_first, found))  # type: ignore[return-value]


class _Call:
    """The plan of one call, read on the host. rows: [b, 1, s, 1], to broadcast."""

    def __init__(
        self,
        query: Tensor,
        segments: Tensor | None,
        rows: Tensor | None,
        plan: Tensor | None,
        window: int | None,
        scale: float,
    ) -> None:
        size = query.shape[2]
        self.given = segments, rows, plan, window
        self.scale = scale
        self.window = None if _window(window, size) == size else window
        self.kind, self.after, self.longest = Kind.EVERY_TOKEN, False, size
        if segments is None or rows is None or plan is None:
            return
        kind, count, self.longest, after = plan.tolist()
        self.kind, self.after, self.rows = Kind(kind), bool(after), rows[:, None, :, None]
        self.segments = segments[: count + 1]
        if self.kind == Kind.PADDING and self.after and self.window is not None:
            self.kind = Kind.DENSE  # how much of a run a row of padding sees depends on the row

    @property
    def window_sizes(self) -> dict[str, int | None]:
        if self.window is None:
            return {}
        return {"window_size_left": self.window - 1, "window_size_right": 0}

    def keys_of(self, before: bool) -> Tensor:
        """Where the keys of each segment start: its own, or those of the segment before."""
        return F.pad(self.segments[:-1], (1, 0)) if before else self.segments


def _every_token_forward(
    call: _Call, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    if call.window is not None:
        size = query.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, logsumexp, *_ = aten._flash_attention_forward(
            q, k, v, None, None, size, size, 0.0, True, False, scale=call.scale, **call.window_sizes
        )
        return out.transpose(1, 2), logsumexp
    if _is_cudnn(query, key, value, call.scale):
        out, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False, scale=call.scale
        )
        return out, logsumexp.view(query.shape[:3])
    out, logsumexp, *_ = aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True, False, scale=call.scale
    )
    return out, logsumexp


def _every_token_backward(
    call: _Call,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    size, seed = query.shape[2], _no_seed(query)
    if call.window is None and _is_cudnn(query, key, value, call.scale):
        return aten._scaled_dot_product_cudnn_attention_backward(
            *(grad, query, key, value, out, logsumexp.unsqueeze(-1), seed, seed),
            *(None, None, None, size, size, 0.0, True),
            scale=call.scale,
        )
    grad, query, key, value, out = (x.transpose(1, 2) for x in (grad, query, key, value, out))
    found = aten._flash_attention_backward(
        *(grad, query, key, value, out, logsumexp, None, None, size, size, 0.0, True, seed, seed),
        scale=call.scale,
        **call.window_sizes,
    )
    return tuple(x.transpose(1, 2) for x in found)  # type: ignore[return-value]


def _is_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """What PyTorch takes for training with these tensors."""
    trained = (x.detach().requires_grad_() for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    choice = torch._fused_sdp_choice(*trained, None, 0.0, True, scale=scale, enable_gqa=grouped)
    return choice == SDPBackend.CUDNN_ATTENTION.value


def _segments_forward(
    call: _Call, query: Tensor, key: Tensor, value: Tensor, before: bool = False
) -> tuple[Tensor, Tensor]:
    q, k, v = map(_as_tokens, (query, key, value))
    lengths = call.segments, call.keys_of(before), call.longest, call.longest
    windows = {} if before else call.window_sizes
    out, logsumexp, *_ = aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, not before, False, scale=call.scale, **windows
    )
    batch, heads, size, _ = query.shape
    return _as_heads(out, query), logsumexp.view(heads, batch, size).transpose(0, 1)


def _segments_backward(
    call: _Call,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    before: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    g, q, k, v, o = map(_as_tokens, (grad, query, key, value, out))
    lengths = call.segments, call.keys_of(before), call.longest, call.longest
    windows = {} if before else call.window_sizes
    seed = _no_seed(query)
    of_rows = logsumexp.transpose(0, 1).reshape(query.shape[1], -1)
    found = aten._flash_attention_backward(
        *(g, q, k, v, o, of_rows, *lengths, 0.0, not before, seed, seed),
        scale=call.scale,
        **windows,
    )
    return tuple(_as_heads(x, query) for x in found)  # type: ignore[return-value]


def _no_seed(query: Tensor) -> Tensor:
    """The state of a random generator, for kernels that drop nothing."""
    return torch.empty(2, dtype=torch.uint64, device=query.device)


def _as_tokens(x: Tensor) -> Tensor:
    """[b, h, s, d] -> [b * s, h, d]"""
    return x.transpose(1, 2).flatten(0, 1)


def _as_heads(x: Tensor, query: Tensor) -> Tensor:
    return x.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2)


def _dense_forward(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> Any:
    key, value = (_repeated(x, query) for x in (key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, _bias(call, query), True, 0.0, False, scale=call.scale
    )


def _dense_backward(
    call: _Call, grad: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Its forward is run again: the other kernels keep a logsumexp of another layout."""
    out, logsumexp, *seeds = _dense_forward(call, query, key, value)
    k, v = (_repeated(x, query) for x in (key, value))
    of_query, *others, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(grad, query, k, v, _bias(call, query), out, logsumexp, *seeds),
        *(0.0, [True, True, True, False], False),
        scale=call.scale,
    )
    of_key, of_value = (x.unflatten(1, (key.shape[1], -1)).sum(2) for x in others)
    return of_query, of_key, of_value


def _bias(call: _Call, query: Tensor) -> Tensor:
    """[b, h, s, s], zero or minus infinity; the rows as far apart as the kernel wants them."""
    seen = _seen(query, *call.given)
    size = query.shape[2]
    padded = query.new_full((*seen.shape[:3], -(-size // 16) * 16), float("-inf"))
    padded[..., :size].masked_fill_(seen, 0.0)
    return padded[..., :size].expand(*query.shape[:3], -1)


# -- the ops ---------------------------------------------------------------------------------------

document_plan = kernel(
    "document_plan(Tensor documents) -> (Tensor segments, Tensor rows, Tensor plan)",
    fake=lambda documents: _fake_plan(documents, documents.numel() + 1),
    plain=_plan_documents,
    cuda=lambda _, documents: _plan_documents(documents),
)
padding_plan = kernel(
    "padding_plan(Tensor valid) -> (Tensor segments, Tensor rows, Tensor plan)",
    fake=lambda valid: _fake_plan(valid, 3 * (valid.numel() // valid.shape[-1]) + 1),
    plain=_plan_padding,
    cuda=lambda _, valid: _plan_padding(valid),
)

_PLAN = "Tensor? segments, Tensor? rows, Tensor? plan, SymInt? window, float scale"


def _fake_heads(x: Tensor) -> Tensor:
    batch, heads, size, elements = x.shape
    return x.new_empty((batch, size, heads, elements)).transpose(1, 2)


_forward = kernel(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_PLAN}) -> (Tensor, Tensor)",
    fake=lambda query, key, value, segments, rows, plan, window, scale: (
        _fake_heads(query),
        _no_logsumexp(query, plan),
    ),
    plain=_forward_torch,
    cuda=_forward_cuda,
)
_backward = kernel(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor logsumexp, {_PLAN}) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, query, key, value, *rest: tuple(map(_fake_heads, (query, key, value))),
    plain=_backward_torch,
    cuda=_backward_cuda,
)


@register_flop_formula(torch.ops.liger_fx.attention_forward)
def _forward_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    repeated = [(*query[:2], *x[2:]) for x in (key, value)]
    return sdpa_flop_count(query, *repeated)


@register_flop_formula(torch.ops.liger_fx.attention_backward)
def _backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    repeated = [(*query[:2], *x[2:]) for x in (key, value)]
    return sdpa_backward_flop_count(grad, query, *repeated)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, segments, rows, plan, window, scale):
        out, logsumexp = _forward(query, key, value, segments, rows, plan, window, scale)
        ctx.save_for_backward(query, key, value, out, logsumexp, segments, rows, plan)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = _backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale)
        return *found, None, None, None, None, None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor | None,
    rows: Tensor | None,
    plan: Tensor | None,
    window: int | None,
    scale: float,
) -> Tensor:
    """Causal attention (Vaswani et al. 2017; flash: Dao 2023) under a plan.

    query: [b, h, s, d], bfloat16 or float16, d a multiple of 8 and at most 256; elsewhere than on
    CUDA any floating dtype. key, value: [b, h / r, s, d], each head for r queries in a row.
    segments, rows, plan: of `document_plan` or `padding_plan`; None where every token is valid and
    of one document. window: a query sees so many keys, its own included; None for all. scale: of
    the scores. Returns [b, h, s, d], in memory as [b, s, h, d]; zeros for a query that sees no key.
    """
    return _Attention.apply(query, key, value, segments, rows, plan, window, scale)


attention = differentiable(
    f"attention(Tensor query, Tensor key, Tensor value, {_PLAN}) -> Tensor", _attention
)
