# SPDX-License-Identifier: Apache-2.0
"""KronA through the methods that diffusers and transformers models have of their own."""

import json
import warnings

import pytest
import tiny
import torch
from adapted import assert_same_bits, krona_layers, snapshot
from peft import LoraConfig
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from peft_krona import KronAConfig
from peft_krona.pipelines import load_krona_weights

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def krona(**kwargs):
    return KronAConfig(**{"a_out": 8, "a_in": 2, "init_weights": False, **kwargs})


def lora(**kwargs):
    return LoraConfig(**{"r": 2, "target_modules": ATTENTION, "init_lora_weights": False, **kwargs})


INPUTS = (
    torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    torch.tensor([3]),
    torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2)),
)


@torch.no_grad()
def run(unet, **kwargs):
    latents, timestep, words = INPUTS
    return unet(latents.to(unet.dtype), timestep, words.to(unet.dtype), **kwargs).sample


@pytest.fixture
def unet(request):
    if "float64" in request.fixturenames:
        request.getfixturevalue("float64")
    torch.manual_seed(0)
    return tiny.unet()


# -- a bare UNet -------------------------------------------------------------------------------------------------------


def test_unet_adapters_come_and_go(unet):
    base = run(unet)
    unet.add_adapter(krona(), "a")
    a = run(unet)
    unet.add_adapter(krona(r=2, layout="diffusekrona"), "b")
    b = run(unet)
    assert len({t.sum().item() for t in (base, a, b)}) == 3
    unet.set_adapter("a")
    assert torch.equal(run(unet), a) and unet.active_adapters() == ["a"]
    unet.disable_adapters()
    assert torch.equal(run(unet), base)
    unet.enable_adapters()
    assert torch.equal(run(unet), a)
    unet.delete_adapters("a")
    assert all(list(layer.krona_A) == ["b"] for layer in krona_layers(unet).values())
    unet.set_adapter("b")
    assert torch.equal(run(unet), b)


def test_unet_set_adapters_with_weights(unet):
    base = run(unet)
    unet.add_adapter(krona(), "a")
    a = run(unet)
    unet.add_adapter(krona(scaling="rslora", r=4, alpha=3.0), "b")
    b = run(unet)
    for weights, want in (([1.0, 0.0], a), ([0.0, 1.0], b), ([0.0, 0.0], base)):
        unet.set_adapters(["a", "b"], weights)
        assert torch.equal(run(unet), want)
    unet.set_adapters(["a", "b"], [0.5, -0.5])
    for layer in krona_layers(unet).values():
        assert layer.scaling == {"a": 0.5, "b": -0.5 * 3.0 / 2}
    unet.set_adapters("b", 1.0)
    assert torch.equal(run(unet), b)
    unet.set_adapters("a", {"down": 0.0, "mid": 0.0, "up": 0.0})
    assert torch.equal(run(unet), base)
    unet.set_adapters("a", {"up": {"block_1": [0.0, 1.0]}})
    mixed = run(unet)
    assert not torch.equal(mixed, a) and not torch.equal(mixed, base)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("safe", [False, True])
def test_unet_fuse_and_unfuse(unet, safe):
    unet.add_adapter(krona(), "a")
    want, before = run(unet), snapshot(unet)
    unet.fuse_lora(safe_fusing=safe)
    assert all(layer.merged for layer in krona_layers(unet).values())
    torch.testing.assert_close(run(unet), want)
    unet.unfuse_lora()
    assert_same_bits(unet, before)
    assert torch.equal(run(unet), want)


@pytest.mark.usefixtures("float64")
def test_unet_fuse_with_a_scale(unet):
    unet.add_adapter(krona(), "a")
    before = snapshot(unet)
    unet.set_adapters("a", 0.3)
    want = run(unet)
    unet.set_adapters("a", 1.0)
    unet.fuse_lora(lora_scale=0.3)
    torch.testing.assert_close(run(unet), want)
    unet.unfuse_lora()
    assert_same_bits(unet, before)


@pytest.mark.usefixtures("float64")
def test_unet_scale_in_the_call(unet):
    base = run(unet)
    unet.add_adapter(krona(), "a")
    full = run(unet)
    unet.set_adapters("a", 0.4)
    want = run(unet)
    unet.set_adapters("a", 1.0)
    torch.testing.assert_close(run(unet, cross_attention_kwargs={"scale": 0.4}), want)
    assert torch.equal(run(unet, cross_attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(run(unet), full)  # nothing is left behind


def test_unet_gradient_checkpointing(unet):
    unet.add_adapter(krona(), "a")
    unet.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        unet(*INPUTS).sample.square().mean().backward()
        gradients.append([p.grad.clone() for n, p in unet.named_parameters() if ".krona_" in n])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and all(g.any() for g in gradients[0])


@pytest.mark.usefixtures("float64")
def test_unet_convolutions_and_time_embedding(unet):
    base = run(unet)
    unet.add_adapter(krona(target_modules=["conv1", "conv_shortcut", "time_emb_proj", "conv_in", "proj_in"]), "a")
    want = run(unet)
    assert not torch.equal(want, base)
    unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(unet), want)
    unet.fuse_lora()
    torch.testing.assert_close(run(unet), want)


def test_save_lora_adapter_writes_what_load_krona_weights_reads(unet, tmp_path):
    """And what diffusers' own method reads."""
    unet.add_adapter(krona(r=2, alpha=0.5), "a")
    want = run(unet)
    unet.save_lora_adapter(str(tmp_path), adapter_name="a")
    (path,) = tmp_path.iterdir()
    assert path.name == "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["peft_type"] == "KRONA"
        assert all(key.endswith((".krona_A", ".krona_B")) for key in file.keys())
    base = {k.replace(".base_layer", ""): v for k, v in unet.state_dict().items() if "krona" not in k}
    for load in (load_krona_weights, lambda pipe, folder: pipe.load_lora_weights(str(folder))):
        pipe = tiny.sd_pipeline()
        pipe.unet.load_state_dict(base)
        load(pipe, tmp_path)
        assert torch.equal(run(pipe.unet), want)


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("krona_first", [True, False], ids=["krona first", "lora first"])
def test_pipeline_with_a_lora(krona_first):
    """Every mixture, and what each adapter does alone does not depend on the other being there."""
    alone, base = {}, None
    for name, make in (("k", krona), ("l", lora)):
        pipe = tiny.sd_pipeline()
        base = tiny.image(pipe)
        torch.manual_seed(7)
        pipe.unet.add_adapter(make(), name)
        alone[name] = tiny.image(pipe)
    pipe = tiny.sd_pipeline()
    order = [("k", krona), ("l", lora)] if krona_first else [("l", lora), ("k", krona)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in order:
            torch.manual_seed(7)
            pipe.unet.add_adapter(make(), name)
    for names, weights, want in (
        (["k"], [1.0], alone["k"]),
        (["l"], [1.0], alone["l"]),
        (["k", "l"], [1.0, 0.0], alone["k"]),
        (["k", "l"], [0.0, 1.0], alone["l"]),
        (["k", "l"], [0.0, 0.0], base),
    ):
        pipe.set_adapters(names, weights)
        torch.testing.assert_close(tiny.image(pipe), want)
    pipe.set_adapters(["k", "l"], [1.0, 1.0])
    both = tiny.image(pipe)
    assert all((both - other).abs().max() > 1e-3 for other in (base, *alone.values()))
    pipe.unet.disable_adapters()
    assert torch.equal(tiny.image(pipe), base)
    pipe.unet.enable_adapters()
    assert torch.equal(tiny.image(pipe), both)


@pytest.mark.usefixtures("float64")
def test_pipeline_fuses_krona_and_a_lora():
    pipe = tiny.sd_pipeline()
    pipe.unet.add_adapter(lora(), "l")
    pipe.unet.add_adapter(krona(), "k")
    pipe.set_adapters(["k", "l"], [1.0, 1.0])
    want = tiny.image(pipe)
    pipe.fuse_lora(adapter_names=["k", "l"])
    torch.testing.assert_close(tiny.image(pipe), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LoRA's rounding stays in the weight; KronA says so
        pipe.unfuse_lora()
    torch.testing.assert_close(tiny.image(pipe), want)


@pytest.mark.usefixtures("float64")
def test_pipeline_lists_and_deletes():
    pipe = tiny.sd_pipeline()
    base = tiny.image(pipe)
    pipe.unet.add_adapter(krona(), "a")
    pipe.text_encoder.add_adapter(krona(target_modules=["q_proj"]), "a")
    pipe.text_encoder.add_adapter(krona(target_modules=["k_proj"]), "b")
    assert pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a", "b"]}
    pipe.set_adapters("a", 0.5)
    assert pipe.get_active_adapters() == ["a"]
    half = tiny.image(pipe)
    pipe.disable_lora()
    assert torch.equal(tiny.image(pipe), base)
    pipe.enable_lora()
    assert torch.equal(tiny.image(pipe), half)
    pipe.fuse_lora()
    torch.testing.assert_close(tiny.image(pipe), half)
    pipe.unfuse_lora()
    assert torch.equal(tiny.image(pipe), half)
    pipe.delete_adapters(["a", "b"])
    assert torch.equal(tiny.image(pipe), base)
    pipe.unload_lora_weights()
    assert not krona_layers(pipe.unet) and torch.equal(tiny.image(pipe), base)


def test_pipeline_scale_in_the_call():
    pipe = tiny.sd_pipeline()
    base = tiny.image(pipe)
    pipe.unet.add_adapter(krona(), "a")
    full = tiny.image(pipe)
    assert torch.equal(tiny.image(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    assert not torch.equal(tiny.image(pipe, cross_attention_kwargs={"scale": 0.5}), full)
    assert torch.equal(tiny.image(pipe), full)


# -- transformers ------------------------------------------------------------------------------------------------------

GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
IDS = torch.arange(8).view(1, 8)


def gpt2(cls=GPT2LMHeadModel):
    torch.manual_seed(0)
    return cls(GPT2Config(**GPT2)).eval()


@torch.no_grad()
def logits(model):
    return model(IDS)[0]


def test_transformers_adapters_come_and_go():
    model = gpt2()
    base = logits(model)
    model.add_adapter(krona(target_modules=["c_attn"]), "a")
    a = logits(model)
    model.add_adapter(krona(target_modules=["c_fc", "wte"]), "b")
    b = logits(model)
    assert len({t.sum().item() for t in (base, a, b)}) == 3
    model.set_adapter("a")
    assert torch.equal(logits(model), a) and model.active_adapters() == ["a"]
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), a)
    state = model.get_adapter_state_dict("a")
    assert len(state) == 4 and all(".krona_" in key for key in state)
    model.delete_adapter("b")
    assert torch.equal(logits(model), a) and not any(key.endswith(".b") for key in model.state_dict())


@pytest.mark.parametrize("name", ["default", "style"])
def test_transformers_save_and_load(tmp_path, name):
    model = gpt2()
    model.add_adapter(krona(target_modules=["c_attn", "c_fc"], r=2), name)
    want = logits(model)
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "KRONA"
    other = gpt2()
    other.load_adapter(str(tmp_path), adapter_name="loaded")
    assert torch.equal(logits(other), want)
    third = gpt2()
    third.load_adapter(peft_config=model.peft_config[name], adapter_state_dict=model.get_adapter_state_dict(name))
    assert torch.equal(logits(third), want)


@pytest.mark.parametrize("auto,cls", [(AutoModelForCausalLM, GPT2LMHeadModel), (AutoModel, GPT2Model)])
def test_auto_model_from_an_adapter_folder(tmp_path, auto, cls):
    gpt2(cls).save_pretrained(str(tmp_path / "base"))
    model = cls.from_pretrained(str(tmp_path / "base"))
    model.add_adapter(krona(target_modules=["c_attn"]), "a")
    want = logits(model.eval())
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = auto.from_pretrained(str(tmp_path / "adapter"))
    assert len(krona_layers(loaded)) == 2 and torch.equal(logits(loaded), want)


def test_clip_text_encoder_with_default_targets():
    torch.manual_seed(0)
    encoder = tiny.text_encoder()
    ids = torch.arange(77).view(1, 77) % 60
    base = encoder(ids)[0]
    encoder.add_adapter(krona(), "a")
    assert len(krona_layers(encoder)) == 8 and not torch.equal(encoder(ids)[0], base)
