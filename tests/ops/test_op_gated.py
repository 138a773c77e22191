"""``liger_fx::swiglu``, ``geglu``, ``geglu_exact``, their halves of one tensor, ``clamped_swiglu``:
against fp64 and against eager."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from _op_checks import (
    Case,
    Contract,
    no_compile_caches,
    outputs_of,
    randn,
    upstreams,
)
from _util import DEVICE, relative_error
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

from liger_fx import ops


def swiglu(gate, up, overwrite=False):
    return F.silu(gate) * up


def swiglu_gate_up(gate_up, overwrite=False):
    return swiglu(*gate_up.chunk(2, dim=-1))


def geglu(gate, up, overwrite=False):
    return F.gelu(gate, approximate="tanh") * up


def geglu_gate_up(gate_up, overwrite=False):
    return geglu(*gate_up.chunk(2, dim=-1))


def geglu_exact(gate, up, overwrite=False):
    return F.gelu(gate) * up


def geglu_exact_gate_up(gate_up, overwrite=False):
    return geglu_exact(*gate_up.chunk(2, dim=-1))


def clamped_swiglu(gate_up, alpha, limit, interleaved):
    """As Hugging Face's GPT-OSS writes it."""
    if interleaved:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    else:
        gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(min=None, max=limit), up.clamp(min=-limit, max=limit)
    glu = gate * torch.sigmoid(gate * alpha)
    return (up + 1) * glu


def gate_and_up(shape, dtype, generator):
    return [randn(shape, dtype, generator) for _ in range(2)]


def in_one(shape, dtype, generator):
    return [randn((*shape[:-1], 2 * shape[-1]), dtype, generator)]


class TestGated(Contract):
    CASES = tuple(
        Case(f"{eager.__name__}{', overwrite' * overwrite}", op, eager, inputs, (overwrite,))
        for overwrite in (False, True)
        for op, eager, inputs in (
            (ops.swiglu, swiglu, gate_and_up),
            (ops.geglu, geglu, gate_and_up),
            (ops.swiglu_gate_up, swiglu_gate_up, in_one),
            (ops.geglu_gate_up, geglu_gate_up, in_one),
            (ops.geglu_exact, geglu_exact, gate_and_up),
            (ops.geglu_exact_gate_up, geglu_exact_gate_up, in_one),
        )
    ) + tuple(
        Case(
            f"clamped_swiglu, {'interleaved' if interleaved else 'halves'}",
            ops.clamped_swiglu,
            clamped_swiglu,
            in_one,
            (1.702, 0.75, interleaved),
        )
        for interleaved in (False, True)
    )
    SHAPES = ((48,), (1, 257), (7, 5), (2, 3, 48), (4, 1), (0, 48), (2, 0, 48), (100_003, 5))
    BIG = (2**31 // 8192 + 3, 8192)


@pytest.mark.parametrize("limit", [7.0, 0.0])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_at_the_limits_of_a_clamp(interleaved, limit):
    """As in eager, whose convention differs between versions of torch."""
    gate_up = torch.tensor([limit, -limit, limit, -limit], device=DEVICE, requires_grad=True)
    gradients = [
        torch.autograd.grad(act(gate_up, 1.702, limit, interleaved).sum(), gate_up)
        for act in (ops.clamped_swiglu, clamped_swiglu)
    ]
    torch.testing.assert_close(*gradients)


# -- the backward writes over its inputs where it may ---------------------------------------------
#
# An MLP whose projections a checkpoint recomputes, or not, compiled by Inductor.


def projected(use, act):
    return lambda x, *weights: use(act, *(F.linear(x, w) for w in weights))


def in_a_checkpoint(block):
    return lambda *tensors: checkpoint(block, *tensors, use_reentrant=False)


def in_the_open(block):
    return block


def x_and_weights(count):
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(2, 6, 16)] + [(48, 16)] * count
    return [randn(shape, torch.float32, generator) for shape in shapes]


SITUATIONS = [in_a_checkpoint, in_the_open]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(
    ("op", "count"),
    [(ops.swiglu, 2), (ops.geglu_exact, 2), (ops.swiglu_gate_up, 1), (ops.geglu_gate_up, 1)],
)
def test_backward_in_place(op, count, situation):
    """On what a checkpoint has just recomputed without a copy; on copies of what was saved."""
    tensors = x_and_weights(count)
    block = projected(lambda act, *inputs: act(*inputs, overwrite=True).square().sum(), op)
    with no_compile_caches():
        compiled = torch.compile(situation(block), fullgraph=True)
        _, codes = run_and_get_code(lambda: torch.autograd.grad(compiled(*tensors), tensors))
    before, call = codes[-1].split("_backward_.default(")
    recomputed = re.findall(r"extern_kernels\.mm\(.*, out=(\w+)\)", before)
    written = re.findall(r"buf\d+", call)[:count]
    assert set(written).issubset(recomputed) == (situation is in_a_checkpoint), codes[-1]


OVERWRITING = functools.partial(ops.swiglu, overwrite=True)
# Uses of gate and up beside the op: by whom else they are read, and how they lie in memory.
USES = {
    "read elsewhere": lambda act, g, u: act(g, u).sum() * g.square().sum() + u.sin().sum(),
    "upstream from the gate": lambda act, g, u: (act(g, u) * g).sum() + (act(u, g) * u).sum(),
    "returned": lambda act, g, u: (g, act(g, u), u.relu()),
    "one tensor for both": lambda act, g, u: act(g, g) + u,
    "halves": lambda act, g, u: (act(*g.chunk(2, dim=-1)), u),
    "overlapping": lambda act, g, u: (act(g.flatten()[:-16], g.flatten()[16:]), u),
    "saved by what made them": lambda act, g, u: act(g.tanh(), u.sigmoid()),
}
READ_BY_NOTHING_ELSE = list(USES)[3:]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(
    ("use", "act"),
    [
        *((use, ops.swiglu) for use in USES),
        *((use, OVERWRITING) for use in READ_BY_NOTHING_ELSE),
    ],
    ids=lambda value: {ops.swiglu: "spare", OVERWRITING: "overwrite"}.get(value, value),
)
def test_backward_in_place_spares_what_is_still_read(use, act, situation):
    tensors = x_and_weights(2)

    def gradients(function):
        outputs = outputs_of(function(*tensors))
        upstream = upstreams(outputs, torch.float32)
        twice = (torch.autograd.grad(outputs, tensors, upstream, retain_graph=True) for _ in "12")
        return tuple(twice)

    expected, _ = gradients(projected(USES[use], swiglu))
    fused = situation(projected(USES[use], act))
    # Inductor may write over saved tensors, and then refuses a second backward: not so here.
    with no_compile_caches(), torch._functorch.config.patch(donated_buffer=False):
        first, second = gradients(torch.compile(fused, fullgraph=True))
    assert all(relative_error(f, e) < 1e-5 for f, e in zip(first, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
