"""Activation checkpointing in a Dynamo graph.

``torch.utils.checkpoint`` becomes a ``tag_activation_checkpoint`` node whose body is a graph of its
own. The body is matched like any graph. An op that computes its gradients in the forward must not
run again in the backward, so its outputs are kept by a selective-checkpointing policy, the
mechanism of ``torch.utils.checkpoint.create_selective_checkpoint_contexts``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Where tag_activation_checkpoint looks for the policy of a body (torch/_higher_order_ops/wrap.py).
_CONTEXT_FN = "_checkpoint_context_fn"


def checkpoint_bodies(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """The bodies of the activation checkpoints of one graph, each once."""
    names = {
        node.args[0].target: None
        for node in gm.graph.nodes
        if node.op == "call_function" and node.target is tag_activation_checkpoint
    }
    return [cast(fx.GraphModule, gm.get_submodule(name)) for name in names]


def save_in_checkpoint(body: fx.GraphModule, op_names: Sequence[str]) -> None:
    """Keep the outputs of these ops for the backward; recompute the rest as before.

    A body with a policy of its own keeps it: whoever wrote it can name the ops.
    """
    body.meta.setdefault(
        _CONTEXT_FN,
        functools.partial(create_selective_checkpoint_contexts, saving_policy(frozenset(op_names))),
    )


def saving_policy(names: frozenset[str]) -> Callable[..., CheckpointPolicy]:
    """For ``create_selective_checkpoint_contexts``: keep what the ops of these names return
    (``"aten::mm"``), and recompute the rest."""
    return functools.partial(_policy, names)


def _policy(saved: frozenset[str], ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    name = op.name() if isinstance(op, torch._ops.OpOverload) else ""
    return CheckpointPolicy.MUST_SAVE if name in saved else CheckpointPolicy.PREFER_RECOMPUTE
