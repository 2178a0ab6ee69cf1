"""The fault test: breaks the tiny pipeline in many ways and compares its outs with those of an undisturbed run.

    make chaos                                            # everything, about an hour on 2 cores
    python -m chaos --only rank_killed --seed 7          # one kind of fault; docs/faults.md is not written
    python -m chaos --kills 200

Every case works in a copy of a pipeline that ran undisturbed with the same settings, runs the commands that a
user would type, and asserts what the user sees and that every out ends with the same bytes. The whole run writes its
table to docs/faults.md. tests/test_pipeline.py runs the cheap cases once each.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.table import ROOT
from chaos import damage, disks, jobs, kills, locks, mlflow_faults, moves, nodes, nonfinite
from chaos.bench import Bench, run
from chaos.page import page, table

SHARES = {
    kills.kill9_group: 0.40,
    kills.kill9_everything: 0.28,
    kills.terminated: 0.16,
    kills.ctrl_c: 0.16,
}  # of --kills
CASES: list[Callable] = [
    *SHARES, kills.rank_killed, moves.moved, nodes.node_lost, nodes.port_taken, nodes.half_a_checkpoint,
    jobs.queue_full, jobs.time_limit, jobs.job_left_behind,
    disks.disk_full_checkpoint, disks.disk_full_out, disks.read_only, disks.cache_full,
    *damage.CASES, locks.stale_lock, locks.two_at_once, locks.same_work_at_once,
    nonfinite.nan_weights, nonfinite.nonfinite_gradients,
    mlflow_faults.mlflow_unreachable, mlflow_faults.mlflow_slow, mlflow_faults.mlflow_dies,
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="of the moments and places of the faults")
    names = [case.__name__ for case in CASES]
    parser.add_argument("--only", choices=names, action="append", metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--kills", type=int, default=50, help="of whole process groups, over all kill cases")
    options = parser.parse_args()
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="offramp-faults-") as folder:
        print("the undisturbed run comes first", flush=True)
        bench = Bench(Path(folder).resolve(), options.seed)
        for case in CASES:
            if options.only and case.__name__ not in options.only:
                continue
            how = {"kills": max(1, round(options.kills * SHARES[case]))} if case in SHARES else {}
            rows.append(run(bench, case, **how))
            message = rows[-1].failure or rows[-1].message
            print(f"{case.__name__}: {rows[-1].survived} of {rows[-1].tried}  {message}", flush=True)
        print(f"\n{table(rows, bench.folder)}")
        if not options.only:
            (ROOT / "docs").mkdir(exist_ok=True)
            (ROOT / "docs/faults.md").write_text(page(bench, rows, options.kills, time.monotonic() - began))
    return any(row.failure for row in rows)


if __name__ == "__main__":
    sys.exit(main())
