"""Faults inside the engine, made on purpose: each costs one match, and training goes on.

`FAULTS` is the table of what can fail at one match: in matching, in what a rewrite asks of a match
or puts in its place, in the policy. Each is injected into the first, a middle and the last of three
norms. `PUBLISHING` is the table of what can fail once for a graph: reports and logs.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _programs import Program, fixed, trained, with_liger_fx
from liger_fx.passes import DEFAULT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import liger_fx
import liger_fx.matcher
import liger_fx.policy
from liger_fx import Report, Rewrite

ROWS, H, V = 6, 8, 13
NORMS = 3

# The module that Dynamo's backend is in.
BACKEND: ModuleType = sys.modules[liger_fx.liger_fx.__module__]


class Fault(Exception):
    """Raised on purpose."""


# -- programs --------------------------------------------------------------------------------------


def norms(x: Tensor, *weights: Tensor) -> Tensor:
    for weight in weights:
        x = F.rms_norm(x.sin(), (H,), weight, 1e-6)
    return x


def norm_inputs() -> Sequence[Tensor]:
    return trained(ROWS, H), *(trained(H) for _ in range(NORMS))


def norms_in_checkpoints(x: Tensor, *weights: Tensor) -> Tensor:
    for weight in weights:
        x = checkpoint(norms, x, weight, use_reentrant=False)
    return x


def norms_beside_a_transform(x: Tensor, *weights: Tensor) -> Any:
    """The gradient of a norm inside, norms outside."""
    inner = torch.func.grad(lambda t: norms(t, weights[0].detach()).cos().sum())(x.detach())
    return norms(x, *weights), inner


PROGRAMS = {
    "norms in checkpoints": norms_in_checkpoints,
    "norms beside a transform": norms_beside_a_transform,
}


# -- faults at one match ---------------------------------------------------------------------------


class Countdown:
    """Raises at the call number ``at``, counted from 0, and at no other."""

    def __init__(self, at: int) -> None:
        self.left = at

    def now(self) -> bool:
        self.left -= 1
        return self.left == -1

    def __call__(self, *_: Any, **__: Any) -> None:
        if self.now():
            raise Fault("on purpose")


def change(**changes: Any) -> None:
    """Another ``rms_norm`` in the place of the one in `DEFAULT`."""
    (at,) = (i for i, rewrite in enumerate(DEFAULT) if rewrite.name == "rms_norm")
    DEFAULT[at] = dataclasses.replace(DEFAULT[at], **changes)


def norm_rewrite() -> Rewrite:
    (found,) = (rewrite for rewrite in DEFAULT if rewrite.name == "rms_norm")
    return found


class AtOneRoot:
    """Raises for the match number ``at``, each time that it is come upon: several spellings fit."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.roots: list[Any] = []

    def __call__(self, root: Any) -> None:
        if root not in self.roots:
            self.roots.append(root)
        if self.roots.index(root) == self.at:
            raise Fault("on purpose")


def in_matching(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    spellings = {pattern.__name__ for pattern in norm_rewrite().patterns}
    match, raise_at_one = liger_fx.matcher.Matcher.at, AtOneRoot(at)

    def unlucky(self: Any, root: Any, *rest: Any, **named: Any) -> Any:
        found = match(self, root, *rest, **named)
        if found is not None and self.pattern.name in spellings:
            raise_at_one(root)
        return found

    monkeypatch.setattr(liger_fx.matcher.Matcher, "at", unlucky)


def in_check(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    count = Countdown(at)
    change(check=lambda match: count())


def replaced_by(wrong: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch, int], None]:
    """A replacement that goes wrong once: ``wrong(x)`` instead of the rewrite's own."""

    def install(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        count, replace = Countdown(at), norm_rewrite().replace

        def unlucky(match: Any, x: Any, weight: Any = None) -> Any:
            return wrong(x) if count.now() else replace(match, x, weight)

        change(replace=unlucky)

    return install


def fail(x: Any) -> Any:
    raise Fault("on purpose")


def record_and_fail(x: Any) -> Any:
    x.sin().cos()
    raise Fault("on purpose")


def in_policy(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Of an engine that asks for each match, or else the function that is asked for each rewrite.

    The names of both stand here and nowhere else.
    """
    count = Countdown(at)
    if hasattr(BACKEND, "policy"):
        made = BACKEND.policy

        def policy(*args: Any, **named: Any) -> Callable[..., str]:
            allow = made(*args, **named)

            def unlucky(rewrite: Rewrite, match: Any) -> str:
                if rewrite.name == "rms_norm":
                    count()
                return allow(rewrite, match)

            return unlucky

        monkeypatch.setattr(BACKEND, "policy", policy)
    else:
        monkeypatch.setattr(liger_fx.policy, "_verdict", lambda *_: fail(None))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, int], None]] = {
    "matching raises": in_matching,
    "check raises": in_check,
    "the policy raises": in_policy,
    "replace raises": replaced_by(fail),
    "replace raises after it has recorded": replaced_by(record_and_fail),
    "replace gives another shape": replaced_by(lambda x: x.sum()),
    "replace gives another dtype": replaced_by(lambda x: x.double()),
    "replace gives nothing": replaced_by(lambda x: None),
    "replace gives too much": replaced_by(lambda x: (x.sin(), x.cos())),
    "replace gives no tensor": replaced_by(lambda x: x.size()),
    "replace records what cannot run": replaced_by(lambda x: x @ x),
    "replace records what does not exist": replaced_by(lambda x: x.no_such_method()),
    "replace records a loop over a proxy": replaced_by(lambda x: next(iter(x))),
    "replace asks for a proxy's truth": replaced_by(lambda x: x if x.sum() > 0 else -x),
}

POSITIONS = {"first": 0, "middle": 1, "last": 2}

every_fault = pytest.mark.parametrize("fault", FAULTS)
every_position = pytest.mark.parametrize("position", POSITIONS)


@pytest.fixture(autouse=True)
def default_rewrites() -> Iterator[None]:
    """Tests change the list of rewrites in place."""
    before = list(DEFAULT)
    yield
    DEFAULT[:] = before


def inject(fault: str, position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch, POSITIONS[position])


def internal_errors(reports: Sequence[Report]) -> list[str]:
    reasons = [rejection.reason for report in reports for rejection in report.rejections]
    return [reason for reason in reasons if reason.startswith("internal error")]


def count(rewrite: str) -> int:
    return sum(report.counts.get(rewrite, 0) for report in liger_fx.reports())


def logged_with_a_stack(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "liger_fx" and record.exc_info]


def assert_cost_one_norm(caplog: pytest.LogCaptureFixture) -> None:
    assert count("rms_norm") == NORMS - 1, liger_fx.reports()
    assert internal_errors(liger_fx.reports())
    (record,) = logged_with_a_stack(caplog)
    assert record.exc_info[2] is not None, "there is a stack"


@every_position
@every_fault
def test_a_fault_costs_one_match(fault, position, monkeypatch, caplog):
    program = Program(norms, norm_inputs)
    expected = program.run()
    inject(fault, position, monkeypatch)
    program.run(with_liger_fx(policy="all", inner="eager")).assert_like(expected)
    assert_cost_one_norm(caplog)


@pytest.mark.parametrize("name", PROGRAMS)
@every_fault
def test_a_fault_costs_one_match_before_aot(fault, name, monkeypatch, caplog):
    """AOT looks up in the graph where the inputs come from: a copy of it has forgotten."""
    program = Program(PROGRAMS[name], norm_inputs)
    expected = program.run()
    inject(fault, "middle", monkeypatch)
    program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(expected)
    assert_cost_one_norm(caplog)


@pytest.mark.parametrize("fault", ["matching raises", "replace raises after it has recorded"])
def test_a_fault_costs_one_match_before_inductor(fault, monkeypatch, caplog):
    program = Program(norms, norm_inputs)
    expected = program.run()
    inject(fault, "middle", monkeypatch)
    program.run(with_liger_fx(policy="all")).assert_like(expected)
    assert_cost_one_norm(caplog)


@every_fault
def test_strict_raises_the_fault(fault, monkeypatch):
    inject(fault, "middle", monkeypatch)
    torch._dynamo.reset()
    compiled = with_liger_fx(policy="all", inner="eager", strict=True)(norms)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        compiled(*norm_inputs())


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if "policy" not in fault])
def test_what_a_failed_replacement_has_recorded_is_gone(fault, monkeypatch):
    """The graph has as many nodes as one that has two norms to replace."""
    sizes = []

    def size_of(rewriting: Callable[[torch.fx.GraphModule], Any]) -> int:
        def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            rewriting(gm)
            gm.graph.lint()
            sizes.append([node.op for node in gm.graph.nodes])
            return gm.forward

        torch._dynamo.reset()
        torch.compile(norms, backend=backend, fullgraph=True)(*norm_inputs())
        return len(sizes[-1])

    found = size_of(lambda gm: liger_fx.rewrite_graph(gm, []))
    inject(fault, "middle", monkeypatch)
    with_faults = size_of(lambda gm: liger_fx.rewrite_graph(gm, DEFAULT))
    assert with_faults == found, "a norm is one node before and after"


def test_every_norm_may_fail(caplog):
    """The same exception at each match is logged once."""
    program = Program(norms, norm_inputs)
    expected = program.run()
    change(check=lambda match: fail(match))
    program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(expected)
    assert count("rms_norm") == 0
    assert len(internal_errors(liger_fx.reports())) == NORMS
    assert len(logged_with_a_stack(caplog)) == 1


def test_other_rewrites_go_on():
    def fn(x: Tensor, weight: Tensor, head: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(norms(x, weight), head), y)

    program = Program(fn, lambda: (trained(ROWS, H), trained(H), trained(V, H), torch.arange(ROWS)))
    expected = program.run()
    change(replace=lambda match, x: fail(x))
    program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(expected)
    assert liger_fx.reports()[-1].counts == {"linear_cross_entropy": 1}


def test_a_fault_in_joining_costs_no_more_than_the_head():
    """torchtune's chunks."""

    def chunked(h: Tensor, w: Tensor, y: Tensor) -> Any:
        losses = [F.cross_entropy(F.linear(c, w), t) for c, t in zip(h.chunk(2), y.chunk(2))]  # noqa: B905
        return losses[0] + losses[1]

    (at,) = (i for i, r in enumerate(DEFAULT) if r.name == "linear_cross_entropy")
    DEFAULT[at] = dataclasses.replace(DEFAULT[at], join=lambda view, *_: fail(view))
    program = Program(chunked, lambda: (trained(ROWS, H), trained(V, H), torch.arange(ROWS)))
    program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(program.run())
    assert internal_errors(liger_fx.reports())
    assert count("linear_cross_entropy") == 0


# -- the table of measurements ---------------------------------------------------------------------

BROKEN_TABLES = {"no JSON": "{", "not our JSON": '{"sm90": {"rows": [{}]}}', "empty": ""}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of a GPU does the policy look anything up; meta tensors stand for one's."""
    monkeypatch.setattr(BACKEND, "device_of", lambda gm: torch.device("meta"))


@pytest.mark.parametrize("text", BROKEN_TABLES)
def test_a_broken_table_decides_nothing(text, tmp_path, monkeypatch, on_a_gpu, caplog):
    """What needs no measurement is made all the same."""
    (tmp_path / "measured.json").write_text(BROKEN_TABLES[text])
    monkeypatch.setattr(liger_fx.policy, "files", lambda package: tmp_path)
    liger_fx.policy.table.cache_clear()
    try:
        check_without_a_table(caplog)
    finally:
        liger_fx.policy.table.cache_clear()


def test_a_table_that_raises_decides_nothing(monkeypatch, on_a_gpu, caplog):
    monkeypatch.setattr(liger_fx.policy, "table", lambda: fail(None))
    check_without_a_table(caplog)


def check_without_a_table(caplog: pytest.LogCaptureFixture) -> None:
    def fn(x: Tensor, weight: Tensor, head: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(norms(x, weight), head), y)

    program = Program(fn, lambda: (trained(ROWS, H), trained(H), trained(V, H), torch.arange(ROWS)))
    program.run(with_liger_fx(policy="auto", inner="aot_eager")).assert_like(program.run())
    (report,) = liger_fx.reports()
    assert report.counts == {"linear_cross_entropy": 1}
    assert "internal error" in str(report)
    assert len(logged_with_a_stack(caplog)) == 1


def test_a_table_that_raises_is_no_matter_to_all(monkeypatch, on_a_gpu):
    monkeypatch.setattr(liger_fx.policy, "table", lambda: fail(None))
    program = Program(norms, norm_inputs)
    program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(program.run())
    assert count("rms_norm") == NORMS


def test_strict_raises_for_a_broken_table(monkeypatch, on_a_gpu):
    monkeypatch.setattr(liger_fx.policy, "table", lambda: fail(None))
    compiled = with_liger_fx(policy="auto", inner="eager", strict=True)(norms)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="on purpose"):
        compiled(*norm_inputs())


# -- reports and logs ------------------------------------------------------------------------------


class BrokenHandler(logging.Handler):
    """A disk that is full, a socket that is closed."""

    def emit(self, record: logging.LogRecord) -> None:
        raise Fault("on purpose")


def break_method(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(Report, name, fail)


def break_log(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = [*logging.getLogger("liger_fx").handlers, BrokenHandler()]
    monkeypatch.setattr(logging.getLogger("liger_fx"), "handlers", handlers)


def break_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else torch writes there is written."""
    trace = torch._logging.trace_structured

    def unlucky(name: str, *args: Any, **named: Any) -> None:
        if "liger_fx" in sys._getframe(1).f_globals["__name__"]:
            raise Fault("on purpose")
        trace(name, *args, **named)

    monkeypatch.setattr(torch._logging, "trace_structured", unlucky)


PUBLISHING: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "summary": break_method("summary"),
    "text": break_method("__str__"),
    "the log": break_log,
    "the trace": break_trace,
}

every_publication = pytest.mark.parametrize("what", PUBLISHING)


@pytest.fixture
def everything_is_logged() -> Iterator[None]:
    """pytest's handler raises where those of `logging` would print."""
    log = logging.getLogger("liger_fx")
    level = log.level
    log.setLevel(logging.DEBUG)
    yield
    log.setLevel(level)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@every_publication
def test_what_cannot_be_reported_is_made(what, inner, monkeypatch, everything_is_logged):
    program = Program(norms, norm_inputs)
    expected = program.run()
    PUBLISHING[what](monkeypatch)
    program.run(with_liger_fx(policy="all", inner=inner)).assert_like(expected)
    assert count("rms_norm") == NORMS


@pytest.mark.parametrize("what", ["summary", "the trace"])
def test_what_cannot_be_reported_is_an_internal_error(what, monkeypatch, caplog):
    PUBLISHING[what](monkeypatch)
    program = Program(norms, norm_inputs)
    program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(program.run())
    assert len(logged_with_a_stack(caplog)) == 1
    assert len(internal_errors(liger_fx.reports())) == 1


def test_a_report_that_is_no_json(monkeypatch):
    """Only asked for where a trace is written; as then, the method is called here."""
    monkeypatch.setattr(Report, "to_json", fail)

    def trace(name: str, metadata_fn: Any = None, payload_fn: Any = lambda: "", **_: Any) -> None:
        if "liger_fx" in sys._getframe(1).f_globals["__name__"]:
            payload_fn()

    monkeypatch.setattr(torch._logging, "trace_structured", trace)
    program = Program(norms, norm_inputs)
    program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(program.run())
    assert count("rms_norm") == NORMS


def test_a_failing_log_while_a_match_fails(monkeypatch):
    """The handler gets the error of the match, and fails over it."""
    program = Program(norms, norm_inputs)
    expected = program.run()
    inject("replace raises", "middle", monkeypatch)
    break_log(monkeypatch)
    program.run(with_liger_fx(policy="all", inner="aot_eager")).assert_like(expected)
    assert count("rms_norm") == NORMS - 1


@pytest.mark.parametrize("what", ["summary", "the log", "the trace"])
def test_strict_raises_what_cannot_be_reported(what, monkeypatch, everything_is_logged):
    PUBLISHING[what](monkeypatch)
    compiled = with_liger_fx(policy="all", inner="eager", strict=True)(norms)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="on purpose"):
        compiled(*norm_inputs())


# -- graphs that DDP has split ---------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(NORMS))
        self.norms = nn.ModuleList(nn.RMSNorm(H, eps=1e-6) for _ in range(NORMS))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x).sin())
        return x


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process alone, with buckets as small as possible: DDP splits the graph at each."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_gloo_available():
        pytest.skip("no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    first = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1
    yield
    dist._DEFAULT_FIRST_BUCKET_BYTES = first
    dist.destroy_process_group()


@every_position
@pytest.mark.parametrize("fault", ["matching raises", "replace raises after it has recorded"])
def test_a_fault_costs_one_match_under_ddp(fault, position, monkeypatch, caplog, process_group):
    assert torch._dynamo.config.optimize_ddp
    torch.manual_seed(0)
    model, x = Normed(), fixed(ROWS, H)
    expected = torch.autograd.grad(model(x).cos().sum(), list(model.parameters()))
    inject(fault, position, monkeypatch)
    parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.0001)
    options = {"policy": "all", "inner": "aot_eager"}
    torch.compile(parallel, backend="liger_fx", options=options)(x).cos().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert len(liger_fx.reports()) > 1, "the graph was split"
    assert_cost_one_norm(caplog)


class Masked(nn.Module):
    """Layers of attention under one mask, which the first part of the graph computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(ROWS)
        seen = (at[None, :] <= at[:, None])[None, None]
        for layer in self.layers:
            y = layer(x)[None, None]
            x = x + nn.functional.scaled_dot_product_attention(y.sin(), y, y, seen)[0, 0]
        return x


def test_a_mask_of_another_part_of_the_graph_is_read_when_it_is_there(process_group):
    parallel = nn.parallel.DistributedDataParallel(Masked(), bucket_cap_mb=0.0001)
    options = {"policy": "all", "inner": "aot_eager"}
    torch.compile(parallel, backend="liger_fx", options=options)(fixed(ROWS, H)).sum().backward()
    counts = [report.counts.get("attention", 0) for report in liger_fx.reports()]
    found = [r.pattern for report in liger_fx.reports() for r in report.replacements]
    assert counts == [1, 1, 1] and found == ["masked, causal", *["masked, given mask"] * 2]
