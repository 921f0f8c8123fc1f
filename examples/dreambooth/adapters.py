# SPDX-License-Identifier: Apache-2.0
"""Adapters of a pipeline: added, saved and read through the package for KronA, through `lora` for PEFT's own kinds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from peft_krona import KronAConfig
from peft_krona.errors import KronAError
from peft_krona.pipelines import add_krona, load_krona_weights, save_krona_weights

from . import TrainingError, lora, sharded

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # each is trained in a folder of its name


def add(
    pipe: Any, config: PeftConfig, text_config: PeftConfig | None = None, text_encoders: Collection[str] = COMPONENTS
) -> dict[str, nn.Module]:
    """Add a fresh, trainable adapter named "default"; returns {component: adapted model}.

    Args:
        pipe: the pipeline. config: for its denoiser. text_config: for its text encoders; None: leave them alone.
        text_encoders: names of those that are adapted.

    Raises:
        TrainingError: if nothing in a model matches, or a layer does not suit.
    """
    wanted = (*COMPONENTS[:2], *(text_encoders if text_config is not None else ()))
    parts = {name: part for name, part in pipe.components.items() if name in wanted and part is not None}
    try:
        if isinstance(config, KronAConfig):
            return add_krona(SimpleNamespace(components=parts), config, text_encoder_config=text_config)
        return lora.add(parts, config, text_config)
    except (KronAError, ValueError) as error:
        raise TrainingError(f"The adapter does not fit the {', '.join(parts)}: {error}") from error


def save(
    pipe: Any,
    models: Mapping[str, nn.Module],
    folder: Path,
    base_model: str,
    metadata: Mapping[str, str],
    state_dicts: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
) -> None:
    """One PEFT folder per model: adapter_config.json and adapter_model.safetensors.

    `base_model`: what the configs name as their base. `state_dicts`: whole ones of models that are spread over
    processes.
    """
    for model in models.values():
        model.peft_config["default"].base_model_name_or_path = base_model
    if all(isinstance(model.peft_config["default"], KronAConfig) for model in models.values()):
        save_krona_weights(pipe, folder, metadata=metadata, state_dicts=state_dicts)
    else:
        lora.save(models, folder, metadata, state_dicts)


def load_state(models: Mapping[str, nn.Module], folder: Path) -> None:
    """Read saved weights into adapters that are there already (of any kind).

    Raises:
        TrainingError: if a file is missing or its tensors are not the adapter's.
    """
    for name, model in models.items():
        path = folder / name / "adapter_model.safetensors"
        if not path.is_file():
            raise TrainingError(f"{folder} has no {path.name} for the {name}: was it trained with other flags?")
        try:
            state = {k.removeprefix(lora.PREFIX): v for k, v in load_file(path).items()}
        except SafetensorError as error:
            raise TrainingError(f"{path} is damaged ({error}): resume from another checkpoint.") from error
        own = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
        wrong = [
            k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape
        ]
        if wrong:
            raise TrainingError(
                f"{path} does not fit the adapter that the flags describe ({len(wrong)} tensors, e.g. {min(wrong)}). "
                "Resume with the same adapter flags, or choose another --output_dir."
            )
        set_peft_model_state_dict(model, sharded.spread_like(own, state), adapter_name="default")


def load(pipe: Any, folder: str | Path, adapter_name: str = "default", weight: float = 1.0) -> list[str]:
    """Load what `save` wrote (KronA: also what other tools wrote); returns the adapted components' names.

    Raises:
        TrainingError: if the folder has no adapter, or it does not fit the pipeline.
    """
    try:
        if not lora.is_its_own(Path(folder)):  # also what is no PEFT folder: a file, or an id on the Hub
            return load_krona_weights(pipe, str(folder), adapter_name=adapter_name, weight=weight)
        return lora.load(pipe, Path(folder), adapter_name, weight)
    except (KronAError, OSError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{folder} could not be loaded into {type(pipe).__name__}: {error}") from error


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def file_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*/adapter_model.safetensors"))


def dtype_of(mixed_precision: str | None) -> torch.dtype:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)
