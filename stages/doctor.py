"""Says what is here to run the pipeline with, what is missing, and how to mend it: python -m stages.doctor

The exit code is 1 only where the pipeline itself cannot run; engines and extras that are missing are no fault. It needs
nothing but Python, starts nothing and writes nothing.
"""

import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from urllib.parse import urlsplit

from stages.files.artifacts import ROOT

LEAST_PYTHON = (3, 11)
NEEDED_BYTES = 2 * 10**9  # the default pipeline with its cache takes less
INSTALL = ".venv/bin/pip install -c constraints.txt -e"
APART = "in an environment of its own, as its packages do not go together with the pinned ones"
# What an engine is started with, and how to get it. Those that need nothing more than the pipeline are not here.
PROGRAMS = {
    "slurm": ("sbatch", "run the stage on a login node of the cluster"),
    "skypilot": ("sky", f"pip install skypilot {APART}; rendering needs none of it"),
    "kubernetes": ("kubectl", "install kubectl; rendering needs none of it"),
    "sagemaker": ("aws", f"pip install awscli {APART}; rendering needs none of it"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    name: str
    is_there: bool
    detail: str
    mend: str = ""  # of what is missing
    is_needed: bool = False  # by the pipeline itself

    def __str__(self) -> str:
        state = "there" if self.is_there else "MISSING" if self.is_needed else "missing"
        mend = f"; {self.mend}" if self.mend and not self.is_there else ""
        return f"  {state:8} {self.name:14} {self.detail}{mend}"


def main() -> int:
    if sys.argv[1:]:
        print("offramp: python -m stages.doctor takes no arguments; it looks at everything", file=sys.stderr)
        return 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sections: dict[str, Callable[[], Iterator[Finding]]] = {
        "The pipeline": lambda: pipeline(project["dependencies"]),
        "The machine": machine,
        "Engines (engine=...)": engines,
        "Extras": lambda: extras(project["optional-dependencies"]),
    }
    lacking = []
    for title, findings in sections.items():
        print(title)
        for finding in findings():
            print(finding, flush=True)
            lacking += [finding.name] if finding.is_needed and not finding.is_there else []
    if lacking:
        print(f"The pipeline cannot run here: {', '.join(lacking)}")
        return 1
    print("The pipeline can run here: make repro")
    return 0


def pipeline(dependencies: list[str]) -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = ".".join(map(str, LEAST_PYTHON))
    new_enough = sys.version_info >= LEAST_PYTHON
    yield Finding("Python", new_enough, found, f"{wanted} or newer is needed: make PYTHON=<its path> env", True)
    for pin in dependencies:
        name, _, version = pin.partition("==")
        have = installed(name)
        detail = have or f"{version} is not installed"
        if have and have.partition("+")[0] != version:
            detail = f"{have}; the numbers here were measured with {version}"
        yield Finding(name, bool(have), detail, "make env", True)
    yield program("git", "apt install git; without it: dvc config --local core.no_scm true")
    yield program("dvc", "source .venv/bin/activate, or make env", "dvc command")
    yield compiler()
    yield server(os.environ.get("MLFLOW_TRACKING_URI", ""))


def installed(name: str) -> str:
    """The version of a package; empty where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def program(command: str, mend: str, name: str = "") -> Finding:
    path = shutil.which(command)
    return Finding(name or command, path is not None, path or "not on PATH", mend)


def compiler() -> Finding:
    path = shutil.which("gcc") or shutil.which("clang")
    what = path or "neither gcc nor clang: training on a GPU runs uncompiled and takes half as long again"
    return Finding("compiler", path is not None, what, "apt install gcc")


def server(uri: str) -> Finding:
    """The MLflow server that runs are sent to; it is never waited for."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return Finding("MLflow store", True, "mlflow.db in this folder" if not uri else f"{address.scheme} store")
    name = f"{address.hostname}:{address.port or (443 if address.scheme == 'https' else 80)}"
    try:
        with socket.create_connection((address.hostname or "", int(name.rpartition(":")[2])), timeout=3):
            return Finding("MLflow server", True, name)
    except OSError as error:
        later = "runs are kept, and sent by python -m stages.tracking sync"
        return Finding("MLflow server", False, f"{name} does not answer ({error})", later)


def machine() -> Iterator[Finding]:
    free = shutil.disk_usage(ROOT).free
    room = f"{free / 1e9:,.1f} GB free in {ROOT}"
    yield Finding("disk", free >= NEEDED_BYTES, room, f"make room: {NEEDED_BYTES / 1e9:g} GB are needed", True)
    try:
        import torch

        from stages.model.layers import has_bfloat16
        from stages.run.provenance import cores
    except Exception as error:  # a package is missing, or a library of the system
        reason = " ".join(str(error).split())[:200]
        yield Finding("torch", False, f"cannot be imported ({type(error).__name__}: {reason})", "make env", True)
        return
    yield Finding("cores", True, f"{cores()} that this process may use")
    units = "in the matrix units" if has_bfloat16("cpu") else "not in the matrix units: training takes 32-bit floats"
    yield Finding("bfloat16", has_bfloat16("cpu"), units, "nothing to do; it is slower")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    none = "none, or torch was built without CUDA: training runs on the CPU"
    yield Finding("GPU", bool(names), ", ".join(names) or none, "nothing to do, unless this machine has one")


def engines() -> Iterator[Finding]:
    for name in sorted(path.stem for path in (ROOT / "conf/engine").glob("*.yaml")):
        if name == "ray":
            version = installed("ray")
            yield Finding(name, bool(version), version or "ray is not installed", f"{INSTALL} '.[ray]'")
        elif name in PROGRAMS:
            command, mend = PROGRAMS[name]
            path = shutil.which(command)
            detail = _said(path, "--version") or path if path else f"no {command} here"
            answers = name != "slurm" or not path or "UP" in _said("scontrol", "ping")
            detail += "" if answers else ", and no controller answers"
            yield Finding(name, path is not None and answers, detail, mend)
        else:
            yield Finding(name, True, "needs nothing more than the pipeline")


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        return ""


def extras(optional: dict[str, list[str]]) -> Iterator[Finding]:
    for extra, pins in optional.items():
        names = [pin.partition("==")[0].partition("[")[0] for pin in pins]
        absent = [name for name in names if not installed(name)]
        detail = f"lacks {', '.join(absent)}" if absent else ", ".join(names)
        yield Finding(extra, not absent, detail, f"{INSTALL} '.[{extra}]'")


if __name__ == "__main__":
    sys.exit(main())
