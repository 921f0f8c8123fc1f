# SPDX-License-Identifier: Apache-2.0
"""Results as JSON lines: one record a finished run, so that a killed study goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Results:
    """The records in a file, by their "key"."""

    def __init__(self, path: Path):
        """
        Raises:
            ValueError: if a line other than the last is no record.
        """
        self.path, self.records = Path(path), {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self.records[record["key"]] = record
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if number < len(lines):
                    raise ValueError(
                        f"{self.path}, line {number} is no record of a run: remove the line and its run is done again"
                    ) from error
                self._rewrite()  # a kill while it was written

    def _rewrite(self) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records.values()), encoding="utf-8")
        os.replace(temporary, self.path)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["key"]] = record

    def __contains__(self, key: str) -> bool:
        return key in self.records
