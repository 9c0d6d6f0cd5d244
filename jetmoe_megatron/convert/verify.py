"""Compare two models, each a checkpoint or a Hugging Face folder, by their tensors or by their logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from data_tools.progress import OnProgress, no_progress
from jetmoe_megatron.config.schema import Model
from jetmoe_megatron.convert.hf_config import hf_config
from jetmoe_megatron.convert.hf_folder import HuggingFaceFolder
from jetmoe_megatron.convert.megatron_folder import MegatronFolder
from jetmoe_megatron.convert.safetensors_file import nbytes
from jetmoe_megatron.convert.streaming import joined, one_thread
from jetmoe_megatron.convert.to_hf import write_hf_folder
from jetmoe_megatron.errors import UserError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_A_TIME = 1 << 24  # values whose differences are computed in fp32 at a time


@dataclass
class Comparison:
    what: str  # what was compared
    different: int = 0  # tensors whose bits differ
    largest: float = 0.0  # largest difference
    where: str = ""

    def within(self, tolerance: float) -> bool:
        """A tolerance of 0 requires equal bits."""
        return self.different == 0 or 0 < tolerance >= self.largest

    def __str__(self) -> str:
        if self.different == 0:
            return f"{self.what}: equal to the bit"
        differ = "differ" if self.different == 1 else f"{self.different} differ"
        return f"{self.what}: {differ}, the most by {self.largest:.3g} {self.where}"

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            return
        self.different += 1
        flat_a, flat_b = a.reshape(-1), b.reshape(-1)
        for start in range(0, flat_a.numel(), _AT_A_TIME):
            part = slice(start, start + _AT_A_TIME)
            x, y = flat_a[part].float(), flat_b[part].float()
            difference = torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
            size, place = difference.max(0)
            if size > self.largest or not self.where:
                index = [int(i) for i in torch.unravel_index(place + start, a.shape)]
                self.largest = size.item()
                self.where = f"in {name} at {index}: {x[place]:.8g} ({a.dtype}) and {y[place]:.8g} ({b.dtype})"


def compare_tensors(a: Path, b: Path, progress: OnProgress = no_progress) -> Comparison:
    """One tensor of each model is in memory at a time.

    Raises:
        UserError: one of them cannot be read, or they are of different shapes.
    """
    first, second = open_folder(a), open_folder(b)
    _refuse_other_shape(first.model, second.model)
    done, total = 0, sum(nbytes(weight, torch.bfloat16) for weight in first.weights)
    comparison = Comparison(f"{len(first.weights)} tensors")
    with one_thread():
        for weight in first.weights:
            comparison.add(weight.hugging_face, *(joined(folder.blocks(weight), weight) for folder in (first, second)))
            done += nbytes(weight, torch.bfloat16)
            progress(done, total)
    return comparison


def compare_logits(a: Path, b: Path, tokens: list[int] | None = None) -> Comparison:
    """Run both models with transformers on the CPU in fp32, one after the other. A checkpoint is converted first.

    Args:
        tokens: one sequence; by default two random ones of 64.

    Raises:
        UserError: one of them cannot be read, they are of different shapes, or a token is not in the vocabulary.
    """
    first, second = open_folder(a), open_folder(b)
    _refuse_other_shape(first.model, second.model)
    vocab, length = first.model.vocab_size, min(64, first.max_positions)
    if tokens is None:
        batch = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(0))
    elif tokens and 0 <= min(tokens) <= max(tokens) < vocab:
        batch = torch.tensor([tokens])
    else:
        raise UserError(f"--tokens: must be ids from 0 to {vocab - 1}")
    comparison = Comparison(f"logits of {batch.numel()} tokens")
    comparison.add("[sequence, position, token]", _logits(first, batch), _logits(second, batch))
    return comparison


def open_folder(path: Path) -> MegatronFolder | HuggingFaceFolder:
    """Raises UserError if it is neither."""
    return HuggingFaceFolder(path) if (path / "config.json").is_file() else MegatronFolder(path)


def _refuse_other_shape(first: Model, second: Model) -> None:
    for field in Model.model_fields:
        a, b = getattr(first, field), getattr(second, field)
        if a != b and field not in ("expert_backend", "init_std"):
            raise UserError(f"the models differ in {field}: {a} and {b}")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.dtype.itemsize])


def _logits(folder: MegatronFolder | HuggingFaceFolder, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM, JetMoeConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with TemporaryDirectory() as aside:
        path = folder.path
        if isinstance(folder, MegatronFolder):
            path = Path(aside) / "hf"
            write_hf_folder(folder, path, torch.float32)
        # From a config.json with the original names, transformers would build a different model.
        config = JetMoeConfig(**hf_config(folder.model, folder.max_positions, "float32", {}))
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, trust_remote_code=False)
        with torch.inference_mode():
            return model.eval()(tokens).logits
