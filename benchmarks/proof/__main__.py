"""`python -m benchmarks.proof`: run the proof, or go on with it, and write its report.

`--size default` takes about an hour on two cores, `--size full` runs every arm and goes on from it. Results stand in
`runs/proof/`: one file an arm in `results/`, and `report.json`, `report.png` and `report.md` of all that are there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.proof.plan import SIZES


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proof", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="default", help="how much is run (default: default)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/proof)")
    parser.add_argument("--report-only", action="store_true", help="only write the report of what is there")
    args = parser.parse_args(argv)

    from benchmarks.proof.report import write_report  # noqa: PLC0415 (torch comes with it: --help is quick)
    from benchmarks.proof.study import Study  # noqa: PLC0415
    from evs_train.errors import EvsTrainError, report  # noqa: PLC0415

    folder = args.out or Path("runs/proof")
    try:
        if not args.report_only:
            Study(folder, SIZES[args.size], say=lambda line: print(line, file=sys.stderr, flush=True)).run()
        print(write_report(folder))
    except EvsTrainError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
