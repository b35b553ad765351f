"""Freed memory stays with the process: pages that an iteration faults in, counted by the kernel."""

import os
import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys
from mmdd.allocator import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def iterate():  # 100 MB, as an encoder's activations, given back in the end
    held = [libc.malloc(100_000) for _ in range(1_000)]
    for block in held:
        libc.memset(block, 1, 100_000)
    for block in reversed(held):
        libc.free(block)

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
    assert faults < 1_000 < many  # an iteration fills 24,414 pages of 4 KiB


@pytest.mark.skipif(sys.platform != "linux", reason="an option of glibc")
def test_who_sets_options_is_left_alone() -> None:
    assert told("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] is False
