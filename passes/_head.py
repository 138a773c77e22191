"""One head: all that is taken of the logits of a projection becomes one op.

Patterns name what is taken of a row of logits, a `Taken`: cross-entropy, log-probability, entropy,
log-sum-exp, a divergence from a second head. `join` finds everything that is taken of one
projection, follows it to the sum in which it ends, and makes one match of it:

- Where the sum takes each token's values times coefficients that are known before the projection
  runs (`_sums`), the match ends in the sum: ``liger_fx::linear_loss``, whose forward computes the
  gradients. Chunks of one hidden state, as torchtune's losses project them, become the whole.
- Else it ends in the values of each token: ``liger_fx::linear_token_losses``, whose backward
  projects again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from liger_fx.passes._join import join
from liger_fx.passes._record import replace
from liger_fx.passes._rows import logits_of
from liger_fx.passes._taken import Head, Taken

from liger_fx import ops
from liger_fx.matcher import Match, Reject
from liger_fx.rewrite import Rewrite

_OPS = ("linear_loss", "linear_token_losses", "linear_loss_kernel")


def head_rewrite(
    name: str,
    leading: Sequence[Taken],
    beside: Sequence[Taken],
    always: bool = False,
    **rest: Any,
) -> Rewrite:
    """A rewrite that makes the op where one of ``leading`` is taken of a projection, and with it
    what else is, of ``leading`` and ``beside``. always: even where the op saves nothing."""
    known = {taken.pattern.__name__: taken for taken in (*leading, *beside)}

    def check(match: Match) -> None:
        if not isinstance(match, Head):
            known[match.pattern.name].check(match)
        elif not always:
            _check_gain(match)

    return Rewrite(
        name=name,
        patterns=[taken.pattern for taken in leading],
        check=check,
        join=functools.partial(join, known),
        replace=replace,
        constants=["teacher_hidden", "teacher_weight", "teacher_bias"],
        saved=_saved,
        settings={"chunk_tokens": 0, "accum_dtype": torch.float32, "skip_ignored": True},
        gain="the logits never exist",
        save_ops=[f"liger_fx::{op}" for op in _OPS],
        **rest,
    )


def _check_gain(head: Head) -> None:
    """Raise `Reject` where all logits fit one chunk, and no gradient needs them."""
    lead = max(head.terms, key=lambda term: term.has_teacher)
    heads = [logits_of(lead.match, prefix) for prefix in ("", "teacher_")[: 1 + lead.has_teacher]]
    tokens = math.prod(lead.tokens.shape) * len(head.chunks)
    few = isinstance(tokens, int) and ops.fits_one_chunk(
        tokens,
        heads[0].shape[-1],
        sum(logits.element_size() for logits in heads),
        heads[0].device.type,
        head.settings["chunk_tokens"],
    )
    if few and not heads[0].requires_grad:
        raise Reject("no gradient is needed and the logits fit one chunk: nothing would be saved")


def _saved(match: Match) -> list[str]:
    """The op of a sum computes its gradients in the forward and keeps nothing else."""
    return [] if isinstance(match, Head) and match.summed else list(match.bindings)
