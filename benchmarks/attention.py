"""Attention alone under a mask, forward and backward, bf16: kernel against kernel.

    python benchmarks/attention.py
    python benchmarks/attention.py --shape 2 16384 32 8 64 --json attention.json

A shape is batch, tokens, heads of queries, heads of keys and elements of a head. Masks: causal, a
window, padding on the right of each row, the same on the left, documents of 64 to 2048 tokens. The
arms:

    dense     the mask as a tensor and keys repeated for each query, as a compiled model has them
    flex      flex attention, compiled, with a block mask that is there already
    liger_fx  what the rewrite `attention` puts in their place, with a plan that is there already

"no gradient" are rows of padding whose upstream gradient is zero, as in training. An arm that does
not fit into memory is left out with a reason. ``plan_ms`` is what making the plan takes, once for
all layers of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Args, Benchmark, compared, options, several
from _measure import lap_times, padding, reason, run_laps
from _output import Panel, Row, columns
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from liger_fx import ops

SHAPES = [(128, 512, 32, 8, 64), (8, 2048, 32, 8, 64), (8, 2048, 16, 8, 128), (2, 16384, 32, 8, 64)]
WINDOW, PADDED, DOCUMENT = 512, 0.4, (64, 2048)
MASKS = ("causal", "window", "padding after", "padding after, no gradient", "padding before")
MASKS += ("documents",)
ARMS = ("dense", "flex", "liger_fx")


class Masked:
    """A mask in all of its forms."""

    def __init__(self, name: str, batch: int, size: int, device: torch.device) -> None:
        self.name, self.batch, self.size, self.device = name, batch, size, device
        self.valid = ~padding(torch.empty(batch, size), PADDED).to(device)
        if name == "padding before":
            self.valid = self.valid.flip(1)
        self.documents = _documents(batch, size).to(device)

    def seen(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """Which keys a query sees; of indices in any form."""
        if self.name == "window":
            return (k <= q) & (q - k < WINDOW)
        if self.name == "documents":
            return (k <= q) & (self.documents[b, q] == self.documents[b, k])
        return (k <= q) & self.valid[b, k] if self.name.startswith("padding") else k <= q

    def dense(self) -> Tensor:
        at = torch.arange(self.size, device=self.device)
        rows = torch.arange(self.batch, device=self.device)[:, None, None, None]
        seen = self.seen(rows, 0, at[None, None, :, None], at[None, None, None, :])
        return seen.expand(self.batch, 1, -1, -1)

    def plan(self) -> tuple[Any, ...]:
        if self.name == "documents":
            return ops.document_plan(self.documents)
        return ops.padding_plan(self.valid) if self.name.startswith("padding") else (None,) * 4


def _documents(batch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    starts, at = torch.zeros(batch * size, dtype=torch.bool), 0
    while at < batch * size:
        starts[at] = True
        at += int(torch.randint(*DOCUMENT, (), generator=generator))
    return starts.view(batch, size).cumsum(1)


def attend(arm: str, mask: Masked, scale: float, grouped: int) -> Callable[..., Tensor]:
    if arm == "liger_fx":
        plan = mask.plan()
        window = WINDOW if mask.name == "window" else None
        return lambda q, k, v: ops.attention(q, k, v, *plan, window, scale)
    if arm == "flex":
        blocks = create_block_mask(
            lambda b, h, q, k: mask.seen(b, h, q, k),  # a method is not taken
            *(mask.batch, None, mask.size, mask.size, str(mask.device)),
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=blocks, scale=scale, enable_gqa=True)
    dense = mask.dense()

    def repeated(x: Tensor) -> Tensor:
        return x.repeat_interleave(grouped, 1)

    return lambda q, k, v: F.scaled_dot_product_attention(
        q, repeated(k), repeated(v), dense, scale=scale
    )


def measure(shape: tuple[int, ...], args: Args) -> Iterator[Row]:
    batch, size, heads, keys, elements = shape

    def randn(n: int) -> Tensor:  # [b, h, s, d], in memory as [b, s, h, d]
        made = torch.randn(batch, size, n, elements, device=args.device, dtype=torch.bfloat16)
        return made.transpose(1, 2)

    inputs = [randn(n).requires_grad_() for n in (heads, keys, keys)]
    for name in args.masks:
        mask, upstream = Masked(name, batch, size, args.device), randn(heads)
        if name.endswith("no gradient"):
            upstream = upstream * mask.valid[:, None, :, None]
        planned = mask.plan()[0] is not None
        plan_ms = run_laps(mask.plan, args.device, args.laps).ms if planned else None
        for arm in args.arms:
            row: Row = {"shape": " x ".join(map(str, shape)), "mask": name, "arm": arm}
            try:
                function = attend(arm, mask, elements**-0.5, heads // keys)
                call = partial(forward_and_backward, function, inputs, upstream)
                lap_times(call, args.device, 3)
                laps = run_laps(call, args.device, args.laps)
                row |= {"ms": laps.ms, "extra_gib": laps.extra_gib}
                row |= {"plan_ms": plan_ms if arm == "liger_fx" else None}
            except Exception as error:
                row |= {"error": reason(error)}
            yield row
            torch._dynamo.reset()


def forward_and_backward(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor
) -> object:
    return torch.autograd.grad(function(*inputs), inputs, upstream)


def run(args: Args) -> Iterator[list[Row]]:
    for shape in args.shape or SHAPES:
        for row in measure(shape, args):
            yield [row]


BENCHMARK = Benchmark(
    options(
        __doc__,
        shape={"type": int, "nargs": 5, "action": "append", "help": "see above"},
        masks=several(MASKS),
        arms=several(ARMS),
        laps=15,
    ),
    run,
    columns=columns(
        "shape {shape} | mask {mask} | arm {arm} | ms {ms:.2f} | speed of dense {speed:.2f} |"
        " extra GiB {extra_gib:.2f} | plan ms {plan_ms:.2f}"
    ),
    finish=lambda rows, args: compared(rows, "dense", ["shape", "mask"], speed="1/ms"),
    title="Attention, forward and backward",
    panels=[Panel("ms", "ms", "{mask}", ".2f", title="{shape}")],
)

if __name__ == "__main__":
    BENCHMARK.main()
