# Every target sets up what it needs: a virtual environment in $(VENV), made once and updated when pyproject.toml or
# constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
FUZZ ?= 10000
DEMO ?=
BENCH ?=
BENCH_OUT ?= benchmarks/results

PY := $(VENV)/bin/python
# Many small tests side by side: one thread each, or the workers fight for the cores.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

.PHONY: demo examples test fuzz lint format docs bench bench-peers clean

demo: $(VENV)/.installed-demo
	$(PY) -m kfac_func.demo $(DEMO)

# The five studies of the workbench, with plots; minutes in all.
examples: $(VENV)/.installed-demo
	for script in examples/*.py; do echo "== $$script"; $(PY) $$script --out examples_output || exit 1; done

# First everything with shapes and types checked at run time (tests/conftest.py), then what must run without that:
# torch.compile, and the examples of README, docs and docstrings.
test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow and not compile and not examples"
	$(PYTEST) -m "(compile or examples) and not slow" $$(grep -rlE "mark\.(compile|examples)" tests)

# Random models against oracles of torch alone (tests/fuzz): half of the cases harmless, half that no tape can see.
fuzz: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --cases $(FUZZ) --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --cases $(FUZZ) --workers $(WORKERS) --hostile

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.installed-docs
	$(PY) -m mkdocs build --strict --quiet

# What got slower since the committed figures is printed; the exit status never depends on a time.
bench: $(VENV)/.installed-demo
	$(PY) -m benchmarks.report --out $(BENCH_OUT) $(BENCH)

# Other optimisers in the same rounds, in an environment of their own: their requirements stay out of ours.
bench-peers: $(VENV)-peers/.installed-peers
	$(VENV)-peers/bin/python -m benchmarks.report --parts peers --name peers --out $(BENCH_OUT) $(BENCH)

clean:
	rm -rf $(VENV) $(VENV)-peers build dist demo_output examples_output out .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)-peers/.installed-peers: pyproject.toml constraints.txt benchmarks/peers/requirements.txt
	test -x $(VENV)-peers/bin/python || $(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]" \
		--requirement benchmarks/peers/requirements.txt
	touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@
