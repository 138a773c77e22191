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


SPELLINGS = [dpo, dpo_average, ppo, selective, softmax_in_fp32]


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
    logical_not: "b8[4, 8]" = loss_mask.logical_not()
    masked_fill: "i64[4, 8]" = labels.masked_fill(logical_not, -2147483648)
    getitem_2: "f32[4, 8, 16]" = l_hidden_[(slice(None, None, None), slice(None, -1, None), slice(None, None, None))]
    linear_cross_entropy_per_token_default: "f32[4, 8]" = torch.ops.liger_fx.linear_cross_entropy_per_token.default(getitem_2, l_weight_, None, masked_fill, -2147483648, 0.0, 0.0, 1.0, 0, torch.float32, True)
    neg: "f32[4, 8]" = -linear_cross_entropy_per_token_default
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
    linear_cross_entropy_per_token_default: "f32[4, 6]" = torch.ops.liger_fx.linear_cross_entropy_per_token.default(getitem_2, l_weight_, None, getitem_1, -2147483648, 0.0, 0.0, 0.7, 0, torch.float32, True)
    neg: "f32[4, 6]" = -linear_cross_entropy_per_token_default
    return (neg,)""",
    )


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [None, True])
def test_every_spelling(spelling, dynamic, inputs):
    found = capture(spelling, *inputs, dynamic=dynamic)
    assert found.reports[0].counts == {"linear_logprobs": 1}
    assert relative_error(found.value, spelling(*inputs)) < TOLERANCES[torch.float32]


def test_inside_a_checkpoint(inputs):
    def fn(*inputs):
        return checkpoint(dpo, *inputs, use_reentrant=False)

    assert capture(fn, *inputs).reports[0].counts == {"linear_logprobs": 1}


def test_policy_and_reference_give_the_same_numbers(inputs):
    compiled = torch.compile(dpo, backend="liger_fx", options={"inner": "eager"})
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


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lora, "the logits are a sum (LoRA on the head?), not one projection"),
        (other_dimension, "the labels are not one class of the last dimension for each token"),
        (negative_temperature, "the temperature is computed or not positive, expected a constant"),
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


def entropy(hidden, weight, labels):
    logprobs = F.log_softmax(F.linear(hidden, weight), -1)
    chosen = torch.gather(logprobs, -1, labels.clamp(0).unsqueeze(-1)).squeeze(-1)
    return chosen, (logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize(
    "fn", [returned_too, mean_of_the_logits, entropy], ids=lambda f: f.__name__
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
    upstream = torch.linspace(-1, 2, 6 * 37, dtype=torch.float64, device=DEVICE)

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
