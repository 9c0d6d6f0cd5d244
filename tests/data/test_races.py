"""A rank that looks late sees the cache in another state than the first rank did, and reads the same."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from jetmoe_megatron.config import Run
from tests.ranks import run_ranks
from tests.support import small_run


def read_late(folder: str, data: dict[str, str]) -> list[int]:
    """Rank 1 takes its time before it looks at the cache."""
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples
    from jetmoe_megatron.data.sequences import Sequences
    from jetmoe_megatron.runtime.device import process_group

    run = Run.model_validate(small_run(Path(folder), data))
    with process_group():
        if os.environ["RANK"] == "1":
            look = Sequences.missing

            def late(sequences: Sequences, epochs: range) -> Iterator[int]:
                time.sleep(0.5)
                return look(sequences, epochs)

            patch.object(Sequences, "missing", late).start()
        samples = RunSamples(run, IndexCache(Path(folder) / "cache"))
        return samples[63]["tokens"].tolist()


def test_a_late_rank(tmp_path: Path, data: dict[str, str]) -> None:
    first, second = run_ranks(2, read_late, str(tmp_path), data, timeout=60)
    assert first == second
