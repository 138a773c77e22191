"""A torchtune metric logger: one JSON line a step, with time and memory."""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig
from torchtune.training.metric_logging import MetricLoggerInterface, Scalar


class StepLog(MetricLoggerInterface):
    """Writes step, loss, seconds since set-up began, and the peak memory of each step.

    The memory is what PyTorch allocated on a GPU, and the resident set of this process without
    its children (Inductor's C++ compiler runs in those) on a CPU.
    """

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._path = Path(path)
        self._path.write_text("")
        self._start = time.perf_counter()
        _reset_peak()

    def log(self, name: str, data: Scalar, step: int) -> None:
        self.log_dict({name: data}, step)

    def log_config(self, config: DictConfig) -> None:
        """The configuration is on the command line already."""

    def log_dict(self, payload: Mapping[str, Scalar], step: int) -> None:
        line = {
            "step": step,
            "loss": float(payload["loss"]),
            "seconds": time.perf_counter() - self._start,
            "peak_bytes": _peak_bytes(),
        }
        with self._path.open("a") as file:  # complete after each step: a progress bar reads along
            file.write(json.dumps(line) + "\n")
        _reset_peak()

    def close(self) -> None:
        """Nothing is open."""


def _peak_bytes() -> int:
    """The largest use of memory since the last reset."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> None:
    """Start a new peak where the system can; elsewhere it stays the peak of the whole run."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM, see proc(5)
