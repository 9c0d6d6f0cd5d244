"""The files, byte by byte: equal to those of the safetensors library, and to what is published of JetMoE-8B."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from jetmoe_megatron.config.schema import Model
from jetmoe_megatron.convert.hf_names import weights
from jetmoe_megatron.convert.safetensors_file import index_json, split_into_shards
from jetmoe_megatron.convert.to_hf import convert_to_hf
from tests.convert.conftest import Saved
from tests.support import REPO

# The four files of jetmoe/jetmoe-8b, and its index of 23.5 kB.
RELEASED = [4_879_573_992, 4_933_084_288, 4_933_084_344, 2_298_765_576]


def test_jetmoe_8b_has_the_published_names_and_sizes() -> None:
    model = Model.model_validate(yaml.safe_load((REPO / "configs/models/jetmoe_8b.yaml").read_text()))
    shards = split_into_shards(weights(model), torch.bfloat16, 5 * 10**9)
    assert [shard.nbytes for shard in shards] == RELEASED
    assert [shard.file for shard in shards] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    index = index_json(shards, torch.bfloat16)
    assert len(index) == 23_472
    content = json.loads(index)
    assert len(content["weight_map"]) == 266
    assert content["metadata"] == {"total_size": 17_044_475_904}
    assert content["weight_map"]["model.layers.6.mlp.input_linear.weight"] == shards[0].file
    assert content["weight_map"]["model.layers.6.mlp.output_linear.weight"] == shards[1].file


def test_a_file_is_what_the_library_writes(saved: Saved, tmp_path: Path) -> None:
    for dtype in ("fp32", "bf16"):
        convert_to_hf(saved.checkpoint, tmp_path / dtype, dtype, shard_bytes=60_000)
        files = sorted((tmp_path / dtype).glob("*.safetensors"))
        assert len(files) > 2
        for file in files:
            save_file(load_file(file), tmp_path / "library", metadata={"format": "pt"})
            assert file.read_bytes() == (tmp_path / "library").read_bytes(), file.name
        index = json.loads((tmp_path / dtype / "model.safetensors.index.json").read_text())
        assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
