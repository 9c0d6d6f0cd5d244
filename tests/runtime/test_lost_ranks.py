"""A rank that has lost the others ends, even if nothing answers. Their names: tests/training/test_rank_dies.py."""

from __future__ import annotations

import sys

from tests.support import command

CUT_OFF = """
import time, types
import torch
from jetmoe_megatron.runtime import lost_ranks
from jetmoe_megatron.runtime.device import process_group

lost_ranks.STORE_ANSWERS = 1.0
with process_group():
    silent = types.SimpleNamespace(set=lambda *a: None, add=lambda *a: 1, check=lambda *a: time.sleep(100))
    torch.distributed.distributed_c10d._get_default_store = lambda: silent
    lost_ranks.name_lost_ranks(RuntimeError("Timed out waiting 60000ms for recv operation. gloo/x.cc"))
"""


def test_a_rendezvous_behind_a_cut_network() -> None:
    ended = command(sys.executable, "-c", CUT_OFF, timeout=60)
    assert ended.returncode == 4, ended.stderr
    assert "lost the other nodes, and the rendezvous too: Timed out waiting 60000ms" in ended.stderr
