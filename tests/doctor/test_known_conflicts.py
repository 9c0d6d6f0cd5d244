"""What is known not to work together is found, and is what setup.py and the script that installs say."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from jetmoe_megatron.doctor import known_conflicts
from jetmoe_megatron.doctor.known_conflicts import Stack, conflicts
from tests.support import REPO

GOOD = Stack(
    "3.12.4",
    {
        "torch": "2.13.0+cu130",
        "megatron-core": "0.19.2",
        "transformer-engine": "2.20.2",
        "packaging": "25.0",
        "megablocks": "0.10.0",
        "grouped_gemm": "0.3.0",
        "stanford-stk": "0.7.1",
    },
    capability=(9, 0),
    cudnn=91900,
    nccl=(2, 28, 9),
)


def having(**versions: str | None) -> Stack:
    changed = {**GOOD.versions, **{name.replace("__", "-"): version for name, version in versions.items()}}
    return replace(GOOD, versions={name: version for name, version in changed.items() if version})


def test_what_goes_together() -> None:
    assert conflicts(GOOD) == []
    old = having(megatron__core="0.16.1", transformer__engine="2.11.0")
    assert conflicts(replace(old, python="3.11.9")) == []
    assert conflicts(having(torch="2.11.0a0+eb65b36914.nv26.02")) == []  # NVIDIA's container
    assert conflicts(having(transformer__engine=None, megablocks=None, grouped_gemm=None, stanford__stk=None)) == []


@pytest.mark.parametrize(
    ("stack", "kind", "said"),
    [
        (replace(GOOD, python="3.14.0"), "wrong", "Python 3.14.0: "),
        (having(torch="2.9.1"), "wrong", "torch 2.9.1: "),
        (having(torch="2.15.0"), "wrong", "torch 2.15.0: "),
        (having(torch="2.10.0a0+b4e4ee81d3.nv25.12"), "wrong", "torch 2.10.0a0"),
        (having(megatron__core=None), "wrong", "Megatron-Core is not installed: "),
        (having(megatron__core="0.20.0"), "unsure", "Megatron-Core 0.20.0: "),
        (having(packaging="24.1"), "wrong", "packaging 24.1: "),
        (having(transformer__engine="2.8.0"), "unsure", "Transformer Engine 2.8.0: "),
        (replace(GOOD, python="3.11.9"), "unsure", "Transformer Engine 2.20.2: "),
        (having(megablocks="0.11.0"), "unsure", "megablocks 0.11.0: "),
        (replace(GOOD, megablocks_is_built=False), "wrong", "MegaBlocks: its extension (megablocks_ops) is missing"),
        (having(nv__grouped__gemm="1.1.4"), "wrong", "grouped_gemm and nv-grouped-gemm: "),
        (replace(GOOD, cudnn=91002), "slow", "cuDNN 91002: "),
        (replace(GOOD, dispatcher="ncclep"), "wrong", "NCCL 2.28.9: "),
    ],
)
def test_what_does_not(stack: Stack, kind: str, said: str) -> None:
    (problem,) = conflicts(stack)
    assert problem.kind == kind and str(problem).startswith(f"{kind}: {said}") and problem.mend


def test_cudnn_matters_on_hopper_alone() -> None:
    assert conflicts(replace(GOOD, cudnn=91002, capability=(8, 0))) == []
    assert conflicts(replace(GOOD, cudnn=91002, capability=None)) == []


def test_the_ranges_are_those_of_setup() -> None:
    text = (REPO / "setup.py").read_text()
    assert f'python_requires="{known_conflicts.PYTHON}"' in text and f'"torch{known_conflicts.TORCH}"' in text
    pins = dict(re.findall(r"\"megatron-core==([\d.]+); python_version (.*) '3\.12'\"", text))
    assert pins == {known_conflicts.MEGATRON_OLD_PYTHON: "<", known_conflicts.MEGATRON_NEW_PYTHON: ">="}
    engines = dict(re.findall(r"\"transformer-engine\[pytorch\](\S+); python_version (.*) '3\.12'\"", text))
    assert engines == {known_conflicts.TRANSFORMER_ENGINE_OLD_PYTHON: "<", known_conflicts.TRANSFORMER_ENGINE: ">="}


def test_the_versions_of_megablocks_are_those_of_the_script() -> None:
    text = (REPO / "scripts/install_gpu.sh").read_text()
    assert all(f"'{name}=={version}'" in text for name, version in known_conflicts.MEGABLOCKS.items())
