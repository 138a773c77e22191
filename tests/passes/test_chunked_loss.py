"""A loss over chunks of one hidden state: when it is one op, and when it stays several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _spellings import H, V, torchtune_chunked
from _util import DEVICE, aot_compiled, gradients, only, show
from expecttest import assert_expected_inline
from liger_fx.passes import linear_cross_entropy

import liger_fx

capture = only(linear_cross_entropy)


def test_chunked_loss_becomes_one_op(hidden, weight, labels):
    found = capture(torchtune_chunked, hidden, weight, labels)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_h_: "f32[2, 6, 8]", L_w_: "f32[13, 8]", L_y_: "i64[2, 6]"):
    l_h_ = L_h_
    l_w_ = L_w_
    l_y_ = L_y_
    ne: "b8[2, 6]" = l_y_ != -100
    total_elements: "i64[]" = ne.sum()
    chunk_1 = l_y_.chunk(3, dim = 1)
    c_3: "i64[2, 2]" = chunk_1[0]
    c_4: "i64[2, 2]" = chunk_1[1]
    c_5: "i64[2, 2]" = chunk_1[2]
    labels_chunk: "i64[4]" = c_3.reshape(-1)
    labels_chunk_1: "i64[4]" = c_4.reshape(-1)
    labels_chunk_2: "i64[4]" = c_5.reshape(-1)
    reshape_6: "i64[2, 2]" = labels_chunk.reshape([2, -1])
    reshape_7: "i64[2, 2]" = labels_chunk_1.reshape([2, -1])
    reshape_8: "i64[2, 2]" = labels_chunk_2.reshape([2, -1])
    cat: "i64[2, 6]" = torch.cat([reshape_6, reshape_7, reshape_8], 1)
    reshape_9: "i64[12]" = cat.reshape(-1)
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(l_h_, l_w_, None, reshape_9, None, None, None, None, None, ['cross_entropy'], -100, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem_6: "f32[]" = linear_loss_default[0]
    truediv: "f32[]" = getitem_6 / total_elements
    return (truediv,)""",
    )


def test_chunks_of_which_one_is_also_returned_stay_single(hidden, weight, labels):
    def fn(h, w, y):
        losses = [
            F.cross_entropy(F.linear(c, w).view(-1, V), z.reshape(-1), reduction="sum")
            for c, z in zip(h.chunk(3, dim=1), y.chunk(3, dim=1), strict=True)
        ]
        return losses[0] + losses[1] + losses[2], losses[0]

    expected = [v.detach() for v in fn(hidden, weight, labels)]
    found = capture(fn, hidden, weight, labels)
    assert found.reports[0].counts == {"linear_cross_entropy": 3}
    actual = aot_compiled(fn, fullgraph=True)(hidden, weight, labels)
    torch.testing.assert_close(list(actual), expected)


def test_chunks_of_which_a_later_one_is_also_returned_stay_single(hidden, weight, labels):
    def fn(h, w, y):
        losses = [
            F.cross_entropy(F.linear(c, w).view(-1, V), z.reshape(-1), reduction="sum")
            for c, z in zip(h.chunk(3, dim=1), y.chunk(3, dim=1), strict=True)
        ]
        return losses[0] + losses[1] + losses[2], losses[1]

    (report,) = capture(fn, hidden, weight, labels).reports
    assert report.counts == {"linear_cross_entropy": 3}


def test_chunks_whose_labels_are_cut_otherwise_become_one_op(weight):
    h = torch.randn(4, 6, H, device=DEVICE, requires_grad=True)
    y = torch.randint(0, V, (6, 4), device=DEVICE)  # its second dimension is not the hidden's

    def fn(h, w, y):
        total = 0.0
        for c, z in zip(h.chunk(2, dim=1), y.chunk(2, dim=1), strict=True):
            total += F.cross_entropy(F.linear(c, w).view(-1, V), z.reshape(-1), reduction="sum")
        return total

    expected = gradients(fn, h, weight, y)
    compiled = aot_compiled(fn)
    actual = gradients(compiled, h, weight, y)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_chunks_in_another_order_stay_single(hidden, weight, labels):
    def fn(h, w, y):
        a, b = h.chunk(2, dim=1)
        y_a, y_b = y.chunk(2, dim=1)
        loss = F.cross_entropy(F.linear(b, w).view(-1, V), y_a.reshape(-1), reduction="sum")
        return loss + F.cross_entropy(F.linear(a, w).view(-1, V), y_b.reshape(-1), reduction="sum")

    expected = gradients(fn, hidden, weight, labels)
    actual = gradients(aot_compiled(fn), hidden, weight, labels)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 2}
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_not_all_chunks_stay_single(hidden, weight, labels):
    def fn(h, w, y):
        a, b, _ = h.chunk(3, dim=1)
        y_a, y_b, _ = y.chunk(3, dim=1)
        loss = F.cross_entropy(F.linear(a, w).view(-1, V), y_a.reshape(-1), reduction="sum")
        return loss + F.cross_entropy(F.linear(b, w).view(-1, V), y_b.reshape(-1), reduction="sum")

    expected = gradients(fn, hidden, weight, labels)
    actual = gradients(aot_compiled(fn), hidden, weight, labels)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
