"""Files that stages write: atomic writes, exact JSON, checksums; and `Refusal`, the error that a user can fix."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def checkout_root(root: str | Path) -> Path:
    """The user's checkout, also where DVC runs the stage in a temporary copy of it."""
    under_dvc = "DVC_STAGE" in os.environ and os.environ.get("DVC_ROOT")
    return Path(under_dvc or root).resolve()


class Refusal(Exception):
    """An error that the user can fix. Its message is one line: what is wrong, where, and how to fix it."""


def write_atomically(path: str | Path, content: bytes | str) -> None:
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
        raise Refusal(f"{path} could not be written ({error.strerror}): fix that, then run it again") from None


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """For writers that want a path: the one given takes the name at the end, and goes at an error."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON with sorted keys and exact floats: reading it gives equal values. NaN and infinity are refused."""
    try:
        text = json.dumps(value, default=_as_list, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        found = next(_not_finite(json.loads(json.dumps(value, default=_as_list))))
        raise Refusal(
            f"{path} was not written: {found}, and JSON holds finite numbers only. A model that diverged gives this"
            " (lower its learning rate), or a division by zero (please report it)"
        ) from None
    write_atomically(path, text + "\n")


AGAIN = "delete it and run dvc repro again"  # the cure for a damaged file that a stage wrote


def read_json(path: str | Path, cure: str = AGAIN) -> Any:
    """The value in a JSON file; a missing or damaged file is refused by name."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refusal(f"{path} is missing: run the stage that writes it (dvc repro)") from None
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror}): {cure}") from None
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits, lists nested too deep
        raise Refusal(f"{path} is not JSON ({error}): {cure}") from None


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for the file, where the file system has that; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sha256_of(path: str | Path) -> str:
    """Checksum of a file, or of a folder as the checksum of its sorted relative names and contents."""
    path = Path(path)
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for inner in sorted(found for found in path.rglob("*") if found.is_file()):
        digest.update(f"{inner.relative_to(path).as_posix()}\0{sha256_of(inner)}\n".encode())
    return digest.hexdigest()


def rounded(value: Any) -> Any:
    """The figures with floats of six significant digits, for metrics; tensors and arrays become lists."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    if hasattr(value, "tolist"):
        return rounded(value.tolist())
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _as_list(value: Any) -> Any:
    """Of numpy and torch scalars and arrays, without importing either."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} cannot be written as JSON")


def _not_finite(value: Any, name: str = "") -> Iterator[str]:
    """Each number that is NaN or infinite, as "models.student.loss is nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name or 'the value'} is {value}"
    elif isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(inner, f"{name}.{key}" if name else str(key))
