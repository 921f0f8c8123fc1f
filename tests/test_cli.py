# SPDX-License-Identifier: Apache-2.0
"""python -m peft_krona, command by command, on a tiny pipeline."""

import copy
import json
import re
import runpy
import shutil
import sys

import pytest
import torch
from convert_fixtures import (
    anything,
    attention,
    image,
    random_adapter,
    relative,
    tiny_clip,
    tiny_pipeline,
    tiny_unet,
)
from rounding import STORED, STORED_IN_A_MODEL
from safetensors.torch import load_file, save_file

from peft_krona.__main__ import main
from peft_krona.convert import AdapterFile, LayerUpdate, export, read_adapter
from peft_krona.convert.merge_pipeline import merge_into_models
from peft_krona.errors import MergeError
from peft_krona.pipelines import load_krona_weights


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "sdxl"])
def pipe(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipe")
    pipe = tiny_pipeline(folder, request.param)
    pipe.save_pretrained(folder / "pipe")
    pipe.folder = str(folder / "pipe")
    return pipe


def parts(pipe):
    return {name: part for name, part in pipe.components.items() if name in ("unet", "text_encoder", "text_encoder_2")}


def adapter_folder(pipe, tmp_path, **kwargs):
    adapter = random_adapter(parts(pipe), kwargs.pop("select", attention), **kwargs)
    export(adapter, tmp_path / "adapter", "peft")
    return adapter, str(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("layout", "r", "to", "endings"),
    [
        ("kron", 1, "auto", ("lokr_w1", "lokr_w2", "alpha")),
        ("diffusekrona", 1, "auto", ("hada_w1_a", "alpha")),
        ("kron", 2, "lora", ("lora_down.weight", "alpha")),
        ("kron", 2, "diff", ("diff",)),
    ],
)
def test_convert(pipe, layout, r, to, endings, tmp_path, capsys):
    adapter, source = adapter_folder(pipe, tmp_path, layout=layout, r=r)
    out = tmp_path / "out.safetensors"
    assert (
        main(["convert", source, str(out), "--to", to, "--base", pipe.folder, "--dtype", "fp32", "--trigger", "zwx"])
        == 0
    )
    text = capsys.readouterr().out
    keys = load_file(out)
    assert all(any(key.endswith(ending) for key in keys) for ending in endings)
    assert "worst relative error" in text and "MiB" in text and f"read {len(adapter)} layers" in text
    xl = "text_encoder_2" in pipe.components
    assert any(key.startswith("lora_te1_text_model" if xl else "lora_te_text_model") for key in keys)
    assert any("input_blocks" in key for key in keys) == xl
    if to == "auto":
        assert ("lokr (" if layout == "kron" else "loha (") in text


def test_convert_scales_and_splits(pipe, tmp_path, capsys):
    adapter, source = adapter_folder(pipe, tmp_path, r=2, factors=(4, 4))
    out = tmp_path / "out"
    arguments = [
        "convert",
        source,
        str(out),
        "--to",
        "lokr",
        "--base",
        pipe.folder,
        "--dtype",
        "fp32",
        "--scale",
        "0.5",
    ]
    assert main(arguments) == 1
    assert "error: " in (text := capsys.readouterr().err) and "--split-terms" in text and len(text.splitlines()) == 1
    assert main([*arguments, "--split-terms"]) == 0
    read = [{layer.name: layer for layer in read_adapter(tmp_path / f"out_term{n}of2.safetensors")} for n in (1, 2)]
    for layer in adapter:
        total = sum(terms[layer.name].delta_weight() for terms in read)
        assert relative(total, layer.delta_weight() * 0.5) <= STORED


def test_convert_checks_against_the_base_folder(pipe, tmp_path, capsys):
    adapter, _ = adapter_folder(pipe, tmp_path)
    layer = next(layer for layer in adapter if layer.module.endswith("attn1.to_q"))
    stranger = AdapterFile((type(layer)(layer.component, layer.module, layer.A, layer.B.repeat(1, 2, 1)),))
    export(stranger, tmp_path / "stranger", "peft")
    assert main(["convert", str(tmp_path / "stranger"), str(tmp_path / "x"), "--base", pipe.folder]) == 1
    assert layer.name in (text := capsys.readouterr().err) and "base model's is" in text
    assert not (tmp_path / "x.safetensors").exists()


def test_merge_gives_the_native_adapters_image(pipe, tmp_path, capsys):
    _, source = adapter_folder(pipe, tmp_path, select=anything, factors=(8, 4), layout="diffusekrona")
    out = tmp_path / "merged"
    assert main(["merge", pipe.folder, source, str(out), "--scale", "0.5"]) == 0
    merged = type(pipe).from_pretrained(out)
    merged.set_progress_bar_config(disable=True)
    native = type(pipe).from_pretrained(pipe.folder)
    native.set_progress_bar_config(disable=True)
    load_krona_weights(native, source, weight=0.5)
    wanted = image(native)
    assert relative(image(merged), wanted) <= STORED_IN_A_MODEL and relative(image(pipe), wanted) > 1e-3
    assert main(["merge", pipe.folder, source, str(out)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_merge_in_half_precision_rounds_once(pipe, tmp_path):
    if "text_encoder_2" in pipe.components:
        pytest.skip("one pipeline is enough")
    adapter, source = adapter_folder(pipe, tmp_path)
    assert main(["merge", pipe.folder, source, str(tmp_path / "merged"), "--dtype", "fp16"]) == 0
    weights = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    before = pipe.unet.state_dict()
    for layer in adapter:
        if layer.component == "unet":
            wanted = before[f"{layer.module}.weight"].half().float() + layer.delta_weight(torch.float32)
            assert torch.equal(weights[f"{layer.module}.weight"], wanted.half())


def floats(folder):
    """{component: dtypes of its weights}"""
    files = sorted(folder.glob("*/*.safetensors"))
    return {f.parent.name: {t.dtype for t in load_file(f).values() if t.is_floating_point()} for f in files}


def test_merge_keeps_the_dtype_of_each_component(pipe, tmp_path):
    """Also of one that only the adapter's later layers are in, and of one that it does not adapt."""
    dtypes = {"text_encoder": torch.float32, "unet": torch.float16, "vae": torch.bfloat16}
    if "text_encoder_2" in pipe.components:
        dtypes["text_encoder_2"] = torch.float16
    mixed = type(pipe).from_pretrained(pipe.folder, torch_dtype={**dtypes, "default": torch.float32})
    mixed.save_pretrained(tmp_path / "mixed")
    _, source = adapter_folder(pipe, tmp_path)
    assert main(["merge", str(tmp_path / "mixed"), source, str(tmp_path / "merged")]) == 0
    assert floats(tmp_path / "merged") == floats(tmp_path / "mixed") == {name: {d} for name, d in dtypes.items()}


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [(["--dtype", "fp16", "--scale", "1e10"], "float16"), (["--scale", "1e300"], "float32")],
)
def test_merge_refuses_to_write_infinite_weights(pipe, tmp_path, capsys, arguments, dtype):
    _, source = adapter_folder(pipe, tmp_path)
    assert main(["merge", pipe.folder, source, str(tmp_path / "merged"), *arguments]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: (unet|text_encoder)\.\S+\.(to_|._proj)\S*weight: the merged weight", last)  # the layer
    assert f"is NaN or infinite in torch.{dtype}; expected finite numbers. Nothing was written. Use a smaller" in last
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merge_refuses_a_quantized_model(pipe, tmp_path, capsys):
    """Told by the config before anything is loaded, and by the weights of a model that is loaded already."""
    adapter, source = adapter_folder(pipe, tmp_path)
    folder = shutil.copytree(pipe.folder, tmp_path / "quantized")
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    assert main(["merge", str(folder), source, str(tmp_path / "merged")]) == 1
    said = (
        r"is quantized \(.*\), and an update cannot be added to packed weights: expected a model in .*\. Merge into the"
    )
    text = capsys.readouterr().err
    assert re.match(rf"error: {re.escape(str(folder / 'unet'))} {said}", text) and len(text.splitlines()) == 1
    assert not (tmp_path / "merged").exists()

    unet, encoder = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    packed = unet.get_submodule(next(layer.module for layer in adapter if layer.component == "unet"))
    packed.weight = torch.nn.Parameter(torch.ones(packed.weight.shape, dtype=torch.int8), requires_grad=False)
    models = {**pipe.components, "unet": unet, "text_encoder": encoder}
    with pytest.raises(MergeError, match=rf"^unet {said}"):
        merge_into_models(models, adapter)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), pipe.text_encoder.parameters(), strict=True))
    assert (packed.weight == 1).all()


def key_layer(width):
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    return LayerUpdate("unet", name, torch.ones(1, 4, 2), torch.ones(1, 160, width // 2))


CLIP = LayerUpdate("text_encoder", "text_model.encoder.layers.0.mlp.fc1", torch.ones(1, 4, 2), torch.ones(1, 768, 384))


@pytest.mark.parametrize(
    ("layer", "base", "found"),
    [
        (key_layer(768), "sdxl", "sd15"),
        (key_layer(1024), "sd15", "sd2"),
        (key_layer(768), "sd15", None),
        (key_layer(2048), "sdxl", None),
        (key_layer(96), "sdxl", None),  # tells nothing
        (CLIP, "sdxl", None),  # SDXL's first text encoder is that of SD 1.x
    ],
)
def test_a_base_that_the_layers_contradict(layer, base, found, tmp_path, capsys):
    export(AdapterFile((layer,)), tmp_path / "in", "peft")
    status = main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "lokr", "--base", base])
    text = capsys.readouterr().err
    if found is None:
        assert (status, text) == (0, "") and (tmp_path / "out.safetensors").is_file()
    else:
        assert status == 1 and f"--base {base}: the adapter's layers have sizes and names of {found}. Give" in text
        assert not (tmp_path / "out.safetensors").exists()


def test_extract_finds_the_adapter_in_a_merged_model(pipe, tmp_path, capsys):
    adapter, source = adapter_folder(pipe, tmp_path, factors=(8, 4), layout="diffusekrona")
    assert main(["merge", pipe.folder, source, str(tmp_path / "merged")]) == 0
    arguments = ["extract", f"{pipe.folder}/unet", str(tmp_path / "merged" / "unet"), str(tmp_path / "found")]
    assert main([*arguments, "--a-out", "8", "--a-in", "4", "--layout", "diffusekrona"]) == 0
    assert "of dW is lost in unet." in capsys.readouterr().out
    found = {layer.name: layer for layer in read_adapter(tmp_path / "found")}
    for layer in adapter:
        if layer.component == "unet":
            assert relative(found[layer.name].delta_weight(), layer.delta_weight()) <= STORED_IN_A_MODEL


def test_inspect_prints_a_table_and_draws(pipe, tmp_path, capsys):
    adapter, source = adapter_folder(pipe, tmp_path)
    assert main(["inspect", source, "--base", pipe.folder, "--plot", str(tmp_path / "x.png")]) == 0
    text = capsys.readouterr().out
    assert all(layer.name in text for layer in adapter) and f"{len(adapter)} layers" in text
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "missing", "out"], "missing: there is no such file"),
        (["inspect", "lora.safetensors", "--base", "missing"], "no weight for"),
        (["convert", "lora.safetensors", "out"], "--base sd15, sd2, sdxl"),
        (["convert", "lora.safetensors", "out", "--base", "sd9"], "expected one of sd15, sd2, sdxl, or the folder"),
        (["convert", "lora.safetensors", "out", "--base", "."], "expected a diffusers pipeline's folder"),
        (["merge", ".", "lora.safetensors", "out"], "with model_index.json"),
        (["extract", ".", ".", "out"], "do not differ"),
        (["convert", "lora.safetensors", ".", "--base", "sd15"], "The output '.' is no name of a file or folder. Give"),
        (["convert", "lora.safetensors", "", "--base", "sd15"], "The output '' is no name of a file or folder. Give"),
        (["convert", "lora.safetensors", "", "--to", "peft"], "The output '' is no name of a file or folder. Give"),
        (["convert", "lora.safetensors", "..", "--base", "sd15"], "The output '..' is no name of a file or folder"),
        (["convert", "lora.safetensors", "new/", "--base", "sd15"], "new/: expected the name of a file to write, got"),
        (
            ["convert", "lora.safetensors", "{here}", "--base", "sd15"],
            ": expected the name of a file to write, got a fo",
        ),
        (["convert", "lora.safetensors", "foo.BIN", "--base", "sd15"], "foo.BIN: expected a name with .safetensors"),
        (["inspect", "missing", "--plot", "x.foo"], "--plot x.foo: expected a name that ends in one of "),
        (["inspect", "missing", "--plot", "x"], "--plot x: expected a name that ends in one of "),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    key = "lora_unet_mid_block_attentions_0_proj_in"
    save_file(
        {f"{key}.lora_down.weight": torch.ones(1, 4), f"{key}.lora_up.weight": torch.ones(4, 1)}, "lora.safetensors"
    )
    assert main([argument.format(here=tmp_path) for argument in arguments]) == 1
    assert message in (text := capsys.readouterr().err) and len(text.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peft_krona", "--help"])
    with pytest.raises(SystemExit) as status:
        runpy.run_module("peft_krona", run_name="__main__")
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("convert", "inspect", "merge", "extract"))


# -- folders with variants, and single-file checkpoints ----------------------------------------------------------------


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    pipe = tiny_pipeline(folder)
    pipe.save_pretrained(folder / "plain")
    pipe.unet.half(), pipe.text_encoder.half(), pipe.vae.half()
    pipe.save_pretrained(folder / "fp16", variant="fp16")
    return folder


@pytest.mark.parametrize("both", [False, True], ids=["only fp16", "both"])
def test_folders_with_a_variant(sd_folder, both, tmp_path, capsys):
    """The variant is found where there is nothing else; where there is, the plain weights are those that count."""
    folder = tmp_path / "pipe"
    shutil.copytree(sd_folder / "fp16", folder)
    if both:
        shutil.copytree(sd_folder / "plain", folder, dirs_exist_ok=True)
    adapter = random_adapter({"unet": tiny_unet(), "text_encoder": tiny_clip()}, attention)
    export(adapter, tmp_path / "adapter", "peft")
    assert main(["merge", str(folder), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    found = {dtype for dtypes in floats(tmp_path / "merged").values() for dtype in dtypes}
    assert found == {torch.float32 if both else torch.float16}
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(folder)]) == 0
    arguments = ["convert", str(tmp_path / "adapter"), str(tmp_path / "x"), "--to", "lokr", "--base", str(folder)]
    assert main(arguments) == 0
    assert "error" not in capsys.readouterr().err


def test_variants_of_which_none_loads_the_whole_pipeline(sd_folder, tmp_path, capsys):
    folder = tmp_path / "pipe"
    shutil.copytree(sd_folder / "fp16", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.ema.safetensors"))
    export(random_adapter({"unet": tiny_unet()}, attention), tmp_path / "adapter", "peft")
    assert main(["merge", str(folder), str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 1
    assert "only as the variants ema, fp16, and which one is meant is not told" in capsys.readouterr().err


def checkpoint(noise=0.0, dtype=torch.float32):
    """A single file as it is downloaded: original names, with VAE and text encoder."""
    shapes = {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (64, 64),
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 8, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (32, 16),
        "model.diffusion_model.out.0.weight": (8,),
    }
    base = {key: torch.randn(shape, generator=torch.Generator().manual_seed(len(key))) for key, shape in shapes.items()}
    generator = torch.Generator().manual_seed(9)
    return {key: (t + noise * torch.randn(t.shape, generator=generator)).to(dtype) for key, t in base.items()}


def test_extract_from_single_file_checkpoints(tmp_path, capsys):
    save_file(checkpoint(), tmp_path / "a.safetensors")
    save_file(checkpoint(0.01), tmp_path / "b.safetensors")
    common = ["extract", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    factors = ["--a-out", "8", "--a-in", "2"]
    assert main([*common, str(tmp_path / "unet"), *factors, "--r", "16"]) == 0
    adapter = read_adapter(tmp_path / "unet")
    query = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert {layer.name for layer in adapter} == {f"unet.{query}", "unet.conv_in", "unet.conv_out"}
    dW = checkpoint(0.01)[f"model.diffusion_model.{LDM_QUERY}"] - checkpoint()[f"model.diffusion_model.{LDM_QUERY}"]
    layer = next(layer for layer in adapter if layer.module == query)
    assert relative(layer.delta_weight(), dW) <= STORED_IN_A_MODEL  # 16 terms of (8, 2): all there are
    assert main(["convert", str(tmp_path / "unet"), str(tmp_path / "x"), "--to", "lora", "--base", "sd15"]) == 0
    assert main([*common, str(tmp_path / "text"), *factors, "--component", "text_encoder"]) == 0
    assert [layer.name for layer in read_adapter(tmp_path / "text")] == [
        "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    ]
    assert main([*common, str(tmp_path / "none"), *factors, "--component", "text_encoder_2"]) == 1
    assert "checkpoint of denoiser, text_encoder, vae; --component text_encoder_2 is not" in capsys.readouterr().err


LDM_QUERY = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


def test_extract_says_what_it_leaves_out(tmp_path, capsys):
    before, after = checkpoint(), checkpoint(dtype=torch.float16)
    after["model.diffusion_model.input_blocks.0.0.weight"] = torch.randn(8, 9, 3, 3).half()  # inpainting
    del before["model.diffusion_model.out.2.weight"]
    save_file(before, tmp_path / "a.safetensors")
    save_file(after, tmp_path / "b.safetensors")
    arguments = ["extract", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), str(tmp_path / "out")]
    assert main(arguments) == 1  # the rest is the same but for its rounding
    captured = capsys.readouterr()
    assert "left out conv_in.weight: its shape is (8, 4, 3, 3) and (8, 9, 3, 3)" in captured.out
    assert "left out conv_out.weight: only one of the two models has it" in captured.out
    assert "rounded to the coarser" in captured.out and "do not differ" in captured.err
    after[f"model.diffusion_model.{LDM_QUERY}"] += 0.5
    save_file(after, tmp_path / "b.safetensors")
    assert main([*arguments, "--a-out", "8", "--a-in", "2"]) == 0
    assert len(read_adapter(tmp_path / "out")) == 1


def test_extract_from_transformer_checkpoints_takes_fused_projections_apart(tmp_path):
    shapes = {"double_blocks.0.img_attn.qkv.weight": (96, 32), "single_blocks.0.linear1.weight": (224, 32)}
    before = {key: torch.randn(shape) for key, shape in shapes.items()}
    after = {key: t + 0.1 * torch.randn(t.shape) for key, t in before.items()}
    save_file(before, tmp_path / "a.safetensors")
    save_file(after, tmp_path / "b.safetensors")
    arguments = ["extract", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), str(tmp_path / "out")]
    assert main([*arguments, "--component", "transformer", "--a-out", "4", "--a-in", "2", "--r", "8"]) == 0
    found = {layer.module: layer for layer in read_adapter(tmp_path / "out")}
    key = "single_blocks.0.linear1.weight"
    mlp = found["single_transformer_blocks.0.proj_mlp"]
    assert mlp.shape == (128, 32) and len(found) == 7
    assert relative(mlp.delta_weight(), (after[key] - before[key])[96:]) <= STORED_IN_A_MODEL
