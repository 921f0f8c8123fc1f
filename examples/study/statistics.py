# SPDX-License-Identifier: Apache-2.0
"""What is computed of the records: values by subject, curves over learning rates, their widths, and comparisons.

The subject is the unit throughout.  Only pairs of subject and seed count that every compared run has, so that a study
that was cut is balanced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from examples.measure.intervals import Interval

from .plan import Run

WITHIN = 0.05  # below the best share: what counts as serving
RESAMPLES = 2000
Cell = tuple[str, float]  # method and learning rate
Values = dict[str, float]  # by subject


def cells(runs: Sequence[Run], records: Mapping[str, dict[str, Any]], base: str) -> dict[Cell, list[dict[str, Any]]]:
    """The records of each cell that is planned, also of those that have none."""
    found: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        own = found[run.method, run.learning_rate]
        if (key := run.key(base)) in records:
            own.append(records[key])
    return dict(found)


def balanced(some: Mapping[Cell, list[dict[str, Any]]]) -> set[tuple[str, int]]:
    """The pairs of subject and seed that all cells have."""
    pairs = [{(r["subject"], r["seed"]) for r in records} for records in some.values()]
    return set.intersection(*pairs) if pairs else set()


def by_subject(records: Sequence[dict[str, Any]], pairs: set[tuple[str, int]], measure: str) -> Values:
    """A subject's mean over its seeds, without the runs that diverged before it could be measured."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if (record["subject"], record["seed"]) in pairs and measure in record:
            found[record["subject"]].append(record[measure])
    return {subject: float(np.mean(found[subject])) for subject in sorted(found)}


class Span(NamedTuple):
    """The part of a curve within `WITHIN` of its best: ends on the x axis, and whether the curve ended first."""

    low: float
    high: float
    open: bool


def span(x: np.ndarray, y: np.ndarray) -> Span:
    """The unbroken part about the best point, with straight lines between points; x (N) increases, N >= 1."""
    best = int(np.argmax(y))
    level = y[best] - WITHIN

    def end(step: int) -> tuple[float, bool]:
        i = best
        while 0 <= i + step < len(y):
            if y[i + step] < level:
                part = (y[i] - level) / (y[i] - y[i + step])
                return float(x[i] + part * (x[i + step] - x[i])), False
            i += step
        return float(x[i]), True

    (low, open_low), (high, open_high) = end(-1), end(1)
    return Span(low, high, open_low or open_high)


@dataclass(frozen=True)
class Curve:
    """A method's quality over its learning rates.

    rates: N, increasing. norms: N, mean norms of the update, no number where all runs diverged. quality: subjects x N;
    the columns of dropped rates are not numbers. deficit: N, for dropped rates how far they were below the column
    `reference` when they were dropped.
    """

    rates: np.ndarray
    norms: np.ndarray
    subjects: tuple[str, ...]
    quality: np.ndarray
    deficit: np.ndarray
    reference: int

    def mean(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The curve over some subjects, N; dropped rates keep their distance from `reference`."""
        y = self.quality[rows].mean(0)
        return np.where(np.isnan(y), y[self.reference] - self.deficit, y)

    def span(self, rows: np.ndarray | slice = slice(None), axis: str = "rates") -> Span:
        """On the logarithm to the base of 10 of `axis`, "rates" or "norms"."""
        x = np.log10(getattr(self, axis))
        order = np.argsort(x, kind="stable")[: int(np.isfinite(x).sum())]  # what is no number is last
        return span(x[order], self.mean(rows)[order])


def resampled(count: int) -> np.ndarray:
    """Rows of subjects, drawn with replacement, `RESAMPLES` x count; the same for every method: pairs stay pairs."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def widths(curves: Mapping[str, Curve], axis: str) -> dict[str, np.ndarray]:
    """Of each method, in decades: first that of the mean curve, then one for each of `resampled`."""
    found = {}
    for method, curve in curves.items():
        rows = [slice(None), *resampled(len(curve.subjects))]
        spans = [curve.span(row, axis) for row in rows]
        found[method] = np.array([s.high - s.low for s in spans])
    return found


def percentiles(values: np.ndarray, subjects: int) -> Interval:
    """Of a statistic's own value, first, and its resampled ones: the 95 % percentile interval."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high), subjects)


def left_out(quality: Mapping[float, Values]) -> dict[str, float]:
    """{subject: the rate that is best on the mean of all others}: its own pictures have no say in what it is judged at.

    Args:
        quality: {rate: {subject: quality}}, the same subjects everywhere, at least two.
    """
    rates = sorted(quality)
    subjects = sorted(next(iter(quality.values())))
    table = np.array([[quality[lr][s] for s in subjects] for lr in rates])  # rates x subjects
    others = (table.sum(1, keepdims=True) - table) / (len(subjects) - 1)
    return {subject: rates[int(i)] for subject, i in zip(subjects, others.argmax(0), strict=True)}
