# Two commands: `make demo` and `make test`. Both set the machine up first, and are quick the second time.
.DEFAULT_GOAL := help
FCMAE := .venv/bin/fcmae
RUN ?= runs/demo
NPROC ?= 2
ARCHIVE ?=
SHORT ?=
# Two more than there are cores: tests wait for processes most of the time.
WORKERS ?= $(shell expr $$(nproc) + 2)
PYTEST = .venv/bin/python -m pytest
# What failed beside other tests (exit code 1) runs once more alone: on a busy machine a test may miss the moment that it
# waits for. What fails twice is a fault; the first of them ends it. Both results are printed.
RUN_TESTS = set -f; $(PYTEST) -n $(WORKERS) -m "$(1)" $(2) || { [ $$? = 1 ] && echo "Once more, alone:" && \
  $(PYTEST) -v -x -m "$(1)" --last-failed --last-failed-no-failures none; }

help:  ## these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## Debian packages, .venv, pinned Python packages
	@./tools/setup/setup.sh

demo: demo-data  ## the whole chain on 60,000 real photographs, to its accuracy (seven minutes on 2 cores)
	$(FCMAE) run recipes/demo.yaml --out $(RUN) --nproc $(NPROC)

demo-scratch: demo-data  ## the same fine-tuning without the pre-training, to compare
	$(FCMAE) run recipes/demo-scratch.yaml --out runs/demo-scratch --nproc $(NPROC)

demo-segmentation: demo-fcmae  ## classes of pixels in composed scenes, after FCMAE and from scratch; both mIoU (five minutes)
	for part in train test; do [ -e runs/data/scenes-$$part.beton ] || \
	  $(FCMAE) prepare maps runs/data/scenes/$$part runs/data/scenes-$$part.beton || exit 1; done
	$(MAKE) -j2 arm-demo-segmentation arm-demo-segmentation-scratch
	for run in demo-segmentation demo-segmentation-scratch; do echo "$$run:"; $(FCMAE) status runs/$$run || exit 1; done

demo-detection: demo-fcmae  ## boxes and masks of the objects in these scenes, after FCMAE and from scratch; both AP
	for part in train test; do [ -e runs/data/objects-$$part.beton ] || $(FCMAE) prepare coco \
	  runs/data/scenes/$$part/images runs/data/scenes/$$part/annotations.json runs/data/objects-$$part.beton || exit 1; done
	$(MAKE) -j2 arm-demo-detection arm-demo-detection-scratch
	for run in demo-detection demo-detection-scratch; do echo "$$run:"; $(FCMAE) status runs/$$run || exit 1; done

demo-fcmae: demo-data  ## FCMAE on these photographs, once for the demos of segmentation and detection
	$(FCMAE) prepare cifar10-scenes runs/data/scenes $(if $(ARCHIVE),--archive $(ARCHIVE))
	$(FCMAE) run recipes/demo-fcmae.yaml --out runs/demo-fcmae --nproc $(NPROC)

# An arm of a comparison. Two side by side, each on half of the processes, end sooner than one after the other, because
# ranks wait for each other. Any number of processes trains the same, but for rounding. Each has one thread: more than
# there are cores would wait for each other too.
arm-%:
	OMP_NUM_THREADS=1 $(FCMAE) run recipes/$*.yaml --out runs/$* --nproc $(shell expr \( $(NPROC) + 1 \) / 2)

demo-slurm: demo-data  ## run the demo on a private Slurm, preempt it, kill a node, compare the bits (SHORT=1: fewer steps)
	.venv/bin/python -m tests.chaos.slurm_demo recipes/demo.yaml --out $(RUN)-slurm$(if $(SHORT),-short) \
	  --reference $(RUN)$(if $(SHORT),-short) $(if $(SHORT),--short)

demo-data: setup
	$(FCMAE) prepare cifar10 runs/data $(if $(ARCHIVE),--archive $(ARCHIVE))

test: setup  ## the test suite, real Slurm included
	@$(call RUN_TESTS,not slow)

test-ci: setup  ## the slow tests that a change must pass: those in tests/slow_in_ci.txt
	@$(call RUN_TESTS,slow,$$(grep '^tests/' tests/slow_in_ci.txt))

test-slow: setup  ## all slow tests, minutes each (more than an hour on 2 cores)
	@$(call RUN_TESTS,slow)

lint: setup  ## style and formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove .venv and caches; runs stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find pipeline cluster recipes tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup demo demo-scratch demo-segmentation demo-detection demo-fcmae demo-slurm demo-data test test-ci test-slow lint clean
