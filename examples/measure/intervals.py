# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals with the subject as the unit: seeds and prompts of one subject are not independent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean over subjects and its percentile interval."""

    mean: float
    low: float
    high: float
    subjects: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(by_subject: Mapping[str, Sequence[float]], level: float = 0.95) -> Interval:
    """The mean over subjects of each subject's own mean, resampling subjects (scipy.stats.bootstrap, seeded).

    Raises:
        ValueError: if there are fewer than two subjects, or one has no value.
    """
    empty = [name for name, values in by_subject.items() if not len(values)]
    if len(by_subject) < 2 or empty:
        raise ValueError(
            f"an interval needs at least two subjects with a value each, got {len(by_subject)}"
            + (f"; none for {', '.join(empty)}" if empty else "")
        )
    from scipy.stats import bootstrap

    means = np.array([np.mean(by_subject[name]) for name in sorted(by_subject)])  # what is drawn depends on the order
    if np.ptp(means) == 0:  # scipy warns of a degenerate distribution
        return Interval(float(means[0]), float(means[0]), float(means[0]), len(means))
    found = bootstrap(
        (means,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(means.mean()), float(found.low), float(found.high), len(means))


def paired(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]], level: float = 0.95) -> Interval:
    """`one` minus `other`, subject by subject.  It is told apart from 0 if 0 is outside the interval.

    Raises:
        ValueError: if the subjects differ.
    """
    if set(one) != set(other):
        raise ValueError(f"a paired difference needs the same subjects, got {sorted(one)} and {sorted(other)}")
    return interval({name: [float(np.mean(one[name]) - np.mean(other[name]))] for name in one}, level)
