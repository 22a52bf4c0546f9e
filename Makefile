# make train   set up, then train VGG by homotopy beside SGD on scanned digits (ARGS= are hta-train's flags)
# make test    set up, then run every test (ARGS= are pytest's)
# make bench   set up, then measure every speed that the README states (RESULTS= is the folder)
# make stress  set up, then kill, alter, fill up and mistype whatever can be, for some three minutes
# make gpu     on a machine with an NVIDIA GPU: check, measure and train, in four stages of nine minutes at most, with the
#              python3 and torch that are there; called again, it goes on (ARGS="--only check", ARGS=--rehearse: on the CPU)
# make clients set up one more environment, then train in Lightning, transformers and others (ARGS= are pytest's)
# make docs    the pages of docs/ and the API, into build/docs; a warning or a broken link fails
# make wheel   build dist/: an sdist, and a manylinux wheel without CUDA code; then test both in clean environments
#              (ARGS= are those of tests/wheel.py)
# make lint    the linter, the formatter's check and the type checker

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
CLIENTS := .venv-clients
RESULTS := runs/bench
PYTHON ?= python3

.PHONY: train test bench stress gpu clients docs wheel lint clean

train: $(READY)
	$(BIN)/hta-train $(ARGS)

# Two tests at a time, a thread each: two pools of threads on the same cores would slow each other down tenfold.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

bench: $(READY)
	for what in ops step copies formats memory scaling train concurrent distributed; do $(BIN)/hta-bench $$what --out $(RESULTS) $(ARGS) || exit 1; done
	$(BIN)/hta-bench report $(RESULTS)

stress: $(READY)
	$(BIN)/python tests/stress.py $(ARGS)

gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

clients: $(CLIENTS)/ready
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/pytest tests/clients $(ARGS)

# In .venv, since the generator imports the package and its torch: another environment would be another torch.
docs: $(VENV)/docs-ready
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/docs
	@echo build/docs/docs/index.html

$(VENV)/docs-ready: docs/requirements.txt $(READY)
	$(BIN)/python -m pip install -q -r docs/requirements.txt
	touch $@

# The wheel is built from the sdist. It finds torch's libraries loaded, and must not carry them.
wheel: $(READY)
	rm -rf dist build/dist
	HTA_CUDA=0 $(BIN)/python -m build --no-isolation --outdir build/dist
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so -w dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
	$(BIN)/python tests/wheel.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): requirements.txt setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# A wheel of what .venv has built.
$(CLIENTS)/ready: tests/clients/requirements.txt $(READY) $(wildcard hta_fused/*.py hta_fused/*/*.py)
	test -x $(CLIENTS)/bin/python || python3 -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install -q -r tests/clients/requirements.txt
	rm -rf build/clients build/lib*
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/clients .
	$(CLIENTS)/bin/python -m pip install -q --no-deps --force-reinstall build/clients/*.whl
	touch $@

clean:
	rm -rf $(VENV) $(CLIENTS) .venv-wheel build dist *.egg-info hta_fused/_C.so
