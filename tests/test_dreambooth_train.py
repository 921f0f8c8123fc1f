# SPDX-License-Identifier: Apache-2.0
"""examples/dreambooth_kron.py end to end on tiny random pipelines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rounding import HALF, assert_same_training
from safetensors.torch import load_file, safe_open

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dreambooth_pipelines as tiny
from accelerate.state import AcceleratorState

from examples import dreambooth_kron, generate
from examples.dreambooth import TrainingError, card, checkpoint, demo, evaluate
from examples.dreambooth.arguments import adapter_name, compared, parse_args

SCRIPT = Path(dreambooth_kron.__file__)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return tiny.images(tmp_path_factory.mktemp("pictures") / "input").parent


def arguments(pipeline, pictures, output, *more):
    return [
        "--pretrained_model_name_or_path", str(pipeline), "--instance_data_dir", str(pictures),
        "--instance_prompt", "a sks dog", "--output_dir", str(output), "--max_train_steps", "2",
        "--train_batch_size", "1", "--report_to", "none", "--export", "none", *map(str, more),
    ]  # fmt: skip


def train(*args):
    return dreambooth_kron.main(parse_args(arguments(*args)))


def weights(output):
    files = sorted(Path(output).glob("*/adapter_model.safetensors"))
    return {f"{f.parent.name}.{k}": v for f in files for k, v in load_file(f).items()}


def differences(one, other):
    assert one.keys() == other.keys() and one
    return [k for k in one if not torch.equal(one[k], other[k])]


# -- resume ----------------------------------------------------------------------------------------------------------

RESUME = ["--max_train_steps", 6, "--checkpointing_steps", 2, "--gradient_accumulation_steps", 2, "--random_flip",
          "--caption_dropout", 0.3, "--noise_offset", 0.1, "--adapter_dropout", 0.2, "--module_dropout", 0.1,
          "--lr_scheduler", "cosine", "--learning_rate", 1e-2]  # fmt: skip

KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(1)
from accelerate import Accelerator
from examples import dreambooth_kron, generate
calls = 0
def kill_at(cls, name, at):
    original = getattr(cls, name)
    def call(*args, **kwargs):
        global calls
        calls += 1
        result = original(*args, **kwargs)
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(cls, name, call)
kill_at(*{what})
sys.exit(dreambooth_kron.run(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def uninterrupted(tiny_sd, pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    train(tiny_sd, pictures, output, *RESUME)
    AcceleratorState._reset_state(True)
    return weights(output)


@pytest.mark.parametrize(
    ("what", "left"),
    [
        # the 9th of 12 micro-steps: in the middle of update 5, its gradient half accumulated
        ("(Accelerator, 'backward', 9)", ["checkpoint-2", "checkpoint-4"]),
        # the second save: all files of checkpoint-4 written, not yet renamed
        ("(Accelerator, 'save_state', 2)", [".tmp-checkpoint-4", "checkpoint-2"]),
    ],
    ids=["in a step", "in a save"],
)
def test_a_killed_run_resumes_exactly(tiny_sd, pictures, tmp_path, uninterrupted, what, left):
    program = KILL.format(root=str(SCRIPT.parents[1]), what=what)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments(tiny_sd, pictures, tmp_path, *RESUME)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == left
    train(tiny_sd, pictures, tmp_path, *RESUME, "--resume_from_checkpoint", "latest")
    assert differences(weights(tmp_path), uninterrupted) == []
    assert not list(tmp_path.glob(".tmp-*"))


def test_resume_is_sensitive(tiny_sd, pictures, tmp_path, uninterrupted):
    """The comparison above can fail: another seed gives other weights everywhere."""
    train(tiny_sd, pictures, tmp_path, *RESUME, "--seed", 1)
    assert len(differences(weights(tmp_path), uninterrupted)) == len(uninterrupted)


# -- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_are_one_with_the_same_global_batch(tiny_sd, pictures, tmp_path):
    common = ["--max_train_steps", 3, "--learning_rate", 1e-1, "--train_text_encoder", "--text_encoder_lr", 1e-1,
              "--adam_epsilon", 1,
              "--random_flip", "--with_prior_preservation", "--class_data_dir", pictures / "input",
              "--class_prompt", "a dog", "--num_class_images", 3, "--seed", 5]  # fmt: skip
    # two processes on a CPU, talking over gloo; on GPUs `accelerate launch` needs neither flag nor variable
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0"]  # fmt: skip
    two = [*launch, str(SCRIPT), *arguments(tiny_sd, pictures, tmp_path / "two", *common, "--checkpointing_steps", 2)]
    done = subprocess.run(
        two, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 updates of 2 images" in done.stdout
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoint-2").glob("random_states*")) == [
        "random_states_0.pkl", "random_states_1.pkl",
    ]  # fmt: skip
    train(tiny_sd, pictures, tmp_path / "one", *common, "--train_batch_size", 2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) > 30
    assert_same_training(one, two, moved="krona_B")


# -- what people combine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_everything_at_once(kind, tiny_sd, tiny_sdxl, pictures, tmp_path, capsys):
    pipeline = {"sd": tiny_sd, "sdxl": tiny_sdxl}[kind]
    summary = train(
        pipeline, pictures, tmp_path / "out", "--train_text_encoder", "--gradient_checkpointing", "--random_flip",
        "--with_prior_preservation", "--class_data_dir", tmp_path / "class", "--class_prompt", "a dog",
        "--num_class_images", 2, "--sample_batch_size", 2, "--snr_gamma", 5, "--noise_offset", 0.1,
        "--caption_dropout", 0.5, "--cache_latents", "--offload", "--mixed_precision", "bf16", "--allow_tf32",
        "--gradient_accumulation_steps", 2, "--validation_prompt", "a sks dog", "on the moon",
        "--num_validation_images", 2, "--validation_steps", 1, "--validation_inference_steps", 2,
        "--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--report_to", "tensorboard", "--seed", 3,
    )  # fmt: skip
    parts = ["text_encoder", "text_encoder_2", "unet"] if kind == "sdxl" else ["text_encoder", "unet"]
    out = tmp_path / "out"
    assert sorted(p.parent.name for p in out.glob("*/adapter_config.json")) == parts
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2"]
    assert sorted(p.name for p in (out / "validation").iterdir()) == ["final-2", "validation-1"]
    assert len(list((out / "validation" / "final-2").glob("[0-9]*.png"))) == 4
    assert list((out / "logs").rglob("events.out.tfevents*"))
    readme = (out / "README.md").read_text()
    assert "needed in every program that loads it" in readme and "`KeyError: 'KRONA'`" in readme
    for expected in (
        "instance_prompt: a sks dog",
        "image_3.png",
        "template:sd-lora",
        "learning_rate",
        "trainable parameters",
    ):
        assert expected in readme, expected
    assert summary["updates"] == 2 and summary["trainable parameters"] == sum(v.numel() for v in weights(out).values())
    assert json.loads((out / "training_summary.json").read_text())["peak memory, MiB"] > 0
    with safe_open(out / "unet" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["instance_prompt"] == "a sks dog" and file.metadata()["krona_a_out"] == "64"
    assert any(v.abs().max() > 0 for k, v in weights(out).items() if k.startswith("unet") and k.endswith("krona_B"))


SHOW = ["--validation_prompt", "x", "--num_validation_images", 1, "--validation_inference_steps", 1]


@pytest.mark.parametrize(
    "more",
    [
        ["--adapter_type", "lora", "--use_dora", *SHOW],
        ["--adapter_type", "lokr", "--rank", 2, *SHOW],
        ["--optimizer", "prodigy"],
        ["--optimizer", "schedulefree", "--lr_warmup_steps", 1],
        ["--optimizer", "Adafactor"],
        ["--optimizer", "SGD", "--optimizer_args", "momentum=0.9", "nesterov=True"],
        ["--learning_rate_a", 1e-5, "--learning_rate_b", 1e-3, "--scale_lr", "--lr_scheduler", "polynomial"],
        ["--layout", "diffusekrona", "--rank", 3, "--scaling", "rslora", "--alpha", 4, "--init_weights", "kaiming"],
        ["--aspect_ratio_buckets", "auto", "--cache_latents", "--train_batch_size", 2, "--num_train_epochs", 1],
        ["--target_modules", r".*attn2\.to_(k|v)", "--torch_compile"],
    ],
    ids=lambda more: " ".join(map(str, more[:2])),
)
def test_variants_train(tiny_sd, pictures, tmp_path, more, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: compiled.append(self))  # minutes otherwise
    summary = train(tiny_sd, pictures, tmp_path, *more, "--max_train_steps", 1)
    assert summary["updates"] == 1 and bool(compiled) == ("--torch_compile" in more)
    trained = weights(tmp_path)
    assert trained and all(torch.isfinite(v).all() for v in trained.values())


def test_accumulation_is_a_larger_batch(tiny_sd, pictures, tmp_path):
    common = ["--learning_rate", 1e-1, "--adam_epsilon", 1, "--repeats", 2, "--random_flip", "--max_train_steps", 4]
    train(tiny_sd, pictures, tmp_path / "batch", *common, "--train_batch_size", 2)
    AcceleratorState._reset_state(True)
    train(tiny_sd, pictures, tmp_path / "accumulated", *common, "--gradient_accumulation_steps", 2)
    assert_same_training(weights(tmp_path / "batch"), weights(tmp_path / "accumulated"), moved="krona_B")


@pytest.mark.parametrize(("kind", "more"), [("sd", []), ("sdxl", ["--layout", "diffusekrona", "--krona_a_out", 4])])
def test_exported_file_is_the_adapter(kind, more, tiny_sd, tiny_sdxl, pictures, tmp_path, capsys):
    from peft_krona.convert import read_adapter

    pipeline = {"sd": tiny_sd, "sdxl": tiny_sdxl}[kind]
    train(
        pipeline, pictures, tmp_path / "dog", "--train_text_encoder", "--export", "lokr", *more, "--learning_rate", 1e-2
    )
    if more:  # one LoKr file cannot hold the shuffled layout: said, and the adapter is saved all the same
        assert "Not exported as lokr" in capsys.readouterr().out and weights(tmp_path / "dog")
        assert not (tmp_path / "dog" / "dog.safetensors").exists()
        return
    saved = {layer.name: layer.delta_weight() for layer in read_adapter(tmp_path / "dog")}
    exported = {layer.name: layer.delta_weight() for layer in read_adapter(tmp_path / "dog" / "dog.safetensors")}
    assert saved.keys() == exported.keys() and len(saved) > 20
    for name, delta in saved.items():
        assert (exported[name] - delta).norm() <= 2 * HALF * delta.norm()


def test_an_earlier_runs_results_do_not_stay_beside_new_weights(tiny_sd, pictures, tmp_path, capsys):
    """Neither a model that is no longer trained, nor an export of the old weights."""
    out = tmp_path / "dog"
    train(tiny_sd, pictures, out, "--train_text_encoder", "--export", "auto", "--max_train_steps", 1)
    assert (out / "text_encoder").is_dir() and (out / "dog.safetensors").is_file()
    AcceleratorState._reset_state(True)
    (out / "notes").mkdir()
    train(tiny_sd, pictures, out, "--max_train_steps", 1)
    assert not (out / "text_encoder").exists() and not (out / "dog.safetensors").exists() and (out / "notes").exists()
    printed = capsys.readouterr().out
    assert f"Removed {out / 'text_encoder'}: an earlier run's adapter" in printed
    assert f"Removed {out / 'dog.safetensors'}: it was made of earlier weights" in printed


@pytest.mark.parametrize(
    ("name", "kind"),
    [("checkpoint-2", "file"), ("unet", "file"), ("validation", "file"), ("README.md", "folder"),
     ("training_summary.json", "folder")],
)  # fmt: skip
def test_names_that_are_taken_show_before_the_training(tiny_sd, pictures, tmp_path, name, kind):
    path = tmp_path / name
    path.touch() if kind == "file" else path.mkdir()
    with pytest.raises(
        TrainingError, match=rf"{path} is a {kind}, where the training writes a f.*: move it, or choose"
    ):
        train(tiny_sd, pictures, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("file", "found"),
    [("model_index.json", r"model_index\.json"), ("unet/config.json", r"unet without adapter_config\.json")],
)
def test_a_pipeline_is_not_overwritten(tiny_sd, pictures, tmp_path, file, found):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(TrainingError, match=rf"holds a pipeline \({found}\).*choose another"):
        train(tiny_sd, pictures, tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == [file]


def test_what_the_files_say(tiny_sd, pictures, tmp_path, monkeypatch):
    """Trigger words, also in the export; no local paths; a base model that is found from the adapter's folder."""
    monkeypatch.chdir(tiny_sd.parent)
    out = tmp_path / "dog"
    train(tiny_sd.name, pictures, out, "--export", "auto", "--max_train_steps", 1)
    config = json.loads((out / "unet" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == os.path.relpath(tiny_sd, out)
    for adapter in (out, out / "unet", out / "dog.safetensors"):
        found = generate.base_model(str(adapter), generate.adapter_configs(str(adapter)))
        assert Path(found).resolve() == tiny_sd.resolve()
    with safe_open(out / "unet" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["trigger_words"] == "a sks dog"
        assert not any(str(folder) in value for folder in (out, pictures) for value in file.metadata().values())
    with safe_open(out / "dog.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "a sks dog"


def test_the_final_images_are_of_the_vae_that_was_asked_for(tiny_sd, pictures, tmp_path, monkeypatch):
    other = tiny.vae().to(torch.float32)
    other.save_pretrained(tmp_path / "vae")
    more = ["--pretrained_vae_model_name_or_path", tmp_path / "vae", "--cache_dir", tmp_path / "cache"]
    asked = []
    load = evaluate.load_pipeline
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *a, **kw: asked.append(kw) or load(*a, **kw))
    seen = []
    monkeypatch.setattr(evaluate, "validation", lambda pipe, *a, **kw: seen.append(pipe) or [Image.new("RGB", (8, 8))])
    train(tiny_sd, pictures, tmp_path / "out", "--max_train_steps", 1, *more, *SHOW)
    assert differences(seen[-1].vae.state_dict(), other.state_dict()) == []
    assert [kw["cache_dir"] for kw in asked] == [str(tmp_path / "cache")] * 2


def test_an_epoch_shows_all_class_images(tiny_sd, pictures, tmp_path):
    """As in diffusers: 5 class images and 3 instance images make 5 steps of one."""
    classes = tiny.images(tmp_path / "class", 5)
    args = arguments(tiny_sd, pictures, tmp_path / "out", "--num_train_epochs", 1, "--with_prior_preservation",
                     "--class_data_dir", classes, "--class_prompt", "a dog", "--num_class_images", 5)  # fmt: skip
    args.remove("--max_train_steps")
    args.remove("2")
    assert dreambooth_kron.main(parse_args(args))["updates"] == 5


def test_a_hub_that_refuses_shows_before_the_training(tiny_sd, pictures, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("401\nunauthorized")

    monkeypatch.setattr(card, "create_repo", refuse)
    with pytest.raises(
        TrainingError, match=r"--push_to_hub: the repository out could not be made \(401 unauthorized\)"
    ):
        train(tiny_sd, pictures, tmp_path / "out", "--push_to_hub")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_push_to_hub(tiny_sd, pictures, tmp_path, monkeypatch, capsys):
    calls = {}
    monkeypatch.setattr(
        card, "create_repo", lambda repo, **kw: calls.update(repo=repo) or SimpleNamespace(repo_id="me/dog")
    )
    monkeypatch.setattr(card, "upload_folder", lambda **kw: calls.update(kw))
    more = ["--push_to_hub", "--hub_token", "secret", "--hub_model_id", "dog"]
    train(tiny_sd, pictures, tmp_path / "out", *more, "--max_train_steps", 1)
    assert (calls["repo"], calls["repo_id"], calls["token"]) == ("dog", "me/dog", "secret")
    assert "checkpoint-*" in calls["ignore_patterns"] and "Uploaded to me/dog" in capsys.readouterr().out
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert written and not any(b"secret" in p.read_bytes() for p in written)

    def refuse(**kw):
        raise RuntimeError("401")

    AcceleratorState._reset_state(True)
    monkeypatch.setattr(card, "upload_folder", refuse)
    with pytest.raises(TrainingError, match=r"upload to the Hub failed \(401\)\. Everything is in"):
        train(tiny_sd, pictures, tmp_path / "again", *more, "--max_train_steps", 1)


@pytest.mark.parametrize("optimizer", ["prodigy", "schedulefree"])
def test_resume_with_stateful_optimizers(tiny_sd, pictures, tmp_path, optimizer):
    """Validation swaps schedule-free's weights; resuming repeats it exactly."""
    more = ["--optimizer", optimizer, "--max_train_steps", 4, "--validation_prompt", "x", "--num_validation_images", 1,
            "--validation_steps", 2, "--validation_inference_steps", 1, "--checkpointing_steps", 2]  # fmt: skip
    train(tiny_sd, pictures, tmp_path, *more)
    whole = weights(tmp_path)
    AcceleratorState._reset_state(True)
    train(tiny_sd, pictures, tmp_path, *more, "--resume_from_checkpoint", tmp_path / "checkpoint-2")
    assert differences(weights(tmp_path), whole) == []


def test_v_prediction_and_one_shot(tmp_path, pictures):
    """From files in half precision."""
    pipeline = tiny.build(tmp_path / "v", prediction_type="v_prediction", dtype=torch.float16)
    summary = train(pipeline, pictures / "input" / "0.png", tmp_path / "out", "--train_batch_size", 2, "--snr_gamma", 5)
    assert summary["updates"] == 2


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_rotation_and_half_written_checkpoints(tiny_sd, pictures, tmp_path, capsys):
    train(
        tiny_sd, pictures, tmp_path, "--max_train_steps", 4, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2
    )
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    (tmp_path / "checkpoint-9").mkdir()  # no state file: not whole
    (tmp_path / ".tmp-checkpoint-11").mkdir()
    AcceleratorState._reset_state(True)
    train(tiny_sd, pictures, tmp_path, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    assert f"Resumed from {tmp_path / 'checkpoint-4'}, after 4 updates" in capsys.readouterr().out
    assert not (tmp_path / ".tmp-checkpoint-11").exists()


def test_a_new_run_does_not_mix_with_an_old_one(tiny_sd, pictures, tmp_path):
    train(tiny_sd, pictures, tmp_path, "--max_train_steps", 1, "--checkpointing_steps", 1)
    AcceleratorState._reset_state(True)
    with pytest.raises(TrainingError, match=r"has checkpoints of another run.*--resume_from_checkpoint latest"):
        train(tiny_sd, pictures, tmp_path)
    AcceleratorState._reset_state(True)
    train(tiny_sd, pictures, tmp_path, "--overwrite_output_dir")
    assert checkpoint.checkpoints(tmp_path) == []


@pytest.fixture(scope="module")
def one_checkpoint(tiny_sd, pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("one")
    train(tiny_sd, pictures, output, "--max_train_steps", 1, "--checkpointing_steps", 1)
    AcceleratorState._reset_state(True)
    return output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--alpha", 2], r"was trained with --alpha 1\.0; received --alpha 2\.0\. Resume with the same"),
        (["--scaling", "rslora"], r"was trained with --scaling alpha; received --scaling rslora"),
        (["--layout", "diffusekrona"], r"was trained with --layout kron; received --layout diffusekrona"),
        (["--optimizer", "SGD"], r"was trained with --optimizer AdamW; received --optimizer SGD"),
        (["--adapter_type", "lora"], r"was trained with --adapter_type krona, --alpha 1\.0; received"),
    ],
)
def test_resuming_as_something_else_is_an_error(tiny_sd, pictures, tmp_path, one_checkpoint, more, message):
    with pytest.raises(TrainingError, match=message):
        train(tiny_sd, pictures, tmp_path, "--resume_from_checkpoint", one_checkpoint / "checkpoint-1", *more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], None),  # two updates instead of one
        (["--checkpointing_steps", 7, "--validation_prompt", "x", "--num_validation_images", 0], None),
        (["--snr_gamma", 5, "--max_grad_norm", 0.5], "(max_grad_norm: 1.0 -> 0.5, snr_gamma: None -> 5.0)"),
        (["--lr_scheduler", "cosine"], "(max_train_steps: 1 -> 2, lr_scheduler: 'constant' -> 'cosine')"),
        (["--num_class_images", 5], "(num_class_images: 100 -> 5)"),
        (["--instance_prompt", "a SKS dog"], "(instance_prompt: 'a sks dog' -> 'a SKS dog')"),
    ],
)
def test_resuming_with_other_settings_is_said(tiny_sd, pictures, tmp_path, one_checkpoint, capsys, more, said):
    train(tiny_sd, pictures, tmp_path, "--resume_from_checkpoint", one_checkpoint / "checkpoint-1", *more)
    printed = capsys.readouterr().out
    assert "Resumed from" in printed and ("with other settings" in printed) == (said is not None)
    assert (said or "") in printed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("training_state.json", r"training_state\.json is damaged .*resume from another checkpoint"),
        ("unet/adapter_model.safetensors", r"adapter_model\.safetensors is damaged .*resume from another checkpoint"),
        ("optimizer.bin", r"optimizer\.bin is damaged \(50 bytes; .* were saved\): resume from another checkpoint"),
    ],
)
def test_a_damaged_checkpoint(tiny_sd, pictures, tmp_path, one_checkpoint, name, message):
    damaged = shutil.copytree(one_checkpoint / "checkpoint-1", tmp_path / "checkpoint-1") / name
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(TrainingError, match=message):
        train(tiny_sd, pictures, tmp_path, "--resume_from_checkpoint", "latest")


def test_going_on_from_an_earlier_checkpoint(tiny_sd, pictures, tmp_path, capsys):
    """What was saved after it is of another run now: never mixed with it, never what is rotated away instead."""
    train(tiny_sd, pictures, tmp_path, "--max_train_steps", 3, "--checkpointing_steps", 1)
    AcceleratorState._reset_state(True)
    again = ["--resume_from_checkpoint", "checkpoint-1", "--checkpointing_steps", 1, "--checkpoints_total_limit", 1]
    train(tiny_sd, pictures, tmp_path, "--learning_rate", 1e-2, *again)
    assert "checkpoint-2, checkpoint-3 came after it on a way that this run leaves" in capsys.readouterr().out
    left = ["abandoned-checkpoint-2", "abandoned-checkpoint-3", "checkpoint-2"]
    assert sorted(p.name for p in tmp_path.glob("*checkpoint-*")) == left
    state = json.loads((tmp_path / "checkpoint-2" / "training_state.json").read_text())
    assert state["settings"]["learning_rate"] == 1e-2
    AcceleratorState._reset_state(True)
    train(tiny_sd, pictures, tmp_path, "--overwrite_output_dir")
    assert not list(tmp_path.glob("*checkpoint-*"))


def test_going_on_without_another_save(tiny_sd, pictures, tmp_path):
    """The final adapter is of the new way, so `latest` must not find the old one."""
    train(tiny_sd, pictures, tmp_path, "--max_train_steps", 3, "--checkpointing_steps", 1)
    AcceleratorState._reset_state(True)
    train(tiny_sd, pictures, tmp_path, "--resume_from_checkpoint", "checkpoint-1")
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_resuming_another_folders_checkpoint_does_not_mix(tiny_sd, pictures, tmp_path, one_checkpoint):
    shutil.copytree(one_checkpoint / "checkpoint-1", tmp_path / "checkpoint-9")
    with pytest.raises(TrainingError, match=r"has checkpoints of another run \(newest: checkpoint-9\)"):
        train(tiny_sd, pictures, tmp_path, "--resume_from_checkpoint", one_checkpoint / "checkpoint-1")


def test_nothing_left_to_train_is_said(tiny_sd, pictures, tmp_path, one_checkpoint, capsys):
    source = ["--resume_from_checkpoint", one_checkpoint / "checkpoint-1", "--max_train_steps", 1]
    assert train(tiny_sd, pictures, tmp_path, *source)["updates"] == 1
    assert "the checkpoint is of update 1 and 1 were asked for: nothing is left" in capsys.readouterr().out


def test_resuming_with_another_adapter_is_an_error(tiny_sd, pictures, tmp_path):
    train(tiny_sd, pictures, tmp_path, "--max_train_steps", 1, "--checkpointing_steps", 1)
    AcceleratorState._reset_state(True)
    with pytest.raises(TrainingError, match="does not fit the adapter that the flags describe"):
        train(tiny_sd, pictures, tmp_path, "--krona_a_out", 8, "--resume_from_checkpoint", "latest")


@contextlib.contextmanager
def full_disk_from_the_second_save(monkeypatch, size):
    """No file can be larger than `size(output)` from then on."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = dreambooth_kron.Checkpoints.save

    def full_from_two(self, step):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size(self.output), limit[1]))
        return save(self, step)

    monkeypatch.setattr(dreambooth_kron.Checkpoints, "save", full_from_two)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_disk_that_gets_full_in_the_optimizers_file(tiny_sd, pictures, tmp_path, capsys, monkeypatch):
    """The adapter still fits: the checkpoint is given up, training goes on."""

    def size(output):
        return (output / "checkpoint-1" / "unet" / "adapter_model.safetensors").stat().st_size + 2000

    with full_disk_from_the_second_save(monkeypatch, size):
        code = dreambooth_kron.run(
            arguments(tiny_sd, pictures, tmp_path, "--checkpointing_steps", 1, "--max_train_steps", 3)
        )
    assert code == 0
    assert "checkpoint-2 could not be written" in (printed := capsys.readouterr().out) and "Training goes on" in printed
    assert [p.name for p in tmp_path.glob("*checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((tmp_path / "training_summary.json").read_text())["updates"] == 3 and weights(tmp_path)


def test_a_full_disk_keeps_what_was_trained(tiny_sd, pictures, tmp_path, capsys, monkeypatch):
    """Writes fail from the second checkpoint on, as on a full disk: the first stays, nothing half written is left."""
    with full_disk_from_the_second_save(monkeypatch, lambda _: 4096):
        code = dreambooth_kron.run(arguments(tiny_sd, pictures, tmp_path, "--checkpointing_steps", 1))
    printed = capsys.readouterr()
    assert code == 2
    assert "checkpoint-2 could not be written" in printed.out and "free some disk space" in printed.out
    assert "error:" in printed.err and f"The newest whole checkpoint is {tmp_path / 'checkpoint-1'}" in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]


def test_ctrl_c_saves_and_resumes(tiny_sd, pictures, tmp_path, capsys, monkeypatch):
    original = dreambooth_kron.objective.loss_of
    calls = []

    def loss_of(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(dreambooth_kron.objective, "loss_of", loss_of)
    args = arguments(tiny_sd, pictures, tmp_path, "--max_train_steps", 5)
    assert dreambooth_kron.run(args) == 130
    assert "Interrupted after 3 of 5 updates." in capsys.readouterr().out
    assert weights(tmp_path)  # the adapter so far
    AcceleratorState._reset_state(True)
    assert dreambooth_kron.run([*args, "--resume_from_checkpoint", "latest"]) == 0
    resumed = weights(tmp_path)
    AcceleratorState._reset_state(True)
    assert dreambooth_kron.run([*args, "--overwrite_output_dir"]) == 0
    assert differences(weights(tmp_path), resumed) == []


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--instance_data_dir", "{empty}"], r"has no images.*expected files ending in"),
        (["--instance_data_dir", "{empty}/none"], r"does not exist: --instance_data_dir expects"),
        (["--instance_data_dir", "{broken}"], r"bad\.png cannot be read as an image.*remove it"),
        (
            ["--pretrained_model_name_or_path", "{empty}"],
            r"has no model_index\.json: expected the folder of a diffusers",
        ),
        (["--krona_a_out", "7", "--strict_factors"], r"a_out=7 does not divide"),
        (["--target_modules", "nothing"], r"adapter does not fit the unet"),
        (
            ["--resolution", "288"],
            r"--resolution 288: expected at most 65,536 pixels, as 256 x 256, for a StableDiffusion",
        ),
        (["--resolution", "100000"], r"--resolution 100000: expected at most 512, for a StableDiffusionPipeline made"),
        (
            ["--validation_prompt", "x", "--validation_inference_steps", "1001"],
            r"--validation_inference_steps 1001: expected at most 1000, all time steps",
        ),
        (["--resolution", "30"], r"Image size 30x30: this pipeline needs both sides to be multiples of 4"),
        (["--optimizer", "Nope"], r"'Nope' is unknown; expected AdamW"),
        (["--optimizer_args", "momentum=1"], r"does not take"),
        (["--with_prior_preservation"], r"needs --class_data_dir"),
        (["--use_dora"], r"--use_dora is for --adapter_type lora"),
        (["--resume_from_checkpoint", "checkpoint-7"], r"not a whole checkpoint.*none"),
        (["--max_grad_norm", "-1"], r"--max_grad_norm -1\.0: expected at least 0"),
        (["--target_modules", "("], r"not a valid regular expression .*correct --target_modules, or give names"),
        (
            ["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1;2"],
            r"--lr_step_rules '1;2': .*expected e\.g\.",
        ),
        (["--report_to", "foo"], r"--report_to foo: expected none or one of .*tensorboard"),
        (["--pretrained_vae_model_name_or_path", "{empty}"], r"--pretrained_vae_model_name_or_path .*AutoencoderKL"),
        (
            ["--with_prior_preservation", "--class_prompt", "a dog", "--class_data_dir", "{broken}/bad.png"],
            r"--class_data_dir .*bad\.png: expected a folder, which cannot be made",
        ),
        (["--noise_offset", "inf"], r"The loss is nan at update 1: try a lower --learning_rate"),
        (
            ["--learning_rate", "1e30", "--adam_weight_decay", "1e30", "--max_train_steps", "1"],
            r"The adapter's weights are NaN or infinite after update 1: try a lower --learning_rate",
        ),
        (
            ["--learning_rate", "1e30", "--adam_weight_decay", "1e30", "--checkpointing_steps", "1"],
            r"The adapter's weights are NaN or infinite after update 1: try a lower --learning_rate",
        ),
        (["--aspect_ratio_buckets", "1;2"], r"--aspect_ratio_buckets '1;2'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_clear_line(tiny_sd, pictures, tmp_path, capsys, change, message):
    (tmp_path / "empty").mkdir()
    broken = tiny.images(tmp_path / "broken")
    (broken / "bad.png").write_bytes((broken / "0.png").read_bytes()[:500])
    change = [c.format(empty=tmp_path / "empty", broken=broken) for c in change]
    assert dreambooth_kron.run(arguments(tiny_sd, pictures, tmp_path / "out", *change)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error), error
    assert not list((tmp_path / "out").glob("*/adapter_model.safetensors"))


# -- the run without arguments -----------------------------------------------------------------------------------------


def test_demo_prints_a_table_and_shows_a_grid(tiny_sd, tmp_path, monkeypatch, capsys):
    """The shipped subject on a tiny pipeline, with a judge that sees nothing but robots."""
    from examples.emoji_sd import judge

    class Robots:
        names = ("dog", "robot")

        def concept_scores(self, images):
            return torch.tensor([[0.0, 1.0]]).repeat(len(images), 1)

    monkeypatch.setattr(judge.Judge, "load", classmethod(lambda cls: Robots()))
    monkeypatch.setattr(demo, "PIPELINE", tiny_sd)
    monkeypatch.setattr(demo, "SAMPLER", {"num_inference_steps": 1})
    settings = demo.settings
    quick = {"max_train_steps": 1, "output_dir": str(tmp_path / "out"), "report_to": "none", "export": "none"}
    monkeypatch.setattr(demo, "settings", lambda subject: settings(subject) | quick)
    assert dreambooth_kron.run([]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith("background  "))
    assert lines[table].split()[1:] == ["base", "model", "KronA", "(64,4)", "LoRA", "r=4"]
    end = lines.index("", table)
    assert len(lines[table + 2 : end]) == 10  # seven backgrounds, the sum, parameters and bytes
    assert lines[end - 3].split()[0] == "all" and lines[end - 3].split()[1::2] == ["28/28"] * 3
    parameters = [int(number.replace(",", "")) for number in lines[end - 2].split()[1:]]
    assert lines[end - 1].split()[0] == "bytes"
    named = {line.partition(":")[0]: Path(line.split()[-1]) for line in lines[-4:]}
    assert list(named) == ["KronA (64,4)", "LoRA r=4", "table", "grid"] and all(p.exists() for p in named.values())
    for name, count in zip(("KronA (64,4)", "LoRA r=4"), parameters, strict=True):  # what the files hold
        held = load_file(named[name] / "unet" / "adapter_model.safetensors")
        assert sum(weight.numel() for weight in held.values()) == count
    with Image.open(named["grid"]) as grid:
        assert grid.size == (170 + 7 * 128, 7 * 128)


def test_the_demo_trains_lora_just_as_long():
    """Everything but the adapter, its learning rate and its folder is the same; nothing is compared where not asked."""
    args = parse_args(["--demo", "dog", "--seed", "3", "--learning_rate", "1e-3"], demo.settings)
    other = compared(args, demo.LEARNING_RATES)
    changed = {name for name, value in vars(args).items() if getattr(other, name) != value}
    rates = {"learning_rate", "text_encoder_lr", "adam_weight_decay", "adam_weight_decay_text_encoder"}
    assert changed <= {"adapter_type", "rank", "alpha", "export", "output_dir"} | rates
    assert other.learning_rate == pytest.approx(1e-3 * demo.LEARNING_RATES["lora"] / demo.LEARNING_RATES["krona"])
    assert other.learning_rate * other.adam_weight_decay == pytest.approx(args.learning_rate * args.adam_weight_decay)
    assert other.output_dir == "output/demo-dog-lora" and adapter_name(other) == "LoRA r=4"
    for flags in (["--compare_with", "none"], ["--adapter_type", "lora"], ["--adapter_type", "lokr"]):
        assert compared(parse_args(["--demo", "dog", *flags], demo.settings), demo.LEARNING_RATES) is None
