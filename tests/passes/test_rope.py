"""The rewrite ``rope``: fires, refuses, leaves alone, numerics."""

from __future__ import annotations

import functools

import pytest
import torch
from _util import DEVICE, no_worse_than_eager, only, reasons, show
from expecttest import assert_expected_inline
from liger_fx.passes import DEFAULT, rope
from liger_fx.passes.rope import OF_A_NORM

capture = only(rope)
B, S, N, D = 2, 5, 3, 12  # batch, sequence, heads, elements of a head


@pytest.fixture
def x():
    return torch.randn(B, S, N, D, device=DEVICE)


def angles(batch=1, size=D, dtype=torch.float32):
    """[b, s, d / 2] of random angles, not those of any position: nothing may depend on that."""
    g = torch.Generator().manual_seed(1)
    return torch.rand(batch, S, size // 2, generator=g).mul(6).to(DEVICE, dtype)


def pairs_cache(batch=1, dtype=torch.float32):
    a = angles(batch)
    return torch.stack([a.cos(), a.sin()], -1).to(dtype)


def halves_cache(batch=1, size=D, dtype=torch.float32):
    a = torch.cat([angles(batch, size)] * 2, -1)
    return a.cos().to(dtype), a.sin().to(dtype)


# -- as each library writes it ---------------------------------------------------------------------


def torchtune_llama(x, cache):
    """cache: [s or more, d / 2, 2], or with positions of each sequence [b, s, d / 2, 2]."""
    rope_cache = cache[: x.size(1)] if cache.dim() == 3 else cache
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    rope_cache = rope_cache.view(-1, pairs.size(1), 1, pairs.size(3), 2)
    out = torch.stack(
        [
            pairs[..., 0] * rope_cache[..., 0] - pairs[..., 1] * rope_cache[..., 1],
            pairs[..., 1] * rope_cache[..., 0] + pairs[..., 0] * rope_cache[..., 1],
        ],
        -1,
    )
    return out.flatten(3).type_as(x)


def torchtune_phi3(x, cache):
    """cache: [s, 2 d], cos and sin."""
    cache = cache[: x.size(1)].view(-1, x.size(1), 1, 2 * x.size(-1))
    cos, sin = cache[..., : x.size(-1)], cache[..., x.size(-1) :]
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return ((x * cos) + (torch.cat((-x2, x1), dim=-1) * sin)).type_as(x)


def torchtune_qwen2(x, cache):
    cache = cache[: x.size(1)].view(-1, x.size(1), 1, 2 * x.size(-1))
    cos = cache[..., : x.size(-1)].to(x.dtype)
    sin = cache[..., x.size(-1) :].to(x.dtype)
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return ((x * cos) + (torch.cat((-x2, x1), dim=-1) * sin)).type_as(x)


def rotate_half(x):
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def huggingface(x, cos, sin):
    """x: [b, s, h, d], rotated as [b, h, s, d]; cos, sin: [b, s, d]."""
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    return (x * cos) + (rotate_half(x) * sin)


def huggingface_phi3(x, cos, sin):
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    rotary = cos.shape[-1]
    rotated, passed = x[..., :rotary], x[..., rotary:]
    return torch.cat([(rotated * cos) + (rotate_half(rotated) * sin), passed], dim=-1)


def modernbert(x, cos, sin):
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    return ((x.float() * cos) + (rotate_half(x.float()) * sin)).to(x.dtype)


def nanochat(x, cos, sin):
    """By the negative angles."""
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (x * cos) + (torch.cat((x2, -x1), dim=-1) * sin)


def qwen2_5_vl(x, cos, sin):
    """cos, sin: [3, b, s, d], by time, height and width; a section of each."""
    x, sections = x.transpose(1, 2), [1, 2, 3] * 2
    cos, sin = (
        torch.cat([m[i % 3] for i, m in enumerate(t.split(sections, dim=-1))], dim=-1).unsqueeze(1)
        for t in (cos, sin)
    )
    return (x * cos) + (rotate_half(x) * sin)


def gpt_oss(x, cos, sin):
    """cos, sin: [b, s, d / 2]."""
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def nanochat_itself(x, cos, sin):
    """On [b, s, h, d]. cos, sin: [b, s, d / 2]."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    half = x.shape[3] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos], 3)


def modded_nanogpt(x, cos, sin):
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    x1, x2 = x.to(dtype=torch.float32).chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), 3).type_as(x)


def slices_by_elements(x, cos, sin):
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    half = x.shape[-1] // 2
    x1, x2 = x[:, :, :, :half], x[:, :, :, half:]
    return torch.concat((cos * x1 + sin * x2, -x1 * sin + x2 * cos), dim=3)


def slices_forwards(x, cos, sin):
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    f = x.float()
    x1, x2 = f[..., : x.size(-1) // 2], f[..., x.size(-1) // 2 :]
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).to(x.dtype)


def chunks_backwards(x, cos, sin):
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    x1, x2 = x.chunk(2, 3)
    return torch.cat([x2 * sin + x1 * cos, x2 * cos - x1 * sin], dim=-1)


def pairs_to_halves_backwards(x, cos, sin):
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def deepseek_v3(x, cos, sin):
    """cos, sin: [b, s, d], of which the left half counts. Neighbours become halves."""
    x = x.transpose(1, 2)
    cos = cos[..., : cos.shape[-1] // 2].unsqueeze(1)
    sin = sin[..., : sin.shape[-1] // 2].unsqueeze(1)
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def rotate_neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def cohere(x, cos, sin):
    """cos, sin: [b, s, d], each element twice."""
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    dtype, x = x.dtype, x.float()
    return ((x * cos) + (rotate_neighbours(x) * sin)).to(dtype=dtype)


def ernie(x, cos, sin):
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
    sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)
    return ((x.float() * cos) + (rotate_neighbours(x).float() * sin)).to(x.dtype)


def glm(x, cos, sin):
    x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
    cos = cos[..., : cos.shape[-1] // 2].repeat_interleave(2, dim=-1)
    sin = sin[..., : sin.shape[-1] // 2].repeat_interleave(2, dim=-1)
    rotary = cos.shape[-1]
    turned, passed = x[..., :rotary], x[..., rotary:]
    return torch.cat([(turned * cos) + (rotate_neighbours(turned) * sin), passed], dim=-1)


def gptj(x, cos, sin):
    """On [b, s, h, d]. cos, sin: [b, s, d / 2]."""
    sin = torch.repeat_interleave(sin[:, :, None, :], 2, 3)
    cos = torch.repeat_interleave(cos[:, :, None, :], 2, 3)
    other = torch.stack((-x[:, :, :, 1::2], x[:, :, :, ::2]), dim=-1).flatten(-2)
    return (x * cos) + (other * sin)


def deepseek_v4(x, cos, sin):
    """The last elements of each head. cos, sin: [b, s, R / 2]."""
    x = x.transpose(1, 2)
    cos = cos.repeat_interleave(2, dim=-1).unsqueeze(1)
    sin = sin.repeat_interleave(2, dim=-1).unsqueeze(1)
    passed, turned = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
    turned = (turned.float() * cos) + (rotate_neighbours(turned).float() * sin)
    return torch.cat([passed, turned.to(x.dtype)], dim=-1)


def torchtitan(x, freqs):
    """freqs: [s, d / 2], complex."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    freqs = freqs.view(1, x.shape[1], 1, x.shape[-1] // 2)
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


def phi3_cache():
    return torch.cat(halves_cache(), -1)[0]


def half_cache(batch=1, size=D):
    return tuple(angle[..., : size // 2] for angle in halves_cache(batch, size))


def sections_cache():
    """One angle by time, height and width: what is chosen of them is that of a text."""
    return tuple(angle.expand(3, *angle.shape) for angle in halves_cache())


def neighbours_cache():
    return tuple(angle.repeat_interleave(2, -1) for angle in half_cache())


SPELLINGS = {
    "torchtune_llama": (torchtune_llama, lambda: [pairs_cache()[0]], "interleaved"),
    "torchtune_llama_longer_cache": (
        torchtune_llama,
        lambda: [torch.cat([pairs_cache()[0]] * 2)],
        "interleaved",
    ),
    "torchtune_llama_packed": (torchtune_llama, lambda: [pairs_cache(B)], "interleaved"),
    "torchtune_phi3": (torchtune_phi3, lambda: [phi3_cache()], "halves"),
    "torchtune_qwen2": (torchtune_qwen2, lambda: [phi3_cache()], "halves"),
    "huggingface": (huggingface, halves_cache, "halves"),
    "huggingface_positions_of_each_sequence": (huggingface, lambda: halves_cache(B), "halves"),
    "huggingface_phi3_partial": (huggingface_phi3, lambda: halves_cache(size=8), "halves"),
    "huggingface_phi3_whole": (huggingface_phi3, halves_cache, "halves"),
    "torchtitan": (torchtitan, lambda: [torch.polar(torch.ones_like(angles()[0]), angles()[0])],
                   "interleaved"),
    "modernbert": (modernbert, halves_cache, "halves"),
    "nanochat": (nanochat, halves_cache, "backwards"),
    "qwen2_5_vl": (qwen2_5_vl, sections_cache, "halves"),
    "gpt_oss": (gpt_oss, half_cache, "halves"),
    "gpt_oss_positions_of_each_sequence": (gpt_oss, lambda: half_cache(B), "halves"),
    "nanochat_itself": (nanochat_itself, half_cache, "backwards"),
    "nanochat_positions_of_each_sequence": (nanochat_itself, lambda: half_cache(B), "backwards"),
    "modded_nanogpt": (modded_nanogpt, half_cache, "backwards"),
    "slices_by_elements": (slices_by_elements, half_cache, "backwards"),
    "slices_forwards": (slices_forwards, half_cache, "halves"),
    "chunks_backwards": (chunks_backwards, half_cache, "backwards"),
    "pairs_to_halves_backwards": (
        pairs_to_halves_backwards, half_cache, "pairs_to_halves_backwards",
    ),
    "deepseek_v3": (deepseek_v3, halves_cache, "pairs_to_halves"),
    "cohere": (cohere, neighbours_cache, "pairs"),
    "ernie": (ernie, halves_cache, "pairs"),
    "glm_partial": (glm, lambda: halves_cache(size=8), "pairs"),
    "glm_whole": (glm, halves_cache, "pairs"),
    "gptj": (gptj, half_cache, "pairs"),
    "gptj_positions_of_each_sequence": (gptj, lambda: half_cache(B), "pairs"),
    "deepseek_v4_trailing": (deepseek_v4, lambda: half_cache(size=8), "trailing_pairs"),
}  # fmt: skip
CAST = [gptj, nanochat_itself, slices_by_elements]  # tables in the dtype of the model
# Heads first, and such tables.
HEADS_FIRST = [
    huggingface,
    huggingface_phi3,
    modernbert,
    nanochat,
    qwen2_5_vl,
    gpt_oss,
    slices_forwards,
    chunks_backwards,
    pairs_to_halves_backwards,
    deepseek_v3,
    cohere,
    ernie,
    glm,
    deepseek_v4,
]


def rotated(x, batch=1, size=D, convention="halves"):
    """The rotation itself: of element i with i + size / 2, or of 2i with 2i + 1."""
    a = angles(batch, size).to(x.dtype).unsqueeze(2)
    if convention.endswith("backwards"):
        a = -a
    if convention == "trailing_pairs":
        rest, head = x[..., :-size], x[..., -size:]
    else:
        head, rest = x[..., :size], x[..., size:]
    if convention in ("halves", "backwards"):
        first, second = head.chunk(2, -1)
    else:
        first, second = head[..., ::2], head[..., 1::2]
    parts = first * a.cos() - second * a.sin(), second * a.cos() + first * a.sin()
    if convention not in ("pairs", "trailing_pairs", "interleaved"):
        return torch.cat((*parts, rest), -1)
    turned = torch.stack(parts, -1).flatten(-2)
    return torch.cat((rest, turned) if convention == "trailing_pairs" else (turned, rest), -1)


# -- fires -----------------------------------------------------------------------------------------


class Rotation(torch.nn.Module):
    """A spelling between a projection's result and its caches, with sizes where models have them."""

    def __init__(self, spelling, caches):
        super().__init__()
        self.spelling = spelling
        for i, cache in enumerate(caches):
            self.register_buffer(f"cache{i}", cache)

    def forward(self, projected):
        x = projected.view(projected.shape[0], projected.shape[1], N, D)
        return self.spelling(x, *self.buffers())


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, False), (torch.float32, True)])
def test_fires_once_on_every_spelling(case, dtype, dynamic, x):
    spelling, caches, convention = SPELLINGS[case]
    made = list(caches())
    if spelling in (*HEADS_FIRST, *CAST):
        made = [t.to(dtype) for t in made]
    module = Rotation(spelling, made)  # sizes of heads and tables are constants, as in a model
    found = capture(module, x.to(dtype).flatten(2), dynamic=dynamic)
    assert found.reports[0].counts == {"rope": 1}, found.reports[0]
    (op,) = (str(n.target) for n in found.graphs[0].graph.nodes if "liger_fx" in str(n.target))
    expected = "rope_interleaved" if convention == "interleaved" else "rope"
    assert op == f"liger_fx.{expected}.default"


def test_fires_graph_by_halves(x):
    found = capture(huggingface, x, *halves_cache())
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_x_: "f32[2, 5, 3, 12]", L_cos_: "f32[1, 5, 12]", L_sin_: "f32[1, 5, 12]"):
    l_x_ = L_x_
    l_cos_ = L_cos_
    l_sin_ = L_sin_
    x: "f32[2, 3, 5, 12]" = l_x_.transpose(1, 2)
    cos: "f32[1, 1, 5, 12]" = l_cos_.unsqueeze(1)
    sin: "f32[1, 1, 5, 12]" = l_sin_.unsqueeze(1)
    squeeze: "f32[1, 5, 12]" = cos.squeeze(1)
    squeeze_1: "f32[1, 5, 12]" = sin.squeeze(1)
    transpose_1: "f32[2, 5, 3, 12]" = x.transpose(1, 2)
    rope_default: "f32[2, 5, 3, 12]" = torch.ops.liger_fx.rope.default(transpose_1, squeeze, squeeze_1, False, False, False)
    transpose_2: "f32[2, 3, 5, 12]" = rope_default.transpose(1, 2)
    return (transpose_2,)""",
    )


def test_fires_graph_interleaved(x):
    found = capture(torchtune_llama, x.bfloat16(), pairs_cache()[0])
    assert_expected_inline(
        show(found.graphs[0]),
        """\
def forward(self, L_cache_: "f32[5, 6, 2]", L_x_: "bf16[2, 5, 3, 12]"):
    l_cache_ = L_cache_
    l_x_ = L_x_
    rope_cache: "f32[5, 6, 2]" = l_cache_[slice(None, 5, None)]
    rope_cache_1: "f32[1, 5, 1, 6, 2]" = rope_cache.view(-1, 5, 1, 6, 2)
    squeeze: "f32[1, 5, 6, 2]" = rope_cache_1.squeeze(2)
    rope_interleaved_default: "bf16[2, 5, 3, 12]" = torch.ops.liger_fx.rope_interleaved.default(l_x_, squeeze, False)
    return (rope_interleaved_default,)""",
    )


def test_angles_wider_than_queries_widen_the_result(x):  # autocast
    cos, sin = halves_cache()
    found = capture(huggingface, x.bfloat16(), cos, sin)
    assert found.reports[0].counts == {"rope": 1}
    torch.testing.assert_close(found.value, huggingface(x.bfloat16(), cos, sin))


def test_a_norm_after_a_rotation_does_not_take_its_sum(x):
    def fn(x, cos, sin, w):
        return torch.rms_norm(huggingface(x, cos, sin), (D,), w, 1e-6)

    everything = functools.partial(capture, rewrites=DEFAULT)
    found = everything(fn, x, *halves_cache(), torch.rand(D, device=DEVICE))
    assert found.reports[0].counts == {"rope": 1, "rms_norm": 1}


@pytest.mark.parametrize("spelling", [gpt_oss, deepseek_v3, glm], ids=lambda f: f.__name__)
def test_a_result_that_eager_makes_contiguous_is_not_copied(spelling, x):
    tables = half_cache() if spelling is gpt_oss else halves_cache(size=8 if spelling is glm else D)
    found = capture(spelling, x, *tables)
    assert found.value.is_contiguous() and "contiguous" not in show(found.graphs[0])
    torch.testing.assert_close(found.value, spelling(x, *tables))


def test_query_and_key_share_their_angles(x):
    def fn(q, k, cos, sin):
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)

    found = capture(fn, x, x[:, :, :1].clone(), *halves_cache())
    assert found.reports[0].counts == {"rope": 2}


def test_packed_positions_index_the_cache(x):
    def fn(x, cache, positions):
        return torchtune_llama(x, cache[positions])

    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]], device=DEVICE)
    found = capture(fn, x, pairs_cache()[0], positions)
    assert found.reports[0].counts == {"rope": 1}
    torch.testing.assert_close(found.value, fn(x, pairs_cache()[0], positions))


def test_a_rotation_that_is_scaled_in_place_afterwards(x):  # torchtune's Gemma 2
    def fn(x, cache):
        out = torchtune_llama(x, cache)
        out.mul_(0.25)
        return out

    found = capture(fn, x, pairs_cache()[0])
    assert found.reports[0].counts == {"rope": 1}
    torch.testing.assert_close(found.value, fn(x, pairs_cache()[0]))


def test_heads_of_a_norm_have_rows_of_their_own(x):
    """Inductor norms and turns them in one kernel."""
    weight = torch.rand(D, device=DEVICE)

    def powers(x):
        return weight * (x * (x.square().mean(-1, keepdim=True) + 1e-6) ** -0.5)

    def functional(x):
        return torch.rms_norm(x, (D,), weight, 1e-6).to(x.dtype)

    def squared(x):
        return x.pow(exponent=2) * weight

    for heads, made in ((powers, OF_A_NORM), (functional, OF_A_NORM), (squared, "")):
        found = capture(lambda x, *cache, f=heads: huggingface(f(x), *cache), x, *halves_cache())
        (rotation,) = found.reports[0].replacements
        assert rotation.pattern.partition(", ")[2] == made


def test_the_input_is_not_overwritten(x):  # A9: torchtune's layout is that of Liger's kernel
    def fn(x, cos, sin):
        return huggingface(x, cos, sin), x.sum()

    before = x.clone()
    compiled = torch.compile(fn, backend="liger_fx", options={"policy": "all", "inner": "eager"})
    out, total = compiled(x, *halves_cache())
    assert torch.equal(x, before) and total == before.sum()
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_one_position_in_either_layout(x):  # decoding
    cos, sin = (t[:, :1] for t in halves_cache())
    token = x[:, :1]

    def in_torchtunes_layout(x, cos, sin):
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return x * cos + rotate_half(x) * sin

    for fn in (huggingface, in_torchtunes_layout):
        found = capture(fn, token, cos, sin)
        assert found.reports[0].counts == {"rope": 1}
        torch.testing.assert_close(found.value, fn(token, cos, sin))


def unequal_halves(a, b):
    """Tables by another rule than the models': (cos, sin) of angles and of others."""
    return torch.cat((a.cos(), b.cos()), -1), torch.cat((a.sin(), 0.5 * b.sin()), -1)


def test_halves_of_the_tables_that_differ_are_both_read(x):
    """Whether the graph shows how the tables are made, or not."""

    def fn(x, a, b):
        return huggingface(x, *unequal_halves(a, b))

    def learned(x, a, b):
        return huggingface(
            x, torch.sigmoid(torch.cat((a, b), -1)), torch.tanh(torch.cat((b, a), -1))
        )

    a, b = angles(), 2 * angles(B)[:1]
    for function, inputs in ((fn, (a, b)), (learned, (a, b)), (huggingface, unequal_halves(a, b))):
        found = capture(function, x, *inputs)
        assert found.reports[0].counts == {"rope": 1}
        torch.testing.assert_close(found.value, function(x, *inputs))


# -- refuses ---------------------------------------------------------------------------------------


def refusal(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {}
    return reasons(report)


def test_refuses_trained_angles(x):
    cos, sin = halves_cache()
    assert_expected_inline(
        refusal(huggingface, x, cos, sin.requires_grad_()),
        """sin is trained; the kernel has no gradient for it""",
    )
    cache = pairs_cache()[0].requires_grad_()
    assert_expected_inline(
        refusal(torchtune_llama, x, cache),
        """the angles are trained; the kernel has no gradient for them""",
    )


def test_refuses_a_cut_that_is_not_in_the_middle(x):
    def fn(x, cos, sin):
        x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
        return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin

    assert_expected_inline(
        refusal(fn, x, *halves_cache()),
        """heads of 12 elements are cut at 4, expected in the middle""",
    )


def halves_of(x, cos, sin, half=D // 2):
    return x[..., :half], x[..., half:], cos.unsqueeze(2), sin.unsqueeze(2)


def test_refuses_slices_of_unequal_width(x):
    """Of one angle for all, which is broadcast."""

    def fn(x, cos, sin):
        x1, x2, cos, sin = halves_of(x[..., :3], cos, sin, 1)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)

    assert_expected_inline(
        refusal(fn, x, *(t[..., :1] for t in half_cache())),
        """heads of 3 elements are cut at 1, expected in the middle""",
    )


def test_refuses_an_odd_number_of_elements(x):
    def fn(x, cos, sin):
        x1, x2 = x.chunk(2, dim=-1)
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), -1)

    assert_expected_inline(
        refusal(fn, x[..., :3], *(t[..., :1] for t in half_cache())),
        """heads of 3 elements are cut at 1, expected in the middle""",
    )


def test_refuses_tables_of_another_width(x):
    cos, sin = (t[..., :1] for t in half_cache())
    assert_expected_inline(
        refusal(nanochat_itself, x, cos, sin),
        """cos is [1, 5, 1, 1] for an input of [2, 5, 3, 12], expected [b, s, 1, 6] or [b, 1, s, 6] with b or 1 in front""",
    )


def test_refuses_trained_sines_of_slices(x):
    cos, sin = half_cache()
    assert_expected_inline(
        refusal(nanochat_itself, x, cos, sin.requires_grad_()),
        """sin is trained; the kernel has no gradient for it""",
    )


def test_refuses_angles_that_differ_in_shape(x):
    cos, sin = halves_cache()
    assert_expected_inline(
        refusal(huggingface, x, cos, sin[:, :1]), """cos and sin differ in shape"""
    )


def test_refuses_one_position_for_all(x):
    cos, sin = (t[:, :1] for t in halves_cache())
    assert_expected_inline(
        refusal(huggingface, x, cos, sin),
        """cos is [1, 1, 1, 12] for an input of [2, 3, 5, 12], expected [b, s, 1, 12] or [b, 1, s, 12] with b or 1 in front""",
    )


def test_refuses_angles_that_broadcast_the_input(x):
    assert_expected_inline(
        refusal(huggingface, x[:1], *halves_cache(B)),
        """cos is [2, 1, 5, 12] for an input of [1, 3, 5, 12], expected [b, s, 1, 12] or [b, 1, s, 12] with b or 1 in front""",
    )


def test_refuses_one_angle_for_all_pairs(x):
    cos, sin = (t[..., :1] for t in half_cache())
    assert_expected_inline(
        refusal(gpt_oss, x, cos, sin),
        """cos is [1, 1, 5, 1] for an input of [2, 3, 5, 12], expected [b, s, 1, 6] or [b, 1, s, 6] with b or 1 in front""",
    )


def test_refuses_neighbours_in_another_order(x):
    """What is stacked goes through another reshape than ``flatten(-2)``."""

    def fn(x, cos, sin):
        x, cos, sin = x[:1].transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
        other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(N, 1, S, D)
        return x * cos + other * sin

    assert_expected_inline(
        refusal(fn, x, *neighbours_cache()),
        """[1, 3, 5, 12] became [3, 3, 5, 12]: heads do not stay heads""",
    )


def test_refuses_trained_angles_of_neighbours(x):
    cos, sin = neighbours_cache()
    assert_expected_inline(
        refusal(cohere, x, cos.requires_grad_(), sin),
        """cos is trained; the kernel has no gradient for it""",
    )


def test_refuses_a_rotated_value_that_escapes(x):
    def fn(x, cos, sin):
        x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
        other = rotate_neighbours(x)
        return x * cos + other * sin, other

    assert_expected_inline(
        refusal(fn, x, *neighbours_cache()), """the value of `reshape` (other) is also returned"""
    )


def test_refuses_double_precision(x):
    cos, sin = (t.double() for t in halves_cache())
    assert_expected_inline(
        refusal(huggingface, x.double(), cos, sin),
        """the input is torch.float64; the kernel computes in float32""",
    )


def test_refuses_heads_of_one_dimension_less(x):
    def fn(x, cos, sin):
        return x * cos + rotate_half(x) * sin

    cos, sin = (t[0].unsqueeze(1) for t in halves_cache())
    assert_expected_inline(
        refusal(fn, x[0], cos, sin), """the input is 3-D, expected [b, s, h, d] or [b, h, s, d]"""
    )


def test_refuses_axial_positions(x):  # torchtune's vision models
    def fn(x, cache):
        tiles = x.float().reshape(B, 1, S, N, D // 2, 2)
        cache = cache.view(1, 1, S, 1, D // 2, 2)
        out = torch.stack(
            [
                tiles[..., 0] * cache[..., 0] - tiles[..., 1] * cache[..., 1],
                tiles[..., 1] * cache[..., 0] + tiles[..., 0] * cache[..., 1],
            ],
            -1,
        )
        return out.reshape(x.shape).type_as(x)

    assert_expected_inline(
        refusal(fn, x, pairs_cache()[0]),
        """heads are not cut into pairs: [2, 5, 3, 12] became [2, 1, 5, 3, 6, 2]""",
    )


def test_refuses_angles_of_each_head(x):
    def fn(x, cache):
        pairs = x.float().reshape(B, S, N, -1, 2)
        a, b, cos, sin = pairs[..., 0], pairs[..., 1], cache[..., 0], cache[..., 1]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3)

    assert_expected_inline(
        refusal(fn, x, torch.rand(1, S, N, D // 2, 2, device=DEVICE)),
        """the angles are [1, 5, 3, 6, 2] for an input of [2, 5, 3, 12], expected [b, s, 1, d / 2, 2] with b or 1 in front""",
    )


# -- leaves alone ----------------------------------------------------------------------------------


def nothing(fn, *args):
    (report,) = capture(fn, *args).reports
    assert report.counts == {} and report.rejections == []


def test_leaves_neighbours_with_the_other_sign(x):
    def fn(x, cos, sin):
        x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
        other = torch.stack((x[..., 1::2], -x[..., ::2]), -1).flatten(-2)
        return x * cos + other * sin

    nothing(fn, x, *neighbours_cache())


def test_leaves_neighbours_that_change_places(x):
    def fn(x, cos, sin):
        x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
        other = torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2)
        return x * cos + other * sin

    nothing(fn, x, *neighbours_cache())


def test_leaves_neighbours_of_another_tensor(x):
    def fn(x, y, cos, sin):
        x, y, cos, sin = x.transpose(1, 2), y.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
        return x * cos + rotate_neighbours(y) * sin

    nothing(fn, x, x.clone(), *neighbours_cache())


WRONG = {
    "no minus": lambda a, b, cos, sin: (a * cos + b * sin, b * cos + a * sin),
    "two minuses": lambda a, b, cos, sin: (a * cos - b * sin, b * cos - a * sin),
    "minus of minus": lambda a, b, cos, sin: (a * cos + b * sin, b * cos + -a * -sin),
    "the other half": lambda a, b, cos, sin: (b * cos + a * sin, a * cos - b * sin),
    "one half twice": lambda a, b, cos, sin: (a * cos + b * sin, a * cos - a * sin),
    "cosine and sine change places": lambda a, b, cos, sin: (a * cos + b * sin, b * sin - a * cos),
    "another sine": lambda a, b, cos, sin: (a * cos + b * sin, b * cos - a * (sin + 1)),
    "three parts": lambda a, b, cos, sin: (a * cos + b * sin, b * cos - a * sin, a),
}


@pytest.mark.parametrize("case", WRONG)
def test_leaves_halves_that_are_not_turned(case, x):
    def fn(x, cos, sin):
        return torch.cat(WRONG[case](*halves_of(x, cos, sin)), -1)

    nothing(fn, x, *half_cache())


def test_leaves_halves_joined_in_another_dimension(x):
    def fn(x, cos, sin):
        a, b, cos, sin = halves_of(x, cos, sin)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), 2)

    nothing(fn, x, *half_cache())


def test_leaves_parts_that_overlap(x):
    def fn(x, cos, sin):
        a, b, cos, sin = x[..., :6], x[..., 5:11], cos.unsqueeze(2), sin.unsqueeze(2)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)

    nothing(fn, x, *half_cache())


def test_leaves_every_third_element(x):
    def fn(x, cos, sin):
        x = x.transpose(1, 2)
        cos, sin = (t[..., : D // 3].unsqueeze(1) for t in (cos, sin))
        x1, x2 = x[..., 0::3], x[..., 1::3]
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)

    nothing(fn, x, *halves_cache())


def test_leaves_halves_that_change_places(x):
    def fn(x, cos, sin):
        x, cos, sin = x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)
        first, second = torch.chunk(x, 2, dim=-1)
        return torch.cat((second * cos + first * sin, first * cos - second * sin), dim=-1)

    nothing(fn, x, *half_cache())


def test_leaves_pairs_with_the_other_sign(x):
    def fn(x, cache):
        pairs = x.float().reshape(B, S, N, -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        cos, sin = (cache.view(1, S, 1, -1, 2)[..., i] for i in (0, 1))
        return torch.stack([a * cos + b * sin, b * cos - a * sin], -1).flatten(3)

    nothing(fn, x, pairs_cache()[0])


def test_leaves_pairs_put_back_as_halves(x):
    def fn(x, cache):
        pairs = x.float().reshape(B, S, N, -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        cos, sin = (cache.view(1, S, 1, -1, 2)[..., i] for i in (0, 1))
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    nothing(fn, x, pairs_cache()[0])


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numerics(case, dtype):
    check_numerics(case, dtype, "aot_eager")


@pytest.mark.parametrize("case", ["torchtune_llama_packed", "huggingface_phi3_partial"])
def test_numerics_under_inductor(case):
    check_numerics(case, torch.bfloat16, "inductor")


def check_numerics(case, dtype, inner):
    spelling, caches, convention = SPELLINGS[case]
    made = list(caches())
    batch = B if case.endswith(("packed", "of_each_sequence")) else 1
    size = 8 if case.endswith(("partial", "trailing")) else D
    transposed = spelling in HEADS_FIRST
    if spelling in (*HEADS_FIRST, *CAST):
        made = [t.to(dtype) for t in made]

    def exact(x):
        out = rotated(x, batch, size, convention)
        return out.transpose(1, 2) if transposed else out

    no_worse_than_eager(
        lambda x: spelling(x, *made), exact, [(B, S, 40 * N, D)], "rope", dtype, inner
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", [huggingface, huggingface_phi3], ids=lambda f: f.__name__)
def test_numerics_of_halves_that_differ(spelling, dtype):
    tables = [t.to(dtype) for t in unequal_halves(angles(size=8), 2 * angles(size=8))]
    if spelling is huggingface:
        tables = [t.repeat_interleave(2, -1)[..., :D] for t in tables]

    def exact(x):
        return spelling(x, *(t.double() for t in tables))

    no_worse_than_eager(lambda x: spelling(x, *tables), exact, [(B, S, 40 * N, D)], "rope", dtype)
