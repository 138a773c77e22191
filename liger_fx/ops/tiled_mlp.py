"""``liger_fx::swiglu_mlp``, ``geglu_mlp``, ``geglu_exact_mlp``: a gated MLP by tiles of tokens.

    y = (act(x Wg^T) * (x Wu^T)) Wd^T

Gate and up exist for a tile of tokens only, in the forward and in the backward, which computes them
again: of [tokens, intermediate] nothing is kept (the idea of Liger's and DeepSpeed's tiled MLP).
Inside an activation checkpoint, where gate and up are recomputed anyway, that costs nothing.

The backward of a tile has three buffers. Gate and up become their gradients; the gradient of their
product becomes the product, which the gradient of ``Wd`` needs.

Each projection may have an adapter of low rank (LoRA):

    x W^T + scale (x A^T) B^T

``x A^T`` is rounded as in eager. The GEMM with ``B`` adds to ``x W^T`` in place, and rounds their
sum once; eager rounds the product, ``scale`` times the product, and the sum. The gradients of ``A``
and ``B`` are summed in fp32. An adapter may be wider than its weight (PEFT's in fp32 beside a
base in bf16): the sum is then made in the adapter's dtype, and rounded to that of the weight, as in
eager. No product is computed for the gradient of a frozen weight.

With ``skip_padding`` the backward leaves out each token whose gradient is exactly zero, as it is
for tokens that pad a sequence: they cost no matrix product. A finite token with a zero gradient
adds nothing to any gradient. A token that is inf or nan does in eager, where 0 times inf is nan:
the weight gradients are nan there, and not here. The host waits for the number of tokens that are
left (see `tokens.tokens_with_gradient`). Without ``skip_padding`` no token is left out, and the
host does not wait.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger_fx.ops.gated import Activation
from liger_fx.ops.geglu import GELU, GELU_TANH
from liger_fx.ops.library import (
    differentiable,
    kernel,
    multiprocessors,
    once_differentiable,
    without_autocast,
)
from liger_fx.ops.matmul import accumulate_mm
from liger_fx.ops.swiglu import SILU
from liger_fx.ops.tokens import tokens_with_gradient

# Bytes of a tile's three buffers, which lie at the peak of a step's memory.
TILE_BUDGET = {"cuda": 1200 << 20, "cpu": 128 << 20}

OnBuffers = Callable[..., None]


class Adapter(NamedTuple):
    """``scale (x A^T) B^T``, of low rank. a: [R, I], b: [O, R], of one dtype."""

    a: Tensor
    b: Tensor
    scale: float

    def inner(self, x: Tensor) -> Tensor:
        """``x A^T``"""
        return x.to(self.a.dtype) @ self.a.t()

    def inner_gradient(self, grad: Tensor) -> Tensor:
        """Of `inner`, given that of the product."""
        made = self.b.new_empty(grad.shape[0], self.b.shape[1])
        return made.addmm_(grad.to(self.b.dtype), self.b, beta=0, alpha=self.scale)


class Projection(NamedTuple):
    """``x W^T``, and what an adapter adds. weight: [O, I], of the adapter's dtype or narrower."""

    weight: Tensor
    adapter: Adapter | None

    def inner(self, x: Tensor) -> Tensor | None:
        return None if self.adapter is None else self.adapter.inner(x)

    def inner_gradient(self, grad: Tensor) -> Tensor | None:
        return None if self.adapter is None else self.adapter.inner_gradient(grad)

    def write(self, x: Tensor, out: Tensor) -> Tensor | None:
        """Over ``out``. Returns `inner`."""
        torch.mm(x, self.weight.t(), out=out)
        inner = self.inner(x)
        if self.adapter is not None and inner is not None:
            _addmm(out, inner, self.adapter.b.t(), self.adapter.scale)
        return inner

    def add_input_gradient(
        self, grad: Tensor, inner_grad: Tensor | None, out: Tensor, first: bool
    ) -> None:
        """``out (+)=`` the gradient of x; ``first``: written."""
        torch.mm(grad, self.weight, out=out) if first else out.addmm_(grad, self.weight)
        if self.adapter is not None and inner_grad is not None:
            _addmm(out, inner_grad, self.adapter.a, 1.0)


def _addmm(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """``total += scale a b``, rounded once; a and b may be wider than ``total``."""
    wide = total.to(a.dtype)  # ``total`` itself, if that is its dtype
    total.copy_(wide.addmm_(a, b, alpha=scale))


# Of each projection weight, a and b: what the kernels take. Without an adapter a and b are None.
Factors = Sequence[Any]


def _projections(factors: Factors, scales: Sequence[float]) -> list[Projection]:
    found = []
    for scale, weight, a, b in zip(scales, factors[::3], factors[1::3], factors[2::3], strict=True):
        found.append(Projection(weight, None if a is None else Adapter(a, b, scale)))
    return found


def tile_tokens_for(row: int, budget: int, unit: int) -> int:
    """Tokens of a tile, each of which takes ``row`` bytes: what the budget takes, in multiples of
    ``unit`` or at least of 128."""
    most = budget // row
    unit = unit if most >= unit else 128
    return max(unit, most // unit * unit)


def _unit(device: torch.device) -> int:
    """The fewest tokens whose matrix products keep every multiprocessor of a GPU busy to their end.

    cuBLAS cuts the output into blocks of 128 x 256; widths are most often multiples of 1024. With
    fewer blocks than multiprocessors in the last round some of these have nothing to do.
    """
    processors = multiprocessors(device)
    return 128 * processors // math.gcd(processors, 1024 // 256)


def _tiles(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _of_tile(tensor: Tensor, part: slice) -> Tensor:
    """Its tokens of a tile; itself where these are all, since a view costs the host time."""
    return tensor if part.stop - part.start == tensor.shape[0] else tensor[part]


def _tile_size(rows: Tensor, projections: Sequence[Projection], tile_tokens: int) -> int:
    if tile_tokens <= 0:
        row = projections[0].weight.shape[0] * _bytes_of_buffers(rows.dtype, projections)
        tile_tokens = _tile_within_budget(row, rows.device)
    return max(1, min(tile_tokens, rows.shape[0]))


@functools.cache
def _tile_within_budget(row: int, device: torch.device) -> int:
    return tile_tokens_for(row, TILE_BUDGET.get(device.type, TILE_BUDGET["cpu"]), _unit(device))


def _bytes_of_buffers(dtype: torch.dtype, projections: Sequence[Projection]) -> int:
    """Of an element: three buffers, and one more in the dtype of adapters that are wider."""
    wider = (p.adapter.a.dtype for p in projections if p.adapter is not None)
    return 3 * dtype.itemsize + max((w.itemsize for w in wider if w != dtype), default=0)


def _buffers(count: int, tokens: int, gate: Projection) -> list[Tensor]:
    return [gate.weight.new_empty(tokens, gate.weight.shape[0]) for _ in range(count)]


def _forward(
    product: OnBuffers, x: Tensor, factors: Factors, scales: Sequence[float], tile_tokens: int
) -> Tensor:
    gate, up, down = projections = _projections(factors, scales)
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], down.weight.shape[0])
    size = _tile_size(rows, projections, tile_tokens)
    buffers = _buffers(2, size, gate)
    with without_autocast(x.device.type):
        for part in _tiles(rows.shape[0], size):
            x_t, out_t = _of_tile(rows, part), _of_tile(out, part)
            g, u = (_of_tile(b, slice(0, x_t.shape[0])) for b in buffers)
            gate.write(x_t, g)
            up.write(x_t, u)
            product(g, u)
            down.write(g, out_t)
    # No view: what a custom function returns may be written in place only if it is none.
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], down.weight.shape[0]))


class _Gradients:
    """Of the factors of a projection, summed over tiles.

    wanted: of weight, a and b. tiles: their number; the first writes the sums, and none leaves
    zeros. A sum over tiles is kept in fp32; a single product is rounded once by its GEMM. Those of
    an adapter, which are small, are kept in fp32 in any case: one has yet to be scaled.
    """

    def __init__(self, factors: Factors, wanted: Sequence[bool], tiles: int) -> None:
        self.factors = factors
        self.sums: list[Tensor | None] = [None] * 3
        for i, (factor, want) in enumerate(zip(factors, wanted, strict=True)):
            if want:
                dtype = factor.dtype
                if i or tiles != 1:
                    dtype = torch.promote_types(dtype, torch.float32)
                self.sums[i] = _like(factor, dtype, zeros=tiles == 0)

    def add(self, x: Tensor, inner: Any, grad: Tensor, inner_grad: Any, first: bool) -> None:
        """A tile's. inner, inner_grad: as `Projection` gives them."""
        for total, a, b in zip(self.sums, (grad, inner_grad, grad), (x, x, inner), strict=True):
            if total is not None:
                if a.dtype != b.dtype:
                    dtype = torch.promote_types(a.dtype, b.dtype)
                    a, b = a.to(dtype), b.to(dtype)
                accumulate_mm(total, a.t(), b, first)

    def rounded(self, scale: float) -> list[Tensor]:
        """Those that are wanted."""
        of_b = self.sums[2]
        if of_b is not None:
            of_b.mul_(scale)
        pairs = zip(self.sums, self.factors, strict=True)
        return [total.to(factor.dtype) for total, factor in pairs if total is not None]


def _backward(
    gradients_and_product: OnBuffers,
    grad: Tensor,
    x: Tensor,
    factors: Factors,
    scales: Sequence[float],
    wanted: Sequence[bool],
    tile_tokens: int,
    skip_padding: bool,
) -> list[Tensor]:
    gate, up, down = projections = _projections(factors, scales)
    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    kept = tokens_with_gradient(grad) if skip_padding else None
    tokens = rows.shape[0] if kept is None else kept.numel()
    # Buffers are for all tokens: from step to step fewer or more are left, but buffers of one size
    # fit where those of the last step were.
    size = _tile_size(rows, projections, tile_tokens)
    dx = _like(rows, x.dtype, zeros=kept is not None) if wanted[0] else None
    gradients = [
        _Gradients(factors[i : i + 3], wanted[1 + i : 4 + i], tiles=-(-tokens // size))
        for i in (0, 3, 6)
    ]
    buffers = _buffers(3, size, gate)
    with without_autocast(x.device.type):
        for part in _tiles(tokens, size):
            index, first = None if kept is None else kept[part], part.start == 0
            x_t, grad_t = (_of_tile(t, part) if index is None else t[index] for t in (rows, grad))
            g, u, h = (_of_tile(b, slice(0, x_t.shape[0])) for b in buffers)
            gate_inner, up_inner = gate.write(x_t, g), up.write(x_t, u)
            down_grad = down.inner_gradient(grad_t)
            down.add_input_gradient(grad_t, down_grad, h, first=True)
            gradients_and_product(g, u, h)
            gate_grad, up_grad = gate.inner_gradient(g), up.inner_gradient(u)
            gradients[0].add(x_t, gate_inner, g, gate_grad, first)
            gradients[1].add(x_t, up_inner, u, up_grad, first)
            gradients[2].add(h, down.inner(h), grad_t, down_grad, first)
            if dx is not None:
                # A tile's own copy of x has been read for the last time.
                dx_t = _of_tile(dx, part) if index is None else x_t
                gate.add_input_gradient(g, gate_grad, dx_t, first=True)
                up.add_input_gradient(u, up_grad, dx_t, first=False)
                if index is not None:
                    dx.index_copy_(0, index, dx_t)
    found = [] if dx is None else [dx.view(x.shape)]
    for each, scale in zip(gradients, scales, strict=True):
        found += each.rounded(scale)
    return found


def _like(t: Tensor, dtype: torch.dtype, zeros: bool) -> Tensor:
    make = torch.zeros_like if zeros else torch.empty_like
    return make(t, dtype=dtype, memory_format=torch.contiguous_format)


def tiled_mlp(name: str, activation: Activation) -> torch._ops.OpOverload:
    """Register ``liger_fx::<name>(x, w_gate, w_up, w_down, tile_tokens=0, skip_padding=False)``.

    x: [..., H]. w_gate, w_up: [I, H], w_down: [H', I]. All float32, bfloat16 or float16 alike (on a
    CPU float64 as well). tile_tokens: 0 chooses by memory budget. skip_padding: the backward leaves
    out tokens whose gradient is exactly zero, and the host waits for their number; see the module.

    Further arguments, each with a default: ``a_gate``, ``b_gate`` and ``scale_gate`` of an adapter
    on the gate, [R, H], [I, R] and a number; likewise those of ``up`` and ``down``. The two tensors
    have one dtype, that of x or a wider one.

    Returns [..., H'], contiguous. Weight gradients are summed over tiles in fp32. The backward is
    differentiable once.
    """

    def product_torch(gate: Tensor, up: Tensor) -> None:
        gate.copy_(activation.plain(gate) * up)

    def gradients_and_product_torch(gate: Tensor, up: Tensor, grad: Tensor) -> None:
        product = activation.plain(gate) * up
        grad_gate, grad_up = activation.gradients(gate, up, grad)
        gate.copy_(grad_gate)
        up.copy_(grad_up)
        grad.copy_(product)

    def forward_liger(module: Any, x: Tensor, *rest: Any) -> Tensor:
        def product(gate: Tensor, up: Tensor) -> None:
            activation.launch_forward(module, gate, up, gate)

        return _forward(product, x, *rest)

    def backward_triton(module: Any, grad: Tensor, *rest: Any) -> list[Tensor]:
        from liger_fx.ops.gated_triton import gradients_and_product

        def on_buffers(gate: Tensor, up: Tensor, grad: Tensor) -> None:
            gradients_and_product(gate, up, grad, activation.name)

        return _backward(on_buffers, grad, *rest)

    forward = kernel(
        f"{name}_forward(Tensor x, Tensor?[] factors, float[] scales, int tile_tokens) -> Tensor",
        fake=lambda x, factors, scales, tile: x.new_empty(*x.shape[:-1], factors[6].shape[0]),
        plain=lambda x, *rest: _forward(product_torch, x, *rest),
        cuda=forward_liger,
        liger=activation.liger,
    )
    backward = kernel(
        f"{name}_backward(Tensor grad, Tensor x, Tensor?[] factors, float[] scales, bool[] wanted,"
        " int tile_tokens, bool skip_padding) -> Tensor[]",
        fake=_fake_gradients,
        plain=lambda grad, *rest: _backward(gradients_and_product_torch, grad, *rest),
        cuda=backward_triton,
        liger=activation.liger,
    )

    class TiledMLP(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
            *factors, scales, tile_tokens, skip_padding = rest
            ctx.save_for_backward(x, *factors)
            ctx.literals = (scales, tile_tokens, skip_padding)
            return forward(x, factors, scales, tile_tokens)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, *factors = ctx.saved_tensors
            scales, *literals = ctx.literals
            wanted = list(ctx.needs_input_grad[: 1 + len(factors)])
            gradients = iter(backward(grad, x, factors, scales, wanted, *literals))
            return *(next(gradients) if want else None for want in wanted), None, None, None

    def op(
        x: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        tile_tokens: int = 0,
        skip_padding: bool = False,
        a_gate: Tensor | None = None,
        b_gate: Tensor | None = None,
        scale_gate: float = 1.0,
        a_up: Tensor | None = None,
        b_up: Tensor | None = None,
        scale_up: float = 1.0,
        a_down: Tensor | None = None,
        b_down: Tensor | None = None,
        scale_down: float = 1.0,
    ) -> Tensor:
        factors = (w_gate, a_gate, b_gate, w_up, a_up, b_up, w_down, a_down, b_down)
        scales = [scale_gate, scale_up, scale_down]
        return TiledMLP.apply(x, *factors, scales, tile_tokens, skip_padding)

    adapters = (
        f", Tensor? a_{each}=None, Tensor? b_{each}=None, float scale_{each}=1.0"
        for each in ("gate", "up", "down")
    )
    return differentiable(
        f"{name}(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, int tile_tokens=0,"
        f" bool skip_padding=False{''.join(adapters)}) -> Tensor",
        op,
    )


def _fake_gradients(
    grad: Tensor,
    x: Tensor,
    factors: Factors,
    scales: Sequence[float],
    wanted: list[bool],
    tile_tokens: int,
    skip_padding: bool,
) -> list[Tensor]:
    """Of those that are wanted."""
    return [t.new_empty(t.shape) for t, want in zip((x, *factors), wanted, strict=True) if want]


swiglu_mlp = tiled_mlp("swiglu_mlp", SILU)
geglu_mlp = tiled_mlp("geglu_mlp", GELU_TANH)
geglu_exact_mlp = tiled_mlp("geglu_exact_mlp", GELU)
