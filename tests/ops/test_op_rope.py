"""``liger_fx::rope`` and ``rope_interleaved``, against fp64 and against eager."""

from __future__ import annotations

import functools

import pytest
import torch
from _op_checks import Case, Contract, in_fp64, randn, upstreams, wide
from _util import TOLERANCES, relative_error

from liger_fx import ops

# -- eager ----------------------------------------------------------------------------------------


def rope(x, cos, sin, inverse, from_pairs=False, to_pairs=False, heads_first=False):
    """As Hugging Face writes it, in the dtype of the tables, or the transpose of that. What is in
    pairs is put in halves first, and back afterwards."""
    heads = 1 if heads_first else 2
    rotary, cos, sin = cos.shape[-1], cos.unsqueeze(heads), sin.unsqueeze(heads)
    turned, rest = x[..., :rotary], x[..., rotary:]
    if from_pairs:
        turned = apart(turned)
    if from_pairs and to_pairs:
        cos, sin = apart(cos), apart(sin)
    if inverse:
        left, right = (turned * sin).chunk(2, dim=-1)
        crossed = torch.cat([right, -left], dim=-1)
    else:
        left, right = turned.chunk(2, dim=-1)
        crossed = torch.cat([-right, left], dim=-1) * sin
    turned = (turned * cos + crossed).to(x.dtype)
    if to_pairs:
        turned = turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat([turned, rest], dim=-1)


def apart(t):
    """Neighbours in the last dimension, put half of it apart."""
    return torch.cat([t[..., ::2], t[..., 1::2]], dim=-1)


def rope_interleaved(x, angles, inverse):
    """As torchtune writes it: in fp32."""
    a, b = wide(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = wide(angles).unsqueeze(2).unbind(-1)
    if inverse:
        sin = -sin
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


# -- inputs ---------------------------------------------------------------------------------------


def angles(shape, count, generator, batches=1, seq=1):
    """One angle for each position and pair. seq: the dimension of positions."""
    of_batch = (shape[0] if batches is None else batches, shape[seq], count)
    return 3 * randn(of_batch, torch.float32, generator, grad=False)


def x_cos_sin(shape, dtype, generator, *, part=1, batches=1, tables=None, equal=True, seq=1):
    """part: of each head that is rotated. batches: None: angles for each sequence. equal: halves."""
    pairs = max(shape[-1] // 2 // part, 1)
    if equal:
        theta = angles(shape, pairs, generator, batches, seq).repeat(1, 1, 2)
    else:
        theta = angles(shape, 2 * pairs, generator, batches, seq)
    return [
        randn(shape, dtype, generator),
        *(f(theta).to(tables or dtype) for f in (torch.cos, torch.sin)),
    ]


def x_angles(shape, dtype, generator, *, batches=1):
    theta = angles(shape, shape[-1] // 2, generator, batches)
    return [randn(shape, dtype, generator), torch.stack([theta.cos(), theta.sin()], dim=-1)]


def transposed(inverse, *layout):
    """The literals of the transpose."""
    return not inverse, *layout[1::-1], *layout[2:]


class RopeContract(Contract):
    BIG = (2**31 // (16 * 32 * 128) + 3, 16, 32, 128)

    def test_second_derivative(self, case):
        """The derivative is the rotation backwards, its derivative the rotation, and so on."""
        source, *tables = case.make()
        value, literals = case.fused(source, *tables), case.literals
        for _ in range(3):
            (upstream,) = upstreams([value], torch.float32)
            upstream.requires_grad_()
            (value,) = torch.autograd.grad(value, source, upstream, create_graph=True)
            source, literals = upstream, transposed(*literals)
            torch.testing.assert_close(value, case.op(source, *tables, *literals))

    def test_inverse_is_the_transpose(self, case):
        x, *tables = in_fp64(case.make())
        y = torch.randn_like(x)
        back = case.op(y, *tables, *transposed(*case.literals))
        forth = (case.fused(x, *tables) * y).sum()
        torch.testing.assert_close(forth, (x * back).sum(), rtol=1e-5, atol=1e-4)  # fp32 on a GPU


class TestHalves(RopeContract):
    CASES = tuple(
        Case(name, ops.rope, rope, functools.partial(x_cos_sin, **options), (inverse,))
        for name, options, inverse in (
            ("whole", {}, False),
            ("inverse", {}, True),
            ("partial", {"part": 2}, False),
            ("partial inverse", {"part": 3}, True),
            ("angles of each sequence", {"batches": None}, False),
            ("fp32 tables", {"tables": torch.float32}, False),
            ("bf16 tables", {"tables": torch.bfloat16}, False),
            ("unequal halves", {"equal": False}, False),
            ("unequal halves, inverse", {"equal": False}, True),
            ("unequal halves, partial", {"equal": False, "part": 2, "batches": None}, False),
        )
    ) + tuple(
        Case(name, ops.rope, rope, functools.partial(x_cos_sin, **options), literals)
        for name, options, literals in (
            ("pairs", {}, (False, True, True)),
            ("pairs, partial inverse", {"part": 3, "batches": None}, (True, True, True)),
            ("unequal pairs", {"equal": False}, (False, True, True)),
            ("pairs to halves", {}, (False, True, False)),
            ("pairs to halves, inverse", {}, (True, True, False)),
            ("halves to pairs, partial inverse", {"part": 2}, (True, False, True)),
            ("unequal, pairs to halves", {"equal": False}, (False, True, False)),
            ("heads first", {"seq": 2}, (False, False, False, True)),
            ("heads first, pairs to halves", {"seq": 2}, (False, True, False, True)),
            ("heads first, partial", {"seq": 2, "part": 2}, (True, False, True, True)),
        )
    )
    SHAPES = (
        (1, 1, 1, 2),
        (2, 7, 3, 6),
        (2, 5, 1, 50),
        (0, 5, 2, 8),
        (2, 0, 2, 8),
        (1, 20_003, 5, 2),
    )


class TestPairs(RopeContract):
    CASES = tuple(
        Case(
            name,
            ops.rope_interleaved,
            rope_interleaved,
            functools.partial(x_angles, **options),
            (inverse,),
        )
        for name, options, inverse in (
            ("shared angles", {}, False),
            ("inverse", {}, True),
            ("packed", {"batches": None}, False),
            ("packed inverse", {"batches": None}, True),
        )
    )
    SHAPES = TestHalves.SHAPES


TABLE_LAYOUTS = {
    "expanded": lambda t: t[:1].expand_as(t),
    "start of a longer table": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "columns of a wider table": lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
    "every second column": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "positions first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


ANGLES_OF_EACH_SEQUENCE = [TestHalves.CASES[4], TestPairs.CASES[2]]


@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
@pytest.mark.parametrize("case", ANGLES_OF_EACH_SEQUENCE, ids=str)
def test_tables_in_any_layout(case, layout):
    x, first, *others = case.make()
    laid = TABLE_LAYOUTS[layout](first)
    actual = case.fused(x, laid, *others)
    torch.testing.assert_close(actual, case.fused(x, laid.contiguous(), *others))
    if others:
        actual = case.fused(x, first, TABLE_LAYOUTS[layout](others[0]))
        expected = case.fused(x, first, TABLE_LAYOUTS[layout](others[0]).contiguous())
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("case", TestHalves.CASES[:5], ids=str)
def test_equal_halves_make_a_rotation(case, inverse):
    x, *tables = case.make()
    back = case.op(case.op(x, *tables, inverse), *tables, not inverse)
    assert relative_error(back, x) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_rotated_stays(dtype):
    x, cos, sin = TestHalves.CASES[2].make(dtype=dtype)
    rotary = cos.shape[-1]
    turned = ops.rope(x, cos, sin, False)
    assert rotary < x.shape[-1] and torch.equal(turned[..., rotary:], x[..., rotary:])
