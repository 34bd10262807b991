# Everything runs in a virtual environment of the checkout's own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install caption test test-slow style tiny study clean

help:
	@echo "make caption    install, then caption a sample clip with the bundled checkpoint"
	@echo "make test       install, then run the tests (make test-slow: the slow ones)"
	@echo "make style      format and lint"
	@echo "make tiny       train the bundled checkpoint and its audio-only twin anew"
	@echo "make study      run what is missing of the study of mismatch, and write its tables"

$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed

caption: install
	$(BIN)/evacap sample sample.mp4
	$(BIN)/evacap caption sample.mp4

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The first takes 13 minutes on two cores, the second 9; the last command prints the figures of the README.
tiny: $(VENV)/.installed-dev
	$(BIN)/evacap train tiny
	$(BIN)/evacap train tiny model.preset=audio-only output=runs/tiny_audio_only
	$(BIN)/python -m evacap.training.procedural.scenes --split test --clips 300 --output runs/test_clips
	$(BIN)/evacap prepare --manifest runs/test_clips/manifest.jsonl --model runs/tiny/model --output runs/test_clips_prepared
	$(BIN)/evacap evaluate tiny=runs/tiny/model tiny_audio_only=runs/tiny_audio_only/model \
		--data runs/test_clips_prepared --dataset "300 procedural test clips" --dataset-id procedural-clips \
		--shuffle 0 1 --output runs/tiny_evaluation

# Thirty runs of at most 12 minutes on two cores. Stopped at any moment, it goes on; a run that is in docs/study is done.
study: $(VENV)/.installed-dev
	$(BIN)/python -m evacap.training.study

clean:
	rm -rf $(VENV) sample.mp4
