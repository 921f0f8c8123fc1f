# SPDX-License-Identifier: Apache-2.0
"""The report: JSON, Markdown and plots beside the records, and in the documentation where that is asked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots, tables
from .plan import Run
from .summary import summarize

MARKED = re.compile(r"(<!-- study: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write(
    runs: Mapping[str, Sequence[Run]],
    records: Mapping[str, dict[str, Any]],
    base: str,
    tuned: Mapping[str, Any],
    output: Path,
    docs: Path | None = None,
) -> Path:
    """`study.json`, `study.md` and plots in `output`, and in `docs`, if given, the JSON and the plots, with the marked
    sections of the page beside it, DOCS.md, filled; returns the Markdown.

    Raises:
        ValueError: if the page is missing, or has other sections than there are.
    """
    summary = summarize(runs, records, base, tuned)
    sections = tables.sections(summary)
    page = None  # made before anything is written
    if docs is not None:
        page = filled(docs.with_suffix(".md"), tables.sections(summary, f"{docs.name}/"))
    text = "\n\n".join(f"## {name.replace('_', ' ')}\n\n{body}" for name, body in sections.items())
    for folder in (output, docs):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            replace(folder / "study.json", json.dumps(summary, indent=1) + "\n")
            plots.write(summary, folder)
    path = output / "study.md"
    replace(path, f"# The study\n\n{text}\n")
    if docs is not None and page is not None:
        replace(docs.with_suffix(".md"), page)
    return path


def filled(path: Path, sections: Mapping[str, str]) -> str:
    """The page's text with each `<!-- study: NAME -->` ... `<!-- end -->` filled.

    Raises:
        ValueError: if the page is missing, or has other sections than there are.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: --docs FOLDER fills the marked sections of the page FOLDER.md")
    text = path.read_text(encoding="utf-8")
    names = [found["name"] for found in MARKED.finditer(text)]
    marks, ends = text.count("<!-- study"), text.count("<!-- end")
    if sorted(names) != sorted(sections) or not len(names) == marks == ends:
        raise ValueError(
            f"{path} has the sections {', '.join(sorted(names)) or 'none'}, of {marks} marks and {ends} ends; expected "
            f"each of {', '.join(sorted(sections))} once, as <!-- study: NAME --> and <!-- end --> on their own lines"
        )
    return MARKED.sub(lambda found: f"{found[1]}\n{sections[found['name']]}\n\n{found[3]}", text)


def replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
