"""A Hugging Face folder to a Megatron distributed checkpoint that any layout can start from.

It has the tensors of a training checkpoint under the same names, without the optimizer's, at 0 tokens. Instead of the
run it has the model's shape, which a run file can name: `model: CHECKPOINT/model.yaml`.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from jetmoe_megatron.checkpoint.checksums import COMPANIONS, write_checksums
from jetmoe_megatron.checkpoint.saved_run import MODEL_FILE
from jetmoe_megatron.convert.hf_folder import HuggingFaceFolder, write_json
from jetmoe_megatron.convert.hf_names import Weight
from jetmoe_megatron.convert.new_folder import UNFINISHED, new_folder
from jetmoe_megatron.convert.safetensors_file import nbytes
from jetmoe_megatron.convert.streaming import Folder, OnProgress, cast, choose_dtype, joined, no_progress, one_thread
from jetmoe_megatron.convert.tokenizer_files import copy_tokenizer

# The metadata that Megatron requires of a checkpoint. Importing Megatron to write it would take seconds.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


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
    """Write what megatron.core.dist_checkpointing.save writes, but tensor by tensor and without ranks."""
    with one_thread(), new_folder(out, sum(nbytes(weight, dtype) for weight in source.weights)) as aside:
        (aside / COMPANIONS).mkdir()
        shutil.copy(companions / "config.json", aside / COMPANIONS)
        copy_tokenizer(companions, aside / COMPANIONS)
        (aside / MODEL_FILE).write_text(yaml.safe_dump(source.model.model_dump(), sort_keys=False), encoding="utf-8")
        with warnings.catch_warnings():  # torch warns that this runs in one process, which is intended
            warnings.simplefilter("ignore", UserWarning)
            planner = _Planner(source, dtype, progress)
            try:
                dcp.save({}, storage_writer=_Writer(aside), planner=planner, no_dist=True)
            except dcp.api.CheckpointException as error:
                raise error.failures[0][0] from None  # what was raised while writing
        torch.save({}, aside / "common.pt")
        write_json(aside / "metadata.json", _FORMAT)
        write_checksums(aside, without=[UNFINISHED])


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Not stored: it would hold the folder's temporary name."""


class _Planner(DefaultSavePlanner):
    """One piece for each tensor of each layer, read just before it is written."""

    def __init__(self, source: Folder, dtype: torch.dtype, progress: OnProgress) -> None:
        super().__init__(flatten_state_dict=False)
        self._source, self._dtype, self._progress = source, dtype, progress
        self._weights = {_index(weight): weight for weight in source.weights}
        self._done, self._total = 0, sum(nbytes(weight, dtype) for weight in source.weights)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(weight, self._dtype) for weight in self._weights.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        weight = self._weights[write_item.index]
        tensor = joined(cast(self._source.blocks(weight), weight, self._dtype), weight)
        tensor = weight.from_hf(tensor).contiguous()
        self._done += tensor.nbytes
        self._progress(self._done, self._total)
        return tensor if weight.layer is None else tensor[None]  # a stack of one layer


def _index(weight: Weight) -> MetadataIndex:
    stack = [] if weight.layer is None else [weight.layer]
    return MetadataIndex(weight.megatron, torch.Size(stack + [0] * len(weight.megatron_shape)))


def _item(weight: Weight, dtype: torch.dtype) -> WriteItem:
    shape, index = weight.megatron_shape, _index(weight)
    stacked = weight.layer is not None
    assert index.offset is not None
    return WriteItem(
        index=index,
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(index.offset, torch.Size((1, *shape) if stacked else shape)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size((weight.model.num_layers, *shape) if stacked else shape),
        ),
    )
