"""One rank of a training stage: `python -m stages.training.rank job.json [pid of its parent]`, started by a launcher.

Only ranks import Lightning, whose import alone costs seconds. The Trainer brings DDP, precision and devices;
the sampler, the checkpoint and the two optimisers are ours, so that a resumed run gives the bytes of an
uninterrupted one.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
import types
import warnings
from functools import partial
from pathlib import Path

from stages.files.artifacts import Refusal, write_atomically, write_json
from stages.run.entry import die_with_parent, leave

if __name__ == "__main__":  # before the imports: in their seconds torchrun may be killed, and nobody else ends a rank
    die_with_parent(int(sys.argv[2]) if sys.argv[2:] else None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it at once, as SIGTERM does, while nothing can be lost

if "torchmetrics" not in sys.modules:
    # Lightning wants torchmetrics, which brings scipy, matplotlib and transformers with it, only to ask of each value
    # logged through it whether it is a metric. Nothing is logged through it here, and half of the import is spared.
    stub = types.ModuleType("torchmetrics")
    stub.__dict__.update(__version__="1.0.0", Metric=type("Metric", (), {}), MetricCollection=type("Metrics", (), {}))
    sys.modules["torchmetrics"] = stub

import lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from stages.data.shards import Tokens, Windows, read_card
from stages.model import hub as models
from stages.run.heap import keep_freed_memory
from stages.training.checkpoints import Checkpoint, made_once
from stages.training.fit import Fit, compile_blocks, max_violation, settle_cublas_workspaces, validation_nats
from stages.training.job import Job
from stages.training.optimizers import learning_rate_factor, make_optimizers
from stages.training.progress import ProgressLine
from stages.training.strategies import strategy

LARGEST_PRIME = 2**64 - 59  # of what torch takes as a seed
LOAD_WINDOW_STEPS = 20  # the expert load reported at the end is that of the last so many steps


class Batches(IterableDataset):
    """The batches of one rank from a step on: no state beyond the step."""

    def __init__(self, fit: Fit, rank: "Rank", start: int):
        self.fit, self.rank, self.steps = fit, rank, range(start, fit.steps)

    def __iter__(self):
        rank = self.rank
        for step in [*self.steps[: rank.rehearsals], *self.steps]:
            yield rank.windows.batch(step, rank.rank, rank.world_size, self.fit.batch_sequences)


class Progress:
    """What rank zero saves and every rank resumes from: step, weights, optimisers, curve, loads.

    The sampler and the random numbers of a step are functions of the step, and need no saving.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.step = 0
        self.curve: list[dict] = []
        self.recent_loads: list[list[list[float]]] = []

    def load(self, model, optimizers, quiet: bool) -> None:
        state = self.checkpoint.load(quiet)
        if state is None:
            return
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.curve, self.recent_loads = state["step"], state["curve"], state["recent_loads"]

    def save(self, model, optimizers) -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        state |= {"step": self.step, "curve": self.curve, "recent_loads": self.recent_loads}
        self.checkpoint.save(self.step, state)


class Training(lightning.LightningModule):
    """A `Fit` as Lightning sees it: manual optimisation, because Muon and AdamW step together."""

    def __init__(self, fit: Fit, job: "Rank", progress: Progress, optimizers: list):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.fit, self.job, self.progress = fit.model, fit, job, progress
        self.both = optimizers
        self.teacher = getattr(fit.objective, "teacher", None)  # a submodule, so that Lightning moves it to the device
        self.started = self.saved = time.monotonic()
        self.start = progress.step
        self.rehearsed = not job.rehearsals
        tokens = fit.batch_sequences * job.sequence_tokens
        out = sys.stdout if job.rank == 0 else None
        self.line = ProgressLine(fit.name, self.start, fit.steps, job.log_every_steps, tokens, out)

    def configure_optimizers(self):
        return self.both

    def on_train_start(self):
        # Lightning's own handler broadcasts in the midst of whatever the signal meets, and ranks wait for each other
        self.job.install_stop_handlers()

    def training_step(self, tokens_BT1: Tensor, _):
        progress, fit, job = self.progress, self.fit, self.job
        factor = learning_rate_factor(progress.step, fit.steps, job.optimizer.warmup_share, job.optimizer.decay_share)
        for optimizer in self.both:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
        drawn = (job.settings.seed << 40) + (progress.step << 16) + job.rank  # whoever draws resumes exactly
        torch.manual_seed(drawn % LARGEST_PRIME)
        outcome = fit.objective(self.model, tokens_BT1)
        self.manual_backward(outcome.loss)
        if not self.rehearsed:
            self.rehearsed = True
            return
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), job.optimizer.clip_norm)

        # One collective per step carries everything the ranks must agree on.
        parts = {"loss": outcome.loss.detach()} | outcome.parts
        stop = torch.tensor([float(job.stop_requested)], device=norm.device)
        message = torch.cat([torch.stack(list(parts.values())).float(), stop, *outcome.loads])
        dist.all_reduce(message)
        means = dict(zip(parts, (message[: len(parts)] / job.world_size).tolist(), strict=True))
        self._refuse_unless_finite(means["loss"], norm.item())
        for optimizer in self.optimizers():
            optimizer.step()
        self._balance(message[len(parts) + 1 :])
        progress.step += 1
        now = time.monotonic()
        self._record(means | {"gradient_norm": norm.item()}, now)
        if message[len(parts)] > 0:
            self._save_and_stop()
        due = now - self.saved > job.checkpoint_every_seconds
        if due and job.rank == 0 and not progress.checkpoint.busy:
            progress.save(self.model, self.both)
            self.saved = now

    def _save_and_stop(self) -> None:
        progress, fit, job = self.progress, self.fit, self.job
        if job.rank == 0:
            progress.save(self.model, self.both)
            progress.checkpoint.wait()
        dist.barrier()  # torchrun ends all ranks when one is gone
        done = f"{fit.name}: interrupted after step {progress.step} of {fit.steps}; "
        raise Refusal(done + (progress.checkpoint.failure or "the same command continues from there"))

    def _refuse_unless_finite(self, loss: float, norm: float) -> None:
        """All ranks see the same two numbers, so all stop here together, before the step could do harm."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        step, index = self.progress.step, self.progress.checkpoint.index
        kept = f"the checkpoint of an earlier step is kept in {index}" if index.exists() else "no step was saved yet"
        raise Refusal(
            f"{self.fit.name}: not finite at step {step}: loss {loss}, gradient norm {norm}; {kept}."
            f" Lower optimizer.*_learning_rate or {self.job.stage}.learning_rate_scale"
        )

    def _balance(self, loads: Tensor) -> None:
        if loads.numel():
            loads = loads.view(-1, self.model.shape.experts)
            self.model.balance(list(loads), self.fit.bias_update_rate)
            self.progress.recent_loads = [*self.progress.recent_loads, loads.tolist()][-LOAD_WINDOW_STEPS:]

    def _record(self, figures: dict, now: float) -> None:
        progress, fit, job = self.progress, self.fit, self.job
        validate = progress.step % fit.validate_every_steps == 0 or progress.step == fit.steps
        if validate:
            figures["validation_bits_per_byte"] = job.validate(self.model, fit)
        if progress.step % job.log_every_steps == 0 or validate:
            row = {"step": progress.step, "loss": round(figures["loss"], 5)}
            row["validation_bits_per_byte"] = round(figures["validation_bits_per_byte"], 5) if validate else None
            progress.curve.append(row)
            done = (progress.step - self.start) * fit.batch_sequences * job.sequence_tokens
            figures["tokens_per_second"] = done / max(now - self.started, 1e-9)
            if progress.recent_loads:
                figures["max_violation"] = max(max_violation(load) for load in torch.tensor(progress.recent_loads[-1]))
            job.log(fit.name, progress.step, figures)
        self.line.step(progress.step, figures["loss"], figures.get("validation_bits_per_byte"))


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
        self.rehearsals = int(self.strategy.needs_rehearsal(self.world_size))
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

    def validate(self, model, fit: Fit) -> float:
        """Bits per byte of windows from all over the validation split, shared out among the ranks."""
        tokens_BT1 = self.validation_windows.spread(fit.validation_sequences)
        own_BT1 = tokens_BT1[self.rank :: self.world_size]
        nats = validation_nats(model, [own_BT1[i : i + 8] for i in range(0, len(own_BT1), 8)])
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


def run_fit(fit: Fit, job: Rank) -> dict:
    """Trains one fit to its end (from its checkpoint, if there is one) and writes the model."""
    optimizers = make_optimizers(fit.model, job.optimizer, fit.learning_rate_scale)
    progress = Progress(Checkpoint(job.state, fit.name))
    progress.load(fit.model, optimizers, quiet=job.rank != 0)
    if progress.step and job.rank == 0:
        print(f"{fit.name}: continues after step {progress.step} of {fit.steps}", flush=True)
    if progress.step < fit.steps:
        fit.model.train()
        training = Training(fit, job, progress, optimizers)
        if job.accelerator == "gpu":
            torch.compiler.reset()  # else the shapes of the fit before count towards how many a block is compiled for
            for model in filter(None, (fit.model, training.teacher)):
                compile_blocks(model)
        trainer = lightning.Trainer(
            accelerator=job.accelerator,
            devices=job.world_size,
            strategy=job.strategy.lightning_strategy(),
            precision={"bfloat16": "bf16-mixed", "float32": "32-true"}[job.precision],
            max_epochs=1,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        batches = Batches(fit, job, progress.step)
        try:
            trainer.fit(training, DataLoader(batches, batch_size=None))
        finally:
            training.line.close()
        if job.rank == 0:
            progress.save(fit.model, optimizers)
    fit.model.cpu()
    if job.rank == 0:
        progress.checkpoint.wait()
        models.save(fit.model, job.place.write(fit.out), job.card["end_of_text"], job.card["tokenizer_sha256"])
    loads = torch.tensor(progress.recent_loads).sum(0) if progress.recent_loads else torch.zeros(0)
    return {
        "validation_bits_per_byte": progress.curve[-1]["validation_bits_per_byte"],
        "expert_load": [(load / load.sum()).tolist() for load in loads],
        "max_violation": [max_violation(load) for load in loads],
        "curve": progress.curve,
        "notes": fit.notes,
    }


def main() -> None:
    warnings.filterwarnings("ignore", module="lightning")
    path, results = Path(sys.argv[1]), {}
    keep_freed_memory()
    try:
        job = Job.read(path)
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
