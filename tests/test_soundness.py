"""Programs that a rewrite must not change: each compiled with liger_fx, against plain eager.

`PROGRAMS` is the table. A label starts with the row that the program belongs to:

- C1  somebody writes to a copy, or to what was copied;
- C3  a loss or a norm inside a function transform (torch.func);
- C4  one expression written twice, with a write between the two;
- C5  a write that has no name ending in an underscore, between the reads of a match;
- C6  rotary embeddings whose cos and sin do not repeat themselves;
- C7  dropout in the same checkpoint as a loss;
- C9  a tensor that eager copies, and that is written before the backward;
- C10 tensors whose memory is not in the order of their dimensions;
- C11 weights that broadcast.

C2 is the subject of test_faults.py; C8 and C13 are no comparisons and stand at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _programs import Inputs, Program, fixed, trained, with_liger_fx
from _util import capture
from liger_fx.passes import DEFAULT
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import liger_fx

B, S, H, V = 2, 5, 8, 13
HEADS, HALF = 3, 4
PAD = 3  # a class that stands for padding
EPS = 1e-6

BF16 = torch.bfloat16
checkpoint = functools.partial(torch_checkpoint, use_reentrant=False)

# -- inputs ----------------------------------------------------------------------------------------


def some_labels() -> Tensor:
    labels = torch.randint(0, V, (B, S))
    labels[:, ::2] = PAD
    labels[0, 1] = -100
    return labels


def head_inputs() -> Sequence[Tensor]:
    return trained(B, S, H), trained(V, H), some_labels()


def head_inputs_sequence_first() -> Sequence[Tensor]:
    return trained(S, B, H), trained(V, H), some_labels()


def norm_inputs() -> Sequence[Tensor]:
    """Not trained: anything may be written to them."""
    return fixed(B, S, H, dtype=BF16), trained(H, dtype=BF16)


def trained_norm_inputs() -> Sequence[Tensor]:
    return trained(B, S, H, dtype=BF16), trained(H, dtype=BF16)


def residual_inputs() -> Sequence[Tensor]:
    return (*(trained(B, S, H, dtype=BF16) for _ in range(2)), trained(H, dtype=BF16))


def mlp_inputs() -> Sequence[Tensor]:
    return trained(B, S, H, dtype=BF16), trained(12, H), trained(12, H), trained(H, 12)


def rope_inputs() -> Sequence[Tensor]:
    """Queries, cos and sin; each half of the angles is of its own."""
    return trained(B, HEADS, S, 2 * HALF), fixed(1, 1, S, 2 * HALF), fixed(1, 1, S, 2 * HALF)


def repeated_rope_inputs() -> Sequence[Tensor]:
    q, cos, sin = rope_inputs()
    return q, cos[..., :HALF].repeat(1, 1, 1, 2), sin[..., :HALF].repeat(1, 1, 1, 2)


# -- what the programs are made of -----------------------------------------------------------------


def loss_of(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).view(-1, V), y.view(-1))


def finish_norm(f: Tensor, w: Tensor) -> Tensor:
    """Hugging Face's, from the fp32 copy of the input on."""
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(w.dtype)


def norm(x: Tensor, w: Tensor) -> Tensor:
    return finish_norm(x.float(), w)


def gemma_norm(x: Tensor, w: Tensor) -> Tensor:
    f = x.float()
    normed = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed * (1.0 + w.float())).to(x.dtype)


def torchtune_norm(x: Tensor, w: Tensor) -> Tensor:
    return torch.rms_norm(x.float(), (H,), w, EPS).to(x.dtype)


def layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (H,), w.float(), w.float(), EPS).to(x.dtype)


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q * cos + torch.cat((-q[..., HALF:], q[..., :HALF]), -1) * sin


def same(x: Tensor) -> Tensor:
    """A tensor that may be written: an input may not if it is trained, and of one that is not AOT
    itself (torch 2.13) reads the new values in the backward where eager has kept a copy."""
    return x + 0


def set_pads(t: Tensor) -> None:
    t[t == PAD] = -100


def set_row(t: Tensor) -> None:
    t[0] = 0.5


LABEL_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": set_pads,
    "masked_fill_": lambda t: t.masked_fill_(t == PAD, -100),
    "mul_": lambda t: t.mul_(0),
    "copy_": lambda t: t.copy_(t.clamp(0, 2)),
    "out=": lambda t: torch.clamp(t, 0, 2, out=t),
}

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": set_row,
    "masked_fill_": lambda t: t.masked_fill_(t > 0, 0.1),
    "mul_": lambda t: t.mul_(0.1),
    "copy_": lambda t: t.copy_(t.flip(0)),
    "an operator": lambda t: t.__iadd__(1),
    "relu in place": lambda t: F.relu(t, inplace=True),
}

Target = Callable[[Tensor, Tensor], Tensor]

TARGETS: dict[str, Target] = {
    "copy": lambda copy, source: copy,
    "view of the copy": lambda copy, source: copy.view(-1),
    "slice of the copy": lambda copy, source: copy[:1],
    "detached copy": lambda copy, source: copy.detach(),
    "source": lambda copy, source: source,
    "view of the source": lambda copy, source: source.view(-1),
    "slice of the source": lambda copy, source: source[1:],
}

LABEL_COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda y: y[..., 1:].contiguous(),
    "to(copy=True)": lambda y: y[..., 1:].to(torch.int64, copy=True),
    "copied by its type": lambda y: y.to(y.dtype, copy=True)[..., 1:],
}

Place = str  # "before" the copy, "between" copy and use, or "after" the use
COPY = TARGETS["copy"]


def labels_copied(
    write: Callable[[Tensor], Any],
    target: Target = COPY,
    place: Place = "between",
    copied: Callable[[Tensor], Tensor] = LABEL_COPIES["contiguous"],
) -> Callable[..., Tensor]:
    def fn(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        if place == "before":
            write(y)
        copy = copied(y)
        if place == "between":
            write(target(copy, y))
        loss = F.cross_entropy(F.linear(h, w)[:, :-1].transpose(1, 2), copy)
        if place == "after":
            write(y)
        return loss

    return fn


def hidden_copied(
    write: Callable[[Tensor], Any],
    target: Target = COPY,
    place: Place = "between",
    copied: Callable[[Tensor], Tensor] = lambda x: x.transpose(0, 1).contiguous(),
    use: Callable[..., Tensor] = loss_of,
) -> Callable[..., Tensor]:
    def fn(x: Tensor, *others: Tensor) -> Tensor:
        x = same(x)
        if place == "before":
            write(x)
        copy = copied(x)
        if place == "between":
            write(target(copy, x))
        value = use(copy, *others)
        if place == "after":
            write(x)
        return value

    return fn


def weight_copied(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    weight = w.contiguous().view(H, V).t().contiguous()
    weight.mul_(0.1)
    return loss_of(h, weight, y)


def gates_copied(x: Tensor, w: Tensor) -> Tensor:
    gate, up = x.transpose(0, 1).contiguous(), (x * w).transpose(0, 1).contiguous()
    gate.mul_(0.1)
    return F.silu(gate) * up


def reissued(first: Callable[..., Tensor], write: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """An MLP whose projections read two copies of one tensor, which is written in between."""

    def fn(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        h = same(x)
        gate = F.silu(F.linear(first(h), w_gate))
        write(h)
        return F.linear(gate * F.linear(first(h), w_up), w_down)

    return fn


def norm_of_two_casts(x: Tensor, w: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    x.add_(1)
    return w * (x.float() * scale).to(x.dtype)


def norm_of_two_casts_of_a_view(x: Tensor, w: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    x.view(-1)[:H].add_(1)
    return w * (x.float() * scale).to(x.dtype)


def norm_of_two_copies(x: Tensor, w: Tensor) -> Tensor:
    scale = torch.rsqrt(x.transpose(0, 1).contiguous().float().pow(2).mean(-1, True) + EPS)
    x.add_(1)
    return w * (x.transpose(0, 1).contiguous().float() * scale).to(x.dtype)


def gates_of_two_chunks(x: Tensor, w: Tensor) -> Tensor:
    both = torch.cat((x * w, x), -1)
    gate = F.silu(both.chunk(2, -1)[0].float())
    both[..., H:].mul_(2)
    return gate * both.chunk(2, -1)[1].float()


def rotated_around_a_write(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q = same(q)
    turned = torch.cat((-q[..., HALF:], q[..., :HALF]), -1)
    q.mul_(2)
    return q * cos + turned * sin


# -- writes that hide ------------------------------------------------------------------------------
#
# Two more have no program here: Dynamo refuses a branch of torch.cond that writes, and a user's
# Triton kernel needs a GPU.


@torch.library.custom_op("soundness::increase", mutates_args={"x"})
def increase(x: Tensor) -> None:
    x.add_(1)


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
    "a custom op's overload": lambda x: torch.ops.soundness.increase.default(x),
    "a custom op's function": lambda x: increase(x),
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


# -- function transforms ---------------------------------------------------------------------------


def flat_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def loss_through_a_norm(h: Tensor, w: Tensor) -> Tensor:
    return (finish_norm(h.float(), w) * torch.arange(H)).sum()


TRANSFORMS: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "grad of a loss": (
        lambda h, w, y: torch.func.grad(flat_loss)(h, w, y),
        lambda: (fixed(S, H), fixed(V, H), torch.arange(S)),
    ),
    "grad of a loss over the weight": (
        lambda h, w, y: torch.func.grad(flat_loss, argnums=1)(h, w, y),
        lambda: (fixed(S, H), fixed(V, H), torch.arange(S)),
    ),
    "grad of a loss, and a loss outside": (
        lambda h, w, y: (torch.func.grad(flat_loss)(h.detach(), w.detach(), y), flat_loss(h, w, y)),
        lambda: (trained(S, H), trained(V, H), torch.arange(S)),
    ),
    "grad_and_value of a loss": (
        lambda h, w, y: torch.func.grad_and_value(flat_loss)(h, w, y),
        lambda: (fixed(S, H), fixed(V, H), torch.arange(S)),
    ),
    "grad of a norm": (
        lambda h, w: torch.func.grad(loss_through_a_norm)(h, w),
        lambda: (fixed(S, H), fixed(H)),
    ),
    "vmap of a loss": (
        lambda h, w, y: torch.func.vmap(flat_loss, (0, None, 0))(h, w, y),
        lambda: (fixed(B, S, H), fixed(V, H), torch.arange(B * S).view(B, S)),
    ),
    "vmap of a norm": (
        lambda h, w: torch.func.vmap(norm, (0, None))(h, w),
        lambda: (fixed(B, S, H), fixed(H)),
    ),
    "vmap of grad of a loss": (
        lambda h, w, y: torch.func.vmap(torch.func.grad(flat_loss), (0, None, 0))(h, w, y),
        lambda: (fixed(B, S, H), fixed(V, H), torch.arange(B * S).view(B, S)),
    ),
    "jvp of a loss": (
        lambda h, w, y: torch.func.jvp(lambda t: flat_loss(t, w, y), (h,), (h.cos(),)),
        lambda: (fixed(S, H), fixed(V, H), torch.arange(S)),
    ),
    "jvp of a norm": (
        lambda h, w: torch.func.jvp(lambda t: norm(t, w), (h,), (h.cos(),)),
        lambda: (fixed(S, H), fixed(H)),
    ),
    "jacrev of a loss": (
        lambda h, w, y: torch.func.jacrev(flat_loss)(h, w, y),
        lambda: (fixed(S, H), fixed(V, H), torch.arange(S)),
    ),
    "jacrev of a norm": (
        lambda h, w: torch.func.jacrev(norm)(h, w),
        lambda: (fixed(2, H), fixed(H)),
    ),
    "jacfwd of a norm": (
        lambda h, w: torch.func.jacfwd(norm)(h, w),
        lambda: (fixed(2, H), fixed(H)),
    ),
}


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


# -- layouts ---------------------------------------------------------------------------------------


def seen_batch_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Memory is [s, b, h] as Megatron has it; the function sees [b, s, h]."""
    return lambda x, *others: function(x.transpose(0, 1), *others)


def and_back(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Fails if the function's result is not in the memory order of its input."""
    return lambda *args: function(*args).transpose(0, 1).view(-1, H)


def added(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def fn(x: Tensor, w: Tensor) -> Any:
        total = x + x.sin()
        return function(total, w), total

    return fn


def nn_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (H,), w, EPS)


def swiglu(x: Tensor, w: Tensor) -> Tensor:
    return F.silu(x * w) * (x + w)


def mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


# -- the table -------------------------------------------------------------------------------------

PROGRAMS: dict[str, Program] = {}


def row(label: str, fn: Callable[..., Any], inputs: Inputs) -> None:
    PROGRAMS[label] = Program(fn, inputs)


for name, write in LABEL_WRITES.items():
    row(f"C1 labels: copy written by {name}", labels_copied(write), head_inputs)
    row(
        f"C1 labels: source written by {name}", labels_copied(write, TARGETS["source"]), head_inputs
    )
for name, target in TARGETS.items():
    row(f"C1 labels: {name} written", labels_copied(lambda t: t.mul_(0), target), head_inputs)
for place in ("before", "after"):
    row(f"C1 labels: source written {place}", labels_copied(set_pads, place=place), head_inputs)
for name, copied in LABEL_COPIES.items():
    for what in ("copy", "source"):
        fn = labels_copied(lambda t: t.mul_(0), TARGETS[what], copied=copied)
        row(f"C1 labels: {name}, {what} written", fn, head_inputs)
row(
    "C1 labels: copy written by a custom op's packet",
    labels_copied(lambda t: torch.ops.soundness.increase(t.clamp_(0, 5))),
    head_inputs,
)
for name, write in WRITES.items():
    row(f"C1 hidden: copy written by {name}", hidden_copied(write), head_inputs_sequence_first)
for name, target in TARGETS.items():
    fn = hidden_copied(lambda t: t.mul_(0.1), target)
    row(f"C1 hidden: {name} written", fn, head_inputs_sequence_first)
for place in ("before", "after"):
    fn = hidden_copied(lambda t: t.mul_(0.1), place=place)
    row(f"C1 hidden: source written {place}", fn, head_inputs_sequence_first)
for what in ("copy", "source"):
    fn = hidden_copied(
        lambda t: t.mul_(0.1), TARGETS[what], copied=lambda x: x.to(x.dtype, copy=True)
    )
    row(f"C1 hidden: to(copy=True), {what} written", fn, head_inputs)
    fn = hidden_copied(lambda t: t.add_(1), TARGETS[what], use=norm)
    row(f"C1 norm: {what} written", fn, trained_norm_inputs)
row("C1 weight: copy written", weight_copied, head_inputs)
row("C1 gates: copy written", gates_copied, lambda: (fixed(B, S, H), trained(H)))

for name, (fn, inputs) in TRANSFORMS.items():
    row(f"C3 {name}", fn, inputs)

for name, write in WRITES.items():
    row(f"C4 mlp: casts around {name}", reissued(lambda h: h.float(), write), mlp_inputs)
row(
    "C4 mlp: casts around a write to a view",
    reissued(lambda h: h.float(), lambda h: h.view(-1).mul_(2)),
    mlp_inputs,
)
row(
    "C4 mlp: copies around a write",
    reissued(lambda h: h.transpose(0, 1).contiguous().float(), lambda h: h.mul_(2)),
    mlp_inputs,
)
row(
    "C4 mlp: casts around a checkpoint that writes",
    reissued(lambda h: h.float(), lambda h: HIDDEN_WRITES["the body of a checkpoint"](h.detach())),
    mlp_inputs,
)
row("C4 norm: casts around a write", norm_of_two_casts, norm_inputs)
row("C4 norm: casts around a write to a view", norm_of_two_casts_of_a_view, norm_inputs)
row("C4 norm: copies around a write", norm_of_two_copies, norm_inputs)
row("C4 gates: chunks around a write", gates_of_two_chunks, norm_inputs)
row("C4 rope: halves around a write", rotated_around_a_write, repeated_rope_inputs)

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

row("C6 halves differ", rotate, rope_inputs)
row(
    "C6 halves of sin differ",
    lambda q, cos, sin: rotate(q, cos[..., :HALF].repeat(1, 1, 1, 2), sin),
    rope_inputs,
)
row(
    "C6 halves differ, bf16",
    rotate,
    lambda: (
        trained(B, HEADS, S, 2 * HALF, dtype=BF16),
        *(fixed(1, 1, S, 2 * HALF, dtype=BF16) for _ in range(2)),
    ),
)
row(
    "C6 halves differ, angles of each batch",
    lambda q, cos, sin: rotate(q, cos.unsqueeze(1), sin.unsqueeze(1)),
    lambda: (trained(B, HEADS, S, 2 * HALF), fixed(B, S, 2 * HALF), fixed(B, S, 2 * HALF)),
)
row(
    "C6 halves differ, sequence first",
    rotate,
    lambda: (trained(B, S, HEADS, 2 * HALF), fixed(B, S, 1, 2 * HALF), fixed(B, S, 1, 2 * HALF)),
)
row(
    "C6 halves differ, a part of each head",
    lambda q, cos, sin: torch.cat((rotate(q[..., : 2 * HALF], cos, sin), q[..., 2 * HALF :]), -1),
    lambda: (trained(B, HEADS, S, 10), *rope_inputs()[1:]),
)

row(
    "C7 dropout before a loss",
    lambda h, w, y: checkpoint(lambda t: loss_of(F.dropout(t, 0.5), w, y), h),
    head_inputs,
)
row(
    "C7 dropout before two losses",
    lambda h, w, y: sum(
        checkpoint(lambda t: loss_of(F.dropout(t, 0.5), w, y), part) for part in (h, h.cos())
    ),
    head_inputs,
)
row(
    "C7 dropout around a checkpoint with a loss",
    lambda h, w, y: checkpoint(lambda t: loss_of(t, w, y), F.dropout(h, 0.5)),
    head_inputs,
)
row(
    "C7 dropout of attention before a loss",
    lambda h, w, y: checkpoint(
        lambda t: loss_of(F.scaled_dot_product_attention(t, t, t, dropout_p=0.5), w, y), h
    ),
    head_inputs,
)
row(
    "C7 noise before a loss",
    lambda h, w, y: checkpoint(lambda t: loss_of(t * torch.rand_like(t), w, y), h),
    head_inputs,
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

for name, function in {
    "norm": norm,
    "gemma norm": gemma_norm,
    "torchtune norm": torchtune_norm,
    "nn norm": nn_norm,
    "swiglu": swiglu,
}.items():
    inputs = lambda: (trained(S, B, H), trained(H))  # noqa: E731
    row(f"C10 {name} seen batch first", seen_batch_first(function), inputs)
    if "nn" not in name and "torchtune" not in name:  # contiguous in eager: the view would fail
        row(f"C10 {name} seen batch first, and back", and_back(seen_batch_first(function)), inputs)
row(
    "C10 sum and norm seen batch first",
    seen_batch_first(added(norm)),
    lambda: (trained(S, B, H), trained(H)),
)
row(
    "C10 norm of a sum seen batch first, and back",
    and_back(seen_batch_first(lambda x, w: added(norm)(x, w)[0])),
    lambda: (trained(S, B, H), trained(H)),
)
row(
    "C10 sum beside its norm seen batch first, and back",
    and_back(seen_batch_first(lambda x, w: (found := added(norm)(x, w))[1] + 0 * found[0])),
    lambda: (trained(S, B, H), trained(H)),
)
row(
    "C10 norm of a slice",
    lambda x, w: norm(x[..., :H], w),
    lambda: (trained(B, S, 2 * H), trained(H)),
)
row(
    "C10 norm of heads",
    lambda x, w: norm(x.view(B, S, HEADS, H).transpose(1, 2), w),
    lambda: (trained(B, S, HEADS * H), trained(H)),
)
row(
    "C10 layer norm seen batch first",
    seen_batch_first(lambda x, w: F.layer_norm(x, (H,), w, w, EPS)),
    lambda: (trained(S, B, H), trained(H)),
)
row(
    "C10 rotation seen batch first",
    lambda q, cos, sin: rotate(q.transpose(1, 2), cos, sin),
    lambda: (trained(B, S, HEADS, 2 * HALF), *repeated_rope_inputs()[1:]),
)
row(
    "C10 mlp seen batch first",
    seen_batch_first(mlp),
    lambda: (trained(S, B, H), trained(12, H), trained(12, H), trained(H, 12)),
)
row(
    "C10 losses of each token, seen batch first",
    seen_batch_first(
        lambda h, w, y: F.cross_entropy(F.linear(h, w).transpose(1, 2), y, reduction="none")
    ),
    head_inputs_sequence_first,
)
row(
    "C10 expanded input",
    lambda x, w: norm(x.expand(B, S, H), w),
    lambda: (trained(1, S, H), trained(H)),
)

for name, function in {"norm": norm, "gemma norm": gemma_norm}.items():
    row(f"C11 {name}", function, lambda: (trained(B, S, H), trained(1)))
    row(f"C11 {name}, bf16", function, lambda: (trained(S, H, dtype=BF16), trained(1, dtype=BF16)))
    row(f"C11 {name} of a sum", added(function), lambda: (trained(B, S, H), trained(1)))
row("C11 norm of one column", norm, lambda: (trained(B, S, 1), trained(H)))

# The programs of the table in soundness.md: Inductor compiles these and no others.
REPRESENTATIVE = [
    "C1 labels: copy written by setitem",
    "C1 hidden: copy written by mul_",
    "C3 grad of a loss",
    "C4 mlp: casts around mul_",
    "C5 written by the body of a checkpoint",
    "C5 written by a custom op's packet",
    "C5 written by embedding",
    "C6 halves differ",
    "C7 dropout before a loss",
    "C9 residual in place",
    "C10 norm of a sum seen batch first, and back",
    "C11 norm",
]


def decided_by_auto(label: str) -> bool:
    return label.split()[0] in ("C1", "C3", "C7")


def assert_no_internal_error() -> None:
    """Also where the values are right: a match that the engine fails at is one that it has not
    understood."""
    for report in liger_fx.reports():
        assert not getattr(report, "error", None), report
        assert not any(r.reason.startswith("internal error") for r in report.rejections), report


@pytest.mark.parametrize("label", PROGRAMS)
def test_aot_eager_alone_is_like_eager(label):
    """A program that this is not true of shows nothing about liger_fx."""
    program = PROGRAMS[label]
    alone = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    program.run(alone).assert_like(program.run())


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("label", PROGRAMS)
def test_all(label, inner):
    program = PROGRAMS[label]
    program.run(with_liger_fx(policy="all", inner=inner)).assert_like(program.run())
    assert_no_internal_error()


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("label", filter(decided_by_auto, PROGRAMS))
def test_auto(label, inner):
    program = PROGRAMS[label]
    program.run(with_liger_fx(policy="auto", inner=inner)).assert_like(program.run())
    assert_no_internal_error()


@pytest.mark.parametrize("label", REPRESENTATIVE)
def test_inductor(label):
    program = PROGRAMS[label]
    options = {"policy": "all", "fallback_random": True}  # random numbers as in eager
    program.run(with_liger_fx(**options)).assert_like(program.run())
    assert_no_internal_error()


# -- what must go on being replaced ----------------------------------------------------------------


def unwritten(x: Tensor) -> None:
    pass


FIRING: dict[str, tuple[Callable[..., Any], Inputs, dict[str, int]]] = {
    "labels copied": (labels_copied(unwritten), head_inputs, {"linear_cross_entropy": 1}),
    "labels copied and cast": (
        labels_copied(unwritten, copied=LABEL_COPIES["to(copy=True)"]),
        head_inputs,
        {"linear_cross_entropy": 1},
    ),
    "hidden state copied": (
        hidden_copied(unwritten),
        head_inputs_sequence_first,
        {"linear_cross_entropy": 1},
    ),
    "labels written before they are copied": (
        labels_copied(set_pads, place="before"),
        head_inputs,
        {"linear_cross_entropy": 1},
    ),
    "another tensor written": (
        lambda h, w, y, other: (labels_copied(unwritten)(h, w, y), other.mul_(2)),
        lambda: (*head_inputs(), fixed(3)),
        {"linear_cross_entropy": 1},
    ),
    "mlp over two casts": (
        reissued(lambda h: h.float(), unwritten),
        mlp_inputs,
        {"tiled_mlp": 1},
    ),
    "norm over two casts": (
        lambda x, w: (
            w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(BF16)
        ),
        norm_inputs,
        {"rms_norm": 1},
    ),
    "norm next to an embedding": (
        lambda x, w: (norm(x, w), F.embedding(torch.tensor([0, 2]), x.view(-1, H))),
        norm_inputs,
        {"rms_norm": 1},
    ),
    "norm of an embedding": (
        lambda x, w: norm(F.embedding(torch.tensor([0, 2]), x.view(-1, H)), w),
        norm_inputs,
        {"rms_norm": 1},
    ),
    "norm around an embedding": (
        norm_around(lambda x: F.embedding(torch.tensor([0, 2]), x.view(-1, H))),
        norm_inputs,
        {"rms_norm": 1},
    ),
    "norm around a checkpoint": (
        norm_around(lambda x: checkpoint(lambda t: t.sin(), x)),
        norm_inputs,
        {"rms_norm": 1},
    ),
    "norm in evaluation, around a batch norm": (
        lambda x, w, mean, var: (norm(x, w), F.batch_norm(x.view(-1, H), mean, var)),
        running_statistics,
        {"rms_norm": 1},
    ),
    "rope with angles from outside": (rotate, repeated_rope_inputs, {"rope": 1}),
    "loss in a checkpoint": (
        lambda h, w, y: checkpoint(lambda t: loss_of(t, w, y), h),
        head_inputs,
        {"linear_cross_entropy": 1},
    ),
    "losses in two checkpoints": (
        lambda h, w, y: sum(checkpoint(lambda t: loss_of(t, w, y), t) for t in (h, h.cos())),
        head_inputs,
        {"linear_cross_entropy": 2},
    ),
    "residual stream": (
        lambda x, r, w: norm((h := x + r) + norm(h, w).sin(), w),
        residual_inputs,
        {"add_rms_norm": 2},
    ),
    "norm seen batch first": (
        seen_batch_first(norm),
        lambda: (trained(S, B, H), trained(H)),
        {"rms_norm": 1},
    ),
    "norm with a weight for each column": (norm, trained_norm_inputs, {"rms_norm": 1}),
}


@pytest.mark.parametrize("label", FIRING)
def test_still_fires(label):
    fn, inputs, counts = FIRING[label]
    program = Program(fn, inputs)
    program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(program.run())
    (report,) = liger_fx.reports()
    assert report.counts == counts, report


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_loss_in_a_checkpoint_without_dropout_keeps_its_gradients(inner):
    """The op computes gradients in its forward: run again in the backward it would cost twice."""
    program = Program(*FIRING["loss in a checkpoint"][:2])
    program.run(with_liger_fx(policy="auto", inner=inner)).assert_like(program.run())
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}


# -- C8: devices -----------------------------------------------------------------------------------


def moved(part: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a model that lies on the second GPU, as pipelines of one process have them."""
    return lambda x, *others: part(x.to("cuda:1"), *others)


def loss_of_long_labels(x: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).flatten(0, 1), x.amax(-1).flatten().long())


MOVES: dict[str, tuple[Callable[..., Any], Sequence[Sequence[int]]]] = {
    "norm": (moved(norm), [(H,)]),
    "gemma norm": (moved(gemma_norm), [(H,)]),
    "layer norm": (moved(layer_norm), [(H,)]),
    "norm of a sum": (moved(lambda x, w: norm(x + x.sin(), w)), [(H,)]),
    "term of a sum": (lambda x, r, w: norm(x.to("cuda:1") + r, w), [(B, S, H), (H,)]),
    "gate": (lambda x, up: F.silu(x.to("cuda:1")) * up, [(B, S, H)]),
    "mlp": (moved(mlp), [(12, H), (12, H), (H, 12)]),
    "loss": (moved(loss_of_long_labels), [(V, H)]),
    "logits": (
        lambda x, y: F.cross_entropy(F.linear(x, x.flatten(0, 1)).flatten(0, 1).to("cuda:1"), y),
        [(B * S,)],
    ),
}


@pytest.mark.parametrize("label", MOVES)
def test_moves_to_another_device_stay(label):
    fn, shapes = MOVES[label]
    graphs = []

    def rewritten(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        small = {"linear_cross_entropy": {"chunk_tokens": 1}}  # else there are too few tokens
        liger_fx.rewrite_graph(gm, DEFAULT, settings=small)
        graphs.append(gm)
        return lambda *_: (torch.empty(()),)

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(B, S, H, device="cuda:0")
        dtype = torch.long if label == "logits" else torch.float32
        others = [torch.empty(shape, device="cuda:1", dtype=dtype) for shape in shapes]
        torch.compile(fn, backend=rewritten, fullgraph=True)(x, *others)
    for node in graphs[0].graph.nodes:
        if "liger_fx" in str(node.target):
            operands = [n.meta["example_value"] for n in node.all_input_nodes]
            devices = {str(value.device) for value in operands if isinstance(value, Tensor)}
            assert len(devices) == 1, f"{node.target} reads {devices}"
    assert any(node.target == "to" and "cuda:1" in node.args for node in graphs[0].graph.nodes)


# -- C11: weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [label for label in PROGRAMS if label.startswith("C11")])
def test_norm_ops_get_a_weight_for_each_column(label):
    """A GPU's kernel would read on beyond its end."""
    program = PROGRAMS[label]
    (gm,) = capture(program.fn, *program.inputs()).graphs
    for node in gm.graph.nodes:
        if "rms_norm" in str(node.target):
            x, *_, weight = (n.meta["example_value"] for n in node.all_input_nodes)
            assert weight.shape == x.shape[-1:], node.format_node()


# -- C13: options ----------------------------------------------------------------------------------


def test_what_another_function_met_is_not_met_by_this_one():
    inputs = head_inputs()
    options = {"require": ["linear_cross_entropy"], "inner": "eager"}
    torch.compile(loss_of, backend="liger_fx", options=dict(options))(*inputs)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}

    def returns_logits(h: Tensor, w: Tensor, y: Tensor) -> Any:
        logits = F.linear(h, w)
        return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits

    with pytest.raises(Exception, match="required but not made: linear_cross_entropy"):
        torch.compile(returns_logits, backend="liger_fx", options=dict(options))(*inputs)


def test_what_a_function_met_in_one_graph_is_met_in_its_others():
    """A graph break leaves a second graph, with a loss that cannot be fused, in one function."""

    def step(h: Tensor, w: Tensor, y: Tensor) -> Any:
        loss = loss_of(h, w, y)
        torch._dynamo.graph_break()
        return loss, norm(h, w[0])

    options = {"require": ["linear_cross_entropy"], "inner": "eager"}
    torch.compile(step, backend="liger_fx", options=options)(*head_inputs())
    assert len(liger_fx.reports()) == 2


WITHOUT_INDUCTOR = pytest.mark.parametrize("inner", ["aot_eager", "eager"])


@WITHOUT_INDUCTOR
def test_a_mode_needs_its_compiler(inner):
    """torch.compile takes either mode or options; who calls the backend may give both."""
    backend = functools.partial(liger_fx.liger_fx, mode="max-autotune", options={"inner": inner})
    with pytest.raises(Exception, match=r"(?s)mode.*inner|inner.*mode"):
        torch.compile(loss_of, backend=backend)(*head_inputs())


@WITHOUT_INDUCTOR
def test_a_mode_needs_the_compiler_of_the_environment(inner, monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", inner)
    compiled = torch.compile(loss_of, backend="liger_fx", mode="max-autotune")
    with pytest.raises(Exception, match=r"(?s)mode.*inner|inner.*mode"):
        compiled(*head_inputs())


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
