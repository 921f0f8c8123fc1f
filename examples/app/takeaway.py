# SPDX-License-Identifier: Apache-2.0
"""What was learned, as a table and a picture; and the file that another program reads, with advice which one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from examples.dreambooth import TrainingError
from peft_krona.convert import read_adapter
from peft_krona.errors import KronAError
from peft_krona.inspection import inspect_adapter, plot, table

# program: (format, what to do with the file)
TOOLS = {
    "ComfyUI": ("auto", "Put the file into ComfyUI/models/loras and load it with the node «Load LoRA»."),
    "A1111, Forge, SD.Next": ("auto", "Put the file into models/Lora and write <lora:NAME:1> in the prompt."),
    "diffusers, without peft-krona": ("lora", "pipe.load_lora_weights(FILE): an exact LoRA, larger than the others."),
    "diffusers or PEFT, with peft-krona": ("peft", "load_krona_weights(pipe, FOLDER), or PeftModel.from_pretrained."),
    "LyCORIS": ("lora", "create_lycoris_from_weights(1.0, FILE, unet); its LoKr takes other factors than ours."),
}


def learned(folder: Path, pipeline: str, picture: Path) -> str:
    """Write the picture of what the adapter changes; returns the table of it.

    Raises:
        TrainingError: if the adapter cannot be read.
    """
    try:
        stats = inspect_adapter(read_adapter(folder), pipeline)
        plot(stats, picture, folder.name)
        return table(stats)
    except (KronAError, OSError) as error:
        raise TrainingError(f"{folder}: {error}") from error


def export(folder: Path, pipeline: str, tool: str, to: Path) -> tuple[list[Path], str]:
    """Write the file for `tool` beside `to`; returns the files and what to do with them.

    Raises:
        TrainingError: with the converter's reason.
    """
    form, advice = TOOLS[tool]
    if form == "peft":
        return sorted(folder.glob("*/adapter_*")), f"The adapter's own folder, {folder}. {advice}"
    command = [sys.executable, "-m", "peft_krona", "convert", str(folder), str(to), "--to", form, "--base", pipeline]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise TrainingError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "The export failed.")
    return sorted(to.parent.glob(f"{to.stem}*.safetensors")), f"{advice}\n\n{done.stdout.strip()}"
