"""Hugging Face's Trainer and what is built on it, compiled with liger_fx: losses and metrics are
eager's, a training step never makes the logits, and there are no more graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _util import relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters

import liger_fx
from liger_fx.deferred import materialized

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from _trainer import (  # noqa: E402
    VOCABULARY,
    arguments,
    collator,
    language_model,
    losses,
    samples,
    settings,
    tokenizer,
)
from transformers import Trainer  # noqa: E402

from liger_fx import huggingface  # noqa: E402
from liger_fx.huggingface import LigerFxCallback, LigerFxPlugin, defer_logits  # noqa: E402

integrations = pytest.mark.integrations
STEPS, EVALUATIONS = 4, 2
# Small chunks, as a head whose logits fit one is not fused where no gradient is needed.
OPTIONS = {"inner": "aot_eager", "linear_cross_entropy.chunk_tokens": 8}


@dataclass
class Run:
    losses: list[float]
    metrics: dict[str, float]
    read: tuple[int, int]  # how often logits were made, in training and in evaluation
    graphs: dict[str, int]
    updates: dict[str, Tensor]  # of the parameters, in all steps


def likelihood(evaluated: Any) -> dict[str, float]:
    """What `compute_metrics` makes of logits [samples, tokens, V]."""
    logits, labels = map(torch.from_numpy, (evaluated.predictions, evaluated.label_ids))
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])
    return {"likelihood": logprobs.mean().item()}


def run(
    folder: Path,
    backend: Any = None,
    model: Callable[[], nn.Module] = language_model,
    trainer: type[Trainer] = Trainer,
    lengths: tuple[int, ...] = (),
    compute_metrics: Any = None,
    resume: str | None = None,
    by_layers: bool = False,
    unpad: bool = False,
    **args: Any,
) -> Run:
    torch._dynamo.reset()
    liger_fx.clear_reports()
    counters.clear()
    made = model()
    start = {name: p.detach().clone() for name, p in made.named_parameters()}
    if backend is not None:
        made.compile(backend=backend)
    if by_layers:
        liger_fx.huggingface.compile(made, unpad=unpad, **OPTIONS)
    trained = trainer(
        made,
        arguments(folder, **args),
        collator(),
        samples(16, *lengths),
        samples(4),
        compute_metrics=compute_metrics,
    )
    before = materialized()
    trained.train(resume_from_checkpoint=resume)
    between = materialized()
    metrics = trained.evaluate()
    read = between - before, materialized() - between
    graphs = {kind: dict(counters[kind]) for kind in ("frames", "graph_break")}
    graphs["stats"] = counters["stats"]["unique_graphs"]
    return Run(
        losses(trained),
        {name: metrics[name] for name in metrics if name in ("eval_loss", "eval_likelihood")},
        read,
        graphs,
        {name: p.detach().cpu() - start[name] for name, p in made.named_parameters()},
    )


def compare(folder: Path, tolerance: float = 1e-5, **case: Any) -> Run:
    """The run under liger_fx, equal to eager's, with as many graphs as with a backend that does
    nothing."""
    eager, plain = (run(folder, backend, **case) for backend in (None, "eager"))
    fused = run(folder, liger_fx.backend(**OPTIONS), **case)
    assert len(fused.losses) == len(eager.losses) > 0
    assert fused.losses == pytest.approx(eager.losses, rel=tolerance)
    assert fused.metrics == pytest.approx(eager.metrics, rel=tolerance)
    assert fused.updates.keys() == eager.updates.keys()
    for name, update in fused.updates.items():
        assert relative_error(update, eager.updates[name]) <= 30 * tolerance, name
    assert fused.graphs == plain.graphs
    return fused


def fused_heads() -> list[int]:
    """For each graph, how many heads were fused with their loss."""
    return [report.counts.get("linear_cross_entropy", 0) for report in liger_fx.reports()]


def test_trainer(tmp_path):
    fused = compare(tmp_path)
    assert fused_heads() == [1, 1] and fused.read == (0, 0)
    assert len(liger_fx.reports()[0].deferred) == 1


CASES: dict[str, dict[str, Any]] = {
    "bf16": dict(bf16=True, tolerance=2e-3),
    "accumulation": dict(gradient_accumulation_steps=2),
    "checkpointing": dict(gradient_checkpointing=True),
    "padding": dict(lengths=(16, 14, 12, 9)),
    "tied": dict(model=lambda: language_model(tie_word_embeddings=True)),
    "all": dict(
        bf16=True,
        tolerance=2e-3,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        lengths=(16, 12),
        model=lambda: language_model(tie_word_embeddings=True),
    ),
}


@integrations
@pytest.mark.parametrize("case", CASES)
def test_settings_of_trainer(case, tmp_path):
    fused = compare(tmp_path, compute_metrics=likelihood, **CASES[case])
    assert set(fused_heads()) == {1}
    assert fused.read == (0, EVALUATIONS)  # whose logits `compute_metrics` gets


class ZLoss(Trainer):
    """Reads logits by their rows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + 0.1 * outputs.logits.float().logsumexp(-1).pow(2).mean()
        return (loss, outputs) if return_outputs else loss


class Penalty(Trainer):
    """Reads the values of all logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + outputs.logits.sin().abs().mean()
        return (loss, outputs) if return_outputs else loss


class OwnLoss(Trainer):
    """As in the documentation: the model gets no labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY).float()
        loss = F.cross_entropy(logits, labels[:, 1:].reshape(-1))
        return (loss, outputs) if return_outputs else loss


@integrations
@pytest.mark.parametrize(
    ("trainer", "heads", "read"),
    [(ZLoss, {1}, 0), (Penalty, {1}, STEPS + EVALUATIONS), (OwnLoss, {0}, 0)],
)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_compute_loss_that_reads_logits(trainer, heads, read, bf16, tmp_path):
    fused = compare(tmp_path, 5e-3 if bf16 else 1e-5, trainer=trainer, bf16=bf16)
    assert set(fused_heads()) == heads and sum(fused.read) == read


@integrations
def test_label_smoothing(tmp_path):
    """Trainer computes this loss itself, of logits that are all that the model returns."""
    compare(tmp_path, label_smoothing_factor=0.1)
    assert set(fused_heads()) == {0} and not any(r.deferred for r in liger_fx.reports())


@integrations
def test_evaluation_of_the_loss_alone(tmp_path):
    assert compare(tmp_path, prediction_loss_only=True).read == (0, 0)


@integrations
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "lm_head"]])
def test_lora(targets, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    # It raises where torchao is as old as torchtune wants it.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)

    def adapted() -> nn.Module:
        base = language_model()
        return peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, r=4))

    fused = compare(tmp_path, 2e-5, model=adapted)
    assert fused.read == (0, 0)
    assert any(update.norm() > 0 for update in fused.updates.values())
    assert set(fused_heads()) == {int("lm_head" not in targets)}


@integrations
def test_resume(tmp_path):
    """From a checkpoint that knows nothing of the compilation."""
    whole = compare(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2)
    checkpoint = str(tmp_path / "checkpoint-2")
    transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    resumed = compare(tmp_path, resume=checkpoint, model=lambda: language_model())
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-6)
    assert resumed.metrics == pytest.approx(whole.metrics, rel=1e-6)


# -- ways in ---------------------------------------------------------------------------------------


@integrations
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", ["model", "model_init"])
@pytest.mark.parametrize("deep", [False, True])
def test_callback(deep, way, bf16, tmp_path, monkeypatch):
    """With ``model_init``, Trainer makes a model when it is made, and another in ``train()``."""
    monkeypatch.setattr(huggingface, "DEEP", 2 if deep else 3)

    def train(*callbacks: LigerFxCallback) -> list[float]:
        torch._dynamo.reset()
        liger_fx.clear_reports()
        trained = Trainer(
            args=arguments(tmp_path, bf16=bf16),
            data_collator=collator(),
            train_dataset=samples(16),
            callbacks=list(callbacks),
            **{way: language_model() if way == "model" else lambda: language_model()},
        )
        trained.train()
        return losses(trained)

    eager, before = train(), materialized()
    assert train(LigerFxCallback(**OPTIONS)) == pytest.approx(eager, rel=2e-3 if bf16 else 1e-5)
    assert materialized() == before
    layers = [len(report.modules) for report in liger_fx.reports() if len(report.modules) > 1]
    if deep:  # the head is fused outside of graphs, and the layers are one graph
        assert sum(fused_heads()) == 0 and layers == [2]
    else:
        assert fused_heads() == [1] and not layers


def own_loop(plugin: Any = None) -> list[float]:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(dynamo_plugin=plugin, cpu=True)
    model = language_model()
    loader = torch.utils.data.DataLoader(samples(8), 2, collate_fn=collator())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found = []
    for batch in loader:
        outputs = model(**batch)
        accelerator.backward(outputs.loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(outputs.loss.item())
    return found


@integrations
@pytest.mark.parametrize("regional", [False, True])
def test_plugin(regional):
    before = materialized()
    plugin = LigerFxPlugin(options=OPTIONS, use_regional_compilation=regional)
    assert own_loop(plugin) == pytest.approx(own_loop(), rel=1e-5)
    assert materialized() == before
    # Compiled by regions, projection and loss are in no graph together: `defer_logits` is for that.
    assert sum(fused_heads()) == (0 if regional else 1)


class Scaled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("head", [None, nn.Identity(), Scaled(32, VOCABULARY)], ids=str)
def test_defer_logits_wants_a_plain_projection(head):
    model = language_model()
    model.lm_head = head
    with pytest.raises(ValueError, match=f"LlamaForCausalLM is {type(head).__name__}, expected"):
        defer_logits(model)
    assert not hasattr(head, "forward") or "forward" not in vars(head)


# -- TRL -------------------------------------------------------------------------------------------


@integrations
@pytest.mark.parametrize("args", [{}, {"bf16": True}, {"packing": True}], ids=str)
def test_sft_trainer(args, tmp_path):
    """TRL computes the loss of its own head, which no backend sees; the layers are ours."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    texts = [" ".join(map(str, sample["input_ids"])) for sample in samples(16, 16, 12)]

    def train(*callbacks: Any) -> list[float]:
        torch._dynamo.reset()
        trained = trl.SFTTrainer(
            language_model(),
            trl.SFTConfig(**settings(tmp_path, max_length=32, **({"bf16": False} | args))),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer(),
            callbacks=list(callbacks),
        )
        trained.train()
        return losses(trained)

    eager, before = train(), materialized()
    fused = train(LigerFxCallback(**OPTIONS | {"policy": "all"}))
    assert fused == pytest.approx(eager, rel=2e-3 if args.get("bf16") else 1e-5)
    assert materialized() == before
    found = liger_fx.Report.merged(liger_fx.reports())
    assert "linear_cross_entropy" not in found.counts and not found.deferred
    assert {"rope", "tiled_mlp", "add_rms_norm"} <= found.counts.keys()


def test_the_callback_names_the_loss_of_gpt2():
    """transformers looks for a name in that of the class, and logs that it has found none: there
    Dynamo would end the graph."""
    sizes = dict(n_embd=32, n_layer=1, n_head=4, vocab_size=67, n_positions=32)
    off = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    ids = dict(bos_token_id=1, eos_token_id=2)
    config = transformers.GPT2Config(**sizes, **off, **ids)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    tokens = torch.randint(0, 67, (2, 16))
    expected = model(input_ids=tokens, labels=tokens).loss
    torch._dynamo.reset()
    liger_fx.clear_reports()
    LigerFxCallback(policy="all", inner="aot_eager").on_init_end(None, None, None, model=model)
    torch.testing.assert_close(model(input_ids=tokens, labels=tokens).loss, expected)
    (report,) = liger_fx.reports()
    assert report.counts["linear_cross_entropy"] == 1 and report.breaks == []
