"""Two final projections + divergence of the one from the other -> ``liger_fx::linear_kl``: neither
student's nor teacher's logits.

Matches      torchtune's ForwardKLLoss, ReverseKLLoss and SymmetricKLLoss with ``normalize=False``
             over rows of two ``F.linear``, the teacher's without gradient; the sum of such losses
             over chunks of both hidden states (their WithChunkedOutput forms), which becomes one
             op; and the weighted sum of one of them and ``F.cross_entropy`` of the same logits, the
             loss of distillation: one projection, one gradient of the head.
Leaves alone logits that anybody else sees; losses of one projection that are not added up, or of
             which others see more than a detached value; a teacher that is trained; LoRA on the
             student's head.
Numerics     Logits in each projection's dtype, softmax in fp32, parameter gradients summed in fp32.
             The weights of the sum are multiplied in fp32, before the gradient is rounded.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from liger_fx.passes._chunked_loss import merge_chunked_losses
from liger_fx.passes._rows import (
    check_gain,
    check_projection,
    check_rows,
    head_arguments,
    keeps_rows,
    kept_rows,
    logits_of,
    needs_gradient,
    rows,
)
from torch import fx

from liger_fx import ops
from liger_fx.canonical import fake, hint, op_name, specialise
from liger_fx.matcher import Match, Reject
from liger_fx.ops.chunked_head import chunk_tokens_for
from liger_fx.pattern import chain
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


teacher_rows = chain("teacher_rows", lambda node: keeps_rows(node) or op_name(node) == "detach")
ce_rows = chain("ce_rows", keeps_rows)
ce_weight = chain("ce_weight", _scaled_loss)
kl_weight = chain("kl_weight", _scaled_loss)


_WEIGHTS = ("ce_weight", "kl_weight")  # as the op takes them


def _forward(student, teacher, target, ignore_index):
    p = F.softmax(teacher, -1, dtype=torch.float32)
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    products = torch.masked_fill(p * log_q, torch.isinf(student), 0)
    return _summed(products, target, ignore_index)


def _reverse(student, teacher, target, ignore_index):
    q = F.softmax(student, -1, dtype=torch.float32)
    log_q = F.log_softmax(student, -1, dtype=torch.float32)
    log_p = F.log_softmax(teacher, -1, dtype=torch.float32)
    infinite = torch.isinf(student) | torch.isinf(teacher)
    products = torch.masked_fill(q * log_p, infinite, 0)
    return _summed(products.sub_(torch.masked_fill(q * log_q, infinite, 0)), target, ignore_index)


def _summed(products, target, ignore_index):
    mask = (target != ignore_index).int()
    return -torch.sum(torch.sum(products, dim=-1).view(-1) * mask.view(-1), dim=0)


def _symmetric(student, teacher, target, ignore_index, forward_share, reverse_share):
    both = (student, teacher, target, ignore_index)
    return forward_share * _forward(*both) + reverse_share * _reverse(*both)


def _with_cross_entropy(
    kl, logits, target, class_weight, ignore_index, reduction, label_smoothing
):  # fmt: skip
    cross_entropy = F.cross_entropy(
        ce_rows(logits), target, class_weight, None, ignore_index, None, reduction, label_smoothing
    )
    return kl_weight(kl) + ce_weight(cross_entropy)


def forward_and_cross_entropy(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, ignore_index,
    class_weight, reduction, label_smoothing,
):  # fmt: skip
    logits = F.linear(hidden, weight, bias)
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    kl = _forward(rows(logits), teacher, target, ignore_index)
    return _with_cross_entropy(
        kl, logits, target, class_weight, ignore_index, reduction, label_smoothing
    )


def reverse_and_cross_entropy(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, ignore_index,
    class_weight, reduction, label_smoothing,
):  # fmt: skip
    logits = F.linear(hidden, weight, bias)
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    kl = _reverse(rows(logits), teacher, target, ignore_index)
    return _with_cross_entropy(
        kl, logits, target, class_weight, ignore_index, reduction, label_smoothing
    )


def symmetric_and_cross_entropy(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, ignore_index,
    forward_share, reverse_share, class_weight, reduction, label_smoothing,
):  # fmt: skip
    logits = F.linear(hidden, weight, bias)
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    kl = _symmetric(rows(logits), teacher, target, ignore_index, forward_share, reverse_share)
    return _with_cross_entropy(
        kl, logits, target, class_weight, ignore_index, reduction, label_smoothing
    )


def forward(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, ignore_index
):
    student = rows(F.linear(hidden, weight, bias))
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    return _forward(student, teacher, target, ignore_index)


def reverse(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, ignore_index
):
    student = rows(F.linear(hidden, weight, bias))
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    return _reverse(student, teacher, target, ignore_index)


def symmetric(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target, ignore_index,
    forward_share, reverse_share,
):  # fmt: skip
    student = rows(F.linear(hidden, weight, bias))
    teacher = teacher_rows(F.linear(teacher_hidden, teacher_weight, teacher_bias))
    return _symmetric(student, teacher, target, ignore_index, forward_share, reverse_share)


def lora_head(hidden, weight, bias, update, teacher, target, ignore_index):
    return _forward(rows(F.linear(hidden, weight, bias) + update), teacher, target, ignore_index)


def lora_head_reverse(hidden, weight, bias, update, teacher, target, ignore_index):
    return _reverse(rows(F.linear(hidden, weight, bias) + update), teacher, target, ignore_index)


def check(
    match: Match,
    weight,
    teacher_weight,
    target,
    ignore_index,
    forward_share=1.0,
    reverse_share=1.0,
):
    for prefix, head in (("", weight), ("teacher_", teacher_weight)):
        check_projection(match, head, prefix)
        check_rows(match, prefix)
    student, teacher = kept_rows(match), kept_rows(match, "teacher_")
    if teacher.requires_grad:
        raise Reject("the teacher's logits require a gradient; the kernel gives them none")
    if not _agree(student.shape, teacher.shape):
        raise Reject(
            f"the student's logits are {list(student.shape)}, the teacher's {list(teacher.shape)}"
        )
    if not _agree([target.numel()], [math.prod(student.shape[:-1])]):
        raise Reject(f"there are {target.numel()} labels for logits {list(student.shape)}")
    if not isinstance(ignore_index, int):
        raise Reject("ignore_index is computed in the graph, expected a constant")
    if hint(forward_share) is None or hint(reverse_share) is None:
        raise Reject("the shares of both directions are computed in the graph, expected constants")
    if "ce_rows" in match.chains:
        _check_cross_entropy(match, **{name: match.values[name] for name in _OF_CROSS_ENTROPY})
    fitting = chunk_tokens_for(
        student.shape[-1],
        logits_of(match).element_size() + logits_of(match, "teacher_").element_size(),
        student.device.type,
    )
    check_gain(match, target.numel(), match.settings["chunk_tokens"] or fitting)


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
    if _slices(match, "ce_rows") != _slices(match, "rows"):
        raise Reject("the cross-entropy and the divergence are of other rows of the logits")
    first = min(match.outputs)
    for node in (step for name in _WEIGHTS for step in match.chains[name]):
        for factor in set(node.all_input_nodes) - {_scaled_loss(node)}:
            if getattr(fake(factor), "requires_grad", False):
                raise Reject("a weight of the sum requires a gradient; the kernel gives it none")
            if factor > first:
                raise Reject(f"{factor.name}, a weight, is computed only after {first.name}")


def _slices(match: Match, name: str) -> list[fx.Node]:
    return [node for node in match.chains[name] if op_name(node) == "getitem"]


def detached_losses(match: Match) -> list[fx.Node]:
    """What the model keeps of both losses for its log."""
    losses = [node for name in _WEIGHTS for node in _steps(match, name)]
    return [user for node in losses for user in node.users if op_name(user) == "detach"]


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
    target,
    ignore_index,
    reduction="sum",
):
    student = head_arguments(match, hidden, weight, bias)
    teacher = head_arguments(match, teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    valid = (target != ignore_index).sum() if reduction == "mean" else None

    def weighted(name: str, value: fx.Proxy, node: fx.Node | None = None) -> fx.Proxy:
        """What the model makes of ``value``, a sum over tokens, up to ``node`` or to the end."""
        value = value / valid if name == "ce_weight" and valid is not None else value
        steps = _steps(match, name)
        return _scaled(steps[steps.index(node) if node else 0 : -1], value)

    weights: list[fx.Proxy | None] = [None, None]
    if "ce_weight" in match.chains:
        one = hidden.new_ones((), dtype=torch.float32)
        weights = [weighted(name, one) for name in _WEIGHTS]
    made = ops.linear_kl(
        *student,
        *weights,
        *teacher,
        target,
        ignore_index,
        *_shares(match),
        *(needs_gradient(match, name) for name in ("hidden", "weight", "bias")),
        match.settings["chunk_tokens"],
        match.settings["accum_dtype"],
        match.settings["skip_ignored"],
    )
    values = [made[0]]
    for output in match.outputs[1:]:
        (node,) = output.all_input_nodes
        name = next(name for name in _WEIGHTS if node in _steps(match, name))
        values.append(weighted(name, made[1][_WEIGHTS.index(name)], node))
    return tuple(
        value if fake(node).dtype == torch.float32 else value.to(fake(node).dtype)
        for value, node in zip(values, match.outputs, strict=True)
    )


def _shares(match: Match) -> tuple[float, float]:
    """Of both directions."""
    if "forward_share" in match.bindings:
        values = match.values
        return specialise(values["forward_share"]), specialise(values["reverse_share"])
    return (1.0, 0.0) if match.pattern.name.startswith("forward") else (0.0, 1.0)


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
        forward_and_cross_entropy,
        reverse_and_cross_entropy,
        symmetric_and_cross_entropy,
        forward,
        reverse,
        symmetric,
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
    settings={"chunk_tokens": 0, "accum_dtype": torch.float32, "skip_ignored": True},
    gain="the logits never exist",
    save_ops=["liger_fx::linear_kl"],
)
