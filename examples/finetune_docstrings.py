"""Fine-tune a Llama on docstrings, first with torchtune's recipe, then with liger_fx's.

Both runs are `tune run` with one configuration, one seed and one order of the data; each is a
fresh process with a cold compile cache. At the end: a table, and a picture of both.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# Read by what is imported below, and by both runs.
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # there are bars of our own
os.environ["HF_HUB_OFFLINE"] = "1"  # the data set is a local file: no server need be asked
os.environ["TORCHAO_FORCE_SKIP_LOADING_SO_FILES"] = "1"  # no warning about kernels not used here

import matplotlib.pyplot as plt
import torch
from docstrings import DocstringTokenizer, train_tokenizer, write_dataset
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from tqdm import tqdm

EXAMPLES = Path(__file__).resolve().parent
CONFIG = EXAMPLES / "finetune_docstrings.yaml"
RECIPE = "full_finetune_single_device"

# The shape of Llama-3.2-1B. The tokenizer stays as small as on a CPU: the text fills no more.
CUDA_SIZES = [
    "dtype=bf16",
    "batch_size=64",
    "optimizer.lr=1e-4",
    "model.vocab_size=128256",
    "model.num_layers=16",
    "model.num_heads=32",
    "model.num_kv_heads=8",
    "model.embed_dim=2048",
    "model.intermediate_dim=8192",
]

WARM_UP = 3  # steps that compile and settle: not counted in the speed
TOLERANCE = 1e-3  # of every step's loss, relative, in fp32


@dataclass(frozen=True)
class Arm:
    """One of the two runs; ``output`` names its folder."""

    name: str
    recipe: str
    output: str
    color: str


ARMS = (
    Arm("torchtune", RECIPE, "torchtune", "#888888"),
    Arm("liger_fx", f"liger_fx/recipes/{RECIPE}", "liger_fx", "#d1495b"),
)


@dataclass(frozen=True)
class Result:
    """What one run logged, a value for each step."""

    losses: list[float]
    seconds: list[float]
    peak_gib: list[float]

    @classmethod
    def read(cls, path: Path) -> "Result":
        lines = path.read_text().splitlines() if path.exists() else []
        steps = [json.loads(line) for line in lines]
        ends = [0.0] + [step["seconds"] for step in steps]
        return cls(
            losses=[step["loss"] for step in steps],
            seconds=[end - start for start, end in pairwise(ends)],
            peak_gib=[step["peak_bytes"] / 2**30 for step in steps],
        )

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds[WARM_UP:])

    @property
    def compile_seconds(self) -> float:
        return sum(self.seconds[:WARM_UP]) - WARM_UP * self.step_seconds


def main() -> int:
    args = parse_args()
    work = args.output.resolve()
    os.environ["HF_DATASETS_CACHE"] = str(work / "datasets")
    overrides = [
        *(CUDA_SIZES if args.device == "cuda" else []),
        f"work={work}",
        f"device={args.device}",
        f"seed={args.seed}",
        f"max_steps_per_epoch={args.steps}",
    ]
    cfg = OmegaConf.merge(OmegaConf.load(CONFIG), OmegaConf.from_dotlist(overrides))
    prepare(cfg)
    if args.prepare:
        return 0
    results = [run(arm, cfg, overrides) for arm in ARMS]
    return report(cfg, *results)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    parser.add_argument("--prepare", action="store_true", help="write data and weights, and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="work folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    args = parser.parse_args()
    if args.steps < WARM_UP + 2:
        parser.error(f"--steps must be at least {WARM_UP + 2}: {WARM_UP} are warm-up")
    return args


def prepare(cfg: DictConfig) -> None:
    """Write what the configuration names: the data and tokenizer once, the checkpoint anew."""
    dataset, tokenizer = Path(cfg.dataset.data_files), Path(cfg.tokenizer.path)
    Path(cfg.checkpointer.checkpoint_dir).mkdir(parents=True, exist_ok=True)
    write_once(dataset, write_dataset)
    vocab_size = OmegaConf.load(CONFIG).model.vocab_size
    write_once(tokenizer, lambda path: train_tokenizer(dataset, path, vocab_size))
    write_checkpoint(cfg)
    describe(cfg)


def write_once(path: Path, write: Callable[[Path], None]) -> None:
    """Write ``path`` if it is missing, in one piece: an interrupted run leaves no half of it."""
    if not path.exists():
        print(f"Writing {path.name} (first use)", flush=True)
        part = path.with_name(path.name + ".part")
        write(part)
        part.rename(path)


def write_checkpoint(cfg: DictConfig) -> None:
    """A random start for both runs, since stock recipes begin from a checkpoint."""
    torch.manual_seed(cfg.seed)
    with training.set_default_dtype(training.get_dtype(cfg.dtype)):
        model = config.instantiate(cfg.model)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # the scales of the norms stay at one
            torch.nn.init.normal_(parameter, std=0.02)
    checkpointer = cfg.checkpointer
    path = Path(checkpointer.checkpoint_dir) / checkpointer.checkpoint_files[0]
    torch.save(model.state_dict(), path)


def describe(cfg: DictConfig) -> None:
    """Print what is trained on, above all how many labels are ignored."""
    tokenizer: DocstringTokenizer = config.instantiate(cfg.tokenizer)
    dataset = config.instantiate(cfg.dataset, tokenizer)
    samples = [dataset[i] for i in range(0, len(dataset), 10)]
    positions = len(samples) * tokenizer.max_seq_len
    ignored = sum(s["labels"].count(CROSS_ENTROPY_IGNORE_IDX) for s in samples) / positions
    padding = sum(s["tokens"].count(tokenizer.pad_id) for s in samples) / positions
    model = cfg.model
    print(
        f"Data     {len(dataset):,} questions and answers from docstrings\n"
        f"Labels   {ignored:.0%} ignored: prompt {ignored - padding:.0%}, padding {padding:.0%}\n"
        f"Model    Llama, {model.num_layers} layers of {model.embed_dim}, "
        f"vocabulary {model.vocab_size:,}, {cfg.dtype} on {cfg.device}\n"
        f"Batch    {cfg.batch_size} x {tokenizer.max_seq_len} tokens, "
        f"{cfg.max_steps_per_epoch} steps\n",
        flush=True,
    )


def run(arm: Arm, cfg: DictConfig, overrides: list[str]) -> Result:
    """Fine-tune in a fresh process, with a progress bar."""
    output = Path(cfg.work) / arm.output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    tune = [sys.executable, "-m", "torchtune._cli.tune"]  # `tune`, wherever it was installed
    command = [*tune, "run", arm.recipe, "--config", CONFIG, *overrides, f"output_dir={output}"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]),
        "TORCHINDUCTOR_CACHE_DIR": str(output / "compiled"),
    }
    environment.pop("TORCH_COMPILE_BACKEND", None)  # Inductor for torchtune, whatever was set
    log, steps = output / "log.txt", output / "steps.jsonl"
    with log.open("w") as file:
        print(shlex.join(map(str, command)), file=file, flush=True)
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            show_progress(arm, process, steps, cfg)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        last = "\n".join(log.read_text().splitlines()[-40:])
        sys.exit(f"{last}\n\nThe run of {arm.name} failed; its whole log is in {log}")
    return Result.read(steps)


def show_progress(arm: Arm, process: subprocess.Popen, path: Path, cfg: DictConfig) -> None:
    """Follow the log of the steps until the process ends."""
    tokens = cfg.batch_size * cfg.tokenizer.max_seq_len
    layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"
    with tqdm(total=cfg.max_steps_per_epoch, desc=f"{arm.name:9}", bar_format=layout) as bar:
        bar.set_postfix_str("loading, compiling")
        running = True
        while running:
            time.sleep(0.2)
            running = process.poll() is None
            result = Result.read(path)
            if len(result.losses) > bar.n:
                bar.set_postfix_str(
                    f"loss {result.losses[-1]:.3f}, {tokens / result.seconds[-1]:,.0f} tokens/s, "
                    f"{result.peak_gib[-1]:.2f} GiB",
                    refresh=False,
                )
                bar.update(len(result.losses) - bar.n)


def report(cfg: DictConfig, stock: Result, fused: Result) -> int:
    """Print the table, draw the picture; the exit status says whether the losses agree."""
    differences = [abs(b - a) / abs(a) for a, b in zip(stock.losses, fused.losses, strict=True)]
    worst = max(differences)
    # All of them, not the largest: max() can step over a NaN.
    agree = cfg.dtype != "fp32" or all(d <= TOLERANCE for d in differences)
    verdict = f"{'PASS' if agree else 'FAIL'}: the limit is {TOLERANCE:g}"
    print(
        f"\n{table(cfg, stock, fused)}\n{noise(stock, fused)}"
        f"\nRewrites made      {rewrites(cfg)}"
        f"\nLoss difference    {worst:.1e} relative at most, in step "
        f"{differences.index(worst) + 1} ({verdict if cfg.dtype == 'fp32' else cfg.dtype})"
        f"\nPicture            {draw(cfg, (stock, fused), worst)}"
    )
    return 0 if agree else 1


def table(cfg: DictConfig, stock: Result, fused: Result) -> str:
    tokens = cfg.batch_size * cfg.tokenizer.max_seq_len

    def row(label: str, form: str, value: Callable[[Result], float], ratio: bool = True) -> str:
        a, b = value(stock), value(fused)
        end = f"{b / a:9.2f}x" if ratio else ""
        return f"{label:32}{format(a, form):>12}{format(b, form):>12}{end}"

    return "\n".join(
        [
            f"{'':32}{ARMS[0].name:>12}{ARMS[1].name:>12}{'ratio':>10}",
            row("loss, first step", ".4f", lambda r: r.losses[0], ratio=False),
            row("loss, last step", ".4f", lambda r: r.losses[-1], ratio=False),
            row("tokens/s (1)", ",.0f", lambda r: tokens / r.step_seconds),
            row(f"peak memory, {memory_kind(cfg)}, GiB", ".2f", lambda r: max(r.peak_gib)),
            row("compile seconds (2)", ".1f", lambda r: r.compile_seconds),
            f"(1) median step after {WARM_UP} of warm-up; every token counts, ignored or not",
            f"(2) loading and the first {WARM_UP} steps, less {WARM_UP} median steps; caches empty",
        ]
    )


def noise(*results: Result) -> str:
    """A warning where steps of one run differ so much that another program must have run."""
    lines = []
    for arm, result in zip(ARMS, results, strict=True):
        fastest, *_, slowest = sorted(result.seconds[WARM_UP:])
        if slowest > 2 * fastest:
            lines.append(
                f"The machine was not quiet: steps of {arm.name} took {fastest:.2f} to "
                f"{slowest:.2f} s. Do not trust the speeds.\n"
            )
    return "".join(lines)


def memory_kind(cfg: DictConfig) -> str:
    return "allocated" if cfg.device == "cuda" else "resident"


def rewrites(cfg: DictConfig) -> str:
    """What liger_fx replaced, over all the graphs of its run."""
    path = Path(cfg.work) / ARMS[1].output / "liger_fx_report.json"
    counts: Counter[str] = Counter()
    for graph in json.loads(path.read_text()):
        counts.update(graph["counts"])
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"


def draw(cfg: DictConfig, results: tuple[Result, Result], worst: float) -> Path:
    """Both loss curves and both memory curves."""
    plt.switch_backend("Agg")  # no display is needed
    figure, (loss, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = ({"lw": 5, "alpha": 0.45}, {"lw": 1.5})  # the thin line lies on the thick one
    for arm, result, style in zip(ARMS, results, styles, strict=True):
        steps = range(1, len(result.losses) + 1)
        loss.plot(steps, result.losses, color=arm.color, label=arm.name, **style)
        memory.plot(steps, result.peak_gib, color=arm.color, lw=2)
        memory.annotate(
            f"{arm.name}  {max(result.peak_gib):.2f} GiB",
            (steps[-1], max(result.peak_gib)),
            xytext=(0, 6),
            textcoords="offset points",
            ha="right",
            color=arm.color,
            weight="bold",
        )
    loss.set(title=f"Loss: largest relative difference {worst:.0e}", xlabel="step")
    loss.legend(frameon=False)
    memory.set(title=f"Peak memory of each step, {memory_kind(cfg)}, GiB", xlabel="step")
    memory.set_ylim(0, 1.15 * max(max(r.peak_gib) for r in results))
    for axes in (loss, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    model = cfg.model
    figure.suptitle(
        f"Fine-tuning a Llama ({model.num_layers} layers of {model.embed_dim}, vocabulary "
        f"{model.vocab_size:,}) with torchtune, {cfg.dtype} on {cfg.device}",
        fontsize=11,
    )
    path = Path(cfg.work) / "curves.png"
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    sys.exit(main())
