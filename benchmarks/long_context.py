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

import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from _harness import Args, Benchmark, compared, fresh, options, several
from _measure import GIB, lap_times, needs_cuda, run_laps
from _output import Panel, Row, columns, progress
from _steps import LLAMAS
from training_step import UNBUDGETED, prepare

SAFE = 0.97  # of the prediction: the allocator cannot use every byte
MULTIPLE = 256  # tokens
STRAIGHT = 0.005  # of the highest peak: how far the others may lie off the line


def card_gib(args: Args) -> float:
    needs_cuda(args.device, "the card's memory")
    return torch.cuda.get_device_properties(args.device).total_memory / GIB


def measure(args: Args) -> Iterator[Row]:
    """The peak of a step that has compiled, and has the optimizer's state to keep."""
    needs_cuda(args.device, "counting memory")
    if args.confirming and args.gib:
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gib / card_gib(args)))
    train, tokens = prepare(args, max_seq_len=args.seq)
    step = partial(train, tokens, tokens)
    lap_times(step, args.device, 1)
    laps = run_laps(step, args.device, 1)
    yield {"ms": laps.ms, "peak_gib": laps.peak_gib}


def run_length(arm: str, seq: int, confirming: bool = False) -> Row:
    row = fresh({"arm": arm, "seq": seq, "confirming": confirming})[-1]
    progress(f"{arm}, {seq:,} tokens: {row.get('error') or row['peak_gib']}")
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


def longest(arm: str, points: list[Row], args: Args, memory: float) -> Row:
    row: Row = {"arm": arm, "memory_gib": memory}
    if errors := [point["error"] for point in points if "error" in point]:
        return row | {"error": errors[0]}
    line = fit(points, memory)
    if line["off_by_gib"] > STRAIGHT * max(point["peak_gib"] for point in points):
        why = f"failed: off a line by {line['off_by_gib']:.2f} GiB, take longer lengths"
        return row | {"points": points, "off_by_gib": line["off_by_gib"], "error": why}
    return row | line | (confirm(arm, line["predicted"]) if args.confirm else {})


def confirm(arm: str, predicted: int) -> Row:
    seq = int(SAFE * predicted) // MULTIPLE * MULTIPLE
    ran = run_length(arm, seq, confirming=True)
    return {"ran": seq, "peak_gib": ran.get("peak_gib"), "confirmed": ran.get("error", "yes")}


def run(args: Args) -> Iterator[list[Row]]:
    memory = args.gib or card_gib(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        points = {arm: [pool.submit(run_length, arm, n) for n in args.lengths] for arm in args.arms}
        for arm, running in points.items():
            yield [longest(arm, [point.result() for point in running], args, memory)]


OPTIONS = options(
    __doc__,
    arms=several(UNBUDGETED, ["torchtune", "liger_by_hand", "liger_fx_recipe"]),
    lengths=[32768, 65536, 98304],
    gib={"type": float, "help": "memory to fill; the card's if left out"},
    confirm={"action": "store_true", "help": "run 0.97 of the predicted length"},
    jobs={"type": int, "default": 1, "help": "lengths that run at a time"},
    model={"choices": LLAMAS, "default": "llama3_2_1b"},
)
OPTIONS.set_defaults(batch=1, checkpoint=True, lr=1e-4, padded=0.0)

BENCHMARK = Benchmark(
    OPTIONS,
    run,
    measure=measure,
    columns=columns(
        "arm {arm} | GiB per 1k tokens {gib_per_1k:.4f} | of torchtune's {slope_ratio:.3f} |"
        " GiB at 0 tokens {intercept_gib:.2f} | off by GiB {off_by_gib:.2f} |"
        " fits, tokens {predicted:,d} | of torchtune's {length_ratio:.2f} | ran, tokens {ran:,d} |"
        " peak GiB {peak_gib:.2f} | confirmed {confirmed}"
    ),
    finish=lambda rows, args: compared(
        rows, "torchtune", [], slope_ratio="gib_per_1k", length_ratio="predicted"
    ),
    title="{model}, one sequence",
    panels=[
        Panel("tokens that fit", "predicted", "{memory_gib:.0f} GiB", ",.0f"),
        Panel("GiB per thousand tokens", "gib_per_1k", "", ".3f"),
    ],
)

if __name__ == "__main__":
    BENCHMARK.main()
