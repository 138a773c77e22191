r"""A whole training step of a Hugging Face decoder: forward, loss, backward, fused AdamW.

    python benchmarks/huggingface_step.py --models llama3_2_1b --ignored 0 0.5
    python benchmarks/huggingface_step.py --models qwen3_0_6b --no-checkpoint --jobs 2
    python benchmarks/huggingface_step.py --models llama3_2_1b --padded 0.4
    python benchmarks/huggingface_step.py --models llama3_2_1b --packed 512
    python benchmarks/huggingface_step.py --models llama3_2_1b --answers 8 --ignored 0.5
    python benchmarks/huggingface_step.py --models tiny --layers 28 --device cpu \
        --batch 2 --seq 64 --jobs 1 --arms inductor liger_fx liger_fx_layers

Models are built from their configurations, in bf16, with random weights and tokens. The first part
of a sequence is the prompt, whose labels are ignored. With ``--padded`` the model is given an
attention mask, as by Trainer's collators, and padding on the right; with ``--packed`` the positions
of documents in one row, as by ``DataCollatorWithFlattening``. With ``--answers 8`` eight sequences
one after the other have the same prompt, as in GRPO, with 2 as a pair of preference. The arms:

    eager           the model as it is
    liger           Liger's own patch of the model, eager
    liger_compiled  the same under ``model.compile()``: here to show its losses
    inductor        ``model.compile()``
    inductor_loss   a function of tokens and labels that returns the loss alone, compiled
    liger_fx        ``model.compile(backend="liger_fx")``
    liger_fx_loss   the function of ``inductor_loss``, with the backend liger_fx
    liger_fx_keep   that of ``liger_fx``, and activation checkpoints keep what attention returns
    liger_fx_recompute  that of ``liger_fx``, under torch's own ``activation_memory_budget``
    liger_fx_layers ``liger_fx.huggingface.compile(model)``: equal layers are compiled once
    liger_fx_offload  the same, and what layers save waits in the host's memory
    liger_fx_unpad  that of ``liger_fx_layers``, and layers see no padding, and a prompt once
    liger_fx_budget  that of ``liger_fx_layers``, and as many layers as the GPU has room for keep
                    their activations

Every arm is a process of its own, with empty caches. All arms of a model compile first, ``--jobs``
at a time; when the last has, they are timed one by one, and each begins with the same weights at
each share of ignored labels. ``losses`` are those of the first steps: where they differ from
eager's, an arm computes something else. An arm that has compiled still holds its weights on the
GPU. One that meets a full GPU while others compile too goes on with compiling when its turn comes,
and its compile time is not known.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import _steps as steps
import torch
from _harness import Args, Benchmark, options, several, side_by_side, with_caches
from _measure import needs_cuda, padding, seconds
from _output import Row, columns
from _steps import LossStep
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

# What the models' config.json say. Trainer turns the cache off.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")


def config(of: Callable[..., Any], *sizes: int, **others: Any) -> Any:
    always = dict(rms_norm_eps=1e-6, tie_word_embeddings=True, use_cache=False)
    return of(**dict(zip(SIZES, sizes, strict=True)) | always | others)


def angles(theta: float, kind: str = "default", **others: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta} | others


LONGER = dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
LONGER |= dict(original_max_position_embeddings=8192)
LLAMA = dict(rms_norm_eps=1e-5, rope_parameters=angles(500_000.0, "llama3", **LONGER))
QWEN = dict(rope_parameters=angles(1_000_000.0))
GEMMA = dict(query_pre_attn_scalar=256, sliding_window=512)  # every sixth layer without a window
GEMMA |= dict(
    rope_parameters=dict(full_attention=angles(1_000_000.0), sliding_attention=angles(10_000.0))
)
CONFIGS = {
    "llama3_2_1b": config(LlamaConfig, 128_256, 2048, 8192, 16, 32, 8, 64, 131_072, **LLAMA),
    "qwen3_0_6b": config(Qwen3Config, 151_936, 1024, 3072, 28, 16, 8, 128, 40_960, **QWEN),
    "gemma3_1b": config(Gemma3TextConfig, 262_144, 1152, 6912, 26, 4, 1, 256, 32_768, **GEMMA),
    "tiny": config(LlamaConfig, 512, 64, 128, 2, 4, 2, 16, 2048),
}

KEEP = "attention.keep_in_checkpoints"


# -- arms ------------------------------------------------------------------------------------------


def eager(model: nn.Module, args: Args) -> LossStep:
    given = collated(args)
    return lambda tokens, labels: model(input_ids=tokens, labels=labels, **given).loss


def collated(args: Args) -> dict[str, Tensor]:
    """What a collator gives beside tokens and labels: [batch, seq], int64."""
    tokens = torch.empty(args.batch, args.seq, dtype=torch.int64)
    if args.padded is not None:
        return {"attention_mask": (~padding(tokens, args.padded)).long().to(args.device)}
    if args.packed is None:
        return {}
    lengths = torch.randint(args.packed // 4, args.packed * 7 // 4, (tokens.numel(),))
    documents = [torch.arange(length) for length in lengths.tolist()]
    return {"position_ids": torch.cat(documents)[: args.seq].expand_as(tokens).to(args.device)}


def compiled_model(backend: str, model: nn.Module, args: Args, **options: Any) -> LossStep:
    model.compile(backend=backend, options=options or None)
    return eager(model, args)


def compiled_loss(backend: str, model: nn.Module, args: Args) -> LossStep:
    return torch.compile(eager(model, args), backend=backend)


def compiled_layers(model: nn.Module, args: Args, **options: Any) -> LossStep:
    from liger_fx import huggingface

    huggingface.compile(model, **options)
    return eager(model, args)


def under_torchs_budget(model: nn.Module, args: Args) -> LossStep:
    torch._functorch.config.activation_memory_budget = 0.8
    return compiled_model("liger_fx", model, args)


def liger(model: nn.Module, args: Args) -> LossStep:
    needs_cuda(args.device, "Liger's patch")
    from liger_kernel.transformers import monkey_patch

    monkey_patch._apply_liger_kernel_to_instance(model)
    return eager(model, args)


def liger_compiled(model: nn.Module, args: Args) -> LossStep:
    liger(model, args)
    return compiled_model("inductor", model, args)


ARMS: dict[str, Callable[[nn.Module, Args], LossStep]] = {
    "eager": eager,
    "liger": liger,
    "liger_compiled": liger_compiled,
    "inductor": partial(compiled_model, "inductor"),
    "inductor_loss": partial(compiled_loss, "inductor"),
    "liger_fx": partial(compiled_model, "liger_fx"),
    "liger_fx_loss": partial(compiled_loss, "liger_fx"),
    "liger_fx_keep": partial(compiled_model, "liger_fx", **{KEEP: True}),
    "liger_fx_recompute": under_torchs_budget,
    "liger_fx_layers": compiled_layers,
    "liger_fx_offload": partial(compiled_layers, offload=True),
    "liger_fx_unpad": partial(compiled_layers, unpad=True),
    "liger_fx_budget": partial(compiled_layers, memory_gib="auto"),
}
UNCOMPILED = ("eager", "liger")


# -- the process of an arm -------------------------------------------------------------------------


def build_model(args: Args) -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[args.model])
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    with args.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if args.checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def tokens_of(args: Args, ignored: float) -> Tensor:
    """int64 [batch, seq]"""
    torch.manual_seed(0)
    tokens = steps.random_tokens(CONFIGS[args.model].vocab_size, args)
    prompt = slice(round(ignored * args.seq))
    for group in tokens.split(args.answers):
        group[1:, prompt] = group[0, prompt]
    return tokens


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


def measure(args: Args) -> Iterator[Row]:
    """A first row when all is compiled; after a line from the parent a row for each share."""
    model = build_model(args)
    step = ARMS[args.arm](model, args)
    initial = [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]
    first = None
    if args.arm not in UNCOMPILED:
        tokens = tokens_of(args, args.ignored[0])
        labels = steps.labels_of(tokens, args.ignored[0], args)
        first = compile_step(model, partial(step, tokens, labels), args.device)
    if args.device.type == "cuda":
        torch.cuda.empty_cache()  # for those that compile now
    yield {"compiled": True}
    sys.stdin.readline()
    for ignored in args.ignored:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), initial, strict=True):
                parameter.copy_(value)
        optimizer = steps.adamw(model, args)
        tokens = tokens_of(args, ignored)
        labels = steps.labels_of(tokens, ignored, args)
        train = partial(steps.training_step(step, optimizer), tokens, labels)
        losses = [train().item() for _ in range(args.warmup)]
        row = steps.time_and_memory(train, tokens.numel(), args)
        yield {
            "checkpoint": args.checkpoint,
            "layers": model.config.num_hidden_layers,
            "ignored": ignored,
            "padded": args.padded,
            "packed": args.packed,
            "answers": args.answers,
            **row,
            "compile_s": first and first - row["ms"] / 1e3,
            "graphs": counters["stats"]["unique_graphs"],
            "losses": losses,
            "rewrites": steps.rewrites(),
        }
        first = None  # later shares compile nothing


# -- all arms --------------------------------------------------------------------------------------


def run(args: Args) -> Iterator[list[Row]]:
    for model in args.models:
        cases = [{"model": model, "arm": arm} for arm in args.arms]
        with tempfile.TemporaryDirectory() as caches:
            yield from side_by_side(
                cases, args.jobs, lambda case: with_caches(f"{caches}/{case['arm']}")
            )


OPTIONS = options(
    __doc__,
    models=several(CONFIGS, [name for name in CONFIGS if name != "tiny"]),
    arms=several(ARMS),
    baseline={"choices": ARMS, "default": "eager", "help": "what speeds are of"},
    batch=8,
    seq=2048,
    layers={"type": int, "help": "instead of the model's own number"},
    answers={"type": int, "default": 1, "help": "sequences with one prompt"},
    jobs=3,
    **steps.STEP,
)
DATA = OPTIONS.add_mutually_exclusive_group()
DATA.add_argument("--padded", type=float, help="share of the tokens that are padding")
DATA.add_argument("--packed", type=int, help="tokens of a document, in the mean")

BENCHMARK = Benchmark(
    OPTIONS,
    run,
    measure=measure,
    columns=columns(
        "model {model} | ignored {ignored:.0%} | arm {arm} | "
        + steps.COLUMNS
        + "cold compile s {compile_s:.1f} | graphs {graphs:d} | losses {losses:.4f} |"
        " rewrites {rewrites}"
    ),
    finish=lambda rows, args: steps.compared_steps(rows, args.baseline, ["model", "ignored"]),
    title="A training step of Hugging Face models, {batch} x {seq}, checkpoints: {checkpoint}",
    panels=steps.panels("{model}, {ignored:.0%} ignored"),
    packages=["transformers"],
)

if __name__ == "__main__":
    BENCHMARK.main()
