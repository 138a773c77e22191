"""What is asked of every op: `Contract`, a class of tests over `Case`s of one op."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from _util import DEVICE, TOLERANCES, relative_error
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLACK = 3e-7  # of the relative error: in fp32 a different order of summation is no error


def _back_to_front(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


# The same values in other places. Rows: all but the last dimension.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed heads": lambda t: t.transpose(1, -2).contiguous().transpose(1, -2),
    "every second row": lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
    "columns of wider rows": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "every second column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "back to front": _back_to_front,
    "expanded": lambda t: t[:1].expand_as(t),
}


@dataclass(frozen=True)
class Case:
    """One use of an op.

    op, eager: take the tensors and then the literals. inputs: (shape, dtype, generator) -> the
    tensors, of which those with a gradient require it, the first with the shape. shape: one with
    four, for CrossEntropy two dimensions.
    """

    name: str
    op: torch._ops.OpOverload
    eager: Callable[..., Any]
    inputs: Callable[[Sequence[int], torch.dtype, torch.Generator], list[Tensor]]
    literals: tuple[Any, ...] = ()
    shape: tuple[int, ...] = (2, 7, 3, 48)

    def __str__(self) -> str:
        return self.name

    def make(
        self, shape: Sequence[int] | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> list[Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        return self.inputs(self.shape if shape is None else shape, dtype, generator)

    def arguments(self, *tensors: Tensor) -> tuple[Any, ...]:
        """Of the op."""
        return *tensors, *self.literals

    def fused(self, *tensors: Tensor) -> Any:
        return self.op(*self.arguments(*tensors))

    def reference(self, *tensors: Tensor) -> Any:
        return self.eager(*tensors, *self.literals)


# -- inputs ---------------------------------------------------------------------------------------


def randn(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, grad: bool = True
) -> Tensor:
    made = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return made.to(dtype).requires_grad_(grad)


def wide(t: Tensor) -> Tensor:
    """fp32 or, for the exact result, fp64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def alike(source: Tensor, made: Tensor) -> Tensor:
    return made.detach().requires_grad_(source.requires_grad)


def in_fp64(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [alike(t, t.double() if t.is_floating_point() else t) for t in tensors]


def laid_out(tensors: Sequence[Tensor], layout: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return [alike(t, layout(t)) if t.requires_grad and t.dim() > 1 else t for t in tensors]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [alike(t, t.clone(memory_format=torch.contiguous_format)) for t in tensors]


# -- results --------------------------------------------------------------------------------------


def outputs_of(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def upstreams(outputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Random upstream gradients, rounded to ``dtype`` so that all precisions see the same."""
    generator = torch.Generator(DEVICE).manual_seed(1 << 20)  # no seed of inputs
    made = (randn(o.shape, dtype, generator, grad=False).to(o.dtype) for o in outputs)
    return list(made)


def run(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
) -> list[Tensor]:
    """Results and gradients. layout: of the upstream gradients."""
    outputs = outputs_of(function(*tensors))
    upstream = [layout(u) if u.dim() > 1 else u for u in upstreams(outputs, dtype)]
    gradients = torch.autograd.grad(outputs, [t for t in tensors if t.requires_grad], upstream)
    return [o.detach() for o in outputs] + list(gradients)


def mean_errors(samples: Sequence[Sequence[float]]) -> list[float]:
    return torch.tensor(samples).square().mean(0).sqrt().tolist()


def check_exactness(case: Case, dtype: torch.dtype, seeds: int = 4) -> None:
    """The error of each result and gradient is at most 1.1 times that of eager."""
    ours, theirs = [], []
    for seed in range(seeds):
        tensors = case.make(dtype=dtype, seed=seed)
        exact = run(case.reference, in_fp64(tensors), dtype)
        for function, found in ((case.fused, ours), (case.reference, theirs)):
            actual = run(function, tensors, dtype)
            assert [t.shape for t in actual] == [t.shape for t in exact]
            found.append([relative_error(a, e) for a, e in zip(actual, exact, strict=True)])
    bounds = [1.1 * error + SLACK for error in mean_errors(theirs)]
    errors = mean_errors(ours)
    assert all(e <= b for e, b in zip(errors, bounds, strict=True)), (errors, bounds)


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], **options: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **options)


@contextlib.contextmanager
def no_compile_caches():
    """They see the graph, but not what an op's backward is: a hit would be a test of old code."""
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        yield


class KernelCalls(TorchDispatchMode):
    """Keeps which operators of ours ran, on what."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is auto_functionalized:
            self.keep(args[0], *kwargs.values())
        elif func.namespace == "liger_fx":
            self.keep(func, *args)
        return func(*args, **kwargs)

    def keep(self, kernel: torch._ops.OpOverload, *arguments: Any) -> None:
        self.calls.append((kernel, tree_map_only(Tensor, Tensor.detach, arguments)))


# -- the tests ------------------------------------------------------------------------------------


class Contract:
    """Subclass it as ``Test...`` for each op."""

    CASES: Sequence[Case]
    SHAPES: Sequence[tuple[int, ...]]  # odd ones: of 1 row, of very many, of none
    BIG: tuple[int, ...]  # more than 2**31 elements
    BIG_TOLERANCE: Mapping[str, float] = MappingProxyType({})
    KERNELS = 2  # of forward and backward
    OWN_LAYOUT = False  # whether the result lies in memory as the input; else it is contiguous

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.CASES, ids=str)
        if "first_case" in metafunc.fixturenames:  # of each op
            by_op = {case.op: case for case in reversed(self.CASES)}
            metafunc.parametrize("first_case", by_op.values(), ids=str)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_less_exact_than_eager(self, case, dtype):
        check_exactness(case, dtype)

    def test_odd_shapes(self, case):
        for shape in self.SHAPES:
            tensors = case.make(shape)
            expected = run(case.reference, in_fp64(tensors))
            for a, e in zip(run(case.fused, tensors), expected, strict=True):
                assert a.shape == e.shape
                assert (a - e).norm() <= TOLERANCES[torch.float32] * (e.norm() + 1), shape

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, case, layout):
        lay = LAYOUTS[layout]
        tensors = laid_out(case.make(), lay)
        assert_all_close(
            run(case.fused, tensors, layout=lay), run(case.fused, copies(tensors), layout=lay)
        )
        for output in outputs_of(case.fused(*tensors)):
            if self.OWN_LAYOUT and tensors[0].stride(-1) == 1:
                assert output.stride() == torch.empty_like(tensors[0]).stride()
            else:
                assert output.is_contiguous()

    def test_two_backwards_with_different_upstream_gradients(self, case):  # A17
        tensors = case.make()
        wanted = [t for t in tensors if t.requires_grad]
        outputs = outputs_of(case.fused(*tensors))

        def backward(factor):
            upstream = [factor * u for u in upstreams(outputs, torch.float32)]
            return torch.autograd.grad(outputs, wanted, upstream, retain_graph=True)

        first, doubled, again = backward(1), backward(2), backward(1)
        assert_all_close(doubled, [2 * g for g in first])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_frozen_tensors(self, case):  # A19
        tensors = case.make()
        everything = run(case.fused, tensors)
        wanted = [t for t in tensors if t.requires_grad]
        gradients = everything[-len(wanted) :]
        for frozen in wanted:
            frozen.requires_grad_(False)
            outputs = outputs_of(case.fused(*tensors))
            assert all(o.requires_grad == (len(wanted) > 1) for o in outputs)
            if len(wanted) > 1:
                torch.autograd.backward(outputs, upstreams(outputs, torch.float32))
            for t, gradient in zip(wanted, gradients, strict=True):
                assert (t.grad is None) == (t is frozen)
                if t is not frozen:
                    torch.testing.assert_close(t.grad, gradient)
                    t.grad = None
            frozen.requires_grad_()

    def test_nothing_is_written_to_and_nothing_shared(self, case):
        tensors = case.make()
        before = [t.detach().clone() for t in tensors]
        outputs = outputs_of(case.fused(*tensors))
        upstream = upstreams(outputs, torch.float32)
        before += [t.clone() for t in (*outputs, *upstream)]
        wanted = [t for t in tensors if t.requires_grad]
        gradients = torch.autograd.grad(outputs, wanted, upstream)
        given = (*tensors, *outputs, *upstream)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
        storages = [t.untyped_storage().data_ptr() for t in given]
        assert len(set(storages)) == len(storages)
        assert not {g.untyped_storage().data_ptr() for g in gradients} & set(storages)

    def test_compiled(self, case):
        tensors = case.make()
        compiled = torch.compile(case.fused, fullgraph=True, backend="aot_eager")
        assert_all_close(run(compiled, tensors), run(case.fused, tensors))

    def test_compiled_by_inductor(self, first_case):
        tensors = first_case.make()
        with no_compile_caches():
            compiled = torch.compile(first_case.fused, fullgraph=True)
            assert_all_close(run(compiled, tensors), run(first_case.fused, tensors))

    def test_autocast_outside_does_not_reach_into_the_op(self, case):
        tensors = case.make()
        expected = run(case.fused, tensors)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = run(case.fused, tensors)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

    def test_second_derivative(self, case):
        tensors = case.make()
        outputs = outputs_of(case.fused(*tensors))
        upstream = upstreams(outputs, torch.float32)
        wanted = [t for t in tensors if t.requires_grad]
        gradient, *_ = torch.autograd.grad(outputs, wanted, upstream, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()

    @pytest.mark.parametrize("layout", [None, "transposed heads", "every second column"])
    def test_opcheck(self, case, layout):
        tensors = case.make((2, 5, 3, 8)[-len(case.shape) :])
        if layout:
            tensors = laid_out(tensors, LAYOUTS[layout])
        torch.library.opcheck(case.op, case.arguments(*tensors))
        with KernelCalls() as kernels:
            run(case.fused, tensors)
        assert len(kernels.calls) == self.KERNELS
        for kernel, arguments in kernels.calls:
            checks = ("test_schema", "test_faketensor")  # the others are about derivatives
            torch.library.opcheck(kernel, arguments, test_utils=checks)

    @pytest.mark.gpu
    def test_nothing_waits_for_the_gpu(self, case):  # A16
        tensors = case.make()
        run(case.fused, tensors)  # the kernels are compiled and loaded
        outputs = outputs_of(case.fused(*tensors))
        upstream = upstreams(outputs, torch.float32)
        wanted = [t for t in tensors if t.requires_grad]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(outputs_of(case.fused(*tensors)), wanted, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.gpu
    def test_more_than_two_billion_elements(self, first_case):  # A28
        if torch.cuda.mem_get_info()[0] < 64 << 30:
            pytest.skip("needs 64 GiB")
        rows = self.BIG[0]
        tensors = first_case.make(self.BIG, torch.bfloat16)
        of_rows = [t.shape[0] == rows for t in tensors]
        whole = run_rows(first_case, tensors, of_rows)
        for part in (slice(0, 3), slice(rows - 3, rows)):
            few = [alike(t, t[part]) if r else t for t, r in zip(tensors, of_rows, strict=True)]
            assert_all_close(
                [t[part] if t.shape[0] == rows else t[..., part] for t in whole],
                run_rows(first_case, few, of_rows),
                **self.BIG_TOLERANCE,
            )


def run_rows(case: Case, tensors: Sequence[Tensor], of_rows: Sequence[bool]) -> list[Tensor]:
    """The results, and the gradients of the tensors that have rows; the upstream is the result."""
    outputs = outputs_of(case.fused(*tensors))
    wanted = [t for t, r in zip(tensors, of_rows, strict=True) if r and t.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, [o.detach() for o in outputs])
    return [o.detach() for o in outputs] + list(gradients)
