"""A whole training step of a torchtune decoder: forward, loss, backward, fused AdamW.

    python benchmarks/training_step.py --batch 128 --seq 512
    python benchmarks/training_step.py --batch 16 --seq 2048 --no-checkpoint
    python benchmarks/training_step.py --ignored 0 0.5 0.8
    python benchmarks/training_step.py --padded 0.4

Random weights and tokens, bf16. The first part of a sequence is the prompt, whose labels are
ignored. With ``--padded`` sequences differ in length, as in a batch that is not packed, and what
fills them up is ignored too: ``liger_fx_recipe`` leaves it out of the layers, ``liger_fx_step`` is
told of it. Every arm trains the same model on the same batches in a process of its own, so the
losses must agree and neither memory nor compiled code is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import _steps as steps
import torch
from _harness import Args, Benchmark, fresh, options, several
from _measure import GIB, IGNORE, needs_cuda, seconds
from _output import Row, columns, progress
from _steps import LossStep
from torch import Tensor, nn
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss


def chunked_loss(model: TransformerDecoder) -> CEWithChunkedOutputLoss:
    loss_fn = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    return loss_fn


def torchtune(model: TransformerDecoder, args: Args) -> LossStep:
    """The stock recipe with ``compile=True``."""
    steps.stock_layers(model, args)
    loss_fn = training.compile_loss(chunked_loss(model), verbose=False)
    return steps.recipe_loss(model, loss_fn, args.batch)


def liger_by_hand(model: TransformerDecoder, args: Args) -> LossStep:
    """Stock layers; the model returns hidden states and Liger's loss takes them."""
    needs_cuda(args.device, "Liger's fused loss")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    steps.hidden_states(model, args)
    loss_fn = partial(LigerFusedLinearCrossEntropyLoss(), model.tok_embeddings.weight)  # tied
    return steps.recipe_loss(model, loss_fn, args.batch)


def fused(args: Args) -> dict[str, Any]:
    """Options of an arm of liger_fx; one that did not fuse must fail."""
    return {"require": "linear_cross_entropy"} | steps.padded_batches(args)


def whole_step(backend: str, model: TransformerDecoder, args: Args) -> LossStep:
    """Checkpoints, model, shift and ``nn.CrossEntropyLoss`` in one graph."""
    if args.checkpoint:
        steps.checkpointed(model)
    step = steps.recipe_loss(model, nn.CrossEntropyLoss(ignore_index=IGNORE), args.batch)
    how = fused(args) if backend == "liger_fx" else None
    return torch.compile(step, backend=backend, fullgraph=True, options=how)


def liger_fx_recipe(model: TransformerDecoder, args: Args, offload: bool = False) -> LossStep:
    """What ``liger_fx/recipes/*`` make of the stock recipe."""
    from liger_fx.torchtune import fuse_head

    steps.fused_layers(model, args, unpad=bool(args.padded), offload=offload)
    head = fuse_head(model, chunked_loss(model), fused(args))
    mask = steps.unpadded_mask if args.padded else None
    return steps.recipe_loss(model, head, args.batch, mask)


def spend(model: TransformerDecoder, optimizer: torch.optim.Optimizer, args: Args) -> None:
    """As the recipes' ``liger_fx.memory_gib``."""
    needs_cuda(args.device, "a memory budget")
    from liger_fx.activations import MemoryBudget
    from liger_fx.torchtune import checkpoints

    layers, peak = checkpoints.checkpoints_of(model), torch.cuda.max_memory_allocated
    keep = partial(checkpoints.keep, layers)
    budget = MemoryBudget(keep, len(layers), int(args.gib * GIB), peak, progress)
    optimizer.register_step_pre_hook(budget)


ARMS: dict[str, Callable[[TransformerDecoder, Args], LossStep]] = {
    "torchtune": torchtune,
    "liger_by_hand": liger_by_hand,
    "inductor_step": partial(whole_step, "inductor"),
    "liger_fx_step": partial(whole_step, "liger_fx"),
    "liger_fx_recipe": liger_fx_recipe,
    "liger_fx_offload": partial(liger_fx_recipe, offload=True),
    "liger_fx_budget": liger_fx_recipe,  # layers keep activations, as many as --gib takes
}
UNBUDGETED = [arm for arm in ARMS if arm != "liger_fx_budget"]  # what needs no --gib


def prepare(args: Args, **sizes: int) -> tuple[LossStep, Tensor]:
    """The training step of an arm, and a batch of tokens for it. ``sizes`` change the model's."""
    model = steps.random_model(partial(steps.llama, args.model, **sizes), args.device)
    step = ARMS[args.arm](model, args)
    optimizer = steps.adamw(model, args)
    if args.arm == "liger_fx_budget":
        spend(model, optimizer, args)
    tokens = steps.random_tokens(model.tok_embeddings.num_embeddings, args)
    return steps.training_step(step, optimizer), tokens


def measure(args: Args) -> Iterator[Row]:
    """One row for each share of ignored labels; only the first one compiles."""
    train, tokens = prepare(args)
    for i, ignored in enumerate(args.ignored):
        call = partial(train, tokens, steps.labels_of(tokens, ignored, args))
        first = seconds(call, args.device)
        row = steps.time_and_memory(call, tokens.numel(), args)
        yield {
            "ignored": ignored,
            **row,
            "compile_s": first - row["ms"] / 1e3 if i == 0 else None,
            "loss": call().item(),
            "rewrites": steps.rewrites(),
        }


STEP = steps.STEP | {
    "model": {"choices": steps.LLAMAS, "default": "llama3_2_1b"},
    "batch": 128,
    "seq": 512,
    "padded": 0.0,
    "gib": {"type": float, "default": 29.87, "help": "for the arm liger_fx_budget"},
}

BENCHMARK = Benchmark(
    options(__doc__, arms=several(ARMS), **STEP),
    run=lambda args: (fresh({"arm": arm}) for arm in args.arms),
    measure=measure,
    columns=columns(
        "ignored {ignored:.0%} | arm {arm} | "
        + steps.COLUMNS
        + "cold compile s {compile_s:.1f} | loss {loss:.4f} | rewrites {rewrites}"
    ),
    finish=lambda rows, args: steps.compared_steps(rows, "torchtune", ["ignored"]),
    title="A training step, {model}, {batch} x {seq}, {padded:.0%} padded",
    panels=steps.panels("{ignored:.0%} ignored"),
)

if __name__ == "__main__":
    BENCHMARK.main()
