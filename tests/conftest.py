import gc
import importlib
import os
from pathlib import Path

# Read when torch is imported, here and in the programs that tests run. pytest has a process for each
# core, whose further threads would be in its way: tensors are too small here to share the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of what Inductor compiles for a CPU most is compiled for one test: a third less to compile.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")

import pytest
import torch
import torch._dynamo.guards
from _spellings import B, H, S, T, V
from _util import DEVICE

# cuBLAS may split the sum of a product as tiny as those here, and add up its parts in bf16.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


# Dynamo flushes the processor's cache after each graph to time the guards, for its log alone.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


def pytest_collection_finish() -> None:
    """Modules stay: the garbage collector, which Dynamo calls after each graph, may pass them by."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """No compiled code, seed or report of an earlier test."""
    import liger_fx.dynamo

    torch._dynamo.reset()
    torch.manual_seed(0)
    liger_fx.clear_reports()
    liger_fx.dynamo._made.clear()


@pytest.fixture(autouse=True)
def no_table_of_ones_own(monkeypatch) -> None:
    """Whoever runs the tests may have measured their GPU."""
    monkeypatch.setattr("liger_fx.policy.own_path", lambda: Path(os.devnull) / "measured.json")


@pytest.fixture
def hidden():
    return torch.randn(B, S, H, device=DEVICE, requires_grad=True)


@pytest.fixture
def weight():
    return torch.randn(V, H, device=DEVICE, requires_grad=True)


@pytest.fixture
def heads(hidden, weight):
    """Hidden states and weights of student and teacher."""
    teacher = torch.randn(B, S, T, device=DEVICE), torch.randn(V, T, device=DEVICE)
    return hidden, weight, *teacher


@pytest.fixture
def labels():
    labels = torch.randint(0, V, (B, S), device=DEVICE)
    labels[:, :2] = -100
    return labels


@pytest.fixture
def head_alone(monkeypatch):
    """On every device, whatever else auto applies there."""
    monkeypatch.setenv("LIGER_FX_POLICY", "linear_cross_entropy,linear_logprobs,linear_kl")


@pytest.fixture
def ppo():
    """The fused recipe's module."""
    return importlib.import_module("liger_fx.recipes.ppo_full_finetune_single_device")
