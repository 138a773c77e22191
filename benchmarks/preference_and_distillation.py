"""Steps of preference and RL training (DPO, GRPO) and of distillation: two models make logits.

    python benchmarks/preference_and_distillation.py
    python benchmarks/preference_and_distillation.py --layers 0     # heads and losses alone
    python benchmarks/preference_and_distillation.py --losses dpo --ignored 0 0.5
    python benchmarks/preference_and_distillation.py --losses dpo --padded 0.4

DPO and GRPO train Llama-3.2-1B against a frozen copy of it, distillation Qwen2.5-0.5B on
Qwen2.5-1.5B: random weights and tokens, bf16, fused AdamW, each arm in a process of its own.
``torchtune`` is the stock recipe with ``compile=True``, ``inductor`` the same with heads and loss
compiled as one region by Inductor alone, ``liger_by_hand`` Liger's chunked losses on hidden states,
``liger_fx_recipe`` what ``liger_fx/recipes/*`` make. Of the sequences of a DPO batch the first half
are chosen, the others rejected. GRPO takes the log-probabilities as the PPO recipes do, of the
second half of each sequence, which is the answer; it has no model of values, as PPO has.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from _common import (
    IGNORE,
    Column,
    Panel,
    Row,
    add_outputs,
    draw,
    in_fresh_process,
    markdown,
    needs_cuda,
    print_header,
    progress,
    run_arm,
    write_json,
)
from _llama import llama
from torch import Tensor, nn
from torchtune import rlhf, training
from torchtune.models.llama3_2 import llama3_2_1b
from torchtune.models.qwen2_5 import qwen2_5_0_5b, qwen2_5_1_5b_base
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss
from torchtune.rlhf.loss import DPOLoss
from training_step import (
    LossStep,
    checkpointed,
    compared,
    labels_of,
    padded_batches,
    rewrites,
    share_of,
    stock_layers,
    time_and_memory,
    training_step,
)

from liger_fx.torchtune import (
    Head,
    HeadTokenLogProbs,
    Scores,
    compile_layers,
    fuse_distillation,
    fuse_log_probs,
)

BETA, RATIO = 0.1, 0.5  # of torchtune's configs
KL_COEFFICIENT, CLIP = 0.04, 0.2  # of GRPO, as in Liger
ARMS = ["torchtune", "inductor", "liger_by_hand", "liger_fx_recipe"]

Build = Callable[[], TransformerDecoder]
ScoresOf = Callable[[Tensor, Tensor], Scores]
LogProbsOf = Callable[[Tensor], Tensor]

# The model that is trained, and the one that is not.
MODELS: dict[str, tuple[Build, Build]] = {
    "dpo": (llama3_2_1b, llama3_2_1b),
    "grpo": (llama3_2_1b, llama3_2_1b),
    "distillation": (qwen2_5_0_5b, qwen2_5_1_5b_base),
    "tiny": (partial(llama, "tiny"), partial(llama, "tiny", embed_dim=128)),
}


# -- preference ------------------------------------------------------------------------------------


def stock_scores(model: TransformerDecoder, args: argparse.Namespace) -> ScoresOf:
    """As ``concatenated_forward`` of torchtune's recipes, which runs the head eagerly."""
    stock_layers(model, args)

    def scores(tokens: Tensor, labels: Tensor) -> Scores:
        logits = model(tokens)
        return Scores(rlhf.get_batch_log_probs(logits, labels), logits.detach().mean((1, 2)))

    return scores


def fused_scores(model: TransformerDecoder, args: argparse.Namespace) -> ScoresOf:
    prepare_layers(model, args)
    head = of_arm(fuse_log_probs(model, options("linear_logprobs", args)), args)
    return lambda tokens, labels: head(model(tokens), labels)


def dpo(model: TransformerDecoder, reference: TransformerDecoder, args: Any) -> LossStep:
    loss_fn = DPOLoss(beta=BETA)
    make = stock_scores if args.arm == "torchtune" else fused_scores
    of_policy, of_reference = make(model, args), make(reference, args)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        pairs = len(tokens) // 2
        policy = of_policy(tokens, labels).logprobs
        with torch.no_grad():
            frozen = of_reference(tokens, labels).logprobs
        losses, *_ = loss_fn(policy[:pairs], policy[pairs:], frozen[:pairs], frozen[pairs:])
        return losses.mean()

    return step


def dpo_by_liger(model: TransformerDecoder, reference: TransformerDecoder, args: Any) -> LossStep:
    needs_cuda(args.device, "Liger's fused loss")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_fn = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA, average_log_prob=False)
    hidden_of = [hidden_states(m, args) for m in (model, reference)]
    weight, frozen = (m.tok_embeddings.weight for m in (model, reference))

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = hidden_of[0](tokens)[:, :-1]
        with torch.no_grad():
            of_reference = hidden_of[1](tokens)[:, :-1]
        loss, *_ = loss_fn(weight, hidden, labels[:, 1:], ref_input=of_reference, ref_weight=frozen)
        return loss

    return step


# -- policy gradients ------------------------------------------------------------------------------


def stock_token_logprobs(model: TransformerDecoder, args: argparse.Namespace) -> LogProbsOf:
    """As torchtune's PPO recipe, which runs the head eagerly."""
    stock_layers(model, args)

    def logprobs(tokens: Tensor) -> Tensor:
        context = tokens.shape[1] // 2
        logits = rlhf.truncate_sequence_for_logprobs(model(tokens), context)
        return rlhf.logits_to_logprobs(logits, tokens[:, context:])

    return logprobs


def fused_token_logprobs(model: TransformerDecoder, args: argparse.Namespace) -> LogProbsOf:
    prepare_layers(model, args)
    head = of_arm(HeadTokenLogProbs(model, options("linear_logprobs", args)), args)

    def logprobs(tokens: Tensor) -> Tensor:
        context = tokens.shape[1] // 2
        with head.instead_of_logits(model):
            answers = rlhf.truncate_sequence_for_logprobs(model(tokens), context)
        return head(answers.hidden, tokens[:, context:], 1.0)

    return logprobs


def grpo(model: TransformerDecoder, reference: TransformerDecoder, args: Any) -> LossStep:
    """On policy: the old log-probabilities are the present ones."""
    make = stock_token_logprobs if args.arm == "torchtune" else fused_token_logprobs
    of_policy, of_reference = make(model, args), make(reference, args)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        logprobs = of_policy(tokens)
        with torch.no_grad():
            frozen = of_reference(tokens)
        counted = labels[:, tokens.shape[1] // 2 :] != IGNORE
        return grpo_loss(logprobs, frozen, advantages_of(tokens), counted)

    return step


def grpo_loss(logprobs: Tensor, frozen: Tensor, advantages: Tensor, counted: Tensor) -> Tensor:
    """Equation 3 of https://arxiv.org/abs/2402.03300 as a mean over all tokens."""
    ratios = (logprobs - logprobs.detach()).exp()
    clipped = ratios.clamp(1 - CLIP, 1 + CLIP)
    gains = torch.minimum(ratios * advantages[:, None], clipped * advantages[:, None])
    divergence = (frozen - logprobs).exp() - (frozen - logprobs) - 1
    return rlhf.masked_mean(KL_COEFFICIENT * divergence - gains, counted)


def advantages_of(tokens: Tensor) -> Tensor:
    """Each sequence's. Their mean is not zero, for a loss that can be compared."""
    return torch.linspace(-1, 2, len(tokens), device=tokens.device)


def grpo_by_liger(model: TransformerDecoder, reference: TransformerDecoder, args: Any) -> LossStep:
    needs_cuda(args.device, "Liger's fused loss")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # "bnpo" is the mean over all tokens.
    loss_fn = LigerFusedLinearGRPOLoss(
        KL_COEFFICIENT, loss_type="bnpo", epsilon_low=CLIP, epsilon_high=CLIP
    )
    hidden_of = [hidden_states(m, args) for m in (model, reference)]
    weight, frozen = (m.tok_embeddings.weight for m in (model, reference))

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        context = tokens.shape[1] // 2
        hidden = rlhf.truncate_sequence_for_logprobs(hidden_of[0](tokens), context)
        with torch.no_grad():
            of_reference = rlhf.truncate_sequence_for_logprobs(hidden_of[1](tokens), context)
        loss, *_ = loss_fn(
            hidden,
            weight,
            tokens[:, context:],
            (labels[:, context:] != IGNORE).float(),
            advantages_of(tokens),
            ref_input=of_reference,
            ref_weight=frozen,
        )
        return loss

    return step


# -- distillation ----------------------------------------------------------------------------------


def distillation(model: TransformerDecoder, teacher: TransformerDecoder, args: Any) -> LossStep:
    loss_fn, kd_loss_fn = CEWithChunkedOutputLoss(), ForwardKLWithChunkedOutputLoss()
    for decoder in (model, teacher):
        decoder.set_num_output_chunks(loss_fn.num_output_chunks)
    if args.arm == "torchtune":
        for decoder in (model, teacher):
            stock_layers(decoder, args)
        losses = partial(
            stock_losses,
            training.compile_loss(loss_fn, verbose=False),
            training.compile_loss(kd_loss_fn, verbose=False),
        )
    else:
        for decoder in (model, teacher):
            prepare_layers(decoder, args)
        how = options("linear_kl", args)
        head = fuse_distillation(model, teacher, loss_fn, kd_loss_fn, RATIO, how)
        losses = of_arm(head, args)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = model(tokens)
        with torch.no_grad():
            taught = teacher(tokens)
        class_loss, kd_loss = losses(hidden, taught, shifted(labels))
        return (1 - RATIO) * class_loss + RATIO * kd_loss

    return step


def stock_losses(
    loss_fn: nn.Module, kd_loss_fn: nn.Module, logits: Any, teacher_logits: Any, labels: Tensor
) -> tuple[Tensor, Tensor]:
    return loss_fn(logits, labels), kd_loss_fn(logits, teacher_logits, labels)


def distillation_by_liger(
    model: TransformerDecoder, teacher: TransformerDecoder, args: Any
) -> LossStep:
    needs_cuda(args.device, "Liger's fused loss")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_fn = LigerFusedLinearJSDLoss(1 - RATIO, RATIO, beta=0.0, ignore_index=IGNORE)
    student, taught_by = hidden_states(model, args), hidden_states(teacher, args)
    weight, teacher_weight = (m.tok_embeddings.weight for m in (model, teacher))

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = student(tokens).flatten(0, 1)
        with torch.no_grad():
            taught = taught_by(tokens).flatten(0, 1)
        return loss_fn(hidden, weight, taught, teacher_weight, shifted(labels).flatten())

    return step


def shifted(labels: Tensor) -> Tensor:
    return torch.hstack((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)))


# -- arms ------------------------------------------------------------------------------------------


def prepare_layers(model: TransformerDecoder, args: argparse.Namespace) -> None:
    """As a fused recipe prepares them, or as a stock one."""
    if args.arm == "inductor":
        return stock_layers(model, args)
    if args.checkpoint:
        checkpointed(model)
    compile_layers(model, padded_batches(args))


def of_arm(head: Head, args: argparse.Namespace) -> Any:
    """``head``, compiled by whom the arm is about."""
    if args.arm == "inductor":
        head._region = torch.compile(head._outcome, backend="inductor")
    return head


def hidden_states(model: TransformerDecoder, args: argparse.Namespace) -> Any:
    stock_layers(model, args)
    model.unembed = model.norm.forward
    return model


def options(rewrite: str, args: argparse.Namespace) -> dict[str, Any]:
    """An arm that did not fuse must fail."""
    return {"require": rewrite} if args.arm == "liger_fx_recipe" else {}


STEPS: dict[str, Callable[[TransformerDecoder, TransformerDecoder, Any], LossStep]] = {
    "dpo": dpo,
    "grpo": grpo,
    "distillation": distillation,
}
BY_HAND = {
    "dpo": dpo_by_liger,
    "grpo": grpo_by_liger,
    "distillation": distillation_by_liger,
}


class NoLayer(nn.Module):
    """torchtune asks its first layer whether there are caches."""

    def caches_are_enabled(self) -> bool:
        return False

    def forward(self, h: Tensor, **_: Any) -> Tensor:
        return h


def build(make: Build, args: argparse.Namespace) -> TransformerDecoder:
    """Random weights, small enough that the first loss is about that of guessing."""
    torch.manual_seed(0)
    with training.set_default_dtype(torch.bfloat16), args.device:
        model = make()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    if args.layers is not None:
        model.layers = model.layers[: args.layers] if args.layers else nn.ModuleList([NoLayer()])
    return model


def prepare(args: argparse.Namespace) -> tuple[LossStep, Tensor]:
    trained, frozen = (build(make, args) for make in MODELS[args.model or args.loss])
    frozen.requires_grad_(False).eval()
    make = BY_HAND if args.arm == "liger_by_hand" else STEPS
    step = make[args.loss](trained, frozen, args)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.lr, fused=True)
    vocabulary = trained.tok_embeddings.num_embeddings
    tokens = torch.randint(vocabulary, (args.batch, args.seq)).to(args.device)
    return training_step(step, optimizer), tokens


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """One row for each share of ignored labels; only the first one compiles."""
    train, tokens = prepare(args)
    for ignored in args.ignored:
        call = partial(train, tokens, labels_of(tokens, ignored, args))
        first = call().item()  # of the weights that all arms begin with, at the first share
        yield {
            "loss": args.loss,
            "arm": args.arm,
            "ignored": ignored,
            **time_and_memory(call, tokens.numel(), args),
            "first_loss": first,
            "rewrites": rewrites() if args.arm == "liger_fx_recipe" else None,
        }


COLUMNS = [
    Column("loss", "loss"),
    Column("ignored", "ignored", ".0%"),
    Column("arm", "arm"),
    Column("ms", "ms", ".1f"),
    Column("tokens/s", "tokens_per_s", ",.0f"),
    Column("speed of torchtune's", "speed", ".3f"),
    Column("peak GiB", "peak_gib", ".2f"),
    Column("memory of torchtune's", "memory", ".3f"),
    Column("first loss", "first_loss", ".4f"),
    Column("rewrites", "rewrites"),
]


def panels(rows: list[Row], args: argparse.Namespace) -> list[Panel]:
    found = {(row["loss"], row["arm"], row.get("ignored")): row for row in rows}
    groups = [(loss, share) for loss in args.losses for share in args.ignored]
    return [
        Panel(
            axis,
            [f"{loss}, {share_of(ignored, args)}" for loss, ignored in groups],
            {
                arm: [found.get((loss, arm, share), {}).get(key) for loss, share in groups]
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
    parser.add_argument("--losses", choices=STEPS, nargs="+", default=list(STEPS))
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=ARMS)
    parser.add_argument("--model", choices=["tiny"], help="instead of those of the loss")
    parser.add_argument("--layers", type=int, help="of each model, if not all")
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ignored", type=float, nargs="+", default=[0.0], help="shares of labels")
    parser.add_argument("--padded", type=float, default=0.0, help="share of tokens, on the right")
    parser.add_argument("--warmup", type=int, default=3, help="steps, the compiling one included")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    add_outputs(parser)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--loss", choices=STEPS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.arm:
        return run_arm(partial(measure, args))
    header = print_header(args.device)
    rows: list[Row] = []
    for loss in args.losses:
        of_loss: list[Row] = []
        for arm in args.arms:
            measured = in_fresh_process("--loss", loss, "--arm", arm)
            of_loss += [{"loss": loss, "arm": arm} | row for row in measured]
            progress(f"{loss}, {arm}: {of_loss[-1].get('error', 'done')}")
            write_json(args.json, rows + of_loss, header)  # a run that is cut off keeps what it has
        rows += compared(of_loss)
    print(markdown(rows, COLUMNS))
    write_json(args.json, rows, header)
    draw(
        args.picture,
        "Steps of preference and RL training, and of distillation",
        panels(rows, args),
        header,
    )


if __name__ == "__main__":
    main()
