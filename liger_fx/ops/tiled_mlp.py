"""``liger_fx::swiglu_mlp``, ``geglu_mlp``, ``geglu_exact_mlp``: a gated MLP by tiles of tokens.

    y = (act(x Wg^T) * (x Wu^T)) Wd^T

Gate and up exist for a tile of tokens only, in the forward and in the backward, which computes them
again: of [tokens, intermediate] nothing is kept (the idea of Liger's and DeepSpeed's tiled MLP).
Inside an activation checkpoint, where gate and up are recomputed anyway, that costs nothing.

The backward of a tile has three buffers. Gate and up become their gradients; the gradient of their
product becomes the product, which the gradient of ``Wd`` needs.

With ``skip_padding`` the backward leaves out each token whose gradient is exactly zero, as it is
for tokens that pad a sequence: they cost no matrix product. A finite token with a zero gradient
adds nothing to any gradient. A token that is inf or nan does in eager, where 0 times inf is nan:
the weight gradients are nan there, and not here. The host waits for the number of tokens that are
left (see `tokens.tokens_with_gradient`). Without ``skip_padding`` no token is left out, and the
host does not wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from liger_fx.ops.gated import Activation
from liger_fx.ops.geglu import GELU, GELU_TANH
from liger_fx.ops.library import differentiable, kernel, multiprocessors, once_differentiable
from liger_fx.ops.matmul import accumulate_mm
from liger_fx.ops.swiglu import SILU
from liger_fx.ops.tokens import tokens_with_gradient

# Bytes of a tile's three buffers, which lie at the peak of a step's memory.
TILE_BUDGET = {"cuda": 1200 << 20, "cpu": 128 << 20}

OnBuffers = Callable[..., None]


def tile_tokens_for(intermediate: int, itemsize: int, budget: int, unit: int) -> int:
    """Tokens of a tile: what the budget takes, in multiples of ``unit`` or at least of 128."""
    most = budget // (3 * intermediate * itemsize)
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


def _tile_size(rows: Tensor, w_gate: Tensor, tile_tokens: int) -> int:
    if tile_tokens <= 0:
        budget = TILE_BUDGET.get(rows.device.type, TILE_BUDGET["cpu"])
        itemsize, unit = rows.element_size(), _unit(rows.device)
        tile_tokens = tile_tokens_for(w_gate.shape[0], itemsize, budget, unit)
    return max(1, min(tile_tokens, rows.shape[0]))


def _buffers(count: int, tokens: int, like: Tensor, w_gate: Tensor) -> list[Tensor]:
    return [like.new_empty(tokens, w_gate.shape[0]) for _ in range(count)]


def _forward(
    product: OnBuffers, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, tile_tokens: int
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], w_down.shape[0])
    size = _tile_size(rows, w_gate, tile_tokens)
    buffers = _buffers(2, size, rows, w_gate)
    with torch.autocast(x.device.type, enabled=False):  # every dtype has been decided
        for part in _tiles(rows.shape[0], size):
            gate, up = (b[: part.stop - part.start] for b in buffers)
            torch.mm(rows[part], w_gate.t(), out=gate)
            torch.mm(rows[part], w_up.t(), out=up)
            product(gate, up)
            torch.mm(gate, w_down.t(), out=out[part])
    # No view: what a custom function returns may be written in place only if it is none.
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], w_down.shape[0]))


def _backward(
    gradients_and_product: OnBuffers,
    grad: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    wanted: list[bool],
    tile_tokens: int,
    skip_padding: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    kept = tokens_with_gradient(grad) if skip_padding else None
    tokens = rows.shape[0] if kept is None else kept.numel()
    # Buffers are for all tokens: from step to step fewer or more are left, but buffers of one size
    # fit where those of the last step were.
    size = _tile_size(rows, w_gate, tile_tokens)
    # A sum over tiles is kept in fp32; a single product is rounded once by its GEMM.
    accum = torch.promote_types(x.dtype, torch.float32) if size < tokens else x.dtype
    dx = _like(rows, x.dtype, zeros=kept is not None) if wanted[0] else None
    sums = [
        _like(w, accum, zeros=not tokens) if want else None  # or the first tile writes it
        for w, want in zip((w_gate, w_up, w_down), wanted[1:], strict=True)
    ]
    buffers = _buffers(3, size, rows, w_gate)
    with torch.autocast(x.device.type, enabled=False):
        for part in _tiles(tokens, size):
            index = None if kept is None else kept[part]
            x_t, grad_t = (t[part if index is None else index] for t in (rows, grad))
            gate, up, product = (b[: part.stop - part.start] for b in buffers)
            torch.mm(x_t, w_gate.t(), out=gate)
            torch.mm(x_t, w_up.t(), out=up)
            torch.mm(grad_t, w_down, out=product)
            gradients_and_product(gate, up, product)
            for total, a, b in zip(sums, (gate, up, grad_t), (x_t, x_t, product), strict=True):
                if total is not None:
                    accumulate_mm(total, a.t(), b, part.start == 0)
            if dx is not None:
                # A tile's own copy of x has been read for the last time.
                dx_t = dx[part] if index is None else x_t
                torch.mm(gate, w_gate, out=dx_t)
                dx_t.addmm_(up, w_up)
                if index is not None:
                    dx.index_copy_(0, index, dx_t)
    dw_gate, dw_up, dw_down = (
        x.new_empty(0) if total is None else total.to(x.dtype) for total in sums
    )
    return x.new_empty(0) if dx is None else dx.view(x.shape), dw_gate, dw_up, dw_down


def _like(t: Tensor, dtype: torch.dtype, zeros: bool) -> Tensor:
    make = torch.zeros_like if zeros else torch.empty_like
    return make(t, dtype=dtype, memory_format=torch.contiguous_format)


def tiled_mlp(name: str, activation: Activation) -> torch._ops.OpOverload:
    """Register ``liger_fx::<name>(x, w_gate, w_up, w_down, tile_tokens=0, skip_padding=False)``.

    x: [..., H]. w_gate, w_up: [I, H], w_down: [H', I]. All float32, bfloat16 or float16 alike (on a
    CPU float64 as well). tile_tokens: 0 chooses by memory budget. skip_padding: the backward leaves
    out tokens whose gradient is exactly zero, and the host waits for their number; see the module.
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

    def backward_triton(module: Any, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        from liger_fx.ops.gated_triton import gradients_and_product

        def on_buffers(gate: Tensor, up: Tensor, grad: Tensor) -> None:
            gradients_and_product(gate, up, grad, activation.name)

        return _backward(on_buffers, grad, *rest)

    forward = kernel(
        f"{name}_forward(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, int tile_tokens)"
        " -> Tensor",
        fake=lambda x, w_gate, w_up, w_down, tile: x.new_empty(*x.shape[:-1], w_down.shape[0]),
        plain=lambda x, *rest: _forward(product_torch, x, *rest),
        cuda=forward_liger,
        liger=activation.liger,
    )
    backward = kernel(
        f"{name}_backward(Tensor grad, Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down,"
        " bool[] wanted, int tile_tokens, bool skip_padding) -> (Tensor, Tensor, Tensor, Tensor)",
        fake=_fake_gradients,
        plain=lambda grad, *rest: _backward(gradients_and_product_torch, grad, *rest),
        cuda=backward_triton,
        liger=activation.liger,
    )

    class TiledMLP(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x, w_gate, w_up, w_down, tile_tokens, skip_padding):
            ctx.save_for_backward(x, w_gate, w_up, w_down)
            ctx.literals = (tile_tokens, skip_padding)
            return forward(x, w_gate, w_up, w_down, tile_tokens)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:
            wanted = ctx.needs_input_grad[:4]
            gradients = backward(grad, *ctx.saved_tensors, list(wanted), *ctx.literals)
            kept = (g if want else None for g, want in zip(gradients, wanted, strict=True))
            return *kept, None, None

    def op(
        x: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        tile_tokens: int = 0,
        skip_padding: bool = False,
    ) -> Tensor:
        return TiledMLP.apply(x, w_gate, w_up, w_down, tile_tokens, skip_padding)

    return differentiable(
        f"{name}(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, int tile_tokens=0,"
        " bool skip_padding=False) -> Tensor",
        op,
    )


def _fake_gradients(
    grad: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    wanted: list[bool],
    tile_tokens: int,
    skip_padding: bool,
) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if want else t.new_empty(0)
        for t, want in zip((x, w_gate, w_up, w_down), wanted, strict=True)
    )


swiglu_mlp = tiled_mlp("swiglu_mlp", SILU)
geglu_mlp = tiled_mlp("geglu_mlp", GELU_TANH)
geglu_exact_mlp = tiled_mlp("geglu_exact_mlp", GELU)
