"""Padded batches of torchtune's, whose padding is left out of the layers."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
from functools import partial

import pytest
import torch
from _torchtune_models import group_of_one
from torch import nn
from torch.utils.data import DataLoader
from torchtune import training
from torchtune.data import padded_collate_dpo, padded_collate_sft
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.phi3 import phi3
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.model_fusion import FusionLayer
from torchtune.rlhf.loss import DPOLoss
from torchtune.utils import batch_to_device

import liger_fx
from liger_fx.torchtune import compile_layers, fuse_head, load_recipe
from liger_fx.torchtune.unpadding import RowMask, leave_out_padding, mask_of, may_share

SMALL = dict(vocab_size=64, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32)
SMALL |= dict(max_seq_len=128, intermediate_dim=48)
LORA = dict(
    lora_attn_modules=["q_proj", "v_proj"], apply_lora_to_mlp=True, lora_rank=4, lora_alpha=8
)
BUILDERS = {
    "llama3_2": partial(llama3_2, **SMALL),
    "phi3": partial(phi3, **SMALL),
    "lora_qwen2": partial(lora_qwen2, **LORA, **SMALL),
}
COLLATE = partial(padded_collate_sft, padding_idx=7, ignore_idx=-100)


def samples(lengths, unlabelled=0, template=0):
    """Sequences with a prompt of two tokens, and ends without labels; all begin with a template."""
    generator = torch.Generator().manual_seed(0)
    beginning = torch.randint(64, (template,), generator=generator)
    for length in lengths:
        tokens = torch.randint(64, (length,), generator=generator)
        tokens[:template] = beginning[:length]
        labels = tokens.clone()
        labels[:2] = -100
        labels[length - unlabelled :] = -100
        yield {"tokens": tokens.tolist(), "labels": labels.tolist()}


def loss_step(model, loss_fn, batch):
    """``_loss_step`` of torchtune's recipes."""
    batch = dict(batch)
    labels = batch.pop("labels")
    hidden = model(**batch)
    labels = torch.hstack((labels[:, 1:], torch.full((len(labels), 1), -100)))
    return loss_fn(hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1))


def value_and_gradients(model, loss_fn, batch):
    loss = loss_step(model, loss_fn, batch)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, [*trained.values()])
    return loss, dict(zip(trained, found, strict=True))


LENGTHS = {
    "of several lengths": ([100, 30, 64, 5], 0),
    "with ends without labels": ([90, 30, 64, 17], 12),
    "one without a label": ([100, 1, 64], 0),
    "fewer than a unit": ([20, 60, 20], 3),
    "with a template": ([100, 30, 64, 90, 64], 0, 60),
}


def cases():
    """Of compiled ones all but those with a template are slow."""
    for (of, lengths), (name, build) in itertools.product(LENGTHS.items(), BUILDERS.items()):
        yield pytest.param(build, lengths, False, id=f"{of}-{name}-eager")
        marks = [] if of == "with a template" else [pytest.mark.slow]
        yield pytest.param(build, lengths, True, marks=marks, id=f"{of}-{name}-compiled")


@pytest.mark.parametrize(("build", "lengths", "compiled"), cases())
def test_equals_the_padded_batch(build, lengths, compiled):
    torch.manual_seed(0)
    stock = build().double()
    ours = copy.deepcopy(stock)
    batches = [[*samples(*lengths)], [*samples([n + 1 for n in lengths[0]], *lengths[1:])]]
    loader = DataLoader(list(itertools.chain(*batches)), len(batches[0]), collate_fn=COLLATE)
    padded = [*loader]
    loss_fn = nn.CrossEntropyLoss(ignore_index=-100)
    if compiled:
        training.set_activation_checkpointing(
            ours, auto_wrap_policy={TransformerSelfAttentionLayer}
        )
    head = fuse_head(ours, loss_fn, {"inner": "aot_eager"})
    assert leave_out_padding([ours], [loader], torch.float64) == ""
    if compiled:
        compile_layers(ours, {"inner": "aot_eager", "policy": "all"})
    for given, batch in zip(padded, loader, strict=True):
        assert len(batch["mask"]["tokens"]) < given["tokens"].numel()
        expected = value_and_gradients(stock, loss_fn, given)
        value, gradients = value_and_gradients(ours, head, batch)
        torch.testing.assert_close(value, expected[0])
        for (name, found), theirs in zip(gradients.items(), expected[1].values(), strict=True):
            torch.testing.assert_close(found, theirs, msg=lambda text, at=name: f"{at}: {text}")


def test_layers_see_the_tokens_that_count_alone():
    model, seen = llama3_2(**SMALL), []
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    loader = DataLoader([*samples([100, 30, 64, 5])], 4, collate_fn=COLLATE)
    fuse_head(model, nn.CrossEntropyLoss())
    leave_out_padding([model], [loader], torch.float32)
    (batch,) = loader
    hidden = model(batch["tokens"], mask=batch["mask"])
    assert seen == [(1, 256, 32)] and hidden.shape == (4, 100, 32)
    read = (batch["labels"][:, 1:] != -100).nonzero()
    assert (hidden[read[:, 0], read[:, 1]] != 0).any(-1).all()


def test_one_graph_of_a_layer_is_for_batches_of_any_length():
    """Made of the first batch. The head has two: of the first, and for all lengths."""
    torch._dynamo.reset()
    model = llama3_2(**SMALL)
    lengths = [100, 30, 64, 5], [90, 31, 64, 50], [120, 100, 30, 60], [33, 100, 120, 126]
    loader = DataLoader(list(itertools.chain(*map(samples, lengths))), 4, collate_fn=COLLATE)
    head = fuse_head(model, nn.CrossEntropyLoss(ignore_index=-100), {"inner": "aot_eager"})
    assert leave_out_padding([model], [loader], torch.float32) == ""
    compile_layers(model, {"inner": "aot_eager"})
    liger_fx.clear_reports()
    for batch in loader:
        loss_step(model, head, batch).backward()
    made = [report.counts.get("linear_cross_entropy", 0) for report in liger_fx.reports()]
    assert made == [0, 1, 1]


def test_tokens_that_all_begin_with_are_there_once():
    batch = COLLATE([*samples([100, 30, 64, 90, 64], template=60)])
    mask = mask_of(batch["tokens"], batch["labels"], -100, shares=True)
    places, source = mask["places"], mask["source"]
    assert len(places) == 343 and len(mask["tokens"]) == 256
    assert len(source.unique()) == 343 - 29 - 3 * 60
    alone = mask_of(batch["tokens"], batch["labels"], -100, shares=False)
    assert len(alone["tokens"]) == 384 and not alone["source"].numel()


def test_a_mask_moves_as_recipes_move_it():
    """By ``batch_to_device``, or as those of distillation."""
    batch = COLLATE([*samples([100, 30, 64, 90, 64])])
    batch["mask"] = mask_of(batch["tokens"], batch["labels"], -100, shares=True)
    moved = [{name: value.to("meta") for name, value in batch.items()}, batch]
    batch_to_device(batch, torch.device("meta"))
    for each in moved:
        assert isinstance(each["mask"], RowMask)
        assert all(tensor.is_meta for tensor in each["mask"].values())


def test_dropout_is_of_each_sequence():
    models = [build() for build in BUILDERS.values()]
    assert may_share(models)
    assert not may_share([*models, lora_qwen2(**LORA, **SMALL, lora_dropout=0.1)])


def test_a_batch_without_padding_has_no_mask():
    loader = DataLoader([*samples([128, 128])], 2, collate_fn=COLLATE)
    model = llama3_2(**SMALL)
    stock = copy.deepcopy(model)
    assert leave_out_padding([model], [loader], torch.float32) == ""
    (batch,) = loader
    assert "mask" not in batch
    assert torch.equal(model(batch["tokens"]), stock(batch["tokens"]))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_that_a_label_follows_is_kept(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, size = torch.randint(1, 9, (2,), generator=generator).tolist()
    size *= 40
    tokens = torch.randint(64, (rows, size), generator=generator)
    labels = torch.full((rows, size), -100)
    share = torch.rand(rows, 1, generator=generator) ** 8
    labels[torch.rand(rows, size, generator=generator) < share] = 1
    mask = mask_of(tokens, labels, -100, shares=False)
    needed = (labels != -100).flip(1).int().cummax(1)[0].flip(1)[:, 1:]
    needed = torch.nn.functional.pad(needed, (0, 1)).bool()
    least = -(-max(1, int(needed.sum())) // 128) * 128
    if mask is None:
        assert least >= (1 - size / 2**15) * labels.numel()
    else:
        assert torch.equal(mask["places"], needed.flatten().nonzero()[:, 0])
        assert len(mask["tokens"]) == min(least, labels.numel())


def with_fusion_layer(model):
    model.layers[1] = FusionLayer(model.layers[0], model.layers[1])
    return model


@pytest.mark.parametrize(
    ("build", "collate", "reason"),
    [
        (
            BUILDERS["llama3_2"],
            torch.utils.data.default_collate,
            "batches are made by default_collate, not by padded_collate_sft",
        ),
        (
            lambda: gemma2(
                **SMALL, head_dim=8, hidden_capping_value=1, final_capping_value=1,
                sliding_window_size=4
            ),
            COLLATE,
            "Gemma2Attention is an attention of its own",
        ),
        (
            lambda: with_fusion_layer(llama3_2(**SMALL)),
            COLLATE,
            "FusionLayer is a layer of its own",
        ),
        (nn.Identity, COLLATE, "Identity is no TransformerDecoder"),
    ],
)  # fmt: skip
def test_refuses(build, collate, reason):
    model, loader = build(), DataLoader([], collate_fn=collate)
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    assert leave_out_padding([model], [loader], torch.float32) == reason
    assert loader.collate_fn is collate
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


def test_refuses_a_model_that_returns_more():
    model = llama3_2(**SMALL)
    model.output_hidden_states = [1]
    reason = "the model returns hidden states of its layers as well"
    assert leave_out_padding([model], [], torch.float32) == reason


def test_sharded():
    with group_of_one():
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        stock = llama3_2(**SMALL)
        ours = copy.deepcopy(stock)
        loader = DataLoader([*samples([100, 30, 64, 5])], 4, collate_fn=COLLATE)
        (padded,) = loader
        for layer in ours.layers:
            fully_shard(layer)
        fully_shard(ours)
        loss_fn = nn.CrossEntropyLoss()
        head = fuse_head(ours, loss_fn, {"inner": "aot_eager"})
        assert leave_out_padding([ours], [loader], torch.float32) == ""
        (batch,) = loader
        loss = loss_step(ours, head, batch)
        loss.backward()
        expected, gradients = value_and_gradients(stock, loss_fn, padded)
        torch.testing.assert_close(loss, expected)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(
                parameter.grad.full_tensor(), gradients[name], atol=1e-6, rtol=1e-4
            )


# -- preference ------------------------------------------------------------------------------------

NAME, CLASS = "lora_dpo_single_device", "LoRADPORecipeSingleDevice"
STOCK = getattr(load_recipe(NAME), CLASS)
FUSED = getattr(importlib.import_module(f"liger_fx.recipes.{NAME}"), CLASS)


def set_up(kind, model):
    """A recipe that is ready for its losses to be compiled."""
    recipe = object.__new__(kind)
    recipe._model, recipe._loss_fn, recipe._settings = model, DPOLoss(), {"inner": "aot_eager"}
    recipe._device, recipe._dtype, recipe._compiles = torch.device("cpu"), torch.float32, True
    recipe.activations_handling_ctx = contextlib.nullcontext()
    return recipe


def pairs(lengths):
    """Of a prompt, a chosen and a rejected answer."""
    generator = torch.Generator().manual_seed(1)
    for size, *answers in lengths:
        sample, prompt = {}, torch.randint(64, (size,), generator=generator)
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            tokens = torch.cat((prompt, torch.randint(64, (answer,), generator=generator)))
            labels = tokens.clone()
            labels[:size] = -100
            sample |= {f"{name}_input_ids": tokens.tolist(), f"{name}_labels": labels.tolist()}
        yield sample


@pytest.mark.parametrize("unpads", [False, True])
def test_preference_data(unpads):
    torch.manual_seed(0)
    stock = llama3_2(**SMALL)
    ours, seen = copy.deepcopy(stock), []
    tokens, labels = batch = padded_collate_dpo([*pairs([(60, 60, 30), (55, 20, 60)])])
    recipe = set_up(FUSED, ours)
    models = recipe._compile_losses()
    recipe._unpads = unpads and recipe._leaves_out_padding({}, models)
    ours.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    found = recipe.concatenated_forward(ours, batch)
    expected = set_up(STOCK, stock).concatenated_forward(stock, batch)
    assert models == [ours] and seen == [(1, 384, 32) if unpads else (4, 120, 32)]
    for f, e in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(f, e)
    trained = [*ours.parameters()], [*stock.parameters()]
    losses = ((chosen - 2 * rejected).sum() for chosen, rejected, *_ in (found, expected))
    for f, e in zip(*map(torch.autograd.grad, losses, trained), strict=True):
        torch.testing.assert_close(f, e, atol=1e-5, rtol=1e-4)
    kept = torch.ones(tokens.numel(), dtype=torch.bool)
    if unpads:
        kept[:] = False
        kept[mask_of(tokens, labels, -100, shares=True)["places"]] = True
    rows = zip(kept.view(labels.shape).split(2), expected[2:], found[2:], strict=True)
    for kept_rows, logits, logged in rows:
        means = [row[keep].mean() for row, keep in zip(logits, kept_rows, strict=True)]
        torch.testing.assert_close(logged.mean(), torch.stack(means).mean(), atol=1e-5, rtol=1e-4)
