"""The trained tokenizer as `transformers` sees it, and what loading refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data_tools.errors import InputError
from data_tools.tokenizer import load_tokenizer, train_bpe, vocabulary_size

Tree = Callable[[Path], list[str]]


@pytest.fixture
def copy(tmp_path: Path, tokenizer_dir: Path) -> Path:
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "copy"))


def test_auto_tokenizer_loads_it(tokenizer_dir: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert theirs.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    ids = (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ids == (0, 1, 2, 2)
    assert theirs.clean_up_tokenization_spaces is False
    assert len(theirs) == 400


def test_ids_are_those_of_auto_tokenizer(tokenizer_dir: Path, texts: list[str]) -> None:
    ours, eod = load_tokenizer(tokenizer_dir)
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir, split_special_tokens=True)
    assert eod == theirs.eos_token_id
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)  # so no <s> is put before


def test_decoding_gives_back_any_text(tokenizer_dir: Path, texts: list[str]) -> None:
    ours, eod = load_tokenizer(tokenizer_dir)
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000, 7), *range(0x10000, 0x110000, 997)]))
    for text in [*texts, everything]:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert eod not in ids
        assert ours.decode(ids) == text
        assert theirs.decode(ids) == text


def test_training_again_gives_the_same_files(tmp_path: Path, corpus: Path, tokenizer_dir: Path, tree: Tree) -> None:
    """In a fresh process and on one thread, so that neither hash seeds nor scheduling play a part."""
    train = f"from data_tools.tokenizer import train_bpe; train_bpe([{str(corpus)!r}], 400, 'again')"
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", train], cwd=tmp_path, env=environment, check=True)
    for name in tree(tokenizer_dir):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer_dir / name).read_bytes()


def test_the_end_of_document_can_have_another_name(tmp_path: Path, corpus: Path) -> None:
    train_bpe([corpus], 300, tmp_path / "bpe", end_of_document="<|endoftext|>")
    assert load_tokenizer(tmp_path / "bpe")[1] == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "bpe").pad_token == "<|endoftext|>"


def test_a_small_text_gives_a_smaller_vocabulary(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    size = train_bpe([jsonl("small.jsonl", b'{"text": "ab ab"}')], 1000, tmp_path / "bpe")
    assert size == 259 + 2  # "ab" and " ab"
    assert vocabulary_size(load_tokenizer(tmp_path / "bpe")[0]) == size


def test_training_refuses(tmp_path: Path, corpus: Path, jsonl: Callable[..., Path], tree: Tree) -> None:
    broken = jsonl("broken.jsonl", b'{"text": "fine"}', b"{")
    (tmp_path / "taken").mkdir()
    before = tree(tmp_path)
    with pytest.raises(InputError, match="vocab_size is 258; it must be at least 259"):
        train_bpe([corpus], 258, tmp_path / "bpe")
    with pytest.raises(InputError, match="broken.jsonl:2: not valid JSON"):
        train_bpe([broken], 300, tmp_path / "bpe")
    with pytest.raises(InputError, match="taken exists; .*--overwrite"):
        train_bpe([corpus], 300, tmp_path / "taken")
    with pytest.raises(InputError, match="cannot write .*broken.jsonl/bpe"):
        train_bpe([corpus], 300, broken / "bpe")
    assert tree(tmp_path) == before


def test_overwriting_keeps_what_else_is_in_the_folder(copy: Path, corpus: Path, tree: Tree) -> None:
    (copy / "notes.txt").write_text("mine")
    train_bpe([corpus], 300, copy, overwrite=True)
    assert vocabulary_size(load_tokenizer(copy)[0]) == 300
    assert tree(copy.parent) == [
        "copy",
        "copy/notes.txt",
        "copy/special_tokens_map.json",
        "copy/tokenizer.json",
        "copy/tokenizer_config.json",
    ]


def test_loading_ignores_saved_truncation_and_padding(copy: Path) -> None:
    saved = load_tokenizer(copy)[0]
    saved.enable_truncation(4)
    saved.enable_padding(length=4)
    saved.save(str(copy / "tokenizer.json"))
    tokenizer = load_tokenizer(copy)[0]
    assert len(tokenizer.encode("q w e r t y u i o p").ids) > 4
    assert [len(encoding.ids) for encoding in tokenizer.encode_batch(["q", "wz"])] == [1, 2]


def test_eos_may_be_an_added_token_or_in_the_map_alone(copy: Path) -> None:
    (copy / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>", "special": True}}))
    assert load_tokenizer(copy)[1] == 1
    (copy / "tokenizer_config.json").unlink()
    assert load_tokenizer(copy)[1] == 2


def test_loading_names_what_is_wrong(copy: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_tokenizer(copy)
        assert "\n" not in str(caught.value)

    config = copy / "tokenizer_config.json"
    config.write_text('{"eos_token": "<end>"}')
    refused("its eos token '<end>' is not in its vocabulary")
    config.write_text("[]")
    refused("tokenizer_config.json: not a JSON object")
    config.write_text("{")
    refused("tokenizer_config.json: not a JSON object")
    config.unlink()
    (copy / "special_tokens_map.json").write_text("{}")
    refused("names an eos_token")
    (copy / "tokenizer.json").write_text("{")
    refused("tokenizer.json: not a tokenizer")
    (copy / "tokenizer.json").unlink()
    refused("tokenizer.json: no such file; a tokenizer is a folder")
