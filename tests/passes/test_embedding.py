"""The rewrite ``embedding``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _op_checks import no_compile_caches
from _util import DEVICE, gradients, only, reasons, relative_error, show
from expecttest import assert_expected_inline
from liger_fx.passes import embedding
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import liger_fx

capture = only(embedding)
V, H = 50, 16
DTYPES = [torch.bfloat16, torch.float16]


def weight(dtype=torch.bfloat16):
    return torch.randn(V, H, device=DEVICE, dtype=dtype, requires_grad=True)


def tokens(*shape, dtype=torch.int64):
    return torch.randint(0, V, shape or (3, 9), device=DEVICE, dtype=dtype)


def lookup(t, w):
    return F.embedding(t, w)


def without_padding(t, w):
    return F.embedding(t, w, padding_idx=-2)


def by_frequency(t, w):
    return F.embedding(t, w, 3, scale_grad_by_freq=True)


def scaled(t, w):
    """Gemma's."""
    return F.embedding(t, w, padding_idx=0) * torch.tensor(H**0.5, dtype=w.dtype)


SPELLINGS = [lookup, without_padding, by_frequency, scaled]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("dtype", "dynamic"), [(d, d is DTYPES[0]) for d in DTYPES])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic):
    (report,) = capture(spelling, tokens(), weight(dtype), dynamic=dynamic).reports
    assert report.counts == {"embedding": 1}, report
    assert report.rejections == [] and report.near_misses == []


def test_fires_on_a_module_whose_numbers_may_vary():
    module = nn.Embedding(V, H, padding_idx=1, dtype=torch.bfloat16, device=DEVICE)
    (report,) = capture(module, tokens(), dynamic=True).reports
    assert report.counts == {"embedding": 1}, report


def test_fires_graph():
    assert_expected_inline(
        show(capture(without_padding, tokens(), weight()).graphs[0]),
        """\
def forward(self, L_t_: "i64[3, 9]", L_w_: "bf16[50, 16]"):
    l_t_ = L_t_
    l_w_ = L_w_
    embedding_default: "bf16[3, 9, 16]" = torch.ops.liger_fx.embedding.default(l_w_, l_t_, 48, False)
    return (embedding_default,)""",
    )


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_a_frozen_table():
    assert_expected_inline(
        refusal(lookup, tokens(), weight().detach()),
        """the table gets no gradient: a lookup alone is left to the compiler""",
    )


def test_refuses_a_table_without_grad_mode():
    def fn(t, w):
        with torch.no_grad():
            return F.embedding(t, w)

    assert_expected_inline(
        refusal(fn, tokens(), weight()),
        """the table gets no gradient: a lookup alone is left to the compiler""",
    )


def test_refuses_single_precision():
    assert_expected_inline(
        refusal(lookup, tokens(), weight(torch.float32)),
        """the table is torch.float32: its gradient is summed in that dtype anyway""",
    )


def test_refuses_sparse_gradients():
    assert_expected_inline(
        refusal(lambda t, w: F.embedding(t, w, sparse=True), tokens(), weight()),
        """the gradient is sparse; the op's is dense""",
    )


def test_refuses_max_norm():
    """A lookup writes to the table."""
    frozen = weight().detach()
    said = refusal(lambda t, w: F.embedding(t, w, max_norm=1.0), tokens(), frozen)
    assert_expected_inline(said, """max_norm: the lookup writes to the table""")


def test_refuses_tokens_that_are_written_before_the_backward():
    def fn(t, w):
        t = t + 0
        out = F.embedding(t, w)
        t.zero_()
        return out

    assert_expected_inline(
        refusal(fn, tokens(), weight()),
        """the backward needs indices, which `zero_` (zero_) writes to later""",
    )


def test_leaves_an_index_alone():
    (report,) = capture(lambda t, w: w[t], tokens(), weight()).reports
    assert report.counts == {} and report.rejections == []


def test_leaves_a_bag_of_embeddings_alone():
    (report,) = capture(lambda t, w: F.embedding_bag(t, w), tokens(), weight()).reports
    assert report.counts == {} and report.rejections == []


# -- numerics --------------------------------------------------------------------------------------


def compiled(fn, inner):
    torch._dynamo.reset()
    return torch.compile(
        fn, backend="liger_fx", options={"policy": ["embedding"], "inner": inner}, fullgraph=True
    )


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numerics(spelling, inner, dtype):
    given = tokens(4, 700), weight(dtype)
    actual = gradients(lambda *t: compiled(spelling, inner)(*t).float().sin().sum(), *given)
    eager = gradients(lambda *t: spelling(*t).float().sin().sum(), *given)
    exact = gradients(
        lambda *t: spelling(*t).sin().sum(), given[0], given[1].detach().double().requires_grad_()
    )
    assert liger_fx.reports()[-1].counts == {"embedding": 1}
    for a, b, e in zip(actual, eager, exact, strict=True):
        assert a.dtype == b.dtype and relative_error(a, e) <= 1.1 * relative_error(b, e) + 3e-7


class Tied(nn.Module):
    """A decoder whose head has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, H, dtype=torch.bfloat16, device=DEVICE)

    def body(self, t):
        return self.embed(t).tanh()

    def forward(self, t):
        hidden = checkpoint(self.body, t, use_reentrant=False)
        return F.cross_entropy(hidden @ self.embed.weight.T, t.roll(1))


def test_a_tied_head_and_a_checkpoint():
    model, t = Tied(), tokens(90)
    grads = []
    for call in (model, compiled(model, "inductor")):
        for _ in range(2):  # gradients are accumulated
            call(t).backward()
        grads.append(model.embed.weight.grad)
        model.zero_grad()
    assert liger_fx.reports()[-1].counts == {"embedding": 1}
    assert relative_error(*grads) < 1e-2


def test_inductor_sums_into_no_table_in_single_precision():
    with no_compile_caches():
        step = compiled(lambda t, w: lookup(t, w).float().sum(), "inductor")
        _, codes = run_and_get_code(lambda: step(tokens(), weight()).backward())
    assert "embedding_backward.default(" in codes[-1] and "tl.atomic_add(" not in codes[-1]


def test_indices_of_32_bits_and_none():
    for t in (tokens(5, dtype=torch.int32), tokens(0, 3)):
        w = weight()
        actual = gradients(lambda *g: compiled(lookup, "aot_eager")(*g).float().sum(), t, w)
        for a, e in zip(actual, gradients(lambda *g: lookup(*g).float().sum(), t, w), strict=True):
            assert torch.equal(a, e)


def test_an_upstream_gradient_in_another_layout():
    t, w = tokens(), weight()
    upstream = torch.randn(H, 9, 3, device=DEVICE, dtype=w.dtype).permute(2, 1, 0)
    actual, expected = (
        torch.autograd.grad(fn(t, w), w, upstream) for fn in (compiled(lookup, "eager"), lookup)
    )
    assert torch.equal(*actual, *expected)
