"""Where the outputs of a graph go: to the caller of the compiled function, or to more of its code.

Dynamo says so of a graph (``compile_subgraph_reason``). DDPOptimizer hands a backend parts of a
graph, and says nothing of the whole. Its frames on the stack hold the whole and the call of the
part (torch/_dynamo/backends/distributed.py).
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import fx
from torch._dynamo.backends.distributed import DDPOptimizer, SubmodCompiler

from liger_fx.effects import nodes_in
from liger_fx.report import Place

PART = (
    "the graph is a part of a larger one (split by DDPOptimizer? "
    "torch._dynamo.config.optimize_ddp = False leaves it whole)"
)

_NO_REASONS = ("step_unsupported",)  # Dynamo's word where it unwinds several frames


def is_part(gm: Any) -> bool:
    """Has DDPOptimizer split ``gm`` off a larger graph?"""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and reason.reason.startswith("DDPOptimizer")


def goes_on(gm: Any, value: fx.Node) -> str:
    """Why code after the graph may read ``value``, an output of ``gm``; "" if the compiled function
    returns ``value`` and does nothing else with it."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None:
        return PART
    if is_part(gm):
        call = _local(SubmodCompiler.run_node, "n")
        whole = _local(DDPOptimizer.compile_fn, "gm")
        indices = {i for i, output in enumerate(outputs(gm.graph)) if output is value}
        if call is None or whole is None or not _only_returned(call, indices):
            return PART
        reason = whole.compile_subgraph_reason
    return "the function goes on after this graph" if reason.graph_break else ""


def graph_break(gm: Any) -> tuple[str, Place] | None:
    """Why Dynamo ended ``gm`` before the end of the compiled function, and where; None if it did
    not, or does not say."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break or not reason.user_stack or is_part(gm):
        return None
    frame = reason.user_stack[-1]
    source = f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
    why = reason.reason.split("\n")[0]
    if why in _NO_REASONS:
        why = "Dynamo goes on in another graph; TORCH_LOGS=graph_breaks says why"
    return why, Place(source=source)


def outputs(graph: fx.Graph) -> list[fx.Node]:
    return nodes_in(graph.output_node().args)


def _only_returned(call: fx.Node, indices: set[int]) -> bool:
    """The graph of ``call`` returns these items of the tuple that ``call`` gives, and nothing else
    in that graph takes them."""
    return all(
        item.target is operator.getitem
        and (item.args[1] not in indices or all(user.op == "output" for user in item.users))
        for item in call.users
    )


def _local(function: Callable[..., Any], name: str) -> Any:
    """The local variable of the innermost call of ``function`` that runs now, None if none does."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get(name)
