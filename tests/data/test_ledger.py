"""A checkpoint knows what it was trained on: the ledger, the refusal of another blend, and how to allow one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter
from jetmoe_megatron.config import Run
from jetmoe_megatron.errors import UserError
from tests.support import metrics, pretrain, small_run, write_dataset, write_run


def ledger(run: Run, saved: dict[str, Any] | None, cache: Path) -> Any:
    from jetmoe_megatron.data.ledger import fingerprint, ledger_of

    return ledger_of(run, fingerprint(run, cache), saved, Path("checkpoint"))


def saved_by(run: Run, cache: Path, samples: int) -> dict[str, Any]:
    """What a checkpoint holds after so many samples; through JSON, as in the file."""
    from dataclasses import replace

    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples

    new = ledger(run, None, cache)
    return json.loads(
        json.dumps(replace(new, read=RunSamples(run, IndexCache(cache)).advance(new.read, samples)).dump())
    )


def run_of(folder: Path, data: dict[str, str], /, **changes: Any) -> Run:
    return Run.model_validate(small_run(folder, data, **changes))


def test_the_same_blend_goes_on(tmp_path: Path, data: dict, world_of_one: None) -> None:
    run = run_of(tmp_path, data)
    saved = saved_by(run, tmp_path, 20)
    moved = {name: str(tmp_path / "moved" / name) for name in data}
    (tmp_path / "moved").mkdir()
    for name in data:
        for suffix in (".bin", ".idx"):
            Path(moved[name] + suffix).write_bytes(Path(data[name] + suffix).read_bytes())
    assert ledger(run_of(tmp_path, moved), saved, tmp_path).dump() == saved
    assert saved["read"] == {"sample": 20, "sequences": {"code": 15, "prose": 5}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 7}, ["seed 1234 -> 7"]),
        (
            {"phases__1__data__0__weight": 3},
            ["phases.decay.share.code 0.5 -> 0.75", "phases.decay.share.prose 0.5 -> 0.25"],
        ),
        ({"phases__0__tokens": 512}, ["phases.stable.tokens 1280 -> 512"]),
        ({"phases__0__data__1__weight": 0, "phases__1__data__1__weight": 0}, ["content.prose", "-> none"]),
        ({"data__mask_loss": True}, ["documents.mask_loss False -> True"]),
        ({"data__mask_attention": True}, ["documents.mask_attention False -> True"]),
        ({"data__reset_positions": True}, ["documents.reset_positions False -> True"]),
        ({"batch__sequence_length": 64}, ["sequence_length 32 -> 64"]),
    ],
)
def test_another_blend_is_refused_with_all_that_differs(
    tmp_path: Path, data: dict, world_of_one: None, changes: dict, named: list[str]
) -> None:
    saved = saved_by(run_of(tmp_path, data), tmp_path, 8)
    with pytest.raises(UserError, match="checkpoint: was trained on other data: .* data.new_blend=true") as caught:
        ledger(run_of(tmp_path, data, **changes), saved, tmp_path)
    for words in named:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_content_under_the_same_name(tmp_path: Path, data: dict, world_of_one: None) -> None:
    saved = saved_by(run_of(tmp_path, data), tmp_path, 8)
    other = {**data, "code": write_dataset(tmp_path / "code", 120, seed=77)}
    with pytest.raises(UserError, match=r"content.code [0-9a-f]{16} -> [0-9a-f]{16}\. Set"):
        ledger(run_of(tmp_path, other), saved, tmp_path)
    again = ledger(run_of(tmp_path, other, data__new_blend=True), saved, tmp_path)
    assert again.began.sequences == {"prose": 2}  # the other `code` has not been read


def test_another_tokenizer(tmp_path: Path, data: dict, world_of_one: None) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(name)
    saved = saved_by(run_of(tmp_path, data, tokenizer=str(tmp_path / "one")), tmp_path, 8)
    with pytest.raises(UserError, match=r"other data: tokenizer [0-9a-f]{16} -> [0-9a-f]{16}\. Set"):
        ledger(run_of(tmp_path, data, tokenizer=str(tmp_path / "other")), saved, tmp_path)


def test_a_new_blend_repeats_nothing_and_loses_nothing(tmp_path: Path, world_of_one: None) -> None:
    """Each token is unique: over both blends every sequence of an epoch must come once before any comes twice."""
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples

    data = {}
    for number, name in enumerate(("code", "prose")):
        data[name] = str(tmp_path / name)
        with IndexedWriter(tmp_path / name, np.int32) as writer:
            writer.add_document(np.arange(2000, dtype=np.int32) + 2000 * number)
    options: dict[str, Any] = {"model__vocab_size": 4000, "phases__0__tokens": 20 * 256, "phases__1__tokens": 12 * 256}
    run = run_of(tmp_path, data, **options)
    first = RunSamples(run, IndexCache(tmp_path / "cache"))
    saved = saved_by(run, tmp_path / "cache", 50)
    weights = {"phases__0__data__0__weight": 1, "phases__0__data__1__weight": 4}
    changed = run_of(tmp_path, data, data__new_blend=True, **options, **weights)
    again = ledger(changed, saved, tmp_path / "cache")
    assert again.past == [{key: value for key, value in saved.items() if key != "past"}]
    second = RunSamples(changed, IndexCache(tmp_path / "cache"), again.began)
    assert len(second) == len(first) == 256
    drawn = [int(first[i]["tokens"][0]) for i in range(50)] + [int(second[i]["tokens"][0]) for i in range(50, 256)]
    for number, name in enumerate(data):
        own = Counter(token for token in drawn if token // 2000 == number)
        epochs, per_epoch = divmod(sum(own.values()), 1999 // 32)[0], 1999 // 32
        assert set(own.values()) <= {epochs, epochs + 1} and (len(own) == per_epoch or not epochs), name
        read = second.advance(again.read, 206).sequences[name]
        assert read == sum(own.values()) == second.end.sequences[name]
    assert second.advance(again.read, 110).sequences["prose"] == pytest.approx(50 / 4 + 110 * 4 / 5, abs=1)


def test_a_data_set_that_comes_back_is_read_on(tmp_path: Path, world_of_one: None) -> None:
    data = {name: write_dataset(tmp_path / name, 100, seed) for seed, name in enumerate(("code", "prose"))}
    weights = ("phases__0__data__1__weight", "phases__1__data__1__weight")  # of prose
    without = run_of(tmp_path, data, data__new_blend=True, **dict.fromkeys(weights, 0))
    saved = saved_by(run_of(tmp_path, data), tmp_path, 20)
    apart = ledger(without, saved, tmp_path)
    assert apart.read.sequences == saved["read"]["sequences"] == {"code": 15, "prose": 5}
    back = ledger(run_of(tmp_path, data, data__new_blend=True), json.loads(json.dumps(apart.dump())), tmp_path)
    assert back.read.sequences == {"code": 15, "prose": 5}
    write_dataset(tmp_path / "prose", 100, seed=99)
    other = ledger(run_of(tmp_path, data, data__new_blend=True), json.loads(json.dumps(apart.dump())), tmp_path)
    assert other.read.sequences == {"code": 15}


def test_sequences_do_not_depend_on_how_many_are_read(tmp_path: Path, data: dict, world_of_one: None) -> None:
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples

    short = RunSamples(run_of(tmp_path, data), IndexCache(tmp_path / "a")).sequences["code"]
    long = RunSamples(run_of(tmp_path, data, phases__1__tokens=2000 * 256), IndexCache(tmp_path / "b")).sequences[
        "code"
    ]
    for number in range(0, 24, 5):
        assert (short[number]["tokens"] == long[number]["tokens"]).all()
    epoch = short.per_epoch
    assert sorted(long[i]["tokens"].tolist() for i in range(epoch)) != sorted(
        long[i]["tokens"].tolist() for i in range(epoch, 2 * epoch)
    ), "a second epoch cuts and orders anew"


def test_through_the_command(tmp_path: Path, data: dict[str, str]) -> None:
    """Kill and resume, another blend refused, then taken; the ledger is exact all along, on two ranks as on one."""
    tree = small_run(tmp_path, data, checkpoint__every_tokens=512)
    run, folder = write_run(tmp_path, tree), tmp_path / "run"
    other = ["phases.1.data.0.weight=3", "phases.1.data.1.weight=1"]
    assert pretrain(1, run, "debug.max_steps=6").returncode == 0
    refused = pretrain(1, run, *other)
    assert refused.returncode == 2
    assert "phases.decay.share.code 0.5 -> 0.75; phases.decay.share.prose 0.5 -> 0.25. Set it back" in refused.stderr
    assert len(metrics(folder)) == 6
    assert pretrain(2, run, *other, "data.new_blend=true").returncode == 0
    records = metrics(folder)
    tokens = [(r["dataset_tokens/code"], r["dataset_tokens/prose"]) for r in records]
    assert tokens[4] == (960, 320) and tokens[5] == (960 + 128, 320 + 128)
    assert tokens[7] == (1088 + 2 * 192, 448 + 2 * 64)
    progress = json.loads((folder / "checkpoints" / "tokens_2048" / "progress.json").read_text())
    assert progress["tokens"] == 2048
    assert progress["data"]["read"] == {"sample": 64, "sequences": {"code": 46, "prose": 18}}
    assert [p["read"]["sample"] for p in progress["data"]["past"]] == [48]
    assert pretrain(1, run, *other).returncode == 0  # the new blend is now the run's own


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"tokens": "x", "data": {}}', "\x00\x00", None])
def test_damaged_progress_is_one_line(tmp_path: Path, data: dict, content: str | None) -> None:
    from jetmoe_megatron.checkpoint.progress import PROGRESS_FILE, read_progress

    if content is not None:
        (tmp_path / PROGRESS_FILE).write_text(content)
    with pytest.raises(UserError, match="missing or damaged"):
        read_progress(tmp_path)
