"""What `start_from` names: nothing, something else, weights of another shape, a converted model that is damaged."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from tests.malformed.world import NEWEST, Case, World


def _start(name: str, make: Callable[[World], Any], said: str, warns: bool = False, **changes: Any) -> Case:
    """make: returns the name of what to start from, if it is not the run's checkpoint."""

    def arguments(world: World) -> list[Any]:
        return world.branch(make(world) or NEWEST, **changes)

    return Case(f"start_from {name}", arguments, said, warns=warns)


def _folder(*files: str) -> Callable[[World], str]:
    def make(world: World) -> str:
        (world / "foreign").mkdir()
        for file in files:
            world.write(f"foreign/{file}", "x")
        return "foreign"

    return make


def _good(name: str, path: str = "") -> Callable[[World], str]:
    def make(world: World) -> str:
        world.put(name)
        return path or name

    return make


def _converted(file: str, how: str, sealed: bool = True) -> Callable[[World], str]:
    def make(world: World) -> str:
        world.put("converted").spoil(f"converted/{file}", how)
        if sealed:
            world.seal(world / "converted")
        return "converted"

    return make


def _crafted(folder: str, file: str) -> Callable[[World], str]:
    def make(world: World) -> str:
        world.put(folder.partition("/")[0])
        world.crafted(f"{folder}/{file}", size=(world / folder / file).stat().st_size)
        world.seal(world / folder)
        return folder

    return make


def _written(file: str, content: str | bytes) -> Callable[[World], str]:
    def make(world: World) -> str:
        world.put("converted").write(f"converted/{file}", content)
        world.seal(world / "converted")
        return "converted"

    return make


def _flipped_where_it_is_large(world: World) -> str:
    """Beyond what a quick look reads: only the checksum that all ranks compute shows it."""
    world.put("wide_run").spoil("wide_run/checkpoints/tokens_256/__0_0.distcp", "flipped")
    return "wide_run/checkpoints/tokens_256"


DAMAGED = "start_from: .*converted is damaged: "
FILES = ("__0_0.distcp", "common.pt", "metadata.json", ".metadata", "model.yaml", "hf/config.json", "checksums.json")


def _with_shape(**changes: Any) -> dict[str, Any]:
    return {f"model__{key}": value for key, value in changes.items()}


CASES = [
    _start("nothing", lambda world: "no/such", "start_from: .*no/such: no such folder"),
    _start("a file", lambda world: world.write("file", "x").name, "start_from: .*file: no such folder"),
    _start("an empty folder", _folder(), "start_from: .*foreign: "),
    _start("a folder of other files", _folder("model.pt", "README.md"), "start_from: .*foreign: "),
    _start("a folder with an empty .metadata", _folder(".metadata"), "foreign: cannot be loaded: ", warns=True),
    _start("a data folder", _good("data"), "start_from: .*data: "),
    _start("a Hugging Face folder", _good("hf"), "start_from: .*hf: .*from-hf"),
    _start("a tokenizer", _good("tokenizer"), "start_from: .*tokenizer: "),
    _start("the folder of checkpoints", _good("run", "run/checkpoints"), "start_from: .*checkpoints: "),
    _start("its .metadata", _good("run", f"{NEWEST}/.metadata"), "start_from: .*metadata: no such folder"),
    _start(
        "a large file flipped", _flipped_where_it_is_large, "tokens_256.*__0_0.distcp", **_with_shape(vocab_size=8192)
    ),
    _start("crafted .metadata", _crafted(NEWEST, ".metadata"), "tokens_1024: cannot be loaded: .*mkdir"),
    _start("crafted common.pt", _crafted(NEWEST, "common.pt"), "tokens_1024: cannot be loaded: "),
    _start("crafted tensors", _crafted(NEWEST, "__0_0.distcp"), "tokens_1024: cannot be loaded: "),
    _start(
        "another width",
        _good("run", NEWEST),
        "differs from the saved run in model.ffn_hidden_size",
        **_with_shape(ffn_hidden_size=64),
    ),
    _start("converted, other layers", _good("converted"), "converted: differs", **_with_shape(num_layers=3)),
    _start("converted, another width", _good("converted"), "converted: differs", **_with_shape(ffn_hidden_size=64)),
    _start("converted, other experts", _good("converted"), "converted: differs", **_with_shape(num_experts=8)),
    _start(
        "converted, other heads of the same shapes",
        _good("converted"),
        "differs from the saved run in model.num_kv_heads .* model.kv_channels",
        **_with_shape(num_kv_heads=1, kv_channels=16),
    ),
    _start(
        "a batch that fits no step",
        _good("run", NEWEST),
        r"no multiple of batch.global_tokens \(384\): the nearest that fit are 256 and 512",
        batch__global_tokens=384,
    ),
    _start(
        "sequences that fit no step",
        _good("run", NEWEST),
        r"no multiple of batch.global_tokens \(480\): none fits: choose another checkpoint",
        batch={"sequence_length": 48, "global_tokens": 480, "micro_sequences": 2},
    ),
    _start("converted, .metadata missing", _converted(".metadata", "missing"), "converted is damaged: .metadata"),
    _start("converted, .metadata empty", _converted(".metadata", "empty"), "converted: "),
    _start("converted, .metadata text", _converted(".metadata", "text"), "converted: "),
    _start("converted, crafted .metadata", _crafted("converted", ".metadata"), "converted: .*mkdir"),
    _start("converted, crafted common.pt", _crafted("converted", "common.pt"), "converted: "),
    _start("converted, crafted tensors", _crafted("converted", "__0_0.distcp"), "converted: "),
    _start("converted, tensors missing", _converted("__0_0.distcp", "missing"), "converted: "),
    _start("converted, tensors cut", _converted("__0_0.distcp", "cut"), "converted: "),
    _start("converted, tensors empty", _converted("__0_0.distcp", "empty"), "converted: "),
    _start("converted, metadata.json missing", _converted("metadata.json", "missing"), "converted: "),
    _start("converted, metadata.json text", _converted("metadata.json", "text"), "converted: "),
    _start("converted, metadata.json a list", _written("metadata.json", "[]"), "converted: "),
    _start("converted, another format", _written("metadata.json", '{"sharded_backend": "zarr"}'), "converted: "),
    _start("converted, common.pt missing", _converted("common.pt", "missing"), "converted: "),
    _start("converted, common.pt empty", _converted("common.pt", "empty"), "converted: "),
    _start("converted, a list for .metadata", _written(".metadata", pickle.dumps([1, 2])), "converted: "),
    *(_start(f"converted, {file} flipped", _converted(file, "flipped", sealed=False), DAMAGED) for file in FILES),
    *(_start(f"converted, {file} lost", _converted(file, "missing", sealed=False), DAMAGED) for file in FILES[:-1]),
]
