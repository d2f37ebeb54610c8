# Needs GNU make 3.81 or newer and Python 3.10 to 3.13; everything else is installed into $(VENV).
# make may empty $(VENV), and `make clean` removes it: do not set it to an environment of your own.

PYTHON ?= python3
VENV ?= .venv

sinusoid_flags = --datasource=sinusoid --logdir=logs/sine/ --metatrain_iterations=70000 --norm=None --update_batch_size=10
sinusoid_run = logs/sine/cls_5.mbs_25.ubs_10.numstep1.updatelr0.001nonorm

published = logs/published/cls_5.mbs_25.ubs_10.numstep1
published_omniglot = logs/published/cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm

.PHONY: help sinusoid figures docs test verify verify-bits clean

help:
	@echo 'make sinusoid     train and test the 10-shot sinusoid, and compare its errors with the original'
	@echo 'make figures      draw the figures of README.md and docs/, except those of docs/rl.md and a screenshot'
	@echo 'make docs         write the tables of README.md and docs/ from results/'
	@echo 'make test         lint and run all tests'
	@echo 'make verify       check what README.md says under "Why trust it", in a table'
	@echo 'make verify-bits  train each network for a few steps and compare its weights bit for bit with the record'
	@echo 'make clean        remove the environment and tool caches; keep runs and data'
	@echo
	@echo 'make PYTHON=python3.12 sinusoid  create $(VENV) with this Python'

sinusoid: $(VENV)/installed
	$(VENV)/bin/python main.py $(sinusoid_flags)
	$(VENV)/bin/python main.py $(sinusoid_flags) --train=False --test_set=True
	$(VENV)/bin/python experiments/compare_sinusoid.py $(sinusoid_run)/results.json

figures: $(VENV)/installed-dev
	$(VENV)/bin/python plot.py sinusoid MAML=$(published).updatelr0.01nonorm \
	  Pretrained=$(published).updatelr0.001nonorm.pretrain --update_lr=0.01 --task=10 --output=figures/sinusoid --dpi=110
	$(VENV)/bin/python plot.py updates MAML=results/sinusoid_maml.json \
	  Pretrained=results/sinusoid_pretrained.json --update_lr=0.001 --output=figures/sinusoid_updates --dpi=110
	$(VENV)/bin/python plot.py updates MAML=results/omniglot_5way_1shot.json \
	  'No convolutions'=results/omniglot_5way_1shot_fc.json --output=figures/omniglot_updates --dpi=110
	$(VENV)/bin/python plot.py training 'Sinusoid, 10-shot'=$(published).updatelr0.01nonorm \
	  'Omniglot, 5-way 1-shot'=$(published_omniglot) --output=figures/training --dpi=110
	test ! -d data/omniglot_resized/Greek || $(VENV)/bin/python plot.py task \
	  'Omniglot, 5-way 1-shot'=$(published_omniglot) --task=23 --output=figures/omniglot_task --dpi=110

docs:
	$(PYTHON) experiments/table.py

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m tach check
	$(VENV)/bin/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal

verify: $(VENV)/installed-dev
	$(VENV)/bin/python experiments/verify.py

verify-bits: $(VENV)/installed
	$(VENV)/bin/python experiments/verify_bits.py

# The stamps are written last, so an interrupted installation starts again from scratch.
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null || echo 'not installed'); \
	  echo "PYTHON=$(PYTHON): is $$found, but 3.10 to 3.13 is required; try make PYTHON=python3.12 ..." >&2; exit 1; }
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { \
	  echo "VENV=$(VENV): is not a virtual environment; move it away, or try make VENV=.venv2 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install -r requirements.txt
	touch $@

# For the same reason, both stamps are absent while the test tools are installed.
$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt requirements-plot.txt
	rm -f $(VENV)/installed
	$(VENV)/bin/python -m pip install -r requirements-dev.txt
	touch $(VENV)/installed $@

clean:
	test ! -f $(VENV)/pyvenv.cfg || rm -rf $(VENV)
	rm -rf .hypothesis .pytest_cache .ruff_cache
	find . -path ./logs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
