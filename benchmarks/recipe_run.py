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

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import IGNORE, Column, Row, markdown, print_header, progress, write_json
from omegaconf import OmegaConf
from torch import nn
from torchtune import training
from torchtune.models.llama3_2 import llama3_2, llama3_2_1b
from torchtune.modules import TransformerDecoder

HERE = Path(__file__).resolve().parent
VOCABULARY = {"llama3_2_1b": 128_256, "tiny": 512}
DOCUMENTS = (64, 512)  # tokens in a document of packed data, least and most
WARM_UP = 3  # steps, the compiling one included


def tiny() -> TransformerDecoder:
    return llama3_2(
        vocab_size=VOCABULARY["tiny"],
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        intermediate_dim=128,
        max_seq_len=2048,
    )


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


def write_checkpoint(args: argparse.Namespace, folder: Path) -> None:
    """Random weights, small enough that the first loss is about that of guessing. Made on the CPU:
    what this process held of the GPU would be missing to the arms."""
    torch.manual_seed(0)
    with training.set_default_dtype(torch.bfloat16):
        model = llama3_2_1b() if args.model == "llama3_2_1b" else tiny()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    torch.save(model.state_dict(), folder / "w.pt")


def config(args: argparse.Namespace, batch: int, checkpoint: Path, output: Path) -> dict[str, Any]:
    vocabulary = VOCABULARY[args.model]
    component = (
        "recipe_run.tiny" if args.model == "tiny" else "torchtune.models.llama3_2.llama3_2_1b"
    )
    return {
        "output_dir": str(output),
        "seed": 0,
        "device": args.device,
        "dtype": "bf16",
        "model": {"_component_": component},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
            "checkpoint_dir": str(checkpoint),
            "checkpoint_files": ["w.pt"],
            "output_dir": str(output),
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "tokenizer": {"_component_": "recipe_run.NoTokenizer", "max_seq_len": args.seq},
        "dataset": {
            "_component_": "recipe_run.RandomTokens",
            "vocabulary": vocabulary,
            "count": batch * args.processes * (WARM_UP + args.steps),
            "ignored": args.ignored,
            "packed": args.packed,
        },
        "shuffle": False,
        "batch_size": batch,
        "epochs": 1,
        "max_steps_per_epoch": WARM_UP + args.steps,
        "gradient_accumulation_steps": 1,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-4, "fused": True},
        "optimizer_in_bwd": False,
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "clip_grad_norm": None,
        "compile": True,
        "enable_activation_checkpointing": True,
        "enable_activation_offloading": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": str(output),
            "filename": "steps.txt",
        },
        "log_every_n_steps": 1,
        "log_peak_memory_stats": args.device == "cuda",
    }


def measure(args: argparse.Namespace, name: str, batch: int, checkpoint: Path) -> Row:
    arm, row = ARMS[name], {"arm": name, "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        output.mkdir()
        path = Path(folder) / "config.yaml"
        OmegaConf.save(config(args, batch, checkpoint, output), path)
        launch = ["--nproc_per_node", str(args.processes)] if "distributed" in args.recipe else []
        recipe = arm.path.format(recipe=args.recipe)
        command = [sys.executable, "-m", "torchtune._cli.tune", "run", *launch, recipe]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
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
            return row | {"error": f"batch {batch}: out of memory"}
        steps = logged(output / "steps.txt")
        if len(steps) <= WARM_UP:
            return row | {"error": f"batch {batch}: failed\n{done.stdout[-3000:]}"}
    return row | summary(args, batch, steps)


def logged(path: Path) -> list[dict[str, float]]:
    """``Step 3 | loss:1.5 lr:0.001 ...`` of torchtune's DiskLogger, for each step."""
    text = path.read_text() if path.exists() else ""
    lines = re.findall(r"^Step \d+ \| (.*)$", text, re.MULTILINE)
    return [
        {key: float(value) for key, value in (item.rsplit(":", 1) for item in line.split())}
        for line in lines
    ]


def summary(args: argparse.Namespace, batch: int, steps: list[dict[str, float]]) -> Row:
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


def compared(rows: list[Row]) -> list[Row]:
    """Each row with its speed and memory over those of the stock recipe at the same batch."""
    stock = {row["batch"]: row for row in rows if row["arm"] == "torchtune" and "error" not in row}
    for row in rows:
        base = stock.get(row["batch"])
        if base and "error" not in row:
            row["speed"] = row["tokens_per_s"] / base["tokens_per_s"]
            row["memory"] = row["peak_gib"] and row["peak_gib"] / base["peak_gib"]
    return sorted(rows, key=lambda row: row["batch"])


COLUMNS = [
    Column("batch", "batch", "d"),
    Column("arm", "arm"),
    Column("tokens/s per GPU", "tokens_per_s", ",.0f"),
    Column("slowest step", "slowest", ",.0f"),
    Column("fastest step", "fastest", ",.0f"),
    Column("speed of torchtune's", "speed", ".3f"),
    Column("peak GiB", "peak_gib", ".2f"),
    Column("memory of torchtune's", "memory", ".3f"),
    Column("loss", "loss", ".4f"),
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="full_finetune_single_device")
    parser.add_argument("--processes", type=int, default=1, help="of a distributed recipe")
    parser.add_argument("--model", choices=VOCABULARY, default="llama3_2_1b")
    parser.add_argument("--batch", type=int, nargs="+", default=[128], help="sequences a GPU")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--packed", action="store_true", help="documents packed into sequences")
    parser.add_argument("--ignored", type=float, default=0.0, help="share of labels")
    parser.add_argument("--steps", type=int, default=8, help=f"after {WARM_UP} of warm-up")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write every row")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    header = print_header(torch.device(args.device))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(args, Path(folder))
        for batch in args.batch:
            for name in args.arms:
                rows.append(measure(args, name, batch, Path(folder)))
                write_json(args.json, rows, header)  # a run that is cut off keeps what it has
                progress(f"{name}, batch {batch}: {rows[-1].get('error') or 'measured'}")
    print(markdown(compared(rows), COLUMNS))
    write_json(args.json, compared(rows), header)


if __name__ == "__main__":
    main()
