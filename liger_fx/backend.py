"""The backend: rewrite the graph, then hand it to the inner compiler."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import counters

from liger_fx import ops
from liger_fx.advice import advice
from liger_fx.measure import NotMeasured, measure
from liger_fx.options import Options
from liger_fx.policy import Judge, by_measurement, by_table, decide, device_of, form_of, instead
from liger_fx.report import Report
from liger_fx.rewrite import Rewrite, rewrite_graph

log = logging.getLogger("liger_fx")

_reports: list[Report] = []


class RequirementError(RuntimeError):
    """A rewrite named in ``require`` was not made in the graph that should have it."""


def liger_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """``torch.compile(fn, backend="liger_fx", options={...}, mode=...)``.

    options: see `liger_fx.options.Options`; keys it does not know go to Inductor. mode: Inductor's
    modes. Raises ValueError for unknown options, RequirementError if ``require`` is not met.
    """
    parsed = parse_options(options)
    publish(rewrite(gm, parsed, example_inputs, mode), parsed)
    return compile_rewritten(gm, example_inputs, parsed, mode)


def parse_options(options: Mapping[str, Any] | None) -> Options:
    """``options`` over the environment. Raises ValueError for what is unknown."""
    return Options.parse(options, {r.name: r.settings for r in _rewrites()})


def reports() -> list[Report]:
    """One report for each graph that this process has compiled with liger_fx, oldest first."""
    return list(_reports)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """What liger_fx would do with ``fn(*args, **kwargs)``, without running a kernel.

    ``fn`` is traced on fake tensors: real, fake and meta arguments will do, and no GPU is needed.
    Code between two graphs runs on fake tensors too. The options come from the environment. Resets
    torch.compile: what the process has compiled before is compiled again when it is called next.
    Returns one report over all graphs.
    """
    from torch._subclasses import FakeTensorMode

    parsed = parse_options(None)
    found: list[Report] = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(rewrite(gm, parsed))
        return gm.forward

    torch._dynamo.reset()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.compile(fn, backend=record)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    return Report.merged(found)


def rewrite(
    gm: fx.GraphModule,
    options: Options,
    example_inputs: Sequence[Any] | None = None,
    mode: str | None = None,
) -> Report:
    """The first step of the backend: rewrite ``gm`` in place. After an engine error it is as it was
    and the error is in the report, unless ``strict``.

    example_inputs, mode: for ``policy="measure"``; without inputs nothing is run.
    """
    if device_of(gm).type == "cpu":
        _warn_without_cuda()
    policy = decide(_rewrites(), options, _judge(gm, options, example_inputs, mode))
    try:
        report = rewrite_graph(gm, policy.chosen, options.settings, policy.where)
    except Exception:
        if options.strict:
            raise
        report = Report(error=traceback.format_exc())
        log.exception("liger_fx failed on a graph and leaves it untouched; please report this")
    report.decisions = policy.decisions(report.spellings)
    report.note = advice()
    return report


@functools.cache
def _warn_without_cuda() -> None:
    log.warning("liger_fx: on a CPU plain PyTorch ops stand in: Liger's Triton kernels need a GPU")


def _rewrites() -> list[Rewrite]:
    from liger_fx.passes import DEFAULT

    return DEFAULT


def _judge(
    gm: fx.GraphModule, options: Options, example_inputs: Sequence[Any] | None, mode: str | None
) -> Judge:
    """What decides about the rewrites that the options leave to evidence."""
    auto = by_table(device_of(gm), options.inner, form_of(gm))
    if options.policy != "measure":
        return auto
    try:
        return _measured(gm, options, example_inputs, mode)
    except NotMeasured as why:
        return instead(auto, str(why))
    except Exception as failure:
        if options.strict:
            raise
        log.warning("liger_fx could not measure a graph, the table decides", exc_info=True)
        return instead(auto, f"{type(failure).__name__}: {failure}".splitlines()[0])


def _measured(
    gm: fx.GraphModule, options: Options, example_inputs: Sequence[Any] | None, mode: str | None
) -> Judge:
    relevant = replace(options, require=(), strict=False)
    if options.inner == "inductor":  # a CUDA graph would keep the copies of the inputs
        relevant = replace(relevant, inductor=options.inductor | {"triton.cudagraphs": False})
    measured = measure(
        gm,
        [rewrite for rewrite in _rewrites() if rewrite.name not in options.disable],
        example_inputs,
        compile_graph=lambda form, inputs: compile_rewritten(form, inputs, relevant, mode),
        settings=options.settings,
        conditions=f"{environment()} {relevant} mode={mode}",
    )
    return by_measurement(measured, device_of(gm))


def publish(report: Report, options: Options) -> None:
    """The second step: the report goes to `reports`, logs and traces. Raises RequirementError."""
    if report.note and not _reports:
        log.warning("liger_fx: %s", report.note)
    _reports.append(report)
    for name, count in report.counts.items():
        counters["liger_fx"][name] += count
    log.info("%s", report.summary())
    log.debug("%s", report)
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "liger_fx_report", "encoding": "json"},
        payload_fn=report.to_json,
    )
    _check_required(options, report)


def _check_required(options: Options, report: Report) -> None:
    made = {name for r in _reports for name in r.counts}
    missing = [name for name in options.require if name not in made]
    # A graph without anything like the rewrite (a layer of its own, say) is no failure yet.
    near = {m.rewrite for m in report.near_misses if 2 * m.matched >= m.total}
    concerned = near | {r.rewrite for r in report.rejections}
    if missing and (concerned & set(missing) or report.error):
        raise RequirementError(f"required but not made: {', '.join(missing)}\n{report}")


def compile_rewritten(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None = None
) -> Callable[..., Any]:
    """The last step: the inner compiler."""
    if options.inner == "eager":
        return gm.forward
    if options.inner == "aot_eager":
        return torch._dynamo.lookup_backend("aot_eager")(gm, list(example_inputs))
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **options.inductor}
    tag = torch.compiler.config.patch(cache_key_tag=_cache_key_tag())  # type: ignore[attr-defined]
    with tag, _cacheable_random_state(patches):
        return compile_fx(  # type: ignore[return-value]
            gm, list(example_inputs), config_patches=patches
        )


def _cacheable_random_state(patches: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """On a GPU, attention in an activation checkpoint counts as random, dropout or not, and runs
    under an operator that restores the generator's state for the recomputation. Of two such
    operators torch takes the one whose graphs torch 2.11 never caches, so that every process
    compiles again (https://github.com/pytorch/pytorch/pull/185562); only in CUDA graphs is it
    needed."""
    from torch._inductor import config as inductor

    in_cuda_graphs = patches.get("triton.cudagraphs", inductor.triton.cudagraphs)
    if in_cuda_graphs or torch._prims.rng_prims.graphsafe_run_with_rng_state.cacheable():
        return contextlib.nullcontext()
    return torch._functorch.config.patch(graphsafe_rng_functionalization=False)


def _fingerprint() -> str:
    """A hash over the source of our ops and rewrites, and Liger's version."""
    source = hashlib.sha256()
    rewrites = importlib.util.find_spec("liger_fx.passes")
    assert rewrites is not None
    for folder in (
        Path(ops.__file__).parent,
        *map(Path, rewrites.submodule_search_locations or ()),
    ):
        for path in sorted(folder.glob("*.py")):
            source.update(path.read_bytes())
    return f"liger_fx={source.hexdigest()[:16]};liger_kernel={version('liger_kernel')}"


def environment() -> str:
    """What decides, beside the options, what a graph becomes."""
    return f"torch={torch.__version__};{_FINGERPRINT}"


_FINGERPRINT = _fingerprint()  # of what has just been imported: an editor may save any time later


def _cache_key_tag() -> str:
    """The compile caches see the rewritten graph, but not what an op's backward is: after a change
    of liger_fx or Liger they must miss (https://github.com/pytorch/pytorch/issues/144344)."""
    return ";".join(filter(None, [torch.compiler.config.cache_key_tag, _FINGERPRINT]))
