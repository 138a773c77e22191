"""``liger_fx::linear_kl``, against fp64 and against torchtune's losses."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _kl_spellings import forward_and_reverse_kl
from _util import DEVICE, TOLERANCES, relative_error
from torchtune.modules.loss import ForwardKLLoss, ReverseKLLoss, SymmetricKLLoss

from liger_fx import ops
from liger_fx.ops import chunked_head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)]
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def torchtune_loss(forward, reverse):
    if not reverse:
        return ForwardKLLoss()
    return SymmetricKLLoss(forward) if forward else ReverseKLLoss()


def jensen_shannon(student, teacher, beta, reduction="sum"):
    """As TRL and Liger write it; KL(p || q) for 0, KL(q || p) for 1."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0.0, 1.0):
        input, target = (log_q, log_p) if beta == 0.0 else (log_p, log_q)
        return F.kl_div(input, target, reduction=reduction, log_target=True)
    shifted = [log_q + math.log(1 - beta), log_p + math.log(beta)]
    mixture = torch.logsumexp(torch.stack(shifted), dim=0)
    of_teacher, of_student = (
        F.kl_div(mixture, target, reduction=reduction, log_target=True) for target in (log_p, log_q)
    )
    return beta * of_teacher + (1 - beta) * of_student


class Case:
    """Inputs of both heads; ``ignored`` is the share of ignored labels, ``mixed`` asks for the
    cross-entropy as well. ``divergence``: torchtune's shares, or a beta, and then other tokens are
    masked than have no label, or none."""

    def __init__(
        self,
        tokens=37,
        hidden=16,
        vocab=61,
        *,
        dtype=torch.float32,
        ignored=0.3,
        bias=False,
        divergence=(0.3, 0.7),
        temperature=1.0,
        mixed=False,
        seed=0,
    ):
        g = torch.Generator().manual_seed(seed)

        def made(*shape):
            return torch.randn(shape, generator=g).to(DEVICE)

        self.input = made(tokens, hidden).to(dtype)
        self.weight = (made(vocab, hidden) * 0.2).to(dtype)
        self.bias = made(vocab).to(dtype) if bias else None
        self.teacher = [made(tokens, 24).to(dtype), (made(vocab, 24) * 0.2).to(dtype)]
        self.teacher.append(made(vocab).to(dtype) if bias else None)
        target = torch.randint(0, vocab, (tokens,), generator=g)
        target[torch.rand(tokens, generator=g) < ignored] = -100
        self.target = target.to(DEVICE)
        self.mask = self.target != -100
        self.direction, self.beta, self.temperature = (0.0, 0.0), None, temperature
        if isinstance(divergence, tuple):
            self.direction = divergence
        else:
            self.beta = divergence
            self.mask = torch.rand(tokens, generator=g).to(DEVICE) >= ignored if ignored else None
        weights = (torch.tensor(w, device=DEVICE) for w in (0.6 / 37, 0.4 / 37))
        self.weights = tuple(weights) if mixed else (None, None)

    def tensors(self, dtype=None):
        made = [self.input, self.weight] + ([] if self.bias is None else [self.bias])
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in made]

    def eager(self, input, weight, bias=None):
        student = F.linear(input, weight, bias)
        teacher = F.linear(*(t if t is None else t.to(input.dtype) for t in self.teacher))
        if self.beta is not None:
            rows = slice(None) if self.mask is None else self.mask
            logits = (t[rows] / self.temperature for t in (student, teacher))
            kl = jensen_shannon(*logits, self.beta)
        elif input.dtype == torch.float64:
            kl = forward_and_reverse_kl(student, teacher, self.target, *self.direction)
        else:
            kl = torchtune_loss(*self.direction)(student, teacher, self.target, normalize=False)
        ce_weight, kl_weight = self.weights
        if ce_weight is None:
            return kl
        student = student if student.dtype == torch.float64 else student.float()
        return ce_weight * F.cross_entropy(student, self.target, reduction="sum") + kl_weight * kl

    def outputs(self, input, weight, bias=None, *, chunk_tokens=8, accum=torch.float32, skip=True):
        needed = [t is not None and t.requires_grad for t in (input, weight, bias)]
        return ops.linear_kl(
            input, weight, bias, *self.weights, *self.teacher, *self.literals, *needed,
            chunk_tokens, accum, skip,
        )  # fmt: skip

    @property
    def literals(self):
        target = None if self.weights[0] is None else self.target
        return target, -100, self.mask, *self.direction, self.beta, self.temperature

    def fused(self, *tensors, **how):
        return self.outputs(*tensors, **how)[0]


def grads(value, tensors, upstream=None):
    return [value, *torch.autograd.grad(value, tensors, upstream, retain_graph=True)]


def errors(case, function):
    """Relative errors of value and gradients against fp64."""
    exact = case.tensors(torch.float64)
    expected = grads(case.eager(*exact), exact)
    tensors = case.tensors()
    actual = grads(function(*tensors), tensors)
    return [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]


def mean_errors(samples):
    return torch.tensor(samples).square().mean(0).sqrt().tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "how",
    [
        *(dict(divergence=d, mixed=m) for d in DIRECTIONS for m in (False, True)),
        *(dict(divergence=beta, mixed=True, temperature=2.0) for beta in BETAS),
        dict(divergence=0.5),
    ],
    ids=str,
)
def test_no_less_exact_than_eager(dtype, how):
    how = dict(dtype=dtype, bias=True) | how
    cases = [Case(203, vocab=157, seed=i, **how) for i in range(4)]
    ours = mean_errors([errors(case, case.fused) for case in cases])
    eager = mean_errors([errors(case, case.eager) for case in cases])
    assert ours[0] < TOLERANCES[dtype]  # one number: its error is a matter of chance
    for mine, theirs in zip(ours[1:], eager[1:], strict=True):
        assert mine < 1.1 * theirs + 3e-7


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels on CUDA compute in fp32")
@pytest.mark.parametrize("divergence", [*DIRECTIONS, *BETAS])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_are_the_derivative(divergence, mixed):
    how = dict(divergence=divergence, temperature=1.0 if isinstance(divergence, tuple) else 1.7)
    case = Case(7, hidden=3, vocab=5, bias=True, dtype=torch.float64, **how)
    if mixed:
        case.weights = tuple(torch.tensor(w, dtype=torch.float64) for w in (0.6, -2.0))

    def fused(*tensors):
        return case.fused(*tensors, chunk_tokens=3, accum=torch.float64)

    assert torch.autograd.gradcheck(fused, case.tensors())


@pytest.mark.parametrize("mixed", [False, True])
def test_both_sums_come_along(mixed):
    case = Case(mixed=mixed, bias=True)
    student = F.linear(case.input, case.weight, case.bias)
    kl = forward_and_reverse_kl(student, F.linear(*case.teacher), case.target, *case.direction)
    ce = F.cross_entropy(student, case.target, reduction="sum") if mixed else torch.zeros_like(kl)
    loss, sums, *_ = case.outputs(*case.tensors())
    torch.testing.assert_close(sums, torch.stack([ce, kl]))
    assert loss.requires_grad and not sums.requires_grad


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 8, 36, 37, 38, 0, -1])
def test_any_chunk_size_gives_the_same(chunk_tokens, skip):
    for case in (Case(bias=True, mixed=True), Case(divergence=0.3, temperature=2.0, mixed=True)):
        function = partial(case.fused, chunk_tokens=chunk_tokens, skip=skip)
        assert max(errors(case, function)) < 2e-6


@pytest.mark.parametrize(
    ("tokens", "ignored"), itertools.product([1, 2, 129, 700], [0.0, 0.5, 1.0])
)
def test_odd_numbers_of_tokens(tokens, ignored):
    for divergence in ((0.3, 0.7), 0.3):
        case = Case(tokens=tokens, ignored=ignored, bias=True, mixed=True, divergence=divergence)
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


@pytest.mark.parametrize("skip", [True, False])
def test_no_token_that_counts(skip):
    """The weights are 1/0 then: the loss is nan as in eager, and every gradient 0."""
    case = Case(ignored=1.0)
    case.weights = (torch.tensor(torch.inf, device=DEVICE),) * 2
    tensors = case.tensors()
    loss, *gradients = grads(case.fused(*tensors, skip=skip), tensors)
    assert loss.isnan()
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


@pytest.mark.parametrize("vocab", [2, 31, 1000, 4099, 20_001])
def test_vocabularies_that_are_multiples_of_nothing(vocab):
    for divergence in ((0.3, 0.7), 0.3):
        case = Case(vocab=vocab, mixed=True, divergence=divergence)
        assert max(errors(case, case.fused)) < 2e-6


def test_teacher_of_another_dtype():
    case = Case(mixed=True)
    case.teacher = [t if t is None else t.bfloat16() for t in case.teacher]
    student = case.tensors()
    teacher = F.linear(*case.teacher)  # rounded as it is
    kl = forward_and_reverse_kl(F.linear(*student), teacher.float(), case.target, *case.direction)
    ce = F.cross_entropy(F.linear(*student), case.target, reduction="sum")
    expected = grads(case.weights[0] * ce + case.weights[1] * kl, student)
    for a, e in zip(grads(case.fused(*student), student), expected, strict=True):
        assert relative_error(a, e) < 2e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("at", ["student", "teacher", "both"])
@pytest.mark.parametrize("infinity", [-torch.inf, torch.inf])
def test_infinite_logits(direction, at, infinity):
    """As eager has them, but that the gradient of the reverse is not nan for a single -inf."""
    case = Case(bias=True, divergence=direction, dtype=torch.float32, ignored=0.0)
    if at != "teacher":
        case.bias[5] = infinity
    if at != "student":
        case.teacher[2][5] = infinity
    tensors = case.tensors()
    actual = grads(case.fused(*tensors), tensors)
    expected = grads(case.eager(*tensors), tensors)
    torch.testing.assert_close(actual[0], expected[0], equal_nan=True)
    if infinity > 0 or not case.direction[1]:
        torch.testing.assert_close(actual[1:], expected[1:], equal_nan=True)
    else:
        assert expected[1].isnan().all() and actual[1].isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_class_left_out_gets_the_gradient_of_the_rest(direction):
    """A logit that is -inf for good is no class: the gradients are those without it."""
    case = Case(bias=True, divergence=direction)
    case.bias[5] = case.teacher[2][5] = -torch.inf
    tensors = case.tensors()
    actual = grads(case.fused(*tensors), tensors)
    rest = [i for i in range(61) if i != 5]
    fewer = Case(bias=True, divergence=direction)
    fewer.weight, fewer.bias = case.weight[rest], case.bias[rest]
    fewer.teacher = [case.teacher[0], case.teacher[1][rest], case.teacher[2][rest]]
    exact = fewer.tensors(torch.float64)
    expected = grads(fewer.eager(*exact), exact)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a = a[rest] if i > 1 else a
        assert relative_error(a, e) < 2e-6


@pytest.mark.parametrize("beta", BETAS)
def test_a_class_of_probability_0(beta):
    """-inf is no class where both have it; where only one has, 0 log 0 is 0. Eager is finite where
    only the teacher has it, for ``F.kl_div`` of its probabilities, and agrees."""
    case = Case(bias=True, divergence=beta, ignored=0.0)
    without = Case(bias=True, divergence=beta, ignored=0.0)
    for each, least in ((case, -torch.inf), (without, -1e4)):
        each.bias[5] = each.teacher[2][5] = least
        each.teacher[2][7] = -torch.inf if least == -torch.inf and beta < 1.0 else -1e4
        if beta > 0.0:
            each.bias[9] = least
    tensors, others = case.tensors(), without.tensors()
    actual = grads(case.fused(*tensors), tensors)
    expected = grads(without.eager(*others), others)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    if beta == 0.0:
        case.bias[5] = 0.0
        tensors = case.tensors()
        log_q, p = F.linear(*tensors).log_softmax(1), F.linear(*case.teacher).softmax(1)
        eager = grads(F.kl_div(log_q, p, reduction="sum"), tensors)
        actual = grads(case.fused(*tensors), tensors)
        torch.testing.assert_close(actual, eager, atol=1e-5, rtol=1e-5)


def test_student_that_excludes_what_the_teacher_has_is_infinitely_far():
    case = Case(bias=True, divergence=0.0)
    case.bias[5] = -torch.inf
    assert case.fused(*case.tensors()) == case.eager(*case.tensors()) == torch.inf


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_as_ligers_own_loss(beta, temperature):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    case = Case(bias=True, divergence=beta, temperature=temperature, mixed=True)
    case.mask = case.target != -100
    case.weights = tuple(weight / case.mask.sum() for weight in torch.tensor([0.3, 0.7]))
    liger = LigerFusedLinearJSDLoss(
        0.3, 0.7, beta, temperature=temperature, compiled=False, chunk_size=8
    )
    tensors = case.tensors()
    x, weight, bias = tensors
    expected = liger(x, weight, *case.teacher[:2], case.target, bias, case.teacher[2])
    for a, e in zip(grads(case.fused(*tensors), tensors), grads(expected, tensors), strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


def test_rows_of_infinite_logits():
    case = Case(4, bias=True, ignored=0.0)
    case.bias.fill_(-torch.inf)
    for case.direction in DIRECTIONS:
        tensors = case.tensors()
        actual, expected = case.fused(*tensors), case.eager(*tensors)
        torch.testing.assert_close(actual, expected)  # 0: no class is left
        for a, e in zip(grads(actual, tensors), grads(expected, tensors), strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)


def test_small_weights_do_not_underflow_in_float16():
    """With 1/n in them and a GradScaler's factor behind them the gradients are all the same."""
    case = Case(dtype=torch.float16, ignored=0.0)
    case.weights = tuple(torch.tensor(w * 1e-7, device=DEVICE) for w in (0.6, 0.4))
    tensors = case.tensors()
    scaled = torch.autograd.grad(case.fused(*tensors), tensors, torch.tensor(1e7, device=DEVICE))
    case.weights = tuple(torch.tensor(w, device=DEVICE) for w in (0.6, 0.4))
    for a, b in zip(scaled, torch.autograd.grad(case.fused(*tensors), tensors), strict=True):
        assert relative_error(a, b) < 2e-3


def test_one_weight_alone_is_an_error():
    case = Case(mixed=True)
    case.weights = (case.weights[0], None)
    with pytest.raises(ValueError, match="all of ce_weight, kl_weight and target, or none"):
        case.fused(*case.tensors())


def test_numbers_out_of_range_are_an_error():
    with pytest.raises(ValueError, match=r"expected beta in \[0, 1\], got 1.5"):
        Case(divergence=1.5).fused(*Case().tensors())
    with pytest.raises(ValueError, match="expected a positive temperature, got 0"):
        Case(temperature=0.0).fused(*Case().tensors())


def test_two_backwards_with_different_upstream_gradients():
    case = Case(mixed=True)
    tensors = case.tensors()
    value = case.fused(*tensors)
    first = torch.autograd.grad(value, tensors, retain_graph=True)
    third = torch.autograd.grad(value * 3, tensors, retain_graph=True)
    again = torch.autograd.grad(value, tensors)
    for a, b, c in zip(first, third, again, strict=True):
        torch.testing.assert_close(b, 3 * a)
        assert torch.equal(a, c)


def test_frozen_tensors_get_and_cost_no_gradient():
    case = Case(bias=True)
    input, weight, bias = case.tensors()
    frozen_head = case.outputs(input, weight.detach(), bias.detach())
    assert [o.numel() for o in frozen_head[2:]] == [input.numel(), 0, 0]
    frozen_input = case.outputs(input.detach(), weight, bias)
    assert [o.numel() for o in frozen_input[2:]] == [0, weight.numel(), bias.numel()]
    everything = grads(case.fused(input, weight, bias), (input, weight, bias))
    torch.testing.assert_close(grads(frozen_head[0], [input]), everything[:2])
    of_head = [everything[0], *everything[2:]]
    torch.testing.assert_close(grads(frozen_input[0], [weight, bias]), of_head)


def test_nothing_is_wanted():
    case = Case(mixed=True)
    tensors = [t.detach() for t in case.tensors()]
    outputs = case.outputs(*tensors)
    torch.testing.assert_close(outputs[0], case.eager(*tensors))
    assert [o.numel() for o in outputs[2:]] == [0, 0, 0] and not outputs[0].requires_grad


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA it is a device-side assertion")
def test_labels_out_of_range_are_an_error():
    case = Case(ignored=0.0, mixed=True)
    case.target[5] = 61
    with pytest.raises(IndexError, match="Target 61 is out of bounds"):
        case.fused(*case.tensors())
    case.weights = (None, None)  # the divergence knows of no labels
    case.fused(*case.tensors())


@pytest.mark.parametrize("poison", range(3))
def test_ignored_rows_in_every_chunk(poison):
    torch.empty(1 << 16, device=DEVICE).fill_(float("nan"))  # so that unwritten memory shows
    case = Case(tokens=101, vocab=127, ignored=0.25, seed=poison, mixed=True)
    for skip in (True, False):
        assert max(errors(case, lambda *t, s=skip: case.fused(*t, chunk_tokens=16, skip=s))) < 2e-6


def test_no_tensor_exceeds_a_chunk_of_logits():
    case = Case(tokens=512, hidden=8, vocab=1024, bias=True, mixed=True)
    tensors = [t.detach() for t in case.tensors()]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    from liger_fx.ops.kl_loss import Divergence
    from liger_fx.ops.linear_kl import _run
    from liger_fx.ops.token_loss import TokenLoss

    loss = TokenLoss(-100)
    with Watch():
        _run(
            tensors[0],
            chunked_head.Head(tensors[1], tensors[2], loss),
            case.teacher[0],
            chunked_head.Head(case.teacher[1], case.teacher[2], loss),
            case.target,
            case.mask,
            Divergence(-100, 0.3, 0.7),
            torch.stack(case.weights),
            chunked_head.Wanted(True, True, True),
            chunk_tokens=64,
            skip_ignored=True,
        )
    assert largest <= 64 * 1024 * 8  # indices of a scatter are int64


def test_the_budget_is_for_both_heads(monkeypatch):
    monkeypatch.setitem(chunked_head.LOGITS_BUDGET, DEVICE, 128 * 61 * 8)
    sizes = []
    module = __import__("sys").modules["liger_fx.ops.linear_kl"]
    buffer = module.logits_buffer

    def counted(rows, *args, **kwargs):
        sizes.append(rows)
        return buffer(rows, *args, **kwargs)

    monkeypatch.setattr(module, "logits_buffer", counted)
    case = Case(tokens=1024)
    case.fused(*case.tensors(), chunk_tokens=0)
    assert sizes == [128, 128]


def test_autocast_outside_does_not_reach_into_the_op():
    case = Case(mixed=True)
    tensors = case.tensors()
    exact = grads(case.fused(*tensors), tensors)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        under = grads(case.fused(*tensors), tensors)
    for a, b in zip(exact, under, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("needed", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck(needed, mixed):
    case = Case(bias=True, mixed=mixed, **({} if mixed else dict(divergence=0.3, ignored=0.0)))
    tensors = [t.detach().requires_grad_(n) for t, n in zip(case.tensors(), needed, strict=True)]
    arguments = (*tensors, *case.weights, *case.teacher, *case.literals, *needed)
    torch.library.opcheck(ops.linear_kl, (*arguments, 8, torch.float32, True))


def test_no_backward_of_the_backward():
    case = Case()
    tensors = case.tensors()
    (gradient,) = torch.autograd.grad(case.fused(*tensors), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_can_be_captured_into_a_cuda_graph():
    case = Case(tokens=512, vocab=512, mixed=True)
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
    case = Case(tokens=17_000, hidden=16, vocab=128_256, dtype=torch.bfloat16, mixed=True)
    tensors = case.tensors()
    whole = grads(case.fused(*tensors, chunk_tokens=17_000, skip=False), tensors)
    parts = grads(case.fused(*tensors, chunk_tokens=1024), tensors)
    for a, b in zip(whole, parts, strict=True):
        assert relative_error(a, b) < 1e-2
