r"""Steps of preference and RL training (DPO, GRPO) and of distillation: two models make logits.

    python benchmarks/preference_and_distillation.py
    python benchmarks/preference_and_distillation.py --layers 0     # heads and losses alone
    python benchmarks/preference_and_distillation.py --losses dpo --ignored 0 0.5
    python benchmarks/preference_and_distillation.py --losses dpo --padded 0.4
    python benchmarks/preference_and_distillation.py --losses dpo --ignored 0.5 \
        --arms torchtune liger_by_hand liger_fx_recipe liger_fx_unpad

DPO and GRPO train Llama-3.2-1B against a frozen copy of it, distillation Qwen2.5-0.5B on
Qwen2.5-1.5B: random weights and tokens, bf16, fused AdamW, each arm in a process of its own.
``torchtune`` is the stock recipe with ``compile=True``, ``inductor`` the same with heads and loss
compiled as one region by Inductor alone, ``liger_by_hand`` Liger's chunked losses on hidden states,
``liger_fx_recipe`` what ``liger_fx/recipes/*`` make, ``liger_fx_unpad`` the same of DPO with
``liger_fx.unpad=True``. Of the sequences of a DPO batch the first half are chosen, the others
rejected; a pair has one prompt, whose labels are ignored. GRPO takes the log-probabilities as the
PPO recipes do, of the second half of each sequence, which is the answer; it has no model of values,
as PPO has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import _steps as steps
import torch
from _harness import Args, Benchmark, fresh, options, several
from _measure import IGNORE, needs_cuda
from _output import Row, columns
from _steps import LossStep
from torch import Tensor, nn
from torchtune import rlhf, training
from torchtune.models.qwen2_5 import qwen2_5_0_5b, qwen2_5_1_5b_base
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss
from torchtune.rlhf import truncate_sequence_for_logprobs as of_answers
from torchtune.rlhf.loss import DPOLoss

from liger_fx.torchtune import Head, HeadTokenLogProbs, Scores, fuse_distillation, fuse_log_probs

BETA, RATIO = 0.1, 0.5  # of torchtune's configs
DPO = DPOLoss(beta=BETA)
KL_COEFFICIENT, CLIP = 0.04, 0.2  # of GRPO, as in Liger
ARMS = ["torchtune", "inductor", "liger_by_hand", "liger_fx_recipe"]
UNPAD = "liger_fx_unpad"  # of DPO alone

Build = Callable[[], TransformerDecoder]

# The model that is trained, and the one that is not.
LLAMA = partial(steps.llama, "llama3_2_1b")
MODELS: dict[str, tuple[Build, Build]] = {
    "dpo": (LLAMA, LLAMA),
    "grpo": (LLAMA, LLAMA),
    "distillation": (qwen2_5_0_5b, qwen2_5_1_5b_base),
    "tiny": (partial(steps.llama, "tiny"), partial(steps.llama, "tiny", embed_dim=128)),
}

# What a loss takes of a model, of tokens and labels; and the loss, of both models' and the same.
Output = Callable[[Tensor, Tensor], Any]
Joint = Callable[[Any, Any, Tensor, Tensor], Tensor]


def joint_step(of_trained: Output, of_frozen: Output, loss: Joint) -> LossStep:
    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        trained = of_trained(tokens, labels)
        with torch.no_grad():
            frozen = of_frozen(tokens, labels)
        return loss(trained, frozen, tokens, labels)

    return step


# -- preference ------------------------------------------------------------------------------------


def stock_scores(model: TransformerDecoder, args: Args) -> Output:
    """As ``concatenated_forward`` of torchtune's recipes, which runs the head eagerly."""
    steps.stock_layers(model, args)

    def scores(tokens: Tensor, labels: Tensor) -> Scores:
        logits = model(tokens)
        return Scores(rlhf.get_batch_log_probs(logits, labels), logits.detach().mean((1, 2)))

    return scores


def fused_scores(model: TransformerDecoder, args: Args) -> Output:
    unpad = args.arm == UNPAD
    prepare_layers(model, args, unpad=unpad)
    head = of_arm(fuse_log_probs(model, require("linear_logprobs", args)), args)
    output = outputs_of(model, unpad)
    return lambda tokens, labels: head(output(tokens, labels), labels)


def dpo_loss(policy: Scores, frozen: Scores, tokens: Tensor, labels: Tensor) -> Tensor:
    losses, *_ = DPO(*policy.logprobs.chunk(2), *frozen.logprobs.chunk(2))  # chosen, rejected
    return losses.mean()


# -- policy gradients ------------------------------------------------------------------------------


def stock_logprobs(model: TransformerDecoder, args: Args) -> Output:
    """As torchtune's PPO recipe, which runs the head eagerly."""
    steps.stock_layers(model, args)

    def logprobs(tokens: Tensor, labels: Tensor) -> Tensor:
        context = tokens.shape[1] // 2
        return rlhf.logits_to_logprobs(of_answers(model(tokens), context), tokens[:, context:])

    return logprobs


def fused_logprobs(model: TransformerDecoder, args: Args) -> Output:
    prepare_layers(model, args)
    head = of_arm(HeadTokenLogProbs(model, require("linear_logprobs", args)), args)

    def logprobs(tokens: Tensor, labels: Tensor) -> Tensor:
        context = tokens.shape[1] // 2
        with head.instead_of_logits(model):
            answers = of_answers(model(tokens), context)
        return head(answers.hidden, tokens[:, context:], 1.0)

    return logprobs


def grpo_loss(logprobs: Tensor, frozen: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
    """Equation 3 of https://arxiv.org/abs/2402.03300 as a mean over all tokens. On policy: the old
    log-probabilities are the present ones."""
    counted = labels[:, tokens.shape[1] // 2 :] != IGNORE
    advantages = advantages_of(tokens)[:, None]
    ratios = (logprobs - logprobs.detach()).exp()
    gains = torch.minimum(ratios * advantages, ratios.clamp(1 - CLIP, 1 + CLIP) * advantages)
    divergence = (frozen - logprobs).exp() - (frozen - logprobs) - 1
    return rlhf.masked_mean(KL_COEFFICIENT * divergence - gains, counted)


def advantages_of(tokens: Tensor) -> Tensor:
    """Each sequence's. Their mean is not zero, for a loss that can be compared."""
    return torch.linspace(-1, 2, len(tokens), device=tokens.device)


# -- distillation ----------------------------------------------------------------------------------


def distillation(model: TransformerDecoder, teacher: TransformerDecoder, args: Args) -> LossStep:
    loss_fns = CEWithChunkedOutputLoss(), ForwardKLWithChunkedOutputLoss()
    for decoder in (model, teacher):
        decoder.set_num_output_chunks(loss_fns[0].num_output_chunks)
        if args.arm == "torchtune":
            steps.stock_layers(decoder, args)
        else:
            prepare_layers(decoder, args, unpad=bool(args.padded))
    if args.arm == "torchtune":
        of_classes, of_teacher = (training.compile_loss(f, verbose=False) for f in loss_fns)

        def losses(hidden: Any, taught: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
            return of_classes(hidden, labels), of_teacher(hidden, taught, labels)

    else:
        how = require("linear_kl", args)
        losses = of_arm(fuse_distillation(model, teacher, *loss_fns, RATIO, how), args)

    def loss(hidden: Any, taught: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        class_loss, kd_loss = losses(hidden, taught, shifted(labels))
        return (1 - RATIO) * class_loss + RATIO * kd_loss

    unpad = bool(args.padded) and args.arm == "liger_fx_recipe"
    return joint_step(outputs_of(model, unpad), outputs_of(teacher, unpad), loss)


def outputs_of(model: TransformerDecoder, unpad: bool = False) -> Output:
    if unpad:
        return lambda tokens, labels: model(tokens, mask=steps.unpadded_mask(tokens, labels))
    return lambda tokens, labels: model(tokens)


def shifted(labels: Tensor) -> Tensor:
    return torch.hstack((labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)))


# -- Liger's losses of hidden states ---------------------------------------------------------------


def by_liger(model: TransformerDecoder, frozen: TransformerDecoder, args: Args) -> LossStep:
    needs_cuda(args.device, "Liger's fused loss")
    outputs = [outputs_of(steps.hidden_states(m, args)) for m in (model, frozen)]
    weights = [m.tok_embeddings.weight for m in (model, frozen)]
    return joint_step(*outputs, LIGER[args.loss](*weights))


def dpo_by_liger(weight: Tensor, frozen_weight: Tensor) -> Joint:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_fn = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA, average_log_prob=False)

    def loss(hidden: Tensor, frozen: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        reference = {"ref_input": frozen[:, :-1], "ref_weight": frozen_weight}
        return loss_fn(weight, hidden[:, :-1], labels[:, 1:], **reference)[0]

    return loss


def grpo_by_liger(weight: Tensor, frozen_weight: Tensor) -> Joint:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # "bnpo" is the mean over all tokens.
    loss_fn = LigerFusedLinearGRPOLoss(
        KL_COEFFICIENT, loss_type="bnpo", epsilon_low=CLIP, epsilon_high=CLIP
    )

    def loss(hidden: Tensor, frozen: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        context = tokens.shape[1] // 2
        counted = (labels[:, context:] != IGNORE).float()
        reference = {"ref_input": of_answers(frozen, context), "ref_weight": frozen_weight}
        answers, advantages = of_answers(hidden, context), advantages_of(tokens)
        return loss_fn(answers, weight, tokens[:, context:], counted, advantages, **reference)[0]

    return loss


def distillation_by_liger(weight: Tensor, teacher_weight: Tensor) -> Joint:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_fn = LigerFusedLinearJSDLoss(1 - RATIO, RATIO, beta=0.0, ignore_index=IGNORE)

    def loss(hidden: Tensor, taught: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        of_both = (hidden.flatten(0, 1), weight, taught.flatten(0, 1), teacher_weight)
        return loss_fn(*of_both, shifted(labels).flatten())

    return loss


LIGER = {"dpo": dpo_by_liger, "grpo": grpo_by_liger, "distillation": distillation_by_liger}


# -- arms ------------------------------------------------------------------------------------------


def prepare_layers(model: TransformerDecoder, args: Args, *, unpad: bool = False) -> None:
    """As a fused recipe prepares them, or as a stock one."""
    if args.arm == "inductor":
        steps.stock_layers(model, args)
    else:
        steps.fused_layers(model, args, unpad=unpad)


def of_arm(head: Head, args: Args) -> Any:
    """``head``, compiled by whom the arm is about."""
    if args.arm == "inductor":
        head._region = torch.compile(head._outcome, backend="inductor")
    return head


def require(rewrite: str, args: Args) -> dict[str, Any]:
    """An arm that did not fuse must fail."""
    return {"require": rewrite} if args.arm.startswith("liger_fx") else {}


# What a stock recipe and a fused one take of both models, and the loss of these.
HEADS: dict[str, tuple[Any, Any, Joint]] = {
    "dpo": (stock_scores, fused_scores, dpo_loss),
    "grpo": (stock_logprobs, fused_logprobs, grpo_loss),
}


def loss_step(model: TransformerDecoder, frozen: TransformerDecoder, args: Args) -> LossStep:
    if args.arm == UNPAD and args.loss != "dpo":
        raise ValueError(f"{UNPAD} is an arm of dpo, not of {args.loss}")
    if args.arm == "liger_by_hand":
        return by_liger(model, frozen, args)
    if args.loss == "distillation":
        return distillation(model, frozen, args)
    stock, fused, loss = HEADS[args.loss]
    make = stock if args.arm == "torchtune" else fused
    return joint_step(make(model, args), make(frozen, args), loss)


class NoLayer(nn.Module):
    """torchtune asks its first layer whether there are caches."""

    def caches_are_enabled(self) -> bool:
        return False

    def forward(self, h: Tensor, **_: Any) -> Tensor:
        return h


def build(make: Build, args: Args) -> TransformerDecoder:
    model = steps.random_model(make, args.device)
    if args.layers is not None:
        model.layers = model.layers[: args.layers] if args.layers else nn.ModuleList([NoLayer()])
    return model


def prepare(args: Args) -> tuple[LossStep, Tensor]:
    trained, frozen = (build(make, args) for make in MODELS[args.model or args.loss])
    frozen.requires_grad_(False).eval()
    step = loss_step(trained, frozen, args)
    train = steps.training_step(step, steps.adamw(trained, args))
    return train, steps.random_tokens(trained.tok_embeddings.num_embeddings, args)


def pairs(tokens: Tensor, ignored: float) -> Tensor:
    """Chosen and rejected, of one prompt."""
    chosen, rejected = tokens.chunk(2)
    prompt = round(ignored * tokens.shape[1])
    return torch.cat((chosen, torch.cat((chosen[:, :prompt], rejected[:, prompt:]), 1)))


def measure(args: Args) -> Iterator[Row]:
    """One row for each share of ignored labels; only the first one compiles."""
    train, tokens = prepare(args)
    for ignored in args.ignored:
        given = pairs(tokens, ignored) if args.loss == "dpo" else tokens
        call = partial(train, given, steps.labels_of(given, ignored, args))
        first = call().item()  # of the weights that all arms begin with, at the first share
        yield {
            "ignored": ignored,
            **steps.time_and_memory(call, tokens.numel(), args),
            "first_loss": first,
            "rewrites": steps.rewrites() if args.arm.startswith("liger_fx") else None,
        }


BENCHMARK = Benchmark(
    options(
        __doc__,
        losses=several(LIGER),
        arms=several([*ARMS, UNPAD], ARMS),
        model={"choices": ["tiny"], "help": "instead of those of the loss"},
        layers={"type": int, "help": "of each model, if not all"},
        batch=16,
        seq=1024,
        padded=0.0,
        **steps.STEP,
    ),
    run=lambda args: (
        fresh({"loss": loss, "arm": arm}) for loss in args.losses for arm in args.arms
    ),
    measure=measure,
    columns=columns(
        "loss {loss} | ignored {ignored:.0%} | arm {arm} | "
        + steps.COLUMNS
        + "first loss {first_loss:.4f} | rewrites {rewrites}"
    ),
    finish=lambda rows, args: steps.compared_steps(rows, "torchtune", ["loss", "ignored"]),
    title="Steps of preference and RL training, and of distillation, {padded:.0%} padded",
    panels=steps.panels("{loss}, {ignored:.0%} ignored"),
)

if __name__ == "__main__":
    BENCHMARK.main()
