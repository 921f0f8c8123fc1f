# SPDX-License-Identifier: Apache-2.0
"""The study:

    python -m examples.study --quick                          # does everything run?  minutes; the numbers say nothing
    python -m examples.study --experiments stability --minutes 120

Finished runs are kept in OUTPUT/runs.jsonl: start it again and it goes on.  Each call ends with a report of what has
run by then.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from . import plan, report
from .results import Results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/study"), help="records, trainings and reports")
    parser.add_argument("--experiments", nargs="+", choices=tuple(plan.EXPERIMENTS), default=list(plan.EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="four tiny runs instead")
    parser.add_argument("--minutes", type=float, help="start no run after so long")
    parser.add_argument("--report", action="store_true", help="only report what has run")
    args = parser.parse_args(argv)

    from .runs import demo, execute, fingerprint  # slow to import

    sizes = plan.Sizes()
    runs = plan.quick() if args.quick else [run for name in args.experiments for run in plan.EXPERIMENTS[name](sizes)]
    base = fingerprint(demo.PIPELINE)
    keys = [run.key(base) for run in runs]
    output = args.output / "quick" if args.quick else args.output
    try:
        results = Results(output / "runs.jsonl")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    end = time.time() + 60 * args.minutes if args.minutes else None
    for number, (run, key) in enumerate(zip(runs, keys, strict=True), 1):
        if args.report or key in results:
            continue
        if end and time.time() >= end:
            print("Out of time; the same command goes on.")
            break
        print(
            f"[{number} of {len(runs)}] {run.experiment}: {run.method}, {run.learning_rate:g}, {run.subject}",
            flush=True,
        )
        results.add(execute(run, output / "training"))

    for name in dict.fromkeys(run.experiment for run in runs):
        planned = Counter((run.method, run.learning_rate) for run in runs if run.experiment == name)
        own = [k for k, run in zip(keys, runs, strict=True) if run.experiment == name and k in results]
        print(report.write(name, [results.records[k] for k in own], dict(planned), output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
