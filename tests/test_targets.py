# SPDX-License-Identifier: Apache-2.0
"""Which layers are adapted by default, and how much of a model that is."""

import re
import warnings

import diffusers
import pytest
import torch
from adapted import adapted_mlp, mlp
from peft import PeftMixedModel, get_peft_model
from tiny import DENOISERS, flux_pipeline, tiny_denoiser
from torch import nn

from peft_krona import KronAConfig, KronALayer, _register
from peft_krona.errors import ConfigError
from peft_krona.pipelines import add_krona
from peft_krona.share import Share, line, share_of
from peft_krona.targets import DIFFUSERS_TARGET_MODULES

ATTENTION = r"to_[qkv]|to_out\.0"
BOTH_STREAMS = rf"attn\.({ATTENTION}|add_[qkv]_proj|to_add_out)"

# What diffusers' LoRA script of each family trains, as a regex over the names of the layers: {class: (regex, number)}.
WANTED = {
    "UNet2DConditionModel": (rf".*attn[12]\.({ATTENTION})", 4 * 2 * 4),
    "SD3Transformer2DModel": (rf"transformer_blocks\.\d+\.{BOTH_STREAMS}", 8 + 7),  # the last block has no to_add_out
    "FluxTransformer2DModel": (
        rf"transformer_blocks\.0\.({BOTH_STREAMS}|ff(_context)?\.net\.(0\.proj|2))|"
        r"single_transformer_blocks\.0\.attn\.to_[qkv]",
        12 + 3,
    ),
    "Flux2Transformer2DModel": (
        rf"transformer_blocks\.\d\.attn\.({ATTENTION})|single_transformer_blocks\.\d\.attn\.(to_qkv_mlp_proj|to_out)",
        2 * 4 + 2 * 2,
    ),
    "QwenImageTransformer2DModel": (rf"transformer_blocks\.\d\.attn\.({ATTENTION})", 2 * 4),
    "ZImageTransformer2DModel": (rf"(layers|noise_refiner|context_refiner)\.\d\.attention\.({ATTENTION})", 4 * 4),
    "Krea2Transformer2DModel": (
        rf".*\.({ATTENTION}|to_gate|ff\.up|ff\.down)|img_in|final_layer\.linear|text_fusion\.projector|"
        r"(txt_in|time_embed)\.linear_[12]|time_mod_proj",
        4 * 7 + 8,
    ),
    "Ideogram4Transformer2DModel": (rf"layers\.\d\..*\.({ATTENTION}|w[123])", 2 * 7),
    "Lumina2Transformer2DModel": (rf".*\.({ATTENTION})", 4 * 4),
    "SanaTransformer2DModel": (r".*\.to_[qkv]", 2 * 2 * 3),
    "HiDreamImageTransformer2DModel": (r".*\.(to_[qkv]|to_out)", 2 * 4),
    "CogVideoXTransformer3DModel": (rf".*\.({ATTENTION})", 2 * 4),
    "CosmosTransformer3DModel": (rf".*\.({ATTENTION}|ff\.net\.0\.proj|ff\.net\.2)", 2 * (2 * 4 + 2)),
}


def adapted(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, KronALayer)}


def config(**fields) -> KronAConfig:
    return KronAConfig(a_out=4, a_in=2, **fields)


@pytest.mark.parametrize("name", WANTED)
def test_default_layers_of_every_family(name):
    regex, number = WANTED[name]
    model = tiny_denoiser(name)
    wanted = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(regex, n)}
    assert len(wanted) == number
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = get_peft_model(model, config())
    assert adapted(model.base_model.model) == wanted


def test_every_entry_is_a_class_of_diffusers_and_is_tested():
    assert set(DIFFUSERS_TARGET_MODULES) == set(WANTED)
    assert all(hasattr(diffusers, name) for name in DIFFUSERS_TARGET_MODULES)


def test_a_subclass_has_the_layers_of_its_base_and_so_has_a_compiled_model():
    class Mine(type(flux_pipeline().transformer)):
        pass

    for model in (Mine(**DENOISERS["FluxTransformer2DModel"]), torch.compile(flux_pipeline().transformer)):
        assert len(adapted(get_peft_model(model, config()))) == WANTED["FluxTransformer2DModel"][1]


def test_default_layers_of_a_pipeline_and_of_a_second_adapter():
    pipe = flux_pipeline()
    add_krona(pipe, config())
    first = adapted(pipe.transformer)
    add_krona(pipe, config(), adapter_name="second")
    assert adapted(pipe.transformer) == first and len(first) == WANTED["FluxTransformer2DModel"][1]
    assert all("second" in m.krona_A for m in pipe.transformer.modules() if isinstance(m, KronALayer))


def test_default_layers_with_layers_to_transform():
    model = get_peft_model(
        tiny_denoiser("Flux2Transformer2DModel"),
        config(layers_to_transform=[1], layers_pattern="single_transformer_blocks"),
    )
    assert adapted(model.base_model.model) == {
        f"single_transformer_blocks.1.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")
    }
    other = config(layers_to_transform=0, layers_pattern=["transformer_blocks"])
    model = get_peft_model(tiny_denoiser("Flux2Transformer2DModel"), other)
    assert len(adapted(model)) == 4 and all(".transformer_blocks.0." in name for name in adapted(model))


def test_default_layers_survive_a_save(tmp_path):
    from peft import PeftModel

    name = "Flux2Transformer2DModel"
    model = get_peft_model(tiny_denoiser(name), config(init_weights=False))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        loaded = PeftModel.from_pretrained(tiny_denoiser(name), tmp_path)
    assert adapted(loaded) == adapted(model)


def test_a_model_without_an_entry_gets_its_attention_and_a_warning_with_the_share():
    model = tiny_denoiser("ChromaTransformer2DModel")
    with pytest.warns(RuntimeWarning) as caught:
        model = get_peft_model(model, config())
    share = share_of(model)
    assert {n.rpartition("attn.")[2] for n in adapted(model)} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert (share.linear, share.all_linear) == (7, 24) and 0 < share.of_weights < 0.2
    assert str(caught[0].message) == (
        "KronAConfig.target_modules is None and ChromaTransformer2DModel has no entry in "
        "peft_krona.targets.DIFFUSERS_TARGET_MODULES, so its attention projections are adapted: 7 of 24 Linear layers, "
        f"{100 * share.of_weights:.1f}% of the weights. Pass target_modules (or 'all-linear') to choose the layers "
        "yourself."
    )


def test_no_warning_where_the_user_chose_or_the_share_is_large():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        get_peft_model(tiny_denoiser("ChromaTransformer2DModel"), config(target_modules=["to_q"]))
        get_peft_model(tiny_denoiser("PixArtTransformer2DModel"), config())  # no entry, but mostly attention


def test_a_model_of_which_nothing_has_a_default_name():
    model = tiny_denoiser("JoyImageEditPlusTransformer3DModel")
    with pytest.raises(ConfigError) as error:
        get_peft_model(model, config())
    assert str(error.value).startswith(
        "JoyImageEditPlusTransformer3DModel: KronAConfig.target_modules is None, and none of its layers has one of the "
        "names that are adapted by default (to_q, to_k, to_v, to_out.0). Pass target_modules: 'all-linear', or some of "
        "the names of its Linear layers ("
    )
    assert "img_attn_qkv" in str(error.value) and not adapted(model)


# -- the share ---------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Linear 6 x 4 (with bias), a convolution, an embedding that a head shares its weight with."""

    def __init__(self):
        super().__init__()
        self.lin, self.conv, self.embed = nn.Linear(4, 6), nn.Conv2d(4, 8, 3, bias=False), nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


ALL = 6 * 4 + 6 + 8 * 4 * 9 + 10 * 4


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["lin"], Share(1, 2, 0, 24, ALL)),
        (["lin", "conv"], Share(1, 2, 1, 24 + 288, ALL)),
        (["conv", "embed"], Share(0, 2, 2, 288 + 40, ALL)),
        ("all-linear", Share(2, 2, 0, 24 + 40, ALL)),
    ],
    ids=str,
)
def test_share(targets, wanted):
    for low_cpu_mem_usage in (False, True):  # a meta device has sizes as well
        model = get_peft_model(
            Tied(), KronAConfig(target_modules=targets, a_out=2, a_in=2), low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert share_of(model) == share_of(model.base_model.model) == wanted


def test_share_is_of_the_active_adapter_or_the_named_one():
    model = get_peft_model(Tied(), KronAConfig(target_modules=["lin"], a_out=2, a_in=2))
    model.add_adapter("second", KronAConfig(target_modules=["lin", "conv"], a_out=2, a_in=2, modules_to_save=["embed"]))
    assert share_of(model) == Share(1, 2, 0, 24, ALL)
    assert share_of(model, "second") == Share(1, 2, 1, 24 + 288, ALL)
    model.set_adapter("second")
    assert share_of(model) == Share(1, 2, 1, 24 + 288, ALL)
    assert line(Tied()) is None and share_of(Tied()) == Share(0, 2, 0, 0, ALL) and share_of(nn.ReLU()).of_weights == 0


def test_print_of_a_mixed_model_and_of_other_tuners(capsys):
    from peft import LoraConfig

    model = PeftMixedModel(mlp(), KronAConfig(target_modules=["lin0"], a_out=2, a_in=2))
    model.print_trainable_parameters()
    assert capsys.readouterr().out.endswith("\nKronA adapts 1 of 2 Linear layers, 46.7% of the weights\n")
    get_peft_model(mlp(), LoraConfig(target_modules=["lin0"])).print_trainable_parameters()
    assert capsys.readouterr().out.count("\n") == 1


def test_the_line_is_printed_once_however_often_it_is_registered(capsys):
    _register.add_to_print(line)
    adapted_mlp().print_trainable_parameters()
    assert capsys.readouterr().out.count("KronA adapts") == 1


# -- patterns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern", "factor_pattern"])
def test_keys_of_patterns_that_match_no_layer_warn(pattern):
    value = (2, 2) if pattern == "factor_pattern" else 2
    keys = {"lin0": value, r"li.\d": value, "0": value, "lin": value, "lin1": value}
    with pytest.warns(RuntimeWarning) as caught:
        get_peft_model(mlp(), KronAConfig(target_modules=["lin0"], a_out=2, a_in=2, **{pattern: keys}))
    assert [str(w.message) for w in caught] == [
        f"The following {pattern} keys did not match any targeted module and were ignored: ['0', 'lin', 'lin1']."
    ]


def test_keys_that_match_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        get_peft_model(mlp(), KronAConfig(target_modules=["lin0"], a_out=2, a_in=2, factor_pattern={"lin0": (5, 2)}))
