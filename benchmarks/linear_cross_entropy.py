"""Linear and cross-entropy alone, forward and backward, bf16.

    python benchmarks/linear_cross_entropy.py
    python benchmarks/linear_cross_entropy.py --shape 32768 4096 128256 --ignored 0.5
    python benchmarks/linear_cross_entropy.py --error --shape 4096 1024 32000 --ignored 0.5

The default measures time and memory of two shapes; ``--error`` the relative error of the loss and
of both gradients against fp64. Floor: three matrix products, 6·N·H·V operations, at ``--tflops``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from _common import (
    GIB,
    IGNORE,
    Column,
    Row,
    Unavailable,
    labels_like,
    lap_times,
    markdown,
    needs_cuda,
    peak_bytes,
    print_header,
    progress,
    reset_peak,
    write_json,
)
from torch import Tensor, nn

PERIOD = 512  # tokens of one prompt and its answer

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The code that the other arms replace; logits are upcast as torchtune does it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`eager` in the dtype of its inputs."""
    return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE)


def inductor(device: torch.device) -> Head:
    return torch.compile(eager, backend="inductor", fullgraph=True)


def liger_fx(device: torch.device) -> Head:
    return torch.compile(eager, backend="liger_fx", fullgraph=True)


def liger(accumulate: torch.dtype | None, device: torch.device) -> Head:
    needs_cuda(device, "Liger's fused loss")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_fn = LigerFusedLinearCrossEntropyLoss(accum_dtype=accumulate)
    return lambda hidden, weight, labels: loss_fn(weight, hidden, labels)


def cut_cross_entropy(device: torch.device) -> Head:
    needs_cuda(device, "cut-cross-entropy")
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable("cut-cross-entropy is not installed") from error
    return partial(linear_cross_entropy, ignore_index=IGNORE)


def torch_chunked(device: torch.device) -> Head:
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = nn.LinearCrossEntropyOptions()
    return partial(F.linear_cross_entropy, ignore_index=IGNORE, options=options)


ARMS: dict[str, Callable[[torch.device], Head]] = {
    "eager": lambda device: eager,
    "inductor": inductor,
    "liger": partial(liger, None),
    "liger_fp32": partial(liger, torch.float32),
    "cut_cross_entropy": cut_cross_entropy,
    "torch_chunked": torch_chunked,
    "liger_fx": liger_fx,
}

TIMES = [
    Column("N", "tokens", "d"),
    Column("H", "hidden", "d"),
    Column("V", "vocabulary", "d"),
    Column("ignored", "ignored", ".0%"),
    Column("arm", "arm"),
    Column("ms", "ms", ".1f"),
    Column("floor ms", "floor_ms", ".1f"),
    Column("floor ms, valid tokens only", "valid_floor_ms", ".1f"),
    Column("extra GiB", "extra_gib", ".2f"),
]
ERRORS = [
    *TIMES[:5],
    Column("loss", "loss_error", ".2e"),
    Column("dX", "hidden_error", ".2e"),
    Column("dW", "weight_error", ".2e"),
    Column("loss, of eager's", "loss_ratio", ".3f"),
    Column("dX, of eager's", "hidden_ratio", ".3f"),
    Column("dW, of eager's", "weight_ratio", ".3f"),
]


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int
    ignored: float


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @staticmethod
    def random(shape: Shape, device: torch.device) -> Inputs:
        """Logits of standard deviation 1."""
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
        hidden = normal(shape.tokens, shape.hidden)
        weight = normal(shape.vocabulary, shape.hidden) * shape.hidden**-0.5
        targets = torch.randint(
            shape.vocabulary, (shape.tokens,), generator=generator, device=device
        )
        labels = labels_like(targets, shape.ignored, PERIOD)
        return Inputs(hidden.requires_grad_(), weight.requires_grad_(), labels)

    def double(self) -> Inputs:
        hidden, weight = (x.detach().double().requires_grad_() for x in self[:2])
        return Inputs(hidden, weight, self.labels)


class Result(NamedTuple):
    loss: Tensor
    hidden: Tensor
    weight: Tensor


def loss_and_gradients(head: Head, inputs: Inputs) -> Result:
    loss = head(*inputs)
    return Result(loss.detach(), *torch.autograd.grad(loss, inputs[:2]))


def measure_time(head: Head, inputs: Inputs, shape: Shape, args: argparse.Namespace) -> Row:
    device = inputs.hidden.device
    call = partial(loss_and_gradients, head, inputs)
    lap_times(call, device, args.warmup)
    reset_peak(device)
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    ms = statistics.median(lap_times(call, device, args.steps))
    peak = peak_bytes(device)
    gradients = sum(x.nbytes for x in inputs[:2])
    floor = 6 * shape.tokens * shape.hidden * shape.vocabulary / args.tflops / 1e9
    return {
        "ms": ms,
        "floor_ms": floor,
        "valid_floor_ms": floor * (1 - shape.ignored),
        "extra_gib": peak and (peak - allocated - gradients) / GIB,
    }


def measure_error(head: Head, inputs: Inputs, reference: Result) -> Row:
    """Relative Frobenius errors."""
    result = loss_and_gradients(head, inputs)
    return {
        f"{name}_error": ((got.double() - want).norm() / want.norm()).item()
        for name, got, want in zip(Result._fields, result, reference, strict=True)
    }


def with_ratios(rows: list[Row]) -> list[Row]:
    """Each error over that of the eager arm."""
    base: Row = next((row for row in rows if row["arm"] == "eager"), {})
    for row in rows:
        for name in Result._fields:
            if f"{name}_error" in row and base.get(f"{name}_error"):
                row[f"{name}_ratio"] = row[f"{name}_error"] / base[f"{name}_error"]
    return rows


def check_fused() -> None:
    """Raise if the last graph kept its projection. The backend's own option ``require`` would be
    content with the graph of an earlier shape."""
    from liger_fx import reports

    if "linear_cross_entropy" not in reports()[-1].counts:
        raise RuntimeError(f"not fused: {reports()[-1]}")


def measure(shape: Shape, args: argparse.Namespace) -> Iterator[Row]:
    inputs = Inputs.random(shape, args.device)
    reference = loss_and_gradients(exact, inputs.double()) if args.error else None
    for arm in args.arms:
        row = {"arm": arm} | shape._asdict()
        try:
            head = ARMS[arm](args.device)
            if reference:
                row |= measure_error(head, inputs, reference)
            else:
                row |= measure_time(head, inputs, shape, args)
            if arm == "liger_fx":
                check_fused()
        except Unavailable as why:
            row["error"] = f"left out: {why}"
        except Exception as error:  # one arm's failure, out of memory above all, is a result
            row["error"] = f"failed: {type(error).__name__}: {error}".splitlines()[0]
        progress(f"{arm}: {row.get('error', 'done')}")
        yield row
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "H", "V"))
    parser.add_argument("--ignored", type=float, default=0.0, help="share of labels; with --shape")
    parser.add_argument("--error", action="store_true", help="gradient errors instead of times")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--warmup", type=int, default=3, help="calls, the compiling one included")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tflops", type=float, default=790, help="the device's matrix products")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--json", type=Path, help="write every row")
    return parser.parse_args()


def shapes(args: argparse.Namespace) -> list[Shape]:
    if args.shape:
        return [Shape(*args.shape, args.ignored)]
    if args.error:
        return [Shape(4096, 1024, 32000, 0.5)]
    return [Shape(16384, 2048, 128256, 0.0), Shape(32768, 4096, 128256, 0.5)]


def main() -> None:
    args = parse_args()
    print_header(args.device)
    rows: list[Row] = []
    for shape in shapes(args):
        measured = list(measure(shape, args))
        rows += with_ratios(measured) if args.error else measured
        write_json(args.json, rows)
    print(markdown(rows, ERRORS if args.error else TIMES))


if __name__ == "__main__":
    main()
