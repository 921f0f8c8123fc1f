# SPDX-License-Identifier: Apache-2.0
"""The helpers of examples/dreambooth_kron.py one by one, and the presets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import diffusers
import dreambooth_pipelines as tiny
from PIL import Image
from rounding import assert_rounded
from safetensors.torch import save_file

from examples.dreambooth import (
    TrainingError,
    adapters,
    arguments,
    card,
    checkpoint,
    data,
    demo,
    exports,
    files,
    objective,
    optim,
)
from examples.dreambooth.arguments import adapter_config, build_parser, parse_args, public_settings
from examples.dreambooth.families import known
from examples.dreambooth.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from peft_krona.convert import AdapterFile, LayerUpdate, export

EXAMPLES = Path(data.__file__).resolve().parents[1]
BASIC = ["--pretrained_model_name_or_path", "p", "--instance_data_dir", "d", "--instance_prompt", "a sks dog"]


# -- arguments and presets -------------------------------------------------------------------------------------------

# of diffusers 0.42's train_dreambooth_lora_sdxl.py; not offered: --do_edm_style_training (Playground v2.5)
DIFFUSERS_FLAGS = """adam_beta1 adam_beta2 adam_epsilon adam_weight_decay adam_weight_decay_text_encoder allow_tf32
cache_dir caption_column center_crop checkpointing_steps checkpoints_total_limit class_data_dir class_prompt
dataloader_num_workers dataset_config_name dataset_name enable_xformers_memory_efficient_attention
gradient_accumulation_steps gradient_checkpointing hub_model_id hub_token image_column image_interpolation_mode
instance_data_dir instance_prompt learning_rate local_rank logging_dir lora_dropout lr_num_cycles lr_power lr_scheduler
lr_warmup_steps max_grad_norm max_train_steps mixed_precision num_class_images num_train_epochs num_validation_images
optimizer output_dir output_kohya_format pretrained_model_name_or_path pretrained_vae_model_name_or_path
prior_generation_precision prior_loss_weight prodigy_beta3 prodigy_decouple prodigy_safeguard_warmup
prodigy_use_bias_correction push_to_hub random_flip rank repeats report_to resolution resume_from_checkpoint revision
sample_batch_size scale_lr seed snr_gamma text_encoder_lr train_batch_size train_text_encoder use_8bit_adam use_dora
validation_epochs validation_prompt variant with_prior_preservation""".split()


def test_diffusers_flags_keep_their_names():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    assert [f for f in DIFFUSERS_FLAGS if f"--{f}" not in known] == []


@pytest.mark.parametrize("preset", ["released", "paper"])
@pytest.mark.parametrize(
    ("script", "released_steps", "model"),
    [
        ("sd.sh", 500, "stabilityai/stable-diffusion-2-1-base"),
        ("sdxl.sh", 1000, "stabilityai/stable-diffusion-xl-base-1.0"),
    ],
)
def test_presets(tmp_path, script, preset, released_steps, model):
    """Runs the script with an `accelerate` that writes down what it was asked to launch, and parses that."""
    fake = tmp_path / "accelerate"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/called\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", EXAMPLES / "configs" / script, preset, "my dog", "a photo of sks dog", "--seed", "7"]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    called = (tmp_path / "called").read_text().splitlines()
    at = next(i for i, word in enumerate(called) if word.endswith("dreambooth_kron.py"))
    assert called[0] == "launch" and Path(called[at]).is_file()
    args = parse_args(called[at + 1 :])
    expected = {
        "released": ((64, 8), 1e-3, released_steps, "diffusekrona"),
        "paper": ((64, 4), 5e-4, 1000, "kron"),
    }[preset]
    assert ((args.krona_a_out, args.krona_a_in), args.learning_rate, args.max_train_steps, args.layout) == expected
    assert (args.train_batch_size, args.gradient_accumulation_steps, args.adam_weight_decay) == (1, 4, 1e-2)
    assert args.use_8bit_adam and args.mixed_precision == "fp16" and args.lr_scheduler == "constant"
    assert (args.instance_data_dir, args.instance_prompt, args.seed) == ("my dog", "a photo of sks dog", 7)
    assert args.pretrained_model_name_or_path == model
    assert not args.train_text_encoder and not args.with_prior_preservation


@pytest.mark.parametrize("name", ["multi_gpu", "deepspeed_zero2", "deepspeed_zero3", "fsdp"])
def test_accelerate_configs_load(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / "configs" / f"{name}.yaml"))
    assert config.num_processes == 2 and config.mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--export", "lokr"], None),
        (["--export", "lokr", "--rank", "2"], "it holds one term a layer, and --rank is 2; take --export auto"),
        (["--export", "loha", "--rank", "2"], "it holds one term a layer, and --rank is 2; take --export auto"),
        (["--export", "lora", "--rank", "2"], None),
        (["--export", "lokr", "--layout", "diffusekrona"], "--layout diffusekrona is no plain Kronecker product; take"),
        (["--export", "loha", "--layout", "diffusekrona"], None),
        (["--export", "lokr", "--adapter_type", "lora"], "it holds one term a layer, and --rank is 4; take --export a"),
        (["--export", "lokr", "--adapter_type", "lora", "--rank", "1"], None),
        (["--export", "loha", "--adapter_type", "lokr"], None),
        (["--adapter_type", "lora", "--use_dora"], "DoRA rescales the base weights, .*; take --export none"),
        (["--adapter_type", "lora", "--use_dora", "--export", "none"], None),
    ],
)
def test_an_export_that_will_not_be_written_is_said_at_once(more, said, capsys):
    """And the other ones are: what the converters do with these adapters is in test_unfit_exports."""
    parse_args([*BASIC, *more])
    printed = capsys.readouterr().out
    assert ("will write no file" in printed) == (said is not None)
    assert said is None or re.search(rf"^warning: --export \w+ will write no file: {said}", printed), printed


@pytest.mark.parametrize("adapter", ["krona", "krona diffusekrona", "krona 2", "lora 1", "lora 2", "lokr"])
def test_unfit_exports(adapter, tmp_path):
    """The rule of `unfit_export` is what happens."""
    flags = {
        "krona": [], "krona diffusekrona": ["--layout", "diffusekrona"], "krona 2": ["--rank", "2"],
        "lora 1": ["--adapter_type", "lora", "--rank", "1"], "lora 2": ["--adapter_type", "lora", "--rank", "2"],
        "lokr": ["--adapter_type", "lokr", "--rank", "2", "--alpha", "2"],
    }[adapter]  # fmt: skip
    tiny_sd, targets = tiny.build(tmp_path / "sd"), ["to_q"]
    args = parse_args([*BASIC, *flags, "--krona_a_out", "4", "--krona_a_in", "2"])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None)
    trained = adapters.add(pipe, adapter_config(args, "unet", targets))
    for parameter in (p for p in trained["unet"].parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    adapters.save(pipe, trained, tmp_path / "dog", str(tiny_sd), {})
    for kind in ("auto", "lokr", "loha", "lora"):
        args.export = kind
        files = exports.export_for_other_tools(tmp_path / "dog", kind, str(tiny_sd), str)
        assert bool(files) == (arguments.unfit_export(args) is None), kind
        exports.remove_exports(tmp_path / "dog")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q", "those for sdxl, guessed from the number of"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "those for sd15, guessed from the input size"),
        ("transformer.transformer_blocks.0.attn.to_q", None),
    ],
)
def test_names_of_exports_for_a_model_on_the_hub(module, said, tmp_path):
    """What is guessed is said; a transformer's names need no guess."""
    component, _, name = module.partition(".")
    n_in = 768 if name.endswith("to_k") else 3072 if component == "transformer" else 1280
    n_out = 1280 if component == "unet" else 3072
    layer = LayerUpdate(component, name, torch.randn(1, 64, 4), torch.randn(1, n_out // 64, n_in // 4))
    export(AdapterFile((layer,)), tmp_path / "dog", "peft")
    lines = []
    files = exports.export_for_other_tools(tmp_path / "dog", "lokr", "somebody/model", lines.append)
    assert len(files) == 1, lines
    assert [line for line in lines if "guessed" in line] == [line for line in lines if said and said in line]
    assert bool(said) == any("guessed" in line for line in lines)


def test_flags_from_a_file(tmp_path):
    """Written as people write YAML; the command line goes before it."""
    (tmp_path / "c.yaml").write_text(
        "learning_rate: 5e-4  # no number of YAML 1.1\nmixed_precision: no\ncache_latents: true\nrandom_flip: false\n"
        "lora_dropout: 0.5\ntarget_modules: [to_q, to_k]\ninstance_prompt: '-- a sks dog'\nmax_train_steps:\nseed: 3\n"
        "optimizer_args:\n- a=1\nuse_8bit_adam: off\n"
    )
    args = parse_args(["--config", str(tmp_path / "c.yaml"), *BASIC[:4], "--seed", "4"])
    assert (args.learning_rate, args.mixed_precision, args.cache_latents, args.random_flip) == (5e-4, "no", True, False)
    assert (args.adapter_dropout, args.target_modules, args.optimizer_args) == (0.5, ["to_q", "to_k"], ["a=1"])
    assert (args.instance_prompt, args.max_train_steps, args.seed) == ("-- a sks dog", 500, 4)
    assert "config" not in public_settings(args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nlearning_rat: 1", r"c\.yaml, line 2: 'learning_rat' is no flag .*; is it 'learning_rate'\?"),
        ("xyzzy: 1", r"line 1: 'xyzzy' is no flag of this script; expected flags as in --help"),
        ("config: d.yaml", r"line 1: 'config' is no flag"),
        ("seed: 1\nseed: 2", r"line 2: 'seed' is there twice"),
        ("lora_dropout: 0.1\nadapter_dropout: 0.1", r"line 2: 'adapter_dropout' is there twice"),
        ("cache_latents: 3", r"line 1: 'cache_latents' is '3': expected true or false"),
        ("seed: [1, 2]", r"line 1: 'seed' has several values: expected one"),
        ("rank: many", r"--config .*c\.yaml: argument --rank: invalid positive_int value: 'many'"),
        ("- seed", r"expected lines of `name: value`"),
        ("a: b: c", r"c\.yaml is not YAML: mapping values are not allowed here.*line 1"),
        (None, r"c\.yaml cannot be read \(.*No such file.*\): expected a YAML file"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_of_flags(tmp_path, text, message):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(TrainingError) as caught:
        parse_args(["--config", str(tmp_path / "c.yaml"), *BASIC])
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        *((flag, "-1", "-1(.0)?: expected at least 0") for flag in (
            "max_grad_norm", "prior_loss_weight", "lr_warmup_steps", "learning_rate", "learning_rate_a",
            "learning_rate_b", "text_encoder_lr", "adam_weight_decay", "dataloader_num_workers",
            "num_validation_images",
        )),
        ("learning_rate", "nan", "nan: expected at least 0"),
        ("adam_beta1", "-1", "-1.0: expected at least 0 and below 1"),
        ("adam_beta2", "1", "1.0: expected at least 0 and below 1"),
        ("prodigy_beta3", "1.5", "1.5: expected at least 0 and below 1"),
        ("snr_gamma", "0", "0.0: expected a number above 0"),
        ("snr_gamma", "-5", "-5.0: expected a number above 0"),
        ("alpha", "0", "0.0: expected a number above 0"),
        ("seed", "-1", "-1: expected an integer from 0 to 4294967295"),
        ("seed", "4294967296", "4294967296: expected an integer from 0 to 4294967295"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(flag, value, expected):
    with pytest.raises(TrainingError, match=rf"^--{flag} {expected}\.$"):
        parse_args([*BASIC, f"--{flag}", value])


@pytest.mark.parametrize(
    "flag",
    [
        "output_dir", "logging_dir", "cache_dir", "class_data_dir", "resume_from_checkpoint", "config", "init_adapter",
        "pretrained_vae_model_name_or_path", "cache_to_disk", "optimizer", "revision", "variant", "caption_column",
    ],
)  # fmt: skip
def test_an_empty_name_is_not_what_is_there_without_the_flag(flag):
    """As of a shell's variable that is not set: an empty output would be the current folder."""
    with pytest.raises(TrainingError, match=rf"^--{flag} is empty: was it given by a variable that is not set"):
        parse_args([*BASIC, f"--{flag}", ""])


@pytest.mark.parametrize(("given", "kept"), [("adamw", "AdamW"), ("Prodigy", "prodigy"), ("SGD", "SGD")])
def test_optimizers_in_any_case(given, kept):
    assert parse_args([*BASIC, "--optimizer", given]).optimizer == kept


def test_zero_turns_off_what_can_be_turned_off():
    args = parse_args([*BASIC, "--max_grad_norm", "0", "--learning_rate", "0", "--num_validation_images", "0"])
    assert (args.max_grad_norm, args.learning_rate, args.num_validation_images) == (0, 0, 0)
    with pytest.raises(TrainingError, match="--learning_rate 0 with --learning_rate_a or --learning_rate_b: expected"):
        parse_args([*BASIC, "--learning_rate", "0", "--learning_rate_a", "1e-3"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], ""),
        (["--adapter_type", "lora", "--krona_a_out", "64"], ""),  # the default: nothing is lost
        (
            ["--adapter_type", "lora", "--krona_a_out", "8", "--layout", "diffusekrona", "--module_dropout", "0.1"],
            "warning: --krona_a_out, --layout has no effect: only with --adapter_type krona.\n"
            "warning: --module_dropout has no effect: only with --adapter_type krona or lokr.\n",
        ),
        (["--lokr_factor", "8"], "warning: --lokr_factor has no effect: only with --adapter_type lokr.\n"),
        (
            ["--class_prompt", "a dog", "--text_encoder_lr", "1e-4"],
            "warning: --class_prompt has no effect: only with --with_prior_preservation.\n"
            "warning: --text_encoder_lr has no effect: only with --train_text_encoder.\n",
        ),
    ],
)
def test_flags_without_effect_are_named(capsys, more, said):
    parse_args([*BASIC, *more])
    assert capsys.readouterr().out == said


def test_settings_that_leave_the_machine_have_no_local_paths(tmp_path):
    args = parse_args([*BASIC, "--output_dir", "out", "--validation_prompt", "x", "--cache_dir", "c"])
    args.pretrained_vae_model_name_or_path = str(tmp_path)
    shown = public_settings(args)
    assert shown["pretrained_model_name_or_path"] == "p" and shown["instance_prompt"] == "a sks dog"
    hidden = {"output_dir", "instance_data_dir", "validation_prompt", "cache_dir", "pretrained_vae_model_name_or_path"}
    assert not hidden & shown.keys()


def test_factors_per_projection():
    args = parse_args([*BASIC, "--krona_unet_q_a_out", "32", "--krona_unet_o_a_in", "8"])
    config = adapter_config(args, "unet")
    assert (config.a_out, config.a_in) == (64, 4)
    assert config.factor_pattern == {"to_q": (32, 4), r"to_out\.0": (64, 8)}
    assert adapter_config(args, "text_encoder").factor_pattern == {}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet.add_adapter(config)

    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.to_q.factors("default") == (32, 4) and attention.to_k.factors("default") == (64, 4)
    assert attention.to_out[0].factors("default") == (64, 8)


def test_learning_rates_of_the_groups():
    args = parse_args([*BASIC, "--learning_rate", "1e-3", "--learning_rate_b", "4e-3", "--text_encoder_lr", "1e-4"])
    model = torch.nn.Module()
    model.krona_A, model.krona_B = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    rates = {"unet": args.learning_rate, "text_encoder": args.text_encoder_lr}
    ratio_b = args.learning_rate_b / args.learning_rate
    groups = optim.parameter_groups(
        {"unet": model, "text_encoder": model}, rates, dict.fromkeys(rates, 0.0), 1, ratio_b
    )
    assert {g["name"]: pytest.approx(g["lr"]) for g in groups} == {
        "unet.a": 1e-3, "unet.b": 4e-3, "text_encoder.a": 1e-4, "text_encoder.b": 4e-4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "given"),
    [
        ([], {}),  # its eps is a pair, it has no betas
        (["eps=(None,1e-2)"], {"eps": (None, 1e-2)}),
    ],
)
def test_adafactor_gets_what_it_takes(more, given):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "weight_decay": 0.0}]
    optimizer = optim.build_optimizer(groups, "Adafactor", 1e-3, more=more)
    assert optimizer.defaults["eps"] == given.get("eps", (None, 1e-3))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"name": "SparseAdam"}, "SparseAdam is for sparse gradients, which adapters do not have"),
        ({"name": "Adafactor", "eps": 1e-6}, "Adafactor does not take {'eps': 1e-06}"),
    ],
)
def test_optimizers_that_do_not_suit(more, message):
    with pytest.raises(TrainingError, match=message):
        optim.build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}], lr=1e-3, **more)


# -- data ------------------------------------------------------------------------------------------------------------


def test_the_seeds_layout_and_generated_folders(tmp_path):
    tiny.images(tmp_path / "dog" / "input")
    tiny.images(tmp_path / "dog" / "generated", 9)
    assert [Path(p.name).parent.name for p in data.read_folder(tmp_path / "dog", "x")] == ["input"] * 3
    with pytest.raises(TrainingError, match="Its folders dog have some: choose one of them"):
        data.read_folder(tmp_path, "x")
    one = data.read_folder(tmp_path / "dog" / "input" / "1.png", "x")
    assert [p.caption for p in one] == ["x"]


def test_captions(tmp_path):
    tiny.images(tmp_path)
    (tmp_path / "1.txt").write_text("from a sidecar\n")
    (tmp_path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "2.png", "text": "from metadata", "note": "other"})
    )
    assert [p.caption for p in data.read_folder(tmp_path, "default")] == ["default", "from a sidecar", "from metadata"]
    assert data.read_folder(tmp_path, "default", "note")[2].caption == "other"
    with pytest.raises(TrainingError, match=r"0\.png has no caption"):
        data.read_folder(tmp_path, None)
    with pytest.raises(TrainingError, match=r"metadata\.jsonl, line 1: .*'nope'"):
        data.read_folder(tmp_path, "default", "nope")


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("1.txt", "ein h\xfcbscher Hund".encode("latin-1"), None, r"1\.txt is not UTF-8 text.*: save it as UTF-8"),
        ("metadata.jsonl", b'{"file_name": "1.png", "text": "\xfc"}', None, r"metadata\.jsonl is not UTF-8 text"),
        ("metadata.jsonl", b'{"file_name": "1.png", "text": 5}', None, r"line 1: expected .*'text' is 5, not a text"),
        ("other", b"", "words", r"--caption_column 'words': expected .*metadata\.jsonl with that key"),
    ],
)
def test_captions_that_cannot_be_read(tmp_path, name, content, column, message):
    tiny.images(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        data.read_folder(tmp_path, "default", column)


def test_a_caption_file_may_begin_with_a_mark(tmp_path):
    tiny.images(tmp_path, 1)
    (tmp_path / "0.txt").write_text("a dog", encoding="utf-8-sig")
    assert data.read_folder(tmp_path, None)[0].caption == "a dog"


def test_an_image_over_the_pixel_limit(tmp_path, monkeypatch):
    tiny.images(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(TrainingError, match=r"0\.png cannot be read as an image .*exceeds limit"):
        data.read_folder(tmp_path, "default")


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_of_grey_become_eight(tmp_path, name):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / name)
    image = data.open_image(tmp_path / name)
    assert image.mode == "RGB" and [image.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


@pytest.mark.parametrize(("values", "expected"), [([0, 100, 255], [0, 100, 255]), ([0, 25700, 65535], [0, 100, 255])])
def test_grey_in_whole_numbers(values, expected):
    image = data.as_rgb(Image.fromarray(np.array([values], np.int32)))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "nobody/nothing"}, r"--dataset_name nobody/nothing \(split 'train'\) could not be loaded: "),
        ({"split": "nope"}, r"\(split 'nope'\) could not be loaded: .*one of its splits in --dataset_split"),
        ({}, r"d\[1\] cannot be read as an image .*remove it from the dataset"),
    ],
    ids=["missing", "split", "corrupt"],
)
def test_datasets_that_cannot_be_read(tmp_path, change, message):
    pytest.importorskip("datasets")
    tiny.images(tmp_path / "d" / "train", 2)
    (tmp_path / "d" / "train" / "1.png").write_bytes(b"no image")
    arguments = {"name": str(tmp_path / "d"), "cache_dir": str(tmp_path / "cache"), "default_caption": "x"}
    with pytest.raises(TrainingError, match=message) as raised:
        data.read_dataset(**arguments | change)
    assert "\n" not in str(raised.value)


def test_a_datasets_folder(tmp_path):
    pytest.importorskip("datasets")
    tiny.images(tmp_path / "d" / "train", 2)
    (tmp_path / "d" / "train" / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{i}.png", "words": f"number {i}"}) for i in range(2))
    )
    arguments = {"name": str(tmp_path / "d"), "cache_dir": str(tmp_path / "cache"), "caption_column": "words"}
    found = data.read_dataset(**arguments)
    assert [(p.caption, p.size, p.load().mode) for p in found] == [(f"number {i}", (40, 40), "RGB") for i in range(2)]
    with pytest.raises(TrainingError, match="--caption_column 'nope': the dataset's columns are image, words"):
        data.read_dataset(**arguments | {"caption_column": "nope"})


def test_transparent_becomes_white_and_exif_is_obeyed(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert data.open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "b.jpg", exif=exif)
    assert data.open_image(tmp_path / "b.jpg").size == (2, 4)


def test_crops_have_the_coordinates_of_the_pixels():
    y, x = np.mgrid[0:40, 0:60].astype(np.uint8)
    image = Image.fromarray(np.stack([y, x, 0 * x], -1))
    pixels, (top, left) = data.fit(image, (40, 40), (0.3, 0.7), False, "bilinear")
    assert (top, left) == (0, 14) and pixels.shape == (3, 40, 40)
    assert round(float((pixels[1, 0, 0] + 1) * 127.5)) == left
    flipped, (_, left) = data.fit(image, (40, 40), (0.3, 0.7), True, "bilinear")
    assert round(float((flipped[1, 0, 0] + 1) * 127.5)) == 59 - left
    assert data.fit(image, (40, 40), None, False, "bilinear")[1] == (0, 10)
    assert data.fit(Image.new("RGB", (10, 10)), (40, 24), None, False, "box")[0].shape == (3, 40, 24)


def make_dataset(tmp_path, **changes):
    tiny.images(tmp_path / "wide", 3, (64, 32))
    tiny.images(tmp_path / "tall", 2, (32, 64))
    pictures = data.read_folder(tmp_path / "wide", "w") + data.read_folder(tmp_path / "tall", "t")
    settings = {"seed": 0, "center_crop": False, "random_flip": True, "caption_dropout": 0.0,
                "interpolation": "box"} | changes  # fmt: skip
    buckets = data.choose_buckets("32,64;64,32;32,32", 32, 8)
    return data.DreamBoothDataset(pictures, buckets, **settings)


def test_batches_have_one_shape_and_cover_the_epoch(tmp_path):
    dataset = make_dataset(tmp_path)
    assert [p.bucket for p in dataset.pictures] == [0, 0, 0, 1, 1]
    batches = data.Batches(dataset, 2, 0, 1, repeats=1, seed=0)
    assert batches.per_epoch == 3
    batches.stop = 6
    seen = [[index for index, _ in batch] for batch in batches]
    assert all(len({dataset.pictures[i].bucket for i in batch}) == 1 for batch in seen)
    assert {i for batch in seen[:3] for i in batch} == {i for batch in seen[3:] for i in batch} == set(range(5))
    assert data.collate([dataset[key] for key in next(iter(batches))])["pixels"].shape[0] == 2
    assert data.Batches(dataset, 2, 0, 1, repeats=3, seed=0).per_epoch == 5 + 3


def test_processes_share_what_one_process_sees(tmp_path):
    dataset = make_dataset(tmp_path)

    def keys(batch_size, process, processes, start=0):
        batches = data.Batches(dataset, batch_size, process, processes, 1, seed=4)
        batches.start, batches.stop = start, 9
        return list(batches)

    whole = keys(4, 0, 1)
    assert [a + b for a, b in zip(keys(2, 0, 2), keys(2, 1, 2), strict=True)] == whole
    assert keys(4, 0, 1, start=5) == whole[5:]
    assert len({number for batch in whole for _, number in batch}) == 9 * 4


def test_samples_depend_on_their_number_only(tmp_path):
    dataset = make_dataset(tmp_path)
    one, again, other = dataset[0, 5]["instance"], dataset[0, 5]["instance"], dataset[0, 6]["instance"]
    assert torch.equal(one["pixels"], again["pixels"]) and not torch.equal(one["pixels"], other["pixels"])


# -- objective -------------------------------------------------------------------------------------------------------


def scheduler(kind):
    return diffusers.DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")


def loss_of(prediction, target, scheduler, times, snr_gamma):
    goal = objective.NoisePrediction(scheduler.config, snr_gamma)
    return objective.loss_of(prediction, target, goal.weight(times))


def test_min_snr_weights():
    """A perfect v-prediction that is off by e in noise space must weigh the same as epsilon off by e, per min-SNR."""
    t = torch.tensor([10, 500, 990])
    alpha = scheduler("epsilon").alphas_cumprod[t].double()
    snr = alpha / (1 - alpha)
    off, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for i in range(3):
        epsilon = loss_of(off, zero, scheduler("epsilon"), t[i : i + 1], 5.0)
        velocity = loss_of(off, zero, scheduler("v_prediction"), t[i : i + 1], 5.0)
        for got, want in ((epsilon, snr[i].clamp(max=5) / snr[i]), (velocity, snr[i].clamp(max=5) / (snr[i] + 1))):
            assert_rounded(got, want, want, 16)  # one difference, exact or of half the size, a root, five quotients
    assert loss_of(off, zero, scheduler("epsilon"), t[:1], None) == 1


def test_min_snr_without_signal():
    """Zero terminal SNR: the weight stays finite."""
    none = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    loss = loss_of(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), none, torch.tensor([999]), 5.0)
    assert torch.isfinite(loss)


def test_targets():
    x, noise, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([3, 700])
    target_of = lambda kind: objective.NoisePrediction(scheduler(kind).config).add_noise(x, noise, t)[2]  # noqa: E731
    assert target_of("epsilon") is noise
    a = scheduler("v_prediction").alphas_cumprod[t].view(-1, 1, 1, 1).double()
    expected, size = (a.sqrt() * n - (1 - a).sqrt() * y for n, y in ((noise, x), (noise.abs(), -x.abs())))
    assert_rounded(target_of("v_prediction"), expected, size, 6)
    with pytest.raises(TrainingError, match="'sample'; this script trains epsilon and v_prediction"):
        target_of("sample")


def test_noise_offset_shifts_whole_channels():
    batch = {"noise_key": [(n, data.NOISE) for n in range(64)]}

    def draw(offset):
        goal = objective.NoisePrediction(scheduler("epsilon").config, noise_offset=offset)
        return objective.draw(batch, torch.Size([4, 8, 8]), 0, goal, torch.device("cpu"))

    _, plain, steps = draw(0.0)
    _, shifted, same = draw(2.0)
    assert torch.equal(steps, same)
    shift = shifted - plain
    assert shift.std(dim=(2, 3)).max() <= 2 * torch.finfo(shift.dtype).eps * shifted.abs().max()
    assert 1.5 < shift[:, :, 0, 0].std() < 2.5
    assert abs(plain.mean()) < 0.05 and 0.95 < plain.std() < 1.05


def test_latents_with_mean_and_std():
    vae = tiny.vae().double()
    vae.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    mean, std = StableDiffusion(SimpleNamespace(vae=vae)).encode_image(pixels)
    posterior = vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, (posterior.mean - 1) * vae.config.scaling_factor / 2)
    torch.testing.assert_close(std, posterior.std * vae.config.scaling_factor / 2)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_prompts_are_encoded_as_the_pipeline_does(tmp_path, kind):
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny.build(tmp_path, kind), torch_dtype=torch.float64)
    prompts = ["a dog", ""]
    family = known()[type(pipe).__name__](pipe)
    encoded = family.collate(family.encode_prompt(prompts))
    for i, prompt in enumerate(prompts):
        if kind == "sd":
            expected, pooled = pipe.encode_prompt(prompt, "cpu", 1, False)[0], None
        elif prompt:
            expected, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
        else:  # what guidance uses where no negative prompt is given
            _, expected, _, pooled = pipe.encode_prompt("x", device="cpu", do_classifier_free_guidance=True)
        torch.testing.assert_close(encoded["hidden"][i : i + 1], expected)
        if pooled is not None:
            torch.testing.assert_close(encoded["pooled"][i : i + 1], pooled)


def test_micro_conditioning():
    batch = {"original_size": [(40, 60)], "crop": [(0, 14)], "target_size": [(32, 48)]}
    ids = StableDiffusionXL(None).conditions(batch, torch.device("cpu"))["time_ids"]
    assert ids.tolist() == [[40, 60, 0, 14, 32, 48]]


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_kill_while_replacing_a_folder_loses_nothing(tmp_path):
    """Between the two renames the old folder waits under another name; cleaning puts it back."""
    (tmp_path / ".tmp-old-unet").mkdir()
    (tmp_path / ".tmp-old-unet" / "file").write_text("old")
    (tmp_path / ".tmp-checkpoint-3").mkdir()
    (tmp_path / ".tmp-delete-checkpoint-1").mkdir()
    files.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["unet"] and (tmp_path / "unet" / "file").read_text() == "old"


@pytest.mark.parametrize("limit", [100, 20_000, 60_000, 97_000, 99_700])
def test_a_failed_write_is_recognised(tmp_path, limit):
    """Wherever in torch.save the disk gets full; it ends in different errors."""
    import resource

    state, path = [torch.zeros(64, 64) for _ in range(6)], tmp_path / "optimizer.bin"  # 100 kB
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(RuntimeError) as raised:
            torch.save(state, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert checkpoint.is_write_error(raised.value), raised.value
    assert not checkpoint.is_write_error(RuntimeError("shapes do not match"))


def test_exports_of_earlier_weights_are_removed_and_nothing_else(tmp_path):
    output = tmp_path / "my.dog"
    output.mkdir()
    ours, other = {"krona.source": "krona"}, {"format": "pt"}
    files = {
        "my.dog.safetensors": ours, "my.dog_term1of2.safetensors": ours, "my.dog_term2of2.safetensors": other,
        "myxdog.safetensors": ours, "cat.safetensors": ours,
    }  # fmt: skip
    for name, metadata in files.items():
        save_file({"x": torch.zeros(1)}, output / name, metadata=metadata)
    (output / "my.dog_term3of3.safetensors").write_bytes(b"no safetensors file")
    assert [p.name for p in exports.remove_exports(output)] == ["my.dog.safetensors", "my.dog_term1of2.safetensors"]
    assert sorted(p.name for p in output.iterdir()) == [
        "cat.safetensors", "my.dog_term2of2.safetensors", "my.dog_term3of3.safetensors", "myxdog.safetensors",
    ]  # fmt: skip


# -- demo ------------------------------------------------------------------------------------------------------------


def test_demo_settings_parse_and_can_be_overridden():
    args = parse_args(["--demo", "robot", "--learning_rate", "2e-3"], demo.settings)
    assert args.instance_data_dir.endswith("subjects/robot") and args.learning_rate == 2e-3 and args.cache_latents
    with pytest.raises(TrainingError, match="--demo nobody: expected one of the shipped subjects, dog,"):
        parse_args(["--demo", "nobody"], demo.settings)


def test_demo_backgrounds_are_new():
    for name, subject in demo.subjects().items():
        prompts = demo.prompts_of(name, "a sks thing")
        assert len(prompts) == 7 and not set(prompts) & set(subject["colours"])


def test_checkpoints_that_were_set_aside(tmp_path, capsys):
    """They neither replace each other nor pass for those of their step, and only they are ever removed."""

    def put(name, step):
        (tmp_path / name).mkdir()
        state = {"step": step, "settings": {"optimizer": "adamw", "processes": 1}}  # typed so by the user
        (tmp_path / name / checkpoint.STATE).write_text(json.dumps(state))
        checkpoint.write_checksums(tmp_path / name)

    for name in ("checkpoint-20", "checkpoint-30", "abandoned-checkpoint-20", "abandoned-checkpoint-30"):
        put(name, int(name[-2:]))
    precious = {"abandoned-photos/a.jpg", "abandoned-ideas.txt", "elsewhere/b.txt"}
    for name in precious:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    accelerator = SimpleNamespace(
        is_main_process=True,
        num_processes=1,
        print=print,
        load_state=lambda path: None,
        wait_for_everyone=lambda: None,
        distributed_type="NO",
        is_fsdp2=False,
    )
    settings = {"lr_scheduler": "constant", "optimizer": "AdamW"}
    run = checkpoint.Checkpoints(accelerator, tmp_path, settings, overwrite=True)
    assert run.resume(run.find("abandoned-checkpoint-20")) == 20 and run.saved_step is None
    assert "other settings" not in capsys.readouterr().out
    run.set_aside()
    found = sorted(p.name for p in tmp_path.glob("*checkpoint-*"))
    assert found == [f"abandoned-{n}checkpoint-{step}" for n in ("2-", "") for step in (20, 30)]

    (tmp_path / "checkpoint-40").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / checkpoint.STATE).write_text("{}")
    run = checkpoint.Checkpoints(accelerator, tmp_path, settings, overwrite=True)
    assert run.resume(run.find(None)) == 0
    assert not list(tmp_path.glob("*checkpoint-*")) and not list(tmp_path.glob(".tmp-*"))
    assert all((tmp_path / name).read_text() == "precious" for name in precious)


def test_only_the_script_and_its_command_line_see_the_flags():
    """Every other helper is given the values that it uses; nobody writes into the parsed flags but their parser."""
    helpers = [p for p in (EXAMPLES / "dreambooth").rglob("*.py") if p.name != "arguments.py"]
    assert [
        p.name for p in helpers if re.search(r"\bargs\.(?!\.)|\bargs: (?!Any,)", p.read_text(encoding="utf-8"))
    ] == []
    script = (EXAMPLES / "dreambooth_kron.py").read_text(encoding="utf-8")
    assert re.search(r"\bargs\.\w+ = |setattr\(args", script) is None
    assert {"save_krona_weights", "load_krona_weights", "add_krona"} <= vars(adapters).keys()


@pytest.mark.parametrize(
    ("path", "output", "name"),
    [
        ("{tmp}/sd", "{tmp}/out", "../sd"),
        ("{tmp}/sd/", "{tmp}/a/out", "../../sd"),
        ("{tmp}/cache/models--me--sd/snapshots/0f", "{tmp}/out", "me/sd"),
        ("{tmp}/sd", "/nowhere/else", "sd"),  # the way there would tell all that the absolute path tells
        ("stabilityai/sdxl", "{tmp}/out", "stabilityai/sdxl"),
    ],
)
def test_the_base_models_name_is_relative_or_an_id(tmp_path, path, output, name):
    path, output = (text.format(tmp=tmp_path) for text in (path, output))
    if path.startswith(str(tmp_path)):
        Path(path).mkdir(parents=True)
    assert card.base_model_name(path, Path(output)) == name
