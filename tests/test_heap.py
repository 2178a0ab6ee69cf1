"""Keeping what a training step frees."""

import subprocess
import sys

import pytest

from stages.files.artifacts import ROOT

FAULTS_OF_LATER_STEPS = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from stages.run.heap import keep_freed_memory
    keep_freed_memory()
if sys.argv[1] == "given back":
    from benchmarks.timing import kept_memory
    with kept_memory():
        torch.ones(1 << 24)
for step in range(24):
    if step == 20:  # until then the heap takes its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS_OF_LATER_STEPS, how]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="told to glibc only")
def test_memory_that_a_step_freed_is_not_faulted_in_again():
    assert faults("kept") < 100 < faults("as it is")


@pytest.mark.skipif(sys.platform != "linux", reason="told to glibc only")
def test_a_benchmark_that_kept_memory_leaves_the_next_as_it_was():
    assert faults("given back") > 100
