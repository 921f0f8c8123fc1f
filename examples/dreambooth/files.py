# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there: written under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp-"  # names that start so are unfinished and never read


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """The path of a temporary file, which becomes `path` at the end of the block, or goes if that fails."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Put a finished folder in its place; what was there goes only after."""
    old = target.with_name(f"{TEMPORARY}old-{target.name}")
    remove(old)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    remove(old)


def remove(folder: Path) -> None:
    """Delete a folder; renamed first, so that a half deleted one does not look like a whole one."""
    if folder.is_symlink():  # what it leads to lies elsewhere and is left alone
        folder.unlink()
    if not folder.exists():
        return
    if not folder.name.startswith(TEMPORARY):
        hidden = folder.with_name(f"{TEMPORARY}delete-{folder.name}")
        if hidden.exists():
            shutil.rmtree(hidden)
        os.replace(folder, hidden)
        folder = hidden
    shutil.rmtree(folder)


def clean(output: Path) -> None:
    """Remove what a killed run left half written. A folder that was being replaced gets its old content back."""
    for path in output.glob(f"{TEMPORARY}*"):
        original = output / path.name.removeprefix(f"{TEMPORARY}old-")
        if path.name.startswith(f"{TEMPORARY}old-") and not original.exists():
            os.replace(path, original)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
