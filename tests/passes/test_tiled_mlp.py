"""The rewrite ``tiled_mlp``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _op_checks import no_compile_caches
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
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint
from torchtune.models.llama3 import llama3
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

import liger_fx
from liger_fx.ops.tokens import _indices

capture = only(tiled_mlp)
B, S, H, M = 2, 5, 16, 24  # batch, sequence, hidden, intermediate
SHAPES = [(B, S, H), (M, H), (M, H), (H, M)]


@pytest.fixture
def inputs():
    """x and the weights of gate, up and down."""
    return [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in SHAPES]


# -- as each library writes it ---------------------------------------------------------------------


def torchtune(x, w1, w3, w2):
    h = F.silu(F.linear(x, w1), inplace=False)
    h = h * F.linear(x, w3)
    return F.linear(h, w2)


def huggingface(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def up_first(x, gate, up, down):
    return F.linear(F.linear(x, up, None) * F.silu(F.linear(x, gate, None)), down, None)


def flat(x, gate, up, down):
    """Over [tokens, hidden] under names that others' code has."""
    rows = x.reshape(-1, x.shape[-1])
    out = F.linear(input=torch.mul(F.silu(F.linear(rows, gate)), F.linear(rows, up)), weight=down)
    return out.view(x.shape)


def gemma(x, gate, up, down):
    return F.linear(F.gelu(F.linear(x, gate), approximate="tanh") * F.linear(x, up), down)


def t5(x, gate, up, down):
    return F.linear(F.gelu(F.linear(x, gate)) * F.linear(x, up), down)


def phi3(x, gate, up, down):
    """Gate and up are one weight, [2 I, H]."""
    gate, up = F.linear(x, torch.cat((gate, up))).chunk(2, dim=-1)
    return F.linear(up * F.silu(gate), down)


def gemma_in_one(x, gate, up, down):
    gate, up = F.linear(x, torch.cat((gate, up))).chunk(2, dim=-1)
    return F.linear(F.gelu(gate, approximate="tanh") * up, down)


def modernbert(x, gate, up, down):
    gate, up = F.linear(x, torch.cat((gate, up))).chunk(2, dim=-1)
    return F.linear(F.gelu(gate) * up, down)


OPS = {
    torchtune: "swiglu_mlp",
    huggingface: "swiglu_mlp",
    up_first: "swiglu_mlp",
    flat: "swiglu_mlp",
    gemma: "geglu_mlp",
    t5: "geglu_exact_mlp",
    phi3: "swiglu_mlp",
    gemma_in_one: "geglu_mlp",
    modernbert: "geglu_exact_mlp",
}
SPELLINGS = list(OPS)


# -- fires -----------------------------------------------------------------------------------------


def ops_of(gm):
    return [str(n.target) for n in gm.graph.nodes if "liger_fx" in str(n.target)]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic, inputs):
    found = capture(spelling, *(t.to(dtype) for t in inputs), dynamic=dynamic)
    (report,) = found.reports
    assert report.counts == {"tiled_mlp": 1}, report
    assert report.rejections == [] and report.near_misses == []
    assert ops_of(found.graphs[0]) == [f"liger_fx.{OPS[spelling]}.default"]


def test_fires_graph(inputs):
    assert_expected_inline(
        show(capture(torchtune, *inputs).graphs[0]),
        """\
def forward(self, L_x_: "f32[2, 5, 16]", L_w1_: "f32[24, 16]", L_w3_: "f32[24, 16]", L_w2_: "f32[16, 24]"):
    l_x_ = L_x_
    l_w1_ = L_w1_
    l_w3_ = L_w3_
    l_w2_ = L_w2_
    swiglu_mlp_default: "f32[2, 5, 16]" = torch.ops.liger_fx.swiglu_mlp.default(l_x_, l_w1_, l_w3_, l_w2_, 0, False)
    return (swiglu_mlp_default,)""",
    )


def test_fires_graph_geglu(inputs):
    assert_expected_inline(
        show(capture(gemma, *inputs).graphs[0]),
        """\
def forward(self, L_x_: "f32[2, 5, 16]", L_gate_: "f32[24, 16]", L_up_: "f32[24, 16]", L_down_: "f32[16, 24]"):
    l_x_ = L_x_
    l_gate_ = L_gate_
    l_up_ = L_up_
    l_down_ = L_down_
    geglu_mlp_default: "f32[2, 5, 16]" = torch.ops.liger_fx.geglu_mlp.default(l_x_, l_gate_, l_up_, l_down_, 0, False)
    return (geglu_mlp_default,)""",
    )


def test_autocast_casts_what_it_would_have_cast(inputs):
    def mlp(*tensors):
        with torch.autocast(DEVICE, torch.bfloat16):
            return huggingface(*tensors)

    found = capture(mlp, *inputs)
    assert_expected_inline(
        show(found.graphs[0]).replace(DEVICE, "cpu"),
        """\
def forward(self, L_tensors_0_: "f32[2, 5, 16]", L_tensors_1_: "f32[24, 16]", L_tensors_2_: "f32[24, 16]", L_tensors_3_: "f32[16, 24]"):
    l_tensors_0_ = L_tensors_0_
    l_tensors_1_ = L_tensors_1_
    l_tensors_2_ = L_tensors_2_
    l_tensors_3_ = L_tensors_3_
    _enter_autocast = torch.amp.autocast_mode._enter_autocast('cpu', torch.bfloat16, True, None)
    to: "bf16[2, 5, 16]" = l_tensors_0_.to(torch.bfloat16)
    to_1: "bf16[24, 16]" = l_tensors_1_.to(torch.bfloat16)
    to_2: "bf16[24, 16]" = l_tensors_2_.to(torch.bfloat16)
    to_3: "bf16[16, 24]" = l_tensors_3_.to(torch.bfloat16)
    swiglu_mlp_default: "bf16[2, 5, 16]" = torch.ops.liger_fx.swiglu_mlp.default(to, to_1, to_2, to_3, 0, False)
    _exit_autocast = torch.amp.autocast_mode._exit_autocast(_enter_autocast)
    return (swiglu_mlp_default,)""",
    )
    assert relative_error(found.value, mlp(*inputs)) < TOLERANCES[torch.bfloat16]


def test_one_projection_is_not_copied(inputs):
    x, gate, up, down = inputs

    def mlp(x, both, down):
        gate, up = F.linear(x, both).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    assert_expected_inline(
        show(capture(mlp, x, torch.cat((gate, up)), down).graphs[0]),
        """\
def forward(self, L_x_: "f32[2, 5, 16]", L_both_: "f32[48, 16]", L_down_: "f32[16, 24]"):
    l_x_ = L_x_
    l_both_ = L_both_
    l_down_ = L_down_
    chunk_1 = l_both_.chunk(2)
    getitem_2: "f32[24, 16]" = chunk_1[0]
    getitem_3: "f32[24, 16]" = chunk_1[1]
    swiglu_mlp_default: "f32[2, 5, 16]" = torch.ops.liger_fx.swiglu_mlp.default(l_x_, getitem_2, getitem_3, l_down_, 0, False)
    return (swiglu_mlp_default,)""",
    )


def test_autocast_casts_one_projection(inputs):
    def mlp(*tensors):
        with torch.autocast(DEVICE, torch.bfloat16):
            return phi3(*tensors)

    found = capture(mlp, *inputs)
    assert found.reports[0].counts == {"tiled_mlp": 1} and found.value.dtype == torch.bfloat16
    assert relative_error(found.value, mlp(*inputs)) < TOLERANCES[torch.bfloat16]


def test_an_mlp_that_takes_the_residual_as_well(inputs):
    def layer(x, *weights):
        return x + huggingface(x, *weights)

    found = capture(layer, *inputs)
    assert found.reports[0].counts == {"tiled_mlp": 1}
    assert relative_error(found.value, layer(*inputs)) < TOLERANCES[torch.float32]


def test_one_weight_for_gate_and_up(inputs):
    x, gate, _, down = inputs
    found = capture(lambda *t: huggingface(t[0], t[1], t[1], t[2]), x, gate, down)
    assert found.reports[0].counts == {"tiled_mlp": 1}


def test_another_width_than_that_of_the_input(inputs):
    found = capture(huggingface, *inputs[:3], torch.randn(7, M, device=DEVICE))
    assert found.reports[0].counts == {"tiled_mlp": 1}
    assert found.value.shape == (B, S, 7)


def test_it_is_made_before_swiglu_and_geglu(inputs):
    for spelling in (torchtune, gemma):
        (report,) = only(*DEFAULT)(spelling, *inputs).reports
        assert report.counts == {"tiled_mlp": 1}


def test_tile_tokens_reach_the_op(inputs):
    options = {"policy": ["tiled_mlp"], "inner": "eager", "tiled_mlp.tile_tokens": 3}
    compiled = torch.compile(huggingface, backend="liger_fx", options=options)
    with mock.patch("liger_fx.ops.tiled_mlp._tile_size", return_value=3) as size:
        compiled(*inputs)
    assert size.call_args.args[-1] == 3


@pytest.mark.parametrize("skip_padding", [False, True])
def test_skip_padding_reaches_the_op(skip_padding, inputs):
    options = {"policy": ["tiled_mlp"], "inner": "eager", "tiled_mlp.skip_padding": skip_padding}
    compiled = torch.compile(huggingface, backend="liger_fx", options=options)
    with mock.patch("liger_fx.ops.tiled_mlp.tokens_with_gradient", return_value=None) as look:
        compiled(*inputs).sum().backward()
    assert look.call_count == skip_padding


def test_padding_is_not_skipped_unless_asked_for(inputs):
    """An inf in a token without a gradient: the weight gradients are nan, as in eager."""
    x, *weights = inputs
    x = x.detach()
    x[:, -1] = torch.inf

    def loss(mlp):
        return lambda x, *rest: mlp(x, *rest)[:, :-1].sum()

    for skip_padding in (False, True):
        torch._dynamo.reset()
        options = {"policy": ["tiled_mlp"], "inner": "aot_eager"}
        options["tiled_mlp.skip_padding"] = skip_padding
        compiled = torch.compile(huggingface, backend="liger_fx", options=options)
        _, *found = gradients(loss(compiled), x, *weights)
        _, *eager = gradients(loss(huggingface), x, *weights)
        assert all(g.isnan().any() for g in eager)
        assert all(g.isnan().any() != skip_padding for g in found)


# -- inside an activation checkpoint ---------------------------------------------------------------


def in_a_checkpoint(body):
    return lambda *tensors: checkpoint(body, *tensors, use_reentrant=False)


def norm(x):
    return torch.rms_norm(x, (H,), None, 1e-6)


def layer(x, *weights):
    return x + huggingface(norm(x), *weights)


def post_norm(x, *weights):
    """Gemma2's."""
    return x + norm(gemma(norm(x), *weights))


def two_layers(x, *weights):
    return layer(layer(x, *weights), *weights)


def scaled(x, *weights):
    """Of a product the backward needs both factors."""
    return x + huggingface(norm(x), *weights) * x


@pytest.mark.parametrize("body", [huggingface, layer], ids=lambda f: f.__name__)
def test_fires_in_a_checkpoint_where_its_output_is_only_added_and_returned(body, inputs):
    (report,) = capture(in_a_checkpoint(body), *inputs).reports
    assert report.counts == {"tiled_mlp": 1} and report.rejections == []


def test_fires_in_a_checkpoint_where_its_output_is_cast_and_reshaped(inputs):
    def body(x, *weights):
        return x.double().flatten(0, 1) + huggingface(norm(x), *weights).double().flatten(0, 1)

    (report,) = capture(in_a_checkpoint(body), *inputs).reports
    assert report.counts == {"tiled_mlp": 1}


@pytest.mark.parametrize("body", [post_norm, scaled], ids=lambda f: f.__name__)
def test_refuses_in_a_checkpoint_what_the_backward_needs(body, inputs):
    (report,) = capture(in_a_checkpoint(body), *inputs).reports
    assert report.counts == {}
    assert_expected_inline(
        reasons(report),
        """the backward needs the MLP's output: in this checkpoint the op would run once more""",
    )
    assert capture(body, *inputs).reports[0].counts == {"tiled_mlp": 1}


def test_fires_in_the_last_of_two_layers_of_a_checkpoint(inputs):
    (report,) = capture(in_a_checkpoint(two_layers), *inputs).reports
    assert report.counts == {"tiled_mlp": 1} and len(report.rejections) == 1
    assert capture(two_layers, *inputs).reports[0].counts == {"tiled_mlp": 2}


def test_what_is_refused_in_a_checkpoint_is_left_to_geglu(inputs):
    (report,) = only(*DEFAULT)(in_a_checkpoint(post_norm), *inputs).reports
    assert report.counts["geglu"] == 1 and "tiled_mlp" not in report.counts


def calls_in_the_backward(body, tensors):
    options = {"policy": ["tiled_mlp"]}
    compiled = torch.compile(in_a_checkpoint(body), backend="liger_fx", options=options)
    with no_compile_caches():
        _, codes = run_and_get_code(lambda: compiled(*tensors).square().sum().backward())
    assert liger_fx.reports()[-1].counts["tiled_mlp"] == 1
    return [codes[-1].count(f"swiglu_mlp_{which}.default(") for which in ("forward", "backward")]


@pytest.mark.parametrize("body", [huggingface, layer], ids=lambda f: f.__name__)
def test_the_backward_of_a_checkpoint_does_not_run_the_forward_again(body, inputs):
    assert calls_in_the_backward(body, inputs) == [0, 1]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("body", [layer, two_layers, post_norm], ids=lambda f: f.__name__)
def test_gradients_in_a_checkpoint(body, inner, inputs):
    x, *weights = inputs
    tensors = [x, *(w.detach().div(4).requires_grad_() for w in weights)]
    options = {"policy": "all", "inner": inner}
    compiled = torch.compile(in_a_checkpoint(body), backend="liger_fx", options=options)
    actual = gradients(lambda *t: compiled(*t).sin().sum(), *tensors)
    expected = gradients(lambda *t: body(*t).sin().sum(), *tensors)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def with_biases(x, gate, up, down):
    def linear(x, weight):
        return F.linear(x, weight, weight[:, 0])

    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def test_refuses_biases(inputs):
    assert_expected_inline(
        refusal(with_biases, *inputs), """the projections have biases; the op has none"""
    )


def test_refuses_weights_of_one_dimension(inputs):
    assert_expected_inline(
        refusal(huggingface, *inputs[:3], torch.randn(M, device=DEVICE)),
        """a projection's weight is not 2-D""",
    )


def test_refuses_a_product_that_broadcasts(inputs):
    x, gate, up, down = inputs
    assert_expected_inline(
        refusal(huggingface, x, gate, up[:1], down),
        """the product broadcasts [24, 16] and [1, 16]""",
    )


def test_refuses_gate_and_up_of_an_odd_number(inputs):
    """Two rows and one: the product broadcasts."""

    def mlp(x, both, down):
        gate, up = F.linear(x, both).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    x, gate, _, down = inputs
    assert_expected_inline(
        refusal(mlp, x, gate[:3], down[:, :2]),
        """the weight of gate and up is [3, 16]: it has no halves""",
    )


def test_refuses_double_precision(inputs):
    assert_expected_inline(
        refusal(huggingface, *(t.double() for t in inputs)),
        """the output is torch.float64; the kernel computes in float32""",
    )


def test_refuses_projections_of_two_dtypes(inputs):
    def mlp(x, gate, up, down):
        """Autocast around one of them."""
        product = F.silu(F.linear(x, gate)) * F.linear(x, up)
        with torch.autocast(DEVICE, torch.bfloat16):
            return F.linear(product, down)

    assert_expected_inline(
        refusal(mlp, *inputs),
        """the projections run in torch.bfloat16 and torch.float32; the op takes one""",
    )


def test_refuses_gates_that_no_block_holds():
    weights = [torch.empty(65537, 2), torch.empty(65537, 2), torch.empty(2, 65537)]
    tensors = [t.to("meta") for t in (torch.empty(3, 2), *weights)]
    assert_expected_inline(
        refusal(huggingface, *tensors),
        """gates have 65537 elements; the kernel takes at most 65536""",
    )


@pytest.mark.parametrize("escaping", ["gate", "active", "up", "product"])
def test_refuses_what_escapes(escaping, inputs):
    def mlp(x, w_gate, w_up, w_down):
        gate, up = F.linear(x, w_gate), F.linear(x, w_up)
        active = F.silu(gate)
        product = active * up
        seen = dict(gate=gate, active=active, up=up, product=product)
        return F.linear(product, w_down), seen[escaping]

    assert "is also returned" in refusal(mlp, *inputs)


def test_refuses_a_product_that_is_used_twice(inputs):
    """Two heads over one product."""

    def mlp(x, gate, up, down):
        product = F.silu(F.linear(x, gate)) * F.linear(x, up)
        return F.linear(product, down), F.linear(product, down * 2)

    assert "is also used by `linear`" in refusal(mlp, *inputs)


def test_refuses_an_input_that_is_written_in_place(inputs):
    def mlp(x, gate, up, down):
        x = x + 1
        gate = F.silu(F.linear(x, gate))
        x.mul_(2)
        return F.linear(gate * F.linear(x, up), down)

    assert_expected_inline(
        refusal(mlp, *inputs), """x is written in place by `mul_` (mul_) before `linear`"""
    )


# -- leaves alone ----------------------------------------------------------------------------------


def sums(x, gate, up, down):
    """Of two projections each, neither of which is an adapter of low rank."""

    def linear(x, weight):
        return F.linear(x, weight) + F.linear(x, weight * 2)

    return linear(F.silu(linear(x, gate)) * linear(x, up), down)


def up_in_front(x, gate, up, down):
    up, gate = F.linear(x, torch.cat((up, gate))).chunk(2, dim=-1)
    return F.linear(up * F.silu(gate), down)


def two_inputs(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x.tanh(), up), down)


def dropout_in_between(x, gate, up, down):
    product = F.silu(F.linear(x, gate)) * F.linear(x, up)
    return F.linear(F.dropout(product, 0.5), down)


@pytest.mark.parametrize(
    ("fn", "found"),
    [
        (
            sums,
            "7 of 7: wanted linear, found `l_x_`, an input of this graph: what computes it was "
            "traced elsewhere, or runs eagerly",
        ),
        (up_in_front, "6 of 9: wanted 0, found 1"),
        (two_inputs, "5 of 5: wanted the same x as before, found `tanh` (tanh)"),
    ],
)
def test_leaves_and_says_how_near_it_was(fn, found, inputs):
    (report,) = capture(fn, *inputs).reports
    assert report.counts == {} and report.rejections == []
    (miss,) = report.near_misses
    assert f"{miss.matched} of {miss.total}: {miss.reason}" == found


def without_a_gate(x, gate, up, down):
    return F.linear(F.relu(F.linear(x, up)), down)


def sigmoid_gate(x, gate, up, down):
    return F.linear(torch.sigmoid(F.linear(x, gate)) * F.linear(x, up), down)


@pytest.mark.parametrize("fn", [without_a_gate, sigmoid_gate, dropout_in_between])
def test_leaves_and_says_nothing(fn, inputs):
    (report,) = capture(fn, *inputs).reports
    assert report.counts == {} and report.rejections == [] and report.near_misses == []


# -- numerics --------------------------------------------------------------------------------------

LARGE = [(8, 37, 64), (96, 64), (96, 64), (64, 96)]


def smaller_weights(spelling):
    """Of random inputs the products would be too large for fp16."""
    return lambda x, *weights: spelling(x, *(w / 8 for w in weights))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile_tokens", ["0", "64"])
def test_numerics(spelling, dtype, tile_tokens, monkeypatch):
    monkeypatch.setenv("LIGER_FX_TILED_MLP_TILE_TOKENS", tile_tokens)
    fn = smaller_weights(spelling)
    no_worse_than_eager(fn, fn, LARGE, "tiled_mlp", dtype)


@pytest.mark.parametrize("spelling", [huggingface, gemma, phi3])
def test_numerics_under_inductor(spelling):
    fn = smaller_weights(spelling)
    no_worse_than_eager(fn, fn, LARGE, "tiled_mlp", torch.bfloat16, "inductor")


def test_a_padded_step_computes_its_tokens_only():
    """The head drops ignored labels, and each layer's backward leaves out the padding."""
    model = llama3(
        vocab_size=64,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        embed_dim=32,
        max_seq_len=16,
        intermediate_dim=48,
    ).to(DEVICE)
    tokens = torch.randint(64, (3, 16), device=DEVICE)
    labels = tokens.clone()
    labels[:, :2] = labels[0, 9:] = labels[1, 3:] = -100  # prompts and padding
    set_activation_checkpointing(model, {TransformerSelfAttentionLayer})

    def step(tokens, labels):
        return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())

    def gradients_of(fn):
        loss = fn(tokens, labels)
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    with mock.patch("liger_fx.ops.tokens._indices", wraps=_indices) as spy:
        options = {"policy": "all", "inner": "aot_eager", "require": "tiled_mlp"}
        options |= {"tiled_mlp.skip_padding": True}
        got = gradients_of(torch.compile(step, backend="liger_fx", fullgraph=True, options=options))
    # Those of all labels and of each layer, from the last; what is left of 48 tokens.
    masks = [int(call.args[0].sum()) for call in spy.call_args_list]
    assert masks == [22, 22, 28, 28]
    for g, e in zip(got, gradients_of(step), strict=True):
        assert relative_error(g, e) < 1e-5
