"""``liger_fx::swiglu_mlp``, ``geglu_mlp`` and ``geglu_exact_mlp``, against fp64 and against eager."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _op_checks import Case, Contract, in_fp64, randn
from _util import DEVICE, TOLERANCES, relative_error
from torch._subclasses import FakeTensorMode
from torchtune.models.llama3 import llama3

from liger_fx import ops
from liger_fx.ops import tiled_mlp
from liger_fx.ops.tokens import tokens_with_gradient, valid_tokens

INTERMEDIATE, OUT = 40, 24


def swiglu_mlp(x, w_gate, w_up, w_down, tile_tokens=0, skip_padding=False):
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def geglu_mlp(x, w_gate, w_up, w_down, tile_tokens=0, skip_padding=False):
    gate = F.gelu(F.linear(x, w_gate), approximate="tanh")
    return F.linear(gate * F.linear(x, w_up), w_down)


def geglu_exact_mlp(x, w_gate, w_up, w_down, tile_tokens=0, skip_padding=False):
    return F.linear(F.gelu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def x_and_weights(shape, dtype, generator):
    columns = shape[-1]
    x = randn(shape, dtype, generator)
    weights = (
        (randn(size, torch.float32, generator, grad=False) * size[1] ** -0.5)
        for size in ((INTERMEDIATE, columns), (INTERMEDIATE, columns), (OUT, INTERMEDIATE))
    )
    return [x, *(w.to(dtype).requires_grad_() for w in weights)]


SCALES = {"gate": 0.5, "up": 0.3, "down": 0.7}
RANK = 4


@dataclass(frozen=True)
class Adapted(Case):
    """Projections with adapters. literals: the tokens of a tile. dtype: of the adapters; None for
    that of the weights."""

    projections: tuple[str, ...] = ("gate", "up", "down")
    dtype: torch.dtype | None = None

    def make(self, shape=None, dtype=torch.float32, seed=0):
        x, gate, up, down = super().make(shape, dtype, seed)
        generator = torch.Generator(DEVICE).manual_seed(seed + 1)
        sizes = {"gate": gate.shape, "up": up.shape, "down": down.shape}
        factors = [
            randn(size, torch.float32, generator, grad=False) * size[1] ** -0.5
            for name in self.projections
            for size in ((RANK, sizes[name][1]), (sizes[name][0], RANK))
        ]
        kind = self.dtype or dtype
        return [x, gate, up, down, *(t.to(kind).requires_grad_() for t in factors)]

    def adapters(self, factors):
        """(a, b, scale) by projection."""
        pairs = zip(factors[::2], factors[1::2], strict=True)
        found = zip(self.projections, pairs, strict=True)
        return {name: (*pair, SCALES[name]) for name, pair in found}

    def arguments(self, *tensors):
        found = self.adapters(tensors[4:])
        given = (found.get(name, (None, None, 1.0)) for name in SCALES)
        return *tensors[:4], *self.literals, False, *itertools.chain(*given)

    def reference(self, x, *tensors):
        weights = dict(zip(SCALES, tensors, strict=False))
        found = self.adapters(tensors[3:])

        def project(x, name):
            base = F.linear(x, weights[name])
            if name not in found:
                return base
            a, b, scale = found[name]
            return (base + scale * F.linear(F.linear(x.to(a.dtype), a), b)).to(base.dtype)

        return project(F.silu(project(x, "gate")) * project(x, "up"), "down")


ADAPTED = tuple(
    Adapted(
        f"swiglu_mlp, tiles of {tile or 'all'}, {dtype or ''} adapters on {', '.join(names)}",
        ops.swiglu_mlp,
        swiglu_mlp,
        x_and_weights,
        (tile,),
        projections=names,
        dtype=dtype,
    )
    for tile, names, dtype in (
        (0, ("gate", "up", "down"), None),
        (16, ("gate", "up", "down"), None),
        (16, ("gate", "up", "down"), torch.float32),
        (0, ("up",), None),
        (16, ("gate", "down"), None),
        (0, ("down",), torch.float32),
    )
)


class TestTiledMLP(Contract):
    # One tile, and many: the last of 16 tokens has 10 of 42.
    CASES = (
        tuple(
            Case(f"{eager.__name__}, tiles of {tile or 'all'}", op, eager, x_and_weights, (tile,))
            for tile in (0, 16)
            for op, eager in (
                (ops.swiglu_mlp, swiglu_mlp),
                (ops.geglu_mlp, geglu_mlp),
                (ops.geglu_exact_mlp, geglu_exact_mlp),
            )
        )
        + ADAPTED
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
    assert tiled_mlp.tile_tokens_for(3 * 2 * intermediate, budget, unit) == tile


@pytest.mark.parametrize(
    ("base", "adapters", "size"),
    [
        (torch.bfloat16, None, 6),
        (torch.bfloat16, torch.bfloat16, 6),
        (torch.bfloat16, torch.float32, 10),
        (torch.float32, torch.float32, 12),
    ],
)
def test_bytes_of_an_element_of_a_tile(base, adapters, size):
    """The sum with a wider adapter is made in a buffer of its own."""
    a, b = torch.empty(2, 8, dtype=adapters), torch.empty(24, 2, dtype=adapters)
    adapter = None if adapters is None else tiled_mlp.Adapter(a, b, 1.0)
    projections = [tiled_mlp.Projection(torch.empty(24, 8, dtype=base), adapter)]
    assert tiled_mlp._bytes_of_buffers(base, projections) == size


@pytest.mark.parametrize(("processors", "unit"), [(132, 4224), (108, 3456), (114, 7296)])
def test_a_unit_fills_the_gpu(processors, unit):
    """132 multiprocessors have an H100 SXM and an H200, 108 an A100, 114 an H100 PCIe."""
    with mock.patch.object(tiled_mlp, "multiprocessors", return_value=processors):
        assert tiled_mlp._unit(torch.device("cuda")) == unit
    blocks = unit // 128 * (1024 // 256)
    assert blocks % processors == 0 and unit % 128 == 0


@pytest.mark.parametrize("case", [TestTiledMLP.CASES[0], ADAPTED[0]], ids=str)
def test_nothing_of_tokens_by_intermediate_is_saved(case):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tensors = case.make((64, 8))
        case.fused(*tensors)
    assert {tuple(t.shape) for t in saved} == {tuple(t.shape) for t in tensors}


def test_fake_gradients():
    with FakeTensorMode():
        x, gate, up, down = (torch.empty(s) for s in ((2, 3, 8), (40, 8), (40, 8), (24, 40)))
        a, b = torch.empty(3, 8), torch.empty(40, 3)
        factors = [gate, None, None, up, a, b, down, None, None]
        wanted = [True, *3 * [False], True, True, *4 * [False]]
        got = torch.ops.liger_fx.swiglu_mlp_backward(
            torch.empty(2, 3, 24), x, factors, [1.0, 2.0, 1.0], wanted, 0, True
        )
    assert [tuple(g.shape) for g in got] == [(2, 3, 8), (40, 8), (3, 8)]  # that are wanted


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

    def gradients(op, x, *rest):
        tensors = [x.detach().requires_grad_(), *rest[:3]]
        return torch.autograd.grad(op(*tensors, *rest[3:]), tensors, upstream.to(x.dtype))

    exact = gradients(swiglu_mlp, *in_fp64([x, *weights]))
    eager = gradients(swiglu_mlp, x, *weights)
    for got, e, reference in zip(
        gradients(ops.swiglu_mlp, unread, *weights, tile, True), eager, exact, strict=True
    ):
        assert (got - reference).norm() <= 1.1 * (e - reference).norm() + 3e-7 * reference.norm()
    assert not kept or not got.isnan().any()


@pytest.mark.parametrize("share", ["none", "some", "most", "all"])
def test_rows_with_a_gradient(share):
    """A nan counts as a gradient, -0.0 does not, and few zeros are not worth a copy."""
    grad = torch.ones(64, 3)
    grad[{"none": [], "some": [5], "most": slice(1, None), "all": slice(None)}[share]] = -0.0
    assert share == "all" or grad[0].fill_(torch.nan).isnan().all()
    kept = tokens_with_gradient(grad)
    assert (kept is None) == (share in ("none", "some"))
    assert kept is None or kept.tolist() == [0] * (share == "most")


# -- what is computed depends on inputs and options alone -------------------------------------------


def padded_step(seed=0, dtype=torch.float32):
    """Inputs and an upstream gradient that is zero for the tokens that pad, of which one is inf."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x, *weights = x_and_weights((2, 21, 24), dtype, generator)
    upstream = randn((2, 21, OUT), dtype, generator, grad=False)
    upstream[:, 12:] = 0
    with torch.no_grad():
        x[1, 20, 3] = torch.inf
    return [x, *weights], upstream


def gradients_of(tensors, upstream, skip_padding, tile=16):
    made = ops.swiglu_mlp(*tensors, tile, skip_padding)
    return torch.autograd.grad(made, tensors, upstream)


def same_bits(a, b):
    return all(torch.equal(x.isnan(), y.isnan()) for x, y in zip(a, b, strict=True)) and all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True)
    )


def ignored_labels():
    """Somebody's batch with ignored labels: a head, and an MLP that skips padding."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    x, weight = (randn(s, torch.float32, generator) for s in ((6, 8), (16, 8)))
    labels = torch.tensor([1, -100, 2, -100, -100, 3], device=DEVICE)
    literals = (["cross_entropy"], -100, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    loss, _ = ops.linear_loss(x, weight, None, labels, *(None,) * 5, *literals)
    assert loss.isfinite()
    gradients_of(*padded_step(7), skip_padding=True)


@pytest.mark.parametrize("skip_padding", [False, True])
def test_nothing_that_ran_before_changes_the_gradients(skip_padding):
    step = padded_step()
    before = gradients_of(*step, skip_padding)
    ignored_labels()
    after = gradients_of(*step, skip_padding)
    valid_tokens(torch.tensor([True], device=DEVICE))  # and a batch without ignored labels
    assert same_bits(before, after) and same_bits(before, gradients_of(*step, skip_padding))


def test_an_infinite_token_without_a_gradient():
    """As in eager it makes weight gradients nan, unless it is left out."""
    tensors, upstream = padded_step()
    eager = torch.autograd.grad(swiglu_mlp(*tensors), tensors, upstream)
    without = gradients_of(tensors, upstream, skip_padding=False)
    skipping = gradients_of(tensors, upstream, skip_padding=True)
    assert [g.isnan().any().item() for g in eager] == [g.isnan().any().item() for g in without]
    assert any(g.isnan().any() for g in without)
    assert not any(g.isnan().any() for g in skipping)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [0, 16])
def test_padding_skipped_or_not_is_the_same_of_finite_tokens(tile, dtype):
    tensors, upstream = padded_step(dtype=dtype)
    with torch.no_grad():
        tensors[0].clamp_(-3, 3)
    without = gradients_of(tensors, upstream, False, tile)
    for got, expected in zip(gradients_of(tensors, upstream, True, tile), without, strict=True):
        assert relative_error(got, expected) < TOLERANCES[dtype]
    dx, *_ = without
    assert not dx[:, 12:].any()


def test_two_models_in_one_process():
    """The one skips padding, the other does not, layer by layer in turn."""
    one, other = padded_step(1), padded_step(2)
    alone = gradients_of(*one, skip_padding=True), gradients_of(*other, skip_padding=False)
    for _ in range(2):
        assert same_bits(gradients_of(*one, skip_padding=True), alone[0])
        assert same_bits(gradients_of(*other, skip_padding=False), alone[1])


def test_two_threads():
    steps = [(padded_step(seed), bool(seed % 2)) for seed in range(4)]
    alone = [gradients_of(*step, skip) for step, skip in steps]

    def repeatedly(i):
        (step, skip), expected = steps[i], alone[i]
        for _ in range(20):
            ignored_labels()
            if not same_bits(gradients_of(*step, skip), expected):
                return False
        return True

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(repeatedly, range(4)))


@pytest.mark.parametrize("skip_padding", [False, True])
def test_deterministic_algorithms(skip_padding, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    step = padded_step()
    expected = gradients_of(*step, skip_padding)
    torch.use_deterministic_algorithms(True)
    try:
        found = [gradients_of(*step, skip_padding) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same_bits(gradients, expected) for gradients in found)


def test_no_token_is_looked_for_unasked():
    with mock.patch.object(tiled_mlp, "tokens_with_gradient") as look:
        gradients_of(*padded_step(), skip_padding=False)
    look.assert_not_called()


# -- which tokens have no gradient -----------------------------------------------------------------


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
