# The two commands: `make demo` and `make test`. Both install what they need into .venv first.

PYTHON ?= python3
BIN := .venv/bin
# torchao's compiled extensions are for another torch; liger_fx needs none of them.
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES = 1

.PHONY: demo test lint format docs clean

demo: .venv/installed
	@$(BIN)/python examples/finetune_docstrings.py

# Whoever is done takes tests from another: as a whole, the longest files would leave a core idle.
test: lint
	$(BIN)/pytest -q -n auto --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation, in build/docs. A dead link or a page that the menu lacks is an error.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs-installed: .venv/installed
	@$(BIN)/pip install --disable-pip-version-check -q "pip>=25.1"
	@$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt --group docs
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	@echo "Installing into .venv; on first use this takes a few minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
