# SPDX-License-Identifier: Apache-2.0
"""suggest_factors and `plan`: its counts against real adapters and published numbers, its budgets, its sources."""

import json
import re
from functools import cache

import diffusers
import pytest
import torch
from peft import get_peft_model
from test_counts import ATTENTION, build
from tiny import tiny_denoiser, unet
from torch import nn

import peft_krona
from peft_krona import KronAConfig
from peft_krona.__main__ import main
from peft_krona.errors import ConfigError, FormatError
from peft_krona.share import share_of
from peft_krona.skeleton import skeleton
from peft_krona.suggest import DTYPES, Option, parse_budget, suggest_factors


class Mixed(nn.Module):
    """Every kind of layer that is counted, sizes with few divisors, one shared shape."""

    def __init__(self):
        super().__init__()
        self.lin, self.same, self.odd = nn.Linear(96, 128), nn.Linear(96, 128), nn.Linear(35, 21)
        self.conv, self.grouped = nn.Conv2d(32, 64, 3), nn.Conv2d(32, 64, 3, groups=4)
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(nn.Linear(96, 96) for _ in range(12))  # keys whose order is not the modules'


ALL = ["lin", "same", "odd", "conv", "grouped", "embed", *(f"blocks.{i}" for i in range(12))]


@cache
def klein():
    with torch.device("meta"):
        return diffusers.Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680
        )


# what PEFT's image-gen benchmark names for it: 80 layers
KLEIN = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("linear_in", "linear_out", "to_qkv_mlp_proj"),
]


# -- counts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "r"), [("4k", 1), ("20k", None), (9000, 2)])
def test_counts_and_file_sizes_are_those_of_the_adapter(budget, r, tmp_path):
    plan = suggest_factors(Mixed(), budget, target_modules=ALL, r=r)
    assert plan.layers == len(ALL)
    for option in plan.options:
        config = KronAConfig(target_modules=ALL, a_out=option.a_out, a_in=option.a_in, r=option.r)
        model = get_peft_model(Mixed(), config)
        assert option.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        for dtype, name in zip(DTYPES, ("float32", "float16", "bfloat16"), strict=True):
            model.to(getattr(torch, name)).save_pretrained(tmp_path)
            assert option.file_bytes[dtype] == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert plan.chosen in plan.options and plan.chosen.parameters <= parse_budget(budget)[0]
    assert plan.share == share_of(get_peft_model(Mixed(), plan.config()))


@pytest.mark.parametrize(
    ("model", "targets", "budget", "factors", "parameters", "flops"),
    [  # DESIGN's and the paper's counts; the added FLOPs of klein were computed apart from this code
        ("sdxl", None, "3.9M", (64, 4, 1), 3_874_560, 0.018),
        ("sd15", ATTENTION, 398_048, (64, 4, 1), 398_048, None),
        ("sdxl", None, 2_152_320, (64, 8, 1), 2_152_320, None),
        ("klein", KLEIN, "1.05M", (64, 64, 1), 1_041_920, 0.021),
        ("klein", KLEIN, "3M", (64, 16, 1), 2_940_000, 0.021),
    ],
)
def test_published_counts(model, targets, budget, factors, parameters, flops):
    plan = suggest_factors(klein() if model == "klein" else build(model), budget, target_modules=targets)
    chosen = plan.chosen
    assert (chosen.a_out, chosen.a_in, chosen.r) == factors
    assert chosen.parameters == parameters if parameters % 10_000 else abs(chosen.parameters - parameters) < 10_000
    assert flops is None or abs(chosen.added_flops / plan.layer_flops - flops) < 1e-3
    assert plan.layers == {"sdxl": 560, "sd15": 128, "klein": 80}[model]


def test_flops_are_those_that_the_layers_take():
    """Counted by torch in a forward pass of the products, the base layers' taken off."""
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 64))
    plan = suggest_factors(model, "2k", target_modules=["0", "1"])
    found = []
    for adapt in (lambda: model, lambda: get_peft_model(model, plan.config(init_weights=False))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            adapt()(torch.randn(1, 96))
        found.append(counter.get_total_flops())
    assert found[0] == plan.layer_flops
    assert found[1] - found[0] == plan.chosen.added_flops


# -- the rule ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["1.7MB", "1.6MiB", "225k", "790k", "800k", "3M"])
def test_the_largest_that_fits(budget):
    model = build("sd15")
    plan = suggest_factors(model, budget)
    limit, in_bytes = parse_budget(budget)
    sizes = [o.file_bytes["fp32"] if in_bytes else o.parameters for o in plan.options]
    assert sizes == sorted(sizes, reverse=True)
    chosen = plan.options.index(plan.chosen)
    assert sizes[chosen] <= limit
    if plan.chosen.r == 1:
        assert all(size > limit for size in sizes[:chosen])
    else:  # beyond what is known of r = 1: terms of the paper's best
        assert plan.chosen.a_in == 4 and (plan.chosen.r + 1) * 398_048 > limit


def test_what_is_asked_for_is_kept():
    plan = suggest_factors(build("sd15"), "1.2M", a_out=32, r=4)
    assert (plan.chosen.a_out, plan.chosen.r) == (32, 4) and plan.chosen.parameters <= 1_200_000
    config = plan.config(layout="diffusekrona", target_modules=["to_q"])
    assert (config.a_out, config.r, config.layout, config.target_modules) == (32, 4, "diffusekrona", {"to_q"})
    half = suggest_factors(build("sd15"), "1MB", dtype="fp16")
    assert half.chosen.file_bytes["fp16"] <= 1e6 < half.chosen.file_bytes["fp32"]


def test_the_rate_is_the_paper_s_at_its_width_and_falls_with_the_fourth_root():
    plan = suggest_factors(nn.Sequential(nn.Linear(1280, 1280)), 6656, target_modules=["0"])
    assert plan.chosen == Option(64, 4, 1, 6656, plan.chosen.file_bytes, 2 * 30720)
    assert plan.learning_rate == pytest.approx(5e-4)
    wide = suggest_factors(
        nn.Sequential(nn.Linear(16 * 1280, 64), nn.Linear(1280, 64)), "60k", target_modules=["0", "1"], r=1
    )
    assert wide.learning_rate == pytest.approx(5e-4 / 2**0.5)
    terms = suggest_factors(nn.Sequential(nn.Linear(1280, 1280)), 16 * 6656, target_modules=["0"], r=16)
    assert terms.chosen.r == 16 and terms.learning_rate == pytest.approx(2.5e-4)
    assert "learning rate: 5.0e-04" in str(plan) and "It was not tried on this model." in str(plan)


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (1, (1, False)),
        ("1000000", (10**6, False)),
        ("1_000_000", (10**6, False)),
        ("1,000,000", (10**6, False)),
        ("1M", (10**6, False)),
        ("1m", (10**6, False)),
        (" .5 k ", (500, False)),
        ("2G", (2 * 10**9, False)),
        ("5MB", (5 * 10**6, True)),
        ("5 mb", (5 * 10**6, True)),
        ("5.5 MiB", (5767168, True)),
        ("800kB", (800_000, True)),
        ("1 KiB", (1024, True)),
        ("1GB", (10**9, True)),
    ],
)
def test_budgets(written, meant):
    assert parse_budget(written) == meant


@pytest.mark.parametrize(
    "written",
    [*("", "MB", "5 apples", "-5MB", "1e6", "5iB", "5i", "nan", "1M 2", "0.0001"), 0, -1, True, None, 1.5, [1]],
)
def test_bad_budgets(written):
    with pytest.raises(ConfigError, match=rf"budget={re.escape(repr(written))} is not allowed; "):
        parse_budget(written)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("1B", "budget='1B': bytes, or billions of parameters? Write 1kB or 1G."),
        ("100", "with a_out=64 and r=1 on the target layers (1) has 224 parameters, with a_in=2 (1.11 kB in fp32)."),
        ("1kB", "too small: the smallest adapter"),
        ("12288", "is as much as the target layers themselves have (12,288 parameters). Train them whole"),
        ("5MB", "is as much as the target layers themselves have (49.15 kB)"),
    ],
)
def test_budgets_that_do_not_fit(budget, says):
    with pytest.raises(ConfigError) as error:
        suggest_factors(nn.Sequential(nn.Linear(96, 128)), budget, target_modules=["0"])
    assert says in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dtype": "int8"}, "dtype='int8' is not allowed; expected one of ('fp32', 'fp16', 'bf16')."),
        ({"a_out": 0}, "a_out=0 is not allowed; expected an integer >= 1."),
        ({"r": 1.5}, "r=1.5 is not allowed; expected an integer >= 1."),
        ({"target_modules": ["lin"]}, "Sequential: Target modules"),
        ({"target_modules": None}, "Pass target_modules."),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ConfigError) as error:
        suggest_factors(nn.Sequential(nn.Linear(96, 128)), "2k", **{"target_modules": ["0"], **settings})
    assert says in str(error.value), str(error.value)


# -- where the model comes from ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline's folder with configs alone, as its repository has them."""
    root = tmp_path_factory.mktemp("pipeline")
    unet().save_config(root / "unet")
    (root / "text_encoder").mkdir()
    (root / "text_encoder" / "config.json").write_text(
        json.dumps({"model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "hidden_size": 64})
    )
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return root


@pytest.mark.parametrize("kind", ["pipeline", "folder", "file", "model", "peft", "compiled"])
def test_every_way_to_a_model_gives_the_same_plan(kind, folders):
    wanted = suggest_factors(unet(), "4k")
    saved = KronAConfig(target_modules=["to_k"], a_out=2, a_in=2, modules_to_save=["conv_out"])
    source = {
        "pipeline": lambda: folders,
        "folder": lambda: str(folders / "unet"),
        "file": lambda: folders / "unet" / "config.json",
        "model": unet,
        "peft": lambda: get_peft_model(unet(), saved),
        "compiled": lambda: torch.compile(unet()),
    }[kind]()
    plan = suggest_factors(source, "4k")
    assert (plan.chosen, plan.options, plan.layers) == (wanted.chosen, wanted.options, wanted.layers)


def test_a_text_encoder_and_a_class(folders):
    plan = suggest_factors(folders, "40k", component="text_encoder")
    assert plan.model.startswith("CLIPTextModel of ") and plan.layers == 12 * 4
    by_name, by_class = (skeleton(c) for c in ("FluxTransformer2DModel", diffusers.FluxTransformer2DModel))
    assert by_name[0] == by_class[0] == "FluxTransformer2DModel in its default configuration"
    assert {p.device.type for p in by_name[1].parameters()} == {"meta"}
    assert skeleton("torch.nn.Identity")[0] == "Identity in its default configuration"


def test_an_id_on_the_hub(folders, monkeypatch):
    from peft_krona import sources

    asked = []
    monkeypatch.setattr(sources, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(folders))
    assert suggest_factors("somebody/something", "4k").chosen == suggest_factors(unet(), "4k").chosen
    assert asked == [
        (("somebody/something",), {"allow_patterns": ["model_index.json", "config.json", "*/config.json"]})
    ]


def test_the_model_itself_is_left_alone():
    model = tiny_denoiser("Flux2Transformer2DModel")
    before = {name: (id(p), p.requires_grad, p.device) for name, p in model.named_parameters()}
    names = [name for name, _ in model.named_modules()]
    suggest_factors(model, "10k")
    assert before == {name: (id(p), p.requires_grad, p.device) for name, p in model.named_parameters()}
    assert names == [name for name, _ in model.named_modules()] and not hasattr(model, "peft_config")


def test_a_quantized_model_counts_as_the_plain_one():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(96, 128), bnb.nn.Linear8bitLt(128, 64))
    plain = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 64))
    found, wanted = (suggest_factors(m, "2k", target_modules=["0", "1"]) for m in (model, plain))
    assert found.chosen == wanted.chosen and found.layer_flops == wanted.layer_flops


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        (3, ConfigError, "Expected a model, a model class or its name, or the folder of a model or pipeline, got 3."),
        ("NoSuchModel", ConfigError, "NoSuchModel is no folder here, and no class of diffusers"),
        ("torch.nn.NoSuch", ConfigError, "There is no class torch.nn.NoSuch"),
        ("DDIMScheduler", ConfigError, "DDIMScheduler is no model (torch.nn.Module)."),
        (nn.Linear, ConfigError, "Linear needs a configuration: "),
        ("no/such/folder", FormatError, "no/such/folder does not exist, and is no id of a repository"),
        ("{empty}", FormatError, "expected the folder of a pipeline (model_index.json) or of a model (config.json)."),
        ("{broken}", FormatError, "not JSON"),
        ("{strange}", FormatError, "not the config of a model: it has neither _class_name (diffusers) nor model_type."),
        ("{scheduler}", FormatError, "no model can be built from it: diffusers"),
        ("{newer}", FormatError, "has no model Flux9Transformer"),
        ("{other}", FormatError, "has no model torch.nn.Identity"),
        ("{index}", FormatError, "expected a denoiser (unet, transformer, transformer_2, prior); it has vae."),
    ],
    ids=str,
)
def test_bad_sources(source, error, says, tmp_path):
    contents = {
        "empty": None, "broken": "{", "strange": "[1]", "scheduler": '{"_class_name": "DDIMScheduler"}',
        "newer": '{"_class_name": "Flux9Transformer"}', "other": '{"_class_name": "torch.nn.Identity"}', "index": None,
    }  # fmt: skip
    for name, text in contents.items():
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "config.json").write_text(text)
    (tmp_path / "index" / "model_index.json").write_text("{}")
    (tmp_path / "index" / "vae").mkdir()
    (tmp_path / "index" / "vae" / "config.json").write_text("{}")
    source = str(tmp_path / source[1:-1]) if str(source).startswith("{") else source
    with pytest.raises(error) as raised:
        suggest_factors(source, "1k")
    assert says in str(raised.value), str(raised.value)


def test_a_component_that_is_not_there(folders):
    with pytest.raises(FormatError, match=r"expected component='vae'; it has text_encoder, unet\."):
        suggest_factors(folders, "1k", component="vae")
    with pytest.raises(FormatError, match="component='unet' is for a pipeline's folder"):
        suggest_factors(folders / "unet", "1k", component="unet")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_plan(folders, capsys):
    assert main(["plan", str(folders), "--budget", "4k", "--target-modules", "to_q", "to_k", "--r", "2"]) == 0
    out = capsys.readouterr().out
    assert out == f"{suggest_factors(folders, '4k', target_modules=['to_q', 'to_k'], r=2)}\n"
    assert re.search(r"^-> +64 +\d+ +2 +[\d,]+ .*kB .*%", out, re.MULTILINE)
    assert "UNet2DConditionModel of" in out and "budget: 4,000 parameters" in out and "r=2)" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "many"], "error: --budget many is not allowed"),
        (["--budget", "10"], "error: --budget 10 is too small"),
        (["--budget", "1k", "--component", "vae"], "expected --component vae; it has text_encoder, unet."),
        (["--budget", "1k", "--target-modules", "nothing"], "Pass --target-modules."),
        (["joy", "--budget", "1k"], "KronAConfig.target_modules is None, and none of its layers"),
        (["joy", "--budget", "1k"], "Pass --target-modules: 'all-linear', or some of the names"),
    ],
)
def test_bad_input_is_one_line_in_words_of_the_command(arguments, says, folders, capsys):
    model = "JoyImageEditPlusTransformer3DModel" if arguments[0] == "joy" else str(folders)
    assert main(["plan", model, *arguments[arguments[0] == "joy" :]]) == 1
    out = capsys.readouterr()
    assert says in out.err and out.err.count("\n") == 1 and not out.out


def test_it_is_exported():
    assert peft_krona.suggest_factors is suggest_factors
