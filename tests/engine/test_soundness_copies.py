"""C1 and C4: a copy, or one expression written twice, and somebody who writes to either side.

The label of a program starts with the row of the table that it belongs to:

- C1  somebody writes to a copy, or to what was copied;
- C4  one expression written twice, with a write between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _programs import (
    BF16,
    EPS,
    HALF,
    PAD,
    B,
    H,
    LikeEager,
    Place,
    Program,
    S,
    Table,
    V,
    checkpoint,
    fixed,
    head_inputs,
    head_inputs_sequence_first,
    loss_of,
    mlp_inputs,
    norm,
    norm_inputs,
    repeated_rope_inputs,
    same,
    set_pads,
    set_row,
    trained,
    trained_norm_inputs,
)
from torch import Tensor

# -- what is written, and where --------------------------------------------------------------------


LABEL_WRITES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": set_pads,
    "masked_fill_": lambda t: t.masked_fill_(t == PAD, -100),
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
    "to(copy=True)": lambda y: y[..., 1:].to(torch.int64, copy=True),
    "copied by its type": lambda y: y.to(y.dtype, copy=True)[..., 1:],
}

COPY = TARGETS["copy"]


def labels_copied(
    write: Callable[[Tensor], Any],
    target: Target = COPY,
    place: Place = "between",
    copied: Callable[[Tensor], Tensor] = lambda y: y[..., 1:].contiguous(),
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


# -- the table -------------------------------------------------------------------------------------

PROGRAMS = Table()
row = PROGRAMS.add


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
for name, target in list(TARGETS.items())[1:]:  # the copy itself stands above
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
    reissued(lambda h: h.float(), lambda h: checkpoint(lambda t: t.add_(1), h.detach())),
    mlp_inputs,
)
row("C4 norm: casts around a write", norm_of_two_casts, norm_inputs)
row("C4 norm: casts around a write to a view", norm_of_two_casts_of_a_view, norm_inputs)
row("C4 norm: copies around a write", norm_of_two_copies, norm_inputs)
row("C4 gates: chunks around a write", gates_of_two_chunks, norm_inputs)
row("C4 rope: halves around a write", rotated_around_a_write, repeated_rope_inputs)


def unwritten(x: Tensor) -> None:
    pass


FIRING = {
    "labels copied": (Program(labels_copied(unwritten), head_inputs), {"linear_cross_entropy": 1}),
    "labels copied and cast": (
        Program(labels_copied(unwritten, copied=LABEL_COPIES["to(copy=True)"]), head_inputs),
        {"linear_cross_entropy": 1},
    ),
    "hidden state copied": (
        Program(hidden_copied(unwritten), head_inputs_sequence_first),
        {"linear_cross_entropy": 1},
    ),
    "labels written before they are copied": (
        Program(labels_copied(set_pads, place="before"), head_inputs),
        {"linear_cross_entropy": 1},
    ),
    "another tensor written": (
        Program(
            lambda h, w, y, other: (labels_copied(unwritten)(h, w, y), other.mul_(2)),
            lambda: (*head_inputs(), fixed(3)),
        ),
        {"linear_cross_entropy": 1},
    ),
    "mlp over two casts": (
        Program(reissued(lambda h: h.float(), unwritten), mlp_inputs),
        {"tiled_mlp": 1},
    ),
    "norm over two casts": (
        Program(
            lambda x, w: (
                w
                * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(BF16)
            ),
            norm_inputs,
        ),
        {"rms_norm": 1},
    ),
}


class TestCopies(LikeEager):
    PROGRAMS = PROGRAMS
    AUTO = ("C1",)
    UNDER_INDUCTOR = (
        "C1 labels: copy written by setitem",
        "C1 hidden: copy written by mul_",
        "C4 mlp: casts around mul_",
    )
    FIRING = FIRING
