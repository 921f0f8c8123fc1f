# SPDX-License-Identifier: Apache-2.0
"""Names of layers as this package uses them: diffusers' dotted ones, for CLIP text encoders `text_model.encoder...`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import transformers

# -- text encoders -----------------------------------------------------------------------------------------------------

_CLIP_LAYER = re.compile(r"^(text_model\.)?(encoder\.layers\..*|embeddings\..*|final_layer_norm)$")
_CLIP_DROPS_TEXT_MODEL = int(transformers.__version__.split(".")[0]) >= 5


def to_file_name(component: str, module: str) -> str:
    """Put back the `text_model.` that transformers 5 dropped from the module names of CLIPTextModel.

    >>> to_file_name("text_encoder", "encoder.layers.0.mlp.fc1"), to_file_name("unet", "conv_in")
    ('text_model.encoder.layers.0.mlp.fc1', 'conv_in')
    """
    match = _CLIP_LAYER.match(module) if component.startswith("text_encoder") else None
    return f"text_model.{match[2]}" if match else module


def to_module_name(component: str, module: str, known: Collection[str] | None = None) -> str:
    """The module name that the model itself uses; the inverse of `to_file_name`.

    Args:
        known: the model's module names. Without them: transformers >= 5 drops `text_model.` in the first text encoder
            (CLIPTextModel) and keeps it in the second (CLIPTextModelWithProjection).
    """
    match = _CLIP_LAYER.match(module) if component.startswith("text_encoder") else None
    if match is None:
        return module
    if known is not None:
        return match[2] if match[2] in known else f"text_model.{match[2]}"
    return match[2] if _CLIP_DROPS_TEXT_MODEL and component == "text_encoder" else f"text_model.{match[2]}"


def flatten(module: str) -> str:
    """`down_blocks.0.attn` -> `down_blocks_0_attn`."""
    return module.replace(".", "_")


def is_embedding(module: str) -> bool:
    """Whether a layer's name is that of a text encoder's embedding table, which no exchange format holds."""
    return module.endswith(("token_embedding", "position_embedding", "embed_tokens"))


def guess_component(modules: Iterable[str]) -> str:
    """The pipeline's part that a bare model's layer names belong to ("model" if none is recognised).

    >>> guess_component(["transformer_blocks.0.attn.to_q"])
    'transformer'
    """
    modules = list(modules)
    for component, starts in (
        ("unet", ("down_blocks.", "up_blocks.", "mid_block.", "time_embedding.", "add_embedding.")),
        ("transformer", ("transformer_blocks.", "single_transformer_blocks.", "double_blocks.", "single_blocks.")),
        ("text_encoder", ("text_model.encoder.", "encoder.layers.")),
    ):
        if any(module.startswith(starts) for module in modules):
            return component
    return "model"
