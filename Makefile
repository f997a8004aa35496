# Every target sets itself up: .venv is made on first use and whenever a requirements file changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check setup clean

demo: .venv/.ready
	$(BIN)/python -m pretrain configs/pretrain/image_demo.yaml $(ARGS)
	$(BIN)/python -m finetune.report runs/image_demo

test: .venv/.ready-dev
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

setup: .venv/.ready-dev

.venv/.ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.ready-dev: .venv/.ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
