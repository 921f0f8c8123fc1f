# SPDX-License-Identifier: Apache-2.0
"""Every public method of diffusers' and transformers' LoRA mixins with a KronA adapter, as docs/diffusers.md says."""

import copy
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from adapted import krona_layers
from diffusers import (
    ControlNetModel,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from diffusers.loaders import lora_pipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import delete_adapter_layers, state_dict_utils
from peft import LoraConfig, get_peft_model_state_dict
from transformers.integrations.peft import PeftAdapterMixin as TransformersMixin

from peft_krona import KronAConfig, _diffusers
from peft_krona.errors import ConfigError, FormatError, UnsupportedLayerError
from peft_krona.pipelines import add_krona, load_krona_weights, save_krona_weights

PAGE = Path(__file__).parents[1] / "docs" / "diffusers.md"


def config(**kwargs):
    return KronAConfig(**{"a_out": 8, "a_in": 2, "init_weights": False, **kwargs})


def adapted_pipe(**names):
    """A tiny SD pipeline with KronA on UNet and text encoder."""
    pipe = tiny.sd_pipeline()
    torch.manual_seed(3)
    add_krona(pipe, config(alpha=0.5), text_encoder_config=config(r=2, target_modules=["q_proj", "fc1"]), **names)
    return pipe


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The pictures without and with the adapter, and where it is saved, once by us and once by diffusers."""
    folder, file = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("file")
    pipe = adapted_pipe()
    save_krona_weights(pipe, folder)
    parts = {f"{name}_lora_layers": get_peft_model_state_dict(getattr(pipe, name)) for name in ("unet", "text_encoder")}
    StableDiffusionPipeline.save_lora_weights(file, **parts)
    return {"base": tiny.image(tiny.sd_pipeline()), "image": tiny.image(pipe), "folder": folder, "file": file}


# -- the tables --------------------------------------------------------------------------------------------------------


def public_methods(*classes):
    return {
        name
        for cls in classes
        for name, value in vars(cls).items()
        if not name.startswith("_") and isinstance(value, (property, classmethod, staticmethod, type(public_methods)))
    }


def families():
    return [c for c in vars(lora_pipeline).values() if inspect.isclass(c) and issubclass(c, LoraBaseMixin)]


def documented(heading):
    section = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [part for part in section if part.startswith(heading)]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = re.findall(r"`(\w+)`", " ".join(cells))
    assert len(names) == len(set(names))
    return set(names)


@pytest.mark.parametrize(
    ("heading", "classes", "cases"),
    [
        ("Pipelines", families, "pipeline_"),
        ("Models", lambda: [PeftAdapterMixin], "model_"),
        ("Text encoders", lambda: [TransformersMixin], "transformers_"),
    ],
)
def test_every_public_method_is_in_the_table_and_tried(heading, classes, cases):
    methods = public_methods(*classes())
    assert documented(heading) == methods
    # what stands in one case's name is tried by that case
    tried = " ".join(name for name in globals() if name.startswith(f"{cases}"))
    assert not [name for name in methods if name not in tried and name not in SHARED]


# Tried by test_loading_into_one_component, as they are classmethods of many families with one body.
SHARED = {
    "load_lora_into_unet",
    "load_lora_into_transformer",
    "load_lora_into_transformer_ref",
    "load_lora_into_text_encoder",
    "load_lora_into_text_conditioner",
}


# -- pipelines ---------------------------------------------------------------------------------------------------------


def pipeline_load_lora_weights(known, tmp_path):
    for source in (known["folder"], known["file"], str(known["file"] / "pytorch_lora_weights.safetensors")):
        pipe = tiny.sd_pipeline()
        pipe.load_lora_weights(source, adapter_name="mine")
        assert torch.equal(tiny.image(pipe), known["image"])
        assert pipe.get_list_adapters() == {"unet": ["mine"], "text_encoder": ["mine"]}
    pipe.load_lora_weights(known["folder"])
    pipe.load_lora_weights(known["folder"])
    assert pipe.get_list_adapters()["unet"] == ["mine", "default_0", "default_1"]
    pipe = tiny.sd_pipeline()
    pipe.load_lora_weights(known["folder"] / "unet")
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}
    with pytest.raises(OSError, match=r"no file named none.safetensors"):  # diffusers' own message
        pipe.load_lora_weights(known["folder"], weight_name="none.safetensors")
    for name in ("a.safetensors", "b.safetensors"):  # which of them is meant?
        shutil.copy(known["file"] / "pytorch_lora_weights.safetensors", tmp_path / name)
    with pytest.raises(FormatError, match=r"several files of KronA .*'a.safetensors', 'b.safetensors'.* weight_name="):
        pipe.load_lora_weights(tmp_path)
    with pytest.raises(FormatError, match=r"several files of KronA"):
        pipe.unet.load_lora_adapter(tmp_path, prefix="unet")


def pipeline_save_lora_weights(known, tmp_path):
    pipe = adapted_pipe()
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(pipe.unet).items()}
    with pytest.raises(ConfigError, match=r"safetensors only; leave safe_serialization at True"):
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, safe_serialization=False)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)  # copies: whose are they?
    with pytest.raises(FormatError, match=r"no settings, .*load_krona_weights\(pipe, source, config=KronAConfig"):
        tiny.sd_pipeline().load_lora_weights(tmp_path)
    settings = pipe.unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=settings)
    loaded = tiny.sd_pipeline()
    loaded.load_lora_weights(tmp_path)
    pipe.text_encoder.delete_adapter("default")
    assert torch.equal(tiny.image(loaded), tiny.image(pipe))


def pipeline_lora_state_dict(known, tmp_path):
    states = [StableDiffusionPipeline.lora_state_dict(known[source])[0] for source in ("folder", "file")]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert {key.split(".")[0] for key in states[0]} == {"unet", "text_encoder"}
    pipe = tiny.sd_pipeline()
    pipe.load_lora_weights(states[0])
    assert torch.equal(tiny.image(pipe), known["image"])


def pipeline_unload_lora_weights(known, tmp_path):
    pipe = adapted_pipe()
    pipe.unload_lora_weights()
    assert torch.equal(tiny.image(pipe), known["base"]) and not pipe.get_list_adapters()
    assert not krona_layers(pipe.unet) and not krona_layers(pipe.text_encoder)


def pipeline_fuse_lora_unfuse_lora_fused_loras_num_fused_loras(known, tmp_path):
    pipe = adapted_pipe()
    pipe.fuse_lora(lora_scale=1.0)
    assert pipe.fused_loras == {"default"} and pipe.num_fused_loras == 1
    assert all(layer.merged for layer in (krona_layers(pipe.unet) | krona_layers(pipe.text_encoder)).values())
    assert not torch.equal(tiny.image(pipe), known["base"])
    pipe.unfuse_lora()
    assert torch.equal(tiny.image(pipe), known["image"]) and pipe.num_fused_loras == 0


def pipeline_set_adapters_lora_scale(known, tmp_path):
    pipe = adapted_pipe()
    assert pipe.lora_scale == 1.0
    pipe.set_adapters("default", 0.0)
    assert torch.equal(tiny.image(pipe), known["base"])
    pipe.set_adapters("default", {"unet": {"down": 0.5, "mid": 0.0, "up": {"block_1": 2.0}}, "text_encoder": 0.0})
    scales = {name.split(".")[0]: layer.scaling["default"] for name, layer in krona_layers(pipe.unet).items()}
    assert scales == {"down_blocks": 0.25, "mid_block": 0.0, "up_blocks": 1.0}
    assert not any(layer.scaling["default"] for layer in krona_layers(pipe.text_encoder).values())
    pipe.set_adapters("default")
    assert torch.equal(tiny.image(pipe), known["image"])
    scaled, half = tiny.image(pipe, cross_attention_kwargs={"scale": 0.5}), adapted_pipe()
    half.set_adapters("default", 0.5)
    assert torch.equal(scaled, tiny.image(half))


def pipeline_disable_lora_enable_lora(known, tmp_path):
    pipe = adapted_pipe()
    pipe.disable_lora()
    assert torch.equal(tiny.image(pipe), known["base"])
    pipe.enable_lora()
    assert torch.equal(tiny.image(pipe), known["image"])


def pipeline_delete_adapters_get_active_adapters_get_list_adapters(known, tmp_path):
    pipe = adapted_pipe(adapter_name="a")
    pipe.load_lora_weights(known["folder"], adapter_name="b")
    assert pipe.get_active_adapters() == ["b"] and pipe.get_list_adapters()["unet"] == ["a", "b"]
    pipe.delete_adapters("a")
    assert torch.equal(tiny.image(pipe), known["image"]) and pipe.get_list_adapters()["unet"] == ["b"]
    pipe.delete_adapters("b")
    assert torch.equal(tiny.image(pipe), known["base"])


def pipeline_set_lora_device(known, tmp_path):
    pipe = adapted_pipe(adapter_name="s")
    pipe.unet.add_adapter(config(target_modules=["to_q"]), "t")
    pipe.vae.requires_grad_(False)
    pipe.set_lora_device(["s"], "meta")
    devices = {(n.rpartition(".")[2], p.device.type) for n, p in pipe.unet.named_parameters() if ".krona_" in n}
    assert devices == {("s", "meta"), ("t", "cpu")}
    mixed = tiny.sd_pipeline()  # LoRA in one model, KronA in the other
    mixed.unet.add_adapter(config())
    mixed.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"]), "default")
    before = [id(p) for n, p in mixed.unet.named_parameters() if ".krona_" in n]
    mixed.set_lora_device(["default"], "cpu")  # an optimizer has them still
    assert before == [id(p) for n, p in mixed.unet.named_parameters() if ".krona_" in n]
    mixed.set_lora_device(["default"], "meta")
    lora = {p.device.type for n, p in mixed.text_encoder.named_parameters() if ".lora_" in n}
    assert lora == {"meta"} == {p.device.type for n, p in mixed.unet.named_parameters() if ".krona_" in n}


def pipeline_enable_lora_hotswap(known, tmp_path):
    pipe = tiny.sd_pipeline()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(known["folder"], adapter_name="a")
    assert {layer.r["a"] for layer in krona_layers(pipe.unet).values()} == {4}  # and see test_hotswap.py
    pipe.load_lora_weights(known["folder"], adapter_name="a", hotswap=True)
    assert set(pipe.unet.peft_config) == {"a"}


def pipeline_pack_weights_write_lora_layers(known, tmp_path):
    state = get_peft_model_state_dict(adapted_pipe().unet)
    packed = StableDiffusionPipeline.pack_weights(state, "unet")
    assert set(packed) == {f"unet.{key}" for key in state}
    StableDiffusionPipeline.write_lora_layers(packed, str(tmp_path), True, None, None, True)
    with pytest.raises(FormatError, match="no settings"):
        load_krona_weights(tiny.sd_pipeline(), tmp_path)
    assert load_krona_weights(tiny.sd_pipeline(), tmp_path, config=config(alpha=0.5)) == ["unet"]


# -- models ------------------------------------------------------------------------------------------------------------


def model_add_adapter_set_adapter_active_adapters_set_adapters(known, tmp_path):
    unet, x = tiny.sd_pipeline().unet, unet_input()
    base = unet(**x).sample
    outputs = {}
    for name in ("a", "b"):
        unet.add_adapter(config(), name)
        outputs[name] = unet(**x).sample
        assert unet.active_adapters() == [name]
    unet.set_adapter("a")
    assert torch.equal(unet(**x).sample, outputs["a"]) and not torch.equal(outputs["a"], outputs["b"])
    unet.set_adapters(["a", "b"], [0.0, 1.0])
    assert unet.active_adapters() == ["a", "b"] and torch.equal(unet(**x).sample, outputs["b"])
    unet.set_adapters(["a", "b"], [0.0, 0.0])
    assert torch.equal(unet(**x).sample, base)


def model_load_lora_adapter_save_lora_adapter(known, tmp_path):
    unet, x = adapted_pipe().unet, unet_input()
    want = unet(**x).sample
    unet.save_lora_adapter(tmp_path)
    plain = get_peft_model_state_dict(unet)
    for source, prefix in [
        (tmp_path, None),
        (plain, None),
        ({f"unet.{key}": tensor for key, tensor in plain.items()}, "unet"),
        (known["file"], "unet"),
        (known["folder"], "unet"),
        (known["folder"] / "unet", None),
        (known["folder"] / "unet", "transformer"),  # the default; a PEFT folder has no prefixes
    ]:
        fresh = tiny.sd_pipeline().unet
        fresh.load_lora_adapter(source, prefix=prefix)
        assert list(fresh.peft_config) == ["default_0"] and torch.equal(fresh(**x).sample, want)
        assert fresh.peft_config["default_0"].alpha == 0.5
    with pytest.raises(FormatError, match=r"has weights for \['text_encoder', 'unet'\]; pass prefix="):
        tiny.sd_pipeline().unet.load_lora_adapter(known["file"], prefix=None)
    with pytest.raises(ConfigError, match="already has an adapter named 'default_0'"):
        fresh.load_lora_adapter(tmp_path, prefix=None, adapter_name="default_0")
    fresh.load_lora_adapter({f"unet.{k}": t for k, t in plain.items()}, prefix="transformer")  # nothing, as with LoRA
    assert list(fresh.peft_config) == ["default_0"]


def model_fuse_lora_unfuse_lora_unload_lora_delete_adapters(known, tmp_path):
    unet, x = adapted_pipe().unet, unet_input()
    want, base = unet(**x).sample, tiny.sd_pipeline().unet(**x).sample
    unet.fuse_lora()
    assert all(layer.merged for layer in krona_layers(unet).values())
    assert not torch.equal(unet(**x).sample, base)
    unet.unfuse_lora()
    assert torch.equal(unet(**x).sample, want)
    unet.add_adapter(config(), "other")
    unet.delete_adapters("other")
    unet.set_adapter("default")
    assert torch.equal(unet(**x).sample, want)
    unet.unload_lora()
    assert torch.equal(unet(**x).sample, base)


def model_enable_adapters_disable_adapters_enable_lora_disable_lora(known, tmp_path):
    unet, x = adapted_pipe().unet, unet_input()
    want, base = unet(**x).sample, tiny.sd_pipeline().unet(**x).sample
    for off, on in ((unet.disable_adapters, unet.enable_adapters), (unet.disable_lora, unet.enable_lora)):
        off()
        assert torch.equal(unet(**x).sample, base)
        on()
        assert torch.equal(unet(**x).sample, want)


def model_enable_lora_hotswap(known, tmp_path):
    unet = adapted_pipe().unet
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        unet.enable_lora_hotswap()
    unet.load_lora_adapter(known["folder"], prefix="unet", adapter_name="default", hotswap=True)
    assert set(unet.peft_config) == {"default"}
    with pytest.raises(ConfigError, match="no KronA adapter 'other' to hotswap"):
        unet.load_lora_adapter(known["folder"], prefix="unet", adapter_name="other", hotswap=True)


def unet_input():
    generator = torch.Generator().manual_seed(2)
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": torch.randn(1, 5, tiny.WIDTH, generator=generator),
    }


# -- transformers ------------------------------------------------------------------------------------------------------


IDS = torch.arange(5)[None]


def encode(model):
    return model(IDS).last_hidden_state


def transformers_add_adapter_set_adapter_active_adapters_enable_adapters_disable_adapters(known, tmp_path):
    encoder = tiny.sd_pipeline().text_encoder
    base = encode(encoder)
    encoder.add_adapter(config(), "a")
    encoder.add_adapter(config(), "b")
    encoder.set_adapter("a")
    a = encode(encoder)
    assert encoder.active_adapters() == ["a"] and not torch.equal(a, base)
    encoder.disable_adapters()
    assert torch.equal(encode(encoder), base)
    encoder.enable_adapters()
    assert torch.equal(encode(encoder), a)
    encoder.set_adapter("b")
    assert not torch.equal(encode(encoder), a)


def transformers_load_adapter_get_adapter_state_dict_delete_adapter(known, tmp_path):
    encoder = adapted_pipe().text_encoder
    want = encode(encoder)
    state = encoder.get_adapter_state_dict("default")
    assert all(".krona_" in key for key in state)
    for source in (
        {"peft_model_id": str(known["folder"] / "text_encoder")},
        {"peft_config": encoder.peft_config["default"], "adapter_state_dict": state},
    ):
        fresh = tiny.sd_pipeline().text_encoder
        base = encode(fresh)
        fresh.load_adapter(**source, adapter_name="x")
        assert torch.equal(encode(fresh), want)
        fresh.delete_adapter("x")
        assert torch.equal(encode(fresh), base)


def transformers_enable_peft_hotswap(known, tmp_path):
    encoder = tiny.sd_pipeline().text_encoder
    encoder.enable_peft_hotswap()
    encoder.load_adapter(str(known["folder"] / "text_encoder"), adapter_name="x")
    with pytest.raises(ValueError, match="only supported for LoRA, please set `hotswap=False`"):
        encoder.load_adapter(str(known["folder"] / "text_encoder"), adapter_name="x")


@pytest.mark.parametrize(
    "case", [v for k, v in list(globals().items()) if k.startswith(("pipeline_", "model_", "transformers_"))],
    ids=lambda case: case.__name__[:60],
)  # fmt: skip
def test_method(case, known, tmp_path):
    case(known, tmp_path)


def test_loading_into_one_component(known):
    """Every family's load_lora_into_... hands the state dict to the model's own method, or to our wrapper."""
    state = StableDiffusionPipeline.lora_state_dict(known["folder"])[0]
    models = {"unet": tiny.sd_pipeline().unet, "text_encoder": tiny.sd_pipeline().text_encoder}
    for count, (family, name) in enumerate((f, n) for f in families() for n in SHARED if hasattr(f, n)):
        component = name.removeprefix("load_lora_into_")
        stand_in = component if component in models else "unet"  # for the transformer
        prefix = component if component in models else getattr(family, f"{component}_name", "transformer")
        own = {f"{prefix}.{k.partition('.')[2]}": t for k, t in state.items() if k.startswith(f"{stand_in}.")}
        required = {"network_alphas": None, "prefix": prefix}
        parameters = inspect.signature(getattr(family, name)).parameters
        given = {k: v for k, v in required.items() if k in parameters}
        argument = next(k for k in parameters if k not in ("state_dict", "network_alphas"))
        getattr(family, name)(own, **given, **{argument: models[stand_in]}, adapter_name=f"x{count}")
        assert list(models[stand_in].peft_config) == [f"x{count}"], (family, name)
        delete_adapter_layers(models[stand_in], f"x{count}")
    assert count > 30


# -- other calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_fused_projections_and_adapters_exclude_each_other_unless_merged(kind, tmp_path):
    pipe = tiny.PIPELINES[kind]()
    model, base = tiny.denoiser(pipe), tiny.image(pipe)
    torch.manual_seed(3)
    model.add_adapter(config())
    image, names = tiny.image(pipe), {name for name, _ in model.named_modules()}
    with pytest.raises(
        UnsupportedLayerError, match=r"Cannot fuse the projections of .*Merge it first \(fuse_lora\(\)\)"
    ):
        model.fuse_qkv_projections()
    assert {name for name, _ in model.named_modules()} == names and torch.equal(tiny.image(pipe), image)
    pipe.fuse_lora(components=["unet" if kind == "sd" else "transformer"])
    model.fuse_qkv_projections()
    fused = [module for module in model.modules() if hasattr(module, "to_qkv")]
    for attention in fused:
        parts = [getattr(attention, name).get_base_layer().weight for name in ("to_q", "to_k", "to_v")]
        assert torch.equal(attention.to_qkv.weight, torch.cat(parts))  # with the adapter
    assert fused and not torch.equal(tiny.image(pipe), base)
    for unfuse in (model.unfuse_lora, lambda: pipe.unfuse_lora(components=["unet" if kind == "sd" else "transformer"])):
        with pytest.raises(UnsupportedLayerError, match=r"Call unfuse_qkv_projections\(\) first"):
            unfuse()
    with pytest.raises(UnsupportedLayerError, match=r"the layer is not called any longer. Call unfuse_qkv_projections"):
        model.add_adapter(config(), "second")
    model.unfuse_qkv_projections()
    model.unfuse_lora()
    assert torch.equal(tiny.image(pipe), image)
    fresh = tiny.PIPELINES[kind]()
    tiny.denoiser(fresh).fuse_qkv_projections()
    with pytest.raises(UnsupportedLayerError, match=r"Call unfuse_qkv_projections\(\) first"):
        add_krona(fresh, config())
    add_krona(fresh, config(target_modules=["to_out.0"]))  # is called as ever


def test_lora_is_fused_as_before():
    pipe = tiny.sd_pipeline()
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    pipe.fuse_qkv_projections(vae=False)
    pipe.unfuse_lora(components=["unet"])


@pytest.mark.parametrize("is_merged", [False, True])
def test_models_made_from_an_adapted_one_have_its_base_weights(caplog, is_merged):
    pipe = adapted_pipe()
    unet = pipe.unet
    if is_merged:
        unet.fuse_lora()
    layer = krona_layers(unet)["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    motion = MotionAdapter(
        block_out_channels=unet.config.block_out_channels, motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=2, motion_norm_num_groups=4,
    )  # fmt: skip
    for make in (ControlNetModel.from_unet, lambda unet: UNetMotionModel.from_unet2d(unet, motion)):
        caplog.clear()
        made = make(unet)
        copied = made.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
        assert torch.equal(copied.weight, layer.get_base_layer().weight) and not krona_layers(made)
        assert ("adapters ['default'] are not in the new model" in caplog.text) == (not is_merged)
        assert krona_layers(unet)  # which has them still


def test_copies_of_a_pipeline(known):
    pipe = adapted_pipe()
    others = [copy.deepcopy(pipe), StableDiffusionPipeline.from_pipe(pipe), StableDiffusionPipeline(
        **pipe.components, requires_safety_checker=False)]  # fmt: skip
    for other in others:
        other.set_progress_bar_config(disable=True)
        assert torch.equal(tiny.image(other), known["image"])
    assert StableDiffusionImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet
    others[0].set_adapters("default", 0.0)
    assert torch.equal(tiny.image(others[0]), known["base"]) and torch.equal(tiny.image(pipe), known["image"])
    pipe.to(torch.float64)
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float64}


def test_token_embeddings(known):
    pipe = adapted_pipe()
    pipe.text_encoder.resize_token_embeddings(pipe.text_encoder.config.vocab_size + 8)
    assert torch.equal(tiny.image(pipe), known["image"])
    for kind in (config, LoraConfig):  # transformers' own message, the same for both
        encoder = tiny.sd_pipeline().text_encoder
        encoder.add_adapter(kind(target_modules=["token_embedding"]), "x")
        with pytest.raises(TypeError, match="Old embeddings are of type"):
            encoder.resize_token_embeddings(encoder.config.vocab_size + 8)


def test_attention_processors_and_kohya_are_one_line(known):
    pipe = adapted_pipe()
    with pytest.raises(ConfigError, match=r"save_attn_procs does not know KronA adapters; use save_krona_weights"):
        pipe.unet.save_attn_procs("nowhere")
    with pytest.raises(ConfigError, match=r"load_attn_procs does not know KronA adapters; use load_krona_weights"):
        pipe.unet.load_attn_procs(known["folder"])
    with pytest.raises(FormatError, match=r"convert_state_dict_to_kohya writes LoRA files only.*peft_krona convert"):
        state_dict_utils.convert_state_dict_to_kohya(get_peft_model_state_dict(pipe.unet))


# -- registration ------------------------------------------------------------------------------------------------------


CONVERTERS = [name for name in vars(state_dict_utils) if re.fullmatch(r"convert_(all_)?state_dict_to_\w+", name)]


def test_registration_is_idempotent_reversible_and_leaves_lora_alone(tmp_path):
    functions = {name: getattr(state_dict_utils, name) for name in CONVERTERS}
    assert len(functions) == 4
    signatures = {name: str(inspect.signature(function)) for name, function in functions.items()}
    krona = get_peft_model_state_dict(adapted_pipe().unet)
    pipe = tiny.sd_pipeline()
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    lora = get_peft_model_state_dict(pipe.unet)

    def to_diffusers(state):
        return state_dict_utils.convert_state_dict_to_diffusers(state)

    wrapped = PeftAdapterMixin.load_lora_adapter
    with_krona = to_diffusers(lora)
    _diffusers.register()
    _diffusers.register()
    assert PeftAdapterMixin.load_lora_adapter is not wrapped and to_diffusers(krona).keys() == krona.keys()
    try:
        _diffusers.unregister()
        _diffusers.unregister()
        assert PeftAdapterMixin.load_lora_adapter.__module__.startswith("diffusers.")
        assert not hasattr(PeftAdapterMixin.load_lora_adapter, "__wrapped__")
        without = to_diffusers(lora)
        assert without.keys() == with_krona.keys() and all(torch.equal(without[k], with_krona[k]) for k in without)
        with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
            to_diffusers(krona)
    finally:
        _diffusers.register()
    for name, function in functions.items():  # the same objects, which a script may have imported long ago
        assert getattr(state_dict_utils, name) is function
        assert str(inspect.signature(function)) == signatures[name]
    for bad in ({"x": torch.zeros(1)}, {}):
        with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
            to_diffusers(bad)
    fresh = tiny.sd_pipeline()
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=with_krona)
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(tiny.image(fresh), tiny.image(pipe))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        fresh.load_lora_weights({"x.weight": torch.zeros(1)})


def test_importing_it_before_diffusers():
    """Nothing of diffusers is imported for it. (Here it came first; the other tests import diffusers first.)"""
    code = """
import sys
import peft_krona, torch
assert not [name for name in sys.modules if name.partition(".")[0] == "diffusers"]
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
assert convert_state_dict_to_diffusers({"x.krona_A": torch.zeros(1)})
print("fine")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "fine", result.stderr


def test_an_older_diffusers_is_left_usable(caplog):
    """0.35 has no `_save_lora_weights`; a KeyError there took down `import diffusers` for everyone."""

    class LoraBaseMixin:
        def set_lora_device(self):
            return "as ever"

    _diffusers._wrap(LoraBaseMixin, "_save_lora_weights", lambda original: None)
    assert not hasattr(LoraBaseMixin, "_save_lora_weights") and LoraBaseMixin().set_lora_device() == "as ever"
    assert re.search(
        r"diffusers [\d.]+ has no LoraBaseMixin._save_lora_weights.* Install diffusers >= 0.40", caplog.text
    )
