# SPDX-License-Identifier: Apache-2.0
"""One `KronAConfig` for layers that differ: the most frequent settings, and patterns for the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch

from ..choices import Layout
from ..config import PEFT_PREFIX, KronAConfig
from ..errors import FormatError
from .names import to_module_name


class _Layer(Protocol):
    """What is needed of a `record.LayerUpdate`."""

    @property
    def module(self) -> str: ...

    @property
    def A(self) -> torch.Tensor: ...

    @property
    def B(self) -> torch.Tensor: ...

    @property
    def scale(self) -> float: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def r(self) -> int: ...

    @property
    def factors(self) -> tuple[int, int]: ...


def config_of(
    component: str, layers: Sequence[_Layer], known: Collection[str] | None = None
) -> tuple[KronAConfig, dict[str, torch.Tensor]]:
    """A KronAConfig that gives these layers of one component their settings, and PEFT's state dict of their factors.

    Args:
        known: the model's own module names; without them, those of the installed transformers.

    Raises:
        FormatError: if two layouts are mixed.
    """
    layouts: list[Layout] = sorted({layer.layout for layer in layers})
    if len(layouts) > 1:
        raise FormatError(
            f"{component}: the layouts {layouts} are mixed, and a KronAConfig holds one. Split the adapter by layout."
        )
    names = [to_module_name(component, layer.module, known) for layer in layers]
    r, rank_pattern = _default_and_pattern(names, [layer.r for layer in layers])
    alpha, alpha_pattern = _default_and_pattern(names, [float(layer.scale) for layer in layers])
    (a_out, a_in), factor_pattern = _default_and_pattern(names, [layer.factors for layer in layers])
    # PEFT also matches a listed name as the end of a longer one: short names go into a regex, which has to fit whole.
    short = any(name.count(".") < 2 for name in names)
    config = KronAConfig(
        target_modules="|".join(map(re.escape, names)) if short else names,
        a_out=a_out,
        a_in=a_in,
        r=r,
        alpha=alpha,
        scaling="alpha",
        layout=layouts[0],
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        factor_pattern=factor_pattern,
        strict_factors=True,
        inference_mode=True,
    )
    state_dict = {}
    for name, layer in zip(names, layers, strict=True):
        state_dict[f"{PEFT_PREFIX}{name}.krona_A"] = layer.A
        state_dict[f"{PEFT_PREFIX}{name}.krona_B"] = layer.B
    return config, state_dict


def _default_and_pattern(names: list[str], values: list[Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and {pattern key: value} of the layers that have another.

    A key is the end of a name ("to_k", "attn2.to_k") where all layers of that end have that value, else one whole name:
    the config stays short to read, and fast, as PEFT tries every key on every layer.

    >>> _default_and_pattern(["x.a.q", "x.a.k", "y.a.q", "y.a.k", "y.b.q"], [1, 2, 1, 2, 3])
    (1, {'k': 2, 'b\\\\.q': 3})
    """
    default = Counter(values).most_common(1)[0][0]
    found: dict[str, set[Any]] = {}
    for name, value in zip(names, values, strict=True):
        for end in _ends(name):
            found.setdefault(end, set()).add(value)
    pattern = {}
    for name, value in zip(names, values, strict=True):
        if value != default:
            short = next((end for end in _ends(name) if len(found[end]) == 1), None)
            pattern[f"^{re.escape(name)}" if short is None else re.escape(short)] = value
    return default, pattern


def _ends(name: str) -> list[str]:
    """The last one and two parts of a dotted name; a number goes with what is before it ("to_out.0").

    >>> _ends("mid_block.attn1.to_out.0")
    ['to_out.0', 'attn1.to_out.0']
    """
    parts = re.findall(r"[^.]*[^.\d][^.]*(?:\.\d+)*", name) or [name]
    return [".".join(parts[-n:]) for n in (1, 2)]
