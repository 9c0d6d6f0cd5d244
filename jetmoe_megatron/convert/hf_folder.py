"""The weights of a Hugging Face folder."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jetmoe_megatron.convert.hf_config import read_hf_config
from jetmoe_megatron.convert.hf_names import EMBEDDING, Weight, weights
from jetmoe_megatron.convert.safetensors_file import INDEX
from jetmoe_megatron.convert.streaming import BLOCK
from jetmoe_megatron.errors import UserError

_MOST_JSON = 2**28  # bytes
_TIED = "lm_head.weight"  # some programs save the embedding a second time under this name


class HuggingFaceFolder:
    """
    Attributes:
        model: its shape; the shapes of the tensors agree with it.
        dtype: of all its tensors, or None if they differ.
        max_positions: the longest sequence that it is made for.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if this is not a JetMoE in safetensors, or if its shape differs from its config."""
        self.path = path
        config = read_json(path / "config.json")
        try:
            self.model, self.max_positions = read_hf_config(config)
        except UserError as error:
            raise UserError(f"{path / 'config.json'}: {error}") from None
        self._file_of = _files(path)
        self.weights = weights(self.model)
        self._refuse_other_tensors()
        dtypes = {self._checked(weight).dtype for weight in self.weights}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None

    def blocks(self, weight: Weight) -> Iterator[Tensor]:
        """The values as stored. The file is mapped again for each tensor, so that memory is freed after reading."""
        return iter(self._checked(weight).flatten().split(BLOCK))

    def _checked(self, weight: Weight) -> Tensor:
        tensor = self._read(weight.hugging_face)
        if tuple(tensor.shape) != weight.shape:
            raise UserError(
                f"{self.path}: {weight.hugging_face} has the shape {list(tensor.shape)}, but config.json says "
                f"{list(weight.shape)}"
            )
        if not tensor.dtype.is_floating_point:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{self.path}: {weight.hugging_face} has numbers of the type {kind}")
        return tensor

    def _read(self, name: str) -> Tensor:
        file = self._file_of[name]
        with _open(file) as tensors:
            if name not in tensors.keys():  # noqa: SIM118  # it is not a dict
                raise UserError(f"{file}: has no tensor {name!r}")
            return tensors.get_tensor(name)

    def _refuse_other_tensors(self) -> None:
        expected = {weight.hugging_face for weight in self.weights}
        for name in expected - self._file_of.keys():
            raise UserError(f"{self.path}: has no tensor {name!r}")
        if _TIED in self._file_of and not torch.equal(self._read(_TIED), self._read(EMBEDDING.hugging_face)):
            raise UserError(f"{self.path}: {_TIED} differs from {EMBEDDING.hugging_face}; JetMoE ties them")
        for name in self._file_of.keys() - expected - {_TIED}:
            raise UserError(f"{self.path}: {name!r} is no tensor of a JetMoE of {self.model.num_layers} layers")


def read_json(file: Path) -> dict[str, Any]:
    try:
        kind, size = stat.S_IFMT(file.stat().st_mode), file.stat().st_size
        if kind not in (stat.S_IFREG, stat.S_IFDIR):  # reading a pipe would block, and a device may never end
            raise UserError(f"{file}: is no file")
        if size > _MOST_JSON:
            raise UserError(f"{file}: has {size:,} bytes, too many for such a file")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError(f"{file}: not valid JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _files(path: Path) -> dict[str, Path]:
    """Which file holds each tensor. If there are a single file and an index, transformers takes the single file."""
    single = path / "model.safetensors"
    if single.is_file():
        with _open(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if (path / INDEX).is_file():
        places = read_json(path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(_is_plain_name(file) for file in places.values()):
            raise UserError(f"{path / INDEX}: weight_map must give a file of this folder for each tensor")
        return {name: path / file for name, file in places.items()}
    if pickled := next(path.glob("*.bin"), None):
        raise UserError(f"{pickled}: a pickle, which can run code when it is read; save the model as safetensors first")
    raise UserError(f"{path}: has neither model.safetensors nor {INDEX}")


def _is_plain_name(file: Any) -> bool:
    return isinstance(file, str) and Path(file).name == file


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from None
