"""metrics.jsonl has every line, with its held-out loss, whatever ends the run and when."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from data_tools.engines import open_reference
from data_tools.tokenize import tokenize
from data_tools.tokenizer import train_bpe
from jetmoe_megatron.checkpoint.folder import published
from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.data.step_batches import HeldOutSamples
from tests.support import losses, metrics, small_run, training, write_run


def run_file(folder: Path, data: dict[str, str], every: int) -> Path:
    held_out = {"every_steps": every, "sequences": 4, "data": [{"name": "v", "path": data["held_out"]}]}
    return write_run(folder, small_run(folder, data, evaluation=held_out))


def held_out(folder: Path) -> dict[int, float]:
    return {r["step"]: r["held_out_loss"] for r in metrics(folder / "run") if "held_out_loss" in r}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert training(run_file(folder, data, every=4)).run().returncode == 0
    assert held_out(folder).keys() == {4, 8}
    return folder


def killed_while_it_measures() -> None:
    from jetmoe_megatron.training.held_out_loss import HeldOutLoss

    patch.object(HeldOutLoss, "measure", _kill).start()


def killed_when_a_checkpoint_has_its_name() -> None:
    from jetmoe_megatron.checkpoint import saver

    patch.object(saver, "retain", _kill).start()


def _kill(*arguments: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped_in_step_4() -> None:
    _stop_in_step(4)


def stopped_in_step_8() -> None:
    _stop_in_step(8)


def _stop_in_step(number: int) -> None:
    from jetmoe_megatron.training import loop
    from jetmoe_megatron.training.held_out_loss import HeldOutLoss
    from jetmoe_megatron.training.step import compute_gradients

    begun = []

    def compute(*arguments: Any) -> Any:
        begun.append(1)
        if len(begun) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute_gradients(*arguments)

    def measure(*arguments: Any) -> Any:
        assert len(begun) < number, "the seconds that a batch system leaves are for the save"
        return original(*arguments)

    original = HeldOutLoss.measure
    patch.object(loop, "compute_gradients", compute).start()
    patch.object(HeldOutLoss, "measure", measure).start()


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (killed_while_it_measures, -9),
        (killed_when_a_checkpoint_has_its_name, -9),
        (stopped_in_step_4, 75),
        (stopped_in_step_8, 75),
    ],
)
def test_no_line_is_lost(
    ends: Callable[[], None], status: int, whole: Path, tmp_path: Path, data: dict[str, str]
) -> None:
    run = run_file(tmp_path, data, every=4)
    ended = training(run, before=ends).run()
    assert ended.returncode == status, ended.stderr
    again = training(run).run()
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "run") == losses(whole / "run")
    assert held_out(tmp_path) == held_out(whole)
    assert published(tmp_path / "run/checkpoints")[-1].name == "tokens_2048"
    assert "nothing left to do" in training(run).run().stdout


def test_bits_per_byte(tmp_path: Path, data: dict[str, str]) -> None:
    """Of the tokens whose loss was measured, as their text says."""
    lines = [json.dumps({"text": f"{letter} quick brown fox jumps " * 5}) + "\n" for letter in "abcdefghij" * 8]
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    train_bpe([tmp_path / "texts.jsonl"], 270, tmp_path / "tokenizer")
    tokenize([tmp_path / "texts.jsonl"], tmp_path / "set", tmp_path / "tokenizer")
    sets = [{"name": "fox", "path": str(tmp_path / "set")}]
    tree = small_run(tmp_path, data, tokenizer=str(tmp_path / "tokenizer"), model__vocab_size=300)
    tree |= {"evaluation": {"sequences": 4, "data": sets}, "data": {"mask_loss": True}}
    assert training(write_run(tmp_path, tree), "debug.max_steps=2").run().returncode == 0
    last = metrics(tmp_path / "run")[-1]

    run = Run.model_validate(tree)
    samples = HeldOutSamples(
        run.evaluation.data[0], run, resolve_layout(run, 1), IndexCache(tmp_path / "run/data_index")
    )
    labels = [item["labels"][item["loss_mask"] > 0].tolist() for item in map(samples.__getitem__, range(4))]
    text = "".join(map(open_reference(tmp_path / "tokenizer").decode, labels))
    whole = len(text.replace("</s>", "").encode())
    bits = last["held_out_loss/fox"] * sum(map(len, labels)) / math.log(2)
    assert last["bits_per_byte/fox"] == pytest.approx(bits / whole, rel=1e-12)
