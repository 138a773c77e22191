"""Liger's kernels on a CPU, by Triton's interpreter.

The interpreter leaves two things out that the kernels use: scalar arguments with a dtype, and
libdevice. Both are put in here, so that what is under test without a GPU is Liger's kernel text and
our launch of it. Import this before anything imports Triton.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from liger_kernel.ops import (
    cross_entropy,
    fused_add_rms_norm,
    geglu,
    layer_norm,
    rms_norm,
)
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def _with_floats(argument):
    if type(argument) is float:
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _convert(argument)


def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


interpreter._implicit_cvt = _with_floats
for module in (rms_norm, fused_add_rms_norm, layer_norm):
    module.rsqrt = lambda x: tl.rsqrt(x)
for module in (geglu, cross_entropy):
    module.tanh = _tanh
