"""Machines that train by themselves and average what they have become: what they send, and what a stopped run keeps.

The ranks are real and joined by gloo, but forks of one process (tests/forked_ranks.py).
"""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import in_ranks
from safetensors.torch import load_file
from test_evaluate import with_values, write_data

from stages import pretrain
from stages.files.artifacts import Refusal, read_json, sha256_of
from stages.run.entry import Place
from stages.training.job import Job, name_of
from stages.training.rank import INTERRUPTED, Rank, run_fit
from stages.training.strategies.local_sgd import LocalSGD, ranks_agree

STEPS, EVERY = 5, 2
WEIGHTS = "artifacts/teacher/model.safetensors"


@pytest.fixture(scope="module")
def settings(tiny_settings):
    settings = with_values(tiny_settings, "pretrain", steps=STEPS, validate_every_steps=STEPS, validation_sequences=5)
    settings = with_values(settings, "teacher", layers=2).model_copy(update={"sequence_tokens": 32})
    return with_values(settings, "trainer", strategy="local_sgd", average_every_steps=EVERY, log_every_steps=1)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("local_sgd")
    write_data(root / "artifacts/data")
    return root


def train(root, settings, state, ranks=2, of_machine=1, stop=None):
    """What the teacher's fit gives in each rank; `stop` is the step at which rank zero is told to."""

    def in_rank(rank):
        warnings.filterwarnings("ignore")
        job = Job("pretrain", name_of(pretrain.fits), settings, Place(root, state), state, "cpu", "32-true")
        rank = Rank(job)
        (fit,) = pretrain.fits(settings, job.place, None)
        steps = iter(range(1, STEPS + 1))
        if stop:
            rank.wish_to_stop = lambda: INTERRUPTED if next(steps) >= stop else 0.0
        try:
            run_fit(fit, rank)
        except Refusal as refusal:
            return str(refusal)
        return {name: weight.detach().clone() for name, weight in fit.model.named_parameters()}

    state.mkdir(parents=True, exist_ok=True)
    return in_ranks(ranks, root / "ranks", in_rank, of_machine)


def test_ranks_end_equal_and_a_run_that_was_stopped_on_the_bytes_of_one_that_was_not(root, settings):
    one, other = train(root, settings, root / "stayed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    said = train(root, settings, root / "stopped", stop=1)
    wanted = "teacher: interrupted after step 2 of 5; the same command continues from there"
    assert said == [wanted] * 2, "told at step 1, where they differ"
    assert read_json(root / "stopped/teacher.json")["step"] == 2
    shutil.copytree(root / "stopped", root / "moved")
    train(root, settings, root / "stopped")
    assert sha256_of(root / "stopped" / WEIGHTS) == sha256_of(root / "stayed" / WEIGHTS)
    with_ddp = with_values(settings, "trainer", strategy="ddp")
    (moved,) = train(root, with_ddp, root / "moved", ranks=1)
    assert all((moved[name] - one[name]).abs().max() < 0.1 for name in one), "any strategy goes on with it"
    train(root, with_ddp, root / "ddp")
    ours, theirs = load_file(root / "stayed" / WEIGHTS), load_file(root / "ddp" / WEIGHTS)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    assert all((ours[name] - theirs[name]).abs().max() < 0.1 for name in ours)


def test_on_one_machine_it_is_ddp(root, settings):
    for strategy in ("local_sgd", "ddp"):
        chosen = with_values(settings, "trainer", strategy=strategy)
        train(root, chosen, root / "alone" / strategy, ranks=2, of_machine=2)
    assert sha256_of(root / "alone/local_sgd" / WEIGHTS) == sha256_of(root / "alone/ddp" / WEIGHTS)


def test_the_mean_is_over_machines_whose_ranks_each_send_their_part_of_it(root):
    values = [torch.arange(15.0).view(3, 5), torch.ones(4)]

    def in_rank(rank):
        strategy, sent = LocalSGD(), []
        reduce = dist.all_reduce
        dist.all_reduce = lambda part, **words: (sent.append(part.nbytes), reduce(part, **words))
        machine = rank // 2
        return strategy._means([value * (1 + 2 * machine) for value in values]), sent

    for means, sent in in_ranks(4, root / "means", in_rank, of_machine=2):
        assert all(torch.equal(mean, 2 * value) for mean, value in zip(means, values, strict=True))
        assert sent == [2 * 10], "19 values in bfloat16 and one that fills up, over two ranks"


def test_the_last_step_is_one_that_all_ranks_agree_after(root, settings):
    def in_rank(_):
        return [ranks_agree(step, STEPS, settings.trainer) for step in range(1, STEPS + 1)]

    for found in in_ranks(2, root / "agree", in_rank, of_machine=1):
        assert found == [False, True, False, True, True]
