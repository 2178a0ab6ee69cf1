"""What the bytes of an out depend on: recorded in provenance/<stage>.json by every stage that DVC runs, and of all
stages together in provenance.json, which git keeps.

The conditions (versions, processor, accelerator, ranks, threads, precision), the checksums of what was asked for,
read and written, and the headline metrics. No clock, host, path or process id: equal runs leave equal records.
`stages.run.compare` sets a record beside that of another commit or machine.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import yaml

from stages.files.artifacts import read_json, sha256_of
from stages.settings.reading import picked

PACKAGES = ("torch", "lightning", "numpy", "tokenizers", "safetensors")
# Instruction sets that torch, oneDNN, MKL and OpenBLAS choose their kernels by, as /proc/cpuinfo spells them.
INSTRUCTIONS = {
    "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "asimddp", "bf16", "i8mm",
    "sve", "sve2", "svebf16",
}  # fmt: skip
# Variables with which a user chooses other kernels.
SWITCHES = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE",
    "NPY_DISABLE_CPU_FEATURES", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NCCL_PROTO",
)  # fmt: skip
RECORDS = "provenance.json"  # of all stages
TIMED = ("measurements/", "report/")  # outs that hold timings
HEADLINES = ("bits_per_byte", "bytes_per_token", "quality_kept")


def is_recorded(stage: str, root: Path) -> bool:
    """Does this stage leave a record? Of the report's outs, which hold timings, no two runs make the same bytes."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    return record_path(stage) in _outs(stages[stage])


def record(stage: str, own: dict[str, dict], root: Path) -> dict:
    """What made the outs that now stand under `root`; `own` are the conditions and inputs that only the stage knows."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    entry, metrics = stages[stage], root / "metrics" / f"{stage}.json"
    read = filter(is_reproducible, _paths(entry, "deps"))  # a reproducible out does not depend on timings
    return {
        "conditions": machine_conditions() | own.get("conditions", {}),
        "recipe": recipe(stage, stages, root),
        "inputs": own.get("inputs", {}) | _checksums(read, root, code=False),
        "outs": _checksums(filter(is_reproducible, set(_outs(entry)) - {record_path(stage)}), root, code=False),
        "metrics": headlines(read_json(metrics)) if metrics.exists() else {},
    }


def is_reproducible(out: str) -> bool:
    """Are the bytes of this out the same in every run under the same conditions? All are, but for timings."""
    return not out.startswith(TIMED)


def record_path(stage: str) -> str:
    return f"provenance/{stage}.json"


# ---- conditions


def machine_conditions() -> dict:
    """Versions and the processor, without importing any of the packages."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    cpuinfo = Path("/proc/cpuinfo")
    found |= processor(cpuinfo.read_text() if cpuinfo.exists() else "")
    return found | {name: os.environ[name] for name in SWITCHES if name in os.environ}


def processor(cpuinfo: str) -> dict[str, str]:
    """Maker, family, model and instruction sets of the first core in the text of /proc/cpuinfo."""
    first = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    core = {name.strip(): value.strip() for name, value in first.items()}
    names = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU architecture", "CPU part")  # x86, then ARM
    kind = " ".join(f"{name.split()[-1]} {core[name]}" for name in names if name in core)
    flags = set(core.get("flags", core.get("Features", "")).split())
    return {
        "processor": kind.removeprefix("vendor_id ") or platform.processor() or platform.machine(),
        "instructions": " ".join(sorted(flags & INSTRUCTIONS)),
    }


def cores() -> int:
    """That this process may use; a thread each, whatever OMP_NUM_THREADS says, since bytes depend on it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_conditions(gpus: int) -> dict:
    """What torch computes on: so many GPUs, or the processor where there are none."""
    import torch

    found = {"cpu_kernels": torch.backends.cpu.get_cpu_capability()}
    if not gpus:
        return found | {"accelerator": "none"}
    names = Counter(torch.cuda.get_device_name(index) for index in range(gpus))
    return found | {
        "accelerator": ", ".join(f"{count} x {name}" for name, count in sorted(names.items())),
        "cuda": torch.version.cuda or f"rocm {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


# ---- what was asked for, read and written


def recipe(stage: str, stages: dict, root: Path) -> str:
    """Hash of the settings and the code of a stage and of all stages that it builds on."""
    settings = yaml.safe_load((root / "resolved.yaml").read_text(encoding="utf-8"))
    chain = [stages[name] for name in sorted(_chain(stage, stages))]
    deps = {path for entry in chain for path in _paths(entry, "deps")}
    sections = {name for entry in chain for params in entry["params"] for name in params["resolved.yaml"]}
    asked = [_checksums(deps, root, code=True), picked(settings, sorted(sections))]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _chain(stage: str, stages: dict) -> set[str]:
    makers = {path: name for name, entry in stages.items() if "params" in entry for path in _outs(entry)}  # not config
    chain, waiting = set(), [stage]
    while waiting:
        name = waiting.pop()
        chain.add(name)
        for path in _paths(stages[name], "deps"):
            parents = [path, *(parent.as_posix() for parent in Path(path).parents)]
            waiting += [makers[p] for p in parents if p in makers and makers[p] not in chain]
    return chain


def _paths(entry: dict, kind: str) -> list[str]:
    return [next(iter(item)) if isinstance(item, dict) else item for item in entry.get(kind, [])]


def _outs(entry: dict) -> list[str]:
    return _paths(entry, "outs") + _paths(entry, "metrics")


def _checksums(paths: Iterable[str], root: Path, code: bool) -> dict[str, str]:
    """Of the code or of the data among the paths. One that is missing is DVC's to refuse."""
    chosen = [path for path in paths if path.startswith("stages/") == code and (root / path).exists()]
    return {path: _code_of(root / path) if code else sha256_of(root / path) for path in chosen}


def _code_of(path: Path) -> str:
    """Checksum of a module, or of the modules of a folder without what Python caches there."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)}\n" for file in files).encode()).hexdigest()


def headlines(metrics: dict, prefix: str = "") -> dict[str, float]:
    """The figures that a person compares runs by, under dotted names."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= headlines(value, f"{prefix}{name}.")
        elif name.endswith(HEADLINES) and isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = value
    return found
