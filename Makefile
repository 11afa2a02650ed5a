# Two commands do all their set-up on a fresh Debian or Ubuntu machine: make demo, make test.
PRESET ?= release
PYTHON_BIN = .venv/bin/python
CPP_SOURCES = $(shell git ls-files '*.cpp' '*.h' '*.hpp' '*.c')

.PHONY: help demo test build test-cpp test-python test-gpu sanitize-gpu lint format clean

help:
	@echo "make demo     train a small language model with and without anymask; ends with a report"
	@echo "make test     all tests, C++ and Python (no GPU needed)"
	@echo "make test-gpu the tests that need a Hopper GPU;  make sanitize-gpu  a few under compute-sanitizer"
	@echo "make lint     formatting and static checks;  make format  formats"

demo:
	@tools/setup.sh demo
	@.venv/bin/anymask demo $(ARGS)

test: lint test-cpp test-python

build: setup-dev
	@PATH="$(CURDIR)/.venv/bin:$$PATH" cmake --preset $(PRESET) -DPython3_EXECUTABLE=$(CURDIR)/$(PYTHON_BIN)
	@PATH="$(CURDIR)/.venv/bin:$$PATH" cmake --build --preset $(PRESET)

test-cpp: build
	@PATH="$(CURDIR)/.venv/bin:$$PATH" ctest --preset $(PRESET)

test-python: setup-dev
	@$(PYTHON_BIN) -m pytest tests/python $(ARGS)

test-gpu: build
	@PATH="$(CURDIR)/.venv/bin:$$PATH" ctest --preset $(PRESET) -R OnGpu
	@$(PYTHON_BIN) -m pytest tests/gpu $(ARGS)

# The same kernels under compute-sanitizer, over small problems.
sanitize-gpu: setup-dev
	@PYTHON=$(PYTHON_BIN) tests/gpu/sanitizer.sh $(ARGS)

lint: setup-dev
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/clang-format --dry-run --Werror $(CPP_SOURCES)

format: setup-dev
	@.venv/bin/ruff check --fix . && .venv/bin/ruff format .
	@.venv/bin/clang-format -i $(CPP_SOURCES)

.PHONY: setup-dev
setup-dev:
	@tools/setup.sh dev

clean:
	rm -rf build dist demo-report
