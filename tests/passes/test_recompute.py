"""The rewrites ``recompute_norm`` and ``recompute_activation``: fires, refuses, leaves alone,
numerics, and what is saved."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _util import DEVICE, TOLERANCES, gradients, only, reasons, relative_error, show
from expecttest import assert_expected_inline
from liger_fx.passes import recompute_activation, recompute_norm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import liger_fx

NAMES = ("recompute_norm", "recompute_activation")
BOTH = {"policy": list(NAMES), "strict": True}
capture = only(recompute_norm, recompute_activation)
TOKENS, WIDTH, INNER = 6, 16, 40


@pytest.fixture
def x():
    return torch.randn(2, TOKENS, WIDTH, device=DEVICE, requires_grad=True)


def weight(rows, columns, grad=True):
    return torch.randn(rows, columns, device=DEVICE).div_(columns**0.5).requires_grad_(grad)


@pytest.fixture
def weights():
    """Of gate, up and down."""
    return weight(INNER, WIDTH), weight(INNER, WIDTH), weight(WIDTH, INNER)


def huggingface(x, scale):
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return scale * normalised.to(x.dtype)


def torchtune(x, scale):
    return F.rms_norm(x.float(), (WIDTH,), scale, 1e-6).to(x.dtype)


def gemma(x, scale):
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (normalised * (1.0 + scale.float())).to(x.dtype)


def layer_norm(x, scale):
    return F.layer_norm(x, (WIDTH,), scale, None, 1e-5)


NORMS = [huggingface, torchtune, gemma, layer_norm]


def swiglu(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def geglu(x, gate, up, down):
    return F.linear(F.gelu(F.linear(x, gate), approximate="tanh") * F.linear(x, up), down)


def halves(x, gate, up, down):
    both = F.linear(x, torch.cat((gate, up))).chunk(2, dim=-1)
    return F.linear(F.silu(both[0]) * both[1], down)


def gelu(x, gate, _, down):
    return F.linear(F.gelu(F.linear(x, gate)), down)


def squared_relu(x, gate, _, down):
    return F.linear(F.relu(F.linear(x, gate)).square(), down)


def matmul(x, gate, up, down):
    return (F.silu(x @ gate.t()) * (x @ up.t())).view(-1, INNER) @ down.t()


MLPS = [swiglu, geglu, halves, gelu, squared_relu, matmul]


def read_by_a_projection(norm):
    return lambda x, scale, weight: F.linear(norm(x, scale), weight)


# -- fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", MLPS)
def test_fires_on_activations(mlp, x, weights):
    (report,) = capture(mlp, x, *weights).reports
    assert report.counts == {"recompute_activation": 1} and not report.rejections
    assert report.near_misses == []


@pytest.mark.parametrize("norm", NORMS)
def test_fires_on_norms(norm, x):
    scale = torch.ones(WIDTH, device=DEVICE, requires_grad=True)
    found = capture(read_by_a_projection(norm), x, scale, weight(INNER, WIDTH))
    assert found.reports[0].counts == {"recompute_norm": 1}


def test_fires_graph(x, weights):
    assert_expected_inline(
        show(capture(swiglu, x, *weights).graphs[0]),
        """\
def forward(self, L_x_: "f32[2, 6, 16]", L_gate_: "f32[40, 16]", L_up_: "f32[40, 16]", L_down_: "f32[16, 40]"):
    l_x_ = L_x_
    l_gate_ = L_gate_
    l_up_ = L_up_
    l_down_ = L_down_
    linear: "f32[2, 6, 40]" = torch._C._nn.linear(l_x_, l_gate_)
    linear_1: "f32[2, 6, 40]" = torch._C._nn.linear(l_x_, l_up_)
    recomputed_body_0 = self.recomputed_body_0
    tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(recomputed_body_0, linear, linear_1, use_reentrant = False)
    getitem: "f32[2, 6, 40]" = tag_activation_checkpoint[0]
    linear_2: "f32[2, 6, 16]" = torch._C._nn.linear(getitem, l_down_)
    return (linear_2,)
class recomputed_body_0(torch.nn.Module):
    def forward(self, linear: "f32[2, 6, 40]", linear_1: "f32[2, 6, 40]"):
        silu: "f32[2, 6, 40]" = torch.nn.functional.silu(linear)
        mul: "f32[2, 6, 40]" = silu * linear_1
        return (mul,)""",
    )


def test_each_has_a_checkpoint_of_its_own(x, weights):
    """A reader of one norm and of two activations."""
    scale = torch.ones(WIDTH, device=DEVICE, requires_grad=True)

    def two_layers(x, scale, *weights):
        return swiglu(swiglu(torchtune(x, scale), *weights), *weights)

    found = capture(two_layers, x, scale, *weights)
    assert found.reports[0].counts == {"recompute_norm": 1, "recompute_activation": 2}
    bodies = [name for name, _ in found.graphs[0].named_children()]
    assert bodies == ["recomputed_body_0", "recomputed_body_1", "recomputed_body_2"]


def test_a_view_that_nobody_reads_is_no_output(x, weights):
    def fn(x, gate, up, down):
        active = F.silu(F.linear(x, gate))
        product = active * F.linear(x, up)
        active.view(-1)
        return F.linear(product, down)

    assert capture(fn, x, *weights).reports[0].counts == {"recompute_activation": 1}


# -- what is saved ---------------------------------------------------------------------------------


def saved(fn, *tensors):
    """Shapes of what is saved beside the inputs."""
    given, found = {t.untyped_storage().data_ptr() for t in tensors}, []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            found.append(tuple(tensor.shape))
        return tensor

    fn(*tensors)  # compiles
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fn(*tensors)
    return found


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_neither_norm_nor_product_is_saved(inner, x, weights):
    scale = torch.ones(WIDTH, device=DEVICE, requires_grad=True)

    def layer(x, scale, *weights):
        return swiglu(layer_norm(x, scale), *weights)

    sizes = []
    for policy in ([], list(NAMES)):
        torch._dynamo.reset()
        compiled = torch.compile(
            layer, backend="liger_fx", options={"policy": policy, "inner": inner}
        )
        sizes.append(saved(compiled, x, scale, *weights))
    wide, narrow = ((2, TOKENS, INNER), (2 * TOKENS, INNER)), ((2, TOKENS, WIDTH), (12, WIDTH))
    count = lambda shapes, of: sum(shape in of for shape in shapes)  # noqa: E731
    without, with_ = sizes
    assert (count(without, wide), count(with_, wide)) == (3, 2)
    assert (count(without, narrow), count(with_, narrow)) == (1, 0)


# -- refuses ---------------------------------------------------------------------------------------


def test_refuses_what_autocast_copies(x, weights):
    def fn(x, scale, weight):
        with torch.autocast(DEVICE, torch.bfloat16):
            return F.linear(torchtune(x, scale), weight)

    scale = torch.ones(WIDTH, device=DEVICE, requires_grad=True)
    (report,) = capture(fn, x, scale, weights[0]).reports
    assert report.counts == {}
    assert_expected_inline(
        reasons(report), """what is saved is a copy of it, which autocast makes"""
    )


def test_refuses_a_graph_in_an_eager_checkpoint(x, weights):
    torch._dynamo.reset()
    liger_fx.clear_reports()
    compiled = torch.compile(swiglu, backend="liger_fx", options=BOTH | {"inner": "aot_eager"})
    checkpoint(compiled, x, *weights, use_reentrant=False).sum().backward()
    (report, *_) = liger_fx.reports()
    assert report.counts == {}
    assert_expected_inline(
        next(r.reason for r in report.rejections if r.rewrite == NAMES[1]),
        """the activation checkpoint around this graph saves nothing of it""",
    )


# -- leaves alone ----------------------------------------------------------------------------------


def alone(fn, *args):
    (report,) = capture(fn, *args).reports
    return not report.counts and not report.rejections


def test_leaves_checkpoints(x, weights):
    assert alone(lambda *t: checkpoint(swiglu, *t, use_reentrant=False), x, *weights)


def test_leaves_what_frozen_weights_read(x, weights):
    gate, up, down = weights
    assert alone(swiglu, x, gate, up, down.detach())
    assert alone(matmul, x, gate, up, down.detach())


def test_leaves_inputs_without_gradient(x, weights):
    """Gate and up would be kept for it alone."""
    gate, up, down = weights
    assert alone(swiglu, x.detach(), gate.detach(), up.detach(), down)


def test_leaves_values_that_others_read(x, weights):
    def residual(x, gate, up, down):
        active = F.silu(F.linear(x, gate)) * F.linear(x, up)
        return F.linear(active, down), active.sin()

    def returned(x, gate, up, down):
        active = F.silu(F.linear(x, gate)) * F.linear(x, up)
        return F.linear(active, down), active

    assert alone(residual, x, *weights) and alone(returned, x, *weights)
    scale = torch.ones(WIDTH, device=DEVICE, requires_grad=True)
    assert alone(lambda x, s: layer_norm(x, s).view(2, TOKENS, 4, 4).sin(), x, scale)


def test_leaves_an_activation_whose_input_is_written_to(x, weights):
    def fn(x, gate, up, down):
        gated, upped = F.linear(x, gate), F.linear(x, up)
        active = F.silu(gated) * upped
        upped.mul_(2)
        return F.linear(active, down) + upped.sum()

    assert not capture(fn, x, *weights).reports[0].counts


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_numerics(inner, dtype):
    """Of a layer with all that it has: writes, dropout, a norm of heads, an escape."""

    def layer(x, scale, gate, up, down):
        hidden = x + swiglu(huggingface(x, scale), gate, up, down)
        hidden.add_(1)
        normed = torchtune(hidden, scale)
        return hidden + geglu(normed, gate, up, down) + gelu(gemma(hidden, scale), gate, up, down)

    made = [torch.randn(2, TOKENS, WIDTH), torch.ones(WIDTH), *map(torch.randn, (INNER, INNER))]
    made[2:] = [torch.randn(INNER, WIDTH), torch.randn(INNER, WIDTH), torch.randn(WIDTH, INNER)]
    made[2:] = [w / w.shape[1] ** 0.5 for w in made[2:]]
    tensors = [t.to(DEVICE, dtype).requires_grad_() for t in made]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="liger_fx", options=BOTH | {"inner": inner})
    results = [
        gradients(lambda *t, fn=fn: fn(*t).sin().sum(), *given)
        for fn, given in ((compiled, tensors), (layer, tensors), (layer, exact))
    ]
    assert liger_fx.reports()[-1].counts == {"recompute_norm": 3, "recompute_activation": 3}
    for found, eager, wanted in zip(*results, strict=True):
        limit = max(TOLERANCES[dtype], 1.5 * relative_error(eager, wanted))
        assert relative_error(found, wanted) <= limit


def test_two_backwards_and_two_forwards(x, weights):
    torch._dynamo.reset()
    compiled = torch.compile(swiglu, backend="liger_fx", options=BOTH | {"inner": "aot_eager"})
    first, second = compiled(x, *weights), compiled(x * 2, *weights)
    wanted = [torch.autograd.grad(swiglu(t, *weights).sum(), weights) for t in (x, x * 2)]
    for _ in range(2):
        for made, expected in zip((second, first), wanted[::-1], strict=True):
            found = torch.autograd.grad(made.sum(), weights, retain_graph=True)
            for f, e in zip(found, expected, strict=True):
                torch.testing.assert_close(f, e)


def test_the_option_enable(x, weights):
    """Beside what the policy makes."""
    torch._dynamo.reset()
    options = {"enable": ["recompute_activation"], "inner": "aot_eager", "policy": ["swiglu"]}
    compiled = torch.compile(
        lambda x, *w: gelu(swiglu(x, *w), *w), backend="liger_fx", options=options
    )
    compiled(x, *weights).sum().backward()
    report = liger_fx.reports()[-1]
    assert report.counts == {"swiglu": 1, "recompute_activation": 1}
    (made,) = (r for r in report.replacements if r.rewrite == "recompute_activation")
    assert made.worth == "enabled by option"


def test_caches_tell_a_checkpoint_from_none(x, weights):
    """AOTAutograd's cache: the graph with a checkpoint is another one than that without."""
    with mock.patch.object(torch._functorch.config, "enable_autograd_cache", True):
        for policy, kept in (([], 3), (list(NAMES), 2)):
            torch._dynamo.reset()
            compiled = torch.compile(swiglu, backend="liger_fx", options={"policy": policy})
            shapes = saved(compiled, x, *weights)
            assert sum(INNER in shape for shape in shapes) == kept


def test_modules_keep_their_names_in_the_report(x):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH, device=DEVICE)
            self.up = nn.Linear(WIDTH, INNER, device=DEVICE)

        def forward(self, x):
            return self.up(self.norm(x))

    torch._dynamo.reset()
    torch.compile(Layer(), backend="liger_fx", options=BOTH | {"inner": "eager"})(x)
    (made,) = liger_fx.reports()[-1].replacements
    assert made.place.module == "norm"
