"""Where the time and the memory of a training step go, kernel by kernel, tensor by tensor.

    python benchmarks/profile_step.py
    python benchmarks/profile_step.py --arms torchtune liger_fx_recipe --ignored 0.5

The arms are those of training_step.py. The first table sorts the kernels of a step into groups and
compares the matrix products with the fewest that the arm could do, at ``--tflops``; ``idle`` is the
time in which no kernel runs. Then come each arm's largest kernels, and the tensors that are alive
when its memory is highest, with the line of (compiled) code that made them.
"""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import _steps as steps
import torch
from _harness import Args, Benchmark, fresh, options, several
from _measure import GIB, lap_times, needs_cuda
from _output import Column, Panel, Row, columns, markdown
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training_step import ARMS, STEP, prepare

STEPS = 2  # that are profiled

# A group takes the kernels whose name holds one of its words; the first that fits wins.
GROUPS: dict[str, tuple[str, ...]] = {
    "loss": ("liger_cross_entropy", "token_loss", "divergence", "nll_loss", "softmax"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "GEMM": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas"),
    "optimizer": ("multi_tensor", "adam"),
    "Inductor": ("triton_",),
    # Liger's, and our own
    "liger_fx": ("_swiglu", "_geglu", "_rms_norm", "_layer_norm", "_rotate", "gated_gradients"),
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


def memory_at_the_peak(train: Any) -> list[Row]:
    """What a step has allocated when it has allocated most, by the line that made it; without what
    lives longer."""
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python")
    train()
    torch.cuda.synchronize()
    (trace, *_) = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(enabled=None)
    signs = {"alloc": 1, "free_completed": -1}
    held = list(accumulate(signs.get(e["action"], 0) * e["size"] for e in trace))
    alive: dict[int, Any] = {}
    for event in trace[: held.index(max(held)) + 1]:
        if event["action"] == "alloc":
            alive[event["addr"]] = event
        elif event["action"] == "free_completed":
            alive.pop(event["addr"], None)
    sizes: Counter[str] = Counter()
    for event in alive.values():
        sizes[_made_by(event["frames"])] += event["size"]
    return [{"tensor": what, "gib": size / GIB} for what, size in sizes.most_common()]


def _made_by(frames: list[Any]) -> str:
    """The innermost line of Python, of compiled code the whole line."""
    if not frames:
        return "?"
    frame = frames[0]
    code = linecache.getline(frame["filename"], frame["line"]).strip().split("#")[0].strip()
    return f"{frame['filename'].rsplit('/', 1)[-1]}:{frame['line']} {code}"


def gemm_floor(args: Args, tokens: torch.Tensor) -> float:
    """Milliseconds of the matrix products of a step without checkpoints: 6 operations a weight and
    token, the valid tokens only for the head; attention left out."""
    with torch.device("meta"):
        model = steps.llama(args.model)
    head = model.tok_embeddings.weight.numel()  # tied
    layers = sum(p.numel() for p in model.layers.parameters() if p.dim() > 1)
    return 6 * tokens.numel() * (layers + head * (1 - args.ignored[0])) / args.tflops / 1e9


def measure(args: Args) -> Iterator[Row]:
    needs_cuda(args.device, "profiling kernels")
    step, tokens = prepare(args)
    train = partial(step, tokens, steps.labels_of(tokens, args.ignored[0], args))
    lap_times(train, args.device, args.warmup)
    (ms,) = lap_times(train, args.device, 1)
    kernels = kernel_times(train)
    groups: Counter[str] = Counter()
    for name, time in kernels.items():
        groups[group_of(name)] += time
    yield {
        "ms": ms,
        "floor_ms": gemm_floor(args, tokens),
        "idle": max(0.0, ms - sum(kernels.values())),
        "kernels": kernels.most_common(40),
        "peak": memory_at_the_peak(train)[:20],
    } | groups


PARTS = [*GROUPS, "other", "idle"]
COLUMNS = columns("arm {arm} | ms {ms:.1f} | GEMM floor {floor_ms:.1f}")
COLUMNS += [Column(part, part, ".1f") for part in PARTS]


def text(rows: list[Row], args: Args) -> str:
    tables = [markdown(rows, COLUMNS)]
    for row in rows:
        if "error" not in row:
            most = row["kernels"][: args.most]
            kernels = [{"ms": t, "group": group_of(k), "kernel": k[:100]} for k, t in most]
            tables += [
                f"{row['arm']}: kernels of a step, and what is alive at the peak of memory\n",
                markdown(kernels, columns("ms {ms:.2f} | group {group} | kernel {kernel}")),
                markdown(row["peak"][: args.most], columns("GiB {gib:.2f} | made by {tensor}")),
            ]
    return "\n".join(tables)


BENCHMARK = Benchmark(
    options(
        __doc__,
        arms=several(ARMS, ["torchtune", "liger_fx_recipe"]),
        tflops=790.0,
        most={"type": int, "default": 12, "help": "kernels and tensors to print"},
        **STEP,
    ),
    run=lambda args: (fresh({"arm": arm}) for arm in args.arms),
    measure=measure,
    columns=COLUMNS,
    text=text,
    title="A training step, {model}",
    panels=[Panel("milliseconds of a step", {part: part for part in PARTS}, "{key}")],
)

if __name__ == "__main__":
    BENCHMARK.main()
