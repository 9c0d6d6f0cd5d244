"""Round trips through both formats are exact to the bit, whatever layout saved the checkpoint and whatever loads it."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.checkpoint.folder import newest
from jetmoe_megatron.convert.from_hf import convert_from_hf
from jetmoe_megatron.convert.to_hf import convert_to_hf
from jetmoe_megatron.convert.verify import compare_tensors
from tests.convert.saved_by_ranks import save_and_load
from tests.ranks import run_ranks
from tests.support import small_run

DATA = {"code": "unused", "prose": "unused"}
# name: (ranks, parallel section, precision)
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "ep2, attention experts sharded, bf16": (2, {"expert": 2, "attention_experts": "sharded"}, "bf16"),
    "tp2 etp2, bf16": (2, {"tensor": 2, "expert_tensor": 2}, "bf16"),
    "dp2, no distributed optimizer": (2, {"distributed_optimizer": False}, "fp32"),
    "dp4": (4, {}, "fp32"),
    "pp2, layers 1 and 3": (2, {"pipeline": 2, "layers_per_stage": [1, 3]}, "fp32"),
    "tp2": (2, {"tensor": 2}, "fp32"),
    "tp2 etp2 dp2": (4, {"tensor": 2, "expert_tensor": 2}, "fp32"),
    "tp2 etp2 ep2, attention experts sharded": (
        4,
        {"tensor": 2, "expert_tensor": 2, "expert": 2, "attention_experts": "sharded"},
        "fp32",
    ),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, "fp32"),
    "pp4": (4, {"pipeline": 4}, "fp32"),
    "ep4": (4, {"expert": 4}, "fp32"),
    "tp2 pp2 vpp2 ep2, bf16": (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}, "bf16"),
    "tp2 ep2 pp2 dp2": (8, {"tensor": 2, "expert": 2, "pipeline": 2}, "fp32"),
}


def run_tree(parallel: dict[str, Any], precision: str) -> dict[str, Any]:
    return small_run(Path("unused"), DATA, model__num_layers=4, parallel=parallel, precision=precision)


@functools.cache
def truth(precision: str) -> Path:
    """The Hugging Face folder that one process leads to, and the checkpoint made of it."""
    folder = Path(tempfile.mkdtemp(prefix="jetmoe-truth-"))
    atexit.register(shutil.rmtree, folder)
    run_ranks(1, save_and_load, run_tree({"distributed_optimizer": False}, precision), str(folder), None)
    convert_to_hf(the_checkpoint(folder), folder / "hf")
    convert_from_hf(folder / "hf", folder / "back")
    return folder


def the_checkpoint(root: Path) -> Path:
    checkpoint = newest(root)
    assert checkpoint
    return checkpoint


@pytest.mark.parametrize(("ranks", "parallel", "precision"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_to_hugging_face_and_back(
    ranks: int, parallel: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    true, tree = truth(precision), run_tree(parallel, precision)
    results = run_ranks(ranks, save_and_load, tree, str(tmp_path), str(true / "back"))
    convert_to_hf(the_checkpoint(tmp_path), tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (true / "hf/model.safetensors").read_bytes()
    compared = [difference for result in results for difference in result]
    assert len(compared) >= 2 + 4 * 11
    for name, difference in compared:
        assert difference == 0, name


def test_hugging_face_to_a_checkpoint_and_back(tmp_path: Path) -> None:
    true = truth("bf16")
    convert_to_hf(true / "back", tmp_path / "hf")
    for file in (true / "hf").iterdir():
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes()
    assert compare_tensors(the_checkpoint(true), true / "back").different == 0
