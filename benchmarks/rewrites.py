"""What each rewrite changes, on its own: the table that ``policy="auto"`` decides by.

    python benchmarks/rewrites.py --write
    python benchmarks/rewrites.py --add
    python benchmarks/rewrites.py --add --rewrites rope add_rms_norm
    python benchmarks/rewrites.py --show sm90
    python benchmarks/rewrites.py --model tiny --device cpu --batch 2 --seq 32 --laps 2

Two decoder layers, torchtune's or those of transformers, in the sizes of real models, forward and
backward, with random weights in bf16 and without embedding and head: each layer compiled by itself
("layers") or both in one graph ("step"), checkpointed or not, under each inner compiler. And the
loss on logits, and a trained embedding. Each rewrite is made alone and compared with none: laps in
turn, in one process, medians. Memory is that of the peak; of layers without checkpoints it is what
their forward leaves for the backward.

A case is a process of its own. First all compile, ``--jobs`` at a time; when the last has, they
are timed one by one. ``--write`` puts the rows into liger_fx/measured.json, in the place of what it
says of the architecture of this machine; ``--add`` puts them beside, and the median of all runs
counts. One run is not enough: from run to run a row differs by 1 or 2 %, sometimes by 5.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import itertools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _harness import Args, Benchmark, options, several, side_by_side
from _measure import GIB, interleaved, lap_times, padding, run_laps
from _output import PACKAGES, Column, Panel, Row, columns, markdown
from _steps import checkpointed, llama, lora, random_model
from liger_fx.passes import DEFAULT
from torch import Tensor, fx, nn
from torchtune.models.gemma2 import gemma2
from torchtune.models.qwen2 import qwen2
from torchtune.modules.loss import CEWithChunkedOutputLoss

from liger_fx import rewrite_graph
from liger_fx.measure import left_by_forward
from liger_fx.options import INNER
from liger_fx.own_table import as_text
from liger_fx.policy import Row as TableRow
from liger_fx.policy import architecture_of, pays, table

TABLE = Path(__file__).parent.parent / "liger_fx" / "measured.json"

JUDGED = [rewrite.name for rewrite in DEFAULT if rewrite.gain is None]
NO_RUNS: Row = {"machine": "", "commands": [], "rows": []}

LAYERS, VOCABULARY = 2, 8  # the vocabulary is that of a head and an embedding that nobody calls
LOGITS = {"logits [4096, 128256]": (4096, 128_256), "tiny logits [64, 512]": (64, 512)}
TABLES = {"table [128256, 2048]": (128_256, 2048), "tiny table [512, 64]": (512, 64)}


class OfTransformers(nn.Module):
    """A layer of transformers that is called as one of torchtune's, but for its angles."""

    def __init__(self, layer: nn.Module, rotary: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer(x, position_embeddings=angles)


def of_transformers(name: str) -> nn.Module:
    """The first layers of a model of huggingface_step.py."""
    from huggingface_step import CONFIGS
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers, config.vocab_size = LAYERS, VOCABULARY
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model
    kinds = [(kind,) for kind in config.layer_types] if name.startswith("gemma3") else [()] * LAYERS

    def rotary(x: Tensor, *kind: str) -> tuple[Tensor, Tensor]:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return model.rotary_emb(x, positions, *kind)

    found = nn.Module()
    found.tok_embeddings, found.rotary = model.embed_tokens, model.rotary_emb
    found.layers = nn.ModuleList(
        OfTransformers(layer, lambda x, kind=kind: rotary(x, *kind))
        for layer, kind in zip(model.layers, kinds, strict=False)
    )
    return found


GEMMA2 = {"hidden_capping_value": 30.0, "final_capping_value": 50.0}
# Positional: vocabulary, layers, heads and their sizes, hidden size, that of the MLP, length.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama-3.2-1B": partial(llama, "llama3_2_1b", vocab_size=VOCABULARY, num_layers=LAYERS),
    "Qwen2.5-1.5B": partial(qwen2, VOCABULARY, LAYERS, 12, 2, 1536, 8960, 131_072),
    "Gemma2-2B": partial(gemma2, VOCABULARY, LAYERS, 8, 256, 4, 2304, 9216, 8192, **GEMMA2),
    "Llama-3.2-1B, LoRA": partial(lora, "llama3_2_1b", vocab_size=VOCABULARY, num_layers=LAYERS),
    "Qwen3-0.6B": partial(of_transformers, "qwen3_0_6b"),
    "Gemma3-1B": partial(of_transformers, "gemma3_1b"),
    "tiny": partial(llama, "tiny", vocab_size=VOCABULARY, num_layers=LAYERS),
}
MASKED = [name for name in MODELS if name.startswith(("Llama", "Qwen2", "tiny"))]  # torchtune's
# What a model computes in its graph of a causal mask and of [b, s]: which keys a query sees.
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda seen, _: seen,
    "padding": lambda seen, tokens: seen & (tokens != 0)[:, None, :],
    "documents": lambda seen, tokens: seen & _same((tokens == 0).cumsum(1)),
}


def _same(documents: Tensor) -> Tensor:
    return documents[:, :, None] == documents[:, None, :]


Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
Build = Callable[[Compile], "Lap"]  # some of it compiled


def case(model: str, form: str, checkpoint: bool, inner: str, mask: str = "") -> Row:
    parts = [model, form, "checkpoint" if checkpoint else "no checkpoint", inner]
    arm = ", ".join([*parts, f"{mask} mask"] if mask else parts)
    made = {"model": model, "form": form, "checkpoint": checkpoint, "inner": inner, "mask": mask}
    return {"arm": arm} | made


def cases(models: Sequence[str], inners: Sequence[str]) -> list[Row]:
    """Those that take longest to compile first. Without Inductor the form makes no difference."""
    small = "tiny" in models
    parts = [(name, "loss") for name in LOGITS] + [(name, "embedding") for name in TABLES]
    parts = [part for part in parts if part[0].startswith("tiny") == small]
    found = [
        case(model, form, checkpoint, inner)
        for inner in inners
        for form in (("step", "layers") if inner == "inductor" else ("layers",))
        for model, checkpoint in itertools.product(models, (True, False))
    ]
    if "inductor" in inners:  # of several layers: they share a mask
        of_masks = [name for name in models if name in MASKED]
        found += [
            case(model, "step", checkpoint, "inductor", mask)
            for model, checkpoint, mask in itertools.product(of_masks, (True, False), MASKS)
        ]
    return found + [case(*part, False, inner) for part in parts for inner in inners]


# -- a case ----------------------------------------------------------------------------------------


class Lap:
    """A forward and backward of ``run``."""

    def __init__(
        self, run: Callable[..., Tensor], trained: Sequence[Tensor], *inputs: Tensor
    ) -> None:
        self.forward, self.trained = partial(run, *inputs), trained
        self.upstream = torch.randn_like(self.forward().detach())

    def __call__(self) -> object:
        return torch.autograd.grad(self.forward(), self.trained, self.upstream)

    def gib(self, args: Args) -> float | None:
        """At the peak. Of layers without checkpoints what their forward leaves for the backward: a
        deep model has all of that at its peak. A CPU counts neither."""
        if args.device.type != "cuda" or args.checkpoint or args.form in ("loss", "embedding"):
            return run_laps(self, args.device, 1).peak_gib
        return left_by_forward(self.forward) / GIB


def decoder(args: Args) -> Build:
    model = random_model(MODELS[args.model], args.device)
    if args.checkpoint:
        checkpointed(model)
    layers: Any = model.layers
    size = (args.batch, args.seq, model.tok_embeddings.embedding_dim)
    hidden = torch.randn(size, dtype=torch.bfloat16, device=args.device, requires_grad=True)
    trained = [hidden, *(x for x in layers.parameters() if x.requires_grad)]
    tokens = of_mask(args)
    rotaries = [getattr(layer, "rotary", None) for layer in layers]

    def angles(x: Tensor) -> list[dict[str, Any]]:
        return [{"angles": rotary(x)} if rotary else {} for rotary in rotaries]

    outside, whole = angles(hidden), args.form == "step"

    def build(compiled: Compile) -> Lap:
        each = layers if whole else [compiled(layer) for layer in layers]

        def run(x: Tensor) -> Tensor:
            given = {}
            if args.mask:
                at = torch.arange(args.seq, device=x.device)
                causal = (at <= at[:, None]).expand(args.batch, -1, -1)
                given = {"mask": MASKS[args.mask](causal, tokens)}
            # A whole model computes its angles in the graph of its layers; layers are given theirs.
            for layer, found in zip(each, angles(x) if whole else outside, strict=True):
                x = layer(x, **given, **found)
            return x

        return Lap(compiled(run) if whole else run, trained, hidden)

    return build


def of_mask(args: Args) -> Tensor:
    """[b, s]: positions of documents, or zero for the padding on the right."""
    tokens = torch.arange(args.seq).remainder(max(args.seq // 4, 1)).expand(args.batch, -1)
    if args.mask == "padding":
        tokens = (~padding(tokens, 0.4)).long()
    return tokens.to(args.device)


def loss_on_logits(args: Args) -> Build:
    """What a stock recipe compiles of its loss."""
    tokens, classes = LOGITS[args.model]
    how = {"dtype": torch.bfloat16, "device": args.device, "requires_grad": True}
    logits = torch.randn(tokens, classes, **how)
    labels = torch.randint(classes, (tokens,), device=args.device)
    loss = CEWithChunkedOutputLoss().compute_cross_entropy

    def build(compiled: Compile) -> Lap:
        return Lap(compiled(loss), [logits], logits, labels)

    return build


def embedding(args: Args) -> Build:
    """A lookup of every token of a batch."""
    weight = torch.randn(TABLES[args.model], dtype=torch.bfloat16, device=args.device)
    weight.requires_grad_()
    tokens = torch.randint(len(weight), (args.batch, args.seq), device=args.device)

    def build(compiled: Compile) -> Lap:
        return Lap(compiled(F.embedding), [weight], tokens, weight)

    return build


def possible(build: Build, asked: Sequence[str]) -> dict[str, str]:
    """Which of the rewrites ``asked`` for can be made in this case, each on its own, and the
    spelling that each finds: one, as a model has its own."""
    found: dict[str, str] = {}

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for rewrite in DEFAULT:
            if rewrite.name in asked:
                made = rewrite_graph(copy.deepcopy(gm), [rewrite]).replacements
                found.update({each.rewrite: each.pattern for each in made})
        return gm.forward

    build(lambda function: torch.compile(function, backend=record))
    return found


def compiled_with(names: Sequence[str], inner: str) -> Compile:
    options = {"policy": list(names), "inner": inner, "strict": True}
    return lambda function: torch.compile(function, backend="liger_fx", options=options)


def measure(args: Args) -> Iterator[Row]:
    """A first row when all is compiled; after a line from the parent a row for each rewrite."""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # each arm is one
    build = {"loss": loss_on_logits, "embedding": embedding}.get(args.form, decoder)(args)
    asked = [name for name in args.rewrites if name == "attention" or not args.mask]
    spellings = possible(build, asked)
    arms = {name: build(compiled_with([name], args.inner)) for name in spellings}
    if arms:
        arms["none"] = build(compiled_with([], args.inner))
    for call in arms.values():
        lap_times(call, args.device, 2)  # compiles the backward, and Triton's kernels
    if args.device.type == "cuda":
        torch.cuda.empty_cache()  # for those that compile now
    yield {"compiled": True}
    sys.stdin.readline()
    memory = {name: lap.gib(args) for name, lap in arms.items()}
    laps = interleaved(arms, args.device, args.laps)
    times = {name: statistics.median(found) for name, found in laps.items()}
    for name, spelling in spellings.items():
        yield {
            "rewrite": name,
            "spelling": spelling,
            "ms_without": times["none"],
            "ms_with": times[name],
            "speed": times["none"] / times[name],
            "gib_without": memory["none"],
            "memory": memory[name] and memory[name] / memory["none"],
        }


# -- all cases -------------------------------------------------------------------------------------


def versions() -> str:
    """What runs must have in common whose medians are taken."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def runs_before(device: torch.device) -> Row:
    """What the table says of this machine's architecture. Raises ValueError where that was measured
    with other versions."""
    entry = json.loads(TABLE.read_text()).get(architecture_of(device))
    if entry and entry["versions"] != versions():
        raise ValueError(
            f"{TABLE.name} is of {entry['versions']}; nothing can be added to it with "
            f"{versions()}, only --write makes it anew"
        )
    return entry or NO_RUNS


def write_table(rows: Sequence[Row], device: torch.device, before: Row) -> None:
    """Put ``rows`` beside those of ``before``, this machine's architecture in the table."""
    entries = json.loads(TABLE.read_text())
    machines = [*before["machine"].split(", "), torch.cuda.get_device_name(device)]
    entries[architecture_of(device)] = {
        "machine": ", ".join(dict.fromkeys(filter(None, machines))),
        "versions": versions(),
        "date": str(datetime.date.today()),
        "commands": [*before["commands"], f"python {shlex.join(sys.argv)}"],
        "rows": with_speeds(before["rows"], rows),
    }
    TABLE.write_text(as_text(entries))


def with_speeds(before: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """``rows`` as the table keeps them, each with the speeds of the same one in ``before``, and
    those of ``before`` whose rewrite has none in that case this time: it failed, or was not asked
    for. Several masks of one graph are rows that the table does not tell apart: the first is the
    first's."""
    keys = [field.name for field in fields(TableRow) if field.name not in ("speed", "memory")]
    earlier: dict[tuple[Any, ...], list[Row]] = {}
    for row in before:
        earlier.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for row in rows:
        if "error" in row:
            continue
        place = {key: row[key] for key in keys}
        same = earlier.get(tuple(place.values()))
        speeds = same.pop(0)["speeds"] if same else []
        found.append({"speeds": [*speeds, row["speed"]], "memory": row["memory"]} | place)
    measured = [case_of(row) for row in found]
    left = itertools.chain.from_iterable(earlier.values())
    return found + [row for row in left if case_of(row) not in measured]


def case_of(row: Row) -> list[Any]:
    return [row[key] for key in ("rewrite", "model", "form", "checkpoint", "inner")]


PLACES = {
    "Inductor, a layer, checkpoint": ("inductor", "layers", True),
    "a layer": ("inductor", "layers", False),
    "several layers, checkpoint": ("inductor", "step", True),
    "several layers": ("inductor", "step", False),
    "aot_eager, checkpoint": ("aot_eager", "layers", True),
    "aot_eager": ("aot_eager", "layers", False),
    "eager, checkpoint": ("eager", "layers", True),
    "eager": ("eager", "layers", False),
}


def summary(architecture: str) -> str:
    """What the table says: speed from worst to best and the least memory,
    of those without the rewrite; in bold where ``auto`` applies it."""
    rows: dict[tuple[str, ...], list[TableRow]] = {}
    for row in table()[architecture].rows:
        form = row.form if row.form == "step" else "layers"
        place = (row.rewrite, row.spelling, row.inner, form, row.checkpoint)
        rows.setdefault(place, []).append(row)
    names = sorted(dict.fromkeys(place[:2] for place in rows), key=lambda name: name[0])
    columns = [Column("", "rewrite"), *(Column(title, title) for title in PLACES)]
    lines = [
        {"rewrite": f"`{rewrite}`, {spelling}"}
        | {
            title: cell(rows.get((rewrite, spelling, *place), []))
            for title, place in PLACES.items()
        }
        for rewrite, spelling in names
    ]
    return markdown(lines, columns)


def cell(rows: list[TableRow]) -> str | None:
    if not rows:
        return None
    speeds = [row.speed for row in rows]
    memory = min(row.memory or 1.0 for row in rows)
    worst, best = f"{min(speeds):.3f}", f"{max(speeds):.3f}"
    text = worst if worst == best else f"{worst} to {best}"
    text = f"**{text}**" if pays(rows) else text
    return f"{text}; {memory:.2f}"


class Show(argparse.Action):
    def __call__(self, parser: Any, namespace: Args, value: Any, option: Any = None) -> None:
        print(summary(value))
        parser.exit()


def run(args: Args) -> Iterator[list[Row]]:
    if (args.write or args.add) and args.device.type != "cuda":
        raise SystemExit("the table is for GPUs: on a CPU nothing is decided from it")
    if (args.write or args.add) and set(args.inner) != set(INNER):
        raise SystemExit(f"the table is of all inner compilers: {', '.join(INNER)}")
    before = runs_before(args.device) if args.add else NO_RUNS
    found = cases(args.models, args.inner)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LIGER_FX_")}
    rows: list[Row] = []
    for measured in side_by_side(found, args.jobs, lambda case: environment):
        rows += measured
        yield measured
    if args.write or args.add:
        write_table(rows, args.device, before)


BENCHMARK = Benchmark(
    options(
        __doc__,
        model=several(MODELS, [name for name in MODELS if name != "tiny"]) | {"dest": "models"},
        inner=several(INNER) | {"help": "compilers"},
        rewrites=several(JUDGED),
        batch=8,
        seq=2048,
        laps={"type": int, "default": 15, "help": "at least, of each arm"},
        jobs=8,
        write={"action": "store_true", "help": "liger_fx/measured.json anew"},
        add={"action": "store_true", "help": "to liger_fx/measured.json"},
        show={"action": Show, "metavar": "sm90", "help": "only print what measured.json says"},
    ),
    run,
    measure=measure,
    columns=columns(
        "model {model} | graph {form} | checkpoint {checkpoint} | inner {inner} | mask {mask} |"
        " rewrite {rewrite} | spelling {spelling} | ms without {ms_without:.3f} |"
        " ms with {ms_with:.3f} | speed {speed:.3f} | memory {memory:.3f}"
    ),
    title="Each rewrite on its own",
    panels=[
        Panel(
            "speed with it, of that without, at worst",
            "speed",
            "{rewrite}, {spelling}",
            ".3f",
            series="in a checkpoint: {checkpoint}",
            title="{inner}",
            reference=1.0,
        )
    ],
)

if __name__ == "__main__":
    BENCHMARK.main()
