# SPDX-License-Identifier: Apache-2.0
"""`KronAConfig`: every setting of the adapter, checked where it is made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from .choices import BIASES, INITS, LAYOUTS, SCALINGS, Bias, Init, Layout, Scaling
from .errors import ConfigError, ConfigTypeError
from .setting_names import explains_unknown_names

PEFT_PREFIX = "base_model.model."  # what PEFT puts before module names in its files
Names: TypeAlias = list[str] | tuple[str, ...] | set[str] | str  # or one regex


def scaling_factor(scaling: Scaling, alpha: float, r: int, a_in: int) -> float:
    """s for one layer: "alpha": alpha (KronA, DiffuseKronA). "rank": alpha / r. "rslora": alpha / sqrt(r).
    "cdka": alpha / sqrt(r * a_in) (CDKA, Theorem 3.4).

    >>> scaling_factor("cdka", 64.0, 8, 2)
    16.0
    """
    return {
        "alpha": alpha,
        "rank": alpha / r,
        "rslora": alpha / math.sqrt(r),
        "cdka": alpha / math.sqrt(r * a_in),
    }[scaling]


class LayerSettings(NamedTuple):
    """What may differ between layers: the number of terms, alpha, and the requested (a_out, a_in)."""

    r: int
    alpha: float
    factors: tuple[int, int]


@explains_unknown_names
@dataclass
class KronAConfig(PeftConfig):
    """Settings of a Kronecker adapter: dW = s * layout(sum_{i=1..r} A_i (x) B_i) on every target layer.

    Sources: KronA (Edalati et al. 2022), DiffuseKronA (Marjit et al., WACV 2025), CDKA (Bai et al. 2026). The paper's
    (a1, a2) is (a_in, a_out) here: its best setting "(4, 64)" is a_out=64, a_in=4, the default.

    Args:
        target_modules: Names of the modules to adapt: a list of names or name endings, one regex over full names,
            "all-linear", or None for the default of a known architecture (models of diffusers: the layers that its
            LoRA script for the family trains, see `peft_krona.targets`, or the attention projections).
        exclude_modules: Names (list) or a regex of modules to leave out.
        a_out, a_in: Sizes of the left factor A_i. Where one does not divide a layer's size, the largest divisor below
            it is taken (see `strict_factors`).
        r: Number of Kronecker terms.
        alpha: Scale; its meaning depends on `scaling`.
        scaling: How s follows from alpha: "alpha" (s = alpha), "rank" (alpha / r), "rslora" (alpha / sqrt(r)),
            "cdka" (alpha / sqrt(r * a_in)).
        layout: "kron", the Kronecker product of the paper's equation, or "diffusekrona", what the released DiffuseKronA
            code computes (its output index is shuffled).
        init_weights: True or "diffusekrona": A ~ N(0, std 1/a_out), B = 0. "kaiming": A Kaiming-uniform, B = 0.
            "cdka": A = 0, B Kaiming-uniform. False: both random, so that the adapter changes the model at once.
        krona_dropout: Probability of dropping an element of the adapter's input in training.
        module_dropout: Probability of skipping a layer's adapter for one training forward (as in LoKr: no rescaling).
        fan_in_fan_out: The target stores its weight as (in, out). transformers' Conv1D is recognised without it.
        bias: Which biases of the base model train: "none", "all" or "krona_only" (those of the adapted layers).
        modules_to_save: Modules trained and saved whole beside the adapter.
        layers_to_transform: Index or indices of the layers to adapt; needs target_modules as a list.
        layers_pattern: Name(s) of the module list that these indices count in.
        rank_pattern, alpha_pattern, factor_pattern: {module name or regex: r | alpha | (a_out, a_in)} for single
            layers; a key matches a full name or the end of one.
        strict_factors: Raise where a factor does not divide a layer's size.

    Raises:
        ConfigError: (a ValueError) names the field, its value and what is allowed.
        ConfigTypeError: (also a TypeError) for a keyword that is none of these: what LoRA's, LoKr's and the papers'
            settings are called here.

    >>> KronAConfig(target_modules=["to_q"], a_out=64, a_in=8).peft_type.value
    'KRONA'
    """

    target_modules: Names | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: Names | None = field(default=None, metadata={"help": "Modules to leave out."})
    a_out: int = field(default=64, metadata={"help": "Rows of the left factor A."})
    a_in: int = field(default=4, metadata={"help": "Columns of the left factor A."})
    r: int = field(default=1, metadata={"help": "Number of Kronecker terms."})
    alpha: float = field(default=1.0, metadata={"help": "Scale; see `scaling`."})
    scaling: Scaling = field(default="alpha", metadata={"help": f"One of {SCALINGS}."})
    layout: Layout = field(default="kron", metadata={"help": f"One of {LAYOUTS}."})
    init_weights: Init = field(default=True, metadata={"help": f"One of {INITS}."})
    krona_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    module_dropout: float = field(default=0.0, metadata={"help": "Probability of skipping a layer's adapter."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "The target stores its weight as (in, out)."})
    bias: Bias = field(default="none", metadata={"help": f"One of {BIASES}."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the module list."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "r for single layers."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "alpha for single layers."})
    factor_pattern: dict[str, tuple[int, int]] = field(
        default_factory=dict, metadata={"help": "(a_out, a_in) for single layers."}
    )
    strict_factors: bool = field(default=False, metadata={"help": "Raise where a factor does not divide."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["KRONA"]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
            elif value is not None and not isinstance(value, (str, set)):
                self._refuse(name, value, "a list of names, a regex string or None")
            self._check_names(name)
        if isinstance(self.modules_to_save, str):
            self._refuse("modules_to_save", self.modules_to_save, f"a list of names: [{self.modules_to_save!r}]")
        self._check("modules_to_save", self.modules_to_save, _is_list_of_names, "a list of names, or None")
        for name in ("a_out", "a_in", "r"):
            self._check(name, getattr(self, name), _is_positive_int, "an integer >= 1")
        self._check("alpha", self.alpha, _is_finite, "a finite number")
        for name in ("krona_dropout", "module_dropout"):
            self._check(name, getattr(self, name), lambda v: _is_finite(v) and 0 <= v < 1, "a number in [0, 1)")
        for name, allowed in (("scaling", SCALINGS), ("layout", LAYOUTS), ("init_weights", INITS), ("bias", BIASES)):
            self._check(name, getattr(self, name), lambda v, a=allowed: _is_one_of(v, a), f"one of {allowed}")
        for name in ("fan_in_fan_out", "strict_factors", "inference_mode"):
            self._check(name, getattr(self, name), lambda v: isinstance(v, bool), "True or False")
        self._check_patterns()
        self._check_layers()

    def for_layer(self, name: str) -> LayerSettings:
        """The settings of the layer called `name`, patterns applied as PEFT applies its own.

        >>> KronAConfig(factor_pattern={"to_k": (64, 8)}).for_layer("mid_block.attn1.to_k")
        LayerSettings(r=1, alpha=1.0, factors=(64, 8))
        """

        def of(pattern: dict[str, Any], default: Any) -> Any:
            return pattern.get(get_pattern_key(list(pattern), name), default)

        return LayerSettings(
            r=of(self.rank_pattern, self.r),
            alpha=of(self.alpha_pattern, self.alpha),
            factors=tuple(of(self.factor_pattern, (self.a_out, self.a_in))),
        )

    def _check_patterns(self) -> None:
        for name, ok, allowed in (
            ("rank_pattern", _is_positive_int, "an integer >= 1"),
            ("alpha_pattern", _is_finite, "a finite number"),
            ("factor_pattern", _is_factor_pair, "a pair (a_out, a_in) of integers >= 1"),
        ):
            pattern = getattr(self, name)
            if pattern is None:
                setattr(self, name, {})
                continue
            if not isinstance(pattern, dict):
                self._refuse(name, pattern, "a dict {module name or regex: value}")
            for key, value in pattern.items():
                self._check(f"{name}[{key!r}]", value, ok, allowed)
                self._check(
                    f"{name}: key", key, lambda key: isinstance(key, str), "a module name or regex, as a string"
                )
                try:
                    re.compile(key)
                except re.error as error:
                    raise ConfigError(f"KronAConfig.{name}: the key {key!r} is not a valid regex: {error}.") from error
        self.factor_pattern = {key: (a_out, a_in) for key, (a_out, a_in) in self.factor_pattern.items()}

    def _check_names(self, field: str) -> None:
        """A string is a regex, unless it is PEFT's word for all Linear layers."""
        value = getattr(self, field)
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ConfigError(
                    f"KronAConfig.{field}={value!r} is not allowed: a string is a regex over whole names, and this is "
                    f"no valid one ({error}). Expected a regex such as '.*to_[qk]', a list of names, or 'all-linear'."
                ) from error
        else:
            self._check(field, value, _is_list_of_names, "a list of names, each a string, or one regex")

    def _check_layers(self) -> None:
        self._check(
            "layers_to_transform", self.layers_to_transform, _is_indices, "an index >= 0, a list of them, or None"
        )
        pattern = self.layers_pattern
        if not isinstance(pattern, str):
            self._check("layers_pattern", pattern, _is_list_of_names, "a name, a list of names, or None")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"KronAConfig.layers_pattern={self.layers_pattern!r} says where layers_to_transform counts, but "
                "layers_to_transform is None. Set layers_to_transform to the layer indices, or drop layers_pattern."
            )
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"KronAConfig.{name}={getattr(self, name)!r} cannot be used with target_modules as a string "
                        f"({self.target_modules!r}). Pass target_modules as a list of names, or put the layer "
                        "indices into the regex."
                    )

    def _check(self, name: str, value: Any, ok: Any, allowed: str) -> None:
        if not ok(value):
            self._refuse(name, value, allowed)

    @staticmethod
    def _refuse(name: str, value: Any, allowed: str) -> None:
        raise ConfigError(f"KronAConfig.{name}={value!r} is not allowed; expected {allowed}.")


def check_is_config(value: Any, argument: str = "config", instead: str = "") -> None:
    """That `value` is a `KronAConfig`.

    Args:
        argument: what it is called in the message. instead: what else is allowed, for the message.

    Raises:
        ConfigTypeError: says what was received, and what to write.
    """
    if isinstance(value, KronAConfig):
        return
    wanted = f"Expected a KronAConfig{instead} for {argument}, got"
    if isinstance(value, PeftConfig):
        raise ConfigTypeError(
            f"{wanted} {type(value).__name__}, which is an adapter of another kind: model.add_adapter(config) or "
            "get_peft_model(model, config) take it. For KronA write KronAConfig(a_out=64, a_in=4, target_modules=...); "
            "docs/from_lora.md has the settings that take the place of LoRA's."
        )
    if isinstance(value, type) and issubclass(value, KronAConfig):
        raise ConfigTypeError(f"{wanted} the class {value.__name__}. Write {value.__name__}(), with brackets.")
    hint = " Write KronAConfig(**settings)." if isinstance(value, dict) else ""
    raise ConfigTypeError(f"{wanted} {value!r} of type {type(value).__name__}.{hint}")


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond the floats
        return False


def _is_list_of_names(value: Any) -> bool:
    return value is None or (
        isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)
    )


def _is_indices(value: Any) -> bool:
    many = value if isinstance(value, (list, tuple, set, range)) else [] if value is None else [value]
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in many)


def _is_one_of(value: Any, allowed: tuple) -> bool:
    return any(value is a or (isinstance(a, str) and value == a) for a in allowed)


def _is_factor_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_positive_int(v) for v in value)
