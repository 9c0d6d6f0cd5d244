"""A process requests each page of memory from the kernel only once."""

from __future__ import annotations

import ctypes
import sys

import pytest

from tests.support import command

PROGRAM = """
import resource, sys, torch
from jetmoe_megatron.runtime.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touch():
    for _ in range(10):
        torch.ones(2**24)

if sys.argv[1] == "keep":
    keep_freed_memory()
touch()
before = faults()
touch()
print(faults() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_freed_tensor_is_filled_again_without_page_faults() -> None:
    asked = {how: int(command(sys.executable, "-c", PROGRAM, how).stdout) for how in ("keep", "free")}
    assert asked["keep"] < 100 < asked["free"]
