# make help lists the targets. PYTHON is the interpreter that makes $(VENV). To use an environment that has torch already, as it is and
# without any network: make test VENV= PYTHON=/path/to/its/python

PYTHON ?= python3
VENV ?= .venv
TEXT ?=

ifeq ($(VENV),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
endif
LIBRARY := kernels/minkernels/_ops.so
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h') kernels/minkernels/_build.py
# A process a core, each with one thread: tests are small. Those about threads ask for their own.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
INSTALL := $(PY) -m pip install --quiet
STAMP := build/installed-$(subst /,_,$(PY))
unexport PYTHONDONTWRITEBYTECODE  # packages arrive uncompiled: every process would compile them again, torch alone for two seconds

.PHONY: help run test aot portable bench lint build clean
help:
	@echo "make run     the showcase: each model trained for a little, a speed table, all on one page (TEXT=FILE: on your text)"
	@echo "make test    every test"
	@echo "make aot     the GPU kernels compiled for every target and head dim, not only those of make test: no spills, no TF32"
	@echo "make portable  the C++ library compiled by clang for Linux on x86-64 and aarch64, and for macOS"
	@echo "make bench   the benchmarks, and their report in bench/results/local"
	@echo "make lint    ruff, and clang-format for csrc"
	@echo "make build   the environment and the C++ library alone"
	@echo "make clean   remove what was built ($(VENV) too)"
	@echo "PYTHON=python3.12 makes $(if $(VENV),$(VENV),.venv) with another interpreter;"
	@echo "VENV= PYTHON=/path/to/python uses an environment that has torch already, and installs nothing into it but this project"

run: build
	$(PY) -m minmodels showcase --out runs/showcase $(if $(TEXT),--text "$(TEXT)")

test: build
	$(PYTEST) tests
	TRITON_INTERPRET=1 $(PYTEST) tests -m interpret

aot: build
	AOT=all $(PYTEST) tests/test_aot.py

portable: build
	$(INSTALL) "ziglang>=0.17"
	$(PYTEST) tests/test_portable.py

bench: build
	$(PY) -m pytest bench --benchmark-json=bench/results/local.json; status=$$?; \
	$(PY) -m bench.report bench/results/local.json --out bench/results/local && exit $$status

lint: build
	$(PY) -m ruff check .
	$(PY) -c "import sys; from clang_format import clang_format; sys.exit(clang_format())" --dry-run --Werror $(filter csrc/%,$(SOURCES))

build: $(STAMP) $(LIBRARY)

# What compiles the library comes first, the rest while it is compiled.
$(STAMP): pyproject.toml setup.py constraints.txt data.txt
ifeq ($(VENV),)
	$(INSTALL) --no-build-isolation --no-deps --editable .
else
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-compile --constraint constraints.txt torch numpy setuptools ninja pybind11
	trap 'trap - TERM; kill 0' INT TERM; \
	{ $(INSTALL) --no-compile --requirement constraints.txt && { \
	$(INSTALL) --no-deps --only-binary :all: --requirement data.txt || echo "minUNet and minYOLO will ask for data of your own"; }; } & \
	$(INSTALL) --no-build-isolation --no-deps --editable .; status=$$?; wait $$! && exit $$status
endif
	@mkdir -p $(@D) && touch $@

$(LIBRARY): $(SOURCES) | $(STAMP)
	$(PY) -m minkernels build
	@touch $@

clean:
	rm -rf build $(LIBRARY) kernels/minkernels/_host.*.so *.egg-info $(if $(VENV),$(VENV))
