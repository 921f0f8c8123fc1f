# SPDX-License-Identifier: Apache-2.0
"""PEFT's own LoRA and LoKr, to compare with: what the package's pipeline functions are for KronA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from . import TrainingError

PREFIX = "base_model.model."  # what PEFT puts before module names in its files


def add(models: dict[str, nn.Module], config: PeftConfig, text_config: PeftConfig | None) -> dict[str, nn.Module]:
    """Add the adapter "default" to models by component: a denoiser and, with `text_config`, text encoders."""
    for name, model in models.items():
        model.add_adapter(text_config if name.startswith("text_encoder") else config)
    return models


def save(
    models: Mapping[str, nn.Module],
    folder: Path,
    metadata: Mapping[str, str],
    state_dicts: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """One PEFT folder per model, in `folder` (which nobody reads before it is whole)."""
    for name, model in models.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        whole = (state_dicts or {}).get(name)
        state = get_peft_model_state_dict(model, state_dict=whole, adapter_name="default", save_embedding_layers=False)
        state = {f"{PREFIX}{k}": v.detach().float().cpu().contiguous().clone() for k, v in state.items()}
        save_file(state, folder / name / "adapter_model.safetensors", metadata={"format": "pt", **metadata})
        config = model.peft_config["default"]
        inference, config.inference_mode = config.inference_mode, True
        config.save_pretrained(folder / name)
        config.inference_mode = inference


def is_its_own(folder: Path) -> bool:
    """Whether the folder holds an adapter per component, and one that is not KronA."""
    configs = folder.glob("*/adapter_config.json") if folder.is_dir() else ()
    return any(PeftConfig.from_pretrained(file.parent).peft_type.value != "KRONA" for file in configs)


def load(pipe: Any, folder: Path, adapter_name: str, weight: float) -> list[str]:
    """Load what `save` wrote, at a strength of `weight`; returns the components' names."""
    found = sorted(file.parent.name for file in folder.glob("*/adapter_config.json"))
    for name in found:
        model = getattr(pipe, name, None)
        if model is None:
            raise TrainingError(f"{folder / name}: the pipeline {type(pipe).__name__} has no component {name}.")
        model.add_adapter(PeftConfig.from_pretrained(folder / name), adapter_name=adapter_name)
        state = load_file(folder / name / "adapter_model.safetensors")
        state = {k.removeprefix(PREFIX): v for k, v in state.items()}
        set_peft_model_state_dict(model, state, adapter_name=adapter_name)
        for module in model.modules():
            if hasattr(module, "set_scale") and hasattr(module, "scaling"):
                module.set_scale(adapter_name, weight)
    return found
