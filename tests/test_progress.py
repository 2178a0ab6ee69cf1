"""The lines that a person sees while a fit trains: early, now and then, and with the time that is left."""

import io
import os
import pty

from stages.training.progress import ERASE, ProgressLine


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lines_of(steps=400, seconds_per_step=1.0, first_step=3.0, start=0, validate_every=50):
    """What a log shows of a fit, with the second at which each line came."""
    clock, log = Clock(), io.StringIO()
    line = ProgressLine("teacher", start, steps, first=10, tokens_per_step=100, out=log, clock=clock)
    found, shown = [], 0
    for step in range(start + 1, steps + 1):
        clock.now += first_step if step == start + 1 else seconds_per_step
        line.step(step, loss=5.0, validation=2.0 if step % validate_every == 0 else None)
        fresh = log.getvalue()[shown:]
        shown += len(fresh)
        found += [(clock.now, each) for each in fresh.splitlines()]
    return found


def test_the_first_line_comes_within_seconds_or_steps_and_says_what_is_left():
    assert lines_of()[0] == (5.0, "teacher: step 3/400  loss 5.0000  100 tokens/s  6 min 37 s left")
    assert lines_of(seconds_per_step=0.1, first_step=0.2)[0][1].startswith("teacher: step 10/400 ")
    assert lines_of(seconds_per_step=40, first_step=90)[0][0] == 90


def test_a_log_has_a_line_for_each_validation_and_one_every_half_minute_between():
    times = [at for at, _ in lines_of(validate_every=400)]
    assert times[0] == 5.0 and all(30 <= b - a <= 31 for a, b in zip(times, times[1:-1], strict=False))
    validated = [line for _, line in lines_of() if "validation 2.0000 bits/byte" in line]
    assert len(validated) == 8 and "left" not in validated[-1] and "step 400/400" in validated[-1]


def test_a_first_step_that_takes_minutes_does_not_spoil_what_is_left():
    line = next(line for _, line in lines_of(steps=6000, first_step=120.0) if "step 50/" in line)
    assert "1 h 39 min left" in line


def test_a_resumed_fit_counts_from_where_it_goes_on():
    assert lines_of(start=300)[0][1] == "teacher: step 303/400  loss 5.0000  100 tokens/s  1 min 37 s left"


def test_a_terminal_has_one_line_that_is_written_anew_and_lines_that_stay_for_validations(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    clock = Clock()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb") as screen:
        line = ProgressLine("teacher", 0, 4, first=10, tokens_per_step=100, out=terminal, clock=clock)
        for step in (1, 2, 3, 4):
            clock.now += 1.0
            line.step(step, loss=5.0, validation=2.0 if step == 4 else None)
        line.close()
        text = ""
        while not text.endswith(f"\r\n{ERASE}"):  # a terminal may hand it over in parts
            text += os.read(screen.fileno(), 10_000).decode()
    *states, last = text.split("\r", 3)
    assert [state.removeprefix(ERASE).split("  ")[0] for state in states] == [
        f"teacher: step {step}/4" for step in (1, 2, 3)]
    assert last.startswith(f"{ERASE}teacher: step 4/4") and last.endswith(f"\r\n{ERASE}")


def test_a_reader_that_is_gone_and_a_closed_stream_stop_nothing():
    read, write = os.pipe()
    os.close(read)
    clock = Clock()
    for out in (os.fdopen(write, "w"), None):
        line = ProgressLine("teacher", 0, 4, first=1, tokens_per_step=100, out=out, clock=clock)
        clock.now += 1.0
        line.step(1, loss=5.0)
        line.close()
