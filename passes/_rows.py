"""The rows of logits between projection and loss.

Whatever happens to rows of logits happens as well to rows of the hidden state: reshapes of leading
dimensions, slices of positions (``logits[..., :-1, :]``), and casts, which only widen.
"""

from typing import Any

import torch
from torch import fx

from liger_fx.canonical import fake, op_name
from liger_fx.matcher import Match
from liger_fx.pattern import chain


def _keeps_rows(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    before, after = fake(source), fake(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if op_name(node) == "cast":
        return torch.promote_types(before.dtype, after.dtype) == after.dtype
    if op_name(node) == "getitem":
        return _is_row_slice(node.args[1], before.dim())
    if op_name(node) == "reshape" and before.dim() and after.dim():
        return str(before.shape[-1]) == str(after.shape[-1])
    return False


def _is_row_slice(index: Any, dims: int) -> bool:
    """Slices of leading dimensions only."""
    items = list(index) if isinstance(index, tuple | list) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (dims - len(items) + 1)
    if not all(isinstance(item, slice) for item in items):
        return False
    return len(items) < dims or items[-1] in (slice(None), slice(0, None))


rows = chain("rows", _keeps_rows)


def slice_rows(match: Match, hidden: fx.Proxy) -> fx.Proxy:
    """Drop from the hidden state the rows that the model drops from the logits.

    Reshapes matter only where a slice follows: the op takes any leading dimensions.
    """
    steps = match.chains["rows"][::-1]
    if not any(op_name(node) == "getitem" for node in steps):
        return hidden
    tracer, width = hidden.tracer, match.values["hidden"].shape[-1]

    def as_proxy(node: fx.Node) -> Any:
        return fx.Proxy(node, tracer)

    for node in steps:
        if op_name(node) == "reshape":
            hidden = hidden.reshape(*_leading_sizes(node), width)
        elif op_name(node) == "getitem":
            hidden = hidden[fx.node.map_arg(node.args[1], as_proxy)]  # type: ignore[index]
    return hidden


def _leading_sizes(node: fx.Node) -> list[int]:
    """The node's leading sizes, at most one of them unknown while tracing."""
    return [size if isinstance(size, int) else -1 for size in fake(node).shape[:-1]]
