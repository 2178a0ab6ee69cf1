"""Learning per second: what each recipe reaches in the same seconds of training, on corpora found on the machine.

    make recipe                                              # half a day on one idle core; benchmarks/recipe.md
    python -m benchmarks.recipe --minutes 60                 # the same, an hour of it; called again it continues
    python -m benchmarks.recipe --seconds 60 --seeds 1 --corpora "C headers" -- "batch of 16"     # prints this one

One process of one thread trains the teacher of the default scale as a rank of `pretrain` does, without Lightning.
The budget counts processor seconds of training, validation apart. A recipe's step is timed first, in turn with plain
AdamW's so that other load cancels, and the schedule is laid over as many steps as the budget pays for: what costs more
per step takes fewer. Validation windows and data order are the same for all. What was measured is kept in
.runs/recipe and not measured again, so an interrupted table continues; delete it when the code has changed.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

if __name__ == "__main__":  # before the libraries that read it are imported
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}

import torch
from torch import Tensor

from benchmarks.table import ROOT, conditions, listed
from benchmarks.variants import (
    Recipe,
    default_recipe,
    new_model,
    new_objective,
    new_optimizers,
    orthogonalisation,
    plain_adamw,
    rate_factor,
    variants,
)
from stages.data.shards import SPLITS, Tokens, Windows, token_dtype, write_card, write_split
from stages.data.splits import refuse_few, split_documents
from stages.files.artifacts import write_atomically
from stages.files.resuming import Interruption
from stages.model.layers import has_bfloat16
from stages.prepare import encode, gather, texts, train_tokenizer
from stages.run.heap import keep_freed_memory
from stages.settings import schema as settings
from stages.settings.compose import compose
from stages.training.fit import validation_nats

CORPORA = {  # that of most documents first: on it plain AdamW is tuned
    "English manuals": ["/usr/share/man/man1/*.gz"],
    "Perl modules": ["/usr/share/perl/**/*.pm", "/usr/share/perl5/**/*.pm"],
    "C headers": ["/usr/include/**/*.h"],
}
ADAMW = "plain AdamW"  # what the names of its variants begin with
SECONDS = 360.0  # about what the default scale gives its teacher where there are no bfloat16 units
MEGABYTES = 6.0  # of text per corpus
SEEDS = (1, 2, 3)  # a single one says nothing on C headers
LONGER = {1800.0: 3, 3600.0: 1}  # seconds that default and dense twin have, too, by the first seed: on how many corpora
LONGER_MEGABYTES = 24.0  # so that little text comes twice
FACTORS = (3.0, 2.0, 1.5, 1.0)  # how many times sooner the default may be; the cheapest to try comes first
KEPT = ROOT / ".runs" / "recipe"
VALIDATION_SEQUENCES = 64
LARGEST_FILE = 1 << 18  # bytes; above it stand tables and generated code


# ---- corpora -----------------------------------------------------------------------------------------------


def documents_of(patterns: list[str], most_bytes: int) -> Iterator[str]:
    """The texts of the files, a sample by the checksum of their names, of manual pages the prose."""
    files = {Path(name).resolve() for pattern in patterns for name in glob(pattern, recursive=True)}
    for path in sorted(files, key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            continue
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        if path.suffix == ".gz":  # lines that begin with a dot or an apostrophe are requests to the typesetter
            text = "".join(line for line in text.splitlines(keepends=True) if line[0] not in ".'")
        if not text.strip():
            continue
        most_bytes -= len(text.encode())
        if most_bytes < 0:
            return
        yield text


def prepared(documents: Iterator[str], knobs: settings.Prepare, folder: Path) -> Path:
    """The shards that `prepare` makes of the texts, near-duplicates kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with Interruption("recipe") as interruption, tempfile.TemporaryFile() as spool:
        found, _ = gather(documents, spool, interruption, near=None)
        refuse_few(found, [])
        splits = split_documents(found, knobs.val_share, knobs.test_share)
        tokenizer = train_tokenizer(knobs.tokenizer, knobs.vocab_size, texts(spool, splits["train"]))
        parts = {}
        for split in SPLITS:
            encoded = encode(tokenizer, spool, splits[split], split, interruption)
            parts[split] = write_split(folder, split, encoded, tokenizer, knobs.shard_tokens)
    card = {"vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text, "splits": parts}
    write_card(folder, card | {"dtype": token_dtype(tokenizer.vocab_size)})
    return folder


@dataclass(frozen=True)
class Data:
    """A corpus as a run sees it."""

    name: str
    train: Tokens
    validation_batches: list[Tensor]
    validation_bytes: float

    @classmethod
    def of(cls, name: str, folder: Path, sequence_tokens: int) -> "Data":
        validation = Tokens(folder, "val")
        tokens_BT1 = Windows(validation, sequence_tokens, seed=None).spread(VALIDATION_SEQUENCES)
        targets = tokens_BT1[:, 1:].numel()
        return cls(name, Tokens(folder, "train"), list(tokens_BT1.split(8)), targets * validation.bytes_per_token)


# ---- training ----------------------------------------------------------------------------------------------


class Run:
    """What a rank of `pretrain` does in a step, in one process."""

    def __init__(self, recipe: Recipe, data: Data, seed: int, steps: int):
        self.recipe, self.data, self.steps = recipe, data, steps
        self.model, self.objective = new_model(recipe, seed), new_objective(recipe)
        self.optimizers = new_optimizers(recipe, self.model)
        self.windows = Windows(data.train, recipe.shape.sequence_tokens, seed)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu"))

    def step(self, step: int) -> None:
        recipe, model = self.recipe, self.model
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate_factor(recipe, step, self.steps)
            optimizer.zero_grad(set_to_none=True)
        tokens_BT1 = self.windows.batch(step, batch_sequences=recipe.batch_sequences)
        with self.autocast():
            outcome = self.objective(model, tokens_BT1)
        outcome.loss.backward()
        if recipe.gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip_val)
        with orthogonalisation(recipe), self.autocast():
            for optimizer in self.optimizers:
                optimizer.step()
        model.balance(outcome.loads, recipe.bias_update_rate)

    def bits_per_byte(self) -> float:
        with self.autocast():
            nats = validation_nats(self.model, self.data.validation_batches)
        return nats.item() / math.log(2) / self.data.validation_bytes


def seconds_of_steps(recipes: list[Recipe], data: Data, rounds: int) -> list[list[float]]:
    """Processor seconds of each recipe's step, a step of each in turn, after as many rounds that let the heap grow.

    Until then a step pays for memory that it is the first to touch: up to half of its time on a virtual machine.
    """
    runs = [Run(recipe, data, seed=0, steps=1000) for recipe in recipes]
    seconds: list[list[float]] = [[] for _ in recipes]
    for step in range(2 * rounds):
        for run, taken in zip(runs, seconds, strict=True):
            started = time.process_time()
            run.step(step)
            if step >= rounds:
                taken.append(time.process_time() - started)
    return seconds


def trained(recipe: Recipe, data: Data, seed: int, steps: int) -> list[tuple[int, float]]:
    """Steps and validation bits per byte, at half of the run and its end."""
    run, curve = Run(recipe, data, seed, steps), []
    for step in range(steps):
        run.step(step)
        if step + 1 in (steps // 2, steps):
            curve.append((step + 1, run.bits_per_byte()))
    return curve


# ---- what is measured, and kept ----------------------------------------------------------------------------


def costs(recipe: Recipe) -> tuple:
    """What a step's cost depends on."""
    r, shape = recipe, replace(recipe.shape, route_scale=1.0)
    return shape, r.batch_sequences, r.plain, len(r.coefficients), r.query_key_norm, r.ahead_weight > 0


class OutOfTime(Exception):
    """What is still to be measured stays a blank in the table."""


class Bench:
    """Runs at a budget; each is done once, its numbers are kept by what they depend on."""

    def __init__(
        self,
        corpora: list[Data],
        default: Recipe,
        kept: Path,
        seeds: Sequence[int] = SEEDS,
        end: float = math.inf,
        rounds: int = 21,
    ):
        self.corpora, self.kept, self.seeds, self.rounds = corpora, kept, seeds, rounds
        self.reference = plain_adamw(default, 1e-3)
        self.end = end  # by time.monotonic: after it nothing is begun

    def once(self, measure: Callable[[], list], *what) -> list:
        key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
        path = self.kept / f"{key}.json"
        if not path.exists():
            if time.monotonic() > self.end:
                raise OutOfTime
            write_atomically(path, json.dumps(measure()))
        return json.loads(path.read_text())

    def seconds_per_step(self, recipe: Recipe) -> float:
        data, reference = self.corpora[0], self.reference

        def measured(*recipes: Recipe) -> list[list[float]]:
            return seconds_of_steps(list(recipes), data, self.rounds)

        alone = self.once(lambda: measured(reference), *costs(reference))
        both = self.once(lambda: measured(reference, recipe), "in turn", *costs(recipe))
        ratio = statistics.median(theirs / ours for ours, theirs in zip(*both, strict=True))
        return statistics.median(alone[0]) * ratio

    def curve(self, recipe: Recipe, data: Data, seconds: float, seed: int) -> list[tuple[float, float]]:
        """Seconds of training and validation bits per byte."""
        each = self.seconds_per_step(recipe)
        steps = max(4, round(seconds / each))
        identity = (recipe, data.name, data.validation_bytes, seed, steps)
        curve = self.once(lambda: trained(recipe, data, seed, steps), *identity)
        return [(step * each, bits) for step, bits in curve]

    def bits(self, recipe: Recipe, data: Data, seconds: float) -> list[float]:
        """Bits per byte at the end, by seed."""
        return [self.curve(recipe, data, seconds, seed)[-1][1] for seed in self.seeds]


# ---- the comparison ----------------------------------------------------------------------------------------


class Table:
    """Validation bits per byte of the variants, as far as time allowed, and what follows from them."""

    def __init__(self, bench: Bench, found: dict[str, Recipe], seconds: float):
        self.bench, self.found, self.seconds = bench, found, seconds
        self.bits: dict[tuple[str, str], list[float]] = {}  # by variant and corpus, of each seed
        self.notes: list[str] = []
        self.complete = True

    def fill(self) -> None:
        """AdamW's variants by the first seed on the first corpus, the better two and all else everywhere."""
        plain = [name for name in self.found if name.startswith(ADAMW)]
        self.measure(name for name in self.found if name not in plain)
        with self.while_time_lasts():
            plain = self.tuned(plain)
            self.measure(plain)
            for data in self.bench.corpora:
                with self.while_time_lasts():
                    self.notes += self.against_adamw(plain, data)

    @contextmanager
    def while_time_lasts(self) -> Iterator[None]:
        try:
            yield
        except OutOfTime:
            self.complete = False

    def measure(self, names: Iterable[str]) -> None:
        for name, data in itertools.product(names, self.bench.corpora):
            with self.while_time_lasts():
                bits = self.bits[name, data.name] = self.bench.bits(self.found[name], data, self.seconds)
                print(f"{data.name}: {name}: {statistics.mean(bits):.4f}", file=sys.stderr, flush=True)

    def tuned(self, names: list[str]) -> list[str]:
        """The better two; of more the numbers that chose them are noted."""
        if len(names) <= 2:
            return names
        bench, data = self.bench, self.bench.corpora[0]
        seed = bench.seeds[0]
        bits = {name: bench.curve(self.found[name], data, self.seconds, seed)[-1][1] for name in names}
        numbers = "; ".join(f"{bits[name]:.4f} at {name.removeprefix(ADAMW).strip()}" for name in names)
        self.notes.append(f"{ADAMW} was tuned on {data.name}, seed {seed}: {numbers}")
        return sorted(names, key=bits.__getitem__)[:2]

    def against_adamw(self, plain: list[str], data: Data) -> Iterator[str]:
        ends = {name: statistics.mean(self.bits[name, data.name]) for name in plain if (name, data.name) in self.bits}
        if not ends or ("default", data.name) not in self.bits:
            return
        best = min(ends, key=ends.__getitem__)
        factor = self.times_sooner(data, ends[best])
        how = f"no worse than {best} in 1/{factor:g} of the time" if factor else f"worse than {best}"
        yield f"{data.name}: the default ends {how}"

    def times_sooner(self, data: Data, bits: float) -> float:
        """The largest of FACTORS by which the default's budget can be cut, its schedule with it, to end no worse."""
        for factor in FACTORS:
            if statistics.mean(self.bench.bits(self.found["default"], data, self.seconds / factor)) <= bits:
                return factor
        return 0.0

    def section(self, megabytes: float) -> str:
        seeds = ", ".join(map(str, self.bench.seeds))
        title = f"## {self.seconds:g} seconds, up to {megabytes:g} MB of text; seeds: {seeds}"
        notes = "".join(f"- {note}\n" for note in self.notes)
        return "\n".join(filter(None, [f"{title}\n", f"{self.rendered()}\n", notes]))

    def rendered(self) -> str:
        corpora, lines = [data.name for data in self.bench.corpora], []
        for name in dict.fromkeys(name for name, _ in self.bits):
            each = self.bench.seconds_per_step(self.found[name])
            cells = (self.cell(name, corpus) for corpus in corpora)
            lines.append(f"| {name} | {each:.3f} | {round(self.seconds / each)} | {' | '.join(cells)} |")
        head = ["variant", "s per step", "steps", *corpora]
        return "\n".join([f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}", *lines])

    def cell(self, name: str, corpus: str) -> str:
        bits, default = self.bits.get((name, corpus)), self.bits.get(("default", corpus))
        if not bits:
            return ""
        if name == "default" or not default:
            return f"{statistics.mean(bits):.4f}"
        more = [ours - theirs for ours, theirs in zip(bits, default, strict=True)]
        error = f" ± {statistics.stdev(more) / math.sqrt(len(more)):.4f}" if len(more) > 1 else ""
        return f"{statistics.mean(bits):.4f} ({statistics.mean(more):+.4f}{error})"


def page(sections: list[str]) -> str:
    what = (
        "Written by `make recipe`. Validation bits per byte after processor seconds of training on one core, the "
        "schedule laid over as many steps as these pay for: means over the seeds (difference from the default ± its "
        "standard error over the seeds). Commit and load are those of the last call, which continues what earlier ones "
        "have measured."
    )
    return "\n".join(["# The recipe\n", f"{what}\n", f"{listed(conditions())}\n", *sections])


def corpora_here(names: Iterable[str], megabytes: float, plain: settings.Settings) -> Iterator[Data | str]:
    """Each corpus, or a line for one that this machine does not have."""
    for name in names:
        folder = KEPT / f"{name.replace(' ', '-')}-{megabytes:g}"
        if not (folder / "card.json").exists():
            documents = list(documents_of(CORPORA[name], round(megabytes * 1e6)))
            if sum(map(len, documents)) < megabytes * 5e5:
                yield f"{name} left out: not on this machine"
                continue
            prepared(iter(documents), plain.prepare, folder)
        yield Data.of(name, folder, plain.sequence_tokens)


def compared(
    names: Sequence[str], seconds: float, megabytes: float, seeds: Sequence[int], corpora: Sequence[str], end: float
) -> Table | str:
    """The table of the default and the variants named, of the rivals where none is; a line where there is no corpus."""
    demo = settings.validate(compose(["scale=demo", "corpus=stdlib"]))
    here = list(corpora_here(corpora, megabytes, demo))
    missing = [one for one in here if isinstance(one, str)]
    data = [one for one in here if isinstance(one, Data)]
    if not data:
        return "\n".join(missing)
    default = default_recipe(demo, data[0].train.vocab_size)
    found = variants(default)
    if unknown := [name for name in names if name not in found]:
        sys.exit(f"benchmarks.recipe: no variant {unknown[0]!r}; there are {', '.join(found)}")
    named = names or ["dense twin", *(name for name in found if name.startswith(ADAMW))]
    found = {name: recipe for name, recipe in found.items() if name in ("default", *named)}
    table = Table(Bench(data, default, KEPT, seeds, end), found, seconds)
    table.fill()
    table.notes += missing
    if not table.complete:
        table.notes.append("not all is measured yet: the same command continues")
    return table


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe")
    parser.add_argument("names", nargs="*", help="variants; none: the rivals, into benchmarks/recipe.md")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor seconds of training per run")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="of text per corpus")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after these; it continues later")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="whose mean the table shows")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA))
    given = parser.parse_args(arguments)

    torch.set_num_threads(1)
    keep_freed_memory()
    end = time.monotonic() + 60 * given.minutes
    plans = [(given.names, given.seconds, given.megabytes, given.seeds, given.corpora)]
    if not given.names:
        twin, first = ["dense twin"], given.seeds[:1]
        plans += [(twin, seconds, LONGER_MEGABYTES, first, given.corpora[:many]) for seconds, many in LONGER.items()]
    sections: list[str] = []
    for names, seconds, megabytes, seeds, corpora in plans:
        table = compared(names, seconds, megabytes, seeds, corpora, end)
        if isinstance(table, str) and not sections:
            sys.exit(table)
        sections.append(f"{table}\n" if isinstance(table, str) else table.section(megabytes))
        print(sections[-1])
    if not given.names:
        write_atomically(ROOT / "benchmarks" / "recipe.md", page(sections))


if __name__ == "__main__":
    main(sys.argv[1:])
