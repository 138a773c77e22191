"""``liger_fx::attention`` under its plans, against a dense mask in fp64 and in eager."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from _op_checks import KernelCalls, no_compile_caches
from _util import CUDA, DEVICE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from liger_fx import ops

# The package has the op by that name.
implementation = importlib.import_module("liger_fx.ops.attention")
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.bfloat16]
B, HEADS, KEYS, S, D = 3, 6, 2, 24, 16  # rows, heads of queries and of keys, tokens, elements

# -- masks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """tokens: int [b, s], for `ops.document_plan` or, of zeros and ones, `ops.padding_plan`."""

    name: str
    make: Callable[..., tuple[Tensor, ...]] | None = None
    tokens: Callable[[int, int], Tensor] = torch.zeros
    window: int | None = None

    def __str__(self) -> str:
        return self.name

    def of(self, batch: int, size: int) -> tuple[Tensor | None, ...]:
        return (None,) * 4 if self.make is None else self.make(self.tokens(batch, size).to(DEVICE))

    def mask(self, batch: int, size: int) -> Tensor:
        """bool [b, 1, s, s]"""
        q, k = torch.arange(size)[:, None], torch.arange(size)[None]
        seen = (k <= q) & (q - k < (self.window or size))
        seen = seen.expand(batch, 1, size, size)
        if self.make is not None:
            tokens = self.tokens(batch, size)
            if self.make is ops.document_plan:
                seen = seen & (tokens[:, None, :, None] == tokens[:, None, None, :])
            else:
                seen = seen & tokens[:, None, None, :].bool()
        return seen.to(DEVICE)


def starts(share: float) -> Callable[[int, int], Tensor]:
    def documents(batch: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(batch, size, generator=generator) < share).cumsum(1)

    return documents


def runs(*bounds: tuple[float, float]) -> Callable[[int, int], Tensor]:
    """Valid from one share of a row to another, row by row."""

    def valid(batch: int, size: int) -> Tensor:
        made = torch.zeros(batch, size, dtype=torch.int64)
        for i in range(batch):
            first, end = bounds[i % len(bounds)]
            made[i, round(first * size) : round(end * size)] = 1
        return made

    return valid


def holes(batch: int, size: int) -> Tensor:
    return (torch.arange(size) % 4 != 1).long().expand(batch, size)


RIGHT, LEFT = runs((0, 1), (0, 0.3), (0, 0.8)), runs((0.4, 1), (0, 1), (0.9, 1))
PLANS = [
    Plan("causal"),
    Plan("window", window=5),
    Plan("window of one", window=1),
    Plan("wide window", window=1000),
    Plan("documents", ops.document_plan, starts(0.2)),
    Plan("documents of one token", ops.document_plan, lambda b, s: torch.arange(s).expand(b, s)),
    Plan("one document a row", ops.document_plan),
    Plan("documents in a window", ops.document_plan, starts(0.1), window=3),
    Plan("no padding", ops.padding_plan, runs((0, 1))),
    Plan("no padding in a window", ops.padding_plan, runs((0, 1)), window=4),
    Plan("padding after", ops.padding_plan, RIGHT),
    Plan("padding after, in a window", ops.padding_plan, RIGHT, window=4),
    Plan("padding before", ops.padding_plan, LEFT),
    Plan("padding before, in a window", ops.padding_plan, LEFT, window=4),
    Plan("padding on both sides", ops.padding_plan, runs((0.2, 0.7), (0.1, 1), (0, 0.5))),
    Plan("a row of padding", ops.padding_plan, runs((0, 0.5), (0, 0), (0.5, 1))),
    Plan("nothing but padding", ops.padding_plan),
    Plan("padding in between", ops.padding_plan, holes),
]
WITH_PLAN = [plan for plan in PLANS if plan.make]


class Shared(Plan):
    """Sequences with tokens in common, in each row of a batch."""

    # Of each sequence the parts of a row. The second begins as the first, the third as the second.
    # The fourth has no query of its own, and the fifth shares nothing.
    parts = (
        [(0, 0.4)],
        [(0, 0.2), (0.4, 0.6)],
        [(0, 0.2), (0.4, 0.5), (0.6, 0.8)],
        [(0, 0.3)],
        [(0.8, 1)],
    )

    def members(self, size: int) -> Tensor:
        token = torch.arange(size)
        bounds = [[(round(a * size), round(b * size)) for a, b in parts] for parts in self.parts]
        inside = [[(token >= a) & (token < b) for a, b in of] for of in bounds]
        return torch.stack([torch.stack(of).any(0) for of in inside])

    def of(self, batch: int, size: int) -> tuple[Tensor, ...]:
        members = self.members(size)
        return ops.sequence_plan(torch.block_diag(*[members] * batch).bool().to(DEVICE))

    def mask(self, batch: int, size: int) -> Tensor:
        members = self.members(size)
        place, query = members.cumsum(1), members.byte().argmax(0)
        ahead = place[query] - place[query].gather(1, torch.arange(size)[:, None])
        seen = members[query] & (ahead <= 0) & (ahead > -(self.window or size))
        return seen.expand(batch, 1, size, size).to(DEVICE)


SHARED = [
    Shared("sequences that begin alike", ops.sequence_plan),
    Shared("sequences that begin alike, in a window", ops.sequence_plan, window=4),
]
each_plan = pytest.mark.parametrize("plan", [*PLANS, *SHARED], ids=str)


def operands(dtype=DTYPES[0], batch=B, heads=HEADS, keys=KEYS, size=S, elements=D, grad=True):
    """[b, h, s, d], in memory as [b, s, h, d]."""
    torch.manual_seed(0)
    made = [torch.randn(batch, size, n, elements, device=DEVICE) for n in (heads, keys, keys)]
    return [t.to(dtype).transpose(1, 2).requires_grad_(grad) for t in made]


def fused(plan, query, key, value, scale=None):
    batch, _, size, elements = query.shape
    scale = elements**-0.5 if scale is None else scale
    return ops.attention(query, key, value, *plan.of(batch, size), plan.window, scale)


def under_mask(plan, query, key, value, scale=None):
    mask = plan.mask(query.shape[0], query.shape[2])
    return ops.masked_attention(query, key, value, mask, scale or query.shape[-1] ** -0.5)


def eager(plan, query, key, value, scale=None):
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    mask = plan.mask(query.shape[0], query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def exact(plan, query, key, value, scale=None):
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    seen = plan.mask(query.shape[0], query.shape[2])
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return weights.masked_fill(~seen, 0.0) @ value


def run(function, plan, tensors, lay=torch.Tensor.contiguous, **options):
    """lay: lays out the upstream gradient, [b, h, s, d]."""
    out = function(plan, *tensors, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    upstream = lay(upstream.to(out.device, tensors[0].dtype).to(out.dtype))
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


def check(plan, tensors, slack=3e-7, function=fused, **options):
    wide = [t.detach().double().requires_grad_() for t in tensors]
    wanted = run(exact, plan, wide, **options)
    ours, theirs = (run(f, plan, tensors, **options) for f in (function, eager))
    for a, b, e in zip(ours, theirs, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        error, bound = ((x.double() - e).norm() for x in (a, b))
        assert error <= 1.1 * bound + slack * (e.norm() + 1), (error, bound, e.norm())


# -- numerics -------------------------------------------------------------------------------------


@each_plan
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_exact_than_eager(plan, dtype):
    check(plan, operands(dtype, size=96), slack=3e-4 if dtype != torch.float32 else 3e-7)


class Other(Plan):
    """A mask that is none of a plan."""

    def mask(self, batch: int, size: int) -> Tensor:
        seen = torch.ones(batch, 1, size, size, dtype=torch.bool)
        if self.name == "random":
            generator = torch.Generator().manual_seed(0)
            seen = torch.rand(seen.shape, generator=generator) < 0.5
            seen[..., 0] = True
        return seen.to(DEVICE)


OTHERS = [Other("random"), Other("not causal")]


@pytest.mark.parametrize("plan", [*PLANS, *OTHERS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_under_a_mask_no_less_exact_than_eager(plan, dtype):
    slack = 3e-4 if dtype != torch.float32 else 3e-7
    check(plan, operands(dtype, size=96), slack, under_mask)


@pytest.mark.parametrize("size", [1, 2, 3, 24])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_values_of_a_mask_are_a_plan(plan, size):
    mask = plan.mask(B, size)
    found, window = implementation._plan_of(mask)
    assert found is not None
    query = torch.empty(B, 1, size, 8, device=DEVICE)
    seen = torch.zeros_like(mask)
    for at, _, within in implementation._parts(query, found, window):
        if at is ...:
            seen |= within
        else:
            rows, _, tokens = at
            seen[rows, :, tokens, tokens] = within
    assert torch.equal(seen, mask)


@pytest.mark.parametrize("plan", OTHERS, ids=str)
def test_values_of_a_mask_are_no_plan(plan):
    assert implementation._plan_of(plan.mask(B, S)) == (None, None)


def test_a_mask_is_read_once_for_all_layers(monkeypatch):
    read, tensors, mask = [], operands(), PLANS[4].mask(B, S)
    found = implementation._read_mask
    monkeypatch.setattr(implementation, "_read_mask", lambda m: read.append(m) or found(m))
    for reads in (1, 1, 2):
        if reads == 2:
            mask[:, :, 3:, 2] = False
        implementation._plan_of(mask)
        assert len(read) == reads
    with torch.inference_mode():  # writes are not counted
        mask = mask.clone()
        for reads in (3, 4):
            implementation._plan_of(mask)
            assert len(read) == reads
    if CUDA:
        mask = PLANS[4].mask(B, S)
        for _ in range(2):
            ops.masked_attention(*tensors, mask, 0.3).sum().backward()
        assert len(read) == 5


SHAPES = {
    "one token": {"size": 1},
    "two tokens": {"size": 2},
    "a prime number of tokens": {"size": 131},
    "a row": {"batch": 1},
    "a key for each query": {"keys": HEADS},
    "one key head": {"keys": 1},
    "64": {"elements": 64},
    "128": {"elements": 128},
    "256": {"elements": 256},
    "40": {"elements": 40},
}


@each_plan
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(plan, shape):
    check(plan, operands(**SHAPES[shape]), slack=2e-3 if CUDA else 1e-6)


@each_plan
def test_scale(plan):
    check(plan, operands(), slack=2e-3 if CUDA else 1e-6, scale=0.5)


@each_plan
@pytest.mark.parametrize("layout", ["heads first", "wider", "expanded"])
def test_layouts(plan, layout):
    lay = {
        "heads first": lambda t: t.contiguous(),
        "wider": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        "expanded": lambda t: t[:1].expand(t.shape),
    }[layout]
    laid = [lay(t.detach()).requires_grad_() for t in operands()]
    copied = [t.detach().contiguous().transpose(1, 2).contiguous() for t in laid]
    copied = [t.transpose(1, 2).requires_grad_() for t in copied]
    for a, e in zip(run(fused, plan, laid), run(fused, plan, copied), strict=True):
        torch.testing.assert_close(a, e)
        assert a.transpose(1, 2).is_contiguous()


GRADIENTS = {
    "heads first": lambda t: t.contiguous(),
    "sequence first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "elements first": lambda t: t.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "one number": lambda t: t.new_ones(()).expand(t.shape),
}


@each_plan
@pytest.mark.parametrize("layout", GRADIENTS)
@pytest.mark.parametrize("keys", [HEADS, 2])
def test_layouts_of_the_gradient(plan, layout, keys):
    """In torch 2.11 cuDNN's own is wrong where it differs from the output's."""
    check(plan, operands(keys=keys, elements=64), 2e-3 if CUDA else 1e-6, lay=GRADIENTS[layout])


def test_no_rows():
    tensors = operands(batch=0)
    assert run(fused, PLANS[0], tensors)[0].shape == (0, HEADS, S, D)


# -- as an operator -------------------------------------------------------------------------------


@each_plan
def test_opcheck(plan):
    tensors = operands(size=8, elements=8)
    arguments = (*tensors, *plan.of(B, 8), plan.window, 0.3)
    torch.library.opcheck(ops.attention, arguments)
    with KernelCalls() as kernels:
        run(fused, plan, tensors)
    assert len(kernels.calls) == 2 + (plan.make in (ops.document_plan, ops.padding_plan))
    for kernel, given in kernels.calls:
        torch.library.opcheck(kernel, given, test_utils=("test_schema", "test_faketensor"))


def planned(made):
    """`fused`, with a plan that is there already."""

    def attend(plan, query, key, value):
        return 2 * ops.attention(query, key, value, *made, plan.window, D**-0.5)

    return attend


@each_plan
def test_compiled(plan):
    tensors, attend = operands(), planned(plan.of(B, S))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for a, e in zip(run(compiled, plan, tensors), run(attend, plan, tensors), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("plan", [PLANS[4], OTHERS[0]], ids=str)
def test_under_a_mask_as_an_operator(plan):
    tensors, mask = operands(), plan.mask(B, S)
    torch.library.opcheck(ops.masked_attention, (*tensors, mask, 0.3))
    with KernelCalls() as kernels:
        run(under_mask, plan, tensors)
    for kernel, given in kernels.calls:
        torch.library.opcheck(kernel, given, test_utils=("test_schema", "test_faketensor"))
        assert torch.Tag.cudagraph_unsafe in kernel.tags

    def attend(plan, query, key, value):
        return 2 * ops.masked_attention(query, key, value, mask, D**-0.5)

    for backend in ("aot_eager", "inductor"):
        with no_compile_caches():
            compiled = torch.compile(attend, fullgraph=True, backend=backend)
            for a, e in zip(run(compiled, plan, tensors), run(attend, plan, tensors), strict=True):
                torch.testing.assert_close(a, e)


@pytest.mark.parametrize("plan", [PLANS[1], PLANS[4], PLANS[10], SHARED[1]], ids=str)
def test_compiled_by_inductor(plan):
    tensors, attend = operands(), planned(plan.of(B, S))
    with no_compile_caches():
        compiled = torch.compile(attend, fullgraph=True)
        for a, e in zip(run(compiled, plan, tensors), run(attend, plan, tensors), strict=True):
            torch.testing.assert_close(a, e)


@each_plan
def test_two_backwards(plan):
    tensors = operands()
    out = fused(plan, *tensors)
    first, again = (
        torch.autograd.grad(out, tensors, torch.ones_like(out), retain_graph=True) for _ in "12"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) or CUDA
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), tensors, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("plan", WITH_PLAN, ids=str)
def test_a_plan_keeps_no_tokens(plan):
    """Whoever writes to the documents or to the padding later changes nothing."""
    tokens = plan.tokens(B, S).contiguous()
    before = [t.clone() for t in plan.make(tokens)]
    made = plan.make(tokens)
    tokens.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(made, before, strict=True))


def test_sequences_with_no_token_in_common_are_segments():
    members = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    segments, _, keys, facts = ops.sequence_plan(members)
    assert segments.tolist() == [[0, 2, 5]] and not keys.numel()
    assert facts.tolist() == [implementation.Kind.SEGMENTS, 2, 3, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
def test_padding_of_any_dtype(dtype):
    wanted, made = (ops.padding_plan(RIGHT(B, S).to(d)) for d in (torch.int64, dtype))
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


def test_flops_are_counted():
    tensors = operands()
    plan = PLANS[4]
    counted = []
    for function in (fused, eager):
        with FlopCounterMode(display=False) as counter:
            run(function, plan, tensors)
        counted.append(counter.get_total_flops())
    assert counted[0] > 0 and (not CUDA or counted[0] == counted[1])


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_rows_of_padding_without_a_gradient(plan):
    """As where they have no labels: the second call has nothing to do in its backward."""
    tensors = operands()
    seen = plan.tokens(B, S)[:, None, :, None].bool().to(DEVICE) if plan.make else 1

    def masked(function):
        return lambda plan, *given: function(plan, *given) * seen

    for a, b in zip(
        run(masked(fused), plan, tensors), run(masked(eager), plan, tensors), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-2 if CUDA else 1e-5, rtol=2e-2)


@pytest.mark.gpu
@each_plan
def test_no_memory_is_read_before_it_is_written(plan):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert all(t.isfinite().all() for t in run(fused, plan, operands()))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@each_plan
def test_only_the_plan_waits_for_the_gpu(plan):
    tensors, given = operands(), plan.of(B, S)
    arguments = (*given, plan.window, D**-0.5)
    ops.attention(*tensors, *arguments).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.attention(*tensors, *arguments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
