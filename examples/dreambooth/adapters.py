# SPDX-License-Identifier: Apache-2.0
"""Adapters: their settings, adding them to a model, PEFT folders, and files for other tools."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoKrConfig, LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from peft_krona import KronAConfig
from peft_krona.errors import KronAError
from peft_krona.pipelines import load_krona_weights

from . import TrainingError

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")  # what can be trained, each in a folder of its name
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": r"to_out\.0"}
PREFIX = "base_model.model."  # what PEFT puts before module names in its files


def adapter_config(args: Any, part: str) -> PeftConfig:
    """The adapter's settings for "unet" or a text encoder.

    Raises:
        TrainingError: if a value is not allowed.
    """
    if part == "unet":
        targets = args.target_modules or UNET_TARGETS
    else:
        targets = args.text_encoder_target_modules or TEXT_TARGETS
    try:
        if args.adapter_type == "lora":
            return LoraConfig(
                r=args.rank, lora_alpha=args.alpha, target_modules=targets, lora_dropout=args.adapter_dropout,
                init_lora_weights="gaussian", use_dora=args.use_dora,
            )  # fmt: skip
        if args.adapter_type == "lokr":
            return LoKrConfig(
                r=args.rank, alpha=args.alpha, target_modules=targets, rank_dropout=args.adapter_dropout,
                module_dropout=args.module_dropout, decompose_factor=args.lokr_factor,
            )  # fmt: skip
        return KronAConfig(
            target_modules=targets, a_out=args.krona_a_out, a_in=args.krona_a_in, r=args.rank, alpha=args.alpha,
            scaling=args.scaling, layout=args.layout, init_weights=args.init_weights,
            krona_dropout=args.adapter_dropout, module_dropout=args.module_dropout,
            factor_pattern=factor_pattern(args) if part == "unet" else {}, strict_factors=args.strict_factors,
        )  # fmt: skip
    except KronAError as error:
        raise TrainingError(str(error)) from error


def factor_pattern(args: Any) -> dict[str, tuple[int, int]]:
    """Factors of q, k, v and o where they differ from the global ones."""
    pattern = {}
    for letter, module in PROJECTIONS.items():
        own = getattr(args, f"krona_unet_{letter}_a_out"), getattr(args, f"krona_unet_{letter}_a_in")
        if any(own):
            pattern[module] = own[0] or args.krona_a_out, own[1] or args.krona_a_in
    return pattern


def add_adapter(model: nn.Module, config: PeftConfig, part: str) -> None:
    """Add a fresh, trainable adapter named "default".

    Raises:
        TrainingError: if nothing in the model matches, or a layer does not suit.
    """
    try:
        model.add_adapter(config)
    except re.error as error:
        raise TrainingError(
            f"The target modules of the {part} are not a valid regular expression ({error}): correct "
            f"--{'' if part == 'unet' else 'text_encoder_'}target_modules, or give names such as to_q to_k."
        ) from error
    except (KronAError, ValueError) as error:
        raise TrainingError(f"The adapter does not fit the {part}: {error}") from error


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def save_adapters(
    parts: dict[str, nn.Module],
    folder: Path,
    metadata: dict[str, str],
    base_model: str,
    gathered: dict[str, torch.Tensor] | None = None,
) -> None:
    """One PEFT folder per model: adapter_config.json and adapter_model.safetensors, in fp32.

    `gathered`: the denoiser's whole state, where its parameters are spread over processes.
    """
    for number, (name, model) in enumerate(parts.items()):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        whole = None
        if gathered is not None:
            prefix = "unet." if name == "unet" else f"encoders.{number - 1}."
            whole = {k.removeprefix(prefix): v for k, v in gathered.items() if k.startswith(prefix)}
        state = get_peft_model_state_dict(model, state_dict=whole, adapter_name="default", save_embedding_layers=False)
        state = {f"{PREFIX}{k}": v.detach().float().cpu().contiguous().clone() for k, v in state.items()}
        save_file(state, target / "adapter_model.safetensors", metadata={"format": "pt", **metadata})
        config = model.peft_config["default"]
        inference, config.inference_mode = config.inference_mode, True
        # a local folder resolved, so that the adapter finds it from anywhere
        config.base_model_name_or_path = str(Path(base_model).resolve()) if os.path.isdir(base_model) else base_model
        config.save_pretrained(target)
        config.inference_mode = inference


def load_state(parts: dict[str, nn.Module], folder: Path) -> None:
    """Read saved weights into adapters that are there already.

    Raises:
        TrainingError: if a file is missing or its tensors are not the adapter's.
    """
    for name, model in parts.items():
        path = folder / name / "adapter_model.safetensors"
        if not path.is_file():
            raise TrainingError(f"{folder} has no {path.name} for the {name}: was it trained with other flags?")
        try:
            state = {k.removeprefix(PREFIX): v for k, v in load_file(path).items()}
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
        set_peft_model_state_dict(model, state, adapter_name="default")


def load_adapters(pipe: Any, folder: str | Path, adapter_name: str = "default", weight: float = 1.0) -> list[str]:
    """Load what `save_adapters` wrote (KronA: also what other tools wrote); returns the adapted components' names.

    Raises:
        TrainingError: if the folder has no adapter, or it does not fit the pipeline.
    """
    folder = Path(folder)
    found = sorted(p.parent.name for p in folder.glob("*/adapter_config.json")) if folder.is_dir() else []
    kinds = {PeftConfig.from_pretrained(folder / name).peft_type.value for name in found}
    try:
        if kinds <= {"KRONA"}:  # also what is no PEFT folder: a file, or an id on the Hub
            return load_krona_weights(pipe, str(folder), adapter_name=adapter_name, weight=weight)
        for name in found:
            model = getattr(pipe, name, None)
            if model is None:
                raise TrainingError(f"{folder / name}: the pipeline {type(pipe).__name__} has no component {name}.")
            model.add_adapter(PeftConfig.from_pretrained(folder / name), adapter_name=adapter_name)
            state = load_file(folder / name / "adapter_model.safetensors")
            set_peft_model_state_dict(
                model, {k.removeprefix(PREFIX): v for k, v in state.items()}, adapter_name=adapter_name
            )
            set_scale(model, adapter_name, weight)
    except (KronAError, OSError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{folder} could not be loaded into {type(pipe).__name__}: {error}") from error
    return found


def set_scale(model: nn.Module, adapter_name: str, weight: float) -> None:
    """Weight an adapter: 0 turns it off, 1 is as trained."""
    for module in model.modules():
        if hasattr(module, "set_scale") and hasattr(module, "scaling"):
            module.set_scale(adapter_name, weight)


def file_size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*/adapter_model.safetensors"))


def dtype_of(mixed_precision: str | None) -> torch.dtype:
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)
