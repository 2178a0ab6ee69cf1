"""The short form of the fault test: the cheap cases of tests/faults.py, once each.

Left to `make chaos`, because each trains again and again or needs a server or root: kills of the whole pipeline,
of a rank and by signals, full and read-only disks, damaged models, metrics and checkpoints, failing MLflow servers.
"""

import pytest

from tests import faults


@pytest.fixture(scope="module")
def bench(tmp_path_factory, finished) -> faults.Bench:
    return faults.Bench(tmp_path_factory.mktemp("faults"), finished=finished)


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (faults.kill9_prepare, {"kills": 1}),
        (faults.damaged_tokenizer, {}),
        (faults.damaged_settings, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_nothing_is_lost_or_silently_wrong(bench, case, how):
    row = faults.run(bench, case, **how)
    assert not row.failure, row.failure
    assert row.tried == row.survived > 0 and row.compared > 0 and row.message
