"""A Megatron distributed checkpoint of any layout to a Hugging Face folder. No model is built, no GPU is needed."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from jetmoe_megatron.checkpoint.saved_run import read_saved_run
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.convert.hf_config import hf_config
from jetmoe_megatron.convert.names import EMBEDDING, FINAL_NORM, LAYER
from jetmoe_megatron.errors import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


def convert_to_hf(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Write `out` with config.json, generation_config.json, safetensors and the tokenizer's files.

    Args:
        checkpoint: a published `tokens_<N>` folder.
        dtype: bf16, fp16 or fp32; the precision of training by default.
        tokenizer: a folder; the run's by default.

    Raises:
        UserError: if the checkpoint is not one, or `out` exists. Nothing is left of `out` then.
    """
    run = read_saved_run(checkpoint)
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or choose another folder")
    dtype = dtype or run.precision
    tokenizer = tokenizer or (Path(run.tokenizer) if run.tokenizer else None)
    if tokenizer is not None and not tokenizer.is_dir():
        raise UserError(f"{tokenizer}: no such tokenizer folder; name it with --tokenizer")
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        special = _copy_tokenizer(tokenizer, aside) if tokenizer else {"bos_token_id": 1, "eos_token_id": 2}
        _write_tensors(checkpoint, run, aside, _DTYPES[dtype], shard_bytes, progress)
        name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
        _write_json(aside / "config.json", hf_config(run.model, run.batch.sequence_length, name, special))
        _write_json(aside / "generation_config.json", {"_from_model_config": True, **special})
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_tensors(
    checkpoint: Path,
    run: Run,
    out: Path,
    dtype: torch.dtype,
    shard_bytes: int,
    progress: Callable[[str], None],
) -> None:
    """Tensors in the order of the released files; a new file begins when the next tensor would pass `shard_bytes`."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in _hf_tensors(checkpoint, run):
        tensor = tensor.to(dtype).contiguous()
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        progress(f"{file}: {len(shard)} tensors")
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        _write_json(
            out / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )


def _hf_tensors(checkpoint: Path, run: Run) -> list[tuple[str, Tensor]]:
    names = {name.megatron: f"decoder.layers.{name.megatron}" for name in LAYER}
    stored = _read_tensors(checkpoint, [EMBEDDING.megatron, FINAL_NORM.megatron, *names.values()])
    tensors = [(EMBEDDING.hugging_face, stored[EMBEDDING.megatron])]
    for i in range(run.model.num_layers):
        for name in LAYER:
            weight = name.to_hf(stored[names[name.megatron]][i], run.model)
            tensors.append((f"model.layers.{i}.{name.hugging_face}", weight))
    tensors.append((FINAL_NORM.hugging_face, stored[FINAL_NORM.megatron]))
    return tensors


def _read_tensors(checkpoint: Path, keys: list[str]) -> dict[str, Tensor]:
    """Megatron's torch_dist format is torch.distributed.checkpoint's, which needs no process group to read."""
    if not (checkpoint / ".metadata").is_file():
        raise UserError(f"{checkpoint}: not a whole checkpoint: it has no .metadata")
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, Tensor] = {}
    for key in keys:
        entry = metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{checkpoint}: has no tensor {key!r}; is it a checkpoint of this program?")
        state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():  # that it runs in one process is what is wanted
        warnings.simplefilter("ignore", UserWarning)
        load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def _copy_tokenizer(tokenizer: Path, out: Path) -> dict[str, int]:
    """Returns the ids of the special tokens as config.json names them."""
    for pattern in _TOKENIZER_FILES:
        for file in tokenizer.glob(pattern):
            shutil.copy(file, out / file.name)
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
    ids = {f"{kind}_token_id": getattr(loaded, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {key: value for key, value in ids.items() if value is not None}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
