"""Linear and cross-entropy alone, forward and backward, bf16.

    python benchmarks/linear_cross_entropy.py
    python benchmarks/linear_cross_entropy.py --shape 32768 4096 128256 --ignored 0 0.5
    python benchmarks/linear_cross_entropy.py --grid --json grid.json --picture grid.png
    python benchmarks/linear_cross_entropy.py --error --ignored 0 0.5 0.8

The default measures time and memory of two shapes; ``--error`` the relative error of the loss and
of both gradients against fp64, over several chunks of tokens. Floor: three matrix products, 6·N·H·V
operations, at ``--tflops``.

``--grid`` measures the errors first and then 36 cells, each arm in each of them, and compares
liger_fx with the fastest peer that is exact: one whose gradients are no further from fp64 than
plain Inductor's, at any share of ignored labels. An arm compiles a shape once for all shares.

An arm whose package is not installed is left out. The newest are

    liger_cute    liger-kernel's own three kernels for sm90; all logits exist (nvidia-cutlass-dsl)
    liger_scaled  liger-kernel's loss of each token, made again in the backward (nvidia-cutlass-dsl)
    quack         QuACK's chunks, on sm90 with exponentials in the place of logits (quack-kernels)
    quack_logits  QuACK's chunks of logits, which other GPUs get (quack-kernels)
    trl           TRL's head: tiles of tokens and classes, made again in the backward (trl)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from math import inf
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _harness import Args, Benchmark, compared, options, several
from _measure import (
    GIB,
    IGNORE,
    Unavailable,
    interleaved,
    labels_like,
    lap_times,
    needs_cuda,
    needs_package,
    reason,
    run_laps,
)
from _output import Panel, Row, columns, failures, markdown
from torch import Tensor, nn
from torch._inductor import metrics

PERIOD = 512  # tokens of one prompt and its answer
LEAST_LAPS, ENOUGH_MS = 3, 250  # laps of a large shape, and what those of a small one may take
OURS, PLAIN = "liger_fx", "inductor"
NOISE = 1.05  # an error is a random number too
TRL_CLASSES = 32768  # classes of a tile, as in TRL's trainers

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


# -- arms ------------------------------------------------------------------------------------------


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The code that the other arms replace; logits are upcast as torchtune does it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`eager` in the dtype of its inputs."""
    return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE)


def inductor(device: torch.device) -> Head:
    return torch.compile(eager, backend="inductor", fullgraph=True)


def auto_chunker(device: torch.device) -> Head:
    if not hasattr(torch._inductor.config, "auto_chunker"):
        raise Unavailable(f"Inductor of torch {torch.__version__} has no auto-chunker")
    metrics.num_auto_chunking = 0
    # Not from a cache, which would say nothing of how the graph was made.
    options = {"auto_chunker.enable": True, "fx_graph_cache": False}
    return torch.compile(eager, backend="inductor", fullgraph=True, options=options)


def torchtune(device: torch.device) -> Head:
    """torchtune's chunked loss under ``compile=True``, with the projection of its decoder."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    loss_fn = CEWithChunkedOutputLoss()
    compiled = torch.compile(loss_fn.compute_cross_entropy, backend="inductor")
    loss_fn.compute_cross_entropy = compiled

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        chunks = hidden.unsqueeze(0).chunk(loss_fn.num_output_chunks, dim=1)
        return loss_fn([F.linear(chunk, weight) for chunk in chunks], labels.unsqueeze(0))

    return head


def liger(device: torch.device, **settings: Any) -> Head:
    needs_cuda(device, "Liger's fused loss")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return partial(liger_fused_linear_cross_entropy, ignore_index=IGNORE, **settings)


def liger_cute(device: torch.device) -> Head:
    """Liger's kernels for sm90, which hold all logits and take no ignored label out."""
    needs_cuda(device, "Liger's CuTe head")
    needs_package("cutlass", "nvidia-cutlass-dsl")
    from liger_kernel.ops.cutedsl.ops import fused_linear_cross_entropy_sm90 as sm90

    return partial(sm90.liger_fused_linear_cross_entropy_sm90, ignore_index=IGNORE)


def liger_scaled(device: torch.device) -> Head:
    """Liger's loss of each token: kernels for sm90, chunks of PyTorch's operations elsewhere. Both
    make the logits again in the backward."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        needs_package("cutlass", "nvidia-cutlass-dsl")

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)
        return losses.sum() / (labels != IGNORE).sum()

    return head


def cut_cross_entropy(device: torch.device) -> Head:
    needs_cuda(device, "cut-cross-entropy")
    needs_package("cut_cross_entropy", "cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy

    return partial(linear_cross_entropy, ignore_index=IGNORE)


def quack(device: torch.device, **settings: Any) -> Head:
    needs_cuda(device, "QuACK")
    needs_package("quack", "quack-kernels")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return partial(chunked_linear_cross_entropy, ignore_index=IGNORE, **settings)


def trl(device: torch.device) -> Head:
    """The head that TRL's trainers add to a model: only labels that count are projected, and the
    logits are made again in the backward."""
    needs_package("trl", "trl")
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise Unavailable("trl is older than 1.16") from error

    def head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        counted = labels != IGNORE
        settings = 1.0, TRL_CLASSES, None, 1.0, ()  # temperature, chunk, softcap, scale, outputs
        logprobs, *_ = ChunkedLogProbFunction.apply(
            hidden[counted], weight, None, labels[counted], *settings
        )
        return -logprobs.mean()

    return head


def torch_chunked(device: torch.device) -> Head:
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = nn.LinearCrossEntropyOptions()
    return partial(F.linear_cross_entropy, ignore_index=IGNORE, options=options)


def liger_fx(device: torch.device) -> Head:
    return torch.compile(eager, backend="liger_fx", fullgraph=True)


ARMS: dict[str, Callable[[torch.device], Head]] = {
    "eager": lambda device: eager,
    "inductor": inductor,
    "auto_chunker": auto_chunker,
    "torchtune": torchtune,
    "liger": liger,
    "liger_fp32": partial(liger, accum_dtype=torch.float32),
    "liger_fp32_large": partial(liger, accum_dtype=torch.float32, chunk_mem_const=8),
    "liger_cute": liger_cute,
    "liger_scaled": liger_scaled,
    "cut_cross_entropy": cut_cross_entropy,
    "quack": quack,
    "quack_logits": partial(quack, use_scaled_exp=False),
    "trl": trl,
    "torch_chunked": torch_chunked,
    "liger_fx": liger_fx,
}


def check_chunked() -> None:
    """Inductor compiles what its auto-chunker cannot chunk as it is, and does not say so."""
    if not metrics.num_auto_chunking:
        raise RuntimeError("nothing was chunked")


def check_fused() -> None:
    """Raise if the last graph kept its projection. The backend's own option ``require`` would be
    content with the graph of an earlier shape."""
    from liger_fx import reports

    if "linear_cross_entropy" not in reports()[-1].counts:
        raise RuntimeError(f"not fused: {reports()[-1]}")


# That an arm is what its name says; called when it has compiled.
CHECKS = {"auto_chunker": check_chunked, "liger_fx": check_fused}


# -- measuring -------------------------------------------------------------------------------------


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int


HEADS = [(896, 151936), (2048, 128256), (2304, 256000), (4096, 128256)]
GRID = [Shape(tokens, *head) for tokens in (4096, 16384, 65536) for head in HEADS]
TWO = [Shape(16384, 2048, 128256), Shape(32768, 4096, 128256)]
FITS_IN_FP64 = Shape(16384, 1024, 128256)  # and is several chunks to each arm that makes chunks


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @staticmethod
    def random(shape: Shape, device: torch.device) -> Inputs:
        """Logits of standard deviation 1, no label ignored."""
        generator = torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, generator=generator, device=device, dtype=torch.bfloat16)
        hidden = normal(shape.tokens, shape.hidden)
        weight = normal(shape.vocabulary, shape.hidden) * shape.hidden**-0.5
        labels = torch.randint(
            shape.vocabulary, (shape.tokens,), generator=generator, device=device
        )
        return Inputs(hidden.requires_grad_(), weight.requires_grad_(), labels)

    def ignoring(self, share: float) -> Inputs:
        return self._replace(labels=labels_like(self.labels, share, PERIOD))

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


def measure_error(head: Head, inputs: Inputs, reference: Result) -> Row:
    """Relative Frobenius errors."""
    result = loss_and_gradients(head, inputs)
    return {
        f"{name}_error": ((got.double() - want).norm() / want.norm()).item()
        for name, got, want in zip(Result._fields, result, reference, strict=True)
    }


def time_rows(shape: Shape, args: Args) -> Iterator[list[Row]]:
    """One cell after the other. Its arms take turns, so that each meets the GPU as warm."""
    inputs = Inputs.random(shape, args.device)
    floor = 6 * shape.tokens * shape.hidden * shape.vocabulary / args.tflops / 1e9
    heads = {arm: head_of(arm, args) for arm in args.arms}
    for share in args.ignored:
        cell = inputs.ignoring(share)
        rows = {arm: attempt(partial(warm_up, arm, heads[arm], cell, args)) for arm in heads}
        lap = [row.pop("lap") for row in rows.values() if "lap" in row]
        laps = max(LEAST_LAPS, round(ENOUGH_MS / mean(lap))) if lap else 0
        ready = [arm for arm, row in rows.items() if "error" not in row]
        calls = {arm: partial(loss_and_gradients, heads[arm], cell) for arm in ready}
        for arm, times in interleaved(calls, args.device, min(args.steps, laps)).items():
            rows[arm] |= {"ms": median(times), "times": times}
            rows[arm] |= {"floor_ms": floor, "valid_floor_ms": floor * (1 - share)}
        yield [{"arm": arm} | shape._asdict() | {"ignored": share} | rows[arm] for arm in rows]
    free_memory()


def warm_up(arm: str, head: Head, inputs: Inputs, args: Args) -> Row:
    """``lap``: ms of a call. ``extra_gib``: at its peak, without inputs and their gradients."""
    free_memory(compiled=False)
    call = partial(loss_and_gradients, head, inputs)
    lap_times(call, args.device, args.warmup)
    if arm in CHECKS:
        CHECKS[arm]()
    laps = run_laps(call, args.device, 1)
    gradients = sum(x.nbytes for x in inputs[:2]) / GIB
    return {"lap": laps.ms, "extra_gib": laps.extra_gib and laps.extra_gib - gradients}


def error_rows(shape: Shape, args: Args) -> Iterator[list[Row]]:
    """One arm after the other, a row for each share of ignored labels."""
    inputs = Inputs.random(shape, args.device)
    wide = inputs.double()
    references = {s: loss_and_gradients(exact, wide.ignoring(s)) for s in args.ignored}
    del wide

    def measure(arm: str, head: Head, share: float) -> Row:
        row = measure_error(head, inputs.ignoring(share), references[share])
        if arm in CHECKS:
            CHECKS[arm]()
        return row

    for arm in args.arms:
        free_memory()
        head = head_of(arm, args)
        place = {"arm": arm} | shape._asdict()
        yield [
            place | {"ignored": share} | attempt(partial(measure, arm, head, share))
            for share in args.ignored
        ]


def head_of(arm: str, args: Args) -> Head:
    """The head of an arm, made by the first call: where an arm cannot run is said in its row."""
    make = cache(partial(ARMS[arm], args.device))
    return lambda *inputs: make()(*inputs)


def attempt(measure: Callable[[], Row]) -> Row:
    """One failure, out of memory above all, is a result."""
    try:
        return measure()
    except Exception as error:
        return {"error": reason(error)}


def free_memory(compiled: bool = True) -> None:
    """compiled: forget compiled code as well, which may hold tensors."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def run(args: Args) -> Iterator[list[Row]]:
    """Of the grid errors come first, then times, which say whether their arm is exact."""
    args.ignored = args.ignored or ([0.0, 0.5, 0.8] if args.grid else [0.0, 0.5])

    def shapes(otherwise: Sequence[Shape]) -> Sequence[Shape]:
        return [Shape(*sizes) for sizes in args.shape or otherwise]

    qualified: set[str] = set()
    if args.grid or args.error:
        shape, *_ = shapes([FITS_IN_FP64])
        errors = []
        for rows in error_rows(shape, args):
            errors += rows
            yield rows
        qualified = exact_arms(errors)
    if not args.error:
        for shape in shapes(GRID if args.grid else TWO):
            for rows in time_rows(shape, args):
                yield [
                    row | {"exact": row["arm"] in qualified} if args.grid else row for row in rows
                ]


# -- comparing -------------------------------------------------------------------------------------

PLACE = columns("N {tokens:d} | H {hidden:d} | V {vocabulary:d} | ignored {ignored:.0%}")
COLUMNS = PLACE + columns(
    "arm {arm} | ms {ms:.1f} | floor ms {floor_ms:.1f} |"
    " floor ms, valid tokens only {valid_floor_ms:.1f} | extra GiB {extra_gib:.2f} |"
    " loss {loss_error:.2e} | dX {hidden_error:.2e} | dW {weight_error:.2e} |"
    " loss, of eager's {loss_ratio:.3f} | dX, of eager's {hidden_ratio:.3f} |"
    " dW, of eager's {weight_ratio:.3f}"
)
SUMMARY = PLACE + columns(
    "fastest exact peer {peer} | its ms {peer_ms:.1f} | liger_fx ms {ms:.1f} |"
    " speed of the peer's {speed:.3f} | its extra GiB {peer_extra_gib:.2f} |"
    " liger_fx extra GiB {extra_gib:.2f}"
)
PLACE_KEYS = [column.key for column in PLACE]


def by_cell(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """For each shape and share, in order, the row of each arm."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in PLACE_KEYS), {})[row["arm"]] = row
    return [cell for _, cell in sorted(cells.items())]


def exact_arms(errors: Sequence[Row]) -> set[str]:
    """Arms whose gradients are no further from fp64 than plain Inductor's in any cell."""

    def as_exact(arm: str, cell: dict[str, Row]) -> bool:
        found, plain = cell.get(arm, {}), cell.get(PLAIN, {})
        keys = ("hidden_error", "weight_error")
        return all(found.get(key, inf) <= NOISE * plain.get(key, -inf) for key in keys)

    cells = by_cell(errors)
    return {arm for arm in ARMS if cells and all(as_exact(arm, cell) for cell in cells)}


def finish(rows: list[Row], args: Args) -> list[Row]:
    """Errors over those of eager; in the grid rows of liger_fx beside the fastest exact peer."""
    times = [row for row in rows if "exact" in row]
    errors = [row for row in rows if "exact" not in row]
    for cell in by_cell(times):
        if "ms" in cell.get(OURS, {}):
            _compare(cell[OURS], [row for row in cell.values() if row["exact"] and "ms" in row])
    ratios = {f"{name}_ratio": f"{name}_error" for name in Result._fields}
    return compared(errors, "eager", PLACE_KEYS, **ratios) + times


def _compare(ours: Row, exact: Sequence[Row]) -> None:
    peers = [row for row in exact if row is not ours]
    peer = min(peers, key=lambda row: row["ms"], default={"arm": "no exact peer"})
    ours["peer"], ours["peer_ms"] = peer["arm"], peer.get("ms")
    ours["peer_extra_gib"] = peer.get("extra_gib")
    ours["speed"] = peer["ms"] / ours["ms"] if "ms" in peer else None


def text(rows: list[Row], args: Args) -> str:
    if not args.grid:
        return markdown(rows, COLUMNS)
    times = [row for row in rows if "exact" in row]
    inexact = dict.fromkeys(row["arm"] for row in times if not row["exact"] and "ms" in row)
    parts = [
        markdown([row for row in rows if "exact" not in row], COLUMNS),
        f"Less exact than Inductor: {', '.join(inexact) or 'none'}\n",
        markdown([row for row in times if row["arm"] == OURS], SUMMARY),
        *failures(times, COLUMNS),
    ]
    return "\n".join(parts)


SHAPE = "{tokens:,} x {hidden:,} x {vocabulary:,}"


def panels(args: Args) -> list[Panel]:
    if args.grid:
        axis = "speed, of the fastest exact peer's (named below the shape)"
        title = "{ignored:.0%} of the labels ignored"
        return [Panel(axis, "speed", SHAPE + "\n{peer}", ".2f", OURS, title, reference=1)]
    group = SHAPE + "\n{ignored:.0%} ignored"
    return [
        Panel("ms", "ms", group, ",.1f"),
        Panel("extra GiB over inputs and gradients", "extra_gib", group, ".2f"),
        Panel("error of dX, of eager's", "hidden_ratio", group, ".2f"),
        Panel("error of dW, of eager's", "weight_ratio", group, ".2f"),
    ]


OPTIONS = options(
    __doc__,
    shape={
        "type": int,
        "nargs": 3,
        "action": "append",
        "metavar": ("N", "H", "V"),
        "help": "may be given several times; errors are those of the first",
    },
    ignored={"type": float, "nargs": "+", "help": "shares of labels"},
    arms=several(ARMS),
    warmup={"type": int, "default": 2, "help": "calls, the compiling one included"},
    steps={"type": int, "default": 10, "help": "at most; fewer of a large shape"},
    tflops=790.0,
)
WHAT = OPTIONS.add_mutually_exclusive_group()
WHAT.add_argument("--grid", action="store_true", help="36 cells against their fastest peers")
WHAT.add_argument("--error", action="store_true", help="gradient errors instead of times")

BENCHMARK = Benchmark(
    OPTIONS,
    run,
    columns=COLUMNS,
    finish=finish,
    text=text,
    title="Linear and cross-entropy, forward and backward, N x H x V",
    panels=panels,
)

if __name__ == "__main__":
    BENCHMARK.main()
