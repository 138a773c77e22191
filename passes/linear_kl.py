"""Two final projections + divergence of the one from the other -> ``liger_fx::linear_kl``: neither
student's nor teacher's logits.

Matches      torchtune's ForwardKLLoss, ReverseKLLoss and SymmetricKLLoss with ``normalize=False``
             over rows of two ``F.linear``, the teacher's without gradient; ``F.kl_div`` in both
             directions, of a target in probabilities or in logarithms; the generalised
             Jensen-Shannon divergence as TRL (GKD) and Liger write it; each at a constant
             temperature, with any mask of tokens, added up or averaged in any way (`_sums`). The
             sum of torchtune's losses over chunks of both hidden states (their WithChunkedOutput
             forms), which becomes one op. The weighted sum of one of all these and
             ``F.cross_entropy`` of the same logits, as in Hinton et al., 2015, without the
             temperature: one projection, one gradient of the head.
Leaves alone logits that anybody else sees; losses of one projection that are not added up, or of
             which others see more than a detached value; a teacher that is trained; LoRA on the
             student's head; ``jsd[mask]`` (the graph ends there: its shape depends on data).
Numerics     Logits in each projection's dtype, softmax and temperature in fp32, parameter gradients
             summed in fp32. The weights of the sum are multiplied in fp32, before the gradient is
             rounded. Of infinite logits: `liger_fx.ops.kl_loss`.
"""

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from liger_fx.passes._chunked_loss import merge_chunked_losses
from liger_fx.passes._rows import (
    check_gain,
    check_projection,
    check_rows,
    head_arguments,
    keeps_or_scales_rows,
    keeps_rows,
    kept_rows,
    logits_of,
    needs_gradient,
    slices,
    temperature,
)
from liger_fx.passes._sums import check_sum, losses, mask_of, scaled_as_the_mean
from torch import fx

from liger_fx import ops
from liger_fx.canonical import fake, hint, op_name, specialise
from liger_fx.matcher import Match, Reject, name_of
from liger_fx.pattern import chain, guard
from liger_fx.rewrite import Rewrite


def _scaled_loss(node: fx.Node) -> fx.Node | None:
    """The loss that ``node`` multiplies or divides by a number."""
    if op_name(node) not in ("mul", "div") or node.kwargs or len(node.args) != 2:
        return None
    operands = node.args if op_name(node) == "mul" else node.args[:1]
    tensors = [n for n in operands if isinstance(n, fx.Node) and _dims(n) is not None]
    if not tensors or any(_dims(operand) for operand in node.args):
        return None
    # Weights are of labels, and were there before.
    return max(tensors, key=lambda n: (fake(n).requires_grad, n))


def _dims(value: fx.node.Argument) -> int | None:
    value = fake(value)
    return value.dim() if isinstance(value, torch.Tensor) else None


def _detaches(node: fx.Node) -> bool:
    return op_name(node) == "detach"


rows = chain("rows", keeps_or_scales_rows)
teacher_rows = chain("teacher_rows", lambda node: keeps_or_scales_rows(node) or _detaches(node))
teacher_softmax = chain("teacher_softmax", _detaches)
constant = guard("a value without gradient", lambda value: not value.requires_grad)
scalar = guard("a scalar", lambda value: not value.dim())
ce_rows = chain("ce_rows", keeps_rows)
ce_weight = chain("ce_weight", _scaled_loss)
kl_weight = chain("kl_weight", _scaled_loss)


_WEIGHTS = ("ce_weight", "kl_weight")  # as the op takes them

_Part = Callable[..., Any]  # of a pattern, in the words of the model


def forward(student, teacher, target, ignore_index):
    p = F.softmax(teacher, -1, dtype=torch.float32)
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    products = torch.masked_fill(p * log_q, torch.isinf(student), 0)
    return _summed(products, target, ignore_index)


def reverse(student, teacher, target, ignore_index):
    q = F.softmax(student, -1, dtype=torch.float32)
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, -1, dtype=torch.float32)
    infinite = torch.isinf(student) | torch.isinf(teacher)
    products = torch.masked_fill(q * log_p, infinite, 0)
    return _summed(products.sub_(torch.masked_fill(q * log_q, infinite, 0)), target, ignore_index)


def _summed(products, target, ignore_index):
    mask = (target != ignore_index).int()
    return -torch.sum(torch.sum(products, dim=-1).view(-1) * mask.view(-1), dim=0)


def symmetric(student, teacher, target, ignore_index, forward_share, reverse_share):
    both = (student, teacher, target, ignore_index)
    return scalar(forward_share * forward(*both)) + reverse_share * reverse(*both)


def kl_div(log_q, p, kl_reduction):
    """Hinton's, as ``nn.KLDivLoss`` has it."""
    return F.kl_div(log_q, p, None, None, kl_reduction, False)


def kl_div_of_logs(log_q, log_p, kl_reduction):
    """TRL's and Liger's for a beta of 0; the reverse is theirs for 1."""
    return F.kl_div(log_q, log_p, None, None, kl_reduction, True)


def reverse_kl_div(q, log_p, kl_reduction):
    return F.kl_div(log_p, q, None, None, kl_reduction, False)


def reverse_kl_div_of_logs(log_q, log_p, kl_reduction):
    return F.kl_div(log_p, log_q, None, None, kl_reduction, True)


def jensen_shannon(
    log_q, log_p, student_share, teacher_share, log_student_share, log_teacher_share, kl_reduction
):
    """TRL's GKDTrainer and LigerFusedLinearJSDLoss."""
    mixture = torch.logaddexp(log_q + log_student_share, log_p + log_teacher_share)
    of_teacher = F.kl_div(mixture, log_p, None, None, kl_reduction, True)
    of_student = F.kl_div(mixture, log_q, None, None, kl_reduction, True)
    return teacher_share * of_teacher + student_share * of_student


def alone(loss):
    return loss


def summed(loss, sum_dim):
    return torch.sum(losses(loss), dim=sum_dim)


def averaged(loss):
    return torch.mean(losses(loss))


def and_cross_entropy(
    loss, logits, target, class_weight, ignore_index, reduction, label_smoothing
):  # fmt: skip
    cross_entropy = F.cross_entropy(
        ce_rows(logits), target, class_weight, None, ignore_index, None, reduction, label_smoothing
    )
    return scalar(kl_weight(loss)) + ce_weight(cross_entropy)


def reduced_and_cross_entropy(
    loss, logits, target, class_weight, ignore_index, reduction, label_smoothing
):  # fmt: skip
    labels = (target, class_weight, ignore_index, reduction, label_smoothing)
    return and_cross_entropy(losses(loss), logits, *labels)


TORCHTUNE: list[_Part] = [forward, reverse, symmetric]
KL_DIV: list[_Part] = [
    kl_div,
    kl_div_of_logs,
    reverse_kl_div,
    reverse_kl_div_of_logs,
    jensen_shannon,
]


def patterns(divergences: Sequence[_Part], ending: _Part) -> list[_Part]:
    """One for each divergence, with this ending. Parts get by name what they ask for."""
    return [_pattern(divergence, ending) for divergence in divergences]


def _pattern(divergence: _Part, ending: _Part) -> _Part:
    def pattern(
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, softmax_dim,
        softmax_dtype, kl_reduction, student_share, teacher_share, log_student_share,
        log_teacher_share, forward_share, reverse_share, sum_dim, target, ignore_index,
        class_weight, reduction, label_smoothing,
    ):  # fmt: skip
        named = locals()
        logits = F.linear(hidden, weight, bias)
        student = rows(logits)
        teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
        how = dict(dim=softmax_dim, dtype=softmax_dtype)
        named |= dict(
            logits=logits,
            student=student,
            teacher=teacher,
            q=F.softmax(student, **how),
            log_q=F.log_softmax(student, **how),
            p=constant(teacher_softmax(F.softmax(teacher, **how))),
            log_p=constant(teacher_softmax(F.log_softmax(teacher, **how))),
        )
        named["loss"] = _call(divergence, named)
        return _call(ending, named)

    names = (divergence.__name__, "" if ending is alone else f"_{ending.__name__}")
    pattern.__name__ = "".join(names)
    return pattern


def _call(part: _Part, named: dict[str, Any]) -> Any:
    return part(*(named[name] for name in inspect.signature(part).parameters))


def lora_head(hidden, weight, bias, update, teacher, target, ignore_index):
    return forward(rows(F.linear(hidden, weight, bias) + update), teacher, target, ignore_index)


def lora_head_reverse(hidden, weight, bias, update, teacher, target, ignore_index):
    return reverse(rows(F.linear(hidden, weight, bias) + update), teacher, target, ignore_index)


def check(
    match: Match,
    weight,
    teacher_weight,
    target=None,
    ignore_index=-100,
    softmax_dim=-1,
    forward_share=1.0,
    reverse_share=1.0,
):
    for prefix, head in (("", weight), ("teacher_", teacher_weight)):
        check_projection(match, head, prefix)
        check_rows(match, prefix)
    student, teacher = kept_rows(match), kept_rows(match, "teacher_")
    if teacher.requires_grad and "teacher_softmax" not in match.chains:
        raise Reject("the teacher's logits require a gradient; the kernel gives them none")
    if not _agree(student.shape, teacher.shape):
        raise Reject(
            f"the student's logits are {list(student.shape)}, the teacher's {list(teacher.shape)}"
        )
    tokens = math.prod(student.shape[:-1])
    if target is not None and not _agree([target.numel()], [tokens]):
        raise Reject(f"there are {target.numel()} labels for logits {list(student.shape)}")
    if softmax_dim not in (-1, student.dim() - 1):
        raise Reject("the softmax is not over the vocabulary")
    if temperature(match) is None:
        raise Reject("the temperature is computed or not positive, expected a constant")
    if temperature(match, "teacher_rows") != temperature(match):
        raise Reject("the teacher's logits have another temperature than the student's")
    if not isinstance(ignore_index, int):
        raise Reject("ignore_index is computed in the graph, expected a constant")
    if hint(forward_share) is None or hint(reverse_share) is None:
        raise Reject("the shares of both directions are computed in the graph, expected constants")
    if "softmax_dim" in match.bindings:
        check_sum(match, fake(match.sources.get("kl_weight", match.root)))
        if "student_share" in match.bindings and _teacher_share(match) is None:
            raise Reject(
                "the weights of both divergences are not those of the mixture, or no constants"
            )
    if "ce_rows" in match.chains:
        _check_cross_entropy(match, **{name: match.values[name] for name in _OF_CROSS_ENTROPY})
    check_gain(match, tokens, logits_of(match), logits_of(match, "teacher_"))


def _agree(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Are two shapes that eager combines the same? Sizes of other symbols are, or it would have
    raised; only 1, which Dynamo makes a constant, is repeated for another."""
    hints = [[hint(size) for size in shape] for shape in (a, b)]
    return hints[0] == hints[1] and None not in hints[0]


_OF_CROSS_ENTROPY = ("target", "class_weight", "reduction", "label_smoothing")


def _check_cross_entropy(match: Match, target, class_weight, reduction, label_smoothing):
    if class_weight is not None or label_smoothing != 0.0:
        raise Reject("the cross-entropy has class weights or label smoothing; the kernel has not")
    if reduction == "none" or match.output.dim():
        raise Reject("the losses of single tokens are added up, expected their sum or mean")
    if kept_rows(match, "ce_").dim() != 2 or target.dim() != 1:
        raise Reject("the class dimension of the loss is not the projection's output dimension")
    if slices(match, "ce_rows") != slices(match):
        raise Reject("the cross-entropy and the divergence are of other rows of the logits")
    first = min(match.outputs)
    for node in (step for name in _WEIGHTS for step in match.chains[name]):
        for factor in set(node.all_input_nodes) - {_scaled_loss(node)}:
            if getattr(fake(factor), "requires_grad", False):
                raise Reject("a weight of the sum requires a gradient; the kernel gives it none")
            if factor > first:
                raise Reject(f"{factor.name}, a weight, is computed only after {first.name}")


def detached_losses(match: Match) -> list[fx.Node]:
    """What the model keeps of both losses for its log."""
    both = [node for name in _WEIGHTS for node in _steps(match, name)]
    return [user for node in both for user in node.users if op_name(user) == "detach"]


def _steps(match: Match, name: str) -> list[fx.Node]:
    """A loss on its way into the sum, outermost first; none if nothing is added up."""
    return [*match.chains[name], match.sources[name]] if name in match.chains else []


def replace(
    match: Match,
    hidden,
    weight,
    bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    target=None,
    ignore_index=-100,
    reduction="sum",
):
    student = head_arguments(match, hidden, weight, bias)
    teacher = head_arguments(match, teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    mixed = "ce_weight" in match.chains
    labelled: Any = None if target is None else target != ignore_index
    valid = labelled.sum() if reduction == "mean" else None
    textbook = "softmax_dim" in match.bindings

    def weighted(name: str, value: fx.Proxy, node: fx.Node | None = None) -> fx.Proxy:
        """What the model makes of ``value``, a sum over tokens, up to ``node`` or to the end."""
        if name == "ce_weight" and valid is not None:
            value = value / valid
        if name == "kl_weight" and textbook:
            value = scaled_as_the_mean(match, value, student[0], weight)
        steps = _steps(match, name)
        return _scaled(steps[steps.index(node) if node else 0 : -1], value)

    weights: list[fx.Proxy | None] = [None, None]
    if mixed:
        one = hidden.new_ones((), dtype=torch.float32)
        weights = [weighted(name, one) for name in _WEIGHTS]
    made = ops.linear_kl(
        *student,
        *weights,
        *teacher,
        target if mixed else None,
        ignore_index,
        mask_of(match, hidden) if textbook else labelled,
        *_divergence(match),
        temperature(match),
        *(needs_gradient(match, name) for name in ("hidden", "weight", "bias")),
        match.settings["chunk_tokens"],
        match.settings["accum_dtype"],
        match.settings["skip_ignored"],
    )
    values = [made[0] if mixed else weighted("kl_weight", made[0])]
    for output in match.outputs[1:]:
        (node,) = output.all_input_nodes
        name = next(name for name in _WEIGHTS if node in _steps(match, name))
        values.append(weighted(name, made[1][_WEIGHTS.index(name)], node))
    return tuple(
        value if fake(node).dtype == torch.float32 else value.to(fake(node).dtype)
        for value, node in zip(values, match.outputs, strict=True)
    )


def _divergence(match: Match) -> tuple[float, float, float | None]:
    """The shares of torchtune's directions, and beta."""
    values, name = match.values, match.pattern.name
    if "forward_share" in values:
        return specialise(values["forward_share"]), specialise(values["reverse_share"]), None
    if "student_share" in values:
        return 0.0, 0.0, _teacher_share(match)
    reverse = float(name.startswith("reverse"))
    return (0.0, 0.0, reverse) if "softmax_dim" in values else (1.0 - reverse, reverse, None)


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


def _scaled(nodes: list[fx.Node], value: fx.Proxy) -> fx.Proxy:
    """``value`` times and over what ``nodes``, outermost first, scale a loss by."""
    for node in reversed(nodes):
        (operand,) = (arg for arg in node.args if arg is not _scaled_loss(node))
        factor: Any = fx.Proxy(operand, value.tracer) if isinstance(operand, fx.Node) else operand
        value = value * factor if op_name(node) == "mul" else value / factor
    return value


linear_kl = Rewrite(
    name="linear_kl",
    patterns=[
        *patterns(TORCHTUNE, and_cross_entropy),
        *patterns(KL_DIV, reduced_and_cross_entropy),
        *patterns(TORCHTUNE, alone),
        *patterns(KL_DIV, summed),
        *patterns(KL_DIV, averaged),
        *patterns(KL_DIV, alone),
    ],
    refuses=[
        (twin, "the logits are a sum (LoRA on the head?), not one projection")
        for twin in (lora_head, lora_head_reverse)
    ],
    check=check,
    replace=replace,
    also=detached_losses,
    combine=merge_chunked_losses,
    constants=["teacher_hidden", "teacher_weight", "teacher_bias"],
    saved=[],  # the gradients are computed in the forward
    settings={"chunk_tokens": 0, "accum_dtype": torch.float32, "skip_ignored": True},
    gain="the logits never exist",
    save_ops=["liger_fx::linear_kl"],
)
