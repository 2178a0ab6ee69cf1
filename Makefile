# Each target makes the environment it needs in .venv first; with nothing changed that costs nothing.
PYTHON ?= python3
PORT ?= 5000
MODEL ?= student
SERVE_PORT ?= 8080
SLURM := apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: env repro test test-forms test-engines test-nodes test-slurm chaos claims bench recipe serve ui lint audit
.DELETE_ON_ERROR:

env: .venv/.run .venv/.develop

# torch goes in first: the same command gives the CUDA build where that is what the index serves, and no
# other package can pull a different torch afterwards.
.venv/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=<its path>")'
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing the packages of the pipeline into .venv (once, some minutes)"
	@$(PIP) torch==2.13.0
	@$(PIP) -e .
	@touch $@

.venv/.develop: .venv/.run
	@echo "installing the packages of the tests into .venv"
	@$(PIP) -e '.[huggingface,corpus,test,lint]'
	@touch $@

.venv/.gguf: .venv/.run
	@echo "installing llama.cpp and the packages of GGUF into .venv"
	@$(PIP) -e '.[gguf]'
	@touch $@

.venv/.forms: .venv/.develop .venv/.gguf
	@echo "installing the packages of ONNX into .venv"
	@$(PIP) -e '.[onnx]'
	@touch $@

.venv/.ray: .venv/.develop
	@echo "installing Ray into .venv"
	@$(PIP) -e '.[ray]'
	@touch $@

.venv/.slurm: .venv/.develop
	@echo "installing Hydra's launcher for SLURM into .venv"
	@$(PIP) -e '.[slurm]'
	@touch $@

# The engines' own parsers: their packages do not go together with the pinned ones.
.engines/.parsers: tests/engines.txt
	@test -x .engines/bin/python || $(PYTHON) -m venv .engines
	@echo "installing the parsers of the engines' documents into .engines"
	@.engines/bin/python -m pip install --quiet --disable-pip-version-check -r tests/engines.txt
	@touch $@

.venv/.audit: .venv/.run
	@$(PIP) -e '.[audit]'
	@touch $@

repro: .venv/.run
	@test -e .git || dvc config --local core.no_scm true
	dvc repro
	@python -m stages.tracking sync || true  # waits for the stages' mirrors; a server that is down is no failure
	@echo
	@echo "The report:    $(CURDIR)/report/index.html"
	@echo "The runs:      make ui   (MLflow on http://127.0.0.1:$(PORT))"

test: .venv/.develop
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

chaos: .venv/.develop
	python -m chaos

claims: .venv/.develop
	python -m claims

bench: .venv/.develop
	python -m benchmarks

recipe: .venv/.develop
	python -m benchmarks.recipe

test-forms: .venv/.forms  # what make test skips where the extras gguf and onnx are not installed
	python -m pytest tests/test_export.py tests/test_llama_cpp.py

test-engines: .venv/.ray .engines/.parsers  # what make test skips: each document by its engine's own parser; Ray
	python -m pytest tests/test_engines.py tests/test_engine_parsers.py

test-nodes: .venv/.develop  # several machines, as network namespaces of this one: root and iproute2
	python -m pytest -m nodes tests/test_nodes.py tests/test_placement.py

test-slurm: .venv/.slurm  # a real SLURM of three network namespaces
	@PATH="$$PATH:/usr/sbin"; for tool in slurmctld slurmd sbatch munged; do \
		command -v $$tool > /dev/null || { test "$$(id -u)" = 0 && $(SLURM); } || \
			{ echo "$$tool is missing: as root, $(SLURM)" >&2; exit 1; }; done
	python -m pytest -m nodes tests/test_slurm.py

serve: .venv/.gguf
	python -m stages.serve --model $(MODEL) --port $(SERVE_PORT)

ui: .venv/.run
	@python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT)))' 2>/dev/null || \
		{ echo "port $(PORT) is in use: make ui PORT=$$(($(PORT) + 1))" >&2; exit 1; }
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --workers 1 --host 127.0.0.1 --port $(PORT) \
		--backend-store-uri sqlite:///mlflow.db

lint: .venv/.develop
	ruff check .
	mypy

audit: .venv/.audit
	@python .ci/audit.py
