# SPDX-License-Identifier: Apache-2.0
"""What kohya's tools, A1111 and ComfyUI's managers expect in a file besides its weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch

from .formats import Format
from .record import AdapterFile
from .safetensors_io import tensor_hash
from .unet_names import UNetNames


def with_whole_attentions(adapter: AdapterFile, base_model: UNetNames) -> AdapterFile:
    """With zero layers added where an OpenCLIP attention lacks some of q, k, v and out: A1111 skips it otherwise."""
    present = {layer.name for layer in adapter}
    added = []
    for layer in adapter:
        open_clip = layer.component == "text_encoder_2" or (
            layer.component == "text_encoder" and base_model.version == "sd_v2"
        )
        stem = layer.module.rpartition(".")[0]
        if open_clip and stem.endswith("self_attn"):
            for other in ("q_proj", "k_proj", "v_proj", "out_proj"):
                zero = replace(layer, module=f"{stem}.{other}", A=layer.A * 0, B=layer.B * 0)
                if zero.name not in present:
                    present.add(zero.name)
                    added.append(zero)
    return replace(adapter, layers=(*adapter.layers, *added))


def krona_metadata(adapter: AdapterFile) -> dict[str, str]:
    """What the adapter was before: factors and layouts, with base model and trigger words if known."""
    factors = Counter(f"{layer.r}x{layer.factors[0]}x{layer.factors[1]}" for layer in adapter)
    metadata = {
        "format": "pt",
        "krona.factors": json.dumps(dict(factors.most_common())),  # {"r x a_out x a_in": layers}
        "krona.layout": ",".join(sorted({layer.layout for layer in adapter})),
        "krona.source": adapter.source,
    }
    return metadata | dict(adapter.metadata)


def kohya_metadata(
    adapter: AdapterFile, tensors: Mapping[str, torch.Tensor], format: Format, base_model: UNetNames | None, name: str
) -> dict[str, str]:
    """The metadata that kohya's tools, A1111 and ComfyUI's managers read."""
    module, arguments = format.kohya_network
    alphas = [float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")]
    of_unet = {}
    if base_model is not None:
        of_unet = {
            "ss_base_model_version": base_model.version,
            "ss_v2": str(base_model.version == "sd_v2"),
            "modelspec.architecture": f"{base_model.architecture}/lora",
            "modelspec.resolution": "1024x1024" if base_model.version.startswith("sdxl") else "512x512",
        }
    metadata = {
        "ss_network_module": module,
        "ss_network_args": json.dumps(arguments),
        "ss_network_dim": f"{max(alphas, default=1):.0f}",
        "ss_network_alpha": f"{max(alphas, default=1):.0f}",
        "ss_output_name": name,
        "ss_sd_model_name": adapter.metadata.get("base_model", ""),
        "sshs_model_hash": tensor_hash(tensors),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.trigger_phrase": adapter.metadata.get("trigger_words", ""),
        **of_unet,
    }
    return {key: value for key, value in metadata.items() if value} | krona_metadata(adapter)
