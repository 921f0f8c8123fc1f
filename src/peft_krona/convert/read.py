# SPDX-License-Identifier: Apache-2.0
"""`read_adapter`: any file or folder of a known format, told apart by its content."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config import KronAConfig
from ..errors import FormatError, KronAError
from .families import Target
from .file_names import Shapes, resolve, without_wrappers
from .foreign import what_is
from .formats import FORMATS, SHARED_ENDINGS, Factors, Format, Parts
from .formats.diffusekrona import DIFFUSEKRONA, looks_like_lora
from .formats.format import header_alpha
from .formats.krona import KRONA, config_from_json
from .formats.lokr import LOKR
from .formats.lora import LORA
from .fused import split, swap_halves
from .groups import complete, group_by_layer
from .names import guess_component, to_file_name
from .record import AdapterFile, LayerUpdate
from .safetensors_io import read_safetensors
from .unet_names import UNetNames, kernel_of

logger = logging.getLogger(__name__)

_SINGLE_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def read_adapter(
    path: str | os.PathLike, base_model: UNetNames | None = None, shapes: Shapes | None = None
) -> AdapterFile:
    """Read an adapter of any supported format, told by its content.

    Supported are PEFT folders (KronA, LoKr, LoRA) of one model or of a pipeline's parts, released DiffuseKronA
    checkpoints, LoKr and LoRA files, and folders that hold one of these files.

    Args:
        path: a file or a folder.
        base_model: its kind (`names.BASES`), needed only for LoKr files that store 1 x 1 convolutions as matrices.
        shapes: the base model's layers ({component: {module: shape}}, see `shapes_of_folder` and `shapes_of_models`).
            A file's layer names are looked up among them; without them they are read by what is known of the families.

    Returns:
        The adapter; `AdapterFile.peft_components()` makes configs and state dicts of it.

    Raises:
        FormatError: names file, key and reason.
        FileNotFoundError: if there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder.")
    if path.is_dir():
        return _read_folder(path, base_model, shapes)
    if path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").is_file():
        return _read_peft_folder(path.parent, None)
    tensors, metadata = read_safetensors(path)
    with _naming(path):
        return from_tensors(tensors, metadata, base_model, shapes)


def _read_folder(path: Path, base_model: UNetNames | None, shapes: Shapes | None) -> AdapterFile:
    parts = _peft_folders(path)
    if parts:
        adapters = [_read_peft_folder(part, None if part == path else part.name) for part in parts]
        layers = tuple(layer for adapter in adapters for layer in adapter)
        metadata = {key: value for adapter in adapters for key, value in adapter.metadata.items()}
        return AdapterFile(layers, source=adapters[0].source, metadata=metadata)
    files = [path / name for name in _SINGLE_FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return read_adapter(files[0], base_model, shapes)
    found = ", ".join(file.name for file in files) or "no safetensors file"
    raise FormatError(
        f"{path}: expected an adapter_config.json here or one folder deeper, or one safetensors file; found {found}. "
        "Name the file itself."
    )


def _peft_folders(path: Path) -> list[Path]:
    """The folder itself, or those of a pipeline's parts in it, if they hold an adapter_config.json."""
    if (path / "adapter_config.json").is_file():
        return [path]
    return sorted(part.parent for part in path.glob("*/adapter_config.json"))


def _read_peft_folder(path: Path, component: str | None) -> AdapterFile:
    config = _read_config(path)
    tensors, metadata = _read_peft_weights(path)
    with _naming(path):
        adapter = from_peft(config, tensors, component)
    return replace(adapter, metadata={**_known_metadata(metadata), **adapter.metadata})


def _read_config(path: Path) -> dict[str, Any]:
    config_file = path / "adapter_config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{config_file} is not the config of a PEFT adapter: not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise FormatError(f"{config_file}: expected a JSON object, got {type(config).__name__}.")
    return config


def _read_peft_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():
        beside = ", ".join(sorted(p.name for p in path.glob("adapter_model*"))) or "nothing of that kind"
        raise FormatError(
            f"{path} has an adapter_config.json but no adapter_model.safetensors ({beside}). Pickled weights "
            "(.bin) are not opened; save the adapter again with safe_serialization=True."
        )
    return read_safetensors(weights)


def saved_components(path: str | os.PathLike) -> dict[str, tuple[KronAConfig, dict[str, torch.Tensor]]] | None:
    """A KronA folder with its settings as they were saved, {component: (config, state dict)}; None for other adapters.

    `read_adapter` reads the same folders into numbers alone. Here dropouts, scaling and patterns stay what they were,
    and weights that were trained beside the adapter (biases, modules_to_save) are among the tensors.

    Args:
        path: a folder that PEFT or `save_krona_weights` wrote. A single model's component is guessed from its layers'
            names.

    Raises:
        FormatError, ConfigError: as `read_adapter`.
    """
    path = Path(path)
    folders = _peft_folders(path) if path.is_dir() else []
    configs = {folder: _read_config(folder) for folder in folders}
    if not configs or any(config.get("peft_type") != KRONA.peft_type for config in configs.values()):
        return None
    components = {}
    for folder, config in configs.items():
        tensors, _ = _read_peft_weights(folder)
        state_dict = _renamed(tensors, without_wrappers)
        with _naming(folder):
            settings = config_from_json(config)
        settings.inference_mode = True
        components[guess_component(state_dict) if folder == path else folder.name] = settings, state_dict
    return components


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before the messages of the readers, which only see tensors."""
    try:
        yield
    except KronAError as error:
        raise type(error)(f"{path}: {error}") from error


def from_tensors(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    base_model: UNetNames | None = None,
    shapes: Shapes | None = None,
) -> AdapterFile:
    """The adapter in a file's tensors, whichever supported format that is; see `read_adapter`."""
    metadata = metadata or {}
    config = _stored_config(metadata)
    if config:
        adapter = _from_stored_config(tensors, config)
    else:
        if not tensors:
            raise FormatError("The file has no adapter weights.")
        groups = _grouped(tensors)
        formats = _formats_of(groups)
        layers = _layers({name: (formats[name], parts) for name, parts in groups.items()}, metadata, base_model, shapes)
        adapter = AdapterFile(layers, source="+".join(dict.fromkeys(format.name for format in formats.values())))
    return replace(adapter, metadata={**_known_metadata(metadata), **adapter.metadata})


def from_lokr(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, base_model: UNetNames | None = None
) -> AdapterFile:
    """Read a LoKr file as KronA of layout "kron": exact (low-rank sides are multiplied out).

    A convolution's w2 that is stored as a matrix (kohya) gets its kernel from the layer's name; where the flattened
    input is not split at a multiple of the kernel (sd-scripts' KronA) that takes several terms and is still exact.

    Args:
        tensors: LoKr keys under flat (`lora_unet_...`) or dotted (`unet....`) names.
        metadata: the file's; needed for scales that some trainers put nowhere else.
        base_model: its kind; needed for `proj_in` and `proj_out` stored as matrices (1 x 1 convolutions in SD 1.x).

    Raises:
        FormatError: names the layer: sides missing or doubled, shapes that do not fit, DoRA, alpha not positive.
    """
    return _from_one_format(LOKR, tensors, metadata or {}, base_model)


def from_lora(tensors: Mapping[str, torch.Tensor]) -> AdapterFile:
    """Read a LoRA file as KronA: exact, with a_out = out, a_in = 1, b_out = 1, b_in = in and r = rank.

    Args:
        tensors: keys of kohya's, diffusers' or PEFT's kind; convolutions with their kernel in the down half.
            Without an alpha a layer's scale is 1.

    Raises:
        FormatError: names the layer: a half missing, shapes that do not fit, DoRA, a Tucker core, alpha not positive.
    """
    return _from_one_format(LORA, tensors, {}, None)


def from_diffusekrona(tensors: Mapping[str, torch.Tensor]) -> AdapterFile:
    """Read a released DiffuseKronA checkpoint: exact, factors as they are.

    Args:
        tensors: `unet.<path>.attn{1,2}.processor.to_{q,k,v,out}_lora.{down,up}.weight`,
            `text_encoder[_2].text_model....{q,k,v,out}_proj.lora_linear_layer.{down,up}.weight`, and
            `unet....ff.net.{0.proj,2}.lora_layer.{down,up}.weight`; down (a_in, a_out), up (b_out, b_in).

    Returns:
        An adapter of layout "diffusekrona", scale 1, r = 1.

    Raises:
        FormatError: names the key: of another format, one half missing, not a matrix, an attention's q, k, v and out
            that do not fit each other, or LoRA in place of KronA.
    """
    adapter = _from_one_format(DIFFUSEKRONA, tensors, {}, None)
    if looks_like_lora(group_by_layer(tensors, DIFFUSEKRONA.endings)):
        raise FormatError(
            "Every down and up of this file share a rank, down (rank, in) and up (out, rank): this is LoRA, not KronA. "
            "Read it with from_lora."
        )
    return adapter


def _from_one_format(
    format: Format, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], base_model: UNetNames | None
) -> AdapterFile:
    endings = (*format.endings, *format.extras, *(SHARED_ENDINGS if format is not DIFFUSEKRONA else ()))
    groups = group_by_layer(tensors, endings)
    layers = _layers({name: (format, parts) for name, parts in groups.items()}, metadata, base_model)
    return AdapterFile(layers, source=format.name)


def _grouped(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{layer: {ending: tensor}} of a file of any formats."""
    tensors = _renamed(tensors, _without_adapter_name)
    endings = dict.fromkeys(SHARED_ENDINGS)
    for format in FORMATS.values():
        endings |= dict.fromkeys((*format.endings, *format.extras))
    foreign = next((key for key in tensors if not key.endswith(tuple(f".{ending}" for ending in endings))), None)
    if foreign is not None:
        known = next((key for key in tensors if what_is(key) and not key.endswith(".dora_scale")), None)
        if known is not None:
            raise FormatError(f"The key '{known}' {what_is(known)}")
        raise FormatError(f"The key '{foreign}' is of no adapter format that is known here. Is this a full model?")
    return group_by_layer(tensors, endings)


def _renamed(tensors: Mapping[str, torch.Tensor], rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """The tensors under other keys.

    Raises:
        FormatError: if two keys become one, as those of two adapters in one file do.
    """
    renamed: dict[str, str] = {}
    for key in tensors:
        other = renamed.setdefault(rename(key), key)
        if other != key:
            raise FormatError(f"The keys '{other}' and '{key}' are the same weight of two adapters. Keep one of them.")
    return {new: tensors[key] for new, key in renamed.items()}


def _without_adapter_name(key: str) -> str:
    """PEFT's own state dicts, saved as they are, have the adapter's name in their keys: `lora_A.default.weight`."""
    return _ADAPTER_NAME.sub(lambda m: f".{m[1]}.{m[2]}" if m[1] else f".{m[3]}", key)


def _formats_of(groups: Mapping[str, Parts]) -> dict[str, Format]:
    """The format of each layer, by its endings. Files may hold several: LyCORIS chooses one per layer.

    Raises:
        FormatError: names a layer of no format, or of two.
    """
    found: dict[str, Format] = {}
    for format in FORMATS.values():
        own = {name: parts for name, parts in groups.items() if not parts.keys().isdisjoint(format.endings)}
        if format.claims is not None and not (own and format.claims(groups)):
            continue
        for name in own:
            other = found.setdefault(name, format)
            if other is not format and set(groups[name]) & set(format.endings) - set(other.endings):
                raise FormatError(
                    f"The layer '{name}' mixes {other.name} and {format.name} ({', '.join(sorted(groups[name]))}); "
                    "no tool reads one layer of two formats. Keep one of them."
                )
    alone = next((name for name in groups if name not in found), None)
    if alone is not None:
        raise FormatError(
            f"The layer '{alone}' has {', '.join(sorted(groups[alone]))} and no weights: half of it is missing. "
            "The file is incomplete."
        )
    return found


def _layers(
    found: Mapping[str, tuple[Format, Parts]],
    metadata: Mapping[str, str],
    base_model: UNetNames | None,
    known: Shapes | None = None,
) -> tuple[LayerUpdate, ...]:
    """The layers that the names of a file stand for.

    Raises:
        FormatError: if one is of a format that is not read, and whatever a format's reader raises.
    """
    readers = {}
    for name, (format, parts) in found.items():
        if format.read is None:
            key = f"{name}.{next(ending for ending in parts if ending in format.endings)}"
            raise FormatError(f"This is a {format.name} file ('{key}'), which {format.refuses}.")
        if "dora_scale" in parts:
            raise FormatError(
                f"'{name}' is DoRA ('dora_scale'): the layer's weight becomes m (W + dW) / ||W + dW||, which depends "
                "on W and is no plain low-rank update and no fixed Kronecker one. Merge the file with the tool that "
                "made it, then extract the difference of the two models."
            )
        readers[name] = format.read
    if any("alpha" in parts for _, parts in found.values()):
        metadata = {key: value for key, value in metadata.items() if "alpha" not in key and "lora_alpha" not in value}
    elif any(header_alpha(name, metadata) for name in found):
        logger.warning(
            "No layer of the file has an alpha; that of its header is taken. Tools that read only the tensors take the "
            "rank for it, so that the adapter has another strength there."
        )
    factors = {name: read(name, found[name][1], metadata) for name, read in readers.items()}
    shapes = {name: (A.shape[1] * B.shape[1], A.shape[2] * B.shape[2]) for name, (A, B, *_) in factors.items()}
    per_block = 2 if base_model is None else base_model.layers_per_block
    targets = resolve(shapes, known, per_block)
    of_format: dict[str, list[LayerUpdate]] = {}
    for name, target in targets.items():
        members = of_format.setdefault(found[name][0].name, [])
        for module, update in _parts(name, factors[name], target).items():
            layer = LayerUpdate(target.component, module, *update)
            if not layer.kernel:
                layer = layer.with_kernel(kernel_of(layer.component, module, base_model))
            members.append(layer)
    for format_name, members in of_format.items():
        check = FORMATS[format_name].check
        if check is not None:
            check(members)
    return tuple(layer for members in of_format.values() for layer in members)


def _parts(name: str, factors: Factors, target: Target) -> dict[str, Factors]:
    """The update of a layer of a file as those of the model's layers that it stands for."""
    if target.swapped:
        factors = swap_halves(factors)
    if len(target.modules) == 1:
        return {target.modules[0]: factors}
    rows, whole = factors.A.shape[1] * factors.B.shape[1], sum(target.shares)
    if rows % whole:
        raise FormatError(
            f"'{name}': its {rows} rows are not {' + '.join(map(str, target.shares))} equal shares, as "
            f"{', '.join(target.modules)} need."
        )
    sizes = {module: rows // whole * share for module, share in zip(target.modules, target.shares, strict=True)}
    return split({name: factors}, {name: sizes})


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], component: str | None = None
) -> AdapterFile:
    """Read a PEFT adapter of a type that a format here has (KRONA, LOKR, LORA): exact.

    Args:
        config: the content of `adapter_config.json`.
        tensors: of `adapter_model.safetensors`: `base_model.model.<module>.krona_A` and so on.
        component: the pipeline's part; without it, guessed from the layers' names.

    Raises:
        FormatError: for another peft_type, or names the layer: halves missing, factors that are not the config's, DoRA.
        ConfigError: if a KRONA config has values that are not allowed.
    """
    kind = config.get("peft_type")
    readers = {f.peft_type: (f.read_peft, f.peft_endings) for f in FORMATS.values() if f.read_peft is not None}
    if not isinstance(kind, str) or kind not in readers:
        raise FormatError(f"adapter_config.json: peft_type={kind!r} cannot be read; expected one of {tuple(readers)}.")
    tensors = _renamed(tensors, lambda key: _without_adapter_name(without_wrappers(key)))
    known = next((key for key in tensors if what_is(key)), None)
    if known is not None:
        raise FormatError(f"The key '{known}' {what_is(known)}")
    extra = next((key for key in tensors if not _FACTOR.search(key)), None)
    if extra is not None:
        raise FormatError(
            f"'{extra}' is a whole weight that was trained beside the adapter (bias or modules_to_save). Only PEFT "
            "itself loads such adapters: PeftModel.from_pretrained(model, folder)."
        )
    component = component or guess_component(tensors)
    read, (required, optional) = readers[kind]
    groups = group_by_layer(tensors, (*required, *optional))
    for module, parts in groups.items():
        complete(module, parts, required)
    layers = []
    for module, factors in read(config, groups).items():
        layer = LayerUpdate(component, to_file_name(component, module), *factors)
        layers.append(layer if layer.kernel else layer.with_kernel(kernel_of(component, module, None)))
    return AdapterFile(tuple(layers), source=f"peft-{kind.lower()}", metadata=_base_model_name(config))


_FACTOR = re.compile(r"\.(krona|lokr|lora|hada)_")
_ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.(?!weight$|bias$)[^.]+\.(weight|bias)$|\.(lora_embedding_[AB])\.[^.]+$")


def _base_model_name(config: Mapping[str, Any]) -> dict[str, str]:
    name = config.get("base_model_name_or_path")
    return {"base_model": name} if isinstance(name, str) and name else {}


def _stored_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The PEFT config that diffusers' save_lora_adapter and save_lora_weights put into the metadata; {} if none."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"The metadata's lora_adapter_metadata is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise FormatError("The metadata's lora_adapter_metadata is not a table.")
    return config


def _from_stored_config(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> AdapterFile:
    """One model's weights, or those of a pipeline's parts with their names as prefixes of keys and config entries."""
    if "peft_type" in config:
        return from_peft(config, tensors)
    components = dict.fromkeys(key.split(".")[0] for key in tensors)
    adapters = [from_peft(_under(name, config), _under(name, tensors), name) for name in components]
    return AdapterFile(tuple(layer for adapter in adapters for layer in adapter), source=adapters[0].source)


def _under(component: str, table: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in table.items() if key.startswith(prefix)}


def _known_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """What is passed on of a file's metadata: the base model and the trigger words."""
    sources = {
        "base_model": ("base_model", "ss_sd_model_name"),
        "trigger_words": ("trigger_words", "modelspec.trigger_phrase"),
    }
    found = {name: next((metadata[key] for key in keys if metadata.get(key)), "") for name, keys in sources.items()}
    return {name: value for name, value in found.items() if value}
