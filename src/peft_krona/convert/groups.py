# SPDX-License-Identifier: Apache-2.0
"""Grouping the flat keys of a file by layer, with clear errors for missing halves and foreign keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ..errors import FormatError


def group_by_layer(tensors: Mapping[str, torch.Tensor], endings: Collection[str]) -> dict[str, dict[str, torch.Tensor]]:
    """{layer: {ending: tensor}} for keys `<layer>.<ending>`; the longest ending counts.

    Raises:
        FormatError: names a key with another ending.

    >>> group_by_layer({"a.b.up": torch.zeros(1), "a.b.down": torch.ones(1)}, ("up", "down")).keys()
    dict_keys(['a.b'])
    """
    endings = sorted(endings, key=len, reverse=True)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((e for e in endings if key.endswith(f".{e}") and len(key) > len(e) + 1), None)
        if ending is None:
            raise FormatError(
                f"The key '{key}' does not belong here: expected keys that end in {', '.join(endings)}. "
                "Is the file of another format, or of several mixed?"
            )
        layers.setdefault(key[: -len(ending) - 1], {})[ending] = tensor
    return layers


def complete(layer: str, parts: Mapping[str, torch.Tensor], required: Collection[str]) -> list[torch.Tensor]:
    """The required tensors of a layer, in that order.

    Raises:
        FormatError: names the layer and what it lacks.
    """
    missing = [ending for ending in required if ending not in parts]
    if missing:
        raise FormatError(
            f"The layer '{layer}' has {', '.join(sorted(parts))} but not {', '.join(missing)}: "
            "half of it is missing. The file is incomplete."
        )
    return [parts[ending] for ending in required]
