"""``policy="measure"``: both forms of a graph, timed on the user's own machine and remembered.

The graph is compiled without and with each rewrite that nothing else decides about, and run forward
and backward on copies of its inputs. The answer is kept in torch's cache directory: the next
process reads it. Whoever measures sees nothing of the program around: no hooks on saved tensors, no
tracing context of Dynamo's, and a state of the random generators that is put back.

What the program can see: the graph's inputs are in memory once more meanwhile, and the statistics
of CUDA's peak memory start anew.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

# Where Inductor keeps what it compiles (torch/_inductor/runtime/cache_dir_utils.py).
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses import FakeTensor

from liger_fx import inner
from liger_fx.canonical import fake, hint
from liger_fx.matcher import Match
from liger_fx.options import Options
from liger_fx.policy import Judge, Measurement, device_of, pays
from liger_fx.rewrite import Rewrite, rewrite_graph

log = logging.getLogger("liger_fx")

WARMUP, FEWEST, MOST = 2, 5, 50  # laps
SECONDS = 0.5  # for the laps of one form of the graph, within the limits above


class NotMeasured(Exception):
    """Nothing can be measured here; the message says why."""


def measured(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any] | None,
    rewrites: Sequence[Rewrite],
    options: Options,
    table: Judge,
) -> Judge:
    """``policy="measure"``: decides by what `measure` finds. table: decides where nothing can be
    measured, or where that fails, unless ``options.strict``. A rewrite that is not among what was
    measured cannot be made here; it is tried, for the report to say why."""
    relevant = replace(options, require=(), strict=False, table="")
    if relevant.inner == "inductor":  # a CUDA graph would keep the copies of the inputs
        relevant = replace(relevant, inductor=relevant.inductor | {"triton.cudagraphs": False})
    try:
        found = measure(gm, example_inputs, rewrites, relevant)
    except NotMeasured as reason:
        why = str(reason)
    except Exception as failure:
        if options.strict:
            raise
        log.warning("liger_fx could not measure a graph, the table decides", exc_info=True)
        why = f"{type(failure).__name__}: {failure}".splitlines()[0]
    else:
        machine = "CPU" if device_of(gm).type == "cpu" else "GPU"
        return lambda rewrite, match: _said(found.get(rewrite.name), machine)

    def stand_in(rewrite: Rewrite, match: Match) -> tuple[bool, str]:
        pays_here, evidence = table(rewrite, match)
        return pays_here, f"{evidence} [not measured here: {why}]"

    return stand_in


def _said(found: Measurement | None, machine: str) -> tuple[bool, str]:
    if found is None:
        return True, "not measured"
    memory = "" if found.memory is None else f", {found.memory:.2f} of the memory"
    return pays([found]), f"{found.speed:.3f}x the speed{memory}, on this {machine}"


def measure(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any] | None,
    rewrites: Sequence[Rewrite],
    options: Options,
) -> dict[str, Measurement]:
    """What each of ``rewrites`` without a gain of its own changes in ``gm``, which stays as it is.

    The remembered answer, or else a new one, which is remembered. Rewrites that are disabled or
    cannot be made in this graph are not in it. example_inputs: None where nothing may run. Raises
    NotMeasured, and whatever compiling and running the graph raises.
    """
    device = device_of(gm)
    path = _path(gm, device, f"{inner.environment(rewrites)} {options}")
    if path.exists():
        return {name: Measurement(**found) for name, found in json.loads(path.read_text()).items()}
    if example_inputs is None:
        raise NotMeasured("nothing runs while a function is explained")
    if any(isinstance(value, FakeTensor) or _is_meta(value) for value in example_inputs):
        raise NotMeasured("the inputs are fake or meta tensors")
    if _processes() > 1:
        raise NotMeasured("each of several processes could get an answer of its own")
    measured = measure_anew(gm, example_inputs, rewrites, options)
    text = json.dumps({name: asdict(found) for name, found in measured.items()})
    write_at_once(path, text)
    return measured


def measure_anew(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    rewrites: Sequence[Rewrite],
    options: Options,
    one_of_many: bool = False,
) -> dict[str, Measurement]:
    """As `measure`, with nothing remembered. one_of_many: the memory that counts is not the peak of
    the graph but what its forward leaves for its backward, since a model runs many such graphs
    before the first backward. Raises whatever compiling and running the graph raises."""
    candidates = [rewrite for rewrite in rewrites if rewrite.name not in options.disable]
    without, forms = _forms(gm, candidates, options.settings)
    measured: dict[str, Measurement] = {}
    if forms:
        log.info("liger_fx measures %s", ", ".join(forms))
        with _undisturbed(device_of(gm)):
            bench = _Bench(example_inputs, device_of(gm))

            def compiled(form: fx.GraphModule) -> Callable[..., Any]:
                return inner.compile_rewritten(form, bench.data.inputs, options, rewrites)

            base = compiled(without)
            for name, form in forms.items():
                measured[name] = bench.compare(base, compiled(form), one_of_many)
    return measured


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


# -- remembering -----------------------------------------------------------------------------------


def _path(gm: fx.GraphModule, device: torch.device, conditions: str) -> Path:
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    machine = torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}"
    key = hashlib.sha256("\n".join([machine, conditions, _text(gm)]).encode())
    return Path(cache_dir()) / "liger_fx" / f"{key.hexdigest()}.json"


def _text(gm: fx.GraphModule) -> str:
    """The graph and the bodies in it, with dtypes and shapes; symbols for sizes that may vary."""
    lines = []
    for name, module in gm.named_modules():
        if isinstance(module, fx.GraphModule):
            lines.append(f"{name} {sorted(map(str, module.meta))}")  # has it a checkpoint policy?
            lines += [f"{n.format_node()} {_kinds(fake(n))}" for n in module.graph.nodes]
    return "\n".join(lines)


def _kinds(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_kinds, value))})"
    if isinstance(value, Tensor):
        sizes, grad = list(value.shape), " grad" if value.requires_grad else ""
        return f"{value.dtype} {sizes} {value.device.type}{grad}"
    return type(value).__name__


def write_at_once(path: Path, text: str) -> None:
    """Another process may read ``path`` at any time, and finds all of ``text`` or what was there
    before. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


# -- the forms of a graph --------------------------------------------------------------------------


def _forms(
    gm: fx.GraphModule, rewrites: Sequence[Rewrite], settings: dict[str, dict[str, Any]]
) -> tuple[fx.GraphModule, dict[str, fx.GraphModule]]:
    """``gm`` with what is always made in it, and by name the same with one rewrite more."""
    forms = {}
    for candidate in rewrites:
        if candidate.gain is None:
            form = copied(gm)
            chosen = [r for r in rewrites if r.gain is not None or r is candidate]
            if candidate.name in rewrite_graph(form, chosen, settings).counts:
                forms[candidate.name] = form
    without = copied(gm)
    rewrite_graph(without, [r for r in rewrites if r.gain is not None], settings)
    return without, forms


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose modules, parameters and buffers are its own. What stands in ``meta``, such as a
    checkpoint's policy, is shared."""
    modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    shared = [value for module in modules for value in module.meta.values()]
    return copy.deepcopy(gm, {id(value): value for value in shared})


# -- running ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Out of sight of the program that is being compiled, and without a trace in it. Autocast and
    grad mode stay: Dynamo has set them as they are where the graph begins."""
    on_gpu = device.type == "cuda"
    with (
        torch._guards.tracing(None),
        # A backward that is compiled when it first runs counts as another compilation, which cannot
        # be while Dynamo is in one.
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        _without_saved_tensors_hooks(),
        torch.cuda.device(device) if on_gpu else contextlib.nullcontext(),
        torch.random.fork_rng([device] if on_gpu else []),
    ):
        yield


@contextlib.contextmanager
def _without_saved_tensors_hooks() -> Iterator[None]:
    """The hooks of a checkpoint or of offloading around the graph are taken off and put back.

    (torch/autograd/graph.py; its `disable_saved_tensors_hooks` would forbid those that the graph
    itself sets.)
    """
    autograd, hooks = torch._C._autograd, []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


class _Data:
    """Copies of the inputs of a graph, which it may write to, and gradients of what it returns.
    SymInts are numbers here."""

    def __init__(self, example_inputs: Sequence[Any]) -> None:
        symbolic = torch.SymInt | torch.SymFloat
        self.examples = [hint(v) if isinstance(v, symbolic) else v for v in example_inputs]
        with torch.inference_mode(False):  # its tensors would not count what is written to them
            self.inputs = [_clone(value) for value in self.examples]
        self.versions = [_version(value) for value in self.inputs]
        self.trained = [v for v in self.inputs if isinstance(v, Tensor) and v.requires_grad]
        self.upstream: list[Tensor] = []

    def restore(self) -> None:
        """Undo what a call has written: a counter that goes on would run out of its cache."""
        for i, value in enumerate(self.inputs):
            if _version(value) != self.versions[i]:
                with torch.no_grad():
                    value.copy_(self.examples[i])
                self.versions[i] = _version(value)

    def backward(self, outputs: Sequence[Any]) -> None:
        roots = [v for v in outputs if isinstance(v, Tensor) and v.requires_grad]
        if not roots or not self.trained:
            return
        if not self.upstream:
            self.upstream = [torch.randn_like(root) for root in roots]
        # Not backward(): nothing may be left in a `grad`.
        torch.autograd.grad(roots, self.trained, self.upstream, allow_unused=True)


def _clone(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) else None


class _Bench:
    """Runs compiled forms of a graph, forward and backward, on one set of data."""

    def __init__(self, example_inputs: Sequence[Any], device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.allocated = torch.cuda.memory_allocated() if self.on_gpu else 0
        self.data = _Data(example_inputs)

    def compare(
        self, without: Callable[..., Any], with_it: Callable[..., Any], one_of_many: bool
    ) -> Measurement:
        """Laps of both in turn: what slows the machine down for a while slows both."""
        both = (without, with_it)
        for form in both * WARMUP:
            self.lap(form)()
        memory = [self.left(form) if one_of_many else self.peak(form) for form in both]
        slower = max(self.lap(form)() for form in both)
        laps = min(MOST, max(FEWEST, round(SECONDS / slower)))
        clocks = [[self.lap(form) for form in both] for _ in range(laps)]
        before, after = (
            statistics.median(read() for read in reads) for reads in zip(*clocks, strict=True)
        )
        return Measurement(before / after, memory[1] / memory[0] if self.on_gpu else None)

    def lap(self, form: Callable[..., Any]) -> Callable[[], float]:
        """Run ``form`` once. What comes back says how many seconds it took, and waits for that: the
        host may run ahead, as it does in training."""
        self.data.restore()
        if not self.on_gpu:
            start = time.perf_counter()
            self._run(form)
            seconds = time.perf_counter() - start
            return lambda: seconds
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._run(form)
        end.record()

        def read() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return read

    def _run(self, form: Callable[..., Any]) -> None:
        self.data.backward(form(*self.data.inputs))

    def peak(self, form: Callable[..., Any]) -> int:
        """Bytes at most, the graph's inputs and gradients included. 0 on a CPU."""
        if not self.on_gpu:
            return 0
        torch.cuda.reset_peak_memory_stats()
        self.lap(form)()
        return torch.cuda.max_memory_allocated() - self.allocated

    def left(self, form: Callable[..., Any]) -> int:
        """Bytes. 0 on a CPU."""
        self.data.restore()
        return left_by_forward(lambda: form(*self.data.inputs)) if self.on_gpu else 0


def left_by_forward(forward: Callable[[], object]) -> int:
    """Bytes on the GPU that a forward leaves for its backward, what it returns included."""
    before = torch.cuda.memory_allocated()
    outputs = forward()
    left = torch.cuda.memory_allocated() - before
    del outputs
    return left
