"""What matching costs, next to the cold compile that it is part of. Runs on a CPU.

    python benchmarks/matching_time.py
    python benchmarks/matching_time.py --layers 16 32 80 --inner aot_eager

The whole loss step of a Llama of many tiny layers is one graph: matching sees the nodes of a large
model, and no time is lost on computing it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from _harness import Args, Benchmark, fresh, options
from _measure import seconds
from _output import Panel, Row, columns
from _steps import llama, recipe_loss
from torch import nn


def measure(args: Args) -> Iterator[Row]:
    from liger_fx import reports

    with args.device:
        model = llama("tiny", num_layers=args.layers)
        tokens = torch.randint(model.tok_embeddings.num_embeddings, (2, 16))
    step = recipe_loss(model, nn.CrossEntropyLoss(), len(tokens))
    how = {"inner": args.inner}
    step = torch.compile(step, backend="liger_fx", fullgraph=True, options=how)
    compile_s = seconds(lambda: step(tokens, tokens).backward(), tokens.device)
    report = reports()[-1]
    yield {
        "nodes": report.nodes,
        "matching_s": report.seconds,
        "us_per_node": report.seconds / report.nodes * 1e6,
        "compile_s": compile_s,
        "share": report.seconds / compile_s,
        "rewrites": report.summary(),
    }


BENCHMARK = Benchmark(
    options(
        __doc__,
        device="cpu",
        layers=[16, 32, 80],
        inner={"choices": ("inductor", "aot_eager", "eager"), "default": "inductor"},
    ),
    run=lambda args: (fresh({"arm": f"{n} layers", "layers": n}) for n in args.layers),
    measure=measure,
    columns=columns(
        "layers {layers:d} | nodes {nodes:d} | matching s {matching_s:.3f} |"
        " µs a node {us_per_node:.1f} | cold compile s {compile_s:.1f} | share {share:.2%} |"
        " rewrites {rewrites}"
    ),
    title="What matching takes of a cold compile",
    panels=[
        Panel(
            "seconds",
            {"cold compile": "compile_s", "liger_fx: matching": "matching_s"},
            "{layers} layers",
            ",.2f",
            series="{key}",
        )
    ],
)

if __name__ == "__main__":
    BENCHMARK.main()
