"""`jetmoe data mix` and `prepare`, the index cache, and a mixture of twelve data sets."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jetmoe_megatron.config import Run, load_run
from jetmoe_megatron.data.mixture_report import shares, table, warnings
from jetmoe_megatron.errors import UserError
from tests.support import REPO, environment, pretrain, small_run, write_run


def jetmoe(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jetmoe_megatron.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        cwd=REPO,
    )


def test_plan_counts_tokens_and_epochs(tmp_path: Path, data: dict) -> None:
    run = Run.model_validate(small_run(tmp_path, data, phases__0__tokens=100 * 256, phases__1__tokens=60 * 256))
    rows = shares(run, tmp_path)
    assert [(r.phase, r.dataset, r.share, r.tokens) for r in rows] == [
        ("stable", "code", 0.75, 75 * 256),
        ("stable", "prose", 0.25, 25 * 256),
        ("decay", "code", 0.5, 30 * 256),
        ("decay", "prose", 0.5, 30 * 256),
    ]
    size = {name: Path(data[name] + ".bin").stat().st_size // 2 for name in ("code", "prose")}
    assert rows[3].available == (size["prose"] - 1) // 32 * 32
    assert rows[3].epochs == pytest.approx(55 * 256 / rows[3].available)
    assert warnings(run, rows) == []
    epochs = {row.dataset: row.epochs for row in rows}
    limit = sum(epochs.values()) / 2  # one of the two is above
    (warning,) = warnings(run.model_copy(update={"data": run.data.model_copy(update={"warn_epochs": limit})}), rows)
    often = max(epochs, key=epochs.__getitem__)
    assert warning.startswith(f"warning: data set {often!r} is read {epochs[often]:.1f} times, more often than")
    assert "75.00%" in table(rows) and "19,200" in table(rows)


def test_mix_prints_and_draws(tmp_path: Path, data: dict) -> None:
    run = write_run(tmp_path, small_run(tmp_path, data))
    plot = ("--plot", tmp_path / "mixture.png")
    ended = jetmoe("data", "mix", run, "phases.0.tokens=2560", *plot, "data.warn_epochs=0.01")
    assert ended.returncode == 0, ended.stderr
    assert "1,920" in ended.stdout and "warning: data set 'code' is read 0." in ended.stdout
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run").exists()
    missing = jetmoe("data", "mix", run, "phases.0.data.0.path=no/such", "phases.1.data.0.path=no/such")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "no/such.idx" in missing.stderr
    odd = jetmoe("data", "mix", run, "--plot", tmp_path / "mixture.odd")
    assert odd.returncode == 2 and odd.stderr.count("\n") == 1


def test_prepared_training_builds_nothing(tmp_path: Path, data: dict) -> None:
    held_out = {"data": [{"name": "v", "path": data["held_out"]}]}
    run = write_run(tmp_path, small_run(tmp_path, data, evaluation=held_out, data={"build_limit_tokens": 1}))
    refused = pretrain(1, run)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "run `jetmoe data prepare RUN.yaml` first" in refused.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    ended = jetmoe("data", "prepare", run)
    assert ended.returncode == 0, ended.stderr
    cache = tmp_path / "run" / "data_index"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert ended.stdout.count("built ") == 3  # the orders of both phases were there
    trained = pretrain(2, run)
    assert trained.returncode == 0, trained.stderr
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert jetmoe("data", "prepare", run).stdout.count("built ") == 0


def test_nothing_is_left_to_prepare(tmp_path: Path, data: dict) -> None:
    run = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run).returncode == 0
    for more in ((), ("data.new_blend=true", "phases.1.data.0.weight=3")):
        ended = jetmoe("data", "prepare", run, *more)
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("harm", ["truncate", "pickle", "text", "missing", "archive", "header", "pipe"])
def test_a_damaged_cache_is_named(tmp_path: Path, data: dict, world_of_one: None, harm: str) -> None:
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples

    run, cache = Run.model_validate(small_run(tmp_path, data)), IndexCache(tmp_path / "cache")
    RunSamples(run, cache)
    file = next(cache.root.glob("*epoch0")) / "shuffle_index.npy"
    witness = tmp_path / "witness"
    if harm == "truncate":
        os.truncate(file, file.stat().st_size - 5)
    elif harm == "text":
        file.write_text("text")
    elif harm == "missing":
        file.unlink()
    elif harm == "archive":
        with open(file, "wb") as stream:
            np.savez(stream, a=np.arange(3))
    elif harm == "header":
        file.write_bytes(b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"-" * 9000)
    elif harm == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_bytes(pickle.dumps(Crafted(str(witness))))
    with pytest.raises(UserError) as caught:
        samples = RunSamples(run, cache)
        for number in range(len(samples)):
            samples[number]
    assert f"data.cache: {file} is damaged: delete {file.parent}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not witness.exists()


VALUES = [
    ("*epoch0", name, value)
    for name in ("document_index", "sample_index", "shuffle_index")
    for value in (-7, 200, 2**31 - 1)
] + [("order-*", name, value) for name in ("data_set", "place") for value in (-7, 200, 2**14)]


@pytest.mark.parametrize(("folder", "name", "value"), VALUES)
def test_values_that_no_index_has(
    tmp_path: Path, data: dict, world_of_one: None, folder: str, name: str, value: int
) -> None:
    """They would be counted from the end of a file, or lead out of it."""
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples

    run, cache = Run.model_validate(small_run(tmp_path, data)), IndexCache(tmp_path / "cache")
    RunSamples(run, cache)
    for file in cache.root.glob(f"{folder}/{name}.npy"):
        array = np.load(file)
        array[...] = np.array(value).astype(array.dtype)
        np.save(file, array)
    with pytest.raises(UserError) as caught:
        samples = RunSamples(run, cache)
        for number in range(len(samples)):
            samples[number]
    said = str(caught.value)
    assert said.startswith("data.cache: ") and "is damaged: delete" in said and "\n" not in said


class Crafted:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def test_a_kill_while_building_leaves_no_half_index(tmp_path: Path, data: dict) -> None:
    run = write_run(tmp_path, small_run(tmp_path, data, phases__0__tokens=40_000_000 * 256))
    process = subprocess.Popen([sys.executable, "-m", "jetmoe_megatron.cli", "data", "prepare", str(run),
                                "data.warn_epochs=1e9"], env=environment(), cwd=REPO)  # fmt: skip
    cache, deadline = tmp_path / "run" / "data_index", time.time() + 120
    while not list(cache.glob("order-*.tmp-*/*.npy")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert [path for path in cache.iterdir() if ".tmp-" not in path.name] == []
    assert pretrain(1, run, "phases.0.tokens=1280").returncode == 0


def test_twelve_data_sets_keep_their_shares(tmp_path: Path, world_of_one: None) -> None:
    """Within a tenth of a percent of its share each, over a million samples."""
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import Order

    weights = {d.name: d.weight for d in phase2(tmp_path)}
    weights |= {"pile_remaining": 3.1, "proof_pile": 2.0}  # a group of the published table, taken apart
    assert len(weights) == 12
    order = Order(weights, 1_000_000, IndexCache(tmp_path))
    order.build()
    order.open()
    drawn, total = order.counts(0, order.size), sum(weights.values())
    assert order.totals() == drawn
    for name, weight in weights.items():
        assert drawn[name] == pytest.approx(1e6 * weight / total, rel=1e-3), name
    place = np.asarray(order.place)
    assert all((np.diff(place[np.asarray(order.data_set) == i]) == 1).all() for i in range(12))


@pytest.mark.parametrize("phase", [0, 1])
def test_jetmoe_8b_is_never_two_sequences_off_its_weights(tmp_path: Path, world_of_one: None, phase: int) -> None:
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import orders

    order = list(orders(jetmoe_8b(tmp_path, "phases.0.tokens=4e9", "phases.1.tokens=4e9"), IndexCache(tmp_path)))[
        phase
    ][1]
    order.build()
    order.open()
    read: np.ndarray = np.arange(1, order.size + 1)
    for index, weight in enumerate(order.weights):
        assert np.abs(np.cumsum(np.asarray(order.data_set) == index) - weight * read).max() < 2


def phase2(folder: Path) -> list[Any]:
    return jetmoe_8b(folder).phases[1].data


def jetmoe_8b(folder: Path, *overrides: str) -> Run:
    os.environ.setdefault("DATA", str(folder))
    os.environ.setdefault("OUTPUT", str(folder))
    return load_run(REPO / "configs" / "jetmoe_8b" / "run.yaml", ["schedule.warmup_tokens=0", *overrides])


def test_a_very_rare_data_set(tmp_path: Path, world_of_one: None) -> None:
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import Order

    for weights in ({"a": 1.0, "b": 1e-5}, {"a": 1.0, "b": 1e-9}, {"only": 3.0}):
        order = Order(weights, 200_000, IndexCache(tmp_path))
        order.build()
        assert order.open().totals() == order.counts(0, order.size)
