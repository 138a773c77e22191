"""Final projection + cross-entropy -> ``liger_fx::linear_loss``: no logits.

Matches      ``F.cross_entropy`` over rows of ``F.linear``, with reshapes, slices of rows or of
             classes and upcasts in between in any order (torchtune, torchtitan, Hugging Face,
             nanochat, F.linear_cross_entropy); a temperature or a scale (Granite, Cohere) and
             ``c * tanh(logits / c)`` (Hugging Face Gemma2) between the two; logits transposed to
             [b, V, s]; label smoothing and class weights. Beside it what else is taken of the same
             logits: the z-loss ``logsumexp(linear) ** 2``, their log-sum-exp, the entropy. Losses
             of tokens with masks and weights, and the sum of all of it, also over chunks of one
             hidden state (torchtune's CEWithChunkedOutputLoss), as `_head` says.
Leaves alone logits that anybody else sees; two cross-entropies of the same logits; probability
             targets; LoRA on the head. A softcap on the hidden state (torchtune's Gemma2) belongs
             to the hidden state.
Numerics     Logits in the projection's dtype; scale, softmax and weights of tokens in fp32; sums of
             parameter gradients in fp32. ``mean`` stays a division in the graph: no valid token
             gives nan, as in eager. Ignored tokens are left out: where the hidden state of one is
             inf or nan, eager's gradient of the weight is nan (0 times nan), and this one is not.
"""

import torch
import torch.nn.functional as F
from liger_fx.passes._head import head_rewrite
from liger_fx.passes._rows import (
    check_projection,
    check_rows,
    check_temperature,
    rows,
    scaled_rows,
)
from liger_fx.passes._taken import Taken
from liger_fx.passes.linear_logprobs import ENTROPIES, LOG_SUM_EXPS
from torch import fx

from liger_fx.canonical import fake, hint
from liger_fx.matcher import Match, Reject


def plain(
    hidden, weight, bias, target, class_weight, ignore_index, reduction, label_smoothing
):  # fmt: skip
    logits = scaled_rows(F.linear(hidden, weight, bias))
    return F.cross_entropy(
        logits, target, class_weight, None, ignore_index, None, reduction, label_smoothing
    )


def softcapped(
    hidden, weight, bias, softcap, target, class_weight, ignore_index, reduction, label_smoothing
):  # fmt: skip
    logits = rows(torch.tanh(scaled_rows(F.linear(hidden, weight, bias)) / softcap) * softcap)
    return F.cross_entropy(
        logits, target, class_weight, None, ignore_index, None, reduction, label_smoothing
    )


def classes_second(
    hidden, weight, bias, target, class_weight, ignore_index, reduction, label_smoothing
):  # fmt: skip
    logits = scaled_rows(F.linear(hidden, weight, bias)).transpose(1, 2)
    return F.cross_entropy(
        logits, target, class_weight, None, ignore_index, None, reduction, label_smoothing
    )


def lora_head(
    hidden, weight, bias, update, target, class_weight, ignore_index, reduction, label_smoothing
):  # fmt: skip
    logits = rows(F.linear(hidden, weight, bias) + update)
    return F.cross_entropy(
        logits, target, class_weight, None, ignore_index, None, reduction, label_smoothing
    )


def check(match: Match) -> None:
    values = match.values
    target, softcap = values["target"], hint(values.get("softcap", 1.0))
    if target.is_floating_point():
        raise Reject("the target is class probabilities, not class indices")
    check_projection(match, values["weight"])
    if not _classes_are_where_expected(match, target):
        raise Reject("the class dimension of the loss is not the projection's output dimension")
    check_rows(match)
    check_temperature(match)
    if not isinstance(values["ignore_index"], int):
        raise Reject("ignore_index is computed in the graph, expected a constant")
    if softcap is None or softcap <= 0:
        raise Reject("the softcap is computed in the graph or not positive, expected a constant")


def _classes_are_where_expected(match: Match, target: torch.Tensor) -> bool:
    """[N, V] against [N], or [V] against []; transposed, [b, V, s] against [b, s]."""
    root: fx.Node = match.root
    logits = fake(root.args[0] if root.args else root.kwargs["input"])
    dims = {3} if match.pattern.name == "classes_second" else {1, 2}
    return logits.dim() in dims and target.dim() == logits.dim() - 1


CROSS_ENTROPIES = [
    Taken(pattern, "cross_entropy", check) for pattern in (plain, softcapped, classes_second)
]

linear_cross_entropy = head_rewrite(
    name="linear_cross_entropy",
    leading=CROSS_ENTROPIES,
    beside=[*ENTROPIES, *LOG_SUM_EXPS],
    refuses=[(lora_head, "the logits are a sum (LoRA on the head?), not one projection")],
)
