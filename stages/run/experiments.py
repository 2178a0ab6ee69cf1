"""`dvc exp run -S` writes into params.yaml before any stage runs. A refusal takes that back."""

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from stages.files.artifacts import write_atomically

ACCEPTED = Path(".runs/accepted")  # copies of the files, as the last `dvc repro` accepted them


def remember_accepted(root: Path) -> None:
    """Keeps params.yaml: the user may have edited it after the last commit."""
    (root / ACCEPTED).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / "params.yaml", root / ACCEPTED / "params.yaml")


def undo_set_params(root: Path) -> str:
    """Gives the files that -S changed back as they were, and says so; it says, too, where that is not certain.

    Certain is: the same -S on the committed or the last accepted file gives, byte for byte, what stands there now.
    """
    said = []
    for name, overrides in _set_params().items():
        now = (root / name).read_bytes()
        before = next((each for each in _candidates(root, name) if _after(each, overrides, Path(name)) == now), None)
        if before is None:
            said.append(f"{name} keeps what -S wrote: edit it")
        else:
            write_atomically(root / name, before)
            said.append(f"{name} is as it was before -S")
    return "; ".join(said)


def _set_params() -> dict[str, list[str]]:
    """The overrides by file of the `dvc exp run` that runs this process."""
    import psutil  # DVC's own dependency
    from dvc.cli.parser import get_main_parser
    from dvc.utils.cli_parse import to_path_overrides

    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            words = process.cmdline()
            for index, pair in enumerate(zip(words, words[1:], strict=False)):
                if pair in (("exp", "run"), ("experiments", "run")):
                    return to_path_overrides(get_main_parser().parse_args(words[index:]).set_param or [])
    return {}


def _candidates(root: Path, name: str) -> list[bytes]:
    committed = subprocess.run(["git", "-C", str(root), "show", f"HEAD:./{name}"], capture_output=True)
    found = [committed.stdout] if committed.returncode == 0 else []
    accepted = root / ACCEPTED / name
    return [*found, accepted.read_bytes()] if accepted.exists() else found


def _after(before: bytes, overrides: list[str], name: Path) -> bytes:
    from dvc.utils.hydra import apply_overrides

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name.name
        copy.write_bytes(before)
        with contextlib.suppress(Exception):  # this file does not take them: it is not what stood there
            apply_overrides(copy, overrides)
        return copy.read_bytes()
