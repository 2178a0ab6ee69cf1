"""Standard streams that are closed, full or without a reader, and disks and folders that cannot be written to.

    fill_closed_streams()                # before any file is opened
    shield_output()                      # where what is shown is not the work: it goes on without it
    with whole_output(): print(answer)   # where it is: a Refusal
    with disk_refusals("prepare"): ...   # a full disk, a file where a folder is needed
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from stages.files.artifacts import Refusal

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
FOLDER_ERRORS = (errno.EEXIST, errno.ENOTDIR, errno.ELOOP)


def fill_closed_streams() -> None:
    """Opens what cron or a daemon closed: else the next file would take its number, be inherited as such, and receive
    what others print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w" if number else "r")  # takes the lowest free number
            os.set_inheritable(stream.fileno(), stream.fileno() == number)
            setattr(sys, name, stream)


class ShieldedOutput:
    """Standard output for work that goes on when nobody can be shown anything any more; says so once, on stderr."""

    def __init__(self, stream: TextIO):
        self._stream, self._lost = stream, False

    def write(self, text: str) -> int:
        with self._losing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            self._stream.flush()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            drop_output()
            if not self._lost:
                self._lost = True
                line = f"offramp: standard output cannot be written ({error.strerror}): the work goes on without it\n"
                with contextlib.suppress(OSError):
                    sys.stderr.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def shield_output() -> None:
    if not isinstance(sys.stdout, ShieldedOutput):
        sys.stdout = ShieldedOutput(sys.stdout)


@contextlib.contextmanager
def whole_output() -> Iterator[None]:
    """For a command whose answer is all that it does: a Refusal where standard output cannot take it."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # of a file
            raise
        drop_output()
        raise Refusal(f"standard output could not be written ({error.strerror}): the answer is not complete") from None


def drop_output() -> None:
    """Leads descriptor 1 nowhere, so that what is still in Python's buffer ends there and not in an error at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


@contextlib.contextmanager
def disk_refusals(name: str, place: Path) -> Iterator[None]:
    """An error of a disk or a folder, which the user can fix, as a Refusal that says why and where: near `place`."""
    try:
        yield
    except OSError as error:
        at = Path(os.fsdecode(error.filename2 or error.filename)) if error.filename else place
        if error.errno in FOLDER_ERRORS and (reason := obstacle(at)):
            raise Refusal(reason) from None
        if error.errno not in DISK_ERRORS:
            raise
        raise Refusal(f"{name} could not write ({error.strerror}: {at}): fix that and run the command again") from None


def obstacle(path: Path) -> str:
    """What stands in the way of a folder or a file at this path; empty where nothing does."""
    for part in [*reversed(path.parents), path]:
        if part.is_symlink() and not part.exists():
            return f"{part} is a link to {os.readlink(part)}, which is not there: make that folder, or remove the link"
        if part.exists() and not part.is_dir():
            return f"{part} is a file, and a folder is needed there: move it away"
    return ""
