"""Nothing in a checkpoint runs code: crafted files with checksums that match."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import traceback
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

from jetmoe_megatron.checkpoint.checksums import CHECKSUMS, METADATA, checksum
from jetmoe_megatron.checkpoint.common_state import read_optimizer_steps
from jetmoe_megatron.checkpoint.metadata import read_metadata
from tests.ranks import run_ranks
from tests.support import REPO, environment, jetmoe, pretrain, small_run, training, write_run
from tests.warm import Command

WEIGHT = "decoder.final_layernorm.weight"


class Crafted:
    """Makes a folder when it is unpickled by whoever lets it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert pretrain(1, write_run(folder, small_run(folder, data)), "debug.max_steps=2").returncode == 0
    return folder / "run"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path, data: dict[str, str]) -> Path:
    """A copy to spoil, beside a run file that resumes it."""
    shutil.copytree(trained, tmp_path / "run")
    write_run(tmp_path, small_run(tmp_path, data))
    return tmp_path / "run/checkpoints/tokens_512"


def seal(checkpoint: Path) -> None:
    """Checksums that fit: whoever crafts the one can craft the other."""
    files = [path for path in checkpoint.iterdir() if path.name != CHECKSUMS and path.is_file()]
    (checkpoint / CHECKSUMS).write_text(json.dumps({path.name: checksum(path) for path in files}))


def rewrite(checkpoint: Path, edit: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    edit(metadata)
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def whole_file(checkpoint: Path, payload: bytes, name: str) -> None:
    content = payload * (20000 // len(payload)) if name.endswith(".distcp") else payload
    (checkpoint / name).write_bytes(content)


def an_object_among_the_tensors(checkpoint: Path, payload: bytes) -> None:
    """torch's planner unpickles what `.metadata` calls an object. Its shape, which Megatron asks for, is put on."""

    def edit(metadata: Metadata) -> None:
        file = next(iter(metadata.storage_data.values())).relative_path
        entry: Any = BytesStorageMetadata()
        entry.size = metadata.state_dict_metadata[WEIGHT].size  # type: ignore[union-attr]
        metadata.state_dict_metadata[WEIGHT] = entry
        end = (checkpoint / file).stat().st_size
        metadata.storage_data[MetadataIndex(WEIGHT)] = _StorageInfo(file, end, len(payload))
        with open(checkpoint / file, "ab") as stream:
            stream.write(payload)

    rewrite(checkpoint, edit)


def a_piece_that_is_no_tensor(checkpoint: Path, payload: bytes) -> None:
    def edit(metadata: Metadata) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn == WEIGHT:
                end = (checkpoint / place.relative_path).stat().st_size
                with open(checkpoint / place.relative_path, "ab") as stream:
                    stream.write(payload)
                metadata.storage_data[index] = _StorageInfo(place.relative_path, end, len(payload))

    rewrite(checkpoint, edit)


def a_file_elsewhere(checkpoint: Path, payload: bytes) -> None:
    (checkpoint.parent / "elsewhere").write_bytes(payload)

    def edit(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = "../elsewhere"

    rewrite(checkpoint, edit)


def a_hook_of_the_reader(checkpoint: Path, payload: bytes) -> None:
    def edit(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.transform_descriptors = ["zstd"]

    rewrite(checkpoint, edit)


def a_member_of_the_plan(checkpoint: Path, payload: bytes) -> None:
    rewrite(checkpoint, lambda metadata: setattr(metadata, "planner_data", Crafted(checkpoint.parents[2] / "witness")))


ATTACKS: dict[str, Callable[[Path, bytes], None]] = {
    **{f"the whole of {name}": partial(whole_file, name=name)
       for name in (METADATA, "common.pt", "__0_0.distcp")},
    **{function.__name__: function for function in (
        an_object_among_the_tensors,
        a_piece_that_is_no_tensor,
        a_file_elsewhere,
        a_hook_of_the_reader,
        a_member_of_the_plan,
    )},
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_crafted_files_are_refused(attack: Callable[[Path, bytes], None], checkpoint: Path, data: dict) -> None:
    """On resume and on start_from, in one line, also where a cluster has switched torch's own care off."""
    witness = checkpoint.parents[2] / "witness"
    attack(checkpoint, pickle.dumps(Crafted(witness)))
    seal(checkpoint)
    folder = checkpoint.parents[2]
    other = write_run(folder / "other", small_run(folder / "other", data, start_from=str(checkpoint)))
    for run_file in (folder / "run.yaml", other):
        command = training(run_file)
        command.env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        ended = command.run()
        assert not witness.exists()
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count("\n") == 1 and f"error: {checkpoint}: cannot be loaded" in ended.stderr
    for arguments in (("convert", "to-hf", checkpoint, folder / "hf"), ("convert", "verify", checkpoint, checkpoint)):
        jetmoe(*arguments)
        assert not witness.exists()


def test_a_pipe_in_the_place_of_a_file_is_damage(checkpoint: Path) -> None:
    """It would be waited for, for ever."""
    (checkpoint / "common.pt").unlink()
    os.mkfifo(checkpoint / "common.pt")
    listed = json.loads((checkpoint / CHECKSUMS).read_text())
    listed["common.pt"] = [0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]
    (checkpoint / CHECKSUMS).write_text(json.dumps(listed))
    ended = pretrain(1, checkpoint.parents[2] / "run.yaml", timeout=60)
    assert ended.returncode == 2
    assert "common.pt is not a file" in ended.stderr


@pytest.mark.parametrize("name", ["common.pt", "metadata.json", "progress.json", "__0_0.distcp", CHECKSUMS])
def test_a_pipe_that_is_not_listed(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    seal(checkpoint)
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    ended = pretrain(1, checkpoint.parents[2] / "run.yaml", timeout=60)
    assert ended.returncode == 2
    assert "checksums.json" in ended.stderr and "is damaged" in ended.stderr


@pytest.mark.parametrize("name", ["common.pt", "metadata.json", "__0_0.distcp"])
def test_a_pipe_where_nothing_is_listed(name: str, tmp_path: Path, data: dict[str, str]) -> None:
    """In weights that `jetmoe convert from-hf` made before it wrote checksums."""
    weights = tmp_path / "weights"
    shutil.copytree(REPO / "tests/golden/from_hf-6290843/weights", weights)
    (weights / name).unlink()
    os.mkfifo(weights / name)
    run_file = write_run(tmp_path, small_run(tmp_path, data, start_from=str(weights)))
    for ended in (
        training(run_file).run(timeout=30),
        Command(["jetmoe", "convert", "to-hf", weights, tmp_path / "hf"], environment(), REPO).run(timeout=30),
    ):
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1
        assert f"error: {weights}: is damaged: {name} is not a file" in ended.stderr


def test_a_link_is_damage(checkpoint: Path) -> None:
    """It would bring a file from elsewhere into an export."""
    (checkpoint / "elsewhere").write_bytes((checkpoint / "common.pt").read_bytes())
    (checkpoint / "common.pt").unlink()
    (checkpoint / "common.pt").symlink_to(checkpoint / "elsewhere")
    ended = jetmoe("convert", "to-hf", checkpoint, checkpoint.parents[2] / "hf")
    assert ended.returncode == 2 and "common.pt is not a file" in ended.stderr


def reached(path: Path, run_file: Path) -> list[str]:
    """What the standard library's unpickler was asked for while a checkpoint was loaded in every way."""
    from jetmoe_megatron.checkpoint.load import load_checkpoint, load_weights
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.config.layout import resolve_layout
    from jetmoe_megatron.convert.megatron_folder import MegatronFolder
    from jetmoe_megatron.model.build import build_model
    from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel
    from jetmoe_megatron.training.ranks.process_groups import parallel_groups

    found: list[str] = []
    listening = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event in ("pickle.find_class", "marshal.loads", "os.system", "subprocess.Popen"):
            callers = {frame.filename.rsplit("/", 1)[-1] for frame in traceback.extract_stack()}
            if "distributed_c10d.py" not in callers:  # which unpickles what the ranks tell each other
                found.append(f"{event} {arguments}")

    def torchs(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("torch unpickles")

    sys.addaudithook(hook)
    torch.load = torch._weights_only_unpickler.load = torchs
    run = load_run(run_file)
    layout = resolve_layout(run, 1)
    with parallel_groups(run, layout):
        model = wrap_for_data_parallel(run, build_model(run, layout))
        optimizer = build_optimizer(run, model)
        for listening in (False, True):  # noqa: B007  # the first time modules are imported
            load_checkpoint(path, model, optimizer)
            load_weights(path, model, optimizer)
            folder = MegatronFolder(path)
            for weight in folder.weights:
                list(folder.blocks(weight))
        pickle.loads(pickle.dumps(Path()))  # this is heard
        return found


def test_no_unpickler_but_ours_is_reached(checkpoint: Path) -> None:
    found = run_ranks(1, reached, checkpoint, checkpoint.parents[2] / "run.yaml")[0]
    assert [line.split("'")[1] for line in found] == ["pathlib"]


def test_what_is_read_is_what_was_written(checkpoint: Path) -> None:
    ours, torchs = read_metadata(checkpoint), pickle.loads((checkpoint / METADATA).read_bytes())
    assert ours.state_dict_metadata.keys() == torchs.state_dict_metadata.keys()
    for name, entry in torchs.state_dict_metadata.items():
        mine: Any = ours.state_dict_metadata[name]
        assert (mine.size, mine.chunks, mine.properties.dtype) == (entry.size, entry.chunks, entry.properties.dtype)
    assert ours.storage_data == torchs.storage_data


@pytest.mark.parametrize("value", [True, -1, 2**53, 1.0, "7", None, torch.tensor(7)], ids=str)
def test_the_optimizers_steps_are_a_number(checkpoint: Path, value: Any) -> None:
    torch.save({"optimizer_steps": value}, checkpoint / "common.pt")
    seal(checkpoint)
    ended = pretrain(1, checkpoint.parents[2] / "run.yaml")
    assert ended.returncode == 2
    assert "common.pt has no number of" in ended.stderr or "common.pt cannot be read" in ended.stderr


def test_common_holds_plain_values(checkpoint: Path) -> None:
    """Of which one is taken: Megatron would put all of them among what it has loaded."""
    torch.save({"optimizer_steps": 2, "model0": {WEIGHT: 7}}, checkpoint / "common.pt")
    assert read_optimizer_steps(checkpoint) == 2
    tensor = {"optimizer_steps": 2, "model0": {WEIGHT: torch.zeros(1)}}
    refused: list[Any] = [[], tensor, {"optimizer_steps": "x" * 2**17}]
    for content in refused:
        torch.save(content, checkpoint / "common.pt")
        with pytest.raises(ValueError, match="common.pt (has no number|cannot be read)"):
            read_optimizer_steps(checkpoint)
    with zipfile.ZipFile(checkpoint / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**28))
    with pytest.raises(ValueError, match="more than a few values"):
        read_optimizer_steps(checkpoint)
