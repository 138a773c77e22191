"""Layers that keep their activations, and how many of them fit a budget."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from _torchtune_models import group_of_one
from expecttest import assert_expected_inline
from torch.distributed.fsdp import fully_shard
from torchtune import training
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerSelfAttentionLayer

import liger_fx
from liger_fx import activations, offload
from liger_fx.offload import Offload
from liger_fx.torchtune import checkpoints, compile_layers

LAYERS, TOKENS = 4, 32
GIB = 2**30


def decoder():
    torch.manual_seed(0)
    model = llama3_2(
        vocab_size=128,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=64,
        intermediate_dim=96,
        max_seq_len=TOKENS,
    )
    training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    return model


def saved_and_gradients(model):
    """What a forward keeps for the backward, [shape], and the gradients."""
    saved = []
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(tokens).square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    shapes = [tuple(t.shape) for t in saved if not isinstance(t, torch.nn.Parameter)]
    return shapes, gradients


@pytest.mark.parametrize("checkpoint_inside", [True, False])
def test_layers_keep_and_let_go(checkpoint_inside):
    model = decoder()
    options = {"policy": "all", "inner": "aot_eager"}
    compile_layers(model, options, checkpoint_inside=checkpoint_inside)
    layers = checkpoints.checkpoints_of(model)
    assert len(layers) == LAYERS
    as_wrapped = [wrapper.checkpoint_fn for wrapper in layers]
    before = len(liger_fx.reports())
    sizes, gradients = [], []
    for kept in (0, 1, 3, 0):
        checkpoints.keep(layers, kept)
        saved, found = saved_and_gradients(model)
        sizes.append(sum(torch.Size(shape).numel() for shape in saved))
        gradients.append(found)
    assert [wrapper.checkpoint_fn for wrapper in layers] == as_wrapped
    of_a_layer = sizes[1] - sizes[0]
    assert of_a_layer > 0 and sizes == [sizes[0] + kept * of_a_layer for kept in (0, 1, 3, 0)]
    for found in gradients[1:]:
        for a, e in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(a, e)
    # One graph for each way, whatever the number of layers; without a checkpoint only one.
    assert len(liger_fx.reports()) - before == (2 if checkpoint_inside else 1)


def test_nothing_of_the_mlps_inside_is_kept():
    model = decoder()
    compile_layers(model, {"policy": "all", "inner": "aot_eager"})
    checkpoints.keep(checkpoints.checkpoints_of(model), LAYERS)
    saved, _ = saved_and_gradients(model)
    assert not [shape for shape in saved if 96 in shape]
    assert len([shape for shape in saved if shape == (2, 4, TOKENS, 16)]) == LAYERS  # of attention


@pytest.mark.parametrize("sharded", [False, True])
def test_offloading_moves_the_inputs_of_layers(sharded, monkeypatch):
    """Not what FSDP2 gathers for a layer; and no bit changes."""
    moved = []
    init = offload._Saved.__init__

    def recorded(self, call, tensor, host):
        moved.append(tuple(tensor.shape))
        init(self, call, tensor, host)

    monkeypatch.setattr(offload._Saved, "__init__", recorded)
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS)
    with group_of_one() if sharded else contextlib.nullcontext():
        found = []
        for mover in (None, Offload(least=2 * TOKENS * 64 * 4)):
            model = decoder()
            for layer in [*model.layers, model] if sharded else []:
                fully_shard(layer)
            compile_layers(model, {"policy": "all", "inner": "aot_eager"}, offload=mover)
            model(tokens).square().sum().backward()
            found.append([parameter.grad for parameter in model.parameters()])
        for one, other in zip(*found, strict=True):
            assert torch.equal(*(g.full_tensor() if sharded else g for g in (one, other)))
    assert moved == [(2, TOKENS, 64)] * LAYERS


class Memory:
    """A device on which a step takes 10 GiB, and 2 more for each layer that keeps; where
    ``elsewhere`` is higher, that is its peak."""

    def __init__(self, gib, before=10.0, elsewhere=0.0):
        self.said, self.before, self.elsewhere = [], before, elsewhere
        keep = functools.partial(checkpoints.keep, checkpoints.checkpoints_of(decoder()))
        self.budget = activations.MemoryBudget(
            keep, LAYERS, int(gib * GIB), self.peak, self.said.append
        )
        self.optimizer = torch.optim.AdamW([torch.ones(1, requires_grad=True)])
        self.optimizer.register_step_pre_hook(self.budget)

    def peak(self):
        return int(max(self.elsewhere, self.before + 2 * self.budget.kept) * GIB)

    def steps(self, count):
        kept = []
        for _ in range(count):
            self.optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
            self.optimizer.step()
            kept.append(self.budget.kept)
        return kept


def test_as_many_layers_keep_as_fit():
    """The first step is not looked at: its optimizer has no state yet."""
    memory = Memory(17)
    assert memory.steps(6) == [0, 1, 2, 3, 3, 3]
    assert_expected_inline(
        "\n".join(memory.said),
        """3 of 4 layers keep their activations: a layer takes 2.00 GiB, the peak was 16.00 of 17.00 GiB""",
    )


@pytest.mark.parametrize(
    ("gib", "kept"),
    [(100, [0, 1, 2, 4, 4]), (13, [0, 1, 1, 1]), (11, [0, 1, 0, 0]), (9, [0, 0, 0, 0])],
)
def test_budgets(gib, kept):
    """All layers; only the one that was tried; not even that one; nothing to spend at all."""
    assert Memory(gib).steps(len(kept)) == kept


def test_a_layer_that_seems_to_take_nothing():
    """The peak is elsewhere until the third layer keeps: the fourth has no room then."""
    assert Memory(17.5, elsewhere=15).steps(7) == [0, 1, 2, 4, 3, 3, 3]


def test_a_larger_batch_takes_layers_back_for_good():
    memory = Memory(17)
    memory.steps(5)
    memory.before = 12.5
    assert memory.steps(1) == [2]
    memory.before = 10.0
    assert memory.steps(2) == [2, 2]
