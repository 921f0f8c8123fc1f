# SPDX-License-Identifier: Apache-2.0
"""The shapes of a base model's layers: {component: {module: (out, in, *kernel)}}."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import nn

from ..errors import FormatError
from .names import is_embedding, to_file_name
from .safetensors_io import read_header
from .weight_files import parts_of, variant_of, weight_files


def shapes_of_models(models: Mapping[str, nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    """{component: {module: (out, in, *kernel)}} of the layers of a pipeline's parts that can be adapted.

    An embedding counts as (embedding_dim, num_embeddings), and the input of a grouped convolution as that of one group.

    >>> shapes_of_models({"unet": nn.Sequential(nn.Linear(3, 5))})
    {'unet': {'0': (5, 3)}}
    """
    return {
        component: {
            to_file_name(component, name.removesuffix(".base_layer")): shape
            for name, module in model.named_modules()
            if (shape := _shape_of(module)) is not None
        }
        for component, model in models.items()
    }


def _shape_of(module: nn.Module) -> tuple[int, ...] | None:
    """(out, in, *kernel), not from the weight itself: a quantized one is packed."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    return None


def shapes_of_folder(folder: str | os.PathLike) -> dict[str, dict[str, tuple[int, ...]]]:
    """{component: {module: weight shape}} of a pipeline's folder, or one model's, from its safetensors files' headers.

    Raises:
        FormatError: if there are no safetensors weights in it.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    variant = variant_of(folder)
    files = ((name, path) for name, part in parts_of(folder).items() for path in weight_files(part, variant))
    for component, path in files:
        for key, (_, shape) in read_header(path).items():
            if key.endswith(".weight") and len(shape) > 1:
                module = to_file_name(component, key.removesuffix(".weight"))
                # An embedding's table is stored transposed: (num_embeddings, embedding_dim).
                shapes.setdefault(component, {})[module] = shape[::-1] if is_embedding(module) else shape
    if not shapes:
        raise FormatError(f"{folder}: there are no safetensors weights in it.")
    return shapes
