"""A whole training step of a Hugging Face decoder: forward, loss, backward, fused AdamW.

    python benchmarks/huggingface_step.py --models llama3_2_1b --ignored 0 0.5
    python benchmarks/huggingface_step.py --models qwen3_0_6b --no-checkpoint --jobs 2
    python benchmarks/huggingface_step.py --models llama3_2_1b --padded 0.4
    python benchmarks/huggingface_step.py --models llama3_2_1b --packed 512

Models are built from their configurations, in bf16, with random weights and tokens. The first part
of a sequence is the prompt, whose labels are ignored. With ``--padded`` the model is given an
attention mask, as by Trainer's collators, and padding on the right; with ``--packed`` the positions
of documents in one row, as by ``DataCollatorWithFlattening``. The arms:

    eager           the model as it is
    liger           Liger's own patch of the model, eager
    liger_compiled  the same under ``model.compile()``: here to show its losses
    inductor        ``model.compile()``
    inductor_loss   a function of tokens and labels that returns the loss alone, compiled
    liger_fx        ``model.compile(backend="liger_fx")``
    liger_fx_loss   the function of ``inductor_loss``, with the backend liger_fx

Every arm is a process of its own, with empty caches. All arms of a model compile first, ``--jobs``
at a time; when the last has, they are timed one by one, and each begins with the same weights at
each share of ignored labels. ``losses`` are those of the first steps: where they differ from
eager's, an arm computes something else. An arm that has compiled still holds its weights on the
GPU. One that meets a full GPU while others compile too goes on with compiling when its turn comes,
and its compile time is not known.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from _common import (
    IGNORE,
    Child,
    Column,
    Panel,
    Row,
    add_outputs,
    caches_in,
    draw,
    labels_like,
    markdown,
    needs_cuda,
    padding,
    print_header,
    progress,
    run_arm,
    seconds,
    write_json,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from training_step import LossStep, compared, rewrites, time_and_memory, training_step
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

# What the models' config.json say. Trainer turns the cache off.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama3_2_1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=True,
        use_cache=False,
    ),
    "qwen3_0_6b": Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        use_cache=False,
    ),
    "gemma3_1b": Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,  # every sixth of them with full attention
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        max_position_embeddings=32_768,
        sliding_window=512,
        rms_norm_eps=1e-6,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        tie_word_embeddings=True,
        use_cache=False,
    ),
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    ),
}


# -- arms ------------------------------------------------------------------------------------------


def eager(model: nn.Module, args: argparse.Namespace) -> LossStep:
    given = collated(args)
    return lambda tokens, labels: model(input_ids=tokens, labels=labels, **given).loss


def collated(args: argparse.Namespace) -> dict[str, Tensor]:
    """What a collator gives beside tokens and labels: [batch, seq], int64."""
    tokens = torch.empty(args.batch, args.seq, dtype=torch.int64)
    if args.padded is not None:
        return {"attention_mask": (~padding(tokens, args.padded)).long().to(args.device)}
    if args.packed is None:
        return {}
    lengths = torch.randint(args.packed // 4, args.packed * 7 // 4, (tokens.numel(),))
    documents = [torch.arange(length) for length in lengths.tolist()]
    return {"position_ids": torch.cat(documents)[: args.seq].expand_as(tokens).to(args.device)}


def compiled_model(backend: str, model: nn.Module, args: argparse.Namespace) -> LossStep:
    model.compile(backend=backend)
    return eager(model, args)


def compiled_loss(backend: str, model: nn.Module, args: argparse.Namespace) -> LossStep:
    return torch.compile(eager(model, args), backend=backend)


def liger(model: nn.Module, args: argparse.Namespace) -> LossStep:
    needs_cuda(args.device, "Liger's patch")
    from liger_kernel.transformers import monkey_patch

    monkey_patch._apply_liger_kernel_to_instance(model)
    return eager(model, args)


def liger_compiled(model: nn.Module, args: argparse.Namespace) -> LossStep:
    liger(model, args)
    return compiled_model("inductor", model, args)


ARMS: dict[str, Callable[[nn.Module, argparse.Namespace], LossStep]] = {
    "eager": eager,
    "liger": liger,
    "liger_compiled": liger_compiled,
    "inductor": partial(compiled_model, "inductor"),
    "inductor_loss": partial(compiled_loss, "inductor"),
    "liger_fx": partial(compiled_model, "liger_fx"),
    "liger_fx_loss": partial(compiled_loss, "liger_fx"),
}
UNCOMPILED = ("eager", "liger")


# -- the process of an arm -------------------------------------------------------------------------


def build_model(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    with args.device:
        model = AutoModelForCausalLM.from_config(CONFIGS[args.model], dtype=torch.bfloat16)
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def compile_step(
    model: nn.Module, call: Callable[[], Tensor], device: torch.device
) -> float | None:
    """Seconds of a first forward and backward; None where the memory was not enough."""
    try:
        return seconds(lambda: call().backward(), device)
    except torch.OutOfMemoryError:
        return None
    finally:
        model.zero_grad(set_to_none=True)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """A first row when all is compiled; after a line from the parent a row for each share."""
    model = build_model(args)
    step = ARMS[args.arm](model, args)
    initial = [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]
    tokens = torch.randint(CONFIGS[args.model].vocab_size, (args.batch, args.seq)).to(args.device)
    first = None
    if args.arm not in UNCOMPILED:
        labels = labels_like(tokens, args.ignored[0], args.seq)
        first = compile_step(model, partial(step, tokens, labels), args.device)
    if args.device.type == "cuda":
        torch.cuda.empty_cache()  # for those that compile now
    yield {"compiled": True}
    sys.stdin.readline()
    for ignored in args.ignored:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), initial, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
        labels = labels_like(tokens, ignored, args.seq)
        if args.padded:
            labels = labels.masked_fill(padding(tokens, args.padded), IGNORE)
        train = partial(training_step(step, optimizer), tokens, labels)
        losses = [train().item() for _ in range(args.warmup)]
        row = time_and_memory(train, tokens.numel(), args)
        yield {
            "model": args.model,
            "checkpoint": args.checkpoint,
            "ignored": ignored,
            "padded": args.padded,
            "packed": args.packed,
            **row,
            "compile_s": first and first - row["ms"] / 1e3,
            "graphs": counters["stats"]["unique_graphs"],
            "losses": losses,
            "rewrites": rewrites(),
        }
        first = None  # later shares compile nothing


# -- all arms --------------------------------------------------------------------------------------

COLUMNS = [
    Column("model", "model"),
    Column("ignored", "ignored", ".0%"),
    Column("arm", "arm"),
    Column("ms", "ms", ".1f"),
    Column("tokens/s", "tokens_per_s", ",.0f"),
    Column("speed of baseline's", "speed", ".3f"),
    Column("peak GiB", "peak_gib", ".2f"),
    Column("memory of baseline's", "memory", ".3f"),
    Column("cold compile s", "compile_s", ".1f"),
    Column("graphs", "graphs", "d"),
    Column("losses", "shown_losses"),
    Column("rewrites", "rewrites"),
]


def arms_of(model: str, args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of each arm, as it is timed."""
    children = {arm: Child(arm, "--model", model, "--arm", arm) for arm in args.arms}
    with tempfile.TemporaryDirectory() as caches:

        def compile_arm(arm: str) -> None:
            children[arm].compile(os.environ | caches_in(Path(caches, arm)), args.jobs)

        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(compile_arm, args.arms))
        for child in children.values():
            yield [{"model": model} | row for row in child.time()]


def shown(row: Row) -> Row:
    """``row``, as the table shows it."""
    if "error" in row:
        return row | {"error": f"{row['model']}: {row['error']}"}
    return row | {"shown_losses": ", ".join(f"{loss:.4f}" for loss in row["losses"])}


def brief(row: Row) -> str:
    cells = [row["model"], row["arm"]]
    if "error" in row:
        return ", ".join([*cells, row["error"]])
    cells += [f"{row['ignored']:.0%} ignored", f"{row['ms']:.1f} ms"]
    if row["peak_gib"] is not None:
        cells.append(f"{row['peak_gib']:.2f} GiB")
    return f"{', '.join(cells)}, losses {shown(row)['shown_losses']}"


def panels(rows: list[Row], args: argparse.Namespace) -> list[Panel]:
    found = {(row["model"], row["arm"], row.get("ignored")): row for row in rows}
    groups = [(model, share) for model in args.models for share in args.ignored]
    return [
        Panel(
            axis,
            [f"{model}, {share:.0%} ignored" for model, share in groups],
            {
                arm: [found.get((model, arm, share), {}).get(key) for model, share in groups]
                for arm in args.arms
            },
            numbers,
        )
        for axis, key, numbers in (
            ("ms a step", "ms", ",.1f"),
            ("GiB allocated at most", "peak_gib", ".2f"),
        )
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    real = [name for name in CONFIGS if name != "tiny"]
    parser.add_argument("--models", choices=CONFIGS, nargs="+", default=real)
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--baseline", choices=ARMS, default="eager", help="what speeds are of")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ignored", type=float, nargs="+", default=[0.0], help="shares of labels")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--padded", type=float, help="share of the tokens that are padding")
    data.add_argument("--packed", type=int, help="tokens of a document, in the mean")
    parser.add_argument("--jobs", type=int, default=3, help="arms that compile at a time")
    parser.add_argument("--warmup", type=int, default=3, help="steps, those with a loss")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    add_outputs(parser)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=CONFIGS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.arm:
        return run_arm(partial(measure, args))
    header = print_header(args.device, "transformers")
    rows: list[Row] = []
    for model in args.models:
        of_model: list[Row] = []
        for measured in arms_of(model, args):
            of_model += measured
            write_json(
                args.json, rows + of_model, header
            )  # a run that is cut off keeps what it has
            progress("\n".join(brief(row) for row in measured))
        rows += compared(of_model, args.baseline)
    print(markdown([shown(row) for row in rows], COLUMNS))
    write_json(args.json, rows, header)
    checkpointing = "checkpointed" if args.checkpoint else "no checkpointing"
    title = f"A training step of Hugging Face models, {args.batch} x {args.seq}, {checkpointing}"
    draw(args.picture, title, panels(rows, args), header)


if __name__ == "__main__":
    main()
