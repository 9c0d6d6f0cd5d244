"""What is known not to work together, with the reason of each. What is not listed here is not judged.

setup.py, docs/install.md and docs/performance.md say the same; `tests/doctor/test_known_conflicts.py` compares.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from packaging.specifiers import SpecifierSet

from jetmoe_megatron.config.expert_backends import HOPPER
from jetmoe_megatron.doctor.problems import Problem
from jetmoe_megatron.runtime.machine import CUDNN_FOR_HOPPER, version_of

PYTHON, TORCH = ">=3.10,<3.14", ">=2.10,<2.15"
MEGATRON_OLD_PYTHON, MEGATRON_NEW_PYTHON = "0.16.1", "0.19.2"  # below Python 3.12, and from it on
TRANSFORMER_ENGINE, TRANSFORMER_ENGINE_OLD_PYTHON = ">=2.9", ">=2.9,<2.12"
MEGABLOCKS = {"megablocks": "0.10.0", "grouped_gemm": "0.3.0", "stanford-stk": "0.7.1"}
NCCL_FOR_NCCLEP = (2, 30, 4)
_INSTALL_MEGABLOCKS = "bash scripts/install_gpu.sh --megablocks"


@dataclass(frozen=True)
class Stack:
    """What the rules below look at.

    Attributes:
        versions: of packages, by pip's names; a package that is not installed is not in it.
        megablocks_is_built: whether its extension in CUDA is there.
        cudnn: as torch gives it, 91500 for 9.15.0; 0: there is none.
        nccl: empty without a GPU.
    """

    python: str
    versions: dict[str, str]
    megablocks_is_built: bool = True
    capability: tuple[int, int] | None = None
    cudnn: int = 0
    nccl: tuple[int, ...] = ()
    dispatcher: str = "alltoall"  # parallel.moe_token_dispatcher
    is_new_python: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_new_python", _within(self.python, ">=3.12"))


def this_stack(dispatcher: str = "alltoall") -> Stack:
    names = ("torch", "megatron-core", "transformer-engine", "nv-grouped-gemm", "packaging", *MEGABLOCKS)
    gpu = torch.cuda.is_available()
    return Stack(
        platform.python_version(),
        {name: version for name in names if (version := version_of(name))},
        importlib.util.find_spec("megablocks_ops") is not None,
        torch.cuda.get_device_capability() if gpu else None,
        torch.backends.cudnn.version() or 0,
        tuple(torch.cuda.nccl.version()) if gpu else (),
        dispatcher,
    )


def conflicts(stack: Stack) -> list[Problem]:
    return [problem for rule in _RULES for problem in rule(stack)]


def _python(stack: Stack) -> Iterator[Problem]:
    if not _within(stack.python, PYTHON):
        why = "Megatron-Core has wheels for Python 3.10 to 3.13 only"
        yield Problem("wrong", f"Python {stack.python}", why, "use a Python from 3.10 to 3.13")


def _torch(stack: Stack) -> Iterator[Problem]:
    version = stack.versions.get("torch", "")
    if version and not _within(version, TORCH):
        why = f"setup.py allows {TORCH}; torch.nn.functional.grouped_mm is public from 2.10 on"
        yield Problem("wrong", f"torch {version}", why, f"pip install 'torch{TORCH}'")


def _megatron(stack: Stack) -> Iterator[Problem]:
    wanted = MEGATRON_NEW_PYTHON if stack.is_new_python else MEGATRON_OLD_PYTHON
    if (version := stack.versions.get("megatron-core", "")) in (MEGATRON_OLD_PYTHON, MEGATRON_NEW_PYTHON):
        return
    mend = f"pip install megatron-core=={wanted}"
    if not version:
        yield Problem("wrong", "Megatron-Core is not installed", "nothing can be trained without it", mend)
    else:
        why = f"the CPU adapter replaces parts of {MEGATRON_OLD_PYTHON} and {MEGATRON_NEW_PYTHON} (runtime/cpu.py)"
        yield Problem("unsure", f"Megatron-Core {version}", why, mend)


def _packaging(stack: Stack) -> Iterator[Problem]:
    version = stack.versions.get("packaging", "")
    if version and not _within(version, ">=24.2"):
        why = "Megatron-Core needs 24.2 or newer; MegaBlocks, installed without our script, brings an older one"
        yield Problem("wrong", f"packaging {version}", why, "pip install 'packaging>=24.2'")


def _transformer_engine(stack: Stack) -> Iterator[Problem]:
    wanted = TRANSFORMER_ENGINE if stack.is_new_python else TRANSFORMER_ENGINE_OLD_PYTHON
    version = stack.versions.get("transformer-engine", "")
    if version and not _within(version, wanted):
        why = f"Megatron-Core of this Python declares, and our backends were written for, {wanted}"
        mend = "in an environment without it: bash scripts/install_gpu.sh --te"
        yield Problem("unsure", f"Transformer Engine {version}", why, mend)


def _megablocks(stack: Stack) -> Iterator[Problem]:
    for name, wanted in MEGABLOCKS.items():
        if (version := stack.versions.get(name, wanted)) != wanted:
            why = f"expert_backend megablocks was written for {wanted}"
            yield Problem("unsure", f"{name} {version}", why, f"pip uninstall {name}; {_INSTALL_MEGABLOCKS}")
    if "megablocks" in stack.versions and not stack.megablocks_is_built:
        why = "its extension (megablocks_ops) is missing, as in a wheel that was built without CUDA"
        yield Problem("wrong", "MegaBlocks", why, f"pip uninstall megablocks; {_INSTALL_MEGABLOCKS}")


def _grouped_gemm(stack: Stack) -> Iterator[Problem]:
    if {"grouped_gemm", "nv-grouped-gemm"} <= stack.versions.keys():
        mend = f"pip uninstall nv-grouped-gemm grouped_gemm; {_INSTALL_MEGABLOCKS}"
        yield Problem("wrong", "grouped_gemm and nv-grouped-gemm", "their modules have the same names", mend)


def _slow_attention(stack: Stack) -> Iterator[Problem]:
    if stack.capability and stack.capability[0] == HOPPER[0] and stack.cudnn < CUDNN_FOR_HOPPER:
        why = f"torch takes cuDNN's faster attention on this GPU from {CUDNN_FOR_HOPPER} on"
        mend = "in a new environment, whose torch brings a newer cuDNN: pip install 'torch>=2.11,<2.15'"
        yield Problem("slow", f"cuDNN {stack.cudnn}", why, mend)


def _ncclep(stack: Stack) -> Iterator[Problem]:
    if stack.dispatcher == "ncclep" and stack.nccl and stack.nccl < NCCL_FOR_NCCLEP:
        needed, here = (".".join(map(str, version)) for version in (NCCL_FOR_NCCLEP, stack.nccl))
        why = f"parallel.moe_token_dispatcher: ncclep wants NCCL {needed}"
        yield Problem("wrong", f"NCCL {here}", why, "parallel.moe_token_dispatcher=alltoall, or a newer NCCL")


_RULES: tuple[Callable[[Stack], Iterator[Problem]], ...] = (
    _python,
    _torch,
    _megatron,
    _packaging,
    _transformer_engine,
    _megablocks,
    _grouped_gemm,
    _slow_attention,
    _ncclep,
)


def _within(version: str, allowed: str) -> bool:
    """A pre-release counts as older than its release, as for pip."""
    return SpecifierSet(allowed).contains(version, prereleases=True)
