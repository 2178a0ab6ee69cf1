"""What `trainer.deterministic` costs: the teacher's training step with the switch on against off.

On GPU both have cuBLAS's fixed workspaces (CUBLAS_WORKSPACE_CONFIG is read once per process); the row is the
cost of the kernels that the switch exchanges: sorted scatters, attention's backward pass in one order.
"""

from collections.abc import Iterator

import torch

from benchmarks.ceiling import DTYPES
from benchmarks.table import Row
from benchmarks.timing import DEVICE, interleaved
from benchmarks.training_step import BATCHES, SHAPE, Step, batches, new_teacher, teacher_step
from stages.model.families.deepseek_v3.model import DeepseekV3Shape as TeacherShape


def switched(step: Step, on: bool) -> Step:
    def run():
        torch.use_deterministic_algorithms(on)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            return step()
        finally:
            torch.use_deterministic_algorithms(False)

    return run


def rows(
    shape: TeacherShape = SHAPE,
    sequences: int = BATCHES[0],
    seconds: float = 5.0 if DEVICE.type == "cuda" else 15.0,
    least_rounds: int = 4,
) -> Iterator[Row]:
    tokens = sequences * shape.sequence_tokens
    for precision, dtype in DTYPES.items():
        actions = {
            name: switched(teacher_step(new_teacher(shape), batches(shape, sequences), dtype), on)
            for name, on in (("on", True), ("off", False))
        }
        times = interleaved(actions, seconds, least_rounds)
        yield Row.of(
            "deterministic kernels",
            f"teacher's step, {precision}",
            tokens / times.median("on"),
            "the switch off",
            tokens / times.median("off"),
            "tokens/s",
            times.ratio("off", "on"),
            times.rounds,
        )
