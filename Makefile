# The two commands: `make demo` and `make test`. Both install what they need into .venv first.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
# torchao's compiled extensions are for another torch; liger_fx needs none of them.
export TORCHAO_FORCE_SKIP_LOADING_SO_FILES = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-torch lint format docs build install-test clean

demo: .venv/installed
	@$(BIN)/python examples/finetune_docstrings.py

# Whoever is done takes tests from another: as a whole, the longest files would leave a core idle.
test: lint
	$(BIN)/pytest -q -n auto --dist worksteal

# The suite with another torch, and with whatever Python is named, in an environment of its own. Whatever
# depends on the torch is left to pip, or is named too: TORCH="torch==2.11.0 numpy==2.3.5".
test-torch: VENV = build/$(subst ==,-,$(firstword $(TORCH)))-$(notdir $(PYTHON))
test-torch:
	@$(PYTHON) -m venv $(VENV)
	@grep -v -E "^(torch|triton|numpy|setuptools)==" constraints.txt > $(VENV)/others.txt
	@$(VENV)/bin/pip install -qq "pip>=25.1"
	@$(VENV)/bin/pip install -qq -c $(VENV)/others.txt $(TORCH) -e ".[torchtune,huggingface]" --group test
	$(VENV)/bin/pytest -q -n auto --dist worksteal $(TESTS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# sdist and wheel in dist/, byte for byte the same from the same commit. setuptools gives the files of
# an sdist the time at which it is built: the sdist is packed anew (by GNU tar).
build: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
build: $(BIN)/python
	@$(BIN)/pip install -qq "pip>=25.1"
	@$(BIN)/pip install -qq -c constraints.txt --group build
	rm -rf dist *.egg-info
	$(BIN)/python -m build --no-isolation --sdist
	cd dist && tar -xf *.tar.gz && rm *.tar.gz
	cd dist && tar -c --format=ustar --sort=name --mtime=@$$SOURCE_DATE_EPOCH --mode=u=rwX,go=rX \
		--owner=0 --group=0 --numeric-owner * | gzip -9n > ../build.tar.gz
	cd dist && mv ../build.tar.gz $$(ls).tar.gz && rm -r */
	umask 022; $(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist dist/*.tar.gz
	$(BIN)/twine check --strict dist/*

# The wheel in an environment of its own, without the repository and its tools.
install-test: build
	$(PYTHON) -m venv --clear build/venv
	build/venv/bin/pip install -qq $(TORCH) dist/*.whl
	build/venv/bin/python tests/installed.py

# The documentation, in build/docs. A dead link or a page that the menu lacks is an error.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs-installed: .venv/installed
	@$(BIN)/pip install -qq -c constraints.txt --group docs
	@touch $@

.venv/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into .venv; on first use this takes a few minutes."
	@$(BIN)/pip install -qq "pip>=25.1"  # older ones know no dependency groups
	@$(BIN)/pip install -qq -c constraints.txt -e ".[torchtune,huggingface]" --group dev
	@touch $@

$(BIN)/python:
	@$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist *.egg-info
