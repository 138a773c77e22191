"""How the ops are registered, and what their launchers share.

An op has two sides. `kernel` registers an opaque operator without a derivative: its schema, fake
implementation, plain PyTorch and CUDA launcher; the compiler sees nothing else. `differentiable`
registers the operator that rewrites put into a graph: an autograd formula over kernels, which
AOTAutograd takes apart into them. Compiled code then calls kernels without autograd's part of the
dispatch, which in Python is most of the cost of a `torch.library.custom_op`
(benchmarks/host_time.py: "eager" against "compiled").
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from liger_fx.ops.signatures import Misfit, check_signatures

log = logging.getLogger("liger_fx")

_LIBRARY = torch.library.Library("liger_fx", "FRAGMENT")

kernels: list[torch._ops.OpOverload] = []  # all opaque operators

# What each kernel of Triton's does on CUDA, by its name: ``launchers[name](module, *arguments)``.
# Tests run it in Triton's interpreter, benchmarks with kernels that do nothing.
launchers: dict[str, Callable[..., Any]] = {}
modules: dict[str, str] = {}  # the name of that module of Liger's


def kernel(
    schema: str,
    *,
    fake: Callable[..., Any],
    plain: Callable[..., Any],
    cuda: Callable[..., Any],
    liger: str | None = None,
    waits: bool = False,
) -> torch._ops.OpOverload:
    """Register an opaque operator whose first argument is a tensor.

    schema: ``"rms_norm_forward(Tensor x, ...) -> Tensor"``. fake: for fake and meta tensors. plain:
    in plain PyTorch, for every device but CUDA. cuda: gets Liger's module of the name ``liger`` as
    its first argument; where that cannot be used ``plain`` runs on the GPU. Without a name it gets
    None. On fake tensors of a GPU the operator raises `Misfit` where Liger's kernels do not fit.
    waits: the operator may wait for the device, which none in a CUDA graph can.
    """

    def fake_if_fit(first: Tensor, *rest: Any) -> Any:
        if liger is not None:
            require_fit(first, liger)
        return fake(first, *rest)

    def launch(first: Tensor, *rest: Any) -> Any:
        module = None if liger is None else liger_module(liger)
        if module is None and liger is not None:
            return plain(first, *rest)
        if first.device.index != torch.cuda.current_device():  # Triton launches on the current one
            with torch.cuda.device(first.device):
                return cuda(module, first, *rest)
        return cuda(module, first, *rest)

    name = _define(schema, *[torch.Tag.cudagraph_unsafe] * waits)
    if liger is not None:
        launchers[name], modules[name] = cuda, liger
    _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")  # all devices but those below
    _LIBRARY.impl(name, launch, "CUDA")
    torch.library.register_fake(f"liger_fx::{name}", fake_if_fit, lib=_LIBRARY)
    kernels.append(op := getattr(torch.ops.liger_fx, name).default)
    return op


def differentiable(schema: str, function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register ``function``, an autograd function over kernels, as one operator."""
    name = _define(schema)
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.liger_fx, name).default


def _define(schema: str, *tags: torch.Tag) -> str:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    return schema.split("(", 1)[0]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose gradients raise RuntimeError if they are differentiated.

    `torch.autograd.function.once_differentiable` does so only where the upstream gradient requires
    one itself; a gradient penalty on the loss alone would be a constant, without a word.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Any) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # nobody asked for a graph of the backward
            return gradients
        several = gradients if isinstance(gradients, tuple) else (gradients,)
        marker = torch.empty(0, requires_grad=True)
        return tuple(g if g is None else _NoSecondDerivative.apply(g, marker) for g in several)

    return wrapper


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, marker: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("liger_fx's ops are differentiable once: there is no second derivative")


_misfits: dict[str, str] = {}  # by module of Liger's


@functools.cache
def liger_module(name: str) -> Any:
    """A module of Liger's kernels, imported when first needed: it imports Triton. None, with a
    warning, where that fails, and where a kernel has other parameters than our launchers pass."""
    try:
        with unset_fake_temporarily(), _alone():  # what an import computes stays
            utils, module = (
                importlib.import_module(f"liger_kernel.ops.{part}") for part in ("utils", name)
            )
        check_signatures(utils)
        check_signatures(module)
        return module
    except Exception as error:  # a broken Triton raises whatever its driver raises
        if isinstance(error, Misfit):
            _misfits[name] = str(error)
        log.warning("Liger's kernels cannot be used (%s); plain PyTorch stands in", error)
        return None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Import Liger's kernels without what Liger (0.8) imports for its other parts: PEFT, to see
    whether it is installed, and transformers, to ask for an Ascend NPU. Both take seconds, in a
    process that may have use for neither. What Liger learns is the same on a GPU."""
    if "liger_kernel.utils" in sys.modules:
        yield
        return
    finder: Any = _Missing({"peft", "transformers"}.difference(sys.modules))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        utils: Any = sys.modules.get("liger_kernel.utils")
        if "peft" in finder.packages and hasattr(utils, "PEFT_AVAILABLE"):
            utils.PEFT_AVAILABLE = importlib.util.find_spec("peft") is not None


class _Missing:
    """An entry of ``sys.meta_path``: for this thread there are no such packages."""

    def __init__(self, packages: Collection[str]) -> None:
        self.packages, self.thread = packages, threading.get_ident()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in self.packages and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"{name} is not needed now", name=name)


def require_fit(first: Tensor, name: str) -> None:
    """For fake implementations: raise `Misfit` if a kernel of this module of Liger's would run on
    ``first``, and has other parameters than our launchers pass. A rewrite is refused by that."""
    if _on_a_gpu(first) and liger_module(name) is None and name in _misfits:
        raise Misfit(_misfits[name])


def _on_a_gpu(fake: Tensor) -> bool:
    """Would the tensor be on a GPU? One on meta stands for one on the best device there is."""
    return fake.device.type in ("cuda", "meta") and torch.cuda.is_available()


@functools.cache
def block_settings(columns: int) -> tuple[int, int]:
    """Liger's block size and number of warps for rows of ``columns`` elements. Raises RuntimeError
    beyond 65536 columns."""
    return liger_module("utils").calculate_settings(columns)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for anything else."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(rows: int, device: torch.device) -> tuple[int, int]:
    """A grid over all rows for kernels that sum a weight gradient: (programs, rows of each).

    Liger takes one program for each multiprocessor. Where the rows of a program are a compile-time
    constant, that compiles a kernel for every new number of rows; a power of two does so only when
    the number has doubled, for at most twice as many programs.
    """
    share = max(1, rows // multiprocessors(device))
    each = 1 << (share.bit_length() - 1)
    return -(-rows // each), each


def column_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over programs, [programs, columns] -> [columns], rounded once. (A cast that does
    nothing would still cost the host a microsecond.)"""
    total = partial.sum(0)
    return total if total.dtype == dtype else total.to(dtype)


_NO_CONTEXT = contextlib.nullcontext()


def without_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """For code in which every dtype has been decided. Where autocast is off, as in a compiled
    graph, the context is none, which costs the host nothing. kind: a ``device.type``."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _NO_CONTEXT


# -- layouts --------------------------------------------------------------------------------------


def empty_rows(x: Tensor) -> Tensor:
    """An output for ``x``: in its layout, if its rows lie in memory as such."""
    if x.stride(-1) == 1:
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_sum(x: Tensor, y: Tensor) -> Tensor:
    """An output for ``x + y``, of one shape and dtype: in the layout that eager gives their sum, if
    its rows lie in memory as such.

    Where the two lie in memory alike, so does the sum. Else torch decides by rules of its own: a
    sum of tensors without memory asks it for them.
    """
    if x.stride() == y.stride():
        return empty_rows(x)
    without_memory = (torch.empty_strided(t.shape, t.stride(), device="meta") for t in (x, y))
    total = torch.add(*without_memory)
    if total.stride(-1) != 1:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty_strided(total.shape, total.stride())


def as_eager_leaves(gradient: Tensor, upstream: Tensor) -> Tensor:
    """``gradient``, contiguous where ``upstream`` is: eager's chain of products keeps the layout of
    the upstream gradient, a kernel that of its input. torch's own operators may depend on that:
    under AOTAutograd ``native_dropout_backward`` on a CPU takes contiguous gradients only."""
    return gradient.contiguous() if upstream.is_contiguous() else gradient


def as_rows(x: Tensor, like: Tensor | None = None) -> Tensor:
    """``x [..., columns]`` as [rows, columns] with unit stride, in the order in which the rows of
    ``like`` (default: its own) lie in memory. A view where the layout allows it, else a copy.

    A norm over transposed heads, [b, h, s, d] in memory as [b, s, h, d], so needs no copy. An
    output of `empty_rows` is always a view, so inputs follow it: they may be expanded or strided.
    """
    like = x if like is None else like
    if like.is_contiguous() and x.is_contiguous():
        return x.view(-1, x.shape[-1])
    leading = sorted(range(like.dim() - 1), key=like.stride, reverse=True)
    rows = x.permute(*leading, -1).reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def row_pointer(x: Tensor, like: Tensor | None = None) -> tuple[Tensor, int]:
    """`as_rows` for a kernel: a tensor to point at, and the stride of its rows. The common case, a
    contiguous tensor, costs the host next to nothing."""
    if x.is_contiguous() and (like is None or like.is_contiguous()):
        return x, x.shape[-1]
    rows = as_rows(x, like)
    return rows, rows.stride(0)
