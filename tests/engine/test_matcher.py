"""Patterns from Python functions, and when a match is one; with a toy rewrite of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _util import reasons, show, words
from expecttest import assert_expected_inline

from liger_fx import Reject, Rewrite, rewrite_graph
from liger_fx.matcher import Matcher, candidates, size
from liger_fx.pattern import Binding, Cast, Op, Pattern, binding, either, guard, traced


def swiglu_pattern(gate, up):
    return F.silu(gate) * up


def norm_pattern(x, weight, eps):
    f = x.float()
    normed = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def double(match, **inputs):
    (first, *_) = inputs.values()
    return first * 2


swiglu = Rewrite("swiglu", [swiglu_pattern], lambda match, gate, up: torch.sub(gate, up))
norm = Rewrite("norm", [norm_pattern], lambda match, x, weight: torch.sub(x, weight))


class Rewriter:
    def __init__(self, *rewrites):
        self.rewrites = rewrites

    def __call__(self, gm, example_inputs):
        self.report = rewrite_graph(gm, self.rewrites)
        self.gm = gm
        return gm.forward


def rewritten(fn, *args, rewrites=(swiglu,), dynamic=None):
    torch._dynamo.reset()
    rewriter = Rewriter(*rewrites)
    torch.compile(fn, backend=rewriter, fullgraph=True, dynamic=dynamic)(*args)
    return rewriter


A, B = torch.randn(3, 4), torch.randn(3, 4)


def test_a_function_becomes_a_pattern():
    pattern = Pattern(swiglu_pattern)
    assert pattern.term == Op("mul", (Op("silu", (Binding("gate"),)), Binding("up")))
    assert Pattern(lambda x, y: x.type_as(y) + 1).term.args[0] == Cast(Binding("x"), Binding("y"))
    with pytest.raises(TypeError, match="casts to a dtype or to that of a value"):
        Pattern(lambda x: x.to("cuda") + 1)


@pytest.mark.parametrize(
    "fn",
    [
        lambda g, u: F.silu(g) * u,
        lambda g, u: u * F.silu(g),
        lambda g, u: torch.mul(F.silu(g, inplace=False), u),
        lambda g, u: F.silu(g.float()).view(3, 4) * u.contiguous(),
        lambda g, u: F.silu(input=g).mul(u),
    ],
)
def test_fires_whatever_the_spelling(fn):
    rewriter = rewritten(fn, A, B)
    assert rewriter.report.counts == {"swiglu": 1}
    assert_expected_inline_graph(rewriter.gm)


def assert_expected_inline_graph(gm):
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [torch.sub]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_may_be_missing_where_they_do_nothing(dtype):
    def fn(x, w):
        f = x.to(torch.float32)
        f = torch.rsqrt(torch.mean(f.pow(2), -1, keepdim=True) + 1e-6) * f
        return w * f.type_as(x)

    x, w = A.to(dtype), torch.ones(4, dtype=dtype)
    assert rewritten(fn, x, w, rewrites=(norm,)).report.counts == {"norm": 1}


def test_a_cast_to_another_dtype_does_not_match():
    def fn(x, w):
        f = x.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).half() * w

    assert rewritten(fn, A.bfloat16(), torch.ones(4), rewrites=(norm,)).report.counts == {}


def test_reissued_values_match_one_binding():
    def fn(x, w):
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed.to(x.dtype) * w

    args = (A.bfloat16(), torch.ones(4).bfloat16())
    assert rewritten(fn, *args, rewrites=(norm,)).report.counts == {"norm": 1}


def test_matches_that_share_inputs_and_feed_each_other():
    def fn(g, u, v):
        first = F.silu(g) * u
        return F.silu(g) * v, F.silu(first) * u

    rewriter = rewritten(fn, A, B, A)
    assert rewriter.report.counts == {"swiglu": 3}
    assert_expected_inline(
        show(rewriter.gm),
        """\
def forward(self, L_g_: "f32[3, 4]", L_u_: "f32[3, 4]"):
    l_g_ = L_g_
    l_u_ = L_u_
    sub: "f32[3, 4]" = torch.sub(l_g_, l_u_)
    sub_1: "f32[3, 4]" = torch.sub(l_g_, l_g_)
    sub_2: "f32[3, 4]" = torch.sub(sub, l_u_)
    return (sub_1, sub_2)""",
    )


def test_a_condition_tells_two_parts_apart():
    constant = guard("a value without gradient", lambda value: not value.requires_grad)

    def difference(trained, fixed):
        return torch.dist(trained.exp(), constant(fixed.exp()))

    rewrite = Rewrite("difference", [difference], lambda match, trained, fixed: trained.sum())
    trained = A.clone().requires_grad_()
    for fn in (
        lambda a, b: torch.dist(a.exp(), b.exp()),
        lambda a, b: torch.dist(b.exp(), a.exp()),
    ):
        first = rewritten(fn, trained, B, rewrites=[rewrite]).report
        second = rewritten(fn, B, trained, rewrites=[rewrite]).report
        assert sum(map(len, (first.replacements, second.replacements))) == 1
        (miss,) = first.near_misses + second.near_misses
        assert miss.reason.startswith("wanted a value without gradient, found `exp`")


def shifted(x):
    y = torch.exp(x)
    return either(y + binding("shift")(x), y)


@pytest.mark.parametrize(
    ("fn", "becomes"),
    [
        (lambda x: x.exp(), "sub(l_x_, 0)"),
        (lambda x: 3 + x.exp(), "sub(l_x_, 3)"),
        (lambda x: (x.exp() + 2) * x.exp(), "sub(l_x_, 2); sub(l_x_, 0)"),
    ],
)
def test_a_part_that_may_be_missing(fn, becomes):
    """The larger match counts; what is missing binds nothing."""
    rewrite = Rewrite("shifted", [shifted], lambda match, x, shift=0: torch.sub(x, shift))
    code = show(rewritten(fn, A, rewrites=[rewrite]).gm)
    assert "; ".join(re.findall(r"sub\(.*\)", code)) == becomes and "exp" not in code
    assert size(Pattern(shifted).term) == 1


def test_near_twins_are_refused_once():
    """Not again for a part of them, nor for a part of what is replaced."""

    def twin(x):
        return either(torch.tanh(x) + binding("shift")(x), torch.tanh(x))

    rewrite = Rewrite("shifted", [shifted], lambda match, x: x, refuses=[(twin, "a tanh")])
    report = rewritten(lambda x: (x.tanh() + 2) * (x.exp() + 2), A, rewrites=[rewrite]).report
    assert report.counts == {"shifted": 1} and [r.reason for r in report.rejections] == ["a tanh"]


def test_symbolic_shapes():
    def fn(g, u):
        return F.silu(g.view(-1, g.shape[-1])) * u

    assert rewritten(fn, A, B, dynamic=True).report.counts == {"swiglu": 1}


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (
            lambda g, u: (F.silu(h := g), F.silu(h) * u)[1] + (s := F.silu(g)) * u + s,
            "the value of `silu` (s) is also used by `add` (add_1)",
        ),
        (lambda g, u: ((s := F.silu(g)) * u, s), "the value of `silu` (s) is also returned"),
    ],
)
def test_refuses_values_that_escape(fn, reason):
    assert reason in [r.reason for r in rewritten(fn, A, B).report.rejections]


def test_views_and_casts_that_nobody_reads_go_too():
    """accelerate upcasts the logits that a model returns, whether or not its caller keeps them."""

    def fn(g, u):
        s = F.silu(g)
        s.double().view(-1)[:2]
        return s * u

    found = rewritten(fn, A, B)
    assert found.report.counts and not found.report.rejections
    names = [node.name for node in found.gm.graph.nodes if node.op.startswith("call")]
    assert names == ["sub"]


def test_refuses_a_view_that_is_written():
    def fn(g, u):
        s = F.silu(g)
        s.view(-1).add_(1)
        return s * u

    assert not rewritten(fn, A, B).report.counts


def test_takes_inputs_that_are_written_before_they_are_read():
    def fn(g, u):
        s = F.silu(g)
        u = u.clone()
        u[0] = 0.0
        return s * u

    found = rewritten(fn, A, B)
    assert found.report.counts == {"swiglu": 1}
    calls = [node.name for node in found.gm.graph.nodes if node.op.startswith("call")]
    assert calls == ["u", "setitem", "sub"]


def test_refuses_inputs_written_between_reading_and_replacing():
    def fn(g, u):
        g = g + 0
        s = F.silu(g)
        g.view(-1).add_(1)  # through a view of it
        return s * u + g

    (rejection,) = rewritten(fn, A, B).report.rejections
    assert rejection.reason == "g is written in place by `add_` (add_) before `mul`"


def test_writes_before_and_after_do_not_matter():
    def fn(g, u):
        g = g + 0
        g.add_(1)
        y = F.silu(g) * u
        g.add_(1)
        return y, g

    assert rewritten(fn, A, B).report.counts == {"swiglu": 1}


def test_refuses_an_inplace_twin():
    def fn(g, u):
        return F.silu(g + 0, inplace=True) * u

    report = rewritten(fn, A, B).report
    assert report.counts == {} and report.near_misses == []  # a `mul` alone tells nothing


def test_check_refuses_with_its_reason_and_place():
    def check(match, up):
        if up.shape[-1] % 8:
            raise Reject(f"{up.shape[-1]} columns are no multiple of 8")

    picky = Rewrite("picky", [swiglu_pattern], double, check=check)
    (rejection,) = rewritten(lambda g, u: F.silu(g) * u, A, B, rewrites=(picky,)).report.rejections
    assert rejection.reason == "4 columns are no multiple of 8"
    assert rejection.source.startswith("test_matcher.py:")


def test_a_grad_mode_that_is_switched_and_back_is_no_switch():  # fake quantisation in between
    def fn(g, u):
        active = F.silu(g)
        with torch.no_grad():
            scale = u.abs().max()
        return active * (u / scale)

    assert rewritten(fn, A, B).report.counts == {"swiglu": 1}


# -- matches that are joined ------------------------------------------------------------------------


def gate_mean_pattern(gate, dim):
    return F.silu(gate).mean(dim)


def both(match, gate, up):
    product = torch.sub(gate, up)
    return product if len(match.outputs) == 1 else (product, torch.amax(gate, -1))


def with_means(view, matches, reject):
    """The mean of the same gate becomes a second output."""
    pattern = traced(gate_mean_pattern)
    means = [Matcher(view, pattern).at(node) for node in candidates(view, pattern)]
    for match in matches:
        for mean in means:
            if mean is not None and mean.bindings["gate"] is match.bindings["gate"]:
                match.outputs += mean.outputs
                match.nodes |= mean.nodes
                means.remove(mean)
                break
    return matches


swiglu_and_mean = Rewrite("swiglu", [swiglu_pattern], both, join=with_means)


def with_mean(fn, *args):
    return rewritten(fn, *args, rewrites=(swiglu_and_mean,))


@pytest.mark.parametrize("first", [True, False])
def test_a_joined_match_has_a_second_output(first):
    def fn(g, u):
        s = F.silu(g)
        return (s.mean(-1), s * u) if first else (s * u, s.mean(-1))[::-1]

    found = with_mean(fn, A, B)
    assert found.report.counts == {"swiglu": 1}
    calls = [node.target for node in found.gm.graph.nodes if node.op.startswith("call")]
    assert calls == [torch.sub, torch.amax]


def test_what_was_not_joined_still_reads():
    def fn(g, u):
        s = F.silu(g)
        return s * u, s.mean(-1), s.mean(0)

    (rejection,) = with_mean(fn, A, B).report.rejections
    assert rejection.reason == "the value of `silu` (s) is also used by `mean` (mean_1)"


def test_a_write_between_two_outputs_matters_to_what_is_read_later():
    def fn(g, u, written):
        g, u = g + 0, u + 0
        s = F.silu(g)
        product = s * u
        {"g": g, "u": u, "s": s, "product": product}[written].mul_(2)
        return product, s.mean(-1), g, u

    for harmless in ("g", "u", "product"):
        found = with_mean(fn, A, B, harmless)
        assert found.report.counts == {"swiglu": 1}
    (rejection,) = with_mean(fn, A, B, "s").report.rejections
    assert rejection.reason == "the value of `silu` (s) is also used by `mul_` (mul_)"


def test_an_output_without_gradients_is_a_constant():
    def fn(g, u):
        s = F.silu(g)
        with torch.no_grad():
            mean = s.mean(-1)
        return s * u, mean

    g = A.clone().requires_grad_()
    found = with_mean(fn, g, B)
    (product, mean) = found.gm(g, B)
    assert product.requires_grad and not mean.requires_grad


def test_near_twins_are_refused_by_name():
    def sigmoid_glu(gate, up):
        return torch.sigmoid(gate) * up

    with_twin = Rewrite("swiglu", [swiglu_pattern], double, refuses=[(sigmoid_glu, "a GLU")])
    report = rewritten(lambda g, u: torch.sigmoid(g) * u, A, B, rewrites=(with_twin,)).report
    assert [r.reason for r in report.rejections] == ["a GLU"]


def test_the_nearest_miss_is_reported():
    def fn(x, w):  # the sum of the squares, not their mean
        f = x.float()
        return w * (f * torch.rsqrt(f.pow(2).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)

    (miss,) = rewritten(fn, A, torch.ones(4), rewrites=(norm,)).report.near_misses
    assert (miss.matched, miss.total) == (4, 6)
    assert miss.reason == "wanted mean, found `sum` (sum_1)"


def test_new_nodes_carry_metadata():
    gm = rewritten(lambda g, u: (F.silu(g) * u) + 1, A.requires_grad_(), B).gm
    (new,) = (n for n in gm.graph.nodes if n.target is torch.sub)
    assert new.meta["example_value"].shape == (3, 4)
    assert new.meta["example_value"].requires_grad
    assert "stack_trace" in new.meta and "source_fn_stack" in new.meta
    A.requires_grad_(False)


def test_recompute_tags_are_kept():  # A37
    def tagging(gm, example_inputs):
        for node in gm.graph.nodes:
            node.meta["recompute"] = "tag of the policy"
        rewriter(gm, example_inputs)
        return gm.forward

    torch._dynamo.reset()
    rewriter = Rewriter(swiglu)
    torch.compile(lambda g, u: F.silu(g) * u, backend=tagging)(A, B)
    (new,) = (n for n in rewriter.gm.graph.nodes if n.target is torch.sub)
    assert new.meta["recompute"] == "tag of the policy"


def test_the_same_program_gives_the_same_graph():
    def fn(g, u, v):
        return F.silu(g) * u + F.silu(v) * g

    texts = {show(rewritten(fn, A, B, A + 1).gm) for _ in range(3)}
    assert len(texts) == 1


def test_without_a_match_the_graph_is_as_dynamo_made_it():
    def fn(g, u):
        return torch.sigmoid(g) * u

    plain = []
    torch.compile(fn, backend=lambda gm, _: plain.append(str(gm.graph)) or gm.forward)(A, B)
    assert str(rewritten(fn, A, B).gm.graph) == plain[0]


def test_an_error_halfway_leaves_the_match_as_it_was():
    def unlucky(match, gate, up):
        torch.sub(gate, up)
        raise ZeroDivisionError("out of luck")

    def backend(gm, example_inputs):
        before = str(gm.graph)
        rewrite = Rewrite("unlucky", [swiglu_pattern], unlucky)
        report = rewrite_graph(gm, [rewrite])
        assert str(gm.graph) == before
        assert reasons(report) == "internal error: ZeroDivisionError: out of luck"
        with pytest.raises(ZeroDivisionError):
            rewrite_graph(gm, [rewrite], strict=True)
        assert str(gm.graph) == before
        return gm.forward

    def fn(g, u):
        return F.silu(g) * u

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fn, backend=backend)(A, B), fn(A, B))


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: F.relu(x).square(),
        lambda x: torch.square(F.relu(x)),
        lambda x: F.relu(x) ** 2,
        lambda x: (r := F.relu(x)) * r,
    ],
)
def test_a_pattern_may_end_in_a_power(spelling):
    rewrite = Rewrite("relu_squared", [lambda x: F.relu(x) ** 2], lambda match, x: x.exp())
    assert rewritten(spelling, A, rewrites=[rewrite]).report.counts == {"relu_squared": 1}


def test_a_pattern_may_end_in_a_logaddexp():
    rewrite = Rewrite(
        "both", [lambda x, y: torch.logaddexp(x.sin(), y)], lambda match, x, y: torch.sub(x, y)
    )
    stacked = lambda x, y: torch.logsumexp(torch.stack([x.sin(), y]), 0)  # noqa: E731
    assert rewritten(stacked, A, B, rewrites=[rewrite]).report.counts == {"both": 1}


def test_a_graph_without_example_values_is_an_error():
    gm = torch.fx.symbolic_trace(lambda g, u: torch.mul(F.silu(g), u))
    with pytest.raises(ValueError, match="no meta\\['example_value'\\]"):
        rewrite_graph(gm, [swiglu])


def test_the_example_of_a_custom_rewrite():
    example = Path(__file__).parents[2] / "examples" / "custom_rewrite.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = words(done.stdout)
    assert "relu_squared replaced spelling primer; auto: a rewrite of your own" in said
    assert "linear_cross_entropy replaced spelling plain; auto: the logits never exist" in said


def test_bodies_of_checkpoints_are_rewritten_and_those_of_autograd_functions_are_not():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, g, u):
            return F.silu(g) * u

        @staticmethod
        def backward(ctx, grad):
            return grad * 42, grad

    def fn(g, u):
        kept = torch.utils.checkpoint.checkpoint(
            lambda g, u: F.silu(g) * u, g, u, use_reentrant=False
        )
        return kept + Double.apply(g, u)

    g = A.clone().requires_grad_()
    rewriter = rewritten(fn, g, B)
    assert rewriter.report.counts == {"swiglu": 1}
    assert "torch.sub" in str(rewriter.gm.wrap_body_0.code)
