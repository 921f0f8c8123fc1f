# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines: add, save and load, and nothing changed where loading fails."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from adapted import assert_same_state, krona_layers, state_of
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_krona import KronAConfig, pipelines, sources
from peft_krona.errors import ConfigError, ConfigTypeError, FormatError, KronAError
from peft_krona.pipelines import add_krona, load_krona_weights, save_krona_weights

KINDS = list(tiny.PIPELINES)
TEXT_ENCODERS = {
    "sd": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "sd3": ["text_encoder", "text_encoder_2"],
    "flux": ["text_encoder"],
}


def config(**kwargs):
    return KronAConfig(**{"a_out": 8, "a_in": 2, "init_weights": False, **kwargs})


def denoiser_name(kind):
    return "unet" if kind in ("sd", "sdxl") else "transformer"


def components(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def states(pipe):
    return {name: state_of(part) for name, part in components(pipe).items()}


def assert_untouched(pipe, before):
    for name, part in components(pipe).items():
        assert_same_state(part, before[name])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{kind: (folder, image with the adapter, image without)}, made when first asked for; copy before changing."""
    made = {}

    def get(kind):
        if kind not in made:
            pipe = tiny.PIPELINES[kind]()
            base = tiny.image(pipe)
            torch.manual_seed(3)
            add_krona(pipe, config(), text_encoder_config=config(target_modules=["q_proj", "fc1"], r=2))
            folder = tmp_path_factory.mktemp(kind)
            save_krona_weights(pipe, folder)
            made[kind] = folder, tiny.image(pipe), base
        return made[kind]

    return get


# -- adding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_add_adapts_the_denoiser_only_unless_asked(kind):
    pipe = tiny.PIPELINES[kind]()
    base = tiny.image(pipe)
    adapted = add_krona(pipe)
    assert list(adapted) == [denoiser_name(kind)] and adapted[denoiser_name(kind)] is tiny.denoiser(pipe)
    assert torch.equal(tiny.image(pipe), base)  # a fresh adapter
    layers = krona_layers(tiny.denoiser(pipe))
    assert layers and all(re.search(r"\.(attn\d?|ff|ff_context)\.", name) for name in layers)  # which: test_targets.py
    for name, part in components(pipe).items():
        assert name in adapted or not krona_layers(part)
    trainable = [n for n, p in tiny.denoiser(pipe).named_parameters() if p.requires_grad]
    assert trainable and all(".krona_" in n for n in trainable)


@pytest.mark.parametrize("kind", KINDS)
def test_add_with_text_encoders(kind):
    pipe = tiny.PIPELINES[kind]()
    adapted = add_krona(pipe, config(), text_encoder_config=True, adapter_name="style")
    assert sorted(adapted) == sorted([denoiser_name(kind), *TEXT_ENCODERS[kind]])
    for name in TEXT_ENCODERS[kind]:
        layers = krona_layers(adapted[name])
        assert {layer.rpartition(".")[2] for layer in layers} == {"q_proj", "k_proj", "v_proj", "out_proj"}
        assert all(list(layer.krona_A) == ["style"] for layer in layers.values())
    configs = [model.peft_config["style"] for model in adapted.values()]
    assert len({id(c) for c in configs}) == len(configs)  # each model has its own


def test_adapters_of_a_half_precision_pipeline_are_fp32():
    pipe = tiny.sd_pipeline()
    pipe.unet.to(torch.bfloat16)
    add_krona(pipe)
    assert {p.dtype for n, p in pipe.unet.named_parameters() if ".krona_" in n} == {torch.float32}
    add_krona(pipe, adapter_name="low", autocast_adapter_dtype=False)
    assert {p.dtype for n, p in pipe.unet.named_parameters() if n.endswith(".low")} == {torch.bfloat16}


def test_add_refuses_a_name_that_exists_and_undoes_what_it_did():
    pipe = tiny.sd_pipeline()
    add_krona(pipe, text_encoder_config=True)
    pipe.unet.delete_adapters("default")  # the text encoder's is left
    before = states(pipe)
    with pytest.raises(
        ConfigError, match=r"text_encoder already has an adapter named 'default'. Choose another adapter"
    ):
        add_krona(pipe, text_encoder_config=True)
    assert_untouched(pipe, before)


@pytest.mark.parametrize(
    "bad,message",
    [
        (config(target_modules=["nothing"]), "not found"),
        (config(target_modules=["conv_norm_out"]), "Cannot adapt 'conv_norm_out' of type GroupNorm"),
        (config(target_modules=["to_q", "conv_norm_out"]), "Cannot adapt 'conv_norm_out' of type GroupNorm"),
        (config(a_out=7, strict_factors=True), "a_out=7 does not divide"),
    ],
    ids=["no match", "unsupported", "unsupported after good ones", "strict"],
)
def test_a_failed_add_leaves_the_pipeline_as_it_was(bad, message):
    pipe = tiny.sd_pipeline()
    for with_other in (False, True):
        if with_other:
            add_krona(pipe, config(), adapter_name="other")
        before = states(pipe)
        with pytest.raises((ValueError, TypeError), match=message):
            add_krona(pipe, bad, text_encoder_config=True)
        assert_untouched(pipe, before)


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training"])
def test_names_that_torch_does_not_take(saved, name):
    pipe = tiny.sd_pipeline()
    before = states(pipe)
    message = rf"adapter_name={name!r} is not allowed; expected a name that is not empty, has no dots and .*another"
    for call in (lambda: add_krona(pipe, adapter_name=name), lambda: load_krona_weights(pipe, saved("sd")[0], name)):
        with pytest.raises(ConfigError, match=message):
            call()
    assert_untouched(pipe, before)


def test_things_that_are_no_pipeline():
    with pytest.raises(
        ConfigError, match=r"Expected a diffusers pipeline, got UNet2DConditionModel. For a single model"
    ):
        add_krona(tiny.unet())
    pipe = type("Upscaler", (), {"components": {"vae": tiny.vae(), "scheduler": 3}})()
    with pytest.raises(ConfigError, match=r"Upscaler has no model to adapt: expected one of \('unet', 'transformer', .*"
                                          r"among its components, got \['vae'\]"):  # fmt: skip
        add_krona(pipe)


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_equal_images_after_loading(saved, kind):
    folder, image, base = saved(kind)
    names = [denoiser_name(kind), *TEXT_ENCODERS[kind]]
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    for name in names:
        assert sorted(p.name for p in (folder / name).iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert json.loads((folder / name / "adapter_config.json").read_text())["peft_type"] == "KRONA"
    pipe = tiny.PIPELINES[kind]()
    assert sorted(load_krona_weights(pipe, folder, adapter_name="new")) == sorted(names)
    assert torch.equal(tiny.image(pipe), image) and not torch.equal(image, base)
    pipe.delete_adapters("new")
    assert torch.equal(tiny.image(pipe), base)


def test_loading_with_a_weight(saved):
    folder, image, base = saved("sd")
    images = {}
    for weight in (0.0, 0.5, 1.0):
        pipe = tiny.sd_pipeline()
        load_krona_weights(pipe, folder, weight=weight)
        images[weight] = tiny.image(pipe)
    assert torch.equal(images[0.0], base) and torch.equal(images[1.0], image)
    assert not torch.equal(images[0.5], image) and not torch.equal(images[0.5], base)


@pytest.mark.usefixtures("float64")
def test_several_adapters_and_set_adapters(saved):
    folder, _, _ = saved("sd")
    pipe = tiny.sd_pipeline()
    base = tiny.image(pipe)
    load_krona_weights(pipe, folder, "first")
    image = tiny.image(pipe)
    load_krona_weights(pipe, folder, "second")
    assert torch.equal(tiny.image(pipe), image)  # the one loaded last is active
    pipe.set_adapters(["first", "second"], [0.5, 0.5])
    torch.testing.assert_close(tiny.image(pipe), image)
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert torch.equal(tiny.image(pipe), image)
    pipe.set_adapters(["first", "second"], [0.0, 0.0])
    assert torch.equal(tiny.image(pipe), base)


def test_dropout_is_off_in_a_pipeline_that_infers(tmp_path):
    pipe = tiny.sd_pipeline()
    add_krona(pipe, config(krona_dropout=0.5, module_dropout=0.5))
    save_krona_weights(pipe, tmp_path)
    pipe = tiny.sd_pipeline()
    load_krona_weights(pipe, tmp_path)
    assert torch.equal(tiny.image(pipe), tiny.image(pipe))


def test_a_model_that_peft_wrapped_saves_and_loads(saved, tmp_path):
    pipe = tiny.sd_pipeline()
    pipe.unet = get_peft_model(pipe.unet, config())
    image = tiny.image(pipe)
    save_krona_weights(pipe, tmp_path)
    fresh = tiny.sd_pipeline()
    assert load_krona_weights(fresh, tmp_path) == ["unet"]
    assert torch.equal(tiny.image(fresh), image)


def test_a_plain_peft_folder_loads(tmp_path):
    model = get_peft_model(tiny.sd_pipeline().unet, config())
    model.save_pretrained(str(tmp_path))
    pipe = tiny.sd_pipeline()
    assert load_krona_weights(pipe, tmp_path) == ["unet"]
    reference = tiny.sd_pipeline()
    reference.unet = model
    assert torch.equal(tiny.image(pipe), tiny.image(reference))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_both_naming_schemes(saved, tmp_path, prefix):
    """transformers 5 dropped "text_model." from CLIPTextModel's module names."""
    folder, image, _ = saved("sd")
    copied = copy_folder(folder, tmp_path)
    path = copied / "text_encoder" / "adapter_model.safetensors"
    start = "base_model.model."
    state = {start + prefix + k.removeprefix(start).removeprefix("text_model."): t for k, t in load_file(path).items()}
    save_file(state, path)
    pipe = tiny.sd_pipeline()
    load_krona_weights(pipe, copied)
    assert torch.equal(tiny.image(pipe), image)


def test_saving_one_of_several(tmp_path):
    pipe = tiny.sd_pipeline()
    add_krona(pipe, config(), text_encoder_config=True, adapter_name="both")
    add_krona(pipe, config(), adapter_name="unet only")
    assert [p.name for p in save_krona_weights(pipe, tmp_path, "unet only")] == ["unet"]
    with pytest.raises(ConfigError, match=r"No model of this StableDiffusionPipeline has a KronA adapter named "
                                          r"'third'; it has \['both', 'unet only'\]"):  # fmt: skip
        save_krona_weights(pipe, tmp_path, "third")
    with pytest.raises(ConfigError, match=r"it has none. Add one with add_krona\(pipe\)"):
        save_krona_weights(tiny.sd_pipeline(), tmp_path)


def test_a_save_replaces_the_earlier_adapter(saved, tmp_path):
    """Also the parts that it lacks, of another kind of pipeline too; everything else is left alone."""
    folder = copy_folder(saved("sdxl")[0], tmp_path)
    for kept in ("notes.txt", "checkpoint-5/adapter_config.json", "vae/config.json"):
        (folder / kept).parent.mkdir(exist_ok=True)
        (folder / kept).write_text("{}")
    for kept, kind in (("text_encoder_best", "KRONA"), ("text_encoder_3", "LORA")):  # no component; another method's
        (folder / kept).mkdir()
        (folder / kept / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    pipe = tiny.sd_pipeline()
    add_krona(pipe, config())
    image = tiny.image(pipe)
    assert save_krona_weights(pipe, folder) == [folder / "unet"]
    kept = ["checkpoint-5", "notes.txt", "text_encoder_3", "text_encoder_best", "unet", "vae"]
    assert sorted(p.name for p in folder.iterdir()) == kept
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "text_encoder_best")
    (folder / "checkpoint-5" / "adapter_config.json").unlink()
    fresh = tiny.sd_pipeline()
    assert load_krona_weights(fresh, folder) == ["unet"]
    assert torch.equal(tiny.image(fresh), image)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ("adapter_config.json", r"is the PEFT folder of a single model \(adapter_config.json\); expected a new folder"),
        ("unet/config.json", r"unet is there and holds no adapter .* Choose another save_directory"),
    ],
)
def test_a_save_replaces_nothing_but_an_adapter(tmp_path, there, message):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("precious")
    pipe = tiny.sd_pipeline()
    add_krona(pipe, config())
    with pytest.raises(FormatError, match=message):
        save_krona_weights(pipe, tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files == [tmp_path / there] and files[0].read_text() == "precious"


@pytest.mark.parametrize("given", ["none", "a part", "empty tensors", "the whole"])
def test_weights_that_are_spread_over_processes_are_saved_whole_or_not_at_all(tmp_path, given):
    pipe = tiny.sd_pipeline()
    add_krona(pipe, config(), text_encoder_config=config())
    whole = pipe.unet.state_dict()
    if given == "none":  # as ZeRO-3 leaves the parameters
        for parameter in krona_layers(pipe.unet)["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].parameters():
            parameter.data = parameter.data.new_empty(0)
        state_dicts = None
    else:
        part = {k: t for k, t in whole.items() if "mid_block" not in k or "krona_B" not in k}
        empty = {k: t.new_empty(0) if "krona_" in k else t for k, t in whole.items()}
        state_dicts = {"unet": {"a part": part, "empty tensors": empty, "the whole": whole}[given]}
    if given == "the whole":
        save_krona_weights(pipe, tmp_path / "out", state_dicts=state_dicts)
        load_krona_weights(tiny.sd_pipeline(), tmp_path / "out")
        return
    message = r"all \d+ weights of the adapter 'default' of 'unet', got \d+ of them empty or not at all \(e\.g\. "
    message += "" if given == "empty tensors" else ".*mid_block"
    with pytest.raises(FormatError, match=message + r".*state_dicts={'unet': accelerator\.get_state_dict\(model\)}"):
        save_krona_weights(pipe, tmp_path / "out", state_dicts=state_dicts)
    assert not (tmp_path / "out").exists(), "nor anything of the other components"


def test_a_lora_of_the_same_name_is_not_saved_as_krona(tmp_path):
    pipe = tiny.sd_pipeline()
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"]), "default")
    with pytest.raises(ConfigError, match=r"has a KronA adapter named 'default'"):
        save_krona_weights(pipe, tmp_path)


@pytest.mark.parametrize("stage", ["save_file", "config", "rename"])
def test_a_failed_save_leaves_the_previous_one(monkeypatch, tmp_path, stage):
    pipe = tiny.sd_pipeline()
    add_krona(pipe, config())
    save_krona_weights(pipe, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with torch.no_grad():
        next(iter(krona_layers(pipe.unet).values())).krona_A["default"].add_(1)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    if stage == "save_file":
        monkeypatch.setattr(pipelines, "save_file", fail)
    elif stage == "config":
        monkeypatch.setattr(KronAConfig, "save_pretrained", fail)
    else:
        replace = os.replace
        monkeypatch.setattr(pipelines.os, "replace", lambda a, b: fail() if Path(a).name == "new" else replace(a, b))
    with pytest.raises(OSError, match="disk full"):
        save_krona_weights(pipe, tmp_path)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["unet"]  # no temporary folder is left
    save_krona_weights(pipe, tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} != before


# -- loads that fail ---------------------------------------------------------------------------------------------------


def copy_folder(folder, to):
    for file in folder.rglob("*"):
        if file.is_file():
            target = to / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


def edit(folder, part, change):
    path = folder / part / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def first(state):
    return sorted(state)[0]


def edit_config(folder, part, **fields):
    path = folder / part / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


LAST = "text_encoder"  # components are loaded in order: the UNet is in place by then
FAILURES = {
    "wrong shape": (
        lambda f: edit(f, LAST, lambda s: s.update({first(s): torch.zeros(1, 3, 3)})),
        r"krona_A has shape \(1, 3, 3\), the layer needs \(2, 8, 2\).*Was it trained on another base model"),
    "missing key": (
        lambda f: edit(f, LAST, lambda s: s.pop(first(s))),
        r"text_encoder: the adapter does not fit .* no weights for .*krona_A"),
    "left-over key": (
        lambda f: edit(f, "unet", lambda s: s.update({"base_model.model.nowhere.krona_A": torch.zeros(2)})),
        r"unet: the adapter does not fit this model: no layer for nowhere.krona_A"),
    "truncated": (lambda f: os.truncate(f / LAST / "adapter_model.safetensors", 100), "adapter_model.safetensors"),
    "corrupted": (
        lambda f: (f / LAST / "adapter_model.safetensors").write_bytes(b"\x00garbage" * 50),
        "adapter_model.safetensors"),
    "no weights": (
        lambda f: (f / LAST / "adapter_model.safetensors").unlink(),
        "has an adapter_config.json but no adapter_model.safetensors"),
    "wrong component": (
        lambda f: (f / LAST).rename(f / "image_encoder"), r"has weights for \['image_encoder'\], but this StableDiff"),
    "broken config": (
        lambda f: (f / LAST / "adapter_config.json").write_text("{"), "is not the config of a PEFT adapter"),
    "bad config": (lambda f: edit_config(f, LAST, a_out=0), r"KronAConfig.a_out=0 is not allowed"),
    "targets nothing": (lambda f: edit_config(f, LAST, target_modules=["nope"]), "nope.*not found"),
    "other size": (lambda f: edit_config(f, LAST, a_out=16), r"has shape .*, the layer needs"),
}  # fmt: skip


@pytest.mark.parametrize("with_other", [False, True], ids=["bare", "beside another"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_load_leaves_the_pipeline_as_it_was(saved, tmp_path, name, with_other):
    damage, message = FAILURES[name]
    folder = copy_folder(saved("sd")[0], tmp_path)
    damage(folder)
    pipe = tiny.sd_pipeline()
    if with_other:
        add_krona(pipe, config(), text_encoder_config=config(target_modules=["q_proj"]), adapter_name="other")
    before = states(pipe)
    with pytest.raises(ValueError, match=message) as caught:
        load_krona_weights(pipe, folder)
    assert isinstance(caught.value, KronAError) or "nope" in str(caught.value)
    assert_untouched(pipe, before)


def test_images_are_equal_after_a_failed_load(saved, tmp_path):
    folder = copy_folder(saved("sd")[0], tmp_path)
    edit(folder, LAST, lambda s: s.pop(first(s)))
    pipe = tiny.sd_pipeline()
    load_krona_weights(pipe, saved("sd")[0], "good")
    image = tiny.image(pipe)
    with pytest.raises(FormatError):
        load_krona_weights(pipe, folder, "bad")
    assert torch.equal(tiny.image(pipe), image) and torch.equal(image, saved("sd")[1])
    load_krona_weights(pipe, saved("sd")[0], "bad")  # the name is free
    assert torch.equal(tiny.image(pipe), image)


def test_an_existing_name_is_refused(saved):
    folder = saved("sd")[0]
    pipe = tiny.sd_pipeline()
    load_krona_weights(pipe, folder)
    before = states(pipe)
    with pytest.raises(ConfigError, match=r"already has an adapter named 'default'. Choose another adapter_name, or "
                                          r"remove it first: pipe.delete_adapters\('default'\)"):  # fmt: skip
        load_krona_weights(pipe, folder)
    assert_untouched(pipe, before)


def test_an_adapter_of_another_model_is_refused(saved):
    """SDXL's weights for SD: names fit, sizes do not."""
    pipe = tiny.sd_pipeline()
    before = states(pipe)
    with pytest.raises(
        FormatError, match=r"has weights for \['text_encoder_2'\], but this StableDiffusionPipeline has only"
    ):
        load_krona_weights(pipe, saved("sdxl")[0])
    with pytest.raises(FormatError, match=r"the adapter does not fit this model"):
        load_krona_weights(pipe, saved("sdxl")[0] / "unet")
    assert_untouched(pipe, before)


def test_a_failed_load_keeps_a_lora_beside_it(saved, tmp_path):
    folder = copy_folder(saved("sd")[0], tmp_path)
    edit(folder, "unet", lambda s: s.pop(first(s)))
    pipe = tiny.sd_pipeline()
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k"], init_lora_weights=False), "lora")
    image, before = tiny.image(pipe), states(pipe)
    with pytest.raises(FormatError):
        load_krona_weights(pipe, folder)
    assert_untouched(pipe, before)
    assert torch.equal(tiny.image(pipe), image)


# -- where from --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", None, 3, b"x", {"a": 1}], ids=repr)
def test_what_is_no_path(saved, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = tiny.sd_pipeline()
    add_krona(pipe)
    for call, argument in ((save_krona_weights, "save_directory"), (load_krona_weights, "source")):
        with pytest.raises((ConfigError, ConfigTypeError), match=rf"^{argument} (is empty|should be a path, got)"):
            call(pipe, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/x", "file/x/y", "dangling", "dangling/x"])
def test_saving_where_no_folder_can_be(place, tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    pipe = tiny.sd_pipeline()
    add_krona(pipe)
    with pytest.raises(FormatError, match=r"(file|dangling) is no folder\. Choose another save_directory"):
        save_krona_weights(pipe, tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_paths_that_do_not_exist(saved, tmp_path):
    pipe = tiny.sd_pipeline()
    for source in (str(tmp_path / "nowhere"), "./nowhere", "nowhere"):
        with pytest.raises(FormatError, match=r"does not exist, and is no id of a repository"):
            load_krona_weights(pipe, source)
    with pytest.raises(FormatError, match=r"holds no other.safetensors"):
        load_krona_weights(pipe, saved("sd")[0], weight_name="other.safetensors")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub: repositories are folders under tmp_path/hub; records what is asked for."""
    root, cache, asked = tmp_path / "hub", tmp_path / "cache", []

    def download(repo, allow_patterns=None, ignore_patterns=None, revision=None, token=None):
        names = sorted(p.relative_to(root / repo).as_posix() for p in (root / repo).rglob("*") if p.is_file())
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            asked.append((repo, name, revision, token))
            (cache / repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / repo / name, cache / repo / name)
        return str(cache / repo)

    monkeypatch.setattr(sources, "snapshot_download", download)
    return root, asked


def test_a_repository_of_folders(saved, hub):
    root, asked = hub
    folder, image, _ = saved("sd")
    copy_folder(folder, root / "user" / "adapter")
    (root / "user" / "adapter" / "README.md").write_text("not fetched")
    pipe = tiny.sd_pipeline()
    assert sorted(load_krona_weights(pipe, "user/adapter", revision="v1", token="t")) == ["text_encoder", "unet"]
    assert torch.equal(tiny.image(pipe), image)
    assert len(asked) == 4
    assert all(a[0] == "user/adapter" and a[2:] == ("v1", "t") and "README" not in a[1] for a in asked)


def test_a_repository_that_is_one_peft_folder(saved, hub):
    root, _ = hub
    copy_folder(saved("sd")[0] / "unet", root / "user" / "adapter")
    assert load_krona_weights(tiny.sd_pipeline(), "user/adapter") == ["unet"]


def test_a_repository_with_one_file_and_a_named_file(saved, hub):
    root, asked = hub
    (root / "user" / "adapter").mkdir(parents=True)
    save_file({"x": torch.zeros(1)}, root / "user" / "adapter" / "weights.safetensors")
    for kwargs in ({}, {"weight_name": "weights.safetensors"}):
        with pytest.raises(FormatError, match=r"weights.safetensors"):
            load_krona_weights(tiny.sd_pipeline(), "user/adapter", **kwargs)
    assert asked[-1] == ("user/adapter", "weights.safetensors", None, None)


def test_a_repository_without_an_adapter(hub):
    root, _ = hub
    (root / "user" / "empty").mkdir(parents=True)
    with pytest.raises(
        FormatError, match=r"The repository user/empty holds no adapter: expected adapter_config.json or"
    ):
        load_krona_weights(tiny.sd_pipeline(), "user/empty")
