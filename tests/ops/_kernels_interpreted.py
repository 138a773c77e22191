"""Liger's kernels as we launch them, by Triton's interpreter, against plain PyTorch.

`test_kernels.py` runs this file in a process of its own: the interpreter is chosen when Triton is
imported, for good. numpy has no bf16: fp32 and fp16 it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import sys
from unittest import mock

import _interpreter  # noqa: F401  before anything imports Triton
import pytest
import torch
from _op_checks import LAYOUTS, KernelCalls, alike, laid_out, run
from test_op_cross_entropy import TestCrossEntropy as CrossEntropy
from test_op_gated import TestGated as Gated
from test_op_linear_loss import CE, JSD, MIXTURE, ONE, TUNES, TWO, grads
from test_op_linear_loss import Case as Head
from test_op_norms import NORMS, ROWS_IN_MEMORY, two_layouts
from test_op_norms import TestAddRMSNorm as AddRMSNorm
from test_op_norms import TestRMSNorm as RMSNorm
from test_op_rope import ANGLES_OF_EACH_SEQUENCE, TABLE_LAYOUTS
from test_op_rope import TestHalves as Halves
from test_op_rope import TestPairs as Pairs
from test_op_tiled_mlp import TestTiledMLP as TiledMLP
from torch.utils._pytree import tree_leaves, tree_map_only

from liger_fx import ops
from liger_fx.ops import kl_loss, kl_triton, library, token_loss, token_loss_triton
from liger_fx.ops.token_loss import (
    TAKES,
    TokenLoss,
    write_cross_entropy_liger,
    write_values_torch,
)

CASES = [
    *((case, (2, 3, 2, 5)) for case in (*NORMS, *Gated.CASES, *TiledMLP.CASES)),
    *((case, (2, 2, 3, 10)) for case in Halves.CASES),
    *((case, (2, 2, 2, 34)) for case in Pairs.CASES),  # two blocks of 16 pairs
    *((case, (7, 21)) for case in CrossEntropy.CASES),
]
DTYPES = [torch.float32, torch.float16]
TOLERANCES = {torch.float32: {}, torch.float16: {"atol": 2e-3, "rtol": 2e-3}}
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
    module = library.liger_module(library.modules[name])
    with as_on_a_gpu():
        return library.launchers[name](module, *arguments)


def tensors_of(values):
    return [v for v in tree_leaves(values) if isinstance(v, torch.Tensor)]


def outcome(function, arguments, mutates):
    """What a kernel returns, or writes over its arguments."""
    copies = tree_map_only(torch.Tensor, torch.clone, arguments)
    if mutates:
        function(*copies)
        return tensors_of(copies)
    results = tensors_of(function(*arguments))
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


def test_a_clamp_at_its_limits():
    gate_up = torch.tensor([7.0, -7.0, 7.0, -7.0], requires_grad=True)
    check_kernels(lambda t: ops.clamped_swiglu(t, 1.702, 7.0, False), [gate_up])


def in_layouts():
    """Each case in one layout after the other: shapes of a kernel are several cases."""
    layouts = itertools.cycle(["transposed heads", "back to front", "expanded"])
    return [(*case, layout) for case, layout in zip(CASES, layouts, strict=False)]


@pytest.mark.parametrize(("case", "shape", "layout"), in_layouts(), ids=str)
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


# -- what a loss takes of logits -------------------------------------------------------------------

ROWS, VOCAB = 7, 53
SUBSETS = [c for n in range(1, 5) for c in itertools.combinations(TAKES, n)]
LITERALS = {"label_smoothing": 0.1, "softcap": 2.0, "temperature": 0.7, "class_weight": True}
DIVERGED = [
    *((c, 0.5) for n in range(1, 4) for c in itertools.combinations((*TUNES, CE), n) if c != (CE,)),
    (("reverse_kl", CE, "forward_kl"), 0.5),
    *(((JSD,), beta) for beta in (0.0, 0.1, 0.5, 1.0)),
    ((CE, JSD), 0.1),
]


def made(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss_of(takes, ignore_index=3, **literals):
    if literals.get("class_weight"):
        literals["class_weight"] = 0.5 + made(VOCAB).abs().repeat_interleave(2)[::2]
    return TokenLoss(takes, ignore_index, **literals)


def check_values(write, plain, loss, logits, *others, tolerance, cleared=False):
    """``write`` gives what ``plain`` does, with and without weights and gradients; of rows, labels
    and weights with gaps between them. cleared: logits of ignored labels may become 0."""
    target = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(0))
    target[1::2] = 3
    target[2], target[4] = 50, 5
    target = target.repeat_interleave(2)[::2] if CE in loss.takes else None
    all_weights = made(len(loss.takes), 2 * ROWS)[:, ::2]
    all_weights[:, 5] = 0.0
    for weights, differentiate in ((None, False), (None, True), (all_weights, True)):
        if weights is not None and write is liger:
            continue
        expected, actual = torch.full((2, ROWS, 64), torch.nan, dtype=logits.dtype)
        values = torch.zeros(2, len(loss.takes), ROWS)
        for each, to, function in zip((expected, actual), values, (plain, write), strict=True):
            each[:, :VOCAB] = logits
            function(each[:, :VOCAB], *others, target, to, loss, weights, differentiate)
        if cleared and not differentiate:
            expected[target == loss.ignore_index, :VOCAB] = 0.0
        torch.testing.assert_close(values[1], values[0], equal_nan=True)
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)


def liger(logits, target, values, loss, weights, differentiate):
    write_cross_entropy_liger(logits, target, values[0], loss, differentiate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "given",
    [
        (),
        ("softcap",),
        ("label_smoothing",),
        ("softcap", "label_smoothing"),
        ("class_weight",),
        ("softcap", "class_weight"),
    ],
    ids=", ".join,
)
def test_cross_entropy_by_liger(given, dtype):
    loss = loss_of((CE,), **{name: LITERALS[name] for name in given})
    assert loss.known_to_liger
    logits = made(ROWS, VOCAB).to(dtype)
    tolerance = TOLERANCES[dtype]
    check_values(liger, write_values_torch, loss, logits, tolerance=tolerance, cleared=True)


BOTH_ENDS = [SUBSETS[0], SUBSETS[-1][::-1]]
OF_ONE_HEAD = [
    *((takes, tuple(LITERALS), torch.float32) for takes in SUBSETS),
    *((takes, (), torch.float32) for takes in SUBSETS[::4]),
    *((takes, (name,), torch.float32) for takes in BOTH_ENDS for name in LITERALS),
    *(
        (takes, literals, torch.float16)
        for takes in BOTH_ENDS
        for literals in ((), tuple(LITERALS))
    ),
]


@pytest.mark.parametrize(("takes", "literals", "dtype"), OF_ONE_HEAD, ids=str)
def test_takes_of_one_head(takes, literals, dtype, monkeypatch):
    monkeypatch.setattr(token_loss_triton, "_MAX_BLOCK", 32)
    logits = 3 * made(ROWS, VOCAB)
    if "label_smoothing" not in literals:
        logits[2, :40] = -torch.inf  # a whole block as well
    logits[4] *= 100
    ignored = None if literals == ("temperature",) else 3
    check_values(
        token_loss_triton.write_values_triton,
        write_values_torch,
        loss_of(takes, ignored, **{name: LITERALS[name] for name in literals}),
        logits.to(dtype),
        tolerance=TOLERANCES[dtype],
    )


@pytest.mark.parametrize(
    ("dtype", "infinite", "temperature", "ignored"),
    [
        (torch.float32, False, 1.0, None),
        (torch.float32, True, 2.0, 3),
        (torch.float16, False, 2.0, 3),
    ],
)
@pytest.mark.parametrize(("takes", "beta"), DIVERGED, ids=str)
def test_takes_of_two_heads(takes, beta, temperature, ignored, infinite, dtype, monkeypatch):
    monkeypatch.setattr(kl_triton, "_BLOCK", 32)
    logits, teacher = (made(ROWS, VOCAB, seed=seed).to(dtype) for seed in (0, 1))
    if infinite:  # a whole block, single ones, another block of the teacher's, everything
        logits[0, :32] = logits[2, 5] = logits[4] = -torch.inf
        teacher[2, 32:] = teacher[5, 7] = -torch.inf
        if JSD not in takes or beta == 1.0:
            logits[6, 20] = torch.inf
        if JSD in takes and beta == 0.0:  # infinite, and where it is depends on p = 0
            teacher[0, :32] = teacher[2, 5] = -torch.inf
    check_values(
        kl_triton.write_divergences_triton,
        kl_loss.write_divergences_torch,
        TokenLoss(takes, ignored, temperature=temperature, beta=beta),
        logits,
        teacher,
        tolerance=TOLERANCES[dtype],
    )


@pytest.mark.parametrize("takes", [*TUNES, 0.0, 0.1, 0.5, 1.0])
def test_divergences_of_confident_rows(takes, monkeypatch):
    monkeypatch.setattr(kl_triton, "_BLOCK", 16)
    beta = 0.5 if takes in TUNES else takes
    loss = TokenLoss((takes if takes in TUNES else JSD, CE), temperature=2.0, beta=beta)
    student = 100 + made(16, 61)
    student[range(16), torch.arange(16)] += 9
    teacher = 50 + student + 0.1 * made(16, 61, seed=1)
    values, exact = torch.zeros(2, 16), torch.zeros(2, 16, dtype=torch.float64)
    arguments = (teacher, torch.arange(16))
    kl_triton.write_divergences_triton(student, *arguments, values, loss, None, False)
    kl_loss.write_divergences_torch(student.double(), *arguments, exact, loss, None, False)
    torch.testing.assert_close(values.double(), exact, atol=1e-6, rtol=1e-6)


def test_nan_stays_in_its_row():
    logits = made(3, 21)
    logits[1, 5] = torch.nan
    target, values = torch.tensor([1, 2, 3]), torch.zeros(4, 3)
    loss = TokenLoss(TAKES, -1)
    token_loss_triton.write_values_triton(logits, target, values, loss, None, True)
    assert values.isnan().tolist() == 4 * [[False, True, False]]
    assert logits.isnan().all(1).tolist() == logits.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [0.37, torch.inf, torch.nan])
def test_scaled(dtype, upstream):
    gradient = made(3, 2000).to(dtype)
    gradient[1] = 0.0
    upstream, found = torch.tensor(upstream), torch.empty_like(gradient)
    token_loss_triton.write_scaled(gradient, upstream, found)
    expected = torch.ops.liger_fx.scaled(gradient, upstream)
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)
    assert not found[1].any()


WRITERS = ("write_values_torch", "write_cross_entropy_liger", "write_values_triton")


@pytest.mark.parametrize(
    ("loss", "weighted", "writer"),
    [
        (TokenLoss(), False, "write_cross_entropy_liger"),
        (TokenLoss(), True, "write_values_triton"),
        (TokenLoss(temperature=0.7), False, "write_values_triton"),
        (TokenLoss(("logsumexp",)), False, "write_values_triton"),
        (TokenLoss((CE, "entropy")), False, "write_values_triton"),
        (loss_of((CE,), class_weight=True), False, "write_cross_entropy_liger"),
        (loss_of((CE,), class_weight=True, label_smoothing=0.1), False, "write_values_triton"),
    ],
)
@pytest.mark.parametrize("usable", [True, False])
def test_which_kernel_is_launched(loss, weighted, writer, usable, monkeypatch):
    called = []
    for module, name in zip((token_loss, token_loss, token_loss_triton), WRITERS, strict=True):
        monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(token_loss, "liger_module", lambda name: usable or None)
    logits, values = made(2, 5), torch.zeros(len(loss.takes), 2)
    target = torch.tensor([1, 2]) if CE in loss.takes else None
    with as_on_a_gpu():
        token_loss.write_values(logits, target, values, loss, values if weighted else None, True)
    assert called == [writer if usable else "write_values_torch"]


@pytest.mark.parametrize("weights", [None, "one", "each"])
@pytest.mark.parametrize("op", [ops.linear_loss, ops.linear_token_losses], ids=str)
@pytest.mark.parametrize("head", [Head(), ONE, TWO, MIXTURE], ids=str)
def test_heads(head, op, weights):
    case = dataclasses.replace(head, op=op, weights=weights, skip=False, chunk_tokens=5)
    tensors = case.make((12, 21))
    expected = grads(case.total(*tensors), tensors)
    with as_on_a_gpu():
        actual = grads(case.total(*tensors), tensors)
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=1e-5)
