"""Final projection + log-probability of one token each, and entropy: no logits.

What preference (DPO) and RL (PPO, GRPO) losses take of the logits is the ``log_softmax`` at one
label: its cross-entropy with the sign turned. Many RL losses or their logs take the entropy of each
token's distribution as well; the op gives both.

Matches      ``gather(log_softmax(linear), labels)`` (torchtune) and ``gather(linear, labels) -
             logsumexp(linear)`` (TRL), with row slices, upcasts and a division by a constant
             temperature in between. Beside it the entropy of the same rows at the same temperature,
             ``(exp(logp) * logp).sum(-1)`` (TRL) or ``logsumexp(linear) - (p * linear).sum(-1)``
             (verl), with a gradient, detached or without grad mode; their log-sum-exp and its
             square. What the graph multiplies by a False, as torchtune drops the prompt, is not
             projected; nor is in the backward what has no gradient. A sum of log-probabilities
             with known weights (a policy gradient) is ``liger_fx::linear_loss``, as `_head` says.
Leaves alone logits that anybody else sees; an entropy alone; a temperature that is computed; more
             than one label for a token; LoRA on the head.
Numerics     Softmax in fp32. The backward projects again, chunk by chunk, where the gradient of
             each token's value is known only then. Made with and without gradients, so that a
             policy and its reference, as long as they are the same, give the same numbers.
"""

import torch
import torch.nn.functional as F
from liger_fx.passes._head import head_rewrite
from liger_fx.passes._rows import (
    check_projection,
    check_rows,
    check_temperature,
    keeps_or_scales_rows,
)
from liger_fx.passes._rows import scaled_rows as rows
from liger_fx.passes._taken import Taken
from torch import fx

from liger_fx.canonical import op_name, same_sizes
from liger_fx.matcher import Match, Reject
from liger_fx.pattern import chain


def _detaches(node: fx.Node) -> bool:
    return op_name(node) == "detach"


summed_rows = chain("summed_rows", keeps_or_scales_rows)
detached_rows = chain("rows", lambda node: keeps_or_scales_rows(node) or _detaches(node))
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


def negative_entropy(hidden, weight, bias, softmax_dim, softmax_dtype, sum_dim):
    logits = detached_rows(F.linear(hidden, weight, bias))
    logprobs = detached(F.log_softmax(logits, softmax_dim, dtype=softmax_dtype))
    return (logprobs.exp() * logprobs).sum(sum_dim)


def negative_entropy_by_softmax(hidden, weight, bias, softmax_dim, softmax_dtype, sum_dim):
    logits = detached_rows(F.linear(hidden, weight, bias))
    probs = F.softmax(logits, softmax_dim, dtype=softmax_dtype)
    return (probs * F.log_softmax(logits, softmax_dim, dtype=softmax_dtype)).sum(sum_dim)


def entropy_of_logits(hidden, weight, bias, softmax_dim, softmax_dtype, sum_dim):
    logits = detached_rows(F.linear(hidden, weight, bias))
    probs = F.softmax(logits, softmax_dim, dtype=softmax_dtype)
    return torch.logsumexp(logits, softmax_dim) - (probs * logits).sum(sum_dim)


def logsumexp(hidden, weight, bias, softmax_dim):
    return torch.logsumexp(detached_rows(F.linear(hidden, weight, bias)), softmax_dim)


def squared_logsumexp(hidden, weight, bias, softmax_dim):
    """The z-loss of PaLM and OLMo, before its mean."""
    return torch.logsumexp(rows(F.linear(hidden, weight, bias)), softmax_dim) ** 2


def check_logprob(match: Match) -> None:
    values = match.values
    last = {values["softmax_dim"], values["gather_dim"]} == {-1}
    if not last or not same_sizes(values["label"].shape, match.output.shape):
        raise Reject("the labels are not one class of the last dimension for each token")
    if match.chains.get("summed_rows", match.chains["rows"]) != match.chains["rows"]:
        raise Reject("the sum is taken over other logits than those of the labels")
    check_taken(match)


def check_taken(match: Match) -> None:
    """Raise `Reject` for what is not taken of each row of logits that the op computes."""
    values = match.values
    check_projection(match, values["weight"])
    check_rows(match)
    if {values["softmax_dim"], values.get("sum_dim", -1)} != {-1}:
        raise Reject(f"{match.pattern.name} is not taken over the classes of each token")
    check_temperature(match)


ENTROPIES = [
    Taken(negative_entropy, "entropy", check_taken, sign=-1.0),
    Taken(negative_entropy_by_softmax, "entropy", check_taken, sign=-1.0),
    Taken(entropy_of_logits, "entropy", check_taken),
]
LOG_SUM_EXPS = [
    Taken(squared_logsumexp, "squared_logsumexp", check_taken),
    Taken(logsumexp, "logsumexp", check_taken),
]
LOG_PROBABILITIES = [
    Taken(pattern, "cross_entropy", check_logprob, sign=-1.0) for pattern in (gathered, normalised)
]

linear_logprobs = head_rewrite(
    name="linear_logprobs",
    leading=LOG_PROBABILITIES,
    beside=[*ENTROPIES, *LOG_SUM_EXPS],
    always=True,  # a policy and its reference, as long as they are the same, give the same numbers
    refuses=[(lora_head, "the logits are a sum (LoRA on the head?), not one projection")],
)
