# SPDX-License-Identifier: Apache-2.0
"""What the settings with a few values may be: each as a type for annotations, and as a tuple of its values.

>>> from peft_krona.choices import SCALINGS, Scaling
>>> def trained_with(scaling: Scaling) -> str:
...     return f"s from {scaling}"
>>> SCALINGS
('alpha', 'rank', 'rslora', 'cdka')
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Scaling: TypeAlias = Literal["alpha", "rank", "rslora", "cdka"]  # how s follows from alpha: `config.scaling_factor`
Layout: TypeAlias = Literal["kron", "diffusekrona"]  # where A_i (x) B_i puts its entries: docs/math.md
Init: TypeAlias = Literal[True, False, "diffusekrona", "kaiming", "cdka"]  # of A and B: `KronAConfig.init_weights`
Bias: TypeAlias = Literal["none", "all", "krona_only"]  # which biases of the base model train
Order: TypeAlias = Literal["b_first", "a_first"]  # which factor x meets first
Backend: TypeAlias = Literal["torch", "triton"]  # what computes the products
Dtype: TypeAlias = Literal["fp32", "fp16", "bf16"]  # of the weights in a file

SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
INITS: tuple[Init, ...] = get_args(Init)
BIASES: tuple[Bias, ...] = get_args(Bias)
ORDERS: tuple[Order, ...] = get_args(Order)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
