"""A whole training step of a torchtune decoder: forward, loss, backward, fused AdamW.

    python benchmarks/training_step.py --batch 128 --seq 512
    python benchmarks/training_step.py --batch 16 --seq 2048 --no-checkpoint
    python benchmarks/training_step.py --ignored 0 0.5 0.8
    python benchmarks/training_step.py --padded 0.4

Random weights and tokens, bf16. The first part of a sequence is the prompt, whose labels are
ignored. With ``--padded`` sequences differ in length, as in a batch that is not packed, and what
fills them up is ignored too; arms of liger_fx are told so, as by the recipes. Every arm trains the
same model on the same batches in a process of its own, so the losses must agree and neither memory
nor compiled code is shared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _common import (
    GIB,
    IGNORE,
    Column,
    Panel,
    Row,
    add_outputs,
    draw,
    in_fresh_process,
    labels_like,
    lap_times,
    markdown,
    needs_cuda,
    padding,
    peak_bytes,
    print_header,
    progress,
    reset_peak,
    run_arm,
    seconds,
    write_json,
)
from _llama import llama
from torch import Tensor, nn
from torchtune import training
from torchtune.models.llama3_2 import llama3_2_1b
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss

LossStep = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Any, Tensor], Tensor]


MODELS: dict[str, Callable[[], TransformerDecoder]] = {
    "llama3_2_1b": llama3_2_1b,
    "tiny": partial(llama, "tiny"),
}


def recipe_loss(model: TransformerDecoder, loss_fn: Loss, rows: int) -> LossStep:
    """``_loss_step`` of torchtune's recipes; the column of ignored labels outlives the step there
    as well."""
    device = next(model.parameters()).device
    ignored_column = torch.full((rows, 1), IGNORE, device=device)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(tokens)
        labels = torch.hstack((labels[..., 1:], ignored_column[: labels.shape[0]]))
        if not isinstance(logits, list):
            labels = labels.reshape(-1)
            logits = logits.reshape(-1, logits.size(-1))
        return loss_fn(logits, labels)

    return step


def checkpointed(model: TransformerDecoder) -> None:
    training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})


def stock_layers(model: TransformerDecoder, args: argparse.Namespace) -> None:
    """Layers as a stock recipe prepares them: compiled, then the checkpoint around."""
    training.compile_model(model, verbose=False)
    if args.checkpoint:
        checkpointed(model)


def chunked_loss(model: TransformerDecoder) -> CEWithChunkedOutputLoss:
    loss_fn = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    return loss_fn


def torchtune(model: TransformerDecoder, args: argparse.Namespace) -> LossStep:
    """The stock recipe with ``compile=True``."""
    stock_layers(model, args)
    loss_fn = training.compile_loss(chunked_loss(model), verbose=False)
    return recipe_loss(model, loss_fn, args.batch)


def liger_by_hand(model: TransformerDecoder, args: argparse.Namespace) -> LossStep:
    """Stock layers; the model returns hidden states and Liger's loss takes them."""
    needs_cuda(args.device, "Liger's fused loss")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    stock_layers(model, args)
    model.unembed = model.norm.forward
    weight = model.tok_embeddings.weight  # tied
    return recipe_loss(model, partial(LigerFusedLinearCrossEntropyLoss(), weight), args.batch)


def fused(args: argparse.Namespace) -> dict[str, Any]:
    """Options of an arm of liger_fx; one that did not fuse must fail."""
    return {"require": "linear_cross_entropy"} | padded_batches(args)


def padded_batches(args: argparse.Namespace) -> dict[str, Any]:
    """What torchtune's recipes tell liger_fx of batches that are not packed."""
    return {"tiled_mlp.skip_padding": True} if args.padded else {}


def whole_step(backend: str, model: TransformerDecoder, args: argparse.Namespace) -> LossStep:
    """Checkpoints, model, shift and ``nn.CrossEntropyLoss`` in one graph."""
    if args.checkpoint:
        checkpointed(model)
    step = recipe_loss(model, nn.CrossEntropyLoss(ignore_index=IGNORE), args.batch)
    options = fused(args) if backend == "liger_fx" else None
    return torch.compile(step, backend=backend, fullgraph=True, options=options)


def liger_fx_recipe(model: TransformerDecoder, args: argparse.Namespace) -> LossStep:
    """What ``liger_fx/recipes/*`` make of the stock recipe."""
    from liger_fx.torchtune import compile_layers, fuse_head

    if args.checkpoint:
        checkpointed(model)
    compile_layers(model, padded_batches(args))
    return recipe_loss(model, fuse_head(model, chunked_loss(model), fused(args)), args.batch)


def spend(
    model: TransformerDecoder, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> None:
    """As the recipes' ``liger_fx.memory_gib``."""
    needs_cuda(args.device, "a memory budget")
    from liger_fx.torchtune.activations import MemoryBudget, checkpoints_of

    layers, peak = checkpoints_of(model), torch.cuda.max_memory_allocated
    budget = MemoryBudget(layers, int(args.gib * GIB), peak, progress)
    optimizer.register_step_pre_hook(budget)


ARMS: dict[str, Callable[[TransformerDecoder, argparse.Namespace], LossStep]] = {
    "torchtune": torchtune,
    "liger_by_hand": liger_by_hand,
    "inductor_step": partial(whole_step, "inductor"),
    "liger_fx_step": partial(whole_step, "liger_fx"),
    "liger_fx_recipe": liger_fx_recipe,
    "liger_fx_budget": liger_fx_recipe,  # layers keep activations, as many as --gib takes
}

UNBUDGETED = [arm for arm in ARMS if arm != "liger_fx_budget"]  # what needs no --gib

COLUMNS = [
    Column("ignored", "ignored", ".0%"),
    Column("arm", "arm"),
    Column("ms", "ms", ".1f"),
    Column("tokens/s", "tokens_per_s", ",.0f"),
    Column("speed of torchtune's", "speed", ".3f"),
    Column("peak GiB", "peak_gib", ".2f"),
    Column("memory of torchtune's", "memory", ".3f"),
    Column("cold compile s", "compile_s", ".1f"),
    Column("loss", "loss", ".4f"),
    Column("rewrites", "rewrites"),
]


def build_model(args: argparse.Namespace) -> TransformerDecoder:
    """Random weights, small enough that the first loss is about that of guessing."""
    torch.manual_seed(0)
    with training.set_default_dtype(torch.bfloat16), args.device:
        model = MODELS[args.model]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def training_step(step: LossStep, optimizer: torch.optim.Optimizer) -> LossStep:
    def train(tokens: Tensor, labels: Tensor) -> Tensor:
        loss = step(tokens, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train


def prepare(args: argparse.Namespace) -> tuple[LossStep, Tensor]:
    """The training step of an arm, and a batch of tokens for it."""
    model = build_model(args)
    step = ARMS[args.arm](model, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    if args.arm == "liger_fx_budget":
        spend(model, optimizer, args)
    vocabulary = model.tok_embeddings.num_embeddings
    tokens = torch.randint(vocabulary, (args.batch, args.seq)).to(args.device)
    return training_step(step, optimizer), tokens


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """One row for each share of ignored labels; only the first one compiles."""
    train, tokens = prepare(args)
    for i, ignored in enumerate(args.ignored):
        call = partial(train, tokens, labels_of(tokens, ignored, args))
        first = seconds(call, args.device)
        row = time_and_memory(call, tokens.numel(), args)
        yield {
            "arm": args.arm,
            "ignored": ignored,
            **row,
            "compile_s": first - row["ms"] / 1e3 if i == 0 else None,
            "loss": call().item(),
            "rewrites": rewrites(),
        }


def labels_of(tokens: Tensor, ignored: float, args: argparse.Namespace) -> Tensor:
    labels = labels_like(tokens, ignored, args.seq)
    return labels.masked_fill(padding(tokens, args.padded), IGNORE)


def time_and_memory(call: Callable[[], object], tokens: int, args: argparse.Namespace) -> Row:
    """Of a step that has run once."""
    lap_times(call, args.device, args.warmup - 1)
    reset_peak(args.device)
    times = lap_times(call, args.device, args.steps)
    peak = peak_bytes(args.device)
    ms = statistics.median(times)
    return {
        "ms": ms,
        "times": times,
        "tokens_per_s": tokens / ms * 1e3,
        "peak_gib": peak and peak / GIB,
    }


def rewrites() -> str | None:
    """What liger_fx has replaced in this process, to see that an arm is what it says."""
    if "liger_fx" not in sys.modules:
        return None
    from liger_fx import reports

    counts = sum((Counter(report.counts) for report in reports()), Counter())
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


def compared(rows: list[Row], baseline: str = "torchtune") -> list[Row]:
    """Rows sorted by share, each with its speed and memory over those of the arm ``baseline``."""
    bases = {row.get("ignored"): row for row in rows if row["arm"] == baseline}
    for row in rows:
        base = bases.get(row.get("ignored"), {})
        if "ms" in row and "ms" in base:
            row["speed"] = base["ms"] / row["ms"]
            row["memory"] = row["peak_gib"] and row["peak_gib"] / base["peak_gib"]
    return sorted(rows, key=lambda row: row.get("ignored", 0))


def panels(rows: list[Row], args: argparse.Namespace) -> list[Panel]:
    found = {(row["arm"], row.get("ignored")): row for row in rows}
    groups = [share_of(ignored, args) for ignored in args.ignored]
    return [
        Panel(
            axis,
            groups,
            {arm: [found.get((arm, i), {}).get(key) for i in args.ignored] for arm in args.arms},
            numbers,
        )
        for axis, key, numbers in (
            ("tokens a second", "tokens_per_s", ",.0f"),
            ("GiB allocated at most", "peak_gib", ".2f"),
        )
    ]


def share_of(ignored: float, args: argparse.Namespace) -> str:
    return f"{ignored:.0%} ignored" + (f", {args.padded:.0%} padded" if args.padded else "")


def brief(row: Row) -> str:
    return row.get("error") or f"{row['ms']:.1f} ms"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What makes a step: the model, the batch, the arms."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama3_2_1b")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ignored", type=float, nargs="+", default=[0.0], help="shares of labels")
    parser.add_argument("--warmup", type=int, default=3, help="steps, the compiling one included")
    parser.add_argument(
        "--padded", type=float, default=0.0, help="share of tokens, on the right of sequences"
    )
    parser.add_argument("--gib", type=float, default=29.87, help="for the arm liger_fx_budget")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    add_outputs(parser)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return parser


def parse_args() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--steps", type=int, default=6)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.arm:
        return run_arm(partial(measure, args))
    header = print_header(args.device)
    rows: list[Row] = []
    for arm in args.arms:
        measured = [{"arm": arm} | row for row in in_fresh_process("--arm", arm)]
        rows += measured
        write_json(args.json, rows, header)  # a run that is cut off keeps what it has
        progress(f"{arm}: {', '.join(brief(row) for row in measured)}")
    print(markdown(compared(rows), COLUMNS))
    write_json(args.json, compared(rows), header)
    draw(args.picture, f"A training step, {args.model}", panels(rows, args), header)


if __name__ == "__main__":
    main()
