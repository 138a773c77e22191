"""The rewrite ``linear_cross_entropy``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from _spellings import (
    SPELLINGS,
    B,
    H,
    S,
    V,
    huggingface_gemma2,
    huggingface_shifted_logits,
    per_token,
    torchtune,
    torchtune_chunked,
    torchtune_per_chunk,
)
from _util import DEVICE, TOLERANCES, aot_compiled, gradients, only, reasons, relative_error, show
from expecttest import assert_expected_inline
from liger_fx.passes import linear_cross_entropy
from torch.utils.checkpoint import checkpoint

import liger_fx
from liger_fx.ops import chunked_head

capture = only(linear_cross_entropy)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_fires_once_on_every_spelling(spelling, dynamic, hidden, weight, labels):
    (report,) = capture(spelling, hidden, weight, labels, dynamic=dynamic).reports
    assert report.counts == {"linear_cross_entropy": 1}, report
    assert report.rejections == [] and report.near_misses == []


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"inner": "eager"}, {"inner": "aot_eager"}])
def test_numerics(spelling, dtype, options, hidden, weight, labels):
    check_numerics(spelling, dtype, options, hidden, weight, labels)


@pytest.mark.parametrize("spelling", [torchtune, torchtune_chunked, huggingface_gemma2, per_token])
def test_numerics_under_inductor(spelling, hidden, weight, labels):
    check_numerics(spelling, torch.float32, None, hidden, weight, labels)


def check_numerics(spelling, dtype, options, hidden, weight, labels):
    h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    exact = (t.detach().double().requires_grad_() for t in (h, w))
    expected = gradients(spelling, *exact, labels)
    eager = gradients(spelling, h, w, labels)
    compiled = torch.compile(spelling, backend="liger_fx", options=options, fullgraph=True)
    actual = gradients(compiled, h, w, labels)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}
    for i, (a, b, e) in enumerate(zip(actual, eager, expected, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        slack = TOLERANCES[dtype] if i == 0 or dtype == torch.float32 else 0.0
        # At this size rounding of the result is most of the error, and the gradients of the sum
        # are rounded once more when 1/n scales them.
        assert relative_error(a, e) <= 1.25 * relative_error(b, e) + slack


def test_fires_graph(hidden, weight, labels):
    found = capture(torchtune, hidden, weight, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    getitem: "i64[2, 5]" = l_y_[(Ellipsis, slice(1, None, None))]
    full: "i64[2, 1]" = torch.full((2, 1), -100)
    y: "i64[2, 6]" = torch.hstack((getitem, full))
    y_1: "i64[12]" = y.reshape(-1)
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(l_h_, l_w_, None, y_1, None, None, None, None, None, ['cross_entropy'], -100, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem_1: "f32[]" = linear_loss_default[0]
    ne: "b8[12]" = y_1 != -100
    sum_1: "i64[]" = ne.sum()
    truediv: "f32[]" = getitem_1 / sum_1
    return (truediv,)""",
    )


def test_softcap_graph(hidden, weight, labels):
    found = capture(huggingface_gemma2, hidden, weight, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    view_1: "i64[12]" = l_y_.view(-1)
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(l_h_, l_w_, None, view_1, None, None, None, None, None, ['cross_entropy'], -100, 0.0, 30.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem: "f32[]" = linear_loss_default[0]
    ne: "b8[12]" = view_1 != -100
    sum_1: "i64[]" = ne.sum()
    truediv_1: "f32[]" = getitem / sum_1
    return (truediv_1,)""",
    )


def test_row_slices_move_to_the_hidden_state(hidden, weight, labels):
    found = capture(huggingface_shifted_logits, hidden, weight, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    getitem_1: "i64[2, 5]" = l_y_[(Ellipsis, slice(1, None, None))]
    contiguous_1: "i64[2, 5]" = getitem_1.contiguous()
    view_1: "i64[10]" = contiguous_1.view(-1)
    getitem_2: "f32[2, 5, 8]" = l_h_[(Ellipsis, slice(None, -1, None), slice(None, None, None))]
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(getitem_2, l_w_, None, view_1, None, None, None, None, None, ['cross_entropy'], -100, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem_3: "f32[]" = linear_loss_default[0]
    ne: "b8[10]" = view_1 != -100
    sum_1: "i64[]" = ne.sum()
    truediv: "f32[]" = getitem_3 / sum_1
    return (truediv,)""",
    )


def test_per_token_graph(hidden, weight, labels):
    found = capture(per_token, hidden, weight, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    view_1: "i64[12]" = l_y_.view(-1)
    linspace: "f32[12]" = torch.linspace(0, 1, 12)
    expand: "f32[12]" = linspace.expand((12,))
    reshape: "f32[12]" = expand.reshape(-1)
    float_2: "f32[12]" = reshape.float()
    stack: "f32[1, 12]" = torch.stack([float_2])
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(l_h_, l_w_, None, view_1, None, None, None, None, stack, ['cross_entropy'], -100, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem: "f32[]" = linear_loss_default[0]
    return (getitem,)""",
    )


def test_report_names_the_place():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output = torch.nn.Linear(H, V, bias=True)
            self.loss = torch.nn.CrossEntropyLoss()

        def forward(self, h, y):
            return self.loss(self.output(h), y)

    model = Model().to(DEVICE)
    h, y = torch.randn(5, H, device=DEVICE), torch.randint(0, V, (5,), device=DEVICE)
    (report,) = capture(model, h, y).reports
    (made,) = report.replacements
    assert made.place.module == "loss"
    assert made.place.source.startswith("test_linear_cross_entropy.py:")
    assert made.place.source.endswith("in forward")


def test_bias_gets_its_gradient(hidden, weight, labels):
    bias = torch.randn(V, device=DEVICE, requires_grad=True)

    def fn(h, w, b, y):
        return F.cross_entropy(F.linear(h, w, b).view(-1, V), y.view(-1))

    expected = gradients(fn, hidden, weight, bias, labels)
    actual = gradients(aot_compiled(fn, fullgraph=True), hidden, weight, bias, labels)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_tied_embedding_gets_both_gradients(labels):
    table = torch.randn(V, H, device=DEVICE, requires_grad=True)

    def fn(table, y):
        tokens = y.clamp_min(0)
        h = torch.tanh(F.embedding(tokens, table))
        return F.cross_entropy(F.linear(h, table).view(-1, V), y.view(-1))

    expected = gradients(fn, table, labels)
    actual = gradients(aot_compiled(fn, fullgraph=True), table, labels)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_weight_may_be_computed_in_the_graph(
    hidden, weight, labels
):  # QAT: a fake-quantised weight
    def fn(h, w, y):
        return F.cross_entropy(F.linear(h, w.round() * 0.5 + w).view(-1, V), y.view(-1))

    (report,) = capture(fn, hidden, weight, labels).reports
    assert report.counts == {"linear_cross_entropy": 1}


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_returned_logits(hidden, weight, labels):  # A42
    def fn(h, w, y):
        logits = F.linear(h, w)
        return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits

    assert_expected_inline(
        refusal(fn, hidden, weight, labels), """the value of `linear` (logits) is also returned"""
    )


def test_refuses_logits_in_a_metric(hidden, weight, labels):
    def fn(h, w, y):
        logits = F.linear(h, w)
        accuracy = (logits.argmax(-1) == y).float().mean()
        return F.cross_entropy(logits.view(-1, V), y.view(-1)), accuracy

    assert_expected_inline(
        refusal(fn, hidden, weight, labels),
        """the value of `linear` (logits) is also used by `argmax` (argmax)""",
    )


def test_refuses_two_cross_entropies(hidden, weight, labels):
    def fn(h, w, y):
        logits = F.linear(h, w).view(-1, V)
        return F.cross_entropy(logits, y.view(-1)) + F.cross_entropy(logits, y.view(-1).roll(1))

    assert_expected_inline(
        refusal(fn, hidden, weight, labels),
        """cross_entropy and cross_entropy are taken of one projection; the op gives one of each""",
    )


def test_refuses_a_lora_head(hidden, weight, labels):  # A21
    a = torch.randn(4, H, device=DEVICE, requires_grad=True)
    b = torch.randn(V, 4, device=DEVICE, requires_grad=True)

    def fn(h, w, a, b, y):
        logits = F.linear(h, w, None) + 2.0 * F.linear(F.linear(h, a), b)
        return F.cross_entropy(logits.float().view(-1, V), y.view(-1))

    assert_expected_inline(
        refusal(fn, hidden, weight, a, b, labels),
        """the logits are a sum (LoRA on the head?), not one projection""",
    )


def test_refuses_probability_targets(hidden, weight):
    def fn(h, w, p):
        return F.cross_entropy(F.linear(h, w).view(-1, V), p)

    p = torch.rand(B * S, V, device=DEVICE)
    assert_expected_inline(
        refusal(fn, hidden, weight, p), """the target is class probabilities, not class indices"""
    )


def test_refuses_double_precision(hidden, weight, labels):
    def fn(h, w, y):
        return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1))

    assert_expected_inline(
        refusal(fn, hidden.double(), weight.double(), labels),
        """the logits are torch.float64; the kernel computes in float32""",
    )

    def upcast(h, w, y):
        return F.cross_entropy(F.linear(h, w).view(-1, V).double(), y.view(-1))

    assert_expected_inline(
        refusal(upcast, hidden, weight, labels),
        """plain is computed in torch.float64; the kernel computes in float32""",
    )


def test_refuses_a_weight_that_is_not_2d(hidden):  # A22
    w = torch.randn(H, device=DEVICE, requires_grad=True)
    y = torch.randint(0, S, (B,), device=DEVICE)

    def fn(h, w, y):
        return F.cross_entropy(F.linear(h, w), y)

    assert_expected_inline(
        refusal(fn, hidden, w, y),
        """the projection's weight is 1-D, expected 2-D [classes, hidden]""",
    )


def test_refuses_where_nothing_would_be_saved(hidden, weight, labels):
    with torch.no_grad():
        assert_expected_inline(
            refusal(torchtune_per_chunk, hidden, weight, labels),
            """no gradient is needed and the logits fit one chunk: nothing would be saved""",
        )


def test_refuses_an_ignore_index_that_is_no_constant(hidden, weight, labels):
    def fn(h, w, y, i):
        return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), ignore_index=i)

    (report,) = capture(fn, hidden, weight, labels.clamp_min(0), 7, dynamic=True).reports
    assert_expected_inline(
        reasons(report), """ignore_index is computed in the graph, expected a constant"""
    )


def test_refuses_a_softcap_that_is_no_constant(hidden, weight, labels):
    def fn(h, w, y, c):
        logits = c * torch.tanh(F.linear(h, w) / c)
        return F.cross_entropy(logits.view(-1, V), y.view(-1))

    cap = torch.tensor(30.0, device=DEVICE)
    assert_expected_inline(
        refusal(fn, hidden, weight, labels, cap),
        """the softcap is computed in the graph or not positive, expected a constant""",
    )


def test_refuses_a_slice_of_unflattened_logits(hidden, weight, labels):
    def fn(h, w, y):
        logits = F.linear(h.view(-1, H), w).view(B, S, V)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, V), y[:, 1:].reshape(-1))

    assert_expected_inline(
        refusal(fn, hidden, weight, labels),
        """logits are reshaped to more than two dimensions and sliced afterwards""",
    )


def test_refuses_classes_in_another_dimension(hidden, weight):
    y = torch.randint(0, S, (B, V), device=DEVICE)

    def fn(h, w, y):
        return F.cross_entropy(F.linear(h, w), y)

    assert_expected_inline(
        refusal(fn, hidden, weight, y),
        """the class dimension of the loss is not the projection's output dimension""",
    )


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh(DEVICE, (2,))
    torch.distributed.destroy_process_group()


def test_refuses_dtensors(mesh):  # A23
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def fn(h, w, y):
        return F.cross_entropy(F.linear(h, w), y)

    h, w = torch.randn(4, H, device=DEVICE), torch.randn(12, H, device=DEVICE)
    y = torch.randint(0, 12, (4,), device=DEVICE)
    h, y = (distribute_tensor(t, mesh, [Replicate()]) for t in (h, y))
    w = distribute_tensor(w, mesh, [Shard(0)]).requires_grad_()
    assert_expected_inline(
        refusal(fn, h, w, y), """hidden is a DTensor; the kernels take plain tensors only"""
    )


def test_refuses_tensor_subclasses(hidden, weight, labels):
    from torch.testing._internal.two_tensor import TwoTensor

    def fn(h, w, y):
        return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1))

    two = TwoTensor(weight.detach(), weight.detach().clone()).requires_grad_()
    assert_expected_inline(
        refusal(fn, hidden, two, labels),
        """weight is a TwoTensor; the kernels take plain tensors only""",
    )


def test_refuses_a_grad_mode_switch_in_between(hidden, weight, labels):
    def fn(h, w, y):
        with torch.no_grad():
            logits = F.linear(h, w).view(-1, V)
        return F.cross_entropy(logits, y.view(-1)) * h.sum()

    assert_expected_inline(
        refusal(fn, hidden, weight, labels), """grad mode is switched in the middle of it"""
    )


def test_refuses_a_hidden_state_written_in_between(hidden, weight, labels):
    def fn(h, w, y):
        h = h * 1.0
        logits = F.linear(h, w).view(-1, V)
        h.mul_(2.0)
        return F.cross_entropy(logits, y.view(-1)) + h.sum() * 0

    with torch.no_grad(), torch.device(DEVICE):
        many = torch.randn(B, 2_000, H)
        y = torch.randint(0, V, (B, 2_000))
    found = capture(fn, many, weight.detach(), y)
    assert_expected_inline(
        reasons(found.reports[0]),
        """h is written in place by `mul_` (mul_) before `cross_entropy`""",
    )


# -- leaves alone ----------------------------------------------------------------------------------


def near_miss(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {} and report.rejections == []
    return "\n".join(m.reason for m in report.near_misses)


def test_leaves_a_loss_without_its_projection(labels):
    logits = torch.randn(B * S, V, device=DEVICE, requires_grad=True)

    def fn(logits, y):
        return F.cross_entropy(logits, y.view(-1))

    assert_expected_inline(
        near_miss(fn, logits, labels),
        """wanted linear, found `l_logits_`, an input of this graph: what computes it was traced elsewhere, or runs eagerly""",
    )


def test_refuses_a_scale_that_is_not_positive(hidden, weight, labels):
    def fn(h, w, y):
        return F.cross_entropy(F.linear(h, w).view(-1, V) * -0.5, y.view(-1))

    assert_expected_inline(
        refusal(fn, hidden, weight, labels),
        """the temperature or scale of the logits is computed or not positive, expected a constant""",
    )


def test_leaves_a_softcap_with_two_constants(hidden, weight, labels):
    def fn(h, w, y):
        return F.cross_entropy(20.0 * torch.tanh(F.linear(h, w).view(-1, V) / 30.0), y.view(-1))

    assert_expected_inline(
        near_miss(fn, hidden, weight, labels), """wanted the same softcap as before, found 20.0"""
    )


def test_a_softcap_of_the_hidden_state_is_not_that_of_the_logits(hidden, weight, labels):  # A27
    def torchtune_gemma2(h, w, y):
        h = torch.tanh(h / 30.0) * 30.0
        return F.cross_entropy(F.linear(h, w).float().view(-1, V), y.view(-1))

    found = capture(torchtune_gemma2, hidden, weight, labels)
    assert found.reports[0].counts == {"linear_cross_entropy": 1}
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    truediv: "f32[2, 6, 8]" = l_h_ / 30.0
    tanh: "f32[2, 6, 8]" = torch.tanh(truediv)
    h: "f32[2, 6, 8]" = tanh * 30.0
    view_1: "i64[12]" = l_y_.view(-1)
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(h, l_w_, None, view_1, None, None, None, None, None, ['cross_entropy'], -100, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem: "f32[]" = linear_loss_default[0]
    ne: "b8[12]" = view_1 != -100
    sum_1: "i64[]" = ne.sum()
    truediv_1: "f32[]" = getitem / sum_1
    return (truediv_1,)""",
    )


def test_leaves_narrowed_logits(hidden, weight, labels):
    def fn(h, w, y):
        return F.cross_entropy(F.linear(h, w).bfloat16().view(-1, V), y.view(-1))

    assert_expected_inline(
        near_miss(fn, hidden, weight, labels), """wanted linear, found `cast` (bfloat16)"""
    )


@pytest.mark.parametrize("of", [slice(None, None, 2), [2, 0, 1]], ids=str)
def test_a_choice_of_classes_is_one_of_the_weight(of, hidden, weight):
    """A slice is; a list of classes is left alone."""

    def fn(h, w, y):
        return F.cross_entropy(F.linear(h, w)[..., of].flatten(0, 1), y.view(-1))

    y = torch.randint(0, 3, (B, S), device=DEVICE)
    found = capture(fn, hidden, weight, y)
    assert found.reports[0].counts == ({"linear_cross_entropy": 1} if of != [2, 0, 1] else {})
    actual = torch.autograd.grad(found.value, [hidden, weight])
    for a, e in zip(actual, gradients(fn, hidden, weight, y)[1:], strict=True):
        assert relative_error(a, e) <= TOLERANCES[torch.float32]


def test_leaves_an_index_that_permutes_rows(hidden, weight, labels):
    def fn(h, w, y, order):
        return F.cross_entropy(F.linear(h, w).view(-1, V)[order], y.view(-1))

    order = torch.randperm(B * S, device=DEVICE)
    assert "wanted linear, found `getitem`" in near_miss(fn, hidden, weight, labels, order)


def test_logits_written_in_place_are_left(hidden, weight, labels):
    def fn(h, w, y):
        logits = F.linear(h, w).view(-1, V)
        logits[:, 0] = -1e4
        return F.cross_entropy(logits, y.view(-1))

    (report,) = capture(fn, hidden, weight, labels).reports
    assert report.counts == {} and len(report.rejections) == 1


# -- normalisation, autocast, checkpoints, frozen parameters ---------------------------------------


def test_all_labels_ignored_behaves_as_eager(hidden, weight, labels):  # A15
    nothing = torch.full_like(labels, -100)
    compiled = aot_compiled(torchtune_chunked, fullgraph=True)
    expected = gradients(torchtune_chunked, hidden, weight, nothing)
    actual = gradients(compiled, hidden, weight, nothing)
    for a, e in zip(actual, expected, strict=True):  # the loss is nan, the gradients are zero
        torch.testing.assert_close(a, e, equal_nan=True)
    summed = aot_compiled(torchtune_per_chunk, fullgraph=True)
    for value in gradients(summed, hidden, weight, nothing):
        assert value.abs().sum() == 0


def test_gradient_accumulation_stays_exact(weight):  # A14
    h = torch.randn(8, S, H, device=DEVICE)
    y = torch.randint(0, V, (8, S), device=DEVICE)
    for row in range(8):
        y[row, : min(row, S)] = -100  # the last two rows have no valid token at all
    compiled = aot_compiled(torchtune_per_chunk)
    whole = torch.autograd.grad(compiled(h, weight, y) / (y != -100).sum(), weight)[0]
    parts = sum(
        torch.autograd.grad(compiled(h[i : i + 1], weight, y[i : i + 1]), weight)[0]
        for i in range(8)
    )
    torch.testing.assert_close(parts / (y != -100).sum(), whole)


def test_a_label_smoothing_that_changes_is_not_baked_in(hidden, weight, labels):
    def fn(h, w, y, e):
        return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1), label_smoothing=e)

    compiled = torch.compile(fn, backend="liger_fx", options={"inner": "eager"}, dynamic=True)
    for e in (0.1, 0.2):
        expected = fn(hidden, weight, labels, e)
        torch.testing.assert_close(compiled(hidden, weight, labels, e), expected)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA it is a device-side assertion")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_labels_out_of_range_are_an_error_when_compiled(inner, hidden, weight, labels):  # A29
    labels[0, 3] = V
    compiled = torch.compile(torchtune, backend="liger_fx", options={"inner": inner})
    with pytest.raises(IndexError, match=f"Target {V} is out of bounds"):
        compiled(hidden, weight, labels)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_computes_as_autocast_does(inside, hidden, weight, labels):  # A26
    def fn(h, w, y):
        if inside:
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                logits = F.linear(h, w)
        else:
            logits = F.linear(h, w)
        return F.cross_entropy(logits.float().view(-1, V), y.view(-1))

    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not inside):
        eager = gradients(fn, hidden, weight, labels)
        actual = gradients(aot_compiled(fn, fullgraph=True), hidden, weight, labels)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}
    for a, e in zip(actual, eager, strict=True):
        assert a.dtype == e.dtype
        assert relative_error(a, e) < 5e-3


def test_integer_constants_under_dynamic_shapes_recompile_once(weight):  # A40
    compiled = aot_compiled(torchtune_per_chunk)
    for s in (5, 7, 11, 29):
        h = torch.randn(B, s, H, device=DEVICE, requires_grad=True)
        y = torch.randint(0, V, (B, s), device=DEVICE)
        expected = gradients(torchtune_per_chunk, h, weight, y)
        for a, e in zip(gradients(compiled, h, weight, y), expected, strict=True):
            torch.testing.assert_close(a, e)
    assert len(liger_fx.reports()) <= 2


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_checkpointing_runs_the_op_once(inner, hidden, weight, labels, monkeypatch):  # A38
    calls = 0
    run = chunked_head.run

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return run(*args, **kwargs)

    op_module = sys.modules["liger_fx.ops.linear_loss"]
    monkeypatch.setattr(op_module, "run", counted)

    def fn(h, w, y):
        return checkpoint(
            lambda h, w: torchtune_per_chunk(h.sin(), w, y), h, w, use_reentrant=False
        )

    compiled = torch.compile(fn, backend="liger_fx", options={"inner": inner}, fullgraph=True)
    actual = gradients(compiled, hidden, weight, labels)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}
    assert calls == 1
    for a, e in zip(actual, gradients(fn, hidden, weight, labels), strict=True):
        torch.testing.assert_close(a, e)


def test_saves_the_gradients_and_nothing_else(hidden, weight, labels):  # A18, A19
    def saved(h, w):
        torch._dynamo.reset()
        loss = aot_compiled(torchtune_per_chunk, fullgraph=True)(h, w, labels)
        return sorted(tuple(t.shape) for t in loss.grad_fn.saved_tensors)

    assert saved(hidden, weight) == [(B, S, H), (V, H)]
    assert saved(hidden, weight.detach()) == [(B, S, H)]
    assert saved(hidden.detach(), weight) == [(V, H)]


def test_frozen_head_and_frozen_input(hidden, weight, labels):
    for h, w in ((hidden.detach(), weight), (hidden, weight.detach())):
        torch._dynamo.reset()
        expected = gradients(torchtune_per_chunk, h, w, labels)
        compiled = aot_compiled(torchtune_per_chunk, fullgraph=True)
        for a, e in zip(gradients(compiled, h, w, labels), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_several_losses_share_the_hidden_state(hidden, labels):
    heads = [torch.randn(V, H, device=DEVICE, requires_grad=True) for _ in range(3)]

    def fn(h, a, b, c, y):
        return sum(F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1)) for w in (a, b, c))

    expected = gradients(fn, hidden, *heads, labels)
    actual = gradients(aot_compiled(fn), hidden, *heads, labels)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 3}
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
