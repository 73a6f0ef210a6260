# SPDX-License-Identifier: Apache-2.0
#
# Every target sets up what it needs, from nothing, in .venv, .cache and build of this checkout, and is quick when
# that is there already. Needed beforehand: git, make, gcc and g++, Python 3.11 or later, and a package mirror that
# pip is configured for. ARGS is handed on: make test ARGS="-k ring".

PYTHON ?= $(shell for candidate in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$candidate; break; }; done)
BIN := .venv/bin
ARGS ?=

.PHONY: help demo test test-vm test-gpu bench check build setup toolchain clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

demo: build ## run an unmodified CUDA program through a mediator, on a GPU or the software GPU
	@$(BIN)/python examples/demo.py $(ARGS)

test: build toolchain ## every test that needs no GPU, those in virtual machines too
	-@$(BIN)/python tests/vm/packages.py fetch
	@$(BIN)/python tests/prometheus.py fetch
	-@$(BIN)/python tests/perfetto.py fetch
	@$(BIN)/pytest -m "not gpu" $(ARGS)

test-vm: build toolchain ## the tests that boot a virtual machine (QEMU and a kernel are fetched)
	@$(BIN)/python tests/vm/packages.py fetch
	@$(BIN)/pytest -m vm tests/vm $(ARGS)

test-gpu: build toolchain ## the tests that need a real GPU
	@test -e /dev/nvidiactl || { echo "this machine has no NVIDIA GPU (no /dev/nvidiactl)" >&2; exit 1; }
	@$(BIN)/pytest -m gpu $(ARGS)

bench: build ## native against remoted: one table and one JSON file
	@$(BIN)/python bench/run.py $(ARGS)

check: build toolchain ## all that CI runs: ruff, mypy, generated files, tests
	@$(BIN)/python tools/check $(ARGS)

build: setup ## the native parts, in place
	@$(BIN)/python tools/build_native.py

guest-bundle: build ## dist/vgpu-guest-VERSION.tar.gz: all that a VM needs, to copy into it
	@$(BIN)/python -P -m vgpu.guest_main bundle -o dist/ $(ARGS)

setup:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed and none was found" >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py

toolchain: setup
	@$(BIN)/python tests/toolchain.py fetch

clean: ## remove what was built; downloads and .venv stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf shim/lib
	rm -f gpu/_replay.abi3.so transport/_ring.abi3.so
	find . -name __pycache__ -not -path './.venv/*' -not -path './.cache/*' -prune -exec rm -rf {} +
