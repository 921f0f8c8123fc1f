# SPDX-License-Identifier: Apache-2.0
"""What this package overrides or replaces in PEFT is still there, under the same name and with the same arguments.

A method that PEFT renames would not fail: ours would never be called again, and what it guards would happen silently.
"""

import inspect

import peft
import pytest
from packaging.version import Version
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from peft_krona import KronAConfig, KronALayer, KronAModel
from peft_krona.layers import Embedding, Linear

SINCE_0_21 = ["_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load"]
# class: (the class of PEFT or torch whose methods it overrides, their names)
OVERRIDDEN = {
    KronAModel: (
        BaseTuner,
        [
            "_prepare_adapter_config",
            "inject_adapter",
            "_check_target_module_compatiblity",  # so misspelt in PEFT
            "_create_and_replace",
            *SINCE_0_21,
            "merge_adapter",
            "unmerge_adapter",
            "_unload_and_optionally_merge",
            "_enable_peft_forward_hooks",
        ],
    ),
    KronALayer: (
        BaseTunerLayer,
        [
            "_get_base_layer_device_and_dtype",
            "get_base_weight",
            "merge",
            "quantization_backend",  # an attribute there, that get_base_weight and set_base_weight read
            "supports_lora_conversion",
            "unmerge",
        ],
    ),
    Linear: (BaseTunerLayer, ["supports_lora_conversion"]),
    Embedding: (BaseTunerLayer, []),
    KronAConfig: (peft.PeftConfig, ["__post_init__"]),
}
ROWS = [(cls, base, name) for cls, (base, names) in OVERRIDDEN.items() for name in names]


@pytest.mark.parametrize("cls,base,name", ROWS, ids=lambda v: getattr(v, "__name__", v))
def test_an_overridden_method_is_still_what_peft_calls(cls, base, name):
    if name in SINCE_0_21 and Version(peft.__version__) < Version("0.21"):
        pytest.skip("PEFT has it since 0.21")
    assert name in vars(cls), f"{cls.__name__} overrides {name} no more: take it out of the table"
    # PEFT has no `_enable_peft_forward_hooks` of its own on the base class: PeftModel asks the tuner for it
    theirs = getattr(peft.PeftModel if name == "_enable_peft_forward_hooks" else base, name, None)
    if name == "quantization_backend":
        assert inspect.getsource(base.set_base_weight).count(f"self.{name}") > 1
        return
    assert theirs is not None, f"{base.__name__}.{name} is gone (renamed?): {cls.__name__}.{name} is never called"
    ours = inspect.signature(inspect.unwrap(getattr(cls, name))).parameters
    if not any(p.kind == p.VAR_KEYWORD for p in ours.values()):
        wanted = {n for n, p in inspect.signature(inspect.unwrap(theirs)).parameters.items() if p.kind != p.VAR_KEYWORD}
        wanted -= {
            "config",
            "peft_config",
            "args",
            "kwargs",
            "parameter_name",
        }  # parameter_name: target_parameters only
        assert wanted <= ours.keys(), f"{name}: PEFT passes {sorted(wanted - ours.keys())} too"


@pytest.mark.parametrize("cls", OVERRIDDEN, ids=lambda v: v.__name__)
def test_the_table_is_complete(cls):
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("peft.")]
    shared = {
        name for name, value in vars(cls).items() if callable(value) or isinstance(value, (classmethod, property))
    }
    shared = {name for name in shared if any(name in vars(base) for base in bases)}
    generic = {"__init__", "__repr__", "__eq__", "__hash__", "forward", "update_layer", "__replace__", "__match_args__"}
    assert shared - generic <= set(OVERRIDDEN[cls][1]), "name what is overridden in this table and in docs/design.md"


def test_what_mixed_models_are_given():
    """These have no hook; `_register` replaces them by name."""
    import peft.mixed_model
    import peft.tuners.mixed
    from peft.tuners.mixed import model as mixed

    assert isinstance(mixed.COMPATIBLE_TUNER_TYPES, tuple) and isinstance(mixed.PREFIXES, list)
    assert peft.tuners.mixed.COMPATIBLE_TUNER_TYPES == peft.mixed_model.COMPATIBLE_TUNER_TYPES
    assert KronAConfig in mixed.Configs.__args__ and KronALayer in mixed.Layers
    original = mixed.MixedModel._create_and_replace._before_peft_krona
    assert original.__qualname__ == "MixedModel._create_and_replace"
    assert list(inspect.signature(original).parameters)[:2] == ["self", "config"]
    source = inspect.getsource(mixed)
    assert source.count("Configs") > 1 and source.count("Layers") > 1  # they are read there


def test_what_is_printed_after_peft():
    for cls in (peft.PeftModel, peft.PeftMixedModel):
        original = cls.print_trainable_parameters._before_peft_krona
        assert original.__name__ == "print_trainable_parameters" and list(inspect.signature(original).parameters) == [
            "self"
        ]


def test_what_is_added_to_the_card_of_a_saved_folder():
    original = peft.PeftModel.create_or_update_model_card._before_peft_krona
    assert original.__name__ == "create_or_update_model_card"
    assert list(inspect.signature(original).parameters) == ["self", "output_dir"]
    assert "self.create_or_update_model_card(save_directory)" in inspect.getsource(peft.PeftModel.save_pretrained)


def test_what_the_optimizers_for_lora_call():
    from peft.optimizers import lorafa, loraplus

    assert loraplus.get_parameter_names._before_peft_krona.__name__ == "get_parameter_names"
    assert "get_parameter_names(model, " in inspect.getsource(loraplus.create_loraplus_optimizer)
    original = lorafa.LoraFAOptimizer.__init__._before_peft_krona
    assert list(inspect.signature(original).parameters)[:2] == ["self", "params"]
    source = inspect.getsource(lorafa.create_lorafa_optimizer)
    assert "LoraFAOptimizer(" in source and '"names": ' in source and '"params": ' in source


def test_what_hotswapping_is_given():
    from peft.utils import hotswap

    assert hotswap.CONFIG_KEYS_TO_CHECK[peft.PeftType.KRONA] == ["layout"]
    wanted = {
        "hotswap_adapter_from_state_dict": ["model", "state_dict", "adapter_name", "config", "parameter_prefix"],
        "_pad_lora_weights": ["model", "target_rank"],
        "_convert_scalings_to_tensor": ["model"],
    }
    source = inspect.getsource(hotswap)
    for name, parameters in wanted.items():
        wrapper = getattr(hotswap, name)
        assert list(inspect.signature(wrapper._before_peft_krona).parameters) == parameters
        assert source.count(f"{name}(") > 1  # its module calls it
        assert inspect.unwrap(wrapper) is wrapper._before_peft_krona


def test_names_that_peft_reads_from_the_classes():
    assert issubclass(KronALayer, nn.Module) and KronAModel.tuner_layer_cls is KronALayer
    assert KronAModel.prefix == "krona_" and set(vars(KronALayer)) >= {"adapter_layer_names", "other_param_names"}
