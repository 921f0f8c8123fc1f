# SPDX-License-Identifier: Apache-2.0
"""What the records say: means over subjects with 95 % intervals, as JSON, a table and plots."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from examples.measure.intervals import Interval, interval, paired

MEASURES = ("subject_right", "similarity", "background_right", "drift", "update_norm")
WITHIN = 0.05  # of the best rate's share of right subjects: what counts as serving
Cell = tuple[str, float]  # method and learning rate


def cells(records: Iterable[dict[str, Any]]) -> dict[Cell, list[dict[str, Any]]]:
    """Records by method and learning rate."""
    found = defaultdict(list)
    for record in records:
        found[record["method"], record["learning_rate"]].append(record)
    return dict(found)


def by_subject(records: list[dict[str, Any]], measure: str) -> dict[str, list[float]]:
    found = defaultdict(list)
    for record in records:
        found[record["subject"]].append(record[measure])
    return dict(found)


def summarize(records: list[dict[str, Any]], planned: dict[Cell, int]) -> list[dict[str, Any]]:
    """A row a cell: runs done and planned, parameters, and each measure's `Interval`, None below two subjects."""
    done = cells(records)
    rows = []
    for (method, rate), wanted in planned.items():
        some = done.get((method, rate), [])
        row: dict[str, Any] = {"method": method, "learning_rate": rate, "runs": len(some), "planned": wanted}
        if some:
            row["parameters"] = some[0]["parameters"]
        for measure in MEASURES:
            values = by_subject(some, measure)
            row[measure] = interval(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def serving_rates(rows: list[dict[str, Any]], method: str) -> tuple[float, float] | None:
    """The unbroken range of learning rates about a method's best one whose share of right subjects is within 0.05
    of it; None if nothing of the method has an interval."""
    own = sorted((r for r in rows if r["method"] == method and r["subject_right"]), key=lambda r: r["learning_rate"])
    if not own:
        return None
    shares = [r["subject_right"].mean for r in own]
    low = high = int(np.argmax(shares))
    while low > 0 and shares[low - 1] >= max(shares) - WITHIN:
        low -= 1
    while high + 1 < len(own) and shares[high + 1] >= max(shares) - WITHIN:
        high += 1
    return own[low]["learning_rate"], own[high]["learning_rate"]


def against(records: list[dict[str, Any]], one: Cell, other: Cell, measure: str) -> Interval | None:
    """`one` minus `other` on the subjects and seeds that both have; None below two subjects."""
    done = cells(records)
    a, b = ({(r["subject"], r["seed"]): r[measure] for r in done.get(cell, [])} for cell in (one, other))
    values: dict[str, list[float]] = defaultdict(list)
    for subject, seed in a.keys() & b.keys():
        values[subject].append(a[subject, seed] - b[subject, seed])
    return paired(values, {s: [0.0] for s in values}) if len(values) > 1 else None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown.  What was not run says so."""
    lines = [
        "| method | learning rate | parameters | runs | right subject | similarity | right background | drift "
        "| norm of the update |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["runs"]:
            numbers = [str(row[m]) if row[m] else "one subject" for m in MEASURES]
        else:
            numbers = ["not run"] * len(MEASURES)
        runs = f"{row['runs']} of {row['planned']}"
        lines.append(
            f"| {row['method']} | {row['learning_rate']:g} | {row.get('parameters', '')} | {runs} | "
            + " | ".join(numbers)
            + " |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Right subjects against the learning rate and the size of the update: a line a method, intervals shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method and r["subject_right"]]
        for axis, x in zip(
            axes, ([r["learning_rate"] for r in own], [r["update_norm"].mean for r in own]), strict=True
        ):
            order = np.argsort(x)
            x = np.array(x)[order]
            low, mean, high = (
                np.array([getattr(r["subject_right"], part) for r in own])[order] for part in ("low", "mean", "high")
            )
            axis.plot(x, mean, marker="o", label=method)
            axis.fill_between(x, low, high, alpha=0.15)
    for axis, label in zip(axes, ("learning rate", "norm of the update"), strict=True):
        axis.set(xscale="log", xlabel=label, ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right subject, 95 % interval over subjects")
    axes[0].legend(fontsize="small")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
    pyplot.close(figure)


def write(experiment: str, records: list[dict[str, Any]], planned: dict[Cell, int], folder: Path) -> Path:
    """`EXPERIMENT.md`, `.json` and `.png` in `folder`; returns the first."""
    rows = summarize(records, planned)
    methods = list(dict.fromkeys(method for method, _ in planned))
    ranges = {method: serving_rates(rows, method) for method in methods}
    text = [f"# {experiment}", "", table(rows), ""]
    if len({rate for _, rate in planned}) > 1:
        text += [f"Learning rates within {WITHIN:g} of the method's best share of right subjects:", ""]
        for method, found in ranges.items():
            span = f"{found[0]:g} to {found[1]:g}, a factor of {found[1] / found[0]:.3g}" if found else "not run"
            text.append(f"- {method}: {span}")
    done = len(records)
    text += [
        "",
        f"{done} of {sum(planned.values())} runs. Means over subjects; 95 % bootstrap intervals over subjects.",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{k: v._asdict() if isinstance(v, Interval) else v for k, v in row.items()} for row in rows]
    versions = sorted({json.dumps(r["versions"], sort_keys=True) for r in records})
    whole = {"rows": plain, "serving_rates": ranges, "versions": [json.loads(v) for v in versions]}
    (folder / f"{experiment}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    plot(rows, folder / f"{experiment}.png")
    path = folder / f"{experiment}.md"
    path.write_text("\n".join(text), encoding="utf-8")
    return path
