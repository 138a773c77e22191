"""Deferred logits against the same logits computed at once."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _util import TOLERANCES, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from liger_fx import deferred
from liger_fx.deferred import DeferredLogits, Head, materialized

B, S, H, V = 3, 5, 8, 11


def softcapped(hidden: Tensor, weight: Tensor) -> Tensor:
    return 5 * torch.tanh(F.linear(hidden, weight) / 5)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(deferred, "chunk_tokens_for", lambda *_: 4)


class Case:
    """The same head on the same leaves, at once and deferred."""

    def __init__(self, lead: tuple[int, ...] = (B, S), dtype: torch.dtype = torch.float32) -> None:
        self.leaf = torch.randn(*lead, H).to(dtype).requires_grad_()
        self.weight = torch.randn(V, H).to(dtype).requires_grad_()
        self.dtype = dtype

    def eager(self) -> Tensor:
        return softcapped(self.leaf * 1, self.weight)

    def deferred(self) -> Any:
        head, hidden = Head(softcapped, (self.weight,)), self.leaf * 1
        grad = torch.is_grad_enabled()
        return DeferredLogits(head, hidden, classes=V, dtype=self.dtype, requires_grad=grad)

    def exact(self) -> Case:
        wide = Case.__new__(Case)
        wide.leaf, wide.weight = (
            t.detach().double().requires_grad_() for t in (self.leaf, self.weight)
        )
        wide.dtype = torch.float64
        return wide

    def gradients(self, outcome: Any) -> tuple[Tensor, ...]:
        tensors = [t for t in tree_leaves(outcome) if isinstance(t, Tensor) and t.requires_grad]
        loss = sum((t.double() * _weights(t)).sum() for t in tensors)
        return torch.autograd.grad(loss, (self.leaf, self.weight))


def _weights(like: Tensor) -> Tensor:
    return torch.linspace(-1, 2, like.numel(), dtype=torch.float64).view(like.shape)


def same(use: Callable[[Any], Any], case: Case | None = None, reads: int | None = None) -> None:
    """``use`` gives the same values, metadata and gradients, after ``reads`` reads of values."""
    case = case or Case()
    before = materialized()
    actual, expected = use(case.deferred()), use(case.eager())
    if reads is not None:
        assert materialized() - before == reads
    tolerance = TOLERANCES[case.dtype]
    pairs = list(zip(tree_leaves(actual), tree_leaves(expected), strict=True))
    for a, e in pairs:
        if not isinstance(e, Tensor):
            assert a == e
            continue
        assert (a.shape, a.dtype, a.requires_grad) == (e.shape, e.dtype, e.requires_grad)
        torch.testing.assert_close(a + 0, e + 0, rtol=10 * tolerance, atol=10 * tolerance)
    if any(isinstance(e, Tensor) and e.requires_grad for _, e in pairs):
        exact = case.exact()
        reference = exact.gradients(use(exact.eager()))
        eager = case.gradients(use(case.eager()))
        for a, b, e in zip(case.gradients(actual), eager, reference, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert relative_error(a, e) <= 1.5 * relative_error(b, e) + tolerance


@pytest.fixture
def case():
    return Case()


LABELS = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(0))
LABELS[0, :2] = LABELS[2, 1] = -100
INDEX = torch.randint(V, (B, S, 2), generator=torch.Generator().manual_seed(1))
MASK = LABELS % 2 == 0

METADATA: dict[str, Callable[[Any], Any]] = {
    "attributes": lambda x: [
        str((x.shape, x.dtype, x.device, x.layout, x.ndim, x.is_leaf, x.requires_grad, x.is_cuda)),
        str((x.grad_fn is None, x.grad, x.itemsize, x.nbytes, x._base)),
    ],
    "methods": lambda x: [
        str((x.size(), x.size(-1), x.dim(), x.numel(), x.stride(), x.is_contiguous(), len(x))),
        str((x.is_floating_point(), x.element_size(), x.get_device(), x.type())),
    ],
    "functions": lambda x: [str((torch.numel(x), torch.is_floating_point(x), torch.is_tensor(x)))],
    "strides": lambda x: [x[:, 1:].stride(), x[:, 1:].is_contiguous(), x[1].storage_offset()],
}


@pytest.mark.parametrize("use", METADATA.values(), ids=METADATA)
def test_metadata(use):
    same(use, reads=0)


# Read at the end: by a reduction over classes, which computes by chunks.
ROWS: dict[str, Callable[[Any], Any]] = {
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "shifted": lambda x: x[..., :-1, :].contiguous().view(-1, V),
    "float": lambda x: x.float(),
    "bfloat16": lambda x: x.bfloat16().float(),
    "half": lambda x: torch.Tensor.half(x),
    "type": lambda x: x.type(torch.float64),
    "type_as": lambda x: x.type_as(torch.ones(1, dtype=torch.float64)),
    "to dtype": lambda x: x.to(torch.float64),
    "to device": lambda x: x.to("cpu").to(torch.device("cpu"), torch.bfloat16),
    "to other": lambda x: x.to(torch.ones(1, dtype=torch.float64)),
    "to copy": lambda x: x.to(x.dtype, copy=True),
    "view": lambda x: x.view(-1, V),
    "reshape": lambda x: torch.reshape(x, (S, B, V)),
    "flatten": lambda x: torch.flatten(x, 0, 1),
    "unflatten": lambda x: x.unflatten(0, (B, 1)),
    "squeeze": lambda x: x[:1].squeeze(0),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0, 2),
    "int": lambda x: x[1],
    "ints": lambda x: x[1, 2],
    "last": lambda x: x[:, -1, :],
    "none": lambda x: x[None, :, None],
    "ellipsis": lambda x: x[..., 1, :],
    "mask": lambda x: x[MASK],
    "mask of a dimension": lambda x: x[:, MASK[0]],
    "index tensor": lambda x: x[:, torch.tensor([3, 0, 0])],
    "index tensors": lambda x: x[torch.tensor([0, 2]), torch.tensor([1, 1])],
    "0-dim index": lambda x: x[torch.tensor(1)],
    "list": lambda x: x[[0, 2]],
    "select": lambda x: x.select(1, 0),
    "narrow": lambda x: torch.narrow(x, 1, 1, 3),
    "index_select": lambda x: x.index_select(0, torch.tensor([2, 2])),
    "chain": lambda x: x[1:].float()[:, :-1].transpose(0, 1)[2:].detach(),
}


@pytest.mark.parametrize("use", ROWS.values(), ids=ROWS)
def test_rows(use):
    same(lambda x: use(x).argmax(-1), reads=0)
    same(lambda x: use(x).logsumexp(-1), reads=0)
    same(lambda x: use(x).cos())


def test_several_rows():
    same(lambda x: [t.logsumexp(-1) for t in x.split(2, dim=1)], reads=0)
    same(lambda x: [t.logsumexp(-1) for t in x.chunk(2)], reads=0)
    same(lambda x: torch.stack([t.logsumexp(-1) for t in x]), reads=0)


CHUNKED: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda x: (x.argmax(-1), torch.argmax(x, dim=2, keepdim=True)),
    "argmin": lambda x: torch.argmin(input=x, dim=-1),
    "max": lambda x: tuple(x.max(dim=-1)),
    "max values": lambda x: torch.max(x, -1, keepdim=True).values,
    "amax": lambda x: x.amax((-1,)),
    "min": lambda x: tuple(torch.min(x, -1)),
    "topk": lambda x: tuple(x.topk(3)),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True),
    "sum": lambda x: (x.sum(-1), x.mean(dim=-1)),
    "gather": lambda x: x.gather(-1, INDEX),
    "log-probabilities": lambda x: torch.gather(x.log_softmax(-1), 2, INDEX[..., :1]).squeeze(-1),
    "temperature": lambda x: (x / 0.7).softmax(-1).amax(-1),
    "temperature tensor": lambda x: torch.div(x, torch.tensor(0.7)).logsumexp(-1),
    "softcap": lambda x: (30 * torch.tanh(x / 30)).logsumexp(-1),
    "entropy": lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1),
    "entropy of exp": lambda x: -(F.log_softmax(x, -1).exp() * F.log_softmax(x, -1)).sum(dim=-1),
    "entropy of a slice": lambda x: (
        -(x[:, :-1].softmax(-1) * x[..., :-1, :].log_softmax(-1)).sum(-1)
    ),
    "trl's entropy": lambda x: torch.logsumexp(x, -1) - (F.softmax(x, dim=-1) * x).sum(-1),
    "torch's entropy": lambda x: torch.distributions.Categorical(
        logits=x, validate_args=False
    ).entropy(),
    "cross-entropy": lambda x: F.cross_entropy(x.view(-1, V).float(), LABELS.view(-1)),
    "module": lambda x: torch.nn.CrossEntropyLoss()(x.flatten(0, 1), LABELS.flatten()),
    "shifted": lambda x: F.cross_entropy(
        x[..., :-1, :].contiguous().view(-1, V), LABELS[..., 1:].reshape(-1), reduction="sum"
    ),
    "weights": lambda x: F.cross_entropy(
        x.view(-1, V), LABELS.view(-1), torch.arange(1, V + 1).to(x.dtype), label_smoothing=0.1
    ),
    "per token": lambda x: F.cross_entropy(
        x.view(-1, V), LABELS.view(-1), reduction="none", label_smoothing=0.1
    ),
    "nll": lambda x: F.nll_loss(F.log_softmax(x.view(-1, V), dim=-1), LABELS.view(-1)),
    "all ignored": lambda x: F.cross_entropy(
        x.view(-1, V), torch.full((B * S,), -100), reduction="sum"
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", CHUNKED.values(), ids=CHUNKED)
def test_by_chunks(use, dtype):
    same(use, Case(dtype=dtype), reads=0)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0), (1, 1)], ids=str)
def test_shapes(lead):
    case = Case(lead)
    same(lambda x: (x.logsumexp(-1), x.argmax(-1), x.log_softmax(-1).max(-1).values), case, 0)
    same(lambda x: x + 1, case)
    same(lambda x: x.detach().tolist(), case)
    labels = torch.zeros(lead, dtype=torch.int64)
    if len(lead) < 2:
        same(lambda x: F.cross_entropy(x, labels, reduction="sum"), case, 0)


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "tolist": lambda x: x[0, 0].tolist() and None,
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x.detach(), x]),
    "matmul": lambda x: x @ torch.ones(V, 2).to(x.dtype),
    "full": lambda x: x + torch.ones(B, S, V).to(x.dtype),
    "another dimension": lambda x: (x.logsumexp(1), x.softmax(0), x.max(), x.argmax()),
    "classes": lambda x: (x[..., :3], x[..., 0], x.transpose(1, 2), x.flatten()),
    "class dimension": lambda x: F.cross_entropy(x.transpose(1, 2), LABELS),
    "soft labels": lambda x: F.cross_entropy(
        x.view(-1, V), torch.full((B * S, V), 1 / V).to(x.dtype)
    ),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "deepcopy of one twice": lambda x: len(set(map(id, copy.deepcopy([y := x.detach(), y])))),
    "copy": lambda x: copy.copy(x.detach()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "save": lambda x: _saved(x),
    "array": lambda x: torch.as_tensor(x.detach().__array__()),
    "compare": lambda x: (x == x, torch.isnan(x).any()),
}


def _saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"logits": x.detach()}, file)
    file.seek(0)
    return torch.load(file)["logits"]


@pytest.mark.parametrize("use", COMPUTED.values(), ids=COMPUTED)
def test_computed(use):
    same(use)


def test_one_computation(case):
    logits, before = case.deferred(), materialized()
    values = logits.materialize()
    assert type(values) is Tensor and torch.equal(values, case.eager())
    assert logits.materialize() is values and type(torch.cat([logits])) is Tensor
    logits.detach().numpy(), logits.view(-1, V).cos(), logits.exp().argmax(-1)
    assert logits.data_ptr() == values.data_ptr()
    assert materialized() - before == 1


def test_a_detached_read_computes_for_all(case):
    logits, before = case.deferred(), materialized()
    logits.detach().cpu().numpy()
    logits.cos()
    assert materialized() - before == 1


def test_hidden_states_with_the_sequence_first_in_memory(case):
    """As Megatron's are: their rows are a copy."""
    case.leaf = torch.randn(S, B, H).transpose(0, 1).requires_grad_()
    case.weight.requires_grad_(False)
    (actual,), (expected,) = (
        torch.autograd.grad(softly(), case.leaf)
        for softly in (
            lambda: case.deferred().float().pow(2).sum(),
            lambda: case.eager().pow(2).sum(),
        )
    )
    torch.testing.assert_close(actual, expected)


def test_gradients_beside_other_uses(case):
    def use(logits_of: Callable[[Tensor], Any]) -> tuple[Tensor, ...]:
        hidden = case.leaf * 2
        logits = logits_of(hidden)
        loss = hidden.pow(2).sum() + logits.cos().sum() + logits.logsumexp(-1).sum()
        loss = loss + logits.sin().sum() + F.linear(hidden, case.weight).sum()
        leaves = case.leaf, case.weight
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        return *once, *torch.autograd.grad(loss, leaves)

    head = Head(softcapped, (case.weight,))
    kind = dict(classes=V, dtype=torch.float32, requires_grad=True)
    actual = use(lambda hidden: DeferredLogits(head, hidden, **kind))
    torch.testing.assert_close(actual, use(lambda hidden: softcapped(hidden, case.weight)))


def test_tied_embeddings(case):
    """The hidden states depend on the head's weight, which gets each gradient once."""

    def use(logits_of: Callable[[Tensor], Any]) -> list[Tensor]:
        logits = logits_of(case.weight[LABELS.clamp(min=0)].tanh())
        losses = [logits.cos().sum(), logits.logsumexp(-1).sum()]
        losses += [F.cross_entropy(logits.view(-1, V), LABELS.view(-1))]
        losses += [torch.distributions.Categorical(logits=logits).entropy().sum()]
        return [torch.autograd.grad(x, case.weight, retain_graph=True)[0] for x in losses]

    head = Head(softcapped, (case.weight,))
    kind = dict(classes=V, dtype=torch.float32, requires_grad=True)
    actual = use(lambda hidden: DeferredLogits(head, hidden, **kind))
    torch.testing.assert_close(actual, use(lambda hidden: softcapped(hidden, case.weight)))


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.cos().sum(),
        lambda x: x.logsumexp(-1).sum(),
        lambda x: F.cross_entropy(x.view(-1, V), LABELS.view(-1)),
    ],
    ids=["read", "chunks", "cross-entropy"],
)
def test_gradients_of_gradients(case, use):
    leaves = case.leaf, case.weight

    def second(logits: Any) -> Any:
        first = torch.autograd.grad(use(logits), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    torch.testing.assert_close(second(case.deferred()), second(case.eager()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_first_read_without_grad(case, mode):
    logits = case.deferred()
    with mode():
        assert not (logits.cos().requires_grad or logits.logsumexp(-1).requires_grad)
    expected = case.gradients(case.eager().cos())
    torch.testing.assert_close(case.gradients(logits.cos()), expected)
    assert torch.is_grad_enabled()


def test_view_made_without_grad(case):
    """In eager such a view says that it requires a gradient, and gives none to the logits."""

    def use(x: Any) -> Any:
        with torch.no_grad():
            flat = x.view(-1, V)
            assert flat.logsumexp(-1).requires_grad is False
        loss = flat.cos().sum() + flat[1:].logsumexp(-1).sum() + x.cos().sum()
        return flat.requires_grad, torch.autograd.grad(loss, (case.leaf, case.weight))

    torch.testing.assert_close(use(case.deferred()), use(case.eager()))


def test_made_in_inference_mode(case):
    with torch.inference_mode():
        logits = case.deferred()
        assert torch.equal(logits.view(-1, V).argmax(-1), case.eager().view(-1, V).argmax(-1))
    assert torch.equal(logits.cos(), case.eager().cos().detach())


def test_a_graph_that_was_freed(case):
    logits = case.deferred()
    logits.cos().sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        logits.sin().sum().backward()


def test_frozen_parameters(case):
    case.weight.requires_grad_(False)
    for use in (lambda x: x.cos(), lambda x: x.logsumexp(-1), lambda x: x.sum(-1)):
        actual, expected = (
            torch.autograd.grad(use(x).sum(), case.leaf) for x in (case.deferred(), case.eager())
        )
        torch.testing.assert_close(actual, expected)


WRITES: dict[str, Callable[[Any], Any]] = {
    "mask": lambda x: x.__setitem__(x > 1, 0.0),
    "method": lambda x: x.div_(3.0),
    "operator": lambda x: x.__imul__(2),
    "view": lambda x: x[:, -1].div_(3.0),
    "view of a view": lambda x: x[1:].view(-1, V)[3].zero_(),
    "view that was read": lambda x: (x[1].cos(), x[1].exp_()),
    "rows": lambda x: x.__setitem__((slice(None), 1), 7.0),
    "function": lambda x: F.relu(x, inplace=True),
    "positional": lambda x: F.relu(x[0], True),
    "operator overload": lambda x: torch.ops.aten.relu_.default(x[1]),
    "foreach": lambda x: torch._foreach_mul_([x[1], x[2]], 3),
    "functions": lambda x: torch.relu_(x[0]),
    "tensor": lambda x: x.mul_(torch.full((V,), 2.0)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_are_seen(write):
    def use(x: Any) -> Any:
        before, copied, row = x.view(-1, V), x.clone(), x[1]
        write(x)
        after = x[:, 1:]
        return [t * t for t in (x, before, copied, row, after)] + [after.logsumexp(-1)]

    same(use)


def test_arguments_that_change_later():
    def use(x: Any) -> Any:
        end, shape = torch.tensor(2), [B * S, V]
        part, flat = x[:, :end], x.view(shape)
        end.fill_(4), shape.reverse()
        x.mul_(2)
        return part * 1, flat * 1

    same(use)


def test_writes_to_detached(case):
    def use(x: Any) -> Any:
        x.detach()[0].zero_()
        return x + 0

    torch.testing.assert_close(use(case.deferred()), use(case.eager()))


def test_writes_through_the_values(case):
    logits = case.deferred()
    row = logits[1]
    with torch.no_grad():
        logits.materialize().zero_()
    assert not row.any() and not logits.any()


def test_out():
    same(lambda x: torch.add(torch.ones(B, S, V), 1, out=x.detach()))


def test_writes_to_memory_that_was_given_away(case):
    logits = case.deferred()
    memory = logits[1].detach().numpy()
    with torch.no_grad():
        logits.zero_()
    assert not memory.any() and not logits.any()
    logits = case.deferred().detach()
    torch.ops.test_deferred.fill(logits[1])
    assert logits[1].eq(7).all() and not logits[0].eq(7).any()


@torch.library.custom_op("test_deferred::fill", mutates_args=("x",))
def _fill(x: Tensor) -> None:
    x.fill_(7.0)


def test_autograd_function_that_writes():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            x.mul_(2)
            ctx.mark_dirty(x)
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    def use(x: Any) -> Any:
        Doubled.apply(x)
        return x.cos(), x[1].logsumexp(-1)

    same(use)


@pytest.mark.parametrize(
    "forward",
    [lambda x: x, lambda x: x.view_as(x), lambda x: x.clone(), lambda x: x.view(-1, V), torch.cos],
    ids=["same", "view", "clone", "rows", "values"],
)
def test_autograd_functions(forward):
    """Their backward is not left out, also where their output stays deferred."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return -grad.view(B, S, V)

    def use(x: Any) -> Any:
        y = Reversed.apply(x)
        return y.logsumexp(-1), y[1:].cos(), x.cos()

    same(use)


def test_stale_hidden_and_parameters():
    case = Case()
    read, unread, view = case.deferred(), case.deferred(), case.deferred()[1]
    values = read.cos()
    with torch.no_grad():
        case.weight.add_(1)
    for use in (lambda: unread.cos(), lambda: view.argmax(-1), lambda: unread.view(-1, V).cos()):
        with pytest.raises(
            RuntimeError, match=r"parameter 0 of the head, of shape \[11, 8\], was w"
        ):
            use()
    assert torch.equal(read.cos(), values) and unread.shape == (B, S, V)
    hidden = torch.randn(B, H)
    head = Head(softcapped, (case.weight,))
    logits = DeferredLogits(head, hidden, classes=V, dtype=torch.float32, requires_grad=False)
    hidden.zero_()
    with pytest.raises(RuntimeError, match=r'hidden state.*materialize.*logits="keep"'):
        logits.argmax(-1)


def test_resharded_parameters(case):
    logits = case.deferred()
    case.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"parameter 0 .* was resharded or freed"):
        logits.cos()


def test_autocast_is_that_of_the_head(case):
    head, hidden = Head(F.linear, (case.weight,)), case.leaf * 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = F.linear(hidden, case.weight)
        logits: Any = DeferredLogits(
            head, hidden, classes=V, dtype=expected.dtype, requires_grad=True
        )
        assert logits.softmax(-1).dtype == expected.softmax(-1).dtype
        inside = logits.float().logsumexp(-1)
    assert torch.equal(inside, expected.float().logsumexp(-1))
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert torch.equal(logits, expected) and logits.dtype == torch.bfloat16
    logits.float().pow(2).sum().backward()
    assert case.weight.grad.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made, and the functions that ran."""

    elements = 0

    def __init__(self):
        super().__init__()
        self.functions = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.functions.add(func)
        outcome = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(outcome) if isinstance(t, Tensor) and not t.is_meta]
        made = [t for t in made if type(t) is not DeferredLogits]  # without memory
        sizes = [t.untyped_storage().nbytes() // t.itemsize for t in made]
        self.elements = max([self.elements, *sizes])
        return outcome


def test_no_tensor_of_all_logits(case):
    rows, classes = 64, 50
    hidden = torch.randn(rows, H, requires_grad=True)
    weight = torch.randn(classes, H, requires_grad=True)
    labels = torch.randint(classes, (rows,))
    with Largest() as largest:
        logits: Any = DeferredLogits(
            Head(softcapped, (weight,)),
            hidden,
            classes=classes,
            dtype=torch.float32,
            requires_grad=True,
        )
        log_probs = logits.float().log_softmax(-1)
        loss = F.cross_entropy(logits, labels) - (log_probs.exp() * log_probs).sum(-1).mean()
        loss = loss + log_probs.gather(-1, labels[:, None]).sum() + logits.logsumexp(-1).sum()
        logits.argmax(-1), logits.topk(2), logits.max(-1)
        for part in (logits[::2], logits[labels < 9], logits.index_select(0, labels[:20])):
            loss = loss + part.logsumexp(-1).sum()
        loss.backward()
    assert largest.elements <= max(hidden.numel(), weight.numel()) < rows * classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy_of_a_projection_is_fused(dtype, reduction, with_bias):
    leaves = [torch.randn(B, S, H), torch.randn(V, H), torch.randn(V)][: 2 + with_bias]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]

    def loss(logits: Any) -> Tensor:
        logits = logits[:, :-1].float().reshape(-1, V)
        labels = LABELS[:, 1:].reshape(-1)
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=0.1)

    def deferred_logits(hidden: Tensor, *parameters: Tensor) -> Any:
        kind = dict(classes=V, dtype=dtype, requires_grad=hidden.requires_grad)
        return DeferredLogits(Head(F.linear, parameters), hidden, **kind)

    with Largest() as made:
        actual = loss(deferred_logits(leaves[0] * 1, *leaves[1:]))
    assert torch.ops.liger_fx.linear_loss_kernel.default in made.functions
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected, reference = loss(F.linear(*leaves)), F.linear(*exact)
    torch.testing.assert_close(actual, expected)
    with Largest() as scaling:
        grads = torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)
    assert torch.ops.liger_fx.scaled.default in scaling.functions  # not step by step
    precise = torch.autograd.grad(
        F.cross_entropy(
            reference[:, :-1].reshape(-1, V),
            LABELS[:, 1:].reshape(-1),
            reduction=reduction,
            label_smoothing=0.1,
        ),
        exact,
    )
    for a, b, e in zip(*grads, precise, strict=True):
        assert relative_error(a, e) <= 1.1 * relative_error(b, e) + TOLERANCES[dtype]
    with torch.no_grad():
        assert torch.equal(loss(deferred_logits(*leaves)), actual)


def test_memory(case):
    """Nothing of the size of the logits is held before a read, and all is freed without a gc."""
    gc.collect()
    gc.disable()
    try:
        for read in (False, True):
            hidden = case.leaf * 1
            watched = weakref.ref(hidden)
            head, kind = Head(softcapped, (case.weight,)), dict(dtype=case.dtype)
            with Largest() as largest:
                logits: Any = DeferredLogits(head, hidden, classes=V, requires_grad=True, **kind)
                views = logits.view(-1, V), logits[:, 1:], logits.float().log_softmax(-1)
                assert largest.elements <= hidden.numel()
            if read:
                (logits.cos().sum() + views[1].sum() + views[2].logsumexp(-1).sum()).backward()
            del hidden
            assert watched() is not None
            del logits, views
            assert watched() is None
    finally:
        gc.enable()


def test_accelerate(case):
    operations = pytest.importorskip("accelerate.utils.operations")
    state = pytest.importorskip("accelerate.state").PartialState(cpu=True)
    logits, before = case.deferred(), materialized()
    outputs = operations.convert_to_fp32({"logits": logits.bfloat16()})
    assert type(outputs["logits"]) is DeferredLogits and materialized() == before
    padded = operations.pad_across_processes(outputs, dim=1, pad_index=-100)
    whole = operations.concatenate([padded, padded])["logits"]
    assert state.num_processes == 1 and type(whole) is Tensor
    torch.testing.assert_close(whole[:B], case.eager().bfloat16().float())


def test_hooks(case):
    def use(x: Any) -> Any:
        seen: list[Tensor] = []
        x.register_hook(lambda grad: seen.append(grad) or grad * 2)
        return seen, case.gradients((x.cos(), x.view(-1, V).logsumexp(-1)))

    torch.testing.assert_close(use(case.deferred()), use(case.eager()))


def test_retain_grad(case):
    def use(x: Any) -> Any:
        x.retain_grad()
        (x.cos().sum() + x.logsumexp(-1).sum()).backward()
        return x.grad

    torch.testing.assert_close(use(case.deferred()), use(case.eager()))


@pytest.mark.parametrize("use", [torch.cos, lambda x: x.logsumexp(-1)], ids=["read", "chunks"])
def test_gradient_of_logits(case, use):
    def gradient(logits: Any) -> Tensor:
        return torch.autograd.grad(use(logits).sum(), logits)[0]

    torch.testing.assert_close(gradient(case.deferred()) + 0, gradient(case.eager()))


def test_leaf(case):
    with torch.no_grad():
        logits = case.deferred()
    logits.requires_grad_()
    logits.cos().sum().backward()
    torch.testing.assert_close(logits.grad, -case.eager().sin().detach())


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "liger_fx"])
def test_input_of_a_compiled_function(case, backend):
    options = {"inner": "aot_eager"} if backend == "liger_fx" else None
    compiled = torch.compile(lambda x, y: (x * 2 + y).sin(), backend=backend, options=options)
    logits, before = case.deferred(), materialized()
    outcome = compiled(logits, torch.ones(V))
    assert type(outcome) is Tensor and materialized() - before == 1
    expected = (case.eager() * 2 + 1).sin()
    torch.testing.assert_close(outcome, expected)
    torch.testing.assert_close(case.gradients(outcome), case.gradients(expected))


def test_representation(case):
    logits, before = case.deferred(), materialized()
    assert "not computed" in repr(logits) and "shape=[3, 5, 11]" in f"{logits}"
    assert materialized() == before
    logits.materialize()
    assert repr(logits) == repr(logits.materialize())


def test_log(case, caplog):
    deferred._readers.clear()
    with caplog.at_level(logging.INFO, "liger_fx"):
        for _ in range(2):
            case.deferred().view(-1, V).cos()
    (record,) = caplog.records
    assert f"{__file__}:" in record.message and "0.0 MiB" in record.message


def test_wrong_metadata(case):
    head = Head(softcapped, (case.weight,))
    logits = DeferredLogits(head, case.leaf, classes=V + 1, dtype=torch.float32, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"returned rows of 11 torch.float32, but"):
        logits.cos()


def test_errors_are_those_of_the_values(case):
    for use in (
        lambda x: x[9],
        lambda x: x[torch.tensor([9])],
        lambda x: x[torch.ones(2, 2, dtype=torch.bool)],
        lambda x: F.cross_entropy(x.view(-1, V), torch.full((B * S,), 99)),
    ):
        with pytest.raises(IndexError):
            use(case.deferred())
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        case.deferred().view(7, V)


def test_as_many_rows_as_classes():
    """A tensor [V] is for classes where it broadcasts, and for rows where it is a target."""
    case, per_class, labels = Case((V,)), torch.arange(1.0, V + 1), torch.arange(V)
    same(lambda x: (x * per_class).logsumexp(-1), case, 0)
    same(lambda x: F.cross_entropy(x, labels, per_class.to(x.dtype)), case, 0)
    same(lambda x: F.cross_entropy(x.transpose(0, 1), labels), case)


def test_a_source_of_a_copy_is_not_written(case):
    logits = case.deferred()
    loss = logits.sin().sum()
    torch.empty(B, S, V).copy_(logits.detach())
    torch._foreach_copy_([torch.empty(B, S, V)], [logits.detach()])
    torch.testing.assert_close(case.gradients(loss), case.gradients(case.eager().sin().sum()))


def test_gradients_of_parts_together():
    """Slices, masks and casts of one tensor, each with its own loss."""
    labels = LABELS.clamp(min=0)

    def use(x: Any) -> Any:
        wide = x[:, :-1].float()
        picked = wide.log_softmax(-1).gather(-1, labels[:, 1:, None]).squeeze(-1)
        losses = [picked, x[MASK].logsumexp(-1), x[1:, 2:].logsumexp(-1), x[0, 0].exp().sum(-1)]
        return [*losses, F.cross_entropy(wide.reshape(-1, V), LABELS[:, 1:].reshape(-1))]

    same(use, reads=0)
    same(use, Case(dtype=torch.bfloat16), reads=0)


def test_a_hook_changes_the_gradient_of_a_fused_loss():
    hidden, weight = torch.randn(B, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.tensor([1, -100, 3])

    def gradients(logits: Any) -> Any:
        logits.register_hook(lambda grad: grad * 2)
        loss = F.cross_entropy(logits, labels) + logits.logsumexp(-1).sum()
        return torch.autograd.grad(loss, (hidden, weight))

    kind = dict(classes=V, dtype=torch.float32, requires_grad=True)
    actual = gradients(DeferredLogits(Head(F.linear, (weight,)), hidden, **kind))
    torch.testing.assert_close(actual, gradients(F.linear(hidden, weight)))


FUSED = {
    "softcap": lambda x: torch.tanh(x / 30.0) * 30.0,
    "softcap in fp32": lambda x: 30 * torch.tanh(x.float() / 30),
    "scale": lambda x: x * 0.0625,
    "divisor": lambda x: x / 8.0,
    "scale and softcap": lambda x: torch.tanh(x * 0.5 / 30.0) * 30.0,
    "scale of a slice": lambda x: x[:, :-1] / 8.0,
}
NOT_FUSED = {
    "two softcaps": lambda x: x.tanh().tanh(),
    "a negative scale": lambda x: x * -1.0,
    "a shift": lambda x: x + 1.0,
    "a scale that is computed": lambda x: x * torch.tensor(2.0),
    "a factor for each class": lambda x: x * torch.arange(V),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", FUSED | NOT_FUSED)
def test_scaled_and_capped_heads(of, dtype):
    """Gemma2, Cohere and Granite among them."""
    shape = (FUSED | NOT_FUSED)[of]

    def loss(head: Callable[..., Any], *leaves: Tensor) -> Tensor:
        logits = shape(head(leaves[0] * 1, leaves[1]))
        labels = LABELS[:, : logits.shape[1]].reshape(-1)
        return F.cross_entropy(logits.float().view(-1, V), labels, label_smoothing=0.1)

    def deferred_logits(hidden: Tensor, weight: Tensor) -> Any:
        kind = dict(classes=V, dtype=dtype, requires_grad=True)
        return DeferredLogits(Head(F.linear, (weight,)), hidden, **kind)

    leaves = [torch.randn(*size).to(dtype).requires_grad_() for size in ((B, S, H), (V, H))]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    runs = ((deferred_logits, leaves), (F.linear, leaves), (F.linear, exact))
    recompute, before = deferred._by_recomputing, materialized()
    with mock.patch.object(deferred, "_by_recomputing", side_effect=recompute) as recomputed:
        found = [torch.autograd.grad(loss(head, *given), given) for head, given in runs]
    assert recomputed.called == (of in NOT_FUSED) and materialized() == before
    for a, b, e in zip(*found, strict=True):
        assert relative_error(a, e) <= 1.2 * relative_error(b, e) + TOLERANCES[dtype]


@pytest.mark.parametrize("factor", [30.0, 1 / 30.0, 1.0])
@pytest.mark.parametrize("where", ["capped", "between", "logits"])
@pytest.mark.parametrize("others", [False, True])
def test_hooks_of_a_capped_head(factor, where, others):
    """One that multiplies as the next step of the backward does is not taken for it."""
    hidden, weight = torch.randn(B, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.tensor([1, -100, 3])

    def gradients(logits: Any) -> Any:
        between = torch.tanh(logits / 30.0)
        capped = between * 30.0
        locals()[where].register_hook(lambda grad: grad * factor)
        capped.retain_grad()
        loss = F.cross_entropy(capped, labels)
        if others:
            loss = loss + capped.logsumexp(-1).sum() + F.cross_entropy(capped, labels.relu())
        loss.backward()
        found = hidden.grad, weight.grad, capped.grad + 0
        hidden.grad = weight.grad = None
        return found

    kind = dict(classes=V, dtype=torch.float32, requires_grad=True)
    actual = gradients(DeferredLogits(Head(F.linear, (weight,)), hidden, **kind))
    torch.testing.assert_close(actual, gradients(F.linear(hidden, weight)))


@pytest.mark.parametrize(
    "given",
    [
        lambda grad: grad,
        lambda grad: grad * 7 * 7 * 7,
        lambda grad: grad * 30.0,
        lambda grad: grad * torch.arange(V),
    ],
    ids=["as it is", "by as many steps", "by one step", "by a factor for each class"],
)
def test_the_gradient_of_capped_logits_is_none_of_the_logits(given):
    """Whoever hands it to the logits themselves wants it to be taken as theirs."""
    hidden, weight = torch.randn(B, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.tensor([1, -100, 3])

    def gradients(logits: Any) -> Any:
        capped = torch.tanh(logits / 30.0) * 30.0
        (grad,) = torch.autograd.grad(F.cross_entropy(capped, labels), capped, retain_graph=True)
        return torch.autograd.grad(logits, (hidden, weight), given(grad))

    kind = dict(classes=V, dtype=torch.float32, requires_grad=True)
    actual = gradients(DeferredLogits(Head(F.linear, (weight,)), hidden, **kind))
    torch.testing.assert_close(actual, gradients(F.linear(hidden, weight)))


@pytest.mark.parametrize("shape", [lambda x: x * 1.0, FUSED["softcap"]], ids=["plain", "capped"])
def test_a_penalty_on_the_gradient_of_a_fused_loss(shape):
    hidden, weight = torch.randn(B, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.tensor([1, -100, 3])

    def gradients(logits: Any) -> Any:
        loss = F.cross_entropy(shape(logits), labels)
        (of_hidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
        return torch.autograd.grad(of_hidden.square().sum(), (hidden, weight))

    kind = dict(classes=V, dtype=torch.float32, requires_grad=True)
    actual = gradients(DeferredLogits(Head(F.linear, (weight,)), hidden, **kind))
    torch.testing.assert_close(actual, gradients(F.linear(hidden, weight)))


def test_read_after_a_fused_loss():
    hidden, weight = torch.randn(B, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.tensor([1, -100, 3])

    def gradients(logits: Any) -> Any:
        loss = F.cross_entropy(logits, labels)
        loss = loss + logits.sin().sum()
        return torch.autograd.grad(loss, (hidden, weight))

    kind = dict(classes=V, dtype=torch.float32, requires_grad=True)
    actual = gradients(DeferredLogits(Head(F.linear, (weight,)), hidden, **kind))
    torch.testing.assert_close(actual, gradients(F.linear(hidden, weight)))


def test_a_checkpoint_around_head_and_loss():
    """It lets go of the logits, and the backward gets others that are made anew."""
    hidden, weight = torch.randn(B, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.tensor([1, -100, 3])
    kind = dict(classes=V, dtype=torch.float32, requires_grad=True)

    def gradients(head: Callable[..., Any]) -> Any:
        def losses(hidden: Tensor) -> Tensor:
            logits, others = head(hidden), head(hidden * 2)
            return F.cross_entropy(logits, labels) + F.cross_entropy(others, labels).square()

        loss = checkpoint(losses, hidden, use_reentrant=False)
        return torch.autograd.grad(loss, (hidden, weight))

    actual = gradients(lambda x: DeferredLogits(Head(F.linear, (weight,)), x, **kind))
    torch.testing.assert_close(actual, gradients(lambda x: F.linear(x, weight)))


def test_saved_outputs_keep_nothing_alive(case):
    """Autograd saves the output of a softmax in the softmax' own node."""
    watched = weakref.ref(logits := case.deferred())
    outputs = logits.softmax(-1), logits.tanh(), logits.exp()
    assert all(output.requires_grad for output in outputs)
    del logits, outputs
    assert watched() is None
