"""``python -m liger_fx measure``: a table of this GPU, for ``policy="auto"`` to decide by.

Decoder layers in plain PyTorch, with random weights in bf16 and the sizes of real models: one layer
in a graph, and under Inductor two, checkpointed or not. The loss on logits, and a trained
embedding. Each rewrite is made alone and compared with none, as ``policy="measure"`` compares them;
the median of all runs counts. The table has the format of liger_fx/measured.json.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from liger_fx import __version__, policy
from liger_fx.measure import copied, measure_anew, write_at_once
from liger_fx.options import INNER, OptionError, Options
from liger_fx.passes import DEFAULT
from liger_fx.policy import Row, architecture_of, own_table
from liger_fx.rewrite import rewrite_graph

LOGITS = (4096, 128_256)
TABLE = (128_256, 2048)


class CannotMeasure(ValueError):
    """There is no GPU, or nothing could be measured on it; the message says what to do."""


# -- what is measured ------------------------------------------------------------------------------


def _llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * _normalised(x).to(x.dtype)


def _gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    return (_normalised(x) * (1.0 + weight.float())).type_as(x)


def _normalised(x: Tensor) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@dataclass(frozen=True)
class Sizes:
    """Of a decoder layer. key_heads: of keys and of values. head: elements of one."""

    hidden: int
    mlp: int
    heads: int
    key_heads: int
    head: int
    norm: Callable[[Tensor, Tensor], Tensor] = _llama_norm
    activation: Callable[[Tensor], Tensor] = F.silu


MODELS = {
    "Llama-3.2-1B": Sizes(2048, 8192, 32, 8, 64),
    "Qwen2.5-1.5B": Sizes(1536, 8960, 12, 2, 128),
    "Gemma2-2B": Sizes(2304, 9216, 8, 4, 256, _gemma_norm, _gelu),
}


class Layer(nn.Module):
    """A decoder layer, written as transformers and torchtune write it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        queries, keys = sizes.heads * sizes.head, sizes.key_heads * sizes.head
        self.sizes = sizes
        self.attention_norm = nn.Parameter(torch.ones(sizes.hidden))
        self.mlp_norm = nn.Parameter(torch.ones(sizes.hidden))
        self.query = nn.Linear(sizes.hidden, queries, bias=False)
        self.key = nn.Linear(sizes.hidden, keys, bias=False)
        self.value = nn.Linear(sizes.hidden, keys, bias=False)
        self.out = nn.Linear(queries, sizes.hidden, bias=False)
        self.gate = nn.Linear(sizes.hidden, sizes.mlp, bias=False)
        self.up = nn.Linear(sizes.hidden, sizes.mlp, bias=False)
        self.down = nn.Linear(sizes.mlp, sizes.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [b, s, h]; cos, sin: [1, 1, s, d]."""
        x = x + self._attention(self.sizes.norm(x, self.attention_norm), cos, sin)
        y = self.sizes.norm(x, self.mlp_norm)
        return x + self.down(self.sizes.activation(self.gate(y)) * self.up(y))

    def _attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.sizes.head)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = (y * cos + _rotated_half(y) * sin for y in (query, key))
        b, groups, s, d = key.shape
        times = self.sizes.heads // groups
        key, value = (
            y[:, :, None].expand(b, groups, times, s, d).reshape(b, groups * times, s, d)
            for y in (key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(b, s, -1))


def _rotated_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Decoder(nn.Module):
    """Layers without embedding and head. recomputed: each in an activation checkpoint."""

    def __init__(self, sizes: Sizes, layers: int, recomputed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(layers))
        self.recomputed = recomputed

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            if self.recomputed:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = layer(x, cos, sin)
        return x


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels)


GRAPHS = {
    "layers": "one layer",
    "step": "two layers",
    "loss": "the loss",
    "embedding": "an embedding",
}


class Case(NamedTuple):
    """One graph under one compiler. form: which of `GRAPHS`, as in a table's rows."""

    model: str
    form: str
    checkpoint: bool
    inner: str

    def __str__(self) -> str:
        recomputed = ["in checkpoints"] * self.checkpoint
        return ", ".join([self.model, GRAPHS[self.form], *recomputed, self.inner])


def cases(inners: Sequence[str] = INNER) -> Iterator[Case]:
    """Without Inductor the number of layers makes no difference."""
    for inner in inners:
        for form in ("layers", "step") if inner == "inductor" else ("layers",):
            for model, recomputed in itertools.product(MODELS, (True, False)):
                yield Case(model, form, recomputed, inner)
        yield Case(f"logits {list(LOGITS)}", "loss", False, inner)
        yield Case(f"table {list(TABLE)}", "embedding", False, inner)


def _built(
    case: Case, batch: int, seq: int, device: torch.device
) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
    """What is compiled, and what it is called with."""
    how: Any = {"dtype": torch.bfloat16, "device": device}
    if case.form == "embedding":
        tokens = torch.randint(TABLE[0], (batch, seq), device=device)
        return F.embedding, [tokens, torch.randn(TABLE, requires_grad=True, **how)]
    if case.form == "loss":
        labels = torch.randint(LOGITS[1], LOGITS[:1], device=device)
        return _loss, [torch.randn(LOGITS, requires_grad=True, **how), labels]
    sizes = MODELS[case.model]
    hidden = torch.randn(batch, seq, sizes.hidden, requires_grad=True, **how)
    angles = torch.outer(torch.arange(seq), 1e4 ** -torch.linspace(0, 1, sizes.head // 2))
    angles = torch.cat((angles, angles), dim=-1)[None, None]
    model = Decoder(sizes, 2 if case.form == "step" else 1, case.checkpoint).to(**how)
    return model, [hidden, angles.cos().to(**how), angles.sin().to(**how)]


# -- measuring -------------------------------------------------------------------------------------


def measured(case: Case, batch: int, seq: int, device: torch.device) -> list[Row]:
    """A row for each rewrite that can be made in ``case``. Raises whatever compiling and running
    raises."""
    # As policy="measure" does: a CUDA graph would keep the copies of the inputs.
    inductor = {"triton.cudagraphs": False} if case.inner == "inductor" else {}
    options = Options(inner=case.inner, inductor=inductor)
    rows = []

    def record(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        patterns = {
            made.rewrite: made.pattern
            for rewrite in DEFAULT
            for made in rewrite_graph(copied(gm), [rewrite]).replacements
        }
        many = case.model in MODELS and not case.checkpoint
        for name, found in measure_anew(gm, example_inputs, DEFAULT, options, many).items():
            place = (name, patterns[name], case.inner, case.checkpoint, case.model, case.form)
            rows.append(Row(found.speed, found.memory, *place))
        return gm.forward

    function, inputs = _built(case, batch, seq, device)
    torch._dynamo.reset()
    torch.compile(function, backend=record, fullgraph=True, dynamic=False)(*inputs)
    return rows


def run(
    found: Sequence[Case],
    batch: int,
    seq: int,
    device: torch.device,
    say: Callable[[str], object],
) -> list[dict[str, Any]]:
    """The rows of ``found``, as a table keeps them: those of a case that stands there several times
    are one, with several speeds. say: gets a line for each case and each row. A case that fails,
    such as one for which memory is short, is left out, and said. Raises CannotMeasure where none is
    left."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for case in found:
        say(str(case))
        try:
            new = measured(case, batch, seq, device)
        except Exception as failure:
            # Dynamo wraps what a backend raises in a BackendCompilerFailed.
            cause = getattr(failure, "inner_exception", failure)
            say(f"  not measured: {type(cause).__name__}: {cause}".splitlines()[0])
            continue
        for row in new:
            memory = "" if row.memory is None else f", {row.memory:.2f} of the memory"
            say(f"  {row.rewrite}, {row.spelling}: {row.speed:.3f}x the speed{memory}")
            place = asdict(row)
            numbers = {"speeds": [place.pop("speed")], "memory": place.pop("memory")}
            key = tuple(place.values())
            if key in rows:
                rows[key]["speeds"] += numbers["speeds"]
            else:
                rows[key] = numbers | place
    if not rows:
        raise CannotMeasure("nothing could be measured; less --batch or --seq takes less memory")
    return list(rows.values())


def gpu() -> torch.device:
    """Raises CannotMeasure where there is none."""
    if not torch.cuda.is_available():
        raise CannotMeasure(
            "torch finds no GPU here, and the table is for GPUs: on a CPU policy='measure' decides"
        )
    return torch.device("cuda", torch.cuda.current_device())


# -- the file --------------------------------------------------------------------------------------


def destination(path: str) -> Path:
    """The file that is written: ``path``, or else what ``auto`` reads. Raises CannotMeasure for one
    that cannot be written to: better before measuring."""
    file = Path(path or os.environ.get("LIGER_FX_TABLE") or policy.own_path())
    with contextlib.suppress(OSError):  # the check says so
        file.parent.mkdir(parents=True, exist_ok=True)
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CannotMeasure(f"{file} cannot be written to: give --write another file")
    return file


def write(
    file: Path, device: torch.device, rows: Sequence[Mapping[str, Any]], command: str
) -> None:
    """Put ``rows`` into ``file``, in the place of what it says of the architecture of ``device``. A
    file that is no table is replaced. Raises OSError."""
    tables = {}
    with contextlib.suppress(OptionError):
        own_table(str(file))
        tables = json.loads(file.read_text(encoding="utf-8"))
    liger = f"liger_kernel {version('liger_kernel')}, liger_fx {__version__}"
    tables[architecture_of(device)] = {
        "machine": torch.cuda.get_device_name(device),
        "versions": f"torch {torch.__version__}, {liger}",
        "date": str(datetime.date.today()),
        "commands": [command],
        "rows": rows,
    }
    write_at_once(file, as_text(tables))


def as_text(tables: Mapping[str, Any]) -> str:
    """JSON with one row a line."""
    rounded = json.loads(json.dumps(tables), parse_float=lambda number: round(float(number), 4))
    entries = []
    for architecture, entry in rounded.items():
        rows = ",\n".join(f"   {json.dumps(row)}" for row in entry.pop("rows"))
        facts = "".join(
            f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in entry.items()
        )
        entries.append(f' "{architecture}": {{\n{facts}  "rows": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(entries) + "\n}\n"
