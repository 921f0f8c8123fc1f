# SPDX-License-Identifier: Apache-2.0
"""The version: the only place. pyproject.toml and `peft_krona.__version__` take it from here."""

__version__ = "0.1.0"
