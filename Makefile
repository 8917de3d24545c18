# `make demo` and `make test` do all the set-up on a fresh machine: Python >= 3.10, a C++17 compiler, git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(shell find vendor/fetch.py vendor/CMakeLists.txt vendor/llama.cpp.lock patches -type f)

.PHONY: demo test test-device lint docs check-devices bench clean

demo: $(STAMP)
	$(BIN)/kvlocal demo --document demo/expedition-log.txt --question-file demo/question.txt

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# the native tests on an accelerator that every machine has: Vulkan on the CPU
test-device: $(STAMP)
	$(BIN)/python tools/device_tests.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find patches/overlay tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# the pages of the commands, and the site in site/
docs: $(STAMP)
	$(BIN)/python tools/reference.py
	$(BIN)/mkdocs build --strict --quiet

# our parts of backends whose hardware is not there, compiled; 840 MB of compilers once, in build/
check-devices: $(STAMP)
	$(BIN)/python tools/check_devices.py

# an editable install: Python changes are live, native ones are rebuilt when a source is newer
$(STAMP): pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build site vendor/llama.cpp vendor/llama_cpp vendor/.fetched
