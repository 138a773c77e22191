"""The canonical view: which spellings are one expression, and which stay two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from _util import capture

from liger_fx.canonical import View, op_name, positional


def traced(fn, *args, dynamic=None):
    """The view of ``fn``'s graph and the nodes that it returns."""
    (gm,) = capture(fn, *args, dynamic=dynamic, rewrites=[]).graphs
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return View(gm.graph), output.args[0]


X = torch.randn(2, 3, 4)
W = torch.randn(5, 4)

SAME = {
    "casts": lambda x, w: (x.bfloat16(), x.to(torch.bfloat16), x.to(dtype=torch.bfloat16)),
    "reshapes": lambda x, w: (
        x.view(6, 4),
        x.reshape(-1, 4),
        x.flatten(0, 1),
        torch.flatten(x, 0, 1),
        torch.reshape(input=x, shape=(6, 4)),
    ),
    "new dimensions": lambda x, w: (
        x[:, None],
        x.unsqueeze(1),
        x[:, None, ...],
        x.view(2, 1, 3, 4),
    ),
    "slices": lambda x, w: (x[..., ::2], x[:, :, 0::2], x[..., 0:None:2], x[:, 0::1, ::2]),
    "elements": lambda x, w: (x[..., 1], x[:, :, 1], x[0:, :, 1]),
    "softmax": lambda x, w: (
        F.log_softmax(x, dim=-1),
        torch.log_softmax(x, -1),
        x.log_softmax(-1),
        torch.nn.LogSoftmax(-1)(x),
    ),
    "logarithms of sums": lambda x, w: (
        torch.logsumexp(torch.stack([x, x.view(2, 3, 4)]), dim=0),
        torch.stack((x, x), dim=0).logsumexp(0),
        torch.logsumexp(torch.stack(dim=0, tensors=[x, x]), 0),
        torch.logaddexp(x, x),
    ),
    "expand": lambda x, w: (x.expand(5, 2, 3, 4), x.expand(5, -1, -1, -1), x.expand(7, 2, 3, 4)),
    "attention": lambda x, w: (
        F.scaled_dot_product_attention(x, x, x),
        F.scaled_dot_product_attention(x, x, x, None, 0.0, False),
        F.scaled_dot_product_attention(value=x, key=x, query=x, enable_gqa=False),
    ),
    "linear": lambda x, w: (F.linear(x, w), F.linear(x, w, None), F.linear(input=x, weight=w)),
    "relu": lambda x, w: (F.relu(x), torch.relu(x), x.relu(), F.relu(x, False)),
    "square": lambda x, w: (x.pow(2), x**2, x * x, x.square(), torch.square(x), torch.pow(x, 2)),
    "inverse root": lambda x, w: (x.rsqrt(), torch.rsqrt(x), x.pow(-0.5), x**-0.5),
    "clamp": lambda x, w: (x.clamp(max=1.0), torch.clamp(x, None, 1.0), x.clamp(None, max=1.0)),
    "silu": lambda x, w: (F.silu(x), F.silu(x, inplace=False), F.silu(input=x)),
    "gelu": lambda x, w: (F.gelu(x), F.gelu(x, approximate="none")),
    "add": lambda x, w: (x + 1.0, torch.add(x, 1.0), x.add(1.0)),
    "transpose": lambda x, w: (
        x.transpose(1, 2),
        torch.transpose(x, 1, 2),
        x.transpose(-1, -2),
        x.transpose(2, dim1=1),
    ),
    "the last dimension": lambda x, w: (x.softmax(-1), F.softmax(x, 2), torch.softmax(x, dim=2)),
    "another dimension": lambda x, w: (x.mean(1, True), x.mean(-2, keepdim=True)),
    "concatenation": lambda x, w: (
        torch.cat((x, x), -1),
        torch.cat([x, x], dim=2),
        torch.concat(tensors=(x, x), dim=-1),
        torch.concatenate((x, x), 2),
    ),
    "the first dimension": lambda x, w: (torch.cat((x, x)), torch.cat((x, x), -3)),
    "stack": lambda x, w: (torch.stack((x, x), -1), torch.stack((x, x), 3)),
    "the only dimension": lambda x, w: (lambda v: (v.softmax(0), v.softmax(-1)))(x[0, 0]),
}


@pytest.mark.parametrize("case", SAME)
def test_spellings_of_one_expression(case):
    view, nodes = traced(SAME[case], X, W)
    first, *rest = (view.expr(view.resolve(n)) for n in nodes)
    for other in rest:
        assert other == first


NO_OPS = {
    "cast to its own dtype": lambda x: x.float(),
    "type_as itself": lambda x: x.type_as(x),
    "move to its own device": lambda x: x.to("cpu"),
    "reshape to its own shape": lambda x: x.reshape(2, 3, 4),
    "contiguous": lambda x: x.contiguous(),
    "full slices": lambda x: x[:, slice(0, None), :],
    "all of them": lambda x: x[...].float().view(2, 3, 4).contiguous(),
}


@pytest.mark.parametrize("case", NO_OPS)
def test_what_does_nothing_is_its_input(case):
    view, (y,) = traced(lambda x: NO_OPS[case](x) + 1, X)
    assert view.resolve(y.args[0]).op == "placeholder"


EFFECTIVE = {
    "real cast": lambda x: x.double(),
    "transposed shape": lambda x: x.reshape(3, 2, 4),
    "real slice": lambda x: x[:, 1:],
    "index tensor of the same shape": lambda x: x[torch.tensor([1, 0])],
    "new dimension": lambda x: x[:, None],
    "expand": lambda x: x.expand(5, 2, 3, 4),
}


@pytest.mark.parametrize("case", EFFECTIVE)
def test_what_does_something_is_kept(case):
    view, (y,) = traced(lambda x: EFFECTIVE[case](x) + 1, X)
    assert view.resolve(y.args[0]).op != "placeholder"


def test_parts_of_one_dimension():
    def fn(x):
        chunks = x.chunk(2, 2)[0], x.chunk(2, -1)[0], torch.chunk(x, 2, dim=2)[0]
        split = x.split(2, 2)[0], x.split(2, -1)[0], torch.split(x, 2, dim=2)[0]
        return *chunks, *split, x.unbind(2)[0], torch.unbind(x, -1)[0], x.unbind()[0]

    view, nodes = traced(fn, X)
    parts = [view.expr(view.expr(node).args[0]) for node in nodes]
    assert parts[0] == parts[1] == parts[2] and parts[3] == parts[4] == parts[5]
    assert parts[6] == parts[7] != parts[8]


def test_dimensions_that_differ():
    def fn(x):
        stacked = torch.stack((x, x)), torch.stack((x, x), 2), torch.stack((x, x), 3)
        joined = torch.cat((x, x)), torch.cat((x, x), -2), torch.cat((x, x), 2)
        turned = x.transpose(0, 1), x.transpose(0, 2), x.transpose(1, 2)
        sums = x.sum(), x.sum(0), x.sum(-1), x.sum((0, 1)), x.sum(-1, True)
        return *stacked, *joined, *turned, *sums, x[0, 0, 0].softmax(0)

    view, nodes = traced(fn, X)
    found = [repr(view.expr(node)) for node in nodes]
    assert len(set(found)) == len(found)


def test_slices_that_differ():
    def fn(x):
        return x[..., ::2], x[..., 1::2], x[:, ::2], x[:, :, :2], x[:, 1:, ::2], x[:1, :, ::2]

    view, nodes = traced(fn, X)
    found = [repr(view.expr(node)) for node in nodes]
    assert len(set(found)) == len(found)


def test_an_index_that_also_selects_is_no_reshape():
    view, nodes = traced(lambda x: (x[:, None, 0], x[None, 1:], x[0]), X)
    assert [view.expr(node).op for node in nodes] == ["getitem"] * 3


def test_attention_that_is_told_more_is_another_expression():
    def fn(x):
        attention = F.scaled_dot_product_attention
        return attention(x, x, x), attention(x, x, x, is_causal=True), attention(x, x, x, scale=0.5)

    view, nodes = traced(fn, X)
    plain, causal, scaled = (view.expr(node) for node in nodes)
    assert plain.args[3:] == (None, 0.0, False, None, False)
    assert causal.args[3:] == (None, 0.0, True, None, False)
    assert scaled.args[3:] == (None, 0.0, False, 0.5, False)


def test_an_argument_by_another_name_is_not_lost():
    view, nodes = traced(lambda x, w: (torch.sum(x), torch.sum(x, axis=1), x.sum(axis=1)), X, W)
    whole, *others = map(view.expr, nodes)
    assert whole not in others


def test_specialised_numbers_are_literals():
    norm = torch.nn.RMSNorm(4, eps=1e-5)
    view, (y,) = traced(lambda x: norm(x), X, dynamic=True)
    assert any(node.target == "item" for node in view.position)
    assert view.expr(y).args[-1] == 1e-5


def test_symbolic_shapes_are_compared_without_a_guard():
    def fn(x):
        return x.reshape(x.shape[0], -1) + 1

    x = torch.randn(6, 4)
    torch._dynamo.mark_dynamic(x, 0)
    view, (y,) = traced(fn, x)
    assert view.resolve(y.args[0]).op == "placeholder"


def test_reissued_expressions_hold_the_same_value():
    def fn(x, w):
        return (
            x.double() + 0,
            x.double() + 0,
            x[0] + 0,
            x[0] + 0,
            x[1] + 0,
            torch.rand_like(x),
            torch.rand_like(x),
        )

    view, (a, b, c, d, e, r, s) = traced(fn, X, W)
    assert view.same(a, b) and view.same(c, d)
    assert not view.same(c, e) and not view.same(a, c)
    assert not view.same(r, s), "two random tensors"


def test_names():
    _, (a, b) = traced(lambda x: (x / 2, torch.div(x, 2)), X)
    assert op_name(a) == op_name(b) == "div"


def test_operators_recorded_as_methods():
    """torch 2.11 records ``a == b`` of tensors so."""
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    equal = graph.call_method("__eq__", (a, b))
    assert op_name(equal) == "eq" and positional(equal) == (a, b)
    assert op_name(graph.call_method("__iadd__", (a, b))) == "add_"


def test_expressions_are_compared_without_a_guard_on_their_sizes():
    """A guard such as "the sequence is not as long as the weight" compiles the model again."""

    def fn(x, w):
        return F.linear(x.float(), w.float()) * F.linear(x.float(), w.float())

    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        view = View(gm.graph)
        casts = view.calls["cast"]
        assert [view.same(casts[0], other) for other in casts] == [True, False, True, False]
        return gm.forward

    compiled = torch.compile(fn, backend=backend, dynamic=True)
    for length in (5, 6):  # 6 is the length of the weight
        compiled(torch.randn(length, 2, 8).bfloat16(), torch.randn(6, 8).bfloat16())
    assert len(graphs) == 1
