"""C3, C6, C7, C8, C10 and C11: around and inside of a match, what an op must not take for granted.

The label of a program starts with the row of the table that it belongs to:

- C3  a loss or a norm inside a function transform (torch.func);
- C6  rotary embeddings whose cos and sin do not repeat themselves;
- C7  dropout in the same checkpoint as a loss;
- C10 tensors whose memory is not in the order of their dimensions;
- C11 weights that broadcast.

C8, tensors of two devices, is no comparison and stands at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _programs import (
    BF16,
    EPS,
    HALF,
    HEADS,
    B,
    H,
    Inputs,
    LikeEager,
    Program,
    S,
    Table,
    V,
    checkpoint,
    finish_norm,
    fixed,
    gemma_norm,
    head_inputs,
    head_inputs_sequence_first,
    layer_norm,
    loss_of,
    mlp,
    norm,
    repeated_rope_inputs,
    rope_inputs,
    rotate,
    torchtune_norm,
    trained,
    trained_norm_inputs,
    with_liger_fx,
)
from _util import capture
from liger_fx.passes import DEFAULT
from torch import Tensor
from torch._subclasses import FakeTensorMode

import liger_fx

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


# -- the table -------------------------------------------------------------------------------------

PROGRAMS = Table()
row = PROGRAMS.add


for name, (fn, inputs) in TRANSFORMS.items():
    row(f"C3 {name}", fn, inputs)
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
    "C10 rotation and its value without a gradient, both returned",
    lambda q, *angles: ((rotated := rotate(q.transpose(1, 2), *angles)), rotated.detach()),
    lambda: (trained(B, S, HEADS, 2 * HALF), *repeated_rope_inputs()[1:]),
)
for name, function in {"norm": norm, "norm of a sum": lambda x, w: added(norm)(x, w)[0]}.items():
    row(
        f"C10 projection, dropout and {name}, seen batch first",
        seen_batch_first(
            lambda x, w_in, w, w_out, function=function: F.linear(
                function(F.dropout(x + F.linear(x, w_in), 0.5), w), w_out
            )
        ),
        lambda: (trained(S, B, H), trained(H, H), trained(H), trained(H, H)),
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


FIRING = {
    "rope with angles from outside": (Program(rotate, repeated_rope_inputs), {"rope": 1}),
    "norm seen batch first": (
        Program(seen_batch_first(norm), lambda: (trained(S, B, H), trained(H))),
        {"rms_norm": 1},
    ),
    "norm with a weight for each column": (Program(norm, trained_norm_inputs), {"rms_norm": 1}),
}


class TestValues(LikeEager):
    PROGRAMS = PROGRAMS
    AUTO = ("C3", "C7")
    UNDER_INDUCTOR = (
        "C3 grad of a loss",
        "C6 halves differ",
        "C7 dropout before a loss",
        "C10 norm of a sum seen batch first, and back",
        "C11 norm",
    )
    FIRING = FIRING


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_loss_in_a_checkpoint_without_dropout_keeps_its_gradients(inner):
    """The op computes gradients in its forward: run again in the backward it would cost twice."""
    program = Program(lambda h, w, y: checkpoint(lambda t: loss_of(t, w, y), h), head_inputs)
    program.run(with_liger_fx(policy="auto", inner=inner)).assert_like(program.run())
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}


# -- C8: devices -----------------------------------------------------------------------------------


# A fake tensor may lie on a GPU that does not exist, but CUDA checks the index where there is one.
SECOND = "cpu" if torch.cuda.device_count() == 1 else "cuda:1"


def moved(part: Callable[..., Any]) -> Callable[..., Any]:
    """A part of a model that lies on a second device, as pipelines of one process have them."""
    return lambda x, *others: part(x.to(SECOND), *others)


def loss_of_long_labels(x: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w).flatten(0, 1), x.amax(-1).flatten().long())


MOVES: dict[str, tuple[Callable[..., Any], Sequence[Sequence[int]]]] = {
    "norm": (moved(norm), [(H,)]),
    "gemma norm": (moved(gemma_norm), [(H,)]),
    "layer norm": (moved(layer_norm), [(H,)]),
    "norm of a sum": (moved(lambda x, w: norm(x + x.sin(), w)), [(H,)]),
    "term of a sum": (lambda x, r, w: norm(x.to(SECOND) + r, w), [(B, S, H), (H,)]),
    "gate": (lambda x, up: F.silu(x.to(SECOND)) * up, [(B, S, H)]),
    "mlp": (moved(mlp), [(12, H), (12, H), (H, 12)]),
    "loss": (moved(loss_of_long_labels), [(V, H)]),
    "logits": (
        lambda x, y: F.cross_entropy(F.linear(x, x.flatten(0, 1)).flatten(0, 1).to(SECOND), y),
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
        others = [torch.empty(shape, device=SECOND, dtype=dtype) for shape in shapes]
        torch.compile(fn, backend=rewritten, fullgraph=True)(x, *others)
    for node in graphs[0].graph.nodes:
        if "liger_fx" in str(node.target):
            operands = [n.meta["example_value"] for n in node.all_input_nodes]
            devices = {str(value.device) for value in operands if isinstance(value, Tensor)}
            assert len(devices) == 1, f"{node.target} reads {devices}"
    assert any(node.target == "to" and SECOND in node.args for node in graphs[0].graph.nodes)


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
