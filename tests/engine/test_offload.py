"""`liger_fx.offload`: what layers save waits in the host's memory, and nothing else changes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from _util import DEVICE
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from liger_fx import offload as module
from liger_fx.offload import Offload

WIDTH, TOKENS = 32, 64
HIDDEN = TOKENS * WIDTH * 4  # bytes


class Layer(nn.Module):
    """A gated MLP in an activation checkpoint, with a buffer and a mask that all layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.rand(TOKENS, WIDTH))

    def forward(self, hidden, mask):
        return checkpoint(self.layer, hidden, mask, use_reentrant=False)

    def layer(self, hidden, mask):
        x = hidden * self.scale * mask
        return hidden + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    def __init__(self, layers=4, offload=None):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers)).to(DEVICE)
        for layer in self.layers:
            compiled = torch.compile(layer._call_impl, backend="aot_eager")
            layer._compiled_call_impl = offload.around(compiled, layer) if offload else compiled

    def forward(self, hidden, mask):
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden


@pytest.fixture
def moved(monkeypatch):
    """When tensors of which shape are saved, leave the device, and come back."""
    saved = module._Saved
    names: dict[int, int] = {}
    log: list[str] = []

    def logged(word, method):
        def call(self, *args):
            before = getattr(self, "_here", None)
            method(self, *args)
            name = names.setdefault(id(self), len(names))
            if before is not self._here:
                log.append(f"{word} {name} {list(self._host.shape)}")

        return call

    for word, method in {"save": "__init__", "leave": "leave", "come": "come"}.items():
        monkeypatch.setattr(saved, method, logged(word, getattr(saved, method)))
    return log


def inputs():
    torch.manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, device=DEVICE, requires_grad=True)
    return hidden, torch.rand(TOKENS, WIDTH, device=DEVICE)


def results(model, times=1):
    """The value and all gradients of ``times`` backwards through one graph."""
    hidden, mask = inputs()
    value = model(hidden, mask).square().sum()
    for i in range(times):
        value.backward(retain_graph=i < times - 1)
    found = [value.detach(), hidden.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


def pair(layers=4, least=HIDDEN):
    """Two equal models, the second of which offloads."""
    models = []
    for offload in (None, Offload(least)):
        torch.manual_seed(0)
        models.append(Decoder(layers, offload))
    return models


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_values_and_gradients_are_the_same_bits(layers):
    plain, offloading = pair(layers)
    for _ in range(3):
        assert_same_bits(results(offloading), results(plain))


def test_a_graph_that_is_kept_gives_its_tensors_again():
    plain, offloading = pair()
    assert_same_bits(results(offloading, 3), results(plain, 3))


def test_moves_hidden_states_ahead_of_the_backward(moved):
    """Not parameters, nor the buffer and the mask of the same size. A layer's backward takes its
    own, and the copy back for the layer before it begins; the last layer's needs none."""
    _, model = pair(3)
    results(model)
    steps = [
        "save 0", "leave 0", "save 1", "leave 1", "save 2",
        "leave 2", "come 1", "leave 1", "come 0", "leave 0",
    ]  # fmt: skip
    assert moved == [f"{step} [{TOKENS}, {WIDTH}]" for step in steps]


def test_small_tensors_stay(moved):
    _, model = pair(least=HIDDEN + 1)
    results(model)
    assert not moved


def test_nothing_moves_without_gradients(moved):
    _, model = pair()
    with torch.no_grad():
        model(*inputs())
    assert not moved


def test_host_memory_goes_with_a_graph_that_is_given_up(monkeypatch):
    hosts = []
    init = module._Saved.__init__

    def recorded(self, call, tensor, host):
        hosts.append(weakref.ref(host))
        init(self, call, tensor, host)

    monkeypatch.setattr(module._Saved, "__init__", recorded)
    _, model = pair()
    value = model(*inputs())
    assert len(hosts) == 4 and all(host() is not None for host in hosts)
    del value
    gc.collect()
    assert not any(host() is not None for host in hosts)


def test_nothing_else_holds_hidden_states_that_have_left():
    _, model = pair(3)
    x, mask = inputs()
    given = []
    for layer in model.layers:
        x = x * 1
        given.append(StorageWeakRef(x.untyped_storage()))
        x = layer(x, mask)
    assert [storage.expired() for storage in given] == [True, True, False]


def test_two_forwards_and_then_their_backwards():
    """As GRPO and gradient accumulation over pairs do; also out of their order."""
    plain, offloading = pair()
    for order in ([0, 1], [1, 0]):
        found = []
        for model in (plain, offloading):
            hidden, mask = inputs()
            values = [model(hidden * factor, mask).sum() for factor in (1.0, 2.0)]
            for i in order:
                values[i].backward()
            found.append([hidden.grad, *(p.grad for p in model.parameters())])
            model.zero_grad()
        assert_same_bits(*found)


def test_one_layer_called_again_and_again():
    """Weights are shared, calls are not."""
    found = []
    for model in pair(1):
        hidden, mask = inputs()
        x = hidden
        for _ in range(4):
            x = model(x, mask)
        x.sum().backward()
        found.append([hidden.grad, *(p.grad for p in model.parameters())])
    assert_same_bits(*found)


def test_an_error_between_layers_leaves_no_trace():
    plain, offloading = pair()
    hidden, mask = inputs()
    with pytest.raises(RuntimeError):
        offloading.layers[1](offloading.layers[0](hidden, mask), mask[:, :3])
    assert_same_bits(results(offloading), results(plain))


@pytest.mark.parametrize("layers", [1, 2])
def test_hidden_states_that_are_written_while_they_are_copied(layers):
    """An error, as without; the copy that is complete is older than the write."""
    _, model = pair(layers)
    hidden, mask = inputs()
    x = hidden * 2
    value = model.layers[0](x, mask)
    x.mul_(0)
    if layers == 2:
        value = model.layers[1](value, mask)
    with pytest.raises(RuntimeError, match=r"shape \[64, 32\] that a layer has saved .* written"):
        value.sum().backward()


def test_hidden_states_that_are_written_after_their_copy():
    """Where eager autograd raises, since it keeps the tensor itself."""
    found = []
    for model, written in zip(pair(2), (False, True), strict=True):
        hidden, mask = inputs()
        x = hidden * 2
        value = model(x, mask)
        if written:
            x.mul_(0)
        value.sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert_same_bits(*found)


@pytest.mark.gpu
def test_fewer_bytes_on_the_gpu():
    """What is left of the hidden states are those of the first layers in line."""
    peaks = []
    for model in pair(8, least=HIDDEN):
        results(model)
        torch.cuda.reset_peak_memory_stats()
        hidden, mask = inputs()
        before = torch.cuda.memory_allocated()
        value = model(hidden, mask)
        peaks.append(torch.cuda.memory_allocated() - before)
        del value
    assert peaks[1] <= peaks[0] - 5 * HIDDEN


@pytest.mark.gpu
def test_copies_under_way_are_waited_for():
    """Layers of almost no work, and copies that take longer than they do."""
    tokens = 1 << 16

    class Thin(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, device=DEVICE))

        def forward(self, hidden):
            return checkpoint(lambda x: (x * self.weight).sin(), hidden, use_reentrant=False)

    found = []
    for offload in (None, Offload()):
        layers = [Thin() for _ in range(12)]
        for layer in layers:
            compiled = torch.compile(layer._call_impl, backend="aot_eager")
            layer._compiled_call_impl = offload.around(compiled, layer) if offload else compiled
        torch.manual_seed(0)
        for _ in range(5):
            hidden = torch.randn(tokens, 512, device=DEVICE, requires_grad=True)
            x = hidden
            for layer in layers:
                x = layer(x)
            x.sum().backward()
        found.append([hidden.grad, *(layer.weight.grad for layer in layers)])
    assert_same_bits(*found)
