"""A teacher that is there already: the Hugging Face folder that `teacher.path` names, as `config` and `prepare` see it.
For a GGUF file that is the folder beside it, which is made where it is missing or older.

    folder = teacher_folder("models/mine", root)     # refused where it lacks what a teacher needs
    tokenizer = teacher_tokenizer(folder, None)

Of the weights only the headers are read here, and nothing in the folder is executed or unpickled.
"""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.files.artifacts import ROOT, Refusal, read_json, write_json
from stages.files.weight_files import PICKLES, refuse_foreign, weight_files

if TYPE_CHECKING:
    from stages.data.file_tokenizer import FileTokenizer

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
RESTORE = "copy the file to the folder again"
GGUF_SOURCE = ".gguf_source"  # in a folder made of a GGUF file: the state of that file


def teacher_folder(path: str, root: Path) -> Path:
    """The folder, relative to the project's root or absolute."""
    folder = root / Path(path).expanduser()
    if path.endswith(".gguf"):
        folder = _folder_of_gguf(folder, path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        hubs = "; models are not fetched from a hub" if not folder.exists() else ""
        raise Refusal(f"teacher.path: {path} {what} (looked in {root.resolve()}): name the folder of a model{hubs}")
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise Refusal(f"teacher.path: {path} has no {name}: save model and tokenizer there with save_pretrained")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(found.name for pattern in PICKLES for found in folder.glob(pattern))
        cure = "save the model there with save_pretrained"
        why = f"{pickles[0]} may be a pickle, which is never read: {cure}" if pickles else cure
        raise Refusal(f"teacher.path: {path} has no *.safetensors: {why}")
    refuse_foreign(config_of(folder), folder / CONFIG)
    weight_files(folder, RESTORE)
    return folder


def _folder_of_gguf(file: Path, path: str) -> Path:
    """The folder beside the file; another process makes it, as only that needs the packages."""
    folder, mark = file.with_suffix(""), file.with_suffix("") / GGUF_SOURCE
    if not file.is_file():
        raise Refusal(f"teacher.path: {path} does not exist (looked in {file.parent.resolve()})")
    if folder.exists() and not mark.exists():
        raise Refusal(f"teacher.path = {path}: {folder} is there and was not made of it: name that folder, or move it")
    state = [file.stat().st_size, file.stat().st_mtime_ns]
    if not mark.exists() or read_json(mark) != state:
        folder.mkdir(exist_ok=True)
        write_json(mark, None)  # a folder that is half made is made again
        print(f"teacher.path: {path} becomes the folder {folder.name}, in float32", flush=True)
        command = [sys.executable, "-m", "stages.formats.gguf_import", str(file.resolve()), str(folder.resolve())]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise Refusal(f"teacher.path = {path}: {done.stderr.strip().splitlines()[-1]}")
        write_json(mark, state)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG, RESTORE)
    if not isinstance(config, dict):
        raise Refusal(f"{folder / CONFIG} is no mapping: {RESTORE}")
    return config


def teacher_files(folder: Path) -> list[tuple[str, Path]]:
    """By name, all that may be read of it: weights, settings, tokenizer."""
    return sorted((path.name, path) for kind in ("json", "safetensors") for path in folder.glob(f"*.{kind}"))


def refuse_longer(sequence_tokens: int, folder: Path) -> None:
    """Sequences beyond the positions that the teacher was trained on."""
    most = config_of(folder).get("max_position_embeddings")
    if isinstance(most, int) and sequence_tokens > most:
        known = f"max_position_embeddings is {most} in {folder / CONFIG}"
        raise Refusal(f"sequence_tokens = {sequence_tokens}: {known}: set it to that or less")


def teacher_tokenizer(folder: Path, end_of_text: str | None) -> "FileTokenizer":
    """As it is; its vocabulary is that of the embedding, which may be padded."""
    from stages.data.hub_tokenizer import load_hub_tokenizer  # late: the stage `config` needs no tokenizer

    vocab_size = config_of(folder).get("vocab_size")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise Refusal(f"{folder / CONFIG}: vocab_size is {vocab_size!r}, expected a number of tokens")
    return load_hub_tokenizer(folder, vocab_size, end_of_text)
