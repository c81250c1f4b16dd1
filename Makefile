# Every target sets up what it needs: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin
# vLLM pins versions of its own, so its tests have an environment of their own.
VLLM_VENV ?= .venv-vllm

# Tests run in two processes of one thread each. A module's tests stay in one process, so that
# its fixtures are made once.
PYTEST = OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadscope

.PHONY: demo test test-all test-vllm lint bench docs clean

demo: $(VENV)/.installed-demo
	$(RUN)/embrm demo --out runs/demo

test: lint
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/with_vllm

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/vulture

bench: $(VENV)/.installed
	$(RUN)/embrm bench cache
	$(RUN)/embrm bench sweep

docs: $(VENV)/.installed
	PYTHONPATH=tests/helpers $(RUN)/python tests/test_docs.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs build dist *.egg-info

# What the demo needs; the full set for development includes it.
$(VENV)/.installed-demo: pyproject.toml constraints.txt
	@echo "Installing torch, transformers and what they need into $(VENV), which takes some minutes."
	@ls -d $(VENV)/lib/python*/site-packages/torch >/dev/null 2>&1 || echo "On Linux, torch's default \
	build brings several GB of CUDA libraries; README.md says how to install the CPU build."
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[extract]'
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing embrm with everything its tests need into $(VENV), which takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed-demo

# uv and not pip: only uv can leave out packages whose build does not match the CPU build of torch.
$(VLLM_VENV)/.installed: pyproject.toml tests/with_vllm/requirements.txt tests/with_vllm/overrides.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet uv
	$(VLLM_VENV)/bin/uv pip install --quiet --python $(VLLM_VENV)/bin/python \
		$(or $(addprefix --find-links ,$(PIP_FIND_LINKS)),--torch-backend cpu) \
		--override tests/with_vllm/overrides.txt --requirements tests/with_vllm/requirements.txt
	touch $@
