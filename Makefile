# From a fresh clone: `make run` or `make test`. Needs Python 3.11 or newer, git, and the network once, for set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MADE := $(VENV)/.made
MADE_TEST := $(VENV)/.made-test
MADE_BENCH := $(VENV)/.made-bench
MADE_DOCS := $(VENV)/.made-docs
MADE_BROWSER := $(VENV)/.made-browser

# uv where it is installed, else pip; the same versions either way.
UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),"$(UV)" pip install --python $(BIN)/python,$(BIN)/python -m pip install) -c constraints.txt

# On Linux without a graphics card: make run TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

FUZZ ?= 30000

# Tests have caches of their own: a warm one would hide a changed reader, and a faulty run would spoil it.
# Matplotlib's too: a list of fonts written while an environment was removed warns in every formula afterwards.
TEST_CACHE := $(abspath build/cache)
test test-slow test-fuzz test-browser coverage record: export GENAILAB_CACHE := $(TEST_CACHE)
test test-slow test-fuzz test-browser coverage record: export MPLCONFIGDIR := $(TEST_CACHE)/matplotlib

coverage: export COVERAGE_FILE := $(abspath build/coverage/data)

# Tests on real films skip where this is unset.
ifneq ($(wildcard ../shared/data),)
export GENAILAB_REAL_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help run test test-slow test-fuzz test-faults test-browser coverage report-determinism budgets \
	test-oldest test-newest matrix lab record editions site bench bench-diffusion clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

run: $(MADE) ## execute every lesson; notebooks and pages go to build/
	$(BIN)/genailab run

test: $(MADE_TEST) ## ruff, mypy, the quick tests, then every notebook against its recorded outputs
	rm -rf $(TEST_CACHE)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not browser"
	$(BIN)/python -m pytest --nbval --nbval-current-env --nbval-cell-timeout=300 notebooks

test-slow: $(MADE_TEST) ## the tests that take more than about ten seconds each
	$(BIN)/python -m pytest -m slow || { code=$$?; \
		test $$code -eq 5 && ! grep -rq "mark\.slow" tests --include="*.py" || exit $$code; }

test-fuzz: $(MADE_TEST) ## 30,000 damaged and odd inputs, five to twenty minutes; make test-fuzz FUZZ=100000 tries more
	FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/fuzz

test-browser: $(MADE_BROWSER) ## lessons in JupyterLab and all pages, in Chromium; screenshots go to build/screenshots
	$(BIN)/python -m pytest -m browser tests/browser

test-faults: $(MADE_TEST) ## put small faults in, note who sees them: two hours; may be stopped, and goes on
	$(BIN)/python benchmarks/seed_faults.py

coverage: $(MADE_TEST) ## which lines quick tests and lessons run; fails below 90 percent
	rm -rf $(TEST_CACHE) build/coverage
	$(BIN)/coverage run -m pytest -q -m "not slow and not browser" -k "not disk_without_room"
	cd notebooks && for lesson in *.ipynb; do $(abspath $(BIN))/coverage run --rcfile=../pyproject.toml \
		-m IPython $$lesson > /dev/null || exit 1; done
	$(BIN)/coverage combine
	$(BIN)/coverage report --show-missing --skip-covered --fail-under=90

report-determinism: $(MADE_TEST) ## which cells differ with threads and instructions, and by how much: half an hour
	$(BIN)/python benchmarks/report_determinism.py

budgets: $(MADE_TEST) ## measure seconds and memory of each lesson, on a quiet machine; texts quote docs/lessons.json
	$(BIN)/python benchmarks/measure_lessons.py

# Whatever a learner has installed: the oldest releases that pyproject.toml allows, and the newest that there are.
# Recorded outputs hold for the pinned ones alone, so there the quick tests and a run of the lessons are asked.
test-oldest: RELEASES := lowest-direct
test-newest: RELEASES := highest
test-oldest: matrix ## quick tests and a run of the lessons on the oldest dependencies that are allowed
test-newest: matrix ## the same on the newest dependencies that there are

matrix: TREE = build/$(RELEASES)
matrix: $(MADE_TEST)
	@test -n "$(UV)" || { echo "this needs uv: pip install uv" >&2; exit 1; }
	rm -rf $(TREE) && $(BIN)/python -m venv $(TREE)
	"$(UV)" pip install --python $(TREE)/bin/python --resolution $(RELEASES) -e ".[test]"
	GENAILAB_CACHE=$(abspath $(TREE)/cache) $(TREE)/bin/python -m pytest -m "not slow and not browser"
	GENAILAB_CACHE=$(abspath $(TREE)/cache) $(TREE)/bin/genailab run

lab: $(MADE) ## open JupyterLab on the lessons
	$(BIN)/jupyter lab notebooks

record: $(MADE) ## execute the notebooks and write their outputs, the reference of the tests
	rm -rf $(TEST_CACHE)
	$(BIN)/python -m genailab_helpers.nbregression record notebooks/*.ipynb

editions: $(MADE) ## a student's and a solutions edition of every lesson, in build/editions
	$(BIN)/python docs/editions.py build/editions

site: $(MADE_DOCS) ## lessons, pages for teachers and functions as a site, in build/site; needs no network
	$(BIN)/codespell README.md CONTRIBUTING.md data/README.md docs notebooks genailab_helpers
	$(BIN)/python docs/site/build.py build/site

bench: $(MADE_BENCH) ## run every bench_*.py script under benchmarks/, one after the other
	@missed=0; for script in benchmarks/bench_*.py; do \
		echo "== $$script"; $(BIN)/python $$script || missed=1; done; exit $$missed

bench-diffusion: $(MADE_BENCH) ## our diffusion engine beside its peers: hours; may be stopped, and goes on
	$(BIN)/python benchmarks/compare_peers.py

clean: ## remove the environment, build/ and caches
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find genailab_helpers tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Made once, and again when the files that describe it change. The base interpreter is asked for, because PYTHON
# may be the one of the very environment that is about to be replaced.
$(MADE): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "GenAI Lab needs Python 3.11 or \
	newer, and $(PYTHON) is not; name another one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	base=$$($(PYTHON) -c "import sys; print(sys._base_executable)") && \
		rm -rf $(VENV) && "$$base" -m venv $(VENV)
	$(if $(TORCH_INDEX),$(INSTALL) torch torchvision --index-url $(TORCH_INDEX))
	$(INSTALL) -e .
	@touch $@

$(MADE_TEST): $(MADE)
	$(INSTALL) -e ".[test]"
	@touch $@

$(MADE_BENCH): $(MADE_TEST)
	$(INSTALL) -e ".[bench]"
	@touch $@

$(MADE_DOCS): $(MADE)
	$(INSTALL) -e ".[docs]"
	@touch $@

$(MADE_BROWSER): $(MADE_TEST)
	$(INSTALL) -e ".[browser]"
	@touch $@
