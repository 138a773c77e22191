"""A whole training step of a decoder: models, batches, and what is measured of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from _harness import Args, compared
from _measure import IGNORE, labels_like, lap_times, padding, run_laps
from _output import Panel, Row
from torch import Tensor, nn
from torchtune import training
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params, set_trainable_params

LossStep = Callable[[Tensor, Tensor], Tensor]  # of tokens and labels, each [batch, seq]
Loss = Callable[[Any, Tensor], Tensor]

# What scripts declare alike: options, columns, and ratios to the rows of a baseline.
STEP = {"checkpoint": True, "ignored": [0.0], "warmup": 3, "steps": 6, "lr": 1e-4}
COLUMNS = (
    "ms {ms:.1f} | tokens/s {tokens_per_s:,.0f} | speed of baseline's {speed:.3f} | "
    "peak GiB {peak_gib:.2f} | memory of baseline's {memory:.3f} | "
)
compared_steps = partial(compared, speed="1/ms", memory="peak_gib")


def panels(group: str) -> list[Panel]:
    return [
        Panel("ms a step", "ms", group),
        Panel("GiB allocated at most", "peak_gib", group, ".2f"),
    ]


# -- models ----------------------------------------------------------------------------------------

SIZES = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "embed_dim", "intermediate_dim")
LLAMAS = {
    "llama3_2_1b": (128_256, 16, 32, 8, 2048, 8192),
    "tiny": (512, 2, 4, 2, 64, 128),
}


def llama(model: str, max_seq_len: int = 131_072, **changed: int) -> TransformerDecoder:
    sizes = dict(zip(SIZES, LLAMAS[model], strict=True))
    return llama3_2(max_seq_len=max_seq_len, **(sizes | changed))


def lora(model: str, max_seq_len: int = 131_072, **changed: int) -> TransformerDecoder:
    """`llama` with adapters of rank 16 on all projections of its layers; they alone train."""
    sizes = dict(zip(SIZES, LLAMAS[model], strict=True)) | changed
    attention = ["q_proj", "k_proj", "v_proj", "output_proj"]
    made = lora_llama3_2(
        attention,
        apply_lora_to_mlp=True,
        max_seq_len=max_seq_len,
        lora_rank=16,
        lora_alpha=32,
        **sizes,
    )
    set_trainable_params(made, get_adapter_params(made))
    return made


def random_model(make: Callable[[], nn.Module], device: torch.device) -> Any:
    """Random weights in bf16, small enough that the first loss is about that of guessing."""
    torch.manual_seed(0)
    with training.set_default_dtype(torch.bfloat16), device:
        model = make()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    return model


def checkpointed(model: Any) -> None:
    kinds = {type(layer) for layer in model.layers}
    training.set_activation_checkpointing(model, auto_wrap_policy=kinds)


def stock_layers(model: TransformerDecoder, args: Args) -> None:
    """Layers as a stock recipe prepares them: compiled, then the checkpoint around."""
    training.compile_model(model, verbose=False)
    if args.checkpoint:
        checkpointed(model)


def fused_layers(
    model: TransformerDecoder, args: Args, *, unpad: bool = False, offload: bool = False
) -> None:
    """Layers as liger_fx's recipes prepare them: the checkpoint inside of what is compiled.
    unpad: a loss reads the hidden states of labelled tokens alone, so others may be left out; the
    model needs `unpadded_mask` then. offload: as with enable_activation_offloading."""
    from liger_fx.offload import Offload
    from liger_fx.torchtune import compile_layers
    from liger_fx.torchtune.unpadding import leave_out_padding

    if args.checkpoint:
        checkpointed(model)
    reason = leave_out_padding([model], [], torch.bfloat16) if unpad else ""
    if reason:
        raise RuntimeError(f"padding goes through the layers: {reason}")
    settings = {} if unpad else padded_batches(args)
    compile_layers(model, settings, offload=Offload() if offload else None)


def padded_batches(args: Args) -> dict[str, Any]:
    """What liger_fx has to be told of padded batches that keep their padding."""
    return {"tiled_mlp.skip_padding": True} if args.padded else {}


@cache
def unpadded_mask(tokens: Tensor, labels: Tensor) -> dict[str, Tensor] | None:
    """The mask that the recipes' loaders make of a batch: once, since its making is not timed."""
    from liger_fx.torchtune.unpadding import mask_of

    mask = mask_of(tokens.cpu(), labels.cpu(), IGNORE, shares=True)
    return mask and mask.to(tokens.device)


def hidden_states(model: TransformerDecoder, args: Args) -> TransformerDecoder:
    """``model`` with stock layers; it returns what its head would project."""
    stock_layers(model, args)
    model.unembed = model.norm.forward
    return model


# -- steps -----------------------------------------------------------------------------------------


def recipe_loss(
    model: TransformerDecoder,
    loss_fn: Loss,
    rows: int,
    mask: Callable[[Tensor, Tensor], Any] | None = None,
) -> LossStep:
    """``_loss_step`` of torchtune's recipes; the column of ignored labels outlives the step there
    as well. mask: makes the model's of tokens and labels."""
    device = next(model.parameters()).device
    ignored_column = torch.full((rows, 1), IGNORE, device=device)

    def step(tokens: Tensor, labels: Tensor) -> Tensor:
        logits = model(tokens, mask=mask(tokens, labels) if mask else None)
        labels = torch.hstack((labels[..., 1:], ignored_column[: labels.shape[0]]))
        if not isinstance(logits, list):
            labels = labels.reshape(-1)
            logits = logits.reshape(-1, logits.size(-1))
        return loss_fn(logits, labels)

    return step


def training_step(step: LossStep, optimizer: torch.optim.Optimizer) -> LossStep:
    def train(tokens: Tensor, labels: Tensor) -> Tensor:
        loss = step(tokens, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return train


def adamw(model: nn.Module, args: Args) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)


def random_tokens(vocabulary: int, args: Args) -> Tensor:
    return torch.randint(vocabulary, (args.batch, args.seq)).to(args.device)


def labels_of(tokens: Tensor, ignored: float, args: Args) -> Tensor:
    labels = labels_like(tokens, ignored, args.seq)
    return labels.masked_fill(padding(tokens, args.padded or 0.0), IGNORE)


def time_and_memory(call: Callable[[], object], tokens: int, args: Args) -> Row:
    """Of a step that has run once."""
    lap_times(call, args.device, args.warmup - 1)
    laps = run_laps(call, args.device, args.steps)
    return {
        "ms": laps.ms,
        "times": laps.times,
        "tokens_per_s": tokens / laps.ms * 1e3,
        "peak_gib": laps.peak_gib,
    }


def rewrites() -> str | None:
    """What liger_fx has replaced in this process, to see that an arm is what it says."""
    if "liger_fx" not in sys.modules:
        return None
    from liger_fx import reports

    counts = sum((Counter(report.counts) for report in reports()), Counter())
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"
