"""Liger's kernels as we launch them, by Triton's interpreter, against plain PyTorch.

`test_kernels.py` runs this file in a process of its own: the interpreter is chosen when Triton is
imported, for good. numpy has no bf16: fp32 and fp16 it is.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from unittest import mock

import _interpreter  # noqa: F401  before anything imports Triton
import pytest
import torch
from _op_checks import LAYOUTS, KernelCalls, alike, laid_out, outputs_of, run
from test_op_cross_entropy import TestCrossEntropy as CrossEntropy
from test_op_gated import TestGated as Gated
from test_op_norms import NORMS, ROWS_IN_MEMORY, two_layouts
from test_op_norms import TestAddRMSNorm as AddRMSNorm
from test_op_norms import TestRMSNorm as RMSNorm
from test_op_rope import ANGLES_OF_EACH_SEQUENCE, TABLE_LAYOUTS
from test_op_rope import TestHalves as Halves
from test_op_rope import TestPairs as Pairs
from test_op_tiled_mlp import TestTiledMLP as TiledMLP

from liger_fx.ops import kl_loss, kl_triton, library, token_loss_triton
from liger_fx.ops.token_loss import (
    TokenLoss,
    write_losses,
    write_losses_liger,
    write_losses_torch,
)

CASES = [
    *((case, (2, 3, 2, 5)) for case in (*NORMS, *Gated.CASES, *TiledMLP.CASES)),
    *((case, (2, 2, 3, 10)) for case in Halves.CASES),
    *((case, (2, 2, 2, 34)) for case in Pairs.CASES),  # two blocks of 16 pairs
    *((case, (7, 21)) for case in CrossEntropy.CASES),
]
DTYPES = [torch.float32, torch.float16]
TOLERANCES = {torch.float32: {}, torch.float16: {"atol": 2e-3, "rtol": 2e-3}}
# Liger's modules, for each op.
MODULES = {
    "rms_norm": "rms_norm",
    "add_rms_norm": "fused_add_rms_norm",
    "layer_norm": "layer_norm",
    "swiglu": "swiglu",
    "swiglu_gate_up": "swiglu",
    "geglu": "geglu",
    "geglu_gate_up": "geglu",
    "geglu_exact": "geglu",
    "geglu_exact_gate_up": "geglu",
    "clamped_swiglu": "swiglu",
    "swiglu_mlp": "swiglu",
    "geglu_mlp": "geglu",
    "geglu_exact_mlp": "geglu",
    "rope": "rope",
    "rope_interleaved": "llama4_rope",
    "cross_entropy": "cross_entropy",
}
RMS_NORM = sys.modules["liger_fx.ops.rms_norm"]  # the package has the op by that name


@contextlib.contextmanager
def as_on_a_gpu():
    """With three multiprocessors, so that each program of a backward has several rows."""
    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(library, "multiprocessors", return_value=3),
    ):
        yield


def launch(name, *arguments):
    """What runs for a kernel on CUDA."""
    module = library.liger_module(MODULES[re.sub("_(forward|backward_?)$", "", name)])
    with as_on_a_gpu():
        return library.launchers[name](module, *arguments)


def tensors_of(values):
    return [v for v in values if isinstance(v, torch.Tensor)]


def outcome(function, arguments, mutates):
    """What a kernel returns, or writes over its arguments."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    if mutates:
        function(*copies)
        return tensors_of(copies)
    results = list(outputs_of(function(*arguments)))
    assert all(map(torch.equal, tensors_of(arguments), tensors_of(copies)))
    return results


def kernel_calls(function, tensors):
    """The kernels that ``function`` and its backward call, with their arguments."""
    with KernelCalls() as kernels:
        run(function, tensors, tensors[0].dtype)
    return kernels.calls


def check_kernels(function, tensors):
    """Liger's kernels do what plain PyTorch does."""
    for kernel, arguments in kernel_calls(function, tensors):
        mutates = kernel._schema.is_mutable
        expected = outcome(kernel, arguments, mutates)
        actual = outcome(functools.partial(launch, name_of(kernel)), arguments, mutates)
        tolerance = TOLERANCES[tensors[0].dtype]
        torch.testing.assert_close(actual, expected, check_stride=True, **tolerance)


def name_of(kernel):
    return kernel._schema.name.removeprefix("liger_fx::")


def test_every_kernel_is_checked():
    calls = (call for case, shape in CASES for call in kernel_calls(case.fused, case.make(shape)))
    assert {name_of(kernel) for kernel, _ in calls} == set(library.launchers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "shape"), CASES, ids=str)
def test_as_plain_pytorch(case, shape, dtype):
    check_kernels(case.fused, case.make(shape, dtype))


@pytest.mark.parametrize("layout", ["transposed heads", "back to front", "expanded"])
@pytest.mark.parametrize(("case", "shape"), CASES, ids=str)
def test_layouts(case, shape, layout):
    check_kernels(case.fused, laid_out(case.make(shape, torch.float16), LAYOUTS[layout]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_frozen_weights(case, dtype):
    x, *others = case.make((7, 5), dtype)
    tensors = [x, *(t.requires_grad_(t.dim() > 1) for t in others)]
    check_kernels(case.fused, tensors)


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_strided_weights(case):
    tensors = case.make((7, 5))
    strided = [t if t.dim() > 1 else alike(t, t.repeat_interleave(2)[::2]) for t in tensors]
    check_kernels(case.fused, strided)


@pytest.mark.parametrize("first", ROWS_IN_MEMORY)
@pytest.mark.parametrize("second", ["contiguous", "transposed heads", "expanded"])
def test_sum_of_two_layouts(first, second):
    check_kernels(AddRMSNorm.CASES[0].fused, two_layouts(first, second))


@pytest.mark.parametrize("case", AddRMSNorm.CASES, ids=str)
def test_sum_that_goes_nowhere(case):
    check_kernels(lambda *tensors: case.fused(*tensors)[0], case.make((7, 5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RMSNorm.CASES, ids=str)
def test_rms_norm_by_blocks_of_rows(case, dtype, monkeypatch):
    monkeypatch.setattr(RMS_NORM, "_by_blocks", lambda block, rows: True)
    check_kernels(case.fused, case.make((5, 11, 5), dtype))


@pytest.mark.parametrize("layout", TABLE_LAYOUTS)
@pytest.mark.parametrize("case", ANGLES_OF_EACH_SEQUENCE, ids=str)
def test_tables_of_angles(case, layout):
    x, *tables = case.make((2, 3, 1, 6))
    check_kernels(case.fused, [x, *map(TABLE_LAYOUTS[layout], tables)])


@pytest.mark.parametrize(("case", "shape"), CASES, ids=str)
def test_no_rows(case, shape):
    check_kernels(case.fused, case.make((0, *shape[1:])))


@pytest.mark.parametrize("case", CrossEntropy.CASES, ids=str)
def test_vocabulary_of_several_blocks(case, monkeypatch):
    monkeypatch.setattr(library.liger_module("cross_entropy"), "MAX_FUSED_SIZE", 16)
    check_kernels(case.fused, case.make((7, 53)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("differentiate", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 2.0},
        {"label_smoothing": 0.1},
        {"softcap": 2.0, "label_smoothing": 0.1},
        {"class_weight": torch.rand(21)},
        {"softcap": 2.0, "class_weight": torch.rand(21)},
    ],
    ids=lambda options: ", ".join(options),
)
def test_losses_of_a_head(options, differentiate, dtype):
    loss = TokenLoss(3, **options)
    logits, target = CrossEntropy.CASES[3].make((7, 21), dtype)
    logits = logits.detach()
    plain, liger = logits.clone(), logits.clone()
    losses = torch.zeros(2, 7)
    write_losses_torch(plain, target, losses[0], loss, differentiate, None)
    write_losses_liger(liger, target, losses[1], loss, differentiate)
    torch.testing.assert_close(losses[1], losses[0])
    if not differentiate:
        plain[target == 3] = 0  # the kernel clears them even so
    torch.testing.assert_close(liger, plain, **TOLERANCES[dtype])


DIRECTIONS = [kl_loss.Divergence(3, *each) for each in [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)]]
BETAS = [kl_loss.Divergence(3, beta=b, temperature=2.0) for b in (0.0, 0.1, 0.5, 1.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("differentiate", [True, False])
@pytest.mark.parametrize("loss", DIRECTIONS, ids=str)
@pytest.mark.parametrize("weights", [None, [0.6, -2.0]])
@pytest.mark.parametrize("infinite", [False, True])
def test_divergences_of_a_head(loss, weights, differentiate, infinite, dtype, monkeypatch):
    monkeypatch.setattr(kl_triton, "_BLOCK", 16)
    check_divergence(loss, weights, differentiate, infinite, dtype)


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("loss", BETAS, ids=str)
def test_jensen_shannon_divergences_of_a_head(loss, infinite, monkeypatch):
    monkeypatch.setattr(kl_triton, "_BLOCK", 16)
    check_divergence(loss, [0.6, -2.0], True, infinite, torch.float32)
    if not infinite:
        check_divergence(loss, None, loss.beta == 0.5, infinite, torch.float16)


def check_divergence(loss, weights, differentiate, infinite, dtype):
    logits, target = CrossEntropy.CASES[3].make((7, 53), dtype)
    teacher = torch.randn(7, 53).to(dtype)
    target[1] = target[3] = 3
    mask = torch.tensor([True, False, True, True, True, False, True])
    mask = None if loss.beta == 0.1 else mask
    if infinite:  # a whole block, single ones, another block of the teacher's, everything
        logits = logits.detach().clone()
        logits[0, :16] = logits[2, 5] = logits[4] = -torch.inf
        teacher[2, 32:48] = teacher[5, 7] = -torch.inf
        if loss.beta in (None, 1.0):
            logits[6, 20] = torch.inf
        if loss.beta == 0.0:  # then the divergence is infinite, and where it is depends on p = 0
            teacher[0, :16] = teacher[2, 5] = -torch.inf
    weights = weights and torch.tensor(weights)
    plain, triton = (torch.zeros(7, 64, dtype=dtype)[:, :53].copy_(logits.detach()) for _ in "ab")
    losses = torch.zeros(2, 2, 7)
    for logits, write, to in (
        (plain, kl_loss.write_losses_torch, losses[0]),
        (triton, kl_triton.write_losses_triton, losses[1]),
    ):
        labels = None if weights is None else target
        write(logits, teacher, labels, mask, to, loss, weights, differentiate)
    torch.testing.assert_close(losses[1], losses[0], equal_nan=True)
    torch.testing.assert_close(triton, plain, equal_nan=True, **TOLERANCES[dtype])


@pytest.mark.parametrize("loss", [*DIRECTIONS[:2], *BETAS], ids=str)
def test_divergences_of_confident_rows(loss, monkeypatch):
    monkeypatch.setattr(kl_triton, "_BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    student = 100 + torch.randn(16, 61, generator=generator)
    student[range(16), torch.arange(16)] += 9
    teacher = 50 + student + 0.1 * torch.randn(16, 61, generator=generator)
    losses, exact = torch.zeros(2, 16), torch.zeros(2, 16, dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0])
    arguments = (teacher, torch.arange(16), None)
    kl_triton.write_losses_triton(student, *arguments, losses, loss, weights, False)
    kl_loss.write_losses_torch(student, *arguments, exact, loss, weights.double(), False)
    torch.testing.assert_close(losses.double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("differentiate", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_scaled_losses_of_a_head(entropy, differentiate, temperature, block, dtype, monkeypatch):
    monkeypatch.setattr(token_loss_triton, "_MAX_BLOCK", block)
    loss = TokenLoss(3, temperature=temperature, entropy=entropy)
    logits, target = CrossEntropy.CASES[3].make((7, 53), dtype)
    logits = logits.detach()
    logits[2, 7:40] = float("-inf")  # a whole block as well
    logits[4] *= 300
    target[2], target[4] = 50, 5
    plain, ours = logits.clone(), torch.cat([logits, logits], 1)[:, :53]  # of wider rows
    shape = (2, 7) if entropy else (7,)
    plain_values, values = torch.zeros(2, *shape)
    factor = torch.randn(*shape, 1) if differentiate and (entropy or block == 16) else None
    write_losses(plain, target, plain_values, loss, differentiate, factor)
    token_loss_triton.write_losses_triton(ours, target, values, loss, differentiate, factor)
    torch.testing.assert_close(values, plain_values)
    torch.testing.assert_close(ours, plain, **TOLERANCES[dtype])


def test_losses_and_entropies_of_logits_that_are_not_finite():
    logits = torch.randn(3, 21)
    logits[1, 5] = float("nan")
    target, values, factor = torch.tensor([1, 2, 3]), torch.zeros(2, 3), torch.ones(2, 3, 1)
    loss = TokenLoss(-1, entropy=True)
    token_loss_triton.write_losses_triton(logits, target, values, loss, True, factor)
    assert values.isnan().tolist() == 2 * [[False, True, False]]
    assert logits.isnan().all(1).tolist() == logits.isnan().any(1).tolist() == [False, True, False]
