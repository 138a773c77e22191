"""The part of the metadata that pyproject.toml cannot say: the README as PyPI can show it."""

import re
from pathlib import Path

from setuptools import setup

# PyPI shows no file of the repository: a relative picture goes, of a relative link its text stays.
PICTURES = r"!\[[^]]*\]\((?!https?:)[^)]*\)|<img [^>]*src=\"(?!https?:)[^>]*>"
LINKS = r"\[([^][]*)\]\((?!https?:|mailto:|#)[^)]*\)"

readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(LINKS, r"\1", re.sub(PICTURES, "", readme)),
    long_description_content_type="text/markdown",
)
