"""What tracking adds to a stage: `prepare` at scale tiny, by hand, with a server that is not there, against the
same stage with tracking taken out of it."""

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.checkout import checkout, environment
from benchmarks.table import Row
from benchmarks.timing import interleaved

WITHOUT = "without tracking"
WORDS = ("scale=tiny", "corpus=stdlib")
STAGE = "import runpy, sys; sys.argv[1:] = {words}; runpy.run_module('stages.prepare', run_name='__main__')"
NO_TRACKING = (
    "import contextlib; from stages import tracking; "
    "tracking.start_run = lambda **_: contextlib.nullcontext(tracking.Run()); "
)


def stage(root: Path, words: tuple[str, ...], tracking: bool, uri: str) -> None:
    """To the end of its output: what a pipeline or a log collector behind the stage waits for."""
    code = STAGE.format(words=list(words))
    command = [sys.executable, "-c", code if tracking else NO_TRACKING + code]
    subprocess.run(command, cwd=root, env=environment(MLFLOW_TRACKING_URI=uri), check=True, capture_output=True)


def rows(words: tuple[str, ...] = WORDS, seconds: float = 60.0, least_rounds: int = 5) -> Iterator[Row | str]:
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,  # mirrors may still be giving up
        socket.create_server(("127.0.0.1", 0)) as mute,  # takes connections and never answers
        socket.socket() as closed,  # bound and not listening: refuses
    ):
        root = checkout(Path(folder))
        closed.bind(("127.0.0.1", 0))
        uris = {what: f"http://127.0.0.1:{at.getsockname()[1]}"
                for what, at in (("MLflow refuses", closed), ("MLflow never answers", mute))}
        actions = {what: partial(stage, root, words, True, uri) for what, uri in uris.items()}
        actions[WITHOUT] = partial(stage, root, words, False, "")
        times = interleaved(actions, seconds, least_rounds)
    for what in uris:
        ratio = times.ratio(WITHOUT, what)
        yield Row.of("tracking", f"prepare, {what}", times.median(what), WITHOUT, times.median(WITHOUT), "s", ratio,
                     times.rounds)
        added = [a - b for a, b in zip(times.seconds[what], times.seconds[WITHOUT], strict=True)]
        yield f"a stage where {what} takes {median(added):+.2f} s more than without tracking (median of {len(added)})"
