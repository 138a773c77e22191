"""Liger's kernels as we launch them, without a GPU: see `_kernels_interpreted.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from _util import CUDA


@pytest.mark.skipif(CUDA, reason="on CUDA the tests of the ops run the kernels")
def test_kernels_by_tritons_interpreter():
    tests = Path(__file__).with_name("_kernels_interpreted.py")
    # conftest.py would import Triton before the interpreter is chosen.
    options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tests)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
