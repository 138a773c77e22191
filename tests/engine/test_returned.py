"""Logits that a graph returns beside its loss: deferred, refused, left alone; values, gradients."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from _util import DEVICE, TOLERANCES, reasons, relative_error, show
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import liger_fx
from liger_fx import DeferredLogits
from liger_fx.deferred import materialized

B, S, H, V = 2, 6, 16, 300


class Model(nn.Module):
    """A decoder without its layers: ``loss_and_logits(h, weight, labels)`` of what it embeds."""

    def __init__(self, head=None, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, H)
        self.norm = nn.RMSNorm(H)
        self.out = nn.Linear(H, V, bias=False)
        if tied:
            self.out.weight = self.embed.weight
        self.head = head or huggingface
        self.to(DEVICE)

    def forward(self, tokens: Tensor):
        return self.head(self.norm(self.embed(tokens)), self.out, (7 * tokens + 3) % V)


def huggingface(h, out, y):
    logits = out(h[:, slice(0, None), :])
    labels = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    loss = F.cross_entropy(logits.float().view(-1, V), labels.view(-1), ignore_index=-100)
    return loss, logits


def nanogpt(h, out, y):
    logits = out(h)
    return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=-1)


def nanochat(h, out, y):
    logits = out(h)[..., : V - 50].float()
    logits = 15 * torch.tanh(logits / 15)
    return F.cross_entropy(logits.view(-1, V - 50), (y % (V - 50)).view(-1)), logits


def gemma(h, out, y):
    logits = torch.tanh(out(h) / 30.0) * 30.0
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten()), logits


def upcast(h, out, y):
    """As under accelerate's ``convert_outputs_to_fp32``: what is returned is a cast of its own."""
    logits = out(h)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten()), logits.float()


def upcast_for_both(h, out, y):
    logits = out(h).float()
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()), logits


def token_logprobs(h, out, y):
    logits = out(h)
    logprobs = logits.float().log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return -logprobs.mean(), logits


def twice(h, out, y):
    loss, logits = huggingface(h, out, y)
    return loss, logits, logits.float() / 0.5


def in_autocast(h, out, y):
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss, logits = huggingface(h, out, y)
    return loss, logits.float()


HEADS = [
    huggingface, nanogpt, nanochat, gemma, upcast, upcast_for_both, token_logprobs, twice,
    in_autocast,
]  # fmt: skip


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, V, (B, S), device=DEVICE)


def compiled(model: Model, **options) -> Model:
    torch._dynamo.reset()
    liger_fx.clear_reports()
    model.compile(backend=liger_fx.backend(**({"inner": "aot_eager"} | options)))
    return model


def split(outputs) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the logits."""
    loss = next(value for value in outputs if value.dim() == 0)
    return loss, [value for value in outputs if value.dim()]


def parameter_gradients(model: Model, loss: Tensor) -> list[Tensor]:
    wanted = list(model.parameters())
    found = torch.autograd.grad(
        loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_step_never_makes_the_logits(head, tied, tokens):
    eager, model = Model(head, tied), compiled(Model(head, tied))
    before = materialized()
    (loss, logits), (expected, all_) = split(model(tokens)), split(eager(tokens))
    assert all(type(value) is DeferredLogits for value in logits)
    for actual, wanted in zip(logits, all_, strict=True):
        assert (actual.shape, actual.dtype, actual.device) == (
            wanted.shape, wanted.dtype, wanted.device,
        )  # fmt: skip
        assert actual.requires_grad == wanted.requires_grad
    tolerance = TOLERANCES[torch.bfloat16 if head is in_autocast else torch.float32]
    assert relative_error(loss, expected) <= tolerance
    pairs = zip(parameter_gradients(model, loss), parameter_gradients(eager, expected), strict=True)
    assert all(relative_error(a, e) <= tolerance for a, e in pairs)
    assert materialized() == before
    (report,) = liger_fx.reports()
    assert len(report.deferred) == len(logits)
    assert "they are returned: computed when read" in str(report)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_what_is_read_is_what_the_model_would_have_returned(head, tokens):
    eager, model = Model(head), compiled(Model(head))
    (loss, logits), (expected, all_) = split(model(tokens)), split(eager(tokens))
    tolerance = 2 * TOLERANCES[torch.bfloat16 if head is in_autocast else torch.float32]
    for actual, wanted in zip(logits, all_, strict=True):
        torch.testing.assert_close(actual.materialize(), wanted, atol=1e-6, rtol=tolerance)
    together = [
        loss + sum(value.float().pow(2).mean() for value in values)
        for loss, values in ((loss, logits), (expected, all_))
    ]
    for _ in range(2):  # the second time with what the first has retained
        pairs = zip(*map(parameter_gradients, (model, eager), together), strict=True)
        assert all(relative_error(a, e) <= tolerance for a, e in pairs)


def test_under_inductor_with_both_caches(tokens):
    """The graph is an ordinary one: a second compilation finds it."""
    for hits in (0, 1):
        AOTAutogradCache.clear() if not hits else None
        counters.clear()
        model = compiled(Model(gemma), inner="inductor")
        loss, (logits,) = split(model(tokens))
        expected, (wanted,) = split(Model(gemma)(tokens))
        torch.testing.assert_close(logits.materialize(), wanted)
        (loss + logits.mean()).backward()
        torch.testing.assert_close(loss, expected)
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits


def test_fires_graph(tokens):
    graphs = []
    rewriting = liger_fx.backend(policy="all", disable=["rms_norm"], inner="eager")

    def keep(gm, inputs):
        run = rewriting(gm, inputs)
        graphs.append(gm)
        return run

    torch._dynamo.reset()
    torch.compile(Model(), backend=keep)(tokens)
    assert_expected_inline(
        show(graphs[0]),
        """\
def forward(self, L_self_modules_embed_parameters_weight_: "f32[300, 16]", L_tokens_: "i64[2, 6]", L_self_modules_norm_parameters_weight_: "f32[16]", L_self_modules_out_parameters_weight_: "f32[300, 16]"):
    l_self_modules_embed_parameters_weight_ = L_self_modules_embed_parameters_weight_
    l_tokens_ = L_tokens_
    l_self_modules_norm_parameters_weight_ = L_self_modules_norm_parameters_weight_
    l_self_modules_out_parameters_weight_ = L_self_modules_out_parameters_weight_
    embedding: "f32[2, 6, 16]" = torch.nn.functional.embedding(l_tokens_, l_self_modules_embed_parameters_weight_, None, None, 2.0, False, False)
    rms_norm: "f32[2, 6, 16]" = torch.rms_norm(embedding, (16,), l_self_modules_norm_parameters_weight_, None)
    mul: "i64[2, 6]" = 7 * l_tokens_
    add: "i64[2, 6]" = mul + 3
    mod: "i64[2, 6]" = add % 300
    getitem: "f32[2, 6, 16]" = rms_norm[(slice(None, None, None), slice(0, None, None), slice(None, None, None))]
    pad: "i64[2, 7]" = torch._C._nn.pad(mod, (0, 1), 'constant', -100)
    getitem_1: "i64[2, 6]" = pad[(Ellipsis, slice(1, None, None))]
    labels: "i64[2, 6]" = getitem_1.contiguous()
    view_1: "i64[12]" = labels.view(-1)
    linear_loss_default = torch.ops.liger_fx.linear_loss.default(rms_norm, l_self_modules_out_parameters_weight_, None, view_1, None, None, None, None, None, ['cross_entropy'], -100, 0.0, 0.0, 1.0, 0.5, 0, torch.float32, True, False)
    getitem_2: "f32[]" = linear_loss_default[0]
    ne: "b8[12]" = view_1 != -100
    sum_1: "i64[]" = ne.sum()
    truediv: "f32[]" = getitem_2 / sum_1
    return (truediv, getitem)""",
    )


def test_evaluation_defers_as_well(tokens):
    model = compiled(Model(), **{"linear_cross_entropy.chunk_tokens": 4})
    with torch.no_grad():
        _, logits = model(tokens)
    assert type(logits) is DeferredLogits and not logits.requires_grad
    torch.testing.assert_close(logits.argmax(-1), Model()(tokens)[1].argmax(-1))


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_values_are_computed_under_the_autocast_of_the_graph(inside, tokens):
    autocast = torch.autocast(DEVICE, dtype=torch.bfloat16)
    model, eager = compiled(Model(huggingface)), Model(huggingface)
    with autocast:
        _, logits = model(tokens)
        _, expected = eager(tokens)
    with autocast if inside else contextlib.nullcontext():
        values = logits.materialize()
    assert values.dtype == logits.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(values, expected)


def test_other_lengths_are_no_other_graphs(tokens):
    model, eager = compiled(Model()), Model()
    for length in (6, 5, 4, 3):
        _, logits = model(tokens[:, :length])
        assert logits.shape == (B, length, V)
        torch.testing.assert_close(logits.materialize(), eager(tokens[:, :length])[1])
    assert len(liger_fx.reports()) == 2  # one length, and any length


def test_in_a_checkpoint_and_beside_one(tokens):
    """A body returns its logits to the graph around it, where they may be read: they are kept."""

    def head(h, out, y):
        h = checkpoint(lambda h: h + F.silu(h), h, use_reentrant=False)
        return huggingface(h, out, y)

    assert type(compiled(Model(head))(tokens)[1]) is DeferredLogits
    model = compiled(Model(lambda *args: checkpoint(huggingface, *args, use_reentrant=False)))
    assert type(model(tokens)[1]) is Tensor


def test_explain_says_so(tokens):
    report = liger_fx.explain(Model(), [tokens])
    assert report.counts["linear_cross_entropy"] == 1 and len(report.deferred) == 1


# -- refused ---------------------------------------------------------------------------------------


def computed_weight(h, out, y):
    logits = F.linear(h, out.weight * 2)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten()), logits


def written(h, out, y):
    loss, logits = huggingface(h, out, y)
    logits.detach().clamp_(max=0.1)
    return loss, logits


def view_without_grad(h, out, y):
    with torch.no_grad():
        h = h.view(h.shape)
    return huggingface(h, out, y)


def viewed_without_grad(h, out, y):
    loss, logits = huggingface(h, out, y)
    with torch.no_grad():
        return loss, logits.view(logits.shape)


def metric(h, out, y):
    loss, logits = huggingface(h, out, y)
    return loss, logits, logits.argmax(-1)


def metric_of_what_is_returned(h, out, y):
    logits = out(h)
    loss, wide = F.cross_entropy(logits.flatten(0, 1), y.flatten()), logits.float()
    return loss, wide, wide.argmax(-1)


def rows_only(h, out, y):
    loss, logits = huggingface(h, out, y)
    return loss, logits[:, -1]


def permuted(h, out, y):
    loss, logits = huggingface(h, out, y)
    return loss, logits[[1, 0]]


def two_views(h, out, y):
    loss, logits = huggingface(h, out, y)
    return loss, logits, logits.detach()


def classes_only(h, out, y):
    loss, logits = huggingface(h, out, y)
    return loss, logits[..., : V - 50]


def goes_on(h, out, y):
    loss, logits = huggingface(h, out, y)
    torch._dynamo.graph_break()
    return loss, logits, logits.argmax(-1)


def refusal(head, tokens, **options) -> str:
    model, eager = compiled(Model(head), **options), Model(head)
    outputs, expected = model(tokens), eager(tokens)
    assert not any(type(value) is DeferredLogits for value in outputs)
    torch.testing.assert_close(outputs, expected)
    (loss, _), (wanted, _) = split(outputs), split(expected)
    pairs = zip(parameter_gradients(model, loss), parameter_gradients(eager, wanted), strict=True)
    assert all(relative_error(a, e) <= TOLERANCES[torch.float32] for a, e in pairs)
    report = liger_fx.Report.merged(liger_fx.reports())
    assert report.counts.get("linear_cross_entropy") is None and not report.deferred
    said = (r.reason for r in report.rejections if r.rewrite == "linear_cross_entropy")
    return "\n".join(said)


def test_refuses_what_it_cannot_compute_later(tokens):
    assert_expected_inline(
        refusal(computed_weight, tokens),
        """the value of `linear` (logits) is also returned, and cannot be computed later: mul_1 is computed in this graph""",
    )
    assert_expected_inline(
        refusal(written, tokens),
        """the value of `linear` (logits) is also used by `clamp_` (clamp_)""",
    )


@pytest.mark.skipif(torch.__version__ < "2.12", reason="aot_eager raises for such views as well")
def test_refuses_views_made_without_grad_mode(tokens):
    assert_expected_inline(
        refusal(view_without_grad, tokens),
        """the value of `linear` (logits) is also returned, and cannot be computed later: h is a view that was made without grad mode""",
    )
    assert_expected_inline(
        refusal(viewed_without_grad, tokens),
        """the value of `linear` (logits) is also returned, and cannot be computed later: view_2 is a view that was made without grad mode""",
    )


def test_refuses_where_somebody_reads_the_logits(tokens):
    assert_expected_inline(
        refusal(metric, tokens),
        """the value of `linear` (logits) is also used by `argmax` (argmax)""",
    )
    assert_expected_inline(
        refusal(metric_of_what_is_returned, tokens),
        """the value of `linear` (logits) is also used by `cast` (wide)""",
    )
    assert_expected_inline(
        refusal(goes_on, tokens),
        """the value of `linear` (logits) is also returned, and cannot be computed later: the function goes on after this graph""",
    )


def test_refuses_rows_of_the_logits(tokens):
    assert_expected_inline(
        refusal(rows_only, tokens),
        """the value of `linear` (logits) is also used by `getitem` (getitem_2)""",
    )
    assert_expected_inline(
        refusal(two_views, tokens),
        """the value of `linear` (logits) is also returned, and cannot be computed later: logits and detach are returned in the same memory""",
    )
    assert_expected_inline(
        refusal(classes_only, tokens),
        """the value of `linear` (logits) is also used by `getitem` (getitem_2)""",
    )
    assert_expected_inline(
        refusal(permuted, tokens),
        """the value of `linear` (logits) is also used by `getitem` (getitem_2)""",
    )


def test_refuses_by_option(tokens):
    assert_expected_inline(
        refusal(huggingface, tokens, logits="keep"),
        """the value of `linear` (logits) is also returned""",
    )


def test_refuses_a_part_of_an_unknown_graph(tokens):
    rewriting = liger_fx.backend(inner="eager")

    def as_a_part(gm, inputs):
        del gm.compile_subgraph_reason
        return rewriting(gm, inputs)

    torch._dynamo.reset()
    liger_fx.clear_reports()
    _, logits = torch.compile(Model(), backend=as_a_part)(tokens)
    assert type(logits) is Tensor
    assert_expected_inline(
        reasons(liger_fx.reports()[0]).splitlines()[0],
        """the value of `linear` (logits) is also returned, and cannot be computed later: the graph is a part of a larger one (split by DDPOptimizer? torch._dynamo.config.optimize_ddp = False leaves it whole)""",
    )


# -- split by DDPOptimizer -------------------------------------------------------------------------


@pytest.fixture
def split_by_ddp(monkeypatch):
    """Wraps a model in DDP, whose buckets are so small that each parameter has one."""
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield lambda model: DistributedDataParallel(model, bucket_cap_mb=1e-6)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_the_last_part_of_a_split_graph_defers(inner, tied, split_by_ddp, tokens):
    eager, model = Model(tied=tied), Model(tied=tied)
    wrapped = split_by_ddp(compiled(model, inner=inner))
    before = materialized()
    for _ in range(2):
        loss, logits = wrapped(tokens)
        loss.backward()
    expected, wanted = eager(tokens)
    (2 * expected).backward()
    assert type(logits) is DeferredLogits and materialized() == before
    assert len(liger_fx.reports()) > 1
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.materialize(), wanted)
    for actual, parameter in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, parameter.grad)


class Reread(Model):
    """Its logits are the input of a further projection, with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Linear(V, 2).to(DEVICE)

    def forward(self, tokens):
        loss, logits = super().forward(tokens)
        return loss, logits, self.probe(logits)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Reread, "the graph is a part of a larger one"),
        (lambda: Model(goes_on), "the function goes on after this graph"),
    ],
)
def test_a_split_graph_keeps_logits_that_are_read(model, why, split_by_ddp, tokens):
    outputs, expected = split_by_ddp(compiled(model()))(tokens), model()(tokens)
    assert not any(type(value) is DeferredLogits for value in outputs)
    torch.testing.assert_close(outputs, expected)
    assert any(why in reasons(report) for report in liger_fx.reports())


# -- left alone ------------------------------------------------------------------------------------


def no_loss(h, out, y):
    return h.sum(), out(h)


def gate_of_an_mlp(h, out, y):
    gate = out(h)
    return (F.silu(gate) * F.linear(h, out.weight + 1)).sum(), gate


def two_losses(h, out, y):
    logits = out(h)
    losses = (F.cross_entropy(logits.flatten(0, 1), labels.flatten()) for labels in (y, y.roll(1)))
    return sum(losses), logits


@pytest.mark.parametrize(
    "head", [no_loss, gate_of_an_mlp, two_losses], ids=lambda head: head.__name__
)
def test_logits_without_a_fused_loss_are_a_tensor(head, tokens):
    model = compiled(Model(head), policy="all")
    outputs = model(tokens)
    torch.testing.assert_close(outputs, Model(head)(tokens))
    assert type(outputs[1]) is Tensor and not liger_fx.reports()[0].deferred
