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
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _common import (
    GIB,
    IGNORE,
    Column,
    Panel,
    Row,
    Unavailable,
    add_outputs,
    draw,
    labels_like,
    lap_times,
    markdown,
    needs_cuda,
    peak_bytes,
    print_header,
    progress,
    reason,
    reset_peak,
    write_json,
)
from torch import Tensor, nn
from torch._inductor import metrics

PERIOD = 512  # tokens of one prompt and its answer
LEAST_LAPS, ENOUGH_MS = 3, 250  # laps of a large shape, and what those of a small one may take
OURS, PLAIN = "liger_fx", "inductor"
NOISE = 1.05  # an error is a random number too

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
    "cut_cross_entropy": cut_cross_entropy,
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

    def __str__(self) -> str:
        return f"{self.tokens:,} x {self.hidden:,} x {self.vocabulary:,}"


def shape_of(row: Row) -> Shape:
    return Shape(row["tokens"], row["hidden"], row["vocabulary"])


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


def measure_time(head: Head, inputs: Inputs, warmup: int, most: int) -> Row:
    """The last call of the warm-up says how many laps there is time for."""
    device = inputs.hidden.device
    call = partial(loss_and_gradients, head, inputs)
    *_, lap = lap_times(call, device, warmup)
    laps = min(most, max(LEAST_LAPS, round(ENOUGH_MS / lap)))
    reset_peak(device)
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    times = lap_times(call, device, laps)
    peak = peak_bytes(device)
    gradients = sum(x.nbytes for x in inputs[:2])
    return {
        "ms": statistics.median(times),
        "times": times,
        "extra_gib": None if peak is None else (peak - allocated - gradients) / GIB,
    }


def measure_error(head: Head, inputs: Inputs, reference: Result) -> Row:
    """Relative Frobenius errors."""
    result = loss_and_gradients(head, inputs)
    return {
        f"{name}_error": ((got.double() - want).norm() / want.norm()).item()
        for name, got, want in zip(Result._fields, result, reference, strict=True)
    }


def floors(shape: Shape, ignored: float, tflops: float) -> Row:
    floor = 6 * shape.tokens * shape.hidden * shape.vocabulary / tflops / 1e9
    return {"floor_ms": floor, "valid_floor_ms": floor * (1 - ignored)}


def time_rows(shape: Shape, args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one arm after the other, a row for each share of ignored labels."""
    inputs = Inputs.random(shape, args.device)

    def measure(head: Head, share: float) -> Row:
        warmup = args.warmup if share == args.ignored[0] else 1  # the first one compiles
        row = measure_time(head, inputs.ignoring(share), warmup, args.steps)
        return row | floors(shape, share, args.tflops)

    return arm_rows(shape, args, measure)


def error_rows(shape: Shape, args: argparse.Namespace) -> Iterator[list[Row]]:
    inputs = Inputs.random(shape, args.device)
    wide = inputs.double()
    references = {s: loss_and_gradients(exact, wide.ignoring(s)) for s in args.ignored}
    del wide
    free_memory()

    def measure(head: Head, share: float) -> Row:
        return measure_error(head, inputs.ignoring(share), references[share])

    return arm_rows(shape, args, measure)


def arm_rows(
    shape: Shape, args: argparse.Namespace, measure: Callable[[Head, float], Row]
) -> Iterator[list[Row]]:
    for arm in args.arms:
        rows = attempt_arm(arm, args, measure)
        outcomes = dict.fromkeys(row.get("error", "done") for row in rows)
        progress(f"{shape}, {arm}: {', '.join(outcomes)}")
        place = {"arm": arm} | shape._asdict()
        yield [place | {"ignored": s} | row for s, row in zip(args.ignored, rows, strict=True)]
        torch.compiler.reset()
        free_memory()


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU


def attempt_arm(
    arm: str, args: argparse.Namespace, measure: Callable[[Head, float], Row]
) -> list[Row]:
    try:
        head = ARMS[arm](args.device)
        rows = [attempt(partial(measure, head, share)) for share in args.ignored]
        if arm in CHECKS and "error" not in rows[0]:
            CHECKS[arm]()
    except Exception as why:
        rows = [{"error": reason(why)} for _ in args.ignored]
    return rows


def attempt(measure: Callable[[], Row]) -> Row:
    """One failure, out of memory above all, is a result."""
    try:
        return measure()
    except Exception as error:
        return {"error": reason(error)}


# -- tables ----------------------------------------------------------------------------------------

CELL = [
    Column("N", "tokens", "d"),
    Column("H", "hidden", "d"),
    Column("V", "vocabulary", "d"),
    Column("ignored", "ignored", ".0%"),
]
TIMES = [
    *CELL,
    Column("arm", "arm"),
    Column("ms", "ms", ".1f"),
    Column("floor ms", "floor_ms", ".1f"),
    Column("floor ms, valid tokens only", "valid_floor_ms", ".1f"),
    Column("extra GiB", "extra_gib", ".2f"),
]
ERRORS = [
    *CELL,
    Column("arm", "arm"),
    Column("loss", "loss_error", ".2e"),
    Column("dX", "hidden_error", ".2e"),
    Column("dW", "weight_error", ".2e"),
    Column("loss, of eager's", "loss_ratio", ".3f"),
    Column("dX, of eager's", "hidden_ratio", ".3f"),
    Column("dW, of eager's", "weight_ratio", ".3f"),
]
SUMMARY = [
    *CELL,
    Column("fastest exact peer", "peer"),
    Column("its ms", "peer_ms", ".1f"),
    Column("liger_fx ms", "ms", ".1f"),
    Column("speed of the peer's", "speed", ".3f"),
    Column("its extra GiB", "peer_extra_gib", ".2f"),
    Column("liger_fx extra GiB", "extra_gib", ".2f"),
]

TITLE = "Linear and cross-entropy, forward and backward, N x H x V"
DRAWN = [
    Column("ms", "ms", ",.1f"),
    Column("extra GiB over inputs and gradients", "extra_gib", ".2f"),
]
DRAWN_ERRORS = [
    Column("error of dX, of eager's", "hidden_ratio", ".2f"),
    Column("error of dW, of eager's", "weight_ratio", ".2f"),
]


def by_cell(rows: list[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """For each shape and share, the row of each arm."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[c.key] for c in CELL), {})[row["arm"]] = row
    return dict(sorted(cells.items()))


def with_ratios(rows: list[Row]) -> list[Row]:
    """Each error over that of the eager arm."""
    for arms in by_cell(rows).values():
        for row in arms.values():
            for name in Result._fields:
                base = arms.get("eager", {}).get(f"{name}_error")
                if base and f"{name}_error" in row:
                    row[f"{name}_ratio"] = row[f"{name}_error"] / base
    return rows


def exact_arms(errors: list[Row]) -> set[str]:
    """Arms whose gradients are no further from fp64 than plain Inductor's in any cell."""
    cells = by_cell(errors).values()
    return {arm for arm in ARMS if cells and all(_as_exact(arm, arms) for arms in cells)}


def _as_exact(arm: str, arms: dict[str, Row]) -> bool:
    keys = ("hidden_error", "weight_error")
    pairs = [(arms.get(arm, {}).get(key), arms.get(PLAIN, {}).get(key)) for key in keys]
    return all(None not in pair and pair[0] <= NOISE * pair[1] for pair in pairs)


def measured_arms(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows if "error" not in row))


def side_by_side(rows: list[Row], key: str) -> list[Row]:
    """A row for each cell, with the arms' values in columns."""
    return [
        dict(zip((c.key for c in CELL), cell, strict=True))
        | {arm: row.get(key) for arm, row in arms.items()}
        for cell, arms in by_cell(rows).items()
    ]


def arm_columns(arms: list[str], qualified: set[str], digits: int) -> list[Column]:
    titles = {arm: arm if arm in qualified else f"({arm})" for arm in arms}
    return [*CELL, *(Column(titles[arm], arm, f".{digits}f") for arm in arms)]


def summary(rows: list[Row], qualified: set[str]) -> list[Row]:
    """Each cell's row of liger_fx, and the fastest exact peer's numbers."""
    return [
        arms[OURS] | _compared(arms[OURS], [arms[arm] for arm in arms if arm in qualified - {OURS}])
        for arms in by_cell(rows).values()
        if OURS in arms
    ]


def _compared(ours: Row, peers: list[Row]) -> Row:
    timed = [row for row in peers if "ms" in row]
    if not timed or "ms" not in ours:
        return {}
    peer = min(timed, key=lambda row: row["ms"])
    return {
        "peer": peer["arm"],
        "peer_ms": peer["ms"],
        "peer_extra_gib": peer["extra_gib"],
        "speed": peer["ms"] / ours["ms"],
    }


def failures(rows: list[Row]) -> list[str]:
    """Each reason once, with the cells where it holds, or none where it holds everywhere."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            where = f"{shape_of(row)}, {row['ignored']:.0%} ignored"
            cells.setdefault((row["arm"], row["error"]), []).append(where)
    everywhere = len(by_cell(rows))
    return [
        f"- {arm}: {error}" + ("" if len(where) == everywhere else f" ({'; '.join(where)})")
        for (arm, error), where in cells.items()
    ]


def print_grid(rows: list[Row], qualified: set[str]) -> None:
    arms = measured_arms(rows)
    print("Milliseconds; in parentheses arms whose gradients are less exact than Inductor's\n")
    print(markdown(side_by_side(rows, "ms"), arm_columns(arms, qualified, 1)))
    print("GiB over inputs and gradients\n")
    print(markdown(side_by_side(rows, "extra_gib"), arm_columns(arms, qualified, 2)))
    print("\n".join(failures(rows)), end="\n\n")
    print(markdown(summary(rows, qualified), SUMMARY))


def speeds(compared: list[Row]) -> list[Panel]:
    """A panel for each share of ignored labels, with a bar for each shape."""
    panels = []
    for share in sorted({row["ignored"] for row in compared}):
        cells = [row for row in compared if row["ignored"] == share]
        groups = [f"{shape_of(row)}\n{row.get('peer', 'no exact peer')}" for row in cells]
        series = {OURS: [row.get("speed") for row in cells]}
        axis = "speed, of the fastest exact peer's (named below the shape)"
        title = f"{share:.0%} of the labels ignored"
        panels.append(Panel(axis, groups, series, ".2f", reference=1, title=title))
    return panels


def arms_compared(rows: list[Row], columns: list[Column]) -> list[Panel]:
    """A panel for each column, with a bar for each arm in each cell."""
    cells = by_cell(rows)
    groups = [f"{Shape(*cell[:3])}\n{cell[3]:.0%} ignored" for cell in cells]
    arms = measured_arms(rows)
    return [
        Panel(
            column.title,
            groups,
            {arm: [cell[arm].get(column.key) for cell in cells.values()] for arm in arms},
            column.format,
        )
        for column in columns
    ]


# -- commands --------------------------------------------------------------------------------------


def grid(args: argparse.Namespace) -> None:
    header = print_header(args.device)
    (shape,) = shapes(args.shape, [FITS_IN_FP64])
    errors: list[Row] = []
    for rows in error_rows(shape, args):
        errors += rows
        write_json(args.json, errors, header)
    qualified = exact_arms(errors)
    times: list[Row] = []
    for shape in shapes(args.shape, GRID):
        for rows in time_rows(shape, args):
            times += [row | {"exact": row["arm"] in qualified} for row in rows]
            write_json(args.json, errors + times, header)  # the run may be cut off
    print(markdown(with_ratios(errors), ERRORS))
    print_grid(times, qualified)
    write_json(args.json, errors + times, header)
    draw(args.picture, TITLE, speeds(summary(times, qualified)), header)


def table(args: argparse.Namespace) -> None:
    header = print_header(args.device)
    measure = error_rows if args.error else time_rows
    rows: list[Row] = []
    for shape in shapes(args.shape, [FITS_IN_FP64] if args.error else TWO):
        for measured in measure(shape, args):
            rows += measured
            write_json(args.json, rows, header)
    rows = with_ratios(rows)
    print(markdown(rows, ERRORS if args.error else TIMES))
    write_json(args.json, rows, header)
    draw(args.picture, TITLE, arms_compared(rows, DRAWN_ERRORS if args.error else DRAWN), header)


def shapes(given: list[int] | None, otherwise: list[Shape]) -> list[Shape]:
    return [Shape(*given)] if given else otherwise


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--grid", action="store_true", help="36 cells against their fastest peers")
    what.add_argument("--error", action="store_true", help="gradient errors instead of times")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "H", "V"))
    parser.add_argument("--ignored", type=float, nargs="+", help="shares of labels")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--warmup", type=int, default=2, help="calls, the compiling one included")
    parser.add_argument("--steps", type=int, default=10, help="at most; fewer of a large shape")
    parser.add_argument("--tflops", type=float, default=790, help="the device's matrix products")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    add_outputs(parser)
    args = parser.parse_args()
    args.ignored = args.ignored or ([0.0, 0.5, 0.8] if args.grid else [0.0, 0.5])
    return args


def main() -> None:
    args = parse_args()
    (grid if args.grid else table)(args)


if __name__ == "__main__":
    main()
