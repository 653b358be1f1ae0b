# Every target sets up what it needs in $(VENV); PYTHON chooses the interpreter it is made with.
#   PYTHON=python3.12 make test        make test ARGS="tests/test_layering.py -x"
SHELL := bash
VENV ?= .venv
ARGS ?=
export VENV

.PHONY: help demo test aot bench quality clean

help:
	@echo "make demo      train a prefix for SmolLM2-135M-Instruct on the E2E data, generate, score -> runs/demo"
	@echo "make test      the whole test suite, in up to four processes (ARGS=... goes to pytest, -n 0 for one process)"
	@echo "make aot       compile every Triton kernel ahead of time, without a GPU, and record the verdicts (minutes)"
	@echo "make bench     speed on this CPU -> benchmarks/results/cpu, docs/benchmarks.md (ARGS=... as --threads 1)"
	@echo "make quality   ruff"
	@echo "make clean     remove builds and caches (keeps $(VENV) and runs)"
	@echo "Variables: PYTHON (default: the first Python >= 3.10 found), VENV (default: .venv)"

demo:
	@tools/setup_env.sh demo
	@"$(VENV)/bin/python" benchmarks/demo.py --output runs/demo $(ARGS)

test:
	@tools/setup_env.sh test
	@"$(VENV)/bin/python" -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

aot:
	@tools/setup_env.sh test
	@"$(VENV)/bin/python" tools/compile_kernels.py --verdicts tests/prefix_kernels/aot_verdicts.json $(ARGS)

bench:
	@tools/setup_env.sh test
	@"$(VENV)/bin/python" benchmarks/bench_prefix_attention.py $(ARGS)
	@"$(VENV)/bin/python" benchmarks/bench_whole.py $(ARGS)
	@"$(VENV)/bin/python" benchmarks/report.py

quality:
	@tools/setup_env.sh test
	@"$(VENV)/bin/python" -m ruff check . && "$(VENV)/bin/python" -m ruff format --check .

clean:
	rm -rf build dist *.egg-info prefix_kernels/_C*.so .pytest_cache .ruff_cache .benchmarks
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
