# SPDX-License-Identifier: Apache-2.0
"""Captions of a folder's images, in every spelling that trainers have: beside the images, or in one table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from . import TrainingError

SIDECARS = (".txt", ".caption")  # in any case; after the image's name with or without its own suffix
TABLES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "prompt")  # of a table, if none is asked for; the first that is there


class Captions:
    """The captions of some images, and what of the folder has a part in them.

    Attributes:
        of: {image: caption}, where there is one. used: the files that were read. remarks: {what: names} of what is
        there but not used.
    """

    def __init__(self, images: Sequence[Path], column: str | None = None):
        folder = images[0].parent
        self.of: dict[Path, str] = {}
        self.used: set[Path] = set()
        self.remarks: dict[str, list[str]] = {}
        beside = {
            p.with_suffix(p.suffix.lower()): p
            for p in folder.iterdir()
            if p.suffix.lower() in SIDECARS and not p.is_dir()
        }
        table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
        if column and table is None:
            raise TrainingError(
                f"--caption_column {column!r}: expected {folder / TABLES[0]} with that key (or {TABLES[1]}), which "
                "does not exist; write it or drop the flag."
            )
        rows = self.read_table(table, column) if table else {}
        for image in images:
            files = [beside[name] for name in sidecar_names(image) if name in beside]
            texts = {file: read_text(file).strip() for file in files}
            chosen = next((file for file, text in texts.items() if text), None)
            listed = rows.pop(image.name, None)
            if listed:
                self.of[image] = listed
            elif chosen:
                self.of[image] = texts[chosen]
                self.used.add(chosen)
            for file, text in texts.items():
                if not text:
                    self.remark("without text", file.name)
                elif file != chosen or listed:
                    self.remark("for images that have another caption", file.name)
            self.used.update(files)
        for name in rows:
            self.remark(f"rows of {table.name} for images that are not there", name)
        for file in sorted(set(beside.values()) - self.used):
            self.remark("for images that are not there", file.name)
            self.used.add(file)

    def remark(self, what: str, name: str) -> None:
        self.remarks.setdefault(what if what.startswith("rows") else f"captions {what}", []).append(name)

    def read_table(self, path: Path, column: str | None) -> dict[str, str | None]:
        """{file name: caption} of a table as `datasets` has it."""
        self.used.add(path)
        captions: dict[str, str | None] = {}
        for number, row in table_rows(path):
            name = row.get("file_name")
            key = column or next((c for c in COLUMNS if c in row), COLUMNS[0])
            caption = row.get(key)
            if not isinstance(name, str) or key not in row or not isinstance(caption, str | None):
                what = (
                    f"{key!r} is {caption!r}, not a text"
                    if key in row and isinstance(name, str)
                    else f"found {', '.join(map(repr, row))}"
                )
                raise TrainingError(
                    f"{path}, line {number}: expected file_name and {key!r} ({what}); choose another key with "
                    "--caption_column."
                )
            name = str(PurePosixPath(name.replace("\\", "/")))  # without "./"
            if name in captions:
                self.remark(f"rows of {path.name} for an image that has another, of which the last is used", name)
            captions[name] = caption and caption.strip()
        return captions


def sidecar_names(image: Path) -> Iterator[Path]:
    """dog.txt, dog.caption, dog.png.txt, dog.png.caption."""
    for stem in (image.with_suffix(""), image):
        for suffix in SIDECARS:
            yield stem.with_name(stem.name + suffix)


def table_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of a .jsonl or .csv file.

    Raises:
        TrainingError: names a line that is no row.
    """
    text = read_text(path)
    if path.suffix == ".csv":
        yield from csv_rows(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold what else `splitlines` takes for an end
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TrainingError(f"{path}, line {number}: expected a JSON object with file_name ({error}).") from error
        if not isinstance(row, dict):
            raise TrainingError(f"{path}, line {number}: expected a JSON object with file_name, found {line[:60]}.")
        yield number, row


def csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for row in reader:
            if None in row:  # fields beyond the header's: the text would be cut at its first comma
                raise TrainingError(
                    f"{path}, line {reader.line_num}: expected {len(row) - 1} fields as in its first line, found "
                    f"{len(row) - 1 + len(row[None])}. Put a text that has commas into quotes."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise TrainingError(
            f"{path}, line {reader.line_num}: not a table of comma-separated values ({error}). Are its quotes closed?"
        ) from error


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # with or without the mark that some editors put first
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is not UTF-8 text ({error}): save it as UTF-8.") from error
