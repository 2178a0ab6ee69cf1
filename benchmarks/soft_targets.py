"""Where a teacher's soft targets pay: half of SmolLM2-135M, cut out of it, trained with them and on the data alone.

    make smollm
    python -m benchmarks.soft_targets                   # three quarters of an hour; benchmarks/soft_targets.md
    python -m benchmarks.soft_targets --minutes 10      # begins nothing after these; called again it continues

The two of a pair have one start, the same batches, rates and steps, and differ in their loss alone. One process does
what the ranks of `distill` do, without Lightning, and what the teacher makes of a window is computed once for all.
Differences are of the test documents of `evaluate`, paired, with intervals by its bootstrap. What was measured is kept
in .runs/soft_targets and not measured again; delete it when the code has changed.

Shapes: B sequences, T tokens, D width.
"""

import argparse
import copy
import functools
import hashlib
import io
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.checkout import checkout, stage
from benchmarks.table import ROOT, conditions, listed
from stages.compress.cut import cut_student
from stages.data.shards import Tokens, Windows, load_tokenizer
from stages.files.artifacts import write_atomically
from stages.measure import scoring
from stages.model.features import Features
from stages.model.hub import load
from stages.model.layers import has_bfloat16
from stages.reporting.wording import signed_number
from stages.run.heap import keep_freed_memory
from stages.settings import schema as settings
from stages.training.fit import Distillation, NextToken, split_targets, validation_nats
from stages.training.optimizers import learning_rate_factor, make_optimizer

KEPT = ROOT / ".runs" / "soft_targets"
Rates = tuple[float, float]  # Muon's and AdamW's
RATES: tuple[Rates, ...] = (
    (0.002, 0.0004), (0.004, 0.0004), (0.008, 0.0004), (0.004, 0.0016), (0.008, 0.0016), (0.016, 0.0016),
)  # fmt: skip
BEST: tuple[Rates, ...] = ((0.008, 0.0016), (0.008, 0.0004))  # by the first seed
LOWER: Rates = (0.004, 0.0016)  # the control may want others than the student
LOWEST: Rates = (0.002, 0.0004)
FEW = 2  # documents, of 9,198 tokens: 24 steps read them five times


@dataclass(frozen=True)
class Cell:
    """What a student is trained on, and how; without a divergence, on the data alone."""

    rates: Rates
    corpus: str = "python"  # of claims/sweep.yaml
    seed: int = 1
    steps: int = 24
    documents: int = 0  # of the training split, the first ones; 0: all
    divergence: str = "forward_kl"
    temperature: float = 1.0
    soft_weight: float = 0.9

    def data_alone(self) -> "Cell":
        return replace(self, divergence="", temperature=1.0, soft_weight=0.0)


class Pair(NamedTuple):
    soft: Cell
    alone: Cell


def rated() -> list[Cell]:
    """What chose the rates: all by the first seed, the best two by the second; and the data alone at lower ones."""
    usual = [*(Cell(rates) for rates in RATES), *(Cell(rates, seed=2) for rates in BEST)]
    return [*usual, *(Cell(rates).data_alone() for rates in (BEST[0], LOWER))]


def pairs(rates: Rates) -> dict[str, Pair]:
    """The students with soft targets and those held against them, by what is told of both."""
    usual = Cell(rates)
    few = replace(usual, documents=FEW)
    found = {
        "as in `scale: smollm`": usual,
        "seed 2": replace(usual, seed=2),
        "C++ headers": replace(usual, corpus="headers"),
        f"{FEW} documents": few,
        f"{FEW} documents, T = 2": replace(few, temperature=2.0),
        f"{FEW} documents, reverse KL": replace(few, divergence="reverse_kl"),
        "96 steps": replace(usual, steps=96),
    }
    against = {name: Pair(cell, cell.data_alone()) for name, cell in found.items()}
    for name, soft, lower in (("as in `scale: smollm`", usual, LOWER), (f"{FEW} documents", few, LOWEST)):
        against[f"{name}, the data alone at rates {lower[0]:g} and {lower[1]:g}"] = Pair(
            soft, replace(soft.data_alone(), rates=lower)
        )
    return against


@dataclass(frozen=True)
class Result:
    scores: np.ndarray  # as of stages.measure.scoring, [documents, columns]
    validation_bits_per_byte: float


class Beginning:
    """The first documents of a split, as `Windows` reads them."""

    def __init__(self, tokens: Tokens, documents: int):
        self.window = tokens.window
        start, count, _ = tokens.documents[documents - 1]
        self.length = int(start + count)

    def __len__(self) -> int:
        return self.length


class Remembering(nn.Module):
    """A frozen teacher that keeps what it made of each sequence, [T, D]."""

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.head = teacher.head
        self.kept: dict[bytes, Tensor] = {}

    def features(self, inputs_BT: Tensor) -> Features:
        keys = [sequence_T.numpy().tobytes() for sequence_T in inputs_BT]
        if new := [place for place, key in enumerate(keys) if key not in self.kept]:
            made = self.teacher.features(inputs_BT[new]).x_BTD
            self.kept |= zip((keys[place] for place in new), made, strict=True)
        return Features(torch.stack([self.kept[key] for key in keys]), [], {})


class Bench:
    """Trains and scores cells; each is done once, its numbers are kept by what they depend on."""

    def __init__(self, plain: settings.Settings, teacher: nn.Module, folders: dict[str, Path], kept: Path):
        self.plain, self.folders, self.kept = plain, folders, kept
        self.teacher = Remembering(teacher)
        self.start = functools.lru_cache(maxsize=1)(self.cut)  # a student is large
        self.stream = functools.cache(self.test_stream)

    def kept_at(self, cell: Cell | str) -> Path:
        return self.kept / f"{hashlib.sha256(repr(cell).encode()).hexdigest()[:16]}.npz"

    def found(self, cell: Cell | str) -> Result | None:
        if not (path := self.kept_at(cell)).exists():
            return None
        with np.load(path) as parts:
            return Result(parts["scores"], parts["validation"].item())

    def measure(self, cell: Cell | str) -> None:
        """A student, or the teacher on the corpus of this name."""
        if self.kept_at(cell).exists():
            return
        started = time.monotonic()
        if isinstance(cell, str):
            corpus, model = cell, self.teacher.teacher
        else:
            corpus, model = cell.corpus, self.trained(cell)
        seconds = time.monotonic() - started
        scores = self.scores(model, corpus)
        with self.autocast():
            validation = self.validation(model, corpus)
        buffer = io.BytesIO()
        np.savez(buffer, scores=scores, validation=validation)
        write_atomically(self.kept_at(cell), buffer.getvalue())
        bits = scoring.bits_per_byte(scores)
        print(f"{cell}: {bits:.4f}, validation {validation:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu"))

    # ---- training

    def windows(self, corpus: str, documents: int, seed: int) -> Windows:
        tokens = Tokens(self.folders[corpus], "train", verify=False)
        return Windows(Beginning(tokens, documents) if documents else tokens, self.plain.sequence_tokens, seed)

    def cut(self, corpus: str, documents: int, seed: int) -> nn.Module:
        """The start of `distill.init: pruned`."""
        student, calibration = self.plain.student, self.windows(corpus, documents, seed)
        batches = [calibration.batch(0, batch_sequences=self.plain.distill.batch_sequences)]
        keep = student.parameters_share, student.keep_layers, student.keep_heads
        return cut_student(self.teacher.teacher, *keep, batches)[0]

    def trained(self, cell: Cell) -> nn.Module:
        data, recipe = (cell.corpus, cell.documents, cell.seed), self.plain.distill
        model = copy.deepcopy(self.start(*data)).requires_grad_().train()
        soft = cell.divergence, cell.temperature, cell.soft_weight, recipe.chunk_tokens
        objective = Distillation(self.teacher, *soft) if cell.divergence else NextToken()
        rates = dict(zip(("muon_learning_rate", "adamw_learning_rate"), cell.rates, strict=True))
        knobs = self.plain.optimizer.model_copy(update=rates)
        optimizer = make_optimizer(model, knobs, recipe.learning_rate_scale)
        windows = self.windows(*data)
        for step in range(cell.steps):
            factor = learning_rate_factor(step, cell.steps, knobs.warmup_share, knobs.decay_share)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                objective(model, windows.batch(step, batch_sequences=recipe.batch_sequences)).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.plain.trainer.gradient_clip_val or math.inf)
                optimizer.step()
        return model.eval()

    # ---- scores

    def validation(self, model: nn.Module, corpus: str) -> float:
        tokens = Tokens(self.folders[corpus], "val", verify=False)
        windows = Windows(tokens, self.plain.sequence_tokens, seed=None)
        tokens_BT1 = windows.spread(self.plain.distill.validation_sequences)
        nats = validation_nats(model, list(tokens_BT1.split(8)))
        return nats.item() / math.log(2) / (split_targets(tokens_BT1)[1].numel() * tokens.bytes_per_token)

    def test_stream(self, corpus: str) -> scoring.Stream:
        folder = self.folders[corpus]
        tokens = Tokens(folder, "test", verify=False)
        return scoring.read_stream(tokens, load_tokenizer(folder), self.plain.evaluate.test_tokens)

    def scores(self, model: nn.Module, corpus: str) -> np.ndarray:
        sizes = self.plain.sequence_tokens, self.plain.evaluate.batch_sequences
        return scoring.score({"model": model}, self.stream(corpus), *sizes, reference="model")["model"]


# ---- the tables


def rates_table(bench: Bench) -> str:
    lines = [
        "| Muon's rate | AdamW's rate | seed | targets | validation bits per byte |",
        "| ---: | ---: | ---: | --- | ---: |",
    ]
    for cell in rated():
        if result := bench.found(cell):
            told = " | ".join(f"{rate:g}" for rate in cell.rates)
            targets = "the teacher's" if cell.divergence else "the data alone"
            lines.append(f"| {told} | {cell.seed} | {targets} | {result.validation_bits_per_byte:.4f} |")
    return "\n".join(lines)


def pairs_table(bench: Bench, named: dict[str, Pair]) -> str:
    """Those of which both are measured."""
    lines = [
        "| student | teacher | data alone | soft targets | gain (95%) | gain, validation |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, pair in named.items():
        teacher, alone, soft = bench.found(pair.soft.corpus), bench.found(pair.alone), bench.found(pair.soft)
        if not (teacher and alone and soft):
            continue
        bits = [f"{scoring.bits_per_byte(one.scores):.3f}" for one in (teacher, alone, soft)]
        bootstrap = scoring.Bootstrap(len(soft.scores), bench.plain.evaluate.bootstrap_resamples, bench.plain.seed)
        gain, low, high = map(signed_number, scoring.difference(bootstrap, alone.scores, soft.scores)[0])
        validation = signed_number(alone.validation_bits_per_byte - soft.validation_bits_per_byte)
        lines.append(f"| {name} | {' | '.join(bits)} | {gain} ({low} to {high}) | {validation} |")
    return "\n".join(lines)


def page(bench: Bench, named: dict[str, Pair]) -> str:
    usual, (muon, adamw) = bench.plain.distill, next(iter(named.values())).soft.rates
    tokens = usual.batch_sequences * bench.plain.sequence_tokens
    what = (
        "Written by `python -m benchmarks.soft_targets`. Half of SmolLM2-135M's body, cut out of it (`scale: smollm`),"
        f" then trained for 24 steps of {tokens:,} tokens, if a row has no other number, with its targets or on the"
        " data alone. Bits per byte of the beginnings of the test documents; a gain is what soft targets take off them,"
        " paired by document (95% intervals by bootstrap over documents, of one run each)."
    )
    rates = f"Rates {muon:g} and {adamw:g} for both, but where a row says otherwise."
    if waiting := [name for name, pair in named.items() if not all(map(bench.found, pair))]:
        rates += f" Not measured yet: {'; '.join(waiting)}. The same command continues."
    return "\n".join(
        [
            f"# Where soft targets pay\n\n{what}\n\n{listed(conditions())}\n",
            f"## Rates\n\n{rates_table(bench)}\n",
            f"## With soft targets and without\n\n{rates}\n\n{pairs_table(bench, named)}\n",
        ]
    )


# ---- data


def prepared(corpora: Iterable[str], kept: Path) -> dict[str, Path]:
    """What `prepare` makes of each corpus of claims/sweep.yaml with the teacher's tokenizer, made once."""
    import yaml
    from omegaconf import OmegaConf

    from claims.__main__ import package_folder

    OmegaConf.register_new_resolver("package", package_folder, replace=True)
    sweep = OmegaConf.load(ROOT / "claims/sweep.yaml")
    for name in corpora:
        if (kept / name).exists():
            continue
        fresh = kept / f"{name}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        checkout(fresh)
        (fresh / "models").symlink_to(ROOT / "models")
        sheet = yaml.safe_load((fresh / "params.yaml").read_text())
        sheet["distill"]["init"] = "pruned"
        sheet |= {"scale": "smollm", "corpus": OmegaConf.to_container(sweep.corpora[name], resolve=True)}
        (fresh / "params.yaml").write_text(yaml.safe_dump(sheet, sort_keys=False))
        for word in ("config", "prepare"):
            stage(fresh, word)
        fresh.rename(kept / name)
    return {name: kept / name / "artifacts/data" for name in corpora}


def main(arguments: list[str]) -> None:
    from stages.settings.compose import compose

    parser = argparse.ArgumentParser(prog="python -m benchmarks.soft_targets")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after these; it continues later")
    end = time.monotonic() + 60 * parser.parse_args(arguments).minutes

    keep_freed_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    plain = settings.validate(compose(["scale=smollm", "distill.init=pruned"]))
    folder = ROOT / str(plain.teacher.path)
    if not (folder / "config.json").exists():
        sys.exit(f"benchmarks.soft_targets: {plain.teacher.path} is not there: run make smollm")
    named = pairs((plain.optimizer.muon_learning_rate, plain.optimizer.adamw_learning_rate))
    corpora = list(dict.fromkeys(pair.soft.corpus for pair in named.values()))
    bench = Bench(plain, load(folder), prepared(corpora, KEPT), KEPT)
    cells = dict.fromkeys([*rated(), *(cell for pair in named.values() for cell in pair)])
    by_start = sorted(cells, key=lambda cell: (cell.seed, cell.documents, cell.corpus))
    wanted: list[Cell | str] = [*corpora, *by_start]
    for one in wanted:
        if time.monotonic() < end:
            bench.measure(one)
    text = page(bench, named)
    print(text)
    write_atomically(ROOT / "benchmarks/soft_targets.md", text)


if __name__ == "__main__":
    main(sys.argv[1:])
