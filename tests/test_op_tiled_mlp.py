"""``liger_fx::swiglu_mlp`` and ``geglu_mlp``, against fp64 and against eager."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from _op_checks import Case, Contract, randn
from torch._subclasses import FakeTensorMode

from liger_fx import ops
from liger_fx.ops import tiled_mlp

INTERMEDIATE, OUT = 40, 24


def swiglu_mlp(x, w_gate, w_up, w_down, tile_tokens=0):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def geglu_mlp(x, w_gate, w_up, w_down, tile_tokens=0):
    gate = F.gelu(F.linear(x, w_gate), approximate="tanh")
    return F.linear(gate * F.linear(x, w_up), w_down)


def x_and_weights(shape, dtype, generator):
    columns = shape[-1]
    x = randn(shape, dtype, generator)
    weights = (
        (randn(size, torch.float32, generator, grad=False) * size[1] ** -0.5)
        for size in ((INTERMEDIATE, columns), (INTERMEDIATE, columns), (OUT, INTERMEDIATE))
    )
    return [x, *(w.to(dtype).requires_grad_() for w in weights)]


class TestTiledMLP(Contract):
    # One tile, and many: the last of 16 tokens has 10 of 42.
    CASES = tuple(
        Case(f"{eager.__name__}, tiles of {tile or 'all'}", op, eager, x_and_weights, (tile,))
        for tile in (0, 16)
        for op, eager in ((ops.swiglu_mlp, swiglu_mlp), (ops.geglu_mlp, geglu_mlp))
    )
    SHAPES = ((48,), (1, 257), (7, 5), (2, 3, 48), (4, 1), (0, 48), (2, 0, 48), (10_003, 5))
    BIG = (2**31 // 8192 + 3, 8192)
    BIG_TOLERANCE = MappingProxyType(
        {"atol": 1e-3, "rtol": 1.6e-2}
    )  # of few rows another GEMM rounds in its way


def test_weight_gradients_are_summed_in_fp32():
    """A12: in bf16 the sum over 64 tiles would lose the last bits of each."""
    generator = torch.Generator().manual_seed(0)
    tensors = x_and_weights((1024, 32), torch.bfloat16, generator)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    upstream = torch.randn(1024, OUT, generator=generator).bfloat16()

    def weight_gradients(op, values, *tile):
        return torch.autograd.grad(op(*values, *tile), values[1:], upstream.to(values[0].dtype))

    expected = weight_gradients(swiglu_mlp, exact)
    whole = weight_gradients(ops.swiglu_mlp, tensors, 0)
    tiled = weight_gradients(ops.swiglu_mlp, tensors, 16)
    for t, w, e in zip(tiled, whole, expected, strict=True):
        assert (t - e).norm() <= 1.1 * (w - e).norm()


@pytest.mark.parametrize(
    ("tokens", "tile"),
    [(0, 1), (5, 5), (20480, 20480), (20481, 10368), (65536, 16384), (70000, 17536)],
)
def test_tiles_are_as_equal_as_they_come(tokens, tile):
    """960 MiB for three [tile, 8192] in bf16."""
    assert tiled_mlp.tile_tokens_for(tokens, 8192, 2, "cuda") == tile


def test_nothing_of_tokens_by_intermediate_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        generator = torch.Generator().manual_seed(0)
        tensors = x_and_weights((64, 8), torch.float32, generator)
        ops.swiglu_mlp(*tensors)
    assert {tuple(t.shape) for t in saved} == {tuple(t.shape) for t in tensors}


def test_fake_gradients():
    with FakeTensorMode():
        x, *weights = (torch.empty(s) for s in ((2, 3, 8), (40, 8), (40, 8), (24, 40)))
        wanted = [True, False, True, False]
        got = torch.ops.liger_fx.swiglu_mlp_backward(torch.empty(2, 3, 24), x, *weights, wanted, 0)
    assert [tuple(g.shape) for g in got] == [(2, 3, 8), (0,), (40, 8), (0,)]
