"""The pipeline at `scale: tiny` as a user runs it: real stages, real two-process DDP, in a clone of its own."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from benchmarks.checkout import DVC, checkout, environment, outs_of
from chaos.bench import Bench, run
from chaos.damage import damaged_settings, damaged_tokenizer
from chaos.kills import kill9_prepare
from stages import distill
from stages.data.shards import load_tokenizer
from stages.files.artifacts import Refusal
from stages.measure.subjects import MODELS
from stages.run import sweeps
from stages.run.entry import Place


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


def stages_run(output: str) -> list[str]:
    return re.findall("^Running stage '(.*)'", output, re.MULTILINE)


def test_a_second_repro_only_looks_whether_an_input_has_changed(tree):
    lock = (tree / "dvc.lock").read_bytes()
    assert stages_run(user_types(tree, *DVC, "repro").stdout) == ["config"]
    assert (tree / "dvc.lock").read_bytes() == lock
    assert user_types(tree, *DVC, "status").stdout.split() == ["config:", "always", "changed"]


def test_finished_work_whose_outs_dvc_has_saved_leaves_no_state(tree):
    assert not list((tree / ".runs/resume").iterdir())


def test_going_back_to_settings_that_were_run_before_trains_nothing(tree):
    sheet, before = tree / "params.yaml", outs_of(tree)
    text, page = sheet.read_text(), (tree / "report/index.html").read_bytes()
    costs = (tree / "artifacts/costs/distill.json").read_bytes()
    try:
        sheet.write_text(text.replace("temperature: 1.0     # T", "temperature: 2.0     # T"))
        assert stages_run(user_types(tree, *DVC, "repro", "distill").stdout) == ["config", "distill"]
        assert (tree / "artifacts/costs/distill.json").read_bytes() == costs, "its rivals need not be trained again"
    finally:
        sheet.write_text(text)
        again = user_types(tree, *DVC, "repro").stdout
    assert stages_run(again) == ["config"] and "Stage 'distill' is cached" in again
    assert outs_of(tree) == before and (tree / "report/index.html").read_bytes() == page


def test_after_a_cut_lock_file_finished_stages_come_back_from_the_cache(tree):
    lock = tree / "dvc.lock"
    whole = lock.read_text()
    stages = yaml.safe_load(whole)["stages"]
    try:
        lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": {"prepare": stages["prepare"]}}))
        again = user_types(tree, *DVC, "repro").stdout
        assert stages_run(again) == ["config", "report"], "only what git keeps, and not DVC's cache, is made again"
        assert yaml.safe_load(lock.read_text())["stages"] == stages
    finally:
        lock.write_text(whole)


def test_what_a_person_reads_comes_with_the_checkout(tree):
    page = tree / "report/index.html"
    before = page.read_bytes()
    page.unlink()
    user_types(tree, *DVC, "checkout")
    assert page.read_bytes() == before


def test_the_report_is_there_and_states_the_metrics(tree):
    page = (tree / "report" / "index.html").read_text()
    metrics = json.loads((tree / "artifacts" / "evaluation.json").read_text())
    for name, model in metrics["models"].items():
        assert f"{model['bits_per_byte']:.4f}" in page, name


@pytest.mark.parametrize("stage", sweeps.COLUMNS)
def test_the_columns_of_a_sweeps_table_are_metrics_of_the_stage(tree, stage):
    missing = set(sweeps.COLUMNS[stage]) - set(sweeps.numbers_of(tree / f"metrics/{stage}.json"))
    assert missing <= {"gap_closed"}, "which is left out where the gap is not real"


def test_every_model_folder_is_complete(tree):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(tree / "artifacts/data")
    for name in MODELS:
        folder = tree / "artifacts" / name
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs("def f(x):  # <|endoftext|>")["input_ids"] == ours.encode("def f(x):  # <|endoftext|>")
        assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == ours.end_of_text
        weights = json.loads((folder / "config.json").read_text())["weights_sha256"]
        assert weights in (folder / "README.md").read_text()
    student = json.loads((tree / "artifacts/student/config.json").read_text())["weights_sha256"]
    assert f"weights of `student` | `{student}`" in (tree / "artifacts/sparse_student/README.md").read_text()


def test_sparse_models_are_physically_smaller(tree):
    for name in ("teacher", "student"):
        sizes = [(tree / f"artifacts/{kind}{name}/model.safetensors").stat().st_size for kind in ("", "sparse_")]
        assert sizes[1] < 0.9 * sizes[0]


def test_a_model_from_nothing_costs_what_its_rival_cost_with_all_that_it_was_made_from(tree):
    metrics = json.loads((tree / "metrics/challenge.json").read_text())
    own, whole = metrics["training_flops"], metrics["whole_training_flops"]
    for name in ("student", "sparse_teacher", "sparse_student"):
        spent, steps = own[f"scratch_{name}"], metrics[f"scratch_{name}_steps"]
        assert spent <= whole[name] < spent + spent // steps, name
        smaller = (tree / f"artifacts/scratch_{name}/model.safetensors").stat().st_size
        assert smaller == pytest.approx((tree / f"artifacts/{name}/model.safetensors").stat().st_size, rel=0.01)


def test_a_hydra_sweep_runs_every_job_and_leaves_dvc_clean(tree):
    swept = ["distill.init=teacher,random", "distill.steps=4"]
    done = user_types(tree, sys.executable, "-m", "stages.distill", "-m", *swept)
    assert "distill.init=teacher" in done.stdout and "distill.init=random" in done.stdout
    jobs = sorted((tree / "multirun" / "distill").glob("*/*/metrics/distill.json"))
    assert len(jobs) == 2
    assert jobs[0].read_bytes() != jobs[1].read_bytes()

    def weights(job: Path, name: str) -> bytes:
        return (job.parent.parent / f"artifacts/{name}/model.safetensors").read_bytes()

    names = ("student", "control", "warm_control", "cold_student")
    warm, cold = ([weights(job, name) for name in names] for job in jobs)
    assert len(set(warm)) == 4, "four cells, four models"
    assert cold == [warm[3], warm[1], warm[2], warm[3]], "the student is the cold one, the others stay what they are"
    assert user_types(tree, *DVC, "status").stdout.split() == ["config:", "always", "changed"]


def test_the_largest_seed_that_is_accepted_runs_in_every_stage(tree):
    shorter = {"pretrain": "pretrain.steps=2", "distill": "distill.steps=2", "sparsify": "sparsify.recovery.steps=2"}
    shorter |= {"challenge": "challenge.batch_sequences=64", "evaluate": "evaluate.test_tokens=1000"}
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


def test_timings_taken_again_reach_the_page(tree):
    page, before = tree / "report/index.html", outs_of(tree)
    shown = page.read_bytes()
    user_types(tree, *DVC, "repro", "--force", "--single-item", "profile")
    assert stages_run(user_types(tree, *DVC, "repro").stdout) == ["config", "plan", "report"]
    assert page.read_bytes() != shown and outs_of(tree) == before


def test_a_refused_repro_leaves_the_settings_as_they_were(tree):
    sheet = tree / "params.yaml"
    kept = {name: (tree / name).read_bytes() for name in ("params.yaml", "resolved.yaml", "inputs.json", "dvc.lock")}
    try:
        sheet.write_text(sheet.read_text().replace("temperature: 1.0     # T", "temperature: -1.0    # T"))
        done = user_types(tree, *DVC, "repro", check=False)
        assert done.returncode != 0 and "distill.temperature = -1.0: must be above 0" in done.stderr
    finally:
        sheet.write_bytes(kept["params.yaml"])
    assert kept == {name: (tree / name).read_bytes() for name in kept}


def test_a_typo_is_refused_in_one_line_before_any_work(tree):
    done = user_types(tree, sys.executable, "-m", "stages.distill", "distill.temprature=2", check=False)
    assert done.returncode != 0
    assert "temprature" in done.stderr and "Traceback" not in done.stderr


def await_file(tree: Path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(tree.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_training_interrupted_and_resumed_gives_the_bytes_of_an_uninterrupted_run(tree):
    """SIGTERM in the middle of pretrain, then the same command again."""
    whole = (tree / "artifacts/teacher/model.safetensors").read_bytes()
    under_dvc = environment(PYTHONPATH=str(tree), DVC_STAGE="pretrain")
    command = [sys.executable, "-m", "stages.pretrain"]
    process = subprocess.Popen(command, cwd=tree, env=under_dvc, stderr=subprocess.PIPE, text=True)
    await_file(tree, ".runs/resume/pretrain-*/steps.jsonl", process)  # the first steps are done
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 1 and "Traceback" not in said
    assert "interrupted after step" in said and "the same command continues from there" in said
    assert list((tree / ".runs/resume").glob("pretrain-*/teacher.json"))
    subprocess.run(command, cwd=tree, env=under_dvc, check=True, capture_output=True)
    assert (tree / "artifacts/teacher/model.safetensors").read_bytes() == whole

    # DVC could not save the outs, and removes them before the stage runs again
    shutil.rmtree(tree / "artifacts/teacher")
    again = subprocess.run(command, cwd=tree, env=under_dvc, check=True, capture_output=True, text=True)
    assert "teacher: continues after step 20 of 20" in again.stdout
    assert (tree / "artifacts/teacher/model.safetensors").read_bytes() == whole
    shutil.rmtree(tree / ".runs/resume")  # finished, but DVC never saved it: the tests that follow begin anew


WATCHERS = """
import json, time
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

class Slow(Callback):
    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        time.sleep(self.seconds)
        module.log("slept", self.seconds)
        assert trainer.callback_metrics["loss"] > 0

class Lines(Logger):
    name, version = "lines", 0

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    def log_hyperparams(self, params):
        pass

    @rank_zero_only
    def log_metrics(self, metrics, step):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | metrics) + "\\n")
"""
PRESETS = {
    "callbacks/slow.yaml": "slow: {_target_: watchers.Slow, seconds: 0.125}",
    "logger/lines.yaml": "lines: {_target_: watchers.Lines, path: '${run:folder}/${run:fit}.jsonl'}",
}


def test_a_callback_and_a_logger_of_ones_own_watch_a_run_that_a_time_limit_cuts_in_two_and_change_no_byte(tree):
    """Each is one YAML file beside a class."""
    added = {tree / "watchers.py": WATCHERS} | {tree / "conf" / name: text for name, text in PRESETS.items()}
    words = ["logger=[csv,lines]", "callbacks=[learning_rate,slow]", "trainer.log_every_steps=10"]
    command = [sys.executable, "-m", "stages.pretrain", *words, "hydra.run.dir=outputs/watched"]
    for path, text in added.items():
        path.write_text(text)
    try:
        cut = user_types(tree, *command, "trainer.max_time=00:00:00:01", check=False)
        stop = "teacher: stopped by trainer.max_time (00:00:00:01) after step "
        assert cut.returncode == 1 and stop in cut.stderr and "the same command continues from there" in cut.stderr
        assert "Traceback" not in cut.stderr and not list((tree / "outputs/watched").rglob("*.safetensors"))
        done = user_types(tree, *command)
    finally:
        for path in added:
            path.unlink()
    first = int(re.search(r"continues after step (\d+) of 20", done.stdout)[1])
    logs = tree / "outputs/watched/logs"
    rows = [json.loads(line) for line in (logs / "teacher.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert first < 20 and steps == [10, 20] and rows[-1]["slept"] == 0.125, "every row once: rank zero wrote it"
    assert rows[-1]["validation_bits_per_byte"] > 0 and any("lr-MuonAdamW/pg1" in row for row in rows)
    assert list(logs.rglob("metrics.csv"))
    wanted, found = (folder / "artifacts/teacher/model.safetensors" for folder in (tree, tree / "outputs/watched"))
    assert found.read_bytes() == wanted.read_bytes()


def test_a_trial_goes_through_every_fit_and_leaves_nothing_that_could_be_taken_for_a_model(tree):
    recorded = len(list((tree / ".runs/tracking").iterdir()))
    words = ["trainer.fast_dev_run=1", "hydra.run.dir=outputs/trial", "logger=csv"]
    done = user_types(tree, sys.executable, "-m", "stages.distill", *words)
    cells = "cold_student, control, student, warm_control"
    said = f"offramp: distill: trainer.fast_dev_run: {cells} went through; no model was kept"
    assert done.stderr.splitlines() == [said] and "student: step 1/1" in done.stdout
    left = {path.name for path in (tree / "outputs/trial").rglob("*") if path.is_file()}
    assert left == {"resolved.yaml", "config.yaml", "hydra.yaml", "overrides.yaml"}
    assert len(list((tree / ".runs/tracking").iterdir())) == recorded
    assert not list((tree / ".runs/resume").glob("distill-*"))


def test_two_runs_of_the_same_work_never_share_their_state(tree):
    """The second waits; when the first is stopped it continues from its checkpoint."""
    words = ["pretrain.steps=3000", "trainer.log_every_steps=1"]
    theirs = environment(PYTHONPATH=str(tree))
    start = partial(subprocess.Popen, cwd=tree, env=theirs, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-m", "stages.pretrain", *words]
    with start([*command, f"hydra.run.dir={tree}/outputs/first"]) as first:
        await_file(tree, ".runs/resume/pretrain-*/steps.jsonl", first)
        with start([*command, f"hydra.run.dir={tree}/outputs/second"], stdout=subprocess.PIPE) as second:
            assert "pretrain: another process is still running; waiting" in second.stderr.readline()
            first.send_signal(signal.SIGTERM)
            assert "interrupted after step" in first.communicate()[1]
            assert any("continues after step" in line for line in second.stdout)
            second.send_signal(signal.SIGTERM)
            assert second.wait(60) == 1
    shutil.rmtree(tree / ".runs/resume")


def test_two_ddp_ranks_equal_one_process_on_the_same_global_batch(tree):
    from safetensors.torch import load_file

    weights, losses = [], []
    for ranks in (1, 2):
        out = tree / "outputs" / f"ranks-{ranks}"
        words = [f"trainer.ranks={ranks}", "trainer.precision=32-true", "pretrain.steps=5", f"hydra.run.dir={out}"]
        user_types(tree, sys.executable, "-m", "stages.pretrain", *words)
        weights.append(load_file(out / "artifacts/teacher/model.safetensors"))
        losses.append(float((out / "plots/pretrain/teacher.csv").read_text().splitlines()[-1].split(",")[1]))
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
    outs = outs_of(tree)
    assert {"artifacts/data", "artifacts/sparse_student", "artifacts/scores", "provenance.json"} <= set(outs)
    theirs = outs_of(other)
    assert [path for path in outs if theirs[path] != outs[path]] == []


# The short form of the fault test: the cheap cases of chaos/, once each. Left to `make chaos`, because each
# trains again and again or needs a server or root: kills of the whole pipeline, of a rank and by signals, full and
# read-only disks, damaged models, metrics and checkpoints, failing MLflow servers.


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tree) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"), finished=tree)


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (kill9_prepare, {"kills": 1}),
        (damaged_tokenizer, {}),
        (damaged_settings, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_is_lost_or_silently_wrong(bench, case, how):
    row = run(bench, case, **how)
    assert not row.failure, row.failure
    assert row.tried == row.survived > 0 and row.compared > 0 and row.message
