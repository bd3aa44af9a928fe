# The two main commands are `make demo` and `make test`. Everything is installed into .venv, and nowhere else.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check bench clean

demo: .venv/ready ## compress MiniLM-L6 on tweets: eight to ten minutes on two cores
	$(BIN)/hpc-compress search experiment=demo

test: .venv/ready ## all tests that this machine can run
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu"

check: .venv/ready ## formatter, linter, type checker, who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/ready ## the benchmarks; takes hours on two cores. DATA: a folder with sst2, trec6, stsb, qqp_sample and cola, each with train and dev as tsv or parquet
	$(if $(wildcard $(DATA)/sst2/train.*),,$(error make bench DATA=folder that holds sst2/train.tsv or .parquet and the others))
	$(BIN)/pip install --quiet -e '.[demo,bench]'
	$(BIN)/python benchmarks/training.py --data $(wildcard $(DATA)/sst2/train.*) --validation $(wildcard $(DATA)/sst2/dev.*) --out results
	$(BIN)/python benchmarks/distillation.py --data $(wildcard $(DATA)/sst2/train.*) --out results
	$(BIN)/python benchmarks/repeatability.py --out results
	$(BIN)/python benchmarks/compression.py --data $(DATA) --out results
	$(BIN)/python benchmarks/untrained.py --data $(DATA) --out results

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e '.[demo,dev]'
	touch $@

clean:
	rm -rf .venv results/demo
