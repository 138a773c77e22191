"""What MkDocs makes from the package itself.

A page may call the functions of `VARIABLES` between double braces: figures and tables from
``benchmarks/results``, docstrings, the tables of models. Pages for the rewrites, results, pictures
and the page of ``python -m liger_fx explain`` are added to those in ``docs``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import posixpath
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

import draw
import joined
import measured
import results
from as_markdown import as_markdown
from jinja2 import Environment, StrictUndefined
from liger_fx.passes import DEFAULT
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from liger_fx.rewrite import Rewrite

with warnings.catch_warnings():  # of torchtune and torchao
    warnings.simplefilter("ignore")
    tested = importlib.import_module("_models")

ROOT = Path(__file__).parents[1]
EXPLAINED = (
    "--hf llama --checkpoint --set hidden_size=2048 intermediate_size=8192 num_hidden_layers=16 "
    "num_attention_heads=32 num_key_value_heads=8 vocab_size=128256 tie_word_embeddings=true"
)


_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+\.png)\)")  # becomes a link to itself: phones are narrow


def on_config(config: MkDocsConfig) -> None:
    (reference,) = (part["Reference"] for part in config.nav if "Reference" in part)
    (pages,) = (part["Rewrites"] for part in reference if "Rewrites" in part)
    pages += [{rewrite.name: f"reference/rewrites/{rewrite.name}.md"} for rewrite in DEFAULT]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for rewrite in DEFAULT:
        uri = f"reference/rewrites/{rewrite.name}.md"
        files.append(File.generated(config, uri, content=rewrite_page(rewrite)))
    contributing = (ROOT / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=contributing))
    for path in sorted(results.RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    for name in _huggingface_files():
        for model, drawn in draw.pictures(name).items():
            files.append(File.generated(config, f"results/{name}_{model}.png", content=drawn))
    page = explained("--html")
    files.append(File.generated(config, "guides/explain_llama.html", content=page))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    environment = Environment(undefined=StrictUndefined, comment_start_string="{##")
    text = environment.from_string(markdown).render(VARIABLES)
    folder = posixpath.relpath("results", posixpath.dirname(page.file.src_uri) or ".")
    text = text.replace("{results}", folder + "/")
    return _PICTURE.sub(r"[\g<0>](\1)", text)


# -- what pages may call ---------------------------------------------------------------------------


def explained(*more: str) -> str:
    """What ``python -m liger_fx explain`` prints, or the page that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        command = [sys.executable, "-m", "liger_fx", "explain", *EXPLAINED.split()]
        done = subprocess.run(
            [*command, *(f"{flag}={page}" for flag in more)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        )
        return page.read_text() if more else done.stdout


def help_of(name: str) -> str:
    """What ``python -m liger_fx <name>`` says of its arguments."""
    command = [sys.executable, "-m", "liger_fx", name, "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "88"}
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout.rstrip()


def docstring(module: str, first: bool = True) -> str:
    """A module's docstring as Markdown. first: with its first line."""
    text = inspect.getdoc(importlib.import_module(module)) or ""
    return as_markdown(text if first else text.partition("\n")[2].strip())


def source(path: str) -> str:
    """A file of the repository, as a block of code."""
    language = {".py": "python", ".sh": "sh", ".yaml": "yaml"}[Path(path).suffix]
    return f"```{language}\n{(ROOT / path).read_text().rstrip()}\n```"


def rewrite_list() -> str:
    lines = [
        (f"[`{rewrite.name}`](rewrites/{rewrite.name}.md)", _title(_module(rewrite)))
        for rewrite in DEFAULT
    ]
    return results.markdown(["rewrite", "what becomes what"], lines)


VARIABLES: dict[str, Any] = dict(
    figure=results.figure,
    ratio=results.ratio,
    table=results.table,
    origin=results.origin,
    summary=results.summary,
    head_grid=joined.head_grid,
    head_errors=joined.head_errors,
    head_peers=joined.head_peers,
    attention_masks=joined.attention_masks,
    model_coverage=joined.model_coverage,
    models_with_something_left=joined.models_with_something_left,
    models_not_traced=joined.models_not_traced,
    long_context=joined.long_context,
    profile=joined.profile,
    help_of=help_of,
    huggingface_steps=lambda: huggingface_steps(),
    docstring=docstring,
    source=source,
    explained=explained,
    explain_command=f"python -m liger_fx explain {EXPLAINED}",
    families=tested.families,
    modes=tested.modes,
    measured=measured.table,
    measured_on=measured.origin,
    rewrite_list=rewrite_list,
)


# -- a page for each rewrite -----------------------------------------------------------------------


def rewrite_page(rewrite: Rewrite) -> str:
    text = inspect.getdoc(_module(rewrite)) or ""
    sections = [f"# {rewrite.name}", as_markdown(text), _settings(rewrite), _policy(rewrite)]
    sections += [_patterns(rewrite), _refused(rewrite), _ops(text)]
    return "\n\n".join(section for section in sections if section)


def _module(rewrite: Rewrite) -> Any:
    return importlib.import_module(f"liger_fx.passes.{rewrite.name}")


def _title(module: Any) -> str:
    paragraph = (inspect.getdoc(module) or "").split("\n\n")[0]
    return " ".join(as_markdown(paragraph).split()).rstrip(".")


def _settings(rewrite: Rewrite) -> str:
    if not rewrite.settings:
        return ""
    lines = [(f"`{rewrite.name}.{name}`", f"`{value}`") for name, value in rewrite.settings.items()]
    link = "[Options](../../guides/options.md) says what they do."
    return f"## Settings\n\n{results.markdown(['setting', 'default'], lines)}\n\n{link}"


def _policy(rewrite: Rewrite) -> str:
    how = (
        f'`policy="auto"` makes this rewrite on every device: {rewrite.gain}.'
        if rewrite.gain
        else 'With `policy="auto"` the [table of measurements](../../guides/policy.md) decides.'
    )
    return f"## When it is made\n\n{how}"


def _patterns(rewrite: Rewrite) -> str:
    codes = dict.fromkeys(_code(pattern) for pattern in rewrite.patterns)
    names = ", ".join(f"`{pattern.__name__}`" for pattern in rewrite.patterns)
    said = (
        "The model's code in the words of each library. Parameters match any value. Casts and "
        f"reshapes may be missing, and the operands of sums and products may be swapped: {names}."
    )
    block = "```python\n" + "\n\n\n".join(codes) + "\n```"
    return f'## Patterns\n\n{said}\n\n??? example "As code"\n\n{_indented(block)}'


def _code(function: Callable[..., Any]) -> str:
    function = inspect.unwrap(function)
    while hasattr(function, "func"):  # a partial
        function = function.func
    return inspect.cleandoc("\n" + inspect.getsource(function)).rstrip()


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def _refused(rewrite: Rewrite) -> str:
    lines = [f"- {reason}" for reason in dict.fromkeys(reason for _, reason in rewrite.refuses)]
    return "\n".join(["## Near twins that are refused", "", *lines]) if lines else ""


def _ops(text: str) -> str:
    """The docstrings of the modules of the ops that ``text`` names."""
    said = [
        as_markdown(ast.get_docstring(ast.parse(path.read_text())) or "")
        for path in sorted((ROOT / "liger_fx" / "ops").glob("*.py"))
        if _defines(path, text)
    ]
    return "\n\n".join(["## The op", *said]) if said else ""


def _defines(path: Path, text: str) -> bool:
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    return any(
        f"{word}``" in text for word in first.replace(",", " ").split("``") if "liger_fx::" in word
    )


# -- benchmarks ------------------------------------------------------------------------------------


def huggingface_steps() -> str:
    """A section for each ``huggingface_step*.json``: its pictures and its rows."""
    return "\n\n".join(map(_huggingface_step, _huggingface_files()))


def _huggingface_files() -> list[str]:
    """Those with the rewrite `attention` first."""
    found = sorted(path.stem for path in results.RESULTS.glob("huggingface_step*.json"))
    return sorted(found, key=lambda name: _is_old(results.rows(name)))


def _huggingface_step(name: str) -> str:
    found = results.rows(name)
    models = list(dict.fromkeys(row["model"] for row in found))
    columns = ["model"] if len(models) > 1 else []
    columns += ["arm", "ms", "peak_gib", "compile_s", "losses"]
    titles = ", ".join(results.MODELS.get(model, model) for model in models)
    sections = [f"## {titles}: {_data(found)}{_length(name)}"]
    sections += [
        f"![Time and peak memory of a step]({{results}}{name}_{model}.png)"
        for model in draw.pictures(name)
    ]
    for share in sorted({row["ignored"] for row in found}):
        sections += [f"{share:.0%} of the labels ignored:"] if share else []
        sections.append(results.table(name, " ".join(columns), list(results.ARMS), ignored=share))
    return "\n\n".join([*sections, results.origin(name)])


def _length(name: str) -> str:
    """Of the sequences, where the command asks for others than 8 of 2048 tokens."""
    command = results.origin(name)
    asked = re.search(r"--seq (\d+)", command)
    number = re.search(r"--batch (\d+)", command)
    length = f", sequences of {int(asked[1]):,} tokens" if asked else ""
    return length or (f", {number[1]} x 2048" if number else "")


def _data(found: list[results.Row]) -> str:
    row = found[0]
    data = "no padding"
    if row.get("padded"):
        data = f"{row['padded']:.0%} padding on the right"
    if row.get("packed"):
        data = f"documents of {row['packed']} tokens, packed"
    if row.get("answers", 1) > 1:
        data = f"{row['answers']} answers to each prompt"
    data += ", before the rewrite `attention`" if _is_old(found) else ""
    return data + ("" if row["checkpoint"] else ", no activation checkpoints")


def _is_old(found: list[results.Row]) -> bool:
    """Was it measured before liger_fx read masks?"""
    made = [row["rewrites"] or "" for row in found if row["arm"].startswith("liger_fx")]
    return bool(made) and not any(re.search(r"\battention\b", names) for names in made)
