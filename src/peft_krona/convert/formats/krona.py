# SPDX-License-Identifier: Apache-2.0
"""KronA's own weights, as PEFT saves them: `<module>.krona_A` and `.krona_B`, with a `KronAConfig` beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from ...config import KronAConfig, scaling_factor
from ...errors import ConfigError, FormatError
from ...factors import choose_factors
from ..record import AdapterFile
from .format import Factors, Format, Parts

_ENDINGS = ("krona_A", "krona_B")


def config_from_json(config: Mapping[str, Any]) -> KronAConfig:
    """The `KronAConfig` in the content of an `adapter_config.json`; entries of other versions are left aside, as in
    PEFT.

    Raises:
        ConfigError: if a value is not allowed. FormatError: if PEFT's own checks refuse it.
    """
    known = {field.name for field in fields(KronAConfig)}
    try:
        return KronAConfig(**{key: value for key, value in config.items() if key in known})
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # PEFT's own checks
        raise FormatError(f"adapter_config.json: {error}") from error


def _read_peft(config: Mapping[str, Any], groups: Mapping[str, Parts]) -> dict[str, Factors]:
    """Factors as they are, with the scale that the config gives each layer.

    Raises:
        FormatError: names the layer whose factors are not the config's.
    """
    settings = config_from_json(config)
    factors = {}
    for module, parts in groups.items():
        A, B = parts["krona_A"], parts["krona_B"]
        if A.dim() != 3 or B.dim() < 3:
            raise FormatError(
                f"{module}: expected krona_A (r, a_out, a_in) and krona_B (r, b_out, b_in, *kernel), got "
                f"{tuple(A.shape)} and {tuple(B.shape)}."
            )
        own = settings.for_layer(module)
        n_out, n_in = A.shape[1] * B.shape[1], A.shape[2] * B.shape[2]
        wanted = (own.r, *choose_factors(n_out, n_in, *own.factors))
        if tuple(A.shape) != wanted:
            raise FormatError(
                f"{module}: krona_A has shape {tuple(A.shape)}, but the config gives this layer (r, a_out, a_in) = "
                f"{wanted}. Config and weights are not of the same adapter."
            )
        scale = scaling_factor(settings.scaling, own.alpha, own.r, A.shape[2])
        factors[module] = Factors(A, B, scale, settings.layout)
    return factors


def to_peft(
    adapter: AdapterFile, models: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None
) -> dict[str, tuple[KronAConfig, dict[str, torch.Tensor]]]:
    """{component: (config, state dict)} as `Adapter.peft_components`, weights in `dtype` (None: as they are)."""
    components = adapter.peft_components(models)
    for component, (config, state_dict) in components.items():
        config.base_model_name_or_path = adapter.metadata.get("base_model")
        components[component] = config, {key: t if dtype is None else t.to(dtype) for key, t in state_dict.items()}
    return components


KRONA = Format(
    name="krona",
    endings=_ENDINGS,
    refuses="has no config, without which layout and scale are unknown. Read the folder with "
    "adapter_config.json, not the weights alone",
    peft_type="KRONA",
    peft_endings=(_ENDINGS, ()),
    read_peft=_read_peft,
)
