# SPDX-License-Identifier: Apache-2.0
"""Grouping the flat keys of a file by layer, with clear errors for missing halves and foreign keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ..errors import FormatError


def group_by_layer(
    tensors: Mapping[str, torch.Tensor], required: Collection[str], optional: Collection[str] = ()
) -> dict[str, dict[str, torch.Tensor]]:
    """{layer: {ending: tensor}} for keys `<layer>.<ending>`.

    Args:
        required: endings that every layer must have. optional: endings that it may have.

    Raises:
        FormatError: names a key with another ending, or the layer that lacks a required one.

    >>> group_by_layer({"a.b.up": torch.zeros(1), "a.b.down": torch.ones(1)}, ("up", "down")).keys()
    dict_keys(['a.b'])
    """
    endings = sorted((*required, *optional), key=len, reverse=True)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((e for e in endings if key.endswith(f".{e}") and len(key) > len(e) + 1), None)
        if ending is None:
            raise FormatError(
                f"The key '{key}' does not belong here: expected keys that end in {', '.join(endings)}. "
                "Is the file of another format, or of several mixed?"
            )
        layers.setdefault(key[: -len(ending) - 1], {})[ending] = tensor
    for layer, parts in layers.items():
        missing = [ending for ending in required if ending not in parts]
        if missing:
            raise FormatError(
                f"The layer '{layer}' has {', '.join(sorted(parts))} but not {', '.join(missing)}: "
                "half of it is missing. The file is incomplete."
            )
    return layers
