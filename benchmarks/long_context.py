"""The longest sequence that fits: Llama-3.2-1B, one sequence, activation checkpointing.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --gib 40 --lengths 65536 98304 131072 --confirm

The arms are those of training_step.py. Peak memory is measured at a few lengths, each in a process
of its own, the second step of two; a straight line through them says which length fills the memory,
and ``off by`` how far the worst of them lies from it. The lengths must be so long that a layer's
backward sets the peak, not the optimizer; what else runs meanwhile (``--jobs``) does not matter to
a peak. ``--confirm`` then runs 0.97 of that length: the time of attention grows with its square, so
to fill a whole H200 takes many minutes, and ``--gib`` stands in for a smaller card: the confirming
run gets no more than that.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from _common import (
    GIB,
    Column,
    Panel,
    Row,
    add_outputs,
    draw,
    in_fresh_process,
    lap_times,
    markdown,
    needs_cuda,
    peak_bytes,
    print_header,
    progress,
    reset_peak,
    run_arm,
    write_json,
)
from _llama import SIZES, llama
from training_step import MODELS, UNBUDGETED, prepare

BASE = "torchtune"  # what the others are compared with
SAFE = 0.97  # of the prediction: the allocator cannot use every byte
MULTIPLE = 256  # tokens
STRAIGHT = 0.005  # of the highest peak: how far the others may lie off the line

COLUMNS = [
    Column("arm", "arm"),
    Column("GiB per 1k tokens", "gib_per_1k", ".4f"),
    Column("of torchtune's", "slope_ratio", ".3f"),
    Column("GiB at 0 tokens", "intercept_gib", ".2f"),
    Column("off by GiB", "off_by_gib", ".2f"),
    Column("fits, tokens", "predicted", ",d"),
    Column("of torchtune's", "length_ratio", ".2f"),
    Column("ran, tokens", "ran", ",d"),
    Column("peak GiB", "peak_gib", ".2f"),
    Column("confirmed", "confirmed"),
]


def memory_gib(args: argparse.Namespace) -> float:
    """What a process may use, of the card's."""
    if args.gib:
        return args.gib
    needs_cuda(args.device, "the card's memory")
    return torch.cuda.get_device_properties(args.device).total_memory / GIB


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """The peak of a step that has compiled, and has the optimizer's state to keep."""
    needs_cuda(args.device, "counting memory")
    if args.confirming and args.gib:
        card = torch.cuda.get_device_properties(args.device).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gib / card))
    MODELS[args.model] = partial(llama, args.model, max_seq_len=args.seq)  # what `prepare` builds
    train, tokens = prepare(args)
    step = partial(train, tokens, tokens)
    lap_times(step, args.device, 1)
    reset_peak(args.device)
    (ms,) = lap_times(step, args.device, 1)
    yield {"seq": args.seq, "ms": ms, "peak_gib": peak_bytes(args.device) / GIB}


def run_length(arm: str, seq: int, *options: str) -> Row:
    row = in_fresh_process("--arm", arm, "--seq", str(seq), *options)[-1]
    progress(
        f"{arm}, {seq:,} tokens: {row.get('error') or format(row['peak_gib'], '.2f') + ' GiB'}"
    )
    return row


def fit(points: list[Row], memory: float) -> Row:
    """The line through the peaks, and where it meets ``memory``."""
    lengths = [point["seq"] for point in points]
    peaks = [point["peak_gib"] for point in points]
    slope, intercept = statistics.linear_regression(lengths, peaks)
    off_by = (abs(slope * n + intercept - gib) for n, gib in zip(lengths, peaks, strict=True))
    return {
        "points": points,
        "gib_per_1k": slope * 1000,
        "intercept_gib": intercept,
        "off_by_gib": max(off_by),
        "predicted": int((memory - intercept) / slope),
    }


def longest(arm: str, points: list[Row], args: argparse.Namespace, memory: float) -> Row:
    row: Row = {"arm": arm, "memory_gib": memory}
    if errors := [point["error"] for point in points if "error" in point]:
        return row | {"error": errors[0]}
    line = fit(points, memory)
    if line["off_by_gib"] > STRAIGHT * max(point["peak_gib"] for point in points):
        why = f"failed: off a line by {line['off_by_gib']:.2f} GiB, take longer lengths"
        return row | {"points": points, "off_by_gib": line["off_by_gib"], "error": why}
    row |= line
    return row | confirm(arm, row["predicted"]) if args.confirm else row


def confirm(arm: str, predicted: int) -> Row:
    seq = int(SAFE * predicted) // MULTIPLE * MULTIPLE
    ran = run_length(arm, seq, "--confirming")
    return {"ran": seq, "peak_gib": ran.get("peak_gib"), "confirmed": ran.get("error", "yes")}


def compared(rows: list[Row]) -> list[Row]:
    """Each row's slope and length over those of the torchtune arm."""
    base: Row = next((row for row in rows if row["arm"] == BASE and "error" not in row), {})
    for row in rows:
        if base and "error" not in row:
            row["slope_ratio"] = row["gib_per_1k"] / base["gib_per_1k"]
            row["length_ratio"] = row["predicted"] / base["predicted"]
    return rows


def panels(rows: list[Row]) -> list[Panel]:
    def series(key: str, scale: float = 1) -> dict[str, list[float | None]]:
        return {row["arm"]: [row[key] / scale if key in row else None] for row in rows}

    memory = rows[0]["memory_gib"]
    return [
        Panel(f"thousand tokens that fit {memory:.0f} GiB", [""], series("predicted", 1000)),
        Panel("GiB per thousand tokens", [""], series("gib_per_1k"), ".3f"),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arms = ["torchtune", "liger_by_hand", "liger_fx_recipe"]
    parser.add_argument("--arms", choices=UNBUDGETED, nargs="+", default=arms)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 98304])
    parser.add_argument("--gib", type=float, help="memory to fill; the card's if left out")
    parser.add_argument("--confirm", action="store_true", help="run 0.97 of the predicted length")
    parser.add_argument("--jobs", type=int, default=1, help="lengths that run at a time")
    parser.add_argument("--model", choices=SIZES, default="llama3_2_1b")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    add_outputs(parser)
    parser.add_argument("--arm", choices=UNBUDGETED, help=argparse.SUPPRESS)
    parser.add_argument("--seq", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--confirming", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(batch=1, checkpoint=True, lr=1e-4, padded=0.0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.arm:
        return run_arm(partial(measure, args))
    header = print_header(args.device)
    memory = memory_gib(args)
    rows: list[Row] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        points = {arm: [pool.submit(run_length, arm, n) for n in args.lengths] for arm in args.arms}
        for arm, running in points.items():
            rows.append(longest(arm, [point.result() for point in running], args, memory))
            write_json(args.json, compared(rows), header)  # a run that is cut off keeps what it has
    print(markdown(rows, COLUMNS))
    draw(args.picture, f"{args.model}, one sequence", panels(rows), header)


if __name__ == "__main__":
    main()
