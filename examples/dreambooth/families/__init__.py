# SPDX-License-Identifier: Apache-2.0
"""The families of models that can be trained, one file each: every `Family` in this folder is one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import diffusers

from .. import TrainingError
from .base import Family


@lru_cache(maxsize=1)
def known() -> dict[str, type[Family]]:
    """{name of the pipeline's class: family}."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    families = [c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__]
    return {name: family for family in families if issubclass(family, Family) for name in family.pipelines}


def of(pipe: Any, *settings: Any) -> Family:
    """The family of a pipeline that `evaluate.load_pipeline` gave. `settings`: as `Family` takes them."""
    return known()[type(pipe).__name__](pipe, *settings)


def family_of(index: Mapping[str, Any], where: str) -> type[Family]:
    """The family of a pipeline, from its model_index.json, before anything large is read.

    Raises:
        TrainingError: if it is of no known family, of one that this version of diffusers does not have, or one of its
            components is missing.
    """
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) else name  # of a pipeline with code of its own: [module, class]
    family = known().get(name)
    if family is None:
        expected = "; ".join(f"{f.title} ({', '.join(f.pipelines)})" for f in dict.fromkeys(known().values()))
        raise TrainingError(
            f"{where} is a {name}: expected a text-to-image pipeline of one of the known families: {expected}. Choose "
            "such a pipeline, or add a family (examples/README.md)."
        )
    if not hasattr(diffusers, name):
        raise TrainingError(
            f"{where} is a {name}, which diffusers {diffusers.__version__} does not have: update diffusers."
        )
    missing = [part for part in family.components if not all(index.get(part) or (None,))]
    if missing:
        raise TrainingError(
            f"{where} is a {name} without {', '.join(missing)}: {family.title} needs {', '.join(family.components)}. "
            "Take a complete pipeline."
        )
    return family
