# Everything runs in a virtual environment of the checkout's own, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help install caption spice test test-slow test-newest test-lowest test-transformers constraints fuzz gpu-check package style tiny study clean

help:
	@echo "make caption            install, caption a sample clip with the bundled checkpoint, and check the installation"
	@echo "make test               install, then run the tests (make test-slow: the slow ones)"
	@echo "make spice              fetch the parser of the metric SPICE, by Maven"
	@echo "make test-newest        the tests with the newest libraries (PRE=1: with their pre-releases)"
	@echo "make test-lowest        the tests with the lowest versions that setup.py allows"
	@echo "make test-transformers  Transformers' own common tests, from its source distribution"
	@echo "make constraints        write constraints.txt anew, from the newest versions (TORCH=2.14.1: with that one)"
	@echo "make fuzz               read 10,000 damaged files, which takes half an hour; stopped, it goes on"
	@echo "make gpu-check          check and measure a GPU in eight minutes, and write runs/gpu_check/gpu_check.md"
	@echo "make package            build dist/, check it, and try the wheel in an environment of its own"
	@echo "make style              format and lint"
	@echo "make tiny               train the bundled checkpoint and its audio-only twin anew"
	@echo "make study              run what is missing of the study of mismatch, and write its tables"

# The versions of constraints.txt are those that the tests ran with: the commands of the README work in years to come.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

install: $(VENV)/.installed

caption: install
	$(BIN)/evacap sample sample.mp4
	$(BIN)/evacap caption sample.mp4
	$(BIN)/evacap check-install

# Maven and evacap keep what they have: from the second time on, nothing is fetched.
CORENLP := edu.stanford.nlp:stanford-corenlp:3.6.0
M2 := $(HOME)/.m2/repository
spice: install
	mvn --batch-mode --quiet dependency:get -Dmaven.repo.local=$(M2) -Dtransitive=false -Dartifact=$(CORENLP)
	mvn --batch-mode --quiet dependency:get -Dmaven.repo.local=$(M2) -Dtransitive=false -Dartifact=$(CORENLP):jar:models
	$(BIN)/evacap install-spice --from $(M2)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-slow: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# Environments of their own, made anew each time.
test-newest: TESTED = .venv-newest
test-newest:
	rm -rf $(TESTED) && $(PYTHON) -m venv $(TESTED)
	$(TESTED)/bin/python -m pip install --quiet $(if $(PRE),--pre) --editable ".[dev]"
	$(TESTED)/bin/evacap check-install
	HF_HUB_OFFLINE=1 $(TESTED)/bin/python -m pytest

test-lowest: TESTED = .venv-lowest
test-lowest:
	rm -rf $(TESTED) && $(PYTHON) -m venv $(TESTED)
	$(PYTHON) tests/lowest_versions.py > $(TESTED)/lowest.txt
	$(TESTED)/bin/python -m pip install --quiet --constraint $(TESTED)/lowest.txt --editable ".[dev]"
	$(TESTED)/bin/evacap check-install
	HF_HUB_OFFLINE=1 $(TESTED)/bin/python -m pytest

# Away from pyproject.toml and tests/conftest.py, as `tests` is Transformers' package here.
test-transformers: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet parameterized
	HF_HUB_OFFLINE=1 PYTHONPATH=$$($(BIN)/python tests/transformers_common/fetch.py .transformers) \
		$(BIN)/python -m pytest -c tests/transformers_common/pytest.ini tests/transformers_common/common_*.py

# Which file each is follows from its number. A file that comes out wrong stays in runs/fuzz.
fuzz: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python tests/processing/fuzz_media.py --output runs/fuzz.jsonl --keep runs/fuzz

constraints:
	rm -rf .venv-constraints && $(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet --editable ".[dev]" $(if $(TORCH),torch==$(TORCH))
	head -2 constraints.txt > .venv-constraints/constraints.txt
	.venv-constraints/bin/python -m pip freeze --exclude-editable >> .venv-constraints/constraints.txt
	mv .venv-constraints/constraints.txt constraints.txt

gpu-check: $(VENV)/.installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu_check

# As a user gets it: from the wheel, in an environment of its own, away from the checkout.
package: PACKAGE = $(CURDIR)/.venv-package
package:
	rm -rf dist $(PACKAGE) && $(PYTHON) -m venv $(PACKAGE)
	$(PACKAGE)/bin/python -m pip install --quiet build twine
	$(PACKAGE)/bin/python -m build --outdir dist .
	$(PACKAGE)/bin/python -m twine check --strict dist/*
	rm -rf $(PACKAGE) && $(PYTHON) -m venv $(PACKAGE)
	$(PACKAGE)/bin/python -m pip install --quiet dist/*.whl
	cd $(PACKAGE) && bin/evacap sample sample.mp4 && bin/evacap caption sample.mp4 && bin/evacap check-install

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The first takes 13 minutes on two cores, the second 9; the last command prints the figures of the README.
tiny: $(VENV)/.installed-dev
	$(BIN)/evacap train tiny model.preset=evacap-agreement data.p_mix=0 data.procedural=115200
	$(BIN)/python -m evacap.training.evaluation.calibration runs/tiny/model --procedural 500
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
	rm -rf dist $(VENV) .venv-package .venv-newest .venv-lowest .venv-constraints .transformers sample.mp4
