# SPDX-License-Identifier: Apache-2.0
"""Adapters of other tools in, files for other tools out.

Every conversion is a function from tensors to tensors by way of `AdapterFile`; `read_adapter` and `export` handle
files. What is known of one format is one record in `convert.formats`.

>>> import torch
>>> down, up = torch.randn(4, 8), torch.randn(5, 80)  # DiffuseKronA's layer of shape (40, 320)
>>> key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
>>> adapter = from_diffusekrona({f"{key}.down.weight": down, f"{key}.up.weight": up})
>>> adapter.layers[0].shape, adapter.layers[0].layout
((40, 320), 'diffusekrona')
"""

from .base_model import base_of_folder, check_base, describe_base, guess_base, guess_base_and_why, names_need_base
from .export import TO as FORMATS
from .export import Report, choose_format, export, planned_files, to_diff, to_loha, to_lokr, to_lora, tolerance
from .formats.krona import to_peft
from .formats.lora import to_lora_peft
from .nearest import from_difference, nearest_kronecker
from .read import from_diffusekrona, from_lokr, from_lora, from_peft, from_tensors, read_adapter
from .record import AdapterFile, LayerUpdate
from .shapes import shapes_of_folder, shapes_of_models
from .unet_names import BASES, UNetNames

Adapter, KronaLayer = AdapterFile, LayerUpdate  # their names before 0.1, for one release

__all__ = [
    "BASES",
    "FORMATS",
    "AdapterFile",
    "LayerUpdate",
    "Report",
    "UNetNames",
    "base_of_folder",
    "check_base",
    "choose_format",
    "describe_base",
    "export",
    "from_difference",
    "from_diffusekrona",
    "from_lokr",
    "from_lora",
    "from_peft",
    "from_tensors",
    "guess_base",
    "guess_base_and_why",
    "names_need_base",
    "nearest_kronecker",
    "planned_files",
    "read_adapter",
    "shapes_of_folder",
    "shapes_of_models",
    "to_diff",
    "to_loha",
    "to_lokr",
    "to_lora",
    "to_lora_peft",
    "to_peft",
    "tolerance",
]
