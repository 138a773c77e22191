"""Clocks, memory, and data that the benchmarks share."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import torch

IGNORE = -100
GIB = 2**30
TURN = 3  # laps of an arm, before the next one has its turn


class Unavailable(Exception):
    """An arm that cannot run here, and why."""


def needs_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        raise Unavailable(f"{what} needs a GPU")


def needs_package(module: str, package: str) -> None:
    """module: what ``package`` is imported as."""
    if find_spec(module) is None:
        raise Unavailable(f"{package} is not installed")


def reason(error: Exception) -> str:
    """Why an arm has no number, in a line. Out of memory is a result like others."""
    if isinstance(error, Unavailable):
        return f"left out: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, the device's work included."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def lap_times(call: Callable[[], object], device: torch.device, laps: int) -> list[float]:
    """Milliseconds of each of ``laps`` calls in a row.

    Events and no synchronisation in between: the host may run ahead, as it does in training.
    """
    if device.type != "cuda":
        return [1e3 * seconds(call, device) for _ in range(laps)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(laps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


class Laps(NamedTuple):
    """Milliseconds of each lap and GiB at the peak, which a CPU does not count (None)."""

    times: list[float]
    peak_gib: float | None  # all that was allocated
    extra_gib: float | None  # without what was allocated before

    @property
    def ms(self) -> float:
        return statistics.median(self.times)


def run_laps(call: Callable[[], object], device: torch.device, laps: int) -> Laps:
    """``laps`` calls in a row, of a ``call`` that has compiled."""
    if device.type != "cuda":
        return Laps(lap_times(call, device, laps), None, None)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    times = lap_times(call, device, laps)
    peak = torch.cuda.max_memory_allocated(device)
    return Laps(times, peak / GIB, (peak - before) / GIB)


def interleaved(
    arms: dict[str, Callable[[], object]], device: torch.device, laps: int
) -> dict[str, list[float]]:
    """Milliseconds of at least ``laps`` laps of each arm. Arms take turns of a few laps; the lap
    that starts a turn does not count: the host is not ahead yet. In each round the order is another
    one, for the GPU's clock depends on what it did just before."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    shuffle = random.Random(0).shuffle
    order = list(arms)
    while any(len(found) < laps for found in times.values()):
        shuffle(order)
        for name in order:
            times[name] += lap_times(arms[name], device, 1 + TURN)[1:]
    return times


def labels_like(tokens: torch.Tensor, ignored: float, period: int) -> torch.Tensor:
    """``tokens`` with the first ``ignored`` share of every ``period`` ignored: the prompts."""
    position = torch.arange(tokens.shape[-1], device=tokens.device) % period
    return tokens.masked_fill(position < round(ignored * period), IGNORE)


def padding(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Which of ``tokens``, [sequences, length], pad a sequence on its right, bool: the ``share`` of
    all, at most half. Lengths are spread evenly below the whole one, in random order."""
    sequences, length = tokens.shape
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(0))
    shares = 2 * share * (order + 0.5) / sequences
    lengths = (length * (1 - shares)).round().to(tokens.device)
    return torch.arange(length, device=tokens.device) >= lengths[:, None]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
