# SPDX-License-Identifier: Apache-2.0
"""The adapters that are compared, each as a function (frozen nn.Linear, a_out, a_in) -> adapted module.

Every provider's adapter is random and non-zero. `delta_weight` says what it should compute, so that the runner can
check a provider's numerics before it reports its speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn

import peft_krona
from peft_krona.ops import Frozen, backend, kron_delta_weight, kron_linear


class Adapted(nn.Module):
    """An adapted layer and the dW that it stands for."""

    def __init__(self, module: nn.Module, delta_weight: Callable[[], torch.Tensor | None]) -> None:
        super().__init__()
        self.module = module
        self.delta_weight = delta_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def frozen(linear: nn.Linear, a_out: int, a_in: int) -> Adapted:
    """The base layer alone; its input gets a gradient."""
    return Adapted(linear, lambda: None)


def _peft(linear: nn.Linear, config) -> Adapted:
    model = get_peft_model(nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    return Adapted(layer, lambda: layer.get_delta_weight("default"))


def lora(r: int) -> Callable[[nn.Linear, int, int], Adapted]:
    """PEFT LoRA of rank r."""

    def build(linear: nn.Linear, a_out: int, a_in: int) -> Adapted:
        return _peft(linear, LoraConfig(target_modules=["0"], r=r, lora_alpha=r, init_lora_weights=False))

    return build


def peft_lokr(linear: nn.Linear, a_out: int, a_in: int) -> Adapted:
    """PEFT LoKr with the settings of PEFT's own image-generation benchmark: r=32, decompose_factor=-1."""
    return _peft(linear, LoKrConfig(target_modules=["0"], r=32, alpha=32, decompose_factor=-1, init_weights=False))


def lycoris_lokr(bypass: bool) -> Callable[[nn.Linear, int, int], Adapted]:
    """LyCORIS LoKr, full factors, factor=-1: dW rebuilt each step, or applied factored ("bypass")."""

    def build(linear: nn.Linear, a_out: int, a_in: int) -> Adapted:
        from lycoris.modules.lokr import LokrModule

        module = LokrModule(
            "lokr", linear, multiplier=1.0, lora_dim=100_000, alpha=1.0, factor=-1, bypass_mode=bypass, full_matrix=True
        )
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
        module.apply_to()
        forward = linear.forward  # LyCORIS replaces the base layer's own forward
        holder = nn.Module()
        holder.lokr = module
        holder.forward = forward
        return Adapted(holder, lambda: module.get_diff_weight(1.0)[0])

    return build


class _Kron(nn.Module):
    """Base layer plus a Kronecker product, with the contraction as a function (x, A, B, base output)."""

    def __init__(self, linear: nn.Linear, a_out: int, a_in: int, contract: Callable) -> None:
        super().__init__()
        self.base, self.contract = linear, contract
        self.A = nn.Parameter(torch.randn(1, a_out, a_in) / a_out)
        self.B = nn.Parameter(torch.randn(1, linear.out_features // a_out, linear.in_features // a_in) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.contract(x, self.A, self.B, self.base(x))


def _kron(contract: Callable, layout: str = "kron") -> Callable[[nn.Linear, int, int], Adapted]:
    def build(linear: nn.Linear, a_out: int, a_in: int) -> Adapted:
        module = _Kron(linear, a_out, a_in, contract)
        return Adapted(module, lambda: kron_delta_weight(module.A, module.B, layout=layout))

    return build


def _released_order(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The contraction order of the released DiffuseKronA code: Y = up (X^T down), down = A^T."""
    X = x.view(*x.shape[:-1], A.shape[2], B.shape[2]).transpose(-1, -2)
    Y = B[0].to(x.dtype) @ (X @ A[0].T.to(x.dtype))
    return base + Y.flatten(-2)


def _dense(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return base + F.linear(x, kron_delta_weight(A, B).to(x.dtype))


def krona(linear: nn.Linear, a_out: int, a_in: int) -> Adapted:
    """peft_krona as a user gets it from get_peft_model."""
    config = peft_krona.KronAConfig(target_modules=["0"], a_out=a_out, a_in=a_in, init_weights=False)
    return _peft(linear, config)


class _Fused(_Kron):
    """As `krona` with PEFT_KRONA_BACKEND set: one node over the frozen layer."""

    def __init__(self, linear: nn.Linear, a_out: int, a_in: int, backend: str) -> None:
        super().__init__(linear, a_out, a_in, kron_linear)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = Frozen(self.base.weight, self.base.bias)
        return kron_linear(x, self.A, self.B, base=base, backend=self.backend)


def krona_on(backend: str) -> Callable[[nn.Linear, int, int], Adapted]:
    """peft_krona's one node over the frozen layer, on a backend."""

    def build(linear: nn.Linear, a_out: int, a_in: int) -> Adapted:
        module = _Fused(linear, a_out, a_in, backend)
        return Adapted(module, lambda: kron_delta_weight(module.A, module.B))

    return build


def _ours(order: str) -> Callable:
    return lambda x, A, B, base: kron_linear(x, A, B, base=base, order=order)


PROVIDERS: dict[str, Callable[[nn.Linear, int, int], Adapted]] = {
    "frozen": frozen,
    "PEFT LoRA r=4": lora(4),
    "PEFT LoRA r=16": lora(16),
    "PEFT LoKr": peft_lokr,
    "LyCORIS LoKr, rebuilt": lycoris_lokr(bypass=False),
    "LyCORIS LoKr, bypass": lycoris_lokr(bypass=True),
    "released order": _kron(_released_order, "diffusekrona"),
    "dW built": _kron(_dense),
    "KronA": krona,
    "KronA, triton": krona_on("triton"),
    "KronA op, B first": _kron(_ours("b_first")),
    "KronA op, A first": _kron(_ours("a_first")),
}

OTHER_BACKENDS = ("triton",)  # besides "torch", which needs no word in a provider's name


def on_backends(name: str, config: Any) -> dict[str, Any]:
    """The configuration under its name, and under "name, triton"."""
    return {name: config, **{f"{name}, {other}": config for other in OTHER_BACKENDS}}


def backend_of(provider: str) -> str:
    """The backend in a provider's name; "torch" if there is none."""
    other = provider.rpartition(", ")[2]
    return other if other in OTHER_BACKENDS else "torch"


def measured_on(device: str, providers: Iterable[str]) -> list[str]:
    """Those that run without being asked for: on a CPU, only what is on the torch backend."""
    return [name for name in providers if device == "cuda" or backend_of(name) == "torch"]


def on_backend(name: str, step: Callable[[], object]) -> Callable[[], None]:
    """The step with the Kronecker products of adapted models on one backend."""

    def run() -> None:
        before, backend.DEFAULT = backend.DEFAULT, name
        try:
            step()
        finally:
            backend.DEFAULT = before

    return run


def lycoris_kernels(device: str) -> str | None:
    """What LyCORIS computes its bypass mode with on this device; None if LyCORIS is not installed."""
    try:
        from lycoris.kernels.dispatch import resolve_backend
    except ImportError:
        return None
    return resolve_backend(device=torch.device(device)) if device == "cuda" else "torch"
