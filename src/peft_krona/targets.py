# SPDX-License-Identifier: Apache-2.0
"""The names of the layers that are adapted where `KronAConfig.target_modules` is None, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from .errors import ConfigError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

# {class: the layers that diffusers' own LoRA script for this family trains}, read in diffusers' examples/ at commit
# 58eb52c080 (2026-08): examples/dreambooth/train_dreambooth_lora[_FAMILY].py, unless said. A "*" is a block's index.
DIFFUSERS_TARGET_MODULES: dict[str, tuple[str, ...]] = {
    "UNet2DConditionModel": (*ATTENTION, "add_k_proj", "add_v_proj"),  # sd; sdxl has no added projections
    "SD3Transformer2DModel": tuple(f"attn.{name}" for name in (*ATTENTION, *_ADDED)),
    "FluxTransformer2DModel": (
        *(f"attn.{name}" for name in (*ATTENTION, *_ADDED)),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    "Flux2Transformer2DModel": (*ATTENTION, "to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out"),
    "QwenImageTransformer2DModel": ATTENTION,
    "ZImageTransformer2DModel": ATTENTION,
    "Krea2Transformer2DModel": (
        *("img_in", "final_layer.linear", *ATTENTION, "to_gate", "ff.up", "ff.down", "text_fusion.projector"),
        *("txt_in.linear_1", "txt_in.linear_2", "time_embed.linear_1", "time_embed.linear_2", "time_mod_proj"),
    ),
    "Ideogram4Transformer2DModel": (*ATTENTION, "w1", "w2", "w3"),
    "Lumina2Transformer2DModel": ATTENTION,
    "SanaTransformer2DModel": ("to_q", "to_k", "to_v"),
    "HiDreamImageTransformer2DModel": ("to_q", "to_k", "to_v", "to_out"),
    "CogVideoXTransformer3DModel": ATTENTION,  # examples/cogvideo/train_cogvideox_lora.py
    "CosmosTransformer3DModel": (*ATTENTION, "ff.net.0.proj", "ff.net.2"),  # examples/cosmos/
}


def entry_of(model: nn.Module) -> tuple[str, ...] | None:
    """The model's entry in `DIFFUSERS_TARGET_MODULES`, by its class or the nearest base class that has one."""
    return next((e for cls in _classes(model) if (e := DIFFUSERS_TARGET_MODULES.get(cls.__name__))), None)


def is_diffusers_model(model: nn.Module) -> bool:
    """Whether the model's class, or one that it is made from, is a model of diffusers."""
    return any(cls.__module__.partition(".")[0] == "diffusers" for cls in _classes(model))


def default_target_modules(
    model: nn.Module,
    layers_to_transform: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
) -> set[str]:
    """Names for `KronAConfig.target_modules`: the entry of a model of diffusers, or else the attention projections.

    Args:
        layers_to_transform, layers_pattern: as in `KronAConfig`. PEFT applies them to names that are endings, but not
            to the full names that stand for a "*".

    Raises:
        ConfigError: if the model has no layer of these names.

    >>> class FluxTransformer2DModel(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.ff = nn.ModuleDict({"net": nn.Sequential(nn.Identity(), nn.GELU(), nn.Linear(2, 2))})
    >>> "ff.net.2" in default_target_modules(FluxTransformer2DModel())
    True
    """
    names = [name for name, _ in model.named_modules()]
    entry = entry_of(model) or ATTENTION
    blocks = _blocks(layers_to_transform, layers_pattern)
    targets = {name for pattern in entry for name in _expanded(pattern, names, blocks)}
    endings = tuple(f".{target}" for target in targets)
    if not any(name in targets or name.endswith(endings) for name in names):
        linear = sorted(
            {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ConfigError(
            f"{type(model).__name__}: KronAConfig.target_modules is None, and none of its layers has one of the names "
            f"that are adapted by default ({', '.join(entry)}). Pass target_modules: 'all-linear', or some of the "
            f"names of its Linear layers ({', '.join(linear[:12]) or 'it has none'}{', ...' if linear[12:] else ''})."
        )
    return targets


def _classes(model: nn.Module) -> tuple[type, ...]:
    return type(getattr(model, "_orig_mod", model)).__mro__  # _orig_mod: what torch.compile has wrapped


def _expanded(pattern: str, names: Iterable[str], blocks: re.Pattern) -> Iterable[str]:
    """A name as it is; one with a "*" as the full names of the modules it stands for."""
    if "*" not in pattern:
        return [pattern]
    regex = re.compile(r"(?:.*\.)?" + re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if regex.fullmatch(name) and blocks.match(name)]


def _blocks(indices: int | Iterable[int] | None, lists: str | Iterable[str] | None) -> re.Pattern:
    """What the full name of a layer in one of these blocks starts with."""
    if indices is None or indices == []:
        return re.compile("")
    index = "|".join(str(i) for i in ([indices] if isinstance(indices, int) else indices))
    name = "|".join([lists] if isinstance(lists, str) else lists or [r"[^.]*"])
    return re.compile(rf"(?:.*?\.)?(?:{name})\.(?:{index})\.")
