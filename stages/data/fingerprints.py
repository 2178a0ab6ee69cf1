"""Fingerprints of what DVC cannot see, outside the project: the corpus, and a teacher that is there already.

`config` writes them to inputs.json at every `dvc repro`, and `prepare` depends on that file: a corpus with other
bytes, names or files is prepared again, an equal one is not. A file is read only when its size, times or inode have
changed since it was read last; what was read is remembered in .runs/fingerprints.json.
"""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

from stages.data.paths import find_files, library_files
from stages.data.teacher_folder import teacher_files, teacher_folder
from stages.files.artifacts import Refusal, sha256_of, write_atomically

INPUTS = "inputs.json"  # what config writes and prepare depends on
MEMORY = Path(".runs/fingerprints.json")  # of the corpus
TEACHER_MEMORY = Path(".runs/teacher_fingerprints.json")
SETTLED_SECONDS = 2.0  # a file that changed this recently may change again within the same tick of its clock
HUB_SECONDS = 3.0


def corpus_fingerprint(corpus, root: Path, before: dict) -> dict:
    """What identifies the bytes behind the settings of the section `corpus`; `before` is the last one written.

    It holds no path of this machine and no time, so that equal corpora have equal fingerprints everywhere.
    """
    found = {"source": corpus.source}
    if corpus.source == "stdlib":
        return found | {"python": platform.python_version()} | _of_files(library_files(), root)
    if corpus.source == "files":
        return found | _of_files(find_files(corpus.paths, root), root)
    folder = root / Path(corpus.dataset).expanduser()
    if folder.is_dir():
        inside = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
        return found | _of_files(sorted(inside), root)
    found |= {"dataset": corpus.dataset}
    return found | {"revision": _hub_revision(corpus.dataset, before if before.items() >= found.items() else {})}


def teacher_fingerprint(teacher, root: Path) -> dict | None:
    """Of the files behind the section `teacher`; None where the teacher is trained here."""
    if teacher.source == "train":
        return None
    return _of_files(teacher_files(teacher_folder(teacher.path, root)), root, "teacher.path", TEACHER_MEMORY)


def read_inputs(root: Path, of: str = "corpus") -> dict:
    """The fingerprint that was written last; empty where there is none or it is damaged."""
    try:
        return json.loads((root / INPUTS).read_text(encoding="utf-8"))[of]
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def refuse_changed(settings, root: Path) -> None:
    """After the corpus was read: DVC would record what was read under the fingerprint in inputs.json for good."""
    recorded, teacher = read_inputs(root), read_inputs(root, "teacher")
    found = {"corpus": recorded and corpus_fingerprint(settings.corpus, root, recorded) != recorded}
    found["teacher"] = teacher and teacher_fingerprint(settings.teacher, root) != teacher
    for what, is_changed in found.items():
        if is_changed:
            why = "it has changed since; run dvc repro again"
            raise Refusal(f"the {what} is not the one that {INPUTS} describes: {why}")


def _of_files(files: Iterable[tuple[str, Path]], root: Path, of: str = "corpus", memory: Path = MEMORY) -> dict:
    """Number and SHA-256 of these files, by name and content; `of` is for messages, `memory` what was read before."""
    known, kept, count = _load(root / memory), {}, 0
    digest, now = hashlib.sha256(), time.time()
    for name, path in files:
        count += 1
        try:
            stat = path.stat()
            state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            key = os.fsencode(path).decode("utf-8", "backslashreplace")
            sha256 = known[key][1] if key in known and known[key][0] == state else sha256_of(path)
        except OSError as error:
            raise Refusal(f"{of}: {path} cannot be read ({error.strerror}): fix it or leave it out") from None
        if now - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
            kept[key] = [state, sha256]
        digest.update(os.fsencode(name) + f"\0{sha256}\n".encode())
    if kept != known:
        with contextlib.suppress(Refusal):  # remembering only saves time
            write_atomically(root / memory, json.dumps(kept))
    return {"files": count, "sha256": digest.hexdigest()}


def _load(path: Path) -> dict:
    """What was remembered; nothing where it is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return known if all(len(entry) == 2 for entry in known.values()) else {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _hub_revision(dataset: str, before: dict) -> str | None:
    """The commit of a dataset on the hub; the last one known where the hub does not answer."""
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(dataset, timeout=HUB_SECONDS).sha
    except Exception:  # no network, no such package, a private dataset: `prepare` says so where it matters
        return before.get("revision")
