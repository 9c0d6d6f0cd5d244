"""Loading reads each number once, and keeps little beside what it fills."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.checkpoint.test_reshard import LAYOUTS, trained, tree_of
from tests.parallel.oracle import training
from tests.ranks import run_ranks


def write(folder: Path, whole: torch.Tensor, cuts: tuple[int, ...]) -> None:
    """`whole` in equal pieces, as many along each axis as `cuts` says."""
    from jetmoe_megatron.checkpoint.tensors_file import TensorsFile
    from jetmoe_megatron.checkpoint.write_metadata import write_metadata

    with TensorsFile(folder, 0) as file:
        grid = [range(0, size, size // cut) for size, cut in zip(whole.shape, cuts, strict=True)]
        for offset in torch.cartesian_prod(*[torch.tensor(axis) for axis in grid]).reshape(-1, len(cuts)).tolist():
            piece = whole
            for axis, (start, size, cut) in enumerate(zip(offset, whole.shape, cuts, strict=True)):
                piece = piece.narrow(axis, start, size // cut)
            file.add("weight", whole.shape, offset, piece.contiguous().clone())
    write_metadata(folder, [(file.name, file.pieces)])


@pytest.mark.parametrize(
    ("cuts", "parts"), [((1, 1, 1), (1, 1, 2)), ((1, 2, 1), (2, 1, 1)), ((2, 1, 4), (1, 3, 1)), ((1, 1, 1), (2, 2, 2))]
)
@pytest.mark.parametrize("at_once", [2**26, 24], ids=["in one read", "in small reads"])
def test_any_numbers_of_any_part(cuts: tuple[int, ...], parts: tuple[int, ...], at_once: int, tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from jetmoe_megatron.checkpoint import saved_tensors

    whole, choose = torch.arange(4.0 * 6 * 8).view(4, 6, 8), random.Random(1)
    write(tmp_path, whole, cuts)
    saved = saved_tensors.SavedTensors(tmp_path)
    own = [size // count for size, count in zip(whole.shape, parts, strict=True)]
    with patch.multiple(saved_tensors, _READ_AT_ONCE=at_once, _WORTH_A_SEEK=at_once // 3):
        for _ in range(60):
            at = [choose.randrange(count) for count in parts]
            offset = [size * index for size, index in zip(own, at, strict=True)]
            expected = whole
            for axis, (start, size) in enumerate(zip(offset, own, strict=True)):
                expected = expected.narrow(axis, start, size)
            first, end = sorted(choose.sample(range(expected.numel() + 1), 2))
            data = torch.empty(own, device="meta")
            part = ShardedTensor.from_rank_offsets("weight", data, *[(a, at[a], parts[a]) for a in range(3)])
            numbers_N = torch.full((end - first,), -1.0)
            saved.fill(part, numbers_N, first)
            assert numbers_N.equal(expected.flatten()[first:end])


def bytes_read(tree: dict[str, Any], folder: str) -> int:
    """By this rank, to load a checkpoint: of numbers, without what says where they are."""
    with training(tree, 1) as (run, model, _):
        from jetmoe_megatron.checkpoint import read_together, saved_tensors
        from jetmoe_megatron.checkpoint.load import load_checkpoint
        from jetmoe_megatron.checkpoint.pieces import read_rows
        from jetmoe_megatron.training.optimizer import build_optimizer

        total = 0

        def counted(*arguments: Any) -> torch.Tensor:
            nonlocal total
            rows = read_rows(*arguments)
            total += rows.nbytes
            return rows

        optimizer = build_optimizer(run, model)
        # a model as small as this one in blocks, and cut, as a large one would be
        with (
            patch.object(saved_tensors, "read_rows", counted),
            patch.object(saved_tensors, "_WORTH_A_SEEK", 64),
            patch.object(read_together, "_SENT_AT_ONCE", 1024),
        ):
            load_checkpoint(Path(folder) / "tokens_512", model, optimizer)
        return total


@pytest.mark.parametrize(
    ("layout", "precision"), [*[(layout, "bf16") for layout in LAYOUTS], ("one", "fp32"), ("pp2 dp3", "fp32")]
)
def test_all_ranks_together_read_the_checkpoint_once(layout: str, precision: str, tmp_path: Path) -> None:
    ranks, tree = tree_of(layout, precision)
    run_ranks(ranks, trained, tree, str(tmp_path))
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.distcp"))
    own = run_ranks(ranks, bytes_read, tree, str(tmp_path))
    twice = (
        1.2 if tree["parallel"].get("pipeline", 1) == 1 else 1.4
    )  # both ends have the embedding, a tenth of this model
    assert sum(own) < twice * size
    assert max(own) < 2 * sum(own) / ranks + 2**16, "one rank reads for the others"


def damaged_on_one_rank(tree: dict[str, Any], folder: str) -> str:
    with training(tree, 1) as (run, model, _):
        from jetmoe_megatron.checkpoint.load import load_checkpoint
        from jetmoe_megatron.checkpoint.saved_tensors import SavedTensors
        from jetmoe_megatron.errors import SharedError
        from jetmoe_megatron.training.optimizer import build_optimizer

        optimizer = build_optimizer(run, model)
        refused = OSError(5, "Input/output error", "__0_0.distcp")
        on_one = patch.object(SavedTensors, "fill", side_effect=refused)
        with on_one if torch.distributed.get_rank() == 1 else patch.dict({}), pytest.raises(SharedError) as told:
            load_checkpoint(Path(folder) / "tokens_512", model, optimizer)
        return str(told.value)


@pytest.mark.parametrize("layout", ["dp2", "dp2, no distributed optimizer"])
def test_what_one_rank_cannot_read_stops_all(layout: str, tmp_path: Path) -> None:
    ranks, tree = tree_of(layout)
    run_ranks(ranks, trained, tree, str(tmp_path))
    said = run_ranks(ranks, damaged_on_one_rank, tree, str(tmp_path), timeout=60)
    assert set(said) == {f"{tmp_path}/tokens_512: cannot be loaded: __0_0.distcp: Input/output error"}
