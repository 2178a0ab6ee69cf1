"""What every stage needs to leave files behind: atomic writes, canonical JSON, checksums, and the
one exception (`Refusal`) that means "the user can mend this, and here is how"."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def checkout_root(root):
    """The user's checkout, also where DVC runs the stage in a temporary copy of it."""
    under_dvc = "DVC_STAGE" in os.environ and os.environ.get("DVC_ROOT")
    return Path(under_dvc or root).resolve()


class Refusal(Exception):
    """A mistake the user can mend, told in one line: what is wrong, where, and how to mend it."""


def write_atomically(path, content):
    """Write bytes or text so that a reader sees the old file or the whole new one, never a part."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        os.replace(partial, path)
    except OSError as error:  # a full disk, a read-only folder
        with contextlib.suppress(OSError):
            partial.unlink()
        raise Refusal(f"{path} could not be written ({error.strerror}): mend that and repeat the command") from None


def write_json(path, value):
    """Write canonical JSON: sorted keys, floats of six significant digits, so equal runs give equal bytes."""
    text = json.dumps(_rounded(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def read_json(path):
    """The value in a JSON file; a missing or damaged file is the user's to mend."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"{path} is missing: run the stage that writes it (dvc repro)") from None
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror}): delete it and run dvc repro again") from None
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits, a bottomless list
        raise Refusal(f"{path} is not JSON ({error}): delete it and run dvc repro again") from None


def link_or_copy(source, target):
    """A second name for the file, where the file system has that; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sha256_of(path):
    """Checksum of a file, or of a folder as the checksum of its sorted relative names and contents."""
    path = Path(path)
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(inner for inner in path.rglob("*") if inner.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _rounded(value):
    if isinstance(value, dict):
        return {str(key): _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    if isinstance(value, Path):
        return value.as_posix()
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays, without importing either
        return _rounded(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None  # JSON has no NaN
    return value
