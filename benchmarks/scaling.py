"""Which size learns most in the time that the default gives its teacher: width, depth, experts and steps at fixed time.

    python -m benchmarks.scaling                             # some hours on one core; benchmarks/scaling.md
    python -m benchmarks.scaling --minutes 60                # an hour of it; called again it continues

One process of one thread trains as `benchmarks.recipe` does: a budget of processor seconds, the schedule laid over as
many steps as it pays for. Two sizes stand beside their dense twins, which cost a token as many operations.
"""

import argparse
import math
import os
import statistics
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

if __name__ == "__main__":  # before the libraries that read it are imported
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}

import torch

from benchmarks import recipe as bench
from benchmarks.table import ROOT, conditions, listed
from benchmarks.variants import Recipe, default_recipe, dense_twin
from stages.files.artifacts import write_atomically
from stages.measure.flops import flops_per_token
from stages.run.heap import keep_freed_memory
from stages.settings import schema as settings
from stages.settings.compose import compose

CORPORA = {
    "Python library": [f"{sysconfig.get_path('stdlib')}/**/*.py"],  # beside it the site-packages, if any
    "English manuals": bench.CORPORA["English manuals"],
}
SECONDS = 150.0  # of two ranks together: 75 seconds of training
MEGABYTES = 12.0  # of text per corpus
HEAD_WIDTH = 32
EVERYWHERE, WITH_TWIN = 5, 2  # of the sizes, the first: on every corpus, and with a dense twin


def sized(default: Recipe, width: int, layers: int, experts: int, per_token: int, expert_width: int) -> Recipe:
    """The default recipe with a teacher of another size; what the sizes leave open keeps the default's proportions."""
    shape = default.shape
    share = width / shape.width
    return replace(
        default,
        shape=replace(
            shape,
            width=width,
            layers=layers,
            heads=width // HEAD_WIDTH,
            latent_width=8 * round(shape.latent_width * share / 8),
            dense_width=8 * round(shape.dense_width * share / 8),
            experts=experts,
            experts_per_token=per_token,
            expert_width=expert_width,
        ),
    )


def sizes(default: Recipe) -> dict[str, Recipe]:
    """One change at a time around the middle, by name."""
    grid = [
        (128, 2, 16, 4, 64),
        (128, 3, 16, 4, 64),
        (128, 4, 16, 4, 64),
        (192, 2, 16, 4, 96),
        (192, 4, 16, 4, 96),
        (192, 3, 16, 4, 96),
        (96, 4, 16, 4, 48),
        (64, 4, 16, 4, 32),
        (128, 6, 16, 4, 64),
        (128, 2, 8, 4, 64),
        (128, 2, 32, 4, 64),
        (128, 2, 16, 2, 128),
    ]
    found = {}
    for width, layers, experts, per_token, expert_width in grid:
        name = f"width {width}, {layers} layers, {per_token} of {experts} experts of {expert_width}"
        found[name] = sized(default, width, layers, experts, per_token, expert_width)
    names = list(found)
    for name in names[:WITH_TWIN]:
        found[f"{name}: dense twin"] = replace(found[name], shape=dense_twin(found[name].shape))
    first = [one for name in names[:EVERYWHERE] for one in (name, f"{name}: dense twin") if one in found]
    return {name: found[name] for name in dict.fromkeys([*first, *names])}


def table(measured: bench.Bench, found: dict[str, Recipe], seconds: float) -> tuple[str, bool]:
    """Markdown, and whether everything is measured."""
    cells: dict[tuple[str, str], str] = {}
    everywhere = EVERYWHERE + WITH_TWIN
    planned = [(data, name) for data in measured.corpora for name in list(found)[:everywhere]]
    planned += [(measured.corpora[0], name) for name in list(found)[everywhere:]]
    for data, name in planned:
        size = found[name]
        with suppress(bench.OutOfTime):
            bits = measured.bits(size, data, seconds)
            cells[name, data.name] = f"{statistics.mean(bits):.4f}"
            print(f"{data.name}: {name}: {cells[name, data.name]}", flush=True)
    corpora = [data.name for data in measured.corpora]
    head = ["size", "MFLOP per token", "s per step", "steps", *corpora]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for name in dict.fromkeys(name for name, _ in cells):
        shape, each = found[name].shape, measured.seconds_per_step(found[name])
        flops = flops_per_token(shape, shape.sequence_tokens)["total"] / 1e6
        row = " | ".join(cells.get((name, corpus), "") for corpus in corpora)
        lines.append(f"| {name} | {flops:.1f} | {each:.3f} | {round(seconds / each)} | {row} |")
    return "\n".join(lines), len(cells) == len(planned)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor seconds of training per run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after these; it continues later")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="whose mean the table shows")
    given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    keep_freed_memory()
    bench.CORPORA.update(CORPORA)
    demo = settings.validate(compose(["scale=demo", "corpus=stdlib"]))
    here = list(bench.corpora_here(CORPORA, MEGABYTES, demo))
    data = [one for one in here if isinstance(one, bench.Data)]
    default = default_recipe(demo, data[0].train.vocab_size)
    end = time.monotonic() + 60 * given.minutes
    measured = bench.Bench(data, default, bench.KEPT, given.seeds, end)
    rows, complete = table(measured, sizes(default), given.seconds)
    notes = [one for one in here if isinstance(one, str)]
    if not complete:
        notes.append("not all is measured yet: the same command continues")
    seeds = ", ".join(map(str, given.seeds))
    text = f"""# Sizes at fixed time

Written by `python -m benchmarks.scaling`. Validation bits per byte after {given.seconds:g} processor seconds of
training on one core (seeds: {seeds}; up to {MEGABYTES:g} MB of text), the schedule laid over as many steps as these
pay for.

{listed(conditions())}

{rows}
"""
    write_atomically(ROOT / "benchmarks" / "scaling.md", text + "".join(f"\n- {note}" for note in notes))


if __name__ == "__main__":
    main()
