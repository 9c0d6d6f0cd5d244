"""Nothing in a checkpoint runs code: crafted files with checksums that match, and pickles that are nearly right."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import random
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
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from jetmoe_megatron.checkpoint.checksums import CHECKSUMS, METADATA, checksum
from jetmoe_megatron.checkpoint.metadata import read_metadata
from tests.ranks import run_ranks
from tests.support import jetmoe, pretrain, small_run, training, write_run

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


def spoilt(content: bytes, chance: random.Random) -> bytes:
    """Nearly right: bytes turned, opcodes moved, doubled or put in another's place, names exchanged."""
    how = chance.randrange(6)
    if how == 0:
        changed = bytearray(content)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    ends = [position for _, _, position in pickletools.genops(content) if position is not None]
    parts = [content[a:b] for a, b in zip(ends, [*ends[1:], len(content)], strict=True)]
    i, j = chance.randrange(len(parts)), chance.randrange(len(parts))
    if how == 1:
        parts[i] = parts[j]
    elif how == 2:
        parts.insert(i, parts[j])
    elif how == 3:
        del parts[i]
    elif how == 4:
        parts[i] = chance.choice([b"R", b"b", b"o", b"\x81", b"\x92", b"Q", b"\x82\x01", b"0", b"2", b"a", b"u", b"s"])
    else:
        names = [b"TensorStorageMetadata", b"ChunkStorageMetadata", b"MetadataIndex", b"_StorageInfo", b"Size"]
        old, new = chance.choice(names), chance.choice([*names, b"BytesStorageMetadata", b"load", b"Tensor"])
        return content.replace(bytes([len(old)]) + old, bytes([len(new)]) + new, chance.choice([1, -1]))
    return b"".join(parts)


@pytest.mark.parametrize("seed", range(4))
def test_pickles_that_are_nearly_right(checkpoint: Path, seed: int) -> None:
    """Each is refused with a reason in one line, or gives metadata of tensors in files of the checkpoint alone."""
    chance, content, taken = random.Random(seed), _small_metadata(), 0
    for _ in range(1500):
        harmed = spoilt(content, chance)
        (checkpoint / METADATA).write_bytes(harmed)
        try:
            metadata = read_metadata(checkpoint)
        except ValueError as error:
            assert str(error).startswith(METADATA)
            continue
        taken += 1
        assert type(metadata) is Metadata and metadata.planner_data is None
        for entry in metadata.state_dict_metadata.values():
            assert type(entry) is TensorStorageMetadata and type(entry.properties) is TensorProperties
            assert type(entry.size) is torch.Size and isinstance(entry.properties.dtype, torch.dtype)
            assert all(type(chunk) is ChunkStorageMetadata for chunk in entry.chunks)
        for index, place in metadata.storage_data.items():
            assert type(index) is MetadataIndex and type(place) is _StorageInfo
            assert "/" not in place.relative_path and place.relative_path.endswith(".distcp")
            assert place.offset >= 0 and place.length >= 0 and place.transform_descriptors is None
    assert 0 < taken < 1000


def _small_metadata() -> bytes:
    size = torch.Size([4, 6])
    chunks = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 6])) for at in (0, 2)]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, chunks)
    places = {MetadataIndex("w", [at, 0]): _StorageInfo(f"__{at}_0.distcp", 0, 96) for at in (0, 2)}
    return pickle.dumps(Metadata({"w": entry}, storage_data=places))


def test_a_pickle_that_asks_for_memory_or_depth(checkpoint: Path) -> None:
    """Gigabytes by a number of its memo, of a text that is not there, or of a list in a list in a list."""
    for content in (
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\xff\xff\xff\xff\x00\x00\x00\x00x.",
        b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
        b"\x80\x04" + b"(" * 300_000 + b"t" * 300_000 + b".",
        b"\x80\x04}" + b")" + b"2\x86" * 60 + b"Ns.",  # a key whose hash takes for ever
        b"\x80\x04}" + b")" + b"\x94h\x00h\x00\x86" * 60 + b"Ns.",
        b"\x80\x04}" + b")" + b"\x85" * 3_000_000 + b"Ns.",  # one that takes the whole stack
        b"\x80\x04}(" + keys_with_one_hash(300_000) + b"u.",
        pickle.dumps(Metadata(wide_tensor(4000), storage_data={})),
        b"\x80\x05\x96\x00\x00\x00\x80\x01\x00\x00\x00.",  # 6 GB
    ):
        (checkpoint / METADATA).write_bytes(content)
        with pytest.raises(ValueError, match=r"\.metadata"):
            read_metadata(checkpoint)


def keys_with_one_hash(number: int) -> bytes:
    """Each of them would be compared with all others."""
    keys = [(n * sys.hash_info.modulus).to_bytes(11, "little", signed=True) for n in range(1, number)]
    return b"".join(b"\x8a\x0b" + key + b"N" for key in keys)


def wide_tensor(dimensions: int) -> dict[str, Any]:
    """As many chunks as dimensions, all of them one object."""
    size = torch.Size([1] * dimensions)
    chunk = ChunkStorageMetadata(torch.Size([0] * dimensions), size)
    return {"w": TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, [chunk] * dimensions)}


def test_many_chunks_take_no_time_that_grows_with_their_square(checkpoint: Path) -> None:
    """40,000 took 3.5 s when each was compared with all others. Here each is read."""
    number = 60_000
    sizes = torch.Size([1])
    chunks = [ChunkStorageMetadata(torch.Size([n]), sizes) for n in range(number)]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([number]), chunks)
    places = {MetadataIndex("w", [n]): _StorageInfo("__0_0.distcp", 0, 96) for n in range(number)}
    (checkpoint / METADATA).write_bytes(pickle.dumps(Metadata({"w": entry}, storage_data=places)))
    assert len(read_metadata(checkpoint).storage_data) == number


def a_tensor(chunks: list[tuple[list[int], list[int]]], places: list[list[int]]) -> bytes:
    parts = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([4, 6]), parts)
    storage = {MetadataIndex("w", offset): _StorageInfo("__0_0.distcp", 0, 96) for offset in places}
    return pickle.dumps(Metadata({"w": entry}, storage_data=storage))


@pytest.mark.parametrize(
    ("chunks", "places"),
    [
        ([], []),
        ([([0, 0], [2, 6])], [[0, 0]]),
        ([([0, 0], [2, 6]), ([0, 0], [2, 6])], [[0, 0]]),
        ([([0, 0], [3, 6]), ([2, 0], [1, 6])], [[0, 0], [2, 0]]),
        ([([0, 0], [2, 6]), ([2, 0], [2, 6])], [[0, 0]]),
    ],
    ids=["none", "half", "half twice", "one over another", "without a place"],
)
def test_tensors_that_are_not_whole(checkpoint: Path, chunks: Any, places: Any) -> None:
    """The rest would be whatever the memory held."""
    (checkpoint / METADATA).write_bytes(a_tensor(chunks, places))
    with pytest.raises(ValueError, match="parts of 'w' are missing, or occur twice"):
        read_metadata(checkpoint)


def test_a_list_that_many_tensors_share(checkpoint: Path) -> None:
    metadata = pickle.loads(a_tensor([([0, 0], [2, 6]), ([2, 0], [2, 6])], [[0, 0], [2, 0]]))
    metadata.state_dict_metadata["w"].chunks *= 2000
    metadata.state_dict_metadata |= {f"w{i}": metadata.state_dict_metadata["w"] for i in range(2000)}
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="more parts of tensors than it has bytes"):
        read_metadata(checkpoint)


@pytest.mark.parametrize("value", [True, -1, 2**53, 1.0, "7", None, torch.tensor(7)], ids=str)
def test_the_optimizers_steps_are_a_number(checkpoint: Path, value: Any) -> None:
    torch.save({"optimizer_steps": value}, checkpoint / "common.pt")
    seal(checkpoint)
    ended = pretrain(1, checkpoint.parents[2] / "run.yaml")
    assert ended.returncode == 2
    assert "common.pt has no number of" in ended.stderr or "common.pt cannot be read" in ended.stderr


def test_common_holds_plain_values(checkpoint: Path) -> None:
    """Of which one is taken: Megatron would put all of them among what it has loaded."""
    from jetmoe_megatron.checkpoint.common_state import LoadsSteps

    torch.save({"optimizer_steps": 2, "model0": {WEIGHT: 7}}, checkpoint / "common.pt")
    assert LoadsSteps().load_common(checkpoint) == {"optimizer_steps": 2}
    tensor = {"optimizer_steps": 2, "model0": {WEIGHT: torch.zeros(1)}}
    refused: list[Any] = [[], tensor, {"optimizer_steps": "x" * 2**17}]
    for content in refused:
        torch.save(content, checkpoint / "common.pt")
        with pytest.raises(ValueError, match="common.pt (has no number|cannot be read)"):
            LoadsSteps().load_common(checkpoint)
    with zipfile.ZipFile(checkpoint / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**28))
    with pytest.raises(ValueError, match="more than a few values"):
        LoadsSteps().load_common(checkpoint)
