# Every target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

.PHONY: demo test lint bench docs clean

demo: $(VENV)/.installed
	$(RUN)/embrm demo --out runs/demo

test: lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadscope

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(VENV)/.installed
	$(RUN)/embrm bench cache
	$(RUN)/embrm bench sweep

docs: $(VENV)/.installed
	$(RUN)/python tests/test_docs.py

clean:
	rm -rf $(VENV) runs build *.egg-info

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
