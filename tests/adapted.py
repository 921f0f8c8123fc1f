# SPDX-License-Identifier: Apache-2.0
"""Small models with KronA in them, and an independent float64 reference of an adapted layer."""

from __future__ import annotations

import copy
import warnings

import torch
from peft import get_peft_model
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from peft_krona import KronAConfig, KronALayer
from peft_krona.ops.reference import delta_weight_loop


def config(targets="0", **kwargs) -> KronAConfig:
    """Factors (4, 2), random A and B; single target names become a list."""
    targets = [targets] if isinstance(targets, str) and targets != "all-linear" else targets
    return KronAConfig(target_modules=targets, **{"a_out": 4, "a_in": 2, "init_weights": False, **kwargs})


def adapt(module: nn.Module, adapter_name: str = "default", **kwargs):
    """(PeftModel, adapted layer) of one module on its own."""
    model = get_peft_model(nn.Sequential(module), config(**kwargs), adapter_name=adapter_name)
    return model, model.base_model.model[0]


class MLP(nn.Module):
    """Two Linears of different shapes, and a norm with a bias between them."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, dtype=dtype)
        self.norm = nn.LayerNorm(20, dtype=dtype)
        self.lin1 = nn.Linear(20, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.norm(self.lin0(x)).relu())


def mlp(dtype: torch.dtype | None = None, seed: int = 0) -> MLP:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(dtype)


def adapted_mlp(adapter_name: str = "default", dtype: torch.dtype | None = None, **kwargs):
    """A PeftModel over `mlp()` with both Linears adapted."""
    kwargs.setdefault("targets", ["lin0", "lin1"])
    return get_peft_model(mlp(dtype), config(**kwargs), adapter_name=adapter_name)


def krona_layers(model: nn.Module) -> dict[str, KronALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KronALayer)}


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = [name for name in before if not torch.equal(after[name], before[name])]
    assert not changed, f"changed: {changed}"


def state_of(model: nn.Module) -> dict:
    """Everything that a failed operation must leave as it was: modules, weights' identity and bits, flags, adapters."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "peft_config": dict(getattr(model, "peft_config", {})),
        "has_peft_config": hasattr(model, "peft_config"),
        "loaded": getattr(model, "_hf_peft_config_loaded", None),
        "adapters": {
            name: (list(layer.active_adapters), dict(layer.r), dict(layer.scaling), list(layer.krona_A))
            for name, layer in krona_layers(model).items()
        },
    }


def assert_same_state(model: nn.Module, before: dict) -> None:
    after = state_of(model)
    bits, bits_before = after.pop("bits"), before["bits"]
    assert bits.keys() == bits_before.keys()
    assert all(torch.equal(bits[name], bits_before[name]) for name in bits)
    for key, value in after.items():
        assert value == before[key], key


# -- the reference -----------------------------------------------------------------------------------------------------

# name: (factory of the base layer, shape of x or (shape, vocabulary) of ids, (a_out, a_in), r)
LAYERS = {
    "linear b_first": (lambda: nn.Linear(12, 8), (2, 3, 12), (4, 2), 1),
    "linear a_first r3": (lambda: nn.Linear(12, 8), (5, 12), (2, 6), 3),
    "linear no bias": (lambda: nn.Linear(10, 15, bias=False), (4, 10), (5, 2), 2),
    "linear one vector": (lambda: nn.Linear(12, 8), (12,), (4, 2), 1),
    "linear as lora": (lambda: nn.Linear(12, 8), (5, 12), (8, 1), 2),
    "linear a is 1x1": (lambda: nn.Linear(12, 8), (5, 12), (1, 1), 1),
    "linear b is 1x1": (lambda: nn.Linear(12, 8), (5, 12), (8, 12), 1),
    "non-dynamic linear": (lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(12, 8), (5, 12), (4, 2), 1),
    "transformers Conv1D": (lambda: Conv1D(8, 12), (2, 5, 12), (4, 3), 2),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9), (4, 2), 1),
    "conv1d k5 dilated reflect": (
        lambda: nn.Conv1d(6, 8, 5, padding=4, dilation=2, padding_mode="reflect"), (2, 6, 11), (2, 3), 2),
    "conv1d depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6, padding="same"), (2, 6, 7), (3, 1), 1),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 7, 7), (4, 3), 1),
    "conv2d 1x1": (lambda: nn.Conv2d(12, 4, 1), (2, 12, 3, 5), (2, 6), 2),
    "conv2d oblong": (lambda: nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2)), (2, 4, 5, 6), (3, 2), 1),
    "conv2d same circular": (
        lambda: nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="circular"), (2, 4, 6, 7), (3, 2), 2),
    "conv2d same dilated": (
        lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False), (2, 4, 6, 7), (2, 4), 1),
    "conv2d replicate": (
        lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="replicate"), (2, 4, 6, 7), (2, 2), 1),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 6, 7), (2, 2), 1),
    "conv2d groups": (lambda: nn.Conv2d(8, 12, 3, groups=4, padding=1), (2, 8, 5, 5), (4, 2), 2),
    "conv2d groups cut a term": (lambda: nn.Conv2d(6, 12, 3, groups=3, padding=1), (2, 6, 5, 5), (2, 2), 1),
    "conv2d groups reflect": (
        lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1, padding_mode="reflect"), (2, 8, 5, 5), (6, 2), 1),
    "conv2d one image": (lambda: nn.Conv2d(6, 8, 3), (6, 5, 5), (4, 2), 1),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, stride=(1, 2, 1)), (2, 4, 3, 4, 5), (3, 2), 2),
    "conv3d same circular": (
        lambda: nn.Conv3d(4, 6, 3, padding="same", padding_mode="circular"), (1, 4, 3, 4, 3), (3, 2), 1),
    "embedding": (lambda: nn.Embedding(20, 6), ((2, 5), 20), (3, 4), 2),
    "embedding padding": (lambda: nn.Embedding(15, 8, padding_idx=0), ((7,), 15), (4, 3), 1),
}  # fmt: skip


def make_layer(name: str, dtype: torch.dtype, layout: str = "kron", **kwargs):
    """(base layer, peft model, adapted layer, input) of a row of LAYERS."""
    factory, shape, (a_out, a_in), r = LAYERS[name]
    base = factory().to(dtype)
    for parameter in base.parameters():  # Conv1D's bias, among others, starts at zero
        torch.nn.init.normal_(parameter, std=0.5)
    kwargs = {"a_out": a_out, "a_in": a_in, "r": r, "layout": layout, "alpha": 0.7, **kwargs}
    model, layer = adapt(copy.deepcopy(base), **kwargs)
    assert layer.factors(kwargs.get("adapter_name", "default")) == (a_out, a_in), (
        "the table asks for factors that do not divide"
    )
    for parameter in (*layer.krona_A.values(), *layer.krona_B.values()):
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randint(0, shape[1], shape[0]) if isinstance(shape[0], tuple) else torch.randn(shape).to(dtype)
    return base, model, layer, x


def delta_in_base_shape(base: nn.Module, delta: torch.Tensor) -> torch.Tensor:
    """dW (out, in, ...) as the base layer stores its weight."""
    return delta.T if isinstance(base, (Conv1D, nn.Embedding)) else delta


def assert_rounded_once(got: torch.Tensor, exact: torch.Tensor, base: torch.Tensor) -> None:
    """`got` is the float64 sum `exact` over the weight `base`, computed in fp32 (fp64), rounded once to its dtype."""
    fine = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    info = torch.finfo(got.dtype)
    allowed = exact.abs() * info.eps / 2 + 4 * fine * (exact.abs() + base.double().abs() + 1)
    assert ((got.double() - exact).abs() <= allowed.clamp(min=info.smallest_normal * info.eps)).all()


def factor_gradients(G: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, layout: str):
    """(dA, dB) in float64 from the gradient G of dW, by the index formula in a loop."""
    A, B, G = A.detach().double(), B.detach().double(), G.double()
    r, a_out, a_in = A.shape
    _, b_out, b_in, *_ = B.shape
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    for n in range(r):
        for i in range(a_out):
            for k in range(a_in):
                for u in range(b_out):
                    row = i * b_out + u if layout == "kron" else u * a_out + i
                    block = G[row, k * b_in : (k + 1) * b_in]
                    dA[n, i, k] += scale * (block * B[n, u]).sum()
                    dB[n, u] += scale * A[n, i, k] * block
    return dA, dB


def reference(base: nn.Module, layer: KronALayer, x: torch.Tensor, dy: torch.Tensor | None = None, name="default"):
    """Output and gradients {"x", "A", "B"} of the adapted layer, in float64, from a dense weight W + dW."""
    base = copy.deepcopy(base).double()
    A, B, scale, layout = layer.krona_A[name], layer.krona_B[name], layer.scaling[name], layer.layout[name]
    delta = delta_weight_loop(A, B, scale, layout)
    weight = (base.weight.detach() + delta_in_base_shape(base, delta)).requires_grad_()
    x64 = x.detach().double().requires_grad_() if x.is_floating_point() else x
    if isinstance(base, nn.Embedding):
        base.padding_idx = None  # the padding row gets no gradient from nn.Embedding, but dW has no such row
    y = functional_call(base, {"weight": weight}, (x64,))
    if dy is None:
        return y.detach(), None
    leaves = (weight, x64) if x.is_floating_point() else (weight,)
    G, *dx = torch.autograd.grad(y, leaves, dy.double())
    dA, dB = factor_gradients(delta_in_base_shape(base, G), A, B, scale, layout)
    return y.detach(), {"A": dA, "B": dB} | ({"x": dx[0]} if dx else {})


def assert_within_rounding(base, layer, x, dy, y, gradients, dtype, name="default"):
    """Output and gradients against float64, entry by entry, allowing for 4 eps of the dtype computed in.

    Relative to what? All are sums of products, so to the same sum with every input's absolute value: a rounding of
    any factor, product or partial sum changes the result by at most eps/2 of that. Chains here are up to 8 roundings.
    """
    expected, expected_gradients = reference(base, layer, x, dy, name)
    sums, sums_of_gradients = reference(*_absolute(base, layer, x, dy, name))
    eps = torch.finfo(dtype).eps
    pairs = [("y", y, expected, sums)]
    pairs += [(f"d{k}", g, expected_gradients[k], sums_of_gradients[k]) for k, g in gradients.items()]
    for what, got, want, size in pairs:
        error = ((got.detach().double() - want).abs() / (eps * size).clamp(min=1e-300)).max().item()
        assert error <= 4, f"{what} is off by {error:.1f} eps"


def _absolute(base, layer, x, dy, name):
    base, layer = copy.deepcopy(base), copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in (*base.parameters(), *layer.parameters()):
            parameter.abs_()
    layer.scaling[name] = abs(layer.scaling[name])
    return base, layer, x.detach().abs(), dy.abs(), name


def gradients(layer: KronALayer, y: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, name="default"):
    leaves = {"A": layer.krona_A[name], "B": layer.krona_B[name]} | ({"x": x} if x.is_floating_point() else {})
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def quiet(function, *args, **kwargs):
    """Call without PEFT's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)
