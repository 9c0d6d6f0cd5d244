"""The tools: `jetmoe data`, `jetmoe convert` and `jetmoe report`."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from collections.abc import Callable, Sequence
from typing import Any

from tests.malformed.world import Case, World

LONG = "x" * 300
Harm = Callable[[World], Any]


def _written(name: str, content: Any) -> Harm:
    return lambda world: world.write(name, content)


def _spoilt(name: str, how: str) -> Harm:
    return lambda world: world.spoil(name, how)


# jetmoe data tokenize, and tokenizer, of texts


def _texts(name: str, file: str, content: bytes, said: str) -> tuple[Case, Case]:
    def tokenize(world: World) -> list[Any]:
        world.put("tokenizer").write(f"in/{file}", content)
        command = ["jetmoe", "data", "tokenize", world / "in" / file]
        return [*command, "--output", world / "set", "--tokenizer", world / "tokenizer"]

    def train(world: World) -> list[Any]:
        world.write(f"in/{file}", content)
        command = ["jetmoe", "data", "tokenizer", world / "in" / file]
        return [*command, "--output", world / "out", "--vocab-size", 300]

    return Case(f"tokenize, {name}", tokenize, said), Case(f"tokenizer, {name}", train, said)


def _line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


TEXTS = [
    case
    for pair in (
        _texts("UTF-16", "a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"a\.jsonl:1: not valid"),
        _texts("text for JSON", "a.jsonl", b"once upon a time\n", r"a\.jsonl:1: not valid JSON"),
        _texts("a line cut", "a.jsonl", _line("a") + b'{"text": "b', r"a\.jsonl:2: not valid JSON"),
        _texts("a list per line", "a.jsonl", b'["a"]\n', r"a\.jsonl:1: the line is a list"),
        _texts("a text of numbers", "a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: the value of 'text' is a number"),
        _texts("two values", "a.jsonl", b'{"text": "a", "text": "b"}\n', r"a\.jsonl:1: 2 values of the key 'text'"),
        _texts("a line deeply nested", "a.jsonl", b"[" * 200_000 + b"\n", r"a\.jsonl:1: not usable JSON"),
        _texts("a zero-length gzip", "a.jsonl.gz", gzip.compress(b""), r"a\.jsonl\.gz: the file is empty"),
        _texts("a gzip cut", "a.jsonl.gz", gzip.compress(_line("abc") * 9)[:-9], r"a\.jsonl\.gz:\d+: the gzip stream"),
        _texts("Zstandard of nothing", "a.jsonl.zst", b"\x28\xb5\x2f\xfd\xff\xff", r"a\.jsonl\.zst:1: the zstd stream"),
        _texts("Parquet of text", "a.parquet", b"PAR1 not really PAR1", r"a\.parquet: not readable as Parquet"),
        _texts("Parquet of nothing", "a.parquet", b"", r"a\.parquet: "),
        _texts("Latin-1", "a.txt", "Läuft".encode("latin-1"), r"a\.txt:1: not valid UTF-8"),
    )
    for case in pair
]


def _tokenize(name: str, said: str, *options: Any, also: Any = (), harm: Harm = lambda world: None) -> Case:
    """options: the last one of a name counts. also: one more input. Both may be functions of the world."""

    def make(world: World) -> list[Any]:
        world.put("tokenizer", "corpus")
        harm(world)
        command = ["jetmoe", "data", "tokenize", world / "corpus", *_given(world, [also] if also else [])]
        command += ["--output", world / "set", "--tokenizer", world / "tokenizer"]
        return [*command, *_given(world, options)]

    return Case(f"tokenize, {name}", make, said)


def _given(world: World, options: Sequence[Any]) -> list[Any]:
    return [option(world) if callable(option) else option for option in options]


def _partial(**files: Any) -> Harm:
    """What an earlier run seems to have left."""

    def make(world: World) -> None:
        for name, content in files.items():
            world.write(f"set.partial/{name}", content)
        world.write("set.partial/lock", "")

    return make


def _state(**changes: Any) -> Harm:
    """A state as an earlier run with the same settings leaves it, but for the changes."""

    def make(world: World) -> None:
        from dataclasses import asdict

        from data_tools import shards
        from data_tools.engines import open_reference
        from data_tools.inputs import find_files
        from data_tools.partial import State
        from data_tools.tokenize import _identity

        settings = {
            "format": 1,
            "tokenizer": open_reference(world / "tokenizer").digest,
            "text_key": "text",
            "engine": "auto",
            "append_eod": True,
            "shard_bytes": shards.SHARD_BYTES,
            "inputs": [_identity(path) for path in find_files([world / "corpus"])],
        }
        state = {**asdict(State(shards=1)), **changes}
        empty = {name: "" for name in ("bin", "lengths", "skipped")}
        _partial(**{"settings.json": settings, "state.json": state}, **empty)(world)

    return make


TOKENIZE = [
    _tokenize("an input that is not there", "no/such: no such file or folder", also=lambda world: world / "no/such"),
    _tokenize("an empty folder", "tmp: no .jsonl", also=lambda world: world / "tmp"),
    _tokenize("an input twice", r"a\.jsonl: named twice", also=lambda world: world / "corpus/a.jsonl"),
    _tokenize("a device", "/dev/zero: not a file on a disk", also="/dev/zero"),
    _tokenize("a name too long", "x{300}: .*File name too long", also=LONG),
    _tokenize("a pattern of nothing", r"\*\.csv: no such file", also="*.csv"),
    _tokenize("an output below a file", "cannot write ", "--output", lambda world: world.write("f", "") / "set"),
    _tokenize("an output that is a folder", "names no file", "--output", lambda world: f"{world / 'tmp'}/"),
    _tokenize("an output too long", "x{300}.*File name too long", "--output", lambda world: world / LONG),
    _tokenize("an output that exists", r"one\.bin exists", "--output", lambda w: w.put("encoded") / "encoded/one"),
    _tokenize("no workers", "workers is 0", "--workers", "0"),
    _tokenize("workers of text", "argument --workers: invalid int value", "--workers", "many"),
    _tokenize("an unknown engine", "argument --engine: invalid choice", "--engine", "fast"),
    _tokenize("another key", "no key 'content'", "--text-key", "content"),
    _tokenize("a tokenizer that is not there", "no/such/tokenizer.json: no such file", "--tokenizer", "no/such"),
    _tokenize("a partial that is a file", "set.partial", harm=_written("set.partial", "x")),
    _tokenize(
        "a partial of another program", "set.partial/notes.txt is not of this", harm=_partial(**{"notes.txt": ""})
    ),
    _tokenize("a state of text", "set.partial: cannot be read; delete it", harm=_partial(**{"state.json": "text"})),
    _tokenize("a state of a list", "set.partial: cannot be read; delete it", harm=_partial(**{"state.json": []})),
    _tokenize(
        "a state deeply nested",
        "set.partial: cannot be read; delete it",
        harm=_partial(**{"state.json": "[" * 100_000}),
    ),
    _tokenize("a state with documents of text", "set.partial: cannot be read; delete", harm=_state(documents="many")),
    _tokenize("a state with negative shards", "set.partial: cannot be read; delete", harm=_state(shards=-1)),
    _tokenize("a state with an unknown key", "set.partial: cannot be read; delete", harm=_state(extra=1)),
    _tokenize("a state of another engine", "set.partial: cannot be read; delete", harm=_state(engine="quick")),
    _tokenize("a state of more than there is", "set.partial/bin: 0 bytes instead of", harm=_state(tokens=99)),
]


def _tokenizer(name: str, said: str, *options: Any, source: str = "corpus") -> Case:
    def make(world: World) -> list[Any]:
        world.put("corpus")
        command = ["jetmoe", "data", "tokenizer", world / source, "--output", world / "out", "--vocab-size", "300"]
        return [*command, *_given(world, options)]

    return Case(f"tokenizer, {name}", make, said)


TOKENIZER = [
    _tokenizer("too small", "vocab_size is 10; it must be at least 259", "--vocab-size", "10"),
    _tokenizer("a negative size", "vocab_size is -5; it must be", "--vocab-size", "-5"),
    _tokenizer("a size of text", "argument --vocab-size: invalid int value", "--vocab-size", "32k"),
    _tokenizer("an output that exists", "tmp exists; choose another output", "--output", lambda world: world / "tmp"),
    _tokenizer(
        "an output below a file", "cannot write .*f/out", "--output", lambda world: world.write("f", "") / "out"
    ),
    _tokenizer("an output over a file", "f", "--overwrite", "--output", lambda world: world.write("f", "")),
    _tokenizer("an output too long", "x{300}.*File name too long", "--output", lambda world: world / LONG),
    _tokenizer("an input that is not there", "no/such: no such file", source="no/such"),
]


# jetmoe data merge, split, inspect


def _sets(name: str, arguments: Callable[[World], list[Any]], said: str, harm: Harm = lambda world: None) -> Case:
    def make(world: World) -> list[Any]:
        world.put("encoded")
        harm(world)
        return ["jetmoe", "data", *arguments(world)]

    return Case(name, make, said)


def _merge(world: World, *more: Any) -> list[Any]:
    return ["merge", world / "encoded/one", world / "encoded/two", *more, "--output", world / "set"]


def _split(world: World, *more: Any) -> list[Any]:
    outputs = ["--train", world / "train", "--held-out", world / "held"]
    return ["split", world / "encoded/one", *outputs, "--fraction", "0.5", *more]


def _inspect(world: World, *more: Any) -> list[Any]:
    return ["inspect", world / "encoded/one", *more]


def _headed(code: int) -> Harm:
    """The dtype alone is another."""
    return lambda world: world.patch("encoded/one.idx", 17, bytes([code]))


def _of_floats(world: World) -> None:
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 7, 4, 5)
    index += struct.pack("<4i4q5q", *[8] * 4, *range(0, 128, 32), *range(5))
    world.write("encoded/one.idx", index)
    world.write("encoded/one.bin", struct.pack("<32f", *range(32)))


SETS = [
    *(
        _sets(f"{tool.__name__[1:]}, {file} {how}", tool, rf"one\.{file}: {said}", _spoilt(f"encoded/one.{file}", how))
        for tool in (_merge, _split, _inspect)
        for file, how, said in (
            ("idx", "cut", "cut short"),
            ("idx", "a folder", "no such file"),
            ("idx", "text", "not a Megatron index"),
            ("bin", "missing", "no such file"),
            ("bin", "cut", "cut short"),
            ("bin", "longer", "too long"),
        )
    ),
    *(
        _sets(f"{tool.__name__[1:]}, floats", tool, "one.* float32; token ids are integers", _of_floats)
        for tool in (_merge, _split, _inspect)
    ),
    _sets("merge, dtype unknown", _merge, r"one\.idx: version 1 with dtype code 99", _headed(99)),
    _sets("merge, a set twice", lambda w: _merge(w, w / "encoded/one"), "one: named twice"),
    _sets("merge, an output that is an input", lambda w: [*_merge(w), "--output", w / "encoded/two"], "both an input"),
    _sets("merge, an output below a file", lambda w: [*_merge(w), "--output", w.write("f", "") / "a"], "cannot write "),
    _sets("merge, a name too long", lambda w: [*_merge(w), "--output", w / LONG], "x{300}.*File name too long"),
    _sets("merge, an input too long", lambda w: _merge(w, w / LONG), "x{300}.*File name too long"),
    _sets("split, a fraction of text", lambda w: _split(w, "--fraction", "half"), "--fraction: invalid float value"),
    _sets("split, a fraction of 5", lambda w: _split(w, "--fraction", "5"), "fraction is 5.0; it must lie between"),
    _sets("split, an infinite fraction", lambda w: _split(w, "--fraction", "inf"), "fraction is inf; it must lie"),
    _sets("split, a seed of text", lambda w: _split(w, "--seed", "x"), "--seed: invalid int value"),
    _sets("split, a huge seed", lambda w: _split(w, "--seed", "9" * 40), "seed is 9{40}; it must lie between"),
    _sets("split, an output below a file", lambda w: _split(w, "--train", w.write("f", "") / "a"), "cannot write "),
    _sets("split, one output for both", lambda w: _split(w, "--train", w / "held"), "held: named for both sides"),
    _sets(
        "inspect, a document beyond",
        lambda w: _inspect(w.put("tokenizer"), "--document", "99999", "--tokenizer", w / "tokenizer"),
        "no document 99999",
    ),
    _sets("inspect, no tokenizer", lambda w: _inspect(w, "--document", "0"), "pass --tokenizer DIR"),
    _sets(
        "inspect, --check of a cut index",
        lambda w: _inspect(w, "--check"),
        "cut short",
        _spoilt("encoded/one.idx", "cut"),
    ),
    _sets("inspect, a prefix too long", lambda w: ["inspect", w / LONG], "x{300}.*File name too long"),
]


# jetmoe convert


def _to_hf(name: str, said: str, harm: Harm = lambda world: None, *options: Any, source: str = "") -> Case:
    def make(world: World) -> list[Any]:
        world.put("run")
        harm(world)
        checkpoint = world / (source or "run/checkpoints/tokens_1024")
        more = _given(world, options) or [world / "out"]
        return ["jetmoe", "convert", "to-hf", checkpoint, *more]

    return Case(f"to-hf, {name}", make, said)


def _run_yaml(text: str | bytes) -> Harm:
    return _written("run/checkpoints/tokens_1024/run.yaml", text)


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
    _to_hf(".metadata a list", "tokens_1024: .*metadata", _metadata(lambda: [1, 2])),
    _to_hf(".metadata a number", "tokens_1024: .*metadata", _metadata(lambda: 7)),
    _to_hf(".metadata of no tensors", "tokens_1024: has no tensor 'embedding", _metadata(_empty_metadata())),
    _to_hf(".metadata of a list of tensors", "tokens_1024: ", _metadata(_empty_metadata(state_dict_metadata=[1]))),
    _to_hf(".metadata without places", "tokens_1024: ", _without_places()),
    _to_hf(".metadata that leads out", "tokens_1024", _elsewhere(relative_path="../../config.yaml")),
    _to_hf(".metadata that leads to a folder", "tokens_1024", _elsewhere(relative_path="..")),
    _to_hf(".metadata that leads beyond", "distcp: damaged", _elsewhere(offset=2**40)),
    _to_hf(".metadata of negative places", "distcp: ", _elsewhere(offset=-1)),
    _to_hf(".metadata of places in text", "tokens_1024", _elsewhere(offset="x")),
    _to_hf("tensors empty", "distcp: damaged", _spoilt("run/checkpoints/tokens_1024/__0_0.distcp", "empty")),
    _to_hf(
        "tensors a folder", "distcp: Is a directory", _spoilt("run/checkpoints/tokens_1024/__0_0.distcp", "a folder")
    ),
    _to_hf(
        "tensors crafted", "distcp: damaged", lambda w: w.crafted("run/checkpoints/tokens_1024/__0_0.distcp", 200_000)
    ),
    _to_hf("an output that exists", "tmp: exists already", lambda w: None, lambda w: w / "tmp"),
    _to_hf("an output below a file", "/f: File exists", _written("f", ""), lambda w: w / "f/out"),
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
        both = {key: value for key in (name, names.get(name, name))}
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
    return _written(SAFETENSORS, struct.pack("<Q", size) + text)


def _sharded(index: Any) -> Harm:
    return _written("hf/model.safetensors.index.json", index)


def _listed(edit: Callable[[dict[str, str]], Any]) -> Harm:
    """An index of all tensors, changed."""

    def harm(world: World) -> None:
        content = (world / SAFETENSORS).read_bytes()
        header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
        places = dict.fromkeys((name for name in header if name != "__metadata__"), "model.safetensors")
        edit(places)
        world.write("hf/model.safetensors.index.json", {"weight_map": places})

    return harm


UNREADABLE = r"model\.safetensors: not a readable safetensors file"
FROM_HF = [
    _from_hf("config.json empty", _spoilt("hf/config.json", "empty"), r"config\.json: not valid JSON"),
    _from_hf("config.json a folder", _spoilt("hf/config.json", "a folder"), r"config\.json: Is a directory"),
    _from_hf("config.json binary", _written("hf/config.json", bytes(range(256))), r"config\.json: not valid JSON"),
    _from_hf("config.json deeply nested", _written("hf/config.json", "[" * 100_000), r"config\.json: not valid JSON"),
    _from_hf("config.json {}", _written("hf/config.json", "{}"), r"config\.json: model_type: must be 'jetmoe'"),
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
    _config("rope_scaling", "yarn", "rope_parameters or rope_scaling: "),
    _config("rope_parameters", {"rope_type": {}}, "rope_parameters or rope_scaling: "),
    _config("max_position_embeddings", "long", "max_position_embeddings or n_positions: must be a positive number"),
    _config("max_position_embeddings", True, "max_position_embeddings or n_positions: must be a positive number"),
    _config("bias", "no", "bias: JetMoE has True"),
    _from_hf("safetensors empty", _spoilt(SAFETENSORS, "empty"), UNREADABLE),
    _from_hf("safetensors a folder", _spoilt(SAFETENSORS, "a folder"), "has neither model.safetensors nor"),
    _from_hf("safetensors longer", _spoilt(SAFETENSORS, "longer"), UNREADABLE),
    _from_hf("safetensors text", _spoilt(SAFETENSORS, "text"), UNREADABLE),
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
    _from_hf("an index with one too many", _listed(lambda m: m.update(x="model.safetensors")), "'x' is no tensor of"),
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
        harm(world)
        return ["jetmoe", "convert", "verify", world / "hf", world.checkpoint, *options]

    return Case(f"verify, {name}", make, said)


VERIFY = [
    _verify("safetensors cut", UNREADABLE, _spoilt(SAFETENSORS, "cut")),
    _verify("tensors cut", "distcp: damaged", _spoilt("run/checkpoints/tokens_1024/__0_0.distcp", "cut")),
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


# jetmoe report


def _report(name: str, content: Any, said: str = r"metrics\.jsonl: ") -> Case:
    def make(world: World) -> list[Any]:
        if content is not None:
            world.write("run/metrics.jsonl", content)
        return ["jetmoe", "report", world / "run"]

    return Case(f"report, {name}", make, said)


def _metrics_folder(world: World) -> list[Any]:
    (world / "run/metrics.jsonl").mkdir(parents=True)
    return ["jetmoe", "report", world / "run"]


REPORT = [
    _report("nothing", None, "no steps recorded"),
    _report("empty", "", "no steps recorded"),
    _report("text", "once upon a time\n"),
    _report("binary", bytes(range(256))),
    _report("a list", "[]\n[]\n"),
    _report("numbers", "1\n2\n"),
    _report("null", "null\n"),
    _report("other records", '{"epoch": 1}\n'),
    _report("steps alone", '{"step": 1}\n'),
    _report("steps of text", '{"step": "1", "tokens": "2", "lm_loss": "low", "tokens_per_second": "fast"}\n'),
    _report("deeply nested", "[" * 100_000 + "\n"),
    Case("report, metrics a folder", _metrics_folder, "no steps recorded"),
    Case(
        "report, a file", lambda world: ["jetmoe", "report", world.write("f", "")], "no steps recorded|Not a directory"
    ),
    Case("report, a name too long", lambda world: ["jetmoe", "report", LONG], "x{300}.*File name too long"),
]

USAGE = [
    Case("no command", lambda world: ["jetmoe"], "the following arguments are required: COMMAND"),
    Case("an unknown command", lambda world: ["jetmoe", "train"], "invalid choice: 'train'"),
    Case("an unknown data command", lambda world: ["jetmoe", "data", "shuffle"], "invalid choice: 'shuffle'"),
    Case("data_tools, no command", lambda world: ["data_tools"], "the following arguments are required: COMMAND"),
]

CASES = [*TEXTS, *TOKENIZE, *TOKENIZER, *SETS, *TO_HF, *FROM_HF, *VERIFY, *REPORT, *USAGE]
