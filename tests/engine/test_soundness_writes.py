"""C5 and C9: writes that hide, and writes to what a backward needs.

The label of a program starts with the row of the table that it belongs to:

- C5  a write that has no name ending in an underscore, between the reads of a match;
- C9  a tensor that eager copies, and that is written before the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _programs import (
    BF16,
    EPS,
    B,
    H,
    LikeEager,
    Place,
    Program,
    S,
    Table,
    V,
    checkpoint,
    finish_norm,
    fixed,
    gemma_norm,
    head_inputs,
    increase,
    layer_norm,
    loss_of,
    norm,
    norm_inputs,
    repeated_rope_inputs,
    residual_inputs,
    rotate,
    same,
    set_row,
    torchtune_norm,
    trained,
    trained_norm_inputs,
)
from torch import Tensor

import liger_fx

# -- writes that hide ------------------------------------------------------------------------------
#
# Two more have no program here: Dynamo refuses a branch of torch.cond that writes, and a user's
# Triton kernel needs a GPU.


@torch.library.custom_op("soundness::increase_second", mutates_args={"x"})
def increase_second(y: Tensor, x: Tensor) -> Tensor:
    x.add_(1)
    return y.new_full((), x.numel())


@increase_second.register_fake
def _(y, x):
    return y.new_empty(())


@torch._dynamo.allow_in_graph
def increase_in_graph(x: Tensor) -> Tensor:
    return x.add_(1)


@torch._dynamo.nonstrict_trace
def increase_in_nonstrict_graph(x: Tensor) -> Tensor:
    return x.add_(1)


@torch.compiler.nested_compile_region
def increase_in_region(x: Tensor) -> Tensor:
    x.add_(1)
    return x.sum()


class Increase(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.add_(1).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def increase_captured(x: Tensor) -> Tensor:
    def body(t: Tensor) -> Tensor:
        x.add_(1)
        return t.sin()

    return checkpoint(body, x.new_ones(3))


def half_rows(x: Tensor) -> Tensor:
    """A table of embeddings. Of whole rows a norm would not see how long they are."""
    return x.view(-1, H // 2)


HIDDEN_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "the body of a checkpoint": lambda x: checkpoint(lambda t: t.add_(1), x),
    "the body of a checkpoint, to a captured tensor": increase_captured,
    "a checkpoint in a checkpoint": lambda x: checkpoint(
        lambda t: checkpoint(lambda u: u.add_(1), t), x
    ),
    "a custom op's packet": lambda x: torch.ops.soundness.increase(x),
    "a custom op's packet, to the second argument": lambda x: torch.ops.soundness.increase_second(
        x.new_ones(()), x
    ),
    "a custom op's packet, by keyword": lambda x: torch.ops.soundness.increase_second(
        x=x, y=x.new_ones(())
    ),
    "a custom op's function": lambda x: increase(x),  # in the graph: its overload
    "allow_in_graph": lambda x: increase_in_graph(x),
    "nonstrict_trace": lambda x: increase_in_nonstrict_graph(x),
    "a nested region": lambda x: increase_in_region(x),
    "an autograd function": lambda x: Increase.apply(x),
    "embedding": lambda x: F.embedding(torch.tensor([0, 3]), half_rows(x), max_norm=0.1),
    "embedding, by keywords": lambda x: F.embedding(
        input=torch.tensor([0, 3]), weight=half_rows(x), max_norm=0.1
    ),
    "out=": lambda x: torch.add(x, 1, out=x),
    "an aten overload": lambda x: torch.ops.aten.add_.Scalar(x, 1),
    "an aten packet": lambda x: torch.ops.aten.add_(x, 1),
    "an aten overload with out=": lambda x: torch.ops.aten.exp.out(x, out=x),
    "a list": lambda x: torch._foreach_add_([x, x.new_ones(2)], 1.0),
    "a detached tensor": lambda x: x.detach().add_(1),
    "data": lambda x: x.data.add_(1),
    "an operator": lambda x: x.__ifloordiv__(0.3),
    "an inplace flag": lambda x: F.relu(x, inplace=True),
    "an inplace flag by position": lambda x: F.hardtanh(x, -0.1, 0.1, True),
    "setitem": set_row,
}


# A norm does not see the scale of a row: these writes do more than to multiply.
def norm_around(write: Callable[[Tensor], Any], place: Place = "between") -> Callable[..., Any]:
    """A norm with a write between the copy that it takes and its end. What the write returns is
    returned, for nobody to leave it out."""

    def fn(x: Tensor, w: Tensor) -> Any:
        x = same(x)
        before = write(x) if place == "before" else None
        f = x.float()
        between = write(x) if place == "between" else None
        normed = finish_norm(f, w)
        after = write(x) if place == "after" else None
        returned = (value for value in (before, between, after) if isinstance(value, Tensor))
        return normed, x, *(value.sum() for value in returned)

    return fn


def batch_norm_written(x: Tensor, w: Tensor, mean: Tensor, variance: Tensor) -> Any:
    mean, variance = same(mean), same(variance)
    scale = 1.0 + mean.float()
    other = F.batch_norm(x.view(-1, H), mean, variance, training=True)
    f = x.float()
    normed = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * scale).to(x.dtype) * w, other, mean, variance


def instance_norm_written(x: Tensor, w: Tensor, mean: Tensor, variance: Tensor) -> Any:
    mean, variance = same(mean), same(variance)
    scale = 1.0 + mean.float()
    other = F.instance_norm(x.transpose(1, 2), mean, variance, use_input_stats=True)
    f = x.float()
    normed = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * scale).to(x.dtype) * w, other, mean, variance


def running_statistics() -> Sequence[Tensor]:
    return fixed(B, S, H), trained(H), fixed(H), torch.ones(H)


def trained_embedding(table: Tensor, w: Tensor) -> Any:
    """Its rows are normalised in place while they are looked up, even though it is trained."""
    f = table.float()
    rows = F.embedding(torch.tensor([0, 3]), table, max_norm=0.1)
    return finish_norm(f.view(-1, H), w), rows


# -- what is kept for the backward -----------------------------------------------------------------


def residual_in_place(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x + r
    h += norm(h, w).sin()
    return h


def residual_in_place_twice(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x + r
    h += norm(h, w).sin()
    h.add_(norm(h, w).cos())
    return norm(h, w)


def residual_by_setitem(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x + r
    h[:, 1:] += norm(h, w).sin()[:, 1:]
    return h


def residual_through_a_view(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    h = x + r
    h.view(-1, H).add_(norm(h, w).view(-1, H).sin())
    return h


def written_after(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """Eager keeps an fp32 copy of the input; the input itself is written."""

    def fn(x: Tensor, *others: Tensor) -> Any:
        h = same(x)
        value = function(h, *others)
        h.add_(1)
        return value, h

    return fn


def result_written(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fn(x: Tensor, *others: Tensor) -> Tensor:
        value = function(x, *others)
        value.add_(1)
        return value

    return fn


def weight_written_after(x: Tensor, w: Tensor) -> Tensor:
    w = same(w)
    normed = gemma_norm(x, w)
    with torch.no_grad():
        w.add_(1)
    return normed


def sum_written(x: Tensor, r: Tensor, w: Tensor) -> Any:
    x, r = same(x), same(r)
    total = x + r
    normed = norm(total, w)
    x.add_(1)
    r.add_(2)
    return normed, total, x, r


def loss_of_upcast_logits(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), y)


# -- the table -------------------------------------------------------------------------------------

PROGRAMS = Table()
row = PROGRAMS.add


for name, write in HIDDEN_WRITES.items():
    row(f"C5 written by {name}", norm_around(write), norm_inputs)
for place in ("before", "after"):
    for name in ("the body of a checkpoint", "a custom op's packet", "embedding"):
        fn = norm_around(HIDDEN_WRITES[name], place)
        row(f"C5 written {place} by {name}", fn, norm_inputs)
row("C5 a batch norm's running mean", batch_norm_written, running_statistics)
row("C5 an instance norm's running mean", instance_norm_written, running_statistics)
row(
    "C5 written by the embedding of a trained table",
    trained_embedding,
    lambda: (trained(2 * S, H // 2, dtype=BF16), trained(H, dtype=BF16)),
)
row("C9 residual in place", residual_in_place, residual_inputs)
row("C9 residual in place twice", residual_in_place_twice, residual_inputs)
row("C9 residual by setitem", residual_by_setitem, residual_inputs)
row("C9 residual through a view", residual_through_a_view, residual_inputs)
row("C9 the terms of a residual written", sum_written, residual_inputs)
for name, function in {
    "norm": norm,
    "gemma norm": gemma_norm,
    "torchtune norm": torchtune_norm,
    "layer norm": layer_norm,
}.items():
    row(f"C9 input of a {name} written", written_after(function), trained_norm_inputs)
    row(f"C9 result of a {name} written", result_written(function), trained_norm_inputs)
row("C9 weight of a gemma norm written", weight_written_after, trained_norm_inputs)
row(
    "C9 input of a rotation written",
    written_after(rotate),
    repeated_rope_inputs,
)
row(
    "C9 logits written after their loss",
    written_after(loss_of_upcast_logits),
    lambda: (trained(S, V, dtype=BF16), torch.arange(S)),
)


FIRING = {
    "norm next to an embedding": (
        Program(
            lambda x, w: (norm(x, w), F.embedding(torch.tensor([0, 2]), x.view(-1, H))), norm_inputs
        ),
        {"rms_norm": 1},
    ),
    "norm of an embedding": (
        Program(
            lambda x, w: norm(F.embedding(torch.tensor([0, 2]), x.view(-1, H)), w), norm_inputs
        ),
        {"rms_norm": 1},
    ),
    "norm around an embedding": (
        Program(
            norm_around(lambda x: F.embedding(torch.tensor([0, 2]), x.view(-1, H))), norm_inputs
        ),
        {"rms_norm": 1},
    ),
    "norm around a checkpoint": (
        Program(norm_around(lambda x: checkpoint(lambda t: t.sin(), x)), norm_inputs),
        {"rms_norm": 1},
    ),
    "norm in evaluation, around a batch norm": (
        Program(
            lambda x, w, mean, var: (norm(x, w), F.batch_norm(x.view(-1, H), mean, var)),
            running_statistics,
        ),
        {"rms_norm": 1},
    ),
    "residual stream": (
        Program(lambda x, r, w: norm((h := x + r) + norm(h, w).sin(), w), residual_inputs),
        {"add_rms_norm": 2},
    ),
    "loss in a checkpoint": (
        Program(lambda h, w, y: checkpoint(lambda t: loss_of(t, w, y), h), head_inputs),
        {"linear_cross_entropy": 1},
    ),
    "losses in two checkpoints": (
        Program(
            lambda h, w, y: sum(checkpoint(lambda t: loss_of(t, w, y), t) for t in (h, h.cos())),
            head_inputs,
        ),
        {"linear_cross_entropy": 2},
    ),
}


class TestWrites(LikeEager):
    PROGRAMS = PROGRAMS
    test_auto = None  # makes none of these rewrites
    UNDER_INDUCTOR = (
        "C5 written by the body of a checkpoint",
        "C5 written by a custom op's packet",
        "C5 written by embedding",
        "C9 residual in place",
    )
    FIRING = FIRING


def test_a_view_whose_gradient_dynamo_forgets():
    """The fake tensors of torch 2.13 lose it where a view is written without grad mode."""

    def fn(x, weight, labels):
        h = x.transpose(0, 1).contiguous()
        with torch.no_grad():
            h.mul_(2)
        return F.cross_entropy(F.linear(h, weight).view(-1, 11), labels)

    def gradient(backend, **options):
        torch._dynamo.reset()
        torch.manual_seed(0)
        x = torch.randn(5, 2, 8).transpose(0, 1).requires_grad_()
        compiled = torch.compile(fn, backend=backend, dynamic=True, options=options or None)
        compiled(x, torch.randn(11, 8), torch.randint(0, 11, (10,))).backward()
        return x.grad

    actual = gradient("liger_fx", policy="all", inner="aot_eager")
    torch.testing.assert_close(actual, gradient("aot_eager"))


def test_a_checkpoint_that_writes_to_its_inputs_keeps_no_loss():
    """The backward runs the body again on other labels: a loss that is kept would not notice."""

    def fn(x, weight, labels):
        def body(h):
            labels.copy_(labels.flip(0))
            return F.cross_entropy(F.linear(h, weight), labels)

        return checkpoint(body, x, use_reentrant=False)

    given = torch.randn(10, 8, requires_grad=True), torch.randn(11, 8), torch.arange(10)
    options = {"policy": "all", "inner": "eager"}
    torch.compile(fn, backend="liger_fx", options=options)(*given)
    why = liger_fx.reports()[-1].why_not("linear_cross_entropy")
    assert why == "l_labels_ is written by the checkpoint, which runs twice on it"


def test_what_code_after_a_graph_break_writes_to_is_not_kept():
    """Eager keeps a cast of the residual stream; the norm's kernel would keep the stream. Under
    aot_eager the program raises without liger_fx: the partitioner keeps the stream as well."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        h = x * 2
        normed = (F.rms_norm(h.float(), (h.shape[-1],), w.float(), 1e-6)).to(h.dtype)
        torch._dynamo.graph_break()
        h += 1
        return normed.float().pow(2).sum() + h.float().sum()

    given = [torch.randn(4, 8).bfloat16().requires_grad_(), torch.ones(8).requires_grad_()]
    torch._dynamo.reset()
    fused = torch.compile(fn, backend=liger_fx.backend(policy="all", inner="eager"))
    actual, expected = (torch.autograd.grad(f(*given), given) for f in (fused, fn))
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=2e-2)


def test_a_view_of_a_value_that_was_replaced_is_one_of_the_new_value():
    """With frozen weights eager keeps no input of the MLP, which the tiled MLP would keep."""

    def fn(x: Tensor, gain: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        h = F.rms_norm(x, (H,), gain, EPS)
        out = F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
        h.detach().mul_(2)
        return out.pow(2).sum()

    torch._dynamo.reset()
    x = torch.randn(2, 5, H, requires_grad=True)
    given = x, torch.rand(H), torch.randn(6, H), torch.randn(6, H), torch.randn(H, 6)
    fused = torch.compile(fn, backend=liger_fx.backend(policy="all", inner="aot_eager"))
    actual, expected = (torch.autograd.grad(f(*given), x) for f in (fused, fn))
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
    report = liger_fx.reports()[-1]
    assert report.counts["rms_norm"] == 1 and "writes to later" in report.why_not("tiled_mlp")
