# SPDX-License-Identifier: Apache-2.0
"""KronAConfig: what it selects in a model, what it refuses and in which words, and its JSON."""

import dataclasses
import json
import logging

import pytest
import torch
from adapted import adapted_mlp, config, krona_layers, mlp
from peft import PeftConfig, get_peft_model
from tiny import denoiser, sd_pipeline
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_krona import KronAConfig
from peft_krona.config import scaling_factor
from peft_krona.errors import ConfigError, FactorError
from peft_krona.factors import choose_factors

FULL = KronAConfig(
    target_modules=["a", "b"], exclude_modules=["c"], a_out=8, a_in=2, r=3, alpha=0.5, scaling="cdka",
    layout="diffusekrona", init_weights="kaiming", krona_dropout=0.1, module_dropout=0.2, fan_in_fan_out=True,
    bias="krona_only", modules_to_save=["head"], layers_to_transform=[0, 2], layers_pattern="layers",
    rank_pattern={"a": 2}, alpha_pattern={"b": 4.0}, factor_pattern={"a": (4, 2)}, strict_factors=True,
)  # fmt: skip


@pytest.mark.parametrize("original", [KronAConfig(), KronAConfig(target_modules="all-linear"), FULL], ids="0af")
def test_json_round_trip(tmp_path, original):
    original.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)) == original
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "KRONA"
    assert {field.name for field in dataclasses.fields(KronAConfig)} <= stored.keys()


def test_defaults_and_documentation():
    c = KronAConfig()
    assert (c.a_out, c.a_in, c.r, c.alpha, c.scaling, c.layout) == (64, 4, 1, 1.0, "alpha", "kron")
    assert c.init_weights is True and c.bias == "none" and not c.strict_factors
    own = {f.name for f in dataclasses.fields(KronAConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    assert all(name in KronAConfig.__doc__ for name in own)
    assert all(f.metadata.get("help") for f in dataclasses.fields(KronAConfig) if f.name in own)


@pytest.mark.parametrize(
    "scaling,s", [("alpha", 6.0), ("rank", 1.5), ("rslora", 3.0), ("cdka", 6.0 / 8**0.5)], ids=lambda v: str(v)[:6]
)
def test_scaling(scaling, s):
    assert scaling_factor(scaling, 6.0, 4, 2) == pytest.approx(s, rel=1e-15)
    model = adapted_mlp(scaling=scaling, alpha=6.0, r=4)
    layer = krona_layers(model)["base_model.model.lin0"]
    assert layer.scaling["default"] == layer.base_scaling["default"] == pytest.approx(s, rel=1e-15)


def test_cdka_scaling_uses_the_a_in_that_the_layer_got():
    layer = krona_layers(adapted_mlp(scaling="cdka", alpha=1.0, a_in=4))["base_model.model.lin0"]  # in = 10
    assert layer.factors("default")[1] == 2 and layer.scaling["default"] == pytest.approx(2**-0.5)


# -- which layers ------------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """net.blocks.{0,1,2}.{q,k,mlp.fc} and a head."""

    def __init__(self):
        super().__init__()
        blocks = (
            nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8), "mlp": nn.ModuleDict({"fc": nn.Linear(8, 16)})})
            for _ in range(3)
        )
        self.net = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.head = nn.Linear(8, 4)


ALL = {f"net.blocks.{i}.{n}" for i in range(3) for n in ("q", "k", "mlp.fc")}


@pytest.mark.parametrize(
    "fields,expected",
    [
        ({"target_modules": ["q"]}, {"net.blocks.0.q", "net.blocks.1.q", "net.blocks.2.q"}),
        ({"target_modules": ("0.q", "mlp.fc")}, {"net.blocks.0.q", *(f"net.blocks.{i}.mlp.fc" for i in range(3))}),
        ({"target_modules": {"net.blocks.1.k"}}, {"net.blocks.1.k"}),
        ({"target_modules": r"net\.blocks\.[02]\.(q|k)"}, {f"net.blocks.{i}.{n}" for i in (0, 2) for n in "qk"}),
        ({"target_modules": "all-linear"}, {*ALL, "head"}),
        ({"target_modules": "all-linear", "exclude_modules": ["head", "q"]}, {n for n in ALL if n[-1] != "q"}),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.(k|fc)|head"}, {n for n in ALL if n[-1] == "q"}),
        ({"target_modules": ["q", "k"], "layers_to_transform": 0}, {"net.blocks.0.q", "net.blocks.0.k"}),
        ({"target_modules": ["q"], "layers_to_transform": [0, 2]}, {"net.blocks.0.q", "net.blocks.2.q"}),
        (
            {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "blocks"},
            {"net.blocks.1.q"},
        ),
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, ALL),
    ],
    ids=lambda v: str(v)[:60] if isinstance(v, dict) else "",
)  # fmt: skip
def test_selection(fields, expected):
    model = get_peft_model(Blocks(), KronAConfig(a_out=4, a_in=2, **fields))
    assert set(krona_layers(model.base_model.model)) == expected
    trainable = {n.split("base_model.model.")[1] for n, p in model.named_parameters() if p.requires_grad}
    saved = {"head.modules_to_save.default.weight", "head.modules_to_save.default.bias"}
    want = {f"{n}.krona_{f}.default" for n in expected for f in "AB"} | (
        saved if "modules_to_save" in fields else set()
    )
    assert trainable == want


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["nothing"]}, {"target_modules": ["q"], "exclude_modules": ["q"]}], ids=str
)
def test_nothing_selected_is_an_error(fields):
    with pytest.raises(ValueError, match=r"not found|excluded"):
        get_peft_model(Blocks(), KronAConfig(**fields))


def test_patterns():
    model = get_peft_model(
        Blocks(),
        KronAConfig(
            target_modules=["q", "k", "fc"], a_out=4, a_in=2, r=1, alpha=1.0,
            rank_pattern={"q": 2, r"blocks\.2\.k": 3}, alpha_pattern={"k": 5.0, "^net.blocks.0.q": 7.0},
            factor_pattern={"mlp.fc": (16, 1), r"1\.(q|k)": [2, 8]},
        ),
    ).base_model.model  # fmt: skip
    for name, r, alpha, factors in (
        ("net.blocks.0.q", 2, 7.0, (4, 2)),
        ("net.blocks.0.k", 1, 5.0, (4, 2)),
        ("net.blocks.1.q", 2, 1.0, (2, 8)),
        ("net.blocks.1.k", 1, 5.0, (2, 8)),
        ("net.blocks.2.k", 3, 5.0, (4, 2)),
        ("net.blocks.2.mlp.fc", 1, 1.0, (16, 1)),
    ):
        layer = model.get_submodule(name)
        assert (layer.r["default"], layer.alpha["default"], layer.factors("default")) == (r, alpha, factors), name
        assert layer.scaling["default"] == alpha


def tiny_transformers(name):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "vocab_size": 40}  # fmt: skip
    return {
        "bert": lambda: BertModel(BertConfig(**size)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**size)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40)),
        "clip": lambda: CLIPTextModel(CLIPTextConfig(**size, max_position_embeddings=16)),
    }[name]()  # fmt: skip


@pytest.mark.parametrize(
    "name,ends",
    [
        ("bert", {"query", "value"}),
        ("llama", {"q_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("t5", {"q", "v"}),
        ("clip", {"q_proj", "k_proj", "v_proj", "out_proj"}),
    ],
)
def test_default_targets_of_known_architectures(name, ends):
    model = get_peft_model(tiny_transformers(name), KronAConfig(a_out=4, a_in=2))
    layers = krona_layers(model)
    assert {layer.rpartition(".")[2] for layer in layers} == ends
    assert len(layers) == len(ends) * (6 if name == "t5" else 2)


def test_default_targets_of_diffusers_models_are_the_attention_projections():
    unet = sd_pipeline().unet
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    wanted = {name for name, _ in unet.named_modules() if name.endswith(ends)}
    assert set(krona_layers(get_peft_model(unet, KronAConfig(a_out=4, a_in=2)).base_model.model)) == wanted
    assert denoiser(sd_pipeline()) is not None and len(wanted) == 4 * 2 * 4


def test_unknown_architecture_needs_target_modules():
    with pytest.raises(ValueError, match=r"Please specify `target_modules`"):
        get_peft_model(mlp(), KronAConfig())


def test_all_linear_leaves_the_head_of_a_transformer_alone():
    model = get_peft_model(tiny_transformers("llama"), KronAConfig(target_modules="all-linear", a_out=4, a_in=2))
    assert len(krona_layers(model)) == 2 * 7 and not any("lm_head" in name for name in krona_layers(model))


# -- factors -----------------------------------------------------------------------------------------------------------


def test_factors_that_do_not_divide_are_lowered_and_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="peft_krona"):
        model = adapted_mlp(a_out=64, a_in=4)
    layers = krona_layers(model.base_model.model)
    assert {name: layer.factors("default") for name, layer in layers.items()} == {"lin0": (20, 2), "lin1": (8, 4)}
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "lin0 (out=20, in=10): factors (a_out, a_in) = (64, 4) do not divide it, took (20, 2).",
        "lin1 (out=8, in=20): factors (a_out, a_in) = (64, 4) do not divide it, took (8, 4).",
    ]


@pytest.mark.parametrize(
    "a_out,a_in,message",
    [
        (6, 2, r"lin0: a_out=6 does not divide out_features=20. The nearest divisors are 5 or 10; "
               r"set them with factor_pattern=\{'lin0': \(a_out, a_in\)\}, or take 5 with strict_factors=False"),
        (64, 2, r"lin0: a_out=64 does not divide out_features=20. The nearest divisors are 20;"),
        (4, 3, r"lin0: a_in=3 does not divide in_features=10. The nearest divisors are 2 or 5;"),
    ],
)  # fmt: skip
def test_strict_factors_name_layer_size_and_divisors(a_out, a_in, message):
    with pytest.raises(FactorError, match=message) as caught:
        adapted_mlp(targets=["lin0"], a_out=a_out, a_in=a_in, strict_factors=True)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("n", [1, 7, 320, 640, 768, 1280, 2048, 5120])
def test_lowered_factors_are_the_largest_divisors_by_brute_force(n):
    for wanted in (1, 2, 3, 4, 7, 64, 100, 10_000):
        best = max(d for d in range(1, min(n, wanted) + 1) if n % d == 0)
        assert choose_factors(n, 8, wanted, 8) == (best, 8)


# -- refusals ----------------------------------------------------------------------------------------------------------

INTEGER, NUMBER, SHARE, FLAG = "an integer >= 1", "a finite number", r"a number in \[0, 1\)", "True or False"
PAIR = r"a pair \(a_out, a_in\) of integers >= 1"
REFUSED = [
    ("a_out", 0, INTEGER), ("a_out", 4.0, INTEGER), ("a_out", True, INTEGER), ("a_out", None, INTEGER),
    ("a_in", -1, INTEGER), ("a_in", "4", INTEGER), ("r", 0, INTEGER), ("r", 1.5, INTEGER),
    ("alpha", float("nan"), NUMBER), ("alpha", float("inf"), NUMBER), ("alpha", "1", NUMBER), ("alpha", None, NUMBER),
    ("krona_dropout", 1.0, SHARE), ("krona_dropout", -0.1, SHARE), ("module_dropout", 1, SHARE),
    ("module_dropout", None, SHARE),
    ("scaling", "lora", r"one of \('alpha', 'rank', 'rslora', 'cdka'\)"),
    ("layout", "shuffled", r"one of \('kron', 'diffusekrona'\)"),
    ("init_weights", "zeros", r"one of \(True, False, 'diffusekrona', 'kaiming', 'cdka'\)"),
    ("init_weights", 1, r"one of \(True, False,"),
    ("init_weights", None, r"one of \(True, False,"),
    ("bias", "lora_only", r"one of \('none', 'all', 'krona_only'\)"), ("bias", False, r"one of \('none',"),
    ("fan_in_fan_out", "yes", FLAG), ("strict_factors", 1, FLAG), ("strict_factors", None, FLAG),
    ("target_modules", 3, "a list of names, a regex string or None"),
    ("exclude_modules", {"a": 1}, "a list of names, a regex string or None"),
    ("rank_pattern", ["q"], r"a dict \{module name or regex: value\}"),
    ("alpha", 10**400, NUMBER),
    ("inference_mode", "no", "True or False"),
    *((field, value, "a list of names, each a string, or one regex")
      for field in ("target_modules", "exclude_modules") for value in ({1}, {None}, {""})),
    ("modules_to_save", "head", r"a list of names: \['head'\]"),  # PEFT would take its letters
    *(("modules_to_save", value, "a list of names, or None") for value in ([1], 5, [""], {"head": 1})),
    *(("layers_to_transform", value, "an index >= 0, a list of them, or None")
      for value in ("3", -1, [0, "1"], 1.5, True, [0, -2], {"0": 1})),
    ("factor_pattern", "q", r"a dict \{module name or regex: value\}"),
]  # fmt: skip


@pytest.mark.parametrize("field,value,allowed", REFUSED, ids=lambda v: str(v)[:20])
def test_bad_values_are_named(field, value, allowed):
    import re

    with pytest.raises(ConfigError, match=rf"^KronAConfig\.{field}={re.escape(repr(value))} is not allowed; expected "
                                          rf"{allowed}") as caught:  # fmt: skip
        KronAConfig(**{"target_modules": ["q"], field: value})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "field,value,allowed",
    [
        ("rank_pattern", {"q": 0}, INTEGER),
        ("alpha_pattern", {"q": "x"}, NUMBER),
        ("factor_pattern", {"q": (64,)}, PAIR),
        ("factor_pattern", {"q": (64, 0)}, PAIR),
        ("factor_pattern", {"q": 64}, PAIR),
    ],
    ids=str,
)
def test_bad_pattern_values_are_named_with_their_key(field, value, allowed):
    with pytest.raises(ConfigError, match=rf"KronAConfig\.{field}\['q'\]=.* is not allowed; expected {allowed}"):
        KronAConfig(target_modules=["q"], **{field: value})


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("value", ["*", "(", "to_q[", "+"])
def test_a_string_is_a_regex(field, value):
    with pytest.raises(
        ConfigError, match=rf"KronAConfig\.{field}='.*' is not allowed: a string is a regex .* no valid"
    ):
        KronAConfig(**{field: value})


def test_pattern_keys_are_strings():
    with pytest.raises(ConfigError, match=r"rank_pattern: key=1 is not allowed; expected a module name or regex"):
        KronAConfig(rank_pattern={1: 2})
    with pytest.raises(ConfigError, match=r"layers_pattern=\[1\] is not allowed; expected a name, a list of names"):
        KronAConfig(target_modules=["q"], layers_to_transform=[0], layers_pattern=[1])


@pytest.mark.parametrize("field,value", [("rank_pattern", 2), ("alpha_pattern", 2.0), ("factor_pattern", (4, 2))])
def test_pattern_keys_must_be_regexes(field, value):
    with pytest.raises(ConfigError, match=rf"KronAConfig\.{field}: the key 'q\(' is not a valid regex"):
        KronAConfig(target_modules=["q"], **{field: {"q(": value}})


@pytest.mark.parametrize(
    "fields,message",
    [
        (
            {"target_modules": ["q"], "layers_pattern": "blocks"},
            "layers_pattern='blocks' says where layers_to_transform counts, but layers_to_transform is None",
        ),
        (
            {"target_modules": "q", "layers_to_transform": [0]},
            r"layers_to_transform=\[0\] cannot be used with target_m",
        ),
        (
            {"target_modules": "q", "layers_to_transform": 0, "layers_pattern": "b"},
            r"layers_to_transform=0 cannot be used with target_modules as a string \('q'\). Pass target_modules as a "
            "list of names, or put the layer indices into the regex",
        ),
    ],
)
def test_contradicting_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        KronAConfig(**fields)


def test_layers_to_transform_zero_is_an_index():
    assert KronAConfig(target_modules=["q"], layers_to_transform=0, layers_pattern="blocks").layers_to_transform == 0


def test_none_patterns_mean_empty():
    c = KronAConfig(target_modules=["q"], rank_pattern=None, alpha_pattern=None, factor_pattern=None)
    assert c.rank_pattern == c.alpha_pattern == c.factor_pattern == {}


# -- initial weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init", [True, "diffusekrona", "kaiming", "cdka"])
def test_a_fresh_adapter_changes_no_bit(init, dtype):
    base, x = mlp(dtype), torch.randn(7, 10).to(dtype)
    before = base(x)
    model = get_peft_model(base, config(["lin0", "lin1"], init_weights=init, r=2, alpha=3.0))
    assert torch.equal(model(x), before)
    model.merge_adapter()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_init_weights_false_is_no_identity(dtype):
    base, x = mlp(dtype), torch.randn(7, 10).to(dtype)
    before = base(x)
    model = get_peft_model(base, config(["lin0", "lin1"]))
    assert (model(x) - before).abs().max() > 1e-2
    model.merge_adapter()
    assert (model(x) - before).abs().max() > 1e-2


def test_statistics_of_the_initial_weights():
    def factors(init):
        model = get_peft_model(
            nn.Sequential(nn.Linear(512, 512)), config("0", a_out=64, a_in=32, r=3, init_weights=init)
        )
        layer = model.base_model.model[0]
        return layer.krona_A["default"], layer.krona_B["default"]

    A, B = factors(True)  # A (3, 64, 32) ~ N(0, 1/64)
    assert not B.any() and A.std().item() == pytest.approx(1 / 64, rel=0.05) and abs(A.mean().item()) < 1e-3
    A, B = factors("kaiming")  # uniform with bound sqrt(6 / (1 + 5) / fan_in) = fan_in ** -0.5
    assert not B.any() and A.abs().max().item() == pytest.approx(32**-0.5, rel=0.01) and A.abs().max() <= 32**-0.5
    A, B = factors("cdka")
    assert not A.any() and B.abs().max().item() == pytest.approx(16**-0.5, rel=0.03) and B.abs().max() <= 16**-0.5
    A, B = factors(False)
    assert all(term.std() > 0 for factor in (A, B) for term in factor)
    assert not torch.equal(A[0], A[1])
