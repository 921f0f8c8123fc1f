# SPDX-License-Identifier: Apache-2.0
"""`Format`: all that this package knows of one file format, as one record."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key

from ...choices import Layout
from ...errors import FormatError
from ..record import LayerUpdate

Parts = Mapping[str, torch.Tensor]  # one layer's tensors: {ending of the key: tensor}
SHARED_ENDINGS = ("alpha", "dora_scale")  # of several formats


class Factors(NamedTuple):
    """dW = scale * layout(sum_n A[n] (x) B[n]): A (r, a_out, a_in), B (r, b_out, b_in, *kernel)."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0
    layout: Layout = "kron"


@dataclass(frozen=True)
class Format:
    """One file format. Reading and export loop over `formats.FORMATS`, which holds one record for each.

    Attributes:
        name: in messages, and as `to` of `export`.
        endings: of the keys by which a layer is recognised: `<layer>.<ending>`.
        extras: endings that a layer of this format may have besides; `SHARED_ENDINGS` it always may.
        read: (layer's name in the file, its parts, the file's metadata) -> its factors, exactly.
        refuses: why a file of this format is not read, and what to do, where there is no `read`.
        claims: ({layer: parts} of a whole file) -> whether its layers with these endings are of this format. Needed
            where two formats share endings: it is asked in the order of `FORMATS`.
        check: what does not fit together in a file's layers raises here.
        write: (layers, dtype) -> the parts of each. dtype: of the weights.
        delta: (layer's name in the file, its parts, dtype) -> dW, straight from the format's definition. Its shape is
            (out, in, *kernel) or (out, in * prod(kernel)).
        kohya_network: `ss_network_module` and `ss_network_args` of such files.
        notes: (layers) -> what the user of a written file should know.
        peft_type: of PEFT's configs for this format; `read_peft`: (config, {module: parts}) -> {module: factors}.
        peft_endings: (required, optional) endings of the keys in PEFT's files.
    """

    name: str
    endings: tuple[str, ...]
    extras: tuple[str, ...] = ()
    read: Callable[[str, Parts, Mapping[str, str]], Factors] | None = None
    refuses: str = ""
    claims: Callable[[Mapping[str, Parts]], bool] | None = None
    check: Callable[[Sequence[LayerUpdate]], None] | None = None
    write: Callable[[Sequence[LayerUpdate], torch.dtype], list[dict[str, torch.Tensor]]] | None = None
    delta: Callable[[str, Parts, torch.dtype], torch.Tensor] | None = None
    kohya_network: tuple[str, dict[str, str]] = ("", {})
    notes: Callable[[Sequence[LayerUpdate]], tuple[str, ...]] | None = None
    peft_type: str = ""
    peft_endings: tuple[tuple[str, ...], tuple[str, ...]] = field(default=((), ()))
    read_peft: Callable[[Mapping[str, Any], Mapping[str, Parts]], dict[str, Factors]] | None = None


def scalar_alpha(name: str, alpha: torch.Tensor | None, rank: int, metadata: Mapping[str, str] | None = None) -> float:
    """The value of an `.alpha` tensor of any dtype and of shape (), (1,) or (1, 1).

    Where there is none: what the file's header says, as some trainers put it there only, else the rank.

    Raises:
        FormatError: if it is not one finite positive number.
    """
    if alpha is None:
        return float(rank) if metadata is None else header_alpha(name, metadata) or float(rank)
    value = float(alpha) if alpha.numel() == 1 else float("nan")
    if not 0 < value < float("inf"):
        shown = alpha.tolist() if alpha.numel() < 10 else f"a tensor of shape {tuple(alpha.shape)}"
        raise FormatError(
            f"'{name}.alpha' should be one positive number that is finite, as it scales this layer; got {shown}."
        )
    return value


def header_alpha(name: str, metadata: Mapping[str, str]) -> float | None:
    """The alpha that a file's header names for a layer: `<component>.lora_alpha`, `lora_alpha`, `network_alpha` or
    `ss_network_alpha`, or `lora_alpha` in a JSON table; None if there is none.

    Raises:
        FormatError: if it is no finite positive number.
    """
    component, _, module = name.partition(".")
    table = header_config(name, metadata)
    if table is not metadata and table.get("alpha_pattern"):
        return peft_setting(table, "lora_alpha", "alpha_pattern", module, "The header")
    for key in _alpha_names(component):
        value = table.get(key)
        if value not in _NOTHING:
            try:
                alpha = float(value)
            except (TypeError, ValueError):
                alpha = float("nan")
            if not 0 < alpha < float("inf"):
                raise FormatError(f"The header's {key} is {value!r}; expected a positive number.")
            return alpha
    return None


_NOTHING = (None, "None", "")


def _alpha_names(component: str) -> tuple[str, ...]:
    return f"{component}.lora_alpha", "lora_alpha", "network_alpha", "ss_network_alpha"


def header_config(name: str, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """The part of a file's header that names a layer's alpha: a JSON table of a LoRA's settings, or the header itself.

    Of several parts' tables in one ({"unet": {...}, "text_encoder": {...}}) it is that of the layer's component.
    """
    component = name.partition(".")[0]
    tables: list[Mapping[str, Any]] = [metadata]
    for text in metadata.values():
        if text.lstrip().startswith("{") and "lora_alpha" in text:
            try:
                table = json.loads(text)
            except (ValueError, RecursionError):
                continue  # some other text in braces
            if isinstance(table, dict):
                parts = {key: part for key, part in table.items() if isinstance(part, dict)}
                tables += [table, *([parts[component]] if component in parts else parts.values())]
    for key in _alpha_names(component):
        found = next((table for table in tables if table.get(key) not in _NOTHING), None)
        if found is not None:
            return found
    return metadata


def network_arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """`ss_network_args`, which kohya's tools and LyCORIS store as JSON; {} if there are none.

    Raises:
        FormatError: if they cannot be read.
    """
    try:
        arguments = json.loads(metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"The metadata's ss_network_args cannot be read, and with it the scale: {error}.") from error
    return arguments if isinstance(arguments, dict) else {}


def check_rank(config: Mapping[str, Any], module: str, *ranks: int) -> None:
    """That a layer's factors have the rank that the config of a PEFT folder gives it.

    Raises:
        FormatError: if not. PEFT does not load such a folder, and its scale would be a guess.
    """
    wanted = peft_setting(config, "r", "rank_pattern", module) if config.get("r") is not None else None
    other = next((rank for rank in ranks if wanted is not None and rank != wanted), None)
    if other is not None:
        raise FormatError(
            f"{module}: its factors have rank {other}, but the config gives this layer r={wanted}. Config and weights "
            "are not of the same adapter."
        )


def peft_setting(
    config: Mapping[str, Any], name: str, pattern_name: str, module: str, where: str = "adapter_config.json"
) -> float:
    """A layer's alpha or rank: the pattern's where a key of it matches, as PEFT matches it, else the config's.

    Raises:
        FormatError: if it is no positive number, or the pattern no table of valid expressions.
    """
    pattern = config.get(pattern_name) or {}
    if not isinstance(pattern, dict):
        raise FormatError(f"{where}: {pattern_name} is {pattern!r}; expected a table of layers.")
    try:
        value = pattern.get(get_pattern_key(list(pattern), module), config.get(name))
    except re.error as error:
        raise FormatError(f"{where}: {pattern_name} has a key that is no valid regex: {error}.") from error
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise FormatError(f"{module}: the config's {name} is {value!r}; expected a positive number.")
    return value
