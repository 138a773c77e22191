"""An instruction set and a tokenizer made from the docstrings of this Python installation.

The sources are parsed, never imported: fast, and nothing of theirs runs.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtune.data import Message
from torchtune.modules.transforms.tokenizers import (
    ModelTokenizer,
    tokenize_messages_no_special_tokens,
)
from tqdm import tqdm

PACKAGES = ("numpy", "pandas", "networkx")  # beside the standard library, where installed
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "_vendor"}
PUBLIC_NAME = {"posixpath": "os.path", "numpy.core": "numpy"}
MIN_ANSWER, MAX_SIGNATURE = 200, 120  # characters

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def write_dataset(path: Path) -> int:
    """Write one JSON line {question, answer} per documented public name; returns how many."""
    questions, answers = set(), set()
    with path.open("w") as file:
        for source, module in tqdm(_sources(), desc="docstrings", unit=" files", leave=False):
            for question, answer in _examples(source, module):
                # Inherited and aliased docstrings would put the same answer in many times.
                if question in questions or answer in answers:
                    continue
                questions.add(question)
                answers.add(answer)
                file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return len(questions)


def train_tokenizer(dataset: Path, path: Path, vocab_size: int) -> None:
    """Train a byte-level BPE on the questions and answers of ``dataset``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(dataset), trainer)
    tokenizer.save(str(path))


class DocstringTokenizer(ModelTokenizer):
    """The trained tokenizer as torchtune's recipes use it, padding to ``max_seq_len``.

    One length for all batches keeps the compiled shapes static. Padding is masked like the
    prompt, so torchtune's own dataset and collate function turn both into ignored labels.
    """

    def __init__(self, path: str, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self._tokenizer = Tokenizer.from_file(path)
        self.special_tokens = {t: self._tokenizer.token_to_id(t) for t in (PAD, BOS, EOS)}
        self.pad_id, self.bos_id, self.eos_id = self.special_tokens.values()

    def encode(self, text: str, **_: bool) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: list[int], **_: bool) -> str:
        return self._tokenizer.decode(token_ids)

    def tokenize_messages(self, messages: list[Message], **_: bool) -> tuple[list[int], list[bool]]:
        return tokenize_messages_no_special_tokens(
            self, messages, bos_id=self.bos_id, eos_id=self.eos_id
        )

    def __call__(self, sample: Mapping[str, list], inference: bool = False) -> dict[str, list]:
        tokens, mask = self.tokenize_messages(sample["messages"])
        padding = self.max_seq_len - len(tokens)
        return {"tokens": tokens + [self.pad_id] * padding, "mask": mask + [True] * padding}


def _sources() -> list[tuple[Path, str]]:
    """Every source file to read, with its module's name, in a fixed order."""
    stdlib, site = (Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib"))
    found = [(file, stdlib) for file in sorted(stdlib.rglob("*.py"))]
    for package in PACKAGES:
        found += [(file, site) for file in sorted((site / package).rglob("*.py"))]
    return [
        (file, ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
        for file, root in found
        if SKIPPED.isdisjoint(file.relative_to(root).parts)
    ]


def _examples(source: Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError):  # templates and files for other Python versions
        return
    for name, node in _definitions(tree, PUBLIC_NAME.get(module, module)):
        answer = ast.get_docstring(node) or ""
        if len(answer) >= MIN_ANSWER:
            yield f"What does `{name}{_signature(node)}` do?\n", answer


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    """The public functions, classes and methods below ``node``, by their dotted names."""
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if child.name.startswith("_") or "._" in prefix:
                continue
            name = f"{prefix}.{child.name}"
            yield name, child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, name)


def _signature(node: ast.AST) -> str:
    signature = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
    return signature if len(signature) <= MAX_SIGNATURE else "(...)"


def _texts(dataset: Path) -> Iterator[str]:
    for line in dataset.open():
        yield from json.loads(line).values()
