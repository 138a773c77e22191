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

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import _steps as steps
from _harness import Args, Benchmark, Child, compared, options, several, with_caches
from _measure import seconds
from _output import Panel, Row, columns, progress
from torch._dynamo.utils import counters
from training_step import UNBUDGETED, prepare

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


def measure(args: Args) -> Iterator[Row]:
    train, tokens = prepare(args, num_layers=args.layers)
    call = partial(train, tokens, tokens)
    first, second = (seconds(call, args.device) for _ in range(2))
    counts = {name: counters[group][key] for name, (group, key) in COUNTED.items()}
    yield {"seconds": first - second, "rewrites": steps.rewrites()} | counts


def cold_and_warm(case: Row) -> list[Row]:
    row = case
    with tempfile.TemporaryDirectory() as caches:
        for state in ("cold", "warm"):
            *_, measured = Child(case, with_caches(caches)).rows
            progress(f"{case}, {state}: {measured.get('error', 'done')}")
            if "error" in measured:
                return [case | {"error": f"{state}: {measured['error']}"}]
            row = row | {f"{state}_s": measured.pop("seconds")} | measured
    return [row]


def run(args: Args) -> Iterator[list[Row]]:
    cases = [{"arm": arm, "layers": depth} for depth, arm in product(args.layers, args.arms)]
    with ThreadPoolExecutor(args.jobs) as pool:
        yield from pool.map(cold_and_warm, cases)


OPTIONS = options(
    __doc__,
    arms=several(UNBUDGETED, ["torchtune", "inductor_step", "liger_fx_step", "liger_fx_recipe"]),
    layers=[16, 32, 80],
    model={"choices": steps.LLAMAS, "default": "llama3_2_1b", "help": "whose widths"},
    jobs=1,
    batch=2,
    seq=128,
    checkpoint=True,
)
OPTIONS.set_defaults(lr=1e-4, padded=0.0)

BENCHMARK = Benchmark(
    OPTIONS,
    run,
    measure=measure,
    columns=columns(
        "layers {layers:d} | arm {arm} | cold s {cold_s:.1f} | of torchtune's {cold_ratio:.2f} |"
        " warm s {warm_s:.1f} | of torchtune's {warm_ratio:.2f} | graphs {graphs:d} |"
        " FX hits {fx_hits:d} | misses {fx_misses:d} | bypasses {fx_bypasses:d} |"
        " AOTAutograd hits {aot_hits:d} | misses {aot_misses:d} | bypasses {aot_bypasses:d} |"
        " rewrites {rewrites}"
    ),
    finish=lambda rows, args: compared(
        rows, "torchtune", ["layers"], cold_ratio="cold_s", warm_ratio="warm_s"
    ),
    title="Compiling a training step",
    panels=[
        Panel("seconds", "cold_s", "{layers} layers", title="empty caches"),
        Panel("seconds", "warm_s", "{layers} layers", title="caches of the first run"),
    ],
)

if __name__ == "__main__":
    BENCHMARK.main()
