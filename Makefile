# `make demo` and `make test` set up everything they need in .venv; the other targets do too.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.bench-installed
HIVEMIND := .venv-hivemind
RESULTS := bench/results

.PHONY: demo demo-incentive test slow lint types fmt clean bench bench-shaped bench-hivemind bench-scaling bench-micro bench-trust bench-state bench-goodput simulate

demo: $(STAMP)
	$(PY) -m mapreduce.demo

# Miners behind known links, one of them a liar, and what the chain pays them.
demo-incentive: $(STAMP)
	$(PY) -m mapreduce.demo_incentive

test: $(STAMP)
	$(PY) -m pytest -m "not slow"

slow: $(STAMP)
	$(PY) -m pytest --timeout 3600

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

# Collectives over loopback, beside the floor and the rivals.
bench: $(BENCH_STAMP)
	$(PY) -m bench.loopback --json $(RESULTS)/loopback.json --png $(RESULTS)/loopback.png

# The same over links of a given rate, in network namespaces: needs root.
bench-shaped: $(BENCH_STAMP)
	$(PY) -m bench.shaped --json $(RESULTS)/shaped.json --png $(RESULTS)/shaped.png

bench-scaling: $(BENCH_STAMP)
	$(PY) -m bench.scaling --json $(RESULTS)/scaling.json --png $(RESULTS)/scaling.png

bench-micro: $(BENCH_STAMP)
	$(PY) -m bench.micro --json $(RESULTS)/micro.json --png $(RESULTS)/micro.png

# What hashing, signing and sampling cost. As root also over shaped links.
bench-trust: $(BENCH_STAMP)
	$(PY) -m bench.trust --json $(RESULTS)/trust.json

# A validator's state at full size: the file, and what a window and a look cost. Some minutes.
bench-state: $(BENCH_STAMP)
	$(PY) -m bench.state --json $(RESULTS)/state.json

# The incentive over hundreds of windows: what each kind of party earns, beside the promises.
simulate: $(BENCH_STAMP)
	$(PY) -m bench.simulate --json $(RESULTS)/simulate.json --png $(RESULTS)/simulate.png

# What bots measure of miners behind links of a given rate: needs root.
bench-goodput: $(BENCH_STAMP)
	$(PY) -m bench.goodput --json $(RESULTS)/goodput.json

# hivemind has other dependencies than this package: it gets an environment of its own, and then
# takes part in the benchmarks above.
bench-hivemind: $(HIVEMIND)/.installed

$(HIVEMIND)/.installed:
	$(PYTHON) -m venv $(HIVEMIND)
	$(HIVEMIND)/bin/python -m pip install --quiet --upgrade pip
	$(HIVEMIND)/bin/python -m pip install --quiet hivemind==1.1.12 torch==2.13.0
	touch $@

fmt: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The environment is made anew when what it is made from changes.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -c constraints.txt -e '.[test,examples]'
	touch $@

$(BENCH_STAMP): $(STAMP)
	$(PY) -m pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) $(HIVEMIND) $(RESULTS) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
