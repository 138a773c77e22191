"""Final projection + log-probability of one token each: no logits.

What preference (DPO) and RL (PPO, GRPO) losses take of the logits is the ``log_softmax`` at one
label: its cross-entropy with the sign turned, ``liger_fx::linear_cross_entropy_per_token``.

Matches      ``gather(log_softmax(linear), labels)`` (torchtune) and ``gather(linear, labels) -
             logsumexp(linear)`` (TRL), with row slices, upcasts and a division by a constant
             temperature in between. What the graph multiplies by a False, as torchtune drops the
             prompt, is not projected.
Leaves alone logits that anybody else sees; a temperature that is computed; more than one label for
             a token; LoRA on the head.
Numerics     Softmax in fp32. The backward projects again, chunk by chunk: the gradient of each
             token's value is known only then. Made with and without gradients, so that a policy
             and its reference, as long as they are the same, give the same numbers.
"""

import torch
import torch.nn.functional as F
from liger_fx.passes._rows import (
    check_projection,
    check_rows,
    head_arguments,
    keeps_rows,
)
from torch import fx

from liger_fx import ops
from liger_fx.canonical import fake, hint, mutated_arguments, op_name, specialise, storage_key
from liger_fx.matcher import Match, Reject
from liger_fx.pattern import chain
from liger_fx.rewrite import Rewrite

NO_LABEL = -(1 << 31)  # in no vocabulary, and in no data set


def _keeps_or_scales_rows(node: fx.Node) -> bool:
    return keeps_rows(node) or _is_division_by_a_number(node)


def _is_division_by_a_number(node: fx.Node) -> bool:
    if op_name(node) != "div" or node.kwargs or len(node.args) != 2:  # rounding_mode, say
        return False
    return not isinstance(fake(node.args[1]), torch.Tensor)


rows = chain("rows", _keeps_or_scales_rows)
summed_rows = chain("summed_rows", _keeps_or_scales_rows)


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


def check(match: Match, weight, label, softmax_dim, gather_dim):
    check_projection(match, weight)
    check_rows(match)
    last = {-1, label.dim()}
    if not {softmax_dim, gather_dim} <= last or label.shape != match.output.shape:
        raise Reject("the labels are not one class of the last dimension for each token")
    if match.chains.get("summed_rows", match.chains["rows"]) != match.chains["rows"]:
        raise Reject("the sum is taken over other logits than those of the labels")
    if _temperature(match) is None:
        raise Reject("the temperature is computed or not positive, expected a constant")


def replace(match: Match, hidden, weight, bias, label):
    mask = _only_used_where(match.root)
    if mask is not None:
        label = label.masked_fill(fx.Proxy(mask, label.tracer).logical_not(), NO_LABEL)
    loss = ops.linear_cross_entropy_per_token(
        *head_arguments(match, hidden, weight, bias),
        label,
        NO_LABEL,
        0.0,
        0.0,
        _temperature(match),
        match.settings["chunk_tokens"],
        match.settings["accum_dtype"],
        match.settings["skip_ignored"],
    )
    return -loss if match.output.dtype == torch.float32 else (-loss).to(match.output.dtype)


def _only_used_where(node: fx.Node) -> fx.Node | None:
    """The mask of bools by which ``node``, and nothing else of it, is multiplied."""
    user = next(iter(node.users), None)
    if user is None or len(node.users) > 1 or op_name(user) != "mul":
        return None
    masks = (f for f in user.args if isinstance(f, fx.Node) and f < node and _is_mask(f, node))
    return next(masks, None)


def _is_mask(factor: fx.Node, node: fx.Node) -> bool:
    value = fake(factor)
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        return False
    if value.shape != fake(node).shape:
        return False
    written = (t for n in factor.graph.nodes for t in mutated_arguments(n))
    return all(storage_key(target) != storage_key(factor) for target in written)


def _temperature(match: Match) -> float | None:
    """What the logits are divided by in all."""
    temperature = 1.0
    for node in match.chains["rows"]:
        if _is_division_by_a_number(node):
            divisor = fake(node.args[1])
            if (hint(divisor) or 0.0) <= 0:
                return None
            temperature *= specialise(divisor)
    return temperature


linear_logprobs = Rewrite(
    name="linear_logprobs",
    patterns=[gathered, normalised],
    refuses=[(lora_head, "the logits are a sum (LoRA on the head?), not one projection")],
    check=check,
    replace=replace,
    settings={"chunk_tokens": 0, "accum_dtype": torch.float32, "skip_ignored": True},
    gain="the logits never exist",
    save_ops=["liger_fx::linear_cross_entropy_per_token"],
)
