"""Logits that a graph returns beside a loss over them (``CausalLMOutput(loss, logits)``).

They would keep a fused head from being made, and few read them. Where nothing else stands in the
way, the graph returns the hidden state instead, and what computes the logits from it leaves the
graph: the caller gets `liger_fx.deferred.DeferredLogits` over the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from liger_fx.canonical import fake, only_slices, op_name, positional, same_sizes
from liger_fx.deferred import DeferredLogits, Head
from liger_fx.effects import Effects, storage_key, without_grad
from liger_fx.frame import goes_on, outputs
from liger_fx.matcher import BrokenGraph
from liger_fx.report import Place

# Operations on a row of logits alone, beside casts, slices of classes and copies.
_ON_ROWS = frozenset(
    {"cast", "reshape", "getitem", "clone", "detach", "add", "sub", "mul", "div", "neg", "tanh"}
)


@dataclass(frozen=True)
class ReturnedLogits:
    """A projection and what is made of it, up to a value that is returned.

    nodes: the projection first, the returned value last. obstacle: why the logits have to be made,
    "" if they can be deferred.
    """

    nodes: tuple[fx.Node, ...]
    obstacle: str = ""

    @property
    def projection(self) -> fx.Node:
        return self.nodes[0]

    @property
    def value(self) -> fx.Node:
        return self.nodes[-1]


def returned_logits(gm: fx.GraphModule) -> list[ReturnedLogits]:
    """The logits among the outputs of ``gm``, a graph as Dynamo made it, that something else in it
    reads as well."""
    graph = gm.graph
    chains = [_chain(value) for value in graph.output_node().all_input_nodes]
    own = {node for chain in chains for node in chain} | {graph.output_node()}
    found = [chain for chain in chains if not all(own.issuperset(node.users) for node in chain)]
    if not found:
        return []
    effects = Effects(graph)
    return [
        ReturnedLogits(nodes, goes_on(gm, nodes[-1]) or _obstacle(nodes, effects))
        for nodes in found
    ]


def _chain(value: fx.Node) -> tuple[fx.Node, ...]:
    """From the projection to ``value``; nothing if ``value`` is no logits."""
    nodes = [value]
    while op_name(nodes[-1]) != "linear":
        node = nodes[-1]
        inputs = node.all_input_nodes
        if op_name(node) not in _ON_ROWS or len(inputs) != 1 or not _keeps_rows(inputs[0], node):
            return ()
        nodes.append(inputs[0])
    return tuple(reversed(nodes))


def _keeps_rows(source: fx.Node, node: fx.Node) -> bool:
    before, after = fake(source), fake(node)
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and same_sizes(before.shape[:-1], after.shape[:-1])
        and (op_name(node) != "reshape" or same_sizes(before.shape, after.shape))
        and (op_name(node) != "getitem" or only_slices(node.args[1]))
    )


def _obstacle(nodes: Sequence[fx.Node], effects: Effects) -> str:
    hidden, *parameters = _operands(nodes[0])
    for node in parameters:
        if node.op != "placeholder":
            return f"{node.name} is computed in this graph"
    for node in (hidden, *parameters, *nodes):
        if effects.written(node):
            return f"{node.name} is written in this graph"
    memory = set(map(storage_key, (hidden, *nodes)))
    # AOTAutograd gives such a view a gradient where the view is returned.
    for node in without_grad(hidden.graph) if torch.is_grad_enabled() else ():
        if storage_key(node) in memory:
            return f"{node.name} is a view that was made without grad mode"
    value = nodes[-1]
    if not isinstance(fake(value).shape[-1], int):
        return "the number of classes may vary"
    if not fake(value).is_contiguous():
        return f"{value.name} is a view with the strides of other logits"
    for other in value.graph.output_node().all_input_nodes:
        if other is not value and storage_key(other) == storage_key(value):
            return f"{value.name} and {other.name} are returned in the same memory"
    return ""


def _operands(projection: fx.Node) -> list[fx.Node]:
    """Hidden state, weight and, if there is one, bias."""
    return [node for node in positional(projection) if isinstance(node, fx.Node)]


# -- from the rewritten graph ----------------------------------------------------------------------


@dataclass(frozen=True)
class Deferral:
    """What the caller of a compiled graph gets in the place of logits.

    outputs: at these indices the graph returns the hidden state. parameters: the indices of what
    ``head`` takes besides it among the graph's inputs.
    """

    outputs: tuple[int, ...]
    parameters: tuple[int, ...]
    head: Callable[..., Tensor]
    classes: int
    dtype: torch.dtype
    requires_grad: bool
    place: Place

    def __call__(self, hidden: Tensor, inputs: Sequence[Any]) -> DeferredLogits:
        return DeferredLogits(
            Head(self.head, tuple(inputs[i] for i in self.parameters)),
            hidden,
            classes=self.classes,
            dtype=self.dtype,
            requires_grad=self.requires_grad,
        )


def defer(gm: fx.GraphModule, returned: Sequence[ReturnedLogits]) -> list[Deferral]:
    """Let ``gm``, which has been rewritten, return hidden states where nobody in it needs the
    logits any more."""
    graph = gm.graph
    own = {node for logits in returned for node in logits.nodes} | {graph.output_node()}
    free = [
        logits
        for logits in returned
        if not logits.obstacle
        and not logits.projection._erased
        and all(own.issuperset(node.users) for node in logits.nodes)
    ]
    deferrals = [_deferral(graph, logits) for logits in free]
    try:
        _return_hidden(gm, free)
    except Exception as error:
        raise BrokenGraph(f"the graph cannot do without its logits: {error}") from error
    return deferrals


def _return_hidden(gm: fx.GraphModule, free: Sequence[ReturnedLogits]) -> None:
    graph = gm.graph
    for logits in free:
        hidden, *_ = _operands(logits.projection)
        logits.value.replace_all_uses_with(hidden, delete_user_cb=lambda user: user.op == "output")
    for node in sorted({node for logits in free for node in logits.nodes}, reverse=True):
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    gm.recompile()


def _deferral(graph: fx.Graph, logits: ReturnedLogits) -> Deferral:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    _, *parameters = _operands(logits.projection)
    value = fake(logits.value)
    return Deferral(
        tuple(i for i, node in enumerate(outputs(graph)) if node is logits.value),
        tuple(map(inputs.index, parameters)),
        _head(graph, logits),
        value.shape[-1],
        value.dtype,
        value.requires_grad,
        Place.of(logits.projection),
    )


def _head(graph: fx.Graph, logits: ReturnedLogits) -> Callable[..., Tensor]:
    """From hidden state and parameters to the logits, in the regions of autocast that they lie
    in."""
    head, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in _operands(logits.projection):
        copies[node] = head.placeholder(node.name)
    regions = {
        bound
        for end in graph.nodes
        if end.target is torch.amp.autocast_mode._exit_autocast
        and end.args[0] < logits.value
        and logits.projection < end
        for bound in (end.args[0], end)
    }
    if len(logits.nodes) == 1 and not regions:
        return F.linear  # known to DeferredLogits, which has an op for its cross-entropy
    for node in graph.nodes:
        if node in logits.nodes or node in regions:
            copies[node] = head.node_copy(node, copies.__getitem__)
            copies[node].meta.clear()
    head.output(copies[logits.value])
    return fx.GraphModule({}, head)


def returning(compiled: Callable[..., Any], deferrals: Sequence[Deferral]) -> Callable[..., Any]:
    """``compiled``, a graph that returns hidden states, with `DeferredLogits` in their place."""
    if not deferrals:
        return compiled

    def run(*inputs: Any) -> Any:
        outputs = list(compiled(*inputs))
        for deferral in deferrals:
            logits = deferral(outputs[deferral.outputs[0]], inputs)
            for i in deferral.outputs:
                outputs[i] = logits
        return tuple(outputs)

    return run
