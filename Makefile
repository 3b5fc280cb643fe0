# make demo          two X-rays -> CT: without training within a minute, then with a network trained on phantoms beside it, in under 8 minutes on two cores
# make test          what has to hold before a change is shared, under 10 minutes on two cores
# make test-all      the same and everything that takes longer: all chapters again, documents, full-size smoke runs
# make test-docs     pages, links, citations, README's figures, the lock
# make test-browser  opens the explorers in a real browser; wants Chromium (Debian: apt install chromium)
# make docs          the site, in _docs (needs Quarto; runs every notebook for its pictures, about twenty minutes on two cores the first time)
# make setup         only the environment that these need
#
# Each sets up .venv by itself on a machine with Python 3.11 or newer, and is quick the second time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
TESTING := MPLBACKEND=agg OMP_NUM_THREADS=1 NUMEXPR_MAX_THREADS=2 PYTHONWARNINGS=ignore TF_CPP_MIN_LOG_LEVEL=3
QUIET := NUMEXPR_MAX_THREADS=2 PYTHONWARNINGS=ignore TF_CPP_MIN_LOG_LEVEL=3
# fewer phantoms and steps than the recipe's own, so that all of it takes 8 minutes at most
DEMO := -p data phantom:186 -p steps 120
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo lint test test-all test-docs test-browser readme docs clean

setup: $(STAMP)

$(STAMP): settings.ini requirements.lock setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ct_nb needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another: make setup PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV): PyTorch and the pinned stack, some minutes the first time ..."
	@$(PYTHON) -m venv $(VENV) || { echo "could not make $(VENV); on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c requirements.lock -e '.[dev]'
	@touch $@
	@echo "$(VENV) is ready"

demo: $(STAMP)
	@mkdir -p runs
	@echo "papermill nbs/train_drr2ct.ipynb runs/train_drr2ct.ipynb $(DEMO)"
	@echo "within a minute, a CT from two X-rays without training: runs/drr2ct/first.png; then a network is trained"
	@$(QUIET) $(BIN)/papermill nbs/train_drr2ct.ipynb runs/train_drr2ct.ipynb $(DEMO) --log-output --no-progress-bar </dev/null
	@echo "what the training adds: runs/drr2ct/comparison.png; the scores: runs/drr2ct/scoreboard.csv; all of it in a notebook: runs/train_drr2ct.ipynb"

lint: $(STAMP)
	@echo "== notebooks are clean and the library is their export"
	@$(BIN)/python tests/check_notebooks.py
	@echo "== style of the code, direction of the imports"
	@$(BIN)/ruff check nbs ct_nb
	@$(BIN)/lint-imports --no-logo

test: lint
	@echo "== the notebooks' own tests"
	@$(TESTING) $(BIN)/python tests/run_chapters.py
	@echo "== pytest, with one recipe by papermill"
	@$(TESTING) $(BIN)/python -m pytest $(PARALLEL)

test-all: lint
	@$(TESTING) $(BIN)/python tests/run_chapters.py --all --flags slow
	@$(TESTING) CT_NB_TEST_ALL=1 $(BIN)/python -m pytest $(PARALLEL)
	@$(TESTING) $(BIN)/python -m pytest $(PARALLEL) tests/docs

test-docs: $(STAMP)
	@$(TESTING) $(BIN)/python -m pytest $(PARALLEL) tests/docs

test-browser: $(STAMP)
	@$(QUIET) $(BIN)/python -m pytest tests/browser

readme: $(STAMP)
	@$(BIN)/python tests/check_notebooks.py --write

docs: $(STAMP)
	@$(QUIET) $(BIN)/python tests/build_site.py

clean:
	rm -rf runs/* _proc _docs
