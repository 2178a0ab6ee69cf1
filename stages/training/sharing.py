"""What the ranks of several machines agree on before they train: that their work is the same, and where it stands.

Each machine may have a state folder of its own. Node 0 writes the checkpoints, so a run that continues hands them to
the others first; where all share one folder, nothing is sent.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist

from stages.files.artifacts import Refusal, read_json, sha256_of, write_atomically
from stages.training.checkpoints import Checkpoint
from stages.training.job import Job

CHUNK_BYTES = 2**26  # of a checkpoint, on its way


def share_work(job: Job, device: torch.device) -> None:
    """Called by every rank, at the same time; a Refusal in all of them where the machines have different work."""
    key = re.sub(r"-node\d+$", "", job.state.name)  # of settings, code, inputs, libraries and conditions
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
    bounds = torch.tensor([number, -number], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MIN)
    if bounds[0] != -bounds[1]:
        same = "bring the same checkout, settings and artifacts to each, and the same kind of machine"
        raise Refusal(f"the nodes do not have the same code, settings, data or kind of machine: {same}")
    share_checkpoints(job.state, device)


def share_checkpoints(folder: Path, device: torch.device) -> None:
    """Gives the first rank of every machine the checkpoints of rank zero, and takes away what rank zero has not."""
    first, writes = dist.get_rank() == 0, os.environ["LOCAL_RANK"] == "0"
    if first:
        make_whole(folder)
    here = checkpoints_in(folder) if writes else {}
    known = json.loads(_sent(json.dumps(here).encode() if first else None, device))
    if writes and not first:
        for name in here.keys() - known.keys():
            (folder / name).unlink()
    for name, index in sorted(known.items()):
        wanted = writes and here.get(name) != index
        asked = torch.tensor([int(wanted)], device=device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked.item():
            content = _sent((folder / index["file"]).read_bytes() if first else None, device)
            if wanted and not first:
                write_atomically(folder / index["file"], content)
                write_atomically(folder / name, json.dumps(index))
    dist.all_reduce(torch.zeros(1, device=device))  # nobody reads before all is written


def make_whole(folder: Path) -> None:
    """One file of each checkpoint in parts: the ranks of one machine that was killed have left them."""
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(Refusal):  # a damaged index is as good as none
            saved = read_json(path)
            if isinstance(saved, dict) and "parts" in saved:
                Checkpoint(folder, path.stem).make_whole(saved["step"])


def checkpoints_in(folder: Path) -> dict[str, dict]:
    """The indexes of whole checkpoints (stages/training/checkpoints.py), by their file's name.

    A file that is not as it was written, such as one that was copied by half, does not count: the ranks of that machine
    would begin again while those of the others go on.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            index = json.loads(path.read_text())
            if {"file", "sha256", "step"} <= index.keys() and sha256_of(folder / index["file"]) == index["sha256"]:
                found[path.name] = index
        except (OSError, ValueError, AttributeError, TypeError):
            continue  # a damaged one is as good as none
    return found


def _sent(content: bytes | None, device: torch.device) -> bytes:
    """The bytes of rank zero, in every rank."""
    size = torch.tensor([len(content or b"")], dtype=torch.int64, device=device)
    dist.broadcast(size, 0)
    parts = []
    for start in range(0, int(size.item()), CHUNK_BYTES):
        length = min(CHUNK_BYTES, int(size.item()) - start)
        part = torch.empty(length, dtype=torch.uint8, device=device)
        if content is not None:
            part.copy_(torch.frombuffer(bytearray(content[start : start + length]), dtype=torch.uint8))
        dist.broadcast(part, 0)
        parts.append(part.cpu().numpy().tobytes())
    return b"".join(parts)
