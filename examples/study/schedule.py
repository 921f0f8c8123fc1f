# SPDX-License-Identifier: Apache-2.0
"""Which run comes next, also where several processes share a study."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from . import plan, rules
from .results import Results

PAUSE = 2.0  # seconds, where all that is left waits for other processes
Candidate = tuple[str, plan.Run]  # experiment and run


def read_rates(path: Path) -> dict[str, Any]:
    """What `frozen_rates` wrote.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for method in plan.METHODS:
            if not 0 < found["rates"][method] < math.inf:
                raise ValueError(f"{method}: {found['rates'][method]!r}")
            found["sources"][method], found["base"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): expected the rate of each method and where it is from. Put it back, from "
            '"tuned" in study.json, or remove it, and the rates are chosen from the records once more'
        ) from error
    return found


def frozen_rates(results: Results, base: str, freeze: bool) -> dict[str, Any]:
    """{"base", "rates", "sources"}: the rate of each method for the experiments that have one.

    Asked with `freeze`, they are written beside the records and stay, so that all runs of an experiment have the same.
    """
    path = results.path.with_name("rates.json")
    with results.lock:
        if path.exists():
            found = read_rates(path)
            if found["base"] == base:
                return found
        rates, sources = rules.best_rates(results.records, base)
        found = {"base": base, "rates": rates, "sources": sources}
        if freeze:
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
    return found


def candidates(
    experiments: Sequence[str],
    seeds: int,
    results: Results,
    base: str,
    rates: Callable[[], Mapping[str, float]],
    methods: Sequence[str] = tuple(plan.METHODS),
) -> Iterator[Candidate | None]:
    """Runs that are not done, in order; None for each that has to wait until others are.

    Args:
        rates: asked once the first run that needs it comes. methods: those of "stability" that are wanted.
    """
    records = results.records

    @cache
    def hopeless(method: str) -> rules.Dropped:
        return rules.dropped_rates(records, method, base)

    free = [name for name in experiments if name in plan.FREE]
    tuned = [name for name in experiments if name in plan.TUNED]
    for seed in plan.SEEDS[:seeds]:
        complete = True
        for name, run in plan.ordered({name: plan.planned(name) for name in free}):
            if run.seed != seed or run.key(base) in records:
                continue
            if name == "stability":
                if run.method not in methods:
                    continue
                known = hopeless(run.method)
                if run.learning_rate in known.rates:
                    continue
                if known.subjects < rules.wanted(run):
                    complete = False
                    yield None
                    continue
            complete = False
            yield name, run
        if not complete and tuned and "stability" in free:
            yield None  # another process is at the last of them
        elif tuned:
            for name, run in plan.ordered({name: plan.planned(name, rates()) for name in tuned}):
                if run.seed == seed and run.key(base) not in records:
                    yield name, run


def work(
    todo: Callable[[], Iterator[Candidate | None]],
    results: Results,
    base: str,
    execute: Callable[[plan.Run, Path], dict[str, Any]],
    minutes: float | None = None,
) -> None:
    """Do runs of `todo`, which is asked again after each, until there are none or the time is over."""
    end = time.time() + 60 * minutes if minutes is not None else None
    folder = results.path.with_name(f"training-{os.getpid()}")
    try:
        while True:
            waiting, ran = False, False
            for found in todo():
                if end is not None and time.time() >= end:
                    print("Out of time; the same command goes on.")
                    return
                if found is None:
                    waiting = True
                    continue
                name, run = found
                with results.claimed(run.key(base)) as ours:
                    if ours:
                        print(
                            f"{len(results.records)} done; {name}: {run.method}, {run.learning_rate:g}, {run.subject}, "
                            f"seed {run.seed}",
                            flush=True,
                        )
                        results.add(execute(run, folder))
                        ran = True
                        break
            if not ran:
                if not waiting:
                    return
                time.sleep(PAUSE)
                results.refresh()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
