# SPDX-License-Identifier: Apache-2.0
"""Makes PEFT know the tuner type "KRONA". The only code that touches PEFT's enum and tables; safe to run twice.

PEFT has one registration hook, `register_peft_method`, and it demands a member of the `PeftType` enum, which Python
does not let one add; so the member is put into the enum's own tables by hand. PEFT's mixed models keep a closed list of
tuners of their own, which has no hook at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, Union

from huggingface_hub import ModelCard
from peft.utils.peft_types import PeftType, register_peft_method

from .errors import RegistrationError

NAME = "KRONA"
CARD = """
## Loading

This is a KronA adapter. `import peft_krona` before loading it; without, PEFT ends in `KeyError: 'KRONA'`.

```python
import peft_krona
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```
"""
PREFIX = "krona_"


def add_enum_member() -> None:
    """Add PeftType.KRONA. Must run before KronAConfig is instantiated.

    Raises:
        RegistrationError: if PEFT has a KRONA of its own.
    """
    if NAME in PeftType.__members__:
        member = PeftType[NAME]
        if not getattr(member, "_added_by_peft_krona", False):
            raise RegistrationError(
                f"This version of PEFT already defines PeftType.{NAME}, so peft_krona cannot register its own tuner "
                "under that name. Use PEFT's, or install a version of peft_krona made for it."
            )
        return
    added: Any = str.__new__(PeftType, NAME)
    added._name_, added._value_ = NAME, NAME
    added.__objclass__ = PeftType
    added._sort_order_ = len(PeftType._member_names_)
    added._added_by_peft_krona = True
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = added
    PeftType._value2member_map_[NAME] = added
    getattr(PeftType, "_hashable_values_", []).append(NAME)  # Python >= 3.12
    type.__setattr__(PeftType, NAME, added)  # EnumType forbids it to everyone else


def register(config_cls: type, model_cls: type, layer_cls: type) -> None:
    """Register the tuner with PEFT and with PEFT's mixed models.

    Raises:
        RegistrationError: if something else holds the type or the prefix.
    """
    import peft.mapping as mapping

    registered = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if registered is not None:
        if registered.__module__.partition(".")[0] != __name__.partition(".")[0]:
            raise RegistrationError(
                f"PEFT's type {NAME} is taken by {registered.__module__}.{registered.__qualname__}."
            )
        # A reload of this package: point PEFT at the new classes.
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[NAME]] = config_cls
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType[NAME]] = model_cls
        mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType[NAME]] = model_cls
    else:
        try:
            register_peft_method(
                name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX, is_mixed_compatible=True
            )
        except KeyError as error:
            raise RegistrationError(f"PEFT refuses to register {NAME}: {error.args[0]}") from error
    _register_with_mixed_models(config_cls, model_cls, layer_cls)


def add_to_print(line: Callable[[Any], str | None]) -> None:
    """Let `print_trainable_parameters` of PEFT's models print `line(model)` as well, unless that is None."""
    from peft.mixed_model import PeftMixedModel
    from peft.peft_model import PeftModel

    def printing(original: Callable) -> Callable:
        def print_trainable_parameters(self):
            original(self)
            text = line(self)
            if text is not None:
                print(text)

        return print_trainable_parameters

    for cls in (PeftModel, PeftMixedModel):
        _replace(cls, "print_trainable_parameters", printing)


def add_to_model_card(config_cls: type) -> None:
    """Let the README.md that PEFT writes into a saved folder say that `import peft_krona` comes before loading it.

    Without the import, PEFT ends in `KeyError: 'KRONA'`, and neither it nor the folder tells why.
    """
    from peft.peft_model import PeftModel

    def writing(original: Callable) -> Callable:
        def create_or_update_model_card(self, output_dir):
            original(self, output_dir)
            if any(isinstance(config, config_cls) for config in self.peft_config.values()):
                path = os.path.join(output_dir, "README.md")
                card = ModelCard.load(path)
                if "import peft_krona" not in card.text:
                    card.text = f"{card.text.rstrip()}\n{CARD}"
                    card.save(path)

        return create_or_update_model_card

    _replace(PeftModel, "create_or_update_model_card", writing)


def add_to_optimizers(warn: Callable[[Any, str], None]) -> None:
    """Let PEFT's `create_loraplus_optimizer` and `create_lorafa_optimizer` call `warn(parameters, name)` first.

    Args:
        warn: gets the (name, parameter) pairs that are optimized, and the function's name.

    What is replaced is what these functions call: scripts hold their own names from before this package is imported.
    """
    from peft.optimizers import lorafa, loraplus

    def warning_by_model(original: Callable) -> Callable:
        def get_parameter_names(model, *args, **kwargs):
            warn(model.named_parameters(), "create_loraplus_optimizer")
            return original(model, *args, **kwargs)

        return get_parameter_names

    def warning_by_groups(original: Callable) -> Callable:
        def __init__(self, params, *args, **kwargs):
            groups = [group for group in params if isinstance(group, dict)] if isinstance(params, list) else []
            named = (pair for group in groups for pair in zip(group.get("names", ()), group["params"], strict=False))
            warn(named, "create_lorafa_optimizer")
            original(self, params, *args, **kwargs)

        return __init__

    _replace(loraplus, "get_parameter_names", warning_by_model)
    _replace(lorafa.LoraFAOptimizer, "__init__", warning_by_groups)


def _register_with_mixed_models(config_cls: type, model_cls: Any, layer_cls: type) -> None:
    tuners, models = import_module("peft.tuners.mixed"), import_module("peft.mixed_model")
    mixed: Any = import_module("peft.tuners.mixed.model")

    if PeftType[NAME] not in mixed.COMPATIBLE_TUNER_TYPES:
        mixed.COMPATIBLE_TUNER_TYPES += (PeftType[NAME],)
        mixed.PREFIXES.append(PREFIX)
    for module in (tuners, models):  # both hold the tuple under the same name
        module.__dict__["COMPATIBLE_TUNER_TYPES"] = mixed.COMPATIBLE_TUNER_TYPES
    mixed.PREFIXES[:] = dict.fromkeys(mixed.PREFIXES)
    mixed.Configs = Union[mixed.Configs, config_cls]  # noqa: UP007  (PEFT reads __args__ of the Union)
    mixed.Layers = (*mixed.Layers, layer_cls)

    def creating(original: Callable) -> Callable:
        def _create_and_replace(self, config, *args, **kwargs):
            if isinstance(config, config_cls):
                model_cls._create_and_replace(self, config, *args, **kwargs)
            else:
                original(self, config, *args, **kwargs)

        return _create_and_replace

    _replace(mixed.MixedModel, "_create_and_replace", creating)


def _replace(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Put make(original) in the place of a function or method of PEFT, and of one that was put there before."""
    original = getattr(owner, name)
    original = getattr(original, "_before_peft_krona", original)
    wrapper: Any = wraps(original)(make(original))
    wrapper._before_peft_krona = original
    setattr(owner, name, wrapper)


def register_hotswap(
    config_cls: type,
    swap: Callable[..., None],
    pad: Callable[..., bool],
    make_scalings_tensors: Callable[..., bool],
) -> None:
    """Let PEFT's `hotswap_adapter` and `prepare_model_for_compiled_hotswap` take KronA, too: they know LoRA only.

    Args:
        swap(model, config, state_dict, adapter_name): puts weights in an adapter's place.
        pad(model, r), make_scalings_tensors(model): prepare a model; each says whether it had an adapter.
    """
    from peft.utils import hotswap

    hotswap.CONFIG_KEYS_TO_CHECK[PeftType[NAME]] = ["layout"]

    def swapping(original: Callable) -> Callable:
        def hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config, *args, **kwargs):
            if isinstance(config, config_cls):
                swap(model, config, state_dict, adapter_name)
            else:
                original(model, state_dict, adapter_name, config, *args, **kwargs)

        return hotswap_adapter_from_state_dict

    def padding(original: Callable) -> Callable:
        return lambda model, target_rank: pad(model, target_rank) | original(model, target_rank)

    def converting(original: Callable) -> Callable:
        return lambda model: make_scalings_tensors(model) | original(model)

    _replace(hotswap, "hotswap_adapter_from_state_dict", swapping)
    _replace(hotswap, "_pad_lora_weights", padding)
    _replace(hotswap, "_convert_scalings_to_tensor", converting)
