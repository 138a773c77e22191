"""The README, and what docs/ makes of docstrings and results."""

import importlib
import re
from pathlib import Path

import pytest
from _models import FAMILIES, families
from liger_fx.passes import DEFAULT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "docs").rglob("*.md")}
RESULTS = sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(autouse=True)
def docs_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


def module(name: str):
    if name in ("hooks", "as_markdown"):
        pytest.importorskip("mkdocs", reason="make docs installs mkdocs")
        pytest.importorskip("griffe", reason="make docs installs griffe")
    return importlib.import_module(name)


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    links = re.findall(r"\]\(([^)]+)\)", README)
    relative = [link for link in links if not link.startswith("https://")]
    assert relative and all((ROOT / link).exists() for link in relative)


def test_the_readme_has_the_table_of_steps():
    results = module("results")
    assert results.summary() in README
    assert len(results.SUMMARY) <= 8


def test_every_result_is_on_a_page():
    named = "".join(PAGES.values())
    left = [name for name in RESULTS if not re.search(rf"\b{name}\b", named)]
    assert all(name.startswith("huggingface_step") for name in left)  # `huggingface_steps` has all


def test_a_figure_is_that_of_one_row():
    results = module("results")
    row = dict(arm="torchtune", ignored=0.0)
    assert results.figure("training_step", "peak_gib", **row) == "29.87"
    with pytest.raises(ValueError, match=r"training_step.json has 3 rows"):
        results.figure("training_step", "ms", arm="torchtune")


def test_the_table_of_models_has_every_family():
    assert all(row.family in families() for row in FAMILIES)


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_the_table_that_auto_decides_by_has_every_measured_rewrite(inner: str):
    from liger_fx import policy

    shown = module("measured").table("sm90", inner)
    rows = [row for row in policy.table()["sm90"].rows if row.inner == inner]
    assert rows and all(f"`{row.rewrite}`, {row.spelling} |" in shown for row in rows)


def test_docstrings_as_markdown():
    text = module("as_markdown").as_markdown(
        "One ``op``::\n\n    y = x\n\n"
        "Matches      a; ``b``\n             c\nLeaves alone d\n\n"
        "=======  ===\nkind     how\n=======  ===\n``one``  a\n         b\n=======  ===\n\n"
        "first: one. second:\n    two and more. Raises E."
    )
    assert text == (
        "One `op`:\n\n    y = x\n\n"
        "Matches\n:   a; `b` c\n\nLeaves alone\n:   d\n\n"
        "| kind | how |\n| --- | --- |\n| `one` | a b |\n\n"
        "- **`first`**: one.\n- **`second`**: two and more.\n\nRaises E."
    )


def test_every_rewrite_has_a_page():
    hooks = module("hooks")
    for rewrite in DEFAULT:
        page = hooks.rewrite_page(rewrite)
        assert page.startswith(f"# {rewrite.name}\n") and "Numerics\n:   " in page
        assert all(f"`{pattern.__name__}`" in page for pattern in rewrite.patterns)
