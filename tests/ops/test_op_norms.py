"""``liger_fx::rms_norm``, ``add_rms_norm`` and ``layer_norm``, against fp64 and against eager."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from _op_checks import (
    LAYOUTS,
    Case,
    Contract,
    KernelCalls,
    alike,
    assert_all_close,
    randn,
    run,
    wide,
)

from liger_fx import ops

EPS = 1e-6
SHAPES = [(48,), (1, 257), (7, 5), (2, 3, 48), (4, 1), (0, 48), (2, 0, 48), (100_003, 5)]
BIG = (2**31 // 4096 + 3, 4096)


# -- eager ----------------------------------------------------------------------------------------


def rms_norm(x, weight, eps, offset, casting):
    if casting == "gemma" and weight is not None and not offset:
        return torch.rms_norm(wide(x), x.shape[-1:], wide(weight), eps).to(x.dtype)
    normed = wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if casting == "gemma":
        return (normed * (offset + wide(weight))).to(x.dtype)
    return (offset + weight if offset else weight) * normed.to(x.dtype)


def add_rms_norm(x, residual, weight, eps, offset, casting):
    total = x + residual
    return rms_norm(total, weight, eps, offset, casting), total


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# -- inputs ---------------------------------------------------------------------------------------


def inputs(shape, dtype, generator, *, tensors=1, parameters=1, parameter_dtype=None):
    """``tensors`` of [..., H] and ``parameters`` of [H]."""
    return [randn(shape, dtype, generator) for _ in range(tensors)] + [
        randn(shape[-1:], parameter_dtype or dtype, generator) for _ in range(parameters)
    ]


def rms_norm_case(name, casting, offset, **options):
    literals = (EPS, offset, casting)
    if options.get("parameters") == 0:
        literals = (None, *literals)
    return Case(name, ops.rms_norm, rms_norm, functools.partial(inputs, **options), literals)


class TestRMSNorm(Contract):
    CASES = (
        rms_norm_case("gemma", "gemma", 0.0),
        rms_norm_case("gemma, 1 + weight", "gemma", 1.0),
        rms_norm_case("gemma, no weight", "gemma", 0.0, parameters=0),
        rms_norm_case("gemma, 1 + fp32 weight", "gemma", 1.0, parameter_dtype=torch.float32),
        rms_norm_case("llama", "llama", 0.0),
        rms_norm_case("llama, 1 + weight", "llama", 1.0),
        rms_norm_case("llama, no weight", "llama", 0.0, parameters=0),
    )
    SHAPES, BIG, OWN_LAYOUT = SHAPES, BIG, True


class TestAddRMSNorm(Contract):
    CASES = tuple(
        Case(
            f"{casting}, {offset:g} + weight",
            ops.add_rms_norm,
            add_rms_norm,
            functools.partial(inputs, tensors=2),
            (EPS, offset, casting),
        )
        for casting in ("gemma", "llama")
        for offset in (0.0, 1.0)
    )
    SHAPES, BIG, OWN_LAYOUT = SHAPES, BIG, True


class TestLayerNorm(Contract):
    CASES = tuple(
        Case(
            name,
            ops.layer_norm,
            layer_norm,
            functools.partial(inputs, parameters=parameters),
            (*(None,) * (2 - parameters), EPS),
        )
        for name, parameters in (
            ("layer norm", 2),
            ("layer norm, no bias", 1),
            ("layer norm, no parameters", 0),
        )
    )
    # One element has no variance: all that is left of it is rounding, 1 / sqrt(eps) times enlarged.
    SHAPES = tuple(shape for shape in SHAPES if shape[-1] > 1)
    BIG, OWN_LAYOUT = BIG, True


NORMS = [*TestRMSNorm.CASES, *TestAddRMSNorm.CASES, *TestLayerNorm.CASES]
WITH_WEIGHTS = [case for case in NORMS if len(case.make((2, 5))) > 1]


@pytest.mark.parametrize("case", WITH_WEIGHTS, ids=str)
def test_strided_weights(case):
    tensors = case.make()
    strided = [t if t.dim() > 1 else alike(t, t.repeat_interleave(2)[::2]) for t in tensors]
    assert_all_close(run(case.fused, strided), run(case.fused, tensors))


@pytest.mark.parametrize("case", WITH_WEIGHTS, ids=str)
def test_frozen_weights_cost_no_gradient(case):  # A19
    with KernelCalls() as kernels:
        run(case.fused, [t.requires_grad_(t.dim() > 1) for t in case.make()])
    (_, _), (backward, arguments) = kernels.calls
    *_, weight_grad = arguments
    assert weight_grad is False
    assert not any(gradient.numel() for gradient in backward(*arguments)[1:])


ROWS_IN_MEMORY = [*(name for name in LAYOUTS if name != "back to front"), "contiguous"]


def two_layouts(first, second):
    """x and the residual, the one laid out as ``first`` and the other as ``second``."""
    x, residual, weight = TestAddRMSNorm.CASES[0].make()
    both = (LAYOUTS.get(n, torch.clone)(t) for t, n in ((x, first), (residual, second)))
    return [*(alike(x, t) for t in both), weight]


@pytest.mark.parametrize("first", ROWS_IN_MEMORY)
@pytest.mark.parametrize("second", ROWS_IN_MEMORY)
def test_sum_and_norm_lie_in_memory_as_eagers_sum(first, second):
    case = TestAddRMSNorm.CASES[0]
    tensors = two_layouts(first, second)
    expected = (tensors[0] + tensors[1]).stride()
    assert [output.stride() for output in case.fused(*tensors)] == [expected, expected]
    assert_all_close(run(case.fused, tensors), run(case.reference, tensors))
    torch.library.opcheck(case.op, (*tensors, *case.literals))


@pytest.mark.parametrize("case", TestAddRMSNorm.CASES, ids=str)
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_result_is_used(case, used):
    """The norm in a decoder's last layer, the sum where a block is skipped."""
    x, residual, weight = case.make()
    weight = weight.detach()
    with KernelCalls() as kernels:
        actual = run(lambda *t: case.fused(*t)[used], [x, residual, weight])
    expected = run(lambda *t: case.reference(*t)[used], [x, residual, weight])
    assert_all_close(actual, expected)
    # No zeros are made for the other result.  A18
    upstream_of_the_sum = [arguments[1] for _, arguments in kernels.calls[1:]]
    assert upstream_of_the_sum == [None][used:]
