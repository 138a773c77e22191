"""Packed batches of torchtune's: documents in the place of a mask."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader
from torchtune.data import padded_collate_packed
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.phi3 import phi3
from torchtune.utils._import_guard import _SUPPORTS_FLEX_ATTENTION

import liger_fx
from liger_fx.torchtune.packing import Documents, attend_over_documents, collate_documents
from liger_fx.torchtune.parts import compile_layers

# Where a GPU has flex attention, the stock mask is a block mask, which does not run on a CPU.
pytestmark = pytest.mark.skipif(
    _SUPPORTS_FLEX_ATTENTION, reason="compares with stock attention on a CPU"
)

SMALL = dict(vocab_size=64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32)
SMALL |= dict(max_seq_len=64, intermediate_dim=48)


def samples():
    generator = torch.Generator().manual_seed(0)
    for lengths in ([5, 1, 10], [16]):
        yield {
            "tokens": torch.randint(64, (16,), generator=generator),
            "labels": torch.randint(64, (16,), generator=generator),
            "input_pos": torch.cat([torch.arange(n) for n in lengths]),
            "seq_lens": torch.tensor(lengths),
        }


def loss(model, batch):
    logits = model(batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def test_documents_are_those_of_the_mask():
    ours, theirs = collate_documents([*samples()]), padded_collate_packed([*samples()])
    for name in ("tokens", "labels", "input_pos"):
        assert torch.equal(ours[name], theirs[name])
    documents = ours["mask"]
    same = documents[:, :, None] == documents[:, None, :]
    assert torch.equal(theirs["mask"].bool(), same.tril())


@pytest.mark.parametrize("build", [llama3_2, phi3], ids=lambda build: build.__name__)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_equals_the_stock_attention(build, compiled):
    torch._dynamo.reset()
    liger_fx.clear_reports()
    torch.manual_seed(0)
    stock = build(**SMALL)
    ours = copy.deepcopy(stock)
    loader = DataLoader([*samples()], batch_size=2, collate_fn=padded_collate_packed)
    (theirs,) = loader
    assert attend_over_documents([ours], [loader], torch.float32) == ""
    (batch,) = loader
    if compiled:
        compile_layers(ours, {"inner": "aot_eager", "policy": ["attention"], "strict": True})
    found = [loss(model, given) for model, given in ((stock, theirs), (ours, batch))]
    torch.testing.assert_close(*found)
    for a, e in zip(
        torch.autograd.grad(found[1], [*ours.parameters()]),
        torch.autograd.grad(found[0], [*stock.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, e, atol=1e-6, rtol=1e-4)
    if compiled:  # and keys are not repeated
        (report,) = {str(r.replacements[0].pattern) for r in liger_fx.reports()}
        assert report == "planned"


def test_one_plan_for_all_layers():
    model = llama3_2(**SMALL)
    attend_over_documents([model], [], torch.float32)
    batch = collate_documents([*samples()])
    plan = liger_fx.ops.document_plan
    with mock.patch("liger_fx.torchtune.packing.ops.document_plan", side_effect=plan) as called:
        loss(model, batch)
    assert called.call_count == 1


def test_a_batch_with_a_mask_or_without_one_is_attended_over_as_before():
    model = llama3_2(**SMALL)
    stock = copy.deepcopy(model)
    attend_over_documents([model], [], torch.float32)
    batch = padded_collate_packed([*samples()])
    for given in (batch, batch | {"mask": None}):
        assert torch.equal(loss(model, given), loss(stock, given))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: gemma2(
                **SMALL, head_dim=8, hidden_capping_value=1, final_capping_value=1,
                sliding_window_size=4
            ),
            "Gemma2Attention is an attention of its own",
        ),
        (lambda: llama3_2(**SMALL, attn_dropout=0.1), "attention has dropout, or is not causal"),
        (lambda: llama3_2(**SMALL | {"embed_dim": 16}), "heads have 4 elements"),
        (lambda: llama3_2(**SMALL).to("meta"), "attention runs in torch.float32"),
    ],
)  # fmt: skip
def test_refuses(model, reason):
    built = model()
    before = {name: vars(module).copy() for name, module in built.named_modules()}
    assert attend_over_documents([built], [], torch.float32) == reason
    assert {name: vars(module) for name, module in built.named_modules()} == before


def test_documents_are_a_tree_of_tensors():
    """Hooks of FSDP and of checkpoints go through what a layer is given."""
    documents = Documents(*liger_fx.ops.document_plan(torch.zeros(1, 4, dtype=torch.int64)))
    leaves, _ = torch.utils._pytree.tree_flatten(documents)
    assert len(leaves) == 4
