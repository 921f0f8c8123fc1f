# SPDX-License-Identifier: Apache-2.0
"""Linear combinations of adapters.

The terms of a sum of Kronecker sums are the terms of its parts where these have one shape and layout: exact. Where they
have not, the nearest Kronecker sum is taken, which is exact too if its number of terms suffices.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import replace
from functools import reduce
from math import isfinite, log2
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTuner

from .adapter_names import check_adapter_name
from .choices import Layout
from .config import KronAConfig
from .errors import ConfigError
from .layers import KronALayer
from .ops import kron_delta_weight

logger = logging.getLogger(__name__)


class Combined(NamedTuple):
    """One layer's weighted sum: scale * sum_n A_n (x) B_n in `layout`, and how far it is from the sum of the parts.

    A: (r, a_out, a_in). B: (r, b_out, b_in, *kernel). error: ||dW - sum of parts||_F / ||sum of parts||_F; None where
    the terms are those of the parts, which is exact. scale: a power of two.
    """

    A: torch.Tensor
    B: torch.Tensor
    error: float | None
    scale: float = 1.0


def combine_adapters(
    model: BaseTuner,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    r: int | None = None,
) -> dict[str, float]:
    """See `KronAModel.add_weighted_adapter`."""
    weights = _check_arguments(model, adapters, weights, adapter_name, combination_type, r)
    check_adapter_name(model.model, adapter_name)
    layers = {name: m for name, m in model.model.named_modules() if isinstance(m, KronALayer)}
    parts = {
        name: [(a, w) for a, w in zip(adapters, weights, strict=True) if a in m.krona_A] for name, m in layers.items()
    }
    parts = {name: present for name, present in parts.items() if present}
    configs = {a: config for a, config in model.peft_config.items() if isinstance(config, KronAConfig)}
    layouts: list[Layout] = sorted({configs[a].layout for a in adapters}, reverse=True)  # "kron" first
    with torch.no_grad():
        choices = [
            (layout, {name: _combined(layers[name], present, layout, r) for name, present in parts.items()})
            for layout in layouts
        ]
    layout, combined = min(choices, key=lambda choice: sum(c.error or 0.0 for c in choice[1].values()))
    _report(adapter_name, combined)

    shapes = {name: tuple(c.A.shape) for name, c in combined.items()}
    r, a_out, a_in = Counter(shapes.values()).most_common(1)[0][0]
    alpha = Counter(c.scale for c in combined.values()).most_common(1)[0][0]
    config = replace(
        configs[adapters[0]],
        target_modules="|".join(re.escape(name) for name in sorted(parts)),  # a regex has to match a whole name
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        r=r,
        a_out=a_out,
        a_in=a_in,
        alpha=alpha,
        scaling="alpha",
        layout=layout,
        bias="none",
        strict_factors=True,
        rank_pattern={_exactly(name): shape[0] for name, shape in shapes.items() if shape[0] != r},
        alpha_pattern={_exactly(name): c.scale for name, c in combined.items() if c.scale != alpha},
        factor_pattern={
            _exactly(n): (out, n_in) for n, (_, out, n_in) in shapes.items() if (out, n_in) != (a_out, a_in)
        },
    )
    model.peft_config[adapter_name] = config
    model.inject_adapter(model.model, adapter_name)
    with torch.no_grad():
        for name, (A, B, *_) in combined.items():
            layer = layers[name]
            source = layer.krona_A[parts[name][0][0]]
            layer.krona_A[adapter_name].data = A.to(source.device, source.dtype)
            layer.krona_B[adapter_name].data = B.to(source.device, source.dtype)
            layer.set_requires_grad(adapter_name, False)
    return {name: c.error for name, c in combined.items() if c.error is not None}


def _combined(layer: KronALayer, parts: list[tuple[str, float]], layout: Layout, r: int | None) -> Combined:
    """The weighted sum on one layer in `layout`, with at most `r` terms (None: as many as the parts have together)."""
    first = layer.krona_A[parts[0][0]]
    dtype = torch.promote_types(first.dtype, torch.float32)
    c = _power_of_two(max(abs(w * float(layer.scaling[a])) for a, w in parts))
    terms = sum(len(layer.krona_A[a]) for a, _ in parts)
    room = terms if r is None else r
    sizes = {layer.factors(a) for a, _ in parts}
    if len(sizes) == 1 and {layer.layout[a] for a, _ in parts} == {layout} and terms <= room:
        A = torch.cat([layer.krona_A[a].to(dtype) * (w * layer.scaling[a] / c) for a, w in parts])
        return Combined(A, torch.cat([layer.krona_B[a].to(dtype) for a, _ in parts]), None, c)
    deltas = (
        kron_delta_weight(
            layer.krona_A[a].double(),
            layer.krona_B[a].double(),
            scale=w * float(layer.scaling[a]) / c,
            layout=layer.layout[a],
        )
        for a, w in parts
    )
    dW = reduce(torch.add, deltas)
    tried = (_nearest(dW, *factors, room, layout, first.dtype)._replace(scale=c) for factors in sorted(sizes))
    return min(tried, key=lambda c: (round(c.error or 0.0, 6), len(c.A)))  # below that, it is rounding that differs


def _power_of_two(strength: float) -> float:
    """What of the largest |w s| goes into s instead of A, so that 16-bit factors neither overflow nor vanish.

    >>> _power_of_two(0.7), _power_of_two(1e-6), _power_of_two(0.0)
    (1.0, 9.5367431640625e-07, 1.0)
    """
    exponent = round(log2(strength)) if strength else 0
    return 2.0**exponent if abs(exponent) > 6 else 1.0


def _nearest(dW: torch.Tensor, a_out: int, a_in: int, r: int, layout: Layout, dtype: torch.dtype) -> Combined:
    from .convert.nearest import nearest_kronecker  # only when it is needed: it comes with all file formats

    A, B, _ = nearest_kronecker(dW, a_out, a_in, r=r, layout=layout)
    size = A.flatten(1).norm(dim=1) * B.flatten(1).norm(dim=1)
    kept = size > torch.finfo(torch.float32).eps * size.amax()  # the others are what rounding left
    kept[0] = True
    A, B = A[kept].to(dtype), B[kept].to(dtype)
    norm = dW.norm().item()
    error = (kron_delta_weight(A.double(), B.double(), layout=layout) - dW).norm().item()
    return Combined(A, B, error / norm if norm else 0.0)


def _report(adapter_name: str, combined: dict[str, Combined]) -> None:
    near = {name: c for name, c in combined.items() if c.error is not None}
    row = "  {}: {:.1e} (r={}, a_out={}, a_in={})"
    lines = [row.format(name, c.error, *c.A.shape) for name, c in near.items()]
    if near:
        logger.warning(
            "Adapter %r: on %d of %d layers the adapters have different factors or layouts, or more terms than r. "
            "There it is the nearest Kronecker sum; the relative error of dW is\n%s",
            adapter_name,
            len(near),
            len(combined),
            "\n".join(lines),
        )


def _exactly(name: str) -> str:
    """A pattern key that matches this module and no other."""
    return f"^{re.escape(name)}"


def _check_arguments(
    model: BaseTuner,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    r: int | None,
) -> list[float]:
    """The weights as floats."""
    if combination_type != "linear":
        raise ConfigError(
            f"combination_type={combination_type!r} is not offered; use 'linear', which is exact for KronA."
        )
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ConfigError(f"r={r!r} is not allowed; expected an integer >= 1, or None for as many terms as there are.")
    if not isinstance(adapters, (list, tuple)) or not all(isinstance(name, str) for name in adapters):
        raise ConfigError(f"Expected a list of adapter names, got {adapters!r}.")
    weights = _numbers(weights)
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"Expected one weight an adapter, got {len(adapters)} adapters and {len(weights)} weights.")
    missing = [name for name in adapters if name not in model.peft_config]
    if missing:
        raise ConfigError(f"Adapter(s) {missing} do not exist; there are {sorted(model.peft_config)}.")
    others = [name for name in adapters if not isinstance(model.peft_config[name], KronAConfig)]
    if others:
        raise ConfigError(f"Adapter(s) {others} are no KronA adapters; only those can be combined here.")
    if adapter_name in model.peft_config:
        raise ConfigError(f"Adapter {adapter_name!r} exists already. Delete it first or choose another name.")
    if not all(isfinite(w) for w in weights):
        raise ConfigError(f"Weights must be finite, got {weights}.")
    if len(set(adapters)) != len(adapters):
        raise ConfigError(f"Each adapter may be named once, got {adapters}.")
    for name in adapters:
        for field, unused in (("modules_to_save", (None, [])), ("bias", ("none",))):
            value = getattr(model.peft_config[name], field)
            if value not in unused:
                raise ConfigError(
                    f"Cannot combine adapter {name!r}: it was trained with {field}={value!r}, which is no part of the "
                    "factors and would be left out. Merge instead, or combine adapters without it."
                )
    return weights


def _numbers(weights: Any) -> list[float]:
    """One float each, of numbers of Python, numpy or torch."""
    try:
        weights = list(weights)
        if not any(isinstance(w, (str, bytes)) for w in weights):
            return [float(w) for w in weights]
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"Expected a list of numbers as weights, got {weights!r}.")
