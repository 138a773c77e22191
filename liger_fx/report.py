"""What was replaced, what was refused and why, and what nearly matched."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from liger_fx.matcher import BrokenGraph, named

log = logging.getLogger("liger_fx")


@dataclass(frozen=True)
class Place:
    """Where in the model: the module's name and the source line, empty when Dynamo has none."""

    module: str = ""
    source: str = ""

    @staticmethod
    def of(node: fx.Node) -> Place:
        return Place(_module(node), _source(node))

    def of_any_layer(self) -> Place:
        """``layers.7.mlp`` -> ``layers.*.mlp``"""
        return Place(_LAYER.sub(".*", self.module), self.source)

    def __str__(self) -> str:
        return " at ".join(part for part in (self.module, self.source) if part)


@dataclass(frozen=True)
class _Placed:
    rewrite: str
    place: Place = field(default=Place(), kw_only=True)

    @property
    def module(self) -> str:
        return self.place.module

    @property
    def source(self) -> str:
        return self.place.source


@dataclass(frozen=True)
class Replacement(_Placed):
    """A subgraph that was replaced. pattern: the spelling that matched. worth: on what evidence the
    policy allowed it, "" where a user asked for it."""

    pattern: str
    worth: str = ""


@dataclass(frozen=True)
class Rejection(_Placed):
    """A subgraph that matched, and was left alone for ``reason``."""

    reason: str


@dataclass(frozen=True)
class NearMiss(_Placed):
    """How near a rewrite came that matched nowhere in the graph."""

    pattern: str
    matched: int
    total: int
    reason: str


def internal_error(error: Exception, what: str, strict: bool, logged: Collection[str] = ()) -> str:
    """The reason of a `Rejection` after an exception that none of liger_fx should raise.

    The exception is raised if ``strict``, or if the graph is broken. Else it is logged with its
    stack, unless its reason is among those ``logged`` before. The log itself may be what failed.
    """
    if strict or isinstance(error, BrokenGraph):
        raise error
    first_line = next(iter(str(error).splitlines()), "")
    reason = f"internal error: {type(error).__name__}: {first_line}"
    if reason not in logged:
        try:
            log.exception("liger_fx %s; please report this", what)
        except Exception:
            print(f"liger_fx {what}, and its log fails as well", file=sys.stderr)
    return reason


@dataclass
class Report:
    """The outcome for one compiled graph.

    seconds: time spent on matching and rewriting. nodes: size of the graph as Dynamo made it.
    skipped: what was not looked into, a sentence each, and where. breaks: why Dynamo ended the graph
    before the end of the compiled function, and where; the rest is in other graphs. deferred: the
    projections whose logits are returned, and computed when they are read. modules: those that run
    this graph, where they were compiled one by one. note: what the program around the graph leaves
    out, if that is known.
    """

    replacements: list[Replacement] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    skipped: list[tuple[str, Place]] = field(default_factory=list)
    breaks: list[tuple[str, Place]] = field(default_factory=list)
    deferred: list[Place] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    nodes: int = 0
    seconds: float = 0.0
    note: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Replacements by rewrite."""
        return dict(Counter(r.rewrite for r in self.replacements))

    def why_not(self, rewrite: str) -> str | None:
        """In a sentence, why ``rewrite`` was not made; None if nothing came near it."""
        said = [r.reason for r in self.rejections if r.rewrite == rewrite]
        said += [m.reason for m in self.near_misses if m.rewrite == rewrite]
        return said[0] if said else None

    @staticmethod
    def merged(reports: Sequence[Report]) -> Report:
        """One report over several graphs."""
        whole = Report(note=next((r.note for r in reports if r.note), None))
        for report in reports:
            for name in vars(whole).keys() - {"note"}:
                setattr(whole, name, getattr(whole, name) + getattr(report, name))
        return whole

    def to_json(self) -> str:
        return json.dumps({"counts": self.counts} | dataclasses.asdict(self), indent=1)

    def summary(self) -> str:
        """One line: ``linear_cross_entropy 1; refused rope 2, swiglu 1``."""
        refused = Counter(r.rewrite for r in self.rejections)
        return (_counted(self.counts) or "nothing replaced") + (
            f"; refused {_counted(refused)}" if refused else ""
        )

    def _modules(self) -> str:
        """``16 x model.layers.*``"""
        alike = Counter(Place(module).of_any_layer().module for module in self.modules)
        return ", ".join(name if n == 1 else f"{n} x {name}" for name, n in alike.items())

    def __str__(self) -> str:
        reasons: dict[str, Counter[str]] = {}
        for r in self.rejections:
            reasons.setdefault(r.reason, Counter())[r.rewrite] += 1
        several = {reason: names for reason, names in reasons.items() if len(names) > 1}
        rows = [(r.rewrite, "replaced", _said(r), r.place) for r in self.replacements]
        rows += [
            (r.rewrite, "refused", r.reason, r.place)
            for r in self.rejections
            if r.reason not in several
        ]
        rows += [(m.rewrite, "no match", _near(m), m.place) for m in self.near_misses]
        rows += [("", "skipped", what, place) for what, place in self.skipped]
        rows += [("graph", "breaks", why, place) for why, place in self.breaks]
        rows += [
            ("logits", "deferred", "they are returned: computed when read", place)
            for place in self.deferred
        ]
        lines = _grouped(rows)
        lines += [  # such as what a policy has to say of all rewrites
            ("several", "refused", f"{_counted(names)}: {reason}")
            for reason, names in several.items()
        ]
        graph = f"graph of {self.nodes} nodes, matched in {self.seconds * 1e3:.1f} ms"
        head = f"liger_fx: {graph}" if self.nodes else "liger_fx: no graph"
        if self.modules:
            head += f", for {self._modules()}"
        if not lines:
            head += "\n  nothing to replace: no rewrite has its last operation in this graph"
        width = max((len(name) for name, *_ in lines), default=0)
        text = [f"  {name:{width}}  {word:8}  {what}" for name, word, what in lines]
        return "\n".join([head, *text, *([f"  {self.note}"] if self.note else [])])


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def _said(made: Replacement) -> str:
    return f"spelling {made.pattern}" + (f"; {made.worth}" if made.worth else "")


def _grouped(rows: Sequence[tuple[str, str, str, Place]]) -> list[tuple[str, str, str]]:
    """One row for what is the same in every layer."""
    groups: dict[tuple[str, str, str, Place], list[Place]] = {}
    for name, word, what, place in rows:
        groups.setdefault((name, word, what, place.of_any_layer()), []).append(place)
    return [
        (name, word, f"{len(places)} x {what}{_in(anywhere)}")
        if len(places) > 1
        else (name, word, what + _in(places[0]))
        for (name, word, what, anywhere), places in groups.items()
    ]


def _near(miss: NearMiss) -> str:
    return f"{miss.matched} of {miss.total} operations of `{miss.pattern}`: {miss.reason}"


def _in(place: Place) -> str:
    return f"  [{place}]" if str(place) else ""


def describe(found: Any) -> str:
    """What stands where a pattern wanted something else."""
    if not isinstance(found, fx.Node):
        return repr(found)
    if found.op == "placeholder":
        return (
            f"`{found.name}`, an input of this graph: what computes it was traced elsewhere, "
            "or runs eagerly"
        )
    return named(found)


_WRAPPERS = re.compile(r"\.__dict__\['_modules'\]|\['_checkpoint_wrapped_module'\]")
_INDEX = re.compile(r"(?:\._modules)?\['([^']*)'\]")


def _module(node: fx.Node) -> str:
    """``L['model'].layers.0.sa_norm`` -> ``model.layers.0.sa_norm``"""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    name = _WRAPPERS.sub("", list(stack.values())[-1][0])
    name = re.sub(r"^[LG](\['args'\]\[\d+\])?", "", name)  # a local, maybe one of ``*args``
    return _INDEX.sub(r".\1", name).strip(".").removeprefix("self.")


_LAYER = re.compile(r"\.\d+(?=\.|$)")
_FRAME = re.compile(r'File "([^"]*)", line (\d+), in (\S+)')


def _source(node: fx.Node) -> str:
    """``transformer.py:660 in unembed``, of the innermost frame."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, line, function = frames[-1]
    return f"{path.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line} in {function}"
