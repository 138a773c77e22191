"""The CUDA side of ``liger_fx::attention`` on a CPU, over definitions of PyTorch's kernels.

What is checked is our own part: which kernel is called with which segments, and what is made of its
results. The definitions leave NaN where the kernels leave memory as it was.
"""

from __future__ import annotations

import importlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from test_op_attention import OTHERS, PLANS, SHARED, B, D, S, check, operands, under_mask

launcher = importlib.import_module("liger_fx.ops.attention")  # the package has the op by that name


def scores(query, key, scale, causal, left):
    """[h, q, k] of one segment, [q, h, d] and [k, h, d]; aligned at the last query and key."""
    (rows, heads, _), columns = query.shape, key.shape[0]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    found = torch.einsum("qhd,khd->hqk", query, key).float() * scale
    ahead = torch.arange(columns) - (torch.arange(rows)[:, None] + columns - rows)
    hidden = (ahead > 0) & causal
    if left is not None:
        hidden = hidden | (ahead < -left)
    return found.masked_fill(hidden, -math.inf)


def segments(query, of_queries, of_keys, longest):
    if of_queries is None:
        batch, size = query.shape[:2]
        of_queries = of_keys = torch.arange(batch + 1) * size
    for bounds, most in zip((of_queries, of_keys), longest, strict=True):
        assert bounds.diff().max() <= most and bounds[0] == 0
    bounds = zip(of_queries.tolist(), of_keys.tolist(), strict=True)
    for (q, k), (q_end, k_end) in itertools.pairwise(bounds):
        yield slice(q, q_end), slice(k, k_end)


def flat(x):
    return x.reshape(-1, *x.shape[-2:])


def flash_forward(
    query, key, value, of_queries, of_keys, most_q, most_k, dropout, causal, debug, *, scale,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    q, k, v = map(flat, (query, key, value))
    out = torch.full_like(q, math.nan)
    lse = torch.full((q.shape[1], q.shape[0]), math.nan)
    for rows, columns in segments(query, of_queries, of_keys, (most_q, most_k)):
        s = scores(q[rows], k[columns], scale, causal, window_size_left)
        values = v[columns].repeat_interleave(q.shape[1] // v.shape[1], 1).float()
        out[rows] = torch.einsum("hqk,khd->qhd", s.softmax(-1).nan_to_num(0.0), values).to(q.dtype)
        lse[:, rows] = s.logsumexp(-1) if s.shape[-1] else math.inf
    if of_queries is None:
        lse = lse.unflatten(1, query.shape[:2]).transpose(0, 1)
    return out.view(query.shape), lse


def flash_backward(
    grad, query, key, value, out, lse, of_queries, of_keys, most_q, most_k, dropout, causal, seed,
    offset, *, scale, window_size_left=None, window_size_right=None,
):  # fmt: skip
    g, q, k, v, o = map(flat, (grad, query, key, value, out))
    assert of_queries is None or lse.is_contiguous()  # else the kernel reads other numbers
    lse = lse.transpose(0, 1).flatten(1) if lse.dim() == 3 else lse
    found = [torch.full(x.shape, math.nan) for x in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    for rows, columns in segments(query, of_queries, of_keys, (most_q, most_k)):
        s = scores(q[rows], k[columns], scale, causal, window_size_left)
        weights = (s - lse[:, rows, None]).exp()
        values, keys = (x[columns].repeat_interleave(groups, 1).float() for x in (v, k))
        of_weights = torch.einsum("qhd,khd->hqk", g[rows].float(), values)
        delta = (g[rows].float() * o[rows].float()).sum(-1).T[..., None]
        of_scores = weights * (of_weights - delta) * scale
        found[0][rows] = torch.einsum("hqk,khd->qhd", of_scores, keys)
        of_keys_ = torch.einsum("hqk,qhd->khd", of_scores, q[rows].float())
        of_values = torch.einsum("hqk,qhd->khd", weights, g[rows].float())
        for into, given in zip(found[1:], (of_keys_, of_values), strict=True):
            into[columns] = given.unflatten(1, (-1, groups)).sum(2)
    return [f.to(x.dtype).view(x.shape) for f, x in zip(found, (query, key, value), strict=True)]


def cudnn_forward(query, key, value, bias, with_lse, dropout, causal, debug, *, scale):
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    size = q.shape[1]
    out, lse = flash_forward(q, k, v, None, None, size, size, dropout, causal, debug, scale=scale)
    return out.transpose(1, 2), lse.unsqueeze(-1)


def cudnn_backward(
    grad, query, key, value, out, lse, seed, offset, bias, of_queries, of_keys, most_q, most_k,
    dropout, causal, *, scale,
):  # fmt: skip
    assert all(x.transpose(1, 2).is_contiguous() for x in (grad, out))  # else wrong in torch 2.11
    given = (x.transpose(1, 2) for x in (grad, query, key, value, out))
    found = flash_backward(
        *given, lse.squeeze(-1), None, None, most_q, most_k, dropout, causal, seed, offset,
        scale=scale,
    )  # fmt: skip
    return [x.transpose(1, 2) for x in found]


def flash_of_heads(query, key, value, dropout, causal, debug, *, scale):
    out, lse = cudnn_forward(query, key, value, None, True, dropout, causal, debug, scale=scale)
    return out, lse.squeeze(-1)


def efficient_forward(query, key, value, bias, with_lse, dropout, causal, *, scale):
    s = query.float() @ key.float().mT * scale + bias.float()
    out = (s.softmax(-1).nan_to_num(0.0) @ value.float()).to(query.dtype)
    padded = torch.nn.functional.pad(s.logsumexp(-1), (0, -s.shape[-2] % 32), value=math.inf)
    return out, padded, None, None


def efficient_backward(
    grad, query, key, value, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale
):
    assert lse.shape[-1] % 32 == 0
    s = query.float() @ key.float().mT * scale + bias.float()
    weights = (s - lse[..., : s.shape[-2], None]).exp().nan_to_num(0.0)
    of_weights = grad.float() @ value.float().mT
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    of_scores = weights * (of_weights - delta) * scale
    found = of_scores @ key.float(), of_scores.mT @ query.float(), weights.mT @ grad.float()
    return *(f.to(query.dtype) for f in found), None


KERNELS = SimpleNamespace(
    _flash_attention_forward=flash_forward,
    _flash_attention_backward=flash_backward,
    _scaled_dot_product_cudnn_attention=cudnn_forward,
    _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
    _scaled_dot_product_flash_attention=flash_of_heads,
    _scaled_dot_product_efficient_attention=efficient_forward,
    _scaled_dot_product_efficient_attention_backward=efficient_backward,
    _embedding_bag_forward_only=torch.ops.aten._embedding_bag_forward_only,
)


@pytest.fixture(params=[True, False], ids=["cudnn", "flash"])
def on_cuda(request, monkeypatch):
    monkeypatch.setattr(launcher, "aten", KERNELS)
    monkeypatch.setattr(launcher, "_is_cudnn", lambda *_: request.param)
    for name in ("forward", "backward", "masked_forward", "masked_backward"):
        launch = getattr(launcher, f"_{name}_cuda")
        monkeypatch.setattr(launcher, f"_{name}", lambda *args, launch=launch: launch(None, *args))


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_op_attention.py runs the kernels")
@pytest.mark.parametrize("shape", [{}, {"size": 1}, {"size": 37, "keys": 1}, {"batch": 1}], ids=str)
@pytest.mark.parametrize("plan", [*PLANS, *SHARED], ids=str)
def test_equals_the_dense_mask(plan, shape, on_cuda):
    check(plan, operands(torch.float32, **shape), slack=2e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_op_attention.py runs the kernels")
@pytest.mark.parametrize("shape", [{}, {"size": 1}, {"size": 37, "keys": 1}], ids=str)
@pytest.mark.parametrize("plan", [*PLANS, *SHARED, *OTHERS], ids=str)
def test_equals_the_mask_that_is_given(plan, shape, on_cuda):
    check(plan, operands(torch.float32, **shape), slack=2e-6, function=under_mask)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_op_attention.py runs the kernels")
@pytest.mark.parametrize("plan", [*PLANS, *SHARED], ids=str)
def test_what_the_fake_says(plan, on_cuda):
    """Strides and dtypes are those that the compiler counts on."""
    given = (*operands(torch.float32, grad=False), *plan.of(B, S), plan.window, D**-0.5)
    wanted = torch.ops.liger_fx.attention_forward.default(*given)
    for made, plain in zip(launcher._forward(*given), wanted, strict=True):
        assert made.stride() == plain.stride() and made.dtype == plain.dtype
    given = (*given[:3], plan.mask(B, S), D**-0.5)
    wanted = torch.ops.liger_fx.masked_attention_forward.default(*given)
    for made, plain in zip(launcher._masked_forward(*given), wanted, strict=True):
        assert made.stride() == plain.stride() and made.dtype == plain.dtype
