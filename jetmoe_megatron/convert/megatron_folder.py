"""The weights of a Megatron distributed checkpoint, written by ranks of any layout, read one by one on the CPU.

No model is built and no process group is needed: Megatron's `torch_dist` format is torch.distributed.checkpoint's. Of
the folder only these are read: the saved run (or model) in YAML, `.metadata`, which says where the pieces of each
tensor lie, and those pieces of the `.distcp` files that hold the model. The optimizer's state is left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from jetmoe_megatron.checkpoint.saved_run import RUN_FILE, read_saved_run
from jetmoe_megatron.config.schema import Model
from jetmoe_megatron.convert.hf_config import read_hf_config
from jetmoe_megatron.convert.names import Weight, weights
from jetmoe_megatron.errors import UserError

MODEL_FILE = "model.yaml"  # in the place of a run, in a checkpoint that comes from a Hugging Face folder
COMPANIONS = "hf"  # there, the config and the tokenizer that it came with


class MegatronFolder:
    """
    Attributes:
        model: its shape, to which the tensors have been held.
        dtype: of all its tensors, or None if they differ.
        max_positions: the longest sequence it is meant for.
        tokenizer: the folder of its tokenizer, if it has one.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if this is not a whole checkpoint, or of another shape than its run says."""
        self.path = path
        self.tokenizer: Path | None
        if (path / MODEL_FILE).is_file() and not (path / RUN_FILE).exists():
            self.model = _read_model(path / MODEL_FILE)
            self.tokenizer = path / COMPANIONS
            _, self.max_positions = read_hf_config(json.loads((self.tokenizer / "config.json").read_text("utf-8")))
        else:
            run = read_saved_run(path)
            self.model, self.max_positions = run.model, run.batch.sequence_length
            self.tokenizer = Path(run.tokenizer) if run.tokenizer else None
        self._metadata = _read_metadata(path)
        self.weights = weights(self.model)
        dtypes = {self._stored(weight).properties.dtype for weight in self.weights}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None

    def read(self, weight: Weight) -> Tensor:
        """In Hugging Face's layout. Holds this one tensor in memory, and one piece of it."""
        whole: Tensor | None = None
        for chunk in self._stored(weight).chunks:
            place = [slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            if weight.layer is not None:
                in_stack = place.pop(0)
                if not in_stack.start <= weight.layer < in_stack.stop:
                    continue
            piece = self._read_piece(weight, chunk)
            if weight.layer is not None:
                piece = piece[weight.layer - in_stack.start]
            if piece.shape == weight.megatron_shape:
                return weight.to_hf(piece)
            if whole is None:
                whole = torch.empty(weight.megatron_shape, dtype=piece.dtype)
            whole[tuple(place)] = piece
        assert whole is not None, "torch.distributed.checkpoint's metadata covers every tensor"
        return weight.to_hf(whole)

    def _stored(self, weight: Weight) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(weight.megatron)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.path}: has no tensor {weight.megatron!r}; is it a checkpoint of this program?")
        stack = () if weight.layer is None else (self.model.num_layers,)
        if tuple(entry.size) != stack + weight.megatron_shape:
            raise UserError(
                f"{self.path}: {weight.megatron} has the shape {list(entry.size)}, but by the model of the checkpoint "
                f"it is {list(stack + weight.megatron_shape)}"
            )
        return entry

    def _read_piece(self, weight: Weight, chunk: ChunkStorageMetadata) -> Tensor:
        place = self._metadata.storage_data[MetadataIndex(weight.megatron, chunk.offsets)]
        file = self.path / place.relative_path
        try:
            with open(file, "rb") as stream:
                view: Any = _create_file_view(stream, place.offset, place.length)
                piece = torch.load(view, map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from None
        except Exception as error:  # torch raises of its own and of many kinds
            raise UserError(f"{file}: damaged: {weight.megatron} cannot be read ({type(error).__name__})") from None
        if not isinstance(piece, Tensor) or piece.shape != chunk.sizes:
            raise UserError(f"{file}: damaged: {weight.megatron} has not the shape that .metadata says")
        return piece


def _read_metadata(path: Path) -> Metadata:
    if not (path / ".metadata").is_file():
        raise UserError(f"{path}: not a whole checkpoint: it has no .metadata")
    try:
        return FileSystemReader(path).read_metadata()
    except Exception as error:
        raise UserError(f"{path}/.metadata: damaged ({type(error).__name__})") from None


def _read_model(file: Path) -> Model:
    try:
        return Model.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{file}: not a model's shape as `jetmoe convert from-hf` writes it") from None
