# `make test` and `make demo` do all set-up themselves: a virtual environment in .venv and everything that is needed.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: test test-numerics demo app study test-app docs lint clean

test: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(RUN) -m pytest -n auto --dist worksteal

# the tests of numbers with the instructions of other CPUs, nine times: half an hour
test-numerics: $(VENV)/.ready
	$(RUN) tests/numerics.py "" -n auto

demo: $(VENV)/.demo
	$(RUN) examples/dreambooth_kron.py

# the page: http://127.0.0.1:7860
app: $(VENV)/.app
	$(RUN) -m examples.app

# the page in a browser; Chromium comes from the system's packages where they are Debian's
test-app: $(VENV)/.ready $(VENV)/.app
	$(RUN) -m pip install --quiet -c constraints.txt playwright
	command -v chromium || command -v chromium-browser || command -v google-chrome || apt-get install -y chromium
	$(RUN) -m pytest tests/test_app.py tests/test_app_browser.py

# the site, in output/docs
docs: $(VENV)/.ready
	PYTHONPATH=src $(RUN) -m mkdocs build --strict

# `make study ARGS=--quick` says whether everything runs; the study itself takes hours and goes on where it was
study: $(VENV)/.ready
	$(RUN) -m examples.study $(ARGS)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m mypy
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(RUN)

# .demo has what the demo needs and no more, .ready what the tests and the checks need
$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,.[demo])

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call install,.[dev])

$(VENV)/.app: pyproject.toml constraints.txt
	$(call install,.[app])

define install
$(PYTHON) -m venv $(VENV)
$(RUN) -m pip install --quiet --upgrade pip
$(RUN) -m pip install --quiet -c constraints.txt -e '$(1)'
touch $@
endef

clean:
	rm -rf $(VENV) output .pytest_cache .ruff_cache .mypy_cache
