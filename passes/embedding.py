"""An embedding that is trained in 16 bits -> ``liger_fx::embedding``.

Matches      ``F.embedding`` (nn.Embedding) of a table in bf16 or fp16 that gets a gradient, with
             padding_idx and scale_grad_by_freq.
Leaves alone tables in fp32, whose gradient Inductor sums in place; frozen ones; sparse gradients;
             max_norm, which writes to the table.
Numerics     The lookup is torch's. So is its gradient: summed in fp32 and rounded once on a GPU.
"""

import torch
import torch.nn.functional as F

from liger_fx import ops
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite


def dense(weight, indices, padding_idx, norm_type, scale_grad_by_freq):
    return F.embedding(indices, weight, padding_idx, None, norm_type, scale_grad_by_freq, False)


def with_sparse_gradient(weight, indices, padding_idx, norm_type, scale_grad_by_freq):
    return F.embedding(indices, weight, padding_idx, None, norm_type, scale_grad_by_freq, True)


def of_limited_norm(weight, indices, padding_idx, max_norm, norm_type, scale_grad_by_freq):
    return F.embedding(indices, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, False)


def check(match: Match, weight):
    if not match.output.requires_grad:
        raise Reject("the table gets no gradient: a lookup alone is left to the compiler")
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise Reject(f"the table is {weight.dtype}: its gradient is summed in that dtype anyway")


def replace(match: Match, weight, indices, padding_idx, scale_grad_by_freq):
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:  # counted from the end
        padding_idx += int(match.values["weight"].shape[0])
    return ops.embedding(weight, indices, padding_idx, scale_grad_by_freq)


embedding = Rewrite(
    name="embedding",
    patterns=[dense],
    refuses=[
        (with_sparse_gradient, "the gradient is sparse; the op's is dense"),
        (of_limited_norm, "max_norm: the lookup writes to the table"),
    ],
    check=check,
    replace=replace,
    saved=["indices"],
)
