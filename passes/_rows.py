"""A projection, and the rows of its logits on the way to a loss.

Whatever happens to rows of logits happens as well to rows of the hidden state: reshapes of leading
dimensions, slices of positions (``logits[..., :-1, :]``), and casts, which only widen. A slice of
classes, as of a vocabulary that is padded to a round number (nanochat), is one of the weight.
"""

from typing import Any

import torch
from torch import fx

from liger_fx.canonical import fake, hint, op_name, specialise
from liger_fx.matcher import Match, Reject, ends
from liger_fx.pattern import chain


def keeps_rows(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    before, after = fake(source), fake(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if op_name(node) == "cast":
        return torch.promote_types(before.dtype, after.dtype) == after.dtype
    if op_name(node) == "getitem":
        items = _slices(node)  # of classes: by constants
        return bool(items) and not any(isinstance(end, fx.Node) for end in ends(items[-1]))
    if op_name(node) == "reshape" and before.dim() and after.dim():
        return str(before.shape[-1]) == str(after.shape[-1])
    return False


def _slices(node: fx.Node) -> list[slice]:
    """One for each dimension of what ``node`` indexes; nothing if it indexes otherwise."""
    index: Any = node.args[1]
    dims = fake(node.args[0]).dim()
    items = list(index) if isinstance(index, tuple | list) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (dims - len(items) + 1)
    items += [slice(None)] * (dims - len(items))
    return items if all(isinstance(item, slice) for item in items) else []


def _of_classes(node: fx.Node) -> slice | None:
    """What a ``getitem`` takes of the classes, if that is not all of them."""
    before, after = fake(node.args[0]), fake(node)
    return None if str(before.shape[-1]) == str(after.shape[-1]) else _slices(node)[-1]


def _takes_rows(node: fx.Node) -> bool:
    """Is it a slice, and not only of classes?"""
    whole = (slice(None), slice(0, None))
    return op_name(node) == "getitem" and any(item not in whole for item in _slices(node)[:-1])


def keeps_or_scales_rows(node: fx.Node) -> fx.Node | bool:
    return keeps_rows(node) or _scaled(node) or False


def _scaled(node: fx.Node) -> fx.Node | None:
    """What a temperature divides, or a scale multiplies: by a number, that is."""
    if op_name(node) not in ("div", "mul") or node.kwargs or len(node.args) != 2:
        return None  # rounding_mode, say
    left, right = node.args
    if op_name(node) == "mul" and not isinstance(fake(left), torch.Tensor):
        left, right = right, left
    numbers = isinstance(left, fx.Node) and not isinstance(fake(right), torch.Tensor)
    return left if numbers else None  # type: ignore[return-value]


rows = chain("rows", keeps_rows)
scaled_rows = chain("rows", keeps_or_scales_rows)


# Of a match with two heads, the other's bindings and rows have names with a prefix: "teacher_".


def logits_of(match: Match, prefix: str = "") -> torch.Tensor:
    """The fake logits, as the projection makes them."""
    return fake(match.sources[f"{prefix}rows"])


def kept_rows(match: Match, prefix: str = "") -> torch.Tensor:
    """The fake logits, as the loss takes them."""
    name = f"{prefix}rows"
    return fake([*match.chains[name], match.sources[name]][0])


def slices(match: Match, name: str = "rows") -> list[Any]:
    """What is left of the logits' rows, comparable from one chain to another."""
    found = (node for node in match.chains[name] if op_name(node) == "getitem")
    return [(node.args[1], [str(size) for size in fake(node.args[0]).shape]) for node in found]


def temperature(match: Match, name: str = "rows") -> float | None:
    """What the logits are divided by in all; None if that is no positive constant."""
    product = 1.0
    for node in match.chains[name]:
        source = _scaled(node)
        if source is not None:
            number = next(fake(arg) for arg in node.args if arg is not source)
            if (hint(number) or 0.0) <= 0:
                return None
            number = specialise(number)
            product *= number if op_name(node) == "div" else 1.0 / number
    return product


def check_temperature(match: Match, name: str = "rows") -> None:
    if temperature(match, name) is None:
        raise Reject(
            "the temperature or scale of the logits is computed or not positive, expected a "
            "constant"
        )


def check_projection(match: Match, weight: torch.Tensor, prefix: str = "") -> None:
    """Raise `Reject` for a projection that the head ops do not compute."""
    logits = logits_of(match, prefix)
    if weight.dim() != 2:
        raise Reject(f"the projection's weight is {weight.dim()}-D, expected 2-D [classes, hidden]")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Reject(f"the logits are {logits.dtype}; the kernel computes in float32")
    if match.output.dtype == torch.float64:
        name = match.pattern.name
        raise Reject(f"{name} is computed in torch.float64; the kernel computes in float32")


def head_arguments(
    match: Match, hidden: fx.Proxy, weight: fx.Proxy, bias: Any, prefix: str = ""
) -> tuple[Any, ...]:
    """Hidden state, weight and bias as the projection takes them, for the rows that are kept."""
    for node in reversed(match.chains[f"{prefix}rows"]):
        if op_name(node) == "getitem" and (classes := _of_classes(node)):
            weight = weight[classes]  # type: ignore[index]
            bias = bias[classes] if match.values[f"{prefix}bias"] is not None else bias
    given = {"hidden": slice_rows(match, hidden, prefix), "weight": weight, "bias": bias}
    named = {f"{prefix}{name}": value for name, value in given.items()}
    return cast_as_autocast(match, logits_of(match, prefix).dtype, named)


def cast_as_autocast(match: Match, dtype: torch.dtype, given: dict[str, Any]) -> tuple[Any, ...]:
    """The operands of a projection whose result has ``dtype``, by the names of their bindings:
    under autocast it runs in another dtype than they have."""

    def cast(name: str, proxy: Any) -> Any:
        value = match.values[name]
        return proxy if value is None or value.dtype == dtype else proxy.to(dtype)

    return tuple(cast(name, proxy) for name, proxy in given.items())


def check_rows(match: Match, prefix: str = "") -> None:
    """Raise `Reject` for rows that cannot be dropped from the hidden state in the same way."""
    for node in _until_last_slice(match, prefix):
        if op_name(node) == "reshape" and fake(node).dim() != 2:
            raise Reject("logits are reshaped to more than two dimensions and sliced afterwards")


def slice_rows(match: Match, hidden: fx.Proxy, prefix: str = "") -> fx.Proxy:
    """Drop from the hidden state the rows that the model drops from the logits."""
    tracer = hidden.tracer
    for node in _until_last_slice(match, prefix):
        if op_name(node) == "reshape":
            hidden = hidden.flatten(0, -2)
        elif _takes_rows(node):
            index = (
                node.args[1] if _of_classes(node) is None else (*_slices(node)[:-1], slice(None))
            )
            hidden = hidden[fx.node.map_arg(index, lambda n: fx.Proxy(n, tracer))]  # type: ignore[arg-type, return-value, index]
    return hidden


def _until_last_slice(match: Match, prefix: str) -> list[fx.Node]:
    """The steps on the rows, innermost first, as far as they matter: the op takes any leading
    dimensions, so reshapes after the last slice do not."""
    outermost_first = match.chains[f"{prefix}rows"]
    last = next((i for i, node in enumerate(outermost_first) if _takes_rows(node)), None)
    return [] if last is None else outermost_first[last:][::-1]
