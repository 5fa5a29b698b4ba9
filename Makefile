# `make demo` and `make test` do all their own set-up on a machine with python3 (3.11 to 3.13), git and make.
VENV    ?= .venv
WORKDIR ?= workdirs/shapes
# The first interpreter that is new enough; override with `make PYTHON=/path/to/python demo`.
PYTHON  ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
             $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
PINS     = requirements/py$(shell $(PYTHON) -c 'import sys; print("%d%d" % sys.version_info[:2])' 2>/dev/null).txt
BIN      = $(VENV)/bin

.PHONY: setup libtpu demo test test-slow test-exact test-interop test-py312 test-all mutate lint docs check-hopper \
        check-gpu plan wheel clean environments

# pip would compile every module of every package, which takes 20 s; Python compiles what it imports (docs/benchmarks.md).
INSTALL  = -m pip install --quiet --disable-pip-version-check --no-compile

setup: $(VENV)/.tools

# What users have; the demo needs no more.
$(VENV)/.installed: pyproject.toml $(wildcard requirements/*.txt)
	@test -n "$(PYTHON)" || { echo "ar_unified needs Python 3.11, 3.12 or 3.13; none was found. Name one: make PYTHON=... $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) $$(test -f $(PINS) && echo "-c $(PINS)") -e .
	@touch $@

# And what tests and lint need.
$(VENV)/.tools: $(VENV)/.installed
	$(BIN)/python $(INSTALL) $$(test -f $(PINS) && echo "-c $(PINS)") -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed  ## train both tokenizers and the transformer on the embedded shapes data, sample, evaluate, write a report
	$(BIN)/ar-unified demo --workdir $(WORKDIR)

# TPU's compiler, for the tests that compile for TPUs on this machine's CPU. It lies beside the packages and not among
# them: JAX would look for a TPU in every process that finds it there.
libtpu: $(VENV)/libtpu

$(VENV)/libtpu: $(VENV)/.tools
	@$(BIN)/python $(INSTALL) --no-deps --upgrade --target $@ \
	    $$(test -f $(PINS) && echo "-c $(PINS)") libtpu || { mkdir -p $@; echo "no libtpu here: what compiles for TPUs is skipped"; }
	@touch $@

# ---- tests. RESULTS: where each target leaves its outcomes, for tests/summary.py.
# worksteal: a worker takes a run of files and not every other test, and so finds what a file has compiled and trained.
PYTEST   = -m pytest -q -n 2 --dist worksteal
# A file's tests in one process, where what they share takes longer to make than the tests: compiled steps, torch's models.
# Files in tests/conftest.py's order, the longest first, and not, as pytest-xdist has it, those of few tests last.
BY_FILE  = -m pytest -q -n 2 --dist loadscope --no-loadscope-reorder
RESULTS ?= .cache/tests
# Else each worker rewrites every test's assertions anew, which takes it 7 s, and each process compiles this package.
unexport PYTHONDONTWRITEBYTECODE
HERE     = not interop and not newest_jax
INTEROP  = .venv-interop
PY312    = .venv-py312
DOCS     = .venv-docs

# ONCE=1: what test-exact runs as well is left to it, as CI has it.
test: setup libtpu
	$(BIN)/python $(PYTEST) --junitxml=$(RESULTS)/quick.xml -m "not slow and $(HERE)$(if $(ONCE), and not exact)"

test-slow: setup libtpu  ## what takes long: races in kernels, TPUs by the dozen; kills and meshes are test-exact's
	$(BIN)/python $(BY_FILE) --junitxml=$(RESULTS)/slow.xml -m "slow and not exact and not exhaustive and $(HERE)"

test-exact: setup libtpu  ## the same bits after a kill, the same numbers on any mesh, as users' programs are optimised
	AR_UNIFIED_TEST_OPTIMIZED=1 $(BIN)/python $(BY_FILE) --junitxml=$(RESULTS)/exact.xml -m "exact and not exhaustive and $(HERE)"

test-interop: $(INTEROP)/.installed  ## beside torch, transformers, lm-evaluation-harness and lmms-eval
	$(INTEROP)/bin/python $(BY_FILE) --junitxml=$(RESULTS)/interop.xml -m interop

# The GPU kernels emulated, and of every room what meets JAX most.
COVERING = tests/language/test_automaton.py tests/test_checkpoint.py tests/data/test_loader.py tests/training/test_loop.py \
           tests/training/test_step.py tests/sampling/test_decoding.py tests/sampling/test_job.py \
           tests/experiment/test_config.py
test-py312: $(PY312)/.installed  ## Python 3.12 with the newest JAX
	$(PY312)/bin/python $(PYTEST) --junitxml=$(RESULTS)/py312-kernels.xml -m newest_jax tests/kernels
	$(PY312)/bin/python $(PYTEST) --junitxml=$(RESULTS)/py312.xml -m "not slow and not interop" $(COVERING)

ALL = .cache/test-all
test-all: environments  ## every test there is, at both levels of optimisation and on both Pythons; some hours
	rm -rf $(ALL)
	-$(BIN)/python $(PYTEST) --junitxml=$(ALL)/all.xml -m "$(HERE)"
	-AR_UNIFIED_TEST_OPTIMIZED=1 $(BIN)/python $(PYTEST) --junitxml=$(ALL)/exact.xml -m "(exact or exact_later) and $(HERE)"
	-$(INTEROP)/bin/python $(PYTEST) --junitxml=$(ALL)/interop.xml -m interop
	-$(PY312)/bin/python $(PYTEST) --junitxml=$(ALL)/py312.xml -m "not interop"
	$(BIN)/python tests/summary.py --record tests/last_full_run.json $(ALL)/all.xml \
	    $(ALL)/exact.xml $(ALL)/interop.xml $(ALL)/py312.xml

mutate: setup  ## makes mistakes one by one and asks the quick tests; writes docs/mutations.md; five minutes to an hour
	$(BIN)/python tests/mutate.py $(MISTAKES)

environments: setup libtpu $(INTEROP)/.installed $(PY312)/.installed $(DOCS)/.installed

# torch is not for the environment that users have. Two come without what they ask for: lmms_eval's requirements are 5 GB, of
# which its base class needs none, and Apache Beam wants older releases than the pins, and works with these. The environment
# stands on .venv's packages: 60 are installed and not 190.
$(INTEROP)/.installed: $(VENV)/.tools
	$(PYTHON) -m venv --clear $(INTEROP)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	    > $$($(INTEROP)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_users_environment.pth
	$(INTEROP)/bin/python $(INSTALL) $$(test -f $(PINS) && echo "-c $(PINS)") \
	    -r requirements/interop.txt
	$(INTEROP)/bin/python $(INSTALL) --no-deps lmms_eval==0.7.3 \
	    apache-beam==2.77.0
	@touch $@

PYTHON312 ?= $(shell for p in python3.12 python3 $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12*/bin/python; do \
             $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo $$p && break; done)
$(PY312)/.installed: pyproject.toml $(wildcard requirements/*.txt)
	@test -n "$(PYTHON312)" || { echo "Python 3.12 was not found. Name one: make PYTHON312=... $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON312) -m venv $(PY312)
	$(PY312)/bin/python $(INSTALL) -c requirements/py312.txt -e ".[dev]"
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --diff . >/dev/null || { echo "run: ruff format ."; exit 1; }
	$(BIN)/mypy
	$(BIN)/shellcheck $$(git ls-files '*.sh') .ci/run
	@if test -x $(BIN)/hadolint; then $(BIN)/hadolint Dockerfile; else echo "no hadolint for this machine: the Dockerfile is not checked"; fi

# Docstrings are read and not imported, so this environment has no JAX.
docs: $(DOCS)/.installed  ## the pages and the docstrings as a site, .cache/site/index.html; a warning ends it
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build

$(DOCS)/.installed: requirements/docs.txt
	@test -n "$(PYTHON)" || { echo "make docs needs Python 3.11, 3.12 or 3.13. Name one: make PYTHON=... docs"; exit 1; }
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(INSTALL) -r requirements/docs.txt
	@touch $@

HOPPER   = .venv-hopper
check-hopper: $(HOPPER)/.installed  ## compile the GPU kernels for an H200 with NVIDIA's compiler; needs no GPU, 1.4 GB
	PYTHONPATH=.:tokenizers $(HOPPER)/bin/python tests/kernels/check_hopper.py

$(HOPPER)/.installed: $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(HOPPER)
	$(HOPPER)/bin/python $(INSTALL) $$(test -f $(PINS) && echo "-c $(PINS)") jax absl-py
	jax=$$($(HOPPER)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(HOPPER)/bin/python $(INSTALL) --no-deps \
	    jax-cuda13-pjrt==$$jax jax-cuda13-plugin==$$jax nvidia-cuda-nvcc nvidia-nvvm
	@touch $@

# On a GPU machine JAX is often there already, and nothing can be fetched: then with that Python.
GPU_PYTHON ?= $(shell $(PYTHON) -c 'import jax, flax, optax' 2>/dev/null && echo $(PYTHON) || echo $(BIN)/python)
check-gpu:  ## all that is worth knowing about an H100 or H200, in eight minutes; without one, tiny shapes on the CPU
	@command -v $(GPU_PYTHON) >/dev/null || $(MAKE) setup
	PYTHONPATH=.:tokenizers $(GPU_PYTHON) -m experiments.benchmarks.gpu

plan: setup libtpu  ## compile published shapes for TPU slices and write the table in docs/planning.md; an hour on two cores
	PYTHONPATH=.:tokenizers $(BIN)/python experiments/benchmarks/plan_table.py

wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(HOPPER) $(INTEROP) $(PY312) $(DOCS) .cache dist workdirs
