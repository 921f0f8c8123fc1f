# `make test` and `make demo` do all set-up themselves: a virtual environment in .venv and everything that is needed.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: test demo lint clean

test: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(RUN) -m pytest -n auto --dist worksteal

demo: $(VENV)/.demo
	$(RUN) examples/dreambooth_kron.py

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# .demo has what the demo needs and no more, .ready what the tests and the checks need
$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,.[demo])

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call install,.[dev])

define install
$(PYTHON) -m venv $(VENV)
$(RUN) -m pip install --quiet --upgrade pip
$(RUN) -m pip install --quiet -c constraints.txt -e '$(1)'
touch $@
endef

clean:
	rm -rf $(VENV) output .pytest_cache .ruff_cache
