"""Random programs give the same under liger_fx as under the inner compiler alone: see `fuzz`."""

from __future__ import annotations

import dataclasses

import fuzz
import pytest
from _fuzz_menu import MOTIFS, Program
from _repairs import REPAIRS

DEFAULT = [range(start, start + 5) for start in range(0, 10, 5)]
MORE = [range(start, start + 100) for start in range(10, 2010, 100)]


@pytest.fixture(autouse=True)
def quiet():
    with fuzz.quiet():
        yield


def failures(seeds: range) -> str:
    """Those of the seeds that fail, each with its shrunk program."""
    verdicts = ((seed, fuzz.Check()(seed)) for seed in seeds)
    return "\n\n".join(f"seed {s}: {v.kind}: {v.detail}" for s, v in verdicts if v.failed)


@pytest.mark.parametrize("seeds", DEFAULT, ids=str)
def test_random_programs(seeds):
    assert not failures(seeds)


@pytest.mark.fuzz
@pytest.mark.parametrize("seeds", MORE, ids=str)
def test_more_random_programs(seeds):
    assert not failures(seeds)


QUICK = ("copies", "halves", "layouts")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.fuzz) for n in REPAIRS],
)
def test_a_repair_that_is_undone_is_noticed(name):
    seed = REPAIRS[name].seed
    assert not fuzz.Check(shrink=False)(seed).failed
    assert fuzz.Check(shrink=False, without=name)(seed).failed


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repair_can_be_undone(name):
    with REPAIRS[name].undone():
        pass


def test_a_seed_gives_one_program():
    assert fuzz.program(7) == fuzz.program(7)
    assert len({fuzz.program(seed).text for seed in range(50)}) == 50


@pytest.mark.parametrize("seed", range(0, 50, 7))
def test_programs_are_python(seed):
    script = fuzz.program(seed).script()
    compile(script, "<program>", "exec")


def test_every_motif_comes_up():
    seen = {fuzz.program(seed).motif for seed in range(300)}
    assert seen == {"decoder", *(motif.__name__ for motif in MOTIFS)}


def test_the_reference_agrees_with_itself():
    for seed in range(5):
        assert not fuzz.verdict(fuzz.program(seed), lambda p: fuzz.reference(p).run()).failed


def test_shrinking_keeps_what_fails():
    """Here the lines that take part are known: a program fails if it has both of them."""
    body = tuple(f"x{i} = x0 + {i}" for i in range(1, 20))
    whole = Program(0, "", ("x0 = torch.randn(2)", "y1 = torch.ones(2)"), body, ("x3", "x5"))
    small = fuzz.shrunk(whole, lambda p: {"x3 = x0 + 3", "x17 = x0 + 17"} <= {*p.body})
    assert small.body == ("x3 = x0 + 3", "x17 = x0 + 17")
    assert small.inputs == ("x0 = torch.randn(2)",) and len(small.outputs) == 1


@pytest.mark.slow  # that a program shrinks is shown by a small one above
def test_a_wrong_compiler_is_found_and_its_program_shrinks():
    """One that gets every program with a softmax wrong."""

    def wrong(program):
        outcome = fuzz.reference(program).run()
        if "log_softmax" in program.text and outcome.error is None:
            name = next(name for name, value in outcome.values.items() if value is not None)
            outcome.values[name] = outcome.values[name] + 1
        return outcome

    programs = sorted(map(fuzz.program, range(100)), key=lambda program: len(program.body))
    programs = [program for program in programs if "log_softmax" in program.text]
    program, found = next((p, v) for p in programs if (v := fuzz.verdict(p, wrong)).failed)
    small = fuzz.shrunk_failure(program, found, wrong)
    assert found.kind == "values" and len(small.body) <= len(program.body)
    assert fuzz.verdict(small, wrong).like(found)


@pytest.mark.parametrize(
    "change, kind",
    [
        (dict(error="RuntimeError: no"), "raises"),
        (dict(graphs=2), "graphs"),
        (dict(internal="internal error: KeyError"), "internal error"),
        (dict(layouts={"call 0: output 0": None}), "layout"),
        (dict(values={"call 0: output 0": None}), "values"),
    ],
)
def test_what_differs_is_named(change, kind):
    program = Program(0, "", ("x0 = torch.randn(2, 3)",), ("x1 = x0 * 2",), ("x1",))

    def different(program):
        outcome = fuzz.reference(program).run()
        for name, value in change.items():
            old = getattr(outcome, name)
            setattr(outcome, name, old | value if isinstance(value, dict) else value)
        return outcome

    assert fuzz.verdict(program, different).kind == kind


@pytest.mark.parametrize(
    "factor, eagerly, kind",
    [
        (1, 1, "reference wrong"),
        (3, 1, "both wrong"),
        (3, 3, "values"),  # without AOTAutograd as well
    ],
)
def test_a_reference_that_is_wrong(monkeypatch, factor, eagerly, kind):
    """One that doubles the output, unless its inner compiler is eager."""

    def times(factor):
        return lambda gm, _: lambda *args: [output * factor for output in gm.forward(*args)]

    def reference(program):
        return fuzz.Arm(program, times(1 if program.inner == "eager" else 2))

    def candidate(program):
        return fuzz.Arm(program, times(eagerly if program.inner == "eager" else factor)).run()

    monkeypatch.setattr(fuzz, "reference", reference)
    program = Program(0, "", ("x0 = torch.randn(2, 3)",), ("x1 = x0 + 2",), ("x1",))
    assert fuzz.verdict(program, candidate).kind == kind


@pytest.mark.parametrize(
    "body, kind", [("x0 + 2", "reference wrong"), ("x0 @ x0", "does not raise")]
)
@pytest.mark.parametrize("right", [True, False])
def test_a_reference_that_raises(monkeypatch, body, kind, right):
    """The program that is not compiled decides: it may raise as well."""

    def refuses(gm, _):
        raise NotImplementedError("no kernel")

    def candidate(program):
        other = dataclasses.replace(program, body=("x1 = x0 + 2" if right else "x1 = x0 + 3",))
        return fuzz.Arm(other, fuzz._plain("eager")).run()

    monkeypatch.setattr(fuzz, "reference", lambda program: fuzz.Arm(program, refuses))
    program = Program(0, "", ("x0 = torch.randn(2, 3)",), (f"x1 = {body}",), ("x1",))
    wanted = kind if right or "+" not in body else "values"
    assert fuzz.verdict(program, candidate).kind == wanted


def test_a_program_that_proves_nothing_is_drawn_anew(monkeypatch):
    kinds = iter(["both raise", "both wrong", "ok"])
    monkeypatch.setattr(fuzz, "verdict", lambda program, _: fuzz.Verdict(next(kinds)))
    found = fuzz.Check()(7)
    assert found.kind == "ok" and found.program == fuzz.program(7, attempt=2)
    assert len({fuzz.program(7, attempt).text for attempt in range(fuzz.ATTEMPTS)}) == fuzz.ATTEMPTS


def test_the_second_call_has_another_size_where_shapes_are_dynamic():
    body = ("x1 = x0 * x0.shape[1]",)
    program = Program(0, "", ("x0 = torch.randn(2, s)",), body, ("x1",), dynamic=True)
    outcome = fuzz.reference(program).run()
    shapes = [list(outcome.values[f"call {call}: output 0"].shape) for call in (0, 1)]
    assert shapes == [[2, 5], [2, 6]] and outcome.graphs == 1
    static = dataclasses.replace(program, dynamic=False)
    assert fuzz.reference(static).run().graphs == 1


@pytest.mark.slow
def test_a_worker_that_dies_is_a_failure_and_no_more():
    found = dict(fuzz.verdicts([1, 2, 3], Dies(2), jobs=2))
    assert found[2].kind == "crash" and {found[1].kind, found[3].kind} == {"ok"}


@dataclasses.dataclass(frozen=True)
class Dies:
    """In the place of `fuzz.Check`: ends its process at one seed."""

    seed: int

    def __call__(self, seed: int) -> fuzz.Verdict:
        if seed == self.seed:
            fuzz.os._exit(3)
        return fuzz.Verdict("ok")
