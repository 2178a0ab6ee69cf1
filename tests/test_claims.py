"""The experiment of record over seeds and corpora: its statistics, and which runs it takes."""

import subprocess
import sys

import numpy as np
import pytest

from benchmarks.checkout import ROOT, environment
from claims.__main__ import MARKS
from claims.challenge import SCORES, equal_steps
from claims.table import COMPARED, TIMED, Comparison, CrossedBootstrap, Runs, holm, summary
from stages.files.artifacts import write_json
from stages.measure import scoring
from stages.run.entry import Place


def table_of(nats: np.ndarray) -> np.ndarray:
    """A score table of documents of 100 bytes."""
    table = np.zeros((len(nats), len(scoring.COLUMNS)))
    table[:, scoring.NATS], table[:, scoring.BYTES], table[:, scoring.TOKENS] = nats, 100, 30
    return table


def test_a_resample_takes_the_same_documents_of_every_seed_it_takes():
    bootstrap = CrossedBootstrap(seeds=3, documents=7, resamples=50, seed=0)
    counts_RSG = bootstrap.counts_RG.reshape(50, 3, 7)
    assert (counts_RSG.sum((1, 2)) == 21).all()
    for counts_SG in counts_RSG:
        assert np.linalg.matrix_rank(counts_SG) == 1  # how often a seed, times how often a document


def test_noise_between_seeds_widens_the_interval_and_noise_shared_by_two_models_does_not():
    generator = np.random.default_rng(0)
    documents_G, seeds_S = generator.normal(200, 20, 40), np.array([-30.0, 0, 30])
    quiet = table_of(np.tile(documents_G, 3))
    noisy = table_of((documents_G + seeds_S[:, None]).ravel())
    bootstrap = CrossedBootstrap(3, 40, 2000, seed=0)

    def width(table):
        found = scoring.estimate(0.0, bootstrap.bits_per_byte(table))
        return found.high - found.low

    assert width(noisy) > 2 * width(quiet)
    better = noisy.copy()
    better[:, scoring.NATS] -= 5
    apart, _ = scoring.difference(bootstrap, noisy, better)
    assert apart.value == pytest.approx(apart.low) == pytest.approx(apart.high)


def test_holm_multiplies_the_smallest_by_all_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_a_run_counts_once_its_control_of_equal_time_is_scored(tmp_path):
    for name in ("python-1", "python-2", "c-headers-1"):
        scores = tmp_path / name / TIMED / SCORES
        scores.parent.mkdir(parents=True)
        scores.touch()
    (tmp_path / "python-3").mkdir()
    runs = Runs.of(tmp_path)
    assert runs.corpora == ["c-headers", "python"] and runs.seeds == 1
    assert list(runs.folders["python"]) == [1, 2]


def test_the_summary_has_a_row_for_each_control_and_a_column_for_each_corpus():
    def found(corpus: str, model: str, equal: str, better: float, p: float) -> Comparison:
        ahead = scoring.Estimate(better, better - 0.01, better + 0.01)
        return Comparison(corpus, model, equal, "control", ahead, [better], 1.0, 2.0, p)

    rows = summary([found(c, *what, b, p) for c, b, p in (("a", 0.1, 1e-4), ("b", -0.1, 0.9)) for what in COMPARED])
    head, _, first, *others = rows.splitlines()
    assert head.endswith("| a | b |") and len(others) == len(COMPARED) - 1
    assert all((ROOT / "README.md").read_text().count(mark) == 1 for mark in MARKS)
    cells = "+0.1000 (+0.0900 to +0.1100), beaten", "−0.1000 (−0.1100 to −0.0900), level"
    assert first == f"| student, same tokens | {' | '.join(cells)} |"


def test_equal_time_is_the_time_of_teacher_and_student_by_the_measured_speed(tmp_path):
    for path, figures in {
        "measurements/pretrain.json": {"teacher/seconds": 40.0},
        "measurements/distill.json": {"student/seconds": 10.0},
        "measurements/challenge.json": {"scratch_student/seconds": 75.0},
        "metrics/challenge.json": {"scratch_student_steps": 1200},
    }.items():
        write_json(Place(tmp_path, tmp_path).write(path), figures)
    assert equal_steps(Place(tmp_path, tmp_path)) == 800


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["corpus=klingon", "seed=1"], "corpus=klingon is not one of python, headers, algebra (claims/sweep.yaml)"),
        (["corpus=python", "seed=one"], "seed=one: must be a whole number from 0 to 2**32 - 1"),
    ],
)
def test_an_unknown_corpus_and_a_seed_that_is_no_number_are_one_line(words, line):
    words = [sys.executable, "-m", "claims", *words]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"claims: {line}\n"
