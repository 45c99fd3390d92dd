# The commands that README and CI use. Everything lives in .venv, wheels in dist; `make clean` removes both.
PYTHON ?= python3
VENV ?= .venv
DIST ?= dist
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# Compiled objects stay here: after an edit only what it touched is compiled, and wheels are made of the same objects.
BUILD := $(abspath $(VENV))/build
# The build tools come from the environment: with pip's isolation they would have another path each time, and be
# other versions than constraints.txt says.
INSTALL := $(PIP) install --no-deps --no-build-isolation --config-settings=build-dir=$(BUILD)
# A compiler that reports an error stops `make`; only where there is none the package goes without kernels.
export MILLION_EXPERTS_NEED_KERNELS := $(if $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++),1)

.PHONY: help train bench bench-check bench-gpu fuzz test test-versions test-interop interop-rows test-slow test-gpu \
  sanitize lint format wheel clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt scikit-build-core nanobind ninja $(if $(shell command -v cmake),,cmake)
	touch $@

$(VENV)/.installed: $(VENV)/.tools CMakeLists.txt $(wildcard csrc/*)
	$(INSTALL) -e .
	$(PIP) install -c constraints.txt "million-experts[all]"
	touch $@

# Other people's programs lie in an environment of their own that sees the first: transformers takes other ways where
# it finds them, and all else is tested without.
INTEROP := $(VENV)/interop
$(INTEROP)/.installed: $(VENV)/.installed
	$(BIN)/python -m venv $(INTEROP)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(INTEROP)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	$(INTEROP)/bin/python -m pip --quiet --disable-pip-version-check install -c constraints.txt "million-experts[interop]"
	touch $@

train: $(VENV)/.installed ## Train the demo: a language model with 262,144 experts, a quarter of an hour with the installation
	$(BIN)/million-experts train --preset demo --resume

bench: $(VENV)/.installed ## Measure the layer beside others: time and peak memory, with figures
	$(BIN)/million-experts bench --output docs/results/bench

bench-check: $(VENV)/.installed ## Fail when a ratio got more than 25 % worse than the committed results
	$(BIN)/million-experts bench --check docs/results/bench

bench-gpu: $(VENV)/.installed ## Check and time the Triton kernels on a GPU: eight minutes, rows in runs/gpu
	@$(BIN)/python -m million_experts.benchmarks.gpu --minutes 8 --output runs/gpu

# Two processes, each with some files. Threads that wait for work must not take the other's core. Triton's interpreter
# is for a whole process or not at all.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest
INTEROP_PYTEST := OMP_WAIT_POLICY=passive $(INTEROP)/bin/python -m pytest -n 2 --dist loadfile
INTERPRETED := tests/ops/triton

test: lint ## Lint, check types, run the tests (some minutes)
	$(PYTEST) -n 2 --dist loadfile --ignore $(INTERPRETED) --ignore tests/interop
	TRITON_INTERPRET=1 $(PYTEST) -n 2 --dist loadfile $(INTERPRETED)
	$(MAKE) --no-print-directory test-versions test-interop

test-interop: $(INTEROP)/.installed ## Run layers and models inside PEFT, TRL, Accelerate, torchao, bitsandbytes, lm-eval
	$(INTEROP_PYTEST) --rows check tests/interop

interop-rows: $(INTEROP)/.installed ## Run the same, and write what works with what into the docs
	$(INTEROP_PYTEST) --rows write tests/interop --ignore tests/interop/test_page.py

# Both ends of the range of transformers, beside the version that the other tests run with. Their packages lie before
# those of the environment, which has the rest.
test-versions: test-versions-oldest test-versions-newest ## Run the models' tests with the oldest and the newest transformers

test-versions-%: $(VENV)/versions/%
	TEST_TRANSFORMERS=$* PYTHONPATH=$(abspath $<) $(PYTEST) -n 2 --dist loadfile tests/models tests/lm/test_trainer.py

$(VENV)/versions/%: tests/versions/%.txt $(VENV)/.installed
	rm -rf $@
	$(PIP) install --no-deps --target $@ -r $<
	touch $@

.PRECIOUS: $(VENV)/versions/%

test-slow: $(VENV)/.installed ## Run what takes longer: the README's training commands, many kills of a run, every launch for four GPUs
	$(BIN)/python -m pytest -m slow --ignore $(INTERPRETED) --ignore tests/interop
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m slow $(INTERPRETED)

test-gpu: $(VENV)/.installed ## Run the Triton kernels on a GPU against the reference (elsewhere skipped, with the reason)
	$(BIN)/python -m pytest -rs tests/gpu

MINUTES ?= 60
fuzz: $(VENV)/.installed ## Feed every boundary what nobody should send, for MINUTES (60), and write the table of the docs
	OMP_WAIT_POLICY=passive PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(MINUTES) --output docs/results/fuzz

sanitize: $(VENV)/.installed ## Run the kernels under the address and undefined-behaviour sanitizers (needs gcc)
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir $(BUILD)-sanitize/wheel \
	  --config-settings=build-dir=$(BUILD)-sanitize --config-settings=install.strip=false \
	  --config-settings=cmake.define.ME_SANITIZE=address,undefined .
	$(BIN)/python tests/sanitize/run.py $(BUILD)-sanitize/_kernels.*.so

lint: $(VENV)/.installed ## Check style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed ## Build a wheel for other Linux machines into dist
	rm -rf $(BUILD)/wheel
	$(PIP) wheel --no-deps --no-build-isolation --config-settings=build-dir=$(BUILD) --wheel-dir $(BUILD)/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --wheel-dir $(DIST) $(BUILD)/wheel/*.whl

clean: ## Remove the environment, caches and wheels
	rm -rf $(VENV) $(DIST) .mypy_cache .pytest_cache .ruff_cache .hypothesis
