# SPDX-License-Identifier: Apache-2.0
"""One file for ComfyUI, A1111 and other tools, through the package's converters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn


def export(pipe: Any, trained: dict[str, nn.Module], output: Path, kind: str, args: Any, say: Callable) -> list[str]:
    """Write the file that --export asks for; returns the paths written."""
    return []
