"""What distilling and pruning save in money: dollars per million tokens trained on, read and written, and break-even.

Training, reading (a prompt) and writing (generated tokens, with a cache) of a model each take seconds per token on a
machine. Money is seconds times a price per hour, so on one machine the break-even of distilling needs no price.
"""

from collections.abc import Mapping

from stages.planning.ranges import Range, exactly, over, plus, times

KINDS = ("train", "read", "write")
BACKWARD_OVER_FORWARD = 2  # FLOPs: the gradients of inputs and of weights, each as many as forward


def dollars_per_million_tokens(seconds_per_token: float, dollars_per_hour: float) -> float:
    return seconds_per_token / 3600 * dollars_per_hour * 1e6


def money(seconds: Mapping[str, Mapping[str, Range]], dollars_per_hour: Range) -> dict[str, dict[str, Range]]:
    """Dollars per million tokens by model and kind."""
    factor = times(dollars_per_hour, exactly(dollars_per_million_tokens(1.0, 1.0)))
    return {name: {kind: times(each, factor) for kind, each in kinds.items()} for name, kinds in seconds.items()}


def training_flops(forward_flops_per_token: float) -> float:
    """Of one token, forward and backward."""
    return forward_flops_per_token * (1 + BACKWARD_OVER_FORWARD)


def measured_seconds(timings: Mapping) -> dict[str, dict[str, Range]]:
    """Seconds per token by model and kind from measurements/profile.json: median and quartiles.

    Reading and writing are of one sequence; training is forward and backward without the optimizer.
    """
    work = timings["workload"]
    found: dict[str, dict[str, Range]] = {}
    for name, times_of in timings["latency"].items():
        found[name] = {
            "read": _per_token(times_of, "prefill_seconds", work["prefill_tokens"]),
            "write": _per_token(times_of, "decode_seconds_per_token", 1),
        }
    for name, times_of in timings["training"].items():
        found[name]["train"] = _per_token(times_of, "step_seconds", work["training_tokens"])
    return found


def _per_token(figures, name, tokens):
    low, high = (figures[f"{name}_quartile_{end}"] for end in ("low", "high"))
    return Range(figures[name] / tokens, low / tokens, high / tokens)


def flops_as_seconds(models: Mapping[str, Mapping]) -> dict[str, dict[str, Range]]:
    """As `measured_seconds`, at one operation a second: what the formula says alone, the same on every machine."""
    return {
        name: {
            "train": exactly(training_flops(figures["flops_per_token"])),
            "read": exactly(figures["flops_per_token"]),
            "write": exactly(figures["flops_per_token"]),
        }
        for name, figures in models.items()
    }


def on_chip(
    seconds: Mapping[str, Mapping[str, Range]],
    models: Mapping[str, Mapping],
    peak_flops_per_second: float,
    utilization: float,
    reference: str = "teacher",
) -> dict[str, dict[str, Range]]:
    """Seconds per token on another chip, of training and reading; writing is bound by memory and is not predicted.

    The reference model runs its FLOPs at `utilization` of the peak: an assumption. The others take their measured
    time relative to it; the range spans that ratio's quartiles and the ratio of FLOPs, the two ways to carry a saving
    from machine to machine.
    """
    found: dict[str, dict[str, Range]] = {}
    for name in seconds:
        by_flops = models[name]["flops_per_token"] / models[reference]["flops_per_token"]
        found[name] = {}
        for kind, flops in (("train", training_flops), ("read", float)):
            if kind not in seconds[name]:
                continue
            of_reference = flops(models[reference]["flops_per_token"]) / (peak_flops_per_second * utilization)
            ratio = over(seconds[name][kind], seconds[reference][kind]) if name != reference else exactly(1.0)
            ends = Range(ratio.value, min(ratio.low, by_flops), max(ratio.high, by_flops))
            found[name][kind] = times(exactly(of_reference), ends)
    return found


def distilling_seconds(seconds: Mapping[str, Mapping[str, Range]], tokens: float) -> Range:
    """Of training the student towards the teacher: for each token a step of the student and a forward pass of the
    teacher (Hinton et al. 2015, arXiv 1503.02531)."""
    return times(plus(seconds["student"]["train"], seconds["teacher"]["read"]), exactly(tokens))


def break_even_tokens(spent: Range, before: Range, after: Range) -> Range | None:
    """Tokens served after which what each saves has returned what was spent. All in seconds, or all in dollars.

    None: the new model is not cheaper beyond the spread. The range takes the corners.
    """
    saved = Range(before.value - after.value, before.low - after.high, before.high - after.low)
    return over(spent, saved) if saved.low > 0 and saved.value > 0 else None


def distilling_pays(
    seconds: Mapping[str, Mapping[str, Range]], teacher_tokens: float | None, student_tokens: float
) -> dict[str, dict[str, Range | None]]:
    """Tokens to read or write until distilling has paid for itself.

    `teacher exists`: only the student's training is spent. `teacher trained for it`: the teacher's as well, where it is
    known how many tokens that took.
    """
    spent_in = {"teacher exists": distilling_seconds(seconds, student_tokens)}
    if teacher_tokens is not None:
        of_teacher = times(seconds["teacher"]["train"], exactly(teacher_tokens))
        spent_in["teacher trained for it"] = plus(spent_in["teacher exists"], of_teacher)
    return {
        case: {
            kind: break_even_tokens(spent, seconds["teacher"][kind], seconds["student"][kind])
            for kind in ("read", "write")
        }
        for case, spent in spent_in.items()
    }
