# SPDX-License-Identifier: Apache-2.0
"""Adapters of other tools in, files for other tools out.

Every conversion is a function from tensors to tensors by way of `Adapter`; `read_adapter` and `export` handle files.

>>> import torch
>>> down, up = torch.randn(4, 8), torch.randn(5, 80)  # DiffuseKronA's layer of shape (40, 320)
>>> key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
>>> adapter = from_diffusekrona({f"{key}.down.weight": down, f"{key}.up.weight": up})
>>> adapter.layers[0].shape, adapter.layers[0].layout
((40, 320), 'diffusekrona')
"""

from .adapter import Adapter, KronaLayer, shapes_of_models
from .base import base_of_folder, check_base, guess_base, shapes_of_folder
from .diff import to_diff
from .diffusekrona import from_diffusekrona
from .export import FORMATS, Report, choose_format, export, tolerance
from .loha import to_loha
from .lokr import from_lokr, to_lokr
from .lora import from_lora, to_lora, to_lora_peft
from .names import BASES, UNetNames
from .nearest import from_difference, nearest_kronecker
from .peft import from_peft, to_peft
from .reading import from_tensors, read_adapter

__all__ = [
    "BASES",
    "FORMATS",
    "Adapter",
    "KronaLayer",
    "Report",
    "UNetNames",
    "base_of_folder",
    "check_base",
    "choose_format",
    "export",
    "from_difference",
    "from_diffusekrona",
    "from_lokr",
    "from_lora",
    "from_peft",
    "from_tensors",
    "guess_base",
    "nearest_kronecker",
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
