# SPDX-License-Identifier: Apache-2.0
"""Faults that users of PEFT and diffusers reported, each as a kind, tried on whole pipelines and on PEFT models."""

import json
import logging
import shutil

import pytest
import tiny
import torch
from adapted import assert_same_state, krona_layers, state_of
from diffusers import AnimateDiffPipeline, MotionAdapter, UNetMotionModel
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from peft_krona import KronAConfig, merged
from peft_krona.convert import BASES, export, read_adapter
from peft_krona.errors import FormatError, MergeError
from peft_krona.pipelines import add_krona, load_krona_weights, save_krona_weights


def config(**kwargs):
    return KronAConfig(**{"a_out": 8, "a_in": 2, "init_weights": False, **kwargs})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of an SD pipeline's UNet adapter, its picture and a LoKr file of it."""
    pipe = tiny.sd_pipeline()
    torch.manual_seed(3)
    add_krona(pipe, config())
    folder = tmp_path_factory.mktemp("saved")
    save_krona_weights(pipe, folder)
    file = folder.parent / "adapter_lokr.safetensors"
    export(read_adapter(folder), file, to="lokr", dtype=torch.float32, base_model=BASES["sd15"])
    return folder, tiny.image(pipe), file


def weights(folder):
    return load_file(folder / "unet" / "adapter_model.safetensors")


# -- peft#3584, peft#3282: an adapter that is called like a layer ------------------------------------------------------


@pytest.mark.parametrize("name", ["attn1", "to_q", "mid_block", "0", "down_blocks"])
def test_every_weight_is_saved_beside_a_lora_called_like_a_layer(saved, tmp_path, name):
    """A KronA adapter of such a name is refused: tests/test_adapter_names.py."""
    folder, image, _ = saved
    pipe = tiny.sd_pipeline()
    load_krona_weights(pipe, folder)
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k"], init_lora_weights=False), name)
    save_krona_weights(pipe, tmp_path)
    want, got = weights(folder), weights(tmp_path)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    load_krona_weights(pipe, folder, "style")  # beside it
    pipe.set_adapters("style")
    assert torch.equal(tiny.image(pipe), image)


def test_whole_modules_beside_a_lora_called_like_them_are_an_error(tmp_path):
    pipe = tiny.sd_pipeline()
    add_krona(pipe, config(modules_to_save=["conv_in"]))
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"]), "conv_in")
    with pytest.raises(FormatError, match="'default' cannot be saved beside an adapter named 'conv_in', which is"):
        save_krona_weights(pipe, tmp_path)


# -- diffusers#7661, #7791, #8995: the model has more layers of those names --------------------------------------------


def with_motion(pipe, path):
    unet = pipe.unet
    motion = MotionAdapter(
        block_out_channels=unet.config.block_out_channels, motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=2, motion_norm_num_groups=4,
    )  # fmt: skip
    return AnimateDiffPipeline(
        pipe.vae, pipe.text_encoder, pipe.tokenizer, UNetMotionModel.from_unet2d(unet, motion), motion, pipe.scheduler
    )


def with_ip_adapter(pipe, path):
    projection = IPAdapterPlusImageProjection(
        embed_dims=8, output_dims=tiny.WIDTH, hidden_dims=8, depth=1, dim_head=4, heads=2, num_queries=2
    )
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    return pipe


def with_another_network(pipe, path):
    pipe.unet.controller = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8)})})
    return pipe


@pytest.mark.parametrize("source", ["folder", "lokr"])
@pytest.mark.parametrize("more", [with_motion, with_ip_adapter, with_another_network])
def test_layers_that_only_the_model_has_are_left_alone_and_named(saved, tmp_path, caplog, more, source):
    folder, _, file = saved
    pipe = more(tiny.sd_pipeline(), tmp_path)
    before = pipe.unet.state_dict()
    with caplog.at_level(logging.WARNING, "peft_krona.pipelines"):
        load_krona_weights(pipe, folder if source == "folder" else file)
    layers = krona_layers(pipe.unet)
    assert len(layers) == len(weights(folder)) // 2
    assert not [name for name in layers if "motion" in name or "hid_proj" in name or "controller" in name]
    assert ("they are left as they are" in caplog.text) == (source == "folder")
    save_krona_weights(pipe, tmp_path / "again")
    want, got = weights(folder), weights(tmp_path / "again")
    assert got.keys() == want.keys()
    pipe.unet.unload_lora()
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_weights_that_are_missing_are_still_an_error(saved, tmp_path):
    """Other numbers, same places: a damaged file, or another base model."""
    folder = shutil.copytree(saved[0], tmp_path / "damaged")
    state = {
        k: t for k, t in weights(folder).items() if ".up_blocks.1.attentions.0.transformer_blocks.0.attn2." not in k
    }
    save_file(state, folder / "unet" / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"no weights for up_blocks\.1"):
        load_krona_weights(tiny.sd_pipeline(), folder)


# -- peft#2957, peft#2962: models that torch.compile wraps -------------------------------------------------------------


def compiled(pipe, in_place):
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    return pipe


@pytest.mark.parametrize("in_place", [False, True], ids=["wrapped", "in place"])
def test_compiled_models(saved, tmp_path, in_place):
    folder, image, file = saved
    pipe = compiled(tiny.sd_pipeline(), in_place)
    assert load_krona_weights(pipe, folder) == ["unet"]
    assert load_krona_weights(pipe, file, "lokr") == ["unet"]
    save_krona_weights(pipe, tmp_path)
    want, got = weights(folder), weights(tmp_path)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    plain = tiny.sd_pipeline()
    load_krona_weights(plain, tmp_path)
    assert torch.equal(tiny.image(plain), image)
    # compiled first, adapted then: the adapter acts
    pipe = compiled(tiny.sd_pipeline(), in_place)
    before = state_of(pipe.unet)
    broken = {key: tensor for key, tensor in want.items() if "mid_block" not in key or "attn1" not in key}
    shutil.copytree(folder, tmp_path / "broken")
    save_file(broken, tmp_path / "broken" / "unet" / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="no weights for mid_block"):
        load_krona_weights(pipe, tmp_path / "broken")
    assert_same_state(pipe.unet, before)
    add_krona(pipe, config())
    save_krona_weights(pipe, tmp_path / "added")
    assert weights(tmp_path / "added").keys() == want.keys()


@pytest.mark.parametrize("place", ["_orig_mod.{}", "unet._orig_mod.{}", "base_model.model._orig_mod.{}"])
def test_files_with_the_names_of_a_compiled_model(saved, tmp_path, place):
    """As others' scripts save them."""
    folder = shutil.copytree(saved[0], tmp_path / "copy")
    path = folder / "unet" / "adapter_model.safetensors"
    state = {place.format(key.removeprefix("base_model.model.")): tensor for key, tensor in weights(folder).items()}
    if place.startswith("unet."):
        settings = json.loads((folder / "unet" / "adapter_config.json").read_text())
        path = tmp_path / "file.safetensors"
        header = json.dumps({f"unet.{key}": value for key, value in settings.items()})
        save_file(state, path, metadata={"lora_adapter_metadata": header})
        folder = path
    else:
        save_file(state, path)
    pipe = tiny.sd_pipeline()
    load_krona_weights(pipe, folder)
    assert torch.equal(tiny.image(pipe), saved[1])


# -- diffusers#11648, #10347, #9177: weights stored in fp8 -------------------------------------------------------------


FP8 = torch.float8_e4m3fn


def stored_in_fp8(pipe):
    pipe.unet.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    return pipe


@pytest.mark.parametrize("order", ["cast first", "adapted first"])
@pytest.mark.parametrize("way", ["load", "load_lora_weights", "add_krona", "add_adapter", "lokr"])
def test_factors_are_fp32_on_a_base_stored_in_fp8(saved, tmp_path, order, way):
    folder, _, file = saved
    ways = {
        "load": lambda pipe: load_krona_weights(pipe, folder),
        "load_lora_weights": lambda pipe: pipe.load_lora_weights(folder, adapter_name="default"),
        "add_krona": lambda pipe: add_krona(pipe, config()),
        "add_adapter": lambda pipe: pipe.unet.add_adapter(config()),
        "lokr": lambda pipe: load_krona_weights(pipe, file),
    }
    pipe = tiny.sd_pipeline()
    for step in (stored_in_fp8, ways[way])[:: 1 if order == "cast first" else -1]:
        step(pipe)
    layers = krona_layers(pipe.unet)
    assert {p.dtype for n, p in pipe.unet.named_parameters() if ".krona_" in n} == {torch.float32}
    assert {layer.get_base_layer().weight.dtype for layer in layers.values()} == {FP8}
    if way == "load":
        save_krona_weights(pipe, tmp_path)
        assert all(torch.equal(t, weights(tmp_path)[key]) for key, t in weights(folder).items())


def test_pictures_and_merging_on_a_base_stored_in_fp8(saved):
    folder, _, _ = saved
    pipe = stored_in_fp8(tiny.sd_pipeline())
    rounded = tiny.sd_pipeline()  # the same weights, rounded likewise but kept in fp32
    rounded.unet.load_state_dict({key: t.float() for key, t in pipe.unet.state_dict().items()})
    for each in (pipe, rounded):
        load_krona_weights(each, folder)
    image = tiny.image(pipe)
    assert torch.equal(image, tiny.image(rounded))
    for merge in (pipe.fuse_lora, lambda: merged(pipe.unet).__enter__()):
        with pytest.raises(MergeError, match=r"Cannot merge into a weight that is stored as torch.float8_e4m3fn"):
            merge()
    assert torch.equal(tiny.image(pipe), image)
    pipe = tiny.sd_pipeline()  # merged before it is cast
    load_krona_weights(pipe, folder)
    pipe.fuse_lora()
    stored_in_fp8(pipe)
    assert tiny.image(pipe).isfinite().all()


# -- diffusers#6089, #6110, #14195: the Hub's cache without a connection -----------------------------------------------


@pytest.fixture
def cache(saved, tmp_path, monkeypatch):
    """A cache that holds me/folders, me/model and me/file, as huggingface_hub lays it out."""
    revision = "a" * 40
    for name, (source, inside) in {
        "folders": (saved[0], ""), "model": (saved[0] / "unet", ""), "file": (saved[2].parent, "x.safetensors")
    }.items():  # fmt: skip
        root = tmp_path / "hub" / f"models--me--{name}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(revision)
        if inside:
            (root / "snapshots" / revision).mkdir(parents=True)
            shutil.copy(saved[2], root / "snapshots" / revision / inside)
        else:
            shutil.copytree(source, root / "snapshots" / revision)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return str(tmp_path / "hub")


@pytest.mark.parametrize(
    ("source", "kwargs"),
    [
        ("me/folders", {}),
        ("me/folders", {"weight_name": "unet/adapter_model.safetensors"}),
        ("me/folders", {"subfolder": "unet"}),
        ("me/folders", {"revision": "a" * 40}),
        ("me/model", {}),
        ("me/file", {}),
        ("me/file", {"weight_name": "x.safetensors"}),
    ],
)
def test_repositories_in_the_cache_are_found_offline(saved, cache, source, kwargs):
    pipe = tiny.sd_pipeline()
    assert load_krona_weights(pipe, source, cache_dir=cache, **kwargs) == ["unet"]
    want = tiny.sd_pipeline()
    load_krona_weights(want, saved[2] if source == "me/file" else saved[0])
    assert torch.equal(tiny.image(pipe), tiny.image(want))


def test_load_lora_weights_finds_a_krona_repository_in_the_cache(saved, cache):
    pipe = tiny.sd_pipeline()
    pipe.load_lora_weights("me/folders", adapter_name="x", cache_dir=cache)
    assert torch.equal(tiny.image(pipe), saved[1])


@pytest.mark.parametrize("kwargs", [{}, {"weight_name": "x.safetensors"}, {"revision": "b" * 40}])
def test_what_is_not_in_the_cache_is_one_sentence(cache, kwargs):
    name = "me/folders" if "revision" in kwargs else "me/other"
    with pytest.raises(FormatError, match=rf"{name} is not on disk, .*HF_HUB_OFFLINE is set.*Download it once"):
        load_krona_weights(tiny.sd_pipeline(), name, cache_dir=cache, **kwargs)
    with pytest.raises(FormatError, match=r"holds no nothing.safetensors"):
        load_krona_weights(tiny.sd_pipeline(), "me/folders", cache_dir=cache, weight_name="nothing.safetensors")
