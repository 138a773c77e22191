"""Random decoder-like programs, run by a reference compiler and by liger_fx, and compared.

    python tests/fuzz.py --seeds 0:10000 --jobs 2          find programs that go wrong
    python tests/fuzz.py --seeds 17                        print seed 17, and check it
    python tests/fuzz.py --seeds 0:500 --self-check        the reference against itself
    python tests/fuzz.py --seeds 0:1000 --without saved    a repair of the engine undone: who notices?
    python tests/fuzz.py --seeds 0:1000 --without all      the same for each repair, as a table

`program` makes a program from a seed: the source text of its inputs and of its body, which
`_fuzz_menu` puts together. `verdict` says what differs between both compilers, and `shrunk` drops
lines while it still does. A failing program is printed so that one can paste and run it. A program
that proves nothing, since the reference raises or is wrong as well, is drawn anew.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import time
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")  # a third less to compile

import torch
from _fuzz_menu import Generator, Program
from _repairs import NOT_COMPARED, REPAIRS
from torch import Tensor, fx

import liger_fx
from liger_fx.bodies import checkpoint_eagerly

SIZES = (5, 6)  # sequence lengths of the first and the second call of a program with dynamic=True
ATTEMPTS = 4  # to find a program that runs
SECONDS = 300.0  # for one seed, shrinking included; more counts as a crash

# Relative error below which two correct programs stay. An error above is compared to NOISE times
# what inputs that differ by a rounding make of the reference; where that is beyond CHAOS, nothing
# can be said.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
NOISE, CHAOS = 8.0, 0.3

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def program(seed: int, attempt: int = 0) -> Program:
    """The program of a seed: always the same one. attempt: 1, 2 ... are other programs, for the
    case that the first one proves nothing."""
    return Generator(seed, attempt).build()


# -- running --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one compiler made of a program.

    values: outputs, gradients and inputs afterwards, by what they are. layouts: strides of the
    outputs, and which of them share memory with which input or output. graphs: how many Dynamo
    made. error: the exception, if one was raised. internal: errors that liger_fx caught itself.
    """

    values: dict[str, Tensor | None] = field(default_factory=dict)
    layouts: dict[str, Any] = field(default_factory=dict)
    graphs: int = 0
    error: str | None = None
    internal: str | None = None


class Arm:
    """One program, compiled by one compiler: may be run several times."""

    def __init__(self, program: Program, compile_graph: Compile) -> None:
        self.program = program
        module = sys.modules["fuzzed"] = types.ModuleType("fuzzed")  # torch 2.11 imports it
        self.namespace: dict[str, Any] = vars(module)
        self.graphs = 0
        self.internal: str | None = None
        self.compile_graph = compile_graph
        exec(compile(program.text, f"<seed {program.seed}>", "exec"), self.namespace)
        torch._dynamo.reset()
        self.compiled = torch.compile(
            self.namespace["program"], backend=self._backend, dynamic=program.dynamic
        )

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return self.compile_graph(gm, example_inputs)

    def uncompiled(self) -> Arm:
        """The same program as it is written."""
        arm = copy.copy(self)
        arm.compiled = self.namespace["program"]
        return arm

    def run(self, perturbed: int | None = None) -> Outcome:
        """Two calls, each with its backward. perturbed: a seed for inputs that differ by a rounding
        from those of the program."""
        outcome = Outcome()
        for call, size in enumerate(SIZES if self.program.dynamic else SIZES[:1] * 2):
            leaves = self.namespace["inputs"](size)
            if perturbed is not None:
                _perturb(leaves, ROUNDING[self.program.dtype], perturbed)
            try:
                with _state_restored():
                    self._call(leaves, f"call {call}: ", outcome)
            except Exception as raised:
                outcome.error = "".join(traceback.format_exception_only(raised)).strip()
                break
        if outcome.error is not None:
            # What torch.func leaves of a trace that raised holds dispatch keys, and takes Autograd
            # from the program that runs when it is collected: collect it now.
            with torch._C._PreserveDispatchKeyGuard():
                gc.collect()
        outcome.graphs = self.graphs
        return outcome

    def _call(self, leaves: Sequence[Tensor], call: str, outcome: Outcome) -> None:
        given = leaves if self.program.leaves else [leaf.clone() for leaf in leaves]
        torch.manual_seed(self.program.seed)
        outputs = self.compiled(*given)
        outcome.values |= {f"{call}output {i}": _frozen(o) for i, o in enumerate(outputs)}
        outcome.layouts |= {f"{call}output {i}": _strides(o) for i, o in enumerate(outputs)}
        outcome.layouts[f"{call}shared memory"] = _shared([*outputs, *given])
        named = list(zip(self.program.input_names, leaves, given, strict=True))
        outcome.values |= {f"{call}{name} afterwards": _frozen(copy) for name, _, copy in named}
        wanted = [(name, leaf) for name, leaf, _ in named if leaf.requires_grad]
        total = _weighted_sum(outputs)
        if total is not None and wanted:
            found = torch.autograd.grad(total, [leaf for _, leaf in wanted], allow_unused=True)
            names = (f"{call}gradient of {name}" for name, _ in wanted)
            outcome.values |= dict(zip(names, found, strict=True))


@contextlib.contextmanager
def _state_restored() -> Iterator[None]:
    """An exception may leave a graph between its entry to autocast, to no_grad or to one of
    torch.func's transforms, which disable checkpoints, and the exit: the next program must not run
    there."""
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", enabled=False), torch.enable_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        while torch._C._functorch.peek_interpreter_stack() is not None:
            torch._C._functorch.pop_dynamic_layer_stack()
        torch._C._autograd._saved_tensors_hooks_enable()


def _perturb(leaves: Sequence[Tensor], rounding: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in leaves:
            if leaf.is_floating_point():
                signs = torch.rand(leaf.shape, generator=generator).sub_(0.5).sign_()
                leaf.mul_(1 + rounding * signs)


def _frozen(value: Any) -> Tensor | None:
    return value.detach().clone() if isinstance(value, Tensor) else None


def _strides(value: Any) -> Any:
    """The strides that matter: those of dimensions with more than one element."""
    if not isinstance(value, Tensor) or not value.numel():
        return None
    sizes_and_strides = zip(value.shape, value.stride(), strict=True)
    return [stride for size, stride in sizes_and_strides if size > 1]


def _shared(values: Sequence[Any]) -> list[int]:
    """For each tensor the first of them that is in the same memory."""
    storages = [v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)]
    return [storages.index(storage) for storage in storages]


def _weighted_sum(outputs: Sequence[Any]) -> Tensor | None:
    """A number that depends on each element of each output in its own way."""
    terms = [
        (o.double() * torch.linspace(1, 2, o.numel(), dtype=torch.float64).view(o.shape)).sum()
        for o in outputs
        if isinstance(o, Tensor) and o.requires_grad
    ]
    return torch.stack(terms).sum() if terms else None


def _plain(inner: str) -> Compile:
    """The compiler that liger_fx hands its graphs to, without liger_fx."""

    def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if inner == "eager":  # Dynamo's own checkpoint would forget the random state
            checkpoint_eagerly(gm)
            return gm.forward
        if inner == "aot_eager":
            return torch._dynamo.lookup_backend("aot_eager")(gm, list(example_inputs))
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(gm, list(example_inputs), config_patches=_INDUCTOR)

    return compile_graph


_INDUCTOR = {"fallback_random": True}  # the random numbers of eager


def _with_liger_fx(inner: str, policy: Any, reports: list[Any]) -> Compile:
    options = {"policy": policy, "inner": inner, "strict": False}
    if inner == "inductor":
        options |= _INDUCTOR

    def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        run = liger_fx.liger_fx(gm, example_inputs, options=options)
        reports.append(liger_fx.reports()[-1])
        return run

    return compile_graph


def reference(program: Program) -> Arm:
    return Arm(program, _plain(program.inner))


def under_test(program: Program, policy: Any = "all") -> Outcome:
    """What liger_fx makes of the program."""
    reports: list[Any] = []
    outcome = Arm(program, _with_liger_fx(program.inner, policy, reports)).run()
    reasons = [r.reason for report in reports for r in report.rejections]
    errors = [reason for reason in reasons if "internal error" in reason]
    outcome.internal = errors[0].strip().splitlines()[-1] if errors else None
    return outcome


# -- comparing ------------------------------------------------------------------------------------


# Of programs that prove nothing: why.
NO_PROOF = {
    "both raise": "the program raises without liger_fx as well",
    "both wrong": "AOTAutograd gets the same values wrong without liger_fx",
    "no kernel": "torch cannot differentiate complex products in a compiled region",
}
# Of programs that liger_fx gets right where the reference does not.
EXCUSED = {
    "saves less": "the reference does not allow a write to what only its own backward reads",
    "reference wrong": "AOTAutograd gets the program wrong, or raises, and uncompiled it is right",
    "less nan": "the reference multiplies the gradient of a token without a loss, zero, by nan",
}


@dataclass(frozen=True)
class Verdict:
    """kind: how the outcomes differ, in a word or two. No failure are "ok" and those of `NO_PROOF`
    and `EXCUSED`.
    program: the one that `Check` has run."""

    kind: str
    detail: str = ""
    program: Program | None = None

    @property
    def failed(self) -> bool:
        return self.kind not in ("ok", *NO_PROOF, *EXCUSED)

    def like(self, other: Verdict) -> bool:
        """Is it the same failure? Of another program, so numbers may differ."""
        words = [re.sub(r"[\d\[\], ]+", " ", v.detail)[:160] for v in (self, other)]
        return self.kind == other.kind and (self.kind != "raises" or words[0] == words[1])


def verdict(program: Program, candidate: Callable[[Program], Outcome] = under_test) -> Verdict:
    """Run the program by the reference and by the candidate, and compare."""
    try:
        arm = reference(program)
    except SyntaxError as raised:  # a program that was shrunk too far
        return Verdict("both raise", str(raised))
    expected = arm.run()
    actual = candidate(program)
    if actual.internal is not None:
        return Verdict("internal error", actual.internal)
    if expected.error is not None and actual.error is not None:
        return Verdict("both raise", expected.error)
    if actual.error is not None:
        return Verdict("no kernel" if _lacks_kernel(program, actual) else "raises", actual.error)
    if expected.error is not None:
        return _without_reference(arm, actual, expected.error)
    if expected.graphs != actual.graphs:
        return Verdict("graphs", f"{actual.graphs}, expected {expected.graphs}")
    if different := dict(_differences(actual, expected, arm)):
        if all(_has_less_nan(name, actual, expected) for name in different):
            return Verdict("less nan", _values(different).detail)
        return _judged_by_eager(program, candidate, different, actual, expected)
    for name, layout in expected.layouts.items():
        if actual.layouts[name] != layout:
            return Verdict("layout", f"{name}: {actual.layouts[name]}, expected {layout}")
    return Verdict("ok")


def _lacks_kernel(program: Program, actual: Outcome) -> bool:
    """torch 2.11 hands the conjugates of complex factors to the backward of a region, for which its
    operator has no kernel: mostly without liger_fx as well, but which values go there depends on
    the partitioner."""
    complex_region = all(word in program.text for word in ("view_as_complex", "nested_compile"))
    return complex_region and "invoke_subgraph at dispatch key" in (actual.error or "")


def _without_reference(arm: Arm, actual: Outcome, error: str) -> Verdict:
    """The verdict where only the reference raises. arm: the reference."""
    # An op may keep less for its backward: a write to what it does not keep is no error.
    if "modified by an inplace operation" in error:
        return Verdict("saves less", error)
    uncompiled = arm.uncompiled()
    expected = uncompiled.run()
    if expected.error is not None:
        return Verdict("does not raise", error)
    different = dict(_differences(actual, expected, uncompiled))
    return _values(different) if different else Verdict("reference wrong", error)


def _judged_by_eager(
    program: Program,
    candidate: Callable[[Program], Outcome],
    different: dict[str, str],
    actual: Outcome,
    expected: Outcome,
) -> Verdict:
    """The verdict on values that differ, where the reference may be wrong itself: AOTAutograd reads
    an input again in the backward that was written since (torch 2.11 and 2.13).

    Where the candidate is wrong only in values that the reference gets wrong, nothing is proved,
    unless it fails without AOTAutograd as well."""
    uncompiled = reference(program).uncompiled()
    right = uncompiled.run()
    only_numbers = all(text.startswith("relative error") for text in different.values())
    if right.error is not None or not only_numbers:
        return _values(different)
    if not any(_differences(actual, right, uncompiled)):
        return Verdict("reference wrong", _values(different).detail)
    wrong = dict(_differences(expected, right, uncompiled))
    own = {name: text for name, text in different.items() if name not in wrong}
    if own or program.inner == "eager":
        return _values(own or different)
    without_aot = verdict(dataclasses.replace(program, inner="eager"), candidate)
    return without_aot if without_aot.failed else Verdict("both wrong", _values(different).detail)


def _has_less_nan(name: str, actual: Outcome, expected: Outcome) -> bool:
    """A gradient that is nan where it differs, and a number here: heads leave tokens without a loss
    out, whatever their hidden states are."""
    found, wanted = actual.values.get(name), expected.values.get(name)
    if "gradient of" not in name or found is None or wanted is None:
        return False
    nan = wanted.isnan()
    same = torch.where(nan, 0.0, found), torch.where(nan, 0.0, wanted)
    near = TOLERANCES.get(found.dtype, TOLERANCES[torch.float32])
    return bool(nan.any() and found[nan].isfinite().all() and torch.allclose(*same, near, near))


def _values(different: dict[str, str]) -> Verdict:
    name, text = next(iter(different.items()))
    return Verdict("values", f"{name}: {text}")


def _differences(actual: Outcome, expected: Outcome, arm: Arm) -> Iterator[tuple[str, str]]:
    """The values that differ, and by how much. arm: whose outcome is expected."""
    noise = functools.cache(lambda: [arm.run(perturbed=seed).values for seed in range(3)])
    for name in expected.values | actual.values:
        wanted = expected.values.get(name)
        difference = _difference(actual.values.get(name), wanted)
        if isinstance(difference, str):
            yield name, difference
        elif difference > TOLERANCES[arm.program.dtype]:
            usual = max(_error(values.get(name), wanted) for values in noise())
            if usual < CHAOS and difference > NOISE * usual:
                yield name, f"relative error {difference:.2g}"


def _difference(actual: Tensor | None, expected: Tensor | None) -> float | str:
    """The relative error, or in words what differs otherwise."""
    if actual is None or expected is None:
        return 0.0 if actual is expected else f"{_kind(actual)}, expected {_kind(expected)}"
    if _kind(actual) != _kind(expected):
        return f"{_kind(actual)}, expected {_kind(expected)}"
    return _error(actual, expected)


def _kind(value: Tensor | None) -> str:
    return "None" if value is None else f"{value.dtype} {list(value.shape)}"


def _error(actual: Tensor | None, expected: Tensor | None) -> float:
    """The relative Frobenius error; infinite where other elements are nan or inf."""
    if actual is None or expected is None:
        return 0.0 if actual is expected else float("inf")
    a, e = actual.double(), expected.double()
    if not torch.equal(_not_finite(a), _not_finite(e)):
        return float("inf")
    a, e = a[e.isfinite()], e[e.isfinite()]
    return ((a - e).norm() / e.norm().clamp_min(1e-12)).item()


def _not_finite(value: Tensor) -> Tensor:
    """1 for nan, 2 and 3 for both infinities, 0 for numbers."""
    return value.isnan() + 2 * value.isposinf() + 3 * value.isneginf()


# -- shrinking ------------------------------------------------------------------------------------


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A program with as few lines, outputs and features as still fail, by delta debugging."""
    before = None
    while program != before:
        before = program
        program = _with_fewer_lines(program, fails)
        simpler = next(filter(fails, _with_a_feature_less(program)), None)
        while simpler is not None:
            program = simpler
            simpler = next(filter(fails, _with_a_feature_less(program)), None)
    fewer = program.without_unused_inputs()  # may draw other numbers for those that are left
    return fewer if fails(fewer) else program


def _with_fewer_lines(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Halves of the body are left out, then quarters, at last single lines."""
    length = max(len(program.body) // 2, 1)
    while length:
        start = 0
        while start < len(program.body):
            body = program.body[:start] + program.body[start + length :]
            attempt = dataclasses.replace(program, body=body)
            if fails(attempt):
                program = attempt
            else:
                start += length
        length //= 2
    return program


def _with_a_feature_less(program: Program) -> Iterator[Program]:
    for i in range(len(program.outputs) if len(program.outputs) > 1 else 0):
        outputs = program.outputs[:i] + program.outputs[i + 1 :]
        yield dataclasses.replace(program, outputs=outputs)
    for i, line in enumerate(program.body):
        if line.lstrip().startswith("with "):
            yield dataclasses.replace(program, body=_without_block(program.body, i))
    if program.dynamic:
        yield dataclasses.replace(program, dynamic=False)
    for i, line in enumerate(program.inputs):
        for feature in (".requires_grad_()", ".bfloat16()"):
            if feature in line:
                inputs = (*program.inputs[:i], line.replace(feature, ""), *program.inputs[i + 1 :])
                yield dataclasses.replace(program, inputs=inputs)


def _without_block(body: tuple[str, ...], start: int) -> tuple[str, ...]:
    """The lines below a ``with`` moved to where it stood."""
    indent = _indent(body[start])
    end = start + 1
    while end < len(body) and _indent(body[end]) > indent:
        end += 1
    inner = (line.removeprefix("    ") for line in body[start + 1 : end])
    return (*body[:start], *inner, *body[end:])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def shrunk_failure(
    program: Program, first: Verdict, candidate: Callable[[Program], Outcome] = under_test
) -> Program:
    """The smallest program found that fails in the same way as ``program`` did."""
    deadline = time.monotonic() + SECONDS / 3

    def fails(attempt: Program) -> bool:
        return time.monotonic() < deadline and verdict(attempt, candidate).like(first)

    return shrunk(program, fails)


# -- command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What is done with each seed; sent to the workers."""

    policy: Any = "all"
    self_check: bool = False
    shrink: bool = True
    inner: str | None = None
    without: str | None = None

    def __call__(self, seed: int) -> Verdict:
        """The verdict on the first program of a seed that proves something. The detail of a failure
        ends in its shrunk program."""
        for attempt in range(ATTEMPTS):
            found = self.judge(program(seed, attempt))
            if found.kind not in NO_PROOF:
                break
        return found

    def judge(self, whole: Program) -> Verdict:
        if self.inner is not None:
            whole = dataclasses.replace(whole, inner=self.inner)
        found = verdict(whole, self._candidate)
        detail = found.detail
        if found.failed:
            smallest = shrunk_failure(whole, found, self._candidate) if self.shrink else whole
            detail += f"\n\n{smallest.script(self.policy)}"
        return Verdict(found.kind, detail, whole)

    def _candidate(self, program: Program) -> Outcome:
        if self.self_check:
            return reference(program).run()
        undone = REPAIRS[self.without].undone() if self.without else contextlib.nullcontext()
        with undone:
            return under_test(program, self.policy)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No caches, which would hide what is compiled, and no log of what fails on purpose."""
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _work(connection: multiprocessing.connection.Connection, check: Check) -> None:
    """A worker: a seed comes in, its verdict goes out."""
    with quiet():
        while (seed := connection.recv()) is not None:
            try:
                connection.send(check(seed))
            except Exception:
                connection.send(Verdict("fuzzer", traceback.format_exc()))


class _Worker:
    """A process that works on one seed at a time, and may die of it."""

    def __init__(self, check: Check) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, check), daemon=True)
        self.process.start()
        other.close()
        self.seed: int | None = None
        self.since = 0.0

    def take(self, seed: int | None) -> None:
        self.seed, self.since = seed, time.monotonic()
        self.connection.send(seed)

    def result(self) -> Verdict | None:
        """The verdict; None while there is none yet."""
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return Verdict("crash", f"the worker ended with {self.process.exitcode}")
        if time.monotonic() - self.since < 2 * SECONDS:
            return None
        self.process.kill()
        return Verdict("crash", f"no verdict after {2 * SECONDS:.0f} s")


def verdicts(seeds: Sequence[int], check: Check, jobs: int) -> Iterator[tuple[int, Verdict]]:
    """Each seed and its verdict, as they come."""
    if jobs == 1:
        with quiet():
            yield from ((seed, check(seed)) for seed in seeds)
        return
    todo = list(reversed(seeds))
    workers = [_Worker(check) for _ in range(min(jobs, len(todo)))]
    for worker in workers:
        worker.take(todo.pop())
    while workers:
        multiprocessing.connection.wait([w.connection for w in workers], timeout=1)
        for i, worker in reversed(list(enumerate(workers))):
            found = worker.result()
            if found is None:
                continue
            yield worker.seed, found  # type: ignore[misc]
            crashed = found.kind == "crash"
            if not todo:
                del workers[i]
            elif crashed:
                worker = workers[i] = _Worker(check)
            if todo or not crashed:
                worker.take(todo.pop() if todo else None)


def _seeds(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last) if last else int(first) + 1)


def first_to_notice(check: Check, seeds: Sequence[int]) -> tuple[int, Verdict] | None:
    """The first seed that fails; None if no seed does."""
    with quiet():
        return next(((seed, v) for seed in seeds if (v := check(seed)).failed), None)


def undo(names: Sequence[str], seeds: Sequence[int], check: Check, jobs: int) -> int:
    """Print for each repair which seed notices that it is undone. 1 if one is not noticed."""
    checks = [dataclasses.replace(check, shrink=False, without=name) for name in names]
    context = multiprocessing.get_context("spawn")
    unnoticed = 0
    with ProcessPoolExecutor(jobs, context) as pool:
        found = pool.map(first_to_notice, checks, itertools.repeat(seeds))
        for name, first in zip(names, found, strict=True):
            unnoticed += first is None
            how = "NOT NOTICED"
            if first is not None:
                seed, v = first
                motif = v.program.motif if v.program else ""
                how = f"seed {seed} ({motif}): {v.kind}: {v.detail.splitlines()[0]}"
            print(f"{REPAIRS[name].row:6}{name:20}{how[:150]}", flush=True)
    return 1 if unnoticed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=_seeds, default=range(100), help="first:last, or one")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--policy", default="all", help="auto, all, or names with commas")
    parser.add_argument("--inner", help="for all programs: aot_eager, eager or inductor")
    parser.add_argument("--keep-going", action="store_true", help="after the first failure")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--self-check", action="store_true", help="the reference against itself")
    parser.add_argument(
        "--without",
        choices=[*REPAIRS, "all"],
        help="undo a repair of the engine (tests/_repairs.py): the run must find a failure",
    )
    given = parser.parse_args()
    check = Check(given.policy, given.self_check, not given.no_shrink, given.inner)
    if given.without is not None:
        names = list(REPAIRS) if given.without == "all" else [given.without]
        if given.without == "all":
            print(
                "\n".join(f"{row:6}cannot occur here: {why}" for row, why in NOT_COMPARED.items())
            )
        return undo(names, given.seeds, check, given.jobs)
    kinds: Counter[str] = Counter()
    failures, start = 0, time.monotonic()
    for seed, found in verdicts(given.seeds, check, given.jobs):
        kinds[found.kind] += 1
        if len(given.seeds) == 1 and found.program is not None:
            print(found.program.script(given.policy))
        if found.failed:
            failures += 1
            motif = found.program.motif if found.program else ""
            print(f"\n=== seed {seed} ({motif}): {found.kind}: {found.detail}", flush=True)
            if not given.keep_going:
                break
        if kinds.total() % 100 == 0:
            seconds = (time.monotonic() - start) / kinds.total()
            counts = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
            print(f"{kinds.total()} programs, {seconds:.2f} s each: {counts}", flush=True)
    print(f"{kinds.total()} programs, {failures} failures")
    if 2 * sum(kinds[kind] for kind in NO_PROOF) > kinds.total() > 10:
        print("most programs raise without liger_fx as well: this run says nothing")
        return 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
