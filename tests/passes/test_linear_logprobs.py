"""The rewrite ``linear_logprobs``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from _util import DEVICE, TOLERANCES, only, reasons, relative_error, show
from expecttest import assert_expected_inline
from liger_fx.passes import linear_logprobs
from torch.utils.checkpoint import checkpoint
from torchtune import rlhf

import liger_fx

capture = only(linear_logprobs)
B, S, H, V = 4, 9, 16, 31


@pytest.fixture
def inputs():
    """Hidden states, weight and labels, of which the first are padding."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, H, generator=generator).to(DEVICE).requires_grad_()
    weight = (0.3 * torch.randn(V, H, generator=generator)).to(DEVICE).requires_grad_()
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[:, :3] = -100
    return hidden, weight, labels.to(DEVICE)


def dpo(hidden, weight, labels, upcast=torch.Tensor.float, **how):
    """torchtune's DPO recipes."""
    return rlhf.get_batch_log_probs(upcast(F.linear(hidden, weight)), labels, **how)


def dpo_average(hidden, weight, labels, upcast=torch.Tensor.float):
    return dpo(hidden, weight, labels, upcast, return_average_logprobs=True)


def ppo(hidden, weight, labels, upcast=torch.Tensor.float, temperature=0.7):
    """torchtune's PPO recipe: the logits before each token of the answer."""
    logits = upcast(F.linear(hidden, weight))
    answer = rlhf.truncate_sequence_for_logprobs(logits, 3)
    return rlhf.logits_to_logprobs(answer, labels[:, 3:], temperature)


def selective(hidden, weight, labels, upcast=torch.Tensor.float):
    """TRL's: without the log-softmax of what was not chosen."""
    logits = upcast(F.linear(hidden, weight)) / 0.9
    chosen = torch.gather(logits, dim=-1, index=labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(logits, dim=-1)


def softmax_in_fp32(hidden, weight, labels, upcast=torch.Tensor.float):
    logits = upcast(F.linear(hidden, weight))
    logprobs = F.log_softmax(logits, dim=2, dtype=logits.dtype)
    return logprobs.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)


def entropy_from_logits(logits):
    """TRL's words."""
    logprobs = F.log_softmax(logits, dim=-1)
    return -(torch.exp(logprobs) * logprobs).sum(-1)


def entropy_by_logsumexp(logits):
    """verl's words."""
    probs = F.softmax(logits, dim=-1)
    return torch.logsumexp(logits, dim=-1) - torch.sum(probs * logits, dim=-1)


def selective_with_entropy(hidden, weight, labels, upcast=torch.Tensor.float):
    logits = upcast(F.linear(hidden, weight)) / 0.9
    chosen = torch.gather(logits, dim=-1, index=labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.stack((chosen - torch.logsumexp(logits, -1), entropy_from_logits(logits)))


def selective_with_logsumexp(hidden, weight, labels, upcast=torch.Tensor.float):
    logits = upcast(F.linear(hidden, weight))[:, :-1]
    index = labels[:, 1:].clamp(min=0).unsqueeze(-1)
    chosen = torch.gather(logits, dim=-1, index=index).squeeze(-1)
    return torch.stack((chosen - torch.logsumexp(logits, -1), entropy_by_logsumexp(logits)))


def ppo_with_entropy(hidden, weight, labels, upcast=torch.Tensor.float):
    """Both of one log-softmax, the entropy times -1."""
    logits = rlhf.truncate_sequence_for_logprobs(upcast(F.linear(hidden, weight)), 3)
    logprobs = F.log_softmax(logits / 0.7, dim=-1)
    chosen = logprobs.gather(2, labels[:, 3:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.stack((chosen, (logprobs.exp() * logprobs).sum(-1)))


def ppo_with_logsumexp(hidden, weight, labels, upcast=torch.Tensor.float):
    logits = upcast(F.linear(hidden, weight))[:, 2:-1]
    chosen = rlhf.logits_to_logprobs(logits, labels[:, 3:].clamp(min=0), 0.7)
    return torch.stack((chosen, entropy_by_logsumexp(logits / 0.7)))


def all_in_their_dtype(hidden, weight, labels, upcast=torch.Tensor.float):
    logits = F.linear(hidden, weight)
    chosen = rlhf.logits_to_logprobs(logits, labels.clamp(min=0))
    return torch.stack((chosen, -torch.sum(logits.softmax(-1) * logits.log_softmax(-1), dim=2)))


WITH_ENTROPY = [
    selective_with_entropy,
    selective_with_logsumexp,
    ppo_with_entropy,
    ppo_with_logsumexp,
    all_in_their_dtype,
]
SPELLINGS = [dpo, dpo_average, ppo, selective, softmax_in_fp32, *WITH_ENTROPY]


# -- fires -----------------------------------------------------------------------------------------


def test_dpo_graph(inputs):
    found = capture(dpo, *inputs)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_hidden_: "f32[4, 9, 16]", L_weight_: "f32[31, 16]", L_labels_: "i64[4, 9]"):
    l_hidden_ = L_hidden_
    l_weight_ = L_weight_
    l_labels_ = L_labels_
    getitem: "i64[4, 8]" = l_labels_[(slice(None, None, None), slice(1, None, None))]
    labels: "i64[4, 8]" = getitem.clone()
    loss_mask: "b8[4, 8]" = labels != -100
    eq: "b8[4, 8]" = labels == -100
    labels[eq] = 0;  setitem = labels
    getitem_2: "f32[4, 8, 16]" = l_hidden_[(slice(None, None, None), slice(None, -1, None), slice(None, None, None))]
    linear_token_losses_default: "f32[1, 32]" = torch.ops.liger_fx.linear_token_losses.default(getitem_2, l_weight_, None, labels, None, None, None, None, loss_mask, ['cross_entropy'], None, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True)
    getitem_3: "f32[32]" = linear_token_losses_default[0]
    reshape: "f32[4, 8]" = getitem_3.reshape((4, 8))
    neg: "f32[4, 8]" = -reshape
    mul: "f32[4, 8]" = neg * loss_mask
    sum_1: "f32[4]" = mul.sum(-1)
    return (sum_1,)""",
    )


def test_ppo_graph(inputs):
    found = capture(ppo, *inputs)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_hidden_: "f32[4, 9, 16]", L_weight_: "f32[31, 16]", L_labels_: "i64[4, 9]"):
    l_hidden_ = L_hidden_
    l_weight_ = L_weight_
    l_labels_ = L_labels_
    getitem_1: "i64[4, 6]" = l_labels_[(slice(None, None, None), slice(3, None, None))]
    getitem_2: "f32[4, 6, 16]" = l_hidden_[(slice(None, None, None), slice(2, -1, None))]
    linear_token_losses_default: "f32[1, 24]" = torch.ops.liger_fx.linear_token_losses.default(getitem_2, l_weight_, None, getitem_1, None, None, None, None, None, ['cross_entropy'], None, 0.0, 0.0, 0.7, 0.5, 0, torch.float32, True)
    getitem_3: "f32[24]" = linear_token_losses_default[0]
    reshape: "f32[4, 6]" = getitem_3.reshape((4, 6))
    neg: "f32[4, 6]" = -reshape
    return (neg,)""",
    )


def masked_with_entropy(hidden, weight, labels):
    """A mask that both are multiplied by."""
    mask = labels != -100
    logits = F.linear(hidden, weight).float()
    chosen = rlhf.logits_to_logprobs(logits, labels.clamp(min=0))
    return chosen * mask, (entropy_from_logits(logits) * mask).sum() / mask.sum()


def test_graph_with_entropy(inputs):
    found = capture(masked_with_entropy, *inputs)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_labels_: "i64[4, 9]", L_hidden_: "f32[4, 9, 16]", L_weight_: "f32[31, 16]"):
    l_labels_ = L_labels_
    l_hidden_ = L_hidden_
    l_weight_ = L_weight_
    mask: "b8[4, 9]" = l_labels_ != -100
    clamp: "i64[4, 9]" = l_labels_.clamp(min = 0)
    linear_token_losses_default: "f32[2, 36]" = torch.ops.liger_fx.linear_token_losses.default(l_hidden_, l_weight_, None, clamp, None, None, None, None, mask, ['cross_entropy', 'entropy'], None, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True)
    getitem: "f32[36]" = linear_token_losses_default[0]
    reshape: "f32[4, 9]" = getitem.reshape((4, 9))
    neg_1: "f32[4, 9]" = -reshape
    getitem_1: "f32[36]" = linear_token_losses_default[1]
    reshape_1: "f32[4, 9]" = getitem_1.reshape((4, 9))
    neg_2: "f32[4, 9]" = -reshape_1
    mul: "f32[4, 9]" = neg_1 * mask
    neg: "f32[4, 9]" = -neg_2
    mul_2: "f32[4, 9]" = neg * mask
    sum_2: "f32[]" = mul_2.sum()
    sum_3: "i64[]" = mask.sum()
    truediv_1: "f32[]" = sum_2 / sum_3
    return (mul, truediv_1)""",
    )
    assert found.reports[0].replacements[0].pattern == "gathered, negative_entropy"


def without_gradient(hidden, weight, labels):
    """As TRL's GRPO logs it."""
    logits = F.linear(hidden, weight).float()
    logprobs = rlhf.logits_to_logprobs(logits, labels.clamp(min=0))
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return logprobs, entropy


def test_graph_of_an_entropy_without_gradient(inputs):
    found = capture(without_gradient, *inputs)
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_hidden_: "f32[4, 9, 16]", L_weight_: "f32[31, 16]", L_labels_: "i64[4, 9]"):
    l_hidden_ = L_hidden_
    l_weight_ = L_weight_
    l_labels_ = L_labels_
    clamp: "i64[4, 9]" = l_labels_.clamp(min = 0)
    linear_token_losses_default: "f32[2, 36]" = torch.ops.liger_fx.linear_token_losses.default(l_hidden_, l_weight_, None, clamp, None, None, None, None, None, ['cross_entropy', 'entropy'], None, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True)
    getitem: "f32[36]" = linear_token_losses_default[0]
    reshape: "f32[4, 9]" = getitem.reshape((4, 9))
    neg_1: "f32[4, 9]" = -reshape
    getitem_1: "f32[36]" = linear_token_losses_default[1]
    reshape_1: "f32[4, 9]" = getitem_1.reshape((4, 9))
    neg_2: "f32[4, 9]" = -reshape_1
    detach: "f32[4, 9]" = neg_2.detach()
    _set_grad_enabled = torch._C._set_grad_enabled(False)
    entropy: "f32[4, 9]" = -detach
    _set_grad_enabled_1 = torch._C._set_grad_enabled(True)
    return (neg_1, entropy)""",
    )


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [None, True])
def test_every_spelling(spelling, dynamic, inputs):
    found = capture(spelling, *inputs, dynamic=dynamic)
    assert found.reports[0].counts == {"linear_logprobs": 1}
    assert relative_error(found.value, spelling(*inputs)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("spelling", [dpo, selective_with_entropy], ids=lambda f: f.__name__)
def test_inside_a_checkpoint(spelling, inputs):
    def fn(*inputs):
        return checkpoint(spelling, *inputs, use_reentrant=False)

    assert capture(fn, *inputs).reports[0].counts == {"linear_logprobs": 1}


@pytest.mark.parametrize("spelling", [dpo, selective_with_entropy], ids=lambda f: f.__name__)
def test_policy_and_reference_give_the_same_numbers(spelling, inputs):
    torch._dynamo.reset()
    compiled = torch.compile(spelling, backend="liger_fx", options={"inner": "eager"})
    policy = compiled(*inputs)
    with torch.no_grad():
        reference = compiled(*inputs)
    assert torch.equal(policy, reference) and policy.requires_grad
    assert [r.counts for r in liger_fx.reports()[-2:]] == 2 * [{"linear_logprobs": 1}]


def test_what_is_masked_is_not_projected(inputs):
    hidden, weight, labels = inputs
    poisoned = hidden.detach().clone()
    poisoned[:, :2] = float("nan")  # the third predicts the first label that counts
    compiled = torch.compile(dpo, backend="liger_fx", options={"inner": "eager"}, fullgraph=True)
    actual = compiled(poisoned, weight, labels)
    assert relative_error(actual, dpo(*inputs)) < TOLERANCES[torch.float32]


def test_what_is_masked_of_both_is_not_projected(inputs):
    hidden, weight, labels = inputs
    poisoned = hidden.detach().clone()
    poisoned[:, :3] = float("nan")
    found = capture(masked_with_entropy, poisoned, weight, labels)
    for actual, expected in zip(found.value, masked_with_entropy(*inputs), strict=True):
        assert relative_error(actual, expected) < TOLERANCES[torch.float32]


def of_detached_logits(hidden, weight, labels):
    logits = F.linear(hidden, weight).float()
    logprobs = rlhf.logits_to_logprobs(logits, labels.clamp(min=0), 0.7)
    return logprobs, entropy_by_logsumexp(logits.detach() / 0.7)


def of_detached_logprobs(hidden, weight, labels):
    logprobs = F.log_softmax(F.linear(hidden, weight).float(), -1)
    chosen = logprobs.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    logprobs = logprobs.detach()
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


def detached(hidden, weight, labels):
    logprobs, entropy = selective_with_entropy(hidden, weight, labels)
    return logprobs, entropy.detach()


@pytest.mark.parametrize(
    "fn",
    [without_gradient, of_detached_logits, of_detached_logprobs, detached],
    ids=lambda f: f.__name__,
)
def test_entropy_without_gradient(fn, inputs):
    options = {"policy": ["linear_logprobs"], "inner": "aot_eager"}
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="liger_fx", options=options, fullgraph=True)
    expected, actual = fn(*inputs), compiled(*inputs)
    assert liger_fx.reports()[-1].counts == {"linear_logprobs": 1}
    assert actual[0].requires_grad and not actual[1].requires_grad
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < TOLERANCES[torch.float32]
    gradients = (torch.autograd.grad(v[0].sin().sum(), inputs[:2]) for v in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        assert relative_error(a, e) < TOLERANCES[torch.float32]


# -- refuses ---------------------------------------------------------------------------------------


def lora(hidden, weight, labels):
    logits = F.linear(hidden, weight) + F.linear(F.linear(hidden, weight[:2]), weight[:, :2])
    return rlhf.get_batch_log_probs(logits, labels)


def other_dimension(hidden, weight, labels):
    logprobs = F.log_softmax(F.linear(hidden, weight), 1)
    return torch.gather(logprobs, -1, labels.clamp(0).unsqueeze(-1)).squeeze(-1)


def negative_temperature(hidden, weight, labels):
    return ppo(hidden, weight, labels, temperature=-1.0)


def other_sum(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    chosen = torch.gather(logits, -1, labels.clamp(0).unsqueeze(-1)).squeeze(-1)
    return chosen - torch.logsumexp(logits / 2, -1)


def rounded(hidden, weight, labels):
    logits = torch.div(F.linear(hidden, weight), 2.0, rounding_mode="floor")
    return rlhf.logits_to_logprobs(logits, labels.clamp(0))


def in_fp64(hidden, weight, labels):
    return dpo(hidden.double(), weight.double(), labels, upcast=torch.Tensor.contiguous)


def entropy_at_another_temperature(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    logprobs = rlhf.logits_to_logprobs(logits, labels.clamp(0), 0.7)
    return logprobs, entropy_from_logits(logits)


def entropy_of_other_rows(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    logprobs = rlhf.logits_to_logprobs(logits[:, :-1], labels[:, 1:].clamp(0))
    return logprobs, entropy_from_logits(logits[:, 1:])


def entropy_over_positions(hidden, weight, labels):
    logits = F.linear(hidden[:, :V], weight[: hidden.shape[1]])
    logprobs = F.log_softmax(logits, 1)
    chosen = rlhf.logits_to_logprobs(logits, labels.clamp(0, 3))
    return chosen, -(logprobs.exp() * logprobs).sum(1)


def entropy_in_fp64(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    return rlhf.logits_to_logprobs(logits, labels.clamp(0)), entropy_from_logits(logits.double())


def entropy_before_the_label(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    entropy = entropy_from_logits(logits)
    return rlhf.logits_to_logprobs(logits, entropy.argsort().clamp(0)), entropy


def entropy_without_gradient_first(hidden, weight, labels):
    logits, labels = F.linear(hidden, weight), labels.clamp(0)
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return rlhf.logits_to_logprobs(logits, labels), entropy


def temperature_in_place(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    logits.div_(0.7)
    return rlhf.logits_to_logprobs(logits, labels.clamp(0)), entropy_from_logits(logits)


def two_entropies(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    entropies = entropy_from_logits(logits), entropy_by_logsumexp(logits)
    return rlhf.logits_to_logprobs(logits, labels.clamp(0)), *entropies


def accuracy_as_well(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    accuracy = (logits.detach().float().argmax(-1) == labels).float().mean()
    return rlhf.logits_to_logprobs(logits, labels.clamp(0)), entropy_from_logits(logits), accuracy


def means_as_well(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    return rlhf.logits_to_logprobs(logits, labels.clamp(0)), logits.detach().mean()


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (
            entropy_at_another_temperature,
            "the cross_entropy and entropy have different temperatures",
        ),
        (entropy_of_other_rows, "the cross_entropy and entropy are of different rows"),
        (entropy_over_positions, "entropy is not taken over the classes of each token"),
        (entropy_in_fp64, "negative_entropy is computed in torch.float64"),
        (entropy_before_the_label, "label (clamp) is computed only after entropy"),
        (entropy_without_gradient_first, "grad mode is switched in the middle of it"),
        (temperature_in_place, "the value of `linear` (logits) is also used by `div_` (div_)"),
        (two_entropies, "entropy and entropy are taken of one projection"),
        (accuracy_as_well, "the value of `linear` (logits) is also used by `argmax` (argmax)"),
        (means_as_well, "the value of `linear` (logits) is also used by `mean` (mean)"),
        (lora, "the logits are a sum (LoRA on the head?), not one projection"),
        (other_dimension, "the labels are not one class of the last dimension for each token"),
        (
            negative_temperature,
            "the temperature or scale of the logits is computed or not positive",
        ),
        (other_sum, "the sum is taken over other logits than those of the labels"),
        (in_fp64, "the logits are torch.float64; the kernel computes in float32"),
    ],
)
def test_refuses(fn, reason, inputs):
    found = capture(fn, *inputs)
    assert found.reports[0].counts == {}
    assert reason in reasons(found.reports[0])


# -- leaves alone ----------------------------------------------------------------------------------


def returned_too(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    return rlhf.get_batch_log_probs(logits, labels), logits


def mean_of_the_logits(hidden, weight, labels):
    """What torchtune's DPO recipes log, in one graph with the rest."""
    logits = F.linear(hidden, weight)
    return rlhf.get_batch_log_probs(logits, labels), logits.detach().mean()


def best_logprob(hidden, weight, labels):
    logprobs = F.log_softmax(F.linear(hidden, weight), -1)
    chosen = torch.gather(logprobs, -1, labels.clamp(0).unsqueeze(-1)).squeeze(-1)
    return chosen, logprobs.amax(-1)


def partly_detached_entropy(hidden, weight, labels):
    logprobs = F.log_softmax(F.linear(hidden, weight), -1)
    chosen = torch.gather(logprobs, -1, labels.clamp(0).unsqueeze(-1)).squeeze(-1)
    return chosen, -(logprobs.exp() * logprobs.detach()).sum(-1)


def cross_entropy_of_two(hidden, weight, labels):
    logits = F.linear(hidden, weight)
    chosen = rlhf.logits_to_logprobs(logits, labels.clamp(0))
    return chosen, (logits.softmax(-1) * logits.flip(0).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize(
    "fn",
    [
        returned_too,
        mean_of_the_logits,
        best_logprob,
        partly_detached_entropy,
        cross_entropy_of_two,
    ],
    ids=lambda f: f.__name__,
)
def test_leaves_logits_that_somebody_else_sees(fn, inputs):
    found = capture(fn, *inputs)
    assert found.reports[0].counts == {}
    for actual, expected in zip(found.value, fn(*inputs), strict=True):
        assert relative_error(actual, expected) < TOLERANCES[torch.float32]


def test_leaves_rounded_logits_alone(inputs):
    found = capture(rounded, *inputs)
    assert found.reports[0].counts == {}
    assert "wanted linear, found `div`" in found.reports[0].near_misses[0].reason


def test_a_number_is_no_mask(inputs):
    def fn(hidden, weight, labels):
        return rlhf.logits_to_logprobs(F.linear(hidden, weight), labels.clamp(0)) * hidden.shape[1]

    found = capture(fn, *inputs, dynamic=True)
    assert found.reports[0].counts == {"linear_logprobs": 1}
    assert relative_error(found.value, fn(*inputs)) < TOLERANCES[torch.float32]


def test_a_mask_of_numbers_is_multiplied_as_it_is(inputs):
    def fn(hidden, weight, labels):
        mask = (labels != -100).float() * 0.5
        return ppo(hidden, weight, labels.clamp(0)) * mask[:, 3:]

    found = capture(fn, *inputs)
    assert found.reports[0].counts == {"linear_logprobs": 1}
    assert relative_error(found.value, fn(*inputs)) < TOLERANCES[torch.float32]


def test_a_mask_that_changes_later_drops_nothing(inputs):
    def fn(hidden, weight, labels):
        mask = labels != -100
        logprobs = rlhf.logits_to_logprobs(F.linear(hidden, weight), labels.clamp(0))
        mask[:, 0] = True
        return logprobs * mask

    found = capture(fn, *inputs)
    assert found.reports[0].counts == {"linear_logprobs": 1}
    assert relative_error(found.value, fn(*inputs)) < TOLERANCES[torch.float32]


def test_log_probabilities_that_are_written_to(inputs):
    """As torchtune's PPO recipe fills in the padding, here before the entropy is taken."""

    def fn(hidden, weight, labels):
        logits = F.linear(hidden, weight)
        logprobs = rlhf.logits_to_logprobs(logits, labels.clamp(0))
        logprobs[labels == -100] = 1.0
        return logprobs, entropy_by_logsumexp(logits)

    found = capture(fn, *inputs)
    assert found.reports[0].counts == {"linear_logprobs": 1}
    for actual, expected in zip(found.value, fn(*inputs), strict=True):
        assert relative_error(actual, expected) < TOLERANCES[torch.float32]


def test_a_mask_of_only_one_drops_nothing(inputs):
    def fn(hidden, weight, labels):
        logprobs, entropy = selective_with_entropy(hidden, weight, labels)
        return torch.stack((logprobs * (labels != -100), entropy))

    found = capture(fn, *inputs)
    assert found.reports[0].counts == {"linear_logprobs": 1}
    assert relative_error(found.value, fn(*inputs)) < TOLERANCES[torch.float32]


def test_an_entropy_of_other_logits_stays(inputs):
    def fn(hidden, weight, labels):
        other = F.linear(hidden.flip(-1), weight)
        return selective(hidden, weight, labels) + entropy_from_logits(other)

    found = capture(fn, *inputs)
    assert [r.pattern for r in found.reports[0].replacements] == ["normalised"]
    assert relative_error(found.value, fn(*inputs)) < TOLERANCES[torch.float32]


def test_an_entropy_alone_stays(inputs):
    def fn(hidden, weight, labels):
        return entropy_from_logits(F.linear(hidden, weight))

    assert capture(fn, *inputs).reports[0].counts == {}


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_numerics(spelling, dtype, chunk_tokens):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 37, 48, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (0.2 * torch.randn(157, 48, generator=generator)).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(0, 157, (6, 37), generator=generator).to(DEVICE)
    labels[:, 5:9] = -100 if spelling in (dpo, dpo_average) else 0
    upstream = torch.linspace(-1, 2, 2 * 6 * 37, dtype=torch.float64, device=DEVICE)

    def outcome(fn, hidden, weight):
        """Values, and gradients under another upstream gradient for each."""
        value = fn(hidden, weight, labels)
        weighted = value.double() * upstream[: value.numel()].view(value.shape)
        return value, *torch.autograd.grad(weighted.sum(), (hidden, weight))

    options = {"policy": ["linear_logprobs"], "linear_logprobs.chunk_tokens": chunk_tokens}
    options["inner"] = "aot_eager"
    torch._dynamo.reset()
    compiled = torch.compile(spelling, backend="liger_fx", options=options, fullgraph=True)
    exact = functools.partial(spelling, upcast=torch.Tensor.contiguous)
    wide = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = outcome(exact, *wide)
    eager = outcome(spelling, hidden, weight)
    for _ in range(2):
        for a, b, e in zip(outcome(compiled, hidden, weight), eager, expected, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert relative_error(a, e) <= 1.1 * relative_error(b, e) + 3e-7
    assert liger_fx.reports()[-1].counts == {"linear_logprobs": 1}
