# SPDX-License-Identifier: Apache-2.0
"""examples/dreambooth_kron.py --init_adapter: training that starts from an adapter of any tool."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dreambooth_pipelines as tiny
import tiny_families
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from examples import dreambooth_kron
from examples.dreambooth import TrainingError, init_adapter
from examples.dreambooth.arguments import parse_args
from peft_krona import KronAConfig
from peft_krona.convert import (
    AdapterFile,
    LayerUpdate,
    base_of_folder,
    export,
    read_adapter,
    shapes_of_models,
    tolerance,
)
from peft_krona.pipelines import add_krona, save_krona_weights

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return tiny.images(tmp_path_factory.mktemp("pictures"), count=2)


def adapter(unet, a_out, a_in, r=1, layout="kron", text=None):
    """A random adapter of the attention, which is the reference: nothing of it went through a file."""
    torch.manual_seed(7)
    shapes = shapes_of_models({"unet": unet} | ({"text_encoder": text} if text else {}))
    layers = [
        LayerUpdate(
            part, name, torch.randn(r, a_out, a_in), torch.randn(r, shape[0] // a_out, shape[1] // a_in), 0.5, layout
        )
        for part, modules in shapes.items()
        for name, shape in modules.items()
        if name.endswith(TARGETS if part == "unet" else "q_proj")
    ]
    return AdapterFile(tuple(layers))


def released(adapter_):
    """As DiffuseKronA's own code saves it."""
    tensors = {}
    for layer in adapter_:
        key = f"unet.{layer.module.replace('.to_', '.processor.to_').replace('to_out.0', 'to_out')}_lora"
        tensors[f"{key}.down.weight"] = (layer.A[0].T * layer.scale).contiguous()
        tensors[f"{key}.up.weight"] = layer.B[0].contiguous()
    return tensors


@pytest.fixture(scope="module")
def sources(tiny_sd, tmp_path_factory):
    """{name: (path, the adapter that is in it)}."""
    folder = tmp_path_factory.mktemp("sources")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd)
    plain = adapter(pipe.unet, 4, 2)
    made = {"lokr": plain, "lora": plain, "terms": adapter(pipe.unet, 4, 2, r=2)}
    made["diffusekrona"] = adapter(pipe.unet, 8, 4, layout="diffusekrona")
    made["text"] = adapter(pipe.unet, 4, 2, text=pipe.text_encoder)
    paths = {name: folder / f"{name}.safetensors" for name in made}
    save_file(released(made["diffusekrona"]), paths["diffusekrona"])
    for name, to in (("lokr", "lokr"), ("lora", "lora"), ("terms", "lora"), ("text", "lokr")):
        export(made[name], paths[name], to=to, base_model=base_of_folder(tiny_sd), dtype=torch.float32)

    config = KronAConfig(target_modules=list(TARGETS), a_out=8, a_in=2, alpha=3.0, scaling="cdka", krona_dropout=0.25,
                         factor_pattern={"to_q": (4, 4)}, init_weights=False)  # fmt: skip
    add_krona(pipe, config)
    save_krona_weights(pipe, folder / "krona")
    paths["krona"], made["krona"] = folder / "krona", read_adapter(folder / "krona")

    strength = {k: v / 4 if k.endswith(".alpha") else v for k, v in load_file(paths["lora"]).items()}
    paths["alpha"], made["alpha"] = folder / "alpha.safetensors", plain.scaled(0.25)
    save_file(strength, paths["alpha"])

    dora = load_file(paths["lora"])
    dora |= {k.replace("lora_down.weight", "dora_scale"): torch.ones(1, 32) for k in dora if "lora_down" in k}
    save_file(dora, folder / "dora.safetensors")
    other = {k.replace("down_blocks", "down_blocks_9"): v for k, v in load_file(paths["lokr"]).items()}
    save_file(other, folder / "other.safetensors")
    return {name: (path, made[name]) for name, path in paths.items()} | {
        name: (folder / f"{name}.safetensors", None) for name in ("dora", "other", "nothing")
    }


def arguments(pipeline, pictures, output, *more):
    return [
        "--pretrained_model_name_or_path", str(pipeline), "--instance_data_dir", str(pictures), "--max_train_steps",
        "1", "--instance_prompt", "a sks dog", "--output_dir", str(output), "--train_batch_size", "1", "--report_to",
        "none", "--export", "none", *map(str, more),
    ]  # fmt: skip


def train(*args):
    return dreambooth_kron.main(parse_args(arguments(*args)))


def begin(tiny_sd, pictures, source, *more):
    """What the script does before the first step; returns the pipeline."""
    pipe = DiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    denoiser = "unet" if hasattr(pipe, "unet") else "transformer"
    args = parse_args(arguments(tiny_sd, pictures, "unused", "--init_adapter", source, *more))
    init_adapter.begin(pipe, args.init_adapter, denoiser, vars(args), args.train_text_encoder, print)
    return pipe


@pytest.mark.parametrize(
    ("source", "more", "expected"),
    [
        ("krona", [], {"a_out": 8, "a_in": 2, "scaling": "cdka", "krona_dropout": 0.25}),
        ("krona", ["--adapter_dropout", 0, "--alpha", 3, "--target_modules", *TARGETS], {"krona_dropout": 0}),
        ("lokr", ["--module_dropout", 0.5], {"a_out": 4, "a_in": 2, "module_dropout": 0.5}),
        ("lora", [], {"a_in": 1, "r": 16}),
        ("lora", ["--krona_a_out", 4, "--krona_a_in", 2, "--rank", 1], {"a_out": 4, "a_in": 2, "r": 1}),
        ("alpha", ["--alpha", 0.25], {"a_in": 1, "r": 16, "alpha": 0.25}),
        ("alpha", ["--krona_a_out", 4, "--krona_a_in", 2, "--rank", 1], {"a_out": 4, "a_in": 2, "alpha": 0.25}),
        ("terms", ["--krona_a_out", 4, "--krona_a_in", 2, "--rank", 3], {"a_out": 4, "a_in": 2, "r": 3}),
        ("lokr", ["--rank", 2], {"a_out": 4, "a_in": 2, "r": 2}),
        ("diffusekrona", [], {"a_out": 8, "a_in": 4, "layout": "diffusekrona"}),
        ("text", ["--train_text_encoder"], {"a_out": 4, "a_in": 2}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_the_start_is_the_file(tiny_sd, pictures, tmp_path, sources, source, more, expected):
    path, wanted = sources[source]
    pipe = begin(tiny_sd, pictures, path, *more)
    assert all(p.requires_grad == (".krona_" in name) for name, p in pipe.unet.named_parameters())
    assert not pipe.unet.peft_config["default"].inference_mode
    save_krona_weights(pipe, tmp_path)
    config = json.loads((tmp_path / "unet" / "adapter_config.json").read_text())
    assert {name: config[name] for name in expected} == expected
    wanted = {layer.name: layer.delta_weight() for layer in wanted}
    got = {layer.name: layer.delta_weight() for layer in read_adapter(tmp_path)}
    assert got.keys() == wanted.keys()
    for name, delta in wanted.items():  # rounded into the file, and once more if the factors are others
        assert (got[name] - delta).norm() <= 2 * tolerance(torch.float32) * delta.norm(), name


@pytest.mark.parametrize(("to", "more"), [("lokr", []), ("lora", ["--krona_a_out", 4, "--krona_a_in", 2, "--rank", 1])])
def test_files_of_a_transformer(tmp_path, pictures, to, more):
    """FLUX.2 klein, with its fused projections, under other tools' names."""
    pipe = DiffusionPipeline.from_pretrained(tiny_families.build(tmp_path / "klein", "flux2_klein"))
    add_krona(pipe, KronAConfig(a_out=4, a_in=2, init_weights=False))
    save_krona_weights(pipe, tmp_path / "krona")
    made = read_adapter(tmp_path / "krona")
    export(made, tmp_path / "file.safetensors", to=to, dtype=torch.float32)
    begun = begin(tmp_path / "klein", pictures, tmp_path / "file.safetensors", *more)
    save_krona_weights(begun, tmp_path / "begun")
    got = {layer.name: layer.delta_weight() for layer in read_adapter(tmp_path / "begun")}
    wanted = {layer.name: layer.delta_weight() for layer in made}
    assert got.keys() == wanted.keys() and any("to_qkv_mlp_proj" in name for name in got)
    for name, delta in wanted.items():
        assert (got[name] - delta).norm() <= 2 * tolerance(torch.float32) * delta.norm(), name


def test_new_terms_learn(tiny_sd, pictures, tmp_path, sources):
    train(tiny_sd, pictures, tmp_path, "--init_adapter", sources["lokr"][0], "--rank", 2, "--learning_rate", 1e-2)
    before = {layer.name: layer for layer in sources["lokr"][1]}
    for layer in read_adapter(tmp_path):
        assert layer.B[1].any() and layer.A[1].any() and not torch.equal(layer.B[0], before[layer.name].B[0])


def test_resume_needs_no_file(tiny_sd, pictures, tmp_path, sources):
    """The checkpoint has all of it; exact, as ever."""
    init = Path(shutil.copy(sources["lora"][0], tmp_path))
    more = ["--init_adapter", init, "--krona_a_out", 4, "--krona_a_in", 2, "--rank", 2, "--adapter_dropout", 0.3,
            "--max_train_steps", 2, "--checkpointing_steps", 1]  # fmt: skip
    train(tiny_sd, pictures, tmp_path / "out", *more)
    whole = load_file(tmp_path / "out" / "unet" / "adapter_model.safetensors")
    AcceleratorState._reset_state(True)
    init.unlink()
    train(tiny_sd, pictures, tmp_path / "out", *more, "--resume_from_checkpoint", "checkpoint-1")
    again = load_file(tmp_path / "out" / "unet" / "adapter_model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("lora", ["--adapter_type", "lora"], r"--adapter_type lora contradicts --init_adapter: every file is read as"),
        ("lokr", ["--init_weights", "cdka"], r"--init_weights cdka contradicts --init_adapter: the weights start as"),
        ("lokr", ["--krona_unet_q_a_in", 2], r"--krona_unet_q_a_in 2 contradicts --init_adapter: its layers have"),
        ("lora", ["--krona_a_out", 8, "--rank", 1],
         r"--krona_a_out 8, --rank 1 contradicts --init_adapter .*lora\.safetensors: unet\..* is \(\d+, 1\), r=16, "
         r"layout kron there, and no exact \(8, 1\), r=1, layout kron; the nearest is \d\d\.\d% off\. Drop the"),
        ("terms", ["--krona_a_out", 4, "--krona_a_in", 2, "--rank", 1], r"and no exact \(4, 2\), r=1"),
        ("diffusekrona", ["--layout", "kron"], r"--layout kron contradicts .* layout diffusekrona there, and no exact"),
        ("lokr", ["--krona_a_out", 5, "--strict_factors"], r"a_out=5 does not divide out_features=\d+"),
        ("krona", ["--alpha", 1], r"--alpha 1\.0 contradicts --init_adapter .*krona, whose alpha is 3 in the unet"),
        ("krona", ["--scaling", "rank"], r"--scaling rank contradicts .* whose scaling is cdka in the unet"),
        ("lokr", ["--target_modules", "to_q"], r"--target_modules matches \d+ layers of the unet, and contradicts .* "
         r"which has \d+ \(.*to_k is among them\): drop it"),
        ("text", [], r"text\.safetensors has weights for text_encoder, which are not trained: add --train_text_enc"),
        ("lokr", ["--train_text_encoder"], r"--train_text_encoder contradicts --init_adapter .*for unet alone: drop"),
        ("dora", [], r"--init_adapter .* cannot be the start of a training: .*dora_scale"),
        ("other", [], r"cannot be the start of a training: .*"),
        ("nothing", [], r"nothing\.safetensors cannot be the start of a training: .*does not exist"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)  # fmt: skip
def test_what_contradicts_is_refused(tiny_sd, pictures, sources, source, more, message):
    with pytest.raises(TrainingError) as caught:
        begin(tiny_sd, pictures, sources[source][0], *more)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), caught.value


def test_a_refusal_is_one_line_and_leaves_nothing(tiny_sd, pictures, tmp_path, capsys, sources):
    args = arguments(tiny_sd, pictures, tmp_path / "out", "--init_adapter", sources["dora"][0])
    assert dreambooth_kron.run(args) == 2
    assert re.fullmatch(r"error: --init_adapter .*\n", capsys.readouterr().err)
    assert not list((tmp_path / "out").iterdir())
