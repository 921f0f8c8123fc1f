# SPDX-License-Identifier: Apache-2.0
"""`export`: choose a format, write, read back, rebuild every dW and compare, and only then give the file its name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import FormatError
from .families import families, family_of, to_lycoris_name
from .formats import FORMATS, SHARED_ENDINGS
from .formats.krona import to_peft
from .formats.lokr import as_plain_kron
from .formats.lora import lora_rank, to_lora_peft
from .groups import group_by_layer
from .kohya import kohya_metadata, krona_metadata, with_whole_attentions
from .names import is_embedding
from .read import read_adapter
from .record import AdapterFile, LayerUpdate
from .safetensors_io import new_folder, output_path, read_safetensors, write_safetensors
from .unet_names import UNetNames, to_kohya_name

WRITTEN = {name: format for name, format in FORMATS.items() if format.write is not None}
TO = ("auto", *WRITTEN, "peft")
# A dot in a name is no ending ("my-dog-1.5"); these would be mistaken for what they are not.
_OTHER_ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".gguf", ".onnx", ".json", ".zip")
TINY = 1e-15  # a norm in float32 below which squares of single entries may be 0


@dataclass(frozen=True)
class Report:
    """What `export` did.

    Attributes:
        format: the format written. reason: why `auto` picked it. files: what was written.
        worst_error: largest relative error of a layer's rebuilt dW, ||dW' - dW||_F / ||dW||_F, and `worst_layer`.
        size: bytes of all files. notes: what the user should know, such as tools that cannot load the file.
    """

    format: str
    reason: str
    files: tuple[Path, ...]
    worst_error: float
    worst_layer: str
    size: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"format: {self.format}" + (f" ({self.reason})" if self.reason else "")]
        lines += [f"wrote {path}" for path in self.files]
        lines.append(f"size: {self.size / 2**20:.2f} MiB")
        lines.append(f"worst relative error of a rebuilt layer: {self.worst_error:.2e} ({self.worst_layer})")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def tolerance(dtype: torch.dtype) -> float:
    """Largest relative error of a layer that rounding its two factors to `dtype` explains.

    >>> tolerance(torch.float16)
    0.001953125
    """
    return 2 * torch.finfo(dtype).eps


def choose_format(adapter: AdapterFile) -> tuple[str, bool, str]:
    """(format, split into terms, reason) that "auto" takes.

    One plain term a layer: LoKr, the smallest. One shuffled term: LoHa. More terms: LoRA, if that stays below half the
    rank of every layer, else one file a term. Transformers of a family whose names for other formats are not known:
    LoRA.

    >>> one = LayerUpdate("unet", "conv_in", torch.ones(1, 4, 2), torch.ones(1, 4, 8))
    >>> choose_format(AdapterFile((one,)))
    ('lokr', False, 'one plain Kronecker product a layer')
    """
    if not _is_for_unet(adapter) and not _has_lycoris_names(adapter):
        return "lora", False, "the format whose names are known for every transformer"
    plain = all(as_plain_kron(layer) is not None for layer in adapter for layer in layer.terms())
    if all(layer.r == 1 for layer in adapter):
        if plain:
            return "lokr", False, "one plain Kronecker product a layer"
        return "loha", False, "one shuffled Kronecker product a layer, exact as LoHa and not as LoKr"
    if all(lora_rank(layer) <= min(layer.shape[:2]) / 2 for layer in adapter):
        return "lora", False, "several terms a layer, of a rank at most half of the layer's"
    return ("lokr" if plain else "loha"), True, "several terms a layer, of too high a rank for LoRA: one file a term"


def _is_for_unet(adapter: AdapterFile) -> bool:
    """Whether files for it have kohya's names: those of a UNet and of CLIP text encoders."""
    return all(
        layer.component == "unet"
        or (
            layer.component in ("text_encoder", "text_encoder_2")
            and layer.module.startswith(("text_model.", "text_projection"))
        )
        for layer in adapter
    )


def _has_lycoris_names(adapter: AdapterFile) -> bool:
    """Whether it is for a transformer of a family in `families`, and its text encoders."""
    modules = [layer.module for layer in adapter if layer.component == "transformer"]
    others = {layer.component for layer in adapter} - {"transformer"}
    return bool(modules) and all(c.startswith("text_encoder") for c in others) and family_of(modules) is not None


def export(
    adapter: AdapterFile,
    out: str | os.PathLike,
    to: str = "auto",
    *,
    base_model: UNetNames | None = None,
    dtype: torch.dtype | None = None,
    split_terms: bool = False,
) -> Report:
    """Write an adapter for other tools, or as a PEFT folder, and check what was written.

    Args:
        adapter: what to write. out: a file, for "peft" a new folder, with several terms the stem of the files.
        to: one of `TO`. base_model: its kind, for names and metadata; needed for a UNet.
        dtype: of the weights; None means float16 for files (readers add in the file's dtype, and bfloat16 would round
            the base model's weights) and no change for "peft".
        split_terms: write a file per Kronecker term, to be loaded together.

    Returns:
        What was written, how large it is and how exact.

    Raises:
        FormatError: if the format cannot hold the adapter (says which can), `out` is no name of a new file (of a folder
            for "peft"), or a rebuilt layer is off by more than the dtype's rounding explains. Nothing is left behind
            then.
    """
    chosen, split, reason = _chosen(adapter, to, split_terms)
    files = planned_files(adapter, out, to, split_terms)
    if chosen == "peft":
        return _export_peft(adapter, files[0], dtype)
    dtype = dtype or torch.float16
    if not split:
        return _export_file(adapter, files[0], chosen, reason, base_model, dtype)
    reports: list[Report] = []
    terms = max(layer.r for layer in adapter)
    for n, path in enumerate(files):
        part = replace(adapter, layers=tuple(layer.terms()[n] for layer in adapter if layer.r > n))
        try:
            reports.append(_export_file(part, path, chosen, reason, base_model, dtype))
        except FormatError:
            for report in reports:
                report.files[0].unlink()
            raise
    worst = max(reports, key=lambda report: report.worst_error)
    return replace(
        worst,
        files=tuple(report.files[0] for report in reports),
        size=sum(report.size for report in reports),
        notes=(*worst.notes, *(["load all of these files together, at one strength"] if terms > 1 else [])),
    )


def planned_files(
    adapter: AdapterFile, out: str | os.PathLike, to: str = "auto", split_terms: bool = False
) -> tuple[Path, ...]:
    """What `export` would write with these arguments: files, or for "peft" one folder.

    Raises:
        FormatError: if the format is unknown, or `out` is no name of a file (of a folder for "peft").
    """
    chosen, split, _ = _chosen(adapter, to, split_terms)
    if chosen == "peft":
        return (output_path(out),)
    path = _output_file(out)
    terms = max(layer.r for layer in adapter)
    if not split or terms == 1:
        return (path,)
    return tuple(path.with_name(f"{path.stem}_term{n + 1}of{terms}.safetensors") for n in range(terms))


def _chosen(adapter: AdapterFile, to: str, split_terms: bool) -> tuple[str, bool, str]:
    """(format, split into terms, why "auto" took it)"""
    if to not in TO:
        raise FormatError(f"to={to!r} is unknown; expected one of {', '.join(TO)}.")
    if to != "auto":
        return to, split_terms, ""
    chosen, split, reason = choose_format(adapter)
    return chosen, split_terms or split, reason


def to_file(
    adapter: AdapterFile, to: str, base_model: UNetNames | None = None, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """The tensors of a file of format `to`, under kohya's names for a UNet and ComfyUI's for a transformer: exact, or
    refused.

    Raises:
        FormatError: names the layer that the format cannot hold, and formats that can, or that has no such name.
    """
    names = list(_names(adapter, base_model))
    write = WRITTEN[to].write
    assert write is not None  # of those in WRITTEN
    written = write(adapter.layers, dtype)
    return {
        f"{name}.{ending}": tensor
        for name, parts in zip(names, written, strict=True)
        for ending, tensor in parts.items()
    }


def _names(adapter: AdapterFile, base_model: UNetNames | None) -> dict[str, LayerUpdate]:
    """{name in a file: layer}."""
    if _is_for_unet(adapter):
        if base_model is None:
            raise FormatError(
                "A file for this format needs the base model's kind: base_model=BASES['sd15'] or another."
            )
        return {to_kohya_name(layer.component, layer.module, base_model): layer for layer in adapter}
    if "transformer" in adapter.components and not _has_lycoris_names(adapter):
        known = ", ".join(families())
        raise FormatError(
            f"The transformer's layers, such as {adapter.layers[0].name}, are of no family whose names in such files "
            f"are known here ({known}). Use to='lora' or to='peft'."
        )
    return {to_lycoris_name(layer.component, layer.module): layer for layer in adapter}


def to_lokr(
    adapter: AdapterFile, base_model: UNetNames | None = None, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """A LoKr file's tensors: w1 = A, w2 = B, alpha 1; one plain term a layer. See `to_file`."""
    return to_file(adapter, "lokr", base_model, dtype)


def to_loha(
    adapter: AdapterFile, base_model: UNetNames | None = None, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """A LoHa file's tensors, rank max(rank A, rank B), alpha = rank; one term a layer. See `to_file`."""
    return to_file(adapter, "loha", base_model, dtype)


def to_lora(
    adapter: AdapterFile, base_model: UNetNames | None = None, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """A LoRA file's tensors, one alpha for all layers. See `to_file`."""
    return to_file(adapter, "lora", base_model, dtype)


def to_diff(
    adapter: AdapterFile, base_model: UNetNames | None = None, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """A `.diff` file's tensors, every dW as it is. See `to_file`."""
    return to_file(adapter, "diff", base_model, dtype)


def _output_file(out: str | os.PathLike) -> Path:
    """The file to write: `out` with .safetensors at its end.

    Raises:
        FormatError: if it is a folder, or its ending is that of another kind of file.
    """
    path = output_path(out)
    if path.is_dir() or os.fspath(out).endswith(("/", os.sep)):
        raise FormatError(f"{out}: expected the name of a file to write, got a folder. Name a file in it.")
    if path.suffix.lower() in _OTHER_ENDINGS:
        raise FormatError(f"{out}: expected a name with .safetensors at its end, or with no ending; change it.")
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def _export_file(
    adapter: AdapterFile, out: Path, to: str, reason: str, base_model: UNetNames | None, dtype: torch.dtype
) -> Report:
    if "model" in adapter.components:
        raise FormatError(
            "The layers' names belong to no part of a diffusion pipeline, and files for other tools need one. "
            "Use to='peft', or read the adapter from a folder named after its part (unet, transformer, ...)."
        )
    tables = [layer.name for layer in adapter if is_embedding(layer.module)]
    if tables:
        raise FormatError(f"{tables[0]} is an embedding, which files for other tools cannot hold. Use to='peft'.")
    if to == "lora" and not _is_for_unet(adapter):
        tensors, metadata = to_lora_peft(adapter, dtype)
        names = {f"{layer.component}.{layer.module}": layer for layer in adapter}
        metadata |= krona_metadata(adapter)
    else:
        if _is_for_unet(adapter) and base_model is not None:
            adapter = with_whole_attentions(adapter, base_model)
        names = _names(adapter, base_model)
        tensors = to_file(adapter, to, base_model, dtype)
        metadata = kohya_metadata(adapter, tensors, WRITTEN[to], base_model, out.stem)
    beyond = next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if beyond is not None:
        raise FormatError(
            f"'{beyond}' would be NaN or infinite in {dtype}: the update is too large for it. Nothing was written. Use "
            "dtype=torch.float32, or a smaller scale (AdapterFile.scaled)."
        )
    if len(names) != len(adapter):
        raise FormatError("Two layers have the same name in this format; the adapter cannot be written as such a file.")
    worst: dict[str, float] = {}

    def verify(path: Path) -> None:
        written, _ = read_safetensors(path)
        # float64 where the file's own rounding is near that of float32
        precision = torch.float64 if dtype == torch.float32 else torch.float32
        groups = group_by_layer(written, (*WRITTEN[to].endings, *SHARED_ENDINGS))
        delta = WRITTEN[to].delta
        assert delta is not None  # a format that is written has one: test_convert_formats.py
        worst.update(_errors(names, ((name, delta(name, parts, precision)) for name, parts in groups.items())))
        _check_errors(worst, to, dtype)

    write_safetensors(out, tensors, metadata, verify)
    layer = max(worst, key=worst.__getitem__)
    noted = WRITTEN[to].notes
    notes = () if noted is None else noted(adapter.layers)
    if not _is_for_unet(adapter) and to != "lora":
        notes = (*notes, "the names are those that ComfyUI reads; diffusers' load_lora_weights takes to='lora'")
    if to == "lora":
        notes = (*notes, *_note_on_size(adapter, tensors))
    return Report(to, reason, (out,), worst[layer], layer, out.stat().st_size, notes)


def _note_on_size(adapter: AdapterFile, tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """A word where a LoRA is more than ten times the LoKr of the same adapter."""
    if any(as_plain_kron(layer) is None for layer in adapter):
        return ()
    size = sum(tensor.numel() for tensor in tensors.values())
    lokr = sum(layer.A.numel() + layer.B.numel() + 1 for layer in adapter)
    if size <= 10 * lokr:
        return ()
    bytes_each = next(iter(tensors.values())).element_size()
    return (
        f"this LoRA has {size * bytes_each / 2**20:,.2f} MiB of weights, {size / lokr:.0f} times those of the same "
        f"adapter as LoKr ({lokr * bytes_each / 2**20:,.2f} MiB), which to='lokr' writes",
    )


def _export_peft(adapter: AdapterFile, out: Path, dtype: torch.dtype | None) -> Report:
    with new_folder(out) as folder:
        for component, (config, state_dict) in to_peft(adapter, dtype=dtype).items():
            # A bare model's folder is the adapter itself; a pipeline's parts have subfolders.
            part = folder if component == "model" else folder / component
            part.mkdir(exist_ok=True)
            config.save_pretrained(str(part))
            metadata = {"format": "pt", **adapter.metadata}
            save_file({k: t.contiguous() for k, t in state_dict.items()}, part / "adapter_model.safetensors", metadata)
        read = {layer.name: layer for layer in read_adapter(folder)}
        changed = {layer.name: layer for layer in adapter if not _is_same(layer, read.get(layer.name))}
        worst = dict.fromkeys((layer.name for layer in adapter), 0.0)
        worst |= _errors(changed, ((name, read[name].delta_weight()) for name in changed if name in read))
        _check_errors(worst, "peft", dtype or torch.float32)
    layer = max(worst, key=worst.__getitem__)
    files = tuple(sorted(out.rglob("adapter_model.safetensors")))
    return Report("peft", "", files, worst[layer], layer, sum(path.stat().st_size for path in files))


def _is_same(one: LayerUpdate, other: LayerUpdate | None) -> bool:
    """Whether two layers are bit for bit the same, so that their dW need not be compared."""
    return (
        other is not None
        and (one.scale, one.layout) == (other.scale, other.layout)
        and torch.equal(one.A, other.A)
        and torch.equal(one.B, other.B)
    )


def _errors(names: Mapping[str, LayerUpdate], written: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """Relative error of each layer of a file that was read back; layers that are missing count as infinitely wrong."""
    errors = dict.fromkeys((layer.name for layer in names.values()), float("inf"))
    for name, dW in written:
        wanted = names[name].delta_weight(dW.dtype)
        norm = wanted.norm().item()
        if norm < TINY:  # squares of such numbers vanish in float32, and with them the error
            wanted = names[name].delta_weight()
            unit = wanted.abs().amax().item() or 1.0
            wanted, dW = wanted / unit, dW.double() / unit
            norm = wanted.norm().item()
        distance = (dW.reshape(wanted.shape) - wanted).norm().item()
        errors[names[name].name] = distance / norm if norm else distance
    return errors


def _check_errors(errors: Mapping[str, float], to: str, dtype: torch.dtype) -> None:
    bad = {name: error for name, error in errors.items() if not error <= tolerance(dtype)}
    if bad:
        name = max(bad, key=bad.__getitem__)
        raise FormatError(
            f"{name}: rebuilt from the {to} file, dW is off by {bad[name]:.1e} (relative), more than rounding to "
            f"{dtype} explains ({tolerance(dtype):.1e}); {len(bad)} of {len(errors)} layers are. Nothing was written. "
            "Its numbers are probably too small or too far apart for the dtype: use dtype=torch.float32."
        )
