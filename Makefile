PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread per worker: the workers already fill the cores.
WORKERS ?= 2
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help venv quickstart test test-portable check format benchmark clean

help:
	@echo "make venv        create $(VENV) with the tested versions"
	@echo "make quickstart  train, save, reload and evaluate a small HMoE on real text"
	@echo "make test        the test suite"
	@echo "make test-portable  tests that compare numbers, with the arithmetic of an older processor"
	@echo "make check       lint, formatting, types"
	@echo "make format      apply the lint fixes and the formatting"
	@echo "make benchmark   time and memory beside Mixtral and Llama, into docs/performance.md"
	@echo "make clean       remove caches and build outputs (VENV stays)"

venv: $(STAMP)

# torch comes first and alone, so that a failure of the largest download is seen at once.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot create a virtual environment: on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart.py

test: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# As on another processor: PyTorch, MKL and oneDNN without AVX sum in another order and have no fused multiply-add.
OLD_PROCESSOR := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41
NUMERIC := $(addprefix tests/,conversion distributed/test_parallel.py test_checkpoint_code.py test_experts_hmoe.py test_lora.py \
	test_loss_scale.py test_losses_hmoe.py test_metrics.py test_modeling_hmoe.py test_old_checkpoints.py test_placement.py \
	test_routing.py training/test_packing.py training/test_trainer.py training/test_trl.py)

test-portable: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(OLD_PROCESSOR) $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(NUMERIC)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Those of benchmarks/ that need nothing but this machine; clusters, conversion and distributed have their own pages.
BENCHMARKS := experts growth train_step generate soak

benchmark: $(STAMP)
	@set -e; for name in $(BENCHMARKS); do \
	  echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py --json docs/performance/$$name.json; \
	done
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
