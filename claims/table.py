"""From the runs of the experiment of record to its tables: claims by corpus, with intervals over seeds and documents.

A corpus has the same test documents for every seed, so seeds and documents are resampled apart, crossed. With three
seeds there are ten different samples of them: the intervals hold the noise between seeds, but only roughly.

Shapes: R resamples, S seeds, G documents.
"""

import statistics
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np

from benchmarks.table import conditions, listed
from claims.challenge import SCORES
from stages.challenge import MADE_FROM
from stages.evaluate import comparisons, control_differences, quality
from stages.files.artifacts import read_json
from stages.measure import scoring
from stages.measure.subjects import MODELS
from stages.reporting.claims import Claim, claims_as_markdown, quality_claims
from stages.reporting.controls import SAME_OPERATIONS, SAME_TOKENS, controls_of, strongest
from stages.reporting.wording import number, signed_number, words

TIMED, SAME_TIME = "timed", "same time"  # the folder of the control of equal time in that of a job, and its kind
MIN_SEEDS, MIN_CORPORA = 3, 3
RESAMPLES = 4000
COMPARED = (  # the claims that a control decides
    ("student", SAME_TOKENS),
    ("student", SAME_OPERATIONS),
    ("student", SAME_TIME),
    ("sparse_teacher", SAME_OPERATIONS),
    ("sparse_student", SAME_OPERATIONS),
)


class CrossedBootstrap(scoring.Bootstrap):
    """Paired resampling of seeds and of documents: how often a document of a seed stands in each resample, [R, S*G]."""

    def __init__(self, seeds: int, documents: int, resamples: int, seed: int):
        generator = np.random.Generator(np.random.PCG64(seed))
        counted = []
        for size in (seeds, documents):
            drawn = generator.integers(0, size, size=(resamples, size))
            counted.append(np.stack([np.bincount(row, minlength=size) for row in drawn]))
        seeds_RS, documents_RG = counted
        self.counts_RG = np.einsum("rs,rg->rsg", seeds_RS, documents_RG).reshape(resamples, -1).astype(float)


@dataclass(frozen=True)
class Runs:
    """Finished runs by corpus and seed."""

    folders: dict[str, dict[int, Path]]

    @classmethod
    def of(cls, folder: Path) -> "Runs":
        found: dict[str, dict[int, Path]] = {}
        for path in sorted(folder.glob(f"*-*/{TIMED}/{SCORES}")):
            run = path.parents[len(Path(TIMED, SCORES).parts) - 1]
            corpus, _, seed = run.name.rpartition("-")
            found.setdefault(corpus, {})[int(seed)] = run
        return cls(found)

    @property
    def corpora(self) -> list[str]:
        return list(self.folders)

    @property
    def seeds(self) -> int:
        """That every corpus has at least."""
        return min((len(seeds) for seeds in self.folders.values()), default=0)


@dataclass(frozen=True)
class Comparison:
    """A model against its strongest control, over all seeds and documents of a corpus."""

    corpus: str
    model: str
    equal: str
    control: str
    better: scoring.Estimate  # bits per byte; below zero the control is better
    by_seed: list[float]
    time: float | None  # seconds of training of the control with all that it was made from, over those of the model
    effect: float  # mean over documents and seeds of the paired difference, in its standard deviations (Cohen's d_z)
    p: float  # two-sided, of the bootstrap; from `compared` corrected for the number of comparisons (Holm)


class Corpus:
    """All runs of one corpus: their score tables one after another, and what follows from them."""

    def __init__(self, name: str, folders: dict[int, Path]):
        self.name, self.folders = name, list(folders.values())
        scores = [folder / "artifacts/scores" for folder in self.folders]
        self.tables = {model: np.concatenate([np.load(each / f"{model}.npy") for each in scores]) for model in MODELS}
        self.tables["timed_student"] = np.concatenate([np.load(each / TIMED / SCORES) for each in self.folders])
        self.documents = len(self.tables["teacher"]) // len(scores)
        self.bootstrap = CrossedBootstrap(len(scores), self.documents, RESAMPLES, seed=0)
        self.metrics = self.pooled()

    def pooled(self) -> dict:
        """The metrics of the first seed with every figure of quality from all seeds."""
        first = self.folders[0]
        metrics = {name: read_json(first / f"metrics/{name}.json") for name in ("pretrain", "distill", "challenge")}
        evaluated = read_json(first / "artifacts/evaluation.json")
        models = {
            model: evaluated["models"][model] | quality(self.bootstrap, table, model != "teacher")
            for model, table in self.tables.items()
            if model in evaluated["models"]
        }
        compared = comparisons(self.bootstrap, self.tables, models)
        controls = control_differences(self.bootstrap, self.tables)
        return metrics | {"evaluate": evaluated | {"models": models, "comparisons": compared, "controls": controls}}

    def claims(self) -> list[Claim]:
        return quality_claims(self.metrics)

    def comparison(self, model: str, equal: str) -> Comparison:
        control = "timed_student"
        if equal != SAME_TIME:
            control = strongest(controls_of(model, self.metrics), equal).name
        theirs, own = self.tables[control], self.tables[model]
        resampled_R = self.bootstrap.bits_per_byte(theirs) - self.bootstrap.bits_per_byte(own)
        tail = min((resampled_R <= 0).mean(), (resampled_R >= 0).mean())
        by_seed = [np.split(table, len(self.folders)) for table in (theirs, own)]
        seeds = [scoring.bits_per_byte(t) - scoring.bits_per_byte(o) for t, o in zip(*by_seed, strict=True)]
        paired = (theirs[:, scoring.NATS] - own[:, scoring.NATS]) / own[:, scoring.BYTES]
        effect = paired.mean() / paired.std(ddof=1)
        p = min(1.0, max(2 * tail, 1 / RESAMPLES))
        ahead, _ = scoring.difference(self.bootstrap, theirs, own)
        return Comparison(self.name, model, equal, control, ahead, seeds, self.time(control, model), effect, p)

    def time(self, control: str, model: str) -> float | None:
        """Median over the seeds: equal operations are not equal time. None where the seconds of no seed are known."""
        ratios = []
        for folder in self.folders:
            seconds, parts = seconds_of_fits(folder), [(name, *MADE_FROM.get(name, ())) for name in (control, model)]
            if all(part in seconds for part in chain(*parts)):
                theirs, own = (sum(seconds[part] for part in each) for each in parts)
                ratios.append(theirs / own)
        return statistics.median(ratios) if ratios else None


def seconds_of_fits(folder: Path) -> dict[str, float]:
    """Of every model that the run trained, by name."""
    found: dict[str, float] = {}
    for stage in ("pretrain", "distill", "sparsify", "challenge"):
        measured = read_json(folder / f"measurements/{stage}.json")
        timed = {name: value for name, value in measured.items() if name.endswith("/seconds") and value}
        found |= {name.removesuffix("/seconds"): value for name, value in timed.items()}
    found["timed_student"] = read_json(folder / TIMED / "metrics/challenge.json")["timed_student_seconds"]
    return found


def holm(values: list[float]) -> list[float]:
    """p values corrected for how many there are (Holm 1979)."""
    order, corrected, least = np.argsort(values), [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, values[index] * (len(values) - rank)))
        corrected[index] = least
    return corrected


def outcome(comparison: Comparison) -> str:
    if comparison.p >= 0.05:
        return "level"
    return "beaten" if comparison.effect > 0 else "control is better"


def comparisons_table(found: list[Comparison]) -> str:
    head = ["corpus", "model", "strongest control", "its time", "bits per byte better", "95% interval", "seeds"]
    lines = [f"| {' | '.join([*head, 'effect', 'p', 'outcome'])} |"]
    lines.append("| --- | --- | --- | ---: | ---: | --- | --- | ---: | ---: | --- |")
    for comparison in found:
        cells = [
            comparison.corpus,
            words(comparison.model),
            f"{words(comparison.control)} ({comparison.equal})",
            f"{number(comparison.time)}×",
            signed_number(comparison.better.value),
            f"{signed_number(comparison.better.low)} to {signed_number(comparison.better.high)}",
            ", ".join(map(signed_number, comparison.by_seed)),
            number(comparison.effect),
            f"{comparison.p:.2g}",
            outcome(comparison),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(found: list[Comparison]) -> str:
    """A row for each model and kind of control, a column for each corpus: how much better, 95%, the outcome."""
    corpora = list(dict.fromkeys(one.corpus for one in found))
    lines = [f"| model, against its strongest control of | {' | '.join(corpora)} |"]
    lines.append("| --- |" + " --- |" * len(corpora))
    for model, equal in COMPARED:
        cells = [
            f"{signed_number(one.better.value)} ({signed_number(one.better.low)} to {signed_number(one.better.high)}),"
            f" {outcome(one)}"
            for one in found
            if (one.model, one.equal) == (model, equal)
        ]
        lines.append(f"| {words(model)}, {equal} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(runs: Runs) -> tuple[list[Corpus], list[Comparison]]:
    corpora = [Corpus(name, folders) for name, folders in runs.folders.items()]
    found = [corpus.comparison(*what) for corpus in corpora for what in COMPARED]
    return corpora, [replace(one, p=p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


def page(corpora: list[Corpus], found: list[Comparison]) -> str:
    parts = [
        "# The claims over seeds and corpora",
        "Written by `make claims`. Intervals and p values resample seeds and test documents apart (with three seeds"
        " they are rough); p is corrected for the number of comparisons (Holm). The effect is the mean difference of a"
        " document in its standard deviations, the time that of the control's training over the model's, each with all"
        " that it was made from (median over the seeds). A control is beaten, or better, where the corrected p is below"
        " 0.05.",
        listed(conditions()),
        "## Models against their strongest controls",
        comparisons_table(found),
    ]
    for corpus in corpora:
        title = f"{corpus.name}: {len(corpus.folders)} seeds, {corpus.documents} test documents"
        parts += [f"## {title}", claims_as_markdown(corpus.claims()).rstrip()]
    return "\n\n".join(parts) + "\n"
