"""What matching costs, next to the cold compile that it is part of. Runs on a CPU.

    python benchmarks/matching_time.py
    python benchmarks/matching_time.py --layers 16 32 80 --inner aot_eager

The whole loss step of a Llama of many tiny layers is one graph: matching sees the nodes of a large
model, and no time is lost on computing it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from _common import (
    Column,
    Panel,
    Row,
    add_outputs,
    draw,
    in_fresh_process,
    markdown,
    print_header,
    progress,
    run_arm,
    seconds,
    write_json,
)
from _llama import llama
from torch import nn
from training_step import recipe_loss

COLUMNS = [
    Column("layers", "layers", "d"),
    Column("nodes", "nodes", "d"),
    Column("matching s", "matching_s", ".3f"),
    Column("µs a node", "us_per_node", ".1f"),
    Column("cold compile s", "compile_s", ".1f"),
    Column("share", "share", ".2%"),
    Column("rewrites", "rewrites"),
]


def measure(layers: int, inner: str) -> Iterator[Row]:
    from liger_fx import reports

    model = llama("tiny", num_layers=layers)
    tokens = torch.randint(model.tok_embeddings.num_embeddings, (2, 16))
    step = recipe_loss(model, nn.CrossEntropyLoss(), len(tokens))
    step = torch.compile(step, backend="liger_fx", fullgraph=True, options={"inner": inner})
    compile_s = seconds(lambda: step(tokens, tokens).backward(), tokens.device)
    report = reports()[-1]
    yield {
        "layers": layers,
        "nodes": report.nodes,
        "matching_s": report.seconds,
        "us_per_node": report.seconds / report.nodes * 1e6,
        "compile_s": compile_s,
        "share": report.seconds / compile_s,
        "rewrites": report.summary(),
    }


def panels(rows: list[Row]) -> list[Panel]:
    groups = [row["arm"] for row in rows]
    parts = {"cold compile": "compile_s", "liger_fx: matching": "matching_s"}
    series = {name: [row.get(key) for row in rows] for name, key in parts.items()}
    return [Panel("seconds", groups, series, ",.2f")]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 32, 80])
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), default="inductor")
    add_outputs(parser)
    parser.add_argument("--arm", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.arm:
        return run_arm(partial(measure, args.arm, args.inner))
    header = print_header(torch.device("cpu"))
    rows: list[Row] = []
    for layers in args.layers:
        rows += [{"arm": f"{layers} layers"} | r for r in in_fresh_process("--arm", str(layers))]
        write_json(args.json, rows, header)
        progress(f"{layers} layers: {rows[-1].get('error', 'done')}")
    print(markdown(rows, COLUMNS))
    draw(args.picture, "What matching takes of a cold compile", panels(rows), header)


if __name__ == "__main__":
    main()
