"""Liger's kernels have the parameters that our launchers pass, or are left alone."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

import liger_fx
from liger_fx.ops import library
from liger_fx.ops.signatures import TAKEN, Misfit, check_signatures

triton = pytest.importorskip("triton")
VERSION = re.compile(r"liger_kernel \S+")


def liger(module):
    return importlib.import_module(f"liger_kernel.ops.{module}")


@pytest.mark.parametrize("name", TAKEN)
def test_the_installed_kernels_fit(name):
    check_signatures(liger(name))


def test_all_that_launchers_take_is_compared():
    source = "".join(p.read_text() for p in Path(library.__file__).parent.glob("*.py"))
    taken = set(re.findall(r"(?:\bliger|liger_module\(\"utils\"\))\.(\w+)", source))
    assert taken == {name for names in TAKEN.values() for name in names}


# -- one kernel against what is expected -----------------------------------------------------------


@triton.jit
def as_expected(dc, a, b, stride, n_cols, BLOCK_SIZE):
    pass


@triton.jit
def with_a_default(dc, a, b, stride, n_cols, BLOCK_SIZE, FAST=True):
    pass


@triton.jit
def with_one_more(dc, a, b, stride, n_cols, BLOCK_SIZE, FAST):
    pass


@triton.jit
def with_one_less(dc, a, b, stride, n_cols):
    pass


@triton.jit
def in_another_order(a, dc, b, stride, n_cols, BLOCK_SIZE):
    pass


autotuned = triton.autotune([triton.Config({"BLOCK_SIZE": 64})], key=[])(as_expected)


def module_with(**functions):
    module = ModuleType("liger_kernel.ops.geglu")
    fitting = dict.fromkeys(TAKEN["geglu"], as_expected)
    vars(module).update(fitting | {"_geglu_tanh_forward_kernel": forward} | functions)
    return module


@triton.jit
def forward(a, b, c, stride, n_cols, BLOCK_SIZE):
    pass


@pytest.mark.parametrize("kernel", [as_expected, with_a_default])
def test_fits(kernel):
    check_signatures(module_with(_geglu_tanh_backward_kernel=kernel))


def misfit(module):
    with pytest.raises(Misfit) as raised:
        check_signatures(module)
    return VERSION.sub("liger_kernel *", str(raised.value))


def test_says_what_does_not_fit():
    found = (with_one_more, with_one_less, in_another_order, autotuned)
    assert_expected_inline(
        "\n".join(misfit(module_with(_geglu_tanh_backward_kernel=k)) for k in found),
        """\
parameter 7 of `_geglu_tanh_backward_kernel` in liger_kernel * is `FAST`, liger_fx passes none
parameter 6 of `_geglu_tanh_backward_kernel` in liger_kernel * is none, liger_fx passes `BLOCK_SIZE`
parameter 1 of `_geglu_tanh_backward_kernel` in liger_kernel * is `a`, liger_fx passes `dc`
parameter 1 of `_geglu_tanh_backward_kernel` in liger_kernel * is `args`, liger_fx passes `dc`""",
    )


def test_says_what_is_missing():
    module = module_with()
    del module._geglu_tanh_backward_kernel
    assert_expected_inline(
        misfit(module),
        """liger_kernel * has no `liger_kernel.ops.geglu._geglu_tanh_backward_kernel`""",
    )


# -- what becomes of it ----------------------------------------------------------------------------


@contextlib.contextmanager
def other_kernels(module, name):
    """As on a GPU, with a Liger whose kernel has other parameters."""

    def forget():
        library.liger_module.cache_clear()
        library._misfits.clear()

    forget()
    with (
        mock.patch.object(liger(module), name, in_another_order),
        mock.patch.object(library, "_on_a_gpu", return_value=True),
    ):
        yield
    forget()


def normed_head(x, scale, weight, labels):
    return F.cross_entropy(F.linear(F.rms_norm(x, (8,), scale), weight), labels)


def arguments():
    tensors = torch.randn(6, 8), torch.ones(8), torch.randn(11, 8)
    return *(t.requires_grad_() for t in tensors), torch.arange(6)


def compiled(**options):
    options = {"inner": "aot_eager", "policy": "all"} | options
    return torch.compile(normed_head, backend="liger_fx", options=options)


@pytest.mark.parametrize("strict", [False, True])
def test_a_rewrite_without_its_kernel_is_refused(strict):
    with other_kernels("rms_norm", "_rms_norm_backward_kernel"):
        compiled(strict=strict)(*arguments()).backward()
    (report,) = liger_fx.reports()
    assert report.counts == {"linear_cross_entropy": 1}
    assert_expected_inline(
        VERSION.sub("liger_kernel *", report.why_not("rms_norm")),
        """parameter 1 of `_rms_norm_backward_kernel` in liger_kernel * is `a`, liger_fx passes `dY_ptr`""",
    )


def test_a_head_without_its_kernel_is_refused():
    with other_kernels("cross_entropy", "liger_cross_entropy_kernel"):
        compiled()(*arguments()).backward()
        with pytest.raises(liger_fx.RequirementError, match="is `a`, liger_fx passes `X_ptr`"):
            torch._dynamo.reset()
            compiled(require=["linear_cross_entropy"])(*arguments())
    assert liger_fx.reports()[0].counts == {"rms_norm": 1}
    assert "X_ptr" in liger_fx.reports()[0].why_not("linear_cross_entropy")


def test_logprobs_without_their_kernel_are_refused():
    def logprobs(x, weight, labels):
        return F.linear(x, weight).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    x, _, weight, labels = arguments()
    with other_kernels("cross_entropy", "liger_cross_entropy_kernel"):
        torch.compile(logprobs, backend="liger_fx", options={"inner": "eager"})(x, weight, labels)
    assert "X_ptr" in liger_fx.reports()[-1].why_not("linear_logprobs")


def test_a_call_of_the_op_itself_takes_plain_pytorch(caplog):
    with other_kernels("rms_norm", "_rms_norm_forward_kernel"):
        assert library.liger_module("rms_norm") is None
        assert library.liger_module("layer_norm") is liger("layer_norm")
    assert "plain PyTorch stands in" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
def test_nothing_is_compared_where_plain_pytorch_runs():
    with mock.patch.object(library, "liger_module") as imported:
        compiled()(*arguments())
        liger_fx.explain(normed_head, [t.to("meta") for t in arguments()])
    assert not imported.called
    assert liger_fx.reports()[0].counts == {"linear_cross_entropy": 1, "rms_norm": 1}
