# Two commands for people: `make demo` and `make test`. Everything is installed into .venv; nothing else is touched.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check bench clean

demo: .venv/ready ## compress MiniLM-L6 on tweets: under 6 minutes on two cores
	$(BIN)/hpc-compress search experiment=demo

test: .venv/ready ## all tests that this machine can run
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: .venv/ready ## formatter, linter, type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/ready ## TRAIN=... VALIDATION=... csv, tsv or parquet files with the columns sentence and label
	$(if $(and $(TRAIN),$(VALIDATION)),,$(error make bench TRAIN=file VALIDATION=file, with columns sentence and label))
	$(BIN)/pip install --quiet -e '.[demo,bench]'
	$(BIN)/python benchmarks/training.py --data $(TRAIN) --validation $(VALIDATION) --out results
	$(BIN)/python benchmarks/repeatability.py --out results

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e '.[demo,dev]'
	touch $@

clean:
	rm -rf .venv results/demo
