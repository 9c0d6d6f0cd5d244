"""What a sequence says about its documents equals Megatron's own masks, and all layouts follow it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.indexed import IndexedWriter
from data_tools.tokenizer import train_bpe
from jetmoe_megatron.config import Run, load_run
from jetmoe_megatron.errors import UserError
from tests.support import metrics, pretrain, small_run, write_run

APART = {"reset_positions": True, "mask_attention": True, "mask_loss": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.jsonl").write_text('{"text": "a small text to begin with"}\n')
    train_bpe([folder / "text.jsonl"], 259, folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Short ones, each closed by the token 2."""
    random, data = np.random.default_rng(0), {}
    for name in ("code", "prose"):
        data[name] = str(tmp_path_factory.mktemp("data") / name)
        with IndexedWriter(data[name], np.uint16) as writer:
            for _ in range(200):
                writer.add_document(np.append(random.integers(3, 259, random.integers(1, 25)), 2).astype(np.uint16))
    return data


def tree(folder: Path, data: dict[str, str], tokenizer: Path, /, **changes: Any) -> dict[str, Any]:
    return small_run(folder, data, tokenizer=str(tokenizer), model__vocab_size=260, **changes)


def test_as_megatron_makes_them(tmp_path: Path, documents: dict, tokenizer: Path, world_of_one: None) -> None:
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples
    from jetmoe_megatron.training.step import _hidden

    samples = RunSamples(
        Run.model_validate(tree(tmp_path, documents, tokenizer, data=APART)), IndexCache(tmp_path / "cache")
    )
    several = 0
    for number in range(len(samples)):
        item = samples[number]
        mask, loss_mask, positions = _get_ltor_masks_and_position_ids(item["tokens"], 2, True, True, True, True)
        assert torch.equal(item["position_ids"], positions)
        assert torch.equal(item["loss_mask"], loss_mask)
        assert torch.equal(_hidden(item["document"][None])[0], mask)
        several += int((item["tokens"][:-1] == 2).any())
    assert several > len(samples) / 2


def test_each_option_matters_and_layouts_agree(tmp_path: Path, documents: dict, tokenizer: Path) -> None:
    """Through the real command, with the pipeline split and layers recomputed."""
    first: dict[str, float] = {}
    layouts: list[tuple[str, int, dict[str, Any]]] = [
        ("together", 1, {}),
        ("positions", 1, {"data__reset_positions": True}),
        ("attention", 1, {"data__mask_attention": True}),
        ("loss", 1, {"data__mask_loss": True}),
        ("all", 1, {"data": APART}),
        ("all, pp2", 2, {"data": APART, "parallel": {"pipeline": 2}, "recompute": "full"}),
    ]
    for name, ranks, changes in layouts:
        folder = tmp_path / name
        run = write_run(folder, tree(folder, documents, tokenizer, debug__max_steps=1, model__init_std=0.2, **changes))
        ended = pretrain(ranks, run)
        assert ended.returncode == 0, ended.stderr
        first[name] = metrics(folder / "run")[0]["lm_loss"]
    assert first["all, pp2"] == pytest.approx(first["all"], rel=1e-5)
    del first["all, pp2"]
    assert len({round(loss, 5) for loss in first.values()}) == 5, first


@pytest.mark.parametrize("option", APART)
def test_a_tokenizer_is_asked_for(tmp_path: Path, documents: dict, option: str) -> None:
    run = write_run(tmp_path, small_run(tmp_path, documents, **{f"data__{option}": True}))
    with pytest.raises(UserError, match=r"^.*tokenizer: data.reset_positions, mask_attention and mask_loss need it"):
        load_run(run)


def test_context_parallelism_is_refused(tmp_path: Path, documents: dict, tokenizer: Path) -> None:
    run = write_run(tmp_path, tree(tmp_path, documents, tokenizer, data__mask_attention=True, parallel={"context": 2}))
    with pytest.raises(UserError, match=r"parallel.context: cannot split sequences"):
        load_run(run)
