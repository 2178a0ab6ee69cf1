"""Numbers and names as text for people: in the claims, on the page, on the axes of charts."""

import math


def number(value, digits=3):
    """A number for people: significant digits and an SI suffix, so 12345678 reads 12.3M; None reads –."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * (1 - 0.5 * 10**-digits):  # or 999,999 would read 1000k
            return f"{_plain(value / limit, digits)}{suffix}"
    return _plain(value, digits)


def _plain(value, digits):
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text and abs(value) >= 1 else text


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def signed(share: float) -> str:
    text = f"{100 * share:+.1f}%".replace("-", "−")
    return "0.0%" if text[1:] == "0.0%" else text


def signed_number(value: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:+.4f}".replace("-", "−")
    return "0" if float(text[1:]) == 0 else text


def count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def words(name: str) -> str:
    return name.replace("_", " ")


def policy_words(policy: str) -> str:
    """every_2 recomputes each second block, mlp_4 the MLPs of four blocks."""
    word, _, number = policy.rpartition("_")
    if word == "every":
        return "every block" if number == "1" else f"one block in {number}"
    parts = {"attention": "attention of", "mlp": "MLPs of"}
    return f"{parts[word]} {number} blocks" if word in parts else words(policy)
