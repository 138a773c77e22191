"""Losses of classes or of tokens, added up to one number.

``losses`` is a wildcard for any of ``.sum(-1)``, ``.sum()``, ``.mean()``, a mask of tokens
(multiplied, ``masked_fill`` or ``torch.where``), a number as a factor, casts and reshapes, in any
order. All of it is the sum over the tokens of the mask (`mask_of`), times and over numbers
(`scaled_as_the_mean`).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from liger_fx.passes._rows import kept_rows
from torch import fx

from liger_fx.canonical import fake, hint, op_name, positional
from liger_fx.matcher import Match, Reject
from liger_fx.pattern import chain


def _operand(node: fx.Node) -> Any:
    """The losses that ``node`` adds up, masks or scales; None if it does something else."""
    op, args = op_name(node), node.args
    if op in ("mul", "div"):
        return _scaled(node)
    if op == "where":
        return args[1] if len(args) == 3 and args[2] == 0 else None
    if op in ("masked_fill", "masked_fill_"):
        return args[0] if len(args) == 3 and args[2] == 0 else None
    if op == "sum":
        _, dim, keepdim, dtype = positional(node)
        last = dim in (None, -1, (-1,), [-1], fake(args[0]).dim() - 1)
        return args[0] if last and not keepdim and dtype is None else None
    if op == "mean":
        return args[0] if len(args) == 1 and not node.kwargs else None
    kept = op == "reshape" or (op == "cast" and fake(node).is_floating_point())
    return args[0] if kept else None


def _scaled(node: fx.Node) -> fx.Node | None:
    tensors = [n for n in node.args if isinstance(n, fx.Node) and _is_tensor(n)]
    squared = len(tensors) != len(set(tensors))
    if node.kwargs or len(node.args) != 2 or squared:
        return None
    if op_name(node) == "div" and tensors != [node.args[0]]:
        return None
    # A mask is no loss, was there before and has no gradient.
    masked = [n for n in tensors if len(tensors) == 1 or _bools(n) is None]
    return max(masked, key=lambda n: (fake(n).requires_grad, n), default=None)


def _is_tensor(value: Any) -> bool:
    return isinstance(fake(value), torch.Tensor)


losses = chain("losses", _operand)


def _steps(match: Match) -> list[fx.Node]:
    """What adds up, innermost first. The last of it may be the root."""
    passed = match.chains.get("losses", [])[::-1]
    return [*passed, match.root] if op_name(match.root) in ("sum", "mean") else passed


def _masks(match: Match) -> list[tuple[fx.Node, fx.Node]]:
    """Each step that masks, and its mask."""
    return [
        (node, mask)
        for node in _steps(match)
        if op_name(node) in ("mul", "where", "masked_fill", "masked_fill_")
        for mask in node.all_input_nodes
        if mask is not _operand(node) and _is_tensor(mask)
    ]


def check_sum(match: Match, total: torch.Tensor) -> None:
    """Raise `Reject` unless ``total`` is a sum over tokens, with at most one mask, of bools, and
    with factors and sizes that `scaled_as_the_mean` can compute where the first output stands."""
    if total.dim():
        raise Reject(
            "the divergences of single classes or tokens leave the graph, or are added up by more "
            "than sum(), mean() and a mask; jsd[mask] ends the graph, jsd * mask does not"
        )
    masks = _masks(match)
    if len(masks) > 1:
        raise Reject("the losses have several masks, expected one")
    for node, mask in masks:
        _check_mask(match, node, mask)
    varying = {_formula(count) for count in _divisors(match) if not isinstance(count, int)}
    if not varying <= {*map(_formula, _sizes(match))}:
        raise Reject("the mean is over a size that varies, neither sequences, tokens nor classes")
    for factor in (n for node in _steps(match) for n in node.all_input_nodes if not _is_tensor(n)):
        if factor > match.first:
            raise Reject(f"{factor.name}, a weight, is computed only after {match.first.name}")


def _check_mask(match: Match, node: fx.Node, mask: fx.Node) -> None:
    before, logits = fake(_operand(node)), kept_rows(match)
    bools = _bools(mask)
    if bools is None:
        raise Reject(f"the losses are multiplied by {fake(mask).dtype}, expected a mask of bools")
    of_classes = hint(before.numel()) == hint(logits.numel())
    of_tokens = hint(fake(bools).numel()) == hint(math.prod(logits.shape[:-1]))
    if of_classes:
        of_tokens &= fake(mask).shape[-1:] == (1,)
    if match.view.effects.written(bools):
        raise Reject(f"{bools.name}, the mask, is written in place")
    if not of_tokens or [*map(hint, fake(node).shape)] != [*map(hint, before.shape)]:
        raise Reject("the mask is not one of tokens")


def _bools(mask: Any) -> fx.Node | None:
    """The bools of which ``mask`` is a cast or a reshape."""
    while isinstance(mask, fx.Node) and fake(mask).dtype != torch.bool:
        mask = mask.args[0] if op_name(mask) in ("cast", "reshape") else None
    return mask


def mask_of(match: Match, like: fx.Proxy) -> fx.Proxy | None:
    """Bools, as many as there are tokens: whose losses are added up. None for all."""
    for node, mask in _masks(match):
        bools = fx.Proxy(_bools(mask), like.tracer)  # type: ignore[arg-type]
        return bools if op_name(node) in ("mul", "where") else bools.logical_not()
    return None


def _divisors(match: Match) -> Iterator[int]:
    """The sizes that the sum is divided by."""
    reduction, logits = match.bindings.get("kl_reduction", "none"), kept_rows(match)
    if reduction in ("batchmean", "mean"):
        yield logits.shape[0] if reduction == "batchmean" else logits.numel()
    yield from (fake(node.args[0]).numel() for node in _steps(match) if op_name(node) == "mean")


def _sizes(match: Match) -> tuple[int, int, int]:
    """The numbers of sequences (or of tokens, if flat), of tokens, and of classes of them all."""
    logits = kept_rows(match)
    return match.values["hidden"].shape[0], math.prod(logits.shape[:-1]), logits.numel()


def _formula(size: int | torch.SymInt) -> str:
    """Of the symbols: two that are as large today may differ tomorrow."""
    return str(size if isinstance(size, int) else size.node.expr.expand())


def scaled_as_the_mean(
    match: Match, total: fx.Proxy, hidden: fx.Proxy, weight: fx.Proxy
) -> fx.Proxy:
    """``total``, the sum over tokens, times and over all that the model scales it by until it is
    one number. hidden: of the tokens."""

    def size(count: int) -> Any:
        if isinstance(count, int):
            return count
        sequences, tokens, _ = map(_formula, _sizes(match))
        if _formula(count) == sequences:
            return hidden.size(0)
        number = hidden.flatten(0, -2).size(0)
        return number if _formula(count) == tokens else number * weight.size(0)

    for count in _divisors(match):
        total = total / size(count)
    masks = [node for node, _ in _masks(match)]
    for node in _steps(match):
        if op_name(node) in ("mul", "div") and node not in masks:
            (factor,) = (arg for arg in node.args if arg is not _operand(node))
            number: Any = fx.Proxy(factor, total.tracer) if isinstance(factor, fx.Node) else factor
            total = total * number if op_name(node) == "mul" else total / number
    return total
