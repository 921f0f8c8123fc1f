# SPDX-License-Identifier: Apache-2.0
"""The run without arguments: a shipped subject on the shipped pipeline, judged and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import TrainingError

ASSETS = Path(__file__).resolve().parents[1] / "assets"
DEFAULT_SUBJECT = "teapot"


def settings(subject: str) -> dict[str, Any]:
    """The defaults that --demo sets."""
    subjects = json.loads((ASSETS / "subjects" / "subjects.json").read_text())
    if subject not in subjects:
        raise TrainingError(f"--demo {subject!r}: the shipped subjects are {', '.join(subjects)}.")
    return {
        "pretrained_model_name_or_path": str(ASSETS / "emoji-sd"),
        "instance_data_dir": str(ASSETS / "subjects" / subject),
        "instance_prompt": f"a sks {subjects[subject]['class_noun']}",
        "output_dir": f"output/demo-{subject}",
        "overwrite_output_dir": True,
        "max_train_steps": 300,
        "cache_latents": True,
        "center_crop": True,
        "export": "none",
    }


def judge_and_show(args: Any) -> None:
    raise NotImplementedError
