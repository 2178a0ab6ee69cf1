"""Interleaved repetitions: one of each action per round, so that a busy moment of the machine hits all alike.

Torch and the standard library only, so that the benchmarks run on any machine that has torch.
"""

import contextlib
import ctypes
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median, quantiles

import torch

from stages.run.heap import keep_freed_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Action = Callable[[], object]
_GLIBC_DEFAULTS = {-1: 128 << 10, -2: 128 << 10, -4: 65536}  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """What is freed stays in the heap, as in the ranks, and is given back at the end.

    Not for all that is measured: kept through every group, it came to more than 24 GB.
    """
    keep_freed_memory()
    try:
        yield
    finally:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for parameter, value in _GLIBC_DEFAULTS.items():
                libc.mallopt(parameter, value)
            libc.malloc_trim(0)


@dataclass(frozen=True)
class Ratio:
    """How many times longer one action takes than another: ratio of the medians over all rounds, and the
    quartiles of the ratio within a round."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    seconds: dict[str, list[float]]  # one number per round
    failed: dict[str, str]  # action -> reason, of the actions that could not run

    def __contains__(self, name: str) -> bool:
        return name in self.seconds

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def ratio(self, longer: str, shorter: str) -> Ratio:
        paired = [a / b for a, b in zip(self.seconds[longer], self.seconds[shorter], strict=True)]
        low, _, high = quantiles(paired, n=4, method="inclusive") if len(paired) > 1 else paired * 3
        return Ratio(self.median(longer) / self.median(shorter), low, high)


def interleaved(
    actions: Mapping[str, Action],
    seconds: float,
    least_rounds: int = 3,
    most_rounds: int = 100,
    may_fail: Collection[str] = (),
    warm_up: int = 1,
) -> Timings:
    """Rounds of every action until `seconds` have passed, after `warm_up` untimed ones.

    An action named in `may_fail` (a peer) that raises in the first untimed round is left out and its reason kept.
    """
    taken: dict[str, list[float]] = {name: [] for name in actions}
    failed = {}
    for name, action in actions.items():
        try:
            _seconds(action)
        except Exception as error:  # whatever a peer raises, the others still have their rows
            if name not in may_fail:
                raise
            failed[name] = _reason(error)
            del taken[name]
    for _ in range(warm_up - 1):
        for name in taken:
            actions[name]()
    end = time.perf_counter() + seconds
    for done in range(most_rounds):
        if done >= least_rounds and time.perf_counter() > end:
            break
        # Every other round runs backwards, so that no action always follows the same neighbour.
        for name in list(taken) if done % 2 == 0 else reversed(list(taken)):
            taken[name].append(_seconds(actions[name]))
    return Timings(taken, failed)


def heats_and_final(
    actions: Mapping[str, Action], peers: Collection[str], seconds: float, may_fail: Collection[str], rounds: int = 9
) -> tuple[Timings, str | None]:
    """Few rounds of all tell the quickest of the peers, rounds of its own with all that are no peers how quick it is.

    The quickest of several in few rounds is the luckiest, too: those rounds would flatter it.
    """
    heats = interleaved(actions, seconds, may_fail=may_fail)
    best = min(filter(heats.__contains__, peers), key=heats.median, default=None)
    finalists = {name: actions[name] for name in heats.seconds if name == best or name not in peers}
    return replace(interleaved(finalists, seconds, rounds), failed=heats.failed), best


def one_by_one(
    makers: Mapping[str, Callable[[], Action]], rounds: int, warm_up: int, may_fail: Collection[str] = ()
) -> Timings:
    """Each action made, timed and dropped before the next: for models that do not fit into a GPU beside each other.

    Nobody else uses a GPU that is ours, so no round has to be shared.
    """
    taken, failed = {}, {}
    for name, make in makers.items():
        try:
            taken[name] = _rounds_of(make(), rounds, warm_up)
        except Exception as error:
            if name not in may_fail:
                raise
            failed[name] = _reason(error)
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return Timings(taken, failed)


def _rounds_of(action: Action, rounds: int, warm_up: int) -> list[float]:
    for _ in range(warm_up):
        action()
    return [_seconds(action) for _ in range(rounds)]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _seconds(action: Action) -> float:
    _wait_for_device()
    start = time.perf_counter()
    action()
    _wait_for_device()
    return time.perf_counter() - start


def _wait_for_device() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
