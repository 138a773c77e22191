"""What one call of an op costs the host. Nothing waits for the device.

    python benchmarks/host_time.py

A step calls some 33 norms and 16 gated activations: a GPU must not wait for Python. ``compiled`` is
the opaque kernel as Inductor's code calls it, ``eager`` the differentiable op under autograd. On a
CPU the kernels do nothing: what is timed there is dispatch, allocation and our launchers, without
Triton's own launch.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable
from typing import Any

import torch
from _common import Column, Panel, Row, add_outputs, draw, markdown, print_header, write_json

from liger_fx import ops
from liger_fx.ops.library import launchers, liger_module

ROWS, COLUMNS = 8, 64  # small: the device must keep up with the host
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TABLE = [
    Column("op", "op"),
    Column("forward, compiled µs", "forward", ".1f"),
    Column("backward, compiled µs", "backward", ".1f"),
    Column("forward, eager µs", "eager", ".1f"),
]


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
    """Let the launchers run on a CPU, on `NoKernels`."""
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


def cases() -> dict[str, tuple[Any, tuple[Any, ...], str, tuple[Any, ...]]]:
    """By op: the differentiable op and its arguments, its backward kernel and the arguments."""

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(*(shape or (ROWS, COLUMNS)), device=DEVICE)

    x, weight, rstd = rows(), rows(COLUMNS), rows(ROWS)
    heads, angles = rows(1, 4, 2, 16), rows(1, 4, 8, 2)
    cos = rows(1, 4, 16)
    literals = (1e-6, 0.0, "gemma")
    return {
        "rms_norm": (
            ops.rms_norm,
            (x, weight, *literals),
            "rms_norm_backward",
            (x, x, weight, rstd, 0.0, "gemma", True),
        ),
        "add_rms_norm": (
            ops.add_rms_norm,
            (x, x, weight, *literals),
            "add_rms_norm_backward",
            (x, x, x, weight, rstd, 0.0, "gemma", True),
        ),
        "layer_norm": (
            ops.layer_norm,
            (x, weight, weight, 1e-6),
            "layer_norm_backward",
            (x, x, weight, rstd, rstd, True),
        ),
        "swiglu": (ops.swiglu, (x, x), "swiglu_backward_", (x, rows(), x)),
        "geglu": (ops.geglu, (x, x), "geglu_backward_", (x, rows(), x)),
        "rope": (ops.rope, (heads, cos, cos, False), "rope_forward", (heads, cos, cos, True)),
        "rope_interleaved": (
            ops.rope_interleaved,
            (heads, angles, False),
            "rope_interleaved_forward",
            (heads, angles, True),
        ),
    }


def measure(name: str, op: Any, arguments: tuple[Any, ...], back: str, given: Any) -> Row:
    forward = getattr(torch.ops.liger_fx, f"{name}_forward").default
    backward = getattr(torch.ops.liger_fx, back).default
    trained = (arguments[0].clone().requires_grad_(), *arguments[1:])
    with torch.no_grad():
        row = {
            "op": name,
            "forward": microseconds(lambda: forward(*arguments)),
            "backward": microseconds(lambda: backward(*given)),
        }
    return row | {"eager": microseconds(lambda: op(*trained))}


def panels(rows: list[Row]) -> list[Panel]:
    titles = {column.title: column.key for column in TABLE[1:]}
    series = {title: [row[key] for row in rows] for title, key in titles.items()}
    return [Panel("µs of the host's, a call", [row["op"] for row in rows], series)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_outputs(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    header = print_header(torch.device(DEVICE))
    # Held until the end: a library takes its implementations with it.
    library = None if DEVICE == "cuda" else without_kernels()
    what = f"One call, on {DEVICE}" + (", kernels left out" if library else "")
    print(f"\n{what}")
    rows = [measure(name, *case) for name, case in cases().items()]
    print(markdown(rows, TABLE))
    write_json(args.json, rows, header)
    draw(args.picture, what, panels(rows), header)


if __name__ == "__main__":
    assert liger_module("utils"), "Liger cannot be imported"
    main()
