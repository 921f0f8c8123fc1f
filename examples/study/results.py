# SPDX-License-Identifier: Apache-2.0
"""Results as JSON lines, one record a finished run: a killed study goes on where it was, and processes share one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class Results:
    """The records in a file, by their "key"."""

    def __init__(self, path: Path):
        """
        Raises:
            ValueError: if a line other than the last is no record.
        """
        self.path, self.records = Path(path), {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added.

        Raises:
            ValueError: if a line other than the last is no record.
        """
        with self.lock:
            lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
            found = {}
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    found[record["key"]] = record
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    if number < len(lines):
                        raise ValueError(
                            f"{self.path}, line {number} is no record of a run: remove the line and its run is done "
                            "again"
                        ) from error
                    self._rewrite(found)  # a kill while it was written: nobody else writes, as the lock is ours
            self.records = found

    def _rewrite(self, records: dict[str, dict[str, Any]]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records.values()), encoding="utf-8")
        os.replace(temporary, self.path)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; it is on the disk when this returns."""
        self.refresh()  # mends a line that another process was killed in
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["key"]] = record

    def __contains__(self, key: str) -> bool:
        return key in self.records

    @contextmanager
    def claimed(self, key: str) -> Iterator[bool]:
        """Whether the run is ours for the length of the block: False if it is done, or another process is at it.

        The claim is a lock of the operating system, so it ends with the process, however that ends.
        """
        folder = self.path.with_name("claims")
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            self.refresh()  # it may have been done since we looked
            yield key not in self.records
        finally:
            lock.release()
