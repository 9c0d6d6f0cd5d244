"""The benchmark of conversion on a small model: all of it runs, and memory does not grow with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.convert import measure, measure_return, table_of, table_of_return, total_bytes
from jetmoe_megatron.config.schema import Model

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_kv_heads": 2, "kv_channels": 32, "vocab_size": 1000}
LARGE: dict[str, Any] = {"num_layers": 12, "hidden_size": 512, "num_kv_heads": 8, "kv_channels": 64, "vocab_size": 9000}


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = {}
    for name, shape, ffn in (("small", SMALL, 96), ("large", LARGE, 1408)):
        model = Model(ffn_hidden_size=ffn, **shape)
        (tmp_path / name).mkdir()
        rounds = measure(model, tmp_path / name, repeat=1)
        assert table_of(model, rounds).count("\n") == 5
        peaks[name] = rounds[0][1].peak_gb * 1e9
    returned = measure_return(tmp_path / "small")
    assert table_of_return(model, returned).count("\n") == 4
    assert total_bytes(model) > 500e6
    assert peaks["large"] - peaks["small"] < 50e6
