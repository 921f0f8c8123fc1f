# SPDX-License-Identifier: Apache-2.0
"""What every format is read into and written from: `LayerUpdate`, one layer, and `AdapterFile`, all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, lcm, log2, prod
from typing import Any

import torch
from torch import nn

from ..choices import LAYOUTS, Layout
from ..config import KronAConfig
from ..errors import FormatError, ShapeError
from ..ops import kron_delta_weight
from .peft_config import config_of
from .shapes import shapes_of_models

# A real layer is far below this (a 256k x 8k embedding has 2e9 entries); a small hostile file can declare far more.
MAX_LAYER_ELEMENTS = 2**32


@dataclass(frozen=True)
class LayerUpdate:
    """The Kronecker update of one layer: dW = scale * layout(sum_n A[n] (x) B[n]).

    Attributes:
        component: the pipeline's part: "unet", "transformer", "text_encoder", "text_encoder_2", ..., or "model".
        module: the layer's dotted name in that part. CLIP text encoders always as `text_model.encoder...`, whatever
            the installed transformers calls them.
        A: (r, a_out, a_in). B: (r, b_out, b_in), for convolutions (r, b_out, b_in, *kernel).
        scale: s. layout: "kron" or "diffusekrona".

    Raises:
        ShapeError: on construction, names the layer if A, B and layout do not belong together.

    >>> LayerUpdate("unet", "to_q", torch.zeros(1, 4, 2), torch.zeros(1, 8, 3)).shape
    (32, 6)
    """

    component: str
    module: str
    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0
    layout: Layout = "kron"

    def __post_init__(self) -> None:
        A, B = tuple(self.A.shape), tuple(self.B.shape)
        if len(A) != 3 or not 3 <= len(B) <= 6 or A[0] != B[0] or 0 in A + B:
            raise ShapeError(
                f"{self.name}: expected A (r, a_out, a_in) and B (r, b_out, b_in, *kernel) with one r and no empty "
                f"dimension, got A {A} and B {B}."
            )
        if self.layout not in LAYOUTS:
            raise ShapeError(f"{self.name}: layout={self.layout!r} is unknown; expected one of {LAYOUTS}.")
        if not isfinite(self.scale):
            raise ShapeError(f"{self.name}: scale={self.scale} is not a finite number.")
        if prod(self.shape) > MAX_LAYER_ELEMENTS:
            raise ShapeError(f"{self.name}: A {A} and B {B} stand for a weight of {self.shape}, larger than any layer.")

    @property
    def name(self) -> str:
        """component and module, for messages and as a key."""
        return f"{self.component}.{self.module}"

    @property
    def r(self) -> int:
        """Number of Kronecker terms."""
        return self.A.shape[0]

    @property
    def factors(self) -> tuple[int, int]:
        """(a_out, a_in)."""
        return self.A.shape[1], self.A.shape[2]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution, () for a Linear."""
        return tuple(self.B.shape[3:])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that is adapted: (out, in, *kernel)."""
        return (self.A.shape[1] * self.B.shape[1], self.A.shape[2] * self.B.shape[2], *self.kernel)

    def delta_weight(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """dW, shape `self.shape`, computed in `dtype`."""
        return kron_delta_weight(self.A.to(dtype), self.B.to(dtype), scale=self.scale, layout=self.layout)

    def terms(self) -> list[LayerUpdate]:
        """The layer's r terms as r layers with one term each."""
        return [replace(self, A=self.A[n : n + 1], B=self.B[n : n + 1]) for n in range(self.r)]

    def with_kernel(self, kernel: tuple[int, ...]) -> LayerUpdate:
        """The layer of a convolution whose kernel was stored in B's columns: dW is reshaped to (out, in, *kernel).

        The flattened input index is c * K + q for channel c and kernel position q, K = prod(kernel); the product splits
        it as k * width + v. If K divides width, a term stays one term. Otherwise it takes n = lcm(width, K) / width
        terms, of which term m holds the columns k = m (mod n) of A. Exact in both cases.

        Raises:
            ShapeError: if the layer has a kernel already, or its input is no multiple of this one.
        """
        K, (r, a_out, columns), (b_out, width) = prod(kernel), self.A.shape, self.B.shape[1:3]
        n = lcm(width, K) // width
        if self.kernel or columns % n:
            raise ShapeError(
                f"{self.name}: the shape {self.shape} cannot be reshaped to one with the kernel {kernel}, which a "
                "layer of this name has."
            )
        A = self.A.reshape(r, a_out, columns // n, n).permute(0, 3, 1, 2).reshape(r * n, a_out, columns // n)
        B = self.B.new_zeros(r, n, b_out, n, width)
        for m in range(n):
            B[:, m, :, m] = self.B
        return replace(self, A=A, B=B.reshape(r * n, b_out, n * width // K, *kernel))

    def balanced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in float64 with the scale folded into A, and balanced: see `balance`."""
        A, B = self.A.to(torch.float64), self.B.to(torch.float64)
        return balance(A * self.scale, B)


def balance(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """left * c and right / c with the power of two c that brings their largest absolute entries nearest to each other.

    That keeps half-precision copies as far from overflow and underflow as it can be, and rounds nothing by itself.

    >>> balance(torch.tensor([64.0]), torch.tensor([1.0]))
    (tensor([8.]), tensor([8.]))
    """
    top_left, top_right = left.abs().amax().item(), right.abs().amax().item()
    if top_left == 0 or top_right == 0:
        return left, right
    c = 2.0 ** round(log2(top_right / top_left) / 2)
    return left * c, right / c


@dataclass(frozen=True)
class AdapterFile:
    """Layers, what file they came from (`source`), and metadata to pass on.

    Attributes:
        layers: one `LayerUpdate` per adapted layer. source: name of the format it was read from.
        metadata: strings; known keys are `base_model` and `trigger_words`.

    Raises:
        FormatError: on construction, if there is no layer or one is there twice.
    """

    layers: tuple[LayerUpdate, ...]
    source: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise FormatError("The adapter has no layers. Is the file one of an adapter, and not empty?")
        twice = [name for name, count in Counter(layer.name for layer in self.layers).items() if count > 1]
        if twice:
            raise FormatError(f"The layer {twice[0]} is there more than once ({len(twice)} such). Keep one of them.")

    def __iter__(self) -> Iterator[LayerUpdate]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the pipeline's parts that it adapts, in order of appearance."""
        return tuple(dict.fromkeys(layer.component for layer in self.layers))

    def num_parameters(self) -> int:
        """Entries of all A and B."""
        return sum(layer.A.numel() + layer.B.numel() for layer in self.layers)

    def scaled(self, factor: float) -> AdapterFile:
        """The same adapter with every dW multiplied by `factor`."""
        return replace(self, layers=tuple(replace(layer, scale=layer.scale * factor) for layer in self.layers))

    def fitted(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> AdapterFile:
        """Checked against a base model, with 1 x 1 kernels as that model has them.

        Args:
            shapes: {component: {module: weight shape (out, in, *kernel)}}, CLIP names with `text_model.`; see
                `shapes_of_models` and `shapes_of_folder`.

        Raises:
            FormatError: names the layer that the base model lacks, or whose size differs, and both sizes.
        """
        return replace(self, layers=tuple(_fit(layer, shapes) for layer in self.layers))

    def peft_components(
        self, models: Mapping[str, Any] | None = None
    ) -> dict[str, tuple[KronAConfig, dict[str, torch.Tensor]]]:
        """A config and a state dict per component, as `get_peft_model`, `add_adapter` and `inject_adapter` take them.

        The state dict's keys are PEFT's, `base_model.model.<module>.krona_A` and `.krona_B`. Factors are as read; what
        differs between layers is in the config's patterns.

        Args:
            models: {component: model}, e.g. `pipe.components`. Given, every layer is checked against the model's and
                module names follow it. Without, the text encoders' names follow the installed transformers.

        Raises:
            FormatError: if two layouts are mixed in one component, or a layer is not in the model or does not fit it.
        """
        adapter = self
        if models is not None:
            models = {name: m for name, m in models.items() if isinstance(m, nn.Module) and name in self.components}
            adapter = self.fitted(shapes_of_models(models))
        return {
            component: config_of(
                component,
                [layer for layer in adapter.layers if layer.component == component],
                None if models is None else {name for name, _ in models[component].named_modules()},
            )
            for component in adapter.components
        }


def _fit(layer: LayerUpdate, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> LayerUpdate:
    if layer.component not in shapes:
        raise FormatError(
            f"{layer.name}: the base model has no {layer.component}; it has {', '.join(shapes) or 'nothing adaptable'}."
        )
    if layer.module not in shapes[layer.component]:
        raise FormatError(f"{layer.name}: the base model has no such layer. Is the adapter for another model?")
    wanted = tuple(shapes[layer.component][layer.module])
    if layer.shape == wanted:
        return layer
    if layer.shape == (wanted[0], prod(wanted[1:])):  # the kernel is in the columns
        return layer.with_kernel(wanted[2:])
    if layer.shape[:2] == wanted and prod(layer.kernel) == 1:  # a 1 x 1 convolution here is a Linear there
        return replace(layer, B=layer.B.reshape(layer.B.shape[:3]))
    raise FormatError(
        f"{layer.name}: A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} make a weight of {layer.shape}, but the "
        f"base model's is {wanted}. Is the adapter for another model?"
    )
