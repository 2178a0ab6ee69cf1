"""One rank of a training stage: `python -m stages.training.rank job.json [pid of its parent]`, started by a launcher.

Only ranks import Lightning, whose import alone costs seconds. The Trainer brings the loop, DDP, precision and devices;
the sampler, the checkpoint and the callbacks are ours, so that a resumed run gives the bytes of an uninterrupted one.
"""

import contextlib
import json
import math
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from stages.files.artifacts import Refusal, write_atomically, write_json
from stages.files.streams import shield_output
from stages.run.entry import die_with_parent, leave
from stages.training.torchmetrics_stub import torchmetrics_stub

if __name__ == "__main__":  # before the imports: in their seconds torchrun may be killed, and nobody else ends a rank
    die_with_parent(int(sys.argv[2]) if sys.argv[2:] else None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it at once, as SIGTERM does, while nothing can be lost

from stages.training.job import Job, is_observed

if "torchmetrics" not in sys.modules and not (__name__ == "__main__" and is_observed(Path(sys.argv[1]))):
    sys.modules["torchmetrics"] = torchmetrics_stub()

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from stages.data.shards import Tokens, Windows, read_card
from stages.model import checkpointing
from stages.model import hub as models
from stages.model.families.registry import family_of
from stages.run.heap import keep_freed_memory
from stages.run.provenance import device_conditions
from stages.settings.lightning import duration_seconds
from stages.training import observers, sharing
from stages.training.callbacks import AgreeOnStep, BalanceExperts, ExactResume, RecordSteps
from stages.training.checkpoints import Checkpoint, made_once
from stages.training.cost import step_flops
from stages.training.fit import (
    VALIDATION_BATCH,
    Fit,
    compile_blocks,
    limited,
    max_violation,
    settle_cublas_workspaces,
    validation_nats,
)
from stages.training.machine import chosen_accelerator, chosen_precision
from stages.training.module import Batches, Progress, Training
from stages.training.moving import certificate
from stages.training.strategies import has_engine, shards, strategy

INTERRUPTED, TIME_IS_OVER = 1.0, 0.5  # wishes to stop, which the ranks add up


class Rank:
    """What a rank knows: its job, its place among the ranks, and the data."""

    def __init__(self, job: Job):
        self.stage, self.state, self.place, self.settings = job.stage, job.state, job.place, job.settings
        self.optimizer, self.sequence_tokens = self.settings.optimizer, self.settings.sequence_tokens
        self.checkpoint_every_seconds = self.settings.trainer.checkpoint_every_seconds
        self.log_every_steps = self.settings.trainer.log_every_steps
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.accelerator, self.precision = job.accelerator, job.precision
        self.strategy = strategy(self.settings.trainer.strategy)
        self.rehearses = self.strategy.needs_rehearsal(self.world_size)
        trainer = self.settings.trainer
        self.accumulate, self.max_time = trainer.accumulate_grad_batches, trainer.max_time
        self.limit_val_batches, self.few_steps = trainer.limit_val_batches, int(trainer.fast_dev_run)
        self.is_observed = bool(self.settings.callbacks or self.settings.logger)
        self.deadline = time.monotonic() + duration_seconds(self.max_time) if self.max_time else math.inf
        data = self.place.read("artifacts/data")
        self.card = read_card(data)
        self.windows = Windows(Tokens(data, "train"), self.sequence_tokens, self.settings.seed)
        self.validation_windows = Windows(Tokens(data, "val"), self.sequence_tokens, seed=None)
        self.stop_requested = False

    def install_stop_handlers(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_) -> None:
        self.stop_requested = True

    def wish_to_stop(self) -> float:
        """What this rank adds to the ranks' sum: above zero, all stop after this step. Rank zero watches the clock."""
        if self.stop_requested:
            return INTERRUPTED
        return TIME_IS_OVER if self.rank == 0 and time.monotonic() > self.deadline else 0.0

    def why_it_stops(self, sum_of_wishes: float) -> str:
        return f"stopped by trainer.max_time ({self.max_time})" if sum_of_wishes == TIME_IS_OVER else "interrupted"

    def here(self) -> dict:
        """Where this rank trains: what the record of a fit tells that moves (stages/training/moving.py)."""
        trainer, gpus = self.settings.trainer, int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        found = {"strategy": trainer.strategy, "ranks": self.world_size, "launcher": trainer.launcher}
        found |= {"engine": self.settings.engine.name}
        found |= device_conditions(gpus if self.accelerator == "gpu" else 0)
        found |= {"threads_per_rank": torch.get_num_threads(), "precision": self.precision}
        return found | {"python": platform.python_version(), "torch": str(torch.__version__)}

    def validate(self, model, fit: Fit, nats_of: Callable[[list[torch.Tensor]], torch.Tensor] | None = None) -> float:
        """Bits per byte of windows from all over the validation split, shared out among the ranks.

        `nats_of` batches is the model's `validation_nats`, where nothing else is said.
        """
        nats_of = nats_of or partial(validation_nats, model)
        most = min(fit.validation_sequences, self.validation_windows.count)
        tokens_BT1 = self.validation_windows.spread(limited(most, self.world_size, self.limit_val_batches))
        own_BT1, B = tokens_BT1[self.rank :: self.world_size], VALIDATION_BATCH
        batches = [own_BT1[i : i + B] for i in range(0, len(own_BT1), B)]
        nats = nats_of(batches)
        if shards(self.strategy):  # every rank gathers the weights for each pass: those with fewer batches, too
            most_batches = math.ceil(math.ceil(len(tokens_BT1) / self.world_size) / B)
            nats_of([tokens_BT1[:1]] * (most_batches - len(batches)))
        nats = nats.to(model.head.weight.device, torch.float32)
        dist.all_reduce(nats)
        targets = tokens_BT1[:, 1:].numel()
        return nats.item() / math.log(2) / (targets * self.validation_windows.tokens.bytes_per_token)

    def log(self, name: str, step: int, figures: dict) -> None:
        if self.rank != 0:
            return
        row = {"step": step, "time": time.time(), "figures": {f"{name}/{k}": v for k, v in figures.items()}}
        with contextlib.suppress(OSError), (self.state / "steps.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")  # a full disk costs the curve of this run's record, not the run


def run_fit(fit: Fit, rank: Rank) -> dict:
    """Trains one fit to its end (from its checkpoint, if there is one) and writes the model."""
    if rank.few_steps:
        fit.steps = min(fit.steps, rank.few_steps)
    progress = Progress(Checkpoint(rank.state, fit.name), rank.here())
    progress.load(fit.model, fit.steps, quiet=rank.rank != 0)
    if progress.step and rank.rank == 0:
        print(f"{fit.name}: continues after step {progress.step} of {fit.steps}", flush=True)
    continued_from, started = progress.step, time.monotonic()
    if progress.step < fit.steps:
        state = train(fit, rank, progress).final
        if shards(rank.strategy):  # rank zero has the whole model again, and the others its shape
            fit.model = models.empty_model(fit.model.shape)
            if state is not None:
                fit.model.load_state_dict(state["model"], assign=True)
        else:
            fit.model.cpu()
    seconds = time.monotonic() - started
    if not progress.curve:  # no step at all: a model that is there
        model = fit.model.to("cuda" if rank.accelerator == "gpu" else "cpu")
        loads: list[list[list[torch.Tensor]]] = []

        def nats_of(batches):
            loads.append([])
            return validation_nats(model, batches, loads[-1])

        bits = round(rank.validate(model, fit, nats_of), 5)
        progress.curve = [{"step": 0, "loss": None, "validation_bits_per_byte": bits}]
        progress.recent_loads = of_all_ranks(loads[0])  # a second time, if any, is of windows that were read before
        fit.model.cpu()
    if rank.rank == 0 and not rank.few_steps:
        progress.checkpoint.wait()
        fit.finish(fit.model)
        models.save(fit.model, rank.place.write(fit.out), rank.card["end_of_text"], rank.card["tokenizer_sha256"])
    load_LE = torch.tensor(progress.recent_loads).sum(0) if progress.recent_loads else torch.zeros(0)
    return {
        "validation_bits_per_byte": progress.curve[-1]["validation_bits_per_byte"],
        "expert_load": [(load_E / load_E.sum()).tolist() for load_E in load_LE],
        "max_violation": [max_violation(load_E) for load_E in load_LE],
        "curve": progress.curve,
        "notes": fit.notes,
        "made": how_made(fit, rank),
        "moved": certificate(fit, rank, progress),
        # of the whole fit, from the steps of this process; none where all were done before
        "seconds": seconds * fit.steps / (fit.steps - continued_from) if continued_from < fit.steps else None,
    }


def of_all_ranks(loads: list[list[torch.Tensor]]) -> list[list[list[float]]]:
    """The loads [layers][E] that each rank saw, batch by batch, added up by rank; empty of a model without experts."""
    own = torch.stack([torch.stack(batch) for batch in loads]).sum(0).tolist() if any(loads) else []
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)  # objects: a rank may have had no windows
    return [each for each in found if each]


def how_made(fit: Fit, rank: Rank) -> dict:
    """The model's architecture as in its config.json, its balancing, and the operations of its training."""
    tokens = fit.batch_sequences * rank.accumulate * rank.sequence_tokens
    teacher = getattr(fit.objective, "teacher", None)
    return {
        "config": family_of(fit.model.shape).config_of(fit.model.shape),
        "bias_update_rate": fit.bias_update_rate,
        "balance_loss_weight": getattr(fit.objective, "balance_loss_weight", 0.0),
        "training_flops": fit.steps
        * step_flops(fit.model, tokens, rank.sequence_tokens, teacher, rank.optimizer.name)
        + fit.prepared_flops,
    } | ({"unknown_before": True} if fit.unknown_before else {})


def train(fit: Fit, rank: Rank, progress: Progress) -> Training:
    """To the fit's last step; what was trained, as the strategy has it."""
    fit.model.train()
    batches = Batches(fit, rank, progress.step)
    training = Training(fit, rank, progress, batches)
    policy = checkpointing_policy(fit, rank, training)  # before blocks are compiled, which hides what they do
    if rank.accelerator == "gpu" and not has_engine(rank.strategy):
        torch.compiler.reset()  # else the shapes of the fit before count towards how many a block is compiled for
        for model in filter(None, (fit.model, training.teacher)):
            compile_blocks(model)
    facts = {"folder": str(observers.log_folder(rank.place, rank.stage)), "stage": rank.stage, "fit": fit.name}
    loggers = observers.build("logger", Logger, rank.settings.logger, facts)
    watching = observers.build("callbacks", lightning.Callback, rank.settings.callbacks, facts)
    record = RecordSteps(fit, rank, progress.step)
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", rank.world_size))
    trainer = lightning.Trainer(
        accelerator=rank.accelerator,
        devices=devices,
        num_nodes=rank.world_size // devices,
        strategy=rank.strategy.lightning_strategy(),
        precision=rank.precision,
        accumulate_grad_batches=rank.accumulate,
        gradient_clip_val=rank.settings.trainer.gradient_clip_val,
        callbacks=[AgreeOnStep(), BalanceExperts(), record, *watching.values(), ExactResume()],
        fast_dev_run=rank.few_steps * rank.accumulate or False,
        max_epochs=1,
        use_distributed_sampler=False,
        default_root_dir=facts["folder"],
        logger=[*loggers.values()] or False,
        log_every_n_steps=rank.log_every_steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    try:
        with checkpointing.checkpointed(fit.model, policy):
            trainer.fit(training, DataLoader(batches, batch_size=None))
    except MisconfigurationException as error:  # as where a callback needs a logger, and none was chosen
        hint = "" if loggers else "; logger=csv chooses a logger"
        raise Refusal(f"{fit.name}: {' '.join(str(error).split()).rstrip('.')}{hint}") from None
    except Exception as error:
        if not (name := observers.at_fault(error, loggers | watching)):
            raise
        traceback.print_exc()
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise Refusal(f"{fit.name}: {name} failed: {why}; the traceback is in {rank.state / 'ranks.log'}") from None
    finally:
        record.line.close()
    if progress.step < fit.steps:
        why = f"a callback ({', '.join(rank.settings.callbacks)}) stopped it after step {progress.step}"
        raise Refusal(f"{fit.name}: {why} of {fit.steps}: a model trains all its steps; lower {rank.stage}.steps")
    return training


def checkpointing_policy(fit: Fit, rank: Rank, training: Training) -> str:
    """What trainer.activation_memory_bytes leaves to recompute, counted on this rank's next batch."""
    budget = rank.settings.trainer.activation_memory_bytes
    if budget is None:
        return "none"
    device = torch.device("cuda", torch.cuda.current_device()) if rank.accelerator == "gpu" else torch.device("cpu")
    training.to(device)
    tokens_BT1 = training.batches.batch(training.batches.numbers[0]).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=rank.precision == "bf16-mixed")

    def loss_of():
        with autocast:
            return fit.objective(fit.model, tokens_BT1).loss

    where = f"{fit.name} ({tokens_BT1.shape[0]} sequences of {rank.sequence_tokens} tokens on a rank)"
    chosen = checkpointing.least_recomputation(fit.model, budget, loss_of, where)
    if rank.rank == 0:
        again = f"{chosen.recomputed_flops_share:.1%} of a forward pass again"
        print(f"{fit.name}: keeps {chosen.activation_bytes:,} bytes ({chosen.policy}), {again}", flush=True)
    return chosen.policy


def on_this_machine(job: Job) -> Job:
    """With what an engine that starts ranks elsewhere could not know."""
    accelerator = chosen_accelerator(job.accelerator)
    return replace(job, accelerator=accelerator, precision=chosen_precision(job.precision, accelerator))


def main() -> None:
    warnings.filterwarnings("ignore", module="lightning")
    path, results = Path(sys.argv[1]), {}
    shield_output()
    keep_freed_memory()
    try:
        job = on_this_machine(Job.read(path))
        trainer = job.settings.trainer
        torch.manual_seed(job.settings.seed)
        torch.use_deterministic_algorithms(trainer.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes all memory twice
        if not dist.is_initialized():
            dist.init_process_group("nccl" if job.accelerator == "gpu" else "gloo")
        if job.accelerator == "gpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            if trainer.deterministic:
                settle_cublas_workspaces()
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
            sharing.share_work(job, torch.device("cuda" if job.accelerator == "gpu" else "cpu"))
        rank = Rank(job)
        rank.install_stop_handlers()  # not before: a rank that waits above for one that is gone would not see a signal
        keep = partial(made_once, job.state, rank.rank)
        for fit in job.fits_function()(job.settings, job.place, keep):
            results[fit.name] = run_fit(fit, rank)
        if rank.rank == 0:
            write_json(job.state / "result.json", results)
    except Refusal as refusal:
        reason = path.parent / "error.txt"
        if os.environ["RANK"] == "0" or not reason.exists():
            write_atomically(reason, str(refusal))
        sys.exit(1)


if __name__ == "__main__":
    main()
    leave(0)
