# SPDX-License-Identifier: Apache-2.0
"""Merge an adapter into the weights of a whole pipeline, folder to folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import FormatError, MergeError
from .names import to_module_name
from .record import AdapterFile
from .safetensors_io import new_folder, read_header
from .shapes import shapes_of_models
from .weight_files import variant_of, weight_files

_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def merge_into_models(models: dict[str, nn.Module], adapter: AdapterFile) -> None:
    """Add every dW to the weights of `models` ({component: model}), in float32 at least, rounded once.

    Raises:
        FormatError: names the layer that a model lacks, or whose size differs; no weight is changed then.
        MergeError: names the model that is quantized; no weight is changed then.
    """
    models = {name: model for name, model in models.items() if isinstance(model, nn.Module)}
    for name in adapter.components:
        weights = models[name].parameters() if name in models else ()
        packed = next((weight.dtype for weight in weights if not weight.is_floating_point()), None)
        if packed is not None:
            raise MergeError(_quantized(name, f"weights in {packed}"))
    for layer in adapter.fitted(shapes_of_models(models)):
        model = models[layer.component]
        known = {name for name, _ in model.named_modules()}
        module = model.get_submodule(to_module_name(layer.component, layer.module, known))
        weight = module.weight
        assert isinstance(weight, torch.Tensor)  # `fitted` knows layers with weights only
        dtype = torch.promote_types(weight.dtype, torch.float32)
        dW = layer.delta_weight(dtype).to(weight.device)
        with torch.no_grad():
            weight.copy_(weight.to(dtype) + (dW.T if isinstance(module, nn.Embedding) else dW))


def merge_pipeline(
    folder: str | os.PathLike, adapter: AdapterFile, out: str | os.PathLike, dtype: torch.dtype | None = None
) -> Path:
    """Write a copy of a diffusers pipeline with the adapter merged in. The copy needs nothing of this package.

    Args:
        folder: a pipeline's folder. adapter: to merge, scale included. out: a new folder. dtype: of the copy's weights;
            None keeps the one that each component is stored in. A folder with nothing but a variant ("fp16") is read
            as that.

    Raises:
        FormatError: if `folder` is no pipeline, the adapter does not fit it, or `out` exists. Nothing is left then.
        MergeError: names the weight that would be NaN or infinite, or a quantized model. Nothing is left then.
    """
    from diffusers import DiffusionPipeline

    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise FormatError(f"{folder}: expected the folder of a diffusers pipeline, with model_index.json.")
    _json_table(folder / "model_index.json")
    for name in adapter.components:
        method = _quantization_of(folder / name)
        if method is not None:
            raise MergeError(_quantized(f"{folder / name}", method))
    with new_folder(out) as new:
        variant = variant_of(folder)
        pipe = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype or _stored_dtypes(folder, variant), variant=variant, local_files_only=True
        )
        merge_into_models(pipe.components, adapter)
        _check_finite(pipe.components)
        pipe.save_pretrained(new)
    return Path(out)


def _quantization_of(component: Path) -> str | None:
    """How the model in a folder is quantized, None if it is not."""
    config = component / "config.json"
    found = _json_table(config).get("quantization_config") if config.is_file() else None
    return None if found is None else str(found.get("quant_method", "quantized") if isinstance(found, dict) else found)


def _json_table(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(found).__name__}.")
    return found


def _quantized(name: str, how: str) -> str:
    return (
        f"{name} is quantized ({how}), and an update cannot be added to packed weights: expected a model in float16, "
        "bfloat16 or float32. Merge into the model as it was before and quantize the result, or load the adapter "
        "beside the quantized one (load_krona_weights)."
    )


def _check_finite(components: dict[str, nn.Module]) -> None:
    """Refuse weights that the update, or the cast of the base's, took out of the dtype's range."""
    for component, model in components.items():
        for name, weight in model.named_parameters() if isinstance(model, nn.Module) else ():
            if not torch.isfinite(weight).all():
                raise MergeError(
                    f"{component}.{name}: the merged weight is NaN or infinite in {weight.dtype}; expected finite "
                    "numbers. Nothing was written. Use a smaller scale (AdapterFile.scaled), or dtype=torch.float32."
                )


def _stored_dtypes(folder: Path, variant: str | None) -> dict[str, torch.dtype]:
    """{component: dtype of its first floating-point weight} of those with safetensors, float32 for others."""
    dtypes = {"default": torch.float32}
    for component in (path for path in folder.iterdir() if path.is_dir()):
        headers = [read_header(path) for path in weight_files(component, variant)]
        stored = [_STORED[dtype] for header in headers for dtype, _ in header.values() if dtype in _STORED]
        dtypes |= {component.name: stored[0]} if stored else {}
    return dtypes
