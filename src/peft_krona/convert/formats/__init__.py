# SPDX-License-Identifier: Apache-2.0
"""One file per format, and the table of them. A new format is a file with a `Format`, and its name here."""

from __future__ import annotations

from .diff import DIFF
from .diffusekrona import DIFFUSEKRONA
from .format import SHARED_ENDINGS, Factors, Format, Parts
from .krona import KRONA
from .loha import LOHA
from .lokr import LOKR
from .lora import LORA

# In the order in which they are asked whether a layer is theirs, and in which `export` names them.
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        KRONA,
        DIFFUSEKRONA,
        LOKR,
        LOHA,
        LORA,
        DIFF,
    )
}

__all__ = ["FORMATS", "SHARED_ENDINGS", "Factors", "Format", "Parts"]
