"""``liger_fx::linear_cross_entropy`` and its per-token sibling, against fp64 and against eager."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from types import MappingProxyType
from unittest import mock

import _op_checks
import pytest
import torch
import torch.nn.functional as F
from _op_checks import randn, wide
from _util import DEVICE, TOLERANCES, relative_error

from liger_fx import ops
from liger_fx.ops import chunked_head, library
from liger_fx.ops.token_loss import TokenLoss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case:
    """Inputs of a head; ``ignored`` is the share of ignored labels."""

    def __init__(
        self,
        tokens=37,
        hidden=16,
        vocab=61,
        *,
        dtype=torch.float32,
        ignored=0.3,
        bias=False,
        ignore_index=-100,
        label_smoothing=0.0,
        softcap=0.0,
        temperature=1.0,
        seed=0,
    ):
        g = torch.Generator().manual_seed(seed)
        self.input = torch.randn(tokens, hidden, generator=g).to(DEVICE, dtype)
        self.weight = (torch.randn(vocab, hidden, generator=g) * 0.2).to(DEVICE, dtype)
        self.bias = torch.randn(vocab, generator=g).to(DEVICE, dtype) if bias else None
        target = torch.randint(0, vocab, (tokens,), generator=g)
        target[torch.rand(tokens, generator=g) < ignored] = ignore_index
        self.target = target.to(DEVICE)
        self.literals = (ignore_index, label_smoothing, softcap)
        self.temperature = temperature  # of the op per token

    def tensors(self, dtype=None):
        made = [self.input, self.weight] + ([] if self.bias is None else [self.bias])
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in made]

    def eager(self, input, weight, bias=None, reduction="sum"):
        ignore_index, label_smoothing, softcap = self.literals
        logits = F.linear(input, weight, bias)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if logits.dtype != torch.float64:
            logits = logits.float()
        return F.cross_entropy(
            logits / self.temperature,
            self.target,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    def fused(self, input, weight, bias=None, *, chunk_tokens=8, accum=torch.float32, skip=True):
        needed = [t is not None and t.requires_grad for t in (input, weight, bias)]
        return ops.linear_cross_entropy(
            input, weight, bias, self.target, *self.literals, *needed, chunk_tokens, accum, skip
        )[0]

    def per_token(self, input, weight, bias=None, *, chunk_tokens=8, skip=True):
        return ops.linear_cross_entropy_per_token(
            input, weight, bias, self.target, *self.literals, self.temperature, chunk_tokens,
            torch.float32, skip,
        )  # fmt: skip


def grads(value, tensors, upstream=None):
    return [value, *torch.autograd.grad(value, tensors, upstream, retain_graph=True)]


def errors(case, function, upstream=None):
    """Relative errors of value and gradients against fp64."""
    exact = case.tensors(torch.float64)
    reduction = "sum" if upstream is None or upstream.dim() == 0 else "none"
    expected = grads(
        case.eager(*exact, reduction=reduction),
        exact,
        None if upstream is None else upstream.double(),
    )
    tensors = case.tensors()
    actual = grads(function(*tensors), tensors, upstream)
    return [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]


def mean_errors(samples):
    return torch.tensor(samples).square().mean(0).sqrt().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "literals", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}, {"ignore_index": 3}]
)
def test_no_less_exact_than_eager(dtype, bias, literals):
    cases = [Case(203, vocab=157, dtype=dtype, bias=bias, seed=i, **literals) for i in range(4)]
    ours = mean_errors([errors(case, case.fused) for case in cases])
    eager = mean_errors([errors(case, case.eager) for case in cases])
    assert ours[0] < TOLERANCES[dtype]  # one number: its error is a matter of chance
    for mine, theirs in zip(ours[1:], eager[1:], strict=True):
        assert mine < 1.1 * theirs + 3e-7  # design: at most 1.1 times eager's error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_per_token_with_any_upstream_gradient(dtype, temperature):
    case = Case(tokens=203, vocab=157, dtype=dtype, bias=True, temperature=temperature)
    upstream = torch.randn(203, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = errors(case, case.per_token, upstream)
    eager = errors(case, lambda *t: case.eager(*t, reduction="none"), upstream)
    assert ours[0] < TOLERANCES[dtype]
    for mine, theirs in zip(ours[1:], eager[1:], strict=True):
        assert mine < 1.1 * theirs + 3e-7


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 8, 36, 37, 38, 0, -1])
def test_any_chunk_size_gives_the_same(chunk_tokens, skip):
    case = Case(bias=True)
    assert max(errors(case, lambda *t: case.fused(*t, chunk_tokens=chunk_tokens, skip=skip))) < 2e-6


@pytest.mark.parametrize(
    ("tokens", "ignored"), itertools.product([1, 2, 129, 700], [0.0, 0.5, 1.0])
)
def test_odd_numbers_of_tokens(tokens, ignored):
    case = Case(tokens=tokens, ignored=ignored, bias=True)
    tensors = case.tensors()
    actual = grads(case.fused(*tensors, chunk_tokens=128), tensors)
    exact = case.tensors(torch.float64)
    expected = grads(case.eager(*exact), exact)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, atol=1e-5, rtol=1e-5)


def test_no_token_at_all():
    case = Case(tokens=0)
    tensors = case.tensors()
    for gradient in grads(case.fused(*tensors), tensors):
        assert gradient.abs().sum() == 0


@pytest.mark.parametrize("vocab", [2, 31, 1000, 4099])
def test_vocabularies_that_are_multiples_of_nothing(vocab):
    case = Case(vocab=vocab)
    assert max(errors(case, case.fused)) < 2e-6


def test_upstream_gradient_is_not_rounded():
    # 1/n in bf16 is off by up to 0.4 %; a bf16 product would scale every gradient by that.
    case = Case(dtype=torch.bfloat16, ignored=0.0, tokens=37)
    tensors = case.tensors()
    value = case.fused(*tensors)
    once = torch.autograd.grad(value, tensors, retain_graph=True)
    scaled = torch.autograd.grad(value, tensors, torch.tensor(1 / 37, device=DEVICE))
    for a, b in zip(once, scaled, strict=True):
        a, b = a.double(), b.double() * 37
        bias = (a * b).sum() / (a * a).sum() - 1
        assert abs(bias) < 1e-3


def test_two_backwards_with_different_upstream_gradients():  # A17
    case = Case()
    tensors = case.tensors()
    value = case.fused(*tensors)
    first = torch.autograd.grad(value, tensors, retain_graph=True)
    third = torch.autograd.grad(value * 3, tensors, retain_graph=True)
    again = torch.autograd.grad(value, tensors)
    for a, b, c in zip(first, third, again, strict=True):
        torch.testing.assert_close(b, 3 * a)
        assert torch.equal(a, c)


def test_backward_makes_no_zeros_for_unused_outputs():  # A18
    case = Case()
    tensors = case.tensors()
    value = case.fused(*tensors)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "zeros" in func.__name__:
                made.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        torch.autograd.grad(value, tensors)
    assert made == []


def test_frozen_tensors_get_and_cost_no_gradient():  # A19
    case = Case(bias=True)
    input, weight, bias = case.tensors()
    outputs = ops.linear_cross_entropy(
        input, weight, bias, case.target, *case.literals, True, False, False, 8, torch.float32, True
    )
    assert [o.numel() for o in outputs[1:]] == [input.numel(), 0, 0]
    outputs = ops.linear_cross_entropy(
        input, weight, bias, case.target, *case.literals, False, True, True, 8, torch.float32, True
    )
    assert [o.numel() for o in outputs[1:]] == [0, weight.numel(), bias.numel()]


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA it is a device-side assertion")
def test_labels_out_of_range_are_an_error():  # A29
    case = Case(ignored=0.0)
    case.target[5] = 61
    with pytest.raises(IndexError, match="Target 61 is out of bounds"):
        case.fused(*case.tensors())
    case.target[5] = -1
    with pytest.raises(IndexError, match="Target -1 is out of bounds"):
        case.per_token(*case.tensors())


@pytest.mark.gpu
def test_labels_out_of_range_are_a_device_assertion():  # A29; it takes the CUDA context with it
    code = (
        "import torch\n"
        "from liger_fx import ops\n"
        "x, w = torch.randn(4, 8, device='cuda'), torch.randn(5, 8, device='cuda')\n"
        "y = torch.tensor([0, 1, 5, 2], device='cuda')\n"
        "literals = (-100, 0.0, 0.0, True, True, False, 0, torch.float32, True)\n"
        "print(ops.linear_cross_entropy(x, w, None, y, *literals)[0].item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and not done.stdout
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("ignored", [0.0, 0.5])
def test_weight_gradient_does_not_lose_where_everything_fits_one_chunk(ignored):
    case = Case(tokens=2048, hidden=32, vocab=64, dtype=torch.bfloat16, ignored=ignored)
    ours = errors(case, lambda *t: case.fused(*t, chunk_tokens=0))
    assert ours[2] < 1.1 * errors(case, case.eager)[2]


def test_weight_gradient_does_not_lose_by_chunking():  # A12
    case = Case(tokens=4096, hidden=32, vocab=64, dtype=torch.bfloat16, ignored=0.0)
    fine = errors(case, lambda *t: case.fused(*t, chunk_tokens=8))
    coarse = errors(case, lambda *t: case.fused(*t, chunk_tokens=4096))
    rounded = errors(case, lambda *t: case.fused(*t, chunk_tokens=8, accum=torch.bfloat16))
    assert fine[2] < 1.1 * coarse[2]
    assert rounded[2] > 2 * fine[2], "the test would not notice bf16 accumulation"


def test_no_tensor_exceeds_a_chunk_of_logits():
    case = Case(tokens=512, hidden=8, vocab=1024, bias=True)
    tensors = case.tensors()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    with Watch():
        chunked_head.run(
            tensors[0].detach(),
            case.target,
            chunked_head.Head(tensors[1].detach(), tensors[2].detach(), TokenLoss(-100)),
            chunked_head.Wanted(True, True, True),
            chunk_tokens=64,
        )
    assert largest <= 64 * 1024 * 4


@pytest.mark.parametrize(("tokens", "sizes"), [(384, [384]), (640, [384, 256]), (1000, [512, 488])])
def test_chunks_are_as_equal_as_they_come(monkeypatch, tokens, sizes):
    seen = []
    one_chunk = chunked_head._one_chunk

    def spy(x, target, rows, *rest, **how):
        seen.append(x[rows].shape[0])
        one_chunk(x, target, rows, *rest, **how)

    case = Case(tokens=tokens, hidden=8, vocab=64, ignored=0.0)
    monkeypatch.setitem(chunked_head.LOGITS_BUDGET, DEVICE, 512 * 64 * 4)
    monkeypatch.setattr(chunked_head, "_one_chunk", spy)
    tensors = tuple(t.detach() for t in case.tensors())
    case.fused(*tensors, chunk_tokens=0)
    assert seen == sizes


def test_one_chunk_where_its_logits_take_no_more_than_the_sum_that_it_needs_not(monkeypatch):
    monkeypatch.setitem(chunked_head.LOGITS_BUDGET, "cpu", 128 * 64 * 2)
    x = torch.empty(1024, 256, dtype=torch.bfloat16)
    weight = torch.empty(64, 256, dtype=torch.bfloat16)  # its sum over chunks takes 512 * 64 * 2
    head = chunked_head.Head(weight, None, TokenLoss(-100))

    def size(tokens, **wanted):
        return chunked_head.chunk_size(
            tokens, x.element_size(), x, head, chunked_head.Wanted(**wanted)
        )

    assert size(512, weight=True) == 512
    assert size(513, weight=True) == 128
    assert size(512, weight=True, accum_dtype=torch.bfloat16) == 128
    assert size(512, input=True) == 128


@pytest.mark.parametrize("chunk_tokens", [4096, 40_000])
def test_float16_sums_beyond_its_range(chunk_tokens):
    # 40,000 tokens push the same row: the sum passes 65504, the mean does not.
    tokens = 40_000
    case = Case(tokens=tokens, hidden=8, vocab=8, dtype=torch.float16, ignored=0.0)
    case.input.fill_(4.0)
    case.target.fill_(1)
    tensors = case.tensors()
    value = case.fused(*tensors, chunk_tokens=chunk_tokens) / tokens
    for gradient in torch.autograd.grad(value, tensors):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("poison", range(3))
def test_ignored_rows_in_every_chunk(poison):  # A1
    torch.empty(1 << 16, device=DEVICE).fill_(float("nan"))  # so that unwritten memory shows
    case = Case(tokens=101, vocab=127, ignored=0.25, seed=poison)
    for skip in (True, False):
        assert max(errors(case, lambda *t, s=skip: case.fused(*t, chunk_tokens=16, skip=s))) < 2e-6


def test_autocast_outside_does_not_reach_into_the_op():
    case = Case()
    tensors = case.tensors()
    exact = grads(case.fused(*tensors), tensors)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = grads(case.fused(*tensors), tensors)
    for a, b in zip(exact, under, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck(needed):
    case = Case(bias=True)
    input, weight, bias = case.tensors()
    arguments = (input, weight, bias, case.target, -100, 0.1, 2.0)
    tensors = zip((input, weight, bias), needed, strict=True)
    arguments = (*(t.detach().requires_grad_(n) for t, n in tensors), *arguments[3:])
    torch.library.opcheck(ops.linear_cross_entropy, (*arguments, *needed, 8, torch.float32, True))
    arguments = (*arguments, 0.7, 8, torch.float32, True)
    torch.library.opcheck(ops.linear_cross_entropy_per_token, arguments)


def test_no_backward_of_the_backward():
    case = Case()
    tensors = case.tensors()
    (gradient,) = torch.autograd.grad(case.fused(*tensors), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


# -- with the entropy ------------------------------------------------------------------------------


class EntropyCase(_op_checks.Case):
    """The shape is that of the logits."""

    def fused(self, *tensors):
        losses, entropies = super().fused(*tensors)
        return losses.clone(), entropies.clone()


def losses_and_entropies(input, weight, bias, target, ignore_index, *literals):
    logits = wide(F.linear(input, weight, bias)) / literals[2]
    losses = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    logprobs = logits.log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return losses, entropies.where(target != ignore_index, 0.0)


def entropy_inputs(shape, dtype, generator, ignore_index, ignored):
    tokens, vocab = shape
    device = generator.device
    weight = (0.2 * randn((vocab, 16), dtype, generator, grad=False)).requires_grad_()
    target = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    left_out = torch.rand(tokens, generator=generator, device=device) < ignored
    return [
        randn((tokens, 16), dtype, generator),
        weight,
        randn((vocab,), dtype, generator),
        target.masked_fill(left_out, ignore_index),
    ]


def entropy_case(name, *, ignore_index=-100, ignored=0.3, temperature=1.0, chunk=64, skip=True):
    return EntropyCase(
        name,
        torch.ops.liger_fx.linear_cross_entropy_per_token.default,
        losses_and_entropies,
        functools.partial(entropy_inputs, ignore_index=ignore_index, ignored=ignored),
        (ignore_index, 0.0, 0.0, temperature, chunk, torch.float32, skip, True),
        shape=(203, 157),
    )


class TestEntropy(_op_checks.Contract):
    CASES = (
        entropy_case("some ignored, in one chunk", chunk=1 << 20),
        entropy_case("none ignored", ignored=0.0),
        entropy_case("all ignored", ignored=1.0),
        entropy_case("a class ignored, not skipped", ignore_index=3, skip=False),
        entropy_case("a temperature", temperature=0.7),
    )
    SHAPES = ((1, 257), (7, 5), (33, 48), (3, 4099), (4, 2), (0, 7), (1003, 5))
    BIG = (26_000, 128_256)  # of which 30 % are ignored
    BIG_TOLERANCE = MappingProxyType({"atol": 2e-2, "rtol": 2e-2})  # other GEMMs round otherwise


@pytest.mark.parametrize("of", [0, 1], ids=["loss", "entropy"])
def test_one_of_both_may_be_left_out(of):
    case = TestEntropy.CASES[0]
    tensors = case.make()
    wanted = tensors[:3]
    upstream = torch.randn(203, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    actual = torch.autograd.grad(case.fused(*tensors)[of], wanted, upstream)
    exact = _op_checks.in_fp64(tensors)
    expected = torch.autograd.grad(case.reference(*exact)[of], exact[:3], upstream.double())
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < TOLERANCES[torch.float32]


def test_losses_are_the_same_without_the_entropy():
    case = TestEntropy.CASES[0]
    tensors = case.make()
    alone = ops.linear_cross_entropy_per_token(*tensors, *case.literals[:-1])
    torch.testing.assert_close(case.fused(*tensors)[0], alone)


def test_entropy_with_classes_that_are_masked_out():
    """By an infinite logit: 0 log 0 is 0, and its gradient as well."""
    case = TestEntropy.CASES[1]
    input, weight, bias, target = case.make()
    target %= 100
    few = [input, *(t.detach()[:100].clone().requires_grad_() for t in (weight, bias)), target]
    with torch.no_grad():
        bias[100:] = float("-inf")
    expected = _op_checks.run(case.fused, few)
    actual = _op_checks.run(case.fused, [input, weight, bias, target])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[: len(e)], e)
        assert not a[len(e) :].any()


def test_entropy_of_almost_certain_tokens():
    case = TestEntropy.CASES[1]
    input, weight, bias, target = case.make()
    with torch.no_grad():
        bias[5] += 1e4
    _, entropies = case.fused(input, weight, bias, target)
    assert (entropies == 0).all()


def test_entropy_with_a_softcap_is_an_error():
    tensors = TestEntropy.CASES[0].make()
    with pytest.raises(ValueError, match=r"without softcap \(2.0\) and label smoothing"):
        ops.linear_cross_entropy_per_token(
            *tensors, -100, 0.0, 2.0, 1.0, 0, torch.float32, True, True
        )


# -- without a GPU, and on one ---------------------------------------------------------------------


def test_broken_triton_falls_back_to_pytorch(caplog):
    library.liger_module.cache_clear()
    with mock.patch.dict("sys.modules", {"liger_kernel.ops.cross_entropy": None}):
        assert library.liger_module("cross_entropy") is None
    assert "plain PyTorch stands in" in caplog.text
    library.liger_module.cache_clear()


@pytest.mark.gpu
def test_only_the_count_of_valid_tokens_is_waited_for():  # A16, and by an event: no sync of torch's
    case = Case(tokens=4096, vocab=512)
    tensors = case.tensors()
    case.fused(*tensors, chunk_tokens=256)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(case.fused(*tensors, chunk_tokens=256), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_can_be_captured_into_a_cuda_graph():  # A16
    case = Case(tokens=512, vocab=512)
    tensors = case.tensors()
    expected = grads(case.fused(*tensors, chunk_tokens=128), tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.fused(*tensors, chunk_tokens=128)
    graph.replay()
    torch.testing.assert_close(captured, expected[0])


@pytest.mark.gpu
def test_more_than_two_billion_logits():
    case = Case(tokens=17_000, hidden=16, vocab=128_256, dtype=torch.bfloat16)
    tensors = case.tensors()
    whole = grads(case.fused(*tensors, chunk_tokens=17_000, skip=False), tensors)
    parts = grads(case.fused(*tensors, chunk_tokens=1024), tensors)
    for a, b in zip(whole, parts, strict=True):
        assert relative_error(a, b) < 1e-2
