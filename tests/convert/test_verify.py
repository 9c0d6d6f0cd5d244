"""`verify` says whether two models are the same, and where they differ most."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jetmoe_megatron.cli import main
from jetmoe_megatron.convert.to_hf import convert_to_hf
from jetmoe_megatron.convert.verify import compare_logits, compare_tensors
from jetmoe_megatron.errors import UserError
from tests.convert.conftest import ORIGINAL, Saved
from tests.support import command


@pytest.fixture
def exported(saved: Saved, tmp_path: Path) -> Path:
    convert_to_hf(saved.checkpoint, tmp_path / "hf")
    return tmp_path / "hf"


def change(folder: Path, name: str, index: tuple[int, ...], by: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name][index] += by
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_equal(saved: Saved, exported: Path) -> None:
    for compare, what in ((compare_tensors, "24 tensors"), (compare_logits, "logits of 64 tokens")):
        comparison = compare(saved.checkpoint, exported)
        assert str(comparison) == f"{what}: equal to the bit"
        assert comparison.within(0)


def test_the_largest_difference_and_where(saved: Saved, exported: Path) -> None:
    change(exported, "model.layers.1.mlp.bias", (3,), 0.25)
    change(exported, "model.layers.0.self_attention.kv_proj.weight", (17, 5), -0.5)
    comparison = compare_tensors(saved.checkpoint, exported)
    assert comparison.different == 2
    assert comparison.largest == pytest.approx(0.5)
    assert "in model.layers.0.self_attention.kv_proj.weight at [17, 5]: " in comparison.where
    assert not comparison.within(0) and not comparison.within(0.4) and comparison.within(0.6)
    logits = compare_logits(saved.checkpoint, exported)
    assert logits.largest > 1e-3 and "[sequence, position, token] at [" in logits.where


def test_one_bit(saved: Saved, exported: Path) -> None:
    """A zero's sign is no difference in value, but in bits."""
    for zero in (0.0, -0.0):
        shutil.rmtree(exported.with_name(f"{zero}"), ignore_errors=True)
        shutil.copytree(exported, exported.with_name(f"{zero}"))
        tensors = load_file(exported / "model.safetensors")
        tensors["model.norm.weight"][4] = zero
        save_file(tensors, exported.with_name(f"{zero}") / "model.safetensors", metadata={"format": "pt"})
    comparison = compare_tensors(exported.with_name("0.0"), exported.with_name("-0.0"))
    assert (comparison.different, comparison.largest) == (1, 0.0) and not comparison.within(0)


def test_a_nan_differs_by_infinity(saved: Saved, exported: Path) -> None:
    change(exported, "model.norm.weight", (4,), float("nan"))
    assert compare_tensors(saved.checkpoint, exported).largest == torch.inf


def test_other_types_are_compared_by_value(saved: Saved, exported: Path, tmp_path: Path) -> None:
    convert_to_hf(saved.checkpoint, tmp_path / "bf16", "bf16")
    comparison = compare_tensors(exported, tmp_path / "bf16")
    assert comparison.different == 24 and 0 < comparison.largest < 0.01
    assert "(torch.float32) and " in comparison.where


def test_another_shape_is_refused(saved: Saved, exported: Path, released: Path) -> None:
    assert compare_tensors(exported, released).different == 24
    text = (released / "config.json").read_text()
    (released / "config.json").write_text(text.replace('"rms_norm_eps": 0.001', '"rms_norm_eps": 0.002'))
    with pytest.raises(UserError, match=r"the models differ in norm_eps: 0.001 and 0.002"):
        compare_tensors(exported, released)


@pytest.mark.parametrize("tokens", [[], [96], [-1]])
def test_tokens_outside_the_vocabulary(exported: Path, tokens: list[int]) -> None:
    with pytest.raises(UserError, match="--tokens: must be ids from 0 to 95"):
        compare_logits(exported, exported, tokens)


def test_command(saved: Saved, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = saved.checkpoint.parent.parent
    result = command("jetmoe", "convert", "verify", run_folder, exported)
    assert (result.returncode, result.stdout, result.stderr) == (0, "24 tensors: equal to the bit\n", "")
    change(exported, "model.layers.1.mlp.bias", (3,), 1e-3)
    for options, status in (
        ([], 1),
        (["--tolerance", "0.01"], 0),
        (["--tokens", "1,2,3"], 1),
        (["--tokens", "1,2,3", "--tolerance", "1"], 0),
        (["--tokens", "one"], 2),
    ):
        assert main(["convert", "verify", str(run_folder), str(exported), *options]) == status, options
    output = capsys.readouterr()
    assert output.out.count("logits of 3 tokens: differ, the most by ") == 2
    assert output.err == "error: --tokens: write ids as 1,2,3, not 'one'\n"


def test_logits_of_a_config_in_the_original_names(saved: Saved, exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ORIGINAL}))
    assert compare_logits(exported, saved.checkpoint).within(0)
