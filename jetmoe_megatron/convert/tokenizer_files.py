"""The tokenizer in a Hugging Face folder, and the special tokens that the model's config names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data_tools.errors import InputError
from jetmoe_megatron.convert.hf_folder import read_json
from jetmoe_megatron.errors import UserError

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_tokenizer(folder: Path, out: Path) -> None:
    for file in filter(Path.is_file, (folder / name for name in _FILES)):
        shutil.copy(file, out / file.name)


def is_read_alike(folder: Path) -> bool:
    """Whether transformers gives the same ids as training.

    From a SentencePiece model alone it builds a different tokenizer: other spaces, other merges.

    Raises:
        UserError: the model cannot be read.
    """
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return True
    from data_tools.engines import PROBES, open_reference

    try:
        reference, theirs = open_reference(folder), _load(folder, split_special_tokens=True)
    except InputError as error:
        raise UserError(str(error)) from error
    return all(
        theirs(text, add_special_tokens=False).input_ids == reference.encode([text])[0].tolist() for text in PROBES
    )


def special_tokens(folder: Path) -> dict[str, Any]:
    """Ids by their names in config.json: those of a config beside the tokenizer.

    If there is no such config, or it names no end token, the tokenizer's own ids are added.
    """
    given: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        given = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name) is not None}
        for name, value in given.items():  # a model may have several end tokens
            if not all(type(token) is int and token >= 0 for token in (value if isinstance(value, list) else [value])):
                raise UserError(f"{folder / 'config.json'}: {name} must be the id of a token, not {value!r}")
    if "eos_token_id" in given:
        return given
    try:
        loaded = _load(folder)
    except UserError:
        if (folder / "config.json").is_file():  # of a model that came without a tokenizer
            return given
        raise
    own = {name: getattr(loaded, name) for name in _SPECIAL_TOKENS}
    return {name: value for name, value in own.items() if value is not None} | given


def _load(folder: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
    except Exception as error:  # a broken file can lead to any exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: not a tokenizer that transformers can load ({reason})") from error
