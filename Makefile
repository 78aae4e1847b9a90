# make install   .venv with everything in it, and the CPU kernels built into lmkernels/
# make test      the whole test suite
# make gpu       the same suite, and benchmarks, on an NVIDIA GPU
# make demo      train a small GPT, let it write, and compare with plain torch on this machine
#
# Each but `gpu` starts with what `make install` does, and that does nothing when it has been done. Only the first one needs a
# network. PYTHON picks the interpreter that makes .venv; ARGS goes to pytest or to the benchmarks; WORKERS is the number
# of processes that test (0: this one).

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
WORKERS ?= 2
OTHER_TORCH ?= 2.14.1
OTHER_VENV ?= .venv-torch-$(OTHER_TORCH)
CXX_SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CXX_OF_TESTS := $(wildcard tests/*/*.cpp tests/*/*.h tests/gpu/emulated/*)
# torch's build looks for ninja here
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: install test test-gpu-compile test-other-torch demo bench gpu lint format clean

install: $(VENV)/installed lmkernels/_C.so

# torch first and the package without build isolation, so that it is built with the torch it will run with. So are those
# of its dependencies that come as sources: seqeval takes its version from setuptools-scm.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch numpy ninja 'setuptools>=77' setuptools-scm
	LMKERNELS_NO_EXTENSION=1 $(PIP) install --quiet --constraint constraints.txt --no-build-isolation \
	  --editable '.[test,dev]'
	touch $@

# Built in place: ninja then compiles only what has changed. Where there is no compiler this makes no file, and says so.
lmkernels/_C.so: $(VENV)/installed $(CXX_SOURCES)
	$(VENV)/bin/python setup.py --quiet build_ext --inplace

test: install
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Every Triton kernel in every configuration, compiled for sm_80 and sm_90; needs no GPU.
test-gpu-compile: install
	$(VENV)/bin/python -m pytest tests/gpu/test_compiled.py --every-configuration $(ARGS)

# The library that torch 2.13 built must load under another torch; about 6 GB of disk.
test-other-torch: install $(OTHER_VENV)/bin/torchrun
	LMKERNELS_OTHER_TORCH=$(abspath $(OTHER_VENV))/bin/python \
	  $(VENV)/bin/python -m pytest tests/test_packaging.py -k other_torch $(ARGS)

$(OTHER_VENV)/bin/torchrun:
	$(PYTHON) -m venv $(OTHER_VENV)
	$(OTHER_VENV)/bin/python -m pip --disable-pip-version-check install --quiet torch==$(OTHER_TORCH) numpy

demo: install
	$(VENV)/bin/python -m lmkernels.demo

bench: install
	$(VENV)/bin/python -m benchmarks $(ARGS)

# On a machine with a GPU: tests and benchmarks of its kernels, ten minutes. GPU_PYTHON is one whose torch has CUDA, as
# `$(PYTHON) -m benchmarks.gpu` needs nothing that `make install` makes: it builds the library itself.
GPU_PYTHON ?= $(PYTHON)
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

lint: install
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES) $(CXX_OF_TESTS)

format: install
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_SOURCES) $(CXX_OF_TESTS)

# All but .venv, which only the network can bring back.
clean:
	rm -rf build dist demo-out *.egg-info lmkernels/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
