# SPDX-License-Identifier: Apache-2.0
"""What settings of LoRA, LoKr and the papers are called in `KronAConfig`, for the error that a wrong name gets."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

from .errors import ConfigTypeError

T = TypeVar("T", bound=type)

_FACTORS = "the left factor's size, a_out and a_in (each product a_out * a_in has its number of parameters)"
_TERMS = "r, the number of Kronecker terms (not a rank: each costs as many parameters as the first)"
_INIT = "init_weights (True, 'diffusekrona', 'kaiming', 'cdka' or False)"
_RATE = "krona_dropout (on the adapter's input) or module_dropout (skips a layer's adapter)"

# {name elsewhere: the sentence "here it is ..."}
MEANT: dict[str, str] = {
    # PEFT's LoraConfig
    "lora_alpha": "alpha; LoRA's s = lora_alpha / r is scaling='rank', the default here is s = alpha",
    "lora_dropout": "krona_dropout",
    "init_lora_weights": _INIT,
    "use_rslora": "scaling='rslora' (s = alpha / sqrt(r))",
    "trainable_token_indices": "modules_to_save, which trains the whole embedding",
    # PEFT's LoKrConfig and LoHaConfig, kohya's and LyCORIS' arguments
    "decompose_factor": _FACTORS,
    "decompose_both": "r: both factors are full, and sums of r terms take the place of low-rank factors",
    "rank_dropout": _RATE,
    "use_effective_conv2d": "always so: a kernel stays in the right factor, and dW is never built",
    "factor": _FACTORS,
    "rank": _TERMS,
    "dim": _TERMS,
    "network_dim": _TERMS,
    "network_alpha": "alpha",
    "dropout": _RATE,
    "network_dropout": _RATE,
    # DiffuseKronA, KronA and CDKA
    "a1": "a_in: the paper's (a1, a2) is (a_in, a_out)",
    "a2": "a_out: the paper's (a1, a2) is (a_in, a_out)",
    "krona_a1": "a_in",
    "krona_a2": "a_out",
    "factor_out": "a_out = out / factor_out, the left factor's size (kohya's KronA names the right one's)",
    "factor_in": "a_in",
    "r1": "a_out = out / r1 of CDKA",
    "r2": "a_in = r2 of CDKA",
    "num_terms": "r",
    "krona_alpha": "alpha",
    "cdka_alpha": "alpha, with scaling='cdka'",
    "scale": "alpha (with the default scaling, s = alpha)",
    "krona_scale": "alpha (with the default scaling, s = alpha)",
    "init_krona_weights": _INIT,
}
# of LoRA, with nothing here that does the same
WITHOUT = {
    "use_dora": "DoRA's magnitudes", "use_qalora": "QALoRA", "lora_bias": "a bias in the adapter",
    "target_parameters": "adapters on bare parameters", "layer_replication": "replicated layers",
    "loftq_config": "LoftQ", "eva_config": "EVA", "corda_config": "CorDA",
    "rank_dropout_scale": "dropout of ranks", "ensure_weight_tying": "tied adapters",
}  # fmt: skip


def meaning(name: str, known: Iterable[str]) -> str:
    """What to write in the place of the keyword `name`, in a sentence.

    Args:
        known: the names that there are.

    >>> meaning("lora_dropout", ["krona_dropout", "r"])
    'here it is krona_dropout.'
    >>> meaning("target_module", ["target_modules", "r"])
    'did you mean target_modules?'
    """
    known = list(known)
    if name in MEANT:
        return f"here it is {MEANT[name]}."
    if name in WITHOUT or name in _names_of_lora():
        return f"{WITHOUT.get(name, 'it')} has no counterpart here; leave it out."
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}."


def _names_of_lora() -> set[str]:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    return {field.name for config in (LoraConfig, LoKrConfig, LoHaConfig) for field in fields(config)}


def explains_unknown_names(cls: T) -> T:
    """For a dataclass of settings: an unknown keyword's error says what is meant, by `meaning`.

    The words "got an unexpected keyword argument" are Python's own. PEFT looks for them: when it reads a config of a
    newer version, it leaves such settings out with a warning.
    """
    owner: Any = cls
    original: Callable[..., None] = owner.__init__
    known = [field.name for field in fields(cls) if field.init]

    @wraps(original)
    def __init__(self: object, *args: object, **kwargs: object) -> None:
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            said = "; ".join(f"{name!r}: {meaning(name, known)}" for name in unknown)
            raise ConfigTypeError(f"{cls.__name__} got an unexpected keyword argument {said}")
        original(self, *args, **kwargs)

    owner.__init__ = __init__
    return cls
