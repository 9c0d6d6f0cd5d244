"""A Hugging Face folder to a Megatron distributed checkpoint that any layout can start from.

It has the tensors of a training checkpoint under the same names, without the optimizer's, at 0 tokens. Instead of the
run it has the model's shape, which a run file can name: `model: CHECKPOINT/model.yaml`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml

from data_tools.progress import OnProgress, no_progress
from jetmoe_megatron.checkpoint.checksums import COMPANIONS, write_checksums
from jetmoe_megatron.checkpoint.common_state import write_common
from jetmoe_megatron.checkpoint.saved_run import MODEL_FILE
from jetmoe_megatron.checkpoint.tensors_file import TensorsFile
from jetmoe_megatron.checkpoint.write_metadata import write_metadata
from jetmoe_megatron.convert.hf_folder import HuggingFaceFolder
from jetmoe_megatron.convert.new_folder import UNFINISHED, new_folder
from jetmoe_megatron.convert.safetensors_file import nbytes
from jetmoe_megatron.convert.streaming import Folder, cast, choose_dtype, joined, one_thread
from jetmoe_megatron.convert.tokenizer_files import copy_tokenizer


def convert_from_hf(folder: Path, out: Path, dtype: str | None = None, progress: OnProgress = no_progress) -> None:
    """Write the checkpoint `out`. One tensor is in memory at a time.

    Args:
        folder: with config.json of either dialect and safetensors, in one file or with an index.
        dtype: bf16, fp16 or fp32; as stored by default. Training casts to its own precision when it loads.
        progress: called with the bytes written so far and in all.

    Raises:
        UserError: the folder is not a JetMoE in safetensors, or its shape differs from its config; `out` exists; the
            disk is full; a value is NaN or too large for `dtype`. Then nothing is left of `out`.
    """
    source = HuggingFaceFolder(folder)
    write_weights_only(out, source, choose_dtype(source, dtype), folder, progress)


def write_weights_only(
    out: Path, source: Folder, dtype: torch.dtype, companions: Path, progress: OnProgress = no_progress
) -> None:
    """Write what a training run saves, but tensor by tensor, without ranks and without the optimizer."""
    done, total = 0, sum(nbytes(weight, dtype) for weight in source.weights)
    with one_thread(), new_folder(out, total) as aside:
        (aside / COMPANIONS).mkdir()
        shutil.copy(companions / "config.json", aside / COMPANIONS)
        copy_tokenizer(companions, aside / COMPANIONS)
        (aside / MODEL_FILE).write_text(yaml.safe_dump(source.model.model_dump(), sort_keys=False), encoding="utf-8")
        with TensorsFile(aside, rank=0) as file:
            for weight in source.weights:
                tensor = joined(cast(source.blocks(weight), weight, dtype), weight)
                tensor = weight.from_hf(tensor).contiguous()
                whole, offset = weight.megatron_shape, (0,) * len(weight.megatron_shape)
                if weight.layer is None:
                    file.add(weight.megatron, whole, offset, tensor)
                else:  # a part of the stack of all layers
                    layers = weight.model.num_layers
                    file.add(weight.megatron, (layers, *whole), (weight.layer, *offset), tensor[None])
                done += tensor.nbytes
                progress(done, total)
        write_metadata(aside, [(file.name, file.pieces)])
        write_common(aside, optimizer_steps=None)
        write_checksums(aside, {file.name: file.checksum}, without=[UNFINISHED])
