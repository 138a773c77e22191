"""Axolotl and LLaMA-Factory: their own entry points on a tiny model, with liger_fx as their plug-in
interfaces take it. Each pins versions of its own, and wants an environment of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import liger_fx
from liger_fx.deferred import materialized

pytestmark = pytest.mark.integrations
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from _trainer import arguments, language_model, losses, samples, tokenizer  # noqa: E402

from liger_fx.huggingface import LigerFxCallback  # noqa: E402

LORA = ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("LIGER_FX_INNER", "aot_eager")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")


@pytest.fixture
def folder(tmp_path) -> Path:
    """With a model, its tokenizer and text."""
    language_model(max_position_embeddings=64).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    texts = [" ".join(map(str, sample["input_ids"])) for sample in samples(16, 16, 12)]
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    turns = [{"instruction": text[:20], "input": "", "output": text[20:]} for text in texts]
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    (tmp_path / "dataset_info.json").write_text('{"turns": {"file_name": "turns.json"}}')
    return tmp_path


def assert_fused(ours: list[float], stock: list[float], before: int) -> None:
    assert len(ours) == 4 and ours == pytest.approx(stock, rel=1e-5)
    # Some of their patches break the graph of a layer, none that of the head.
    assert "linear_cross_entropy" in liger_fx.Report.merged(liger_fx.reports()).counts
    assert materialized() == before


def test_accelerate_takes_no_other_backend(tmp_path):
    """What both hosts pass on as `torch_compile_backend`; without this error they need no callback."""
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="liger_fx")
    with pytest.raises(ValueError, match="'LIGER_FX' is not a valid DynamoBackend"):
        transformers.Trainer(language_model(), args, train_dataset=samples(2))


# -- Axolotl ---------------------------------------------------------------------------------------


def axolotl(folder: Path, **settings: Any) -> list[float]:
    import yaml
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import train

    torch._dynamo.reset()
    transformers.set_seed(1)  # of the adapters
    PluginManager.get_instance().plugins.clear()
    data = dict(path=str(folder / "texts.jsonl"), type="completion", field="text", ds_type="json")
    config = dict(
        base_model=str(folder / "model"),
        datasets=[data],
        dataset_num_proc=1,
        dataset_prepared_path=str(folder / "prepared"),
        output_dir=str(folder / "out"),
        special_tokens=dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"),
        attn_implementation="sdpa",
        sequence_len=32,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        num_epochs=1,
        optimizer="adamw_torch",
        lr_scheduler="constant",
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        val_set_size=0,
        bf16=False,
        fp16=False,
        tf32=False,
        seed=1,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config | settings))
    cfg = load_cfg(str(folder / "config.yaml"))
    meta = load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    return losses(train(cfg=cfg, dataset_meta=meta)[2])


PLUGIN = ["liger_fx.axolotl.LigerFxPlugin"]


@pytest.mark.parametrize(
    "settings",
    [{}, dict(adapter="lora", lora_r=4, lora_alpha=8, lora_target_modules=LORA)],
    ids=["full", "lora"],
)
def test_axolotl(settings, folder):
    pytest.importorskip("axolotl")
    stock, before = axolotl(folder, **settings), materialized()
    assert_fused(axolotl(folder, plugins=PLUGIN, **settings), stock, before)


def test_axolotl_compiles_once(folder):
    pytest.importorskip("axolotl")
    with pytest.raises(ValueError, match="torch_compile is set beside LigerFxPlugin"):
        axolotl(folder, plugins=PLUGIN, torch_compile=True)


# -- LLaMA-Factory ---------------------------------------------------------------------------------


def llama_factory(folder: Path, *callbacks: Any, **settings: Any) -> list[float]:
    from llamafactory.train.tuner import run_exp

    torch._dynamo.reset()
    transformers.set_seed(1)
    out = folder / ("ours" if callbacks else "stock")
    config = dict(
        stage="sft",
        do_train=True,
        model_name_or_path=str(folder / "model"),
        dataset="turns",
        dataset_dir=str(folder),
        template="empty",
        cutoff_len=32,
        output_dir=str(out),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=1,
    )
    run_exp(config | settings, callbacks=list(callbacks))
    state = json.loads((out / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
def test_llama_factory(finetuning_type, folder):
    pytest.importorskip("llamafactory.train.tuner", exc_type=ImportError)
    settings = dict(finetuning_type=finetuning_type, disable_gradient_checkpointing=True)
    stock, before = llama_factory(folder, **settings), materialized()
    assert_fused(llama_factory(folder, LigerFxCallback(), **settings), stock, before)
