# Everything lives in .venv; the plain pip commands stand in README.md.
PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed

.PHONY: demo test test-oldest lint docs install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"smallvit needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/smallvit train --arch vit --spt --lsa

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

# The oldest supported timm, put before the installed one, and the tests that meet timm
MEETS_TIMM = tests/plugins $(addprefix tests/test_,$(addsuffix .py,models published registry optim checkpoint engine recipes convnets initial trained variants binaryvit binaryvit_timm)) \
	$(addprefix tests/datasets/test_,$(addsuffix .py,timm_source policies augment))

test-oldest: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target build/timm-oldest timm==1.0.26
	PYTHONPATH=build/timm-oldest $(VENV)/bin/python -m pytest $(MEETS_TIMM)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The site, into build/site; NO_MKDOCS_2_WARNING spares a notice about a future release of mkdocs
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --site-dir build/site

clean:
	rm -rf $(VENV) build dist *.egg-info
