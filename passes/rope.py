"""Rotary position embedding -> ``liger_fx::rope`` or ``liger_fx::rope_interleaved``.

Matches      By halves (``x * cos + cat((-x2, x1)) * sin``): Hugging Face on [b, h, s, d],
             torchtune's Phi-3 and Qwen2 on [b, s, h, d], Phi-3's rotation of a part of each head,
             ModernBERT's in fp32; with a table of half the width (GPT-OSS); the other way round
             (nanochat, modded-nanogpt).
             Neighbours (``x * cos + stack((-x2, x1)).flatten(-2) * sin``): GLM, GPT-J, Helium, in
             fp32 Cohere and ERNIE 4.5; put in halves: DeepSeek-V3.
             Interleaved, in fp32: torchtune's Llama, Mistral and Gemma, with positions in order or
             packed; torchtitan's product of complex numbers.
             Each query and each key is a match of its own.
Leaves alone angles that are trained, or that fit both layouts; vision models' axial positions.
Numerics     fp32, rounded once: interleaved as the models do, by halves finer than they do.
"""

from typing import Any

import torch
from liger_fx.passes._norms import DTYPES
from torch import fx

from liger_fx import ops
from liger_fx.canonical import fake, op_name, positional, same_sizes
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite


def halves(x, cos, sin, half):
    return _rotated(x, cos, sin, half)


def halves_rounded(x, cos, sin, half):
    return _rotated(x, cos, sin, half).to(x.dtype)


def partial(x, cos, sin, rotary, half):
    """Phi-3's: the elements after the first ``rotary`` pass."""
    return torch.cat((_rotated(x[..., :rotary], cos, sin, half), x[..., rotary:]), dim=-1)


def partial_of_all(x, cos, sin, rotary, half):
    """The same where none are left: the first slice does nothing, the second is empty."""
    return torch.cat((_rotated(x, cos, sin, half), x[..., rotary:]), dim=-1)


def halves_in_fp32(x, cos, sin, half):
    return _rotated(x.float(), cos, sin, half).to(x.dtype)


def halves_backwards(x, cos, sin, half):
    """nanochat's: ``rotate_half`` has the other sign."""
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sin


def _rotated(x, cos, sin, half):
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def pairs(x, cos, sin):
    return x * cos + _neighbours(x) * sin


def pairs_in_fp32(x, cos, sin):
    """Cohere's."""
    f = x.float()
    return (f * cos + _neighbours(f) * sin).to(x.dtype)


def pairs_widened(x, cos, sin):
    """ERNIE's."""
    return (x.float() * cos + _neighbours(x).float() * sin).to(x.dtype)


def pairs_partial(x, cos, sin, rotary):
    """GLM's: the elements after the first ``rotary`` pass."""
    turned = x[..., :rotary]
    return torch.cat((turned * cos + _neighbours(turned) * sin, x[..., rotary:]), dim=-1)


def _neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def interleaved(x, angles):
    pairs = x.float().reshape(-1)  # any reshape: `check` looks at the shapes
    turned = forwards(pairs[..., 0], pairs[..., 1], angles[..., 0], angles[..., 1])
    return torch.stack(turned, -1).flatten(3).to(x.dtype)


def complex_numbers(x, angles):
    pairs = torch.view_as_complex(x.float().reshape(-1))
    return torch.view_as_real(pairs * angles).flatten(3).to(x.dtype)


# -- one angle for both elements of a pair: how heads are cut, which way pairs are turned ----------


def chunks(x, half):
    """GPT-OSS's, modded-nanogpt's."""
    halves = x.chunk(2, dim=-1)
    return halves[0], halves[1]


def slices(x, half):
    """nanochat's."""
    return x[..., :half], x[..., half:]


def pairs_to_halves(x, half):
    """DeepSeek-V3's."""
    return x[..., ::2], x[..., 1::2]


def forwards(a, b, cos, sin):
    return a * cos - b * sin, b * cos + a * sin


def backwards(a, b, cos, sin):
    return a * cos + b * sin, b * cos - a * sin


def backwards_by_sine(a, b, cos, sin):
    """nanochat's, modded-nanogpt's: ``x1 * (-sin)``."""
    return a * cos + b * sin, b * cos + a * -sin


def backwards_by_element(a, b, cos, sin):
    """``-x1 * sin``"""
    return a * cos + b * sin, b * cos + -a * sin


def _spelled(cut, turn):
    """The patterns of a cut and a turn: in the dtype of x, and in fp32."""

    def plain(x, cos, sin, half):
        return torch.cat(turn(*cut(x, half), cos, sin), dim=-1)

    def in_fp32(x, cos, sin, half):
        return plain(x.float(), cos, sin, half).to(x.dtype)

    for pattern in (plain, in_fp32):
        pattern.__name__ = f"{cut.__name__}_{turn.__name__}"
    return in_fp32, plain


CUTS = (chunks, slices, pairs_to_halves)
TURNS = (forwards, backwards, backwards_by_sine, backwards_by_element)
SPELLED = [pattern for cut in CUTS for turn in TURNS for pattern in _spelled(cut, turn)]
ONE_ANGLE = {pattern.__name__ for pattern in SPELLED}
NEIGHBOURS = ("pairs", "pairs_in_fp32", "pairs_widened", "pairs_partial")

OF_A_NORM = "of a norm"
NORMS = {"rms_norm", "layer_norm", "rsqrt"}
BEHIND_A_NORM = {"cast", "reshape", "transpose", "mul"}


def variant(match: Match) -> str:
    """Inductor turns heads in the kernel that norms them, as Qwen3's and Gemma3's."""
    seen, left = set(), [match.bindings["x"]]
    while left:
        node = left.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        name = op_name(node)
        if name in NORMS or (name == "pow" and positional(node)[1] == -0.5):
            return OF_A_NORM
        if name in BEHIND_A_NORM:
            left += node.all_input_nodes
    return ""


def check(match: Match, x, cos=None, sin=None, half=None, rotary=None, angles=None):
    if x.dim() != 4:
        raise Reject(f"the input is {x.dim()}-D, expected [b, s, h, d] or [b, h, s, d]")
    if x.dtype not in DTYPES:
        raise Reject(f"the input is {x.dtype}; the kernel computes in float32")
    if match.output.dtype not in DTYPES:
        raise Reject(f"the output is {match.output.dtype}; the kernel computes in float32")
    if angles is None:
        _check_tables(match, x, cos, sin, half, rotary)
    else:
        _check_angles(match, x, angles)


def _check_tables(match: Match, x: Any, cos: Any, sin: Any, half: Any, rotary: Any) -> None:
    size = x.shape[-1] if rotary is None else rotary
    if half is None:
        half = size // 2
    if not isinstance(half, int) or 2 * half != size or size > x.shape[-1]:
        raise Reject(f"heads of {size} elements are cut at {half}, expected in the middle")
    for name, angle in (("cos", cos), ("sin", sin)):
        if not isinstance(angle, torch.Tensor) or not same_sizes(angle.shape, cos.shape):
            raise Reject("cos and sin differ in shape")
        if angle.requires_grad:
            raise Reject(f"{name} is trained; the kernel has no gradient for it")
    _sequence_dim(x, cos, half if match.pattern.name in ONE_ANGLE else size)
    if not same_sizes(match.output.shape, x.shape):
        raise Reject(f"{list(x.shape)} became {list(match.output.shape)}: heads do not stay heads")


def _sequence_dim(x: torch.Tensor, cos: torch.Tensor, size: int) -> int:
    """1 for [b, s, h, d], 2 for [b, h, s, d]: where cos is as long as x; the other is 1."""
    sizes, wanted = [str(n) for n in cos.shape], [str(n) for n in x.shape]
    if len(sizes) == 4 and sizes[0] in ("1", wanted[0]) and sizes[3] == str(size):
        fitting = [d for d in (1, 2) if sizes[d] == wanted[d] and sizes[3 - d] == "1"]
        if len(fitting) == 1:
            return fitting[0]
    raise Reject(
        f"cos is {list(cos.shape)} for an input of {list(x.shape)}, expected [b, s, 1, {size}] or "
        f"[b, 1, s, {size}] with b or 1 in front"
    )


def _check_angles(match: Match, x: torch.Tensor, angles: torch.Tensor) -> None:
    size = x.shape[-1]
    if angles.requires_grad:
        raise Reject("the angles are trained; the kernel has no gradient for them")
    (rotated,) = (fake(n) for n in match.nodes if op_name(n) in ("stack", "view_as_real"))
    if not same_sizes(rotated.shape, [*x.shape[:-1], size // 2, 2]) or not same_sizes(
        match.output.shape, x.shape
    ):
        raise Reject(f"heads are not cut into pairs: {list(x.shape)} became {list(rotated.shape)}")
    table = list(angles.shape if angles.is_complex() else angles.shape[:-1])
    batch = len(table) == 4 and str(table[0]) in ("1", str(x.shape[0]))
    if not batch or not same_sizes(table[1:], [x.shape[1], 1, size // 2]):
        raise Reject(
            f"the angles are {list(angles.shape)} for an input of {list(x.shape)}, expected "
            "[b, s, 1, d / 2, 2] with b or 1 in front"
        )


def replace(match: Match, x, cos=None, sin=None, angles=None):
    if angles is not None:
        if match.values["angles"].is_complex():
            angles = torch.view_as_real(angles)
        return ops.rope_interleaved(x, angles.squeeze(2), False)
    name, output = match.pattern.name, match.output
    table = match.values["cos"]
    sequence = _sequence_dim(match.values["x"], table, table.shape[-1])
    cos, sin = cos.squeeze(3 - sequence), sin.squeeze(3 - sequence)
    if name in ONE_ANGLE:
        cos, sin = (torch.cat((angle, angle), dim=-1) for angle in (cos, sin))
    if name == "halves_backwards":  # whose sines may differ: `inverse` would exchange them
        sin = -sin
    inverse = name in ONE_ANGLE and "backwards" in name
    turn = inverse, name in NEIGHBOURS or name.startswith("pairs_to_halves"), name in NEIGHBOURS
    if output.dtype != match.values["x"].dtype:  # autocast: angles are wider than queries
        x = x.to(output.dtype)
    if sequence == 1:
        return ops.rope(x, cos, sin, *turn)
    if output.is_contiguous():  # a transposed result would be copied
        return ops.rope(x, cos, sin, *turn, True)
    return ops.rope(x.transpose(1, 2), cos, sin, *turn).transpose(1, 2)


rope = Rewrite(
    name="rope",
    patterns=[
        halves_rounded,
        halves,
        partial,
        partial_of_all,
        halves_in_fp32,
        halves_backwards,
        pairs,
        pairs_in_fp32,
        pairs_widened,
        pairs_partial,
        *SPELLED,
        interleaved,
        complex_numbers,
    ],
    check=check,
    replace=replace,
    saved=["cos", "sin", "angles"],
    variant=variant,
)
