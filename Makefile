# make demo   train a small ReLoRA model on Python's own sources, 80 seconds on 2 fast cores after installing
# make test   run every test
# make study  what each part of ReLoRA brings: 8 arms, 5 seeds, with intervals; under an hour on 2 cores
# make course run every block of docs/course, small; SCALE=full: as a student does, and its figures are drawn anew
# make soak   kill a run 30 times at random moments; it must end as if nothing had been
# make versions  the fast part of the tests with other versions of Python, torch and numpy; gigabytes to download
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test study course soak versions clean

demo: .venv/.installed
	$(BIN)/python shards.py stdlib --out corpora/stdlib
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$$($(BIN)/python -c "import torch; print(min(2, torch.cuda.device_count() or 2))") \
		train.py config/demo.yaml
	$(BIN)/python sample.py runs/demo --prompt "def " --prompt "import " --tokens 120
	@echo
	@echo "runs/demo, with the last of its checkpoints opened:"
	@find runs/demo -name '.?*' -prune -o \( -path '*/step_*' -a ! -path '*/step_750*' -a ! -name '*.json' \) -prune -print -o -print \
		| sort | sed -e 's;[^/]*/;   ;g'
	@echo
	@echo "Next, try:"
	@echo "   $(BIN)/python sample.py runs/demo --prompt 'class ' --temperature 0.5"
	@echo "   $(BIN)/python train.py config/pico-relora-1m.yaml       # a longer run, about 1M parameters"
	@echo "   less runs/demo/metrics.jsonl                            # the record of the run"

study: .venv/.installed
	test -d corpora/stdlib || $(BIN)/python shards.py stdlib --out corpora/stdlib
	$(BIN)/python study.py config/studies/ablation.yaml

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2

SCALE ?= quick
course: .venv/.installed-dev
	SCALE=$(SCALE) $(BIN)/python -m pytest -n 2 docs tests/test_course.py

soak: .venv/.installed-dev
	$(BIN)/python tests/soak.py --kills 30

versions: .venv/.installed-dev
	$(BIN)/python tests/versions.py

clean:
	rm -rf corpora/stdlib runs/demo

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	@touch $@

.venv/.installed-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch .venv/.installed $@
