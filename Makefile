# make demo    set everything up and replay, with every backend that can run here, results that were recorded on a GPU
# make test    the tests (TESTFLAGS="-m gpu" or "-m slow" for the others)
# make lint    ruff and mypy
# make wheel   one wheel with the compiled library, in dist/
# make compat  the built library and the specification under every torch, Python and numba that can be had here; writes build/compat/
# make transformers4  the model tests under transformers 4.57
# make receipt on a machine with a GPU: build, tests, bits, errors, goldens, hazards, sanitizers, as build/receipt/receipt.json
#
# PYTHON=python3.12 chooses the interpreter of .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
TESTFLAGS ?=

# The compiler from PyPI where there is no CUDA toolkit.
HAVE_NVCC := $(or $(shell command -v nvcc 2>/dev/null),$(wildcard $(CUDA_HOME)/bin/nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
comma := ,
EXTRAS := test,hf,bench$(if $(HAVE_NVCC),,$(comma)nvcc)

.PHONY: demo test lint wheel compat transformers4 receipt clean

demo: $(VENV)/installed
	$(BIN)/mlpdown check

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTFLAGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(VENV)/installed
	$(BIN)/python .ci/wheel.py --output-dir dist

compat: $(VENV)/installed
	$(BIN)/python .ci/compat.py --output-dir build/compat

transformers4: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target build/transformers4 transformers==4.57.6 tokenizers==0.22.2 \
		huggingface-hub==0.36.2 requests urllib3 charset-normalizer idna certifi hf-xet
	PYTHONPATH=build/transformers4 $(BIN)/python -m pytest tests/model $(TESTFLAGS)

receipt: $(VENV)/installed
	rm -rf build/receipt
	$(BIN)/python -m tests.receipt --out build/receipt

clean:
	rm -rf $(VENV) build dist *.egg-info native/prebuilt

# A stamp, made anew when what is to be installed has changed.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@echo "Installing into $(VENV). On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c $(CONSTRAINTS) pip
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch $@
