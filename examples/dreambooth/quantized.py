# SPDX-License-Identifier: Apache-2.0
"""`--bnb_quantization_config_path`: frozen models in bitsandbytes' 4 or 8 bits, as diffusers' scripts take them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig as TextConfig
from transformers.utils import is_bitsandbytes_available

from . import TrainingError

FLAG = "--bnb_quantization_config_path"


def read_settings(path: str) -> dict[str, Any]:
    """The JSON file's settings, those of `BitsAndBytesConfig`.

    Raises:
        TrainingError: names the file and what is wrong in it.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{FLAG} {path} cannot be read ({error}): expected a JSON file.") from error
    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    if not isinstance(settings, dict):
        raise TrainingError(f'{FLAG} {path}: expected a table such as {{"load_in_4bit": true}}.')
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise TrainingError(f"{FLAG} {path}: {unknown[0]!r} is no setting; expected some of {', '.join(known)}.")
    if bool(settings.get("load_in_4bit")) == bool(settings.get("load_in_8bit")):
        raise TrainingError(f"{FLAG} {path}: expected one of load_in_4bit and load_in_8bit to be true.")
    return settings


def for_pipelines(
    path: str | None, text_encoders_too: bool, dtype: torch.dtype, device: torch.device
) -> Callable[[str, Iterable[str]], PipelineQuantizationConfig] | None:
    """(denoiser, text encoders) -> what `DiffusionPipeline.from_pretrained` takes to load them in a few bits.

    `path`: the settings; None: nothing is quantized. `dtype`: what the models compute in.

    Raises:
        TrainingError: if the file is wrong, or this machine cannot do it.
    """
    if path is None:
        return None
    settings = read_settings(path)
    if not is_bitsandbytes_available():
        raise TrainingError(f"{FLAG} needs a package that is missing: pip install bitsandbytes")
    if device.type == "cpu":
        raise TrainingError(
            f"{FLAG} needs a GPU, and this run is on the CPU: diffusers loads bitsandbytes' models on a GPU only. Drop "
            "the flag, or run where there is one."
        )
    if settings.get("load_in_4bit"):
        settings["bnb_4bit_compute_dtype"] = dtype
    try:
        own, text = BitsAndBytesConfig(**settings), TextConfig(**settings)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"{FLAG} {path}: {error}.") from error

    def of(denoiser: str, encoders: Iterable[str]) -> PipelineQuantizationConfig:
        return PipelineQuantizationConfig(
            quant_mapping={denoiser: own} | dict.fromkeys(encoders if text_encoders_too else (), text)
        )

    return of


def is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def prepare(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Frozen, on `device`, in `dtype`; a quantized one stays where and what it is, with its norms in float32."""
    model.requires_grad_(False)
    if is_quantized(model):
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model.to(device, dtype=dtype)
