# SPDX-License-Identifier: Apache-2.0
"""Files as they are found: spellings of prefixes, bookkeeping numbers, several formats in one file, foreign keys, and
PEFT folders whose settings change what is computed."""

import json
import logging
import re

import pytest
import torch
from convert_fixtures import relative
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from rounding import STORED
from safetensors.torch import load_file, save_file
from torch import nn

from peft_krona.convert import AdapterFile, LayerUpdate, export, from_tensors, read_adapter
from peft_krona.convert.file_names import from_name, resolve
from peft_krona.errors import FormatError

# -- names -------------------------------------------------------------------------------------------------------------

UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
LDM = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
FLUX = "single_transformer_blocks.3.attn.to_q"
CLIP = "text_model.encoder.layers.1.mlp.fc1"
WRAPPERS = ("", "base_model.model.", "base_model.model.base_model.model.", "module.", "_orig_mod.")
DOTTED = {
    "unet.": ("unet", (UNET, LDM)),
    "diffusion_model.": ("unet", (UNET, LDM)),
    "model.diffusion_model.": ("unet", (UNET, LDM)),
    "lora_unet.": ("unet", (UNET, LDM)),
    "lycoris.": ("unet", (UNET,)),
    "": ("unet", (UNET, LDM)),
    "transformer.": ("transformer", (FLUX,)),
    "transformer.diffusion_model.": ("transformer", (FLUX,)),
    "lora_transformer.": ("transformer", (FLUX,)),
    "text_encoder.": ("text_encoder", (CLIP, CLIP.removeprefix("text_model."))),
    "text_encoder_2.": ("text_encoder_2", (CLIP, CLIP.removeprefix("text_model."))),
    "te.": ("text_encoder", (CLIP,)),
    "te1.": ("text_encoder", (CLIP,)),
    "te2.": ("text_encoder_2", (CLIP,)),
    "lora_te1.": ("text_encoder", (CLIP,)),
    "text_encoders.clip_l.transformer.": ("text_encoder", (CLIP,)),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", (CLIP,)),
}
FLAT = {
    "lora_unet_": ("unet", (UNET, LDM)),
    "lycoris_": ("unet", (UNET, LDM)),
    "unet.": ("unet", (UNET,)),
    "lora_transformer_": ("transformer", (FLUX,)),
    "lora_te_": ("text_encoder", (CLIP, CLIP.removeprefix("text_model."))),
    "lora_te1_": ("text_encoder", (CLIP,)),
    "lora_te2_": ("text_encoder_2", (CLIP,)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_combination_of_prefixes(wrapper):
    module = {"unet": UNET, "transformer": FLUX, "text_encoder": CLIP, "text_encoder_2": CLIP}
    for table, flat in ((DOTTED, False), (FLAT, True)):
        for prefix, (component, names) in table.items():
            for name in names:
                name = name.replace(".", "_") if flat else name
                wanted = (component, module[component])
                assert from_name(f"{wrapper}{prefix}{name}") == wanted, f"{wrapper}{prefix}{name}"
                if prefix.endswith("."):  # a wrapper inside, and a container twice
                    assert from_name(f"{prefix}{wrapper}{name}") == wanted
                    assert from_name(f"{prefix}{prefix}{name}") == wanted
                if not flat:
                    assert from_name(f"{wrapper}{prefix}{name.replace('.attn', '._orig_mod.attn')}") == wanted


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vae.decoder.conv_in", "does not begin with a part of a pipeline such as 'unet.'"),
        ("image_encoder.layers.0.q", "does not begin with a part"),
        ("text_encoders.qwen.model.layers.0.q_proj", "does not begin with a part"),
        ("unet.text_encoder.encoder.layers.0.mlp.fc1", "names two parts of a pipeline, text_encoder and unet"),
        ("lora_te1_lora_te2_text_model_encoder_layers_0_mlp_fc1", "names two parts of a pipeline"),
        ("transformer.down_blocks.0.resnets.0.conv1", "layers of a UNet and of a transformer"),
        ("lora_unet_something_else", "Nothing in the layer names tells"),
        ("lycoris_blocks_0_new_thing", r"'blocks_0_new_thing' cannot be read. Give the base model's folder"),
        ("diffusion_model.blocks.0.self_attn.q", "cannot be read. Give the base model's folder"),
    ],
)
def test_unknown_containers_and_layers_are_errors(name, message):
    with pytest.raises(FormatError, match=message):
        from_name(name)


QWEN = "model.layers.3.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
Z_IMAGE = "layers.0.attention.to_q"


@pytest.mark.parametrize(
    ("name", "container"),
    [
        (f"unet.foo.{UNET}", "foo"),
        (f"unet.foo.bar.{UNET}", "foo.bar"),
        (f"unet.vae.{UNET}", "vae"),
        (f"unet.controlnet.{UNET}", "controlnet"),
        (f"base_model.model.unet.foo.{UNET}", "foo"),
        (f"transformer.foo.{FLUX}", "foo"),
        (f"transformer.unet_2.{FLUX}", "unet_2"),
        (f"transformer.foo.{Z_IMAGE}", "foo"),
        (f"lycoris.transformer.foo.{FLUX}", "foo"),
        (f"text_encoder.foo.{CLIP}", "foo"),
        (f"text_encoder_2.clip_g.{CLIP}", "clip_g"),
        (f"text_encoder_3.foo.{T5}", "foo"),
        (f"text_encoder.foo.{QWEN}", "foo.model"),
        (f"lora_te1.foo.{CLIP}", "foo"),
    ],
)
def test_an_unknown_container_inside_a_component_is_an_error_by_name(name, container):
    with pytest.raises(FormatError, match=rf"'{re.escape(name)}' has '{re.escape(container)}' before '"):
        from_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "unet.down_blocks.0.foo.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.foo.transformer_blocks.0.attn1.to_q",
        "unet.mid_block.foo.0.conv1",
        "unet.foo.conv1",
        "unet.foo_mid_block_attentions_0_proj_in",
        "lora_unet_foo_mid_block_attentions_0_proj_in",
        "lora_te1_foo_text_model_encoder_layers_0_mlp_fc1",
    ],
)
def test_unknown_words_within_a_name_are_errors(name):
    with pytest.raises(FormatError, match=r"cannot be read|Nothing in the layer names|does not begin with"):
        from_name(name)


@pytest.mark.parametrize(
    "name",
    [
        f"text_encoder.{QWEN}",
        f"text_encoder.model.language_model.{QWEN.removeprefix('model.')}",
        "text_encoder.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        f"text_encoder_3.{T5}",
        "text_encoder.model.visual.blocks.0.attn.qkv",
        "transformer.distilled_guidance_layer.layers.0.linear_1",
        "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
        "transformer.outer.0.transformer_blocks.0.attn.to_q",
        "unet.down_blocks.1.motion_modules.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.1.temp_attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.mid_block.attentions.0.to_q",
        "unet.encoder_hid_proj.image_projection_layers.0.proj",
        "unet.transformer_in.transformer_blocks.0.attn1.to_q",
    ],
)
def test_names_of_models_that_are_not_known_stay_as_they_are(name):
    assert ".".join(from_name(name)) == name


DIFFUSERS = {
    "time_text_embed_timestep_embedder_linear_1": "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed_text_embedder_linear_2": "time_text_embed.text_embedder.linear_2",
    "time_text_embed_guidance_embedder_linear_1": "time_text_embed.guidance_embedder.linear_1",
    "norm_out_linear": "norm_out.linear",
    "pos_embed_proj": "pos_embed.proj",
    "txt_in_linear_1": "txt_in.linear_1",
}


@pytest.mark.parametrize(
    "outside",
    [
        "proj_out", "x_embedder", "context_embedder", "time_text_embed_timestep_embedder_linear_1", "norm_out_linear",
        "time_text_embed_text_embedder_linear_2", "time_text_embed_guidance_embedder_linear_1", "txt_in_linear_1",
        "img_in", "pos_embed_proj",
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "lora_transformer_"])
def test_layers_outside_the_blocks_are_of_the_same_model_as_the_others(prefix, outside):
    if prefix == "lora_unet_" and outside in ("img_in", "x_embedder"):
        with pytest.raises(FormatError, match=r"mean different layers by them\. Give the base model's folder"):
            from_name(prefix + outside)  # of Qwen-Image, or of Flux in the original code's names
    else:
        assert from_name(prefix + outside) == ("transformer", DIFFUSERS.get(outside, outside))
    if outside == "txt_in_linear_1":
        return  # of Krea 2, whose blocks are others
    both = resolve({f"{prefix}{outside}": None, f"{prefix}transformer_blocks_0_attn_to_q": None})
    assert {target.component for target in both.values()} == {"transformer"}
    with pytest.raises(FormatError, match="layers of a UNet and of a transformer, 'l"):
        resolve({f"{prefix}{outside}": None, f"{prefix}mid_block_attentions_0_proj_in": None})


def test_names_are_looked_up_in_the_model_where_it_is_known():
    known = {"transformer": {"blocks.0.new_thing.up": (4, 4), "a.b_c": (4, 4), "a_b.c": (4, 4)}}
    target = resolve({"lycoris_blocks_0_new_thing_up": None}, known)["lycoris_blocks_0_new_thing_up"]
    assert (target.component, target.modules) == ("transformer", ("blocks.0.new_thing.up",))
    with pytest.raises(
        FormatError, match=r"'lycoris_a_b_c' may be a\.b_c or a_b\.c of the base model; it is ambiguous"
    ):
        resolve({"lycoris_a_b_c": None}, known)
    with pytest.raises(
        FormatError, match=r"transformer\.transformer_blocks\.0\.attn\.to_q: the base model has no such"
    ):
        resolve({"transformer.transformer_blocks.0.attn.to_q": None}, known)


# -- bookkeeping numbers -----------------------------------------------------------------------------------------------

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
FULL = {f"{NAME}.lokr_w1": torch.ones(4, 2), f"{NAME}.lokr_w2": torch.ones(8, 16)}
LOW = {
    f"{NAME}.lokr_w1": torch.ones(4, 2),
    f"{NAME}.lokr_w2_a": torch.ones(8, 4),
    f"{NAME}.lokr_w2_b": torch.ones(4, 16),
}
LORA = {f"{NAME}.lora_down.weight": torch.ones(4, 32), f"{NAME}.lora_up.weight": torch.ones(32, 4)}
LOHA = {
    f"{NAME}.hada_w1_a": torch.ones(32, 4), f"{NAME}.hada_w1_b": torch.ones(4, 32),
    f"{NAME}.hada_w2_a": torch.ones(32, 4), f"{NAME}.hada_w2_b": torch.ones(4, 32),
}  # fmt: skip
FILES = {"full": FULL, "low": LOW, "lora": LORA, "loha": LOHA}
NUMBERS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_alpha_of_any_dtype_and_shape(kind, tmp_path):
    for dtype in NUMBERS:
        for shape in ((), (1,), (1, 1)):
            alpha = torch.tensor(2.0).to(dtype).reshape(shape)
            save_file(FILES[kind] | {f"{NAME}.alpha": alpha}, tmp_path / "x.safetensors")
            (layer,) = read_adapter(tmp_path / "x.safetensors")
            value = 1.0 if dtype is torch.bool else 2.0
            assert layer.scale == (1.0 if kind == "full" else value / 4), (dtype, shape)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("-inf"), float("nan"), None, (1.0, 2.0)])
def test_alpha_counts_only_where_a_factor_is_low_rank(kind, alpha, tmp_path):
    """LyCORIS, ComfyUI and A1111 ignore it for two full LoKr factors, whatever it is."""
    extra = {} if alpha is None else {f"{NAME}.alpha": torch.tensor(alpha)}
    save_file(FILES[kind] | extra, tmp_path / "x.safetensors")
    if kind == "full" or alpha is None:
        assert read_adapter(tmp_path / "x.safetensors").layers[0].scale == 1.0
    else:
        with pytest.raises(FormatError, match=rf"'{NAME}\.alpha' should be one positive number that is finite"):
            read_adapter(tmp_path / "x.safetensors")


def test_weights_are_floating_point_all_the_same(tmp_path):
    save_file(LORA | {f"{NAME}.lora_up.weight": torch.ones(32, 4, dtype=torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="has dtype I8; adapter weights are one of"):
        read_adapter(tmp_path / "x.safetensors")


DOT = "transformer.transformer_blocks.0.attn.to_q"
PEFT_NAMES = {f"{DOT}.lora_A.weight": torch.ones(16, 8), f"{DOT}.lora_B.weight": torch.ones(8, 16)}
LOKR_NAMES = {
    f"{DOT}.lokr_w1": torch.ones(4, 2),
    f"{DOT}.lokr_w2_a": torch.ones(2, 16),
    f"{DOT}.lokr_w2_b": torch.ones(16, 4),
}


@pytest.mark.parametrize("weights", [PEFT_NAMES, LOKR_NAMES], ids=["lora", "lokr"])
@pytest.mark.parametrize(
    ("header", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": "64", "r": "16"}, 4.0),
        ({"transformer.lora_alpha": "64", "transformer.r": "16"}, 4.0),
        ({"unet.lora_alpha": "64"}, 1.0),  # of another part
        ({"network_alpha": "32"}, 2.0),
        ({"ss_network_dim": "16", "ss_network_alpha": "64"}, 4.0),
        ({"ss_network_alpha": "None"}, 1.0),
        ({"config": json.dumps({"lora_alpha": 64, "r": 16})}, 4.0),
        ({"config": json.dumps({"transformer": {"lora_alpha": 64}})}, 4.0),
        ({"comment": "{lora_alpha is 64}"}, 1.0),
    ],
)
def test_alpha_that_stands_only_in_the_header(weights, header, scale, caplog):
    with caplog.at_level(logging.WARNING):
        (layer,) = from_tensors(weights, header)
    assert layer.scale == scale
    assert ("that of its header is taken" in caplog.text) == (scale != 1.0)
    with_tensor = {**weights, f"{DOT}.alpha": torch.tensor(8.0)}  # kohya's own files have both
    assert from_tensors(with_tensor, header).layers[0].scale == 0.5


def test_a_header_with_an_alpha_that_is_none():
    with pytest.raises(FormatError, match=r"The header's lora_alpha is 'nan'; expected a positive number"):
        from_tensors(PEFT_NAMES, {"lora_alpha": "nan"})


@pytest.mark.parametrize(
    ("table", "scale"),
    [
        ({"lora_alpha": 64, "use_rslora": True}, 16.0),
        ({"lora_alpha": 64, "alpha_pattern": {"to_q": 32}}, 2.0),
        ({"lora_alpha": 64, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 16}}, 1.0),
        ({"lora_alpha": 64, "alpha_pattern": {"to_k": 32}}, 4.0),
        ({"text_encoder": {"lora_alpha": 2}, "transformer": {"lora_alpha": 64}}, 4.0),
        ({"transformer": {"lora_alpha": 64, "alpha_pattern": {"to_q": 32}, "use_rslora": True}}, 8.0),
    ],
    ids=str,
)
def test_settings_that_stand_only_in_the_header(table, scale):
    """As PEFT computes s from them."""
    assert from_tensors(PEFT_NAMES, {"config": json.dumps(table)}).layers[0].scale == scale


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"use_dora": True}, "use_dora is set; DoRA"), ({"init_lora_weights": "pissa"}, "also changed the base weights")],
)
def test_settings_in_the_header_that_are_another_update(setting, message):
    with pytest.raises(FormatError, match=message):
        from_tensors(PEFT_NAMES, {"config": json.dumps({"lora_alpha": 16} | setting)})


# -- formats -----------------------------------------------------------------------------------------------------------


def test_every_layer_has_its_own_format():
    """LyCORIS' module_algo_map: LoKr on attention, LoRA on feed-forward, LoHa elsewhere; read exactly, one by one."""
    torch.manual_seed(0)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0"
    w1, w2 = torch.randn(4, 2), torch.randn(8, 16)
    down, up = torch.randn(4, 32), torch.randn(128, 4)
    hada = [torch.randn(*shape) for shape in ((32, 3), (3, 32), (32, 2), (2, 32))]
    file = {f"{stem}_attn1_to_q.lokr_w1": w1, f"{stem}_attn1_to_q.lokr_w2": w2}
    file |= {f"{stem}_ff_net_2.lora_down.weight": down, f"{stem}_ff_net_2.lora_up.weight": up}
    file |= {f"{stem}_attn2_to_q.hada_{end}": t for end, t in zip(("w1_a", "w1_b", "w2_a", "w2_b"), hada, strict=True)}
    file |= {f"{stem}_ff_net_2.alpha": torch.tensor(2.0), f"{stem}_attn2_to_q.alpha": torch.tensor(6.0)}
    adapter = from_tensors(file)
    w1_a, w1_b, w2_a, w2_b = (t.double() for t in hada)
    wanted = {
        "attn1.to_q": torch.kron(w1.double(), w2.double()),
        "ff.net.2": up.double() @ down.double() * 0.5,
        "attn2.to_q": (w1_a @ w1_b) * (w2_a @ w2_b) * 2,
    }
    assert adapter.source == "lokr+loha+lora" and len(adapter) == 3
    for layer in adapter:
        assert relative(layer.delta_weight(), wanted[layer.module.split("transformer_blocks.0.")[1]]) <= STORED


@pytest.mark.parametrize("second", [("lora_A.weight", "lora_B.weight"), ("down.weight", "up.weight")], ids=str)
def test_two_loras_of_one_layer_are_refused(second):
    down, up = second
    both = LORA | {f"{NAME}.{down}": torch.ones(2, 32), f"{NAME}.{up}": torch.ones(32, 2)}
    with pytest.raises(FormatError, match=r"has two LoRAs .*which of them counts is not defined"):
        from_tensors(both)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder_2.down_blocks.0.resnets.0.conv1",
        "lora_te1_up_blocks_0_attentions_0_proj_in",
        "lora_te_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
        "unet.text_model.encoder.layers.0.self_attn.q_proj",
        "transformer.text_model.encoder.layers.0.self_attn.q_proj",
        "lora_transformer_text_model_encoder_layers_0_self_attn_q_proj",
    ],
)
def test_layers_under_another_part_of_the_pipeline_are_refused(name):
    with pytest.raises(FormatError, match=rf"'{name}' .*by its (start|end)|'{name}' is not one|UNet and of a transf"):
        from_tensors({f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)})


@pytest.mark.parametrize(
    "parts",
    [
        {"lokr_w1": (4, 2), "lokr_w2": (8, 16)},
        {"lokr_w1": (4, 2), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 16), "alpha": ()},
        {"lora_down.weight": (4, 32), "lora_up.weight": (32, 4), "alpha": ()},
        {"lora_A.weight": (4, 32), "lora_B.weight": (32, 4)},
        {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32), "alpha": ()},
    ],
    ids=lambda parts: next(iter(parts)),
)
@pytest.mark.parametrize("scale", [(32, 1), (1, 32), (32,)], ids=str)
def test_dora_is_refused_by_name_in_every_format(parts, scale):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.{ending}": torch.ones(shape) for ending, shape in parts.items()}
    assert len(from_tensors(tensors)) == 1
    with pytest.raises(FormatError) as error:
        from_tensors(tensors | {f"{name}.dora_scale": torch.ones(scale)})
    assert str(error.value) == (
        f"'{name}' is DoRA ('dora_scale'): the layer's weight becomes m (W + dW) / ||W + dW||, which depends on W and "
        "is no plain low-rank update and no fixed Kronecker one. Merge the file with the tool that made it, then "
        "extract the difference of the two models."
    )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("out_0.w_norm", "normalisation layer.*read by LyCORIS, ComfyUI and A1111"),
        ("out_0.b_norm", "normalisation layer"),
        ("conv_in.diff_b", "the update of a bias"),
        ("conv_in.lora_B.bias", r"a bias that belongs to a LoRA layer \(lora_bias=True\)"),
        ("conv_in.lora_up.bias", "a bias that belongs to a LoRA layer"),
        ("conv_in.lora_magnitude_vector", "DoRA's magnitude"),
        ("conv_in.lora_magnitude_vector.default.weight", "DoRA's magnitude"),
        ("conv_in.oft_blocks", r"OFT, BOFT"),
        ("conv_in.oft_diag", r"OFT, BOFT"),
        ("conv_in.a1.weight", "GLoRA"),
        ("conv_in.on_input", "IA3"),
        ("conv_in.hada_t1", "LoHa in Tucker form"),
        ("conv_in.set_weight", "a whole weight that replaces"),
        ("token_adapter.trainable_tokens_delta", "embeddings of single tokens"),
        ("conv_in.vera_lambda_b", "of another PEFT method"),
    ],
)
def test_foreign_keys_are_named_with_who_reads_them(key, message):
    with pytest.raises(FormatError, match=rf"lora_unet_.*{message}"):
        from_tensors(LORA | {f"lora_unet_{key}": torch.ones(4)})


@pytest.mark.parametrize("key", ["bundle_emb.my-dog.string_to_param.*", "emb_params", "clip_l", "clip_g", "<my-dog>"])
def test_trained_words_are_named(key):
    with pytest.raises(FormatError, match=r"textual inversion.*kohya's tools, OneTrainer, A1111 and ComfyUI"):
        from_tensors(LORA | {key: torch.ones(4)})


def test_peft_state_dicts_with_the_adapters_name():
    plain = from_tensors(PEFT_NAMES)
    named = from_tensors({key.replace(".weight", ".default.weight"): t for key, t in PEFT_NAMES.items()})
    assert torch.equal(named.layers[0].A, plain.layers[0].A) and named.layers[0].name == plain.layers[0].name
    two = {key.replace(".weight", f".{name}.weight"): t for key, t in PEFT_NAMES.items() for name in ("a", "b")}
    with pytest.raises(FormatError, match="are the same weight of two adapters"):
        from_tensors(two)


# -- PEFT's folders ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.conv, self.emb = nn.Linear(24, 16), nn.Conv2d(4, 8, 3), nn.Embedding(20, 12)

    def forward(self, x):
        return x


PLAIN = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"lin": 2}, "alpha_pattern": {"conv": 7}},
    {"init_lora_weights": "orthogonal", "target_modules": ["lin"]},
    {"init_lora_weights": "gaussian"},
    {"fan_in_fan_out": False, "target_modules": ["emb", "lin"]},
]


def randomized(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name or "hada_" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("settings", PLAIN)
def test_lora_folders_are_what_peft_computes(settings, tmp_path):
    model = randomized(get_peft_model(Net(), LoraConfig(**{"r": 4, "target_modules": ["lin", "conv"]} | settings)))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    adapter = read_adapter(tmp_path)
    for layer in adapter:
        wanted = model.base_model.model.get_submodule(layer.module).get_delta_weight("default")
        wanted = wanted.T if layer.module == "emb" else wanted  # its table is (num_embeddings, embedding_dim)
        assert relative(layer.delta_weight(), wanted) <= STORED
    assert len(adapter) == len(settings.get("target_modules", ["lin", "conv"]))


def test_loha_folders_are_what_peft_computes(tmp_path):
    config = LoHaConfig(r=3, alpha=5, target_modules=["lin", "conv"], rank_pattern={"conv": 2})
    model = randomized(get_peft_model(Net(), config))
    model.save_pretrained(str(tmp_path))
    adapter = read_adapter(tmp_path).fitted({"model": {"lin": (16, 24), "conv": (8, 4, 3, 3)}})
    for layer in adapter:
        wanted = model.base_model.model.get_submodule(layer.module).get_delta_weight("default")
        assert relative(layer.delta_weight(), wanted.reshape(layer.shape)) <= STORED
    assert len(adapter) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"init_lora_weights": start}, f"init_lora_weights='{start}' also changed the base weights")
          for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga")),
        ({"init_lora_weights": "banana"}, "init_lora_weights='banana' is not known here"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set; aLoRA acts on"),
        ({"use_dora": True}, "use_dora is set; DoRA .* merge it with PEFT, then extract"),
        ({"use_qalora": True}, "use_qalora is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication is set"),
        ({"target_parameters": ["experts.w"]}, "target_parameters is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config is set"),
        ({"something_new": 3}, "something_new=3 is not known here; the update may be another"),
    ],
)  # fmt: skip
def test_lora_folders_whose_update_is_another_are_refused(change, message, tmp_path):
    get_peft_model(Net(), LoraConfig(r=4, target_modules=["lin"])).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig, LoKrConfig], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("change", [{"r": 8}, {"rank_pattern": {"lin": 3}}, {"r": 0}, {"r": "2"}], ids=str)
def test_folders_whose_ranks_are_not_the_configs_are_refused(kind, change, tmp_path):
    """PEFT does not load them; their scale alpha / r would be a guess."""
    get_peft_model(Net(), kind(r=2, target_modules=["lin"])).save_pretrained(str(tmp_path))
    if kind is LoKrConfig:  # whose factors are full with a rank as large as they are
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert any(key.endswith("_a") for key in tensors), sorted(tensors)
    assert len(read_adapter(tmp_path)) == 1
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=r"its factors have rank 2, but the config gives this layer r=|config's r is"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("inside", ["_orig_mod.", "base_model.model.", "module.", "base_model.model._orig_mod."])
def test_folders_of_wrapped_models(inside, tmp_path):
    layer = LayerUpdate("unet", UNET, torch.randn(1, 4, 2), torch.randn(1, 8, 16))
    export(AdapterFile((layer,)), tmp_path / "x", "peft")
    path = tmp_path / "x" / "unet" / "adapter_model.safetensors"
    tensors = {f"base_model.model.{inside}{UNET}.krona_{end}": t for end, t in (("A", layer.A), ("B", layer.B))}
    save_file(tensors, path)
    (again,) = read_adapter(tmp_path / "x")
    assert again.name == layer.name and torch.equal(again.A, layer.A)
