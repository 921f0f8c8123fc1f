# SPDX-License-Identifier: Apache-2.0
"""LoRA files: kohya's (`lora_unet_....lora_down.weight`), diffusers' and PEFT's (`lora_A`, `lora.down`, `_lora.down`).

Out: a Kronecker product of rank-a and rank-b factors is a LoRA of rank a * b, in closed form from the SVDs of the two
small factors: A = U_A V_A, B = U_B V_B, so kron(A, B) = kron(U_A, U_B) kron(V_A, V_B).
In: a LoRA of rank r is KronA with r terms, a_in = 1 and b_out = 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from ...errors import FormatError
from ...ops import kron_delta_weight
from ..groups import complete
from ..low_rank import low_rank
from ..names import to_file_name
from ..record import AdapterFile, LayerUpdate, balance
from .format import Factors, Format, Parts, check_rank, header_config, peft_setting, scalar_alpha

# (down, up) endings: kohya's, PEFT's, and those of diffusers' older formats (`.lora.down`, `_lora.down`, ...).
_DIALECTS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("down.weight", "up.weight"),
    ("lora_embedding_A", "lora_embedding_B"),
)


def _read(name: str, parts: Parts, metadata: Mapping[str, str]) -> Factors:
    """Exact, with a_out = out, a_in = 1, b_out = 1, b_in = in and r = rank. Without an alpha the scale is 1.

    Raises:
        FormatError: names the layer: a half missing, shapes that do not fit, a Tucker core, alpha not positive.
    """
    down, up = _pair(name, parts)
    A, B = as_krona_terms(name, down, up)
    rank = down.shape[0]
    alpha = scalar_alpha(name, parts.get("alpha"), rank, metadata)
    table = {} if "alpha" in parts else header_config(name, metadata)
    if table is not metadata:
        _check_peft({key: value for key, value in table.items() if key in (*_OTHER_UPDATES, "init_lora_weights")})
    rslora = str(table.get("use_rslora", metadata.get("use_rslora", ""))).lower() == "true"
    return Factors(A, B, alpha / (rank**0.5 if rslora else rank))


def _pair(name: str, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """down (rank, in, *kernel) and up (out, rank, 1...)."""
    if "lora_mid.weight" in parts:
        raise FormatError(f"'{name}.lora_mid.weight': LoRA with this extra part is no plain low-rank update.")
    found = [pair for pair in _DIALECTS if not parts.keys().isdisjoint(pair)]
    if len(found) > 1:
        raise FormatError(
            f"'{name}' has two LoRAs ({', '.join(sorted(parts.keys() - {'alpha'}))}), and "
            "which of them counts is not defined. Keep one of them."
        )
    endings = found[0] if found else _DIALECTS[0]
    down, up = complete(name, parts, endings)
    return down, up


# Settings of a LoraConfig under which PEFT does not compute W + s B A, and what it computes.
_OTHER_UPDATES = {
    "use_dora": "DoRA rescales the base weights and is no fixed update; merge it with PEFT, then extract the "
    "difference of the two models",
    "alora_invocation_tokens": "aLoRA acts on the tokens after an invocation only",
    "use_qalora": "QA-LoRA sums groups of inputs before A",
    "lora_bias": "lora_B has a bias, which is no update of a weight",
    "layer_replication": "layers of the base model are repeated, and the names are those of the copies",
    "target_parameters": "parameters are adapted that are no layer's weight",
    "trainable_token_indices": "embeddings of single tokens were trained beside it",
    "use_bdlora": "A or B is block-diagonal",
    "arrow_config": "Arrow routes each token to some of several adapters",
    "kasa_config": "KaSA has a diagonal between B and A",
    "monteclora_config": "MonteCLoRA samples its weights",
}
# Settings that leave it W + s B A: s is alpha / r, or with rsLoRA alpha / sqrt(r).
_PLAIN_SETTINGS = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core loftq_config eva_config
    corda_config lora_ga_config velora_config qalora_group_size ensure_weight_tying runtime_config
    """.split()
)
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _check_peft(config: Mapping[str, Any]) -> None:
    """Refuse a LoraConfig under which the update is not s B A."""
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_STARTS_THAT_CHANGE_THE_BASE):
        raise FormatError(
            f"adapter_config.json: init_lora_weights={start!r} also changed the base weights, so that s B A is not the "
            "update. In PEFT, save_pretrained(folder, path_initial_model_for_weight_conversion=...) makes a plain LoRA."
        )
    if not any(start is known or (isinstance(start, str) and start.lower() == known) for known in _PLAIN_STARTS):
        raise FormatError(f"adapter_config.json: init_lora_weights={start!r} is not known here, nor what it changes.")
    for name, value in config.items():
        if name in _OTHER_UPDATES and value:
            raise FormatError(f"adapter_config.json: {name} is set; {_OTHER_UPDATES[name]}.")
        if name not in _OTHER_UPDATES and name not in _PLAIN_SETTINGS and value:
            raise FormatError(
                f"adapter_config.json: {name}={value!r} is not known here; the update may be another than s B A. "
                "Load and merge it with PEFT."
            )


def _read_peft(config: Mapping[str, Any], groups: Mapping[str, Parts]) -> dict[str, Factors]:
    _check_peft(config)
    factors = {}
    for module, parts in groups.items():
        A, B = as_krona_terms(module, *_pair(module, parts))
        check_rank(config, module, A.shape[0])
        alpha = peft_setting(config, "lora_alpha", "alpha_pattern", module)
        factors[module] = Factors(A, B, alpha / (A.shape[0] ** 0.5 if config.get("use_rslora") else A.shape[0]))
    return factors


def as_krona_terms(name: str, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, out, 1) and B (rank, 1, in, *kernel) of a LoRA pair, down (rank, in, *kernel) and up (out, rank).

    Raises:
        FormatError: names the layer if the pair's shapes do not fit.
    """
    fits = down.dim() >= 2 and up.dim() in (2, down.dim()) and up.shape[1] == down.shape[0] > 0
    if not fits or any(k != 1 for k in up.shape[2:]):
        raise FormatError(
            f"'{name}': expected down (rank, in, *kernel) and up (out, rank), got down {tuple(down.shape)} and up "
            f"{tuple(up.shape)}."
        )
    rank = down.shape[0]
    return up.reshape(-1, rank).T.reshape(rank, -1, 1).contiguous(), down[:, None].contiguous()


def lora_rank(layer: LayerUpdate) -> int:
    """Rank of the exact LoRA of a layer: the sum over its terms of rank(A_n) * rank(B_n), at most min(out, in)."""
    out, n_in = layer.shape[0], prod(layer.shape[1:])
    ranks = (low_rank(layer.A[n])[0].shape[1] * low_rank(layer.B[n].flatten(1))[0].shape[1] for n in range(layer.r))
    return min(sum(ranks), out, n_in)


def lora_factors(layer: LayerUpdate) -> tuple[torch.Tensor, torch.Tensor]:
    """up (out, rank) and down (rank, in * prod(kernel)) in float64, with up @ down = dW flattened.

    Rank is the sum over the terms of rank(A_n) * rank(B_n). Where that is more than min(out, in * prod(kernel)), one of
    the two is dW itself and the other the identity.
    """
    out, n_in = layer.shape[0], prod(layer.shape[1:])
    ups, downs = [], []
    for A, B in zip(layer.A, layer.B, strict=True):
        (left_A, right_A), (left_B, right_B) = low_rank(A), low_rank(B.flatten(1))
        ups.append(kron_delta_weight(left_A[None], left_B[None], layout=layer.layout))  # the layout shuffles rows
        downs.append(kron_delta_weight(right_A[None], right_B[None]))
    up, down = torch.cat(ups, dim=1), torch.cat(downs)
    if up.shape[1] > min(out, n_in):
        dW = layer.delta_weight().reshape(out, n_in)
        identity = torch.eye(min(out, n_in), dtype=torch.float64)
        return balance(*((identity, dW) if out <= n_in else (dW, identity)))
    return balance(up * layer.scale, down)


def _write(layers: Sequence[LayerUpdate], dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """kohya's dialect, which every tool reads: exact, closed form.

    All layers have one alpha, the largest rank, and rank / alpha is folded into the factors: diffusers misreads files
    with an alpha per layer.
    """
    pairs = [lora_factors(layer) for layer in layers]
    alpha = max(up.shape[1] for up, _ in pairs)
    written = []
    for layer, (up, down) in zip(layers, pairs, strict=True):
        share = (up.shape[1] / alpha) ** 0.5
        up, down = _in_layer_shape(layer, up * share, down * share)
        written.append(
            {
                "lora_down.weight": down.to(dtype),
                "lora_up.weight": up.to(dtype),
                "alpha": torch.tensor(float(alpha)),
            }
        )
    return written


def to_lora_peft(
    adapter: AdapterFile, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Write as a LoRA file with diffusers' names (`transformer.<module>.lora_A.weight`), for Flux, SD3 and the like.

    Returns:
        Tensors, and the metadata in which diffusers looks for ranks and alphas (alpha = rank in every layer).
    """
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, dict[str, int]] = {}
    for layer in adapter:
        up, down = _in_layer_shape(layer, *lora_factors(layer))
        module = to_file_name(layer.component, layer.module)
        tensors[f"{layer.component}.{module}.lora_A.weight"] = down.to(dtype)
        tensors[f"{layer.component}.{module}.lora_B.weight"] = up.to(dtype)
        config.setdefault(layer.component, {})[module] = down.shape[0]
    flat: dict[str, Any] = {}
    for component, ranks in config.items():
        flat |= {f"{component}.{key}": value for key, value in _lora_config(component, ranks).items()}
    return tensors, {"lora_adapter_metadata": json.dumps(flat, sort_keys=True)}


def _lora_config(component: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The LoRA config of a component whose layers have these ranks, alpha = rank in each.

    PEFT takes names and pattern keys for the ends of names too. In a text encoder that lets one name stand for a layer
    with and without `text_model.`. Elsewhere it must not: Flux has both "proj_out" and
    "single_transformer_blocks.0.proj_out".
    """
    if component.startswith("text_encoder"):
        ranks = {module.removeprefix("text_model."): rank for module, rank in ranks.items()}
        anchor = ""
    else:
        anchor = "^"
    r = max(ranks.values())
    pattern = {f"{anchor}{re.escape(module)}": rank for module, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
    }


def _in_layer_shape(layer: LayerUpdate, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution's down gets the kernel, its up a kernel of ones."""
    rank, n_in, kernel = down.shape[0], layer.shape[1], layer.kernel
    return up.reshape(-1, rank, *[1] * len(kernel)), down.reshape(rank, n_in, *kernel)


def _delta(name: str, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    down, up = _pair(name, parts)
    rank = down.shape[0]
    scale = scalar_alpha(name, parts.get("alpha"), rank) / rank
    dW = up.to(dtype).reshape(up.shape[0], rank) @ down.to(dtype).reshape(rank, -1) * scale
    return dW.reshape(up.shape[0], *down.shape[1:])


LORA = Format(
    name="lora",
    endings=tuple(ending for pair in _DIALECTS for ending in pair),
    extras=("lora_mid.weight",),
    read=_read,
    write=_write,
    delta=_delta,
    kohya_network=("networks.lora", {}),
    peft_type="LORA",
    peft_endings=((), (*_DIALECTS[1], *_DIALECTS[3])),
    read_peft=_read_peft,
)
