# make demo: both stages on data that it makes, about four minutes on two cores.   make test: the tests.
# make lint: ruff's rules and format, and mypy on the public API.   make constraints: the versions that passed, kept.
# make gpu: what a GPU does with this project, in at most nine minutes; make gpu SMOKE=1: the same, tiny, on the CPU.
# make test-oldest: the tests of what is timm's and open_clip's, with the oldest that setup.py admits.
# make test-faults: all that break runs, over and over: what docs/reliability.md counts. About 40 minutes.
PYTHON ?= python3
PY := .venv/bin/python
MADE := data/demo/hashtags.json
FAULTS := tests/test_lease.py $(shell grep -l mark.faults tests/test_*.py)

# No newer versions than passed the tests.   make setup CONSTRAINTS= takes the newest that setup.py admits.
CONSTRAINTS ?= tests/constraints.txt

.PHONY: setup demo test test-faults test-oldest lint constraints gpu

setup: .venv/ready

.venv/ready: setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "prepretrain needs Python 3.10 or newer; name one with: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "no venv module: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet --upgrade pip setuptools wheel
	$(PY) -m pip install --quiet --editable '.[test]' $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
	touch $@

# The sizes and seeds are benchmarks/demo_seeds.py's, too. Names of things are in 60 of 4,000 images; most
# chatter is not.
$(MADE): .venv/ready
	rm -rf data/demo
	$(PY) datasets/make_shards.py synthetic images=8000 size=40 seed=0 aside=0.125 --out data/demo/untagged
	$(PY) datasets/make_shards.py synthetic images=4000 size=40 seed=1 aside=0.125 --out data/demo/train
	$(PY) datasets/make_shards.py synthetic images=1000 size=40 seed=2 aside=0.125 --out data/demo/val
	$(PY) datasets/hashtags.py demo --min-count 60 --out $(MADE)

# Stage one, and what needs nothing of it beside it: one thread each, which two cores do faster than two threads.
demo: export OMP_NUM_THREADS = 1
demo: $(MADE)
	rm -rf runs/demo && mkdir -p runs/demo
	( $(PY) tools/launch.py --stage demo/mae length=1it optim.lr=0 optim.warmup=0it --out runs/demo/untrained && \
	  $(PY) tools/launch.py --stage demo/wsp --out runs/demo/wsp_scratch \
	) 2> runs/demo/beside.log & \
	$(PY) tools/launch.py --stage demo/mae && wait $$!
	$(PY) tools/launch.py --stage demo/wsp --init runs/demo/mae
	@$(PY) tools/report.py curves runs/demo/mae runs/demo/wsp_scratch runs/demo/wsp --out runs/demo/curves.png \
	  --names MAE "hashtags from scratch" "MAE, then hashtags"
	@$(PY) tools/report.py reconstructions runs/demo/mae --data demo:val --out runs/demo/reconstructions.png
	@$(PY) tools/report.py table runs/demo/untrained runs/demo/wsp_scratch runs/demo/mae runs/demo/wsp --chance \
	  --names untrained "hashtags from scratch" MAE "MAE, then hashtags" --out runs/demo/table.md
	@echo "(10-shot: ± over five draws of the images. With five seeds of the whole, from benchmarks/results:)"
	@$(PY) benchmarks/demo_seeds.py --show benchmarks/results/demo_seeds.json
	@echo "Loss curves: runs/demo/curves.png"
	@echo "Original, masked and reconstructed images: runs/demo/reconstructions.png"

test: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder -m "not faults"

test-faults: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -v --timeout 1200 $(FAULTS)

# The oldest timm and open_clip that setup.py admits, by the tests of what is theirs.
test-oldest: .venv/ready
	$(PY) -m pip install --quiet --no-deps --upgrade --target .venv/oldest \
	  $$(sed -n 's/.*"\(timm\|open_clip_torch\)>=\([0-9.]*\),.*/\1==\2/p' setup.py)
	PYTHONPATH=.venv/oldest OMP_NUM_THREADS=1 $(PY) -m pytest -q \
	  tests/test_foreign.py tests/test_golden.py tests/test_masked.py tests/test_text.py tests/test_zoo.py tests/test_finetune.py

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Without what torch itself pins, and without certificates and time zones, which must stay new.
constraints: .venv/ready
	sed -i '/^[^#]/d' tests/constraints.txt
	$(PY) -m pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton|certifi|tzdata)' | \
	  sed 's/==/<=/; s/+.*//' >> tests/constraints.txt

# The GPU's own python, where that has what is needed: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(PY)
gpu:
	COMMIT=$$(git rev-parse --short HEAD 2> /dev/null || echo unknown) PYTHONPATH=. \
	  $(GPU_PYTHON) benchmarks/gpu.py $(if $(SMOKE),--smoke) $(if $(REFERENCE),--reference $(REFERENCE)) $(if $(OUT),--out $(OUT))
