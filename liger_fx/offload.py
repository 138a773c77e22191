"""Activations that wait for the backward in the host's memory.

What a compiled layer saves for its backward, with an activation checkpoint inside little more than
its input, is copied to pinned memory while the layer computes. The backward of each layer begins
with the copy back for the layer before it, so that neither copy is waited for. The idea is that of
Unsloth's checkpoints and of torchtune's OffloadActivations; torchtune starts the copy back when a
layer's backward needs it.

Only a layer's own tensors move: not its parameters and buffers, and of its arguments the first one
alone, the hidden states. The rest, such as a mask, is shared by all layers, which keep it anyway.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class Offload:
    """Moves what layers, called one after the other, save for their backwards.

    least: bytes; smaller tensors stay where they are.
    """

    def __init__(self, least: int = 1 << 20) -> None:
        self.least = least
        self._latest: Callable[[], _Call | None] = lambda: None
        self._streams: dict[torch.device, _Streams] = {}

    def around(self, compiled: Callable[..., Any], layer: nn.Module) -> Callable[..., Any]:
        """``compiled``, which is ``layer``, with what it saves moved. Values and gradients stay the
        same bits. Takes pinned memory of the host for as many bytes as the GPU is spared. Nothing
        moves in a checkpoint around the call, which saves the inputs alone."""
        return functools.partial(self._call, compiled, layer)

    def _call(
        self, compiled: Callable[..., Any], layer: nn.Module, /, *args: Any, **kwargs: Any
    ) -> Any:
        in_backward = torch._C._current_graph_task_id() != -1  # of a reentrant checkpoint
        if not torch.is_grad_enabled() or in_backward or in_checkpoint():
            return compiled(*args, **kwargs)
        call = _Call(self, _Given(layer, args, kwargs))
        try:
            with saved_tensors_hooks(call.pack, call.unpack):
                return compiled(*args, **kwargs)
        finally:
            call.given = None  # which holds the hidden states

    def follow(self, call: _Call) -> _Call | None:
        """The call before this one, whose tensors leave the GPU now."""
        before = self._latest()
        self._latest = weakref.ref(call)
        if before is not None:
            for saved in before.saved():
                saved.leave()
        return before

    def streams(self, device: torch.device) -> _Streams:
        if device not in self._streams:
            self._streams[device] = _Streams(device)
        return self._streams[device]


class _Streams:
    """The copies of one GPU, each way in a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out = torch.cuda.Stream(device)
        self.back = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
        stream.wait_stream(self.compute)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    @property
    def compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)


class _Given:
    """What a layer is called with."""

    def __init__(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs

    def shares(self, tensor: Tensor) -> bool:
        """Is it, or a part of it, there for other layers as well, or for the next step?"""
        hidden, place = next(iter(self.args), None), _place(tensor)
        is_hidden = isinstance(hidden, Tensor) and place == _place(hidden)
        return not is_hidden and place in self._places

    @functools.cached_property
    def _places(self) -> set[int]:
        others = tree_leaves((self.args[1:], self.kwargs))
        every = [*self.layer.parameters(), *self.layer.buffers(), *others]
        return {_place(part) for tensor in every for part in _plain(tensor)}


class _Call:
    """What one call of a layer saves. Its tensors belong to the autograd graph: where that goes
    without a backward, they go too."""

    def __init__(self, offload: Offload, given: _Given) -> None:
        self.offload = offload
        self.given: _Given | None = given  # while the layer runs
        self._before: Callable[[], _Call | None] | None = None
        self._saved: list[weakref.ref[_Saved]] = []

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        plain = type(tensor) is Tensor  # and no parameter
        if not tensor.is_leaf:
            tensor = tensor.detach()  # the graph is not to hold itself
        if not plain or tensor.nbytes < self.offload.least:
            return tensor
        if self.given is None or self.given.shares(tensor):
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        if host.stride() != tensor.stride():  # compiled code counts on them
            return tensor
        if self._before is None:
            before = self.offload.follow(self)
            self._before = (lambda: None) if before is None else weakref.ref(before)
        saved = _Saved(self, tensor, host)
        self._saved.append(weakref.ref(saved))
        return saved

    def unpack(self, packed: Tensor | _Saved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.take()
        assert self._before is not None
        before = self._before()
        if before is not None:
            for saved in before.saved():
                saved.come()
        return tensor

    def saved(self) -> Iterator[_Saved]:
        for reference in self._saved:
            saved = reference()
            if saved is not None:
                yield saved


class _Saved:
    """A tensor: in the host's memory, and on the device around the times when a layer is at it."""

    def __init__(self, call: _Call, tensor: Tensor, host: Tensor) -> None:
        self._call = call
        self._device = tensor.device
        self._host = host
        self._here: Tensor | None = tensor
        self._version: int | None = tensor._version  # while it is the tensor itself
        self._written = False
        self._copied: torch.cuda.Event | None = None  # from or to the device
        self._taken = False
        if tensor.is_cuda:
            streams = call.offload.streams(tensor.device)
            self._copied = streams.copy(host, tensor, streams.out)
        else:
            host.copy_(tensor)

    def leave(self) -> None:
        """No longer on the device, whose later kernels may take the memory: after the copy."""
        if self._here is not None:
            self._wait()
            self._written |= self._version not in (None, self._here._version)
            self._here = self._version = None

    def come(self) -> None:
        if self._here is not None or self._taken:
            return
        # Of the compute stream's memory, for which the copy waits until that stream is so far.
        self._here = torch.empty_like(self._host, device=self._device)
        if self._here.is_cuda:
            streams = self._call.offload.streams(self._device)
            self._copied = streams.copy(self._here, self._host, streams.back)
        else:
            self._here.copy_(self._host)

    def take(self) -> Tensor:
        """The tensor on the device. A graph that is kept may take it more than once. Raises
        RuntimeError, as autograd does, for one that was written while it was copied."""
        self._taken = False
        self.come()
        tensor = self._here
        self.leave()
        self._taken = True
        if tensor is None or self._written:
            raise RuntimeError(
                f"a tensor of shape {list(self._host.shape)} that a layer has saved for its "
                "backward was written in place before it had left the GPU: write to a copy of it"
            )
        return tensor

    def _wait(self) -> None:
        if self._copied is not None:
            self._call.offload.streams(self._device).compute.wait_event(self._copied)
            self._copied = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.leave()  # under way when the graph was given up


def in_checkpoint() -> bool:
    """Is this a call in an activation checkpoint that runs as it is? Its hooks on saved tensors
    must be the innermost: they keep none of them."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


def _plain(tensor: Any) -> Iterator[Tensor]:
    """The tensors of which one is made."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(tensor, name))
    elif isinstance(tensor, Tensor):
        yield tensor


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
