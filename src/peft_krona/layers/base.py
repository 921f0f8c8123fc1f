# SPDX-License-Identifier: Apache-2.0
"""`KronALayer`: the state of an adapted layer, merging, and the way its forward takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from numbers import Real
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import (
    QuantizationBackend,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from torch import nn

from .._compat import is_offloaded
from ..choices import Init, Layout
from ..config import KronAConfig, scaling_factor
from ..errors import ConfigError, MergeError, UnsupportedLayerError
from ..factors import choose_factors
from .base_weight import BaseWeightSnapshot, Share, dequantized, is_float8, subtract_with_warning
from .offload import onloaded


class FactorDict(nn.ParameterDict):
    """Factors by adapter name. To `Module.to(memory_format=...)` they look like matrices, not like images."""

    def __getitem__(self, key: str) -> Any:
        parameter = self._parameters.get(key)  # ParameterDict's own way takes several times as long
        return super().__getitem__(key) if parameter is None else parameter

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FactorDict:
        return super()._apply(lambda t: fn(t.flatten(1)).view(t.shape), recurse)


class KronALayer(nn.Module, BaseTunerLayer):
    """Base of every layer that KronA adapts: dW = s * layout(sum_{i=1..r} A_i (x) B_i) beside a frozen base layer.

    Attributes (dicts by adapter name):
        krona_A: (r, a_out, a_in). krona_B: (r, b_out, b_in), for convolutions (r, b_out, b_in, *kernel).
        r, alpha, scaling: number of terms, alpha, and s as it is applied now (scaling times any weight set since); a
            tensor in a model that is prepared for hotswapping.
        base_scaling: s as the config defines it. layout: "kron" or "diffusekrona".
    """

    adapter_layer_names: tuple[str, ...] = ("krona_A", "krona_B")
    other_param_names: tuple[str, ...] = (
        "r",
        "alpha",
        "scaling",
        "base_scaling",
        "layout",
        "krona_dropout",
        "module_dropout",
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: KronAConfig, **kwargs: Any) -> None:
        """`kwargs`: `name` as `update_layer` takes it, and PEFT's quantization arguments."""
        super().__init__()
        self.base_layer = base_layer
        self.krona_A = FactorDict({})
        self.krona_B = FactorDict({})
        self.krona_dropout = nn.ModuleDict({})
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float | torch.Tensor] = {}
        self.base_scaling: dict[str, float] = {}
        self.layout: dict[str, Layout] = {}
        self.module_dropout: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True
        self._snapshot: BaseWeightSnapshot | None = None
        self._shares: list[Share] = []  # what was merged, in the order of `merged_adapters`

        base = self.get_base_layer()
        self._quantization_kwargs: dict[str, Any] = kwargs.pop("quantization_kwargs", {})
        self._quantization: tuple[tuple[type, type], QuantizationBackend | None] | None = None
        _ = self.quantization_backend  # looked up now, as torch.compile cannot look into it
        self._active_adapter = adapter_name
        for module in (self, self.krona_A, self.krona_B, self.krona_dropout):
            module.training = base.training  # no dropout in a model that is in eval mode
        self.update_layer(adapter_name, config, **kwargs)

    # -- what the layer types define ----------------------------------------------------------------------------

    def _features(self, base: nn.Module) -> tuple[int, int]:
        """(in, out): what a_in * b_in and a_out * b_out must be."""
        n_in, n_out = _get_in_out_features(base)
        if n_in is None or n_out is None:
            raise UnsupportedLayerError(
                f"Cannot adapt a {type(base).__name__}: it has no in_features and out_features."
            )
        return n_in, n_out

    def _kernel(self) -> tuple[int, ...]:
        """Trailing dimensions of krona_B."""
        return ()

    def _adapted(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base layer plus the named adapters."""
        result = self.base_layer(x, *args, **kwargs)
        for name in names:
            result = self._add_delta(result, x, name)
        return result

    # -- adapters -----------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: KronAConfig, name: str = "layer") -> None:
        """Add an adapter with the settings that `config` has for the layer called `name`.

        Raises:
            FactorError: with config.strict_factors, if a factor does not divide this layer's size.
            MergeError: if an adapter of that name is merged into this layer.
        """
        if adapter_name in self.merged_adapters:
            raise MergeError(
                f"Cannot add adapter {adapter_name!r} to '{name}': an adapter of that name is merged into its base "
                "weight. Unmerge it first (unmerge_adapter(), or unfuse_lora() in diffusers), or choose another name."
            )
        n_in, n_out = self.in_features, self.out_features = self._features(self.get_base_layer())
        r, alpha, factors = config.for_layer(name)
        a_out, a_in = choose_factors(n_out, n_in, *factors, strict=config.strict_factors, layer=name)
        self.r[adapter_name] = r
        self.alpha[adapter_name] = alpha
        self.base_scaling[adapter_name] = scaling_factor(config.scaling, alpha, r, a_in)
        self.scaling[adapter_name] = self.base_scaling[adapter_name]
        self.layout[adapter_name] = config.layout
        self.module_dropout[adapter_name] = config.module_dropout
        dropout = nn.Dropout(config.krona_dropout) if config.krona_dropout else nn.Identity()
        self.krona_dropout[adapter_name] = dropout.train(self.training)
        self.krona_A[adapter_name] = nn.Parameter(torch.empty(r, a_out, a_in))
        self.krona_B[adapter_name] = nn.Parameter(torch.empty(r, n_out // a_out, n_in // a_in, *self._kernel()))
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> tuple[int, int]:
        """(a_out, a_in) of an adapter on this layer."""
        _, a_out, a_in = self.krona_A[adapter_name].shape
        return a_out, a_in

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init_weights: Init) -> None:
        """Initialise A and B (see `KronAConfig.init_weights`); all but False leave dW = 0 exactly."""
        A, B = self.krona_A[adapter_name], self.krona_B[adapter_name]
        if init_weights is True or init_weights == "diffusekrona":
            nn.init.normal_(A, std=1 / A.shape[1])
            nn.init.zeros_(B)
            return
        for factor, zero in ((A, init_weights == "cdka"), (B, init_weights == "kaiming")):
            if zero:
                nn.init.zeros_(factor)
            else:
                for term in factor:  # each term is a matrix of its own: fan-in counts its columns
                    nn.init.kaiming_uniform_(term, a=5**0.5)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Weight an adapter: s = scale * the scaling of its config. Unknown names are ignored, as PEFT's LoRA does.

        Raises:
            ConfigError: if `scale` is no finite number.
        """
        if adapter in self.scaling:
            self._set_scaling(adapter, finite_weight(scale) * self.base_scaling[adapter])

    def scale_layer(self, scale: float) -> None:
        """Multiply s of the active adapters.

        Raises:
            ConfigError: if `scale` is NaN or infinite: dividing by it would not give s back.
        """
        if isinstance(scale, float) and scale - scale != 0:  # torch.compile follows no `isfinite`
            finite_weight(scale)
        for name in self.active_adapters:
            if name in self.scaling and scale != 1:
                self._set_scaling(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide s of the active adapters by `scale`; None restores what their config says."""
        for name in self.active_adapters:
            if name in self.scaling:
                self._set_scaling(name, self.base_scaling[name] if scale is None else self.scaling[name] / scale)

    def _set_scaling(self, name: str, s: float | torch.Tensor) -> None:
        current = self.scaling[name]
        if isinstance(current, torch.Tensor):  # of a model that is prepared for hotswapping: keep the tensor
            current.fill_(s)
        else:
            self.scaling[name] = s

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        # Where PEFT puts new factors. An 8-bit float is a weight's storage, nothing computes or trains in it.
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return device, torch.float32 if dtype is not None and is_float8(dtype) else dtype

    @property
    def quantization_backend(self) -> QuantizationBackend | None:  # type: ignore[override]  # PEFT has an attribute
        """How PEFT reads and writes the base weight; None where it is not quantized.

        Looked up anew when the base layer or its weight has become one of another class: models are quantized and
        dequantized with adapters in them.
        """
        base = self.get_base_layer()
        classes = type(base), type(base._parameters.get("weight"))
        if self._quantization is None or self._quantization[0] != classes:
            self._quantization = classes, resolve_quantization_backend(base, **self._quantization_kwargs)
        return self._quantization[1]

    # -- merging ------------------------------------------------------------------------------------------------

    def get_base_weight(self) -> torch.Tensor:
        """The base weight, dequantized where it is quantized."""
        if self.quantization_backend is not None:
            return dequantized(self.quantization_backend, self.get_base_layer())
        return super().get_base_weight()

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """dW of one adapter in the base weight's shape, contiguous, in the factors' dtype as PEFT's tuners give it.

        Merging adds the unrounded fp32 product.
        """
        delta = self._in_base_shape(self._share(adapter_name).delta_weight())
        return delta.to(self.krona_A[adapter_name].dtype)

    def _share(self, name: str) -> Share:
        return Share(name, self.krona_A[name], self.krona_B[name], self.scaling[name], self.layout[name])

    def _in_base_shape(self, delta: torch.Tensor) -> torch.Tensor:
        """dW (out, in, *kernel) as the base layer stores its weight, contiguous."""
        return delta

    def _summed_delta(self, shares: Sequence[Share], device: torch.device) -> torch.Tensor:
        delta, *others = (self._in_base_shape(share.delta_weight()).to(device) for share in shares)
        for other in others:
            delta = delta + other
        return delta

    def _weight_with(self, shares: Sequence[Share]) -> torch.Tensor:
        """What the base weight becomes when `shares` are merged too: one sum over the original, rounded once."""
        if self._snapshot is not None and self._snapshot.untouched():
            return self._sum(self._snapshot.original(self), [*self._shares, *shares])
        return self._sum(self.get_base_weight(), shares)  # nothing is merged, or something else changed it since

    def _sum(self, weight: torch.Tensor, shares: Sequence[Share]) -> torch.Tensor:
        delta = self._summed_delta(shares, weight.device)
        return (weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta).to(weight.dtype)

    def check_merge(self, adapter_names: list[str] | None = None, *, check_finite: bool = False) -> None:
        """Raise what `merge` would raise, without changing anything.

        Raises:
            MergeError: if the base is quantized in a way that cannot be written back, or stored as 8-bit floats.
            ValueError: (PEFT's message) with `check_finite`, if the merged weight has NaN or infinite values.
        """
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise MergeError(
                f"Cannot merge into a {backend.backend_name} layer: its weight cannot be dequantized and written back. "
                "Use the adapter unmerged, or load the base model unquantized and merge into that."
            )
        dtype = getattr(getattr(self.get_base_layer(), "weight", None), "dtype", None)
        if backend is None and dtype is not None and is_float8(dtype):
            raise MergeError(
                f"Cannot merge into a weight that is stored as {dtype}: rounding to it would lose most of the update. "
                "Use the adapter unmerged, or merge before the weights are cast (before enable_layerwise_casting)."
            )
        if check_finite:
            wanted = self.active_adapters if adapter_names is None else adapter_names
            names = [name for name in wanted if name in self.krona_A and name not in self.merged_adapters]
            for count, name in enumerate(names, start=1):
                if not torch.isfinite(self._weight_with([self._share(n) for n in names[:count]])).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight; `unmerge` restores it bit for bit.

        All merged adapters are summed in fp32 (fp64 for fp64) and added to the original weight once. While anything is
        merged, the original weight is kept on its device (one extra copy of every merged layer's weight), and a copy
        of the merged factors: what happens to an adapter afterwards does not change what was merged of it.

        Args:
            safe_merge: refuse a result with NaN or infinite values, before the base weight is touched.
            adapter_names: adapters to merge; None merges the active ones.

        Raises:
            MergeError, ValueError: see `check_merge`.
        """
        self._forget_if_reloaded()
        adapter_names = check_adapters_to_merge(self, adapter_names)
        adapter_names = [name for name in adapter_names if name in self.krona_A]
        if not adapter_names:
            return
        self.check_merge(adapter_names, check_finite=safe_merge)
        with _tensors_as(self.get_base_layer()):
            shares = [self._share(name).kept() for name in adapter_names]
            weight = self._weight_with(shares)
            snapshot = self._snapshot or BaseWeightSnapshot(self)
            known = self._snapshot is None or snapshot.untouched()
            self.set_base_weight(weight)
            if known:
                snapshot.seal()
        self._snapshot = snapshot
        self._shares.extend(shares)
        self.merged_adapters.extend(adapter_names)

    def unmerge(self, keep: int = 0) -> None:
        """Restore the base weight to what it was before the first merge, bit for bit.

        Args:
            keep: leave the first so many of `merged_adapters` merged.
        """
        self._forget_if_reloaded()
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        kept, gone = self._shares[:keep], self._shares[keep:]
        if gone and self._snapshot is not None:
            with _tensors_as(self.get_base_layer()):
                self._take_out(self._snapshot, kept, gone)
        self._shares, self.merged_adapters = kept, [share.name for share in kept]
        if not kept:
            self._snapshot = None

    def _take_out(self, snapshot: BaseWeightSnapshot, kept: list[Share], gone: list[Share]) -> None:
        if not snapshot.untouched():
            weight = self.get_base_weight()
            delta = self._summed_delta(gone, weight.device)
            self.set_base_weight(subtract_with_warning(weight, delta, type(self).__name__))
        elif kept:
            self.set_base_weight(self._sum(snapshot.original(self), kept))
            snapshot.seal()
        else:
            snapshot.restore()

    def _forget_if_reloaded(self) -> None:
        if self._snapshot is not None and not self._snapshot.untouched() and self._snapshot.reloaded():
            self._snapshot, self._shares, self.merged_adapters = None, [], []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` may convert this layer (dense layers only)."""
        return False

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Base layer plus active adapters. `adapter_names`, one name a sample, mixes adapters in a batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            with onloaded(self.krona_A, self.krona_B):
                return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        names = [] if self.merged else [name for name in self.active_adapters if name in self.scaling]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        modules: dict[str, Any] = self._modules  # by attribute takes longer
        if is_offloaded(modules["krona_A"]):
            with onloaded(self.krona_A, self.krona_B):
                return self._adapted(x, names, *args, **kwargs)
        return self._adapted(x, names, *args, **kwargs)

    def _check_adapter_names(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """One adapter a sample; "__base__" and adapters that this layer lacks leave their samples alone."""
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.krona_A:
                rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
                result[rows] = self._add_delta(result[rows], x[rows], name)
        return result

    def _add_delta(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """result + one adapter's part for x, in result's dtype."""
        raise NotImplementedError

    def _scale(self, name: str) -> float | torch.Tensor:
        """s, or s times 0 or 1 where module_dropout draws (a tensor: no branch on data, so no graph break)."""
        scale = self.scaling[name]
        if self.training and self.module_dropout[name]:
            keep = torch.rand((), device=self.krona_A[name].device) >= self.module_dropout[name]
            return scale * keep.to(self.krona_A[name].dtype)
        return scale

    def extra_repr(self) -> str:
        """r, factors, layout per adapter, in PEFT's style of nested containers."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "krona." + super().__repr__()


def finite_weight(weight: Any) -> Any:
    """An adapter's weight, a number of Python or numpy as a float; a tensor is taken as it is.

    Raises:
        ConfigError: if it is NaN, infinite or no number: everything that is drawn would be NaN.
    """
    if isinstance(weight, torch.Tensor):
        return weight
    if isinstance(weight, Real) and isfinite(weight):
        return float(weight)
    raise ConfigError(f"An adapter's weight should be a finite number, got {weight!r}.")


@contextmanager
def _tensors_as(base: nn.Module) -> Iterator[None]:
    """No graph, and new tensors of the kind that the base weight is, inside torch.inference_mode or not.

    A weight that can be trained must stay so; an inference tensor cannot take an ordinary one's values.
    """
    weight = getattr(base, "weight", None)
    with torch.inference_mode(isinstance(weight, torch.Tensor) and weight.is_inference()), torch.no_grad():
        yield
