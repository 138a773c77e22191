"""A torchtune recipe through ``tune run``: stock under Inductor, stock with liger_fx as the
backend, and liger_fx's own form of it.

    python benchmarks/recipe_run.py --batch 128 --packed
    python benchmarks/recipe_run.py --recipe full_finetune_distributed --processes 2 --batch 128
    python benchmarks/recipe_run.py --batch 512 640 768 --steps 3     # what fits

Random weights and tokens, bf16, fused AdamW, activation checkpointing. Every arm is a run of its
own with empty compile caches. Speeds are those that the recipe logs, over all tokens, ignored or
not; the memory is what PyTorch allocated at most on the first GPU. In packed data the ignored share
is rounded for each document, so a speed may be off by half a percent, the same in every arm.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _harness import Args, Benchmark, compared, options, several, with_caches
from _measure import IGNORE
from _output import Panel, Row, columns
from _steps import LLAMAS, llama, random_model
from omegaconf import OmegaConf

HERE = Path(__file__).resolve().parent
DOCUMENTS = (64, 512)  # tokens in a document of packed data, least and most
WARM_UP = 3  # steps, the compiling one included


class NoTokenizer:
    """All that a recipe asks of a tokenizer when the data are tokens already."""

    pad_id = 0

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len


class RandomTokens(torch.utils.data.Dataset):
    """``count`` sequences of ``length`` tokens, the first ``ignored`` share of each document
    ignored. Packed, a sequence is several documents, as torchtune's PackedDataset returns it."""

    def __init__(
        self,
        tokenizer: NoTokenizer,
        vocabulary: int,
        count: int,
        ignored: float,
        packed: bool = False,
    ) -> None:
        self.length, self.vocabulary = tokenizer.max_seq_len, vocabulary
        self.count, self.ignored, self.packed = count, ignored, packed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, self.vocabulary, (self.length,), generator=random)
        lengths = self._documents(random) if self.packed else [self.length]
        position = torch.cat([torch.arange(n) for n in lengths])
        share = torch.cat([torch.arange(n) / n for n in lengths])
        labels = tokens.masked_fill(share < self.ignored, IGNORE)
        if not self.packed:
            return {"tokens": tokens.tolist(), "labels": labels.tolist()}
        lengths = torch.tensor(lengths)
        return {"tokens": tokens, "labels": labels, "input_pos": position, "seq_lens": lengths}

    def _documents(self, random: torch.Generator) -> list[int]:
        lengths: list[int] = []
        while (left := self.length - sum(lengths)) > 0:
            lengths.append(min(left, int(torch.randint(*DOCUMENTS, (1,), generator=random))))
        return lengths


class Arm(NamedTuple):
    """The recipe's path, and the backend of torchtune's own calls to compile."""

    path: str
    backend: str = "inductor"


ARMS = {
    "torchtune": Arm("{recipe}"),
    "torchtune, liger_fx by name": Arm("{recipe}", "liger_fx"),
    "liger_fx recipe": Arm("liger_fx/recipes/{recipe}"),
}


def write_checkpoint(model: str, folder: Path) -> None:
    """Random weights, made on the CPU: what this process held of the GPU would be missing to the
    arms."""
    weights = random_model(lambda: llama(model), torch.device("cpu")).state_dict()
    torch.save(weights, folder / "w.pt")


CONFIG = """
output_dir: {output}
seed: 0
device: {device}
dtype: bf16
model: {{_component_: _steps.llama, model: {model}}}
checkpointer:
  _component_: torchtune.training.FullModelTorchTuneCheckpointer
  checkpoint_dir: {checkpoint}
  checkpoint_files: [w.pt]
  output_dir: {output}
  model_type: LLAMA3_2
resume_from_checkpoint: false
tokenizer: {{_component_: recipe_run.NoTokenizer, max_seq_len: {seq}}}
dataset:
  _component_: recipe_run.RandomTokens
  vocabulary: {vocabulary}
  count: {count}
  ignored: {ignored}
  packed: {packed}
shuffle: false
batch_size: {batch}
epochs: 1
max_steps_per_epoch: {most}
gradient_accumulation_steps: 1
optimizer: {{_component_: torch.optim.AdamW, lr: 1.0e-4, fused: true}}
optimizer_in_bwd: false
loss: {{_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}}
clip_grad_norm: null
compile: true
enable_activation_checkpointing: true
enable_activation_offloading: false
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: {output}
  filename: steps.txt
log_every_n_steps: 1
log_peak_memory_stats: {on_gpu}
"""


def config(args: Args, batch: int, checkpoint: Path, output: Path) -> Any:
    given = vars(args) | {"batch": batch, "checkpoint": checkpoint, "output": output}
    given |= {"vocabulary": LLAMAS[args.model][0], "on_gpu": args.device.type == "cuda"}
    given |= {"most": WARM_UP + args.steps}
    given |= {"count": batch * args.processes * given["most"]}
    return OmegaConf.create(CONFIG.format_map(given))


def measure(args: Args, name: str, batch: int, checkpoint: Path) -> Row:
    arm, row = ARMS[name], {"arm": name, "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        output.mkdir()
        path = Path(folder) / "config.yaml"
        OmegaConf.save(config(args, batch, checkpoint, output), path)
        launch = ["--nproc_per_node", str(args.processes)] if "distributed" in args.recipe else []
        recipe = arm.path.format(recipe=args.recipe)
        command = [sys.executable, "-m", "torchtune._cli.tune", "run", *launch, recipe]
        environment = with_caches(folder) | {
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
            "TORCH_COMPILE_BACKEND": arm.backend,
        }
        done = subprocess.run(
            [*command, "--config", str(path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if "OutOfMemoryError" in done.stdout:
            return row | {"error": "out of memory"}
        steps = logged(output / "steps.txt")
        if len(steps) <= WARM_UP:
            return row | {"error": f"failed\n{done.stdout[-3000:]}"}
    return row | summary(args, steps)


def logged(path: Path) -> list[dict[str, float]]:
    """``Step 3 | loss:1.5 lr:0.001 ...`` of torchtune's DiskLogger, for each step."""
    text = path.read_text() if path.exists() else ""
    lines = re.findall(r"^Step \d+ \| (.*)$", text, re.MULTILINE)
    return [
        {key: float(value) for key, value in (item.rsplit(":", 1) for item in line.split())}
        for line in lines
    ]


def summary(args: Args, steps: list[dict[str, float]]) -> Row:
    """The recipe logs tokens that count for the loss; a step takes the same time for all."""
    counted = 1 - round(args.ignored * args.seq) / args.seq
    speeds = [step["tokens_per_second_per_gpu"] / counted for step in steps[WARM_UP:]]
    peaks = [step["peak_memory_alloc"] for step in steps if "peak_memory_alloc" in step]
    return {
        "tokens_per_s": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "peak_gib": max(peaks, default=None),
        "loss": steps[-1]["loss"],
        "losses": [step["loss"] for step in steps],
    }


def run(args: Args) -> Iterator[list[Row]]:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(args.model, Path(folder))
        for batch in args.batch:
            for name in args.arms:
                yield [measure(args, name, batch, Path(folder))]


BENCHMARK = Benchmark(
    options(
        __doc__,
        recipe="full_finetune_single_device",
        processes={"type": int, "default": 1, "help": "of a distributed recipe"},
        model={"choices": LLAMAS, "default": "llama3_2_1b"},
        batch=[128],
        seq=512,
        packed={"action": "store_true", "help": "documents packed into sequences"},
        ignored={"type": float, "default": 0.0, "help": "share of labels"},
        steps={"type": int, "default": 8, "help": f"after {WARM_UP} of warm-up"},
        arms=several(ARMS),
    ),
    run,
    columns=columns(
        "batch {batch:d} | arm {arm} | tokens/s per GPU {tokens_per_s:,.0f} |"
        " slowest step {slowest:,.0f} | fastest step {fastest:,.0f} |"
        " speed of torchtune's {speed:.3f} | peak GiB {peak_gib:.2f} |"
        " memory of torchtune's {memory:.3f} | loss {loss:.4f}"
    ),
    finish=lambda rows, args: compared(
        rows, "torchtune", ["batch"], speed="tokens_per_s", memory="peak_gib"
    ),
    title="{recipe}",
    panels=[
        Panel("tokens a second and GPU", "tokens_per_s", "batch {batch}", ",.0f"),
        Panel("GiB allocated at most", "peak_gib", "batch {batch}", ".2f"),
    ],
)

if __name__ == "__main__":
    BENCHMARK.main()
