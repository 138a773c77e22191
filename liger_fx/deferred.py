"""Logits that are computed when they are read.

A fused loss needs no logits, yet models return them beside the loss. `DeferredLogits` takes their
place: a tensor of the true shape, dtype, device and gradient, whose values the model's own code
computes, once, when somebody reads them.

Values      Each row of logits depends on one row of hidden states. So reshapes and slices of rows
            are done on the hidden states, functions of a row are composed, and what reduces a row
            (argmax, logsumexp, cross_entropy, ...) runs over chunks of rows. Every other function
            gets the computed values.
Gradients   A deferred tensor is the output of an autograd node, and hooks, DDP's sink and whatever
            else torch attaches to it are ordinary autograd. Results that were computed from rows
            give their gradient to the hidden states and None to the deferred tensor.
Writes      A view of a deferred tensor knows how it was made. Before a write its base is computed
            and the view is made of that, so that the one sees what is written to the other.
Not seen    A parameter written through ``.data``, or filled anew by FSDP2 after a reshard: the
            version that autograd keeps of it does not change.
"""

from __future__ import annotations

import inspect
import logging
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel.distributed import _DDPSink
from torch.utils._pytree import tree_leaves, tree_map

from liger_fx.ops.chunked_head import chunk_tokens_for
from liger_fx.ops.linear_cross_entropy import linear_cross_entropy

_log = logging.getLogger("liger_fx")
_count = 0
_readers: set[str] = set()
_OR_KEEP = 'or compile with the option logits="keep"'
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def materialized() -> int:
    """How often this process computed the values of a deferred tensor, other than by chunks."""
    return _count


@dataclass(frozen=True)
class Head:
    """From hidden states to logits, each row by itself.

    function: ``function(hidden, *parameters)`` with hidden [*, H], of any leading shape, returns a
    new tensor [*, V]. It runs under the autocast of the place where the logits were deferred.
    """

    function: Callable[..., Tensor]
    parameters: tuple[Tensor, ...]


@dataclass(eq=False)
class _Source:
    """``function(rows, parameters)``, each row by itself.

    rows: the hidden states [*, H], and further tensors [*, k] of the same leading shape. classes:
    the size of the last dimension of the values. linear: the dtype of a projection, F.linear, after
    which values were copied or widened at most. graph: the values as autograd recorded them, and
    the aliases of the tensors that they were computed from, until a backward takes both.
    """

    function: Callable[[Sequence[Tensor], Sequence[Tensor]], Any]
    rows: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    classes: int
    linear: torch.dtype | None = None
    graph: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tensors = self.rows + self.parameters
        self.versions = [_version(tensor) for tensor in self.tensors]

    def check(self) -> None:
        """Raise RuntimeError if a tensor has other values than when this source was made."""
        for i, (tensor, version) in enumerate(zip(self.tensors, self.versions, strict=True)):
            written = _version(tensor) != version
            if not written and (tensor.untyped_storage().size() or not tensor.numel()):
                continue
            parameter = i - len(self.rows)
            name = f"parameter {parameter} of the head" if parameter >= 0 else "the hidden state"
            what = "written in place, as by optimizer.step()" if written else "resharded or freed"
            raise RuntimeError(
                f"these logits cannot be computed any more: {name}, of shape {list(tensor.shape)}, "
                f"was {what}. Read the logits or call .materialize() on them before that, "
                f"{_OR_KEEP}"
            )

    def then(
        self,
        step: Callable[..., Any],
        rows: tuple[Tensor, ...] = (),
        parameters: tuple[Tensor, ...] = (),
    ) -> _Source:
        """``step(values, *rows, *parameters)``, where rows and parameters are further ones."""
        function, r, p = self.function, len(self.rows), len(self.parameters)
        return _Source(
            lambda rs, ps: step(function(rs[:r], ps[:p]), *rs[r:], *ps[p:]),
            self.rows + rows,
            self.parameters + parameters,
            self.classes,
        )

    def of_rows(self, rows: Iterable[Tensor]) -> _Source:
        return replace(self, rows=tuple(rows), graph=[])

    def chunks(self) -> list[slice]:
        # What is done with the values takes about four tensors of their size in fp32.
        size = chunk_tokens_for(self.classes, 16, self.rows[0].device.type)
        count = math.prod(self.rows[0].shape[:-1])
        return [slice(start, start + size) for start in range(0, max(count, 1), size)]

    def outputs(self) -> list[Tensor]:
        """The outputs of the function, [N, ...] each, by chunks."""
        flat = [_flat(rows) for rows in self.rows]
        with torch.no_grad(), _no_autocast(flat[0]):
            parts = [
                _tuple(self.function([rows[chunk] for rows in flat], self.parameters))
                for chunk in self.chunks()
            ]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def gradients(
        self, needs: Sequence[bool], grads: Sequence[Tensor | None], again: bool
    ) -> list[Tensor | None]:
        """Of the tensors, where they are needed, by chunks, each computed anew.

        grads: of the outputs, [N, ...] each. again: they shall have gradients themselves.
        """
        r = len(self.rows)
        parts: list[list[Any]] = []
        # A sum over chunks in bf16 would lose what a chunk adds to it.
        totals: list[Any] = [
            torch.zeros_like(p, dtype=_wide(p.dtype)) if need else None
            for p, need in zip(self.parameters, needs[r:], strict=True)
        ]
        with torch.enable_grad(), _no_autocast(self.rows[0]):
            flat, parameters = [_flat(rows) for rows in self.rows], _aliases(self.parameters)
            for chunk in self.chunks():
                inputs = (*(rows[chunk] for rows in flat), *parameters)
                outputs = _tuple(self.function(inputs[:r], inputs[r:]))
                upstream = [g if g is None else g[chunk] for g in grads]
                found = _gradients(outputs, inputs, needs, upstream, again)
                parts.append(found[:r])
                for i, gradient in enumerate(found[r:]):
                    if gradient is not None:
                        totals[i] = totals[i] + gradient if again else totals[i].add_(gradient)
            columns: list[Any] = [
                [part[i] for part in parts] if needs[i] else None for i in range(r)
            ]
            whole = [
                c and torch.cat(c).reshape(t.shape) for c, t in zip(columns, self.rows, strict=True)
            ]
            casts = zip(totals, self.parameters, strict=True)
            return whole + [t if t is None else t.to(p.dtype) for t, p in casts]


def _aliases(tensors: Iterable[Tensor]) -> list[Tensor]:
    """As inputs of a backward that ends at them, although hidden states may depend on a parameter:
    that of the embedding, which is the head's where they are tied."""
    return [tensor.view_as(tensor) for tensor in tensors]


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    upstream: Sequence[Tensor | None],
    again: bool,
) -> list[Tensor | None]:
    pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None]
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [gradient for _, gradient in pairs],
            create_graph=again,
            materialize_grads=True,
        )
    )
    return [next(found) if need else None for need in needs]


class _Computed(torch.autograd.Function):
    """The node of what ``outcome()`` returns: values of a source, deferred or not.

    Its tensors are the ``count`` deferred ones that the rows were taken of, and the source's.
    """

    @staticmethod
    def forward(ctx: Any, outcome: Any, source: _Source, count: int, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        ctx.like = source.function, len(source.rows), source.classes
        ctx.graph, ctx.first = source.graph, 3 + count
        return outcome()

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[ctx.first :]
        function, r, classes = ctx.like
        gradients: Sequence[Tensor | None] = [None] * len(tensors)
        again = torch.is_grad_enabled()
        if all(grad is None for grad in grads):
            pass  # only the hooks of a parent wait for this node
        elif ctx.graph:
            values, inputs = ctx.graph.pop()
            gradients = _gradients([values], inputs, needs, grads, again)
        else:
            lead = tensors[0].dim() - 1
            flat = [g if g is None else _flat(g, lead) for g in grads]
            source = _Source(function, tensors[:r], tensors[r:], classes)
            gradients = source.gradients(needs, flat, again)
        return *[None] * ctx.first, *gradients


class _Signal(torch.autograd.Function):
    """A loss of hidden states, whose backward also runs the hooks of the deferred logits."""

    @staticmethod
    def forward(ctx: Any, deferred: DeferredLogits, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad


class _Read(torch.autograd.Function):
    """``values()`` as the values of a deferred tensor, which gets their gradient."""

    @staticmethod
    def forward(ctx: Any, deferred: DeferredLogits, values: Callable[[], Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        return values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        return grad, None


class DeferredLogits(Tensor):
    """Logits [*, V] of hidden states [*, H], computed when they are read.

    dtype, classes (V) and requires_grad are those of what ``head.function`` returns. Nothing is
    computed here. Holding the tensor keeps the hidden states and the head's parameters alive.
    """

    _source: _Source
    # Of a view: the tensor that it is a view of, and what makes it of that tensor's values.
    _root: DeferredLogits | None = None
    _replay: Any = None
    _raw: Tensor | None = None
    _real: Tensor | None = None
    _node: Any = None  # that gets the gradient of _real
    _linked = False  # _real is a view of the root's
    _lent = False  # somebody has memory of a view that is not the root's
    _bypassed = False  # gradients of this tensor were given to the hidden states directly

    def __new__(
        cls, head: Head, hidden: Tensor, *, classes: int, dtype: torch.dtype, requires_grad: bool
    ) -> DeferredLogits:
        autocast = _autocast(hidden.device.type)

        def function(rows: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
            with autocast():
                return head.function(*rows, *parameters)

        linear = dtype if head.function is F.linear and dtype in _KERNEL_DTYPES else None
        source = _Source(function, (hidden,), tuple(head.parameters), classes, linear)
        like = torch.empty((*hidden.shape[:-1], classes), dtype=dtype, device="meta")
        return _deferred(source, like, requires_grad)

    def materialize(self) -> Tensor:
        """The values as an ordinary tensor, with a gradient if ``requires_grad``: the same tensor
        in each call, and the one that in-place functions write to.

        Raises RuntimeError if the values do not exist yet, and the hidden states or parameters have
        been written or resharded.
        """
        if self._root is not None and not self._computed():
            self._root._lent |= self._shape().numel() != self._root._shape().numel()
        return self._values()

    def _computed(self) -> bool:
        return self._real is not None or (self._root is not None and self._root._real is not None)

    def _native(self, name: str) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return getattr(self, name)

    def _shape(self) -> torch.Size:
        return self._native("shape")

    def _own_node(self, *others: Any) -> bool:
        """No function outside of this module is the last that made this tensor."""
        if not self._native("requires_grad"):
            return True
        return isinstance(self._native("grad_fn"), (_Computed._backward_cls, *others))

    def _values(self, write: bool = False) -> Tensor:
        root = self if self._root is None else self._root
        if write and root._lent:
            raise RuntimeError(
                "cannot write to these logits: a part of them was computed by itself and given "
                "away, and would not see it. Call .materialize() on the whole logits first, "
                f"{_OR_KEEP}"
            )
        whole_exists = (
            write or root._real is not None or root._shape().numel() == self._shape().numel()
        )
        if root is not self and not self._linked and whole_exists:
            whole, own = root._values(), self._own_node()
            differentiable = own and self._native("requires_grad")
            with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
                values = self._replay(whole)
            self._real, self._linked = values if own else self._attach(values), True
            self._node = self._native("grad_fn")
        if self._real is None:
            self._real = self._attach(self._below_autograd(record=self._own_node()))
            self._node = self._native("grad_fn")
        return self._real

    def _attach(self, values: Tensor) -> Tensor:
        if not self._native("requires_grad"):
            return values
        with torch.inference_mode(False), torch.enable_grad():
            return _Read.apply(self, lambda: values)

    def _below_autograd(self, record: bool = False) -> Tensor:
        """The values without history. record: keep the history for the backward."""
        if self._real is not None:
            return self._real.detach()
        root = self._root
        if root is not None and (
            root._real is not None or root._shape().numel() == self._shape().numel()
        ):
            return self._replay(root._below_autograd())
        if self._raw is None:
            source, record = self._source, record and self._native("requires_grad")
            source.check()
            # In this order, as inference_mode sets the grad mode too.
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(record),
                _no_autocast(source.rows[0]),
            ):
                inputs, r = _aliases(source.tensors), len(source.rows)
                values = source.function(inputs[:r], inputs[r:]).contiguous()
            if (values.shape, values.dtype) != (self._shape(), self._native("dtype")):
                raise RuntimeError(
                    f"the head returned {list(values.shape)} {values.dtype}, but its logits were "
                    f"deferred as {list(self._shape())} {self._native('dtype')}"
                )
            if record:
                source.graph.append((values, inputs))
            self._raw = values.detach()
            _announce(values)
        return self._raw

    def _mirror(self) -> Tensor:
        """A tensor without memory that is otherwise alike."""
        with torch._C.DisableTorchFunctionSubclass():
            return torch.empty_strided(
                self.shape,
                self.stride(),
                dtype=self.dtype,
                device="meta",
                requires_grad=self.requires_grad,
            )

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        handler = _HANDLERS.get(func)
        if handler is not None and args and isinstance(args[0], cls) and not args[0]._computed():
            outcome = handler(func, *args, **kwargs)
            if outcome is not NotImplemented:
                return outcome
        return _on_values(func, args, kwargs)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and any(isinstance(leaf, cls) for leaf in tree_leaves(value)):
                raise RuntimeError(
                    f"{func} would write to deferred logits from C++. Give it .materialize() of "
                    f"them, {_OR_KEEP}"
                )

        def values(leaf: Any) -> Any:
            return leaf._below_autograd() if isinstance(leaf, cls) else leaf

        with torch.no_grad():
            return func(*tree_map(values, args), **tree_map(values, kwargs))


def _deferred(
    source: _Source,
    like: Tensor,
    requires_grad: bool,
    parents: tuple[DeferredLogits, ...] = (),
    root: DeferredLogits | None = None,
    replay: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """A deferred tensor with the metadata of ``like``. parents: those that its rows are taken of.
    replay: makes it, a view, of the values of ``root``."""

    def make() -> Any:
        made = Tensor._make_wrapper_subclass(
            DeferredLogits,
            like.shape,
            strides=like.stride(),
            storage_offset=int(like.storage_offset()),
            dtype=like.dtype,
            device=source.rows[0].device,
        )
        made._source, made._root, made._replay = source, root, replay
        return made

    return _record(make, source, requires_grad, parents)


def _record(
    outcome: Callable[[], Any],
    source: _Source,
    requires_grad: bool,
    parents: tuple[DeferredLogits, ...],
) -> Any:
    if not requires_grad:
        return outcome()
    _bypass(parents)
    with torch.enable_grad():
        return _Computed.apply(outcome, source, len(parents), *parents, *source.tensors)


def _bypass(tensors: Iterable[DeferredLogits]) -> None:
    for tensor in tensors:
        tensor._bypassed = True


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, Sequence) else (outputs,)


def _flat(tensor: Tensor, lead: int | None = None) -> Tensor:
    """With the first ``lead`` dimensions, all but the last if None, as one."""
    lead = tensor.dim() - 1 if lead is None else lead
    return tensor.flatten(0, lead - 1) if lead else tensor.unsqueeze(0)


def _autocast(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """The autocast of now, for later."""
    if not torch.amp.is_autocast_available(kind):  # the meta device has none
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    # Without its cache, in which a parameter's cast outlives the parameter's values.
    return lambda: torch.autocast(kind, dtype, enabled, cache_enabled=False)


def _no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    kind = like.device.type
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


def _announce(values: Tensor) -> None:
    global _count
    _count += 1
    frame: Any = sys._getframe()
    inside = ("torch", "liger_fx")
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in inside:
        frame = frame.f_back
    reader = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    if reader not in _readers:
        _readers.add(reader)
        mib = values.numel() * values.element_size() / 2**20
        _log.info("logits are read at %s: %.1f MiB are computed for it", reader, mib)


# Functions on computed values.

_IN_PLACE = {"__setitem__", "__set__"} | {
    f"__i{name}__"
    for name in (
        *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
        *("and", "or", "xor", "lshift", "rshift"),
    )
}
_WHOLE_GRADIENT = {
    torch.autograd.grad,
    Tensor.register_hook,
    Tensor.retain_grad,
    Tensor.register_post_accumulate_grad_hook,
}


def _on_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "").split(".")[0]  # of an operator's overload
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    in_place = in_place or kwargs.get("inplace") is True
    written = tree_leaves((args[:1] if in_place else (), kwargs.get("out")))
    given: dict[int, tuple[DeferredLogits, Tensor, int]] = {}

    def values(leaf: Any) -> Any:
        if not isinstance(leaf, DeferredLogits):
            return leaf
        if func in _WHOLE_GRADIENT and leaf._bypassed:
            raise RuntimeError(
                f"{name} needs the gradient of all logits, but results were computed of their rows "
                "before. Call it before the logits are used, use .materialize() of them in all "
                f"places, {_OR_KEEP}"
            )
        real = leaf._values(write=any(leaf is w for w in written))
        attribute = name in ("__get__", "__set__")  # also read and set by torch itself
        if leaf._native("grad_fn") is not leaf._node and not attribute:
            raise RuntimeError(
                "an autograd.Function wrote to these logits (mark_dirty). Give it .materialize() "
                f"of them, {_OR_KEEP}"
            )
        given[id(real)] = leaf, real, real._version
        return real

    def mapped(argument: Any) -> Any:  # itself where possible, as deepcopy's memo is written to
        found = any(isinstance(leaf, DeferredLogits) for leaf in tree_leaves(argument))
        return tree_map(values, argument) if found else argument

    outcome = func(*map(mapped, args), **{name: mapped(value) for name, value in kwargs.items()})
    for deferred, real, version in given.values():
        if deferred._root is None or deferred._linked:
            continue
        if real._version != version:
            deferred._root._lent = True
            raise RuntimeError(
                f"{name} wrote to a part of deferred logits, which the whole does not see. Call "
                f".materialize() on the whole logits first, {_OR_KEEP}"
            )
        if func is Tensor.data_ptr or any(_may_alias(leaf, real) for leaf in tree_leaves(outcome)):
            deferred._root._lent = True
    return tree_map(lambda leaf: given[id(leaf)][0] if id(leaf) in given else leaf, outcome)


def _may_alias(leaf: Any, tensor: Tensor) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.untyped_storage()._cdata == tensor.untyped_storage()._cdata
    return not isinstance(
        leaf, bool | int | float | complex | str | torch.Size | torch.dtype | None
    )


# Functions that leave their tensor deferred, or take its rows. Each handler is called as
# ``handler(function, deferred, *args, **kwargs)`` and may return NotImplemented.


def _metadata(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(logits, *args, **kwargs)


def _text(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> str:
    with torch._C.DisableTorchFunctionSubclass():
        return (
            f"DeferredLogits(not computed yet, shape={list(logits.shape)}, dtype={logits.dtype}, "
            f"device={logits.device}, requires_grad={logits.requires_grad})"
        )


def _hook(func: Any, logits: DeferredLogits, hook: Any) -> Any:
    # FSDP only wants to know that the backward has begun, whatever the gradient.
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    fsdp = module.startswith("torch.distributed.fsdp")
    return _metadata(func, logits, hook) if fsdp else NotImplemented


def _of_rows(handler: Callable[..., Any], under_autocast: bool = False) -> Callable[..., Any]:
    """``handler`` where taking rows gives what the values would have given."""

    def guarded(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        device, dtype = logits._native("device"), logits._native("dtype")
        if kwargs.get("out") is not None or not logits._native("shape"):
            return NotImplemented
        # Of a function outside of this module, or DDP's sink, the gradient passes only by values.
        if torch.is_grad_enabled() and not logits._own_node(_DDPSink._backward_cls):
            return NotImplemented
        # There autocast may change the dtype.
        low = dtype in (torch.float16, torch.bfloat16)
        if low and not under_autocast and torch.is_autocast_enabled(device.type):
            return NotImplemented
        logits._source.check()
        # Copied, as a list among them may change before the function runs again.
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
        try:
            return handler(func, logits, *args, **kwargs)
        except _NotByRows:
            return NotImplemented

    return guarded


class _NotByRows(Exception):
    """The function has to see the values."""


def _unless(holds: bool) -> None:
    if not holds:
        raise _NotByRows


def _on_mirror(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What the function makes of metadata."""

    def meta(leaf: Any) -> Any:
        _unless(not isinstance(leaf, DeferredLogits))
        return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf

    args, kwargs = tree_map(meta, args), tree_map(meta, kwargs)
    try:
        return func(*args, **kwargs)
    except Exception as failure:  # the function itself shall say so, of the values
        raise _NotByRows from failure


def _reshaped(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """Whatever keeps the order of the elements and the number of classes moves whole rows."""
    mirror = logits._mirror()
    like = _on_mirror(func, mirror, *args, **kwargs)
    _unless(like.dtype == mirror.dtype and like.shape[-1:] == mirror.shape[-1:])
    rows = [t.reshape(*like.shape[:-1], t.shape[-1]) for t in logits._source.rows]
    return _moved(logits, mirror, like, rows, lambda values: func(values, *args, **kwargs))


def _selected(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """What leaves any number of classes whole and last selects whole rows."""
    mirror = logits._mirror()
    wider = mirror.new_empty(*mirror.shape[:-1], mirror.shape[-1] + 1)
    static = (_static_index(*args),) if func is Tensor.__getitem__ else args
    like, probe = (_on_mirror(func, tensor, *static, **kwargs) for tensor in (mirror, wider))
    for part, wide in zip(_tuple(like), _tuple(probe), strict=True):
        _unless(part.shape[-1:] == mirror.shape[-1:])
        _unless(wide.shape == (*part.shape[:-1], part.shape[-1] + 1))
    rows = zip(*(_tuple(func(t, *args, **kwargs)) for t in logits._source.rows), strict=True)

    def taken(i: int) -> Callable[[Tensor], Tensor]:
        return lambda values: _tuple(func(values, *static, **kwargs))[i]

    parts = [
        _moved(logits, mirror, one, of_one, taken(i))
        for i, (one, of_one) in enumerate(zip(_tuple(like), rows, strict=True))
    ]
    return parts[0] if isinstance(like, Tensor) else tuple(parts)


def _static_index(index: Any) -> tuple[Any, ...]:
    """The index with numbers for masks, and without what may change later."""
    items: list[Any] = []
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice):
            ends = item.start, item.stop, item.step
            item = slice(*(end if end is None else operator.index(end) for end in ends))
        elif not isinstance(item, int | EllipsisType | Tensor | None):
            item = torch.as_tensor(item)
        if not isinstance(item, Tensor):
            items.append(item)
        elif item.dtype in (torch.bool, torch.uint8):
            _unless(item.dim() > 0)
            items += item.nonzero(as_tuple=True)
        else:
            items.append(item if item.dim() else int(item))
    return tuple(items)


def _moved(
    logits: DeferredLogits,
    mirror: Tensor,
    like: Tensor,
    rows: Iterable[Tensor],
    replay: Callable[[Tensor], Tensor],
) -> DeferredLogits:
    if like is mirror:
        return logits
    source = logits._source.of_rows(rows)
    if like.untyped_storage()._cdata != mirror.untyped_storage()._cdata:
        return _made(source, like, logits)
    root, before = logits if logits._root is None else logits._root, logits._replay

    def again(values: Tensor) -> Tensor:
        return replay(values if before is None else before(values))

    if torch.is_grad_enabled() or not like.requires_grad:
        return _deferred(source, like, like.requires_grad, (logits,), root, again)
    # As eager's: a leaf, which keeps to itself what gradient it gets.
    made = _deferred(source, like, False, (logits,), root, again)
    return _metadata(Tensor.requires_grad_, made)


def _made(source: _Source, like: Tensor, *parents: DeferredLogits) -> DeferredLogits:
    _unless(like.is_contiguous())
    return _deferred(source, like, like.requires_grad, parents)


def _converted(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    fmt = kwargs.get("memory_format")
    _unless(fmt in (None, torch.preserve_format, torch.contiguous_format))
    mirror = logits._mirror()
    like = _on_mirror(func, mirror, *args, **kwargs)
    if like is mirror:
        return logits
    source = logits._source.then(lambda values: values.to(like.dtype))
    if like.dtype in (mirror.dtype, torch.float32):
        source.linear = logits._source.linear
    return _made(source, like, logits)


def _to(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    if func is Tensor.type and not args and not kwargs:
        return _metadata(func, logits)
    _unless(not any(argument is True for argument in args))  # copy, by its position
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    try:
        device, dtype, _, fmt = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError) as failure:
        raise _NotByRows from failure
    _unless(device is None or torch.empty(0, device=device).device == logits._native("device"))
    dtype = dtype or logits._native("dtype")
    return _converted(Tensor.to, logits, dtype, copy=copy, memory_format=fmt)


def _elementwise(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """Of numbers, of values of the same rows, and of a tensor with one value, or one per row."""
    mirror, source = logits._mirror(), logits._source
    _unless(not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args[1:], kwargs))))
    parents: tuple[DeferredLogits, ...] = (logits,)
    other = args[0] if args else None
    if isinstance(other, DeferredLogits):
        _unless(not other._computed() and other._own_node(_DDPSink._backward_cls))
        other._source.check()
        like = _on_mirror(func, mirror, other._mirror(), **kwargs)
        source, parents = _both(func, source, other._source, kwargs), (logits, other)
    elif isinstance(other, Tensor):
        like = _on_mirror(func, mirror, other, **kwargs)
        per_row = other.shape == (*mirror.shape[:-1], 1)
        _unless(per_row or not other.shape)
        kept = (other.clone(),)
        rows, parameters = (kept, ()) if per_row else ((), kept)
        source = source.then(lambda values, o: func(values, o, **kwargs), rows, parameters)
    else:
        like = _on_mirror(func, mirror, *args, **kwargs)
        source = source.then(lambda values: func(values, *args, **kwargs))
    _unless(like.shape == mirror.shape)
    return _made(source, like, *parents)


def _both(func: Any, a: _Source, b: _Source, kwargs: dict[str, Any]) -> _Source:
    """``func`` of values of two sources, of which one has all tensors of the other."""
    rows, parameters = max(a.rows, b.rows, key=len), max(a.parameters, b.parameters, key=len)
    for source in (a, b):
        for some, all_ in ((source.rows, rows), (source.parameters, parameters)):
            _unless(all(map(_same, some, all_)))

    def values(source: _Source, rs: Sequence[Tensor], ps: Sequence[Tensor]) -> Any:
        return source.function(rs[: len(source.rows)], ps[: len(source.parameters)])

    return _Source(
        lambda rs, ps: func(values(a, rs, ps), values(b, rs, ps), **kwargs),
        rows,
        parameters,
        a.classes,
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """One tensor, or views that are alike of one tensor."""
    if a is b or a._base is None or a._base is not b._base:
        return a is b
    alike = a.shape == b.shape and a.stride() == b.stride() and a.requires_grad == b.requires_grad
    return alike and a.storage_offset() == b.storage_offset()


def _over_classes(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    names, keeps_shape = _OVER_CLASSES[func.__name__]
    mirror = logits._mirror()
    _unless(len(args) <= len(names) and not kwargs.get("sparse_grad"))
    given = dict(zip(names, args, strict=False)) | kwargs
    dim = given.get("dim", -1 if func.__name__ == "topk" else None)
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    _unless(type(dim) is int and dim in (-1, mirror.dim() - 1))
    like = _on_mirror(func, mirror, **given)
    given["dim"] = -1
    index = given.pop("index", None)
    if index is None:
        source = logits._source.then(lambda values: func(values, **given))
    else:
        _unless(index.shape[:-1] == mirror.shape[:-1])
        source = logits._source.then(lambda values, i: func(values, index=i, **given), (index,))
    return _made(source, like, logits) if keeps_shape else _by_chunks(source, like, logits)


def _by_chunks(source: _Source, like: Any, logits: DeferredLogits) -> Any:
    likes = _tuple(like)

    def outcome() -> tuple[Tensor, ...]:
        # Not as views, which autograd forbids to write to.
        pairs = zip(source.outputs(), likes, strict=True)
        return tuple(output.reshape(part.shape).detach() for output, part in pairs)

    differentiable = any(part.requires_grad for part in likes)
    outputs = _record(outcome, source, differentiable, (logits,))
    return outputs[0] if isinstance(like, Tensor) else type(like)(outputs)


def _cross_entropy(
    func: Any,
    logits: DeferredLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``F.cross_entropy`` or ``F.nll_loss`` of [N, V] or [V]."""
    mirror = logits._mirror()
    _unless(size_average is None and reduce is None and mirror.dim() <= 2)
    _unless(target.shape == mirror.shape[:-1] and target.dtype == torch.int64)
    _unless(reduction in ("none", "sum", "mean"))
    settings: dict[str, Any] = dict(ignore_index=ignore_index)
    if func is F.cross_entropy:
        settings["label_smoothing"] = label_smoothing
    wide = _wide(mirror.dtype)

    def losses(values: Tensor, labels: Tensor, *weights: Tensor) -> Tensor:
        weights = tuple(w.to(wide) for w in weights)
        return func(values.to(wide), labels.squeeze(-1), *weights, reduction="none", **settings)

    fused = func is F.cross_entropy and weight is None and reduction != "none"
    if fused and logits._source.linear is not None:
        total = _sum_of_losses(logits, mirror.requires_grad, target, **settings)
    else:
        weights = () if weight is None else (weight,)
        source = logits._source.then(losses, (target.unsqueeze(-1),), weights)
        grad = mirror.requires_grad and torch.is_grad_enabled()
        like = torch.empty(target.shape, device="meta", dtype=wide, requires_grad=grad)
        total = _by_chunks(source, like, logits)
        total = total if reduction == "none" else total.sum()
    if reduction == "mean":
        valid = target != ignore_index
        total = total / (valid if weight is None else weight[target[valid]].to(wide)).sum()
    return total.to(mirror.dtype)


def _sum_of_losses(
    logits: DeferredLogits,
    requires_grad: bool,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """By the op whose forward computes the gradients."""
    hidden, weight, *bias = (t.to(logits._source.linear) for t in logits._source.tensors)
    record = requires_grad and torch.is_grad_enabled()
    given = hidden, weight, bias[0] if bias else None
    needs = [record and tensor is not None and tensor.requires_grad for tensor in given]
    chunking = 0, torch.float32, True
    loss = linear_cross_entropy(
        *given, target, ignore_index, label_smoothing, 0.0, *needs, *chunking
    )[0]
    if not record:
        return loss
    _bypass((logits,))
    return _Signal.apply(logits, loss)


_HANDLERS: dict[Any, Callable[..., Any]] = {}
# Names of what may follow the tensor, and whether the shape stays.
_OVER_CLASSES: dict[str, tuple[tuple[str, ...], bool]] = {
    "argmax": (("dim", "keepdim"), False),
    "argmin": (("dim", "keepdim"), False),
    "amax": (("dim", "keepdim"), False),
    "amin": (("dim", "keepdim"), False),
    "max": (("dim", "keepdim"), False),
    "min": (("dim", "keepdim"), False),
    "sum": (("dim", "keepdim"), False),
    "mean": (("dim", "keepdim"), False),
    "logsumexp": (("dim", "keepdim"), False),
    "topk": (("k", "dim", "largest", "sorted"), False),
    "gather": (("dim", "index"), False),
    "softmax": (("dim",), True),
    "log_softmax": (("dim",), True),
}


def _register(names: str | Iterable[str], handler: Callable[..., Any]) -> None:
    for name in names.split() if isinstance(names, str) else names:
        for place in (Tensor, torch, F):
            function: Any = getattr(place, name, None)
            if inspect.isgetsetdescriptor(function):
                _HANDLERS[function.__get__] = handler
            elif callable(function):
                _HANDLERS[function] = handler


_register(
    "shape dtype device layout ndim requires_grad grad_fn is_leaf grad retains_grad output_nr "
    "itemsize nbytes is_cpu is_cuda is_meta is_mps is_xpu is_nested is_quantized is_sparse "
    "is_sparse_csr is_mkldnn _base _backward_hooks _post_accumulate_grad_hooks size stride dim "
    "ndimension numel nelement element_size storage_offset get_device is_contiguous is_complex "
    "is_floating_point is_signed is_inference is_conj is_neg __len__",
    _metadata,
)
_register("__repr__ __format__", _text)
_register("register_hook", _hook)
_register(
    "view reshape flatten unflatten squeeze unsqueeze", _of_rows(_reshaped, under_autocast=True)
)
_register(
    "__getitem__ select narrow index_select transpose swapaxes swapdims permute movedim unbind "
    "split chunk tensor_split detach",
    _of_rows(_selected, under_autocast=True),
)
_register("clone contiguous float bfloat16 half double", _of_rows(_converted, under_autocast=True))
_register("to type type_as", _of_rows(_to, under_autocast=True))
_register(
    "mul multiply div divide true_divide add sub subtract neg exp log tanh pow clamp __mul__ "
    "__rmul__ __truediv__ __rtruediv__ __add__ __radd__ __sub__ __rsub__ __neg__ __pow__",
    _of_rows(_elementwise),
)
_register(_OVER_CLASSES, _of_rows(_over_classes))
_register("cross_entropy nll_loss", _of_rows(_cross_entropy))
