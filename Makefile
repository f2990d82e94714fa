# make venv    builds .venv (again only when requirements/ or pyproject.toml changed); PYTHON=python3.12 chooses the interpreter
# make demo    mines, fine-tunes and evaluates on real text; ends with a before/after table
# make test    runs the tests, in two processes; some minutes
# make test-all  adds clusters, lost machines and signals
# make signatures  writes the types of the Python functions' arguments, after a change of a flag
# make lint    ruff, mypy, pydoclint, import-linter
# make coverage  the fast tests with the share of lines and branches that they run
# make axe     axe-core from npm, with which tests check the reports' accessibility where there is a Chromium
# make soak    100,000 odd inputs, 2,000 damaged model folders among them, and many small runs in one cluster that must leave nothing behind; an hour
# make bench   speed, memory and quality beside their peers (benchmarks/README.md); hours on a small machine
# make clean   removes .venv and caches; runs/ stays

HARDWARE := $(shell { nvidia-smi -L || ls /dev/nvidia0; } >/dev/null 2>&1 && echo gpu || echo cpu)
LOCK := requirements/lock-$(HARDWARE).txt
LOCKED := .venv/.locked-$(HARDWARE)
INSTALLED := .venv/.installed
BIN := .venv/bin

.PHONY: venv demo test test-all coverage signatures lint soak axe bench clean FORCE

venv: $(INSTALLED)

# With PYTHON given the script looks each time whether .venv is of that version.
$(LOCKED): $(LOCK) $(if $(PYTHON),FORCE)
	@PYTHON="$(PYTHON)" requirements/venv.sh $(HARDWARE)

$(INSTALLED): $(LOCKED) pyproject.toml
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e . </dev/null >.venv/package.log 2>&1 \
		|| { cat .venv/package.log >&2; echo "make venv: installing raybge itself failed" >&2; exit 1; }
	@$(BIN)/python -m pip check --disable-pip-version-check >.venv/check.log 2>&1 \
		|| { cat .venv/check.log >&2; echo "make venv: the packages do not fit: does requirements/ lag behind pyproject.toml?" >&2; exit 1; }
	@touch $@

demo: venv
	$(BIN)/python -m raybge.demo

# Each of the two processes has one Ray, for all its tests that need one.
test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not alone"

# Each file has a process of its own: Ray's native code crashes at times in a process that has started and left many Rays.
test-all: test
	@for file in $$(grep -rl --include='test_*.py' 'mark\.alone' tests | sort); do \
		echo "$$file"; $(BIN)/python -m pytest -m alone "$$file" || exit 1; \
	done

# the keyword arguments of the Python functions, for type checkers and editors: after a change of a flag
signatures: venv
	$(BIN)/python -m raybge.cli.keyword_source

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy raybge
	$(BIN)/pydoclint --quiet raybge
	$(BIN)/lint-imports

# The main process and its children; tests of lost machines and of clusters are left out.
coverage: venv
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=html:runs/coverage -m "not alone"

# SOAK_INPUTS inputs, each of which may take 20 s and a test of thousands as long as it needs; then SOAK_MINUTES of runs
soak: venv
	$(BIN)/python -m pytest -o faulthandler_timeout=0 tests/soak/fuzz_*.py
	$(BIN)/python tests/soak/runs.py --minutes $(or $(SOAK_MINUTES),30)

axe: venv
	npm install --no-audit --no-fund --prefix .venv/axe axe-core@4.14.1

bench: venv
	$(BIN)/python benchmarks/train_speed.py --passage_len 256 --groups 32 --out runs/bench/speed-256.json
	$(BIN)/python benchmarks/train_speed.py --passage_len 512 --groups 16 --out runs/bench/speed-512.json
	$(BIN)/python benchmarks/train_commands.py --out runs/bench/train-commands.json
	$(BIN)/python benchmarks/memory.py --out runs/bench/memory.json
	$(BIN)/python benchmarks/similar_batches.py --out runs/bench/similar-batches.json
	$(BIN)/python benchmarks/quality.py --out runs/bench/quality.json
	$(BIN)/python benchmarks/mining.py speed --out runs/bench/mining-speed.json
	$(BIN)/python benchmarks/mining.py memory --out runs/bench/mining-memory.json
	$(BIN)/python benchmarks/encoding.py --out runs/bench/encoding.json
	$(BIN)/python benchmarks/precision.py --out runs/bench/precision.json
	$(BIN)/python benchmarks/encoding.py backends --out runs/bench/encoding-backends.json
	$(BIN)/python benchmarks/encoding.py memory --out runs/bench/encoding-memory.json
	$(BIN)/python benchmarks/masking.py --out runs/bench/masking.json
	$(BIN)/python benchmarks/pretraining.py --out runs/bench/pretraining.json
	$(BIN)/python benchmarks/tuning.py --out runs/bench/tuning.json
	$(BIN)/python benchmarks/merging.py memory --out runs/bench/merging-memory.json
	$(BIN)/python benchmarks/results.py runs/bench

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
