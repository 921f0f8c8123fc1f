# SPDX-License-Identifier: Apache-2.0
"""Reading safetensors files with suspicion; writing files that are either whole and checked, or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import FormatError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_TENSORS = 100_000
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Bookkeeping numbers (`<layer>.alpha`) are found in any dtype.
_NUMBER_BYTES = _DTYPE_BYTES | {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
}  # fmt: skip
_NUMBER = ".alpha"
_OTHER_TYPES = {
    b"\x80": "a Python pickle",
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<": "a web page",
}


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file of floating-point weights. Nothing in it is ever executed.

    Args:
        path: the file.

    Returns:
        {key: tensor on the CPU, in the file's dtype}, {metadata key: string}.

    Raises:
        FormatError: names the file, the key where there is one, and the reason: not a safetensors file (pickles are
            refused, not opened), truncated, header malformed or with duplicate keys, shapes that do not fit the data,
            integer or 8-bit dtypes, NaN or infinite values (but for
            `<layer>.alpha`, of which readers judge).
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise FormatError(f"{path}: not a valid safetensors file: {error}.") from error
    for key, tensor in tensors.items():
        if not key.endswith(_NUMBER) and not torch.isfinite(tensor).all():
            raise FormatError(
                f"{path}: '{key}' holds NaN or infinite values. The training run diverged, or it is damaged."
            )
    return tensors, metadata


def read_weights(path: str | os.PathLike, only: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor) of a model's safetensors file, one at a time; only floating-point ones (no position ids).

    Args:
        path: the file. only: the keys to read; None reads all.

    Raises:
        FormatError: if it is no safetensors file, or a damaged one.
    """
    floats = [key for key, (dtype, _) in read_header(path).items() if dtype in _DTYPE_BYTES]
    keys = [key for key in floats if only is None or key in only]
    try:
        with safe_open(path, framework="pt") as file:
            for key in keys:
                yield key, file.get_tensor(key)
    except SafetensorError as error:
        raise FormatError(f"{path}: not a valid safetensors file: {error}.") from error


def read_header(path: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{key: (dtype name, shape)} of a safetensors file of any dtypes, without reading its data.

    Raises:
        FormatError: as `read_safetensors`, for the header.
    """
    header = _parse_header(Path(path))
    return {key: (entry["dtype"], tuple(entry["shape"])) for key, entry in header.items() if key != "__metadata__"}


def _check_header(path: Path) -> None:
    header = _parse_header(path)
    with path.open("rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
    data_bytes = path.stat().st_size - data_start
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        sizes = _NUMBER_BYTES if key.endswith(_NUMBER) else _DTYPE_BYTES
        if entry["dtype"] not in sizes:
            raise FormatError(
                f"{path}: '{key}' has dtype {entry['dtype']}; adapter weights are one of {', '.join(_DTYPE_BYTES)}."
            )
        begin, end = entry["data_offsets"]
        wanted = prod(entry["shape"]) * sizes[entry["dtype"]]
        if end - begin != wanted:
            raise FormatError(
                f"{path}: '{key}' declares shape {tuple(entry['shape'])} in {entry['dtype']}, which is {wanted} bytes, "
                f"but has {end - begin} bytes."
            )
        if not 0 <= begin <= end <= data_bytes:
            raise FormatError(
                f"{path}: '{key}' should end at byte {end} of the data, but the file has {data_bytes} bytes of data. "
                "It is truncated or damaged; get it again."
            )


def _parse_header(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        length = _header_length(start, size)
        if length is None:
            kind = next((kind for magic, kind in _OTHER_TYPES.items() if start.startswith(magic)), None)
            if kind is not None:
                raise FormatError(
                    f"{path}: this is {kind}. Only safetensors files are read: pickles can run code when opened. "
                    "Convert it with a tool that you trust."
                )
            raise FormatError(
                f"{path}: not a safetensors file, or truncated: its {size} bytes do not hold the header that the first "
                f"8 bytes announce ({int.from_bytes(start[:8], 'little')} bytes)."
            )
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path}: the safetensors header is not valid JSON: {error}.") from error
    except _DuplicateKeyError as error:
        raise FormatError(f"{path}: the header has the key '{error.args[0]}' twice.") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise FormatError(f"{path}: the safetensors header is not a table of at most {MAX_TENSORS} tensors.")
    for key, entry in header.items():
        if key != "__metadata__" and not _is_tensor_entry(entry):
            raise FormatError(f"{path}: the header's entry for '{key}' is not a tensor's dtype, shape and offsets.")
    return header


class _DuplicateKeyError(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return table


def _header_length(start: bytes, size: int) -> int | None:
    """The header's length, if this begins as a safetensors file does and is large enough to hold it."""
    if start[8:9] != b"{":
        return None
    length = int.from_bytes(start[:8], "little")
    return length if 2 <= length <= min(size - 8, MAX_HEADER_BYTES) else None


def _is_tensor_entry(entry: object) -> bool:
    def is_sizes(value: object) -> bool:
        return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)

    return (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and is_sizes(entry.get("shape"))
        and is_sizes(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
        and entry["data_offsets"][0] <= entry["data_offsets"][1]
    )


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Write a safetensors file under a temporary name, verify that, and only then give it its name.

    Args:
        path: replaced if it exists. Its folder is made if need be.
        tensors: written contiguous, in the given order of keys. metadata: strings.
        verify: called with the temporary file; what it raises leaves nothing behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        data = save({key: tensor.contiguous() for key, tensor in tensors.items()}, dict(metadata))
        Path(temporary).write_bytes(data)
        if verify is not None:
            verify(Path(temporary))
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def output_path(path: str | os.PathLike) -> Path:
    """The path, if something can be written under it.

    Raises:
        FormatError: if it names neither a file nor a folder: "", "." and the like.
    """
    if Path(path).name in ("", ".."):
        raise FormatError(f"The output {os.fspath(path)!r} is no name of a file or folder. Give one.")
    return Path(path)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` if the block ends well, and is removed if it does not.

    Raises:
        FormatError: if `path` is no name, or exists and is not an empty folder.
    """
    path = output_path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FormatError(f"{path}: exists already. Name a new folder, or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tensor_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a file's data without its header: what kohya's tools store as `sshs_model_hash`."""
    data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
