"""How the ops are registered: which device runs what."""

from __future__ import annotations

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensorMode

import liger_fx.ops  # noqa: F401  registers them
from liger_fx.ops import library
from liger_fx.ops.library import launchers

KERNELS = sorted(launchers)
# Devices without kernels of ours: there plain PyTorch stands in.
OTHERS = ["CPU", "XPU", "MPS", "HPU", "PrivateUse1"]


def registered(name: str, key: str) -> bool:
    """For this key itself, without what stands in for it."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"liger_fx::{name}", key)


def computed(name: str) -> dict[str, str]:
    """What runs for each dispatch key."""
    lines = torch._C._dispatch_dump_table(f"liger_fx::{name}").splitlines()
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("name", KERNELS)
def test_every_device_has_an_implementation(name):
    assert registered(name, "CompositeExplicitAutograd")
    assert registered(name, "CUDA") and registered(name, "Meta")
    assert not any(registered(name, key) for key in OTHERS)
    table = computed(name)
    assert all("[default backend kernel]" in table[key] for key in OTHERS), table
    assert all("[kernel]" in table[key] for key in ("CUDA", "Meta")), table


def test_meta_tensors_get_the_fake_implementation():
    x, weight = torch.empty(3, 5, device="meta"), torch.empty(5, device="meta")
    y, rstd = torch.ops.liger_fx.rms_norm_forward(x, weight, 1e-6, 0.0, "gemma")
    assert y.is_meta and rstd.is_meta and (y.shape, rstd.shape) == ((3, 5), (3,))
    out = torch.ops.liger_fx.rms_norm(x.requires_grad_(), weight, 1e-6, 0.0, "gemma")
    (gradient,) = torch.autograd.grad(out, x, torch.empty_like(out))
    assert gradient.is_meta and gradient.shape == x.shape


@pytest.mark.parametrize("device", ["cpu", "xpu", "mps", "cuda"])
def test_fake_tensors_keep_their_device(device):
    if device == "xpu" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 makes no fake tensors of a device that is not there")
    with FakeTensorMode():
        x, weight = torch.empty(3, 5, device=device), torch.empty(5, device=device)
        y, rstd = torch.ops.liger_fx.rms_norm_forward(x, weight, 1e-6, 0.0, "gemma")
    assert y.device.type == rstd.device.type == device


# -- the import of Liger's kernels -----------------------------------------------------------------

IMPORTED = """
import importlib.util, sys
from liger_fx.ops import library

{before}
assert library.liger_module("rms_norm").__name__ == "liger_kernel.ops.rms_norm"
import liger_kernel.utils
assert liger_kernel.utils.PEFT_AVAILABLE == (importlib.util.find_spec("peft") is not None)
print(*sorted({{"peft", "transformers"}}.intersection(sys.modules)))
import transformers  # can be imported as ever
"""


@pytest.mark.parametrize(
    ("before", "imported"),
    [
        ("", ""),
        ("import transformers", "transformers"),
        ("import liger_kernel.ops, peft", "peft transformers"),
    ],
)
def test_ligers_kernels_are_imported_alone(before, imported):
    """Liger's ``import peft`` takes seconds; what it concludes is the same without."""
    pytest.importorskip("transformers")
    if "peft" in imported:
        pytest.importorskip("peft")
    run = [sys.executable, "-W", "ignore", "-c", IMPORTED.format(before=before)]
    found = subprocess.run(run, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == imported.split()


def test_another_thread_imports_what_it_likes(tmp_path, monkeypatch):
    """While one thread does without a package."""
    (tmp_path / "a_package.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [library._Missing({"a_package"}), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("a_package")
    with ThreadPoolExecutor() as pool:
        assert pool.submit(importlib.import_module, "a_package").result().__name__ == "a_package"
    monkeypatch.delitem(sys.modules, "a_package")
