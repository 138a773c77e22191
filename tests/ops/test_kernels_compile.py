"""Triton compiles every kernel as we launch it, for GPUs that are not there: what its interpreter,
which runs Python, cannot tell."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from _op_checks import KernelCalls, run
from _util import CUDA
from test_op_cross_entropy import TestCrossEntropy as CrossEntropy
from test_op_gated import TestGated as Gated
from test_op_norms import NORMS
from test_op_rope import TestHalves as Halves
from test_op_rope import TestPairs as Pairs

from liger_fx.ops import library
from liger_fx.ops.kl_loss import write_divergences
from liger_fx.ops.token_loss import TAKES, TokenLoss, write_values
from liger_fx.ops.token_loss_triton import write_scaled

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CUDA, reason="on CUDA the tests of the ops run the kernels"),
]

ARCHITECTURES = (80, 90)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.bool: "i1"}
OPTIONS = ("num_warps", "num_stages", "num_ctas")


class Compiled:
    """Stands in for a kernel's launch: compiles, and runs nothing."""

    def __init__(self) -> None:
        self.kernels: dict[str, set[str]] = {}

    def __call__(self, kernel, *args, grid, warmup, **named):
        values = dict(zip(kernel.arg_names, args, strict=False)) | named
        signature, constants = {}, {}
        for i, parameter in enumerate(kernel.params):
            value = values.get(parameter.name)
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{NAMES[value.dtype]}"
            else:
                signature[parameter.name] = {bool: "i1", int: "i32", float: "fp32"}[type(value)]
        how = f"{signature} {constants}"
        if how in self.kernels.setdefault(kernel.__name__, set()):
            return
        self.kernels[kernel.__name__].add(how)
        options = {name: value for name, value in named.items() if name in OPTIONS}
        for architecture in ARCHITECTURES:
            source = ASTSource(kernel, signature, constants)
            triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.fixture
def compiled(monkeypatch):
    """What is launched, as on a GPU."""
    found = Compiled()
    monkeypatch.setattr(JITFunction, "run", lambda *args, **named: found(*args, **named))
    with mock.patch.object(torch.Tensor, "is_cuda", True):
        yield found


CASES = [
    *((case, (2, 3, 2, 5)) for case in (*NORMS, *Gated.CASES)),
    *((case, (2, 2, 3, 10)) for case in Halves.CASES),
    *((case, (2, 2, 2, 34)) for case in Pairs.CASES),
    *((case, (7, 21)) for case in CrossEntropy.CASES),
]


@pytest.mark.parametrize(("case", "shape"), CASES, ids=str)
def test_kernels_of_ops(case, shape, monkeypatch):
    tensors = case.make(shape, torch.bfloat16)
    with KernelCalls() as kernels:
        run(case.fused, tensors, tensors[0].dtype)
    found = Compiled()
    monkeypatch.setattr(JITFunction, "run", lambda *args, **named: found(*args, **named))
    for kernel, arguments in kernels.calls:
        name = kernel._schema.name.removeprefix("liger_fx::")
        if name not in library.launchers:
            continue
        module = library.liger_module(library.modules[name])
        with (
            mock.patch.object(torch.Tensor, "is_cuda", True),
            mock.patch.object(library, "multiprocessors", return_value=3),
        ):
            library.launchers[name](module, *arguments)
    assert found.kernels or not kernels.calls


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("differentiate", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        TokenLoss(ignore_index=-100),
        TokenLoss(TAKES, -100, 0.1, 5.0, 0.7, class_weight=torch.ones(53)),
        TokenLoss(TAKES[::-1], label_smoothing=0.1),
        TokenLoss(("logsumexp", "entropy")),
        TokenLoss(("cross_entropy", "forward_kl", "reverse_kl"), -100, temperature=2.0),
        *(TokenLoss(("jensen_shannon", "cross_entropy"), beta=beta) for beta in (0.0, 0.3, 1.0)),
        TokenLoss(("reverse_kl",)),
    ],
    ids=lambda loss: ", ".join(loss.takes),
)
def test_kernels_of_heads(loss, differentiate, weighted, compiled):
    logits, teacher = torch.zeros(2, 7, 53, dtype=torch.bfloat16)
    target = torch.zeros(7, dtype=torch.int64) if "cross_entropy" in loss.takes else None
    values = torch.zeros(len(loss.takes), 7)
    weights = torch.zeros_like(values) if weighted else None
    write = write_values
    if not set(loss.takes) <= {*TAKES}:
        write = functools.partial(write_divergences, teacher=teacher)
        write(logits, target=target, values=values, loss=loss, weights=weights,
              differentiate=differentiate)  # fmt: skip
    else:
        write(logits, target, values, loss, weights, differentiate)
    assert compiled.kernels


def test_kernel_of_scaled_gradients(compiled):
    write_scaled(torch.zeros(7, 53, dtype=torch.bfloat16), torch.ones(()), torch.zeros(7, 53))
    assert compiled.kernels
