"""Every torchtune recipe through the real ``tune run``, on tiny models and real text.

    data = prepare(folder)  # once per session: text, tokenizer, checkpoints
    path = config("lora_finetune_single_device", data, tmp_path, compile=True)
    run("lora_finetune_single_device", path, backend="aot_eager")

The text is the docstrings of Python's standard library (`examples/docstrings.py`). A run gives the
metrics of each step as torchtune logged them, what the processes printed, and the saved weights.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchtune
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune.data import Message

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
sys.path.append(str(EXAMPLES))

import docstrings  # noqa: E402

# -- text ------------------------------------------------------------------------------------------

SOURCES, EXAMPLE_COUNT = 500, 512  # the first files of the standard library give more than enough
MAX_QUESTION, MAX_ANSWER = 80, 120  # characters; together they mostly fit LENGTH tokens
VOCAB, LENGTH, PROMPT_LENGTH = 512, 96, 18  # tokens


class RecipeTokenizer(docstrings.DocstringTokenizer):
    """What every recipe asks of a tokenizer, preference data and packing included.

    It pads in `tokenize_messages`, the one method that all of torchtune's data sets call. ``pad``
    should be off for packing, which puts whole examples behind one another.
    """

    def __init__(self, path: str, max_seq_len: int, pad: bool = True) -> None:
        super().__init__(path, max_seq_len)
        self.pad = pad

    def encode(
        self, text: str, add_bos: bool = False, add_eos: bool = False, **_: bool
    ) -> list[int]:
        return [self.bos_id] * add_bos + super().encode(text) + [self.eos_id] * add_eos

    def tokenize_messages(self, messages: list[Message], **_: bool) -> tuple[list[int], list[bool]]:
        tokens, mask = super().tokenize_messages(messages)
        padding = self.max_seq_len - len(tokens) if self.pad else 0
        return tokens + [self.pad_id] * padding, mask + [True] * padding

    def __call__(self, sample: Mapping[str, list], inference: bool = False) -> dict[str, list]:
        tokens, mask = self.tokenize_messages(sample["messages"])
        return {"tokens": tokens, "mask": mask}


def _write_text(folder: Path) -> None:
    """An instruction set, and a preference set that rejects the answer to another question."""
    everything = folder / "docstrings.jsonl"
    few = docstrings._sources()[:SOURCES]
    with mock.patch.object(docstrings, "_sources", lambda: few):
        docstrings.write_dataset(everything)
    examples = list(itertools.islice(_short(everything), EXAMPLE_COUNT))
    _write_lines(folder / "instruct.jsonl", examples)
    others = [example["answer"] for example in examples[1:] + examples[:1]]
    pairs = [
        {"chosen": _conversation(e, e["answer"]), "rejected": _conversation(e, other)}
        for e, other in zip(examples, others, strict=True)
    ]
    _write_lines(folder / "preference.jsonl", pairs)
    docstrings.train_tokenizer(folder / "instruct.jsonl", folder / "tokenizer.json", VOCAB)


def _short(path: Path) -> Iterator[dict[str, str]]:
    """The examples with a short question, answered by the first paragraph of the docstring."""
    for line in path.open():
        example = json.loads(line)
        answer = example["answer"].split("\n\n")[0]
        if len(example["question"]) <= MAX_QUESTION and len(answer) <= MAX_ANSWER:
            yield example | {"answer": answer}


def _conversation(example: Mapping[str, str], answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": example["question"]},
        {"role": "assistant", "content": answer},
    ]


def _write_lines(path: Path, items: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


# -- models ----------------------------------------------------------------------------------------

SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=64,
    intermediate_dim=128, max_seq_len=128,
)  # fmt: skip
# NF4 takes weights of a multiple of 64 * 256 elements; the smallest here is k_proj, 128 x 256.
WIDE = SMALL | dict(embed_dim=256, intermediate_dim=256)
LORA: dict[str, Any] = dict(
    lora_attn_modules=["q_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, lora_rank=4,
    lora_alpha=8,
)  # fmt: skip

# name of a checkpoint -> module and builder in torchtune.models, sizes
WEIGHTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("llama3_2", "llama3_2", SMALL),
    "untied": ("llama3", "llama3", SMALL),
    "tied_wide": ("llama3_2", "llama3_2", WIDE),
    "teacher": ("llama3", "llama3", SMALL | dict(num_layers=3, embed_dim=128)),
    "classifier": ("llama2", "llama2_classifier", SMALL | dict(num_classes=1)),
}


def _write_checkpoints(folder: Path) -> None:
    for seed, (name, (module, builder, sizes)) in enumerate(WEIGHTS.items()):
        build = getattr(importlib.import_module(f"torchtune.models.{module}"), builder)
        path = folder / name / "model.pt"
        path.parent.mkdir(parents=True)
        torch.save(_initialized(build(**sizes), seed), path)


def _initialized(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Small weights, and norm scales that differ from one another."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.05 * torch.randn(value.shape, generator=generator) + (value.dim() == 1)
        for name, value in model.state_dict().items()
    }


def prepare(folder: Path) -> Path:
    """Write data, tokenizer and checkpoints below ``folder`` unless they are there."""
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder)
        _write_checkpoints(folder / "checkpoints")
        done.touch()
    return folder


# -- configurations --------------------------------------------------------------------------------

STEPS = 20
# Examples behind one another in sequences of one length; for ``config(..., **PACKED)``.
PACKED: dict[str, Any] = {
    "tokenizer": {"max_seq_len": SMALL["max_seq_len"], "pad": False},
    "dataset": {"packed": True},
}


def config(
    recipe: str, data: Path, folder: Path, *, weights: str = "tied", **overrides: Any
) -> Path:
    """A YAML file in ``folder`` for ``recipe``; returns its path.

    data: what `prepare` returned. weights: of the model that is trained, a key of `WEIGHTS`.
    overrides: top-level keys; mappings are merged into what is there.
    """
    settings = OmegaConf.merge(_settings(recipe, data, weights), overrides)
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, prefix=f"{recipe}-", suffix=".yaml", delete=False
    ) as file:
        OmegaConf.save(settings, file)
    return Path(file.name)


def _settings(recipe: str, data: Path, weights: str) -> dict[str, Any]:
    settings = _common(data, weights)
    if "ppo" in recipe:
        return settings | _ppo(data, weights)
    if "lora" in recipe or "knowledge" in recipe:
        settings |= {"model": _model(weights, lora=True), "save_adapter_weights_only": False}
        settings["optimizer"] = _adamw(5e-3)
    if "qat" in recipe:
        settings["quantizer"] = {"_component_": "_recipes.quantizer", "groupsize": 32}
    if "dpo" in recipe:
        settings |= _dpo(data, weights)
    if "knowledge" in recipe:
        settings |= _distillation(data)
    return settings


def _common(data: Path, weights: str) -> dict[str, Any]:
    return {
        "output_dir": "???",  # each run has its own
        "seed": 0,
        "device": "cpu",
        "dtype": "fp32",
        "model": _model(weights),
        "checkpointer": _checkpointer(data, weights),
        "resume_from_checkpoint": False,
        "tokenizer": {
            "_component_": "_recipes.RecipeTokenizer",
            "path": str(data / "tokenizer.json"),
            "max_seq_len": LENGTH,
        },
        "dataset": {
            "_component_": "torchtune.datasets.instruct_dataset",
            "source": "json",
            "data_files": str(data / "instruct.jsonl"),
            "column_map": {"input": "question", "output": "answer"},
            "train_on_input": False,
            "packed": False,
            "split": "train",
        },
        "shuffle": True,
        "batch_size": 4,
        "epochs": 1,
        "max_steps_per_epoch": STEPS,
        "gradient_accumulation_steps": 1,
        "optimizer": _adamw(1e-3),
        "optimizer_in_bwd": False,
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 2,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "clip_grad_norm": None,
        "compile": False,
        "enable_activation_checkpointing": True,
        "enable_activation_offloading": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}",
            "filename": METRICS,
        },
        "log_every_n_steps": 1,
        "log_peak_memory_stats": False,
    }


def _adamw(lr: float) -> dict[str, Any]:
    return {"_component_": "torch.optim.AdamW", "lr": lr}


def _model(weights: str, lora: bool = False) -> dict[str, Any]:
    module, builder, sizes = WEIGHTS[weights]
    prefix, extra = ("lora_", LORA) if lora else ("", {})
    return {"_component_": f"torchtune.models.{module}.{prefix}{builder}", **sizes, **extra}


def _checkpointer(data: Path, weights: str, output: str = "${output_dir}") -> dict[str, Any]:
    return {
        "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
        "checkpoint_dir": str(data / "checkpoints" / weights),
        "checkpoint_files": ["model.pt"],
        "output_dir": output,
        "model_type": "REWARD" if weights == "classifier" else "LLAMA3_2",
    }


def _dpo(data: Path, weights: str) -> dict[str, Any]:
    return {
        "dataset": {
            "_component_": "torchtune.datasets.preference_dataset",
            "source": "json",
            "data_files": str(data / "preference.jsonl"),
            "train_on_input": False,
            "split": "train",
        },
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1},
        "ref_checkpointer": _checkpointer(data, weights),  # of full_dpo_distributed alone
    }


def _distillation(data: Path) -> dict[str, Any]:
    return {
        "teacher_model": _model("teacher"),
        "teacher_checkpointer": _checkpointer(data, "teacher", "${output_dir}/teacher"),
        "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"},
        "kd_ratio": 0.5,
    }


def _ppo(data: Path, weights: str) -> dict[str, Any]:
    """One batch of trajectories is two steps of the optimizer."""
    batch, minibatch = 8, 4
    return {
        "policy_model": _model(weights),
        "reward_and_value_model": _model("classifier"),
        "ref_policy_checkpointer": _checkpointer(data, weights, "${output_dir}/reference"),
        "value_checkpointer": _checkpointer(data, "classifier", "${output_dir}/value"),
        "reward_checkpointer": _checkpointer(data, "classifier", "${output_dir}/reward"),
        "tokenizer": {
            "_component_": "_recipes.RecipeTokenizer",
            "path": str(data / "tokenizer.json"),
            "max_seq_len": PROMPT_LENGTH,
        },
        "dataset": {
            "_component_": "torchtune.datasets.text_completion_dataset",
            "source": "json",
            "data_files": str(data / "instruct.jsonl"),
            "column": "question",
            "add_eos": False,
            "split": "train",
        },
        "batch_size": batch,
        "num_steps": batch * (STEPS // 2),  # counted in prompts
        "ppo_epochs": 1,
        "ppo_batch_size": minibatch,
        "forward_batch_size": minibatch,
        "enable_kv_cache": True,
        "max_generated_tokens": 16,
        "temperature": 0.7,
        "top_k": None,
        "min_response_length": 2,
        "penalise_no_eos": True,
        "reward_penalty": -3,
        # <eos> and thirty more, or an untrained model would seldom stop.
        "stop_token_ids": [2, *range(100, 130)],
        "whiten_rewards": False,
        "gamma": 1,
        "lmbda": 0.95,
        "kl_coeff": 0.01,
        "loss": {
            "_component_": "torchtune.rlhf.loss.PPOLoss",
            "epsilon": 0.2,
            "value_coeff": 0.1,
            "value_clip_range": 0.2,
        },
    }


def quantizer(groupsize: int) -> Any:
    """torchao's quantizer for training. The settings that torchao 0.15 gives are not of the class
    that torchtune 0.6.1 asserts, which is a deprecated subclass now; here they are."""
    from torchao.quantization import qat

    made = qat.Int8DynActInt4WeightQATQuantizer(groupsize=groupsize)
    activation, weight = (
        made.get_activation_fake_quantize_config(),
        made.get_weight_fake_quantize_config(),
    )
    for settings in (activation, weight):
        settings.__class__ = qat.FakeQuantizeConfig
    made.get_activation_fake_quantize_config = lambda: activation
    made.get_weight_fake_quantize_config = lambda: weight
    return made


# -- runs ------------------------------------------------------------------------------------------

METRICS = "metrics.txt"
TIMEOUT = 600  # seconds


class RecipeError(AssertionError):
    """`tune run` failed or took too long; the message ends with what it printed last."""

    def __init__(self, what: str, output: str) -> None:
        super().__init__(f"{what}\n...{_of_workers(output)[-6000:]}")
        self.output = output


def _of_workers(output: str) -> str:
    """Without torchrun's own traceback at the end, which does not say why a worker failed."""
    last = output.rfind("Traceback (most recent call last)")
    return output[:last] if "ChildFailedError" in output[last:] else output


@dataclass(frozen=True)
class Run:
    """What a recipe left behind. metrics: of each step, as logged, without the speeds."""

    output_dir: Path
    output: str
    metrics: list[dict[str, float]]

    def checkpoint(self) -> dict[str, Tensor]:
        """The weights of the last epoch. Adapters have names of their own; PPO's value model is
        below ``value.``"""
        value = self.output_dir / "value"
        return _saved(self.output_dir) | {f"value.{k}": v for k, v in _saved(value).items()}


def _saved(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for epoch in _epochs(folder)[-1:]:
        for file in [*epoch.glob("model-*.bin"), *epoch.glob("adapter_model.pt")]:
            weights |= torch.load(file, weights_only=True)
    return weights


def _epochs(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch_*"), key=lambda path: int(path.name.split("_")[1]))


def run(
    recipe: str,
    config_path: Path,
    *,
    fused: bool = False,
    backend: str | None = None,
    env: Mapping[str, str] | None = None,
    resume: Run | None = None,
) -> Run:
    """``tune run`` the recipe, torchtune's or with ``fused`` liger_fx's of the same name.

    backend: of torchtune's own calls to compile. resume: a run of more than one epoch whose last
    epoch is to be run again, from what it saved before. A distributed recipe has two processes.
    """
    distributed = recipe.endswith("_distributed")
    output_dir = Path(tempfile.mkdtemp(prefix=f"{recipe}-", dir=config_path.parent))
    overrides = _interrupted(resume, output_dir) if resume else []
    launch = ["--nnodes", "1", "--nproc_per_node", "2"] if distributed else []
    variables = environment({"TORCH_COMPILE_BACKEND": backend or "inductor", **(env or {})})
    variables.setdefault("HF_DATASETS_CACHE", str(config_path.parent / "datasets"))
    name = f"liger_fx/recipes/{recipe}" if fused else recipe
    if distributed and OmegaConf.load(config_path).device == "cpu":
        variables[ON_CPU], name = name, Path(__file__).stem
    command = [
        str(Path(sys.executable).parent / "tune"), "run", *launch, name,
        "--config", str(config_path), f"output_dir={output_dir}", *overrides,
    ]  # fmt: skip
    output = _execute(command, variables, cwd=output_dir)
    return Run(output_dir, output, _parse((output_dir / METRICS).read_text()))


def _interrupted(run: Run, folder: Path) -> list[str]:
    """Copy what ``run`` had saved before its last epoch; returns the settings to go on from it.

    torchtune finds the state of the recipe and the adapters there by itself. Weights without an
    adapter should be named; with one it loads those that the run began with.
    """
    for saved in [*_epochs(run.output_dir)[:-1], run.output_dir / "recipe_state"]:
        shutil.copytree(saved, folder / saved.name)
    latest = _epochs(folder)[-1]
    settings = ["resume_from_checkpoint=True"]
    if not (latest / "adapter_model.pt").exists():
        weights = next(latest.glob("model-*.bin")).relative_to(folder)
        settings.append(f"checkpointer.checkpoint_files=[{weights}]")
    return settings


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Of a process that runs a recipe."""
    variables = dict(os.environ)
    variables.pop("TORCH_COMPILE_BACKEND", None)
    paths = [str(HERE), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    return (
        variables
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
            "HF_HUB_OFFLINE": "1",
        }
        | dict(changes)
    )


def _execute(command: list[str], env: Mapping[str, str], cwd: Path) -> str:
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(
            command, env=env, cwd=cwd, stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(TIMEOUT)
        except BaseException as e:
            _end(process)
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            code = None
        printed.seek(0)
        output = printed.read()
    if code != 0:
        how = f"took more than {TIMEOUT} s" if code is None else f"ended with {code}"
        raise RecipeError(f"{' '.join(command)}\n{how}", output)
    return output


def _end(process: subprocess.Popen[bytes]) -> None:
    """torchrun ends its workers when it is asked to end; it cannot when it is killed."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    process.kill()
    process.wait()


def _parse(text: str) -> list[dict[str, float]]:
    """``Step 3 | loss:1.5 lr:0.001 tokens_per_second_per_gpu:17`` for each step."""
    steps = []
    for step, line in re.findall(r"^Step (\d+) \| (.*)$", text, re.MULTILINE):
        pairs = (item.rsplit(":", 1) for item in line.split())
        values = {name: float(value) for name, value in pairs if "per_second" not in name}
        steps.append({"step": float(step)} | values)
    return steps


# -- distributed recipes on a CPU ------------------------------------------------------------------

ON_CPU = "RECIPE_ON_CPU"


def answer_for_a_gpu() -> None:
    """torchtune 0.6.1 cannot run distributed recipes on a CPU: most ask for NCCL whatever the device
    is, and all ask for the GPU's memory in use and empty its cache. From here on these calls are
    answered, in this process alone."""
    from torchtune import training

    start = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda *_, **__: start("gloo")
    unused = dict.fromkeys(("peak_memory_active", "peak_memory_alloc", "peak_memory_reserved"), 0)
    training.get_memory_stats = lambda device: unused
    training.cleanup_before_training = lambda: None


def _run_on_cpu(recipe: str) -> None:
    """What ``tune run`` starts in place of a distributed recipe whose device is a CPU."""
    answer_for_a_gpu()
    if "/" in recipe:
        runpy.run_module(recipe.replace("/", "."), run_name="__main__")
    else:
        path = Path(torchtune.__file__).parent.parent / "recipes" / f"{recipe}.py"
        runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    _run_on_cpu(os.environ[ON_CPU])
