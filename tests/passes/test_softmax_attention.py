"""The rewrite ``softmax_attention``: attention written out, and what `attention` makes of it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from _util import (
    CUDA,
    DEVICE,
    aot_compiled,
    gradients,
    only,
    reasons,
    relative_error,
    show,
)
from expecttest import assert_expected_inline
from liger_fx.passes import attention, softmax_attention
from torch import nn

import liger_fx

INF = math.inf
B, H, S, D = 2, 3, 5, 8  # batch, heads, tokens, elements
SHAPE = (B, H, S, D)
DTYPE = torch.bfloat16 if CUDA else torch.float32
alone, both = only(softmax_attention), only(softmax_attention, attention)


def operands(dtype=DTYPE, shape=SHAPE):
    return [torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(3)]


def causal(scores):
    """True where a key is seen, [s, s]."""
    at = torch.arange(scores.shape[-1], device=scores.device)
    return at[None, :] <= at[:, None]


# -- as each library writes it ---------------------------------------------------------------------


def huggingface(q, k, v):
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    zero = torch.zeros((), device=q.device, dtype=q.dtype)
    mask = torch.where(causal(scores)[None, None], zero, torch.finfo(q.dtype).min)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=True), v)


def nanogpt(q, k, v):
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    triangle = torch.tril(torch.ones(S, S, device=q.device)).view(1, 1, S, S)
    scores = scores.masked_fill(triangle == 0, float("-inf"))
    return F.dropout(F.softmax(scores, dim=-1), 0.1, training=False) @ v


def gpt2(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2)) / 2.5
    scores = torch.where(causal(scores), scores, torch.finfo(scores.dtype).min)
    return torch.matmul(scores.softmax(-1).type(v.dtype), v)


def mask_in_front(q, k, v):
    scores = 0.25 * (q @ k.transpose(3, 2)).float()
    mask = torch.triu(torch.full((S, S), -INF, device=q.device), diagonal=1)
    return torch.softmax(mask + scores, 3).to(v.dtype) @ v


def scaled_queries(q, k, v):
    scores = (q * 0.5) @ k.transpose(2, 3)
    hidden = ~causal(scores)
    return scores.masked_fill(hidden, -INF).softmax(dim=-1) @ v


SPELLINGS = [huggingface, nanogpt, gpt2, mask_in_front, scaled_queries]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_each_spelling_becomes_causal_attention(spelling):
    given = operands()
    found = both(spelling, *given)
    assert found.reports[0].counts == {"softmax_attention": 1, "attention": 1}
    assert "softmax(" not in show(found.graphs[0])
    assert relative_error(found.value, spelling(*given)) < (1e-2 if CUDA else 1e-6)


@pytest.mark.skipif(CUDA, reason="a GPU gets liger_fx::attention")
def test_the_graph_with_both_rewrites():
    found = both(nanogpt, *operands())
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_k_: "f32[2, 3, 5, 8]", L_q_: "f32[2, 3, 5, 8]", L_v_: "f32[2, 3, 5, 8]"):
    l_k_ = L_k_
    l_q_ = L_q_
    l_v_ = L_v_
    scaled_dot_product_attention_1: "f32[2, 3, 5, 8]" = torch._C._nn.scaled_dot_product_attention(l_q_, l_k_, l_v_, None, 0.0, True, scale = 0.35355339059327373)
    return (scaled_dot_product_attention_1,)""",
    )


def test_a_mask_that_attention_does_not_take_stays():
    """Without `attention` the mask is the model's own."""
    found = alone(gpt2, *operands(torch.bfloat16))
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_k_: "bf16[2, 3, 5, 8]", L_q_: "bf16[2, 3, 5, 8]", L_v_: "bf16[2, 3, 5, 8]"):
    l_k_ = L_k_
    l_q_ = L_q_
    l_v_ = L_v_
    at: "i64[5]" = torch.arange(5)
    getitem: "i64[1, 5]" = at[(None, slice(None, None, None))]
    getitem_1: "i64[5, 1]" = at[(slice(None, None, None), None)]
    le: "b8[5, 5]" = getitem <= getitem_1
    scaled_dot_product_attention: "bf16[2, 3, 5, 8]" = torch._C._nn.scaled_dot_product_attention(l_q_, l_k_, l_v_, le, scale = 0.4)
    return (scaled_dot_product_attention,)""",
    )


def test_a_window_over_repeated_keys():
    """As Mistral's eager attention."""

    def fn(q, k, v):
        k, v = (x[:, :, None].expand(B, H, 2, S, D).reshape(B, 2 * H, S, D) for x in (k, v))
        scores = q @ k.transpose(2, 3)
        at = torch.arange(S, device=q.device)
        seen = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - 3)
        return torch.softmax(torch.where(seen, scores, -INF), -1) @ v

    q = torch.randn(B, 2 * H, S, D, device=DEVICE, dtype=DTYPE)
    given = [q, *operands()[1:]]
    found = both(fn, *given)
    assert [r.pattern for r in found.reports[0].replacements] == [
        "chosen",
        "heads_first, causal, window 3",
    ]
    assert relative_error(found.value, fn(*given)) < (1e-2 if CUDA else 1e-6)


def test_under_autocast():
    """The scores are computed in bf16, softmax in float32, and the output in bf16."""

    def fn(q, k, v):
        with torch.autocast(DEVICE, torch.bfloat16):
            scores = q @ k.transpose(2, 3) * 0.3
            return scores.masked_fill(~causal(scores), -INF).softmax(-1) @ v

    given = operands(torch.float32)
    found = both(fn, *given)
    assert found.reports[0].counts == {"softmax_attention": 1, "attention": 1}
    assert found.value.dtype == torch.bfloat16
    assert relative_error(found.value, fn(*given)) < 2e-2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)

    def forward(self, x, mask):
        parts = self.qkv(x).split(H * D, dim=-1)
        q, k, v = (t.view(B, S, H, D).transpose(1, 2) for t in parts)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(D) + mask, -1)
        return x + (weights @ v).transpose(1, 2).reshape(B, S, H * D)


@pytest.mark.parametrize("dynamic", [False, True])
def test_in_a_checkpoint_with_a_mask_made_outside(dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(2)).to(DEVICE, DTYPE)
    x = torch.randn(B, S, H * D, device=DEVICE, dtype=DTYPE, requires_grad=True)

    def fn(x):
        at = torch.arange(x.shape[1], device=x.device)
        mask = torch.zeros(S, S, device=x.device, dtype=x.dtype)
        mask = mask.masked_fill(at[None, :] > at[:, None], -INF)
        for layer in layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, mask, use_reentrant=False)
        return x.square().sum()

    compiled = aot_compiled(fn, dynamic=dynamic, fullgraph=True)
    actual, expected = gradients(compiled, x), gradients(fn, x)
    assert liger_fx.reports()[-1].counts["softmax_attention"] == 2
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < (1e-2 if CUDA else 1e-6)


# -- numerics --------------------------------------------------------------------------------------


def exact(q, k, v, scale):
    scores = (q @ k.mT) * scale
    return scores.masked_fill(~causal(scores), -INF).softmax(-1) @ v


@pytest.mark.parametrize("spelling", [huggingface, gpt2])
def test_bf16_is_no_further_from_fp64_than_eager(spelling):
    """All gradients taken together: those of queries and keys are nearer, of values further."""
    actual, eager, expected = compared(spelling, torch.bfloat16)
    assert error(actual, expected) <= 1.1 * error(eager, expected)


@pytest.mark.skipif(CUDA, reason="refused on a GPU")
@pytest.mark.parametrize("spelling", [huggingface, gpt2])
def test_float32_is_near_fp64(spelling):
    actual, _, expected = compared(spelling, torch.float32)
    assert error(actual, expected) < 2e-6


def compared(spelling, dtype):
    """Value and gradients: compiled, eager, in fp64."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    scale = 0.25 if spelling is huggingface else 1 / 2.5
    given = [x.requires_grad_() for x in operands(dtype, (2, 4, 96, 32))]
    weights = torch.randn(given[0].shape, device=DEVICE, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in given]
    compiled = aot_compiled(spelling, fullgraph=True)
    found = [
        gradients(lambda *t: (fn(*t) * weights).sum(), *tensors)[1:]  # noqa: B023
        for fn, tensors in [
            (compiled, given),
            (spelling, given),
            (lambda *t: exact(*t, scale), wide),
        ]
    ]
    assert liger_fx.reports()[-1].counts["softmax_attention"] == 1
    return found


def error(actual, expected):
    return relative_error(*(torch.cat([x.flatten() for x in part]) for part in (actual, expected)))


# -- refuses ---------------------------------------------------------------------------------------


def seen_by(mask):
    def fn(q, k, v, *rest):
        return torch.softmax(q @ k.transpose(2, 3) + mask(q, *rest), -1) @ v

    return fn


def additive(q):
    return torch.triu(torch.full((S, S), -INF, device=q.device, dtype=q.dtype), diagonal=1)


def refused(fn, *given):
    found = alone(fn, *given)
    assert not found.reports[0].counts
    return reasons(found.reports[0])


def test_refuses_a_mask_of_which_nothing_is_known():
    bias = torch.randn(S, S, device=DEVICE, dtype=torch.bfloat16)
    said = refused(seen_by(lambda q, bias: bias), *operands(torch.bfloat16), bias)
    assert_expected_inline(
        said, """the mask l_rest_0_ is torch.bfloat16, and not zero or minus infinity"""
    )


def test_refuses_padding_by_minus_infinity():
    """A query that sees no key gets NaN of softmax."""
    valid = torch.ones(B, S, device=DEVICE, dtype=torch.bool)

    def mask(q, valid):
        seen = causal(q @ q.mT) & valid[:, None, None, :]
        return torch.where(seen, 0.0, -INF).to(q.dtype)

    assert_expected_inline(
        refused(seen_by(mask), *operands(), valid),
        """a query may see no key: its softmax is NaN, the kernels give zeros""",
    )


def test_refuses_queries_beyond_the_keys():
    """The last queries of a window see none of fewer keys."""

    def mask(q):
        seen = torch.ones(S, S - 3, dtype=torch.bool, device=q.device)
        return torch.where(torch.triu(torch.tril(seen), -1), 0.0, -INF).to(q.dtype)

    q, k, v = operands()
    said = refused(seen_by(mask), q, k[:, :, : S - 3], v[:, :, : S - 3])
    assert_expected_inline(
        said, """a query may see no key: its softmax is NaN, the kernels give zeros"""
    )


def test_refuses_padding_by_a_finite_number():
    """A query that sees no key attends to all of them."""
    valid = torch.ones(B, S, device=DEVICE, dtype=torch.bool)

    def mask(q, valid):
        seen = causal(q @ q.mT) & valid[:, None, None, :]
        return torch.where(seen, 0.0, torch.finfo(q.dtype).min).to(q.dtype)

    assert_expected_inline(
        refused(seen_by(mask), *operands(torch.bfloat16), valid),
        """to is finite for padding: a query that sees no key attends to all of them""",
    )


def test_refuses_a_trained_mask():
    bias = torch.randn(S, S, device=DEVICE, dtype=DTYPE, requires_grad=True)
    said = refused(seen_by(lambda q, bias: bias + additive(q)), *operands(), bias)
    assert_expected_inline(said, """the mask add is trained""")


def test_refuses_a_boolean_that_is_added():
    said = refused(seen_by(lambda q: causal(q @ q.mT)), *operands())
    assert_expected_inline(said, """the mask le is torch.bool, and added to the scores""")


def test_refuses_dropout():
    def fn(q, k, v):
        weights = torch.softmax(q @ k.transpose(2, 3) + additive(q), -1)
        return F.dropout(weights, 0.1) @ v

    assert_expected_inline(
        refused(fn, *operands()), """dropout of 0.1: another kernel draws other random numbers"""
    )


def test_refuses_a_finite_number_that_leaves_weight():
    def fn(q, k, v):
        scores = q @ k.transpose(2, 3)
        return scores.masked_fill(~causal(scores), -1e4).softmax(-1) @ v

    assert_expected_inline(
        refused(fn, *operands(torch.bfloat16)),
        """keys are hidden by -10000.0; expected minus infinity or -3.3895313892515355e+38""",
    )


def test_refuses_the_least_number_of_a_narrower_dtype():
    def fn(q, k, v):
        scores = (q @ k.transpose(2, 3)).float()
        scores = scores.masked_fill(~causal(scores), torch.finfo(torch.float16).min)
        return scores.softmax(-1).to(v.dtype) @ v

    assert_expected_inline(
        refused(fn, *operands(torch.float16)),
        """keys are hidden by -65504.0; expected minus infinity or -3.4028234663852886e+38""",
    )


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_refuses_a_scale_that_is_not_positive(scale):
    def fn(q, k, v):
        scores = scale * (q @ k.transpose(2, 3))
        return scores.masked_fill(~causal(scores), -INF).softmax(-1) @ v

    assert (
        refused(fn, *operands()) == f"scores are scaled by {scale}, for which the kernels give NaN"
    )


def test_refuses_softmax_over_queries():
    def fn(q, k, v):
        return torch.softmax(q @ k.transpose(2, 3) + additive(q), -2) @ v

    assert_expected_inline(
        refused(fn, *operands()),
        """softmax is not over the keys of scores of queries and transposed keys""",
    )


def test_refuses_scores_in_a_wider_dtype():
    def fn(q, k, v):
        scores = q.float() @ k.float().transpose(2, 3) + additive(q)
        return scores.softmax(-1).to(v.dtype) @ v

    assert_expected_inline(
        refused(fn, *operands(torch.bfloat16)),
        """scores are computed in torch.float32, the output in torch.bfloat16""",
    )


def test_refuses_softmax_in_float64():
    def fn(q, k, v):
        weights = torch.softmax(q @ k.transpose(2, 3) + additive(q), -1, dtype=torch.float64)
        return weights.to(v.dtype) @ v

    assert_expected_inline(
        refused(fn, *operands()),
        """softmax runs in torch.float64; the kernels compute it in float32""",
    )


def test_refuses_broadcast_keys():
    q, k, v = operands()
    said = refused(seen_by(additive), q, k[:1], v[:1])
    assert_expected_inline(
        said, """queries, keys, values or the mask are broadcast over each other"""
    )


def test_refuses_three_dimensions():
    def fn(q, k, v):
        return torch.softmax(q @ k.transpose(1, 2) + additive(q), -1) @ v

    assert_expected_inline(
        refused(fn, *operands(shape=(B * H, S, D))),
        """queries, keys or values are not [batch, heads, tokens, elements]""",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_refuses_float32_on_a_gpu():
    said = refused(seen_by(additive), *operands(torch.float32))
    assert "bf16 and fp16" in said


# -- leaves alone ----------------------------------------------------------------------------------


def test_leaves_returned_weights():
    def fn(q, k, v):
        weights = torch.softmax(q @ k.transpose(2, 3) + additive(q), -1)
        return weights @ v, weights

    assert_expected_inline(
        refused(fn, *operands()), """the value of `softmax` (weights) is also returned"""
    )


def test_leaves_a_mask_that_is_written():
    def fn(q, k, v):
        mask = additive(q)
        mask[0, 1] = 0
        return torch.softmax(q @ k.transpose(2, 3) + mask, -1) @ v

    assert_expected_inline(refused(fn, *operands()), """mask is written in place""")


def test_leaves_capped_scores_and_attention_without_a_mask():
    def capped(q, k, v):
        scores = torch.tanh(q @ k.transpose(2, 3) / 30) * 30
        return torch.softmax(scores + additive(q), -1) @ v

    def unmasked(q, k, v):
        return torch.softmax(q @ k.transpose(2, 3), -1) @ v

    for fn in (capped, unmasked):
        assert not alone(fn, *operands()).reports[0].counts


def test_leaves_a_scale_that_is_applied_to_the_masked_scores():
    def fn(q, k, v):
        return torch.softmax((q @ k.transpose(2, 3) + additive(q)) * 0.5, -1) @ v

    assert not alone(fn, *operands()).reports[0].counts
