"""What compiling costs: the first step with empty caches, and with those of an earlier process.

    python benchmarks/compile_time.py
    python benchmarks/compile_time.py --layers 16 32 80 --json compile.json --picture compile.png

The arms are those of training_step.py, the layers as wide as those of Llama-3.2-1B, the tokens so
few that running them costs nothing. Seconds are those of the first step less those of the second.
Hits and misses are those of the second process, in Inductor's cache of FX graphs and AOTAutograd's:
they say whether it compiled at all. ``graphs`` is how many of them Dynamo traced. With ``--jobs``
several are compiled at a time, each with Inductor's own processes, and all take longer.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch
from _common import (
    Column,
    Panel,
    Row,
    add_outputs,
    draw,
    in_process,
    markdown,
    print_header,
    progress,
    run_arm,
    seconds,
    write_json,
)
from _llama import SIZES, llama
from torch._dynamo.utils import counters
from training_step import MODELS, UNBUDGETED, prepare, rewrites

BASE = "torchtune"  # what the others are compared with

# Names of PyTorch's counters, by those of ours.
COUNTED = {
    "graphs": ("stats", "unique_graphs"),
    "fx_hits": ("inductor", "fxgraph_cache_hit"),
    "fx_misses": ("inductor", "fxgraph_cache_miss"),
    "fx_bypasses": ("inductor", "fxgraph_cache_bypass"),
    "aot_hits": ("aot_autograd", "autograd_cache_hit"),
    "aot_misses": ("aot_autograd", "autograd_cache_miss"),
    "aot_bypasses": ("aot_autograd", "autograd_cache_bypass"),
}

COLUMNS = [
    Column("layers", "layers", "d"),
    Column("arm", "arm"),
    Column("cold s", "cold_s", ".1f"),
    Column("of torchtune's", "cold_ratio", ".2f"),
    Column("warm s", "warm_s", ".1f"),
    Column("of torchtune's", "warm_ratio", ".2f"),
    Column("graphs", "graphs", "d"),
    Column("FX hits", "fx_hits", "d"),
    Column("misses", "fx_misses", "d"),
    Column("bypasses", "fx_bypasses", "d"),
    Column("AOTAutograd hits", "aot_hits", "d"),
    Column("misses", "aot_misses", "d"),
    Column("bypasses", "aot_bypasses", "d"),
    Column("rewrites", "rewrites"),
]


def measure(args: argparse.Namespace) -> Iterator[Row]:
    MODELS[args.model] = partial(llama, args.model, num_layers=args.depth)  # what `prepare` builds
    train, tokens = prepare(args)
    call = partial(train, tokens, tokens)
    first, second = (seconds(call, args.device) for _ in range(2))
    counts = {name: counters[group][key] for name, (group, key) in COUNTED.items()}
    yield {"seconds": first - second, "rewrites": rewrites()} | counts


def cold_and_warm(arm: str, depth: int) -> Row:
    row: Row = {"arm": arm, "layers": depth}
    with tempfile.TemporaryDirectory() as caches:
        for state in ("cold", "warm"):
            measured = in_process(Path(caches), "--arm", arm, "--depth", str(depth))[-1]
            progress(f"{arm}, {depth} layers, {state}: {measured.get('error', 'done')}")
            if "error" in measured:
                return row | {"error": f"{depth} layers, {state}: {measured['error']}"}
            row |= {f"{state}_s": measured.pop("seconds")} | measured
    return row


def compared(rows: list[Row]) -> list[Row]:
    """Each row's seconds over those of the torchtune arm at the same depth."""
    base = {row["layers"]: row for row in rows if row["arm"] == BASE and "error" not in row}
    for row in rows:
        if row["layers"] in base and "error" not in row:
            for state in ("cold", "warm"):
                row[f"{state}_ratio"] = row[f"{state}_s"] / base[row["layers"]][f"{state}_s"]
    return rows


def panels(rows: list[Row], arms: list[str]) -> list[Panel]:
    found = {(row["layers"], row["arm"]): row for row in rows}
    depths = sorted({row["layers"] for row in rows})
    return [
        Panel(
            "seconds",
            [f"{depth} layers" for depth in depths],
            {arm: [found[depth, arm].get(key) for depth in depths] for arm in arms},
            title=title,
        )
        for key, title in {"cold_s": "empty caches", "warm_s": "caches of the first run"}.items()
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arms = ["torchtune", "inductor_step", "liger_fx_step", "liger_fx_recipe"]
    parser.add_argument("--arms", choices=UNBUDGETED, nargs="+", default=arms)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32, 80])
    parser.add_argument("--model", choices=SIZES, default="llama3_2_1b", help="whose widths")
    parser.add_argument("--jobs", type=int, default=1, help="arms that compile at a time")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    add_outputs(parser)
    parser.add_argument("--arm", choices=UNBUDGETED, help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(lr=1e-4, padded=0.0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.arm:
        return run_arm(partial(measure, args))
    header = print_header(args.device)
    rows: list[Row] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        cases = [(arm, depth) for depth in args.layers for arm in args.arms]
        for done in as_completed(pool.submit(cold_and_warm, *case) for case in cases):
            rows.append(done.result())
            rows.sort(key=lambda row: cases.index((row["arm"], row["layers"])))
            write_json(args.json, rows, header)  # a run that is cut off keeps what it has
    print(markdown(compared(rows), COLUMNS))
    write_json(args.json, rows, header)
    draw(args.picture, "Compiling a training step", panels(rows, args.arms), header)


if __name__ == "__main__":
    main()
