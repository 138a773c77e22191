"""Two final projections + divergence of the one from the other -> ``liger_fx::linear_loss``: no
logits of the student or of the teacher.

Matches      torchtune's ForwardKLLoss, ReverseKLLoss and SymmetricKLLoss with ``normalize=False``
             over rows of two ``F.linear``, the teacher's without gradient; ``F.kl_div`` in both
             directions, of a target in probabilities or in logarithms; the generalised
             Jensen-Shannon divergence as TRL (GKD) and Liger write it; each at a constant
             temperature. ``F.cross_entropy`` of the same logits beside it, as in Hinton et al.,
             2015, without the temperature. Both with masks and weights of tokens, added up or
             averaged in any way, or apart, and over chunks of both hidden states (torchtune's
             WithChunkedOutput forms), as `_head` says: one projection, one gradient of the head.
Leaves alone logits that anybody else sees; a z-loss or an entropy beside it; two teachers; a
             teacher that is trained; LoRA on the student's head; ``jsd[mask]`` (the graph ends
             there: its shape depends on data).
Numerics     Logits in each projection's dtype, softmax and temperature in fp32, parameter gradients
             summed in fp32. The weights of the sum are multiplied in fp32, before the gradient is
             rounded. Of infinite logits: `liger_fx.ops.kl_loss`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from liger_fx.passes._head import head_rewrite
from liger_fx.passes._rows import (
    check_projection,
    check_rows,
    check_temperature,
    keeps_or_scales_rows,
    kept_rows,
    temperature,
)
from liger_fx.passes._rows import scaled_rows as rows
from liger_fx.passes._taken import Taken
from liger_fx.passes.linear_cross_entropy import CROSS_ENTROPIES
from torch import fx

from liger_fx.canonical import fake, hint, op_name, specialise
from liger_fx.matcher import Match, Reject, name_of
from liger_fx.pattern import chain, guard


def _detaches(node: fx.Node) -> bool:
    return op_name(node) == "detach"


teacher_rows = chain("teacher_rows", lambda node: keeps_or_scales_rows(node) or _detaches(node))
teacher_softmax = chain("teacher_softmax", _detaches)
constant = guard("a value without gradient", lambda value: not value.requires_grad)


def forward(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, sum_dim):
    """torchtune's ForwardKLLoss, of a token, but for the sign."""
    student = rows(F.linear(hidden, weight, bias))
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    p = F.softmax(teacher, -1, dtype=torch.float32)
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    return torch.sum(torch.masked_fill(p * log_q, torch.isinf(student), 0), dim=sum_dim)


def reverse(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, sum_dim):
    """Its ReverseKLLoss, of a token, but for the sign."""
    student = rows(F.linear(hidden, weight, bias))
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    q = F.softmax(student, -1, dtype=torch.float32)
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, -1, dtype=torch.float32)
    infinite = torch.isinf(student) | torch.isinf(teacher)
    products = torch.masked_fill(q * log_p, infinite, 0)
    return torch.sum(products.sub_(torch.masked_fill(q * log_q, infinite, 0)), dim=sum_dim)


def _log_softmaxes(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, dim, dtype
):  # fmt: skip
    student = rows(F.linear(hidden, weight, bias))
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    log_p = constant(teacher_softmax(F.log_softmax(teacher, dim, dtype=dtype)))
    return F.log_softmax(student, dim, dtype=dtype), log_p


def kl_div(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, softmax_dim, softmax_dtype,
    kl_reduction,
):  # fmt: skip
    """Hinton's, as ``nn.KLDivLoss`` has it."""
    student = rows(F.linear(hidden, weight, bias))
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    p = constant(teacher_softmax(F.softmax(teacher, softmax_dim, dtype=softmax_dtype)))
    log_q = F.log_softmax(student, softmax_dim, dtype=softmax_dtype)
    return F.kl_div(log_q, p, None, None, kl_reduction, False)


def kl_div_of_logs(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, softmax_dim, softmax_dtype,
    kl_reduction,
):  # fmt: skip
    """TRL's and Liger's for a beta of 0; the reverse is theirs for 1."""
    heads = hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
    log_q, log_p = _log_softmaxes(*heads, softmax_dim, softmax_dtype)
    return F.kl_div(log_q, log_p, None, None, kl_reduction, True)


def reverse_kl_div(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, softmax_dim, softmax_dtype,
    kl_reduction,
):  # fmt: skip
    student = rows(F.linear(hidden, weight, bias))
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    log_p = constant(teacher_softmax(F.log_softmax(teacher, softmax_dim, dtype=softmax_dtype)))
    q = F.softmax(student, softmax_dim, dtype=softmax_dtype)
    return F.kl_div(log_p, q, None, None, kl_reduction, False)


def reverse_kl_div_of_logs(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, softmax_dim, softmax_dtype,
    kl_reduction,
):  # fmt: skip
    heads = hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
    log_q, log_p = _log_softmaxes(*heads, softmax_dim, softmax_dtype)
    return F.kl_div(log_p, log_q, None, None, kl_reduction, True)


def jensen_shannon(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, softmax_dim, softmax_dtype,
    student_share, teacher_share, log_student_share, log_teacher_share, kl_reduction,
):  # fmt: skip
    """TRL's GKDTrainer and LigerFusedLinearJSDLoss."""
    heads = hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
    log_q, log_p = _log_softmaxes(*heads, softmax_dim, softmax_dtype)
    mixture = torch.logaddexp(log_q + log_student_share, log_p + log_teacher_share)
    of_teacher = F.kl_div(mixture, log_p, None, None, kl_reduction, True)
    of_student = F.kl_div(mixture, log_q, None, None, kl_reduction, True)
    return teacher_share * of_teacher + student_share * of_student


def lora_head(hidden, weight, bias, update, teacher, sum_dim):
    student = rows(F.linear(hidden, weight, bias) + update)
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    p = F.softmax(teacher, -1, dtype=torch.float32)
    return torch.sum(torch.masked_fill(p * log_q, torch.isinf(student), 0), dim=sum_dim)


def lora_head_reverse(hidden, weight, bias, update, teacher, sum_dim):
    student = rows(F.linear(hidden, weight, bias) + update)
    q = F.softmax(student, -1, dtype=torch.float32)
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, -1, dtype=torch.float32)
    infinite = torch.isinf(student) | torch.isinf(teacher)
    products = torch.masked_fill(q * log_p, infinite, 0)
    return torch.sum(products.sub_(torch.masked_fill(q * log_q, infinite, 0)), dim=sum_dim)


def check(match: Match) -> None:
    values = match.values
    for prefix in ("", "teacher_"):
        check_projection(match, values[f"{prefix}weight"], prefix)
        check_rows(match, prefix)
    student, teacher = kept_rows(match), kept_rows(match, "teacher_")
    if teacher.requires_grad and "teacher_softmax" not in match.chains:
        raise Reject("the teacher's logits require a gradient; the kernel gives them none")
    if not _agree(student.shape, teacher.shape):
        raise Reject(
            f"the student's logits are {list(student.shape)}, the teacher's {list(teacher.shape)}"
        )
    if {values.get("softmax_dim", -1), values.get("sum_dim", -1)} != {-1}:
        raise Reject("the softmax is not over the vocabulary")
    check_temperature(match)
    if temperature(match, "teacher_rows") != temperature(match):
        raise Reject("the teacher's logits have another temperature than the student's")
    if "student_share" in values and _teacher_share(match) is None:
        raise Reject(
            "the weights of both divergences are not those of the mixture, or no constants"
        )


def _agree(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Are two shapes that eager combines the same? Sizes of other symbols are, or it would have
    raised; only 1, which Dynamo makes a constant, is repeated for another."""
    hints = [[hint(size) for size in shape] for shape in (a, b)]
    return hints[0] == hints[1] and None not in hints[0]


def _teacher_share(match: Match) -> float | None:
    """Of the mixture and of the divergences; None unless the student has the rest of both."""
    named = (f"{log}{who}_share" for who in ("student", "teacher") for log in ("", "log_"))
    student, log_student, teacher, log_teacher = (_number(match.bindings[name]) for name in named)
    shares = (1.0 - teacher, math.exp(log_student)), (teacher, math.exp(log_teacher))
    agree = all(
        math.isclose(share, expected, abs_tol=1e-6)
        for share, both in zip((student, teacher), shares, strict=True)
        for expected in both
    )
    return teacher if agree and 0.0 < teacher < 1.0 else None


_ARITHMETIC: dict[str, Callable[..., float]] = {
    "tensor": float,  # by torch._refs if the number may vary
    "neg": operator.neg,
    "log": math.log,
    "log1p": math.log1p,
    "add": operator.add,
    "sub": operator.sub,
}


def _number(value: Any) -> float:
    """The number that ``value`` is, or is computed of numbers alone to be; nan if it is neither."""
    if hint(fake(value)) is not None:
        return specialise(fake(value))
    op = name_of(op_name(value)) if isinstance(value, fx.Node) else None
    if op not in _ARITHMETIC or (value.kwargs and op != "tensor"):
        return math.nan
    try:
        return _ARITHMETIC[op](*map(_number, value.args))
    except ValueError:  # the logarithm of 0
        return math.nan


DIVERGENCES = [
    Taken(forward, "forward_kl", check, sign=-1.0),
    Taken(reverse, "reverse_kl", check, sign=-1.0),
    *(Taken(p, "jensen_shannon", check, beta=lambda _: 0.0) for p in (kl_div, kl_div_of_logs)),
    *(
        Taken(p, "jensen_shannon", check, beta=lambda _: 1.0)
        for p in (reverse_kl_div, reverse_kl_div_of_logs)
    ),
    Taken(jensen_shannon, "jensen_shannon", check, beta=lambda match: _teacher_share(match) or 0.0),
]

linear_kl = head_rewrite(
    name="linear_kl",
    leading=DIVERGENCES,
    beside=CROSS_ENTROPIES,
    refuses=[
        (twin, "the logits are a sum (LoRA on the head?), not one projection")
        for twin in (lora_head, lora_head_reverse)
    ],
)
