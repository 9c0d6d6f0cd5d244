"""`jetmoe convert`."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

from tests.malformed.world import LONG, Case, Harm, World, given, spoilt, written


def _without_checksums(world: World) -> None:
    """Who crafts a file can craft a list that fits. A warning says that there is none."""
    (world.checkpoint / "checksums.json").unlink()


def _to_hf(name: str, said: str, harm: Harm = lambda world: None, *options: Any, source: str = "") -> Case:
    def make(world: World) -> list[Any]:
        world.put("run")
        _without_checksums(world)
        harm(world)
        checkpoint = world / (source or "run/checkpoints/tokens_1024")
        more = given(world, options) or [world / "out"]
        return ["jetmoe", "convert", "to-hf", checkpoint, *more]

    return Case(f"to-hf, {name}", make, said, warns=True)


def _run_yaml(text: str | bytes) -> Harm:
    return written("run/checkpoints/tokens_1024/run.yaml", text)


def _metadata(make: Callable[[], Any]) -> Harm:
    return lambda world: world.write("run/checkpoints/tokens_1024/.metadata", pickle.dumps(make()))


def _empty_metadata(**parts: Any) -> Callable[[], Any]:
    def make() -> Any:
        from torch.distributed.checkpoint.metadata import Metadata

        return Metadata(**{"state_dict_metadata": {}, "storage_data": {}, **parts})

    return make


def _without_places() -> Harm:
    """What its tensors are is said, where they lie is not."""

    def harm(world: World) -> None:
        file = world / "run/checkpoints/tokens_1024/.metadata"
        metadata = pickle.loads(file.read_bytes())
        metadata.storage_data = None
        file.write_bytes(pickle.dumps(metadata))

    return harm


def _elsewhere(**changes: Any) -> Harm:
    """Its tensors' places are changed."""

    def harm(world: World) -> None:
        from dataclasses import replace

        file = world / "run/checkpoints/tokens_1024/.metadata"
        metadata = pickle.loads(file.read_bytes())
        metadata.storage_data = {key: replace(place, **changes) for key, place in metadata.storage_data.items()}
        file.write_bytes(pickle.dumps(metadata))

    return harm


SHAPE = "num_layers: 2, hidden_size: 32, num_kv_heads: 2, kv_channels: 8, ffn_hidden_size: 48, vocab_size: 96"
MANY_LAYERS = SHAPE.replace("num_layers: 2", "num_layers: 1000000000000")
TO_HF = [
    _to_hf("nothing", "no/such: no such checkpoint folder", source="no/such"),
    _to_hf("a file", "run.yaml: no such checkpoint folder", source="run/checkpoints/tokens_1024/run.yaml"),
    _to_hf("the folder of checkpoints", "neither run.yaml nor model.yaml", source="run/checkpoints"),
    _to_hf("a name too long", "x{300}.*File name too long", source=LONG),
    _to_hf("run.yaml empty", "run.yaml: damaged, or of another program", _run_yaml("")),
    _to_hf("run.yaml a list", "run.yaml: damaged, or of another program", _run_yaml("[1]")),
    _to_hf("run.yaml broken", "run.yaml: damaged, or of another program", _run_yaml("a: [")),
    _to_hf("run.yaml binary", "run.yaml: damaged, or of another program", _run_yaml(bytes(range(256)))),
    _to_hf("run.yaml deeply nested", "run.yaml: damaged, or of another program", _run_yaml("[" * 50_000)),
    _to_hf("run.yaml of python", "run.yaml: damaged, or", _run_yaml("a: !!python/object/apply:os.mkdir [witness]")),
    _to_hf("run.yaml with a model of text", "run.yaml: damaged, or of another program", _run_yaml("model: small")),
    _to_hf(
        "run.yaml of 10**12 layers",
        "run.yaml: ",
        _run_yaml(f"model: {{{MANY_LAYERS}}}\nbatch: {{sequence_length: 4}}"),
    ),
    _to_hf("run.yaml without a batch", "run.yaml: damaged", _run_yaml(f"model: {{{SHAPE}}}")),
    _to_hf(
        "a tokenizer of numbers",
        "run.yaml: damaged",
        _run_yaml(f"model: {{{SHAPE}}}\nbatch: {{sequence_length: 4}}\ntokenizer: [7]"),
    ),
    *(
        _to_hf(
            f"a sequence of {n[:20]}",
            "run.yaml: damaged",
            _run_yaml(f"model: {{{SHAPE}}}\nbatch: {{sequence_length: {n}}}"),
        )
        for n in ("0", "-5", ".inf", ".nan", "1.5", "1e300", "0x" + "f" * 5000, "[4]", "true")
    ),
    _to_hf(".metadata a list", "tokens_1024: .*metadata", _metadata(lambda: [1, 2])),
    _to_hf(".metadata a number", "tokens_1024: .*metadata", _metadata(lambda: 7)),
    _to_hf(".metadata of no tensors", "tokens_1024: has no tensor 'embedding", _metadata(_empty_metadata())),
    _to_hf(".metadata of a list of tensors", "tokens_1024: ", _metadata(_empty_metadata(state_dict_metadata=[1]))),
    _to_hf(".metadata without places", "tokens_1024: ", _without_places()),
    _to_hf(".metadata that leads out", "tokens_1024", _elsewhere(relative_path="../../config.yaml")),
    _to_hf(".metadata that leads to a folder", "tokens_1024", _elsewhere(relative_path="..")),
    _to_hf(".metadata that leads beyond", "distcp: damaged", _elsewhere(offset=2**40)),
    _to_hf(".metadata of negative places", "metadata does not say where", _elsewhere(offset=-1)),
    _to_hf(".metadata of places in text", "tokens_1024", _elsewhere(offset="x")),
    _to_hf("tensors empty", "distcp: damaged", spoilt("run/checkpoints/tokens_1024/__0_0.distcp", "empty")),
    _to_hf("tensors a folder", "distcp is not a file", spoilt("run/checkpoints/tokens_1024/__0_0.distcp", "a folder")),
    _to_hf(
        "tensors crafted", "distcp: damaged", lambda w: w.crafted("run/checkpoints/tokens_1024/__0_0.distcp", 200_000)
    ),
    _to_hf("an output that exists", "tmp: exists already", lambda w: None, lambda w: w / "tmp"),
    _to_hf("an output below a file", "/f: File exists", written("f", ""), lambda w: w / "f/out"),
    _to_hf("an output too long", "x{300}.*File name too long", lambda w: None, lambda w: w / LONG),
    _to_hf(
        "an unknown dtype", "argument --dtype: invalid choice", lambda w: None, lambda w: w / "out", "--dtype", "fp8"
    ),
    _to_hf(
        "no such tokenizer", "no/such: no such tokenizer", lambda w: None, lambda w: w / "out", "--tokenizer", "no/such"
    ),
]


def _from_hf(name: str, harm: Harm, said: str) -> Case:
    def make(world: World) -> list[Any]:
        world.put("hf")
        harm(world)
        return ["jetmoe", "convert", "from-hf", world / "hf", world / "out"]

    return Case(f"from-hf, {name}", make, said)


def _config(name: str, value: Any, said: str) -> Case:
    """Under both of its names, where it has two."""
    names = {
        "num_local_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_top_k",
        "num_hidden_layers": "num_layers",
    }
    names |= {"rms_norm_eps": "layer_norm_epsilon", "max_position_embeddings": "n_positions"}
    names |= {"intermediate_size": "ffn_hidden_size"}

    def harm(world: World) -> None:
        both = dict.fromkeys((name, names.get(name, name)), value)
        world.edit_json("hf/config.json", lambda content: content.update(both))

    return _from_hf(f"{name}={str(value)[:20]}", harm, rf"config\.json: {said}")


SAFETENSORS = "hf/model.safetensors"


def _header(edit: Callable[[dict[str, Any]], Any]) -> Harm:
    """The header is another, the tensors are where they were."""

    def harm(world: World) -> None:
        content = (world / SAFETENSORS).read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        edit(header)
        text = json.dumps(header).encode()
        world.write(SAFETENSORS, struct.pack("<Q", len(text)) + text + content[8 + size :])

    return harm


NORM = "model.norm.weight"


def _entry(**changes: Any) -> Harm:
    return _header(lambda header: header[NORM].update(changes))


def _raw(size: int, text: bytes) -> Harm:
    return written(SAFETENSORS, struct.pack("<Q", size) + text)


def _sharded(index: Any) -> Harm:
    """In the place of the one file, which would be read first."""

    def harm(world: World) -> None:
        (world / SAFETENSORS).unlink()
        written("hf/model.safetensors.index.json", index)(world)

    return harm


def _listed(edit: Callable[[dict[str, str]], Any]) -> Harm:
    """An index of all tensors, changed."""

    def harm(world: World) -> None:
        content = (world / SAFETENSORS).read_bytes()
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        (world / SAFETENSORS).rename(world / "hf/part.safetensors")
        places = dict.fromkeys((name for name in header if name != "__metadata__"), "part.safetensors")
        edit(places)
        world.write("hf/model.safetensors.index.json", {"weight_map": places})

    return harm


UNREADABLE = r"model\.safetensors: not a readable safetensors file"
FROM_HF = [
    _from_hf("config.json empty", spoilt("hf/config.json", "empty"), r"config\.json: not valid JSON"),
    _from_hf("config.json a folder", spoilt("hf/config.json", "a folder"), r"config\.json: Is a directory"),
    _from_hf("config.json binary", written("hf/config.json", bytes(range(256))), r"config\.json: not valid JSON"),
    _from_hf("config.json deeply nested", written("hf/config.json", "[" * 100_000), r"config\.json: not valid JSON"),
    _from_hf("config.json {}", written("hf/config.json", "{}"), r"config\.json: model_type: must be 'jetmoe'"),
    _config("model_type", ["jetmoe"], "model_type: must be 'jetmoe'"),
    _config("num_hidden_layers", -1, "num_hidden_layers or num_layers: "),
    _config("num_hidden_layers", 10**12, "num_hidden_layers or num_layers: "),
    _config("num_hidden_layers", [2], "num_hidden_layers or num_layers: "),
    _config("hidden_size", 1.5, "hidden_size: "),
    _config("hidden_size", 2**62, ".*"),
    _config("num_local_experts", {"a": 1}, "num_local_experts or moe_num_experts: "),
    _config("num_local_experts", 1, ".*top_k"),
    _config("num_experts_per_tok", 0, "num_experts_per_tok or moe_top_k: "),
    _config("kv_channels", 7, ".*kv_channels"),
    _config("rms_norm_eps", float("nan"), "rms_norm_eps or layer_norm_epsilon|.*norm_eps"),
    _config("rms_norm_eps", float("inf"), "rms_norm_eps or layer_norm_epsilon|.*norm_eps"),
    _config("rms_norm_eps", "1e-5", "rms_norm_eps or layer_norm_epsilon: "),
    _config("rope_theta", -1, "rope_theta: "),
    _config("rope_scaling", "yarn", "rope_scaling: "),
    _config("rope_parameters", {"rope_type": {}}, "rope_parameters: "),
    _config("max_position_embeddings", "long", "max_position_embeddings or n_positions: must be a positive number"),
    _config("max_position_embeddings", True, "max_position_embeddings or n_positions: must be a positive number"),
    _config("bias", "no", "bias: JetMoE has True"),
    _from_hf("safetensors empty", spoilt(SAFETENSORS, "empty"), UNREADABLE),
    _from_hf("safetensors a folder", spoilt(SAFETENSORS, "a folder"), "has neither model.safetensors nor"),
    _from_hf("safetensors longer", spoilt(SAFETENSORS, "longer"), UNREADABLE),
    _from_hf("safetensors text", spoilt(SAFETENSORS, "text"), UNREADABLE),
    _from_hf("header of 2**63 bytes", _raw(2**63, b"{}"), UNREADABLE),
    _from_hf("header longer than the file", _raw(10**6, b"{}"), UNREADABLE),
    _from_hf("header of no bytes", _raw(0, b""), UNREADABLE),
    _from_hf("header no JSON", _raw(4, b"{ no"), UNREADABLE),
    _from_hf("header a list", _raw(2, b"[]"), UNREADABLE),
    _from_hf("header of nothing", _raw(2, b"{}"), "has no tensor 'model"),
    _from_hf("header deeply nested", _raw(100_000, b"[" * 100_000), UNREADABLE),
    _from_hf("offsets beyond the file", _entry(data_offsets=[0, 2**50]), UNREADABLE),
    _from_hf("offsets backwards", _entry(data_offsets=[128, 0]), UNREADABLE),
    _from_hf("offsets that overlap", _entry(data_offsets=[0, 128]), UNREADABLE),
    _from_hf("offsets negative", _entry(data_offsets=[-128, 0]), UNREADABLE),
    _from_hf("offsets of text", _entry(data_offsets="all"), UNREADABLE),
    _from_hf("a type of no size", _entry(dtype="X32"), UNREADABLE),
    _from_hf("a shape of other size", _entry(shape=[7]), UNREADABLE),
    _from_hf("a shape that overflows", _entry(shape=[2**40, 2**40]), UNREADABLE),
    _from_hf("a negative shape", _entry(shape=[-32]), UNREADABLE),
    _from_hf("numbers of 32 bits for floats", _entry(dtype="I32"), f"{NORM}.* int32|several types"),
    _from_hf("a tensor left out", _header(lambda header: header.pop(NORM)), f"{UNREADABLE}|has no tensor '{NORM}'"),
    _from_hf("an index of text", _sharded("text"), r"index\.json: not valid JSON"),
    _from_hf("an index of a list", _sharded([]), r"index\.json: must hold a JSON object"),
    _from_hf("an index without a map", _sharded({}), r"index\.json: weight_map must give a file"),
    _from_hf("an index of numbers", _sharded({"weight_map": {NORM: 1}}), r"index\.json: weight_map must give a file"),
    _from_hf("an index of an absolute path", _sharded({"weight_map": {NORM: "/etc/passwd"}}), "weight_map must give"),
    _from_hf(
        "an index of a missing file", _listed(lambda m: m.update({NORM: "gone.safetensors"})), "gone.safetensors: "
    ),
    _from_hf("an index of an empty name", _listed(lambda m: m.update({NORM: ""})), "weight_map must give|hf"),
    _from_hf(
        "an index of config.json", _listed(lambda m: m.update({NORM: "config.json"})), r"config\.json: not a readable"
    ),
    _from_hf("an index without a tensor", _listed(lambda m: m.pop(NORM)), f"has no tensor '{NORM}'"),
    _from_hf("an index with one too many", _listed(lambda m: m.update(x="part.safetensors")), "'x' is no tensor of"),
    _from_hf("an output that exists", lambda world: (world / "out").mkdir(), "out: exists already"),
    _from_hf("a name with a zero byte", _listed(lambda m: m.update({NORM: "a\0b"})), r"weight_map must give|a\\x00b"),
    Case(
        "from-hf, nothing", lambda w: ["jetmoe", "convert", "from-hf", "no", w / "out"], "no/config.json: No such file"
    ),
    Case(
        "from-hf, a checkpoint",
        lambda w: ["jetmoe", "convert", "from-hf", w.put("run").checkpoint, w / "out"],
        "config.json: No such file",
    ),
    Case(
        "from-hf, a name too long",
        lambda w: ["jetmoe", "convert", "from-hf", LONG, w / "out"],
        "x{300}.*File name too long",
    ),
]


def _verify(name: str, said: str, harm: Harm, *options: Any) -> Case:
    def make(world: World) -> list[Any]:
        world.put("hf", "run")
        _without_checksums(world)
        harm(world)
        return ["jetmoe", "convert", "verify", world / "hf", world.checkpoint, *options]

    return Case(f"verify, {name}", make, said, warns=True)


VERIFY = [
    _verify("safetensors cut", UNREADABLE, spoilt(SAFETENSORS, "cut")),
    _verify("tensors cut", "distcp: damaged", spoilt("run/checkpoints/tokens_1024/__0_0.distcp", "cut")),
    _verify(
        "tensors crafted", "distcp: damaged", lambda w: w.crafted("run/checkpoints/tokens_1024/__0_0.distcp", 200_000)
    ),
    _verify("tokens of text", "--tokens: write ids as 1,2,3, not 'a,b'", lambda w: None, "--tokens", "a,b"),
    _verify("tokens beyond", "--tokens: must be ids from 0 to 95", lambda w: None, "--tokens", "1,96"),
    _verify("tokens of 30 digits", "--tokens: must be ids from 0 to 95", lambda w: None, "--tokens", "9" * 30),
    _verify("no tokens", "--tokens: write ids as 1,2,3", lambda w: None, "--tokens", ""),
    _verify("a tolerance of text", "argument --tolerance: invalid float", lambda w: None, "--tolerance", "little"),
    Case("verify, nothing", lambda w: ["jetmoe", "convert", "verify", "no", "no"], "no: no such checkpoint folder"),
    Case(
        "verify, a data folder",
        lambda w: ["jetmoe", "convert", "verify", w.put("data") / "data", w / "data"],
        "data: not a checkpoint",
    ),
]

CASES = [*TO_HF, *FROM_HF, *VERIFY]
