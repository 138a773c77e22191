"""Where the time and the memory of a training step go, kernel by kernel, tensor by tensor.

    python benchmarks/profile_step.py
    python benchmarks/profile_step.py --arms torchtune liger_fx_recipe --ignored 0.5

The arms are those of training_step.py. The first table sorts the kernels of a step into groups and
compares the matrix products with the fewest that the arm could do, at ``--tflops``; ``idle`` is the
time in which no kernel runs. Then come each arm's largest kernels, and the tensors that are alive
when its memory is highest, with the line of (compiled) code that made them.
"""

from __future__ import annotations

import argparse
import linecache
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from _common import (
    GIB,
    Column,
    Panel,
    Row,
    Unavailable,
    draw,
    in_fresh_process,
    lap_times,
    markdown,
    print_header,
    progress,
    run_arm,
    write_json,
)
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training_step import ARMS, MODELS, arguments, labels_of, prepare

STEPS = 2  # that are profiled

# A group takes the kernels whose name holds one of its words; the first that fits wins.
GROUPS: dict[str, tuple[str, ...]] = {
    "loss": (
        *("liger_cross_entropy", "token_loss", "divergence"),
        *("nll_loss", "log_softmax", "softmax"),
    ),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "GEMM": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas"),
    "optimizer": ("multi_tensor", "adam"),
    "Inductor": ("triton_",),
    # Liger's, and our own
    "liger_fx": (
        "_swiglu",
        "_geglu",
        "_rms_norm",
        "_layer_norm",
        "_rotate",
        "gated_gradients",
    ),
    "copies": ("memcpy", "memset", "copy", "fill"),
}


def group_of(kernel: str) -> str:
    name = kernel.lower()
    return next((g for g, words in GROUPS.items() if any(w in name for w in words)), "other")


def kernel_times(train: Any) -> Counter[str]:
    """Milliseconds in a step, by kernel."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        for _ in range(STEPS):
            train()
        torch.cuda.synchronize()
    return Counter(
        {
            event.key: event.self_device_time_total / 1e3 / STEPS
            for event in prof.key_averages()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        }
    )


# -- memory ----------------------------------------------------------------------------------------


class Block(NamedTuple):
    size: int
    made_by: str


def blocks_at_the_peak(train: Any) -> list[Block]:
    """What a step has allocated when it has allocated most; without what lives longer."""
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python")
    train()
    torch.cuda.synchronize()
    (trace, *_) = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(enabled=None)
    moment = _peak(trace)
    alive: dict[int, Any] = {}
    for event in trace[: moment + 1]:
        if event["action"] == "alloc":
            alive[event["addr"]] = event
        elif event["action"] == "free_completed":
            alive.pop(event["addr"], None)
    return [Block(event["size"], _made_by(event["frames"])) for event in alive.values()]


def _peak(trace: list[Any]) -> int:
    now, highest, moment = 0, 0, 0
    for i, event in enumerate(trace):
        sign = {"alloc": 1, "free_completed": -1}.get(event["action"], 0)
        now += sign * event["size"]
        if now > highest:
            highest, moment = now, i
    return moment


def _made_by(frames: list[Any]) -> str:
    """The innermost line of Python, of compiled code the whole line."""
    if not frames:
        return "?"
    frame = frames[0]
    code = linecache.getline(frame["filename"], frame["line"]).strip().split("#")[0].strip()
    return f"{frame['filename'].rsplit('/', 1)[-1]}:{frame['line']} {code}"


def summed(blocks: list[Block]) -> list[Row]:
    sizes: Counter[str] = Counter()
    for block in blocks:
        sizes[block.made_by] += block.size
    return [{"tensor": what, "gib": size / GIB} for what, size in sizes.most_common()]


# -- arms ------------------------------------------------------------------------------------------


def gemm_floor(args: argparse.Namespace, tokens: torch.Tensor) -> float:
    """Milliseconds of the matrix products of a step without checkpoints: 6 operations a weight and
    token, the valid tokens only for the head; attention left out."""
    with torch.device("meta"):
        model = MODELS[args.model]()
    head = model.tok_embeddings.weight.numel()  # tied
    layers = sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
    return 6 * tokens.numel() * (layers + head * (1 - args.ignored[0])) / args.tflops / 1e9


def measure(args: argparse.Namespace) -> Iterator[Row]:
    if args.device.type != "cuda":
        raise Unavailable("kernels are profiled on a GPU")
    step, tokens = prepare(args)
    train = partial(step, tokens, labels_of(tokens, args.ignored[0], args))
    lap_times(train, args.device, args.warmup)
    (ms,) = lap_times(train, args.device, 1)
    kernels = kernel_times(train)
    groups: Counter[str] = Counter()
    for name, time in kernels.items():
        groups[group_of(name)] += time
    yield {
        "arm": args.arm,
        "ms": ms,
        "floor_ms": gemm_floor(args, tokens),
        "idle": max(0.0, ms - sum(kernels.values())),
        "kernels": kernels.most_common(40),
        "peak": summed(blocks_at_the_peak(train))[:20],
    } | groups


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=["torchtune", "liger_fx_recipe"])
    parser.add_argument("--tflops", type=float, default=790, help="the device's matrix products")
    parser.add_argument("--most", type=int, default=12, help="kernels and tensors to print")
    return parser.parse_args()


COLUMNS = [
    Column("arm", "arm"),
    Column("ms", "ms", ".1f"),
    Column("GEMM floor", "floor_ms", ".1f"),
    *(Column(group, group, ".1f") for group in GROUPS),
    Column("other", "other", ".1f"),
    Column("idle", "idle", ".1f"),
]
KERNELS = [Column("ms", "ms", ".2f"), Column("group", "group"), Column("kernel", "kernel")]
TENSORS = [Column("GiB", "gib", ".2f"), Column("made by", "tensor")]


def panels(rows: list[Row]) -> list[Panel]:
    groups = [*GROUPS, "other", "idle"]
    series = {row["arm"]: [row.get(group) for group in groups] for row in rows}
    return [Panel("milliseconds of a step", groups, series)]


def print_details(row: Row, most: int) -> None:
    print(f"{row['arm']}: kernels of a step, and what is alive at the peak of memory\n")
    kernels = [
        {"ms": ms, "group": group_of(name), "kernel": name[:100]}
        for name, ms in row["kernels"][:most]
    ]
    print(markdown(kernels, KERNELS))
    print(markdown(row["peak"][:most], TENSORS))


def main() -> None:
    args = parse_args()
    if args.arm:
        return run_arm(partial(measure, args))
    header = print_header(args.device)
    rows: list[Row] = []
    for arm in args.arms:
        rows += [{"arm": arm} | row for row in in_fresh_process("--arm", arm)]
        write_json(args.json, rows, header)
        progress(f"{arm}: {rows[-1].get('error', 'done')}")
    print(markdown(rows, COLUMNS))
    draw(args.picture, f"A training step, {args.model}", panels(rows), header)
    for row in rows:
        if "error" not in row:
            print_details(row, args.most)


if __name__ == "__main__":
    main()
