"""The soundness repairs of the engine, each with a patch that undoes it.

A generator of programs that finds nothing proves something only if it finds each fault that was
repaired: ``python tests/fuzz.py --without all`` undoes them one by one. A patch names what it
replaces in the engine, and fails where that name is gone: then it is to be written anew.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from liger_fx.passes import _norms
from liger_fx.passes.tiled_mlp import tiled_mlp

from liger_fx import canonical, effects, inner, legality, ops, rewrite

Patch = contextlib.AbstractContextManager[Any]


@dataclass(frozen=True)
class Repair:
    """row: the class of failures that it belongs to (C1 to C13, see test_soundness_*.py), or "rule"
    for a rule of legality. seed: of the first program that notices. fault: what the engine believes
    without the repair. undone: makes the context in which the repair is undone."""

    row: str
    seed: int
    fault: str
    undone: Callable[[], Patch]


def _returning(owner: Any, name: str, value: Any) -> Patch:
    return mock.patch.object(owner, name, lambda *_, **__: value)


def _copies_unwritten() -> Patch:
    does_nothing = canonical.View.does_nothing

    def unaware(view: canonical.View, node: torch.fx.Node) -> bool:
        with _returning(effects.Effects, "written", False):
            return does_nothing(view, node)

    return mock.patch.object(canonical.View, "does_nothing", unaware)


def _expressions_unwritten() -> Patch:
    same = canonical.View.same

    def unaware(view: canonical.View, a: Any, b: Any) -> bool:
        for node in view.position:  # what is a copy stays as it is: the view remembers
            view.resolve(node)
        with _returning(effects.Effects, "written", False):
            return same(view, a, b)

    return mock.patch.object(canonical.View, "same", unaware)


def _first_half_for_both() -> Patch:
    rope = ops.rope

    def halved(x: Any, cos: Any, sin: Any, *rest: bool) -> Any:
        cos, sin = (torch.cat((t.chunk(2, -1)[0],) * 2, -1) for t in (cos, sin))
        return rope(x, cos, sin, *rest)

    return mock.patch.object(ops, "rope", halved)


@contextlib.contextmanager
def _strides_do_not_matter() -> Iterator[None]:
    """Nor to RoPE, which writes heads first where eager does."""
    rope = ops.rope

    def transposed(x: Any, cos: Any, sin: Any, *rest: bool) -> Any:
        if len(rest) < 4:
            return rope(x, cos, sin, *rest)
        return rope(x.transpose(1, 2), cos, sin, *rest[:3]).transpose(1, 2)

    with mock.patch.object(ops, "rope", transposed), _returning(rewrite, "_same_layout", True):
        yield


@contextlib.contextmanager
def _norms_layouts() -> Iterator[None]:
    """The gradient of a norm in the layout of its input, whatever eager's is."""
    with contextlib.ExitStack() as undone:
        undone.enter_context(mock.patch.object(_norms, "as_eager_reads", lambda _, x: x))
        for name in ("rms_norm", "add_rms_norm"):  # the package's attribute is the op
            module = importlib.import_module(f"liger_fx.ops.{name}")
            undone.enter_context(mock.patch.object(module, "as_eager_leaves", lambda x, _: x))
        yield


REPAIRS: dict[str, Repair] = {
    "copies": Repair("C1", 6, "a copy is its source, whoever writes to either", _copies_unwritten),
    "functorch": Repair(
        "C3",
        27,
        "an op has rules for torch.func",
        lambda: _returning(legality, "is_functorch_wrapped_tensor", False),
    ),
    "expressions": Repair(
        "C4", 7, "two equal expressions are one value, whatever is written", _expressions_unwritten
    ),
    "mutation": Repair(
        "C5",
        25,
        "a value of a match keeps what it holds",
        lambda: _returning(legality.Legality, "_unwritten", None),
    ),
    "bodies": Repair(
        "C5",
        92,
        "the body of a checkpoint writes to nothing outside",
        lambda: _returning(effects, "_written_by_bodies", []),
    ),
    "packets": Repair(
        "C5",
        116,
        "an operator called by its packet does not write",
        lambda: _returning(effects, "_overloads", ()),
    ),
    "hidden": Repair(
        "C5",
        95,
        "what is written can be seen in the graph",
        lambda: _returning(effects, "_version", 0),
    ),
    "unknown": Repair(
        "C5",
        25,
        "a function that nobody knows does not write",
        lambda: _returning(effects, "_is_known", True),
    ),
    "statistics": Repair(
        "C5",
        25,
        "a batch norm does not write its statistics",
        lambda: _returning(effects, "_updates_statistics", False),
    ),
    "memory": Repair(
        "C5",
        447,
        "a tensor stays in its memory",
        lambda: mock.patch.object(effects, "_MOVES", frozenset()),
    ),
    "halves": Repair("C6", 2, "both halves of cos and sin are equal", _first_half_for_both),
    "random_state": Repair(
        "C7",
        11,
        "a checkpoint under inner='eager' drops the same elements twice",
        lambda: _returning(inner, "checkpoint_eagerly", None),
    ),
    "recomputed": Repair(
        "C7",
        15,
        "a checkpoint that writes to its inputs may keep a loss",
        lambda: _returning(legality.Legality, "check_kept", None),
    ),
    "saved": Repair(
        "C9",
        77,
        "what a backward reads is not written to",
        lambda: _returning(legality.Legality, "_kept", {}),
    ),
    "layouts": Repair("C10", 2, "strides do not matter", _strides_do_not_matter),
    "gradient_layouts": Repair(
        "C10",
        604,
        "strides of gradients do not matter",
        _norms_layouts,
    ),
    "broadcast": Repair(
        "C11",
        417,
        "a norm has a weight for each column",
        lambda: _returning(_norms, "same_sizes", True),
    ),
    "padding": Repair(
        "C12",
        16,
        "a token without a gradient is left out, though nobody asked for it",
        lambda: mock.patch.dict(tiled_mlp.settings, skip_padding=True),
    ),
    "grad_mode": Repair(
        "rule",
        115,
        "grad mode is the same all over a match",
        lambda: _returning(legality.Legality, "_one_grad_mode", None),
    ),
    "forgotten_gradients": Repair(
        "rule",
        66,
        "what Dynamo says of gradients is right",
        lambda: _returning(legality.Legality, "_loses_gradient", False),
    ),
    "in_time": Repair(
        "rule",
        120,
        "the inputs of a match are there at its first output",
        lambda: _returning(legality.Legality, "_inputs_in_time", None),
    ),
}

# Rows whose fault no program of the generator can have.
NOT_COMPARED = {
    "C2": "an exception of the engine is a failure of its own; nothing in these programs raises one",
    "C8": "a program has one device, the CPU",
    "C13": "of options, not of programs",
}
