"""The weights of a Megatron distributed checkpoint, written by ranks of any layout, read one by one on the CPU.

No model is built and no process group is needed: Megatron's `torch_dist` format is torch.distributed.checkpoint's. Only
these parts of the folder are used: the saved run (or model) in YAML, `.metadata`, which says where the pieces of each
tensor are, and those pieces of the `.distcp` files that hold the model. The optimizer's state is read only for the
checksums, which cover whole files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from pydantic import ConfigDict, TypeAdapter
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from data_tools.printing import say
from jetmoe_megatron.checkpoint.checksums import CHECKSUMS, COMPANIONS, METADATA, find_damage, find_damage_by_threads
from jetmoe_megatron.checkpoint.metadata import read_metadata
from jetmoe_megatron.checkpoint.pieces import as_bytes, find_piece
from jetmoe_megatron.checkpoint.saved_run import MODEL_FILE, RUN_FILE, without_checksums
from jetmoe_megatron.config.checks import check_model
from jetmoe_megatron.config.schema import Model, Positive
from jetmoe_megatron.config.yaml_text import parse_yaml
from jetmoe_megatron.convert.hf_config import read_hf_config
from jetmoe_megatron.convert.hf_folder import read_json
from jetmoe_megatron.convert.hf_names import Weight, weights
from jetmoe_megatron.convert.streaming import BLOCK
from jetmoe_megatron.errors import UserError

_LENGTH = TypeAdapter(Positive, config=ConfigDict(strict=True))


class MegatronFolder:
    """
    Attributes:
        model: its shape; the shapes of the tensors agree with it.
        dtype: of all its tensors, or None if they differ.
        max_positions: the longest sequence that it is made for.
        tokenizer: the folder of its tokenizer, if it has one.
        weights: its tensors.
    """

    def __init__(self, path: Path, check: bool = True) -> None:
        """
        Args:
            check: compare all files with their checksums first, or warn that there are none.

        Raises:
            UserError: this is not a whole checkpoint, it is damaged, or its shape differs from its run.
        """
        self.path = path
        listed = check and (path / CHECKSUMS).exists()
        if listed and (damage := find_damage(path, quick=True)):  # before anything of it is read
            raise UserError(f"{path}: is damaged: {damage}")
        self.model, self.max_positions, self.tokenizer = _read_shape(path)
        self._metadata = _read_metadata(path)
        self.weights = weights(self.model)
        dtypes = {self._stored(weight).properties.dtype for weight in self.weights}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        if listed and (damage := find_damage_by_threads(path)):
            raise UserError(f"{path}: is damaged: {damage}")
        if check and (warning := without_checksums(path)):
            say(f"warning: {warning}", sys.stderr)

    def blocks(self, weight: Weight) -> Iterator[Tensor]:
        """The values as stored, in the order of Hugging Face's tensor.

        Memory holds one block, or the whole tensor if its pieces do not simply follow each other.
        """
        pieces = self._pieces(weight)
        shape = weight.megatron_shape
        if weight.name.same_order and all(piece.shape[1:] == shape[1:] for piece in pieces):
            for piece in sorted(pieces, key=lambda piece: piece.place[0].start):
                yield from piece.blocks()
            return
        whole = torch.empty(shape, dtype=pieces[0].dtype)
        for piece in pieces:
            whole[piece.place] = torch.cat(list(piece.blocks())).view(piece.shape)
        yield from weight.to_hf(whole).flatten().split(BLOCK)

    def _pieces(self, weight: Weight) -> list[_Piece]:
        """The pieces of this layer, as the ranks have written them."""
        layer, pieces = weight.layer, []
        for chunk in self._stored(weight).chunks:
            if layer is None:
                pieces.append(self._find(weight, chunk))
            elif 0 <= layer - chunk.offsets[0] < chunk.sizes[0]:  # the first axis is the layers'
                piece = self._find(weight, chunk)
                shape = piece.shape[1:]
                start = piece.start + (layer - chunk.offsets[0]) * prod(shape) * piece.dtype.itemsize
                pieces.append(replace(piece, start=start, shape=shape, place=piece.place[1:]))
        if sum(prod(piece.shape) for piece in pieces) != prod(weight.megatron_shape):
            raise UserError(f"{self.path}: {weight.hugging_face} is not whole: parts of it are missing")
        return pieces

    def _stored(self, weight: Weight) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(weight.megatron)
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"{self.path}: has no tensor {weight.megatron!r}; is it a checkpoint of this program?")
        stack = () if weight.layer is None else (self.model.num_layers,)
        if tuple(entry.size) != stack + weight.megatron_shape:
            raise UserError(
                f"{self.path}: {weight.megatron} has the shape {list(entry.size)}, but the model of the checkpoint "
                f"says {list(stack + weight.megatron_shape)}"
            )
        return entry

    def _find(self, weight: Weight, chunk: ChunkStorageMetadata) -> _Piece:
        place = self._metadata.storage_data.get(MetadataIndex(weight.megatron, chunk.offsets))
        if place is None:
            raise UserError(f"{self.path}: {weight.megatron} is not whole: parts of it are missing")
        file = self.path / place.relative_path
        try:
            with open(file, "rb") as stream:
                piece = find_piece(stream, place, chunk.sizes, self._stored(weight).properties.dtype)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{file}: damaged: {weight.megatron}: {error}") from None
        where = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
        return _Piece(file, piece.start, piece.shape, piece.dtype, where)


@dataclass(frozen=True)
class _Piece:
    """Values that are contiguous in a file."""

    file: Path
    start: int  # byte
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: tuple[slice, ...]  # in the whole tensor

    def blocks(self) -> Iterator[Tensor]:
        left = prod(self.shape)
        with open(self.file, "rb") as stream:
            stream.seek(self.start)
            while left:
                block = torch.empty(min(left, BLOCK), dtype=self.dtype)
                if stream.readinto(as_bytes(block)) < block.nbytes:
                    raise UserError(f"{self.file}: damaged: it ends too early")
                yield block
                left -= block.numel()


def _read_metadata(path: Path) -> Metadata:
    if not (path / METADATA).is_file():
        raise UserError(f"{path}: not a whole checkpoint: it has no {METADATA}")
    try:
        return read_metadata(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _read_shape(path: Path) -> tuple[Model, int, Path | None]:
    """The model, its longest sequence and its tokenizer. The rest of a run file may come from another version."""
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder")
    file = next((path / name for name in (RUN_FILE, MODEL_FILE) if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path}: not a checkpoint of this program: it has neither {RUN_FILE} nor {MODEL_FILE}")
    try:
        tree = parse_yaml(file.read_text(encoding="utf-8"))
        model = Model.model_validate(tree if file.name == MODEL_FILE else tree["model"])
        check_model(model)
        if file.name == MODEL_FILE:
            return model, read_hf_config(read_json(path / COMPANIONS / "config.json"))[1], path / COMPANIONS
        tokenizer = Path(tree["tokenizer"]) if tree.get("tokenizer") else None
        return model, _LENGTH.validate_python(tree["batch"]["sequence_length"]), tokenizer
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged, or of another program ({type(error).__name__})") from None
