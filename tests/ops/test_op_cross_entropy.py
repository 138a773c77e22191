"""``liger_fx::cross_entropy``, against fp64 and against eager."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from _op_checks import Case, Contract, assert_all_close, randn, run, upstreams, wide
from _util import DEVICE

from liger_fx import ops


def cross_entropy(logits, target, class_weight, ignore_index, label_smoothing):
    return F.cross_entropy(
        wide(logits),
        target,
        class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )


def inputs(shape, dtype, generator, *, ignore_index=-100, ignored=0.3, weights=False):
    """``ignored``: the share of ignored labels."""
    logits = randn(shape, dtype, generator)
    rows, vocab = shape
    target = torch.randint(0, vocab, (rows,), generator=generator, device=generator.device)
    left_out = torch.rand(rows, generator=generator, device=generator.device) < ignored
    made = [logits, target.masked_fill(left_out, ignore_index)]
    if weights:
        made.append(0.5 + randn((vocab,), torch.float32, generator, grad=False).abs())
    return made


def case(name, ignore_index=-100, label_smoothing=0.0, **options):
    literals = (ignore_index, label_smoothing)
    if not options.get("weights"):
        literals = (None, *literals)
    make = functools.partial(inputs, ignore_index=ignore_index, **options)
    return Case(name, ops.cross_entropy, cross_entropy, make, literals, shape=(203, 157))


class TestCrossEntropy(Contract):
    CASES = (
        case("some ignored"),
        case("none ignored", ignored=0.0),
        case("all ignored", ignored=1.0),
        case("a class ignored", ignore_index=3),
        case("ignored is -1", ignore_index=-1),
        case("class weights", weights=True),
        case("class weights and label smoothing", weights=True, label_smoothing=0.1),
        case("label smoothing", label_smoothing=0.1),
        case("label smoothing, a class ignored", label_smoothing=0.1, ignore_index=3),
        case("both, ignored is -1", label_smoothing=0.1, weights=True, ignore_index=-1),
    )
    SHAPES = ((1, 257), (7, 5), (33, 48), (3, 4099), (4, 2), (0, 7), (100_003, 5))
    BIG = (17_000, 128_256)


def plain(logits, target, class_weight=None, ignore_index=-100, label_smoothing=0.0):
    return ops.cross_entropy(logits, target, class_weight, ignore_index, label_smoothing)


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA it is a device-side assertion")
@pytest.mark.parametrize("label", [157, -1, -101])
def test_labels_out_of_range_are_an_error(label):  # A29
    logits, target = TestCrossEntropy.CASES[1].make()
    target[5] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        plain(logits, target)


def test_strided_labels_and_upstream():
    logits, target = TestCrossEntropy.CASES[0].make()
    (upstream,) = upstreams([target.float()], torch.float32)

    def gradient(labels, of_losses):
        return torch.autograd.grad(plain(logits, labels), logits, of_losses)[0]

    strided = (t.repeat_interleave(2)[::2] for t in (target, upstream))
    assert torch.equal(gradient(*strided), gradient(target, upstream))
    ones = torch.ones_like(upstream)
    assert torch.equal(gradient(target, ones[:1].expand_as(ones)), gradient(target, ones))


def test_ignored_rows_take_nothing_from_an_upstream_that_is_not_finite():
    logits, target = TestCrossEntropy.CASES[0].make()
    upstream = torch.ones_like(target, dtype=torch.float32)
    upstream[target == -100] = float("inf")
    (gradient,) = torch.autograd.grad(plain(logits, target), logits, upstream)
    assert torch.isfinite(gradient).all() and not gradient[target == -100].any()


def test_classes_that_are_masked_out():
    """By an infinite logit, as some models do."""
    logits, target = TestCrossEntropy.CASES[0].make()
    with torch.no_grad():
        logits[:, 1::2] = float("-inf")
        target[target >= 0] //= 2
        target[target >= 0] *= 2
    eager = functools.partial(
        cross_entropy, class_weight=None, ignore_index=-100, label_smoothing=0
    )
    assert_all_close(run(plain, [logits, target]), run(eager, [logits, target]))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_tiny_and_huge_logits(scale):
    logits, target = TestCrossEntropy.CASES[0].make()
    logits = (logits.detach() * scale).requires_grad_()
    eager = functools.partial(
        cross_entropy, class_weight=None, ignore_index=-100, label_smoothing=0
    )
    assert_all_close(run(plain, [logits, target]), run(eager, [logits, target]))


@pytest.mark.parametrize("rows", [1, 7, 202, 203])
def test_any_number_of_rows_at_a_time(rows, monkeypatch):
    tensors = TestCrossEntropy.CASES[0].make(dtype=torch.bfloat16)
    expected = run(plain, tensors)
    module = sys.modules["liger_fx.ops.cross_entropy"]  # the package has the op by that name
    monkeypatch.setattr(module, "_ROWS_BUDGET", rows * 157 * 4)
    assert_all_close(run(plain, tensors), expected)
