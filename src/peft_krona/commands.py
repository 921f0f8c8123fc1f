# SPDX-License-Identifier: Apache-2.0
"""What the commands of `python -m peft_krona` do: `RUN`, by name. Their arguments are in `_command_line`."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import plan
from ._command_line import in_flags
from .convert import (
    BASES,
    FORMATS,
    UNetNames,
    base_of_folder,
    check_base,
    describe_base,
    export,
    from_difference,
    guess_base_and_why,
    names_need_base,
    planned_files,
    read_adapter,
    shapes_of_folder,
)
from .convert.checkpoints import read_component
from .convert.merge_pipeline import merge_pipeline
from .errors import FormatError
from .inspection import check_picture_name, inspect_adapter, plot, shares, table
from .sources import DENOISERS, find, find_configs, is_hub_id

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ADAPTER_CONFIG, PIPELINE_INDEX = "adapter_config.json", "model_index.json"


def convert(options: argparse.Namespace) -> None:
    """Any adapter to a file for another tool, or to a PEFT folder."""
    if options.to not in FORMATS:
        raise FormatError(f"--to {options.to}: expected one of {', '.join(FORMATS)}.")
    source = _found(options.input)
    base = _base(options.base, source, needed=options.to != "peft")
    adapter = read_adapter(source, base.names, base.shapes)
    if base.shapes is not None:
        adapter = adapter.fitted(base.shapes)
    elif base.kind is not None:
        check_base(adapter, base.kind)
    adapter = adapter.scaled(options.scale)
    if options.trigger:
        adapter = replace(adapter, metadata={**adapter.metadata, "trigger_words": options.trigger})
    names = base.names
    if names is None and options.to != "peft" and names_need_base(adapter):
        kind, why = guess_base_and_why(adapter)
        names = BASES[kind]
        print(f"base: {kind}, guessed from {why}; --base says it if that is wrong")
    elif base.said:
        print(f"base: {base.said}")
    print(f"read {len(adapter)} layers ({adapter.source}) from {options.input}")
    dtype = DTYPES[options.dtype] if options.dtype else None
    files = planned_files(adapter, options.output, options.to, options.split_terms)
    if options.to == "peft":
        with _folder(options.output, options, _is_adapter, source) as out:
            report = export(adapter, out, "peft", dtype=dtype)
        moved = tuple(Path(options.output, file.relative_to(out)) for file in report.files)
        report = replace(report, files=moved)
    else:
        for file in files:
            _check_new_file(file, options.force, source)
        report = export(
            adapter, options.output, options.to, base_model=names, dtype=dtype, split_terms=options.split_terms
        )
    print(in_flags(str(report)))


def inspect(options: argparse.Namespace) -> None:
    """What an adapter changes, layer by layer."""
    if options.plot:
        check_picture_name(options.plot)
        _check_new_file(Path(options.plot), options.force)
    source = _found(options.input)
    adapter = read_adapter(source)
    base = options.base
    if base is None and (named := _named_base(source)) is not None:
        base = named.folder
        if base is None:
            print(f"base: {named.name}, as the adapter says, is not on disk; --base FOLDER adds ||dW|| / ||W||")
    try:
        stats = inspect_adapter(adapter, base)
        found = shares(adapter, base) if base is not None else {}
        if base is not None and options.base is None:
            print(f"base: {base}, as the adapter says (base_model_name_or_path)")
    except FormatError as error:
        if options.base is not None:
            raise
        print(f"base: {base}, as the adapter says, is not taken: {in_flags(str(error))}")  # nobody asked for it
        stats, found = inspect_adapter(adapter), {}
    print(table(stats))
    for component, share in found.items():
        print(f"{component}: KronA adapts {share}")
    if options.plot:
        plot(stats, options.plot, Path(options.input).name)
        print(f"wrote {options.plot}")


def merge(options: argparse.Namespace) -> None:
    """A pipeline with an adapter merged into its weights."""
    adapter = read_adapter(_found(options.adapter)).scaled(options.scale)
    dtype = DTYPES[options.dtype] if options.dtype else None
    with _folder(options.output, options, _is_pipeline, options.pipeline, options.adapter) as out:
        merge_pipeline(options.pipeline, adapter, out, dtype)
    print(f"merged {len(adapter)} layers into {options.pipeline}, wrote {options.output}")


def extract(options: argparse.Namespace) -> None:
    """The nearest adapter to the difference of two models."""
    if options.component not in DENOISERS and not re.fullmatch(r"text_encoder(_[23])?", options.component):
        raise FormatError(
            f"--component {options.component}: expected a part of a pipeline that adapters are loaded into: "
            f"{', '.join(DENOISERS)}, text_encoder, text_encoder_2 or text_encoder_3."
        )
    with _folder(options.output, options, _is_adapter, options.before, options.after) as out:
        adapter, errors = from_difference(
            *_comparable(
                read_component(options.before, options.component), read_component(options.after, options.component)
            ),
            options.a_out,
            options.a_in,
            r=options.r,
            layout=options.layout,
            component=options.component,
        )
        report = export(adapter, out, "peft")
    for name, error in errors.items():
        print(f"{error:8.2%} of dW is lost in {name}")
    print(replace(report, files=tuple(Path(options.output, file.relative_to(out)) for file in report.files)))


def _comparable(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights that both models have, in the same shape and dtype; what is left out is printed."""
    shapes = {key: (before[key].shape, after[key].shape) for key in before if key in after}
    for key in sorted(before.keys() ^ after.keys()):
        if key.endswith(".weight"):
            print(f"left out {key}: only one of the two models has it")
    for key, (one, other) in shapes.items():
        if one != other:
            print(f"left out {key}: its shape is {tuple(one)} and {tuple(other)}")
    common = [key for key, (one, other) in shapes.items() if one == other]
    coarser = [key for key in common if before[key].dtype != after[key].dtype]
    if coarser:
        print(
            f"{len(coarser)} weights have two dtypes: the finer are rounded to the coarser, so that this is no change"
        )
    for key in coarser:
        dtype = min(before[key].dtype, after[key].dtype, key=lambda dtype: (dtype.itemsize, -torch.finfo(dtype).eps))
        before[key], after[key] = before[key].to(dtype), after[key].to(dtype)
    return {key: before[key] for key in common}, {key: after[key] for key in common}


RUN: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "convert": convert,
    "inspect": inspect,
    "merge": merge,
    "extract": extract,
    plan.NAME: plan.run,
}

# -- the adapter and its base model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Base:
    """`kind`: a key of `BASES`, if that is all that is known. `said`: what it is and who says so."""

    names: UNetNames | None = None
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None
    kind: str | None = None
    said: str = ""


def _found(source: str) -> Path:
    """The adapter on disk; one on the Hub is downloaded, or taken from its cache."""
    return Path(source) if Path(source).exists() or not is_hub_id(source) else find(source)


def _base(given: str | None, source: Path, needed: bool) -> _Base:
    """What is known of the base model before the adapter is read: `--base`, or else what the adapter names.

    Args:
        needed: whether it is worth asking the Hub for the configs of a model that the adapter names.
    """
    if given is not None:
        if given in BASES:
            return _Base(BASES[given], kind=given)
        if Path(given).is_dir():
            return _of_folder(given, given)
        if is_hub_id(given) and not Path(given).exists():
            return _of_configs(given, given)
        raise FormatError(f"--base {given}: expected one of {', '.join(BASES)}, or the folder of a pipeline or model.")
    named = _named_base(source)
    if named is None or not needed:
        return _Base()
    said = f"{named.name}, as the adapter says (base_model_name_or_path)"
    try:
        if named.folder is not None:
            return _of_folder(str(named.folder), said)
        if is_hub_id(named.name):
            return _of_configs(named.name, said)
    except FormatError as error:
        print(f"base: {said}, is not taken: {in_flags(str(error))}")
    return _Base()


def _of_folder(folder: str, said: str) -> _Base:
    names = base_of_folder(folder)
    return _Base(names, shapes_of_folder(folder), said=f"{said}{describe_base(names)}")


def _of_configs(name: str, said: str) -> _Base:
    names = base_of_folder(find_configs(name))
    return _Base(names, said=f"{said}{describe_base(names)}")


@dataclass(frozen=True)
class _Named:
    """The base model that an adapter names. `folder`: that of the pipeline, or of the one model, if it is on disk."""

    name: str
    folder: Path | None


def _named_base(source: Path) -> _Named | None:
    """The one `base_model_name_or_path` in a PEFT folder's configs, or in a file's header; None if there is not one.

    A path is looked up from the adapter's folder, or from one or two above it (a part of the pipeline, a checkpoint),
    as the training script writes it, then from the current one.
    """
    if source.name == "adapter_model.safetensors":
        source = source.parent
    own = source / ADAPTER_CONFIG
    if source.is_dir():
        files = [own] if own.is_file() else sorted(source.glob(f"*/{ADAPTER_CONFIG}"))
        names = {file: _name_in_config(file) for file in files}
    else:
        names = {source: _name_in_header(source)}
    found = {
        _Named(str(folder) if (folder := _on_disk(name, file)) else name, folder)
        for file, name in names.items()
        if name
    }
    return found.pop() if len(found) == 1 else None


def _name_in_config(file: Path) -> str | None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None  # whoever reads the adapter says what is wrong with it
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) else None


def _name_in_header(file: Path) -> str | None:
    try:
        with safe_open(file, "pt") as weights:
            header = weights.metadata() or {}
        return header.get("base_model") or header.get("ss_sd_model_name")  # kohya's
    except (SafetensorError, OSError):
        return None  # the same


def _on_disk(name: str, file: Path) -> Path | None:
    for folder in (*(parent / name for parent in file.resolve().parents[:3]), Path(name)):
        if (folder / PIPELINE_INDEX).is_file():
            return _short(folder)
        if (folder / "config.json").is_file():
            return _short(folder.parent if (folder.parent / PIPELINE_INDEX).is_file() else folder)
    return None


def _short(folder: Path) -> Path:
    """From the current folder if it is in it."""
    folder = Path(os.path.normpath(folder))
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_absolute() and folder.is_relative_to(here) else folder


# -- what is written ---------------------------------------------------------------------------------------------------


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() or any(folder.glob(f"*/{ADAPTER_CONFIG}"))


def _is_pipeline(folder: Path) -> bool:
    return (folder / PIPELINE_INDEX).is_file()


def _check_new_file(file: Path, force: bool, *read: str | os.PathLike) -> None:
    """Refuse, before anything is computed, a file that cannot or should not be written."""
    if file.is_dir():
        raise FormatError(f"{file}: expected the name of a file to write, got a folder. Name a file in it.")
    _check_place(file, read)
    if file.exists() and not force:
        raise FormatError(f"{file}: exists already. Name another file, or replace this one with --force.")


def _check_place(out: Path, read: tuple[str | os.PathLike, ...]) -> None:
    for source in map(Path, read):
        around = source.exists() and source.resolve().is_relative_to(out.resolve())
        if around or (source.is_dir() and out.exists() and out.resolve().is_relative_to(source.resolve())):
            raise FormatError(f"{out}: {source} is read from there, so it is not written. Name another output.")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir():
        raise FormatError(f"{out}: {place} is a file, not a folder. Name another output.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise FormatError(f"{out}: the folder {place} cannot be written to (no permission). Name another output.")


@contextmanager
def _folder(
    out: str, options: argparse.Namespace, holds: Callable[[Path], bool], *read: str | os.PathLike
) -> Iterator[Path]:
    """Where to write a folder that is to become `out`: itself if it is new; else one beside it that takes its place.

    Args:
        holds: whether a folder is what the command writes; nothing else is replaced, with --force neither. read: what
            the command reads, which it never replaces.
    """
    path = Path(out)
    if path.name not in ("", ".."):  # whoever writes refuses these
        _check_place(path, read)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())) or path.name in ("", ".."):
        yield path
        return
    if not options.force:
        raise FormatError(f"{out}: exists already. Name a new folder, or replace this one with --force.")
    if not path.is_dir() or not holds(path):
        raise FormatError(
            f"{out}: exists already and is nothing that this command writes, so that --force does not replace it. Name "
            "a new folder, or remove this one first."
        )
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=".tmp") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        yield new
        os.replace(path, old)
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(old, path)
            raise
