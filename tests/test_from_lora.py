# SPDX-License-Identifier: Apache-2.0
"""Whoever comes from LoRA: names of settings, its configs, r, the folder that is loaded without the import."""

import dataclasses
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from adapted import adapted_mlp, config, mlp
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model

import peft_krona
from peft_krona import KronAConfig, share
from peft_krona.errors import ConfigError, ConfigTypeError
from peft_krona.setting_names import MEANT, WITHOUT

OWN = {field.name for field in dataclasses.fields(KronAConfig)}
THEIRS = {f.name for c in (LoraConfig, LoKrConfig, LoHaConfig) for f in dataclasses.fields(c)} - OWN


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"lora_alpha": 16}, "'lora_alpha': here it is alpha; LoRA's s = lora_alpha / r is scaling='rank'"),
        ({"lora_dropout": 0.1}, "'lora_dropout': here it is krona_dropout."),
        ({"init_lora_weights": "gaussian"}, "'init_lora_weights': here it is init_weights (True, 'diffusekrona',"),
        ({"use_rslora": True}, "'use_rslora': here it is scaling='rslora'"),
        ({"use_dora": True}, "'use_dora': DoRA's magnitudes has no counterpart here; leave it out."),
        ({"loftq_config": {}}, "'loftq_config': LoftQ has no counterpart"),
        ({"megatron_config": None}, "'megatron_config': it has no counterpart here; leave it out."),
        ({"decompose_factor": 16}, "'decompose_factor': here it is the left factor's size, a_out and a_in"),
        ({"rank_dropout": 0.1}, "'rank_dropout': here it is krona_dropout (on the adapter's input) or module_dropout"),
        ({"network_dim": 16}, "'network_dim': here it is r, the number of Kronecker terms (not a rank"),
        ({"a1": 4, "a2": 64}, "'a1': here it is a_in: the paper's (a1, a2) is (a_in, a_out).; 'a2': here it is a_out:"),
        ({"target_module": ["q"]}, "'target_module': did you mean target_modules?"),
        ({"A_out": 4}, "'A_out': did you mean a_out?"),
        ({"drop": 1, "xyzzy": 1}, "'xyzzy': there are a_in, a_out, alpha, alpha_pattern"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_setting_of_another_name_says_what_it_is_called_here(wrong, words):
    with pytest.raises(ConfigTypeError, match=re.escape(words)) as caught:
        KronAConfig(**wrong)
    assert str(caught.value).startswith(f"KronAConfig got an unexpected keyword argument {next(iter(wrong))!r}: ")
    assert isinstance(caught.value, (TypeError, ValueError, ConfigError))


@pytest.mark.parametrize("name", sorted(THEIRS))
def test_every_setting_of_peft_s_lora_lokr_and_loha_has_an_answer(name):
    with pytest.raises(ConfigTypeError, match=rf"{name!r}: (here it is|.* has no counterpart here)"):
        KronAConfig(**{name: None})


def test_the_tables_name_nothing_that_exists_here():
    assert not OWN & {*MEANT, *WITHOUT} and not MEANT.keys() & WITHOUT.keys()
    for name, said in MEANT.items():
        assert any(re.search(rf"\b{own}\b", said) for own in OWN) or name == "use_effective_conv2d", name


def test_signature_positions_and_subclasses_are_the_dataclass_s():
    parameters = inspect.signature(KronAConfig).parameters
    assert list(parameters) == [f.name for f in dataclasses.fields(KronAConfig) if f.init]
    assert parameters["a_out"].default == 64 and parameters["a_out"].annotation == "int"
    assert dataclasses.replace(KronAConfig(r=2), a_in=8).r == 2
    with pytest.raises(TypeError, match="positional argument"):
        KronAConfig(*range(99))

    @dataclasses.dataclass
    class Own(KronAConfig):
        mine: int = 3

    assert Own(mine=4, a_in=2).mine == 4


def test_a_config_of_a_newer_version_is_still_read_with_peft_s_warning(tmp_path):
    KronAConfig(r=2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 2', '"r": 2, "a_setting_of_the_future": 1'))
    with pytest.warns(UserWarning, match="a_setting_of_the_future.*are ignored"):
        assert PeftConfig.from_pretrained(str(tmp_path)).r == 2
    assert KronAConfig.from_peft_type(peft_type="KRONA", r=3).r == 3


# -- something else in the place of a KronAConfig ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, words",
    [
        (LoraConfig(r=4), "got LoraConfig, which is an adapter of another kind: model.add_adapter(config) or get_peft"),
        (LoKrConfig(), "got LoKrConfig, which is an adapter of another kind"),
        (KronAConfig, "got the class KronAConfig. Write KronAConfig(), with brackets."),
        ({"r": 2}, "got {'r': 2} of type dict. Write KronAConfig(**settings)."),
        ("to_q", "got 'to_q' of type str."),
        (16, "got 16 of type int."),
    ],
    ids=lambda v: type(v).__name__,
)
def test_other_configs_are_refused_by_type(value, words, tmp_path):
    pipe = tiny.sd_pipeline()
    calls = {
        "Expected a KronAConfig or None for config, ": lambda: peft_krona.add_krona(pipe, value),
        "Expected a KronAConfig, True or None for text_encoder_config, ": (
            lambda: peft_krona.add_krona(pipe, text_encoder_config=value)
        ),
        "Expected a KronAConfig or None for config, got": lambda: peft_krona.load_krona_weights(
            pipe, tmp_path, config=value
        ),
    }
    for start, call in calls.items():
        with pytest.raises(ConfigTypeError) as caught:
            call()
        assert str(caught.value).startswith(start) and words in str(caught.value)
        assert not hasattr(pipe.unet, "peft_config") and not hasattr(pipe.text_encoder, "peft_config")


def test_an_argument_that_nobody_reads_is_refused(tmp_path):
    pipe = tiny.sd_pipeline()
    peft_krona.add_krona(pipe, KronAConfig(a_out=4, a_in=2))
    peft_krona.save_krona_weights(pipe, tmp_path)
    pipe = tiny.sd_pipeline()
    with pytest.raises(ConfigTypeError, match=r"argument 'is_trainable'.*can be trained without any"):
        peft_krona.load_krona_weights(pipe, tmp_path, is_trainable=True)
    pipe.unet.requires_grad_(False)
    peft_krona.load_krona_weights(pipe, tmp_path, local_files_only=True)
    assert {n.split(".")[-2] for n, p in pipe.unet.named_parameters() if p.requires_grad} == {"krona_A", "krona_B"}


# -- r -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"r": 16}, True),
        ({"r": 5}, True),
        ({"rank_pattern": {"lin0": 8}}, True),
        ({"r": 4}, False),
        ({"r": 16, "scaling": "cdka"}, False),
        ({"r": 16, "init_weights": "cdka"}, False),
        ({"r": 16, "inference_mode": True}, False),
    ],
    ids=str,
)
def test_that_r_counts_terms_is_said_once(settings, said, monkeypatch, caplog):
    monkeypatch.setattr(share, "_said_that_r_counts_terms", False)
    with caplog.at_level(logging.INFO, "peft_krona"):
        for _ in range(2):
            model = adapted_mlp(**settings)
    lines = [record.getMessage() for record in caplog.records if "counts Kronecker terms" in record.getMessage()]
    assert len(lines) == said
    if said:
        r = max(settings.get("r", 1), *settings.get("rank_pattern", {}).values(), 0)
        n = sum(p.numel() for name, p in model.named_parameters() if "krona_" in name)
        one = sum(p.numel() for name, p in adapted_mlp().named_parameters() if "krona_" in name)
        assert f"r={r})" in lines[0] and f"has {n:,} parameters; with r=1 it has {one:,}." in lines[0]
        assert n == r * one or "rank_pattern" in settings


def test_the_line_has_the_numbers_of_a_pipeline(monkeypatch, caplog):
    monkeypatch.setattr(share, "_said_that_r_counts_terms", False)
    unet = tiny.unet()
    unet.add_adapter(KronAConfig(r=16, a_out=8, a_in=2))
    n = sum(p.numel() for name, p in unet.named_parameters() if "krona_" in name)
    assert f"has {n:,} parameters; with r=1 it has {n // 16:,}." in caplog.text


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_saved_folder_says_what_to_import(tmp_path):
    model = get_peft_model(mlp(), config(["lin0"]))
    for _ in range(2):  # saved again: the words are there once
        model.save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert text.count("`import peft_krona` before loading it") == 1 and "library_name: peft" in text
        assert "### Framework versions" in text
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    names = {"base_model": mlp()}
    exec(code.replace("this folder", str(tmp_path)), names)
    assert isinstance(names["model"], PeftModel)
    get_peft_model(mlp(), LoraConfig(target_modules=["lin0"])).save_pretrained(tmp_path / "lora")
    assert "peft_krona" not in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")


def test_what_is_said_without_the_import(tmp_path):
    """The table of docs/troubleshooting.md: README, cards and docs explain these."""
    pipe = tiny.sd_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    peft_krona.add_krona(pipe, KronAConfig(a_out=4, a_in=2))
    peft_krona.save_krona_weights(pipe, tmp_path / "adapter")
    code = f"""
from diffusers import StableDiffusionPipeline
from peft import PeftConfig
folder, file = {str(tmp_path / "adapter")!r}, {{"weight_name": "adapter_model.safetensors"}}
pipe = StableDiffusionPipeline.from_pretrained({str(tmp_path / "base")!r})
for call in (
    lambda: PeftConfig.from_pretrained(f"{{folder}}/unet"),
    lambda: pipe.text_encoder.load_adapter(f"{{folder}}/unet"),
    lambda: pipe.load_lora_weights(folder),
    lambda: pipe.load_lora_weights(f"{{folder}}/unet", **file),
    lambda: pipe.unet.load_lora_adapter(f"{{folder}}/unet", prefix=None, **file),
):
    try:
        call()
        print("no error")
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}".replace("`", ""))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    page = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = re.findall(r"^\| `([^`]+)` \|", page.partition("## Loading and saving")[0], flags=re.MULTILINE)
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 5 and len(said) == 4, (result.stdout, result.stderr)
    for message, line in zip([said[0], *said], lines, strict=True):
        assert message in line
