"""What the gated activations, ``act(gate) * up``, ask of their inputs."""

import torch
from liger_fx.passes._norms import DTYPES, check_columns
from torch import fx

from liger_fx.canonical import same_sizes, storage_key
from liger_fx.matcher import Match, Reject


def check_gated(match: Match, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Raise `Reject` for inputs that Liger's kernel does not take as they are."""
    for name, value in (("gate", gate), ("up", up)):
        if not isinstance(value, torch.Tensor):
            raise Reject(f"{name} is a number, {value!r}; the kernel takes two tensors")
        if value.dtype not in DTYPES:
            raise Reject(f"{name} is {value.dtype}; the kernel computes in float32")
    if gate.dtype != up.dtype:
        raise Reject(f"gate is {gate.dtype}, up is {up.dtype}, expected one dtype")
    if not same_sizes(gate.shape, up.shape):
        raise Reject(f"the product broadcasts {list(gate.shape)} and {list(up.shape)}")
    # The backward writes over both; and a copy would cost more than the kernel gains.
    if storage_key(match.bindings["gate"]) == storage_key(match.bindings["up"]):
        raise Reject("gate and up share memory")
    if not (gate.is_contiguous() and up.is_contiguous()):
        raise Reject("gate or up is not contiguous: the kernel would need a copy")
    check_columns(gate)


def check_halves(match: Match, gate_up: torch.Tensor) -> None:
    """The same where gate and up are in one tensor."""
    check_columns(match.output)
    if gate_up.dtype not in DTYPES:
        raise Reject(f"gate and up are {gate_up.dtype}; the kernel computes in float32")
    columns = gate_up.shape[-1]
    if not isinstance(columns, int) or columns % 2:
        raise Reject(f"gate and up are {columns} elements of one tensor, expected an even constant")
    if not gate_up.is_contiguous():
        raise Reject("the tensor of gate and up is not contiguous: the kernel would need a copy")


def may_overwrite(match: Match, *names: str) -> bool:
    """Does nothing but the match read these values? Without other readers in the forward there are
    none in the backward, but for those that need its result. See `liger_fx.ops.gated`."""
    return all(_readers(match.bindings[name]) <= match.nodes for name in names)


def _readers(node: fx.Node) -> set[fx.Node]:
    """All that reads the memory of ``node``, through whatever view of it."""
    views, todo = {node}, [node]
    while todo:
        current = todo.pop()
        for other in [*current.all_input_nodes, *current.users]:
            if other not in views and storage_key(other) == storage_key(node):
                views.add(other)
                todo.append(other)
    return {user for view in views for user in view.users} - views
