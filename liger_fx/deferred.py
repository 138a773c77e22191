"""Logits that are computed when they are read.

A fused loss needs no logits, yet models return them beside the loss. `DeferredLogits` takes their
place: a tensor of the true shape, dtype, device and gradient, but without memory.

Autograd     `DeferredLogits.__torch_dispatch__` runs below autograd. Gradients, views, hooks and
             version counters are therefore torch's own.
Rows         Each row of logits depends on one row of hidden states. `_RULES` holds the ATen
             functions that keep rows apart. Their results are deferred, or, where a rule reduces
             the classes (argmax, logsumexp, ...), computed by chunks of rows. Every other function
             gets the values, which are computed once.
Backward     The gradient of deferred logits is deferred as well. The backward of the projection
             computes it by chunks, like a checkpoint that recomputes what it needs.
Writes       A view of deferred logits knows how it was made. A write computes the whole tensor
             first, and all its views are then views of these values.
Not seen     A parameter that is written through ``.data``, or filled anew by FSDP2 after a reshard:
             the version counter of such a parameter does not change.
"""

from __future__ import annotations

import abc
import logging
import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from liger_fx.ops.chunked_head import chunk_tokens_for
from liger_fx.ops.library import without_autocast
from liger_fx.ops.linear_loss import linear_loss_kernel, scaled_kernel

aten = torch.ops.aten
_log = logging.getLogger("liger_fx")
_count = 0
_readers: set[str] = set()
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


# -- rows ------------------------------------------------------------------------------------------
# Deferred values [*, V] are a tree of nodes. ``node.at(rows, memo)`` computes some of its N rows,
# which are a slice or an int64 tensor [n].

_Memo = dict[tuple[Any, int], tuple[Any, Any]]


class _Node(abc.ABC):
    def at(self, rows: Any, memo: _Memo) -> Any:
        key = self, id(rows)
        if key not in memo:
            memo[key] = rows, self.compute(rows, memo)  # rows stay alive, and so does their id
        return memo[key][1]

    @abc.abstractmethod
    def compute(self, rows: Any, memo: _Memo) -> Any: ...

    def cast(self, dtype: torch.dtype) -> _Node:
        return _Op(aten._to_copy.default, (self,), {"dtype": dtype})


@dataclass(eq=False)
class _Each(_Node):
    """The rows of a tensor [N, ...]."""

    tensor: Tensor

    def compute(self, rows: Any, memo: _Memo) -> Tensor:
        return self.tensor[rows]


@dataclass(eq=False)
class _Op(_Node):
    """``function(*args, **kwargs)``, where nodes stand for their rows."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def compute(self, rows: Any, memo: _Memo) -> Any:
        args, kwargs = tree_map_only(_Node, lambda n: n.at(rows, memo), (self.args, self.kwargs))
        return self.function(*args, **kwargs)


# Equal views share one index, so that what is computed for the one is there for the other.
_indices: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()


def _rows_of_view(view: Tensor, count: int, device: torch.device) -> Tensor:
    """Which of ``count`` rows a view of them with the metadata of ``view`` has: int64 [n]."""
    strides = tuple(view.shape), view.stride(), int(view.storage_offset())
    key = count, strides, device
    index = _indices.get(key)
    if index is None:
        with torch.inference_mode(False):
            rows = torch.arange(count, device=device)
            index = _indices[key] = rows.as_strided(*strides).reshape(-1).clone()
    return index


def _indexed(index: Tensor, rows: Any, memo: _Memo) -> Any:
    """``index[rows]``, one tensor for each pair of them."""
    key = id(index), id(rows)
    if key not in memo:
        memo[key] = (index, rows), index[rows]
    return memo[key][1]


@dataclass(eq=False)
class _Take(_Node):
    """Row j is row ``index[j]`` of the source."""

    source: _Node
    index: Tensor

    def compute(self, rows: Any, memo: _Memo) -> Any:
        return self.source.at(_indexed(self.index, rows, memo), memo)


@dataclass(eq=False)
class _Put(_Node):
    """The transpose of `_Take`: row j of the source is added to row ``index[j]`` of zeros."""

    source: _Node
    index: Tensor

    def compute(self, rows: Any, memo: _Memo) -> Any:
        index = self.index
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=index.device)
        wanted, inverse = rows.unique(return_inverse=True)
        found = torch.isin(index, wanted).nonzero().squeeze(1)
        values = self.source.at(found, memo)
        zeros = values.new_zeros(len(wanted), values.shape[-1])
        return zeros.index_add_(0, torch.searchsorted(wanted, index[found]), values)[inverse]

    def cast(self, dtype: torch.dtype) -> _Node:
        return _Put(self.source.cast(dtype), self.index)


@dataclass(eq=False)
class _Known(_Op):
    """A gradient of logits whose gradients of hidden states [N, H] and parameters are known.

    steps: what is between these logits and the projection, the outermost first: by each of them the
    gradient has to come, and by nothing else.
    """

    key: Any = None  # of the projection
    gradients: Sequence[Tensor | None] = ()
    steps: Sequence[_Op] = ()

    def cast(self, dtype: torch.dtype) -> _Node:
        before = _Op(self.function, self.args, self.kwargs)
        return replace(self, function=Tensor.to, args=(before, dtype), kwargs={})


def _through_steps(made: _Op) -> _Op:
    """``made``, known as well if it takes a gradient that is known by its next step."""
    grad = made.args[0]
    if not isinstance(grad, _Known) or not grad.steps:
        return made
    step, *others = grad.steps
    _, *operands = made.args
    if step.function is aten.tanh.default:
        gone = made.function is aten.tanh_backward.default and operands == [step]
    else:  # a product or quotient of logits and a number
        numbers = not any(isinstance(operand, Tensor) for operand in operands)
        gone = made.function is step.function and numbers and operands == [*step.args[1:]]
    if not gone:
        return made
    return _Known(made.function, made.args, made.kwargs, grad.key, grad.gradients, others)


class _Projection(_Op):
    """The head. needs: which of hidden states and parameters take a gradient. linear: the dtype of
    a plain ``F.linear``, for which there is a fused cross-entropy."""

    def __init__(self, head: Head, hidden: Tensor, like: Tensor, needs: Sequence[bool]) -> None:
        rows = hidden.reshape(-1, hidden.shape[-1])
        function = _under_autocast(head.function, hidden.device.type)
        super().__init__(function, (_Each(rows), *head.parameters))
        self.needs, self.like = needs, like
        self.key = object()  # outlives it: a checkpoint lets go of logits, and makes them again
        plain = head.function is F.linear and like.dtype in _KERNEL_DTYPES
        self.linear = like.dtype if plain else None
        self.tensors = rows, *head.parameters
        self.versions = [_version(tensor) for tensor in self.tensors]

    def compute(self, rows: Any, memo: _Memo) -> Any:
        self.check()
        values = super().compute(rows, memo)
        found, wanted = ((t.shape[-1], t.dtype) for t in (values, self.like))
        if found != wanted:
            raise RuntimeError(
                f"the head returned rows of {found[0]} {found[1]}, but its logits were deferred as "
                f"{list(self.like.shape)} {wanted[1]}"
            )
        return values

    def check(self) -> None:
        """Raise RuntimeError if a tensor has other values than when the logits were deferred."""
        for i, (tensor, version) in enumerate(zip(self.tensors, self.versions, strict=True)):
            written = _version(tensor) != version
            if written or (tensor.numel() and not tensor.untyped_storage().size()):
                name = f"parameter {i - 1} of the head" if i else "the hidden state"
                what = (
                    "written in place, as by optimizer.step()" if written else "resharded or freed"
                )
                raise RuntimeError(
                    f"these logits cannot be computed any more: {name}, of shape "
                    f"{list(tensor.shape)}, was {what}. Read the logits or call .materialize() on "
                    'them before that, or compile with the option logits="keep"'
                )


def _chunks(count: int, classes: int, device: torch.device) -> list[slice]:
    # What is done with the values takes about four tensors of their size in fp32.
    size = chunk_tokens_for(classes, 16, device.type)
    return [slice(i, min(i + size, count)) for i in range(0, max(count, 1), size)]


# -- gradients of the projection -------------------------------------------------------------------


class _Project(torch.autograd.Function):
    """From hidden states and parameters to deferred logits."""

    @staticmethod
    def forward(ctx: Any, head: Head, like: Tensor, hidden: Tensor, *parameters: Tensor) -> Any:
        ctx.save_for_backward(hidden, *parameters)
        ctx.set_materialize_grads(False)
        projection = _Projection(head, hidden, like, ctx.needs_input_grad[2:])
        # Not the projection itself: its tensors shall be freed with those that are saved.
        ctx.function, ctx.key = projection.function, projection.key
        ctx.projection = weakref.ref(projection)
        return _wrapped(like, projection, hidden.device)

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if grad is None:
            return None, None, *[None] * len(needs)
        if torch.is_grad_enabled():  # of gradients
            # The backward ends at these, although hidden states may depend on a parameter.
            inputs = [t.view_as(t) for t in inputs]
            outputs = ctx.function(*inputs)
            return None, None, *_gradients(outputs, inputs, needs, grad, create_graph=True)
        node: Any = _node_of(grad)
        index = None
        while isinstance(node, _Put):
            node, index = node.source, node.index if index is None else index[node.index]
        if isinstance(node, _Known) and node.key is ctx.key and not node.steps:
            rows, *others = node.gradients
        else:
            with without_autocast(grad.device.type):
                rows, *others = _by_recomputing(
                    ctx.function, ctx.projection(), inputs, needs, node, index, grad.shape[-1]
                )
        hidden = inputs[0]
        if rows is not None and index is not None:
            zeros = rows.new_zeros(hidden.shape[:-1].numel(), hidden.shape[-1])
            rows = zeros.index_add_(0, index, rows)
        found = [None if rows is None else rows.view(hidden.shape), *others]
        pairs = zip(found, inputs, strict=True)
        return None, None, *(g if g is None else g.to(t.dtype) for g, t in pairs)


def _gradients(
    outputs: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor, **how: Any
) -> list[Tensor | None]:
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, grad, materialize_grads=True, **how))
    return [next(found) if need else None for need in needs]


def _by_recomputing(
    function: Callable[..., Tensor],
    projection: _Projection | None,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    node: _Node,
    index: Tensor | None,
    classes: int,
) -> list[Tensor | None]:
    """The gradients of hidden states and parameters, of the gradient of logits that ``node``
    computes. Each chunk of logits is computed anew. index: the row of hidden states for each row of
    ``node``, None for all in order; the gradients of hidden states [n, H] are in this order."""
    hidden, *parameters = (t.detach() for t in inputs)
    hidden = hidden.reshape(-1, hidden.shape[-1])  # before it is trained: a copy would not be
    for tensor, need in zip((hidden, *parameters), needs, strict=True):
        tensor.requires_grad_(need)
    # A sum over chunks in bf16 would lose what a chunk adds to it.
    sums: list[Any] = [
        torch.zeros_like(p, dtype=_wide(p.dtype)) if p.requires_grad else None for p in parameters
    ]
    parts: list[Any] = []
    for chunk in _chunks(len(hidden if index is None else index), classes, hidden.device):
        memo: _Memo = {}
        rows = chunk if index is None else _indexed(index, chunk, memo)
        with torch.enable_grad():
            some = hidden[rows], *parameters
            values = function(*some)
        memo[projection, id(rows)] = rows, values.detach()
        part, *found = _gradients(values, some, needs, node.at(chunk, memo))
        parts.append(part)
        for total, gradient in zip(sums, found, strict=True):
            if total is not None:
                total.add_(gradient)
    return [torch.cat(parts) if needs[0] else None, *sums]


def _node_of(gradient: Tensor) -> Any:
    if isinstance(gradient, DeferredLogits):
        if gradient._node is not None and not gradient._computed():
            return gradient._node
        gradient = gradient.materialize().detach()
    return _Each(gradient.reshape(-1, gradient.shape[-1]))


# -- the tensor ------------------------------------------------------------------------------------


class DeferredLogits(Tensor):
    """Logits [*, V] of hidden states [*, H], computed when they are read.

    dtype, classes (V) and requires_grad are those of what ``head.function`` returns. Nothing is
    computed here. Holding the tensor keeps the hidden states and the head's parameters alive.
    """

    _store: _Store
    _node: Any  # None for a view that takes rows apart
    _replay: Any = None  # of a view: what makes it of the values of its store
    _part: Tensor | None = None  # the values of a view, where those of its store were not needed
    _given: Any = None

    def __new__(
        cls, head: Head, hidden: Tensor, *, classes: int, dtype: torch.dtype, requires_grad: bool
    ) -> DeferredLogits:
        like = torch.empty((*hidden.shape[:-1], classes), dtype=dtype, device="meta")
        with torch.set_grad_enabled(requires_grad):
            made: DeferredLogits = _Project.apply(head, like, hidden, *head.parameters)
        return made

    def materialize(self) -> Tensor:
        """The values as an ordinary tensor, with a gradient if ``requires_grad``: the same tensor
        as long as somebody holds it, and a view, so that it and these logits see what is written to
        the other.

        Raises RuntimeError if the values do not exist yet, and the hidden states or parameters have
        been written or resharded.
        """
        given: Tensor | None = self._given and self._given()
        if given is None:
            with torch.inference_mode(False), torch.enable_grad():
                given = aten.alias(self)
            self._given = weakref.ref(given)
        return given

    def _computed(self) -> bool:
        return self._store.values is not None

    def _compute(self, whole: bool = False) -> Tensor:
        """The values, without history. whole: in the memory that all views share."""
        store = self._store
        part = self._node is not None and self.numel() < store.like.numel()
        if whole or self._computed() or not part:
            if store.values is None:
                store.values = _read(store.node, store.like, self.device)
            return self._replay(store.values) if self._replay else store.values
        if self._part is None:
            self._part = _read(self._node, self, self.device)
        return self._part

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self._computed():
            return repr(self.materialize())
        return (
            f"DeferredLogits(not computed yet, shape={list(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, requires_grad={self.requires_grad})"
        )

    def __format__(self, spec: str) -> str:
        return format(self.materialize(), spec) if spec else repr(self)

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return _ABOVE_AUTOGRAD.get(func, _no_rule)(*args, **(kwargs or {}))
            except _NeedsValues:
                return func(*args, **(kwargs or {}))

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        outcome = func.decompose(*args, **kwargs)
        if outcome is not NotImplemented:  # what autograd would have decomposed, without autograd
            return outcome
        if func is aten.alias.default:  # by `materialize`
            return args[0]._compute(whole=True).detach()
        if func.is_view:
            return _view(func, *args, **kwargs)
        rule = _no_rule if func._schema.is_mutable else _RULES.get(func.overloadpacket, _no_rule)
        try:
            return rule(func, *args, **kwargs)
        except _NeedsValues:
            return _on_values(func, args, kwargs)


for _name in (
    *("numpy", "tolist", "data_ptr", "untyped_storage", "storage", "pin_memory", "share_memory_"),
    *("__array__", "__dlpack__", "__deepcopy__", "__reduce_ex__"),
):

    def _of_memory(self: Any, *args: Any, _name: str = _name, **kwargs: Any) -> Any:
        return getattr(self.materialize(), _name)(*args, **kwargs)

    setattr(DeferredLogits, _name, _of_memory)


@dataclass(eq=False)
class _Store:
    """What a tensor and its views share. like: metadata of the whole. values: when computed."""

    node: _Node
    like: Tensor
    values: Tensor | None = None


def _wrapped(like: Tensor, node: Any, device: torch.device, **attributes: Any) -> DeferredLogits:
    made: DeferredLogits = Tensor._make_wrapper_subclass(
        DeferredLogits,
        like.shape,
        strides=like.stride(),
        storage_offset=int(like.storage_offset()),
        dtype=like.dtype,
        device=device,
    )
    made._node = node
    for name, value in ({"_store": _Store(node, like)} | attributes).items():
        setattr(made, name, value)
    return made


def _read(node: _Node, like: Tensor, device: torch.device) -> Tensor:
    (values,) = _evaluate(node, [slice(0, like.shape[:-1].numel())], device)
    _announce(values)
    return values.reshape(like.shape)


def _on_values(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    arguments = func._schema.arguments
    owners: dict[int, DeferredLogits] = {}

    def values(argument: Any, given: Any) -> Any:
        def of(logits: DeferredLogits) -> Tensor:
            real = logits._compute(whole=argument.is_write)
            owners[id(real)] = logits
            if argument.is_write and given is not logits and not logits.is_inference():
                torch.autograd.graph.increment_version(logits)  # torch forgets it in a list
            return real

        return tree_map_only(DeferredLogits, of, given)

    named = {argument.name: argument for argument in arguments}
    args = [values(argument, given) for argument, given in zip(arguments, args, strict=False)]
    outcome = func(*args, **{name: values(named[name], kwargs[name]) for name in kwargs})
    return tree_map(lambda leaf: owners.get(id(leaf), leaf), outcome)


def _view(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    store, before, device = logits._store, logits._replay, logits.device
    likes = func(_mirror(logits), *args, **kwargs)

    def made(like: Tensor, pick: Callable[[Any], Tensor]) -> DeferredLogits:
        def replay(whole: Tensor) -> Tensor:
            return pick(func(before(whole) if before else whole, *args, **kwargs))

        node = _node_of_view(store, like, device)
        return _wrapped(like, node, device, _store=store, _replay=replay)

    if isinstance(likes, Tensor):
        return made(likes, lambda view: view)
    return [made(like, operator.itemgetter(i)) for i, like in enumerate(likes)]


def _node_of_view(store: _Store, like: Tensor, device: torch.device) -> _Node | None:
    """The rows of a view with this metadata; None if the view takes rows apart."""
    classes, steps = store.like.shape[-1], (*like.stride()[:-1], like.storage_offset())
    if like.dtype != store.like.dtype or like.shape[-1:] != (classes,) or like.stride(-1) != 1:
        return None
    if any(step % classes for step in steps):
        return None
    if like.numel() == store.like.numel() and like.is_contiguous():
        return store.node
    count, (*stride, offset) = store.like.shape[:-1].numel(), (step // classes for step in steps)
    rows = torch.empty(count, device="meta").as_strided(like.shape[:-1], stride, offset)
    return _Take(store.node, _rows_of_view(rows, count, device))


def _mirror(logits: DeferredLogits) -> Tensor:
    """A tensor without memory that is otherwise alike."""
    like = logits._store.like.view(logits.dtype)
    return like.as_strided(logits.shape, logits.stride(), logits.storage_offset())


# -- rules -----------------------------------------------------------------------------------------
# ``rule(func, *args, **kwargs)`` gives the result of an ATen function by rows.


class _NeedsValues(Exception):
    """The function has to see the values."""


def _no_rule(*args: Any, **kwargs: Any) -> None:
    raise _NeedsValues


def _unless(holds: bool) -> None:
    if not holds:
        raise _NeedsValues


def _tried(func: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return func(*args, **kwargs)
    except Exception as failure:  # the function itself shall say so, of the values
        raise _NeedsValues from failure


def _rows(values: Any) -> Any:
    """The node of deferred values that are not computed yet."""
    _unless(isinstance(values, DeferredLogits) and not values._computed())
    _unless(values._node is not None)
    return values._node


def _like(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What the function makes of metadata."""

    def meta(leaf: Any) -> Any:
        if isinstance(leaf, DeferredLogits):
            return _mirror(leaf)
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        return leaf.to("meta") if isinstance(leaf, Tensor) else leaf

    args, kwargs = tree_map(meta, (args, kwargs))
    return _tried(func, *args, **kwargs)


def _made(like: Tensor, node: _Node, device: torch.device) -> DeferredLogits:
    _unless(like.is_contiguous())
    return _wrapped(like, node, device)


def _first(*arguments: Any) -> DeferredLogits:
    return next(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, DeferredLogits))


def _copied(func: Any, logits: DeferredLogits, *args: Any, device: Any = None, **kw: Any) -> Any:
    _unless(device is None or torch.empty(0, device=device).device == logits.device)
    like, node = _like(func, logits, *args, **kw), _rows(logits)
    node = node if like.dtype == logits.dtype else node.cast(like.dtype)
    return _made(like, node, logits.device)


def _by_rows(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A function of values of the same rows, of numbers, and of tensors with a value for each row
    or class. Deferred if the shape stays, computed by chunks otherwise."""
    logits = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, DeferredLogits))
    like, lead = _like(func, *args, **kwargs), logits.shape[:-1]
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    if func.overloadpacket in _OVER_CLASSES:
        dim = given.get("dim")
        dims = dim if isinstance(dim, Sequence) else [dim]
        _unless(len(dims) == 1 and dims[0] in (-1, len(lead)))
        given["dim"] = -1 if dims[0] is dim else [-1]

    def operand(leaf: Tensor) -> Any:
        if isinstance(leaf, DeferredLogits):
            _unless(leaf.shape == logits.shape)
            return _rows(leaf)
        if func.overloadpacket in _OVER_CLASSES:
            _unless(leaf.dim() == logits.dim() and leaf.shape[:-1] == lead)
            return _Each(leaf.reshape(-1, leaf.shape[-1]))
        # Copied, as it may be written to before the function runs.
        if leaf.numel() == leaf.shape[-1:].numel():
            return leaf.reshape(leaf.shape[-1:]).clone()
        _unless(leaf.shape[:-1] == lead and (leaf.shape[-1] == 1 or leaf.stride(-1) == 0))
        return _Each(leaf[..., :1].reshape(-1, 1).clone())

    given = tree_map_only(Tensor, operand, given)
    node = _Op(func, [given.pop(a.name) for a in arguments if not a.kwarg_only], given)
    node = _through_steps(node)
    if isinstance(like, Tensor) and like.shape == logits.shape:
        return _made(like, node, logits.device)
    outputs = _by_chunks(node, logits)
    if isinstance(like, Tensor):
        return outputs[0].reshape(like.shape)
    return tuple(o.reshape(part.shape) for o, part in zip(outputs, like, strict=True))


def _by_chunks(node: _Node, logits: DeferredLogits) -> list[Tensor]:
    chunks = _chunks(logits.shape[:-1].numel(), logits.shape[-1], logits.device)
    return _evaluate(node, chunks, logits.device)


_NONE, _MEAN = 0, 1  # reductions of ATen


def _nll_loss(
    func: Any, logprobs: Any, target: Tensor, weight: Any, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    args = _rows(logprobs), _Each(target.reshape(-1)), weight, _NONE, ignore_index
    losses = _by_chunks(_Op(lambda *args: func(*args)[0], args), logprobs)[0].view(target.shape)
    valid = target != ignore_index
    total = (valid if weight is None else weight[target[valid]]).sum().to(losses.dtype)
    if reduction == _NONE:
        return losses, total
    whole = losses.sum(dtype=_wide(losses.dtype))
    return (whole / total if reduction == _MEAN else whole).to(losses.dtype), total


def _nll_loss_backward(
    func: Any, grad: Any, logprobs: Any, target: Any, weight: Any, reduction: int, *others: Any
) -> DeferredLogits:
    grads = (grad / others[-1] if reduction == _MEAN else grad).expand(target.shape)
    rows = _Each(grads.reshape(-1)), _rows(logprobs), _Each(target.reshape(-1))
    node = _Op(func, (*rows, weight, _NONE, *others))
    return _made(_mirror(logprobs), node, logprobs.device)


def _index(func: Any, logits: DeferredLogits, *args: Any) -> DeferredLogits:
    """``index`` by tensors, or ``index_select``, of leading dimensions."""
    if func is aten.index.Tensor:
        last = max(i for i, index in enumerate(args[0]) if index is not None)
        args = (args[0][: last + 1],)
    node, lead = _rows(logits), logits.shape[:-1]
    index = _tried(func, torch.arange(lead.numel(), device=logits.device).view(lead), *args)
    like = torch.empty(*index.shape, logits.shape[-1], dtype=logits.dtype, device="meta")
    return _made(like, _Take(node, index.flatten()), logits.device)


def _put(func: Any, zeros: DeferredLogits, *args: Any) -> DeferredLogits:
    """The backward of `_index`: rows are added to zeros, by ``index_put(indices, rows, True)`` or
    ``index_add(dim, index, rows)``."""
    by_tensors = func is aten.index_put.default
    *index, rows = args[:2] if by_tensors else args
    _unless(getattr(_rows(zeros), "function", None) is _zeros and (not by_tensors or args[2]))
    taken = _index(aten.index.Tensor if by_tensors else aten.index_select.default, zeros, *index)
    _unless(taken.shape == rows.shape)
    return _made(_mirror(zeros), _Put(_node_of(rows), taken._node.index), zeros.device)


def _new_zeros(func: Any, logits: DeferredLogits, size: Sequence[int], **kwargs: Any) -> Any:
    like = _like(func, logits, size, **kwargs)
    _unless(like.dtype == logits.dtype and like.shape[-1:] == logits.shape[-1:])
    rows = torch.empty(like.shape[:-1].numel(), 0, dtype=like.dtype, device=logits.device)
    return _made(like, _Op(_zeros, (_Each(rows), like.shape[-1])), logits.device)


def _zeros(rows: Tensor, classes: int) -> Tensor:
    return rows.new_zeros(len(rows), classes)


def _put_view(func: Any, rows: DeferredLogits, size: Sequence[int], dim: int, *args: Any) -> Any:
    """The backward of a slice, or of one index, of a leading dimension."""
    like = torch.empty(size, dtype=rows.dtype, device="meta")
    lead = torch.empty(size[:-1], device="meta")
    view = _tried(_FORWARD[func.overloadpacket], lead, dim % len(size), *args)
    index = _rows_of_view(view, lead.numel(), rows.device)
    return _made(like, _Put(_rows(rows), index), rows.device)


_FORWARD = {aten.slice_backward: aten.slice.Tensor, aten.select_backward: aten.select.int}
# Over the last dimension, whose gradient takes nothing else, but for gather (below).
_OVER_CLASSES = {
    aten._softmax, aten._softmax_backward_data, aten._log_softmax,
    aten._log_softmax_backward_data, aten.argmax, aten.argmin, aten.max, aten.min, aten.amax,
    aten.amin, aten.sum, aten.mean, aten.logsumexp, aten.topk, aten.gather,
}  # fmt: skip
# With what their gradients, and those of the functions above, are made of.
_POINTWISE = {
    aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.exp, aten.log, aten.tanh,
    aten.tanh_backward, aten.pow, aten.clamp, aten.eq, aten.ge, aten.le, aten.logical_and,
    aten.where,
}  # fmt: skip
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_OVER_CLASSES | _POINTWISE, _by_rows),
    **dict.fromkeys((aten.clone, aten._to_copy, aten._unsafe_view), _copied),
    **dict.fromkeys((aten.index, aten.index_select), _index),
    **dict.fromkeys(_FORWARD, _put_view),
    **dict.fromkeys((aten.index_put, aten.index_add), _put),
    aten.new_zeros: _new_zeros,
    aten.nll_loss_forward: _nll_loss,
    aten.nll_loss_backward: _nll_loss_backward,
}


# -- above autograd --------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """For autograd's own formula makes a gradient of all logits."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, index: Tensor) -> Any:
        ctx.save_for_backward(index)
        ctx.shape = logits.shape
        return aten.gather(logits, -1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (index,), classes = ctx.saved_tensors, ctx.shape[-1]
        if torch.is_grad_enabled():  # of gradients
            return grad.new_zeros(ctx.shape).scatter_add(-1, index, grad), None

        def scattered(rows: Tensor, at: Tensor) -> Tensor:
            return rows.new_zeros(len(rows), classes).scatter_add_(-1, at, rows)

        like = torch.empty(ctx.shape, dtype=grad.dtype, device="meta")
        node = _Op(scattered, (_node_of(grad), _node_of(index)))
        return _wrapped(like, node, grad.device), None


def _gather(input: Any, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    _rows(input)
    _unless(not sparse_grad and dim in (-1, input.dim() - 1))
    _unless(index.shape[:-1] == input.shape[:-1])
    gathered: Tensor = _Gather.apply(input, index)
    return gathered


class _CrossEntropy(torch.autograd.Function):
    """The sum of losses, by the op whose forward computes the gradients."""

    @staticmethod
    def forward(
        ctx: Any, logits: DeferredLogits, target: Tensor, grad: bool, *settings: Any
    ) -> Any:
        projection, index, steps = _plain_projection(logits)
        projection.check()
        hidden, *parameters = projection.tensors
        hidden = hidden if index is None else hidden[index]
        given = [t.to(projection.linear) for t in (hidden, *parameters)]
        absent = [None] * (3 - len(given))
        needs = [grad and need for need in projection.needs] + [False] * len(absent)
        others = [None] * 6  # class weights, a teacher, weights of tokens, a mask
        taken = (["cross_entropy"], *settings, *_softcap_and_temperature(steps), 0.0)
        losses, *gradients = linear_loss_kernel(
            *given, *absent, target, *others, *taken, *needs, 0, torch.float32, True, False
        )
        # Not the projection itself: these logits may have been read since.
        ctx.settings, ctx.key, ctx.needs = settings, projection.key, projection.needs
        ctx.steps = steps
        ctx.save_for_backward(logits, target, *gradients)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        logits, target, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # of gradients
            values = logits.materialize()
            return _cross_entropy_gradient(values, target, grad, *ctx.settings), *[None] * 4
        known = [
            scaled_kernel(gradient, grad) if need else None
            for gradient, need in zip(gradients, ctx.needs, strict=False)
        ]
        args = _node_of(logits), _Each(target.reshape(-1)), grad, *ctx.settings
        node = _Known(_of_values, args, {}, ctx.key, known, ctx.steps)
        return _made(_mirror(logits), node, logits.device), *[None] * 4


def _cross_entropy_gradient(
    values: Tensor, target: Tensor, grad: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    settings: Any = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        loss = F.cross_entropy(values, target, reduction="sum", **settings)
        return torch.autograd.grad(loss, values, grad.to(loss.dtype), create_graph=again)[0]


def _of_values(values: Tensor, *args: Any) -> Tensor:
    return _cross_entropy_gradient(values.detach().requires_grad_(), *args)


def _plain_projection(logits: Any) -> tuple[_Projection, Tensor | None, list[_Op]]:
    """The ``F.linear`` that these logits are, copied or widened, scaled or capped at most; the row
    of it for each of theirs, None for all in order; and what scales or caps, the outermost first.
    """
    node: Any = _rows(logits)
    index, dtypes, steps = None, {logits.dtype}, []
    while not isinstance(node, _Projection):
        if isinstance(node, _Take):
            node, index = node.source, node.index if index is None else node.index[index]
            continue
        _unless(isinstance(node, _Op))
        if node.function is aten._to_copy.default:
            dtypes.add(node.kwargs["dtype"])
        else:
            steps.append(node)
        node = node.args[0]
    _unless(node.linear is not None and dtypes <= {node.linear, torch.float32})
    _softcap_and_temperature(steps)
    return node, index, steps


def _softcap_and_temperature(steps: Sequence[_Op]) -> tuple[float, float]:
    """Of ``softcap tanh(x / temperature / softcap)``, or with softcap 0 of ``x / temperature``."""
    softcap, factor, divisor = 0.0, 1.0, 1.0
    for step in steps:
        if step.function is aten.tanh.default:
            _unless(not softcap)
            softcap, factor, divisor = factor / divisor, 1.0, 1.0
            continue
        _unless(step.function in (aten.mul.Tensor, aten.div.Tensor))
        number = step.args[1]
        _unless(isinstance(number, int | float) and 0.0 < number < float("inf"))
        factor *= number if step.function is aten.mul.Tensor else 1.0
        divisor *= number if step.function is aten.div.Tensor else 1.0
    return softcap, divisor / factor / (softcap or 1.0)


def _cross_entropy(
    input: Any,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` of a projection [N, V] or [V], fused."""
    _plain_projection(input)
    _unless(weight is None and size_average is None and reduce is None)
    _unless(input.dim() <= 2 and target.shape == input.shape[:-1] and target.dtype == torch.int64)
    _unless(reduction in ("sum", "mean"))
    # Autocast would widen them.
    low = input.dtype in (torch.bfloat16, torch.float16)
    _unless(not (low and torch.is_autocast_enabled(input.device.type)))
    grad = input.requires_grad and torch.is_grad_enabled()
    total: Tensor = _CrossEntropy.apply(input, target, grad, ignore_index, label_smoothing)
    if reduction == "mean":
        total = total / (target != ignore_index).sum()
    return total.to(input.dtype)


_ABOVE_AUTOGRAD: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    **dict.fromkeys((torch.gather, Tensor.gather), _gather),
}


# -- around a computation --------------------------------------------------------------------------


def _evaluate(node: _Node, chunks: Sequence[slice], device: torch.device) -> list[Tensor]:
    """The outputs of the node for all chunks, whatever mode and autocast its reader is under."""
    with (
        enable_reentrant_dispatch(),
        torch.inference_mode(False),
        torch.no_grad(),  # after the former, which sets the grad mode too
        without_autocast(device.type),
    ):
        parts = [node.at(rows, {}) for rows in chunks]
        columns = zip(*(p if isinstance(p, tuple) else (p,) for p in parts), strict=True)
        return [c[0] if len(c) == 1 or not c[0].dim() else torch.cat(c) for c in columns]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _under_autocast(function: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
    """``function`` under the autocast of now."""
    if not torch.amp.is_autocast_available(kind):
        return function
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def run(*args: Tensor) -> Tensor:
        # Without the cache, in which a parameter's cast outlives the parameter's values.
        with torch.autocast(kind, dtype, enabled, cache_enabled=False):
            return function(*args)

    return run


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
