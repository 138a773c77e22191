"""What random programs are put together from: see `fuzz`.

Source text with ``$name`` for a value that the text defines, which gets a fresh name, and
``{name}`` for a value that it is given. The first letter of a name says what it is: y labels, w a
weight, m a mask, l a loss, t something that is no tensor; any other a float tensor. H, HEADS ... are
the sizes; the batch is 2, and the sequence length s is the argument of ``inputs``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

H, V, FFN = 8, 11, 6

IMPORTS = """\
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
"""

# Called by its packet, torch.ops.liger_fx_fuzz.scale, as most user code does. Its name does not say
# that it writes.
CUSTOM_OP = """
if not hasattr(torch.ops.liger_fx_fuzz, "scale"):
    torch.library.define("liger_fx_fuzz::scale", "(Tensor(a!) x, float by) -> ()")

    @torch.library.impl("liger_fx_fuzz::scale", "CompositeExplicitAutograd")
    def scale(x, by):
        x.mul_(by)
"""

# Dynamo does not look inside, and writes to `data` are not counted.
UNKNOWN_FUNCTION = """
@torch._dynamo.allow_in_graph
def halve(x):
    x.data.mul_(0.5)
    return x.sum()
"""

SCRIPT = """
import liger_fx
options = {options}
for backend in ("{inner}", lambda *graph: liger_fx.liger_fx(*graph, options=options)):
    torch._dynamo.reset()
    leaves = inputs()
    given = {given}
    torch.manual_seed({seed})
    outputs = torch.compile(program, backend=backend, dynamic={dynamic})(*given)
    print([o.detach() for o in outputs])
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    terms = [(o.double() * torch.linspace(1, 2, o.numel()).view(o.shape)).sum() for o in outputs if o.requires_grad]
    print(torch.autograd.grad(sum(terms), wanted, allow_unused=True) if terms and wanted else "")
"""


@dataclass(frozen=True)
class Program:
    """inputs: lines ``name = tensor``. body: lines of the function, indented relative to it.
    outputs: names that it returns. leaves: inputs are given as they are; else as their copies,
    which may be written to even if they require gradients. inner: the compiler below."""

    seed: int
    motif: str
    inputs: tuple[str, ...]
    body: tuple[str, ...]
    outputs: tuple[str, ...]
    inner: str = "aot_eager"
    dynamic: bool = False
    leaves: bool = True

    @property
    def input_names(self) -> list[str]:
        return [line.split(" = ")[0] for line in self.inputs]

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest that anything is computed in."""
        return torch.bfloat16 if "bfloat16" in self.text else torch.float32

    @property
    def text(self) -> str:
        """``inputs(s)`` and ``program(...)`` as Python."""
        names = ", ".join(self.input_names)
        returned = f"return {', '.join(self.outputs)},"
        lines = [
            f"def inputs(s=5):\n    torch.manual_seed({self.seed})",
            *(f"    {line}" for line in self.inputs),
            f"    return {names},\n\n\ndef program({names}):",
            *(f"    {line}" for line in (*self.body, returned)),
        ]
        body = "\n".join(self.body)
        needed = CUSTOM_OP if "liger_fx_fuzz" in body else ""
        needed += UNKNOWN_FUNCTION if "halve" in body else ""
        return f"{IMPORTS}{needed}\n\n" + "\n".join(lines) + "\n"

    def script(self, policy: object = "all") -> str:
        """The program, and the lines that run it by both compilers."""
        options = {"policy": policy, "inner": self.inner, "strict": False}
        given = "leaves" if self.leaves else "[leaf.clone() for leaf in leaves]"
        how = dict(inner=self.inner, seed=self.seed, dynamic=self.dynamic)
        return self.text + SCRIPT.format(options=options, given=given, **how)

    def without_unused_inputs(self) -> Program:
        used = set(re.findall(r"\w+", " ".join([*self.body, *self.outputs])))
        kept = [
            line for line, name in zip(self.inputs, self.input_names, strict=True) if name in used
        ]
        return Program(**{**self.__dict__, "inputs": tuple(kept)})


_INDICES = """\
$mq = torch.arange({q}.shape[2])[:, None]
$mk = torch.arange({q}.shape[2])[None]
"""
_DOCUMENTS = "$md = (torch.diff({d}, prepend={d}[:, :1] - 1, dim=-1) != 1).cumsum(-1)\n"
PADDING = [
    "torch.ones(2, s, dtype=torch.long)",
    "(torch.arange(s) < torch.tensor([[s], [s - 2]])).long()",
    "(torch.arange(s) >= torch.tensor([[2], [0]])).long()",
    "(torch.arange(s) != 1).long().repeat(2, 1)",
]
# Which keys a query sees. Of the last three nothing is made.
MASKS = {
    "causal": _INDICES + "$m = $mk <= $mq",
    "triangle": "$m = torch.ones({q}.shape[2], {q}.shape[2], dtype=torch.bool).tril()",
    "additive": _INDICES + "$m = torch.where($mk <= $mq, 0.0, float('-inf')).to({q}.dtype)",
    "window": _INDICES + "$m = ($mk <= $mq) & ($mk > $mq - 3)",
    "padding": _INDICES + "$m = ($mk <= $mq) & {p}.bool()[:, None, None, :]",
    "padding in a window": _INDICES
    + "$m = ($mk <= $mq) & ($mk > $mq - 2) & {p}.bool()[:, None, None]",
    "documents": _INDICES
    + _DOCUMENTS
    + "$m = ($md[:, None, :, None] == $md[:, None, None]) & ($mk <= $mq)",
    "documents by position": _INDICES
    + _DOCUMENTS
    + "$m = ($md[:, None, :, None] == $md[:, None, None])"
    + " & ({d}[:, None, None] <= {d}[:, None, :, None])",
    "one ahead": _INDICES + "$m = $mk <= $mq + 1",
    "positions alone": "$m = {d}[:, None, None] <= {d}[:, None, :, None]",
    "padded queries": _INDICES + "$m = ($mk <= $mq) & {p}.bool()[:, None, :, None]",
}

_FLOATING = "MASK.is_floating_point()"
_ADDED = f"(MASK if {_FLOATING} else torch.where(MASK, 0.0, float('-inf')).to({{q}}.dtype))"
_CHOSEN = (
    "$n = {q} @ {k}.transpose(2, 3) * 0.7\n"
    f"$n = torch.where(MASK == 0 if {_FLOATING} else MASK, $n, torch.finfo($n.dtype).min)\n"
    "$w = $n.softmax(-1)\n$a = $w @ {v}"
)
WRITTEN_OUT = [
    f"$a = torch.softmax({{q}} @ {{k}}.transpose(2, 3) * 0.5 + {_ADDED}, -1) @ {{v}}",
    f"$w = F.softmax({{q}} @ {{k}}.transpose(-1, -2) / 2 + {_ADDED}, dim=-1, dtype=torch.float32)"
    ".to({v}.dtype)\n$a = torch.matmul(F.dropout($w, 0.1, training=False), {v})",
    "$n = {q} @ {k}.transpose(2, 3)\n"
    f"$n = $n.masked_fill(MASK < 0 if {_FLOATING} else ~MASK, float('-inf'))\n"
    "$a = $n.softmax(-1) @ {v}",
    _CHOSEN,
    f"{_CHOSEN} + $w.sum() * 0",  # the weights are read
]

# -- the menu -------------------------------------------------------------------------------------

NORMS = {
    "torchtune": "$f = {x}.float()\n$r = F.rms_norm($f, ({x}.shape[-1],), {w}, 0.1)\n$n = $r.to({x}.dtype)",
    "module": "$n = F.rms_norm({x}, ({x}.shape[-1],), {w}, 0.1)",
    "gemma": "$f = {x}.float()\n$q = torch.rsqrt($f.pow(2).mean(-1, keepdim=True) + 0.1)\n$r = $f * $q\n$n = ($r * (1.0 + {w}.float())).to({x}.dtype)",
    "huggingface": "$f = {x}.to(torch.float32)\n$q = $f.pow(2).mean(-1, keepdim=True)\n$r = $f * torch.rsqrt($q + 0.1)\n$n = {w} * $r.to({x}.dtype)",
    "olmo": "$f = {x}.float()\n$q = ($f * $f).mean(-1, keepdim=True)\n$r = $f * torch.rsqrt($q + 0.1)\n$n = ({w}.float() * $r).to({x}.dtype)",
    "cast_twice": "$q = {x}.float().pow(2).mean(-1, keepdim=True)\n$r = {x}.float() * torch.rsqrt($q + 0.1)\n$n = {w} * $r.to({x}.dtype)",
    "unweighted": "$f = {x}.float()\n$q = $f.pow(2).mean(-1, keepdim=True)\n$n = ($f * torch.rsqrt($q + 0.1)).to({x}.dtype)",
    "layer_norm": "$n = F.layer_norm({x}, ({x}.shape[-1],), {w}, {b}, 0.1)",
    "fp32_layer_norm": "$f = {x}.float()\n$n = F.layer_norm($f, ({x}.shape[-1],), {w}.float(), {b}.float(), 0.1).to({x}.dtype)",
}  # fmt: skip

MLPS = {
    "silu": "$g = F.linear({x}, {w})\n$a = F.silu($g)\n$u = F.linear({x}, {b})\n$h = F.linear($a * $u, {c})",
    "gelu": "$g = F.linear({x}, {w})\n$u = F.linear({x}, {b})\n$a = F.gelu($g, approximate='tanh')\n$p = $a * $u\n$h = F.linear($p, {c})",
    "gate_up": "$z = F.linear({x}, torch.cat(({w}, {b})))\n$g, $u = $z.chunk(2, dim=-1)\n$p = $u * F.silu($g)\n$h = F.linear($p, {c})",
    "inplace_silu": "$g = F.linear({x}, {w})\n$u = F.linear({x}, {b})\n$a = F.silu($g, inplace=True)\n$h = F.linear($a * $u, {c})",
    "casts": "$a = F.silu(F.linear({x}.float(), {w}.float()))\n$u = F.linear({x}.float(), {b}.float())\n$h = F.linear(($a * $u).to({x}.dtype), {c})",
    "product_in_place": "$g = F.linear({x}, {w})\n$u = F.linear({x}, {b})\n$a = F.silu($g)\n$a *= $u\n$h = F.linear($a, {c})",
}  # fmt: skip

_CAT = "torch.cat((-{0}[..., 2:], {0}[..., :2]), dim=-1)"
ROPES = {
    "halves": "$r = {x} * {c} + " + _CAT.format("{x}") + " * {s}",
    "rounded": "$f = {x}.float()\n$r = ($f * {c} + " + _CAT.format("$f") + " * {s}).to({x}.dtype)",
    "partial": "$p = {x}[..., :4]\n$r = torch.cat(($p * {c} + " + _CAT.format("$p") + " * {s}, {x}[..., 4:]), dim=-1)",
    "interleaved": "$p = {x}.float().reshape(*{x}.shape[:-1], -1, 2)\n$a = {c}[..., :2].movedim(1, 2)\n$d = {s}[..., :2].movedim(1, 2)\n"
    "$e = torch.stack([$p[..., 0] * $a - $p[..., 1] * $d, $p[..., 1] * $a + $p[..., 0] * $d], -1)\n$r = $e.flatten(3).type_as({x})",
    "table": "$p = {x}.float().reshape(*{x}.shape[:-1], -1, 2)\n$a = torch.stack(({c}[..., :2], {s}[..., :2]), -1).float().view(1, -1, 1, 2, 2)\n"
    "$e = torch.stack([$p[..., 0] * $a[..., 0] - $p[..., 1] * $a[..., 1], $p[..., 1] * $a[..., 0] + $p[..., 0] * $a[..., 1]], -1)\n$r = $e.flatten(3).type_as({x})",
    "complex": "$p = torch.view_as_complex({x}.float().reshape(*{x}.shape[:-1], -1, 2))\n$a = torch.complex({c}[0, 0, :, :2].float(), {s}[0, 0, :, :2].float()).view(1, -1, 1, 2)\n"
    "$r = torch.view_as_real($p * $a).flatten(3).type_as({x})",
}  # fmt: skip
_HEADS_SECOND = ("interleaved", "table", "complex")  # [b, s, h, d]; the others rotate [b, h, s, d]

_CE = "F.cross_entropy($v, {y}.reshape(-1), ignore_index=-100, reduction='{reduction}')"
HEADS = {
    "flat": f"$z = F.linear({{h}}, {{w}})\n$v = $z.float().reshape(-1, {V})\n$l = {_CE}",
    "bias": f"$z = F.linear({{h}}, {{w}}, {{b}})\n$v = $z.view(-1, {V})\n$l = {_CE}",
    "shift": f"$z = F.linear({{h}}, {{w}})\n$y = {{y}}[..., 1:].contiguous()\n$v = $z[..., :-1, :].contiguous().view(-1, {V})\n"
    "$l = F.cross_entropy($v, $y.view(-1), reduction='{reduction}')",
    "classes_second": "$z = F.linear({h}, {w})\n$y = {y}[..., 1:].contiguous()\n$v = $z[:, :-1].transpose(1, 2)\n$l = F.cross_entropy($v, $y, reduction='{reduction}')",
    "softcap": f"$z = F.linear({{h}}, {{w}})\n$c = torch.tanh($z / 3.0) * 3.0\n$v = $c.float().reshape(-1, {V})\n$l = {_CE}",
    "smoothed": f"$z = F.linear({{h}}, {{w}})\n$v = $z.view(-1, {V})\n$l = F.cross_entropy($v, {{y}}.reshape(-1), label_smoothing=0.1)",
    "logits": f"$v = {{h}}.reshape(-1, {H}).float()\n$l = F.cross_entropy($v, {{y}}.reshape(-1).clamp(max={H - 1}), reduction='{{reduction}}')",
    "logprobs": "$z = F.linear({h}, {w})\n$y = {y}.clamp(min=0)\n$p = F.log_softmax($z, -1, dtype=torch.float32)\n$g = torch.gather($p, -1, $y.unsqueeze(-1)).squeeze(-1)\n$l = -($g * ({y} != -100)).sum()",
    "trl": "$z = F.linear({h}, {w}) / 0.7\n$y = {y}.clamp(min=0)\n$c = torch.gather($z, -1, $y.unsqueeze(-1)).squeeze(-1)\n$l = $c - torch.logsumexp($z, -1)",
    "entropy": "$z = F.linear({h}, {w})\n$y = {y}.clamp(min=0)\n$p = F.log_softmax($z.float(), -1)\n$g = torch.gather($p, -1, $y.unsqueeze(-1)).squeeze(-1)\n$e = -($p.exp() * $p).sum(-1)\n$l = -$g.mean() - 0.1 * $e.mean()",
    "kl_div": "$z = F.linear({h}, {w})\n$c = F.linear({h}.detach() * 0.5, {b2})\n$q = F.log_softmax($z, -1, dtype=torch.float32)\n$p = F.softmax($c.detach(), -1, dtype=torch.float32)\n$d = F.kl_div($q, $p, reduction='none').sum(-1)\n$l = ($d * ({y} != -100)).sum()",
    "forward_kl": "$z = F.linear({h}, {w})\n$c = F.linear({h}.detach() * 0.5, {b2}).detach()\n$p = F.softmax($c, -1, dtype=torch.float32)\n$q = F.log_softmax($z, -1, dtype=torch.float32)\n$m = torch.isinf($z)\n"
    "$d = torch.masked_fill($p * $q, $m, 0)\n$x = torch.sum($d, dim=-1).view(-1)\n$k = ({y} != -100).int()\n$l = -torch.sum($x * $k.view(-1), dim=0)",
    "distillation": f"$z = F.linear({{h}}, {{w}})\n$c = F.linear({{h}}.detach() * 0.5, {{b2}}).detach()\n$q = F.log_softmax($z, -1, dtype=torch.float32)\n$p = F.softmax($c, -1, dtype=torch.float32)\n$d = F.kl_div($q, $p, reduction='batchmean')\n"
    f"$l = 0.5 * $d + 0.5 * F.cross_entropy($z.float().view(-1, {V}), {{y}}.reshape(-1))",
    "two_losses": f"$z = F.linear({{h}}, {{w}})\n$a = F.cross_entropy($z.view(-1, {V}), {{y}}.reshape(-1))\n$l = $a + 1e-2 * torch.logsumexp($z.float(), -1).pow(2).mean()",
    "chunked": f"$a, $b = {{h}}.chunk(2, dim=1)\n$c, $d = {{y}}.chunk(2, dim=1)\n$p = F.cross_entropy(F.linear($a, {{w}}).reshape(-1, {V}).float(), $c.reshape(-1), reduction='sum')\n"
    f"$q = F.cross_entropy(F.linear($b, {{w}}).reshape(-1, {V}).float(), $d.reshape(-1), reduction='sum')\n$l = (0.0 + $p + $q) / ({{y}} != -100).sum()",
}  # fmt: skip

# Sums of several terms, weights and masks of tokens, and what is no sum.
_TOKENS = f"$z = F.linear({{h}}, {{w}})\n$v = $z.float().reshape(-1, {V})\n$a = F.cross_entropy($v, {{y}}.reshape(-1), reduction='none')\n"
_LOSS = f"$z = F.linear({{h}}, {{w}})\n$v = $z.float().reshape(-1, {V})\n$a = F.cross_entropy($v, {{y}}.reshape(-1))\n"
_LOGPROBS = "$z = F.linear({h}, {w})\n$p = F.log_softmax($z.float(), -1)\n$g = torch.gather($p, -1, {y}.clamp(min=0).unsqueeze(-1)).squeeze(-1)\n"
_DIVERGENCE = "$z = F.linear({h}, {w})\n$c = F.linear({h}.detach() * 0.5, {b2}).detach()\n$q = F.log_softmax($z.float(), -1)\n$p = F.softmax($c.float(), -1)\n$d = F.kl_div($q, $p, reduction='none')\n"
SUMS = {
    "weighted": _TOKENS + "$k = torch.linspace(0, 2, $a.numel())\n$g = $a * $k\n$l = $g.sum() / $k.sum()",
    "masked": _TOKENS + "$m = {y}.reshape(-1) > 4\n$g = $a.masked_fill($m, 0.0)\n$l = $g.sum() / 3",
    "in place": _TOKENS + "$g = $a * 2\n$g.masked_fill_({y}.reshape(-1) > 4, 0.0)\n$l = $g.mean()",
    "sequences": _TOKENS + "$k = ({y} != -100).sum(1, keepdim=True).clamp(min=1)\n$g = $a.view({y}.shape) / $k\n$l = $g.sum(1).mean()",
    "logged": _TOKENS + "$k = $a.detach() * 2\n$l = torch.where({y}.reshape(-1) > 2, $a, 0.0).sum()",
    "focal": _TOKENS + "$k = (1 - torch.exp(-$a)) ** 2\n$l = ($k * $a).mean()",
    "z-loss": _LOSS + "$e = torch.logsumexp($z.float(), -1)\n$g = torch.where({y} != -100, $e.square(), 0.0)\n$l = $a + 1e-2 * $g.sum()",
    "bonus": _LOSS + "$p = F.log_softmax($z.float(), -1)\n$e = -($p.exp() * $p).sum(-1)\n$l = (1 + $a) / 2 - 0.1 * $e.mean()",
    "auxiliary": _LOSS + "$k = {h}.float().square().mean()\n$l = ($a + $k) * 0.5 - torch.logsumexp($z.float(), -1).mean()",
    "accumulated": _LOSS + "$l = {h}.float().square().mean()\n$l += $a",
    "apart": _LOSS + "$e = torch.logsumexp($z.float(), -1).square().mean()\n$l = $a * $e",
    "scaled": f"$z = F.linear({{h}}, {{w}})\n$c = $z / 8.0\n$v = (0.5 * $c).float().reshape(-1, {V})\n$l = F.cross_entropy($v, {{y}}.reshape(-1))",
    "class weights": f"$z = F.linear({{h}}, {{w}})\n$k = torch.linspace(0.5, 2, {V})\n$l = F.cross_entropy($z.float().reshape(-1, {V}), {{y}}.reshape(-1), $k, label_smoothing=0.1)",
    "policy": _LOGPROBS + "$k = torch.linspace(-1, 1, $g.numel()).view($g.shape)\n$l = -($g * $k * ({y} != -100)).mean()",
    "ratio": _LOGPROBS + "$k = ($g - $g.detach() * 0.9).exp()\n$l = torch.min($k, $k.clamp(0.8, 1.2)).mean()",
    "divergence": _DIVERGENCE + "$k = ({y} != -100).float()\n$g = $d.sum(-1) * $k\n$l = $g.sum() / 2",
    "distillation": _DIVERGENCE + f"$g = $d.sum(-1).mean()\n$a = F.cross_entropy($z.float().reshape(-1, {V}), {{y}}.reshape(-1))\n$l = 0.3 * $a + 0.7 * $g",
    "divergence apart": _DIVERGENCE + "$g = $d.sum(-1)\n$l = ($g * $g).sum()",
}  # fmt: skip

COPIES = [
    "$x = {x}.contiguous()",
    "$x = {x}.transpose(0, 1).contiguous()\n$x2 = $x.transpose(0, 1)",
    "$x = {x}.transpose(0, 1).contiguous().transpose(0, 1)",
    "$x = {x}[:, :].clone()",
    "$x = {x}.to({x}.dtype, copy=True)",
    "$x = {x}.float().to({x}.dtype)",
    "$x = {x}.flatten(0, 1)\n$x2 = $x.view({x}.shape)",
    "$x = {x}.detach()\n$x2 = {x} + 0 * $x",
    "$x = torch.empty_like({x})\n$x.copy_({x})",
]

# Writes to a float tensor that the engine has to know from a schema or from a body; first those that
# `_version` does not count.
UNCOUNTED_WRITES = ["torch.ops.liger_fx_fuzz.scale({x}.detach(), 0.5)", "halve({x}.detach())"]
UNSEEN_WRITES = [
    *UNCOUNTED_WRITES,
    "F.embedding(torch.zeros(1, dtype=torch.long), {x}.detach()[0], max_norm=0.1)",
    "def $body(x):\n    x.mul_(0.5)\n    return x.sum()\ncheckpoint($body, {x}.detach(), use_reentrant=False)",
    "def $body():\n    {x}.detach().mul_(0.5)\n    return {x}.sum()\ncheckpoint($body, use_reentrant=False)",
]  # fmt: skip

# All writes to a float tensor, to one of labels, to a weight.
FLOAT_WRITES = [
    "{x}.mul_(0.5)",
    "{x} *= 2",
    "{x}.add_(1)",
    "{x}[..., 0] = 0",
    "{x}.transpose(0, -1).mul_(2)",
    "{x}[..., 1:].abs_()",
    "{x}.masked_fill_({x} > 0.5, 0)",
    "{x}[{x} > 0.5] = 0.25",
    "{x}.copy_({x}.flip(0))",
    "with torch.no_grad():\n    torch.mul({x}, 2, out={x})",
    "torch.mul({x}.detach(), 2, out={x}.detach())",
    "{x}.relu_()",
    "F.silu({x}, inplace=True)",
    "F.relu({x}, inplace=True)",
    "with torch.no_grad():\n    {x}.mul_(2)",
    *UNSEEN_WRITES,
]  # fmt: skip
LABEL_WRITES = [
    "{x}[{x} == 3] = -100",
    "{x}.masked_fill_({x} < 4, -100)",
    "{x}[..., 0] = -100",
    "{x}.copy_({x}.clamp(min=4))",
    "{x}.clamp_(max=6)",
    "{x}.transpose(0, 1)[0] = -100",
]
WEIGHT_WRITES = [
    "F.embedding(torch.zeros(1, dtype=torch.long), {x}.view({x}.shape[0], -1), max_norm=0.1)",
    "{x}.detach().mul_(0.5)",
    "with torch.no_grad():\n    {x}[0] = 0.5",
    "torch.ops.liger_fx_fuzz.scale({x}.detach(), 2.0)",
    # The running mean of a batch norm in training.
    "F.batch_norm(torch.full((3, 6), 2.0, dtype={x}.dtype), {x}.detach().view(-1)[:6], torch.ones(6, dtype={x}.dtype), training=True, momentum=0.5)",
]  # fmt: skip


class Generator:
    """Makes one program: `build`. Its methods append to the lines of the program."""

    def __init__(self, seed: int, attempt: int = 0) -> None:
        self.seed = seed
        self.random = random.Random(f"{seed}/{attempt}" if attempt else seed)
        self.inputs: list[str] = []
        self.body: list[str] = []
        self.outputs: list[str] = []
        self.indent = ""
        self.count = 0
        self.reduced = self.random.random() < 0.4
        self.leaves = self.random.random() < 0.6
        self.trained = 0.85  # share of the inputs that require gradients
        self.inner = self.random.choices(["aot_eager", "eager", "inductor"], [0.8, 0.195, 0.005])[0]
        self.dynamic: bool | None = None

    def build(self) -> Program:
        motif = self.random.choice(MOTIFS) if self.random.random() < 0.6 else decoder
        motif(self)
        quietly = motif is not decoder and self.random.random() < 0.7
        for _ in range(0 if quietly else self.random.choice([0, 1, 1, 2])):
            self.write_anywhere()
        self.maybe_return_others()
        if self.seed % 7 == 5:  # by the seed alone: all other programs stay as they were
            self.return_logits(random.Random(self.seed))
        if self.dynamic is None:
            # A symbol for each size makes a long program take ten times as long to compile.
            self.dynamic = self.random.random() < (0.15 if len(self.body) < 15 else 0.02)
        return Program(
            self.seed,
            motif.__name__,
            tuple(self.inputs),
            tuple(self.body),
            tuple(dict.fromkeys(self.outputs)),
            inner=self.inner,
            dynamic=self.dynamic,
            leaves=self.leaves,
        )

    # -- lines --

    def name(self, kind: str) -> str:
        self.count += 1
        return f"{kind.rstrip('0123456789')}{self.count}"

    def emit(self, text: str, **given: str) -> str:
        """Append the lines of ``text``. Returns the name that the last of them defines."""
        fresh: dict[str, str] = {}

        def named(found: re.Match[str]) -> str:
            return fresh.setdefault(found[1], self.name(found[1]))

        lines = re.sub(r"\$([a-z]+\d*)", named, text.format(**given)).splitlines()
        self.body += [self.indent + line for line in lines]
        return list(fresh.values())[-1] if fresh else ""

    def last(self) -> str:
        return self.body[-1].split(" = ")[0].strip()

    def tensor(self, kind: str, shape: str, grad: bool | None = None) -> str:
        """A new float input."""
        name = self.name(kind)
        cast = ".bfloat16()" if self.reduced else ""
        grad = self.random.random() < self.trained if grad is None else grad
        flag = ".requires_grad_()" if grad else ""
        layout = ".transpose(0, 1)" if shape.startswith("s, 2") else ""
        self.inputs.append(f"{name} = torch.randn({shape}){cast}{layout}{flag}")
        return name

    def weight(self, *shape: int) -> str:
        return self.tensor("w", ", ".join(map(str, shape)))

    def hidden(self, grad: bool | None = None) -> str:
        shape = self.random.choice(["2, s, 8", "2, s, 8", "s, 2, 8"])
        return self.tensor("x", shape, grad)

    def labels(self, ignored: bool = True) -> str:
        name = self.name("y")
        self.inputs.append(f"{name} = torch.randint(0, {V}, (2, s))")
        if ignored and self.random.random() < 0.5:
            self.inputs[-1] += ".index_fill_(1, torch.tensor([1]), -100)"
        return name

    def pick(self, menu: dict[str, str]) -> str:
        return menu[self.random.choice(list(menu))]

    # -- parts of a decoder: a hidden state comes in, another one goes out --

    def copied(self, x: str) -> str:
        """``x``, or a copy or a view of it."""
        if self.random.random() < 0.7:
            return x
        self.emit(self.random.choice(COPIES), x=x)
        return next(line.split(" = ")[0].strip() for line in reversed(self.body) if " = " in line)

    def norm(self, x: str) -> str:
        if self.random.random() < 0.4:
            x = self.emit("$x = {x} + {r}", x=x, r=self.hidden())
        w = self.weight(H)
        if self.random.random() < 0.2:  # after the sum
            w = self.emit("$w = {w} * 1", w=w)
        return self.emit(self.pick(NORMS), x=x, w=w, b=self.weight(H))

    def mlp(self, x: str) -> str:
        weights = dict(w=self.weight(FFN, H), b=self.weight(FFN, H), c=self.weight(H, FFN))
        return self.emit(self.pick(MLPS), x=self.copied(x), **weights)

    def layer(self, x: str) -> str:
        """A pre-norm residual step, out of place or in place."""
        out = self.mlp(self.norm(x))
        if self.random.random() < 0.4:
            self.emit("{x} += {h}", x=out, h=x)
            return out
        return self.emit("$h = {x} + {h}", x=x, h=out)

    def attention(self, x: str) -> str:
        """4 heads of 4 elements, 2 of keys and values, with any rotation."""
        project = "$x = F.linear({x}, {w}).view({x}.shape[0], -1, {n}, 4)"
        q, k, v = (self.emit(project, x=x, w=self.weight(4 * n, H), n=str(n)) for n in (4, 2, 2))
        spelling = self.random.choice(list(ROPES))
        if spelling not in _HEADS_SECOND:
            q, k = (self.emit("$x = {x}.transpose(1, 2)", x=each) for each in (q, k))
        cos, sin = self.angles()
        q, k = (self.emit(ROPES[spelling], x=each, c=cos, s=sin) for each in (q, k))
        if spelling in _HEADS_SECOND:
            q, k = (self.emit("$x = {x}.transpose(1, 2)", x=each) for each in (q, k))
        v = self.emit("$x = {x}.transpose(1, 2)", x=v)
        repeat = "$k = {k}[:, :, None].expand(-1, -1, 2, -1, -1).reshape({q}.shape)"
        k, v = (self.emit(repeat, k=each, q=q) for each in (k, v))
        a = self.emit(self.scores(q), q=q, k=k, v=v)
        merged = "$o = {x} + F.linear({a}.transpose(1, 2).flatten(2), {w})"
        return self.emit(merged, x=x, a=a, w=self.weight(H, 4 * 4))

    def scores(self, q: str) -> str:
        """Attention under a mask, at times written out. Drawn apart, as the mask is."""
        apart, mask = random.Random(f"scores {self.seed}"), self.mask(q)
        if mask == "is_causal=True" or apart.random() < 0.6:
            return f"$a = F.scaled_dot_product_attention({{q}}, {{k}}, {{v}}, {mask})"
        mask = mask.removeprefix("attn_mask=")
        return apart.choice(WRITTEN_OUT).replace("MASK", mask)

    def mask(self, q: str) -> str:
        """The arguments that say which keys a query sees. Drawn apart from the rest, which has been
        drawn alike since there were no masks."""
        apart = random.Random(self.seed)
        if apart.random() < 0.4:
            return "is_causal=True"
        padding, positions = self.name("m"), self.name("m")
        self.inputs.append(f"{padding} = {apart.choice(PADDING)}")
        self.inputs.append(
            f"{positions} = torch.tensor([0, 1, 0, 0, 1, 2, 3, 4, 5])[:s].repeat(2, 1)"
        )
        template = MASKS[apart.choice(list(MASKS))]
        mask = self.emit(template, q=q, p=padding, d=positions)
        if apart.random() < 0.1:
            self.emit(apart.choice(["{m}[..., 0] = True", "{p}[:, 0] = 0"]), m=mask, p=padding)
        return f"attn_mask={mask}"

    def angles(self) -> tuple[str, str]:
        """cos and sin, [1, 1, s, 4], as inputs, whose halves are equal or not."""
        equal = self.random.random() < 0.5
        names = self.name("c"), self.name("s")
        for name, function in zip(names, ("cos", "sin"), strict=True):
            angle = (
                "torch.rand(1, 1, s, 2).repeat(1, 1, 1, 2)" if equal else "torch.rand(1, 1, s, 4)"
            )
            self.inputs.append(f"{name} = {angle}.{function}()" + ".bfloat16()" * self.reduced)
        return names

    def head(self, h: str) -> str:
        """A loss. Of labels that may have been copied before."""
        given = dict(w=self.weight(V, H), b=self.weight(V), b2=self.tensor("w", f"{V}, {H}", False))
        reduction = self.random.choice(["mean", "mean", "sum", "none"])
        text = self.pick(HEADS)
        apart = random.Random(f"{self.seed} {len(self.body)} sums")  # other choices stay the same
        if apart.random() < 0.4:
            text = apart.choice([*SUMS.values()])
        return self.emit(text, h=self.copied(h), y=self.labels(), reduction=reduction, **given)

    # -- regions around a part --

    def inside(self, part: Callable[[str], str], x: str) -> str:
        """The part, alone or in a region: a checkpoint, autocast, no_grad ..."""
        region = self.random.choices(
            [part, *REGIONS], [9, *(weight for weight in REGIONS.values())]
        )[0]
        return part(x) if region is part else region(self, part, x)

    def function(self, part: Callable[[str], str], first: str = "", decorator: str = "") -> str:
        """A function of one tensor, defined in the program: returns its name."""
        name, x = self.name("body"), self.name("x")
        if decorator:
            self.emit(decorator)
        self.emit("def {name}({x}):", name=name, x=x)
        self.indent += "    "
        if first:
            x = self.emit(first, x=x)
        self.emit("return {out}", out=part(x))
        self.indent = self.indent[4:]
        return name

    # -- disturbances --

    def write(self, x: str) -> None:
        """Write to ``x`` in some way. Leaves that require gradients can be written detached."""
        menu = {"y": LABEL_WRITES, "w": WEIGHT_WRITES}.get(x[0], FLOAT_WRITES)
        if self.leaves and any(
            line.startswith(f"{x} = ") and "_grad" in line for line in self.inputs
        ):
            menu = WEIGHT_WRITES[1:] + [write for write in FLOAT_WRITES if "detach" in write]
        self.emit(self.random.choice(menu), x=x)

    def write_anywhere(self) -> None:
        """Insert a write to any value, at any place after it."""
        places = [
            (i, indent, [*self.names(), *seen])
            for i, indent, seen in _scopes(self.body)
            if i == 0 or not self.body[i - 1].lstrip().startswith("@")
        ]
        at, indent, names = self.random.choice(places)
        names = [name for name in names if name[0] not in "mtl"]
        recent = names[-6:] if self.random.random() < 0.7 else names
        rest, self.body = self.body[at:], self.body[:at]
        self.indent = indent
        self.write(self.random.choice(recent))
        self.body, self.indent = self.body + rest, ""

    def maybe_return_others(self) -> None:
        """Let some intermediate values leave the program."""
        *_, (_, _, seen) = _scopes([*self.body, "end"])
        values = [name for name in seen if name[0] != "t"]
        if values and self.random.random() < 0.3:
            self.outputs += self.random.sample(values, min(len(values), self.random.choice([1, 2])))

    def return_logits(self, random: random.Random) -> None:
        """Let the logits leave the program, as Hugging Face's models do."""
        *_, (_, _, seen) = _scopes([*self.body, "end"])
        logits = [name for name in seen if name[0] in "zc"]
        if logits:
            spellings = ["$o = {z}", "$o = {z}.float()", "$o = {z}[..., :9]", "$o = {z} * 0.5"]
            last = self.emit(random.choice(spellings[:1] * 3 + spellings), z=random.choice(logits))
            self.outputs.append(last)
            if random.random() < 0.3:
                self.outputs.append(random.choice(logits))

    def names(self) -> list[str]:
        return [line.split(" = ")[0] for line in self.inputs]


_ASSIGNED = re.compile(r"\s*([a-z]+\d+(?:, [a-z]+\d+)*) = ")


def _scopes(body: list[str]) -> list[tuple[int, str, list[str]]]:
    """For each line: its number, its indentation, and the names that the lines above it define
    where it can see them."""
    found, frames = [], [(-1, [])]  # of each function, indentation and names
    for i, line in enumerate(body):
        indent = len(line) - len(line.lstrip())
        while len(frames) > 1 and indent <= frames[-1][0]:
            frames.pop()
        found.append((i, line[:indent], [name for _, names in frames for name in names]))
        if line.lstrip().startswith("def "):
            frames.append((indent, re.findall(r"[a-z]+\d+", line.partition("(")[2])))
        elif assigned := _ASSIGNED.match(line):
            frames[-1][1].extend(assigned[1].split(", "))
    return found


# -- regions --------------------------------------------------------------------------------------


def in_checkpoint(g: Generator, part: Callable[[str], str], x: str) -> str:
    body = g.function(part)
    return g.emit("$h = checkpoint({body}, {x}, use_reentrant=False)", body=body, x=x)


def in_checkpoint_with_dropout(g: Generator, part: Callable[[str], str], x: str) -> str:
    body = g.function(part, first="$x = F.dropout({x}, 0.5)")
    return g.emit("$h = checkpoint({body}, {x}, use_reentrant=False)", body=body, x=x)


def under_autocast(g: Generator, part: Callable[[str], str], x: str) -> str:
    g.emit('with torch.autocast("cpu", dtype=torch.bfloat16):')
    out = _in_block(g, part, x)
    return g.emit("$h = {out}.to({x}.dtype)", out=out, x=x)


def without_grad(g: Generator, part: Callable[[str], str], x: str) -> str:
    g.emit("with torch.no_grad():")
    return _in_block(g, part, x)


def _in_block(g: Generator, part: Callable[[str], str], x: str) -> str:
    g.indent += "    "
    out = part(x)
    g.indent = g.indent[4:]
    return out


def in_compiled_region(g: Generator, part: Callable[[str], str], x: str) -> str:
    body = g.function(part, decorator="@torch.compiler.nested_compile_region")
    return g.emit("$h = {body}({x})", body=body, x=x)


def in_condition(g: Generator, part: Callable[[str], str], x: str) -> str:
    bodies = dict(a=g.function(part), b=g.function(part), x=x)
    return g.emit("$h = torch.cond({x}.sum() > 0, {a}, {b}, ({x},))", **bodies)


REGIONS = {
    in_checkpoint: 3,
    in_checkpoint_with_dropout: 2,
    under_autocast: 2,
    without_grad: 1,
    in_compiled_region: 1,
    in_condition: 0.3,
}


# -- whole programs -------------------------------------------------------------------------------


def decoder(g: Generator) -> None:
    """Some layers and a loss, each in some region."""
    h = g.hidden()
    layers = g.random.choice([0, 1, 1, 2])
    for _ in range(layers):
        h = g.inside(g.random.choice([g.norm, g.mlp, g.layer, g.attention]), h)
    g.outputs.append(h if layers and g.random.random() < 0.25 else g.inside(g.head, h))


def copied_and_written(g: Generator) -> None:
    """C1: a copy that looks like a no-op, and a write to it or to its source."""
    given = dict(h=g.hidden(), w=g.weight(V, H), y=g.labels(ignored=False))
    text = g.random.choice([
        "$y = {y}[..., 1:].contiguous()\n#\n$z = F.linear({h}, {w})[:, :-1].transpose(1, 2)\n#\n$l = F.cross_entropy($z, $y)",
        "$z = F.linear({h}, {w}).view(-1, 11)\n$y = {y}.to(torch.long, copy=True)\n#\n$l = F.cross_entropy($z, $y.view(-1))",
        "$h = {h}.transpose(0, 1).contiguous()\n#\n$z = F.linear($h, {w}).view(-1, 11)\n$y = {y}.transpose(0, 1).contiguous()\n#\n$l = F.cross_entropy($z.float(), $y.view(-1))",
        "$h = {h}.to({h}.dtype, copy=True)\n#\n$z = F.linear($h, {w}).view(-1, 11)\n#\n$l = F.cross_entropy($z.float(), {y}.reshape(-1))",
        "$z = F.linear({h}, {w})\n$v = $z.transpose(0, 1).contiguous().transpose(0, 1)\n#\n$l = F.cross_entropy($v.reshape(-1, 11).float(), {y}.reshape(-1))",
        "$h = {h}[..., :4].contiguous()\n#\n$f = $h.float()\n$n = ($f * torch.rsqrt($f.pow(2).mean(-1, keepdim=True) + 0.1)).to($h.dtype)",
    ])  # fmt: skip
    g.emit(text, **given)
    _write_at_marks(g, [given["h"], given["y"]])
    g.outputs.append(g.last())


def _write_at_marks(g: Generator, sources: list[str]) -> None:
    """Turn one of the lines "#" into a write, to a copy more often than to a source."""
    marks = [i for i, line in enumerate(g.body) if line.strip() == "#"]
    at = g.random.choice(marks)
    _, g.indent, seen = _scopes(g.body)[at]
    copies = [name for name in seen if name[0] in "hyv"]
    rest, g.body = g.body[at + 1 :], g.body[:at]
    g.write(g.random.choice(copies if copies and g.random.random() < 0.6 else [*sources, *seen]))
    g.body += [line for line in rest if line.strip() != "#"]
    g.body = [line for line in g.body if line.strip() != "#"]
    g.indent = ""


def transformed(g: Generator) -> None:
    """C3: torch.func's transforms of a loss, a norm or an MLP."""
    x = g.hidden()
    if g.random.random() < 0.5:
        body = g.function(lambda h: g.emit("$l = {l}.sum()", l=g.head(h)))
        call = g.random.choice(["torch.func.grad({body})({x})", "torch.func.jacrev({body})({x})"])
    else:
        body = g.function(g.random.choice([g.norm, g.mlp]))
        call = g.random.choice([
            "torch.func.vmap({body})({x})",
            "torch.func.jvp({body}, ({x},), ({x}.cos(),))[1]",
            "torch.func.vjp({body}, {x})[1]({x}.cos())[0]",
        ])  # fmt: skip
    g.outputs.append(g.emit(f"$h = {call}", body=body, x=x))


def written_twice(g: Generator) -> None:
    """C4: the same expression twice, with a write in between."""
    g.reduced = g.random.random() < 0.8
    x = g.emit("$h = {x} * 1", x=g.hidden())
    cast = g.random.choice(
        [".float()", ".float()", ".to(torch.float32)", ".transpose(0, 1)", "[:, :2]", " + 1"]
    )
    weights = dict(w=g.weight(FFN, H), u=g.weight(FFN, H), d=g.weight(H, FFN))
    text = g.random.choice([
        "$a = F.silu(F.linear(({x}{cast}).float(), {w}.float()))\n#\n$b = F.linear(({x}{cast}).float(), {u}.float())\n$o = F.linear($a * $b, {d}.float())",
        "$q = ({x}{cast}).float().pow(2).mean(-1, keepdim=True)\n#\n$n = (({x}{cast}).float() * torch.rsqrt($q + 0.1)).to({x}.dtype)",
    ])  # fmt: skip
    g.emit(text, x=x, cast=cast, **weights)
    _write_at_marks(g, [x])
    g.outputs.append(g.last())


def written_unseen(g: Generator) -> None:
    """C5: a write of the kinds that have no name in place, in the middle of a norm or an MLP.
    Mostly without gradients: the reference may refuse to write to what its backward needs."""
    g.trained = g.random.choice([0.0, 0.0, 0.85])
    if g.random.random() < 0.3:  # rows of a table are renormalised, and normed
        x = g.tensor("w", "5, 8", grad=False)
    else:
        x = g.emit("$h = {x} * 1", x=g.hidden())
    start = len(g.body)
    if g.random.random() < 0.7:
        spelling = g.pick({name: NORMS[name] for name in NORMS if "$r" in NORMS[name]})
        g.outputs.append(g.emit(spelling, x=x, w=g.weight(H), b=g.weight(H)))
    else:
        g.outputs.append(g.mlp(x))
    weights = [name for name in g.names() if name[0] == "w"]
    if weights and g.random.random() < 0.3:
        x = g.random.choice(weights)
    at = g.random.randrange(start + 1, len(g.body)) if len(g.body) > start + 1 else start
    rest, g.body = g.body[at:], g.body[:at]
    moved = x[0] != "w" and not g.trained and g.random.random() < 0.3
    writes = WEIGHT_WRITES if x[0] == "w" else UNCOUNTED_WRITES if moved else UNSEEN_WRITES
    g.emit(g.random.choice(writes), x=x)
    g.body += rest
    if moved:  # what was written is the memory of x no longer
        g.emit("{x}.set_({x} * 2)", x=x)


def unequal_halves(g: Generator) -> None:
    """C6: RoPE with cos and sin as inputs."""
    q = g.tensor("x", "2, 3, s, 4")
    cos, sin = g.angles()
    spelling = g.random.choice(["halves", "rounded", "partial"])
    g.outputs.append(g.emit(ROPES[spelling], x=q, c=cos, s=sin))


def dropout_and_loss(g: Generator) -> None:
    """C7: a loss in a checkpoint whose recomputation must drop the same elements."""
    g.inner = g.random.choice(["eager", "eager", "aot_eager"])
    g.outputs.append(in_checkpoint_with_dropout(g, g.head, g.hidden(grad=True)))


LOSS = "$l = F.cross_entropy(F.linear({h}, {w}).view(-1, 11), {y}.view(-1))"


def written_and_recomputed(g: Generator) -> None:
    """A loss in a checkpoint that writes to what it was given: the second run reads new values."""
    g.inner = "aot_eager"  # a checkpoint in eager notices the write, and raises
    y = g.labels(ignored=False)

    def part(h: str) -> str:
        w, copy = g.weight(V, H), g.emit("$y = {y} * 1", y=y)
        loss = g.emit(LOSS, h=h, w=w, y=copy)
        g.emit(g.random.choice(["{x}.copy_({x}.flip(1))", *LABEL_WRITES]), x=y)
        return loss

    g.outputs.append(in_checkpoint(g, part, g.hidden(grad=True)))


def gradient_forgotten(g: Generator) -> None:
    """A view that is written without grad mode, where Dynamo's fake tensors forget its gradient."""
    g.dynamic = g.random.random() < 0.8
    x = g.tensor("x", "s, 2, 8", grad=True)  # transposed, so that all that follows is views
    h = g.emit("$h = {x}.transpose(0, 1).contiguous()", x=x)
    write = g.random.choice(["mul_(2)", "add_(1)"])
    g.emit(f"with torch.no_grad():\n    {h}.{write}")
    g.outputs.append(g.emit(LOSS, h=h, w=g.weight(V, H), y=g.labels()))


def partly_without_grad(g: Generator) -> None:
    """A part of which one line runs without grad mode."""
    part = g.random.choice([g.norm, g.mlp, g.head])
    x = g.hidden(grad=True)
    g.outputs.append(part(x))
    at = g.random.randrange(len(g.body))
    g.body[at : at + 1] = ["with torch.no_grad():", f"    {g.body[at]}"]


def residual_in_place(g: Generator) -> None:
    """C9: bf16 residual stream that is added to in place after it was normed."""
    g.reduced = g.random.random() < 0.8
    h = g.emit("$h = {x} + {r}", x=g.hidden(grad=True), r=g.hidden())
    n = g.emit(g.pick(NORMS), x=h, w=g.weight(H), b=g.weight(H))
    g.emit(g.random.choice(["{h} += {n}", "{h}.add_({n})"]), h=h, n=g.mlp(n))
    g.outputs.append(g.inside(g.random.choice([g.norm, g.head]), h))


def megatron(g: Generator) -> None:
    """C10: [s, b, h] in memory, seen as [b, s, h], and views that only that layout allows."""
    x = (
        g.tensor("x", "s, 2, 8")
        if g.random.random() < 0.6
        else g.emit("$x = {x}.transpose(0, 1).contiguous().transpose(0, 1)", x=g.hidden())
    )
    if g.random.random() < 0.3:
        x = g.emit("$x = {x} + {r}", x=x, r=g.tensor("x", "s, 2, 8"))
    if g.random.random() < 0.4:  # the view in the backward of the projection is of the gradient
        g.inner = "aot_eager"
        text = "$h = {x} * 2\n$h.add_(F.linear({x}.detach().contiguous(), {w}))"
        g.emit(text, x=x, w=g.weight(H, H))
        x = g.body[-2].split(" = ")[0]
        spelling = g.pick({name: NORMS[name] for name in ("torchtune", "module", "layer_norm")})
        norm = lambda h: g.emit(spelling, x=h, w=g.weight(H), b=g.weight(H))  # noqa: E731
        g.outputs.append(in_checkpoint_with_dropout(g, norm, x))
        return
    n = g.emit(g.pick(NORMS), x=x, w=g.weight(H), b=g.weight(H))
    ends = ["$v = {n}.transpose(0, 1).view(-1, 8)", "$v = {n} * 2", "$v = {n}"]
    g.outputs.append(g.emit(g.random.choice(ends), n=n))


def one_element(g: Generator) -> None:
    """C11: weights that are broadcast: one element, or a shape of more dimensions."""
    g.inner = g.random.choice(["aot_eager", "inductor"])
    shape = g.random.choice(["1", "1", "1", "1, 8", "2, 1, 8"])
    spelling = g.random.choice(["huggingface", "huggingface", "gemma", "olmo"])
    x = (
        g.hidden()
        if g.random.random() < 0.6
        else g.emit("$h = {x} + {r}", x=g.hidden(), r=g.hidden())
    )
    g.outputs.append(g.emit(NORMS[spelling], x=x, w=g.tensor("w", shape)))


def padding(g: Generator) -> None:
    """C12: a token that is not finite and that nobody counts, beside a batch with ignored labels."""
    x, y = g.hidden(), g.labels()
    g.emit("$h = {x} * 1\n$h[:, -1] = float('{bad}')", x=x, bad=g.random.choice(["inf", "nan"]))
    x = g.last().split("[")[0]
    mlp = g.emit(
        g.pick({n: MLPS[n] for n in ("silu", "gelu")}),
        x=x,
        w=g.weight(FFN, H),
        b=g.weight(FFN, H),
        c=g.weight(H, FFN),
    )
    mask = "$m = torch.arange({x}.shape[1])[None, :, None] == {x}.shape[1] - 1\n$h = {h}.masked_fill($m, 0)"
    g.outputs.append(g.emit(mask, x=x, h=mlp))
    batch = dict(h=g.hidden(), w=g.weight(V, H), y=y)
    g.outputs.append(
        g.emit(
            "$z = F.linear({h}, {w})\n$l = F.cross_entropy($z.view(-1, 11), {y}.index_fill(1, torch.tensor([0]), -100).view(-1))",
            **batch,
        )
    )


def copies_before_parts(g: Generator) -> None:
    """Views, copies and casts in front of each part, for writes to find."""
    h = g.hidden()
    for part in g.random.sample([g.norm, g.mlp, g.head], 2):
        h = g.emit(g.random.choice(COPIES), x=h)
        g.write_anywhere()
        out = part(h)
        g.outputs.append(out)


def rope_and_attention(g: Generator) -> None:
    """Repeated heads and rotations, with writes to either."""
    g.outputs.append(g.inside(g.attention, g.hidden()))


MOTIFS: list[Callable[[Generator], None]] = [
    copied_and_written,
    copied_and_written,
    transformed,
    written_twice,
    written_unseen,
    unequal_halves,
    dropout_and_loss,
    written_and_recomputed,
    gradient_forgotten,
    partly_without_grad,
    residual_in_place,
    megatron,
    one_element,
    padding,
    copies_before_parts,
    rope_and_attention,
]
