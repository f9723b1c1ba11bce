# Two commands for a new user: `make demo` and `make test`. Needs Python >= 3.11 and make, nothing else.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PRESET ?= digits-vit
# torch is named in the same pip command as the rest: an open range would pull gigabytes of CUDA packages.
PIN := -c constraints.txt torch==2.13.0

# Kernels that this machine would not choose: no vector units, and in MKL's place of its own ones those for processors it
# does not know, which AMD's get. Their sums take another order, and one that depends on where a matrix lies in memory.
OTHER_KERNELS := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
OTHER_KERNELS += OPENBLAS_CORETYPE=Nehalem
NUMERICS := tests/linalg tests/test_regularizers.py tests/test_metrics.py tests/test_features.py tests/linear
NUMERICS += tests/attacks/test_attack_probes.py tests/attacks/diffusion/test_other_rounding.py
NUMERICS += tests/attacks/diffusion/test_diffusion_attacks.py tests/diffusion/test_published_pipeline.py
NUMERICS += tests/training/test_frozen.py tests/training/test_gradients.py tests/training/test_imma_lora.py
NUMERICS += tests/training/test_resume.py

.PHONY: demo cards newcomer docs notebooks release test test-kernels slow gpu clean

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIN) -e ".[demo]"
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIN) -e ".[dev]"
	touch $@ $(VENV)/demo.stamp

demo: $(VENV)/demo.stamp
	$(VENV)/bin/hf-immunize run recipes/$(PRESET)/run.yaml

# The cards in model_cards/ are those of the demo's models; finished stages of the demo are not run again.
cards: demo
	$(RUN) recipes/cards.py --output model_cards/digits-vit \
		--model_paths runs/digits-vit/condition_number runs/digits-vit/closed_form_adversary

$(VENV)/docs.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check $(PIN) -e ".[docs]"
	touch $@

# The site in build/site, strictly; the notebooks are executed first, in kernels of their own, and have to end well.
docs: $(VENV)/docs.stamp
	$(RUN) docs/tools/notebooks.py --check
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# The outputs that the notebooks of docs/ hold.
notebooks: $(VENV)/docs.stamp
	$(RUN) docs/tools/notebooks.py

# A newcomer's three commands on folders of images, with the built wheel in a new environment away from this clone; with
# a trained MobileNetV2 and photos where HF_IMMUNIZE_DATA or ../shared/data has them. Results come to runs/newcomer.
newcomer:
	$(PYTHON) .ci/clean_install.py

# Sdist and wheel in dist/, checked, and the main job with the wheel in a new environment.
release: $(VENV)/dev.stamp
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[release]"
	$(RUN) .ci/release.py $(if $(TAG),--tag $(TAG)) $(if $(REPOSITORY),--repository $(REPOSITORY))

test: $(VENV)/dev.stamp
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

# The numerics once more, as another processor rounds them (docs/method.md, section 8).
test-kernels: $(VENV)/dev.stamp
	$(OTHER_KERNELS) OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal $(NUMERICS)

slow: $(VENV)/dev.stamp
	$(RUN) -m pytest -m slow

gpu: $(VENV)/dev.stamp
	$(RUN) -m pytest -m gpu

clean:
	rm -rf runs .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist *.egg-info
