"""Sends the records of runs to MLflow, or lists what waits.

    python -m stages.tracking status                        # what waits to be sent, and why
    python -m stages.tracking sync                          # everything that no store has seen whole
    python -m stages.tracking sync .runs/tracking/<run>     # this run, to the store of MLFLOW_TRACKING_URI
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from stages.files.artifacts import ROOT, Refusal
from stages.files.streams import fill_closed_streams, obstacle, whole_output
from stages.tracking.records import (
    ALL_SENT,
    FAILURE,
    RECORDS,
    await_mirrors,
    is_alive,
    mirroring,
    read_lines,
    read_sent,
    unsent,
)


def _print_status(root):
    """What waits, how much of it any store has, and why the last mirror did not send it."""
    waiting = unsent(root)
    for folder in waiting:
        events = read_lines(folder / "events.jsonl")
        running = is_alive(folder)
        end = "running" if running else events[-1].get("status", "KILLED") if events else "KILLED"
        sent = max([state["events"] for state in read_sent(folder).values()], default=0)
        print(f"{RECORDS / folder.name}  {end}  {sent} of {len(events)} events sent")
    print(f"{len(waiting)} runs wait to be sent: python -m stages.tracking sync" if waiting else ALL_SENT)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        print(f"last failure: {(root / FAILURE).read_text(encoding='utf-8')}")


def main(words):
    """`sync [folder]`, `status`; `--mirror` is how a stage calls it: its own run first, then the backlog."""
    fill_closed_streams()
    parser = argparse.ArgumentParser(
        prog="python -m stages.tracking", description="Sends the records of runs to MLflow, or lists what waits.")
    parser.add_argument("command", choices=["sync", "status"])
    parser.add_argument("folder", nargs="?", type=Path, help="a record to send; default: all unsent")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--mirror", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(words)
    root, folder = options.root.resolve(), options.folder and options.folder.resolve()
    if reason := obstacle(root / RECORDS / "any"):
        raise Refusal(reason)
    if options.command == "status":
        return _print_status(root)
    if folder and not (folder / "events.jsonl").exists():
        parser.error(f"{folder} holds no events.jsonl: name a folder under {RECORDS}")
    if options.mirror:
        return _mirror(root, folder)
    code = _sync(root, folder)
    await_mirrors(root)
    return code


def _sync(root, folder):
    if not folder and not unsent(root):
        print(ALL_SENT)
        return 0
    from stages.tracking import mirror  # MLflow takes two seconds to import, and no stage pays for it

    return mirror.send(root, folder, backlog=not folder)


def _mirror(root, folder):
    if hasattr(os, "nice"):
        os.nice(10)  # training goes first
    with mirroring(folder):
        from stages.tracking import mirror

        return mirror.follow(root, folder)


if __name__ == "__main__":
    try:
        with whole_output():
            code = main(sys.argv[1:])
        sys.exit(code)
    except Refusal as refusal:
        sys.exit(f"offramp: {refusal}")
