# SPDX-License-Identifier: Apache-2.0
"""One file for ComfyUI, A1111 and other tools, through the package's converters."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from peft_krona.convert import BASES, base_of_folder, export, guess_base_and_why, names_need_base, read_adapter
from peft_krona.errors import FormatError


def remove_exports(output: Path) -> list[Path]:
    """Remove what `export_for_other_tools` wrote of earlier weights; other files are left alone."""
    stem = re.escape(output.resolve().name)
    removed = []
    for path in sorted(output.glob("*.safetensors")):
        if re.fullmatch(rf"{stem}(_term\d+of\d+)?\.safetensors", path.name) and path.is_file() and is_export(path):
            path.unlink()
            removed.append(path)
    return removed


def is_export(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return "krona.source" in (file.metadata() or {})
    except SafetensorError:  # no safetensors file, so none of ours: those are renamed when they are whole
        return False


def export_for_other_tools(output: Path, kind: str, base_model: str, say: Callable[[str], None]) -> list[str]:
    """Write the adapter in `output` in the format `kind` ("auto", "lokr", ..., "none"); returns the files written.

    `base_model`: folder or id of the pipeline that it was trained on. Of an id, the kind of Stable Diffusion that the
    files' names are for is guessed from the adapter, and said.

    A format that cannot hold the adapter, or a model whose names other tools do not know, is said, not raised: the
    adapter is saved already, and `python -m peft_krona convert` can be tried later.
    """
    if kind == "none":
        return []
    try:
        adapter = read_adapter(output)
        base = None
        if os.path.isdir(base_model):
            base = base_of_folder(base_model)
        elif names_need_base(adapter):
            name, why = guess_base_and_why(adapter)
            base = BASES[name]
            say(f"The files' names are those for {name}, guessed from {why}.")
        report = export(adapter, output / f"{output.resolve().name}.safetensors", to=kind, base_model=base)
    except FormatError as error:
        say(f"Not exported as {kind}: {error}")
        return []
    say(f"Exported for other tools:\n{report}")
    return [str(path) for path in report.files]
