"""The masks of real Hugging Face models: without one, beside padding and over packed documents."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

import liger_fx

BATCH, SEQ, WINDOW = 2, 16, 6
SMALL = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)
FULL, WINDOWED = [""], [f"window {WINDOW}"]
MODELS = {  # and the windows of their layers
    "llama": ({}, FULL),
    "mistral": ({"sliding_window": WINDOW}, WINDOWED),
    "mistral without a window": ({"sliding_window": None}, FULL),
    "qwen2": ({}, FULL),
    "qwen3": ({}, FULL),
    "gemma3_text": (
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
        [*FULL, *WINDOWED],
    ),
    "phi3": ({}, FULL),
    "olmo2": ({}, FULL),
    "smollm3": ({}, FULL),
}
MODES = {"without": "causal", "padded": "causal, padding", "packed": "causal, documents"}


def build(name):
    torch.manual_seed(0)
    settings, windows = MODELS[name]
    layers = {"num_hidden_layers": len(windows)}
    config = AutoConfig.for_model(name.split()[0], **SMALL | layers | settings)
    config._attn_implementation = "sdpa"
    return AutoModelForCausalLM.from_config(config).train()


def batch(mode):
    """What Trainer's collators give: padding on the right of one row, on the left of the other."""
    tokens = torch.randint(1, 64, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    if mode == "padded":
        mask = torch.ones(BATCH, SEQ, dtype=torch.int64)
        mask[0, 11:], mask[1, :4] = 0, 0
        return given | {"attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    if mode == "packed":
        positions = torch.cat([torch.arange(n) for n in (5, 1, 10)])
        return given | {"position_ids": positions.expand(BATCH, -1)}
    return given


def wanted(name, mode):
    says = MODES[mode]
    return {
        ", ".join(filter(None, [says.split(", ")[0], window, *says.split(", ")[1:]]))
        for window in MODELS[name][1]
    }


def read(report):
    found = [r.pattern for r in report.replacements if r.rewrite == "attention"]
    return {pattern.split(", ", 1)[1] for pattern in found}


def models_in_modes():
    """Of those that read a mask as another does, one mode; the other two are slow."""
    for name, mode in itertools.product(MODELS, MODES):
        alike = name in ("qwen2", "phi3", "smollm3", "mistral without a window")
        marks = [pytest.mark.slow] if alike and mode != "padded" else []
        yield pytest.param(name, mode, marks=marks)


@pytest.mark.parametrize(("name", "mode"), models_in_modes())
def test_is_read(name, mode):
    report = liger_fx.explain(build(name), kwargs=batch(mode), options={"policy": ["attention"]})
    assert report.counts == {"attention": len(MODELS[name][1])}
    assert read(report) == wanted(name, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "checkpoints"),
    [
        ("llama", False),
        pytest.param("gemma3_text", False, marks=pytest.mark.slow),
        ("gemma3_text", True),
    ],
)
def test_equals_eager(name, mode, checkpoints):
    torch._dynamo.reset()
    model, given = build(name), batch(mode)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    options = {"policy": ["attention"], "inner": "aot_eager", "strict": True}
    for function in (model, torch.compile(model, backend="liger_fx", options=options)):
        out = function(**given)
        found.append([out.loss, out.logits, *torch.autograd.grad(out.loss, model.parameters())])
    assert read(liger_fx.reports()[-1]) == wanted(name, mode)
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)


def test_padding_in_batches_of_several_sizes():
    """Dynamo may give the batch of the tokens and that of the mask two names: that they are equal
    becomes a guard."""
    torch._dynamo.reset()
    liger_fx.clear_reports()
    model = build("llama")
    options = {"policy": ["attention"], "inner": "aot_eager"}
    compiled = torch.compile(model, backend="liger_fx", options=options)
    for rows, length in ((2, 16), (2, 13), (3, 11), (5, 14), (4, 9)):
        tokens = torch.randint(1, 64, (rows, length))
        mask = (torch.arange(length) < torch.arange(length - rows, length)[:, None] + 1).long()
        given = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        labels = tokens.masked_fill(mask == 0, -100)
        losses = [each(**given, labels=labels).loss for each in (model, compiled)]
        torch.testing.assert_close(*losses)
    assert [report.counts for report in liger_fx.reports()] == [{"attention": 1}] * 3


def test_packed_documents_equal_the_same_apart():
    """As ``DataCollatorWithFlattening`` packs them: one row, and positions that start anew."""
    torch._dynamo.reset()
    model = build("llama")
    documents = [torch.randint(1, 64, (1, n)) for n in (5, 9, 2)]
    apart = [model(input_ids=d, use_cache=False).logits for d in documents]
    packed = {
        "input_ids": torch.cat(documents, 1),
        "position_ids": torch.cat([torch.arange(d.shape[1]) for d in documents])[None],
    }
    options = {"policy": ["attention"], "inner": "aot_eager"}
    compiled = torch.compile(model, backend="liger_fx", options=options)
    together = compiled(**packed, use_cache=False).logits
    assert read(liger_fx.reports()[-1]) == {"causal, documents"}
    torch.testing.assert_close(together, torch.cat(apart, 1))


def test_flattened_batches_train_as_padded_ones():
    """Batches of other lengths share two graphs, the second of which is dynamic."""
    torch._dynamo.reset()
    model = build("llama")
    options = {"policy": ["attention", "linear_cross_entropy"], "inner": "aot_eager"}
    compiled = torch.compile(model, backend="liger_fx", options=options)
    for lengths in ((5, 9, 2), (12, 3, 7), (16, 1, 1), (4, 4, 2)):
        tokens = [torch.randint(1, 64, (n,)) for n in lengths]
        labels = [t.clone().index_fill_(0, torch.tensor([0]), -100) for t in tokens]
        padded = {
            "input_ids": pad_sequence(tokens, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }
        features = [
            {"input_ids": t.tolist(), "labels": own.tolist()}
            for t, own in zip(tokens, labels, strict=True)
        ]
        flat = DataCollatorWithFlattening()(features)
        losses = [
            function(**given, use_cache=False).loss
            for function, given in ((model, padded), (compiled, flat))
        ]
        torch.testing.assert_close(*losses)
        gradients = (torch.autograd.grad(loss, model.parameters()) for loss in losses)
        for expected, actual in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4)
    reports = liger_fx.reports()
    assert [r.counts for r in reports] == [{"attention": 1, "linear_cross_entropy": 1}] * 2
    assert {one for report in reports for one in read(report)} == {"causal, documents"}
