"""DeepSpeed's ZeRO as a strategy: the steps of AdamW, and a state that other strategies go on from and have written.

    make test-deepspeed

The ranks are CPUs joined by gloo. Lightning allows DeepSpeed on CUDA only, so `on_cpus` lifts what forbids it; all else
is what runs on GPUs, where nobody has run it yet.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
from test_evaluate import with_values, write_data
from test_strategies import STEPS, STOP, farthest, few_steps, train, weights

from stages.files.artifacts import Refusal, read_json, sha256_of
from stages.settings.compose import compose
from stages.settings.schema import validate
from stages.training.machine import conditions
from stages.training.zero import configuration

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed: make test-deepspeed"
)
ZERO = ("zero 2", "zero 3")


def on_cpus() -> None:
    """In a rank, before it trains."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.strategies import deepspeed as of_lightning

    from stages.training.zero import ZeRO

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # C++ that it would compile; gloo does the same
    of_lightning._validate_device_index_selection = lambda devices: None
    ZeRO.setup_environment = DDPStrategy.setup_environment
    ZeRO.root_device = property(lambda strategy: torch.device("cpu", 0))


def nothing() -> None:
    pass


@pytest.fixture(scope="module")
def settings(tiny_settings):
    return few_steps(tiny_settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("deepspeed")
    write_data(root / "artifacts/data")
    return root


def trained(root, settings, place, *names, stop=None):
    states = [root / place / name for name in names]
    found = train(root, settings, place, states, stop, on_cpus if place.startswith("zero") else nothing)
    return states, found


@pytest.fixture(scope="module")
def stayed(root, settings):
    """Runs that were never stopped, and their results, by place."""
    found = {}
    for place in ("ddp 2", *ZERO):
        (state,), (result,) = trained(root, settings, place, "stayed")
        found[place] = state, result
    return found


@needs_deepspeed
@pytest.mark.parametrize("place", ZERO)
def test_the_steps_are_those_of_adamw_under_ddp(stayed, place):
    (state, result), (of_ddp, expected) = stayed[place], stayed["ddp 2"]
    for row, of_row in zip(result["curve"], expected["curve"], strict=True):
        assert row == pytest.approx(of_row, abs=1e-4)
    assert result["expert_load"] == expected["expert_load"]
    assert farthest(state, of_ddp) < 1e-5


@needs_deepspeed
def test_a_run_goes_on_under_any_strategy_from_what_any_has_written(root, settings, stayed):
    places = ("ddp 2", "fsdp2 2", *ZERO)
    written = {}
    for place in places:
        (written[place],), (said,) = trained(root, settings, place, "written", stop=STOP)
        assert said == f"teacher: interrupted after step {STOP} of {STEPS}; the same command continues from there"
        assert read_json(written[place] / "teacher.json")["file"] == "teacher-2.pt", "one file, whatever the strategy"
    for reader in places:
        names = [f"from {writer}" for writer in places]
        for writer, name in zip(places, names, strict=True):
            shutil.copytree(written[writer], root / reader / name)
        states, results = trained(root, settings, reader, *names)
        for writer, state, result in zip(places, states, results, strict=True):
            assert farthest(state, stayed["ddp 2"][0]) < 1e-5, f"{writer} to {reader}"
            if writer == reader and reader in ZERO:
                assert sha256_of(weights(state)) == sha256_of(weights(stayed[reader][0])), f"{reader}: an exact resume"
            assert bool(result["moved"]) == (writer != reader)
            if result["moved"]:
                assert result["moved"]["data_order_equal"]


@needs_deepspeed
@pytest.mark.parametrize("place", ["zero 2 of 3", "zero 3 of 3"])
def test_ranks_that_do_not_divide_the_weights_resume_to_the_same_bytes(root, settings, place):
    settings = with_values(settings, "pretrain", batch_sequences=6)
    (whole,), _ = trained(root, settings, place, "whole")
    trained(root, settings, place, "stopped", stop=STOP)
    (state,), (result,) = trained(root, settings, place, "stopped")
    assert len(result["curve"]) == STEPS and sha256_of(weights(state)) == sha256_of(weights(whole))


@needs_deepspeed
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_batches_add_up_activations_are_recomputed_and_a_gradient_is_clipped_as_under_ddp(root, settings, precision):
    halved = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "precision": precision}
    halved |= {"checkpoint_every_seconds": 0.0, "activation_memory_bytes": 640_000}
    settings = with_values(settings, "trainer", **halved)
    found = {place: trained(root, settings, place, precision) for place in ("ddp 2", *ZERO)}
    (of_ddp,), (expected,) = found["ddp 2"]
    near, weights_near = (1e-5, 1e-5) if precision == "32-true" else (2e-3, 1e-2)
    for place in ZERO:
        (state,), (result,) = found[place]
        bits = result["validation_bits_per_byte"]
        assert bits == pytest.approx(expected["validation_bits_per_byte"], rel=near), place
        assert farthest(state, of_ddp) < weights_near, place


@needs_deepspeed
@pytest.mark.parametrize("place", ZERO)
def test_a_gradient_that_is_not_finite_is_refused_though_deepspeed_would_leave_the_step_out(root, settings, place):
    (said,) = train(root, settings, place, [root / place / "broken"], first=with_infinite_gradients)
    assert said.startswith("teacher: not finite at step 0: loss 5.5") and "gradient norm nan" in said


def with_infinite_gradients() -> None:
    from stages.training.module import Training

    on_cpus()
    step = Training.training_step

    def breaks(training, *batch):
        loss = step(training, *batch)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    Training.training_step = breaks


@needs_deepspeed
def test_two_students_of_one_teacher_which_stays_whole(root, settings):
    bits = {}
    for place in ("ddp 2", *ZERO):
        states = [root / place / "distilled"]
        bits[place] = train(root, settings, place, states, None, on_cpus if place in ZERO else nothing, distilled)[0]
    for place in ZERO:
        assert bits[place] == pytest.approx(bits["ddp 2"], abs=1e-4)


def distilled(rank, settings) -> list[float]:
    """The bits per byte of both."""
    from stages.model.hub import build_student, build_teacher
    from stages.training.fit import Distillation, Fit
    from stages.training.rank import run_fit

    sizes = rank.card["vocab_size"], settings.sequence_tokens
    teacher, found = build_teacher(settings.teacher, *sizes, settings.seed), []
    for seed in (1, 2):
        objective = Distillation(teacher, "forward_kl", 2.0, 0.5, chunk_tokens=64)
        fit = Fit(f"student{seed}", build_student(settings.student, *sizes, seed), objective, 2, 4, 1.0, 2, 5, "out")
        found.append(run_fit(fit, rank)["validation_bits_per_byte"])
    return found


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_parser_reads_the_configuration(stage, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    read = DeepSpeedConfig(configuration(stage) | autocast | {"gradient_clipping": 1.0})
    assert (read.zero_optimization_stage, read.gradient_clipping, read.torch_autocast_enabled) == (stage, 1.0, True)
    assert not read.bfloat16_config.enabled and not read.float16_config.enabled
    with pytest.raises(ValueError):
        DeepSpeedConfig(configuration(stage) | {"zero_optimization": {"stage": stage, "stge3_prefetch": 1}})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["optimizer.name=muon"], "optimizer.name = muon: DeepSpeed gives a rank a piece of one long vector, and Muon"),
        (["optimizer.name=adamw", "trainer.accelerator=cpu"], "trainer.strategy = deepspeed_stage_3: Lightning runs"),
    ],
)
def test_what_deepspeed_cannot_do_is_one_line(words, reason):
    with pytest.raises(Refusal) as refusal:
        validate(compose(["trainer.strategy=deepspeed_stage_3", *words]))
    assert str(refusal.value).startswith(reason) and "fsdp2" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_machine_without_cuda_refuses_before_a_rank_starts(tiny_settings, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = with_values(tiny_settings, "trainer", strategy="deepspeed_stage_2").trainer.model_dump()
    with pytest.raises(Refusal, match="^trainer.strategy = deepspeed_stage_2: no CUDA device is here, .* choose fsdp2"):
        conditions(asked)


def test_where_it_is_not_installed_a_line_says_how(monkeypatch):
    from stages.training.strategies import strategy

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(Refusal, match=r"^deepspeed is not installed: .*'.\[deepspeed\]'$"):
        strategy("deepspeed_stage_2").lightning_strategy()
