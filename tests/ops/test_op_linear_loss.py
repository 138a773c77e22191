"""``liger_fx::linear_loss`` and ``liger_fx::linear_token_losses``, of one head and of two, against
fp64 and against eager."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from unittest import mock

import _op_checks
import pytest
import torch
import torch.nn.functional as F
from _op_checks import KernelCalls, in_fp64, wide
from _util import DEVICE, TOLERANCES, relative_error

from liger_fx import ops
from liger_fx.ops import chunked_head, library
from liger_fx.ops.linear_loss import scaled_kernel
from liger_fx.ops.token_loss import TokenLoss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNEL = torch.ops.liger_fx.linear_loss_kernel.default
HIDDEN, TEACHER_HIDDEN = 16, 24
# As the operators take them.
TENSORS = (
    "input", "weight", "bias", "target", "class_weight",
    "teacher_input", "teacher_weight", "teacher_bias",
)  # fmt: skip
LITERALS = ("takes", "ignore_index", "label_smoothing", "softcap", "temperature", "beta")
TAKES, TUNES, JSD = ops.TAKES, ("forward_kl", "reverse_kl"), "jensen_shannon"
CE = "cross_entropy"
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


@dataclass(frozen=True)
class Case:
    """One use of an operator. ``ignored``: the share of ignored labels, and of tokens whose weights
    are zero. weights: "each" is [takes, N], "one" [takes, 1]."""

    op: torch._ops.OpOverload = ops.linear_loss
    takes: tuple[str, ...] = (CE,)
    ignore_index: int | None = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0
    temperature: float = 1.0
    beta: float = 0.5
    class_weight: bool = False
    bias: bool = True
    ignored: float = 0.3
    weights: str | None = None
    chunk_tokens: int = 8
    accum_dtype: torch.dtype = torch.float32
    skip: bool = True
    shape: tuple[int, int] = (37, 61)

    def __str__(self):
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "op"}
        return ", ".join(f"{k}={v}" for k, v in given.items() if v != getattr(Case, k))

    @property
    def summed(self):
        return self.op is ops.linear_loss

    @property
    def two_heads(self):
        return bool({*self.takes} & {*ops.DIVERGENCES})

    def make(self, shape=None, dtype=torch.float32, seed=0):
        tokens, vocab = shape or self.shape
        g = torch.Generator(DEVICE).manual_seed(seed)

        def rand(*shape):
            return torch.rand(shape, generator=g, device=DEVICE)

        def randn(*shape, scale=1.0):
            return (scale * torch.randn(shape, generator=g, device=DEVICE)).to(dtype)

        target = torch.randint(0, vocab, (tokens,), generator=g, device=DEVICE)
        if self.ignore_index is not None:
            target.masked_fill_(rand(tokens) < self.ignored, self.ignore_index)
        each = (0.1 + rand(len(self.takes), tokens)).masked_fill_(rand(tokens) < self.ignored, 0.0)
        each.masked_fill_(rand(*each.shape) < self.ignored / 2, 0.0)
        made = {
            "input": randn(tokens, HIDDEN).requires_grad_(),
            "weight": randn(vocab, HIDDEN, scale=0.2).requires_grad_(),
            "bias": randn(vocab).requires_grad_() if self.bias else None,
            "target": target if CE in self.takes else None,
            "class_weight": 0.5 + rand(vocab) if self.class_weight else None,
        }
        if self.two_heads:
            made["teacher_input"] = randn(tokens, TEACHER_HIDDEN)
            made["teacher_weight"] = randn(vocab, TEACHER_HIDDEN, scale=0.2)
            made["teacher_bias"] = randn(vocab) if self.bias else None
        one = 0.1 + rand(len(self.takes), 1)
        made["weights"] = {None: None, "one": one, "each": each}[self.weights]
        return [made[name] for name in self.names]

    @property
    def names(self):
        """Of the tensors that `make` gives and all other methods take."""
        left_out = {
            "bias": not self.bias,
            "target": CE not in self.takes,
            "class_weight": not self.class_weight,
            "teacher_input": not self.two_heads,
            "teacher_weight": not self.two_heads,
            "teacher_bias": not (self.two_heads and self.bias),
            "weights": self.weights is None,
        }
        return [name for name in (*TENSORS, "weights") if not left_out.get(name)]

    def named(self, tensors):
        return dict.fromkeys((*TENSORS, "weights")) | dict(zip(self.names, tensors, strict=True))

    def arguments(self, tensors, *, mask=None, every_value=False):
        *of_heads, weights = self.named(tensors).values()
        literals = [getattr(self, name) for name in LITERALS]
        chunking = (self.chunk_tokens, self.accum_dtype, self.skip)
        ending = (every_value,) if self.summed else ()
        return *of_heads, weights if self.summed else mask, *literals, *chunking, *ending

    def fused(self, *tensors, **how):
        result = self.op(*self.arguments(tensors, **how))
        return result[0] if self.summed else result

    def total(self, *tensors, **how):
        """A differentiable number."""
        result = self.fused(*tensors, **how)
        weights = self.named(tensors)["weights"]
        return result if self.summed else (result if weights is None else result * weights).sum()

    # -- in eager ---------------------------------------------------------------------------------

    def reference(self, *tensors):
        return self.eager_total(*tensors) if self.summed else self.eager(*tensors)

    def eager_total(self, *tensors):
        values, weights = self.eager(*tensors), self.named(tensors)["weights"]
        return values.sum() if weights is None else (values * weights).sum()

    def eager(self, *tensors):
        """What is taken of each token."""
        given = self.named(tensors)
        logits = wide(F.linear(given["input"], given["weight"], given["bias"]))
        scaled = logits / self.temperature
        if self.softcap:
            scaled = self.softcap * torch.tanh(scaled / self.softcap)
        values = []
        for taken in self.takes:
            if taken == CE:
                weight = given["class_weight"]
                value = F.cross_entropy(
                    logits if self.two_heads else scaled,
                    given["target"],
                    None if weight is None else weight.to(logits.dtype),
                    ignore_index=-100 if self.ignore_index is None else self.ignore_index,
                    label_smoothing=self.label_smoothing,
                    reduction="none",
                )
            elif taken in TAKES:
                value = of_one_head(taken, scaled)
            else:
                teacher = F.linear(*(given[name] for name in TENSORS[5:]))
                value = of_two_heads(taken, scaled, wide(teacher) / self.temperature, self.beta)
            values.append(value)
        return torch.stack(values)


def of_one_head(taken, logits):
    if taken == "entropy":
        logprobs = logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)
    return logits.logsumexp(-1) ** (2 if taken == "squared_logsumexp" else 1)


def of_two_heads(taken, student, teacher, beta):
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    if taken == "forward_kl":
        return -torch.masked_fill(log_p.exp() * log_q, student.isinf(), 0).sum(-1)
    if taken == "reverse_kl":
        infinite = student.isinf() | teacher.isinf()
        return torch.masked_fill(log_q.exp() * (log_q - log_p), infinite, 0).sum(-1)

    def kl(of, to):
        return F.kl_div(to, of, reduction="none", log_target=True).sum(-1)

    if beta in (0.0, 1.0):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    mixture = torch.logaddexp(log_q + math.log(1 - beta), log_p + math.log(beta))
    return beta * kl(log_p, mixture) + (1 - beta) * kl(log_q, mixture)


def grads(value, tensors, upstream=None):
    """The value, and its gradients over those tensors that require one."""
    wanted = [t for t in tensors if t.requires_grad]
    return [value, *torch.autograd.grad(value, wanted, upstream, retain_graph=True)]


def errors(case, dtype=torch.float32, function=None, seed=0):
    """Relative errors of value and gradients against fp64."""
    tensors = case.make(dtype=dtype, seed=seed)
    exact = in_fp64(tensors)
    actual = grads((function or case.total)(*tensors), tensors)
    expected = grads(case.eager_total(*exact), exact)
    return [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]


class Dispatched(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of torch's operators that ran, and the sizes of their results in bytes."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.__name__)
        leaves = torch.utils._pytree.tree_leaves(out)
        storages = (t.untyped_storage() for t in leaves if isinstance(t, torch.Tensor))
        self.sizes += [storage.nbytes() for storage in storages]
        return out


def assert_exact(case, tensors=None, tolerance=1e-9):
    """In fp64, where rounding hides nothing. The kernels on CUDA compute in fp32."""
    tensors = case.make() if tensors is None else tensors
    exact = in_fp64(tensors)
    if DEVICE == "cpu":
        tensors, case = exact, replace(case, accum_dtype=torch.float64)
    else:
        tolerance = 1e-5
    actual = grads(case.total(*tensors), tensors)
    for a, e in zip(actual, grads(case.eager_total(*exact), exact), strict=True):
        assert relative_error(a, e) < tolerance


OPS = pytest.mark.parametrize(
    "op", [ops.linear_loss, ops.linear_token_losses], ids=["linear_loss", "linear_token_losses"]
)
# One head and two, everything taken at once.
ONE = Case(takes=("entropy", CE, "squared_logsumexp", "logsumexp"), label_smoothing=0.1)
ONE = replace(ONE, softcap=5.0, temperature=0.7, class_weight=True)
TWO = Case(takes=("reverse_kl", CE, "forward_kl"), temperature=2.0)
MIXTURE = Case(takes=(CE, JSD), beta=0.3, temperature=2.0)
HEADS = pytest.mark.parametrize("head", [Case(), ONE, TWO, MIXTURE], ids=str)

# -- the contract of all ops -----------------------------------------------------------------------

LARGE = Case(chunk_tokens=64, shape=(203, 157))
SUMS = [
    replace(LARGE, **how)
    for how in (
        {},
        {"bias": False, "ignored": 0.0, "chunk_tokens": 0},
        {"ignored": 1.0},
        {"ignore_index": 3, "label_smoothing": 0.1, "skip": False},
        {"ignore_index": None, "softcap": 5.0, "class_weight": True, "weights": "one"},
        {"takes": ONE.takes, "label_smoothing": 0.1, "class_weight": True, "weights": "each"},
        {"takes": ("entropy",), "temperature": 0.7, "weights": "each"},
        {"takes": ("forward_kl",)},
        {"takes": TWO.takes, "weights": "each"},
        *({"takes": MIXTURE.takes, "beta": b, "temperature": 2.0, "weights": "one"} for b in BETAS),
    )
]
TOKENS = [
    replace(LARGE, op=ops.linear_token_losses, **how)
    for how in (
        {"temperature": 0.7},
        {"bias": False, "ignored": 0.0, "chunk_tokens": 0},
        {"ignored": 1.0},
        {"ignore_index": 3, "skip": False, "softcap": 5.0},
        {"takes": ONE.takes, "label_smoothing": 0.1, "class_weight": True},
        {"takes": ("entropy", CE), "temperature": 0.7, "ignore_index": None},
        {"takes": ("reverse_kl",)},
        {"takes": MIXTURE.takes, "beta": 0.3, "temperature": 2.0},
    )
]


class Contract(_op_checks.Contract):
    SHAPES = ((1, 257), (7, 5), (33, 48), (3, 4099), (4, 2), (0, 7), (1003, 5))

    @pytest.mark.parametrize("layout", [None, "transposed heads", "every second column"])
    def test_opcheck(self, case, layout):
        tensors = case.make((5, 8))
        if layout:
            tensors = _op_checks.laid_out(tensors, _op_checks.LAYOUTS[layout])
        torch.library.opcheck(case.op, case.arguments(tensors))
        with KernelCalls() as kernels:
            _op_checks.run(case.fused, tensors)
        assert len(kernels.calls) == (1 if case.summed else 2)
        for kernel, arguments in kernels.calls:
            checks = ("test_schema", "test_faketensor")  # the others are about derivatives
            torch.library.opcheck(kernel, arguments, test_utils=checks)


class TestSums(Contract):
    CASES = SUMS

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_less_exact_than_eager(self, case, dtype):
        ours, eager = (
            _op_checks.mean_errors([errors(case, dtype, function, seed) for seed in range(4)])
            for function in (case.total, case.eager_total)
        )
        assert ours[0] < TOLERANCES[dtype]  # one number: its error is a matter of chance
        for mine, theirs in zip(ours[1:], eager[1:], strict=True):
            assert mine < 1.1 * theirs + 3e-7  # design: at most 1.1 times eager's error

    test_more_than_two_billion_elements = None  # below


class TestTokenLosses(Contract):
    CASES = TOKENS
    BIG = (26_000, 128_256)  # of which 30 % are ignored
    BIG_TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}  # other GEMMs round otherwise  # noqa: RUF012


# -- what is taken ---------------------------------------------------------------------------------


def orders(*takes):
    return [o for n in range(1, len(takes) + 1) for o in itertools.permutations(takes, n)]


@OPS
@pytest.mark.parametrize(
    "literals",
    [
        {},
        {"label_smoothing": 0.1, "ignore_index": 3},
        {"softcap": 5.0, "temperature": 1.7, "class_weight": True, "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_takes_of_one_head_in_any_order(op, literals):
    for takes in orders(*TAKES):
        literals = literals if CE in takes else {k: v for k, v in literals.items() if k in LITERALS}
        assert_exact(Case(op, takes, **literals, weights="each"))


@OPS
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_takes_of_two_heads_in_any_order(op, temperature):
    for takes in orders(CE, *TUNES)[1:]:
        assert_exact(Case(op, takes, temperature=temperature, weights="each"))
    for takes, beta in itertools.product([(JSD,), (JSD, CE), (CE, JSD)], BETAS):
        assert_exact(Case(op, takes, temperature=temperature, beta=beta, weights="each"))


@OPS
@HEADS
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("weights", [None, "one", "each"])
@pytest.mark.parametrize("ignore_index", [-100, 3, None])
def test_weights_and_ignored_labels(op, head, weights, skip, ignore_index):
    assert_exact(replace(head, op=op, weights=weights, skip=skip, ignore_index=ignore_index))


@pytest.mark.skipif(DEVICE != "cpu", reason="the kernels on CUDA compute in fp32")
@OPS
@HEADS
@pytest.mark.parametrize("weights", [None, "each"])
def test_gradients_are_the_derivative(op, head, weights):
    case = replace(head, op=op, weights=weights, chunk_tokens=3, accum_dtype=torch.float64)
    assert torch.autograd.gradcheck(case.fused, in_fp64(case.make((7, 5))))


@pytest.mark.parametrize("case", [replace(ONE, weights="each"), replace(TWO, weights="one")])
def test_values_come_along_without_a_derivative(case):
    tensors = case.make()
    total, values = case.op(*case.arguments(tensors, every_value=True))
    torch.testing.assert_close(values, case.eager(*tensors).detach())
    assert total.requires_grad and not values.requires_grad


@pytest.mark.parametrize(
    ("takes", "name"),
    [(TUNES[:1], "ForwardKLLoss"), (TUNES[1:], "ReverseKLLoss"), (TUNES, "SymmetricKLLoss")],
)
def test_as_torchtunes_losses(takes, name):
    loss = getattr(pytest.importorskip("torchtune.modules.loss"), name)()  # half of both
    case = Case(takes=takes, weights="each")
    tensors = case.make()
    counts = torch.arange(37, device=DEVICE) % 3 > 0
    tensors[-1].copy_(counts / len(takes))
    student, teacher = F.linear(*tensors[:3]), F.linear(*tensors[3:6])
    expected = loss(student, teacher, torch.where(counts, 0, -100), normalize=False)
    for a, e in zip(grads(case.total(*tensors), tensors), grads(expected, tensors), strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


@OPS
@HEADS
def test_tokens_of_several_dimensions(op, head):
    case = replace(head, op=op, weights="each")
    tensors = case.make((36, 61))
    expected = grads(case.total(*tensors), tensors)
    shaped = {"input": (4, 9, HIDDEN), "teacher_input": (4, 9, TEACHER_HIDDEN), "target": (4, 9)}
    several = [t.view(shaped.get(n, t.shape)) for n, t in zip(case.names, tensors, strict=True)]
    several = [_op_checks.alike(t, s) for t, s in zip(tensors, several, strict=True)]
    total, of_input, *others = grads(case.total(*several), several)
    assert of_input.shape == (4, 9, HIDDEN)
    torch.testing.assert_close([total, of_input.flatten(0, 1), *others], expected)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_as_ligers_own_loss(beta, temperature):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    case = Case(takes=(CE, JSD), beta=beta, temperature=temperature, weights="each")
    tensors = case.make()
    x, weight, bias, target, *teacher, weights = tensors
    counts = target != -100
    weights.copy_(torch.tensor([[0.3], [0.7]], device=DEVICE) * counts / counts.sum())
    liger = LigerFusedLinearJSDLoss(
        0.3, 0.7, beta, temperature=temperature, compiled=False, chunk_size=8
    )
    expected = liger(x, weight, *teacher[:2], target, bias, teacher[2])
    for a, e in zip(grads(case.total(*tensors), tensors), grads(expected, tensors), strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


def test_teacher_of_another_dtype():
    case = replace(TWO, weights="one")
    tensors = case.make()
    tensors = [
        t.bfloat16() if "teacher" in n else t for n, t in zip(case.names, tensors, strict=True)
    ]
    teacher = wide(F.linear(*tensors[4:7]))  # rounded as it is
    as_teacher = [torch.eye(61, device=DEVICE), torch.zeros(61, device=DEVICE)]
    of_logits = [*tensors[:4], teacher, *as_teacher, tensors[7]]
    expected = grads(case.eager_total(*of_logits), of_logits)
    for a, e in zip(grads(case.total(*tensors), tensors), expected, strict=True):
        assert relative_error(a, e) < 2e-6


REFUSED = [
    (Case(takes=()), "expected some of .*, each once, got"),
    (Case(takes=("entropy", "entropy")), "each once, got"),
    (Case(takes=("perplexity",)), "expected some of .*'entropy'.*, got .*perplexity"),
    (replace(TWO, takes=("forward_kl", "entropy")), "expected some of .*'forward_kl'.*entropy"),
    (replace(TWO, takes=("forward_kl", JSD)), "torchtune's divergences or jensen_shannon, got"),
    (replace(TWO, takes=("reverse_kl", JSD)), "torchtune's divergences or jensen_shannon, got"),
    (replace(TWO, label_smoothing=0.1), "are not computed beside a divergence"),
    (replace(TWO, softcap=2.0), "are not computed beside a divergence"),
    (replace(TWO, class_weight=True), "are not computed beside a divergence"),
    (replace(MIXTURE, beta=1.5), r"expected beta in \[0, 1\], got 1.5"),
    (replace(MIXTURE, beta=-0.1), r"expected beta in \[0, 1\], got -0.1"),
    (replace(MIXTURE, beta=math.nan), r"expected beta in \[0, 1\], got nan"),
    (Case(temperature=0.0), "expected a positive temperature, got 0"),
    (Case(temperature=math.nan), "expected a positive temperature, got nan"),
]


@OPS
@pytest.mark.parametrize(
    ("case", "message"), REFUSED, ids=lambda v: "" if isinstance(v, str) else None
)
def test_what_does_not_go_together_is_an_error(op, case, message):
    case = replace(case, op=op)
    with pytest.raises(ValueError, match=message):
        case.fused(*case.make())


@OPS
@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        (Case(), {3: None}, "expected a target if a cross-entropy is taken, and only then"),
        (Case(), {9: ("entropy",)}, "expected a target if a cross-entropy is taken, and only"),
        (TWO, {5: None, 6: None, 7: None}, "expected some of .*, got .*forward_kl"),
        (TWO, {5: None}, "expected some of .*, got .*forward_kl"),
        (TWO, {6: None}, "expected teacher_input and teacher_weight, or neither"),
    ],
)
def test_tensors_that_are_missing_are_an_error(op, head, changes, message):
    case = replace(head, op=op)
    arguments = case.arguments(case.make())
    with pytest.raises(ValueError, match=message):
        op(*(changes.get(i, argument) for i, argument in enumerate(arguments)))


@pytest.mark.skipif(DEVICE != "cpu", reason="on CUDA it is a device-side assertion")
@OPS
@pytest.mark.parametrize("head", [Case(), TWO], ids=str)
@pytest.mark.parametrize("label", [61, -1])
def test_labels_out_of_range_are_an_error(op, head, label):  # A29
    case = replace(head, op=op)
    tensors = case.make()
    case.named(tensors)["target"][5] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        case.fused(*tensors)


@pytest.mark.gpu
def test_labels_out_of_range_are_a_device_assertion():  # A29; it takes the CUDA context with it
    code = (
        "import torch\n"
        "from liger_fx import ops\n"
        "x, w = torch.randn(4, 8, device='cuda'), torch.randn(5, 8, device='cuda')\n"
        "y = torch.tensor([0, 1, 5, 2], device='cuda')\n"
        "tensors = (x, w, None, y, *(None,) * 5)\n"
        "literals = (['cross_entropy'], -100, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)\n"
        "print(ops.linear_loss(*tensors, *literals)[0].item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and not done.stdout
    assert "device-side assert" in done.stderr


# -- which tokens, and how many at a time ----------------------------------------------------------


@pytest.fixture
def projected(monkeypatch):
    """The indices of the tokens that each product with a head is of."""
    found = []
    logits = chunked_head.Head.logits

    def spy(head, rows, out):
        found.append(torch.arange(len(head.x), device=head.x.device)[rows].tolist())
        assert len(out) == len(found[-1])
        logits(head, rows, out)

    monkeypatch.setattr(chunked_head.Head, "logits", spy)
    return found


def indices(mask):
    return mask.nonzero().flatten().tolist()


def by_chunks(tokens, heads=1):
    return [tokens[i : i + 8] for i in range(0, len(tokens), 8) for _ in range(heads)]


EVERY = list(range(37))


@OPS
@pytest.mark.parametrize("takes", [(CE,), (CE, "entropy")])
@pytest.mark.parametrize("ignore_index", [-100, None])
@pytest.mark.parametrize("skip", [True, False])
def test_ignored_labels_are_not_projected(op, takes, ignore_index, skip, projected):
    case = Case(op, takes, ignore_index, skip=skip)
    tensors = case.make()
    case.fused(*tensors)
    ignored = skip and ignore_index is not None and takes == (CE,)
    assert projected == by_chunks(indices(tensors[3] != -100) if ignored else EVERY)


@HEADS
def test_tokens_with_weights_of_zero_are_not_projected(head, projected):
    case = replace(head, weights="each")
    tensors = case.make()
    given = case.named(tensors)
    count = given["weights"] != 0
    count[case.takes.index(CE)] &= given["target"] != -100
    needed, heads = indices(count.any(0)), 2 if case.two_heads else 1
    assert 8 < len(needed) < 30
    total, values = case.op(*case.arguments(tensors))
    assert projected == by_chunks(needed, heads)
    assert not values[:, ~count.any(0)].any()
    projected.clear()
    same, every = case.op(*case.arguments(tensors, every_value=True))
    of_labels = indices(given["target"] != -100) if case.takes == (CE,) else EVERY
    assert projected == by_chunks(of_labels, heads)
    torch.testing.assert_close(every, case.eager(*tensors).detach())
    for a, e in zip(grads(total, tensors), grads(same, tensors), strict=True):
        torch.testing.assert_close(a, e, atol=2e-6, rtol=1e-5)


@HEADS
def test_tokens_without_an_upstream_gradient_are_not_projected_again(head, projected):
    case = replace(head, op=ops.linear_token_losses, weights="each")
    tensors = case.make()
    given = case.named(tensors)
    total = case.total(*tensors)
    projected.clear()
    total.backward()
    count = given["weights"] != 0
    count[case.takes.index(CE)] &= given["target"] != -100
    assert projected == by_chunks(indices(count.any(0)), 2 if case.two_heads else 1)


@HEADS
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("weights", [None, "each"])
def test_values_are_of_tokens_in_the_mask(head, skip, weights, projected):
    case = replace(head, op=ops.linear_token_losses, skip=skip, weights=weights)
    tensors = case.make()
    mask = torch.arange(37, device=DEVICE) % 4 > 1
    tensors[0].data[~mask] = math.nan  # nothing comes from there
    values = case.fused(*tensors, mask=mask.view(1, 37))
    kept = mask & (tensors[3] != -100) if case.takes == (CE,) else mask
    assert projected == by_chunks(indices(kept) if skip else EVERY, 2 if case.two_heads else 1)
    clean = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    clean[0].data[~mask] = 0.0
    expected = case.eager(*clean) * mask
    torch.testing.assert_close(values, expected)
    upstream = torch.randn_like(values)
    upstream[:, ~mask] = math.inf
    actual = grads(values, tensors[:1], upstream)
    expected = grads(expected, clean[:1], upstream.where(mask, 0.0))
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


@OPS
@HEADS
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 8, 36, 37, 38, 0, -1])
def test_any_chunk_size_gives_the_same(op, head, chunk_tokens, skip):
    case = replace(head, op=op, chunk_tokens=chunk_tokens, skip=skip, weights="each")
    assert_exact(case)


@OPS
@HEADS
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [0, 1, 2, 129, 700])
def test_odd_numbers_of_tokens(op, head, tokens, ignored):
    for weights in (None, "each"):
        case = replace(head, op=op, chunk_tokens=128, ignored=ignored, weights=weights)
        assert_exact(case, case.make((tokens, 61)))


@OPS
@HEADS
@pytest.mark.parametrize("vocab", [2, 31, 1000, 4099, 20_001])
def test_vocabularies_that_are_multiples_of_nothing(op, head, vocab):
    assert_exact(replace(head, op=op, shape=(37, vocab)), tolerance=1e-8)


@OPS
@HEADS
@pytest.mark.parametrize("poison", range(3))
@pytest.mark.parametrize("skip", [True, False])
def test_ignored_rows_in_every_chunk(op, head, poison, skip):  # A1
    torch.empty(1 << 16, device=DEVICE).fill_(math.nan)  # so that unwritten memory shows
    case = replace(head, op=op, chunk_tokens=16, skip=skip, shape=(101, 127), ignored=0.25)
    assert max(errors(case, seed=poison)) < 2e-6


@OPS
@HEADS
@pytest.mark.parametrize("skip", [True, False])
def test_no_token_that_counts(op, head, skip):
    """Weights are 1/0 then: the loss is nan as in eager; a cross-entropy has no gradient."""
    case = replace(head, op=op, ignored=1.0, skip=skip, weights="each")
    tensors = case.make()
    weights = case.named(tensors)["weights"]
    weights.zero_()[case.takes.index(CE)] = math.inf
    loss, *gradients = grads(case.total(*tensors), tensors)
    assert loss.isnan()
    assert not any(gradient.any() for gradient in gradients)


@OPS
@pytest.mark.parametrize("skip", [True, False])
def test_mean_of_no_token(op, skip):
    """The upstream gradient is 1/0 then, and no gradient comes of it, as in eager."""
    case = Case(op, ignored=1.0, skip=skip)
    tensors = case.make()
    loss, *gradients = grads(case.total(*tensors) / 0, tensors)
    assert loss.isnan()
    assert not any(gradient.any() for gradient in gradients)


def test_chunks_are_as_equal_as_they_come(projected, monkeypatch):
    monkeypatch.setitem(chunked_head.LOGITS_BUDGET, DEVICE, 512 * 64 * 4)
    case = Case(ignored=0.0, chunk_tokens=0)
    for tokens, sizes in ((384, [384]), (640, [384, 256]), (1000, [512, 488])):
        projected.clear()
        with torch.no_grad():
            case.fused(*case.make((tokens, 64)))
        assert [len(tokens) for tokens in projected] == sizes


def test_the_budget_is_for_both_heads(projected, monkeypatch):
    monkeypatch.setitem(chunked_head.LOGITS_BUDGET, DEVICE, 128 * 61 * 8)
    case = replace(TWO, chunk_tokens=0, takes=("forward_kl",))
    with torch.no_grad():
        case.fused(*case.make((1024, 61)))
    assert [len(tokens) for tokens in projected] == [128] * 16


def test_one_chunk_where_its_logits_take_no_more_than_the_sum_that_it_needs_not(monkeypatch):
    monkeypatch.setitem(chunked_head.LOGITS_BUDGET, "cpu", 128 * 64 * 2)
    x = torch.empty(1024, 256, dtype=torch.bfloat16)
    weight = torch.empty(64, 256, dtype=torch.bfloat16)  # its sum over chunks takes 512 * 64 * 2
    head = chunked_head.Head(x, weight, None)

    def size(tokens, **wanted):
        return chunked_head.chunk_size(
            tokens, x.element_size(), head, chunked_head.Wanted(**wanted)
        )

    assert size(512, weight=True) == 512
    assert size(513, weight=True) == 128
    assert size(512, weight=True, accum_dtype=torch.bfloat16) == 128
    assert size(512, input=True) == 128


def test_logits_take_no_more_than_the_sum_of_the_weights_gradient(monkeypatch):
    monkeypatch.setitem(chunked_head.LOGITS_BUDGET, "cpu", 1 << 30)

    def size(hidden, dtype=torch.bfloat16, **wanted):
        x, weight = (torch.empty(n, hidden, dtype=dtype, device="meta") for n in (16384, 65536))
        head = chunked_head.Head(x, weight, None)
        return chunked_head.chunk_size(
            len(x), x.element_size(), head, chunked_head.Wanted(**wanted)
        )

    assert size(1024, weight=True) == 2048
    assert size(1024, weight=True, dtype=torch.float32) == 1024
    assert size(64, weight=True) == 1024
    assert size(1024, input=True) == 8192


@HEADS
def test_no_tensor_exceeds_a_chunk_of_logits(head):
    case = replace(head, weights="each")
    given = case.named([t.detach() for t in case.make((512, 1024))])
    heads = [chunked_head.Head(*(given[name] for name in TENSORS[:3])), None]
    if case.two_heads:
        heads[1] = chunked_head.Head(*(given[name] for name in TENSORS[5:]))
    literals = [getattr(case, name) for name in LITERALS]
    with Dispatched() as dispatched:
        chunked_head.run(
            *heads,
            given["target"],
            TokenLoss(*literals, given["class_weight"]),
            chunked_head.Wanted(True, True, True),
            weights=given["weights"],
            chunk_tokens=64,
        )
    assert 0 < max(dispatched.sizes) <= 64 * 1024 * 4


# -- gradients -------------------------------------------------------------------------------------


@OPS
@HEADS
@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)), ids=str)
def test_frozen_tensors_get_and_cost_no_gradient(op, head, needed):  # A19
    case = replace(head, op=op)
    tensors = case.make()
    everything = grads(case.total(*tensors), tensors)
    for tensor, wanted in zip(tensors[:3], needed, strict=True):
        tensor.requires_grad_(wanted)
    with KernelCalls() as kernels:
        total = case.total(*tensors)
        assert total.requires_grad == any(needed)
        if any(needed):
            expected = itertools.compress(everything, (True, *needed))
            for a, e in zip(grads(total, tensors), expected, strict=True):
                torch.testing.assert_close(a, e)
    *first, (kernel, arguments) = kernels.calls
    assert len(first) == (not case.summed and any(needed))
    for gradient, tensor, wanted in zip(kernel(*arguments)[1:], tensors[:3], needed, strict=True):
        assert gradient.shape == (tensor.shape if wanted else (0,))
    for kernel, arguments in first:
        assert [gradient.numel() for gradient in kernel(*arguments)[1:]] == [0, 0, 0]


def test_nothing_is_wanted_without_grad_mode():
    tensors = ONE.make()
    with torch.no_grad(), KernelCalls() as kernels:
        total = ONE.total(*tensors)
    ((kernel, arguments),) = kernels.calls
    assert [g.numel() for g in kernel(*arguments)[1:]] == [0, 0, 0] and not total.requires_grad


def test_weights_get_no_gradient():
    case = replace(ONE, weights="one")
    tensors = case.make()
    tensors[-1].requires_grad_()
    total = case.total(*tensors)
    assert torch.autograd.grad(total, tensors[-1:], allow_unused=True) == (None,)


@pytest.mark.parametrize("taken", range(4))
def test_values_that_nothing_comes_of(taken):
    case = replace(ONE, op=ops.linear_token_losses)
    tensors = case.make()
    exact = in_fp64(tensors)
    upstream = torch.randn(37, device=DEVICE)
    actual = grads(case.fused(*tensors)[taken], tensors, upstream)
    expected = grads(case.eager(*exact)[taken], exact, upstream.double())
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < TOLERANCES[torch.float32]


def test_losses_are_the_same_whatever_else_is_taken():
    case = Case(ops.linear_token_losses, (CE, "entropy", "logsumexp"))
    tensors = case.make()
    alone = replace(case, takes=(CE,)).fused(*tensors)
    torch.testing.assert_close(case.fused(*tensors)[:1], alone)


@HEADS
def test_upstream_gradient_is_not_rounded(head):
    # 1/n in bf16 is off by up to 0.4 %; a bf16 product would scale every gradient by that.
    case = replace(head, ignored=0.0)
    tensors = case.make(dtype=torch.bfloat16)
    value = case.fused(*tensors)
    scale = torch.tensor(1 / 37, device=DEVICE)
    for a, b in zip(grads(value, tensors), grads(value, tensors, scale), strict=True):
        a, b = a.detach().double(), b.detach().double() * 37
        if a.dim() > 1:
            assert abs((a * b).sum() / (a * a).sum() - 1) < 1e-3


def test_backward_makes_no_zeros_for_unused_outputs():  # A18
    tensors = ONE.make()
    value = ONE.fused(*tensors)
    with Dispatched() as dispatched:
        grads(value, tensors)
    assert dispatched.names and not any("zeros" in name for name in dispatched.names)


@pytest.mark.parametrize("ignored", [0.0, 0.5])
@OPS
def test_weight_gradient_does_not_lose_where_everything_fits_one_chunk(op, ignored):
    case = Case(op, ignored=ignored, chunk_tokens=0, shape=(2048, 64))
    ours, eager = (errors(case, torch.bfloat16, f) for f in (case.total, case.eager_total))
    assert ours[2] < 1.1 * eager[2]


@OPS
def test_weight_gradient_does_not_lose_by_chunking(op):  # A12
    fine = Case(op, ignored=0.0, shape=(4096, 64))
    rounded = replace(fine, accum_dtype=torch.bfloat16)
    fine, coarse, rounded = (
        errors(case, torch.bfloat16)[2]
        for case in (fine, replace(fine, chunk_tokens=4096), rounded)
    )
    assert fine < 1.1 * coarse
    assert rounded > 2 * fine, "the test would not notice bf16 accumulation"


@OPS
@pytest.mark.parametrize("chunk_tokens", [4096, 40_000])
def test_float16_sums_beyond_its_range(op, chunk_tokens):
    # 40,000 tokens push the same row: the sum passes 65504, the mean does not.
    case = Case(op, ignored=0.0, chunk_tokens=chunk_tokens)
    tensors = case.make((40_000, 8), torch.float16)
    tensors[0].data.fill_(4.0)
    tensors[3].fill_(1)
    gradients = grads(case.total(*tensors) / 40_000, tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)


@HEADS
@pytest.mark.parametrize("weights", ["one", "each"])
def test_small_weights_do_not_underflow_in_float16(head, weights):
    """With 1/n in them and a GradScaler's factor behind them the gradients are all the same."""
    case = replace(head, weights=weights)
    tensors = case.make(dtype=torch.float16)
    expected = grads(case.total(*tensors), tensors)
    tensors[-1] *= 1e-7
    scaled = grads(case.total(*tensors), tensors, torch.tensor(1e7, device=DEVICE))
    for a, e in zip(scaled[1:], expected[1:], strict=True):
        assert relative_error(a, e) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_rounds_once(dtype):
    """Without a compiler as well."""
    gradient = torch.randn(37, 157, device=DEVICE).to(dtype)
    upstream = torch.tensor(1 / 3, device=DEVICE)
    expected = (gradient.double() * upstream.double()).float().to(dtype)
    torch.testing.assert_close(scaled_kernel(gradient.mT, upstream).mT, expected, atol=0, rtol=0)
    torch.library.opcheck(scaled_kernel, (gradient, upstream))
    assert not scaled_kernel(torch.zeros_like(gradient), upstream / 0).any()


# -- logits that are not finite --------------------------------------------------------------------


@OPS
def test_classes_that_are_masked_out(op):
    """By an infinite logit: 0 log 0 is 0, and its gradient as well."""
    case = Case(op, takes=TAKES, weights="each", shape=(37, 157))
    tensors = case.make()
    given = case.named(tensors)
    given["target"] %= 100
    few = [given["input"], *(t.detach()[:100].clone().requires_grad_() for t in tensors[1:3])]
    expected = grads(case.total(*few, *tensors[3:]), few)
    given["bias"].data[100:] = -math.inf
    actual = grads(case.total(*tensors), tensors)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[: len(e)] if a.dim() else a, e)
        assert not a.dim() or not a[len(e) :].any()


def test_entropy_of_almost_certain_tokens():
    case = Case(ops.linear_token_losses, ("entropy",))
    tensors = case.make()
    tensors[2].data[5] += 1e4
    assert not any(result.any() for result in grads(case.fused(*tensors).sum(), tensors))


DIRECTIONS = pytest.mark.parametrize("takes", [TUNES[:1], TUNES[1:], TUNES], ids=str)


@OPS
@DIRECTIONS
@pytest.mark.parametrize("at", ["student", "teacher", "both"])
@pytest.mark.parametrize("infinity", [-math.inf, math.inf])
def test_infinite_logits(op, takes, at, infinity):
    """As eager has them, but that the gradient of the reverse is not nan for a single -inf."""
    case = Case(op, takes)
    tensors = case.make()
    given = case.named(tensors)
    for name, bias in (("student", given["bias"]), ("teacher", given["teacher_bias"])):
        if at in (name, "both"):
            bias.data[5] = infinity
    actual = grads(case.total(*tensors), tensors)
    expected = grads(case.eager_total(*tensors), tensors)
    torch.testing.assert_close(actual[0], expected[0], equal_nan=True)
    if infinity > 0 or takes == TUNES[:1]:
        torch.testing.assert_close(actual[1:], expected[1:], equal_nan=True)
    else:
        assert expected[1].isnan().all() and actual[1].isfinite().all()


@OPS
@DIRECTIONS
def test_a_class_left_out_gets_the_gradient_of_the_rest(op, takes):
    """A logit that is -inf for good is no class: the gradients are those without it."""
    case = Case(op, takes)
    tensors = case.make()
    x, weight, bias, *teacher = tensors
    bias.data[5] = teacher[2][5] = -math.inf
    actual = grads(case.total(*tensors), tensors)
    rest = [i for i in range(61) if i != 5]
    fewer = [x, weight[rest], bias[rest], teacher[0], *(t[rest] for t in teacher[1:])]
    fewer = in_fp64([t.detach().requires_grad_(i < 3) for i, t in enumerate(fewer)])
    expected = grads(case.eager_total(*fewer), fewer)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert relative_error(a[rest] if i > 1 else a, e) < 2e-6


@OPS
@pytest.mark.parametrize("beta", BETAS)
def test_a_class_of_probability_0(op, beta):
    """-inf is no class where both have it; where only one has, 0 log 0 is 0. Eager is finite where
    only the teacher has it, for ``F.kl_div`` of its probabilities, and agrees."""
    case = Case(op, (JSD,), beta=beta)
    tensors, others = case.make(), case.make()
    for each, least in ((tensors, -math.inf), (others, -1e4)):
        bias, teacher_bias = each[2].data, each[5]
        bias[5] = teacher_bias[5] = least
        teacher_bias[7] = -math.inf if least == -math.inf and beta < 1.0 else -1e4
        if beta > 0.0:
            bias[9] = least
    actual = grads(case.total(*tensors), tensors)
    expected = grads(case.eager_total(*others), others)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    if beta == 0.0:
        tensors[2].data[5] = 0.0
        log_q, p = F.linear(*tensors[:3]).log_softmax(1), F.linear(*tensors[3:]).softmax(1)
        eager = grads(F.kl_div(log_q, p, reduction="sum"), tensors)
        actual = grads(case.total(*tensors), tensors)
        torch.testing.assert_close(actual, eager, atol=1e-5, rtol=1e-5)


@OPS
def test_student_that_excludes_what_the_teacher_has_is_infinitely_far(op):
    case = Case(op, (JSD,), beta=0.0)
    tensors = case.make()
    tensors[2].data[5] = -math.inf
    assert case.total(*tensors) == case.eager_total(*tensors) == math.inf


@OPS
@DIRECTIONS
def test_rows_of_infinite_logits(op, takes):
    case = Case(op, takes, shape=(4, 61))
    tensors = case.make()
    tensors[2].data.fill_(-math.inf)
    actual, expected = case.total(*tensors), case.eager_total(*tensors)
    torch.testing.assert_close(actual, expected)  # 0: no class is left
    torch.testing.assert_close(grads(actual, tensors), grads(expected, tensors), equal_nan=True)


# -- without a GPU, and on one ---------------------------------------------------------------------


def test_broken_triton_falls_back_to_pytorch(caplog):
    library.liger_module.cache_clear()
    with mock.patch.dict("sys.modules", {"liger_kernel.ops.cross_entropy": None}):
        assert library.liger_module("cross_entropy") is None
    assert "plain PyTorch stands in" in caplog.text
    library.liger_module.cache_clear()


@pytest.mark.gpu
@OPS
@HEADS
def test_only_the_count_of_valid_tokens_is_waited_for(
    op, head
):  # A16; an event, no sync of torch's
    case = replace(head, op=op, chunk_tokens=256, weights="each")
    tensors = case.make((4096, 512))
    grads(case.total(*tensors), tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads(case.total(*tensors), tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@OPS
@HEADS
def test_can_be_captured_into_a_cuda_graph(op, head):  # A16
    case = replace(head, op=op, chunk_tokens=128, weights="each")
    tensors = case.make((512, 512))
    expected = grads(case.total(*tensors), tensors)
    torch.cuda.synchronize()
    # Autograd keeps the stream on which a leaf was first used.
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = grads(case.total(*leaves), leaves)
    graph.replay()
    for a, e in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("head", [Case(), Case(takes=("entropy", CE)), TWO], ids=str)
def test_more_than_two_billion_logits(head):
    whole = replace(head, chunk_tokens=17_000, skip=False)
    parts = replace(head, chunk_tokens=1024)
    tensors = whole.make((17_000, 128_256), torch.bfloat16)
    results = (grads(case.fused(*tensors), tensors) for case in (whole, parts))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-2
