"""The backend as Dynamo calls it: rewrite a graph, report on it, hand it to the inner compiler."""

from __future__ import annotations

import functools
import logging
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

from liger_fx import inner
from liger_fx.frame import graph_break
from liger_fx.measure import measured
from liger_fx.options import ForTheUser, parse
from liger_fx.passes import DEFAULT
from liger_fx.policy import by_table, device_of, form_of, own_table, policy, too_small
from liger_fx.report import Rejection, Report, internal_error
from liger_fx.returned import Deferral, defer, returned_logits, returning
from liger_fx.rewrite import Allow, Rewrite, rewrite_graph

log = logging.getLogger("liger_fx")

_WITHOUT_CUDA = "liger_fx: on a CPU plain PyTorch ops stand in: Liger's Triton kernels need a GPU"

_reports: deque[Report] = deque(maxlen=1000)


class RequirementError(ForTheUser):
    """A rewrite named in ``require`` was not made in the compiled function that should have it."""


def liger_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(fn, backend="liger_fx", options={...}, mode=...)``.

    options: see `liger_fx.options.Options`; keys it does not know go to Inductor. mode: Inductor's
    modes. Raises OptionError, a ValueError, for options that are unknown or cannot apply,
    RequirementError if ``require`` is not met.
    """
    return Backend(options, mode=mode, made=_made_with(options))(gm, example_inputs)


def backend(rewrites: Sequence[Rewrite] | None = None, **options: Any) -> Backend:
    """A backend to pass to `torch.compile`, with rewrites of your own:
    ``torch.compile(fn, backend=liger_fx.backend([*DEFAULT, mine], inner="aot_eager"))``.

    rewrites: in their order; None for `liger_fx.passes.DEFAULT` and those of installed packages
    (entry points of the group ``liger_fx.rewrites``, each a `Rewrite` or a list of them). options:
    as ``options=`` of `torch.compile`; those with a dot are passed as ``**{"rope.x": 1}``. ``mode``
    is Inductor's. ``policy="auto"`` applies rewrites of your own wherever they are legal. Raises
    OptionError, a ValueError, at once.
    """
    return Backend(options, rewrites, options.pop("mode", None))


class Backend:
    """Options and rewrites, settled once. Callable as Dynamo calls a backend.

    accept: gets the report of each graph before anything is published or compiled, and may raise.
    made: the rewrites made so far for the same compiled function.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        rewrites: Sequence[Rewrite] | None = None,
        mode: str | None = None,
        accept: Callable[[Report], None] | None = None,
        made: set[str] | None = None,
    ) -> None:
        from torch._inductor import list_mode_options

        self.rewrites = [*DEFAULT, *_of_packages()] if rewrites is None else list(rewrites)
        given = {**(list_mode_options(mode) if mode else {}), **(options or {})}
        self.options = parse(given, {r.name: r.settings for r in self.rewrites})
        by_evidence = self.options.policy in ("auto", "measure")
        self.own_table = own_table(self.options.table) if by_evidence else {}
        self.accept = accept
        self.made = set() if made is None else made

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report, deferrals = self.rewrite(gm, example_inputs)
        if self.accept is not None:
            self.accept(report)
        self.publish(report)
        compiled = inner.compile_rewritten(gm, example_inputs, self.options, self.rewrites)
        return returning(compiled, deferrals)

    def rewrite(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any] | None = None
    ) -> tuple[Report, list[Deferral]]:
        """Rewrite ``gm`` in place. An engine error costs a match and is in the report, unless
        ``strict``. example_inputs: for ``policy="measure"``; without inputs nothing is run. Where
        ``gm`` returns hidden states in the place of logits, the deferrals say so."""
        options = self.options
        deferrals: list[Deferral] = []
        try:
            if device_of(gm).type == "cpu":
                torch._logging.warning_once(log, _WITHOUT_CUDA)
            allow = self._policy(gm, example_inputs)
            returned = returned_logits(gm) if options.logits == "on_demand" else []
            report = rewrite_graph(
                gm, self.rewrites, options.settings, allow, options.strict, returned
            )
            deferrals = defer(gm, returned)
            report.deferred = [deferral.place for deferral in deferrals]
            report.breaks = list(filter(None, [graph_break(gm)]))
            report.note = _note()
        except Exception as error:
            reason = internal_error(error, "leaves a graph as it is", options.strict)
            report = Report([], [Rejection("all", reason)], nodes=len(gm.graph.nodes))
        return report, deferrals

    def _policy(self, gm: fx.GraphModule, example_inputs: Sequence[Any] | None) -> Allow:
        try:
            about = device_of(gm), self.options.inner, form_of(gm)
            judge = by_table(*about, self.own_table, too_small(gm))
            if self.options.policy == "measure":
                judge = measured(gm, example_inputs, self.rewrites, self.options, judge)
        except Exception as error:  # such as a broken table
            why = internal_error(error, "cannot read its measurements", self.options.strict)
            judge = lambda rewrite, match: (False, why)  # noqa: E731
        return policy(self.options, judge, [rewrite.name for rewrite in DEFAULT])

    def publish(self, report: Report) -> None:
        """Send the report to `reports`, logs and traces. Raises RequirementError."""
        first = not _reports
        _reports.append(report)
        try:
            if report.note and first:
                log.warning("liger_fx: %s", report.note)
            for name, count in report.counts.items():
                counters["liger_fx"][name] += count
            log.info("%s", report.summary())
            log.debug("%s", report)
            torch._logging.trace_structured(
                "artifact",
                metadata_fn=lambda: {"name": "liger_fx_report", "encoding": "json"},
                payload_fn=report.to_json,
            )
        except Exception as error:
            reason = internal_error(error, "could not report on a graph", self.options.strict)
            report.rejections.append(Rejection("report", reason))
        self._check_required(report)

    def _check_required(self, report: Report) -> None:
        self.made.update(report.counts)
        missing = [name for name in self.options.require if name not in self.made]
        # A graph without anything like the rewrite (a layer of its own, say) is no failure yet.
        near = {m.rewrite for m in report.near_misses if 2 * m.matched >= m.total}
        concerned = near | {r.rewrite for r in report.rejections}
        if concerned & {*missing, "all"} and missing:
            raise RequirementError(f"required but not made: {', '.join(missing)}\n{report}")


# Of functions with a `require` among their options, with the options: torch.compile hands on the
# same object for all graphs of one function. The environment's (None) is one for the process.
_made: dict[int, tuple[Mapping[str, Any] | None, set[str]]] = {}


def _made_with(options: Mapping[str, Any] | None) -> set[str]:
    """The rewrites made in the graphs of the function that was compiled with ``options``."""
    if options is not None and "require" not in options:
        return set()
    return _made.setdefault(id(options), (options, set()))[1]


def reports() -> list[Report]:
    """One report for each graph that this process has compiled with liger_fx, oldest first; the
    last 1000."""
    return list(_reports)


def clear_reports() -> None:
    """Forget the reports so far."""
    _reports.clear()


def explain(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """What liger_fx would do with ``fn(*args, **kwargs)``, without running a kernel.

    ``fn`` is traced on fake tensors: real, fake and meta arguments will do, and no GPU is needed.
    Code between two graphs runs on fake tensors too. options: as for `torch.compile`. Resets
    torch.compile: what the process has compiled before is compiled again when it is called next.
    Returns one report over all graphs. Raises OptionError, a ValueError.
    """
    rewriting = Backend(options)
    found: list[Report] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report, deferrals = rewriting.rewrite(gm)
        found.append(report)
        return returning(gm.forward, deferrals)

    trace_without_kernels(fn, args, kwargs, record)
    return Report.merged(found)


def trace_without_kernels(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    backend: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
) -> None:
    """Give ``backend`` each graph of ``fn(*args, **kwargs)``, traced as `explain` traces."""
    from torch._subclasses import FakeTensorMode

    torch._dynamo.reset()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.compile(fn, backend=backend)(*args, **(kwargs or {}))
    finally:
        torch._dynamo.reset()


# -- what is installed -----------------------------------------------------------------------------


@functools.cache
def _of_packages() -> tuple[Rewrite, ...]:
    found: list[Rewrite] = []
    for entry in entry_points(group="liger_fx.rewrites"):
        try:
            loaded = entry.load()
        except Exception as error:
            internal_error(error, f"cannot load the rewrites {entry.name} = {entry.value}", False)
            continue
        found += [loaded] if isinstance(loaded, Rewrite) else loaded
    return tuple(found)


def _note() -> str | None:
    """A sentence about the program around the graphs, if a library is imported for which liger_fx
    has one (entry points ``<library> = "module:function"``). None where the function fails, as with
    another version of the library."""
    for entry in entry_points(group="liger_fx.notes"):
        if entry.name in sys.modules:
            try:
                note: str | None = entry.load()()
                return note
            except Exception:
                log.debug("liger_fx has no note on %s", entry.name, exc_info=True)
    return None
