"""Freed memory stays with the process: pages that an iteration faults in, counted by the kernel."""

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from mmdd.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def iterate():  # 112 MB in pieces of many sizes, as an encoder's activations
    held = [torch.ones(n * 2**18) for n in (1, 2, 3, 4, 5, 6, 7) * 4]
    while held:
        held.pop()

print(keep_freed_memory() if sys.argv[1] == "keep" else False)
for _ in range(3):
    iterate()
before = faults()
for _ in range(5):
    iterate()
print((faults() - before) // 5)
"""


def told(what: str, **environment: str) -> tuple[bool, int]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE, what],
        env=ours | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_pages_are_faulted_in_once() -> None:
    kept, faults = told("keep")
    if not kept:
        pytest.skip("not with this C library")
    without, many = told("leave")
    assert not without
    assert faults < 100 <= many  # an iteration fills 28,672 pages of 4 KiB


@pytest.mark.skipif(sys.platform != "linux", reason="an option of glibc")
def test_who_sets_options_is_left_alone() -> None:
    assert told("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] is False
