# Everything is installed into .venv; README.md has the plain pip commands.
PYTHON ?= python3
VENV ?= .venv
RUNTIME = $(VENV)/.runtime
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-all test-oldest lint docs install clean

install: $(INSTALLED)

# What training needs
$(RUNTIME): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"smallvit needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable .
	touch $@

# And the development extras
$(INSTALLED): $(RUNTIME)
	$(VENV)/bin/python -m pip install --editable '.[dev]'
	touch $@

demo: $(RUNTIME)
	$(VENV)/bin/smallvit train --recipe quick --spt

# What a newcomer runs: everything but the tests marked slow
test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

# Everything, as CI runs it
test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m ""

# The oldest supported torch, torchvision and timm (the lower bounds in pyproject.toml) are installed into a folder that
# comes first on the path. The subset covers the code that calls them beyond tensors and layers. The rest (pages, tables,
# records, the command line, downloads) runs with the newest versions only, to save time.
OLDEST = build/oldest
LOWER_BOUNDS = $(shell sed -nE 's/^ *"(torch|torchvision|timm)>=([0-9.]+)".*/\1==\2.*/p' pyproject.toml)
TORCH_TESTS = $(addprefix tests/,plugins models training export) \
	$(wildcard $(addprefix tests/,config/test_recipes*.py evaluation/test_predictor.py profiling/test_flops.py \
	utils/test_hardware*.py $(addprefix datasets/test_,readers_huggingface.py auto_augment.py augment.py mixup.py)))

$(OLDEST)/.installed: pyproject.toml
	rm -rf $(OLDEST)
	$(VENV)/bin/python -m pip install --quiet --target $(OLDEST) $(LOWER_BOUNDS)
	touch $@

test-oldest: $(INSTALLED) $(OLDEST)/.installed
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(VENV)/bin/python -m pytest -m "" $(TORCH_TESTS)

# mypy sees the packages where they are installed: plugins as smallvit.plugins, and so on
TYPED = build/typed/smallvit
lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -s $(addprefix $(CURDIR)/,$(wildcard smallvit/*) plugins datasets cli) $(TYPED)
	cd $(dir $(TYPED)) && $(abspath $(VENV))/bin/mypy --config-file $(CURDIR)/pyproject.toml --python-executable $(abspath $(VENV))/bin/python

# Build the site into build/site; NO_MKDOCS_2_WARNING silences a notice about a future release of mkdocs
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --site-dir build/site

clean:
	rm -rf $(VENV) build dist *.egg-info
