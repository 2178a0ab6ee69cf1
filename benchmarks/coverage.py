"""How often a 95% bootstrap interval holds the truth, by the number of documents or of repetitions behind it.

    python -m benchmarks.coverage        # two minutes on one core

Behind the minimum numbers in stages/claims.py. Documents: sizes lognormal, as spread as the files of Python's standard
library (a standard deviation of 1.5 in logarithms, of 200 bytes to 100 kB); a document's difficulty and its own
ratio of the two models vary, the ratio more in short documents. Repetitions: ratios of times with one in ten disturbed.

Shapes: T trials, R resamples, N documents or repetitions.
"""

import numpy as np

TRIALS, RESAMPLES, TRUE_DOCUMENTS = 2000, 1000, 2_000_000
NUMBERS = (3, 5, 10, 15, 20, 30, 50)


def documents(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats of two models on each document."""
    sizes_N = np.clip(generator.lognormal(9, 1.5, n), 200, 100_000)
    first_N = sizes_N * generator.lognormal(0, 0.2, n)
    spread_N = 0.03 * (sizes_N / 8000) ** -0.25
    return first_N, first_N * 1.03 * np.exp(spread_N * generator.standard_normal(n))


def repetitions(generator: np.random.Generator, n: int) -> np.ndarray:
    ratios_N = 1.2 * np.exp(0.04 * generator.standard_normal(n))
    return ratios_N * np.where(generator.random(n) < 0.1, generator.lognormal(0.1, 0.2, n), 1)


def coverage_of_documents(generator: np.random.Generator, n: int, truth: float) -> float:
    held = 0
    for _ in range(TRIALS):
        first_N, second_N = documents(generator, n)
        drawn_RN = generator.integers(0, n, (RESAMPLES, n))
        low, high = np.quantile(second_N[drawn_RN].sum(1) / first_N[drawn_RN].sum(1), [0.025, 0.975])
        held += low <= truth <= high
    return held / TRIALS


def coverage_of_repetitions(generator: np.random.Generator, n: int, truth: float) -> float:
    held = 0
    for _ in range(TRIALS):
        ratios_N = repetitions(generator, n)
        low, high = np.quantile(np.median(generator.choice(ratios_N, (RESAMPLES, n)), axis=1), [0.025, 0.975])
        held += low <= truth <= high
    return held / TRIALS


def main() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    first, second = documents(generator, TRUE_DOCUMENTS)
    ratio, median = second.sum() / first.sum(), float(np.median(repetitions(generator, TRUE_DOCUMENTS)))
    print("n   documents   repetitions")
    for n in NUMBERS:
        by_document = coverage_of_documents(generator, n, ratio)
        print(f"{n:<3} {by_document:9.1%} {coverage_of_repetitions(generator, n, median):13.1%}")


if __name__ == "__main__":
    main()
