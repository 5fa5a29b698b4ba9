# `make demo` and `make test` do all their own set-up on a machine with python3 (3.11 to 3.13), git and make.
VENV    ?= .venv
WORKDIR ?= workdirs/shapes
# The first interpreter that is new enough; override with `make PYTHON=/path/to/python demo`.
PYTHON  ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
             $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
PINS     = requirements/py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null).txt
BIN      = $(VENV)/bin

.PHONY: setup libtpu demo test test-slow lint check-hopper plan wheel clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(wildcard requirements/*.txt)
	@test -n "$(PYTHON)" || { echo "ar_unified needs Python 3.11, 3.12 or 3.13; none was found. Name one: make PYTHON=... $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(test -f $(PINS) && echo "-c $(PINS)") -e ".[dev]"
	@touch $@

demo: setup  ## train both tokenizers and the transformer on the embedded shapes data, sample, evaluate, write a report
	$(BIN)/ar-unified run --config experiments/shapes.py --workdir $(WORKDIR)
	@echo "Open $(WORKDIR)/report.html"

# TPU's compiler, for the tests that compile for TPUs on this machine's CPU. It lies beside the packages and not among
# them: JAX would look for a TPU in every process that finds it there.
libtpu: setup $(VENV)/libtpu

$(VENV)/libtpu: $(wildcard requirements/*.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
	    $$(test -f $(PINS) && echo "-c $(PINS)") libtpu || { mkdir -p $@; echo "no libtpu here: what compiles for TPUs is skipped"; }
	@touch $@

test: setup libtpu
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: setup libtpu  ## what takes long: kills at random moments, races in kernels, TPUs by the dozen
	$(BIN)/python -m pytest -q -n 2 -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff . >/dev/null || { echo "run: ruff format ."; exit 1; }
	$(BIN)/mypy
	$(BIN)/shellcheck $$(git ls-files '*.sh') .ci/run
	@if test -x $(BIN)/hadolint; then $(BIN)/hadolint Dockerfile; else echo "no hadolint for this machine: the Dockerfile is not checked"; fi

HOPPER   = .venv-hopper
check-hopper: $(HOPPER)/.installed  ## compile the GPU kernels for an H200 with NVIDIA's compiler; needs no GPU, 1.4 GB
	PYTHONPATH=.:tokenizers $(HOPPER)/bin/python tests/kernels/check_hopper.py

$(HOPPER)/.installed: $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(HOPPER)
	$(HOPPER)/bin/python -m pip install --quiet --disable-pip-version-check $$(test -f $(PINS) && echo "-c $(PINS)") jax absl-py
	jax=$$($(HOPPER)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(HOPPER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    jax-cuda13-pjrt==$$jax jax-cuda13-plugin==$$jax nvidia-cuda-nvcc nvidia-nvvm
	@touch $@

plan: setup libtpu  ## compile published shapes for TPU slices and write the table in BUILD.md; an hour on two cores
	PYTHONPATH=.:tokenizers $(BIN)/python experiments/benchmarks/plan_table.py

wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(HOPPER) .cache dist workdirs
