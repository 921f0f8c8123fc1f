# SPDX-License-Identifier: Apache-2.0
"""What an adapter changes, layer by layer, as a table and as a picture. No dW is ever built."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, prod
from pathlib import Path

import numpy as np
import torch

from .convert import AdapterFile, LayerUpdate
from .convert.names import is_embedding, to_file_name
from .convert.safetensors_io import read_header, read_weights
from .convert.shapes import shapes_of_folder
from .convert.weight_files import parts_of, variant_of, weight_files
from .errors import FormatError
from .share import Share

# A core larger than this (many terms of large factors) has no singular values computed: minutes for each layer.
MAX_CORE = 1536


@dataclass(frozen=True)
class LayerStats:
    """One row of the table.

    Attributes:
        layer: the layer. norm: ||dW||_F. relative: ||dW||_F / ||W||_F, None without the base model.
        spectrum: singular values of dW (out x in*kernel), descending; None if too costly.
    """

    layer: LayerUpdate
    norm: float
    relative: float | None
    spectrum: torch.Tensor | None

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007); 0 for dW = 0."""
        if self.spectrum is None:
            return None
        total = self.spectrum.sum()
        if total == 0:
            return 0.0
        p = self.spectrum[self.spectrum > 0] / total
        return exp(-(p * p.log()).sum().item())


def inspect_adapter(adapter: AdapterFile, base: str | os.PathLike | None = None) -> list[LayerStats]:
    """Statistics of every layer, in the adapter's order.

    Args:
        base: the folder of the base pipeline, or of the one model that is adapted, for ||W||.

    Raises:
        FormatError: if a layer is not in the base model's safetensors files, or one of them is damaged.
    """
    norms = {} if base is None else _base_norms(Path(base), adapter)
    stats = []
    for layer in adapter:
        norm = delta_norm(layer)
        relative = norm / norms[layer.name] if norms.get(layer.name) else None
        stats.append(LayerStats(layer, norm, relative, singular_values(layer)))
    return stats


def delta_norm(layer: LayerUpdate) -> float:
    """||dW||_F from the factors: the squared norm is s^2 sum_nm <A_n, A_m> <B_n, B_m>.

    >>> delta_norm(LayerUpdate("unet", "x", torch.ones(1, 2, 3), torch.ones(1, 4, 5), 0.5)) ** 2
    30.0
    """
    A, B = layer.A.double().flatten(1), layer.B.double().flatten(1)
    return abs(layer.scale) * ((A @ A.T) * (B @ B.T)).sum().clamp_min(0).sqrt().item()


def singular_values(layer: LayerUpdate) -> torch.Tensor | None:
    """Singular values of dW as an (out, in * prod(kernel)) matrix, descending, float64; None if too costly.

    For one term they are all products of a singular value of A and one of B. For more, A_n and B_n are first written
    in bases of the rows and columns that any of them has; the shuffle of a layout changes no singular value.
    """
    A, B = layer.A.double() * layer.scale, layer.B.double().flatten(2)
    if layer.r == 1:
        values = torch.outer(torch.linalg.svdvals(A[0]), torch.linalg.svdvals(B[0])).flatten()
        return values.sort(descending=True).values
    A, B = _reduced(A), _reduced(B)
    if min(A.shape[1] * B.shape[1], A.shape[2] * B.shape[2]) > MAX_CORE:
        return None
    core = torch.einsum("nik,nuv->iukv", A, B).reshape(A.shape[1] * B.shape[1], -1)
    return torch.linalg.svdvals(core)


def _reduced(terms: torch.Tensor) -> torch.Tensor:
    """(r, m, n) -> (r, m', n') in orthonormal bases of the joint row and column spaces."""
    rows = torch.linalg.qr(torch.cat(list(terms), dim=1)).Q
    columns = torch.linalg.qr(torch.cat(list(terms), dim=0).T).Q
    return rows.T @ terms @ columns


def _base_norms(folder: Path, adapter: AdapterFile) -> dict[str, float]:
    """||W||_F of the adapted layers."""
    if not folder.is_dir():
        raise FormatError(
            f"{folder}: there is no such folder, and no weight for {adapter.layers[0].name}; expected that of "
            "the base pipeline, or of the one model."
        )
    wanted = {layer.name for layer in adapter}
    norms = {}
    variant = variant_of(folder) if folder.is_dir() else None
    parts = parts_of(folder)
    for component in adapter.components:
        for path in weight_files(parts.get(component, folder / component), variant):
            weights = [key for key in read_header(path) if key.endswith(".weight")]
            names = {key: f"{component}.{to_file_name(component, key.removesuffix('.weight'))}" for key in weights}
            for key, weight in read_weights(path, {key for key in weights if names[key] in wanted}):
                norms[names[key]] = weight.double().norm().item()
    missing = sorted(wanted - norms.keys())
    if missing:
        raise FormatError(f"{folder}: the base model's safetensors files have no weight for {missing[0]}.")
    return norms


def shares(adapter: AdapterFile, base: str | os.PathLike) -> dict[str, Share]:
    """{component: which of its layers and what share of its weights the adapter sits on}.

    Args:
        base: the folder of the base pipeline.

    Raises:
        FormatError: if the base model has no safetensors files, or one of them is damaged.
    """
    shapes, parts = shapes_of_folder(base), parts_of(base)
    found = {}
    for component in adapter.components:
        names = {layer.name.removeprefix(f"{component}.") for layer in adapter if layer.component == component}
        names = {to_file_name(component, name) for name in names}
        modules = shapes.get(component, {})
        linear = {name for name, shape in modules.items() if len(shape) == 2 and not is_embedding(name)}
        found[component] = Share(
            linear=len(linear & names),
            all_linear=len(linear),
            other=len(names & modules.keys() - linear),
            weights=sum(prod(modules[name]) for name in names & modules.keys()),
            all_weights=sum(
                prod(shape)
                for path in parts.get(component, Path(base, component)).glob("*.safetensors")
                for _, shape in read_header(path).values()
            ),
        )
    return found


LEGEND = (
    "||dW||: Frobenius norm of the update, scale included; /||W||: of the base weight's, where that is given.",
    "eff. rank: how many directions share it, exp of the entropy of its normalised singular values (-: too costly).",
)


def table(stats: Sequence[LayerStats]) -> str:
    """The statistics as text, one line a layer, with totals."""
    head = ("layer", "shape", "r", "a_out x a_in", "layout", "scale", "||dW||", "/||W||", "eff. rank", "dtype")
    rows = [head, *(_row(entry) for entry in stats)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *totals(stats), *LEGEND])


def _row(entry: LayerStats) -> tuple[str, ...]:
    layer = entry.layer
    rank = entry.effective_rank
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        str(layer.r),
        f"{layer.factors[0]} x {layer.factors[1]}",
        layer.layout,
        f"{layer.scale:g}",
        f"{entry.norm:.3g}",
        "-" if entry.relative is None else f"{entry.relative:.2e}",
        "-" if rank is None else f"{rank:.1f}",
        str(layer.A.dtype).removeprefix("torch."),
    )


def totals(stats: Sequence[LayerStats]) -> list[str]:
    """Lines that sum up the table: layers, parameters against the adapted weights, the whole update's norm."""
    parts = Counter(entry.layer.component for entry in stats)
    parameters = sum(entry.layer.A.numel() + entry.layer.B.numel() for entry in stats)
    adapted = sum(torch.Size(entry.layer.shape).numel() for entry in stats)
    norm = sum(entry.norm**2 for entry in stats) ** 0.5
    return [
        f"{len(stats)} layers: " + ", ".join(f"{count} in {part}" for part, count in parts.items()),
        f"{parameters:,} parameters for {adapted:,} adapted weights ({parameters / adapted:.2%}), "
        f"{parameters * 4 / 2**20:.2f} MiB in float32",
        f"||dW||_F of all layers: {norm:.4g}",
    ]


# -- the picture -------------------------------------------------------------------------------------------------------

_KINDS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"} | {f"{k}_proj": k for k in "qkv"} | {"out_proj": "o"}
_COLUMNS = [*(f"self {k}" for k in "qkvo"), *(f"cross {k}" for k in "qkvo"), "ff", "other"]


def column_of(module: str) -> str:
    """Which column of the overview a layer belongs in.

    >>> column_of("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0")
    'cross o'
    """
    kind = next((kind for end, kind in _KINDS.items() if module.endswith(f".{end}")), None)
    if kind is not None:
        return f"{'cross' if '.attn2.' in module else 'self'} {kind}"
    return "ff" if re.search(r"\.(ff|mlp|ff_context)\.", module) else "other"


def row_of(layer: LayerUpdate) -> str:
    """Which row of the overview a layer belongs in: its block.

    >>> row_of(LayerUpdate("unet", "up_blocks.1.attentions.2.proj_in", torch.ones(1, 1, 1), torch.ones(1, 1, 1)))
    'up 1.2'
    """
    module = layer.module
    match = re.match(r"(down|mid|up)_blocks?\.?(\d+)?\.?(?:attentions|resnets|downsamplers|upsamplers)\.(\d+)", module)
    if match:
        return f"{match[1]} {match[2]}.{match[3]}" if match[2] else f"mid {match[3]}"
    match = re.match(r"(?:text_model\.)?(?:encoder\.)?(\w+)\.(\d+)\.", module)
    if match:
        short = {"layers": "layer", "transformer_blocks": "block", "single_transformer_blocks": "single"}
        prefix = (
            ""
            if layer.component in ("unet", "transformer", "model")
            else f"{layer.component.replace('text_encoder', 'TE')} "
        )
        return f"{prefix}{short.get(match[1], match[1])} {match[2]}"
    return module.split(".")[0]


def _label(layer: LayerUpdate) -> str:
    """Short name of one layer: block, transformer block in it, kind."""
    match = re.search(r"attentions\.\d+\.transformer_blocks\.(\d+)", layer.module)
    kind = column_of(layer.module)
    kind = layer.module.rpartition(".")[2] if kind == "other" else kind
    return f"{row_of(layer)}{f' #{match[1]}' if match else ''} {kind}"


def check_picture_name(path: str | os.PathLike) -> None:
    """Refuse what `plot` cannot write, before the work for it is done.

    Raises:
        FormatError: if matplotlib is not installed, or does not know the ending.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise FormatError("A picture needs matplotlib: pip install 'peft-krona[plot]'.") from error
    ending = Path(path).suffix.lower().removeprefix(".")
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if ending not in known:
        raise FormatError(
            f"picture={str(path)!r}: expected a name that ends in one of {', '.join(known)}, got {ending!r}."
        )


def plot(stats: Sequence[LayerStats], path: str | os.PathLike, title: str = "") -> None:
    """Draw the strongest layers' factors, the update's size by block and kind of layer, and the singular spectra.

    Args:
        path: of the picture; its ending decides the format.

    Raises:
        FormatError: if matplotlib is not installed, or does not know the ending.
    """
    check_picture_name(path)
    path = Path(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    relative = all(entry.relative is not None for entry in stats)
    ranked = sorted(stats, key=lambda entry: _size(entry, relative), reverse=True)
    strongest = ranked[:3]
    rows = list(dict.fromkeys(row_of(entry.layer) for entry in stats))
    height = 7.5 + max(3.0, 0.19 * len(rows))
    figure = Figure(figsize=(14, height), layout="constrained")
    figure.suptitle("\n".join(filter(None, [title, *totals(stats)[:2]])), fontsize=12)
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.6, height - 3.6])
    _draw_factors(top, strongest)
    overview, spectra = bottom.subplots(1, 2, width_ratios=[1.15, 1])
    _draw_overview(bottom, overview, stats, rows, relative)
    _draw_spectra(spectra, ranked)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, dpi=110, format=path.suffix.lower().removeprefix("."))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _size(entry: LayerStats, relative: bool) -> float:
    """||dW|| / ||W|| if `relative`, else ||dW||."""
    return entry.relative if relative and entry.relative is not None else entry.norm


def _draw_factors(figure, strongest: Sequence[LayerStats]) -> None:
    """Heat maps of A and B (first term) of the strongest layers."""
    axes = figure.subplots(1, 2 * len(strongest), squeeze=False)[0]
    for entry, (left, right) in zip(strongest, axes.reshape(-1, 2), strict=True):
        layer = entry.layer
        A, B = layer.A[0].float(), layer.B[0].float().flatten(1)
        for axis, factor, name in ((left, A, "A"), (right, B, "B")):
            limit = factor.abs().amax().item() or 1.0
            # Tall or wide factors are stretched to fill the frame; the labels give the true sizes.
            axis.imshow(factor, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            axis.set_title(f"{name}  {factor.shape[0]} x {factor.shape[1]}   max {limit:.2g}", fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
        terms = "" if layer.r == 1 else f"  (term 1 of {layer.r})"
        left.set_xlabel(f"{_label(layer)}{terms}", fontsize=9, loc="left")
        right.set_xlabel(f"||dW|| = {entry.norm:.3g}", fontsize=9)


def _draw_overview(figure, axis, stats: Sequence[LayerStats], rows: Sequence[str], relative: bool) -> None:
    """Root mean square of the layers' norms by block (down) and kind (across)."""
    cells: dict[tuple[str, str], list[float]] = {}
    for entry in stats:
        cells.setdefault((row_of(entry.layer), column_of(entry.layer.module)), []).append(_size(entry, relative))
    columns = [column for column in _COLUMNS if any(key[1] == column for key in cells)]
    grid = torch.full((len(rows), len(columns)), float("nan"))
    for (row, column), values in cells.items():
        grid[rows.index(row), columns.index(column)] = (sum(v * v for v in values) / len(values)) ** 0.5
    image = axis.imshow(grid, cmap="viridis", aspect="auto", vmin=0)
    axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=9)
    axis.set_yticks(range(len(rows)), rows, fontsize=8 if len(rows) < 40 else 6)
    axis.set_title("size of the update by block: " + ("||dW|| / ||W||" if relative else "||dW||"), fontsize=10)
    if grid.numel() <= 300:
        middle = grid.nan_to_num().max() / 2
        for (i, j), value in np.ndenumerate(grid.numpy()):
            if value == value:  # not NaN: this block has such layers
                axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7, color="wk"[int(value > middle)])
    figure.colorbar(image, ax=axis, shrink=0.8)


def _draw_spectra(axis, ranked: Sequence[LayerStats]) -> None:
    """Singular values relative to the largest: all layers thin, the strongest named."""
    import matplotlib

    colour_of = matplotlib.colormaps["tab10"]
    curves = [(e, _curve(e.spectrum)) for e in ranked if e.spectrum is not None and e.spectrum[0] > 0]
    for _, curve in curves[6:]:
        axis.plot(*curve, color="0.8", linewidth=0.6, zorder=1)
    for index, (entry, curve) in enumerate(curves[:6]):
        label = f"{_label(entry.layer)}, eff. rank {entry.effective_rank:.0f}"
        axis.plot(*curve, color=colour_of(index), linewidth=1.6, label=label, zorder=2)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("index of the singular value")
    axis.set_ylabel("singular value / largest")
    axis.set_title("singular spectra of dW (grey: all other layers)", fontsize=10)
    axis.grid(True, which="major", linewidth=0.4, alpha=0.6)
    if curves:
        axis.legend(fontsize=8, loc="lower left")


def _curve(spectrum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices from 1 and values down to 1e-4 of the largest."""
    relative = spectrum / spectrum[0]
    relative = relative[relative > 1e-4]
    return torch.arange(1, len(relative) + 1), relative
