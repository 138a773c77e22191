"""What liger_fx finds in every causal language model of transformers. Runs on a CPU, on no data.

    python benchmarks/model_coverage.py --jobs 16
    python benchmarks/model_coverage.py --models llama gpt_oss --jobs 1

Each architecture of ``AutoModelForCausalLM`` is built on the meta device from its default config,
with as few layers as show every kind of layer, and traced from the tokens to the loss. How many
norms, rotations, gated MLPs, attentions and heads there are is counted without the patterns:

- norms: calls of modules whose class is called a norm, and that return more than a row's factor;
- rotations: tensors that leave a function whose name says that it applies RoPE;
- gated MLPs: products of an activation and another tensor of its shape, both of projections;
- other gates: the same where one of the two is no projection, as after a norm or a scan;
- attentions: calls of ``scaled_dot_product_attention``, and softmaxes of attention modules. One
  that needs nothing done, since it has no mask and no repeated heads, counts as found;
- heads: one cross-entropy a model.

Found is what a rewrite has taken out of the graph. For the rest the report's reason is counted, or,
where no pattern fits, the operations that are there.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
from _harness import Args, Benchmark, options
from _measure import reason
from _output import Panel, Row, columns, markdown
from torch import fx

KINDS = {
    "norms": ("add_rms_norm", "rms_norm", "layer_norm"),
    "rope": ("rope",),
    "gated": ("tiled_mlp", "swiglu", "geglu"),
    "gates": ("swiglu", "geglu"),
    "attention": ("softmax_attention", "attention"),
    "heads": ("linear_cross_entropy",),
}


class Site(NamedTuple):
    """A place where a rewrite is wanted: one of ``nodes`` should leave the graph."""

    kind: str
    nodes: Sequence[fx.Node]
    operations: str


# -- counting, without the patterns ----------------------------------------------------------------


def sites(graph: fx.Graph) -> list[Site]:
    from liger_fx.canonical import View

    view = View(graph)
    return [*_norms(view), *_rotations(view), *_gated(view), *_attentions(view)]


def _norms(view: Any) -> Iterator[Site]:
    calls: dict[str, list[fx.Node]] = {}
    for node in view.position:
        modules = node.meta.get("nn_module_stack", {})
        norm = next((key for key, entry in modules.items() if _is_norm(entry[1])), None)
        if norm is not None and _computes(view, node):
            calls.setdefault(norm, []).append(node)
    for nodes in calls.values():
        if _shape(nodes[-1])[-1:] != ["1"]:
            yield Site("norms", nodes, _operations(view, nodes))


def _is_norm(kind: Any) -> bool:
    return "norm" in _class_name(kind).lower()


def _class_name(kind: Any) -> str:
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


_APPLIES_ROPE = re.compile(r" in \w*(?:apply|rotate_quer)\w*(?:rot|rope|queries)\w*$", re.MULTILINE)


def _rotations(view: Any) -> Iterator[Site]:
    inside = [n for n in view.position if _APPLIES_ROPE.search(n.meta.get("stack_trace") or "")]
    known = set(inside)
    returned = {view.resolve(node): None for node in inside if not set(node.users) <= known}
    for node in returned:
        if node in known and _computes(view, node):
            nodes = _before(view, node, known)
            products = [n for n in nodes if _op(n) == "mul"]
            yield Site("rope", products or nodes, _operations(view, nodes))


def _before(view: Any, node: fx.Node, known: set[fx.Node]) -> list[fx.Node]:
    """The nodes among ``known`` of which ``node`` is computed, in order."""
    found, todo = {node}, [node]
    while todo:
        for other in todo.pop().all_input_nodes:
            if other in known and other not in found:
                found.add(other)
                todo.append(other)
    return sorted((n for n in found if _computes(view, n)), key=view.position.__getitem__)


_ACTIVATIONS = {"silu", "gelu", "relu", "relu_", "silu_", "mish", "softplus", "quick_gelu"}


def _gated(view: Any) -> Iterator[Site]:
    for node in view.position:
        if _op(node) not in ("mul", "mul_"):
            continue
        factors = [view.resolve(a) for a in node.args]
        if len(factors) != 2 or not all(_shape(f) == _shape(node) for f in factors):
            continue
        gates = [f for f in factors if _is_activation(view, f)]
        if len(gates) == 1:
            ups = [f for f in factors if f is not gates[0]]
            nodes = [*_written_out(view, gates[0]), *ups, node]
            is_mlp = all(_of_a_projection(view, factor) for factor in factors)
            yield Site("gated" if is_mlp else "gates", [node], _operations(view, nodes))


_PASSES = {
    "cast",
    "reshape",
    "getitem",
    "chunk",
    "split",
    "clamp",
    "dropout",
    "sigmoid",
    "add",
    "mul",
}


def _of_a_projection(view: Any, node: Any) -> bool:
    """Is it a product with a parameter, but for activations, clamps, numbers, biases, adapters?"""
    inputs = [view.resolve(n) for n in node.all_input_nodes]
    if any(_is_parameter(view, n) and _shape(n) != _shape(node) for n in inputs):
        return _op(node) not in ("mul", "add", "embedding")
    if _op(node) not in _PASSES | _ACTIVATIONS and not _is_activation(view, node):
        return False
    found = [_of_a_projection(view, n) for n in inputs]
    return any(found) if _op(node) == "add" else bool(found) and all(found)


def _is_parameter(view: Any, node: Any) -> bool:
    while isinstance(node, fx.Node) and _op(node) in ("cast", "transpose", "reshape", "getitem"):
        node = view.resolve(node.args[0])
    return isinstance(node, fx.Node) and "_parameters_" in str(node.target)


def _is_activation(view: Any, node: fx.Node) -> bool:
    modules = node.meta.get("nn_module_stack", {})
    source = next(reversed(modules.values()))[1] if modules else ""
    is_module = "Activation" in _class_name(source) or _class_name(source) in ("SiLU", "GELU")
    leaves = is_module and any(
        user.meta.get("nn_module_stack", {}).keys() != modules.keys() for user in node.users
    )
    return _op(node) in _ACTIVATIONS or leaves or len(_written_out(view, node)) > 1


def _written_out(view: Any, node: fx.Node) -> list[fx.Node]:
    """``x * sigmoid(a * x)``: the nodes; else the node alone."""
    factors = [view.resolve(a) for a in node.args] if _op(node) == "mul" else []
    for sigmoid, x in (factors, factors[::-1]) if len(factors) == 2 else ():
        if _op(sigmoid) == "sigmoid":
            inner = view.resolve(sigmoid.args[0])
            if inner is x:
                return [sigmoid, node]
            if _op(inner) == "mul" and x in map(view.resolve, inner.args):
                return [inner, sigmoid, node]
    return [node]


def _attentions(view: Any) -> Iterator[Site]:
    for node in view.position:
        modules = node.meta.get("nn_module_stack", {})
        module = _class_name(next(reversed(modules.values()))[1]) if modules else ""
        written_out = _op(node) == "softmax" and "Attention" in module
        if _op(node) == "scaled_dot_product_attention" or written_out:
            nodes = [n for n in (*node.all_input_nodes, node) if _computes(view, n)]
            yield Site("attention", [node], _operations(view, nodes))


def _op(node: Any) -> Any:
    from liger_fx.canonical import op_name

    return op_name(node) if isinstance(node, fx.Node) else None


def _shape(value: Any) -> Any:
    from liger_fx.canonical import fake

    return list(map(str, getattr(fake(value), "shape", ["no tensor"])))


def _computes(view: Any, node: fx.Node) -> bool:
    from liger_fx.canonical import fake

    is_call = node.op in ("call_function", "call_method") and not view.does_nothing(node)
    return is_call and isinstance(fake(node), torch.Tensor | tuple | list)


def _operations(view: Any, nodes: Sequence[fx.Node]) -> str:
    from liger_fx.matcher import name_of

    return " ".join(name_of(_op(n)) for n in nodes if _computes(view, n))


# -- one model -------------------------------------------------------------------------------------


def measure(model: str) -> Row:
    from liger_fx.dynamo import Backend, trace_without_kernels
    from liger_fx.explaining.huggingface import subject
    from liger_fx.explaining.memory import all_nodes
    from liger_fx.explaining.subject import Request
    from liger_fx.returned import returning

    request = Request(2, 64, False, False, None, None, {})
    (part,) = subject(model, request).parts
    backend = Backend({"policy": "all", "strict": True})
    found, wanted, left = Counter[str](), Counter[str](), Counter[str]()
    made, reports = Counter[str](), []

    def look(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        there = [site for graph in {n.graph: 0 for n in all_nodes(gm)} for site in sites(graph)]
        report, deferrals = backend.rewrite(gm)
        reports.append(report)
        made.update(report.counts)
        for site in there:
            wanted[site.kind] += 1
            if any(node._erased for node in site.nodes) or _is_plain_attention(site):
                found[site.kind] += 1
            else:
                left[f"{site.kind}: {_why(site, report)}"] += 1
        return returning(gm.forward, deferrals)

    trace_without_kernels(part.call, part.args, part.kwargs, look)
    wanted["heads"] = 1
    found["heads"] = min(1, made["linear_cross_entropy"])
    if not found["heads"]:
        left[f"heads: {_why_no_head(reports)}"] = 1
    counts = {kind: f"{found[kind]} of {wanted[kind]}" if wanted[kind] else "" for kind in KINDS}
    return {
        "arm": model,
        **counts,
        "graphs": len(reports),
        "found": dict(found),
        "wanted": dict(wanted),
        "made": dict(made),
        "left": dict(left),
        "why": "; ".join(f"{n} x {text}" for text, n in left.items()),
    }


def _is_plain_attention(site: Site) -> bool:
    """Nothing is given but queries, keys and values: the kernel for that is what runs."""
    node = site.nodes[0]
    if node._erased or _op(node) != "scaled_dot_product_attention":
        return False
    given = [*node.args, *node.kwargs.values()]
    tensors = [value for value in given if isinstance(value, fx.Node)]
    return len(tensors) == 3 and not any(_op(n) in ("reshape", "expand") for n in tensors[1:])


def _why(site: Site, report: Any) -> str:
    from liger_fx.report import Place

    for node in site.nodes:
        place = Place.of(node)
        for rejection in report.rejections:
            if rejection.rewrite in KINDS[site.kind] and rejection.place.module == place.module:
                return _said(rejection)
    return f"no pattern for {site.operations}"


def _said(each: Any) -> str:
    """What the report says of a rewrite, without the numbers of nodes: one reason a model."""
    return f"{each.rewrite}: " + re.sub(r" \(\w+\)|(?<=[a-z])_\d+\b", "", each.reason)


def _why_no_head(reports: Sequence[Any]) -> str:
    heads = ("linear_cross_entropy", "cross_entropy")
    for said in ("rejections", "near_misses"):
        for report in reports:
            for each in getattr(report, said):
                if each.rewrite in heads:
                    return _said(each)
    return f"no cross-entropy in {len(reports)} graphs"


# -- all models ------------------------------------------------------------------------------------


def run(args: Args) -> Iterator[list[Row]]:
    """Each model in a process of its own, forked from this one, which has imported everything."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    import liger_fx.explaining.huggingface  # noqa: F401

    todo = list(args.models or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[::-1]
    running: dict[Connection, tuple[str, Any]] = {}
    context = multiprocessing.get_context("fork")
    while todo or running:
        while todo and len(running) < args.jobs:
            model = todo.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_in_a_process, args=(model, args.seconds, theirs))
            process.start()
            theirs.close()
            running[ours] = model, process
        for ready in wait(list(running)):
            model, process = running.pop(ready)
            try:
                yield [ready.recv()]
            except EOFError:  # ended by the alarm, or by the system
                process.join()
                yield [{"arm": model, "error": f"failed: ended by signal {-process.exitcode}"}]
            process.join()


def _in_a_process(model: str, seconds: int, to: Connection) -> None:
    import signal

    signal.alarm(seconds)  # ends the process
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        to.send(measure(model))
    except Exception as error:
        to.send({"arm": model, "error": reason(error)})


def text(rows: list[Row], args: Args) -> str:
    measured = [row for row in rows if "error" not in row]
    left, models = Counter[str](), Counter[str]()
    for row in measured:
        left.update(row["left"])
        models.update(row["left"].keys())
    reasons = [f"- {n} ({models[why]} models) {why}" for why, n in left.most_common()]
    return "\n".join([markdown(rows, BENCHMARK.columns), *reasons])


def finish(rows: list[Row], args: Args) -> list[Row]:
    """With a last row for all models."""
    rows = [row for row in rows if "models" not in row]
    found, wanted, made = (
        sum((Counter(row.get(key, {})) for row in rows), Counter[str]())
        for key in ("found", "wanted", "made")
    )
    models = sum("error" not in row for row in rows)
    total = {
        "arm": f"all {models}",
        "models": models,
        **{kind: f"{found[kind]} of {wanted[kind]}" for kind in KINDS},
        **{f"{kind}_share": found[kind] / max(1, wanted[kind]) for kind in KINDS},
        **{"found": dict(found), "wanted": dict(wanted), "made": dict(made), "left": {}},
    }
    return [*rows, total]


BENCHMARK = Benchmark(
    options(
        __doc__,
        device="cpu",
        models={"nargs": "+", "metavar": "TYPE", "help": "model types (all)"},
        jobs={"type": int, "default": 4, "help": "models at a time"},
        seconds={"type": int, "default": 300, "help": "time limit of a model"},
    ),
    run=run,
    finish=finish,
    text=text,
    columns=columns(
        "model {arm} | norms {norms} | rotations {rope} | gated MLPs {gated} |"
        " other gates {gates} | attentions {attention} | heads {heads} | left, and why {why}"
    ),
    title="Found in the causal language models of transformers",
    panels=[
        Panel(
            "share found",
            {kind: f"{kind}_share" for kind in KINDS},
            "{key}",
            ".1%",
            series="liger_fx",
        )
    ],
    packages=("transformers",),
)

if __name__ == "__main__":
    BENCHMARK.main()
