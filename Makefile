PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
SGLANG_VENV ?= .venv-sglang
# What has torch on a machine without the environment of `make setup`: python3, unless PYTHON is given.
GPU_PYTHON := $(or $(wildcard $(BIN)/python),$(if $(filter file,$(origin PYTHON)),python3,$(PYTHON)))

.PHONY: setup sglang-server sglang-versions cuda gpu-check quickstart test test-fast layouts plan-error \
	kill-demo bench bench-kernels study docs clean

setup: $(VENV)/.ready  ## environment, pinned requirements, the package with its compiled part

$(VENV)/.ready: requirements/cpu.txt requirements/dev.txt requirements/build.txt setup.py pyproject.toml tools/build_cuda.py $(wildcard csrc/* csrc/autograd/* csrc/cuda/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements/build.txt
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -r requirements/dev.txt
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

sglang-server: $(SGLANG_VENV)/.ready  ## a real SGLang server for a machine without a GPU, in an environment of its own

$(SGLANG_VENV)/.ready: requirements/sglang-cpu.txt
	test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/pip install -q --no-deps -r requirements/sglang-cpu.txt
	touch $@

sglang-versions: setup  ## the tests with real servers on other versions of SGLang, a few minutes each
	$(BIN)/python tools/sglang_versions.py

cuda:  ## the CUDA kernels, where nvcc is there; needs no device
	$(BIN)/python tools/build_cuda.py

gpu-check:  ## on a machine with a CUDA device: build, test and measure the CUDA kernels, without network
	$(GPU_PYTHON) tools/gpu_check.py

quickstart: setup  ## tiny model, cold start, reinforcement learning, evaluation, Hugging Face export
	$(BIN)/python tools/quickstart.py

test: setup sglang-server  ## every test that needs no GPU
	$(PYTEST) -n 2 --dist loadfile tests

test-fast: setup sglang-server  ## the first minutes' worth of tests
	$(PYTEST) tests -m "not slow"

layouts: setup  ## one step and three loop steps on every parallel layout, as a table
	PYTHONWARNINGS=ignore $(BIN)/python tools/layouts.py

plan-error: setup  ## the planner's memory against live tensor bytes, tiny and 100M-parameter models, as a table
	PYTHONWARNINGS=ignore $(BIN)/python tools/plan_error.py

kill-demo: setup  ## kill a run inside a save, resume it, compare hashes
	PYTHONWARNINGS=ignore $(BIN)/python tools/kill_test.py --demo

bench: setup  ## every benchmark of the README, one after the other
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_engine.py
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_trainer.py
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_kernels.py
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_policy_loss.py
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_sandbox.py
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_replay.py
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_async.py
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_data.py
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_convert.py --kill

bench-kernels: setup  ## the kernel benchmarks on an idle machine, and docs/benchmarks.md out of them
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_kernels.py --compile
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_policy_loss.py
	PYTHONWARNINGS=ignore $(BIN)/python tools/bench_lm_head.py
	$(BIN)/python tools/benchmark_page.py

study: setup  ## comparison of the methods over seeds: tuned, run, reported in docs/study.md (hours)
	$(BIN)/python tools/study.py --tune
	$(BIN)/python tools/study.py
	$(BIN)/python tools/study.py --sweep

docs: setup  ## regenerate the generated pages under docs/
	$(BIN)/python tools/reference_pages.py

clean:
	rm -rf build *.egg-info spear_megatron/*.so
