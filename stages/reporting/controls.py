"""Each model beside the models that it is held against: what else the same tokens, or the same operations, give."""

from typing import Any, NamedTuple

from stages.reporting.wording import number, signed_number, words

SAME_TOKENS, SAME_OPERATIONS = "same tokens", "same operations"
WHAT = {  # of each control: what is held equal, and what it is
    "control": (SAME_TOKENS, "random start, the data alone"),
    "warm_control": (SAME_TOKENS, "the teacher's start, the data alone"),
    "cold_student": (SAME_TOKENS, "random start, the teacher's targets"),
    "scratch_student": (SAME_OPERATIONS, "the student's shape from nothing, for the cost of teacher and student"),
    "continued_teacher": (SAME_TOKENS, "the unpruned teacher, trained on; it costs more per token"),
    "continued_student": (SAME_TOKENS, "the unpruned student, trained on; it costs more per token"),
    "scratch_sparse_teacher": (SAME_OPERATIONS, "the pruned shape from nothing, for the cost of teacher and recovery"),
    "scratch_sparse_student": (
        SAME_OPERATIONS,
        "the pruned shape from nothing, for the cost of teacher, student and recovery",
    ),
}
BEATEN, LEVEL, STRONGER = "beaten", "level", "stronger"


class Interval(NamedTuple):
    """A figure and the ends of its 95% interval; None where one is not known."""

    value: Any
    low: Any = None
    high: Any = None


class Control(NamedTuple):
    """One control of one model."""

    name: str
    model: str
    ahead: Interval  # bits per byte by which the model is better; below zero the control is
    cost: float  # training operations of the control with all that it was made from, over those of the model
    is_whole: bool = True  # False: what the teacher took is not known, and not among the operations

    @property
    def equal(self) -> str:
        return WHAT[self.name][0]

    @property
    def what(self) -> str:
        if self.is_whole or self.equal == SAME_TOKENS:
            return WHAT[self.name][1]
        return f"{WHAT[self.name][1]}, without what the teacher took elsewhere"

    @property
    def outcome(self) -> str:
        """Of the control: beaten or stronger only beyond the interval."""
        if self.ahead.low is not None and self.ahead.low > 0:
            return BEATEN
        if self.ahead.high is not None and self.ahead.high < 0:
            return STRONGER
        return LEVEL

    def sentence(self) -> str:
        """How the model compares, in words: "0.0123 bits per byte worse than scratch student"."""
        better = "better" if self.ahead.value > 0 else "worse"
        return f"{number(abs(self.ahead.value))} bits per byte {better} than {words(self.name)}"

    def interval(self) -> str:
        if self.ahead.low is None:
            return "–"
        return f"{signed_number(self.ahead.low)} to {signed_number(self.ahead.high)}"


def controls_of(model: str, metrics: dict) -> list[Control]:
    """The controls of a model; a random start is no control of a student that has one itself."""
    flops = metrics["challenge"]["whole_training_flops"]
    is_whole = metrics["challenge"].get("teacher_cost_known", True)
    found = []
    for name, figures in metrics["evaluate"]["controls"][model].items():
        if name == "cold_student" and metrics["distill"].get("init") == "random":
            continue
        ahead = Interval(*(figures[key] for key in ("difference", "difference_low", "difference_high")))
        found.append(Control(name, model, ahead, flops[name] / flops[model], is_whole))
    return found


def strongest(controls: list[Control], equal: str) -> Control:
    """The best of those with the same tokens, or with the same operations."""
    return min((control for control in controls if control.equal == equal), key=lambda control: control.ahead.value)
