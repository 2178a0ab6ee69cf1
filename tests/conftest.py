"""What all tests share: one thread per process, no network, no trace of an enclosing DVC or make, tiny settings."""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two cores are shared by ranks and tests
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
for name in ("DVC_STAGE", "DVC_ROOT", "HYDRA_FULL_ERROR", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
from hypothesis import settings as effort  # noqa: E402

from stages.settings import schema as settings  # noqa: E402
from stages.settings.compose import compose  # noqa: E402

# The same examples in every run and no time limit on one: `--hypothesis-profile=default` looks for new ones.
effort.register_profile("same", derandomize=True, deadline=None)
effort.load_profile("same")


@pytest.fixture(scope="session")
def tiny_settings() -> settings.Settings:
    """The real configuration, composed at the scale that is made for tests."""
    return settings.validate(compose(["scale=tiny", "corpus=stdlib"]))


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    """One for each of two ranks, whatever this machine has: bytes depend on a rank's number of threads."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    yield
    os.sched_setaffinity(0, cores)


LONGEST = "test_pipeline.py", "test_tracking_server.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: one that comes last would keep one worker of two waiting."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
