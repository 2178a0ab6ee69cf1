"""The weights of a Hugging Face folder before they are read: which files there are, what memory they take.

    files = weight_files(folder)           # from the headers alone; a folder that is not whole is refused
    refuse_larger_than_memory(files, folder)

Everything is computed in float32. A file is converted and let go before the next one is read, so that loading takes at
most the model and the largest file. Without torch, whose import costs seconds.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.files.artifacts import AGAIN, Refusal, read_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = "model.safetensors.index.json"  # of a model in several files: which one has which tensor
BYTES_PER_PARAMETER = 4  # float32
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FOREIGN = {  # keys of a config.json that ask for more than its model type says
    "auto_map": "it asks for code from its folder, and none is executed",
    "quantization_config": "its weights are quantised: save the folder dequantised (transformers: dequantize())",
}
LONGEST_HEADER = 1 << 30  # bytes; the format itself allows a tenth of that


@dataclass(frozen=True)
class WeightFiles:
    paths: list[Path]
    map: dict[str, str]  # tensor -> file, as the index says; empty for a single file
    parameters: int  # numbers in all files: a tied head that is stored counts twice
    largest_file_bytes: int

    def path_of(self, tensor: str) -> Path:
        """The file that has it; the first one of a tensor that no index names."""
        return self.paths[0].parent / self.map.get(tensor, self.paths[0].name)

    @property
    def bytes(self) -> int:
        """In memory, once it is loaded."""
        return self.parameters * BYTES_PER_PARAMETER


def weight_files(folder: Path, cure: str = AGAIN) -> WeightFiles:
    """What the folder holds. No weight is read; a missing file, a pickle or a damaged header is refused by name."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        names, weight_map = [WEIGHTS], {}
    else:
        weight_map = _weight_map(folder / INDEX, cure)
        names = sorted(set(weight_map.values()))
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise Refusal(_missing(path))
    parameters = sum(sum(map(math.prod, tensor_shapes(path, cure).values())) for path in paths)
    return WeightFiles(paths, weight_map, parameters, max(path.stat().st_size for path in paths))


def refuse_foreign(config: dict[str, Any], path: Path) -> None:
    """A config.json that asks for what its model type alone does not say; `path` is for the message."""
    for key, cure in FOREIGN.items():
        if config.get(key):
            raise Refusal(f"{path}: {key} is set: {cure}")


def _missing(path: Path) -> str:
    pickles = sorted(found.name for pattern in PICKLES for found in path.parent.glob(pattern))
    if pickles and path.name == WEIGHTS:
        return f"{path} is missing, and {pickles[0]} may be a pickle, which is never read: save it as safetensors"
    if (path.parent / INDEX).exists():
        return f"{path} is missing, which {INDEX} names: copy it again"
    return f"{path} is missing: run the stage that writes it (dvc repro)"


def _weight_map(path: Path, cure: str) -> dict[str, str]:
    index = read_json(path, cure)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise Refusal(f"{path} has no weight_map of tensors to files: restore the file")
    for name in sorted(set(files.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise Refusal(f"{path} names {name!r}, which is no safetensors file of its folder")
    return files


def tensor_shapes(path: Path, cure: str = AGAIN) -> dict[str, list[int]]:
    """The shape of each tensor of a safetensors file, from its header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 0 < length <= min(LONGEST_HEADER, size):
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(file.read(length))
        parts = {name: part for name, part in header.items() if name != "__metadata__"}
        if 8 + length + max((part["data_offsets"][1] for part in parts.values()), default=0) > size:
            raise ValueError("it ends too early")
        if not all(isinstance(number, int) for part in parts.values() for number in part["shape"]):
            raise ValueError("a shape is no list of numbers")
        return {name: part["shape"] for name, part in parts.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"{path} is damaged ({reason}): {cure}") from None


def available_bytes() -> int | None:
    """Memory that a process may take here, as the kernel estimates it; None where nothing tells."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text() for name in ("max", "current"))
        found += [int(limit) - int(used)] if limit.strip() != "max" else []
    except (OSError, ValueError, LookupError):  # no Linux, or no control group
        pass
    return min(found, default=None)


def refuse_larger_than_memory(files: WeightFiles, folder: Path, copies: int = 1, is_saved: bool = False) -> None:
    """`copies`: of as many processes, each of which loads the model; one of them may save it, in a copy of its own."""
    beside = max(files.largest_file_bytes, files.bytes if is_saved else 0)
    available, needed = available_bytes(), copies * files.bytes + beside
    if available is not None and needed > available:
        held = f" in each of {copies} ranks" if copies > 1 else ""
        work = "loading and saving" if is_saved else "loading"
        raise Refusal(
            f"{folder}: {files.parameters:,} parameters take {files.bytes:,} bytes{held}, and {work} them {needed:,} in"
            f" all; {available:,} are free: take a smaller model, a larger machine or fewer ranks (trainer.ranks)"
        )
