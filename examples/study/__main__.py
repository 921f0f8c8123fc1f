# SPDX-License-Identifier: Apache-2.0
"""The study:

    python -m examples.study --quick                          # does everything run?  the numbers say nothing
    python -m examples.study --minutes 120                    # a piece; the same command goes on
    python -m examples.study --report --docs docs/evidence    # what has run by then, also into the documentation

Finished runs are kept in OUTPUT/runs.jsonl: start it again and it goes on.  Start it several times at once, and the
processes share the runs.  Each call ends with a report of what has run by then.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import plan, report, schedule
from .results import Results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/study"), help="records, trainings and reports")
    parser.add_argument("--experiments", nargs="+", choices=plan.EXPERIMENTS, default=list(plan.USUAL))
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(plan.METHODS), default=list(plan.METHODS), help="of stability"
    )
    parser.add_argument("--seeds", type=int, default=len(plan.SEEDS), help="of each run, at most")
    parser.add_argument("--quick", action="store_true", help="a few tiny runs of each experiment instead")
    parser.add_argument("--minutes", type=float, help="start no run after so long")
    parser.add_argument("--report", action="store_true", help="only report what has run")
    parser.add_argument("--docs", type=Path, metavar="FOLDER", help="report into FOLDER and the page FOLDER.md as well")
    args = parser.parse_args(argv)
    if not 1 <= args.seeds <= len(plan.SEEDS):
        parser.error(f"--seeds {args.seeds}: expected 1 to {len(plan.SEEDS)}")
    if args.quick and args.docs:
        parser.error("--docs with --quick: the numbers of a quick study say nothing, so they are not for a page")

    from .runs import demo, execute, fingerprint  # slow to import

    base = fingerprint(demo.PIPELINE)
    output = args.output / "quick" if args.quick else args.output
    try:
        results = Results(output / "runs.jsonl")

        def todo():
            if args.quick:
                return iter([(n, run) for n, run in plan.ordered(plan.quick()) if run.key(base) not in results])
            return schedule.candidates(
                args.experiments, args.seeds, results, base,
                lambda: schedule.frozen_rates(results, base, True)["rates"], args.methods,
            )  # fmt: skip

        if not args.report:
            schedule.work(todo, results, base, execute, args.minutes)
        results.refresh()
        tuned = schedule.frozen_rates(results, base, freeze=False)
        runs = plan.quick() if args.quick else {name: plan.planned(name, tuned["rates"]) for name in plan.EXPERIMENTS}
        print(report.write(runs, results.records, base, tuned, output, args.docs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
