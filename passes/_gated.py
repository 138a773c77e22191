"""What the gated activations, ``act(gate) * up``, ask of their inputs."""

import torch
from liger_fx.passes._norms import DTYPES, MAX_COLUMNS

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


def check_columns(x: torch.Tensor) -> None:
    columns = x.shape[-1] if x.dim() else 1
    if isinstance(columns, int) and columns > MAX_COLUMNS:
        raise Reject(f"a row has {columns} elements; the kernel takes at most {MAX_COLUMNS}")
