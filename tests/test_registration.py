# SPDX-License-Identifier: Apache-2.0
"""Registration with PEFT: once, idempotent, and a clear error where the name is taken."""

import copy
import json
import os
import pickle
import subprocess
import sys

import peft.mapping
import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config
from peft.tuners.mixed import model as mixed

from peft_krona import KronAConfig, KronALayer, KronAModel, _register
from peft_krona.errors import RegistrationError


def python(code: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ, **env}
    )


def test_enum_member():
    assert PeftType.KRONA == "KRONA" and PeftType("KRONA") is PeftType.KRONA and PeftType["KRONA"] is PeftType.KRONA
    assert isinstance(PeftType.KRONA, PeftType) and PeftType.KRONA in PeftType and "KRONA" in PeftType.__members__
    assert PeftType.KRONA.value == PeftType.KRONA.name == "KRONA"
    assert str(PeftType.KRONA) == "PeftType.KRONA" and repr(PeftType.KRONA) == "<PeftType.KRONA: 'KRONA'>"
    assert list(PeftType).count(PeftType.KRONA) == 1 and hash(PeftType.KRONA) == hash("KRONA")
    assert json.dumps({"t": PeftType.KRONA}) == '{"t": "KRONA"}'


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_member_are_the_member(copied):
    assert copied(PeftType.KRONA) is PeftType.KRONA


def test_maps():
    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.KRONA] is KronAConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.KRONA] is KronAModel
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.KRONA] == "krona_" == KronAModel.prefix
    assert peft.mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING[PeftType.KRONA] is KronAModel


def test_mixed_models_know_it_once():
    import peft.mixed_model
    import peft.tuners.mixed

    for module in (mixed, peft.tuners.mixed, peft.mixed_model):
        assert module.COMPATIBLE_TUNER_TYPES.count(PeftType.KRONA) == 1
    assert mixed.PREFIXES.count("krona_") == 1
    assert KronAConfig in mixed.Configs.__args__ and mixed.Layers.count(KronALayer) == 1


def test_config_is_found_by_type(tmp_path):
    KronAConfig(target_modules=["q"], r=2).save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "KRONA"
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is KronAConfig and loaded.r == 2
    assert type(get_peft_config({"peft_type": "KRONA", "target_modules": ["q"]})) is KronAConfig
    assert type(pickle.loads(pickle.dumps(loaded))) is KronAConfig and pickle.loads(pickle.dumps(loaded)) == loaded


def test_importing_twice_and_reloading_registers_once():
    result = python("""
import importlib, sys, warnings
import peft_krona, peft_krona as again
from peft import PeftType, get_peft_model, LoraConfig
import peft.mapping, torch
from peft.tuners.mixed import model as mixed
member = PeftType.KRONA
importlib.reload(peft_krona)
for name in [n for n in sys.modules if n.partition(".")[0] == "peft_krona"]:
    del sys.modules[name]
import peft_krona as fresh
assert fresh is not again and PeftType.KRONA is member and list(PeftType).count(member) == 1
assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] is fresh.KronAConfig is not again.KronAConfig
assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is fresh.KronAModel
assert mixed.COMPATIBLE_TUNER_TYPES.count(member) == 1 and mixed.PREFIXES.count("krona_") == 1
config = dict(target_modules=["0"], a_out=2, a_in=2)
for mixed_model in (False, True):
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), fresh.KronAConfig(**config), mixed=mixed_model)
    assert type(model.base_model.model[0]) is sys.modules["peft_krona.layers"].Linear
model.add_adapter("lora", LoraConfig(target_modules=["0"]))
print("fine")
""")
    assert result.stdout.strip() == "fine", result.stderr


def test_a_future_peft_with_its_own_krona_is_a_clear_error():
    result = python("""
import enum
import peft.utils.peft_types as types
types.PeftType = enum.Enum("PeftType", {**{m.name: m.value for m in types.PeftType}, "KRONA": "KRONA"}, type=str)
try:
    import peft_krona
except RuntimeError as error:
    print(type(error).__name__, error)
""")
    assert result.stdout.strip() == (
        "RegistrationError This version of PEFT already defines PeftType.KRONA, so peft_krona cannot register its own "
        "tuner under that name. Use PEFT's, or install a version of peft_krona made for it."
    ), result.stderr


def test_a_type_that_is_taken_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.KRONA, LoraConfig)
    with pytest.raises(RegistrationError, match=r"type KRONA is taken by peft\.tuners\.lora\.config\.LoraConfig"):
        _register.register(KronAConfig, KronAModel, KronALayer)
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[PeftType.KRONA] is KronAModel


def test_a_refusal_of_peft_is_passed_on(monkeypatch):
    monkeypatch.delitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.KRONA)
    with pytest.raises(RegistrationError, match=r"PEFT refuses to register KRONA: .*krona"):
        _register.register(KronAConfig, KronAModel, KronALayer)
