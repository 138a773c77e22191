"""``python -m liger_fx``: ``explain`` says what is done with a model, ``measure`` what pays on this
GPU."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from liger_fx import own_table
from liger_fx.explaining.explanation import explain_subject
from liger_fx.explaining.render import as_html, as_text
from liger_fx.explaining.subject import DTYPES, CannotExplain, Request
from liger_fx.options import INNER

EXTRAS = {"huggingface": "transformers", "torchtune": "torchtune"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m liger_fx", description=__doc__)
    commands = parser.add_subparsers(required=True)
    _add_explain(commands)
    _add_measure(commands)
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except (ValueError, OSError) as error:  # CannotExplain, CannotMeasure, OptionError, a file
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="what would be replaced in a model, what not and why, and the memory it would take",
        description="Builds the model without weights, traces a training step without a GPU, and "
        "prints what liger_fx would replace, what not and why, and the bytes that this saves. "
        "LIGER_FX_* variables are the options of the backend.",
    )
    model = explain.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--hf",
        metavar="CONFIG",
        help="Hugging Face: a folder with config.json, a model type (llama) or an architecture "
        "(LlamaForCausalLM)",
    )
    model.add_argument(
        "--torchtune", metavar="CONFIG", help="a config as tune run takes it (llama3_2/1B_full)"
    )
    explain.add_argument("--batch", type=_positive, default=8, help="sequences (8)")
    explain.add_argument("--seq", type=_positive, default=2048, help="tokens of a sequence (2048)")
    explain.add_argument("--checkpoint", action="store_true", help="checkpoint each layer")
    explain.add_argument("--padding", action="store_true", help="--hf: give an attention mask")
    explain.add_argument("--dtype", choices=DTYPES, help="bf16, or that of torchtune's config")
    explain.add_argument("--layers", type=_positive, help="--hf: how many layers to trace")
    explain.add_argument(
        "--set",
        nargs="+",
        type=_setting,
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help="settings of the config to change: --set num_hidden_layers=16 hidden_size=2048",
    )
    explain.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    explain.set_defaults(run=_explain, error=explain.error)


def _add_measure(commands: Any) -> None:
    measure = commands.add_parser(
        "measure",
        help="what each rewrite changes on this GPU: a table for policy=auto",
        description="Compiles decoder layers in the sizes of Llama-3.2-1B, Qwen2.5-1.5B and "
        "Gemma2-2B with each rewrite and without, and times both forms on this GPU, which should "
        'do nothing else. The policy "auto" decides by the table that --write writes.',
    )
    measure.add_argument(
        "--write",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the table: to FILE, or else to the file that LIGER_FX_TABLE names, or else to "
        "liger_fx/measured.json in your cache directory (~/.cache)",
    )
    measure.add_argument("--batch", type=_positive, default=8, help="sequences (8)")
    measure.add_argument("--seq", type=_positive, default=2048, help="tokens of a sequence (2048)")
    measure.add_argument("--runs", type=_positive, default=3, help="the median of them counts (3)")
    measure.add_argument(
        "--inner", nargs="+", choices=INNER, default=INNER, help="inner compilers (all)"
    )
    measure.set_defaults(run=_measure)


def _measure(given: argparse.Namespace) -> None:
    device = own_table.gpu()
    file = None if given.write is None else own_table.destination(given.write)
    cases = [*own_table.cases(given.inner)] * given.runs
    rows = own_table.run(
        cases, given.batch, given.seq, device, functools.partial(print, flush=True)
    )
    if file is not None:
        how = f"--batch {given.batch} --seq {given.seq} --runs {given.runs}"
        own_table.write(file, device, rows, f"python -m liger_fx measure --write {how}")
        print(f"{len(rows)} rows are in {file}")


def _explain(given: argparse.Namespace) -> None:
    if given.torchtune and (given.padding or given.layers):
        given.error(
            "--padding and --layers go with --hf: torchtune's recipes give no mask, and "
            "one layer of each kind is traced"
        )
    request = Request(
        given.batch,
        given.seq,
        given.checkpoint,
        given.padding,
        given.dtype,
        given.layers,
        dict(given.set),
    )
    library = "huggingface" if given.hf else "torchtune"
    with _quiet():
        subject = _builder(library).subject(given.hf or given.torchtune, request)
        explanation = explain_subject(subject)
    if given.html:
        given.html.write_text(as_html(explanation), encoding="utf-8")
    print(as_text(explanation))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries log and warn of: errors are raised, or stand in the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _builder(library: str) -> Any:
    """The module that builds models of ``library``."""
    package = EXTRAS[library]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise CannotExplain(
            f'{package} cannot be imported ({error}): pip install "liger_fx[{library}]"'
        ) from error
    return importlib.import_module(f"liger_fx.explaining.{library}")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, not {text}")
    return number


def _setting(text: str) -> tuple[str, Any]:
    """``hidden_size=2048`` -> ("hidden_size", 2048); what is no JSON is a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, not {text}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
