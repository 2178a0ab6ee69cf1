"""Published claims beside what was measured: one row each, with figures, their 95% interval and a verdict."""

from collections.abc import Callable
from typing import Any, NamedTuple

from stages.reporting.controls import (
    BEATEN,
    SAME_OPERATIONS,
    SAME_TOKENS,
    STRONGER,
    Control,
    Interval,
    controls_of,
    strongest,
)
from stages.reporting.wording import count, number, percent, policy_words, signed, words

NOT_TESTABLE, CONTROL_NOT_BEATEN = "not testable here", "control not beaten"
TOO_SMALL = "too small to claim anything"
UNKNOWN_COST = "What the teacher from a folder took to train is not known: no control has the cost of the whole."
TOO_FEW_DOCUMENTS, TOO_FEW_REPETITIONS = "too few documents", "too few repetitions"
# A verdict needs these. With fewer documents a 95% interval misses the true value more than twice as often as it should
# (with 3, in one case of four). Intervals of repetitions are right from 5 on; twice that, because a busy machine
# disturbs neighbouring repetitions alike (benchmarks/coverage.py). A model trained on fewer tokens (scale tiny: 10,240;
# demo: 1,024,000) has learned very little.
MIN_DOCUMENTS, MIN_REPETITIONS, MIN_TRAINING_TOKENS = 20, 10, 100_000
CHECKPOINTING_SAVES, CHECKPOINTING_COSTS = 0.3, 0.25  # of the activations' memory, and of a step's time
ROUTER_RATIO = 3.2 / 1.1  # milliseconds before and after; only their ratio travels between machines


class Claim(NamedTuple):
    """A row of the table; `values` are the raw figures behind the words, for claims.json and the tests."""

    name: str
    claim: str
    measured: str
    interval: str
    verdict: str  # beaten | holds | control not beaten | fails | not testable here | too few ... | too small ...
    why: str
    values: dict


def make_claims(metrics: dict, timings: dict) -> list[Claim]:
    """Each published claim beside what was measured."""
    evaluated = metrics["evaluate"]
    return [
        *quality_claims(metrics),
        checkpointing_claim(evaluated["checkpointing"], timings["checkpointing"], evaluated["checkpointing_layers"]),
        router_claim(timings["router"]),
    ]


def quality_claims(metrics: dict) -> list[Claim]:
    """Those that depend on how good the models are."""
    which = model_that_was_trained(metrics)
    stage = {"student": "distill", "teacher": "pretrain"}[which]
    lacking = lack_of_evidence(metrics[stage]["tokens"], metrics["evaluate"]["test"]["documents"], which)
    of_whole_cost = lacking if metrics["challenge"].get("teacher_cost_known", True) else (NOT_TESTABLE, UNKNOWN_COST)
    return [
        distillation_claim(metrics, SAME_TOKENS, lacking),
        distillation_claim(metrics, SAME_OPERATIONS, of_whole_cost),
        sparsity_claim(metrics, "teacher", of_whole_cost),
        sparsity_claim(metrics, "student", of_whole_cost),
    ]


def is_from_folder(metrics: dict) -> bool:
    return metrics["pretrain"].get("source") == "folder"


def model_that_was_trained(metrics: dict) -> str:
    """Whose training tokens count as evidence: the teacher's, or where it came from a folder, the student's."""
    return "student" if is_from_folder(metrics) else "teacher"


def lack_of_evidence(training_tokens: int, documents: int, which: str = "teacher") -> tuple[str, str] | None:
    """The verdict and the reason if there is too little evidence for any other; else None. `which` model was trained
    on these tokens."""
    if training_tokens < MIN_TRAINING_TOKENS:
        needed = f"a verdict needs {MIN_TRAINING_TOKENS:,}."
        return TOO_SMALL, f"The {which} was trained on {training_tokens:,} tokens; {needed}"
    if documents < MIN_DOCUMENTS:
        return TOO_FEW_DOCUMENTS, f"{count(documents, 'document')}; a verdict needs {MIN_DOCUMENTS}."
    return None


def distillation_claim(metrics: dict, equal: str, lacking: tuple[str, str] | None) -> Claim:
    """The claim for a teacher that is there already, whose cost is sunk, against the strongest control of the same
    tokens; or for one that has to be trained, against the student's shape trained for the cost of both.

    The ratio of losses alone flatters: a student that never met the teacher keeps most of it too.
    """
    evaluated, temperature = metrics["evaluate"], metrics["distill"].get("temperature")
    models, compared = evaluated["models"], evaluated["comparisons"]["student"]
    share = models["student"]["parameters"] / models["teacher"]["parameters"]
    kept, control = interval_of(compared, "quality_kept"), strongest(controls_of("student", metrics), equal)
    there = equal == SAME_TOKENS
    verdict, why = lacking or distillation_verdict(share, kept, control)
    control_kept = models["teacher"]["bits_per_byte"] / models[control.name]["bits_per_byte"]
    why += f" {strongest_control(control)}, which keeps {percent(control_kept)}."
    if temperature is None:
        why += " The temperature used is not recorded."
    elif temperature != 2:
        why += f" Trained at T = {temperature:g}, not T = 2."
    kind = "teacher already there" if there else "teacher to be trained"
    return Claim(
        name="distillation_teacher_there" if there else "distillation_teacher_trained",
        claim=f"A student of half the size, distilled at T = 2, keeps 90% of the teacher's quality ({kind})",
        measured=f"keeps {percent(kept.value)} with {percent(share)} of the parameters; {control.sentence()}"
        + f"; {beyond_bits(models['student'])}",
        interval=f"kept {between(kept, percent)}; {quality_interval(control, evaluated)}",
        verdict=verdict,
        why=why,
        values={"parameter_share": share, "control_quality_kept": control_kept, "temperature": temperature}
        | _figures("quality_kept", kept)
        | quality_values(control, evaluated),
    )


def distillation_verdict(share: float, kept: Interval, control: Control) -> tuple[str, str]:
    if share > 0.5:
        return NOT_TESTABLE, f"The student has {percent(share)} of the teacher's parameters, not half."
    if kept.high < 0.9:
        return "fails", "Below 90% beyond its interval."
    if kept.low < 0.9:
        return NOT_TESTABLE, "The interval includes 90%: more test documents would settle it."
    if control.outcome == BEATEN:
        return "beaten", "Above 90%, and better than its strongest control beyond the interval."
    return CONTROL_NOT_BEATEN, f"Above 90%, but its strongest control is {standing(control)}."


def strongest_control(control: Control) -> str:
    return f"Strongest control of the {control.equal}: {words(control.name)} ({control.what})"


def standing(control: Control) -> str:
    return "better beyond the interval" if control.outcome == STRONGER else "level with it within the interval"


def beyond_bits(model: dict) -> str:
    """Agreement and calibration, in words."""
    return (
        f"its first choice is the teacher's for {percent(model['agreement_with_teacher'])} of the tokens,"
        f" calibration error {percent(model['calibration_error'])}"
    )


def quality_interval(control: Control, evaluated: dict) -> str:
    return f"lead {control.interval()} bits per byte; {count(evaluated['test']['documents'], 'document')}"


def quality_values(control: Control, evaluated: dict) -> dict:
    own = {"documents": evaluated["test"]["documents"], "control": control.name, "control_outcome": control.outcome}
    return own | _figures("ahead_of_control", control.ahead)


def sparsity_claim(metrics: dict, model: str, lacking: tuple[str, str] | None) -> Claim:
    """What is lost is lost against the dense model, or against the same trained on for the tokens of the recovery,
    whichever is better; and the pruned shape trained from nothing for the same cost must be worse."""
    evaluated, name = metrics["evaluate"], f"sparse_{model}"
    compared = evaluated["comparisons"][name]
    cut, continued = compared["flops_cut"], compared["continued_quality_lost"]
    trained_on = continued < 0
    lost = interval_of(compared, "quality_lost_to_continued" if trained_on else "quality_lost")
    control = strongest(controls_of(name, metrics), SAME_OPERATIONS)
    verdict, why = lacking or sparsity_verdict(cut, lost, control)
    unpruned = "unpruned" if model == "teacher" and is_from_folder(metrics) else "dense"
    why += f" The {unpruned} {model} with the same extra tokens: {signed(continued)} bits per byte"
    why += ", and the loss is against that one." if trained_on else "."
    why += f" {strongest_control(control)}."
    kind = "mixture-of-experts teacher" if model == "teacher" else "dense student"
    if model == "teacher" and is_from_folder(metrics):
        kind = "teacher from a folder"
    return Claim(
        name=f"sparsity_{model}",
        claim=f"Structured sparsity cuts 30–40% of compute for 5–8% of quality ({kind})",
        measured=f"{signed(-cut)} forward FLOPs per token for {signed(lost.value)} bits per byte; {control.sentence()}"
        + f"; {beyond_bits(evaluated['models'][name])}",
        interval=f"lost {between(lost, signed)}; {quality_interval(control, evaluated)}",
        verdict=verdict,
        why=why,
        values={"flops_cut": cut, "continued_quality_lost": continued}
        | _figures("quality_lost", lost)
        | quality_values(control, evaluated),
    )


def sparsity_verdict(cut: float, lost: Interval, control: Control) -> tuple[str, str]:
    if cut < 0.3:
        return NOT_TESTABLE, f"Only {percent(cut)} is cut at these keep ratios, short of the claim's 30%."
    if lost.high <= 0.08:
        if control.outcome != BEATEN:
            return CONTROL_NOT_BEATEN, f"Little is lost, but its strongest control is {standing(control)}."
        verdict = "beaten" if lost.high < 0.05 else "holds"
        return verdict, "Structures left the tensors, nothing is merely zeroed; recovered by distillation."
    if lost.low <= 0.08:
        return NOT_TESTABLE, "The interval includes 8%: more test documents would settle it."
    if cut > 0.4:
        return NOT_TESTABLE, "More than 8% is lost, but more than the claim's 40% was cut."
    return "fails", "More than 8% is lost, beyond the interval."


def checkpointing_claim(policies: list[dict], measured: dict, layers: int) -> Claim:
    """The policy that saves most within 25% more time."""
    claim = "Checkpointing every 4th layer saves 30% of activation memory for 25% more time"
    tried = [row for row in policies if row["policy"] != "none" and row["gradients_equal"]]
    if not tried:
        return Claim("checkpointing", claim, "no policy kept the gradients", "–", "fails", "All were wrong.", {})
    repetitions = min(measured[row["policy"]]["repetitions"] for row in tried)
    slower = {row["policy"]: more_time(measured[row["policy"]]) for row in tried}
    best = best_policy(tried, slower)
    saved, time = best["memory_saved"], slower[best["policy"]]
    why = f"The best of the policies tried, on {layers} layers; its gradients equal those of plain training."
    if repetitions < MIN_REPETITIONS:
        verdict, why = too_few(repetitions)
    elif saved < CHECKPOINTING_SAVES or lower_end(time) > CHECKPOINTING_COSTS:
        verdict = "fails"
    elif upper_end(time) <= CHECKPOINTING_COSTS:
        better = saved > CHECKPOINTING_SAVES and upper_end(time) < CHECKPOINTING_COSTS
        verdict = "beaten" if better else "holds"
    else:
        verdict, why = NOT_TESTABLE, why + " Its interval includes 25% more time: more repetitions would settle it."
    literal = next((row for row in policies if row["policy"] == "every_4"), None)
    why += " One block in four can save at most a quarter of what blocks keep"
    why += f"; here it saves {percent(literal['memory_saved'])}." if literal else "."
    return Claim(
        name="checkpointing",
        claim=claim,
        measured=f"“{policy_words(best['policy'])}”: {signed(-saved)} memory for {signed(time.value)} time",
        interval=f"memory: counted; time {between(time, signed)}; {count(repetitions, 'repetition')}",
        verdict=verdict,
        why=why,
        values={key: best[key] for key in ("policy", "memory_saved", "recomputed_flops_share")}
        | {"repetitions": repetitions},
    )


def too_few(repetitions: int) -> tuple[str, str]:
    return TOO_FEW_REPETITIONS, f"{count(repetitions, 'repetition')}; a verdict needs {MIN_REPETITIONS}."


def best_policy(policies: list[dict], slower: dict[str, Interval]) -> dict:
    """The policy that saves most memory.

    Candidates: policies that save enough and whose whole interval is within the claim's time; else those whose
    interval reaches into that time; else all.
    """

    def within(end: Callable) -> list[dict]:
        return [row for row in policies if end(slower[row["policy"]]) <= CHECKPOINTING_COSTS]

    enough = [row for row in within(upper_end) if row["memory_saved"] >= CHECKPOINTING_SAVES]
    return max(
        enough or within(lower_end) or policies, key=lambda row: (row["memory_saved"], -slower[row["policy"]].value)
    )


def lower_end(interval: Interval) -> float:
    return interval.value if interval.low is None else interval.low


def upper_end(interval: Interval) -> float:
    return interval.value if interval.high is None else interval.high


def more_time(measured: dict) -> Interval:
    """How much longer a policy's step takes than one that stores all."""
    ratio = interval_of(measured, "step_seconds_ratio")
    return Interval(*(None if end is None else end - 1 for end in ratio))


def router_claim(measured: dict) -> Claim:
    claim = "An optimised router takes 1.1 ms in place of 3.2 ms (2.9×)"
    ratio, repetitions = interval_of(measured, "ratio"), measured["repetitions"]
    low, high = lower_end(ratio), upper_end(ratio)
    verdict, why = NOT_TESTABLE, f"The interval includes {number(ROUTER_RATIO)}×: more repetitions would settle it."
    if repetitions < MIN_REPETITIONS:
        verdict, why = too_few(repetitions)
    elif high < ROUTER_RATIO:
        verdict, why = "fails", "Short of it, beyond the interval."
    elif low > ROUTER_RATIO:
        verdict, why = "beaten", "Above it, beyond the interval."
    plain, ours = (number(measured[f"{which}_microseconds"] / 1e3) for which in ("plain", "ours"))
    return Claim(
        name="router",
        claim=claim,
        measured=f"{number(ratio.value)}×: {plain} ms to {ours} ms, from softmax, top-k and one-hot dispatch",
        interval=f"{between(ratio, lambda times: f'{number(times)}×')}; {count(repetitions, 'repetition')}",
        verdict=verdict,
        why=f"{why} {measured['tokens']:,} tokens, {measured['experts_per_token']} of {measured['experts']} "
        f"experts, width {measured['width']}. Only the ratio travels between machines.",
        values={"repetitions": repetitions} | _figures("ratio", ratio),
    )


def claims_as_markdown(claims: list[Claim]) -> str:
    lines = ["| claim in circulation | measured here | 95% interval | verdict |", "| --- | --- | --- | --- |"]
    for claim in claims:
        cells = (claim.claim, claim.measured, claim.interval, f"**{claim.verdict}**. {claim.why}")
        lines.append("| " + " | ".join(cell.strip().replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def interval_of(figures: dict, name: str) -> Any:
    """The figure with its bounds where it has them; None where the figure itself is missing."""
    value = figures.get(name)
    return None if value is None else Interval(value, figures.get(f"{name}_low"), figures.get(f"{name}_high"))


def _figures(name: str, interval: Interval) -> dict:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def between(interval: Interval, form) -> str:
    return "–" if interval.low is None else f"{form(interval.low)} to {form(interval.high)}"
