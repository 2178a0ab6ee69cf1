"""The pipeline at `scale: tiny` as a user runs it: real stages, real two-process DDP, in a clone of its own."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks.checkout import DVC, checkout, environment
from stages import distill
from stages.artifacts import Refusal, sha256_of
from stages.runs import Place
from tests import faults


def user_types(tree: Path, *command: str, check: bool = True, umask: int = -1, **variables: str):
    theirs = environment(PYTHONPATH=str(tree), DVC_SITE_CACHE_DIR=str(tree / ".dvc" / "site")) | variables
    done = subprocess.run(command, cwd=tree, env=theirs, umask=umask, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A clone after its first `dvc repro`. Whoever changes it puts it back."""
    clone = checkout(tmp_path_factory.mktemp("clone"), "tiny")
    user_types(clone, *DVC, "repro")
    return clone


def test_a_second_repro_does_nothing(tree):
    lock = (tree / "dvc.lock").read_bytes()
    output = user_types(tree, *DVC, "repro").stdout
    assert "Running stage" not in output and "up to date" in output
    assert (tree / "dvc.lock").read_bytes() == lock


def test_the_report_is_there_and_states_the_metrics(tree):
    page = (tree / "report" / "index.html").read_text()
    metrics = json.loads((tree / "metrics" / "evaluate.json").read_text())
    for name, model in metrics["models"].items():
        assert f"{model['bits_per_byte']:.4f}" in page, name


def test_sparse_models_are_physically_smaller(tree):
    for name in ("teacher", "student"):
        sizes = [(tree / f"artifacts/{kind}{name}/model.safetensors").stat().st_size for kind in ("", "sparse_")]
        assert sizes[1] < 0.9 * sizes[0]


def test_a_hydra_sweep_runs_every_job_and_leaves_dvc_clean(tree):
    done = user_types(tree, sys.executable, "-m", "stages.distill", "-m", "distill.temperature=1,2", "distill.steps=4")
    assert "distill.temperature=1" in done.stdout and "distill.temperature=2" in done.stdout
    jobs = sorted((tree / "multirun" / "distill").glob("*/*/metrics/distill.json"))
    assert len(jobs) == 2
    assert jobs[0].read_bytes() != jobs[1].read_bytes()
    assert "up to date" in user_types(tree, *DVC, "status").stdout


def test_the_largest_seed_that_is_accepted_runs_in_every_stage(tree):
    shorter = {"pretrain": "pretrain.steps=2", "distill": "distill.steps=2", "sparsify": "sparsify.recovery.steps=2"}
    shorter["evaluate"] = "evaluate.test_tokens=1000"
    for stage, words in shorter.items():
        command = [sys.executable, "-m", f"stages.{stage}", f"seed={2**32 - 1}", words]
        assert f"{stage} wrote outputs/" in user_types(tree, *command).stderr


def test_an_edit_reruns_exactly_the_stages_that_read_it(tree):
    sheet = tree / "params.yaml"
    before = sheet.read_text()
    sheet.write_text(before.replace("temperature: 1.0     # T", "temperature: 3.0     # T"))
    try:
        planned = user_types(tree, *DVC, "repro", "--dry").stdout
        assert "Running stage 'config'" in planned
        user_types(tree, *DVC, "repro", "config")
        stale = user_types(tree, *DVC, "status").stdout
        assert "distill:" in stale and "pretrain:" not in stale and "prepare:" not in stale
    finally:
        sheet.write_text(before)
        user_types(tree, *DVC, "repro", "config")


def test_timings_taken_again_reach_the_page_though_no_input_of_the_report_changed(tree):
    claims, page = tree / "report/claims.json", tree / "report/index.html"
    before, lock = claims.read_bytes(), (tree / "dvc.lock").read_bytes()
    page.unlink()  # as in a new clone
    user_types(tree, *DVC, "repro", "--force", "--single-item", "evaluate")
    assert "report:" in user_types(tree, *DVC, "status").stdout
    done = user_types(tree, *DVC, "repro").stdout
    assert [line for line in done.splitlines() if line.startswith("Running stage")] == ["Running stage 'report':"]
    assert page.exists() and claims.read_bytes() == before and (tree / "dvc.lock").read_bytes() == lock


def test_a_typo_is_refused_in_one_line_before_any_work(tree):
    done = user_types(tree, sys.executable, "-m", "stages.distill", "distill.temprature=2", check=False)
    assert done.returncode != 0
    assert "temprature" in done.stderr and "Traceback" not in done.stderr


def test_training_interrupted_and_resumed_gives_the_bytes_of_an_uninterrupted_run(tree):
    """SIGTERM in the middle of pretrain, then the same command again."""
    whole = (tree / "artifacts/teacher/model.safetensors").read_bytes()
    under_dvc = environment(PYTHONPATH=str(tree), DVC_STAGE="pretrain")
    command = [sys.executable, "-m", "stages.pretrain"]
    process = subprocess.Popen(command, cwd=tree, env=under_dvc, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tree / ".runs/resume").glob("pretrain-*/steps.jsonl")):  # the first steps are done
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 1 and "Traceback" not in said
    assert "interrupted after step" in said and "the same command continues from there" in said
    assert list((tree / ".runs/resume").glob("pretrain-*/teacher.json"))
    subprocess.run(command, cwd=tree, env=under_dvc, check=True, capture_output=True)
    assert (tree / "artifacts/teacher/model.safetensors").read_bytes() == whole


def test_two_ddp_ranks_equal_one_process_on_the_same_global_batch(tree):
    from safetensors.torch import load_file

    weights, losses = [], []
    for ranks in (1, 2):
        out = tree / "outputs" / f"ranks-{ranks}"
        words = [f"trainer.ranks={ranks}", "trainer.precision=float32", "pretrain.steps=5", f"hydra.run.dir={out}"]
        user_types(tree, sys.executable, "-m", "stages.pretrain", *words)
        weights.append(load_file(out / "artifacts/teacher/model.safetensors"))
        losses.append(float((out / "plots/pretrain.csv").read_text().splitlines()[-1].split(",")[2]))
    one, two = weights
    assert losses[0] == pytest.approx(losses[1], abs=5e-4)
    assert one.keys() == two.keys()
    for name in one:
        # Another order of summing moves the last bit of a gradient, and Muon rounds its updates to bfloat16: the
        # five updates agree to some percent of a matrix that is not much larger than its updates yet.
        assert (one[name] - two[name]).norm() < 0.1 * one[name].norm(), name


def test_a_loss_that_is_not_finite_is_refused_and_no_model_is_written(tree):
    out = tree / "outputs" / "broken"
    words = ["optimizer.adamw_learning_rate=1e9", "pretrain.steps=10", f"hydra.run.dir={out}"]
    done = user_types(tree, sys.executable, "-m", "stages.pretrain", *words, check=False)
    assert done.returncode != 0
    assert "not finite at step" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "artifacts/teacher/model.safetensors").exists()


def test_a_teacher_of_another_tokenizer_is_refused(tree, tiny_settings, tmp_path):
    for name in ("artifacts/data", "artifacts/teacher"):
        shutil.copytree(tree / name, tmp_path / name)
    config = tmp_path / "artifacts/teacher/config.json"
    told = json.loads(config.read_text()) | {"tokenizer_sha256": "0" * 64}
    config.chmod(0o644)
    config.write_text(json.dumps(told).replace("config_sha256", "was"))
    with pytest.raises(Refusal, match="another tokenizer"):
        next(distill.fits(tiny_settings, Place(tmp_path, tmp_path), keep=None))


OTHER_HABITS = {"PYTHONHASHSEED": "7", "TZ": "Pacific/Kiritimati", "LC_ALL": "C", "LANG": "C", "umask": 0o077}
OTHER_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "3")


def test_another_folder_and_another_persons_environment_give_identical_bytes(tree, tmp_path):
    """The whole pipeline elsewhere: hash seed, time zone, locale, umask, a path of another depth, numbers of threads.

    DDP is on, and DVC hashes every out. A stage takes its own number of threads, for bytes depend on it.
    """
    other = checkout(tmp_path / "a folder" / "größer" / "deep", "tiny")
    user_types(other, *DVC, "repro", **OTHER_HABITS, **OTHER_THREADS)
    assert (other / "dvc.lock").read_bytes() == (tree / "dvc.lock").read_bytes()
    stages = yaml.safe_load((tree / "dvc.lock").read_text())["stages"]
    outs = [out["path"] for stage in stages.values() for out in stage["outs"]]
    assert {"artifacts/data", "artifacts/sparse_student", "artifacts/scores", "report/claims.json"} <= set(outs)
    assert [path for path in outs if sha256_of(other / path) != sha256_of(tree / path)] == []


# The short form of the fault test: the cheap cases of tests/faults.py, once each. Left to `make chaos`, because each
# trains again and again or needs a server or root: kills of the whole pipeline, of a rank and by signals, full and
# read-only disks, damaged models, metrics and checkpoints, failing MLflow servers.


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tree) -> faults.Bench:
    return faults.Bench(tmp_path_factory.mktemp("faults"), finished=tree)


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (faults.kill9_prepare, {"kills": 1}),
        (faults.damaged_tokenizer, {}),
        (faults.damaged_settings, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_is_lost_or_silently_wrong(bench, case, how):
    row = faults.run(bench, case, **how)
    assert not row.failure, row.failure
    assert row.tried == row.survived > 0 and row.compared > 0 and row.message
