"""Final projection + log-probability of one token each, and entropy: no logits.

What preference (DPO) and RL (PPO, GRPO) losses take of the logits is the ``log_softmax`` at one
label: its cross-entropy with the sign turned, ``liger_fx::linear_cross_entropy_per_token``. Many RL
losses or their logs take the entropy of each token's distribution as well; the op gives both.

Matches      ``gather(log_softmax(linear), labels)`` (torchtune) and ``gather(linear, labels) -
             logsumexp(linear)`` (TRL), with row slices, upcasts and a division by a constant
             temperature in between. Beside it the entropy of the same rows at the same temperature,
             ``(exp(logp) * logp).sum(-1)`` (TRL) or ``logsumexp(linear) - (p * linear).sum(-1)``
             (verl), with a gradient, detached or without grad mode. What the graph multiplies by a
             False, as torchtune drops the prompt, is not projected.
Leaves alone logits that anybody else sees; an entropy alone; a temperature that is computed; more
             than one label for a token; LoRA on the head.
Numerics     Softmax in fp32. The backward projects again, chunk by chunk: the gradient of each
             token's value is known only then. Made with and without gradients, so that a policy
             and its reference, as long as they are the same, give the same numbers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from liger_fx.passes._rows import (
    check_projection,
    check_rows,
    head_arguments,
    keeps_or_scales_rows,
    slices,
    temperature,
)
from torch import fx

from liger_fx import ops
from liger_fx.canonical import fake, op_name, same_sizes
from liger_fx.matcher import Match, Reject
from liger_fx.pattern import chain
from liger_fx.rewrite import Rewrite

NO_LABEL = -(1 << 31)  # in no vocabulary, and in no data set


def _detaches(node: fx.Node) -> bool:
    return op_name(node) == "detach"


rows = chain("rows", keeps_or_scales_rows)
summed_rows = chain("summed_rows", keeps_or_scales_rows)
entropy_rows = chain("entropy_rows", lambda node: keeps_or_scales_rows(node) or _detaches(node))
detached = chain("detached", _detaches)


def gathered(hidden, weight, bias, softmax_dim, softmax_dtype, gather_dim, label):
    logits = rows(F.linear(hidden, weight, bias))
    logprobs = F.log_softmax(logits, softmax_dim, dtype=softmax_dtype)
    return torch.gather(logprobs, gather_dim, label.unsqueeze(-1)).squeeze(-1)


def normalised(hidden, weight, bias, softmax_dim, gather_dim, label):
    logits = F.linear(hidden, weight, bias)
    chosen = torch.gather(rows(logits), gather_dim, label.unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(summed_rows(logits), softmax_dim)


def lora_head(hidden, weight, bias, update, softmax_dim, softmax_dtype, gather_dim, label):
    logits = rows(F.linear(hidden, weight, bias) + update)
    logprobs = F.log_softmax(logits, softmax_dim, dtype=softmax_dtype)
    return torch.gather(logprobs, gather_dim, label.unsqueeze(-1)).squeeze(-1)


def negative_entropy(hidden, weight, bias, entropy_dim, entropy_dtype, sum_dim):
    logits = entropy_rows(F.linear(hidden, weight, bias))
    logprobs = detached(F.log_softmax(logits, entropy_dim, dtype=entropy_dtype))
    return (logprobs.exp() * logprobs).sum(sum_dim)


def negative_entropy_by_softmax(hidden, weight, bias, entropy_dim, entropy_dtype, sum_dim):
    logits = entropy_rows(F.linear(hidden, weight, bias))
    probs = F.softmax(logits, entropy_dim, dtype=entropy_dtype)
    return (probs * F.log_softmax(logits, entropy_dim, dtype=entropy_dtype)).sum(sum_dim)


def entropy_of_logits(hidden, weight, bias, entropy_dim, entropy_dtype, sum_dim):
    logits = entropy_rows(F.linear(hidden, weight, bias))
    probs = F.softmax(logits, entropy_dim, dtype=entropy_dtype)
    return torch.logsumexp(logits, entropy_dim) - (probs * logits).sum(sum_dim)


def check(match: Match, weight, label, softmax_dim, gather_dim, entropy_dim=-1, sum_dim=-1):
    check_projection(match, weight)
    check_rows(match)
    last = {-1, label.dim()}
    if not {softmax_dim, gather_dim} <= last or not same_sizes(label.shape, match.output.shape):
        raise Reject("the labels are not one class of the last dimension for each token")
    if match.chains.get("summed_rows", match.chains["rows"]) != match.chains["rows"]:
        raise Reject("the sum is taken over other logits than those of the labels")
    if temperature(match) is None:
        raise Reject("the temperature is computed or not positive, expected a constant")
    if match.companion is not None:
        _check_entropy(match, label, {entropy_dim, sum_dim} <= last)


def _check_entropy(match: Match, label: torch.Tensor, of_last_dimension: bool) -> None:
    entropy = fake(match.outputs[1])
    same_rows = slices(match, "entropy_rows") == slices(match)
    if not (same_rows and of_last_dimension and same_sizes(entropy.shape, label.shape)):
        raise Reject("the entropy is not that of each token which has a label")
    if entropy.dtype == torch.float64:
        raise Reject("the entropy is computed in torch.float64; the kernel computes in float32")
    if temperature(match, "entropy_rows") != temperature(match):
        raise Reject("the entropy has another temperature than the log-probabilities")


def replace(match: Match, hidden, weight, bias, label):
    mask = _only_used_where(match)
    if mask is not None:
        label = label.masked_fill(fx.Proxy(mask, label.tracer).logical_not(), NO_LABEL)
    arguments = (
        *head_arguments(match, hidden, weight, bias),
        label,
        NO_LABEL,
        0.0,
        0.0,
        temperature(match),
        match.settings["chunk_tokens"],
        match.settings["accum_dtype"],
        match.settings["skip_ignored"],
    )
    if match.companion is None:
        return _rounded(-ops.linear_cross_entropy_per_token(*arguments), match.root)
    values = ops.linear_cross_entropy_per_token(*arguments, True)
    entropy = values[1] if match.companion.name == "entropy_of_logits" else -values[1]
    return _rounded(-values[0], match.root), _rounded(entropy, match.outputs[1])


def _rounded(value: fx.Proxy, node: fx.Node) -> Any:
    dtype = fake(node).dtype
    return value if dtype == torch.float32 else value.to(dtype)


def _only_used_where(match: Match) -> fx.Node | None:
    """The mask of bools by which every output, and nothing else of it, is multiplied."""
    masks = {_mask_of(match, node) for node in match.outputs}
    return masks.pop() if len(masks) == 1 else None


def _mask_of(match: Match, node: fx.Node) -> fx.Node | None:
    user = next(iter(node.users), None)
    if user is None or len(node.users) > 1:
        return None
    if op_name(user) == "neg":
        return _mask_of(match, user)
    if op_name(user) != "mul":
        return None
    return next((f for f in user.args if _is_mask(match, f, fake(node).shape)), None)  # type: ignore[misc, return-value]


def _is_mask(match: Match, factor: Any, shape: torch.Size) -> bool:
    if not isinstance(factor, fx.Node) or not factor < match.first:
        return False
    value = fake(factor)
    is_bools = isinstance(value, torch.Tensor) and value.dtype == torch.bool
    return is_bools and same_sizes(value.shape, shape) and not match.view.effects.written(factor)


linear_logprobs = Rewrite(
    name="linear_logprobs",
    patterns=[gathered, normalised],
    refuses=[(lora_head, "the logits are a sum (LoRA on the head?), not one projection")],
    companions=[negative_entropy, negative_entropy_by_softmax, entropy_of_logits],
    check=check,
    replace=replace,
    saved=["hidden", "weight", "bias", "label"],
    settings={"chunk_tokens": 0, "accum_dtype": torch.float32, "skip_ignored": True},
    gain="the logits never exist",
    save_ops=["liger_fx::linear_cross_entropy_per_token"],
)
