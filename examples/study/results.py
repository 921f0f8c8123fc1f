# SPDX-License-Identifier: Apache-2.0
"""Results as JSON lines, one record a finished run: a killed study goes on where it was, and processes share one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class Results:
    """The records in a file, by their "key"."""

    def __init__(self, path: Path, problem: Callable[[dict[str, Any]], str | None] = lambda record: None):
        """
        Args:
            problem: says why a record cannot be counted, or None.

        Raises:
            ValueError: if a line is no record, or two are of the same run and not the same.
        """
        self.path, self.problem = Path(path), problem
        self.records: dict[str, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added.  A last line that was half written, by a process that was killed, goes.

        Raises:
            ValueError: if another line is no record, or two are of the same run and not the same.
        """
        with self.lock:
            content = self.path.read_bytes() if self.path.exists() else b""
            *lines, rest = content.split(b"\n")
            found: dict[str, dict[str, Any]] = {}
            numbers: dict[str, int] = {}
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = self._record(line)
                except ValueError as error:
                    raise ValueError(
                        f"{self.path}, line {number} is no record of a run: remove the line and its run is done again "
                        f"({error})"
                    ) from error
                key = record["key"]
                if found.setdefault(key, record) != record:
                    raise ValueError(
                        f"{self.path}, lines {numbers[key]} and {number} are of the same run, with other results: "
                        "remove one of the two"
                    )
                numbers.setdefault(key, number)
            if rest:  # nobody else writes now, as the lock is ours
                try:
                    record = self._record(rest)
                    found.setdefault(record["key"], record)
                    lines.append(rest)  # whole but for its end, by an editor
                except ValueError:
                    print(f"note: the last line of {self.path} was half written, and is removed: its run is done again")
                temporary = self.path.with_name(self.path.name + ".tmp")
                temporary.write_bytes(b"".join(line + b"\n" for line in lines))
                os.replace(temporary, self.path)
            self.records = found

    def _record(self, line: bytes) -> dict[str, Any]:
        """
        Raises:
            ValueError: why it is none.
        """
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("key"), str):
            raise ValueError("no key")
        if why := self.problem(record):
            raise ValueError(why)
        return record

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; it is on the disk when this returns."""
        self.refresh()  # mends a line without an end
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
