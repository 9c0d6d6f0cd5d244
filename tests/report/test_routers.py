"""Loads of experts: measures, codes of the heatmap, and records that are not as they should be."""

from __future__ import annotations

import base64
import math
from pathlib import Path

import numpy as np
import pytest

from jetmoe_megatron.report.colours import LOADS, PALETTE
from jetmoe_megatron.report.routers import DEAD, LEAST, MOST, NO_NUMBER, Heatmap, Routers, codes_of, evenness, load_of
from tests.report.run_folders import router_record, write_lines


def decoded(heatmap: Heatmap) -> np.ndarray:
    """Rows of (layer, expert), and columns."""
    flat = np.frombuffer(base64.b64decode(heatmap.codes()), np.uint8)
    return flat.reshape(math.prod(heatmap.shape), len(heatmap.tokens))


def test_evenness() -> None:
    load_LE = np.array([[1.0, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0], [1.5, 1.5, 0.5, 0.5]])
    found = {name: values.tolist() for name, values in evenness(load_LE).items()}
    entropy = -(0.75 * math.log2(0.375) + 0.25 * math.log2(0.125)) / 2
    assert found["load_entropy"] == pytest.approx([1, 0, 0.5, entropy])
    assert found["max_load"] == pytest.approx([1, 4, 2, 1.5])
    assert found["min_load"] == pytest.approx([1, 0, 0, 0.5])
    assert found["load_variation"] == pytest.approx([0, math.sqrt(3), 1, 0.5])


def test_codes_of_loads() -> None:
    loads = np.array([0.125, 0.25, 0.7, 1.0, 1.3, 2.0, 8.0])
    codes = codes_of(loads, loads <= 0)
    assert [load_of(code) for code in codes] == pytest.approx(loads.tolist(), rel=0.01)
    assert codes[0] == LEAST and codes[3] == 127 and codes[-1] == MOST
    special = np.array([0.0, math.nan, 1e-9, 1e9])
    assert codes_of(special, special <= 0).tolist() == [DEAD, NO_NUMBER, LEAST, MOST]
    assert len(PALETTE) == len(LOADS) == 256 and LOADS[127] == "load 1"
    assert PALETTE[DEAD] not in PALETTE[LEAST:] and PALETTE[NO_NUMBER] not in PALETTE[:NO_NUMBER]


def test_a_column_is_the_mean_of_its_records_and_shows_who_was_dead() -> None:
    heatmap = Heatmap(np.ones((1, 2)), most_cells=8)  # 4 columns
    for number in range(1, 9):
        first = {3: 0.0, 5: 0.5}.get(number, 1.0)
        heatmap.add(number, np.array([[first, 2 - first]]), steps=3 if number == 5 else 1)
    assert heatmap.tokens == [2, 4, 6, 8] and heatmap.last_LE.tolist() == [[1, 1]]
    codes = decoded(heatmap)
    assert codes[0, 1] == DEAD and codes[1, 1] == codes_of(np.array([1.5]), np.array([False]))[0]
    assert load_of(codes[0, 2]) == pytest.approx((3 * 0.5 + 1) / 4, rel=0.01)
    assert load_of(codes[0, 0]) == load_of(codes[1, 3]) == 1


def test_records(tmp_path: Path) -> None:
    path = tmp_path / "routers.jsonl"
    uneven = [[0.5, 1.5, 1, 1], [0, 0, 4, 0]]
    write_lines(path, [router_record(2), router_record(4, moe_load=uneven)])
    routers = Routers.read(path)
    assert routers and routers.curves.steps == [2, 4] and set(routers.heatmaps) == {"moa", "moe"}
    worst, best = math.sqrt(3), math.sqrt(0.125)
    variation = routers.curves.dump("moe_load_variation")  # over layers
    assert variation["mean"] == pytest.approx([0, (worst + best) / 2])
    assert variation["low"] == pytest.approx([0, best]) and variation["high"] == pytest.approx([0, worst])
    assert routers.curves.dump("moa_gate_entropy") == {"mean": [0.55, 0.55], "low": [0.5, 0.5], "high": [0.6, 0.6]}
    assert decoded(routers.heatmaps["moe"])[:, 1].tolist()[4:] == [DEAD, DEAD, 211, DEAD]


def test_records_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "routers.jsonl"
    assert Routers.read(path) is None
    write_lines(path, [{"step": 1, "tokens": 1}])
    assert Routers.read(path) is None
    bad: list[object] = [
        [[1.0], [1, 2]],
        [[1.0] * 3] * 2,
        "x",
        None,
        [1.0],
        [],
        [[]],
        [[None] * 4] * 2,
        [[10**400] * 4] * 2,
    ]
    lines = [router_record(1)] + [router_record(step, moa_load=load) for step, load in enumerate(bad, start=2)]
    write_lines(path, [*lines, router_record(50, moa_load=[[math.nan] * 4] * 2, steps=0)])
    routers = Routers.read(path)
    assert routers and len(routers.heatmaps["moe"].tokens) == len(lines) + 1
    codes = decoded(routers.heatmaps["moa"])
    assert codes[:, 0].tolist() == [127] * 8 and (codes[:, -1] == NO_NUMBER).all()
