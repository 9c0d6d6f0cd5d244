"""What several tests need: small data, a small run, and the real commands as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_tools.indexed import IndexedWriter
from tests.warm import Command

REPO = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
VOCAB = 96


def write_dataset(prefix: Path, documents: int, seed: int, vocab: int = VOCAB) -> str:
    """Documents that count up in a stride of their own: there is something to learn."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            start, stride, length = random.integers(vocab), 1 + random.integers(3), random.integers(20, 120)
            writer.add_document(((start + stride * np.arange(length)) % vocab).astype(np.uint16))
    return str(prefix)


def small_run(folder: Path, data: dict[str, str], /, **changes: Any) -> dict[str, Any]:
    """A run of 8 steps with the phase switch after step 5, that takes well under a second of training."""
    tree: dict[str, Any] = {
        "name": "small",
        "output_dir": str(folder / "run"),
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_kv_heads": 2,
            "kv_channels": 8,
            "ffn_hidden_size": 48,
            "num_experts": 4,
            "top_k": 2,
            "vocab_size": VOCAB,
            "init_std": 0.05,
        },
        "precision": "fp32",
        "batch": {"sequence_length": 32, "global_tokens": 256, "micro_sequences": 2},
        "optimizer": {"max_lr": 1e-2},
        "schedule": {"warmup_tokens": 512},
        "checkpoint": {"keep_last": 10},
        "phases": [
            {
                "name": "stable",
                "tokens": 5 * 256,
                "learning_rate": "constant",
                "data": [{"name": n, "path": data[n], "weight": w} for n, w in (("code", 3), ("prose", 1))],
            },
            {
                "name": "decay",
                "tokens": 3 * 256,
                "learning_rate": "exponential",
                "data": [{"name": n, "path": data[n], "weight": 1} for n in ("code", "prose")],
            },
        ],
    }
    for dotted, value in changes.items():
        node, *path = tree, *dotted.split("__")
        for key in path[:-1]:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[int(path[-1]) if isinstance(node, list) else path[-1]] = value
    return tree


def write_run(folder: Path, tree: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def command(*arguments: object, timeout: float = 240, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end, with the output as text."""
    return subprocess.run(
        [str(a) for a in arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        cwd=more.pop("cwd", REPO),
        **more,
    )


def environment() -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"}}
    bin_folder = str(Path(sys.executable).parent)
    path = bin_folder + os.pathsep + keep.get("PATH", "")
    return {**keep, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONWARNINGS": "ignore"}


def pretrain(ranks: int, run_file: Path, *overrides: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """The training command to its end, without a launcher."""
    return training(run_file, *overrides).run(ranks, timeout)


def training(run_file: object, *overrides: str, before: Callable[[], None] | None = None) -> Command:
    return Command(["pretrain", run_file, *overrides], environment(), REPO, before)


def launched(ranks: int, run_file: Path, *overrides: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """The training command under torchrun, in processes of its own."""
    return command(*TORCHRUN, f"--nproc-per-node={ranks}", "pretrain_jetmoe.py", run_file, *overrides, timeout=timeout)


def jetmoe(*arguments: object) -> subprocess.CompletedProcess[str]:
    return Command(["jetmoe", *arguments], environment(), REPO).run()


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def losses(run_folder: Path) -> list[tuple[float, ...]]:
    return computed(metrics(run_folder))


def computed(records: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """Everything of each step that depends on the computation alone."""
    keys = ["step", "tokens", "lr", "lm_loss", "grad_norm"]
    keys += ["moa_balance_loss", "moe_balance_loss", "moa_z_loss", "moe_z_loss"]
    return [tuple(record[key] for key in keys) for record in records]
