"""What gives our promises in every fit, as callbacks of Lightning that are always on, in this order.

    AgreeOnStep     one collective per step: mean loss and loads of all ranks; refuses what is not finite
    BalanceExperts  moves the routers' biases against the loads
    RecordSteps     validates, keeps the curve, logs, and shows progress
    ExactResume     repeats random numbers, saves in time, stops on a signal

They act when the optimizer has stepped: after the last of the batches whose gradients are added up.
"""

import math
import sys
import time

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from stages.files.artifacts import Refusal
from stages.training.fit import max_violation
from stages.training.order import MODULUS, as_numbers, from_numbers
from stages.training.progress import ProgressLine
from stages.training.strategies import ranks_agree

LOAD_WINDOW_STEPS = 20  # the expert load reported at the end is that of the last so many steps


class AfterStep(Callback):
    """A callback whose `after_step` runs once per step of the optimizer."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if (batch_index + 1) % trainer.accumulate_grad_batches == 0:
            self.after_step(trainer, module)

    def after_step(self, trainer, module) -> None:
        raise NotImplementedError


class AgreeOnStep(AfterStep):
    def after_step(self, trainer, module) -> None:
        rank, outcomes = module.rank, module.outcomes
        parts = {
            name: torch.stack([outcome[name] for outcome, _ in outcomes]).float().mean() for name in outcomes[0][0]
        }
        loads = [torch.stack(same).sum(0) for same in zip(*(loads for _, loads in outcomes), strict=True)]
        wishes, order = module.saves.wishes(), as_numbers(module.batches.order_of_step())
        told = torch.tensor([rank.wish_to_stop(), *wishes, *order], device=module.gradient_norm.device)
        module.mixtures = len(loads)
        message = torch.cat([torch.stack(list(parts.values())), told, *loads])
        dist.all_reduce(message)
        module.figures = dict(zip(parts, (message[: len(parts)] / rank.world_size).tolist(), strict=True))
        module.figures["gradient_norm"] = module.gradient_norm.item()
        told, module.loads = message[len(parts) :].split([len(told), message.numel() - len(parts) - len(told)])
        module.stop, *numbers = told.tolist()
        module.wishes, order = numbers[: len(wishes)], numbers[len(wishes) :]
        module.progress.order = (module.progress.order + from_numbers(order)) % MODULUS
        outcomes.clear()
        self._refuse_unless_finite(module)
        module.progress.step += 1

    def _refuse_unless_finite(self, module) -> None:
        loss, norm, step = module.figures["loss"], module.figures["gradient_norm"], module.progress.step
        if math.isfinite(loss) and math.isfinite(norm):
            return
        index = module.progress.checkpoint.index
        kept = f"the checkpoint before is kept in {index}" if index.exists() else "no step was saved yet"
        raise Refusal(
            f"{module.fit.name}: not finite at step {step}: loss {loss}, gradient norm {norm}; {kept}."
            f" Lower optimizer.*_learning_rate or {module.rank.stage}.learning_rate_scale"
        )


class BalanceExperts(AfterStep):
    def after_step(self, trainer, module) -> None:
        if module.loads.numel():
            loads, progress = module.loads.view(module.mixtures, -1), module.progress
            module.model.balance(list(loads), module.fit.bias_update_rate)
            progress.recent_loads = [*progress.recent_loads, loads.tolist()][-LOAD_WINDOW_STEPS:]


class RecordSteps(AfterStep):
    def __init__(self, fit, rank, start: int):
        self.start, self.tokens_per_step = start, fit.batch_sequences * rank.accumulate * rank.sequence_tokens
        out = sys.stdout if rank.rank == 0 else None
        self.line = ProgressLine(fit.name, start, fit.steps, rank.log_every_steps, self.tokens_per_step, out)

    def on_train_start(self, trainer, module) -> None:
        self.started = time.monotonic()

    def after_step(self, trainer, module) -> None:
        progress, fit, rank, figures = module.progress, module.fit, module.rank, module.figures
        now = time.monotonic()
        validate = progress.step % fit.validate_every_steps == 0 or progress.step == fit.steps
        if validate:
            with trainer.precision_plugin.forward_context():
                figures["validation_bits_per_byte"] = module.validate()
        if progress.step % rank.log_every_steps == 0 or validate:
            row = {"step": progress.step, "loss": round(figures["loss"], 5)}
            row["validation_bits_per_byte"] = round(figures["validation_bits_per_byte"], 5) if validate else None
            progress.curve.append(row)
            done = (progress.step - self.start) * self.tokens_per_step
            figures["tokens_per_second"] = done / max(now - self.started, 1e-9)
            if progress.recent_loads:
                figures["max_violation"] = max(max_violation(load) for load in torch.tensor(progress.recent_loads[-1]))
            rank.log(fit.name, progress.step, figures)
        if rank.is_observed:
            self._observe(trainer, module, validate)
        self.line.step(progress.step, figures["loss"], figures.get("validation_bits_per_byte"))

    def _observe(self, trainer, module, validate: bool) -> None:
        """Shows the figures to the callbacks and loggers of conf/: Lightning hands them on every `log_every_steps`."""
        figures, step = module.figures, module.progress.step
        module.log_dict({"step": float(step)} | figures)
        if validate and step % module.rank.log_every_steps:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=step)


class ExactResume(AfterStep):
    """A resumed fit gives the bytes of an uninterrupted one."""

    def on_train_start(self, trainer, module) -> None:
        # Lightning's own handler starts a collective at an arbitrary point, and ranks may wait for each other
        module.rank.install_stop_handlers()
        module.saves.start()
        if module.rank.rehearses:
            module.rehearse()
        trainer.fit_loop.epoch_loop.on_load_checkpoint({"_batches_that_stepped": module.progress.step})  # for loggers

    def after_step(self, trainer, module) -> None:
        rank = module.rank
        if not ranks_agree(rank.strategy, module.progress.step, module.fit.steps, rank.settings.trainer):
            return  # a wish to stop stays until they do
        if module.stop > 0:
            self._save_and_stop(module)
        module.saves.after_step(module, module.wishes)

    def on_train_end(self, trainer, module) -> None:
        if module.progress.step == module.fit.steps:  # while the strategy still has the parts of all ranks
            module.final = module.saves.save_whole(module)

    def _save_and_stop(self, module) -> None:
        progress, fit = module.progress, module.fit
        module.saves.save_whole(module)
        progress.checkpoint.wait()
        dist.barrier()  # torchrun ends all ranks when one is gone
        done = f"{fit.name}: {module.rank.why_it_stops(module.stop)} after step {progress.step} of {fit.steps}; "
        raise Refusal(done + (progress.checkpoint.failure or "the same command continues from there"))
