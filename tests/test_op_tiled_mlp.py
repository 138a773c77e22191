"""``liger_fx::swiglu_mlp`` and ``geglu_mlp``, against fp64 and against eager."""

from __future__ import annotations

from types import MappingProxyType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _op_checks import Case, Contract, in_fp64, randn
from _util import DEVICE
from torch._subclasses import FakeTensorMode
from torchtune.models.llama3 import llama3

from liger_fx import ops
from liger_fx.ops import tiled_mlp, tokens
from liger_fx.ops.tokens import tokens_with_gradient, valid_tokens

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
    ("intermediate", "budget", "unit", "tile"),
    [
        (8192, 1200 << 20, 4224, 25344),  # 1188 MiB for three [tile, 8192] in bf16, on 132
        (8192, 192 << 20, 4224, 4096),  # less than a unit: in multiples of 128
        (8192, 1 << 20, 4224, 128),
        (8192, 128 << 20, 128, 2688),
    ],
)
def test_tokens_of_a_tile(intermediate, budget, unit, tile):
    assert tiled_mlp.tile_tokens_for(intermediate, 2, budget, unit) == tile


@pytest.mark.parametrize(("processors", "unit"), [(132, 4224), (108, 3456), (114, 7296)])
def test_a_unit_fills_the_gpu(processors, unit):
    """132 multiprocessors have an H100 SXM and an H200, 108 an A100, 114 an H100 PCIe."""
    with mock.patch.object(tiled_mlp, "multiprocessors", return_value=processors):
        assert tiled_mlp._unit(torch.device("cuda")) == unit
    blocks = unit // 128 * (1024 // 256)
    assert blocks % processors == 0 and unit % 128 == 0


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


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("kept", [0, 1, 19, 41, 42])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_a_gradient_are_left_out(dtype, kept, tile):
    """Of 42; nothing of them is looked at, and what is left is as exact as eager."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, *weights = x_and_weights((2, 21, 24), dtype, generator)
    order = torch.randperm(42, generator=generator, device=DEVICE)
    upstream = randn((42, OUT), dtype, generator, grad=False)
    upstream[order[kept:]] = 0
    unread = x.detach().clone()
    if kept < 41:  # one token less is not worth the copy of the others
        unread.view(42, -1)[order[kept:]] = torch.nan
    upstream = upstream.view(2, 21, OUT)
    valid_tokens(torch.tensor([False]))  # the batch has ignored labels

    def gradients(op, x, *rest):
        tensors = [x.detach().requires_grad_(), *rest[:3]]
        return torch.autograd.grad(op(*tensors, *rest[3:]), tensors, upstream.to(x.dtype))

    exact = gradients(swiglu_mlp, *in_fp64([x, *weights]))
    eager = gradients(swiglu_mlp, x, *weights)
    for got, e, reference in zip(
        gradients(ops.swiglu_mlp, unread, *weights, tile), eager, exact, strict=True
    ):
        assert (got - reference).norm() <= 1.1 * (e - reference).norm() + 3e-7 * reference.norm()
    assert not kept or not got.isnan().any()


def test_who_looks_for_tokens_without_a_gradient():
    """After a batch with ignored labels, until nothing was found."""
    valid, grad = torch.tensor([False, True]), torch.tensor([[0.0, 0.0], [torch.nan, 0.0]])
    with mock.patch.object(tokens, "_expected", False):
        assert tokens_with_gradient(grad) is None
        valid_tokens(valid)
        assert tokens_with_gradient(grad).tolist() == tokens_with_gradient(grad).tolist() == [1]
        assert tokens_with_gradient(grad + 1) is None
        assert tokens_with_gradient(grad) is None
        valid_tokens(valid)
        valid_tokens(torch.tensor([True]))
        assert tokens_with_gradient(grad) is None


def test_which_tokens_of_a_decoder_have_no_gradient():
    """Those that pad on the right in every layer, ignored ones in the last: exactly 0."""
    model = llama3(
        vocab_size=32,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        embed_dim=16,
        max_seq_len=10,
        intermediate_dim=24,
    )
    labels = torch.randint(32, (2, 10))
    labels[0, :4] = labels[0, 7:] = labels[1, :2] = -100  # a prompt, padding; a prompt
    without: list[int] = []
    for layer in model.layers:
        layer.mlp.register_full_backward_hook(
            lambda _, __, grads: without.append(int((~grads[0].any(-1)).sum()))
        )
    logits = model(labels.clamp(min=0))
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert without == [9, 3, 3]  # from the last layer to the first
