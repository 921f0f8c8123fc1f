# SPDX-License-Identifier: Apache-2.0
"""Other weights in an adapter's place: right values, no second compilation, no growth, and nothing half swapped."""

import gc

import pytest
import tiny
import torch
from adapted import assert_same_state, config, krona_layers, make_layer, mlp, reference, state_of
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import peft_krona
from peft_krona import KronAConfig
from peft_krona.errors import ConfigError, FormatError, MergeError
from peft_krona.hotswap import prepare, swap
from peft_krona.ops.reference import delta_weight_loop
from peft_krona.pipelines import add_krona, load_krona_weights, save_krona_weights

X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
BOTH = ["lin0", "lin1"]
# Other values, other s, other numbers of terms, by layer too; fewer layers
FITTING = {
    "other values": {},
    "other alpha": {"alpha": 0.3},
    "fewer terms": {"r": 1},
    "more terms": {"r": 3},
    "alpha over r": {"r": 1, "alpha": 2.0, "scaling": "rank"},
    "cdka": {"r": 2, "alpha": 2.0, "scaling": "cdka"},
    "by layer": {"rank_pattern": {"lin0": 1}, "alpha_pattern": {"lin1": 0.25}, "scaling": "rslora"},
    "fewer layers": {"targets": ["lin1"]},
    "dropout": {"krona_dropout": 0.5},
}


def adapter(folder, seed=0, **kwargs):
    """A PeftModel saved into `folder`."""
    torch.manual_seed(seed)
    kwargs = {"targets": BOTH, "r": 2, "alpha": 0.7, **kwargs}
    model = get_peft_model(mlp(), config(**kwargs)).eval()
    model.save_pretrained(str(folder))
    return model


@torch.no_grad()
def assert_acts_as(model, other):
    """Two adapted MLPs give the same outputs, up to fp32 rounding of sums of another length."""
    got, want = model(X), other(X)
    exact = mlp().double()
    for name, layer in krona_layers(other).items():
        A, B, s = layer.krona_A["default"], layer.krona_B["default"], layer.scaling["default"]
        exact.get_submodule(name.removeprefix("base_model.model.")).weight += delta_weight_loop(A, B, s, "kron")
    exact = exact(X.double())
    error, allowed = (got.double() - exact).abs().max(), (want.double() - exact).abs().max()
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("name", FITTING)
def test_swapping_by_peft(tmp_path, name):
    model, other = adapter(tmp_path / "old"), adapter(tmp_path / "new", seed=1, **FITTING[name])
    prepare_model_for_compiled_hotswap(model, target_rank=3)
    assert_acts_as(model, adapter(tmp_path / "old"))  # padding changes nothing
    ids = [id(p) for p in model.parameters()]
    hotswap_adapter(model, str(tmp_path / "new"), "default", torch_device="cpu")
    assert ids == [id(p) for p in model.parameters()]
    assert_acts_as(model, other)
    model.set_adapter("default")
    for layer in krona_layers(model).values():
        layer.set_scale("default", 0.5)
        layer.unscale_layer()
    assert_acts_as(model, other)
    model.save_pretrained(str(tmp_path / "again"))  # with settings that give the same s and r
    assert_acts_as(type(model).from_pretrained(mlp(), str(tmp_path / "again")).eval(), other)
    hotswap_adapter(model, str(tmp_path / "old"), "default", torch_device="cpu")
    assert_acts_as(model, adapter(tmp_path / "old"))
    model.merge_adapter()
    assert_acts_as(model, adapter(tmp_path / "old"))
    model.unmerge_adapter()
    assert all(torch.equal(model.base_model.model.get_submodule(n).weight, getattr(mlp(), n).weight) for n in BOTH)


def test_swapping_without_preparation_where_shapes_are_the_same(tmp_path):
    model, other = adapter(tmp_path / "old"), adapter(tmp_path / "new", seed=1, alpha=0.1)
    hotswap_adapter(model, str(tmp_path / "new"), "default", torch_device="cpu")
    assert_acts_as(model, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear as lora", "transformers Conv1D", "conv1d", "conv2d groups", "embedding"])
def test_every_kind_of_layer_can_be_prepared_and_swapped(kind, dtype):
    base, model, layer, x = make_layer(kind, dtype)
    r, shapes = layer.r["default"], [layer.krona_A["default"].shape, layer.krona_B["default"].shape]

    @torch.no_grad()
    def error():
        want, _ = reference(base, layer, x)
        return ((model(x).double() - want).abs().max() / want.abs().max()).item()

    before = error()
    prepare_model_for_compiled_hotswap(model, target_rank=r + 2, config=model.peft_config)
    assert layer.krona_A["default"].shape[0] == layer.r["default"] == model.peft_config["default"].r == r + 2
    assert error() <= 2 * before + torch.finfo(dtype).eps
    A, B = (torch.randn(shape) for shape in shapes)
    swap(model, config(r=r, alpha=-0.5), {"0.krona_A": A, "0.krona_B": B}, "default")
    assert torch.equal(layer.krona_A["default"][:r], A) and not layer.krona_A["default"][r:].any()
    assert float(layer.scaling["default"]) == -0.5 and error() <= 2 * before + torch.finfo(dtype).eps
    with peft_krona.merged(model):
        assert error() <= 4 * torch.finfo(dtype).eps


MISFITS = {
    "other factors": (
        {"a_out": 2}, FormatError, r"lin0 has krona_A \(2, 2, 2\) and krona_B \(2, 10, 5\) for \(2, 4, 2\)"),
    "too many terms": (
        {"r": 3}, FormatError, r"lin0 has 3 terms and there is room for 2 \(make room with enable_lora_hotswap"),
    "a layer too many": (
        {"targets": ["lin0", "lin1", "norm2"]}, FormatError, r"no layer for norm2.krona_A; no layer for norm2.krona_B"),
    "other layout": (
        {"layout": "diffusekrona"}, ValueError, r"Configs are incompatible: for layout, kron != diffusekrona"),
    "bias": ({"bias": "all"}, ConfigError, r"Cannot hotswap the new adapter into adapter 'default': bias='all' and"),
    "modules_to_save": (
        {"targets": ["lin0"], "modules_to_save": ["lin1"]}, ConfigError, r"mean whole weights, which are not swapped"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_leaves_the_old_adapter(tmp_path, name, monkeypatch):
    kwargs, error, message = MISFITS[name]
    model = adapter(tmp_path / "old")
    if name == "a layer too many":
        wide = mlp()
        wide.norm2 = torch.nn.Linear(4, 4)
        get_peft_model(wide, config(**{"r": 2, **kwargs})).save_pretrained(str(tmp_path / "new"))
    else:
        adapter(tmp_path / "new", **kwargs)
    before = state_of(model)
    with pytest.raises(error, match=message):
        hotswap_adapter(model, str(tmp_path / "new"), "default", torch_device="cpu")
    assert_same_state(model, before)


def test_merged_unknown_and_other_types(tmp_path):
    model = adapter(tmp_path / "old")
    model.merge_adapter()
    with pytest.raises(
        MergeError, match=r"Cannot hotswap adapter 'default' while \['default'\] are merged. Unmerge first"
    ):
        hotswap_adapter(model, str(tmp_path / "old"), "default", torch_device="cpu")
    with pytest.raises(MergeError, match=r"Cannot prepare the model for hotswapping while"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    model.unmerge_adapter()
    with pytest.raises(ConfigError, match=r"no KronA adapter 'typo' to hotswap; this model has \['default'\]"):
        hotswap_adapter(model, str(tmp_path / "old"), "typo", torch_device="cpu")
    before = state_of(model)
    with pytest.raises(ConfigError, match=r"Cannot pad adapter 'default' to 1 terms: it has 2 on lin0"):
        prepare_model_for_compiled_hotswap(model, target_rank=1)
    assert [p.shape for p in model.parameters()] == [t.shape for t in before["bits"].values()]
    get_peft_model(mlp(), LoraConfig(target_modules=BOTH)).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match=r"Incompatible PEFT types found: KRONA and LORA"):
        hotswap_adapter(model, str(tmp_path / "lora"), "default", torch_device="cpu")


def test_lora_is_swapped_as_before(tmp_path):
    lora = LoraConfig(target_modules=BOTH, r=2, init_lora_weights=False)
    model, other = get_peft_model(mlp(), lora).eval(), get_peft_model(mlp(), lora).eval()
    other.save_pretrained(str(tmp_path))
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    error = (model(X) - other(X)).abs().max()
    assert error <= 16 * torch.finfo(torch.float32).eps * other(X).abs().max()


def test_a_compiled_model_is_compiled_once_and_does_not_grow(tmp_path):
    """50 swaps of adapters with other values, s and r, with weights set in between."""
    others = [adapter(tmp_path / f"{i}", seed=i, **kwargs) for i, kwargs in enumerate(FITTING.values())]
    model = adapter(tmp_path / "old")
    prepare_model_for_compiled_hotswap(model, target_rank=3)
    compilations = 0

    def backend(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(X)
    first, tensors = compilations, None
    for count in range(50):
        i = count % len(others)
        hotswap_adapter(compiled, str(tmp_path / f"{i}"), "default", torch_device="cpu")
        assert_acts_as(compiled, others[i])
        if count in (9, 49):
            gc.collect()
            alive = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
            assert tensors is None or alive <= tensors
            tensors = alive
    for layer in krona_layers(model).values():
        layer.set_scale("default", 0.25)
    with torch.no_grad():
        compiled(X)
    assert first >= 1 and compilations == first


# -- pipelines ---------------------------------------------------------------------------------------------------------


def pipe_with(folder=None, **kwargs):
    pipe = tiny.sd_pipeline()
    if folder is not None:
        settings = {"a_out": 8, "a_in": 2, "init_weights": False, **kwargs}
        torch.manual_seed(len(folder.name))
        text = {"text_encoder_config": KronAConfig(**settings)} if folder.name.startswith("text") else {}
        add_krona(pipe, KronAConfig(**settings), **text)
        for model in (pipe.unet, pipe.text_encoder):
            for layer in krona_layers(model).values():
                layer.krona_B["default"].data.mul_(0.1)
        save_krona_weights(pipe, folder)
    return pipe


@pytest.mark.parametrize("how", ["load_krona_weights", "load_lora_adapter", "load_lora_weights"])
def test_swapping_in_a_pipeline(tmp_path, how):
    pipe_with(tmp_path / "old")
    want = tiny.image(pipe_with(tmp_path / "new one", r=2, alpha=0.5, scaling="rank"))
    pipe = pipe_with()
    pipe.enable_lora_hotswap(target_rank=2)
    load_krona_weights(pipe, tmp_path / "old", "a")
    if how == "load_krona_weights":
        assert load_krona_weights(pipe, tmp_path / "new one", "a", hotswap=True) == ["unet"]
    elif how == "load_lora_adapter":
        pipe.unet.load_lora_adapter(tmp_path / "new one", prefix="unet", adapter_name="a", hotswap=True)
    else:
        pipe.load_lora_weights(tmp_path / "new one", adapter_name="a", hotswap=True)
    assert set(pipe.unet.peft_config) == {"a"}
    assert torch.equal(tiny.image(pipe), want)  # s is a power of two: exact wherever it is multiplied in
    load_krona_weights(pipe, tmp_path / "new one", "a", 0.0, hotswap=True)
    assert torch.equal(tiny.image(pipe), tiny.image(pipe_with()))


def test_a_pipeline_is_swapped_whole_or_not_at_all(tmp_path):
    pipe_with(tmp_path / "text a")
    pipe_with(tmp_path / "unet alone")
    pipe_with(tmp_path / "text wide", a_out=4)
    pipe = pipe_with()
    load_krona_weights(pipe, tmp_path / "text a", "a")
    before = state_of(pipe.unet), state_of(pipe.text_encoder)
    with pytest.raises(FormatError, match=r"adapter 'a', which has weights for \['text_encoder'\] as well"):
        load_krona_weights(pipe, tmp_path / "unet alone", "a", hotswap=True)
    with pytest.raises(FormatError, match=r"cannot take the place of adapter 'a': .* has krona_A .* unchanged"):
        load_krona_weights(pipe, tmp_path / "text wide", "a", hotswap=True)
    with pytest.raises(ConfigError, match=r"There is no KronA adapter 'b' to hotswap; this model has \['a'\]"):
        load_krona_weights(pipe, tmp_path / "text a", "b", hotswap=True)
    assert_same_state(pipe.unet, before[0])
    assert_same_state(pipe.text_encoder, before[1])


def test_room_for_a_lora_rank_is_not_taken_silently(tmp_path, caplog):
    pipe_with(tmp_path / "old")
    pipe = pipe_with()
    pipe.unet.enable_lora_hotswap()  # 128, a LoRA rank
    load_krona_weights(pipe, tmp_path / "old", "a")
    assert "padded to 128 Kronecker terms" in caplog.text


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "4", None], ids=repr)
def test_a_number_of_terms_to_pad_to(rank):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), KronAConfig(target_modules=["0"], a_out=4, a_in=2))
    with pytest.raises(ConfigError, match=r"target_rank=.* is not allowed; expected an integer >= 1"):
        prepare(model, rank)
    assert model.base_model.model[0].r == {"default": 1}
