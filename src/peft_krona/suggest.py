# SPDX-License-Identifier: Apache-2.0
"""`suggest_factors`: the factors and terms that a size budget buys on a model, counted exactly before a run."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft import get_peft_model
from torch import nn

from .choices import DTYPES, Dtype
from .config import PEFT_PREFIX, KronAConfig
from .errors import ConfigError, FactorError
from .factors import choose_factors, contraction_cost, divisors, num_parameters
from .layers import Embedding, KronALayer
from .share import Share, share_of
from .skeleton import Source, skeleton

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_NAMES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}  # in a safetensors header
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SIZES = {f"{unit}{b}": base**power for b, base in (("b", 1000), ("ib", 1024)) for power, unit in enumerate("kmg", 1)}
_ADAPTER = "plan"
BEST_A_IN, LEAST_A_IN = 4, 2  # the paper's best, and the smallest that it tried
RATE, WIDTH = 5e-4, 1280  # the paper's rate, with (64, 4) on SDXL, and what most layers there have as their input
RATE_SAYS = (
    "to start with, for Adam, scaling='alpha', alpha=1: the paper's 5e-4 (SDXL, 500 steps) times (1280/(r in))^(1/4).",
    "Where it was measured, the best one hardly depends on the factors (docs/math.md). It was not tried on this model.",
)


class LayerShape(NamedTuple):
    """What of a target layer the counts depend on."""

    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    is_lookup: bool = False  # an embedding: no products


class Choice(NamedTuple):
    """One setting for all target layers."""

    a_out: int
    a_in: int
    r: int


@dataclass(frozen=True)
class Option:
    """One choice of (a_out, a_in) and r on all target layers, and what it costs.

    Attributes:
        parameters: trainable numbers. file_bytes: {dtype: bytes of adapter_model.safetensors}, exact.
        added_flops: per token (per position of an image's features) in a forward pass, 2 for a multiply-add.
    """

    a_out: int
    a_in: int
    r: int
    parameters: int
    file_bytes: dict[Dtype, int]
    added_flops: int


@dataclass(frozen=True)
class FactorPlan:
    """What `suggest_factors` found; `print` it for a table.

    Attributes:
        model: what was counted, in words. layers: number of target layers. share: of the model's weights.
        layer_flops: of the target layers themselves, per token.
        learning_rate: to start with, for Adam and `scaling="alpha"`: the paper's 5e-4 times (1280/(r in))^(1/4),
            geometric mean over the layers. docs/math.md has reasons and measurements; the model itself was not tried.
        chosen: the suggestion. options: it and its neighbours, by size.
        budget: as given. target_modules: as in `KronAConfig`; None is the model's default.
    """

    model: str
    layers: int
    share: Share
    layer_flops: int
    learning_rate: float
    chosen: Option
    options: tuple[Option, ...]
    budget: str
    target_modules: list[str] | str | None = field(default=None)

    def config(self, **settings: Any) -> KronAConfig:
        """The `KronAConfig` of the suggestion; `settings` are its other fields."""
        chosen = {"a_out": self.chosen.a_out, "a_in": self.chosen.a_in, "r": self.chosen.r}
        return KronAConfig(**{"target_modules": self.target_modules, **chosen, **settings})

    def __str__(self) -> str:
        titles = ("", "a_out", "a_in", "r", "parameters", "fp32 file", "fp16 file", "added FLOPs")
        rows: list[tuple[str, ...]] = [titles]
        for option in self.options:
            flops = f"{option.added_flops / self.layer_flops:.1%}" if self.layer_flops else "-"
            sizes = [_megabytes(option.file_bytes["fp32"]), _megabytes(option.file_bytes["fp16"])]
            mark = "->" if option is self.chosen else ""
            numbers = [str(option.a_out), str(option.a_in), str(option.r), f"{option.parameters:,}"]
            rows.append((mark, *numbers, *sizes, flops))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        chosen = self.chosen
        return "\n".join(
            [
                f"{self.model}: {self.share}",
                f"budget: {self.budget}",
                "",
                *lines,
                "",
                f"per token: {chosen.added_flops:,} FLOPs are added to {self.layer_flops:,} of the target layers",
                f"KronAConfig(a_out={chosen.a_out}, a_in={chosen.a_in}, r={chosen.r})",
                f"learning rate: {self.learning_rate:.1e}",
                *RATE_SAYS,
            ]
        )


def suggest_factors(
    model_or_class: Source,
    budget: int | str,
    *,
    target_modules: list[str] | str | None = None,
    component: str | None = None,
    dtype: Dtype = "fp32",
    a_out: int = 64,
    r: int | None = None,
) -> FactorPlan:
    """The largest KronA adapter within a budget of parameters or bytes, with exact counts; no weights are loaded.

    The rule: `a_out` stays 64 and r stays 1, as in the paper, and a_in is the smallest that fits; a larger a_in makes
    the adapter smaller. Where more than twice (64, 4) fits, r is raised instead, as nothing is known of a_in = 1.

    Args:
        model_or_class: a model; a class or the name of one of diffusers'; a folder of a pipeline or model; an id on the
            Hub. See `peft_krona.skeleton.skeleton`.
        budget: parameters (1_000_000, "1M", "500k") or bytes of the saved file ("5 MB", "5 MiB", "800kB").
        target_modules: as in `KronAConfig`. component: which part of a pipeline; None is its denoiser.
        dtype: of the file that a budget in bytes is for. `save_pretrained` writes "fp32", `convert` "fp16".
        a_out: rows of the left factor. r: number of terms; None lets the rule choose.

    Raises:
        ConfigError: if the budget cannot be read, is too small for any factors, or as large as the layers themselves.
        FormatError: if there is no model where `model_or_class` points to.

    >>> plan = suggest_factors(nn.Sequential(nn.Linear(640, 1280)), "5k", target_modules=["0"])
    >>> plan.chosen.a_out, plan.chosen.a_in, plan.chosen.r, plan.chosen.parameters
    (64, 4, 1, 3456)
    >>> plan.config().a_in
    4
    """
    limit, in_bytes = parse_budget(budget)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not allowed; expected one of {DTYPES}.")
    for name, value in (("a_out", a_out), ("r", r)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r} is not allowed; expected an integer >= 1.")
    label, model = skeleton(model_or_class, component)
    names, shapes, share = _targets(label, model, target_modules)
    counter = _Counter(names, shapes)
    whole = sum(s.out_features * s.in_features * math.prod(s.kernel) for s in shapes) * (
        BYTES[dtype] if in_bytes else 1
    )
    if limit >= whole:
        raise ConfigError(
            f"budget={budget!r} is as much as the target layers themselves have ({_amount(whole, in_bytes)}). Train "
            "them whole, or set a smaller budget."
        )

    def fits(choice: Choice) -> bool:
        return (counter.file_bytes(choice, dtype) if in_bytes else counter.parameters(choice)) <= limit

    columns = sorted({d for s in set(shapes) for d in divisors(s.in_features)})
    choices = [Choice(a_out, a_in, r or 1) for a_in in columns if a_in >= LEAST_A_IN] or [Choice(a_out, 1, r or 1)]
    # beyond the smallest, A grows faster than B shrinks
    choices = choices[: 1 + min(range(len(choices)), key=lambda i: counter.parameters(choices[i]))]
    chosen = next((choice for choice in choices if fits(choice)), None)
    if chosen is None:
        least = choices[-1]
        raise ConfigError(
            f"budget={budget!r} is too small: the smallest adapter with a_out={a_out} and r={least.r} on the target "
            f"layers ({len(shapes)}) has {counter.parameters(least):,} parameters, with a_in={least.a_in} "
            f"({_megabytes(counter.file_bytes(least, dtype))} in {dtype}). Raise the budget, or adapt fewer layers "
            "(target_modules)."
        )
    terms = 2
    while r is None and fits(Choice(a_out, BEST_A_IN, terms)):
        chosen, terms = Choice(a_out, BEST_A_IN, terms), terms + 1
    said = _amount(limit, in_bytes) + (f" of a file in {dtype}" if in_bytes else "")
    near = sorted({*_around(chosen, choices, counter)}, key=counter.parameters, reverse=True)
    options = {choice: counter.option(choice) for choice in near}
    return FactorPlan(
        label,
        len(shapes),
        share,
        counter.layer_flops,
        counter.rate(chosen.r),
        options[chosen],
        tuple(options.values()),
        said,
        target_modules,
    )


def parse_budget(budget: int | str) -> tuple[int, bool]:
    """(number, whether it counts bytes).

    Raises:
        ConfigError: names what can be written.

    >>> parse_budget("1.5M"), parse_budget("5 MB"), parse_budget("5MiB"), parse_budget(300_000)
    ((1500000, False), (5000000, True), (5242880, True), (300000, False))
    """
    allowed = "expected a number of parameters (1000000, '1M', '500k') or of bytes ('5 MB', '5 MiB', '800kB')"
    text = str(budget).strip().lower().replace(",", "").replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmg]?i?b?)", text)
    if isinstance(budget, bool) or not isinstance(budget, (int, str)) or match is None:
        raise ConfigError(f"budget={budget!r} is not allowed; {allowed}.")
    number, unit = float(match[1]), match[2]
    if unit == "b":
        raise ConfigError(f"budget={budget!r}: bytes, or billions of parameters? Write {match[1]}kB or {match[1]}G.")
    factor = _SIZES.get(unit) or _COUNTS.get(unit)
    if factor is None:
        raise ConfigError(f"budget={budget!r} is not allowed; {allowed}.")
    limit = int(number * factor)
    if limit < 1:
        raise ConfigError(f"budget={budget!r} is not allowed; it must be positive.")
    return limit, unit in _SIZES


class _Counter:
    """Exact counts of an adapter on given layers."""

    def __init__(self, names: Sequence[str], shapes: Sequence[LayerShape]) -> None:
        self.names, self.shapes = names, shapes
        self.kinds = Counter(shapes)
        self.layer_flops = sum(
            2 * s.out_features * s.in_features * math.prod(s.kernel) * n
            for s, n in self.kinds.items()
            if not s.is_lookup
        )

    def taken(self, choice: Choice) -> dict[LayerShape, tuple[int, int]]:
        """The factors of each kind of layer: the largest divisors."""
        return {s: choose_factors(s.out_features, s.in_features, choice.a_out, choice.a_in) for s in self.kinds}

    def parameters(self, choice: Choice) -> int:
        taken = self.taken(choice)
        return sum(
            n * num_parameters(s.out_features, s.in_features, *taken[s], choice.r, s.kernel)
            for s, n in self.kinds.items()
        )

    def option(self, choice: Choice) -> Option:
        taken = self.taken(choice)
        flops = sum(n * 2 * choice.r * _multiply_adds(s, *taken[s]) for s, n in self.kinds.items() if not s.is_lookup)
        files: dict[Dtype, int] = {dtype: self.file_bytes(choice, dtype) for dtype in DTYPES}
        return Option(*choice, self.parameters(choice), files, flops)

    def file_bytes(self, choice: Choice, dtype: Dtype) -> int:
        """Of a safetensors file as PEFT writes it: 8 bytes, the header as JSON padded to 8, the data."""
        taken, r = self.taken(choice), choice.r
        entries: dict[str, list[int]] = {}
        for name, s in zip(self.names, self.shapes, strict=True):
            a_out, a_in = taken[s]
            entries[f"{PEFT_PREFIX}{name}.krona_A"] = [r, a_out, a_in]
            entries[f"{PEFT_PREFIX}{name}.krona_B"] = [r, s.out_features // a_out, s.in_features // a_in, *s.kernel]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key in sorted(entries):
            start, end = end, end + BYTES[dtype] * math.prod(entries[key])
            header[key] = {"dtype": _NAMES[dtype], "shape": entries[key], "data_offsets": [start, end]}
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
        return 8 + (length + 7) // 8 * 8 + end

    def rate(self, r: int) -> float:
        """The paper's, times (1280 / (r in))^(1/4): the geometric mean over the layers."""
        logs = (n * math.log(WIDTH / (r * s.in_features * math.prod(s.kernel))) for s, n in self.kinds.items())
        return RATE * math.exp(sum(logs) / len(self.shapes) / 4)


def _multiply_adds(s: LayerShape, a_out: int, a_in: int) -> int:
    """Per position and term, of the cheaper order; a kernel goes with B."""
    b_out, b_in = s.out_features // a_out, s.in_features // a_in
    if not s.kernel:
        return min(contraction_cost(a_out, a_in, b_out, b_in))
    k = math.prod(s.kernel)
    return min(s.in_features * b_out * k + s.out_features * a_in, s.in_features * a_out + s.out_features * b_in * k)


def _targets(
    label: str, model: nn.Module, target_modules: list[str] | str | None
) -> tuple[list[str], list[LayerShape], Share]:
    """Names and shapes of the layers that `get_peft_model` adapts, found by letting it."""
    # A (out, 1) and B (1, in) are next to nothing
    config = KronAConfig(target_modules=target_modules, a_out=2**30, a_in=1)
    try:
        adapted = get_peft_model(model, config, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    except ValueError as error:
        if isinstance(error, (ConfigError, FactorError)):
            raise
        raise ConfigError(f"{label}: {error} Pass target_modules.") from error
    names, shapes = [], []
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, KronALayer) and _ADAPTER in layer.krona_A:
            names.append(name)
            kernel = tuple(layer.krona_B[_ADAPTER].shape[3:])
            shapes.append(LayerShape(layer.out_features, layer.in_features, kernel, isinstance(layer, Embedding)))
    return names, shapes, share_of(adapted, _ADAPTER)


def _around(chosen: Choice, choices: Sequence[Choice], counter: _Counter) -> Iterator[Choice]:
    """The suggestion, two larger ones and three smaller ones."""
    yield chosen
    n = counter.parameters(chosen)
    larger = [choice for choice in choices if counter.parameters(choice) > n]
    yield from larger[-2:]
    yield from [choice for choice in choices if counter.parameters(choice) < n][:3]


def _amount(number: int, in_bytes: bool) -> str:
    return _megabytes(number) if in_bytes else f"{number:,} parameters"


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.2f} MB" if number >= 1e5 else f"{number / 1e3:,.2f} kB"
