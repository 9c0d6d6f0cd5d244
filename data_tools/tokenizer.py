"""Train a byte-level BPE tokenizer, and load any tokenizer that `transformers` saved."""

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.atomic import temporary_path
from data_tools.errors import InputError
from data_tools.inputs import find_files
from data_tools.progress import OnProgress, no_progress
from data_tools.reading import locate, read_texts
from data_tools.shards import bytes_in, cut

_UNKNOWN, _BEGIN = "<unk>", "<s>"
_LARGEST = 2**24  # ids: the trainer allocates memory for all of them at once


def train_bpe(
    files: Iterable[str | Path],
    vocab_size: int,
    out_dir: str | Path,
    text_key: str = "text",
    end_of_document: str = "</s>",
    overwrite: bool = False,
    progress: OnProgress = no_progress,
) -> int:
    """Train on texts (see `find_files`) and save a folder that `AutoTokenizer.from_pretrained` loads.

    Ids 0, 1 and 2 are <unk>, <s> and the end of document, as in JetMoE's own tokenizer; padding is the end of
    document; no token is put before a text. Every byte has an id, so decoding gives back any text exactly.
    The same files give the same tokenizer.

    progress: gets the bytes of the files, read and in all. Pairs are merged after that.

    Returns the size of the vocabulary: less than `vocab_size` if the files have too few pairs to merge.

    Raises:
        InputError: files or output cannot be used, a line is broken, or vocab_size is too small.
        KeyboardInterrupt: nothing was written. If pairs are being merged, it is raised after the last of them.
    """
    special = [_UNKNOWN, _BEGIN, end_of_document]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(set(special)) + len(alphabet)
    if vocab_size < smallest:
        raise InputError(f"vocab_size is {vocab_size}; it must be at least {smallest}: each byte and special token")
    if vocab_size > _LARGEST:
        raise InputError(f"vocab_size is {vocab_size}; it must be at most {_LARGEST}, which is far beyond any in use")
    folder = Path(out_dir)
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists; choose another output or pass --overwrite")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    stopped = threading.Event()
    texts = _texts(find_files(files), text_key, stopped, progress)
    with ThreadPoolExecutor(1) as elsewhere:  # because the trainer blocks Ctrl-C in the thread that calls it
        training = elsewhere.submit(tokenizer.train_from_iterator, texts, trainer)
        try:
            training.result()
        except KeyboardInterrupt:
            stopped.set()
            raise
    _save(tokenizer, folder, end_of_document)
    return tokenizer.get_vocab_size()


def load_tokenizer(folder: str | Path) -> tuple[Tokenizer, int]:
    """The tokenizer of a folder, and the id of its eos token, which ends documents.

    It encodes special tokens spelled in a text as plain text, and never truncates or pads.

    Raises:
        InputError: the folder or a file in it is missing or broken, or it names no eos token.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; a tokenizer is a folder that AutoTokenizer.save_pretrained wrote")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise InputError(f"{path}: not a tokenizer ({str(error).splitlines()[0]})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    eos = _eos_token(Path(folder))
    eod = tokenizer.token_to_id(eos)
    if eod is None:
        raise InputError(f"{path}: its eos token {eos!r} is not in its vocabulary")
    return tokenizer, eod


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the size of an embedding, even if ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def _texts(files: list[Path], text_key: str, stopped: threading.Event, progress: OnProgress) -> Iterator[list[str]]:
    done, total = 0, sum(map(bytes_in, files))
    for path in files:
        before = 0  # lines of the earlier shards
        for shard in cut([path]):
            lines = 0
            for batch in read_texts(shard, text_key):
                for number, message in batch.problems:
                    raise InputError(f"{locate(path, before, number, message)}; fix it or leave it out")
                if stopped.is_set():
                    raise InterruptedError
                yield batch.texts
                lines += batch.lines
            before += lines
            done += shard.size
            progress(done, total)


def _save(tokenizer: Tokenizer, folder: Path, end_of_document: str) -> None:
    tokens = {
        "unk_token": _UNKNOWN,
        "bos_token": _BEGIN,
        "eos_token": end_of_document,
        "pad_token": end_of_document,
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    temporary = temporary_path(folder)
    try:
        temporary.mkdir(parents=True)
        tokenizer.save(str(temporary / "tokenizer.json"))
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", tokens)):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        if folder.exists():  # file by file, so that other files in the folder stay
            for path in sorted(temporary.iterdir()):
                os.replace(path, folder / path.name)
        else:
            os.replace(temporary, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _eos_token(folder: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: not a JSON object") from error
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if isinstance(token, str):
            return token
    raise InputError(f"{folder}: neither tokenizer_config.json nor special_tokens_map.json names an eos_token")
