# make demo | test: the two commands. Everything they need is made on the way (scripts/setup.sh).
# Variables: JOBS, ARGS (passed on), ICECACHE_CUDA, ICECACHE_FAISS (AUTO, ON, OFF), ICECACHE_WERROR,
# ICECACHE_UNITY (CMakeLists.txt), ICECACHE_PYTHON, ICECACHE_VLLM, ICECACHE_WHEEL (scripts/setup_vllm.sh).
JOBS ?= $(shell nproc)
ICECACHE_CUDA ?= AUTO
ICECACHE_FAISS ?= AUTO
ICECACHE_WERROR ?= OFF
ICECACHE_UNITY ?= OFF
ARGS ?=
, := ,

# Read when a recipe runs: setup has written it by then.
PYTHON = $(shell cat build/python)
# The environment's tools (cmake, ninja, ruff, ...) come first.
TOOLS = PATH="$(dir $(PYTHON)):$$PATH"
IN_TREE = $(TOOLS) PYTHONPATH="$(CURDIR)/python$${PYTHONPATH:+:$$PYTHONPATH}"

# $(call cmake_build,FOLDER,OPTIONS): configures (a second when nothing changed) and builds.
define cmake_build
	@$(TOOLS) cmake -S . -B $(1) -G Ninja --log-level=NOTICE $(2)
	@$(TOOLS) cmake --build $(1) -j $(JOBS)
endef
RELEASE = -DICECACHE_INPLACE=ON -DICECACHE_CUDA=$(ICECACHE_CUDA) -DICECACHE_FAISS=$(ICECACHE_FAISS) \
  -DICECACHE_WERROR=$(ICECACHE_WERROR) -DICECACHE_UNITY=$(ICECACHE_UNITY) -DPython_EXECUTABLE=$(PYTHON)
# Warnings of the optimiser are not reliable in instrumented code. OpenMP, which FAISS brings, is not
# instrumented, and looks like races to the thread sanitizer.
CHECKED = -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-Og -g1" -DICECACHE_BINDINGS=OFF \
  -DICECACHE_TESTS=ON -DICECACHE_CUDA=OFF
# Sanitizers make every step many times as slow: there the random trace is shorter, and fewer faults are tried.
SAMPLED = ICECACHE_TRACE_STEPS=$${ICECACHE_TRACE_STEPS:-2500} ICECACHE_FAULT_CASES=$${ICECACHE_FAULT_CASES:-30}
# Threads that wait give their cores away.
TWO_AT_ONCE = OMP_WAIT_POLICY=passive
# The thread sanitizer of some compilers cannot place its shadow memory under address randomisation.
FIXED_ADDRESSES = $(shell setarch -R true 2>/dev/null && echo setarch -R)

.PHONY: help demo test build build-test install lint tidy format test-cpp test-python test-vllm \
  test-architectures sanitize \
  sanitize-address sanitize-thread bench build-bench bench-quality docs coverage setup setup-test \
  setup-tools setup-bench setup-vllm setup-vllm-environment clean

help:
	@echo "make demo            build, fetch a small real model, show IceCache on a long document"
	@echo "make test            build and run all tests (test-cpp, test-python)"
	@echo "make test-vllm       the plugin in a real vLLM, which goes into .venv-vllm (10 minutes)"
	@echo "make test-architectures   all models of docs/vllm-models.md in it, and heads that draft (9 minutes)"
	@echo "make build           build into python/icecache, for PYTHONPATH=python"
	@echo "make install         install the wheel into the environment"
	@echo "make lint | format   check | mend the form of the sources; lint checks types and layers too"
	@echo "make tidy            check csrc with clang-tidy (15 seconds)"
	@echo "make docs            write the Python API, from its docstrings, into build/docs"
	@echo "make coverage        run the Python tests, and say which lines of the package they do not reach"
	@echo "make sanitize        C++ tests under the address, undefined and thread sanitizers"
	@echo "make bench           measure kernels, steps, builds, searches, a whole model; draw the plots (1 hour)"
	@echo "make bench-quality   measure what a token budget costs in quality (10 minutes)"

setup:
	@scripts/setup.sh run

setup-test:
	@scripts/setup.sh test

setup-tools:
	@scripts/setup.sh tools

setup-bench:
	@scripts/setup.sh bench

setup-vllm:
	@scripts/setup_vllm.sh

setup-vllm-environment:
	@scripts/setup_vllm.sh environment

build: setup
	$(call cmake_build,build/release,$(RELEASE))

install: setup
	$(TOOLS) CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PYTHON) -m pip install --no-build-isolation --no-deps .

demo: build
	$(IN_TREE) $(PYTHON) -m icecache demo $(ARGS)

test: test-cpp test-python

build-test: setup-test
	$(call cmake_build,build/release,$(RELEASE) -DICECACHE_TESTS=ON)

test-cpp: build-test
	$(TOOLS) ctest --test-dir build/release -j $(JOBS) --output-on-failure --no-tests=error

test-python: build-test
	$(IN_TREE) $(TWO_AT_ONCE) $(PYTHON) -m pytest -n 2 --dist worksteal $(ARGS)

test-vllm: setup-vllm
	$(TWO_AT_ONCE) .venv-vllm/bin/python -m pytest -c tests/vllm/pytest.ini tests/vllm $(ARGS)

test-architectures: setup-vllm
	$(TWO_AT_ONCE) .venv-vllm/bin/python -m pytest -c tests/vllm/pytest.ini -m "" \
	  tests/vllm/test_architectures.py \
	  tests/vllm/test_drafts.py::test_heads_of_other_kinds_and_beside_sliding_windows $(ARGS)

lint: setup-test
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | $(TOOLS) xargs clang-format --dry-run -Werror
	git ls-files '*.sh' .ci/run | $(TOOLS) xargs shellcheck
	$(TOOLS) ruff check
	$(TOOLS) ruff format --check
	$(TOOLS) mypy
	$(IN_TREE) $(PYTHON) -m pytest -q --noconftest tests/python/test_layering.py \
	  tests/python/test_function_sizes.py

# Sources of a folder are one unit, as in unity builds: each header is read once. Left out: bindings,
# whose headers are torch's, FAISS's, what is for one instruction set, and stand-ins for parts.
tidy: setup-tools
	@mkdir -p build/tidy
	@git ls-files 'csrc/*.cpp' | grep -vE '/(bindings|device)/|faiss_search|kernels_avx|/no_' | \
	  sed 's/.*/#include "&"/' >build/tidy/host.cpp
	@git ls-files 'csrc/device/*.cpp' | grep -v /no_ | sed 's/.*/#include "&"/' >build/tidy/device.cpp
	$(TOOLS) clang-tidy --quiet build/tidy/host.cpp build/tidy/device.cpp -- \
	  -std=c++20 -I. -Icsrc -Iinclude

format: setup-test
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | $(TOOLS) xargs clang-format -i
	$(TOOLS) ruff check --fix
	$(TOOLS) ruff format

sanitize: sanitize-address sanitize-thread

sanitize-address: setup-test
	$(call cmake_build,build/address,$(CHECKED) -DICECACHE_SANITIZE=address$(,)undefined)
	$(TOOLS) $(SAMPLED) ctest --test-dir build/address -j $(JOBS) --output-on-failure --no-tests=error

sanitize-thread: setup-test
	$(call cmake_build,build/thread,$(CHECKED) -DICECACHE_SANITIZE=thread -DICECACHE_FAISS=OFF)
	$(TOOLS) $(SAMPLED) $(FIXED_ADDRESSES) ctest --test-dir build/thread -j $(JOBS) \
	  --output-on-failure --no-tests=error

build-bench: setup-bench
	$(call cmake_build,build/release,$(RELEASE) -DICECACHE_BENCHMARKS=ON)

bench: build-bench
	set -e; for name in kernels step build fork search generate; do \
	  $(IN_TREE) $(PYTHON) benchmarks/python/bench_$$name.py \
	    --json benchmarks/results/$$name.json; done
	$(IN_TREE) $(PYTHON) benchmarks/python/plots.py

bench-quality: build
	$(IN_TREE) $(PYTHON) benchmarks/python/bench_quality.py \
	  --json benchmarks/results/quality.json $(ARGS)

# What `icecache` exports, and the engine's contract in plain torch. The plugin, which needs vLLM, has docs/vllm.md.
docs: setup-tools build
	$(IN_TREE) $(PYTHON) -m pdoc --output-directory build/docs icecache icecache.reference

coverage: setup-tools build-test
	$(IN_TREE) $(TWO_AT_ONCE) $(PYTHON) -m pytest -n 2 --dist worksteal --cov=icecache \
	  --cov-report=term-missing:skip-covered $(ARGS)

clean:
	rm -rf build python/icecache/*.so
