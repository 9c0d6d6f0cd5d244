"""A folder with a valid input of every kind, in which a case breaks one thing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from jetmoe_megatron.checkpoint.checksums import write_checksums
from tests.support import environment, small_run, write_dataset, write_run
from tests.warm import Command

LONG = "x" * 300  # more than a file system takes for a name
NEWEST = "run/checkpoints/tokens_1024"
DATA = {"code": 120, "prose": 60, "held_out": 12}  # documents


class Crafted:
    """A pickle that leaves a folder `witness` behind when it is read by whoever lets it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def run(*arguments: object, cwd: Path, scratch: Path) -> tuple[int, str, str]:
    """`pretrain RUN.yaml`, `jetmoe ...` or `data_tools ...`: exit status, stdout, stderr.

    scratch: for temporary files of the command.
    """
    env = {**environment(), "TMPDIR": str(scratch), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    ended = Command(arguments, env, cwd).run(timeout=60)
    return ended.returncode, ended.stdout, ended.stderr


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        make: spoils something and gives the command line: `pretrain`, `jetmoe` or `data_tools` and its arguments.
        said: what the error line must match, a regular expression.
        renamed: what the command may do to the files: names before and after.
        warns: whether warnings may stand before the error.
    """

    name: str
    make: Callable[[World], list[Any]]
    said: str
    renamed: dict[str, str] = field(default_factory=dict)
    warns: bool = False


class Good:
    """What each world is copied from, made once and when it is first needed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _made(self, *arguments: object) -> None:
        status, _, err = run(*arguments, cwd=self.root, scratch=self.root)
        assert status == 0, err

    @cached_property
    def data(self) -> Path:
        folder = self.root / "data"
        folder.mkdir()
        for seed, (name, documents) in enumerate(DATA.items()):
            write_dataset(folder / name, documents, seed)
        return folder

    def _trained(self, name: str, *overrides: str, **changes: Any) -> Path:
        paths = {name: str(self.data / name) for name in DATA}
        self._made("pretrain", write_run(self.root / name, small_run(self.root / name, paths, **changes)), *overrides)
        return self.root / name / "run"

    @cached_property
    def run(self) -> Path:
        """Four of eight steps, with checkpoints after two and four."""
        return self._trained("trained", "debug.max_steps=4", checkpoint__every_tokens=512)

    @cached_property
    def wide_run(self) -> Path:
        """One step of a model whose checkpoint has files of more than a megabyte."""
        return self._trained("wide", "debug.max_steps=1", model__vocab_size=8192)

    @cached_property
    def hf(self) -> Path:
        self._made("jetmoe", "convert", "to-hf", self.run, self.root / "hf")
        return self.root / "hf"

    @cached_property
    def converted(self) -> Path:
        self._made("jetmoe", "convert", "from-hf", self.hf, self.root / "converted")
        return self.root / "converted"

    @cached_property
    def corpus(self) -> Path:
        folder = self.root / "corpus"
        folder.mkdir()
        for name in ("a", "b"):
            texts = [f"{name} {i} the quick brown fox {i * i}" for i in range(40)]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return folder

    @cached_property
    def tokenizer(self) -> Path:
        """Of 300 ids."""
        folder = self.root / "tokenizer"
        self._made("jetmoe", "data", "tokenizer", self.corpus, "--output", folder, "--vocab-size", 300)
        return folder

    @cached_property
    def sentencepiece(self) -> Path:
        import sentencepiece

        folder = self.root / "sentencepiece"
        folder.mkdir()
        texts = [json.loads(line)["text"] for line in (self.corpus / "a.jsonl").read_text().splitlines()]
        with open(folder / "tokenizer.model", "wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=model, vocab_size=40, minloglevel=2
            )
        return folder

    @cached_property
    def encoded(self) -> Path:
        """Two datasets, `one` and `two`, that the tokenizer has made."""
        folder = self.root / "encoded"
        for name, texts in (("one", "a"), ("two", "b")):
            source = self.corpus / f"{texts}.jsonl"
            self._made("jetmoe", "data", "tokenize", source, "--output", folder / name, "--tokenizer", self.tokenizer)
        return folder


class World:
    """Names of its methods and of the folders that they put here are those of `Good`."""

    def __init__(self, folder: Path, good: Good) -> None:
        self.folder, self._good = folder, good
        for name in ("cwd", "tmp"):
            (folder / name).mkdir(parents=True)

    def put(self, *names: str) -> World:
        """Copies of good things: data, run, hf, converted, corpus, tokenizer, sentencepiece, encoded."""
        for name in names:
            if not (self.folder / name).exists():
                shutil.copytree(getattr(self._good, name), self.folder / name)
        return self

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def checkpoint(self) -> Path:
        return self.folder / NEWEST

    def only_one_checkpoint(self) -> None:
        self.put("run")
        shutil.rmtree(self.checkpoint.with_name("tokens_512"))

    # Run files

    def tree(self, **changes: Any) -> dict[str, Any]:
        self.put("data")
        changes = {"checkpoint__every_tokens": 512, **changes}
        return small_run(self.folder, {name: str(self / "data" / name) for name in DATA}, **changes)

    def train(self, *overrides: object, **changes: Any) -> list[Any]:
        """The command, with a good run file but for `changes`."""
        return ["pretrain", write_run(self.folder, self.tree(**changes)), *overrides]

    def train_text(self, edit: Callable[[str], str | bytes]) -> list[Any]:
        """The command, with what `edit` makes of the text of a good run file."""
        text = edit(yaml.safe_dump(self.tree(), sort_keys=False))
        (self / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["pretrain", self / "run.yaml"]

    def branch(self, source: str = NEWEST, **changes: Any) -> list[Any]:
        """A run of another folder that starts from there."""
        return self.train(start_from=str(self / source), output_dir=str(self / "other"), **changes)

    # Files

    def write(self, name: str, content: str | bytes | Any) -> Path:
        """Text and bytes as they are, anything else as JSON."""
        path = self / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str | bytes):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def edit_json(self, name: str, edit: Callable[[Any], Any]) -> None:
        """`edit` changes what it is given, or returns what takes its place."""
        content = json.loads((self / name).read_text())
        changed = edit(content)
        self.write(name, json.dumps(content if changed is None else changed))

    def patch(self, name: str, offset: int, content: bytes) -> None:
        with open(self / name, "r+b") as stream:
            stream.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            stream.write(content)

    def spoil(self, name: str, how: str) -> None:
        """how: missing, empty, cut, flipped, longer, a folder, text."""
        path = self / name
        size = path.stat().st_size
        if how == "missing":
            path.unlink()
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "cut":
            os.truncate(path, size // 2)
        elif how == "flipped":
            content = bytearray(path.read_bytes())
            content[size // 2] ^= 0x10
            path.write_bytes(content)
        elif how == "longer":
            path.write_bytes(path.read_bytes() + b"\0")
        elif how == "text":
            path.write_text("not what it should be\n" * 20)
        else:
            assert how == "a folder"
            path.unlink()
            path.mkdir()

    def crafted(self, name: str, size: int = 0) -> None:
        content = pickle.dumps(Crafted(self / "witness"))
        self.write(name, content * max(1, size // len(content)))

    def seal(self, checkpoint: Path | None = None) -> None:
        """Checksums that fit what lies there now: whoever changes the one can change the other."""
        write_checksums(checkpoint or self.checkpoint)

    def snapshot(self) -> dict[str, bytes | str]:
        """Every path below, with what it holds."""
        found: dict[str, bytes | str] = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.is_symlink():
                found[name] = f"-> {os.readlink(path)}"
            else:
                found[name] = path.read_bytes() if path.is_file() else "folder"
        return found


Harm = Callable[[World], Any]


def written(name: str, content: Any) -> Harm:
    return lambda world: world.write(name, content)


def spoilt(name: str, how: str) -> Harm:
    return lambda world: world.spoil(name, how)


def given(world: World, options: Sequence[Any]) -> list[Any]:
    return [option(world) if callable(option) else option for option in options]
