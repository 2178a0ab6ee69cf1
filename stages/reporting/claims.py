"""Published claims beside what was measured: one row each, with figures, their 95% interval and a verdict."""

from collections.abc import Callable
from typing import Any, NamedTuple

from stages.reporting.wording import count, number, percent, policy_words, signed

NOT_TESTABLE = "not testable here"
TOO_SMALL = "too small to claim anything"
TOO_FEW_DOCUMENTS, TOO_FEW_REPETITIONS = "too few documents", "too few repetitions"
# A verdict needs these. With fewer documents a 95% interval misses the true value more than twice as often as it should
# (with 3, in one case of four). Intervals of repetitions are right from 5 on; twice that, because a busy machine
# disturbs neighbouring repetitions alike (benchmarks/coverage.py). A model trained on fewer tokens (scale tiny: 10,240;
# demo: 819,200) has learned very little.
MIN_DOCUMENTS, MIN_REPETITIONS, MIN_TRAINING_TOKENS = 20, 10, 100_000
CHECKPOINTING_SAVES, CHECKPOINTING_COSTS = 0.3, 0.25  # of the activations' memory, and of a step's time
ROUTER_RATIO = 3.2 / 1.1  # milliseconds before and after; only their ratio travels between machines


class Interval(NamedTuple):
    """A figure and the ends of its 95% interval; None where one is not known."""

    value: Any
    low: Any = None
    high: Any = None


class Claim(NamedTuple):
    """A row of the table; `values` are the raw figures behind the words, for claims.json and the tests."""

    name: str
    claim: str
    measured: str
    interval: str
    verdict: str  # beaten | holds | fails | not testable here | too few documents, repetitions | too small
    why: str
    values: dict


def make_claims(metrics: dict, timings: dict) -> list[Claim]:
    """Each published claim beside what was measured."""
    evaluated = metrics["evaluate"]
    lacking = lack_of_evidence(metrics["pretrain"]["tokens"], evaluated["test"]["documents"])
    return [
        distillation_claim(evaluated, metrics["distill"], lacking),
        sparsity_claim(evaluated, "teacher", lacking),
        sparsity_claim(evaluated, "student", lacking),
        checkpointing_claim(evaluated["checkpointing"], timings["checkpointing"]),
        router_claim(timings["router"]),
    ]


def lack_of_evidence(training_tokens: int, documents: int) -> tuple[str, str] | None:
    """The verdict and the reason if there is too little evidence for any other; else None."""
    if training_tokens < MIN_TRAINING_TOKENS:
        needed = f"a verdict needs {MIN_TRAINING_TOKENS:,}."
        return TOO_SMALL, f"The teacher was trained on {training_tokens:,} tokens; {needed}"
    if documents < MIN_DOCUMENTS:
        return TOO_FEW_DOCUMENTS, f"{count(documents, 'document')}; a verdict needs {MIN_DOCUMENTS}."
    return None


def distillation_claim(evaluated: dict, distilled: dict, lacking: tuple[str, str] | None) -> Claim:
    """The ratio of losses alone flatters, so it comes with the control's figure and the share of the gap closed."""
    models, compared = evaluated["models"], evaluated["comparisons"]["student"]
    share = models["student"]["parameters"] / models["teacher"]["parameters"]
    kept, gap = interval_of(compared, "quality_kept"), interval_of(compared, "gap_closed")
    control, temperature = compared["control_quality_kept"], distilled.get("temperature")
    verdict, why = lacking or distillation_verdict(share, kept, gap, control)
    if temperature is None:
        why += " The temperature used is not recorded."
    elif temperature != 2:
        why += f" Trained at T = {temperature:g}, not T = 2."
    if distilled.get("copied_from_teacher"):
        why += " The student also starts from the teacher's weights, the control at random."
    if gap is None:
        closed = f"gap closed not stated: {compared['gap_closed_reason']}"
    else:
        closed = f"{percent(gap.value)} of the gap closed"
    documents = evaluated["test"]["documents"]
    values = {"parameter_share": share, "control_quality_kept": control, "documents": documents}
    values |= {"temperature": temperature}
    return Claim(
        name="distillation",
        claim="A student of half the size, distilled at T = 2, keeps 90% of the teacher's quality",
        measured=f"keeps {percent(kept.value)} with {percent(share)} of the parameters; {closed}",
        interval=f"kept {between(kept, percent)}"
        + (f"; gap {between(gap, percent)}" if gap else "")
        + f"; {count(documents, 'document')}",
        verdict=verdict,
        why=why,
        values=values | _figures("quality_kept", kept) | _figures("gap_closed", gap or Interval(None)),
    )


def distillation_verdict(share: float, kept: Interval, gap: Interval | None, control: float) -> tuple[str, str]:
    helped = gap is not None and gap.low is not None and gap.low > 0
    if share > 0.5:
        return NOT_TESTABLE, f"The student has {percent(share)} of the teacher's parameters, not half."
    if kept.high < 0.9:
        return "fails", f"Below 90% beyond its interval; the control keeps {percent(control)}."
    if kept.low < 0.9:
        return NOT_TESTABLE, "The interval includes 90%: more test documents would settle it."
    why = f"But 90% alone says little: the control, trained without the teacher, keeps {percent(control)}."
    if gap is not None and not helped:
        why += " The student is not better than it beyond the interval."
    return ("beaten" if helped else "holds"), why


def sparsity_claim(evaluated: dict, model: str, lacking: tuple[str, str] | None) -> Claim:
    compared = evaluated["comparisons"][f"sparse_{model}"]
    cut, lost = compared["flops_cut"], interval_of(compared, "quality_lost")
    continued, documents = compared["continued_quality_lost"], evaluated["test"]["documents"]
    verdict, why = lacking or sparsity_verdict(cut, lost)
    kind = "mixture-of-experts teacher" if model == "teacher" else "dense student"
    return Claim(
        name=f"sparsity_{model}",
        claim=f"Structured sparsity cuts 30–40% of compute for 5–8% of quality ({kind})",
        measured=f"{signed(-cut)} forward FLOPs per token for {signed(lost.value)} bits per byte",
        interval=f"{between(lost, signed)}; {count(documents, 'document')}",
        verdict=verdict,
        why=f"{why} The dense {model} with the same extra tokens: {signed(continued)} bits per byte.",
        values={"flops_cut": cut, "continued_quality_lost": continued, "documents": documents}
        | _figures("quality_lost", lost),
    )


def sparsity_verdict(cut: float, lost: Interval) -> tuple[str, str]:
    if cut < 0.3:
        return NOT_TESTABLE, f"Only {percent(cut)} is cut at these keep ratios, short of the claim's 30%."
    if lost.high <= 0.08:
        verdict = "beaten" if lost.high < 0.05 else "holds"
        return verdict, "Structures left the tensors, nothing is merely zeroed; recovered by distillation."
    if lost.low <= 0.08:
        return NOT_TESTABLE, "The interval includes 8%: more test documents would settle it."
    if cut > 0.4:
        return NOT_TESTABLE, "More than 8% is lost, but more than the claim's 40% was cut."
    return "fails", "More than 8% is lost, beyond the interval."


def checkpointing_claim(policies: list[dict], measured: dict) -> Claim:
    """The policy that saves most within 25% more time."""
    claim = "Checkpointing every 4th layer saves 30% of activation memory for 25% more time"
    tried = [row for row in policies if row["policy"] != "none" and row["gradients_equal"]]
    if not tried:
        return Claim("checkpointing", claim, "no policy kept the gradients", "–", "fails", "All were wrong.", {})
    repetitions = min(measured[row["policy"]]["repetitions"] for row in tried)
    slower = {row["policy"]: more_time(measured[row["policy"]]) for row in tried}
    best = best_policy(tried, slower)
    saved, time = best["memory_saved"], slower[best["policy"]]
    why = "The best of the policies tried; its gradients equal those of plain training."
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


def interval_of(figures: dict, name: str):
    """The figure with its bounds where it has them; None where the figure itself is missing."""
    value = figures.get(name)
    return None if value is None else Interval(value, figures.get(f"{name}_low"), figures.get(f"{name}_high"))


def _figures(name: str, interval: Interval) -> dict:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def between(interval: Interval, form) -> str:
    return "–" if interval.low is None else f"{form(interval.low)} to {form(interval.high)}"
