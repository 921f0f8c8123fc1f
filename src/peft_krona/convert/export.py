# SPDX-License-Identifier: Apache-2.0
"""`export`: choose a format, write, read back, rebuild every dW and compare, and only then give the file its name."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import FormatError
from ..factors import largest_divisor
from .adapter import Adapter, KronaLayer
from .diff import diff_deltas, to_diff
from .files import new_folder, output_path, read_safetensors, tensor_hash, write_safetensors
from .loha import loha_deltas, to_loha
from .lokr import as_plain_kron, lokr_deltas, to_lokr
from .lora import lora_deltas, lora_rank, to_lora, to_lora_peft
from .names import UNetNames, is_embedding, to_kohya_name
from .peft import to_peft
from .reading import read_adapter

FORMATS = ("auto", "lokr", "loha", "lora", "diff", "peft")
_WRITERS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "lokr": to_lokr,
    "loha": to_loha,
    "lora": to_lora,
    "diff": to_diff,
}
_DELTAS: dict[str, Callable[..., Iterator[tuple[str, torch.Tensor]]]] = {
    "lokr": lokr_deltas,
    "loha": loha_deltas,
    "lora": lora_deltas,
    "diff": diff_deltas,
}
_NETWORK = {
    "lokr": ("lycoris.kohya", {"algo": "lokr", "full_matrix": "True"}),
    "loha": ("lycoris.kohya", {"algo": "loha"}),
    "lora": ("networks.lora", {}),
    "diff": ("lycoris.kohya", {"algo": "full"}),
}
# A dot in a name is no ending ("my-dog-1.5"); these would be mistaken for what they are not.
_OTHER_ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".gguf", ".onnx", ".json", ".zip")


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


def choose_format(adapter: Adapter) -> tuple[str, bool, str]:
    """(format, split into terms, reason) that "auto" takes.

    One plain term a layer: LoKr, the smallest. One shuffled term: LoHa. More terms: LoRA, if that stays below half the
    rank of every layer, else one file a term. Transformers: LoRA, the one with names that their pipelines take.

    >>> one = KronaLayer("unet", "conv_in", torch.ones(1, 4, 2), torch.ones(1, 4, 8))
    >>> choose_format(Adapter((one,)))
    ('lokr', False, 'one plain Kronecker product a layer')
    """
    if any(not _is_unet_or_clip(layer) for layer in adapter):
        return "lora", False, "the format that pipelines with a transformer load"
    plain = all(as_plain_kron(layer) is not None for layer in adapter for layer in layer.terms())
    if all(layer.r == 1 for layer in adapter):
        if plain:
            return "lokr", False, "one plain Kronecker product a layer"
        return "loha", False, "one shuffled Kronecker product a layer, exact as LoHa and not as LoKr"
    if all(lora_rank(layer) <= min(layer.shape[:2]) / 2 for layer in adapter):
        return "lora", False, "several terms a layer, of a rank at most half of the layer's"
    return ("lokr" if plain else "loha"), True, "several terms a layer, of too high a rank for LoRA: one file a term"


def _is_unet_or_clip(layer: KronaLayer) -> bool:
    return layer.component == "unet" or (
        layer.component in ("text_encoder", "text_encoder_2")
        and layer.module.startswith(("text_model.", "text_projection"))
    )


def export(
    adapter: Adapter,
    out: str | os.PathLike,
    to: str = "auto",
    *,
    base: UNetNames | None = None,
    dtype: torch.dtype | None = None,
    split_terms: bool = False,
) -> Report:
    """Write an adapter for other tools, or as a PEFT folder, and check what was written.

    Args:
        adapter: what to write. out: a file, for "peft" a new folder, with several terms the stem of the files.
        to: one of `FORMATS`. base: the base model's kind, for names and metadata; needed for a UNet.
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
    if to not in FORMATS:
        raise FormatError(f"--to {to} is unknown; expected one of {', '.join(FORMATS)}.")
    reason = ""
    if to == "auto":
        to, split_auto, reason = choose_format(adapter)
        split_terms = split_terms or split_auto
    if to == "peft":
        return _export_peft(adapter, output_path(out), dtype)
    dtype = dtype or torch.float16
    out = _output_file(out)
    if not split_terms:
        return _export_file(adapter, out, to, reason, base, dtype)
    reports = []
    terms = max(layer.r for layer in adapter)
    for n in range(terms):
        part = replace(adapter, layers=tuple(layer.terms()[n] for layer in adapter if layer.r > n))
        path = out if terms == 1 else out.with_name(f"{out.stem}_term{n + 1}of{terms}.safetensors")
        try:
            reports.append(_export_file(part, path, to, reason, base, dtype))
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
    adapter: Adapter, out: Path, to: str, reason: str, base: UNetNames | None, dtype: torch.dtype
) -> Report:
    if "model" in adapter.components:
        raise FormatError(
            "The layers' names belong to no part of a diffusion pipeline, and files for other tools need one. "
            "Use --to peft, or read the adapter from a folder named after its part (unet, transformer, ...)."
        )
    tables = [layer.name for layer in adapter if is_embedding(layer.module)]
    if tables:
        raise FormatError(f"{tables[0]} is an embedding, which files for other tools cannot hold. Use --to peft.")
    if to == "lora" and any(not _is_unet_or_clip(layer) for layer in adapter):
        tensors, metadata = to_lora_peft(adapter, dtype)
        names = {f"{layer.component}.{layer.module}": layer for layer in adapter}
        metadata |= _krona_metadata(adapter)
    else:
        if base is None:
            raise FormatError("A file for this format needs the base model's kind: base='sd15', 'sd2' or 'sdxl'.")
        adapter = _with_whole_attentions(adapter, base)
        tensors = _WRITERS[to](adapter, base, dtype)
        names = {to_kohya_name(layer.component, layer.module, base): layer for layer in adapter}
        metadata = _kohya_metadata(adapter, tensors, to, base, out.stem)
    if len(names) != len(adapter):
        raise FormatError("Two layers have the same name in this format; the adapter cannot be written as such a file.")
    worst: dict[str, float] = {}

    def verify(path: Path) -> None:
        written, _ = read_safetensors(path)
        # float64 where the file's own rounding is near that of float32
        precision = torch.float64 if dtype == torch.float32 else torch.float32
        worst.update(_errors(names, _DELTAS[to](written, precision)))
        _check_errors(worst, to, dtype)

    write_safetensors(out, tensors, metadata, verify)
    layer = max(worst, key=worst.__getitem__)
    notes = _notes(adapter, to)
    return Report(to, reason, (out,), worst[layer], layer, out.stat().st_size, notes)


def _export_peft(adapter: Adapter, out: Path, dtype: torch.dtype | None) -> Report:
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


def _is_same(one: KronaLayer, other: KronaLayer | None) -> bool:
    """Whether two layers are bit for bit the same, so that their dW need not be compared."""
    return (
        other is not None
        and (one.scale, one.layout) == (other.scale, other.layout)
        and torch.equal(one.A, other.A)
        and torch.equal(one.B, other.B)
    )


def _errors(names: Mapping[str, KronaLayer], written: Iterator[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """Relative error of each layer of a file that was read back; layers that are missing count as infinitely wrong."""
    errors = dict.fromkeys((layer.name for layer in names.values()), float("inf"))
    for name, dW in written:
        wanted = names[name].delta_weight(dW.dtype)
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
            "Its numbers are probably too small or too far apart for the dtype: use --dtype fp32."
        )


def _with_whole_attentions(adapter: Adapter, base: UNetNames) -> Adapter:
    """With zero layers added where an OpenCLIP attention lacks some of q, k, v and out: A1111 skips it otherwise."""
    present = {layer.name for layer in adapter}
    added = []
    for layer in adapter:
        open_clip = layer.component == "text_encoder_2" or (
            layer.component == "text_encoder" and base.version == "sd_v2"
        )
        stem = layer.module.rpartition(".")[0]
        if open_clip and stem.endswith("self_attn"):
            for other in ("q_proj", "k_proj", "v_proj", "out_proj"):
                zero = replace(layer, module=f"{stem}.{other}", A=layer.A * 0, B=layer.B * 0)
                if zero.name not in present:
                    present.add(zero.name)
                    added.append(zero)
    return replace(adapter, layers=(*adapter.layers, *added))


def lycoris_loads(layer: KronaLayer) -> bool:
    """Whether LyCORIS 4.1.3 loads the layer as LoKr with two full factors.

    Its loader derives both splits from one number, which it guesses from the factors, and takes the smaller part of
    each side as w1. That admits square left factors, near-square splits, and some others by luck.

    >>> lycoris_loads(KronaLayer("unet", "x", torch.ones(1, 4, 4), torch.ones(1, 8, 80)))
    True
    """
    _, a_out, a_in = layer.A.shape
    _, b_out, b_in, *kernel = layer.B.shape
    n_out, n_in = layer.shape[:2]

    def splits_right(number: int | None) -> bool:
        return _lycoris_split(n_out, number) == a_out and _lycoris_split(n_in, number) == a_in

    if splits_right(None):
        return True
    candidates = max(a_out, a_in), max(b_out, b_in, *kernel)
    fitting = (c for c in candidates if c in (a_out, b_out) and c in (a_in, b_in))
    return splits_right(next(fitting, min(candidates)))


def _lycoris_split(size: int, number: int | None) -> int:
    """The smaller part of LyCORIS' split of a side: by `number` if that divides it, else the nearest to a square."""
    if number is not None and size % number == 0:
        return min(number, size // number)
    return largest_divisor(size, min(number or size, isqrt(size)))


def _notes(adapter: Adapter, to: str) -> tuple[str, ...]:
    if to == "lokr":
        refused = [layer for layer in adapter if not lycoris_loads(as_plain_kron(layer))]
        if refused:
            a_out, a_in = refused[0].factors
            return (
                f"LyCORIS itself does not load the factors of {len(refused)} of {len(adapter)} layers (a_out={a_out}, "
                f"a_in={a_in} in {refused[0].name}); ComfyUI and A1111 do. For LyCORIS and diffusers use --to lora.",
            )
    if to == "diff":
        return ("diffusers does not load .diff files; ComfyUI, A1111 and LyCORIS do",)
    return ()


def _krona_metadata(adapter: Adapter) -> dict[str, str]:
    """What the adapter was before: factors and layouts, with base model and trigger words if known."""
    factors = Counter(f"{layer.r}x{layer.factors[0]}x{layer.factors[1]}" for layer in adapter)
    metadata = {
        "format": "pt",
        "krona.factors": json.dumps(dict(factors.most_common())),  # {"r x a_out x a_in": layers}
        "krona.layout": ",".join(sorted({layer.layout for layer in adapter})),
        "krona.source": adapter.source,
    }
    return metadata | dict(adapter.metadata)


def _kohya_metadata(
    adapter: Adapter, tensors: Mapping[str, torch.Tensor], to: str, base: UNetNames, name: str
) -> dict[str, str]:
    """The metadata that kohya's tools, A1111 and ComfyUI's managers read."""
    module, arguments = _NETWORK[to]
    alphas = [float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")]
    size = "1024x1024" if base.version.startswith("sdxl") else "512x512"
    metadata = {
        "ss_network_module": module,
        "ss_network_args": json.dumps(arguments),
        "ss_network_dim": f"{max(alphas, default=1):.0f}",
        "ss_network_alpha": f"{max(alphas, default=1):.0f}",
        "ss_output_name": name,
        "ss_base_model_version": base.version,
        "ss_v2": str(base.version == "sd_v2"),
        "ss_sd_model_name": adapter.metadata.get("base_model", ""),
        "sshs_model_hash": tensor_hash(tensors),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.resolution": size,
        "modelspec.trigger_phrase": adapter.metadata.get("trigger_words", ""),
    }
    return {key: value for key, value in metadata.items() if value} | _krona_metadata(adapter)
