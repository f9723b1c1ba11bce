# Two commands for a new user: `make demo` and `make test`. Needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PRESET ?= digits-vit
# torch is named in the same pip command as the rest: an open range would pull gigabytes of CUDA packages.
PIN := -c constraints.txt torch==2.13.0

.PHONY: demo cards test lint types slow gpu clean

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIN) -e ".[demo]"
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIN) -e ".[dev]"
	touch $@ $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp
	$(RUN) recipes/pipeline.py recipes/$(PRESET)/pipeline.yaml

# The cards in model_cards/ are those of the demo's models; finished stages of the demo are not run again.
cards: demo
	$(RUN) recipes/cards.py --output model_cards/digits-vit \
		--model_paths runs/digits-vit/condition_number runs/digits-vit/closed_form_adversary

test: $(VENV)/dev.stamp
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

slow: $(VENV)/dev.stamp
	$(RUN) -m pytest -m slow

gpu: $(VENV)/dev.stamp
	$(RUN) -m pytest -m gpu

clean:
	rm -rf runs .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist *.egg-info
