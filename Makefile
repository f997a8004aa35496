# Every target sets itself up: .venv is made on first use and whenever a requirements file changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-speech demo-text test check setup clean

demo: .venv/.ready
	$(BIN)/python -m pretrain configs/pretrain/image_demo.yaml $(ARGS)
	$(BIN)/python -m finetune.report runs/image_demo

demo-speech: .venv/.ready
	$(BIN)/python -m pretrain configs/pretrain/audio_demo.yaml $(ARGS)
	$(BIN)/python -m finetune.report runs/audio_demo

demo-text: .venv/.ready runs/corpus/english.idx
	$(BIN)/python -m pretrain configs/pretrain/text_demo.yaml $(ARGS)
	$(BIN)/python -m finetune.report runs/text_demo --data data/movie_reviews

# Of the reviews only the training sentences, without their labels, which their order would tell: it is not kept.
TEXTS := data/state_of_the_union/state_of_the_union.txt.xz runs/corpus/reviews.txt
runs/corpus/english.idx: .venv/.ready data/state_of_the_union/state_of_the_union.txt.xz data/movie_reviews/train.tsv.gz
	rm -rf runs/corpus && mkdir -p runs/corpus
	gzip -dc data/movie_reviews/train.tsv.gz | cut -f2 | LC_ALL=C sort > runs/corpus/reviews.txt
	$(BIN)/python -m pretrain.data.tokenizer train $(TEXTS) --vocabulary 8000 --out runs/corpus/tokenizer.model
	$(BIN)/python -m pretrain.data.corpus $(TEXTS) --tokenizer runs/corpus/tokenizer.model --out runs/corpus/english

test: .venv/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

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
