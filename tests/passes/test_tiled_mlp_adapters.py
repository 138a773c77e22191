"""The rewrite ``tiled_mlp`` of MLPs with LoRA adapters: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _util import (
    DEVICE,
    TOLERANCES,
    gradients,
    no_worse_than_eager,
    only,
    reasons,
    relative_error,
    show,
)
from expecttest import assert_expected_inline
from liger_fx.passes import DEFAULT, tiled_mlp
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import FeedForward
from torchtune.modules.peft import DoRALinear, LoRALinear

import liger_fx
from liger_fx.ops.matmul import accumulate_mm

capture = only(tiled_mlp)
B, S, H, M, R = 2, 5, 16, 24, 4  # batch, sequence, hidden, intermediate, rank
WEIGHTS = [(M, H), (M, H), (H, M)]
ADAPTERS = [(R, H), (M, R), (R, H), (M, R), (R, M), (H, R)]
SHAPES = [(B, S, H), *WEIGHTS, *ADAPTERS]
ALL = ("gate", "up", "down")
SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations(ALL, n)]


@pytest.fixture
def inputs():
    """x, the weights of gate, up and down, and a and b of each."""
    made = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    return [made[0].requires_grad_(), *((t / t.shape[1] ** 0.5).requires_grad_() for t in made[1:])]


# -- as each library writes it ---------------------------------------------------------------------


def torchtune(x, w, a, b):
    out = F.linear(x, w, None)
    lora_out = F.linear(x, a)
    lora_out = 2.0 * F.linear(lora_out, b)
    return out + lora_out


def peft(x, w, a, b):
    result = F.linear(x, w)
    dtype = result.dtype
    result = result + F.linear(F.linear(x.to(a.dtype), a), b) * 0.3
    return result.to(dtype)


def unscaled(x, w, a, b):
    return F.linear(F.linear(x, a), b) + F.linear(x, w)


def whole_number(x, w, a, b):
    return F.linear(F.linear(x, a), b).mul(3).add(F.linear(x, w))


def plain(x, w, a, b):
    return F.linear(x, w)


PROJECTIONS = [torchtune, peft, unscaled, whole_number]


def mlp(project, names=ALL, activation=F.silu, other=plain):
    """The projections of these names by ``project``, the rest by ``other``."""

    def function(x, gate, up, down, *factors):
        weights = dict(zip(ALL, (gate, up, down), strict=True))
        pairs = dict(zip(ALL, zip(factors[::2], factors[1::2], strict=True), strict=True))

        def projection(x, name):
            return (project if name in names else other)(x, weights[name], *pairs[name])

        return projection(activation(projection(x, "gate")) * projection(x, "up"), "down")

    return function


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


# -- fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_fires_once_on_every_spelling(project, names, dynamic, inputs):
    found = capture(mlp(project, names), *inputs, dynamic=dynamic)
    (report,) = found.reports
    assert report.counts == {"tiled_mlp": 1}, report
    assert report.rejections == [] and report.near_misses == []
    assert not {"linear", "add"} & {getattr(n.target, "__name__", "") for n in nodes(found)}
    assert relative_error(found.value, mlp(project, names)(*inputs)) < 1e-6


def nodes(found):
    return list(found.graphs[0].graph.nodes)


@pytest.mark.parametrize("activation", [gelu_tanh, F.gelu])
def test_fires_on_other_activations(activation, inputs):
    (report,) = capture(mlp(torchtune, activation=activation), *inputs).reports
    assert report.counts == {"tiled_mlp": 1}


def test_fires_graph(inputs):
    assert_expected_inline(
        show(capture(mlp(torchtune, ("gate", "down")), *inputs).graphs[0]),
        """\
def forward(self, L_factors_0_: "f32[4, 16]", L_x_: "f32[2, 5, 16]", L_gate_: "f32[24, 16]", L_factors_1_: "f32[24, 4]", L_up_: "f32[24, 16]", L_down_: "f32[16, 24]", L_factors_4_: "f32[4, 24]", L_factors_5_: "f32[16, 4]"):
    l_factors_0_ = L_factors_0_
    l_x_ = L_x_
    l_gate_ = L_gate_
    l_factors_1_ = L_factors_1_
    l_up_ = L_up_
    l_down_ = L_down_
    l_factors_4_ = L_factors_4_
    l_factors_5_ = L_factors_5_
    swiglu_mlp_default: "f32[2, 5, 16]" = torch.ops.liger_fx.swiglu_mlp.default(l_x_, l_gate_, l_up_, l_down_, 0, False, a_gate = l_factors_0_, b_gate = l_factors_1_, scale_gate = 2.0, a_down = l_factors_4_, b_down = l_factors_5_, scale_down = 2.0)
    return (swiglu_mlp_default,)""",
    )


def test_fires_graph_of_wide_adapters(inputs):
    """PEFT's, in fp32 beside a base in bf16: no cast is left."""
    narrow = [t.detach().bfloat16() for t in inputs[:4]]
    found = capture(mlp(peft, ("up",)), *narrow, *inputs[4:])
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_x_: "bf16[2, 5, 16]", L_gate_: "bf16[24, 16]", L_up_: "bf16[24, 16]", L_factors_2_: "f32[4, 16]", L_factors_3_: "f32[24, 4]", L_down_: "bf16[16, 24]"):
    l_x_ = L_x_
    l_gate_ = L_gate_
    l_up_ = L_up_
    l_factors_2_ = L_factors_2_
    l_factors_3_ = L_factors_3_
    l_down_ = L_down_
    swiglu_mlp_default: "bf16[2, 5, 16]" = torch.ops.liger_fx.swiglu_mlp.default(l_x_, l_gate_, l_up_, l_down_, 0, False, a_up = l_factors_2_, b_up = l_factors_3_, scale_up = 0.3)
    return (swiglu_mlp_default,)""",
    )
    expected = mlp(peft, ("up",))(*narrow, *inputs[4:])
    assert relative_error(found.value, expected) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_casts_what_it_would_have_cast(base, inputs):
    def cast(*tensors):
        with torch.autocast(DEVICE, torch.bfloat16):
            return mlp(peft)(*tensors)

    tensors = [*(t.detach().to(base) for t in inputs[:4]), *inputs[4:]]
    found = capture(cast, *tensors)
    assert found.reports[0].counts == {"tiled_mlp": 1} and found.value.dtype == torch.bfloat16
    (op,) = (n for n in nodes(found) if "swiglu_mlp" in str(n.target))
    dtypes = {n.meta["example_value"].dtype for n in op.all_input_nodes}
    assert dtypes == {torch.bfloat16}
    assert relative_error(found.value, cast(*tensors)) < TOLERANCES[torch.bfloat16]


def test_an_adapter_on_down_of_gate_and_up_in_one(inputs):
    x, gate, up, down, *_, a, b = inputs

    def phi3(x, both, down, a, b):
        gate, up = F.linear(x, both).chunk(2, dim=-1)
        return torchtune(up * F.silu(gate), down, a, b)

    (report,) = capture(phi3, x, torch.cat((gate, up)), down, a, b).reports
    assert report.counts == {"tiled_mlp": 1}


def test_an_mlp_whose_input_is_a_cast(inputs):
    """The adapter reads the cast as well, and not what is below it."""
    x, *rest = inputs
    fn = lambda x, *rest: mlp(peft)(x.float(), *rest)  # noqa: E731
    assert capture(fn, x.detach().bfloat16(), *rest).reports[0].counts == {"tiled_mlp": 1}


def test_it_is_made_before_swiglu_and_geglu(inputs):
    for activation in (F.silu, gelu_tanh):
        (report,) = only(*DEFAULT)(mlp(torchtune, activation=activation), *inputs).reports
        assert report.counts == {"tiled_mlp": 1}


# -- the libraries' own modules --------------------------------------------------------------------


def feed_forward(linear, **options):
    sizes = dict(gate_proj=(H, M), up_proj=(H, M), down_proj=(M, H))
    made = {name: linear(*size, rank=R, alpha=8, **options) for name, size in sizes.items()}
    return randomly(FeedForward(**made)).to(DEVICE)


def randomly(module):
    """b as well, which starts as zeros."""
    for name, parameter in module.named_parameters():
        if "lora_" in name.lower():
            nn.init.normal_(parameter, std=0.3)
    return module


def llama_mlp(dtype=torch.float32, targets=("gate_proj", "up_proj", "down_proj"), **options):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=H,
        intermediate_size=M,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=8,
    )
    net = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    settings = peft.LoraConfig(r=R, lora_alpha=8, target_modules=list(targets), **options)
    # It wants a newer torchao than torchtune, or none.
    with mock.patch("peft.tuners.lora.torchao.is_torchao_available", return_value=False):
        net = peft.get_peft_model(net, settings)
    return randomly(net.base_model.model.model.layers[0].mlp).to(DEVICE)


def same_as_eager(module, x, **options):
    """Value and gradients, of what is trained alone."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    settings = {"policy": ["tiled_mlp"], "inner": "aot_eager", "require": "tiled_mlp"}
    compiled = torch.compile(module, backend="liger_fx", fullgraph=True, options=settings)

    def run(function):
        value = function(x)
        upstream = torch.linspace(-1, 1, value.numel(), device=x.device).view_as(value)
        return value, *torch.autograd.grad((value * upstream).sum(), [x, *parameters])

    for actual, expected in zip(run(compiled), run(module), strict=True):
        assert actual.dtype == expected.dtype
        assert relative_error(actual, expected) < 4 * TOLERANCES[x.dtype]


def trained_only(module):
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return module


def test_torchtune_module():
    x = torch.randn(B, S, H, device=DEVICE, requires_grad=True)
    same_as_eager(trained_only(feed_forward(LoRALinear)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("gate_proj", "up_proj", "down_proj"), ("down_proj",)])
def test_peft_module(dtype, targets):
    """The adapters are in fp32."""
    module = llama_mlp(dtype, targets)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    same_as_eager(module, torch.randn(B, S, H, device=DEVICE, dtype=dtype, requires_grad=True))


def test_peft_module_under_autocast():
    module = llama_mlp(torch.bfloat16)

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            with torch.autocast(DEVICE, torch.bfloat16):
                return self.module(x)

    x = torch.randn(B, S, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    same_as_eager(Cast(), x)


# -- inside an activation checkpoint ---------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_gradients_in_a_checkpoint(inner, inputs):
    def layer(x, *rest):
        return x + mlp(peft)(torch.rms_norm(x, (H,), None, 1e-6), *rest)

    def body(x, *rest):
        return layer(layer(x, *rest), *rest)

    def loss(*tensors):
        return checkpoint(body, *tensors, use_reentrant=False).sin().sum()

    for frozen in inputs[1:4]:
        frozen.requires_grad_(False)
    options = {"policy": "all", "inner": inner, "require": "tiled_mlp"}
    compiled = torch.compile(loss, backend="liger_fx", options=options)
    actual = gradients(compiled, *inputs)
    assert liger_fx.reports()[-1].counts["tiled_mlp"] == 1  # of the last layer
    for a, e in zip(actual, gradients(loss, *inputs), strict=True):
        assert relative_error(a, e) < 1e-5


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def dropout(x, w, a, b):
    return F.linear(x, w) + 2.0 * F.linear(F.linear(F.dropout(x, 0.1), a), b)


@pytest.mark.parametrize("activation", [F.silu, gelu_tanh, F.gelu])
@pytest.mark.parametrize("other", [plain, torchtune])
@pytest.mark.parametrize("names", [ALL, ("gate",), ("gate", "down")], ids="+".join)
def test_refuses_dropout(names, other, activation, inputs):
    fn = mlp(dropout, names, activation, other)
    assert refusal(fn, *inputs) == "dropout before an adapter; the op has none"


def test_refuses_dropout_of_an_adapter_on_down_alone(inputs):
    assert_expected_inline(
        refusal(mlp(dropout, ("down",)), *inputs),
        """\
dropout before an adapter; the op has none
the value of `mul` (mul) is also used by `dropout` (dropout)""",
    )


def biased(x, w, a, b):
    return F.linear(x, w, w[:, 0]) + 2.0 * F.linear(F.linear(x, a), b)


def biased_adapter(x, w, a, b):
    return F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b, b[:, 0])


@pytest.mark.parametrize("project", [biased, biased_adapter])
@pytest.mark.parametrize("names", [ALL, ("up",)], ids="+".join)
def test_refuses_biases(project, names, inputs):
    fn = mlp(project, names, other=torchtune)
    assert refusal(fn, *inputs) == "the projections have biases; the op has none"


def test_refuses_dora():
    x = torch.randn(B, S, H, device=DEVICE)
    assert_expected_inline(
        refusal(feed_forward(DoRALinear), x),
        """DoRA scales each row of the sum; the op has no such scale""",
    )


def test_refuses_quantised_weights():
    sizes = dict(gate_proj=(128, 256), up_proj=(128, 256), down_proj=(256, 128))
    made = {
        name: LoRALinear(*size, rank=R, alpha=8, quantize_base=True) for name, size in sizes.items()
    }
    assert_expected_inline(
        refusal(FeedForward(**made).to(DEVICE), torch.randn(3, 128, device=DEVICE)),
        """what an adapter is added to is no plain projection (quantised weights?)""",
    )


def two_adapters(x, w, a, b):
    return torchtune(x, w, a, b) + 0.5 * F.linear(F.linear(x, a.sin()), b.cos())


def test_refuses_two_adapters(inputs):
    said = refusal(mlp(two_adapters, ("gate",)), *inputs)
    assert said == "what an adapter is added to is no plain projection (quantised weights?)"


def test_refuses_an_adapter_on_gate_and_up_in_one(inputs):
    x, gate, up, down, a, b, *_ = inputs

    def phi3(x, both, down, a, b):
        gate, up = torchtune(x, both, a, torch.cat((b, b))).chunk(2, dim=-1)
        return F.linear(up * F.silu(gate), down)

    assert_expected_inline(
        refusal(phi3, x, torch.cat((gate, up)), down, a, b),
        """the adapter of gate and up is one; the op takes one for each""",
    )


def test_refuses_narrow_adapters(inputs):
    narrow = [t.detach().bfloat16() for t in inputs[4:]]
    assert_expected_inline(
        refusal(mlp(peft, ("up",)), *inputs[:4], *narrow),
        """the adapter of up runs in torch.bfloat16, its projection in torch.float32; the op takes one dtype that holds the other's numbers""",
    )


def test_refuses_adapters_in_double_precision(inputs):
    wide = [t.detach().double() for t in inputs[4:]]
    assert_expected_inline(
        refusal(mlp(peft, ("up",)), *inputs[:4], *wide),
        """the adapter of up runs in torch.float64; the kernel computes in float32""",
    )


def test_refuses_an_input_that_is_rounded_for_the_adapter(inputs):
    def rounded(x, w, a, b):
        return F.linear(x, w) + F.linear(F.linear(x.half().float(), a), b)

    assert_expected_inline(
        refusal(mlp(rounded, ("up",)), *inputs),
        """the adapter of up reads its input rounded to torch.float16""",
    )


def test_refuses_a_base_under_autocast_and_adapters_outside(inputs):
    """They read x in fp32, which the base reads in bf16."""

    def project(x, w, a, b):
        with torch.autocast(DEVICE, torch.bfloat16):
            base = F.linear(x, w)
        return (base + F.linear(F.linear(x.float(), a), b)).to(base.dtype)

    def base_alone(x, w, a, b):
        with torch.autocast(DEVICE, torch.bfloat16):
            return F.linear(x, w)

    assert_expected_inline(
        refusal(mlp(project, ("gate",), other=base_alone), *inputs),
        """the adapter of gate runs in torch.float32 and reads an input in torch.float32, which its projection reads in torch.bfloat16""",
    )


def test_refuses_a_scale_that_is_computed(inputs):
    def scaled(x, w, a, b):
        return F.linear(x, w) + a.mean() * F.linear(F.linear(x, a), b)

    assert_expected_inline(
        refusal(mlp(scaled, ("gate",)), *inputs),
        """the scale of the adapter of gate is computed, expected a constant""",
    )


def test_refuses_an_adapter_that_is_broadcast(inputs):
    def broadcast(x, w, a, b):
        return F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b[:1])

    assert_expected_inline(
        refusal(mlp(broadcast, ("up",)), *inputs),
        """the factors of the adapter of up are [4, 16] and [1, 4], expected 2-D, with the rows of its weight [24, 16] in the second""",
    )


@pytest.mark.parametrize("escaping", [0, 1, 2, 3], ids=["inner", "product", "scaled", "total"])
@pytest.mark.parametrize("name", ALL)
def test_refuses_what_escapes(name, escaping, inputs):
    def fn(*tensors):
        seen = []

        def leaking(x, w, a, b):
            inner = F.linear(x, a)
            product = F.linear(inner, b)
            scaled = 2.0 * product
            total = F.linear(x, w) + scaled
            seen.extend((inner, product, scaled, total))
            return total

        value = mlp(leaking, (name,), other=torchtune)(*tensors)
        return value, seen[escaping].sin()

    if name == "down" and escaping == 3:  # the output itself
        assert capture(fn, *inputs).reports[0].counts == {"tiled_mlp": 1}
    else:
        assert "is also used by `sin`" in refusal(fn, *inputs)


@pytest.mark.parametrize("written", ["x", "a", "b", "w"])
def test_refuses_what_is_written_in_between(written, inputs):
    def writing(x, w, a, b):
        total = F.linear(x, w) + F.linear(F.linear(x, a), b)
        dict(x=x, w=w, a=a, b=b)[written].mul_(2)
        return total

    def fn(*tensors):
        return mlp(writing, ("up",), other=torchtune)(*(t + 0 for t in tensors))

    with torch.no_grad():
        found = capture(fn, *inputs)
        (report,) = found.reports
        assert report.counts == {} and "is written in place by `mul_`" in reasons(report)
        assert relative_error(found.value, fn(*inputs)) < 1e-6


# -- leaves alone ----------------------------------------------------------------------------------


def other_input(x, w, a, b):
    return F.linear(x, w) + 2.0 * F.linear(F.linear(x.tanh(), a), b)


def activated(x, w, a, b):
    return F.linear(x, w) + 2.0 * F.linear(F.linear(x, a).tanh(), b)


def subtracted(x, w, a, b):
    return F.linear(x, w) - 2.0 * F.linear(F.linear(x, a), b)


def scaled_sum(x, w, a, b):
    return 2.0 * (F.linear(x, w) + F.linear(F.linear(x, a), b))


def rounded_sum(x, w, a, b):
    return (F.linear(x, w) + F.linear(F.linear(x, a), b)).half().float()


@pytest.mark.parametrize("project", [other_input, activated, subtracted, scaled_sum, rounded_sum])
@pytest.mark.parametrize("name", ALL)
def test_leaves_what_is_no_adapter(project, name, inputs):
    (report,) = capture(mlp(project, (name,), other=torchtune), *inputs).reports
    after_the_mlp = name == "down" and project in (scaled_sum, rounded_sum)
    assert report.counts == ({"tiled_mlp": 1} if after_the_mlp else {})


# -- numerics --------------------------------------------------------------------------------------

LARGE = dict(zip(("x", *ALL), [(8, 64, 64), (96, 64), (96, 64), (64, 96)], strict=True))
LARGE_ADAPTERS = dict(gate=[(32, 64), (96, 32)], up=[(32, 64), (96, 32)], down=[(32, 96), (64, 32)])


def wide(x, w, a, b):
    result = F.linear(x, w)
    product = F.linear(F.linear(x.float(), a.float()), b.float())
    return (result + 0.3 * product).to(result.dtype)


def exact(x, w, a, b):
    return F.linear(x, w) + 0.3 * F.linear(F.linear(x, a), b)


def with_small_weights(project, names):
    """Of random inputs the products would be too large for fp16."""

    def function(x, *others):
        weights, factors = others[:3], others[3:]
        pairs = dict(zip(names, zip(factors[::2], factors[1::2], strict=True), strict=True))
        given = [factor for name in ALL for factor in pairs.get(name, (None, None))]
        given = [factor if factor is None else factor / 4 for factor in given]
        return mlp(project, names)(x, *(w / 8 for w in weights), *given)

    return function


def check_numerics(project, names, dtype, inner="aot_eager"):
    shapes = [*LARGE.values(), *(shape for name in names for shape in LARGE_ADAPTERS[name])]
    spelling = with_small_weights(project, names)
    reference = with_small_weights(exact if project is wide else project, names)
    no_worse_than_eager(spelling, reference, shapes, "tiled_mlp", dtype, inner)


@pytest.mark.parametrize("names", [("gate",), ("down",), ALL], ids="+".join)
@pytest.mark.parametrize("project", [torchtune, peft, wide])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile_tokens", ["0", "64"])
def test_numerics(project, names, dtype, tile_tokens, monkeypatch):
    monkeypatch.setenv("LIGER_FX_TILED_MLP_TILE_TOKENS", tile_tokens)
    check_numerics(project, names, dtype)


@pytest.mark.parametrize("project", [torchtune, wide])
def test_numerics_under_inductor(project):
    check_numerics(project, ALL, torch.bfloat16, "inductor")


def test_lengths_that_vary(inputs):
    options = {"policy": ["tiled_mlp"], "inner": "aot_eager", "require": "tiled_mlp"}
    fn = mlp(peft)
    compiled = torch.compile(fn, backend="liger_fx", dynamic=True, fullgraph=True, options=options)
    for length in (7, 3, 1):
        tensors = [torch.randn(2, length, H, device=DEVICE, requires_grad=True), *inputs[1:]]
        actual = gradients(lambda *t: compiled(*t).sin().sum(), *tensors)
        expected = gradients(lambda *t: fn(*t).sin().sum(), *tensors)
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) < 1e-5


def test_a_frozen_weight_costs_no_product(inputs):
    def gradient_products():
        torch._dynamo.reset()
        options = {"policy": ["tiled_mlp"], "inner": "aot_eager", "require": "tiled_mlp"}
        compiled = torch.compile(mlp(torchtune), backend="liger_fx", options=options)
        value = compiled(*inputs).sum()
        with mock.patch("liger_fx.ops.tiled_mlp.accumulate_mm", wraps=accumulate_mm) as products:
            value.backward()
        return [tuple(call.args[0].shape) for call in products.call_args_list]

    assert sorted(gradient_products()) == sorted(WEIGHTS + ADAPTERS)
    for weight in inputs[1:4]:
        weight.requires_grad_(False)
    assert sorted(gradient_products()) == sorted(ADAPTERS)
