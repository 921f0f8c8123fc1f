# SPDX-License-Identifier: Apache-2.0
"""Makes and prints the tables of docs/from_lora.md: parameters of LoRA, LoKr and KronA on the real models.

The models are built from their configurations on the meta device, with no weights; the layers are those that
`target_modules=None` adapts. `python docs/counts.py` takes some seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from peft.tuners.lokr.layer import factorization
from torch import nn

from peft_krona.factors import choose_factors, num_parameters
from peft_krona.suggest import RATE, WIDTH
from peft_krona.targets import default_target_modules

PAGE = Path(__file__).parent / "from_lora.md"
_SD = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}  # fmt: skip
# {model: (class in diffusers, what its config.json has)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD1.5": ("UNet2DConditionModel", {**_SD, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "SDXL": ("UNet2DConditionModel", {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"), "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}),
    "SD3.5 medium": ("SD3Transformer2DModel", {
        "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}),
    "Flux.1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "klein 4B": ("Flux2Transformer2DModel", {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False}),
}  # fmt: skip

NARROW_MODELS, WIDE_MODELS = [*MODELS][:3], [*MODELS][3:]


class KronA(NamedTuple):
    """The setting that takes the place of another adapter's."""

    a_out: int
    a_in: int
    r: int = 1

    def __str__(self) -> str:
        return f"a_out={self.a_out}, a_in={self.a_in}" + (f", r={self.r}" if self.r > 1 else "")


# {rank of a LoRA: KronA with fewer parameters on each of the models}, by the rule of `suggest_factors`: the paper's
# (64, 4), a larger a_in where that is too large, more terms where there is room for them
NARROW = {4: KronA(64, 4), 8: KronA(64, 4, 2), 16: KronA(64, 4, 4), 32: KronA(64, 4, 8), 64: KronA(64, 4, 16)}
WIDE = {4: KronA(64, 16), 8: KronA(64, 8), 16: KronA(64, 4), 32: KronA(64, 4, 2), 64: KronA(64, 4, 4)}
# {(factor, dimension) of LyCORIS' and PEFT's LoKr: KronA for the first models, for the wider ones}
# no dimension: both factors full, which is KronA itself; else KronA with about as many parameters
LOKR = {
    (4, None): (KronA(4, 4), KronA(4, 4)),
    (8, None): (KronA(8, 8), KronA(8, 8)),
    (16, None): (KronA(16, 16), KronA(16, 16)),
    (-1, None): (KronA(32, 32), KronA(64, 64)),
    (8, 16): (KronA(64, 8), KronA(64, 16)),
    (-1, 16): (KronA(64, 16), KronA(64, 64)),
}


@cache
def build(name: str) -> nn.Module:
    cls, config = MODELS[name]
    with torch.device("meta"):
        return getattr(diffusers, cls)(**config)


@cache
def shapes(name: str) -> tuple[tuple[int, int], ...]:
    """(out, in) of every Linear layer that is adapted by default."""
    model = build(name)
    targets = default_target_modules(model)
    return tuple(
        (module.out_features, module.in_features)
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear) and (layer in targets or layer.endswith(tuple(f".{t}" for t in targets)))
    )


def lora(name: str, rank: int) -> int:
    """Parameters of a LoRA: rank * (in + out) on every layer."""
    return sum(rank * (o + i) for o, i in shapes(name))


def krona(name: str, a_out: int, a_in: int, r: int = 1) -> int:
    """Parameters of a KronA, with the factors that each layer gets."""
    return sum(num_parameters(o, i, *choose_factors(o, i, a_out, a_in), r) for o, i in shapes(name))


def lokr(name: str, factor: int, dimension: int | None) -> int:
    """Parameters of a LoKr: w1, and w2 or its two low-rank factors, which it has where they are smaller."""
    total = 0
    for out_features, in_features in shapes(name):
        (out_l, out_k), (in_m, in_n) = factorization(out_features, factor), factorization(in_features, factor)
        full = dimension is None or dimension >= max(out_k, in_n) / 2
        total += out_l * in_m + (out_k * in_n if full else dimension * (out_k + in_n))
    return total


def table(models: Iterable[str], rows: Iterable[tuple[str, Callable[[str], int]]]) -> str:
    """A Markdown table: a row for each (title, parameters of a model), a column for every model."""
    lines = [f"| parameters | {' | '.join(models)} |", f"|---|{'---:|' * len(list(models))}"]
    lines += [f"| {title} | {' | '.join(f'{count(name):,}' for name in models)} |" for title, count in rows]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """{name of a place in the page: its table}."""
    found = {}
    for place, settings, models in (("narrow", NARROW, NARROW_MODELS), ("wide", WIDE, WIDE_MODELS)):
        rows: list[tuple[str, Callable[[str], int]]] = []
        for rank, setting in settings.items():
            rows.append((f"LoRA r={rank}", partial(lora, rank=rank)))
            rows.append((f"**{setting}**", partial(_krona, setting=setting)))
        found[place] = table(models, rows)
    rows = []
    for (factor, dimension), (narrow, wide) in LOKR.items():
        size = "full" if dimension is None else f"dimension {dimension}"
        rows.append((f"LoKr factor={factor}, {size}", partial(lokr, factor=factor, dimension=dimension)))
        title = f"**{narrow}**" if narrow == wide else f"**{narrow}**; wide: **{wide}**"
        rows.append((title, lambda name, n=narrow, w=wide: krona(name, *(w if name in WIDE_MODELS else n))))
    found["lokr"] = table([*MODELS], rows)
    found["settings"], found["rates"] = settings_table(), rates_table()
    return found


def settings_table() -> str:
    """What to write in the place of a LoRA or a LoKr."""
    rows = [(f"LoRA r={rank}", NARROW[rank], WIDE[rank]) for rank in NARROW]
    for (factor, dimension), (narrow, wide) in LOKR.items():
        size = "full" if dimension is None else f"dimension {dimension}"
        rows.append((f"LoKr factor={factor}, {size}", narrow, wide))
    lines = ["| instead of | on SD1.5, SDXL, SD3.5 | on Flux.1, Flux.2 klein |", "|---|---|---|"]
    lines += [f"| {title} | `{narrow}` | `{wide}` |" for title, narrow, wide in rows]
    return "\n".join(lines)


def rate(name: str) -> float:
    """`suggest_factors(...).learning_rate` for one term."""
    return RATE * math.exp(sum(math.log(WIDTH / i) for _, i in shapes(name)) / len(shapes(name)) / 4)


def rates_table() -> str:
    """Learning rates to start with, by `suggest_factors`; they hardly depend on factors and terms."""
    cells = [f"{rate(name):.0e}".replace("e-0", "e-") for name in MODELS]
    return f"| | {' | '.join(MODELS)} |\n|---|{'---:|' * len(MODELS)}\n| start with | {' | '.join(cells)} |"


def _krona(name: str, setting: KronA) -> int:
    return krona(name, *setting)


def in_page(page: str) -> str:
    """The page with its tables replaced; each stands between two comments."""
    for place, text in tables().items():
        mark = re.compile(rf"(<!-- counts: {place} -->\n)(.*?)(\n<!-- end -->)", flags=re.DOTALL)
        if not mark.search(page):
            raise ValueError(f"The page has no place '<!-- counts: {place} -->' ... '<!-- end -->'.")
        page = mark.sub(lambda m, text=text: f"{m[1]}\n{text}\n{m[3]}", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print("\n\n".join(tables().values()))
