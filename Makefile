# On a machine with Python 3.11 or later, g++ and make: `make demo` and `make test` set up .venv and do the rest.
PYTHON ?= python3
VENV ?= .venv
TEST_ARGS ?=
BENCH_ARGS ?=
# Rows of kernels.def, a regular expression, and what to run of tests/ with them.
EMULATED ?= .
EMULATED_TESTS ?= test_forward.py test_backward.py test_decode.py test_sequences.py
# Where an NVIDIA driver answers, JAX comes with CUDA. `make demo ACCELERATOR=` to have none.
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda13)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q
EXTRA = $(shell $(BIN)/python -c "import sys, tomllib; \
  extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
  print(*(f\"'{package}'\" for extra in sys.argv[1:] for package in extras[extra]))" $(1))
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc cmake -type f 2>/dev/null)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: help demo test cpp-test emulator-test lint format bench-cpu bench-memory record-cpu cuda-ci clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

demo: $(VENV)/demo ## train a small language model with flashjax, then generate from a KV cache; a curve in out/
	$(BIN)/python examples/train_lm.py --out out

test: $(VENV)/test cpp-test ## all tests, Python and C++
	$(BIN)/python -m pytest -q -n 2 $(TEST_ARGS)

cpp-test: $(VENV)/test ## the C++ unit tests
	@echo "building the C++ tests"
	@{ $(BIN)/cmake -S tests/cpp -B build/cpp -G "Unix Makefiles" && $(BIN)/cmake --build build/cpp; } \
	  >build/cpp.log 2>&1 || { cat build/cpp.log; exit 1; }
	build/cpp/flashjax_cpp_tests

emulator-test: $(VENV)/test ## the Hopper kernels, on a model of a GPU that runs on the CPU: docs/emulator.md
	$(PIP) nanobind
	@echo "building the kernels for the emulator: about two minutes"
	@{ $(BIN)/cmake -S tests/emulator -B build/emulator -G "Unix Makefiles" -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DFLASHJAX_EMULATED='$(EMULATED)' && $(BIN)/cmake --build build/emulator; } >build/emulator.log 2>&1 || { tail -50 build/emulator.log; exit 1; }
	build/emulator/machine_test
	build/emulator/blocks_test
	cd tests && FLASHJAX_EMULATOR=$(CURDIR)/build/emulator OPENBLAS_NUM_THREADS=1 $(abspath $(BIN)/python) -m pytest -q -n 2 \
	  -c ../pyproject.toml --rootdir .. $(EMULATED_TESTS)

lint: $(VENV)/lint ## formatting, lint, types and what README says
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	find csrc tests -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m docs.tables --check

format: $(VENV)/lint ## rewrite what `make lint` would complain about
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i
	$(BIN)/python -m docs.tables

bench-cpu: $(VENV)/bench-cpu $(VENV)/demo ## the CPU benchmark, to out/bench-cpu.json
	$(BIN)/python -m bench.run --suite cpu --out out/bench-cpu.json $(BENCH_ARGS)
	$(BIN)/python -m bench.report out/bench-cpu.json --plot out/bench-cpu.png

bench-memory: $(VENV)/core ## peak memory against sequence length, to out/memory-cpu.json
	$(BIN)/python -m bench.memory --out out/memory-cpu.json

record-cpu: $(VENV)/bench-cpu $(VENV)/demo ## measure again what README says of the CPU (on a quiet machine), and bring README up to date
	$(BIN)/python -m bench.run --suite cpu --out bench/results/cpu/attention.json $(BENCH_ARGS)
	$(BIN)/python -m bench.report bench/results/cpu/attention.json --plot bench/results/cpu/attention.png >/dev/null
	$(BIN)/python -m bench.memory --out bench/results/cpu/memory.json
	$(BIN)/python -m docs.tables

cuda-ci: $(BIN)/python ## compile the CUDA kernels tagged ci, and check them for spills; needs nvcc, no GPU
	FLASHJAX_CUDA=1 FLASHJAX_KERNELS=ci $(BIN)/python -m pip wheel -q --no-deps -w build/cuda-ci/wheel -Cbuild-dir=build/cuda-ci .
	$(BIN)/python csrc/cuda/check_ptxas.py build/cuda-ci

clean: ## remove what was built; $(VENV) too
	rm -rf build dist out $(VENV)

# Stamps: one for the environment, one for the build, one for each set of extra packages.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/core: $(BIN)/python $(SOURCES)
	@echo "building flashjax and installing jax: about a minute"
	$(PIP) -e '.$(if $(ACCELERATOR),[$(ACCELERATOR)])'
	@touch $@

$(VENV)/demo: $(VENV)/core
	$(PIP) $(call EXTRA,demo)
	@touch $@

$(VENV)/bench-cpu: $(VENV)/core
	$(PIP) $(call EXTRA,bench-cpu) || echo "no torch for this Python: it will be reported as absent"
	@touch $@

$(VENV)/test: $(VENV)/core
	$(PIP) cmake $(call EXTRA,test)
	@mkdir -p build
	@touch $@

# Types need jax, not the build.
$(VENV)/lint: $(BIN)/python pyproject.toml
	$(PIP) 'jax>=0.10' $(call EXTRA,lint)
	@touch $@
