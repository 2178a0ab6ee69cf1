"""How a stage is entered: the commands a person types, on a toy stage in a copy of the repository."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from stages.files.artifacts import ROOT, Refusal, read_json, write_json
from stages.run import commandline, sweeps
from stages.settings.compose import compose

TOY = """
import os, sys, time
from stages.files.artifacts import Refusal, write_json
from stages.run.entry import run_stage

def main(settings, place, run):
    assert settings.teacher is None
    if settings.seed == 13:
        raise Refusal("seed 13 is unlucky")
    if settings.seed == 5:
        sys.stderr.write("at work\\n")
    if settings.seed == 66:
        os._exit(3)
    if settings.seed == 99:
        write_json(place.root / "pid.json", os.getpid())
        time.sleep(60)
    run.metrics({"seed": 1.0})
    t = settings.distill.temperature
    write_json(place.write("metrics/distill.json"),
               {"validation_bits_per_byte": abs(t - 2) + 1, "tokens": 3, "curve": [1]})
    return {"conditions": {"ranks": int(os.environ.get("TOY_RANKS", 2))}}

if __name__ == "__main__":
    run_stage(main, "distill", ("distill", "seed"))
"""
TRACKING = """
import contextlib

class Run:
    def metrics(self, values, step=None):
        pass

@contextlib.contextmanager
def start_run(stage, settings, out, root, sweep):
    assert set(settings) == {"distill", "seed"}
    yield Run()
"""
LAUNCHERS = """
import os
from hydra._internal.core_plugins.basic_launcher import BasicLauncher

class Processes(BasicLauncher):
    '''Runs each job in a process of its own, as joblib and submitit do.'''

    def launch(self, job_overrides, initial_job_idx):
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            child = os.fork()
            if not child:
                try:
                    super().launch([overrides], number)
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
        return []

class Nothing(BasicLauncher):
    def launch(self, job_overrides, initial_job_idx):
        return []

class Broken(BasicLauncher):
    def launch(self, job_overrides, initial_job_idx):
        super().launch(job_overrides[:1], initial_job_idx)
        raise RuntimeError("the queue is closed\\nsee its manual")
"""


@pytest.fixture
def repository(tmp_path):
    """The real entry and settings around a toy stage, without MLflow."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "stages/distill.py").write_text(TOY)
    (tmp_path / "stages/tracking/record.py").write_text(TRACKING)
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins/elsewhere.py").write_text(LAUNCHERS)
    return tmp_path


def typed(repository, *words, stage="distill", dvc=False):
    environment = os.environ | ({"DVC_STAGE": stage} if dvc else {})
    command = [sys.executable, "-m", f"stages.{stage}", *words]
    return subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=60
    )


def jobs_in(folder):
    return sorted(path.parent for path in folder.rglob("resolved.yaml"))


def test_a_run_by_hand_writes_into_its_own_folder_with_its_settings(repository):
    done = typed(repository, "distill.temperature=3")
    assert done.returncode == 0, done.stderr
    (job,) = jobs_in(repository / "outputs/distill")
    assert read_json(job / "metrics/distill.json")["validation_bits_per_byte"] == 2
    assert yaml.safe_load((job / "resolved.yaml").read_text())["distill"]["temperature"] == 3
    assert not (repository / "metrics").exists() and not (repository / "resolved.yaml").exists()
    assert done.stderr.splitlines() == [f"offramp: distill wrote {job.relative_to(repository)}"]


@pytest.mark.parametrize("words", [("-m", "distill.temperature=1,2,4"), ("distill.temperature=1,2,4", "-m")])
def test_a_sweep_prints_a_table_and_the_best_job(repository, words):
    done = typed(repository, *words)
    assert done.returncode == 0, done.stderr
    assert len(jobs_in(repository / "multirun/distill")) == 3
    lines = done.stdout.strip().splitlines()
    assert lines[0].split() == ["job", "overrides", "validation_bits_per_byte", "tokens"]
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["0", "distill.temperature=1", "2"],
        ["1", "distill.temperature=2", "1"],
        ["2", "distill.temperature=4", "3"],
    ]
    assert lines[4] == "best: job 1 (distill.temperature=2), validation_bits_per_byte 1"
    assert (repository / lines[5].removeprefix("      in ") / "resolved.yaml").exists()
    assert lines[6] == "      to keep it in params.yaml: dvc exp run -S distill.temperature=2"


ELSEWHERE = "hydra.launcher._target_=hydra_plugins.elsewhere."


@pytest.mark.parametrize("plugin", [None, "joblib", "submitit"])
def test_a_sweep_whose_jobs_run_in_other_processes_shows_its_outcome_too(repository, plugin):
    launcher = f"{ELSEWHERE}Processes"
    if plugin:
        pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
        launcher = {"joblib": "hydra/launcher=joblib", "submitit": "hydra/launcher=submitit_local"}[plugin]
    well = typed(repository, "-m", launcher, "distill.temperature=1,2")
    assert well.returncode == 0 and "best: job 1 (distill.temperature=2)" in well.stdout, well.stderr
    mixed = typed(repository, "-m", launcher, "distill.temperature=1,-2", "seed=1,13")
    rows = mixed.stdout.strip().splitlines()[1:5]
    assert mixed.returncode == 1 and [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    assert "seed 13 is unlucky" in rows[1] and "must be above 0" in rows[2]
    assert mixed.stderr.splitlines()[-1] == "offramp: 3 of 4 jobs failed, first job 1: seed 13 is unlucky"
    none = typed(repository, "-m", launcher, "distill.temperature=-1,-2")
    assert none.returncode == 1 and "2 of 2 jobs failed" in none.stderr and "best" not in none.stdout


def test_a_job_whose_process_ends_early_is_a_failed_job_also_in_a_folder_that_was_used_before(repository):
    words = ("-m", f"{ELSEWHERE}Processes", "hydra.sweep.dir=multirun/mine")
    assert typed(repository, *words, "seed=1,2,3").returncode == 0
    done = typed(repository, *words, "seed=66,2")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "offramp: 1 of 2 jobs failed, first job 0: no outcome: its process ended early"
    )
    (repository / "multirun/mine/1/outcome.json").unlink()  # as where it ended before the stage began
    (lost,) = sweeps.read_outcomes(repository / "multirun/mine", "another", ".hydra")
    assert (lost.number, lost.overrides) == ("1", ["seed=2"]) and lost.failure.startswith("no outcome")


@pytest.mark.parametrize(
    ("launcher", "line"),
    [("Nothing", "the sweep ran no job"), ("Broken", "the sweep ended early: RuntimeError: the queue is closed")],
)
def test_a_launcher_that_does_not_do_its_work_is_one_line(repository, launcher, line):
    done = typed(repository, "-m", ELSEWHERE + launcher, "seed=1,2")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"offramp: {line}")
    assert "Traceback" not in done.stderr and ("seed=1" in done.stdout) == (launcher == "Broken")


def test_equal_jobs_have_no_best_one(repository):
    assert "best: none, all have the same validation_bits_per_byte" in typed(repository, "-m", "seed=1,2").stdout


def test_a_stage_has_a_score_only_where_it_makes_models():
    metrics = {"sparse_student_validation_bits_per_byte": 1.0, "sparse_teacher_validation_bits_per_byte": 3.0}
    job = sweeps.Outcome("0", [], ROOT, metrics)
    assert job.score("sparsify") == 2.0 and job.score("prepare") is None
    job.failure = "x"
    assert job.score("sparsify") == float("inf")


BEST_JOBS = [
    ["distill.temperature=4", "seed=7"],
    ["scale=tiny"],
    ["scale=demo"],
    ["pretrain.steps=50", "+trainer.gradient_clip_val=2"],
    ["corpus=files", "corpus.paths=['my texts/*.txt','a [1].txt']"],
    ["corpus.max_bytes=1000", "scale=tiny"],
    ["experiment=short", "seed=4"],
]


@pytest.mark.parametrize("entry", ["stdlib", "{source: files, paths: [b.txt], split: validation}"])
@pytest.mark.parametrize("overrides", BEST_JOBS, ids=range(len(BEST_JOBS)))
def test_the_command_that_keeps_the_best_job_gives_its_settings(repository, overrides, entry):
    from dvc.utils.hydra import apply_overrides

    sheet = repository / "params.yaml"
    sheet.write_text(sheet.read_text().replace("corpus: stdlib", f"corpus: {entry}"))
    words = [word.replace("+", "++") for word in overrides]
    of_the_job = compose(words, root=repository)
    apply_overrides(sheet, sweeps.sheet_words(words, repository))
    assert compose(root=repository) == of_the_job


@pytest.mark.parametrize(
    ("stage", "words", "line"),
    [
        ("distill", ["-m", "teacher.experts=4,8"], "teacher.experts: distill does not read it; pretrain does (distill"),
        ("distill", ["corpus=files"], "corpus: distill does not read it; prepare does (distill takes artifacts/data"),
        ("distill", ["-m", "corpus=glob(*)"], "corpus: distill does not read it; prepare does"),
        ("distill", ["prepare.vocab_size=300"], "prepare.vocab_size: distill does not read it; prepare does"),
        ("distill", ["+evaluate.seed=3"], "evaluate.seed: distill does not read it; evaluate and profile do"),
        ("distill", ["hydra/launcher=basic"], "hydra/launcher: only a sweep reads it; add --multirun"),
        ("distill", ["-m", "hydra.run.dir=outputs/a"], "hydra.run.dir: a sweep does not read it; set hydra.sweep.dir"),
        ("distill", ["sede=3"], "sede: no such setting; did you mean seed?"),
    ],
)
def test_a_setting_that_the_stage_does_not_read_is_refused_and_the_reader_named(repository, stage, words, line):
    done = typed(repository, *words, stage=stage)
    assert done.returncode == 1 and done.stderr.startswith(f"offramp: {line}"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (repository / "multirun").exists()


def test_the_words_of_a_sweepers_own_configuration_are_asked_for_their_effect_too(repository):
    config = repository / "conf/config.yaml"
    config.write_text(config.read_text() + "  sweeper: {params: {teacher.experts: '4,8'}}\n")
    done = typed(repository, "-m")
    assert done.returncode == 1 and "teacher.experts: distill does not read it" in done.stderr


def test_a_preset_is_refused_only_where_the_stage_reads_nothing_of_it():
    parser = OverridesParser.create()
    words = parser.parse_overrides(["scale=tiny", "seed=2"])
    commandline.refuse_without_effect(words, "evaluate", ("evaluate", "seed"))
    with pytest.raises(Refusal, match="^scale: report does not read it; prepare, .* evaluate and profile do"):
        commandline.refuse_without_effect(parser.parse_overrides(["scale=tiny"]), "report", ("seed",))
    for word in ("logger=[csv,dvclive]", "callbacks=throughput", "logger.csv.name=mine"):
        with pytest.raises(Refusal, match=": evaluate does not read it; pretrain, distill, sparsify"):
            commandline.refuse_without_effect(parser.parse_overrides([word]), "evaluate", ("evaluate", "seed"))


def test_only_the_batches_of_the_stage_that_runs_must_be_shared_out_among_the_ranks(repository):
    sheet = repository / "params.yaml"
    sheet.write_text(sheet.read_text() + "pretrain: {batch_sequences: 7}\ntrainer: {ranks: 2}\n")
    stage, tracking = repository / "stages/distill.py", repository / "stages/tracking/record.py"
    stage.write_text(stage.read_text().replace('("distill", "seed")', '("distill", "seed", "trainer")'))
    read = '{"distill", "seed", "trainer", "callbacks", "logger", "engine"}'
    tracking.write_text(tracking.read_text().replace('{"distill", "seed"}', read))
    assert typed(repository).returncode == 0
    refused = typed(repository, "distill.batch_sequences=9")
    assert refused.stderr == (
        "offramp: distill.batch_sequences = 9: must be a multiple of trainer.ranks (2): set it to 10,"
        " or change the ranks\n"
    )


def test_a_run_in_its_own_folder_names_it_from_where_it_was_started(repository):
    done = typed(repository, "hydra.job.chdir=true", "hydra.run.dir=outputs/mine")
    assert done.stderr == "offramp: distill wrote outputs/mine\n"


def test_a_corpus_of_ones_own_is_one_word_on_the_command_line(repository):
    """A mapping chooses the preset that `source` names and lays the other keys on top."""
    (repository / "stages/prepare.py").write_text(
        "from stages.files.artifacts import write_json\nfrom stages.run.entry import run_stage\n"
        "def main(settings, place, run):\n"
        "    write_json(place.write('metrics/prepare.json'), {'train': {'tokens': 4, 'bytes_per_token': 2.0}})\n"
        "if __name__ == '__main__': run_stage(main, 'prepare', ('corpus', 'prepare', 'sequence_tokens'))\n"
    )
    tracking = repository / "stages/tracking/record.py"
    tracking.write_text(tracking.read_text().replace('{"distill", "seed"}', '{"corpus", "prepare", "sequence_tokens"}'))
    words = ("-m", "corpus={source:files,paths:[texts/*.txt]}", "prepare.val_share=0.1,0.2")
    done = typed(repository, *words, stage="prepare")
    assert done.returncode == 0, done.stderr
    for job in jobs_in(repository / "multirun"):
        assert yaml.safe_load((job / "resolved.yaml").read_text())["corpus"]["paths"] == ["texts/*.txt"]
    assert "train.tokens  train.bytes_per_token" in done.stdout and "best" not in done.stdout


@pytest.mark.parametrize(
    ("variable", "line"),
    [
        (None, "seed: the environment variable SEED is not set: set it, or write a value"),
        ("five", "seed = 'five': must be a whole number"),
        ("13", "seed 13 is unlucky"),
    ],
)
def test_a_value_from_the_environment_is_a_number_where_it_reads_as_one(repository, monkeypatch, variable, line):
    monkeypatch.delenv("SEED", raising=False)
    if variable:
        monkeypatch.setenv("SEED", variable)
    assert typed(repository, "seed=${oc.env:SEED}").stderr == f"offramp: {line}\n"


def test_closed_standard_streams_cost_nothing(repository):
    command = f"{sys.executable} -m stages.distill seed=5 hydra.run.dir=outputs/mine 0<&- 1>&- 2>&-"
    assert subprocess.run(command, shell=True, cwd=repository, timeout=60).returncode == 0
    assert (repository / "outputs/mine/metrics/distill.json").exists()


@pytest.mark.parametrize(
    ("word", "lengths"), [("scale=tiny,demo", [64, 256]), ("scale=glob(*,exclude=[gpu,node,smollm])", [256, 64])]
)
def test_a_sweep_over_presets_is_composed_for_each_job(repository, word, lengths):
    assert typed(repository, "-m", word).returncode == 0
    steps = [
        yaml.safe_load((job / "resolved.yaml").read_text())["sequence_tokens"]
        for job in jobs_in(repository / "multirun")
    ]
    assert steps == lengths


def test_a_sweep_over_experiments_compares_them(repository):
    assert typed(repository, "-m", "experiment=none,short").returncode == 0
    jobs = jobs_in(repository / "multirun")
    assert [yaml.safe_load((job / "resolved.yaml").read_text())["distill"]["steps"] for job in jobs] == [150, 20]


def test_a_refusing_job_leaves_the_others_running_and_the_sweep_fails(repository):
    done = typed(repository, "-m", "seed=1,13,2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "seed 13 is unlucky" in done.stdout and len(list(repository.rglob("metrics/distill.json"))) == 2
    assert done.stderr.splitlines()[-1] == "offramp: 1 of 3 jobs failed, first job 1: seed 13 is unlucky"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["seed=13"], "offramp: seed 13 is unlucky"),
        (["distill.soft_weight=9"], "offramp: distill.soft_weight = 9: must be at most 1"),
        (["distill.temprature=2"], "offramp: distill.temprature: no such setting; did you mean"),
        (["scale=dmeo"], "offramp: scale = dmeo: must be one of"),
        (["-m", "scale=tiny,dmeo"], "offramp: scale = dmeo: must be one of"),
        (["seed=="], "offramp: "),
        (["distill.temperature=1,2"], "offramp: Ambiguous value for argument 'distill.temperature=1,2': 1. To use"),
        (["distill.temperature=a#b"], "offramp: 'distill.temperature=a#b': Hydra cannot read this: put double quotes"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(repository, words, line):
    done = typed(repository, *words)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(line)


TAKEN = [
    ["hydra.run.dir=artifacts/mine"],
    ["hydra.run.dir=metrics"],
    ["hydra.run.dir={repository}/plots/mine"],
    ["hydra.run.dir=stages/mine"],
    ["hydra.run.dir=conf"],
    ["hydra.run.dir=outputs/../artifacts/data"],
    ["hydra.run.dir=${{oc.env:ARTIFACTS}}"],
    ["hydra.run.dir=outputs/link/mine"],
    ["hydra.run.dir=outputs/a", "hydra.output_subdir=../../artifacts"],
    ["+hydra.job_logging.handlers={{file: {{class: logging.FileHandler, filename: {repository}/conf/log}}}}"],
    ["-m", "hydra.sweep.dir={repository}/artifacts"],
    ["-m", "hydra.sweep.subdir=../../../artifacts/mine", "seed=1,2"],
    ["-m", "hydra.sweep.subdir={repository}/stages/${{hydra.job.num}}", "seed=1,2"],
    ["-m", "hydra.sweep.subdir=${{distill.init}}", "distill.init=random,../../../metrics"],
    ["-m", "hydra.sweep.subdir=${{hydra.job.override_dirname}}", "distill.init=a/../../../../metrics"],
    ["hydra.run.dir=notes/mine"],
]


@pytest.mark.parametrize("words", TAKEN, ids=range(len(TAKEN)))
def test_a_run_that_would_write_among_the_outs_or_the_sources_is_refused_before_a_folder_is_made(
    repository, monkeypatch, words
):
    monkeypatch.setenv("ARTIFACTS", str(repository / "artifacts"))
    (repository / "outputs").mkdir()
    (repository / "artifacts").mkdir()
    (repository / "outputs/link").symlink_to(repository / "artifacts")
    write_json(repository / "notes/own.json", {})
    for git in (["init", "-q"], ["add", "notes"]):  # what git tracks is taken, too
        subprocess.run(["git", *git], cwd=repository, check=True)

    def files():
        return sorted(path for path in repository.parent.rglob("*") if "__pycache__" not in path.parts)

    before = files()
    done = typed(repository, *[word.format(repository=repository) for word in words])
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "holds DVC's outs or the project's own files; name a folder such as outputs/mine" in line
    assert files() == before


@pytest.mark.parametrize("word", ["hydra.run.dir=../elsewhere", "hydra.run.dir={disk}/mine", "hydra.run.dir=.."])
def test_a_run_may_write_outside_the_project(repository, tmp_path_factory, word):
    disk = tmp_path_factory.mktemp("disk")
    done = typed(repository, word.format(disk=disk))
    folder = Path(os.path.join(repository, word.format(disk=disk).removeprefix("hydra.run.dir=")))
    assert done.returncode == 0 and (folder / "metrics/distill.json").exists(), done.stderr
    assert not (repository / "metrics").exists() and not (repository / "outputs").exists()


def test_a_sweep_may_write_outside_the_project(repository, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    done = typed(repository, "-m", f"hydra.sweep.dir={disk}/sweep", "seed=1,2")
    assert done.returncode == 0 and len(list(disk.rglob("metrics/distill.json"))) == 2, done.stderr
    assert "seed=1" in done.stdout and not (repository / "multirun").exists()


def test_a_preset_that_would_write_among_the_outs_is_refused(repository):
    config = repository / "conf/config.yaml"
    config.write_text(config.read_text().replace("dir: outputs/", "dir: artifacts/"))
    assert "holds DVC's outs" in typed(repository).stderr and not (repository / "artifacts").exists()


@pytest.mark.parametrize("words", [["hydra.run.dir=outputs/mine"], ["hydra.run.dir={repository}/outputs/mine"]])
def test_a_folder_inside_the_project_may_be_named(repository, words):
    done = typed(repository, *[word.format(repository=repository) for word in words])
    assert done.returncode == 0 and (repository / "outputs/mine/metrics/distill.json").exists(), done.stderr


def test_a_link_that_the_owner_made_leads_to_another_disk(repository, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    (repository / "multirun").symlink_to(disk)
    done = typed(repository, "-m", "seed=1,2", "hydra.sweep.subdir=seed-${seed}")
    assert done.returncode == 0 and len(list(disk.rglob("seed-*/metrics/distill.json"))) == 2, done.stderr


IN_THE_WAY = {  # what stands there, the words, under DVC, the line
    "outputs": ([], False, "outputs is a link to /nowhere, which is not there: make that folder, or remove the link"),
    "multirun": (["-m", "seed=1,2"], False, "multirun is a file, and a folder is needed there: move it away"),
    ".runs": ([], True, "{root}/.runs is a link to /nowhere, which is not there: make that folder, or remove the link"),
    ".runs/distill.lock/..": ([], True, "{root}/.runs is a file, and a folder is needed there: move it away"),
}


@pytest.mark.parametrize("place", IN_THE_WAY)
def test_a_dangling_link_or_a_file_where_a_folder_is_needed_is_one_line(repository, place):
    words, dvc, line = IN_THE_WAY[place]
    assert not dvc or typed(repository, stage="config", dvc=True).returncode == 0
    path = repository / place.split("/")[0]
    shutil.rmtree(path, ignore_errors=True)
    if "link" in line:
        path.symlink_to("/nowhere")
    else:
        path.write_text("")
    done = typed(repository, *words, dvc=dvc)
    assert done.returncode == 1 and done.stderr == f"offramp: {line.format(root=repository)}\n"


def test_from_another_folder_a_stage_says_where_dvc_repro_is_meant(repository, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("PYTHONPATH", str(repository))
    done = typed(elsewhere, dvc=True)
    assert done.stderr == f"offramp: resolved.yaml is missing: run dvc repro config in {repository}\n"


@pytest.mark.parametrize(("to", "why"), [("> /dev/full", "No space left on device"), ("| true", "Broken pipe")])
def test_output_that_nobody_can_be_shown_costs_the_work_nothing(repository, to, why):
    stage = repository / "stages/distill.py"
    stage.write_text(stage.read_text().replace("    run.metrics", "    print('at work', flush=True)\n    run.metrics"))
    command = f"set -o pipefail; {sys.executable} -m stages.distill hydra.run.dir=outputs/mine {to}"
    done = subprocess.run(["bash", "-c", command], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (repository / "outputs/mine/metrics/distill.json").exists()
    lost = f"offramp: standard output cannot be written ({why}): the work goes on without it"
    assert done.stderr.splitlines() == [lost, "offramp: distill wrote outputs/mine"]


@pytest.mark.parametrize("command", ["stages.config", "stages.tracking status"])
def test_an_answer_that_cannot_be_shown_is_one_line(repository, command):
    for to, why in (("> /dev/full", "No space left on device"), (">&-", "")):
        words = ["bash", "-c", f"{sys.executable} -m {command} {to}"]
        done = subprocess.run(words, cwd=repository, capture_output=True, text=True, timeout=60)
        line = f"offramp: standard output could not be written ({why}): the answer is not complete\n"
        assert (done.returncode, done.stderr) == ((1, line) if why else (0, "")), "a closed stream is the user's wish"


def test_a_run_by_hand_in_the_project_itself_would_overwrite_the_outs_and_is_refused(repository):
    assert "DVC's outs" in typed(repository, "hydra.run.dir=.").stderr
    assert not (repository / "metrics").exists()


@pytest.mark.parametrize("option", ["--config-dir", "--config-path", "--config-name", "--experimental-rerun"])
def test_settings_from_elsewhere_are_refused(repository, option):
    done = typed(repository, option, "conf")
    assert done.returncode == 1
    assert done.stderr == f"offramp: {option}: settings come from params.yaml and conf/ only\n"


def test_under_dvc_a_stage_reads_its_sections_of_resolved_yaml_and_writes_the_outs(repository):
    assert "run dvc repro config" in typed(repository, dvc=True).stderr
    assert typed(repository, stage="config", dvc=True).returncode == 0
    plain = yaml.safe_load((repository / "resolved.yaml").read_text())
    (repository / "resolved.yaml").write_text(yaml.safe_dump({"distill": plain["distill"], "seed": 7}))
    done = typed(repository, dvc=True)
    assert done.returncode == 0, done.stderr
    assert (repository / "metrics/distill.json").exists() and not (repository / "outputs").exists()


def test_under_dvc_a_stage_records_what_made_its_outs_and_compares_it_with_the_commit(repository, monkeypatch):
    typed(repository, stage="config", dvc=True)
    typed(repository, dvc=True)
    record = (repository / "provenance/distill.json").read_bytes()
    write_json(repository / "provenance.json", {"distill": json.loads(record)})  # as report does
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "run"]):
        subprocess.run([*git, *words], cwd=repository, check=True)
    (repository / "provenance/distill.json").unlink()  # as DVC does before a rerun
    assert typed(repository, dvc=True).stderr == "offramp: distill: same bytes as the committed run\n"
    assert (repository / "provenance/distill.json").read_bytes() == record

    monkeypatch.setenv("TOY_RANKS", "4")
    assert "under other conditions than the committed run (ranks: 2 -> 4)" in typed(repository, dvc=True).stderr
    by_hand = typed(repository, "distill.temperature=3")
    assert "committed run" not in by_hand.stderr and not list((repository / "outputs").rglob("provenance"))


@pytest.mark.parametrize("stage", ["distill", "config"])
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--help"], "corpus: files, huggingface, stdlib"),
        (["--cfg", "job", "scale=tiny"], "sequence_tokens: 64"),
        (["--info"], "Hydra"),
        (["-sc", "install=bash"], "complete -"),
    ],
    ids=["help", "cfg", "info", "completion"],
)
def test_hydras_own_questions_are_answered_by_every_stage_and_nothing_runs(repository, stage, words, shown):
    done = typed(repository, *words, stage=stage)
    assert done.returncode == 0 and shown in done.stdout and not done.stderr, done.stderr
    assert not (repository / "outputs").exists() and not (repository / "resolved.yaml").exists()


@pytest.mark.parametrize("stage", ["distill", "config"])
def test_tab_completes_settings_and_presets(repository, monkeypatch, stage):
    for line, found in (("distill.temp", "distill.temperature="), ("scale=ti", "scale=tiny")):
        monkeypatch.setenv("COMP_LINE", f"python -m stages.{stage} {line}")
        monkeypatch.setenv("COMP_POINT", str(len(f"python -m stages.{stage} {line}")))
        assert typed(repository, "-sc", "query=bash", stage=stage).stdout.split() == [found]


@pytest.mark.skipif(not shutil.which("bash"), reason="bash completes")
def test_bash_completes_with_what_a_stage_installs(repository):
    python, line = sys.executable, f"{sys.executable} -m stages.config scale=ti"
    script = (
        f'eval "$({python} -m stages.config -sc install=bash)"; COMP_LINE="{line}"; COMP_POINT={len(line)}; '
        'COMP_CWORD=3; _offramp_completion; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "scale=tiny", done.stderr


def test_compare_and_config_say_how_they_are_used(repository):
    assert "--explain pretrain.steps" in typed(repository, "--help", stage="config").stdout
    assert "what leaving costs" in typed(repository, "--help", stage="plan").stdout
    assert "python -m stages.run.compare v0.1.0" in typed(repository, "--help", stage="run.compare").stdout
    refused = typed(repository, "--bogus", stage="config")
    assert refused.returncode == 1 and refused.stderr.startswith("offramp: --bogus: usage: python -m stages.config")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_a_stage_dies_with_its_dvc_and_the_next_copy_waits_for_its_lock(repository):
    typed(repository, stage="config", dvc=True)
    resolved = yaml.safe_load((repository / "resolved.yaml").read_text())
    (repository / "resolved.yaml").write_text(yaml.safe_dump(resolved | {"seed": 99}))
    starter = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'stages.distill'])"  # for dvc
    environment = os.environ | {"DVC_STAGE": "distill"}
    dvc = subprocess.Popen([sys.executable, "-c", starter], cwd=repository, env=environment)
    deadline = time.monotonic() + 30
    while not (repository / "pid.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    stage = read_json(repository / "pid.json")
    (repository / "resolved.yaml").write_text(yaml.safe_dump(resolved))
    second = subprocess.Popen(
        [sys.executable, "-m", "stages.distill"],
        cwd=repository,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "another process is still running" in second.stderr.readline()
    dvc.send_signal(signal.SIGKILL)
    dvc.wait()
    assert second.wait(20) == 0
    status = Path(f"/proc/{stage}/status")  # a dead process may wait there as a zombie for a lazy init
    assert not status.exists() or "State:\tZ" in status.read_text()
