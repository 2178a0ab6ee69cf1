"""Measures all and writes benchmarks/results.md and results.json; with names, prints those groups only.

    make bench                           # all; on two cores the cold pipeline in it alone takes 5 to 15 minutes
    python -m benchmarks                 # where there is a GPU, what needs torch and transformers alone: results_gpu.*
    python -m benchmarks router losses   # prints these, writes nothing

Where the processor has no bfloat16 units the files are results_float32.* and growth_float32.*: no kind of machine
overwrites another's.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

# Before torch is imported: the peers come from configs, never from the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the ranks have it; deterministic kernels need it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # for peers too: threads that spin make noise of others' load

from benchmarks import (
    ceiling,
    checkpoint,
    data,
    ddp,
    decoding,
    determinism,
    growth,
    losses,
    moe_layer,
    pipeline,
    router,
    startup,
    tracking,
    training_step,
)
from benchmarks.table import ROOT, Row, as_json, as_markdown, conditions, of_this_machine, rendered
from benchmarks.timing import DEVICE, kept_memory
from stages.files.artifacts import write_atomically
from stages.training.fit import settle_cublas_workspaces

GROUPS: dict[str, Callable[[], Iterable[Row | str]]] = {
    "ceiling": ceiling.rows,
    "training_step": training_step.rows,
    "determinism": determinism.rows,
    "moe_layer": moe_layer.rows,
    "router": router.rows,
    "losses": losses.rows,
    "decoding": decoding.rows,
    "data": data.rows,
    "checkpoint": checkpoint.rows,
    "ddp": ddp.rows,
    "startup": startup.rows,
    "tracking": tracking.rows,
    "growth": growth.rows,
    "pipeline": pipeline.rows,
}
OF_ONE_DEVICE = ["ceiling", "training_step", "determinism", "moe_layer", "router", "losses", "decoding"]
STEPS = {"training_step", "determinism", "moe_layer", "growth"}  # measured with memory kept, as the ranks have it


def measured(names: list[str]) -> Iterator[Row | str]:
    for name in names:
        print(f"measuring {name} ...", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        with kept_memory() if name in STEPS else contextlib.nullcontext():
            yield from GROUPS[name]()
        print(f" {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in GROUPS]:
        sys.exit(f"benchmarks: no group {unknown[0]!r}; there are {', '.join(GROUPS)}")
    on_gpu = DEVICE.type == "cuda"
    if on_gpu:
        settle_cublas_workspaces()  # as the ranks do
    under = conditions()
    if float(under["load_before"] or 0) > 0.5 * float(under["cores"]):
        print(f"others use this machine (load {under['load_before']}): expect noise", file=sys.stderr)
    found = list(measured(names or (OF_ONE_DEVICE if on_gpu else list(GROUPS))))
    rows = [one for one in found if isinstance(one, Row)]
    notes = [one for one in found if isinstance(one, str)]
    print(rendered(rows), *notes, sep="\n")
    if names:
        return
    written = f"benchmarks/{of_this_machine('results')}"
    write_atomically(ROOT / f"{written}.md", as_markdown(rows, notes, under))
    write_atomically(ROOT / f"{written}.json", as_json(rows, notes, under))
    print(f"written: {written}.md and {written}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
