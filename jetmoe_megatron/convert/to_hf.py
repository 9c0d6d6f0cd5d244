"""A Megatron distributed checkpoint of any layout to a Hugging Face folder. No model is built, no GPU is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from data_tools.printing import say
from data_tools.progress import OnProgress, no_progress
from jetmoe_megatron.checkpoint.checksums import COMPANIONS
from jetmoe_megatron.checkpoint.pieces import as_bytes
from jetmoe_megatron.convert.hf_config import hf_config
from jetmoe_megatron.convert.hf_folder import write_json
from jetmoe_megatron.convert.megatron_folder import MegatronFolder
from jetmoe_megatron.convert.new_folder import new_folder
from jetmoe_megatron.convert.safetensors_file import INDEX, index_json, nbytes, split_into_shards
from jetmoe_megatron.convert.streaming import ahead, cast, choose_dtype, one_thread
from jetmoe_megatron.convert.tokenizer_files import copy_tokenizer, is_read_alike, special_tokens
from jetmoe_megatron.errors import UserError

SHARD_BYTES = 5 * 10**9  # of the released model


def convert_to_hf(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: OnProgress = no_progress,
    check: bool = True,
) -> None:
    """Write `out` with config.json, generation_config.json, safetensors and the tokenizer's files.

    Args:
        checkpoint: a published `tokens_<N>` folder, or one that `convert_from_hf` has written.
        dtype: bf16, fp16 or fp32; as stored by default.
        tokenizer: a folder; the checkpoint's own by default.
        shard_bytes: a file gets no further tensor that would make its tensors larger than this.
        progress: called with the bytes written so far and in all.
        check: compare the checkpoint with its checksums first.

    Raises:
        UserError: `checkpoint` is not a checkpoint, it is damaged, or its shape differs from its run; `out` exists; the
            disk is full; a value is NaN or too large for `dtype`. Then nothing is left of `out`.
    """
    source = MegatronFolder(checkpoint, check)
    torch_dtype = choose_dtype(source, dtype)
    tokenizer = tokenizer or source.tokenizer
    if tokenizer is not None and not tokenizer.is_dir():
        raise UserError(f"{tokenizer}: no such tokenizer folder; name it with --tokenizer")
    write_hf_folder(source, out, torch_dtype, tokenizer, shard_bytes, progress)


def write_hf_folder(
    source: MegatronFolder,
    out: Path,
    dtype: torch.dtype,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: OnProgress = no_progress,
) -> None:
    """`convert_to_hf` after its choices are made. Without a tokenizer the special tokens are those of JetMoE-8B."""
    shards = split_into_shards(source.weights, dtype, shard_bytes)
    total = sum(nbytes(weight, dtype) for weight in source.weights)
    with one_thread(), new_folder(out, sum(shard.nbytes for shard in shards)) as aside:
        special = {"bos_token_id": 1, "eos_token_id": 2}
        if tokenizer is not None:
            if tokenizer == source.path / COMPANIONS or is_read_alike(tokenizer):
                copy_tokenizer(tokenizer, aside)
            else:
                say(
                    f"warning: {tokenizer}: not copied, because transformers would give other ids for this "
                    "SentencePiece model than training had: give --tokenizer a folder that has it as tokenizer.json",
                    sys.stderr,
                )
            special = special_tokens(tokenizer) or special
        name = str(dtype).removeprefix("torch.")
        write_json(aside / "config.json", hf_config(source.model, source.max_positions, name, special))
        write_json(aside / "generation_config.json", {"_from_model_config": True, **special})
        if len(shards) > 1:
            (aside / INDEX).write_text(index_json(shards, dtype), encoding="utf-8")
        done = 0
        for shard in shards:
            blocks = (block for weight in shard.weights for block in cast(source.blocks(weight), weight, dtype))
            with open(aside / shard.file, "wb") as file:
                file.write(shard.header)
                for block in ahead(blocks):
                    file.write(as_bytes(block))
                    done += block.nbytes
                    progress(done, total)
