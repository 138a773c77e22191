"""The rewrite ``attention`` over repeated keys. Masks are read in test_masks.py."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from _op_checks import no_compile_caches
from _util import (
    CUDA,
    DEVICE,
    TOLERANCES,
    gradients,
    no_worse_than_eager,
    only,
    reasons,
    relative_error,
    show,
)
from expecttest import assert_expected_inline
from liger_fx.passes import attention
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import liger_fx

capture = only(attention)
B, S, KEYS, REPEATS, D = 2, 5, 2, 3, 8  # batch, sequence, key heads, queries of each, elements
HEADS = KEYS * REPEATS
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(B, HEADS, S, D), (B, KEYS, S, D), (B, KEYS, S, D)]


def operands(device=DEVICE, dtype=torch.bfloat16, shapes=SHAPES):
    """Queries, keys and values, [b, h, s, d]."""
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


# -- as each library writes it ---------------------------------------------------------------------


def repeat_torchtune(x):
    b, heads, _, size = x.shape
    return x.unsqueeze(2).expand(b, heads, REPEATS, -1, size).flatten(1, 2)


def repeat_huggingface(x):
    b, heads, s, size = x.shape
    x = x[:, :, None, :, :].expand(b, heads, REPEATS, s, size)
    return x.reshape(b, heads * REPEATS, s, size)


def repeat_torchtitan(x):
    """[b, s, h, d]"""
    b, s, heads, size = x.shape
    x = torch.unsqueeze(x, dim=3).expand(b, s, heads, REPEATS, size)
    return x.reshape(b, s, heads * REPEATS, size)


def torchtune(q, k, v):
    k, v = repeat_torchtune(k), repeat_torchtune(v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True
    )  # fmt: skip


def huggingface(q, k, v):
    k, v = repeat_huggingface(k), repeat_huggingface(v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None, dropout_p=0.0, scale=0.25, is_causal=True
    )


def torchtitan(q, k, v):
    k, v = (repeat_torchtitan(t.transpose(1, 2)).transpose(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def keyword_arguments(q, k, v):
    k = torch.reshape(
        input=torch.unsqueeze(input=k, dim=2).expand(-1, -1, REPEATS, -1, -1),
        shape=(k.shape[0], HEADS, k.shape[2], D),
    )
    return F.scaled_dot_product_attention(
        is_causal=True, value=repeat_torchtune(v), key=k, query=q
    )  # fmt: skip


def not_causal(q, k, v):
    return F.scaled_dot_product_attention(q, repeat_huggingface(k), repeat_huggingface(v))


SPELLINGS = [torchtune, huggingface, torchtitan, keyword_arguments, not_causal]


def exact(q, k, v, causal=True, scale=None):
    k, v = (t.repeat_interleave(REPEATS, 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        future = torch.ones(scores.shape[-2:], device=q.device).triu(1).bool()
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(-1) @ v


# -- fires -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("dtype", "dynamic"), [*((d, False) for d in DTYPES), (DTYPES[0], True)])
def test_fires_once_on_every_spelling(spelling, dtype, dynamic):
    def attention(q, k, v):  # numbers and sizes of heads are constants, as in a model
        pairs = ((q, HEADS), (k, KEYS), (v, KEYS))
        heads = (t.view(t.shape[0], t.shape[1], n, D).transpose(1, 2) for t, n in pairs)
        return spelling(*heads)

    projected = [torch.randn(B, S, n * D, device=DEVICE, dtype=dtype) for n in (HEADS, KEYS, KEYS)]
    (report,) = capture(attention, *projected, dynamic=dynamic).reports
    assert report.counts == {"attention": 1}, report
    assert report.rejections == [] and report.near_misses == []


def test_fires_graph_heads_first():
    assert_expected_inline(
        show(capture(huggingface, *operands()).graphs[0]),
        """\
def forward(self, L_k_: "bf16[2, 2, 5, 8]", L_v_: "bf16[2, 2, 5, 8]", L_q_: "bf16[2, 6, 5, 8]"):
    l_k_ = L_k_
    l_v_ = L_v_
    l_q_ = L_q_
    scaled_dot_product_attention_1: "bf16[2, 6, 5, 8]" = torch._C._nn.scaled_dot_product_attention(l_q_, l_k_, l_v_, None, 0.0, True, scale = 0.25, enable_gqa = True)
    return (scaled_dot_product_attention_1,)""",
    )


def test_fires_graph_heads_second():
    def attention(q, k, v):
        """[b, s, h, d], as torchtitan's are."""
        q, k, v = (t.transpose(1, 2) for t in (q, repeat_torchtitan(k), repeat_torchtitan(v)))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    found = capture(attention, *(t.transpose(1, 2).contiguous() for t in operands()))
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_k_: "bf16[2, 5, 2, 8]", L_v_: "bf16[2, 5, 2, 8]", L_q_: "bf16[2, 5, 6, 8]"):
    l_k_ = L_k_
    l_v_ = L_v_
    l_q_ = L_q_
    q: "bf16[2, 6, 5, 8]" = l_q_.transpose(1, 2)
    transpose_3: "bf16[2, 2, 5, 8]" = l_k_.transpose(1, 2)
    transpose_4: "bf16[2, 2, 5, 8]" = l_v_.transpose(1, 2)
    scaled_dot_product_attention_1: "bf16[2, 6, 5, 8]" = torch._C._nn.scaled_dot_product_attention(q, transpose_3, transpose_4, None, 0.0, True, scale = None, enable_gqa = True)
    return (scaled_dot_product_attention_1,)""",
    )


def test_a_norm_of_the_keys_before_they_are_repeated_stays():
    def attention(q, k, v, weight):
        return huggingface(q, torch.rms_norm(k, (D,), weight, 1e-6), v)

    found = capture(attention, *operands(), torch.rand(D, device=DEVICE, dtype=torch.bfloat16))
    assert found.reports[0].counts == {"attention": 1}


def test_one_head_of_keys_for_all_queries():
    shapes = [(B, REPEATS, S, D), (B, 1, S, D), (B, 1, S, D)]
    found = capture(torchtune, *operands(shapes=shapes))
    assert found.reports[0].counts == {"attention": 1}


def test_keys_of_another_length_than_queries():
    q, k, v = operands()
    found = capture(not_causal, q[:, :, :2], k, v)
    assert found.reports[0].counts == {"attention": 1}
    expected = not_causal(q[:, :, :2], k, v)
    assert relative_error(found.value, expected) < TOLERANCES[torch.bfloat16]


def masked(q, k, v, mask):
    k, v = repeat_huggingface(k), repeat_huggingface(v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_on_a_cpu_a_mask_stays(kind):
    tensors = operands("cpu", torch.float32)
    mask = torch.ones(S, S).tril().bool().expand(B, 1, S, S)
    mask = mask if kind == "bool" else torch.where(mask, 0.5, float("-inf"))
    found = capture(masked, *tensors, mask)
    assert found.reports[0].counts == {"attention": 1}
    expected = masked(*tensors, mask)
    assert relative_error(found.value, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_autocast_casts_what_it_would_have_cast(spelling):
    def attention(q, k, v):
        with torch.autocast(DEVICE, torch.bfloat16):
            return spelling(q, k, v.bfloat16())

    tensors = operands(dtype=torch.float32)  # as Hugging Face's rotation leaves queries and keys
    found = capture(attention, *tensors)
    assert found.reports[0].counts == {"attention": 1}
    assert relative_error(found.value, attention(*tensors)) < TOLERANCES[torch.bfloat16]


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_heads_repeated_as_a_whole():
    def interleaved(x):
        """Heads 0 1 0 1 0 1 instead of 0 0 0 1 1 1."""
        return x[:, None].expand(B, REPEATS, KEYS, S, D).reshape(B, HEADS, S, D)

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, interleaved(k), interleaved(v), is_causal=True)

    assert_expected_inline(
        refusal(attention, *operands()), """the key heads are not repeated one by one, in order"""
    )


def test_refuses_values_repeated_in_another_order_than_keys():
    def attention(q, k, v):
        v = v[:, None].expand(B, REPEATS, KEYS, S, D).flatten(1, 2)
        return F.scaled_dot_product_attention(q, repeat_torchtune(k), v, is_causal=True)

    assert_expected_inline(
        refusal(attention, *operands()), """the value heads are not repeated one by one, in order"""
    )


def test_refuses_repeated_positions():
    def along_the_sequence(x):
        return x.unsqueeze(3).expand(B, KEYS, S, REPEATS, D).flatten(2, 3)

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, along_the_sequence(k), along_the_sequence(v))

    q, k, v = operands()
    assert_expected_inline(
        refusal(attention, q[:, :KEYS], k, v),
        """the key heads are not repeated one by one, in order""",
    )


def test_refuses_heads_that_already_were_repeated_once():
    def attention(q, k, v):
        """The key has five dimensions before it is repeated."""
        k, v = (t.expand(B, KEYS, REPEATS, S, D).flatten(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    q, k, v = operands()
    assert_expected_inline(
        refusal(attention, q, k.unsqueeze(2), v.unsqueeze(2)),
        """the key heads are not repeated one by one, in order""",
    )


def test_refuses_queries_of_another_number_of_heads():
    q, k, v = operands(dtype=torch.float32)
    assert_expected_inline(
        refusal(not_causal, q[:, :1], k, v),
        """queries are [2, 1, 5, 8], repeated keys [2, 6, 5, 8]: other heads""",
    )


def test_refuses_keys_and_values_of_different_numbers_of_heads():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(
            q, repeat_torchtune(k), v.unsqueeze(2).expand(B, 1, HEADS, S, D).flatten(1, 2)
        )

    q, k, v = operands()
    assert_expected_inline(refusal(attention, q, k, v[:, :1]), """keys have 2 heads, values 1""")


def test_refuses_repeated_keys_that_escape():
    def attention(q, k, v):
        k, v = repeat_torchtune(k), repeat_torchtune(v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), k

    assert_expected_inline(
        refusal(attention, *operands()), """the value of `reshape` (k) is also returned"""
    )


def test_refuses_repeated_values_that_two_attentions_read():
    def attention(q, k, v):
        k, v = repeat_torchtune(k), repeat_torchtune(v)
        return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(-q, k, v)

    assert "is also used by" in refusal(attention, *operands())


def test_refuses_keys_that_are_written_in_place_after_they_were_repeated():
    def attention(q, k, v):
        k = k + 1
        repeated = repeat_torchtune(k)
        k.mul_(2)
        return F.scaled_dot_product_attention(q, repeated, repeat_torchtune(v))

    assert_expected_inline(
        refusal(attention, *operands()),
        """k is written in place by `mul_` (mul_) before `scaled_dot_product_attention`""",
    )


# Where PyTorch has no kernel that groups queries. Meta tensors stand for a GPU's.


def test_a_mask_that_is_an_input_is_read_when_it_is_there():
    mask = torch.ones(B, 1, S, S, device="meta", dtype=torch.bool)
    report = liger_fx.explain(masked, (*operands("meta"), mask), options={"policy": ["attention"]})
    (made,) = report.replacements
    assert made.pattern == "heads_first, given mask"


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(B, HEADS, S, S).bool(), "nothing is known of what l_mask_ lets a query see"),
        (torch.ones(1, 1, S, S).bool(), "nothing is known of what l_mask_ lets a query see"),
        (
            torch.ones(B, 1, S, S),
            "the mask l_mask_ is torch.float32, and not zero or minus infinity",
        ),
    ],
    ids=["of heads", "of all rows", "of numbers"],
)
def test_refuses_other_masks_on_a_gpu(mask, reason):
    assert refusal(masked, *operands("meta"), mask.to("meta")) == reason


def test_refuses_a_mask_that_the_graph_changes():
    def changed(q, k, v, mask):
        mask[:, :, 0, 0] = False
        return masked(q, k, v, mask)

    mask = torch.ones(B, 1, S, S, device="meta", dtype=torch.bool)
    assert refusal(changed, *operands("meta"), mask) == "l_mask_ is written in place"


def test_refuses_single_precision_on_a_gpu():
    assert_expected_inline(
        refusal(torchtune, *operands("meta", torch.float32)),
        """attention runs in torch.float32; flash and cuDNN attention take bf16 and fp16""",
    )


@pytest.mark.parametrize(("size", "count"), [(256, 1), (264, 0)])
def test_refuses_heads_that_are_too_large_on_a_gpu(size, count):
    shapes = [(*shape[:3], size) for shape in SHAPES]
    (report,) = capture(torchtune, *operands("meta", shapes=shapes)).reports
    assert report.counts.get("attention", 0) == count
    if not count:
        assert_expected_inline(
            reasons(report), """heads have 264 elements; flash attention takes 256"""
        )


def test_refuses_values_of_another_size_on_a_gpu():
    q, k, v = operands("meta")
    assert_expected_inline(
        refusal(torchtune, q, k, v[..., :4]), """keys have 8 elements, values 4"""
    )


def test_refuses_where_the_kernels_are_switched_off():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
        assert_expected_inline(
            refusal(torchtune, *operands("meta")),
            """flash and cuDNN attention are switched off""",
        )


@pytest.mark.parametrize(("capability", "count"), [((7, 5), 0), ((8, 0), 1)])
def test_refuses_gpus_without_the_kernels(capability, count, monkeypatch):
    monkeypatch.setenv("LIGER_FX_POLICY", "all")
    with FakeTensorMode():
        tensors = operands("cuda")
    with mock.patch("torch.cuda.get_device_capability", return_value=capability):
        report = liger_fx.explain(torchtune, tensors)
    assert report.counts.get("attention", 0) == count
    if not count:
        assert_expected_inline(
            reasons(report),
            """this GPU has no flash attention, which takes compute capability 8.0""",
        )


# -- leaves alone ----------------------------------------------------------------------------------


def as_many_keys_as_queries(q, k, v):
    return F.scaled_dot_product_attention(q, torch.cat([k] * REPEATS, 1), torch.cat([v] * 3, 1))


def repeated_in_turn(q, k, v):
    k, v = (t.repeat(1, REPEATS, 1, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def normalised_after_the_repeat(q, k, v):
    k = torch.rms_norm(repeat_torchtune(k), (D,), None, 1e-6)
    return F.scaled_dot_product_attention(q, k, repeat_torchtune(v), is_causal=True)


def grouped_already(q, k, v):
    """Hugging Face without a mask."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(
    "fn",
    [as_many_keys_as_queries, repeated_in_turn, normalised_after_the_repeat, grouped_already],
    ids=lambda f: f.__name__,
)
def test_leaves_and_says_nothing(fn):
    (report,) = capture(fn, *operands()).reports
    assert report.counts == {} and report.rejections == [] and report.near_misses == []


def test_leaves_attention_of_projections_without_a_word():
    def attention(x, w):
        q, k, v = (F.linear(x, w).view(B, S, HEADS, D).transpose(1, 2) for _ in range(3))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    (report,) = capture(attention, torch.randn(B, S, D), torch.randn(HEADS * D, D)).reports
    assert report.counts == {} and report.rejections == [] and report.near_misses == []


def test_says_how_near_it_was_where_only_the_keys_are_repeated():
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, repeat_torchtune(k), v.flatten(1, 2).view(q.shape))

    q, k, _ = operands()
    (report,) = capture(attention, q, k, q.clone()).reports
    assert report.counts == {} and report.rejections == []
    assert_expected_inline(
        report.why_not("attention"), """wanted expand, found `reshape` (flatten_1)"""
    )


# -- numerics --------------------------------------------------------------------------------------

SCALED = {huggingface: dict(scale=0.25), not_causal: dict(causal=False)}
# A CPU's kernel sums the gradient of a key in half precision: see the next test.
SUMMED_IN_FP32 = [torch.bfloat16, torch.float16] if CUDA else [torch.float32]


@pytest.mark.parametrize("spelling", [torchtune, huggingface, torchtitan, not_causal])
@pytest.mark.parametrize("dtype", SUMMED_IN_FP32)
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_numerics(spelling, dtype, inner):
    def reference(q, k, v):
        return exact(q, k, v, **SCALED.get(spelling, {}))

    shapes = [(3, heads, 40, 16) for heads in (HEADS, KEYS, KEYS)]
    no_worse_than_eager(spelling, reference, shapes, "attention", dtype, inner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_cpu_in_half_precision_only_the_gradients_of_keys_and_values_differ(dtype):
    tensors = [t.requires_grad_() for t in operands("cpu", dtype)]
    (rewritten,) = capture(torchtune, *tensors).graphs
    expected = gradients(lambda *t: torchtune(*t).sin().sum(), *tensors)
    q, k, v = tensors
    actual = gradients(lambda q, k, v: rewritten(k, v, q)[0].sin().sum(), q, k, v)
    assert all(torch.equal(a, e) for a, e in zip(actual[:2], expected[:2], strict=True))
    for a, e in zip(actual[2:], expected[2:], strict=True):
        assert relative_error(a, e) < TOLERANCES[dtype]


def test_keys_that_code_after_a_graph_break_writes_to():
    """Eager keeps the repeated copy of the keys; the kernel would keep the keys themselves."""

    def fn(q, k, v):
        k = k * 1
        out = huggingface(q, k, v)
        torch._dynamo.graph_break()
        k[..., 0] = 0
        return out.float().pow(2).sum() + 0 * k.float().sum()

    given = [t.requires_grad_() for t in operands(dtype=DTYPES[0])]
    liger_fx.clear_reports()
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=liger_fx.backend(policy=["attention"], inner="aot_eager"))
    for actual, expected in zip(gradients(compiled, *given), gradients(fn, *given), strict=True):
        assert relative_error(actual, expected) <= TOLERANCES[DTYPES[0]]
    said = liger_fx.Report.merged(liger_fx.reports()).why_not("attention")
    assert said == "the backward needs key, which later code may write to"


# -- kept in checkpoints ---------------------------------------------------------------------------


def under_a_causal_mask(q, k, v):
    at = torch.arange(q.shape[2], device=q.device)
    k, v = repeat_huggingface(k), repeat_huggingface(v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=at[None, :] <= at[:, None])


def in_a_checkpoint(spelling):
    """Attention whose output the backward needs."""
    return lambda *qkv: checkpoint(lambda *t: spelling(*t).sin(), *qkv, use_reentrant=False)


def forwards(compiled, tensors):
    """Value and gradients, and how often the op's forward ran."""
    with no_compile_caches():
        found = gradients(lambda *t: compiled(*t).sum(), *tensors)
    with torch.profiler.profile() as profile:
        gradients(lambda *t: compiled(*t).sum(), *tensors)
    called = [e for e in profile.events() if e.name == "liger_fx::attention_forward"]
    # The call that a checkpoint answers from what it kept computes nothing.
    return found, sum(any("aten::" in part.name for part in e.cpu_children) for e in called)


def exact_gradients(spelling, tensors):
    """In fp64: PyTorch's own of a causal sequence of 5 in bf16 are wrong on an H100 (torch 2.11)."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    return gradients(lambda *t: spelling(*t).sin().sum(), *wide)


def without_a_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("spelling", [torchtune, under_a_causal_mask, without_a_mask])
def test_a_checkpoint_keeps_the_output_if_told_so(spelling, inner):
    options = {"policy": ["attention"], "inner": inner, "attention.keep_in_checkpoints": True}
    tensors = [t.requires_grad_() for t in operands(dtype=DTYPES[0])]
    torch._dynamo.reset()
    compiled = torch.compile(in_a_checkpoint(spelling), backend="liger_fx", options=options)
    actual, calls = forwards(compiled, tensors)
    assert calls == 1
    expected = exact_gradients(spelling, tensors)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= TOLERANCES[DTYPES[0]]
    assert liger_fx.reports()[-1].counts == {"attention": 1}


def test_a_checkpoint_computes_a_window_twice_if_not_told():
    def window(q, k, v):
        at = torch.arange(q.shape[2], device=q.device)
        seen = (at[None, :] <= at[:, None]) & (at[None, :] > at[:, None] - 3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    shape = SHAPES[0]
    tensors = [t.requires_grad_() for t in operands(dtype=DTYPES[0], shapes=[shape] * 3)]
    for keep in (False, True):
        torch._dynamo.reset()
        options = {"inner": "aot_eager", "attention.keep_in_checkpoints": keep}
        backend = liger_fx.backend(policy=["attention"], **options)
        compiled = torch.compile(in_a_checkpoint(window), backend=backend)
        assert forwards(compiled, tensors)[1] == 2 - keep


def test_refuses_to_keep_what_a_checkpoint_writes_to():
    """Recomputed in eager, attention would see the queries written twice."""

    def body(q, k, v):
        q.mul_(2)
        return torchtune(q, k, v).sin()

    def fn(q, k, v):
        return checkpoint(body, q * 1, k, v, use_reentrant=False)

    backend = liger_fx.backend(
        policy=["attention"], inner="eager", **{"attention.keep_in_checkpoints": True}
    )
    torch._dynamo.reset()
    torch.compile(fn, backend=backend)(*operands(dtype=DTYPES[0]))
    assert_expected_inline(
        reasons(liger_fx.reports()[-1]),
        """mul is written by the checkpoint, which runs twice on it""",
    )


def test_dropout_is_left_to_torch_and_not_kept():
    def fn(q, k, v):
        k, v = repeat_huggingface(k), repeat_huggingface(v)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)

    options = {"policy": ["attention"], "inner": "eager", "attention.keep_in_checkpoints": True}
    torch._dynamo.reset()
    compiled = torch.compile(in_a_checkpoint(fn), backend="liger_fx", options=options)
    assert forwards(compiled, [t.requires_grad_() for t in operands(dtype=DTYPES[0])])[1] == 0
    assert liger_fx.reports()[-1].counts == {"attention": 1}


# -- what has its kernel already, but in a checkpoint on a GPU -------------------------------------


def explained(fn, device="meta", shapes=SHAPES):
    tensors = [t.requires_grad_() for t in operands(device, shapes=shapes)]
    return liger_fx.explain(fn, tensors, options={"policy": ["attention"], "strict": True})


@pytest.mark.parametrize("heads", [HEADS, KEYS])
def test_in_a_checkpoint_no_state_of_a_random_generator_is_put_back(heads):
    shapes = [SHAPES[0], (B, heads, S, D), (B, heads, S, D)]
    fn = in_a_checkpoint(without_a_mask)
    (made,) = explained(fn, shapes=shapes).replacements
    assert made.pattern == "plain"
    tensors = [t.requires_grad_() for t in operands(dtype=DTYPES[0], shapes=shapes)]
    options = {"policy": ["attention"], "inner": "aot_eager", "attention.keep_in_checkpoints": True}
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="liger_fx", options=options)
    with mock.patch("torch._functorch.partitioners.functionalize_rng_ops") as restored:
        actual, calls = forwards(compiled, tensors)
    assert calls == 1 and not restored.called
    expected = exact_gradients(without_a_mask, tensors)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= TOLERANCES[DTYPES[0]]


def dropped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)


def seen_from_both_sides(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def of_three_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)


def of_fewer_queries(q, k, v):
    return F.scaled_dot_product_attention(q[:, :, 1:], k, v, is_causal=True)


def over_keys_of_one_row(q, k, v):
    return F.scaled_dot_product_attention(q, k[:1], v[:1], is_causal=True)


def over_one_head(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True)


@pytest.mark.parametrize(
    "fn",
    [
        dropped,
        seen_from_both_sides,
        of_three_dimensions,
        of_fewer_queries,
        over_keys_of_one_row,
        over_one_head,
    ],
)
def test_nothing_is_said_of_other_attention_without_a_mask(fn):
    report = explained(in_a_checkpoint(fn), shapes=SHAPES[:1] * 3)
    assert not report.replacements and not report.rejections


def test_nothing_is_said_outside_of_a_checkpoint_and_on_a_cpu():
    for fn, device in ((without_a_mask, "meta"), (in_a_checkpoint(without_a_mask), "cpu")):
        report = explained(fn, device)
        assert not report.replacements and not report.rejections
