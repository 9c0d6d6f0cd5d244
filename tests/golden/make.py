"""Make a golden checkpoint: one that a commit wrote, and that all later commits must load.

    python -m tests.golden.make VARIANT [COMMIT]

Use it before each release, and before a change of what checkpoints contain. Older golden checkpoints stay as they are:
the reader must keep loading them (`tests/checkpoint/test_golden.py`).

The commit (default: HEAD) is checked out into a temporary folder and trains 4 small steps there, with its own code, on
CPUs. `tests/golden/VARIANT-COMMIT/` gets the run file, the data, the checkpoint of step 2 and `expected.json`:

    commit, date, torch, megatron_core, cpu   what made it
    ranks                                     how many saved it
    resume                                    overrides without which later commits refuse to resume it
    checkpoint                                its folder
    steps                                     loss and gradient norm of the steps after it, as float.hex, so exact
    export                                    what the commit's `jetmoe convert to-hf` made of it: see digest_of_export
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from data_tools.indexed import IndexedWriter
from tests.support import REPO, TORCHRUN, environment, metrics, write_dataset, write_run

GOLDEN = REPO / "tests/golden"
VOCAB = 32
SEQUENCE = 16  # tokens
STEP_TOKENS = 8 * SEQUENCE


@dataclass(frozen=True)
class Variant:
    """
    Attributes:
        changes: of the run's sections.
        weights_only: keep what `jetmoe convert from-hf` makes, and the first steps of a run that starts there.
        any_order: all sequences of the data are equal, so that a run that reads them in another order computes the
            same: for commits whose data later commits cannot recognise.
    """

    ranks: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    weights_only: bool = False
    any_order: bool = False


VARIANTS = {
    "fp32": Variant(),
    "bf16": Variant(changes={"precision": "bf16"}),
    "two_ranks": Variant(2, {"parallel": {"expert": 2, "attention_experts": "sharded"}}),
    "from_hf": Variant(weights_only=True),
    "any_order": Variant(any_order=True),
}


def run_tree(variant: Variant) -> dict[str, Any]:
    """Relative paths, so that the run works wherever its folder is copied. Only keys that all commits know."""

    def phase(name: str, steps: int, learning_rate: str) -> dict[str, Any]:
        sets = [
            {"name": name, "path": f"data/{name}", "weight": weight} for name, weight in (("code", 3), ("prose", 1))
        ]
        return {"name": name, "tokens": steps * STEP_TOKENS, "learning_rate": learning_rate, "data": sets}

    return {
        "name": "golden",
        "output_dir": "run",
        "model": {
            "num_layers": 2,
            "hidden_size": 8,
            "num_kv_heads": 2,
            "kv_channels": 4,
            "ffn_hidden_size": 8,
            "num_experts": 4,
            "top_k": 2,
            "vocab_size": VOCAB,
            "init_std": 0.05,
        },
        "precision": "fp32",
        "batch": {"sequence_length": SEQUENCE, "global_tokens": STEP_TOKENS, "micro_sequences": 2},
        # With the usual eps, the first steps of Adam turn a rounding error of a gradient near 0 into a visible one.
        # No weight decay: commits before 6d7bb9d did not spare norms and biases.
        "optimizer": {"max_lr": 1e-2, "eps": 1e-5, "weight_decay": 0.0},
        "schedule": {"warmup_tokens": STEP_TOKENS},
        "checkpoint": {"every_tokens": 2 * STEP_TOKENS},
        "phases": [phase("stable", 3, "constant"), phase("decay", 1, "exponential")],
        **variant.changes,
    }


def make(variant: Variant, commit: str, code: Path, folder: Path) -> None:
    """Fill `folder` with what the checkout `code` of `commit` makes."""

    def own(*arguments: object) -> None:
        command = [str(argument) for argument in arguments]
        subprocess.run(command, env={**environment(), "PYTHONPATH": str(code)}, cwd=folder, check=True)

    def pretrain() -> None:
        launcher = [sys.executable] if variant.ranks == 1 else [*TORCHRUN, f"--nproc-per-node={variant.ranks}"]
        own(*launcher, code / "pretrain_jetmoe.py", "run.yaml")

    jetmoe = [sys.executable, "-m", "jetmoe_megatron.cli"]
    (folder / "data").mkdir(parents=True)
    for seed, name in enumerate(("code", "prose")):
        if variant.any_order:
            write_equal_sequences(folder / "data" / name, documents=20)
        else:
            write_dataset(folder / "data" / name, 20, seed, VOCAB)
    tree = run_tree(variant)
    write_run(folder, tree)
    pretrain()
    checkpoint = folder / "run" / "checkpoints" / f"tokens_{2 * STEP_TOKENS}"
    own(*jetmoe, "convert", "to-hf", checkpoint.relative_to(folder), "hf")
    if variant.weights_only:
        own(*jetmoe, "convert", "from-hf", "hf", "weights")
        shutil.rmtree(folder / "run")
        write_run(folder, {**tree, "start_from": "weights"})
        pretrain()
    kept = {} if variant.weights_only else {checkpoint}
    steps = {record["step"]: record for record in metrics(folder / "run")}
    expected = {
        "commit": commit,
        "date": _git("log", "-1", "--format=%cs", commit),
        **environment_of_numbers(),
        "ranks": variant.ranks,
        "resume": ["data.new_blend=true"] if variant.any_order else [],
        "checkpoint": (folder / "weights" if variant.weights_only else checkpoint).relative_to(folder).as_posix(),
        "steps": {
            step: {key: steps[step][key].hex() for key in ("lm_loss", "grad_norm")}
            for step in ((1, 2) if variant.weights_only else (3, 4))
        },
        "export": digest_of_export(folder / "hf"),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(folder / "hf")
    for path in folder.glob("run/*"):
        _remove(path) if path.name != "checkpoints" else None
    for path in folder.glob("run/checkpoints/*"):
        _remove(path) if path not in kept else None


def write_equal_sequences(prefix: Path, documents: int) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            writer.add_document(np.tile(np.arange(SEQUENCE, dtype=np.uint16), 3))


def environment_of_numbers() -> dict[str, str]:
    """What decides the last bits of a number that this program computes on a CPU."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "megatron_core": importlib.metadata.version("megatron-core"),
        "cpu": f"{cpu[0].partition(': ')[2] if cpu else 'unknown'} ({torch.backends.cpu.get_cpu_capability()})",
    }


def digest_of_export(folder: Path) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all tensors of a Hugging Face folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=REPO, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("commit", nargs="?", default="HEAD")
    arguments = parser.parse_args()
    commit = _git("rev-parse", "--short=7", arguments.commit)
    target = GOLDEN / f"{arguments.variant}-{commit}"
    if target.exists():
        print(f"error: {target}: exists. Golden checkpoints are not made again", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        code, folder = Path(temporary, "code"), Path(temporary, "golden")
        _git("worktree", "add", "--detach", str(code), commit)
        try:
            make(VARIANTS[arguments.variant], commit, code, folder)
        finally:
            _git("worktree", "remove", "--force", str(code))
        shutil.copytree(folder, target)
    print(target.relative_to(REPO), sum(path.stat().st_size for path in target.rglob("*") if path.is_file()), "bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
