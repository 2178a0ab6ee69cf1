"""Which size learns most in the time that the default gives its teacher: vocabulary, width, depth, experts and steps.

    python -m benchmarks.scaling                             # some hours on one core; benchmarks/scaling.md
    python -m benchmarks.scaling --minutes 60                # an hour of it; called again it continues

One process of one thread trains as `benchmarks.recipe` does: a budget of processor seconds, the schedule laid over as
many steps as it pays for. A dense twin costs a token as many operations as its size does.
"""

import argparse
import math
import os
import statistics
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Size:
    vocab_size: int
    width: int
    layers: int
    experts: int = 16
    per_token: int = 4
    expert_width: int = 0  # 0: half of the width
    dense: bool = False  # the dense twin

    def __str__(self) -> str:
        kind = "dense twin" if self.dense else f"{self.per_token} of {self.experts} experts"
        wide = f" of {self.expert_width}" if self.expert_width else ""
        return f"{self.vocab_size} tokens, width {self.width}, {self.layers} layers, {kind}{wide}"

    def recipe(self, default: Recipe) -> Recipe:
        """The default recipe at this size; what is left open keeps the proportions of a teacher of width 192."""
        share = self.width / 192
        shape = replace(
            default.shape,
            width=self.width,
            layers=self.layers,
            heads=self.width // HEAD_WIDTH,
            latent_width=8 * round(64 * share / 8),
            dense_width=8 * round(512 * share / 8),
            experts=self.experts,
            experts_per_token=self.per_token,
            expert_width=self.expert_width or self.width // 2,
        )
        return replace(default, shape=dense_twin(shape) if self.dense else shape)


MIDDLE = Size(1024, 128, 2)
SIZES = [  # one change at a time around the middle, and the size of before
    MIDDLE,
    replace(MIDDLE, layers=3),
    replace(MIDDLE, layers=4),
    replace(MIDDLE, width=192),
    replace(MIDDLE, vocab_size=2048),
    replace(MIDDLE, dense=True),
    replace(MIDDLE, layers=3, dense=True),
    replace(MIDDLE, vocab_size=512),
    Size(4096, 128, 2),
    Size(4096, 192, 4),
    Size(4096, 128, 2, dense=True),
    Size(4096, 128, 3),
    Size(4096, 128, 3, dense=True),
    Size(4096, 128, 4),
    Size(4096, 192, 2),
    Size(4096, 192, 3),
    Size(4096, 96, 4),
    Size(4096, 64, 4),
    Size(4096, 128, 6),
    replace(MIDDLE, experts=8),
    replace(MIDDLE, experts=32),
    replace(MIDDLE, per_token=2, expert_width=128),
]


class Study:
    """All sizes on all corpora; every vocabulary has token shards of its own."""

    def __init__(self, seconds: float, seeds: Sequence[int], end: float):
        self.seconds, self.notes = seconds, set[str]()
        self.benches: dict[int, bench.Bench] = {}
        self.defaults: dict[int, Recipe] = {}
        for vocab in dict.fromkeys(size.vocab_size for size in SIZES):
            named = {f"{corpus}, {vocab} tokens": patterns for corpus, patterns in CORPORA.items()}
            bench.CORPORA.update(named)
            plain = settings.validate(compose(["scale=demo", "corpus=stdlib", f"prepare.vocab_size={vocab}"]))
            here = list(bench.corpora_here(named, MEGABYTES, plain))
            self.notes |= {one for one in here if isinstance(one, str)}
            data = [one for one in here if isinstance(one, bench.Data)]
            self.defaults[vocab] = default_recipe(plain, data[0].train.vocab_size)
            self.benches[vocab] = bench.Bench(data, self.defaults[vocab], bench.KEPT, seeds, end)

    def table(self) -> str:
        """Markdown; a corpus is finished before the next begins."""
        cells: dict[tuple[Size, str], str] = {}
        for corpus in CORPORA:
            for size in SIZES:
                with suppress(bench.OutOfTime):
                    cells |= self.cell(size, corpus)
        lines = [f"| size | MFLOP per token | s per step | steps | {' | '.join(CORPORA)} |"]
        lines.append(f"| --- |{' ---: |' * (3 + len(CORPORA))}")
        for size in dict.fromkeys(size for size, _ in cells):
            recipe = size.recipe(self.defaults[size.vocab_size])
            each = self.benches[size.vocab_size].seconds_per_step(recipe)
            flops = flops_per_token(recipe.shape, recipe.shape.sequence_tokens)["total"] / 1e6
            row = " | ".join(cells.get((size, corpus), "") for corpus in CORPORA)
            lines.append(f"| {size} | {flops:.2f} | {each:.3f} | {round(self.seconds / each)} | {row} |")
        if len(cells) < len(SIZES) * len(CORPORA):
            self.notes.add("not all is measured yet: the same command continues")
        return "\n".join(lines)

    def cell(self, size: Size, corpus: str) -> dict[tuple[Size, str], str]:
        measured = self.benches[size.vocab_size]
        for data in measured.corpora:
            if data.name.startswith(corpus):
                bits = measured.bits(size.recipe(self.defaults[size.vocab_size]), data, self.seconds)
                print(f"{corpus}: {size}: {statistics.mean(bits):.4f}", flush=True)
                return {(size, corpus): f"{statistics.mean(bits):.4f}"}
        return {}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor seconds of training per run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after these; it continues later")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="whose mean the table shows")
    given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    keep_freed_memory()
    study = Study(given.seconds, given.seeds, time.monotonic() + 60 * given.minutes)
    rows, seeds = study.table(), ", ".join(map(str, given.seeds))
    text = f"""# Sizes at fixed time

Written by `python -m benchmarks.scaling`. Validation bits per byte after {given.seconds:g} processor seconds of
training on one core (seeds: {seeds}; up to {MEGABYTES:g} MB of text), the schedule laid over as many steps as these
pay for.

{listed(conditions())}

{rows}
"""
    write_atomically(ROOT / "benchmarks" / "scaling.md", text + "".join(f"\n- {note}" for note in sorted(study.notes)))


if __name__ == "__main__":
    main()
