"""Which packages are installed, whether they can be imported, and what is missing without them."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import warnings
from dataclasses import dataclass

import torch

from jetmoe_megatron.runtime.machine import this_machine, version_of


@dataclass(frozen=True)
class Package:
    """
    Attributes:
        name: as pip has it.
        module: that must be importable; empty: it is not tried, because that takes long or changes this process.
        without: what happens if it is missing.
    """

    name: str
    module: str
    without: str


# docs/install.md says more.
PACKAGES = (
    Package("megatron-core", "megatron.core", "nothing can be trained"),
    Package("triton", "triton", "elementwise operations run one by one on a GPU"),
    Package(
        "transformer-engine",
        "transformer_engine.pytorch",
        "no expert_backend te and te_fp8, no context parallelism; the optimizer is torch's",
    ),
    Package("megablocks", "megablocks.ops", "no expert_backend megablocks"),
    Package("grouped_gemm", "grouped_gemm", "no expert_backend megablocks"),
    Package("stanford-stk", "stk", "no expert_backend megablocks"),
    Package("apex", "amp_C", "not needed, the optimizer is Transformer Engine's or torch's"),
    Package("deep_ep", "deep_ep", "no moe_token_dispatcher deepep and hybridep"),
    Package("flash-attn", "", "not needed, torch's and cuDNN's kernels compute the attention"),
    Package("fastokens", "fastokens", "text is tokenized by tokenizers, which is slower"),
    Package("tokenizers", "", "no text can be tokenized"),
    Package("transformers", "", "no conversion to and from Hugging Face"),
    Package("wandb", "", "no logging.wandb"),
    Package("tensorboard", "", "no logging.tensorboard"),
    Package("mlflow-skinny", "", "no logging.mlflow"),
    Package("matplotlib", "", "no --plot"),
    Package("boto3", "", "no data sets in object storage"),
)


def installed() -> list[tuple[str, str]]:
    """(name, version and state) of Python, torch, its libraries, the GPUs and the packages."""
    machine = this_machine()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return [
        ("Python", platform.python_version()),
        ("torch", machine.torch),
        ("CUDA of torch", torch.version.cuda or "none: this torch is for CPUs"),
        ("GPUs", ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none"),
        *[(name, value) for name, value in _of_a_gpu().items() if gpus],
        ("C compiler", shutil.which("cc") or shutil.which("gcc") or "none: elementwise operations run one by one"),
        *[(package.name, _state(package)) for package in PACKAGES],
    ]


def _of_a_gpu() -> dict[str, str]:
    machine = this_machine()
    return {"driver": machine.driver, "cuDNN": machine.cuDNN, "NCCL": machine.NCCL}


def _state(package: Package) -> str:
    version = version_of(package.name)
    if not version:
        return f"not installed: {package.without}"
    return f"{version}, which cannot be imported: {why}" if (why := why_not_importable(package.module)) else version


def why_not_importable(module: str) -> str:
    """Empty if it can be imported, or has no name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module) if module else None
    except (ImportError, OSError) as error:  # a missing shared library is an OSError
        return str(error).splitlines()[0]
    return ""
