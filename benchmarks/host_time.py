"""What one call of an op costs the host. Nothing waits for the device.

    python benchmarks/host_time.py

A step calls some 33 norms and 16 gated activations: a GPU must not wait for Python. ``compiled`` is
the opaque kernel as Inductor's code calls it, ``eager`` the differentiable op under autograd. On a
CPU the kernels do nothing: what is timed there is dispatch, allocation and our launchers, without
Triton's own launch.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _harness import Args, Benchmark, options
from _output import Column, Panel, Row
from triton.runtime.jit import JITFunction

from liger_fx import ops
from liger_fx.ops.library import launchers, liger_module

ROWS, COLUMNS = 8, 64  # small: the device must keep up with the host
TIMES = {
    "forward, compiled µs": "forward",
    "backward, compiled µs": "backward",
    "forward, eager µs": "eager",
}


class NoKernels:
    """Stands in for a module of Liger's: every kernel can be launched and does nothing."""

    torch_to_triton_dtype = dict.fromkeys((torch.float32, torch.bfloat16))

    def _select_kernel_meta(self, half: int) -> tuple[int, int]:
        return 16, 2

    def __getattr__(self, name: str) -> NoKernels:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def without_kernels() -> torch.library.Library:
    """Let the launchers run on a CPU, on `NoKernels`; our own kernels do nothing either."""
    JITFunction.run = lambda *args, **kwargs: None
    library = torch.library.Library("liger_fx", "IMPL")
    for name, launch in launchers.items():
        if not name.startswith("cross_entropy"):  # its launcher does arithmetic of its own
            library.impl(
                name,
                lambda *args, launch=launch: launch(NoKernels(), *args),
                "CPU",
                allow_override=True,
            )
    return library


def microseconds(call: Callable[[], object], calls: int = 200, repeats: int = 100) -> float:
    call()
    return min(timeit.repeat(call, number=calls, repeat=repeats)) / calls * 1e6


def cases(device: torch.device) -> dict[str, tuple[tuple[Any, ...], str, tuple[Any, ...]]]:
    """By op: its arguments, its backward kernel and the arguments of that."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*(shape or (ROWS, COLUMNS)), device=device)

    x, weight, rstd = rows(), rows(COLUMNS), rows(ROWS)
    heads, angles = rows(1, 4, 2, 16), rows(1, 4, 8, 2)
    cos, by_halves = rows(1, 4, 16), (False, False, False)
    norm, saved = (weight, 1e-6, 0.0, "gemma"), (weight, rstd, 0.0, "gemma", True)
    layer, saved_layer = (weight, weight, 1e-6), (weight, rstd, rstd, True, True)
    square, ones = rows(COLUMNS, COLUMNS), [1.0, 1.0, 1.0]
    mlp: Any = [square, None, None] * 3, ones
    wanted = [True, *[True, False, False] * 3]
    return {
        "rms_norm": ((x, *norm), "rms_norm_backward", (x, x, *saved)),
        "add_rms_norm": ((x, x, *norm), "add_rms_norm_backward", (x, x, x, *saved)),
        "layer_norm": ((x, *layer), "layer_norm_backward", (x, x, *saved_layer)),
        "swiglu": ((x, x), "swiglu_backward_", (x, rows(), x)),
        "geglu": ((x, x), "geglu_backward_", (x, rows(), x)),
        "rope": (
            (heads, cos, cos, False, *by_halves),
            "rope_forward",
            (heads, cos, cos, True, *by_halves),
        ),
        "rope_interleaved": (
            (heads, angles, False),
            "rope_interleaved_forward",
            (heads, angles, True),
        ),
        "swiglu_mlp": ((x, *mlp, 0), "swiglu_mlp_backward", (x, x, *mlp, wanted, 0, False)),
    }


def _mlp(x: torch.Tensor, factors: Any, *_: Any) -> torch.Tensor:
    return ops.swiglu_mlp(x, *factors[::3])


def measure(name: str, arguments: tuple[Any, ...], back: str, given: tuple[Any, ...]) -> Row:
    forward = getattr(torch.ops.liger_fx, f"{name}_forward").default
    op = _mlp if name == "swiglu_mlp" else getattr(ops, name)
    backward = getattr(torch.ops.liger_fx, back).default
    trained = (arguments[0].clone().requires_grad_(), *arguments[1:])
    with torch.no_grad():
        row = {
            "op": name,
            "forward": microseconds(lambda: forward(*arguments)),
            "backward": microseconds(lambda: backward(*given)),
        }
    return row | {"eager": microseconds(lambda: op(*trained))}


def run(args: Args) -> Iterator[list[Row]]:
    # Held until the end: a library takes its implementations with it.
    library = None if args.device.type == "cuda" else without_kernels()
    print(f"\nOne call, on {args.device}" + (", kernels left out" if library else ""))
    for name, case in cases(args.device).items():
        yield [measure(name, *case)]


BENCHMARK = Benchmark(
    options(__doc__, device="cuda" if torch.cuda.is_available() else "cpu"),
    run,
    columns=[Column("op", "op"), *(Column(title, key, ".1f") for title, key in TIMES.items())],
    title="One call, on {device}",
    panels=[Panel("µs of the host's, a call", TIMES, "{op}", series="{key}")],
)

if __name__ == "__main__":
    assert liger_module("utils"), "Liger cannot be imported"
    BENCHMARK.main()
