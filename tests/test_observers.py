"""Callbacks and loggers of conf/, as a rank builds them. Real training with both is in tests/test_pipeline.py."""

import sys

import pytest
import torch

from stages.files.artifacts import Refusal
from stages.run.entry import Place
from stages.settings.compose import compose
from stages.training import observers
from stages.training.fit import limited
from stages.training.job import is_observed
from stages.training.launch import observer_targets

FACTS = {"folder": "/logs", "stage": "pretrain", "fit": "teacher"}


def test_what_a_preset_names_is_built_with_the_facts_of_the_run():
    wanted = {
        "mine": {"_target_": "types.SimpleNamespace", "at": "${run:folder}/mine", "of": ["${run:fit}"]},
        "counted": {"_target_": "hydra.utils.get_method", "path": "stages.training.observers.tokens"},
    }
    mine, counted = observers.build("logger", object, wanted, FACTS).values()
    assert (mine.at, mine.of) == ("/logs/mine", ["teacher"]) and type(mine.of) is list
    assert counted(torch.zeros(4, 65)) == 256 and observers.sequences(torch.zeros(4, 65)) == 4
    assert observers.build("logger", object, {}, FACTS) == {}


MISSING = "logger.mine: nowhere.Logger cannot be built: No module named 'nowhere'; pip install -e '.[loggers]', or pip "


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"_target_": "nowhere.Logger"}, f"{MISSING}install nowhere"),
        ({"_target_": "collections.Cunter"}, "logger.mine: collections.Cunter cannot be built: module 'collections'"),
        ({"_target_": "fractions.Fraction", "x": 1}, "logger.mine: fractions.Fraction cannot be built: "),
        ({"_target_": "fractions.Fraction"}, "logger.mine: fractions.Fraction makes a Fraction: it must be a dict of"),
    ],
)
def test_what_cannot_be_built_is_one_line_that_says_what_to_install(entry, line):
    with pytest.raises(Refusal) as refusal:
        observers.build("logger", dict, {"mine": entry}, FACTS)
    assert str(refusal.value).startswith(line) and "\n" not in str(refusal.value)


class Broken:
    def act(self, work):
        return work()


def test_an_error_in_a_callback_is_known_by_its_name_and_one_elsewhere_is_not():
    mine, other = Broken(), Broken()

    def name_of(one):
        try:
            one.act(lambda: 1 / 0)
        except ZeroDivisionError as error:
            return observers.at_fault(error, {"callbacks.mine": mine})

    assert name_of(mine) == "callbacks.mine" and name_of(other) == ""


def test_an_extra_that_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "dvclive", None)
    with pytest.raises(Refusal, match=r"^logger.dvclive: .*dvclive.*; pip install -e '.\[loggers\]'"):
        observers.build("logger", object, compose(["logger=dvclive"])["logger"], FACTS)


def test_loggers_write_beside_a_run_by_hand_or_under_outputs_and_never_among_dvcs_outs(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    assert observers.log_folder(Place(root, out), "pretrain") == out / "logs"
    assert observers.log_folder(Place(root, root), "pretrain") == root / "outputs/pretrain/dvc"


@pytest.mark.parametrize(
    ("limit", "kept"),
    [(1.0, 50), (1, 16), (2, 32), (4, 50), (99, 50), (0.5, 32), (0.01, 16)],  # 4 batches of 8 for each of 2 ranks
)
def test_a_validation_takes_so_many_batches_of_each_rank_or_a_share_of_them(limit, kept):
    assert limited(50, 2, limit) == kept


def test_who_watches_is_recorded_by_class_and_read_before_lightning_is_imported(tmp_path):
    assert observer_targets({"b": {"_target_": "x.B"}, "a": {"_target_": "x.A", "n": 1}}) == "x.A, x.B"
    job = tmp_path / "job.json"
    watched, alone = '{"settings": {"logger": {"a": {}}}}', '{"settings": {"logger": {}}}'
    for text, found in ((watched, True), (alone, False), ("{", False)):
        job.write_text(text)
        assert is_observed(job) is found
