"""Matrix products that add up over chunks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_mm(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total [m, n] (+)= a [m, k] @ b [k, n]``, summed in total's dtype; ``first``: written."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif total.device.type == "cuda":
        # The GEMM's own fp32 accumulator, without rounding to bf16 in between.
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        a, b = a.to(total.dtype), b.to(total.dtype)
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
