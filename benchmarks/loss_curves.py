"""Does fp8 learn like bf16? Trains the same model on the same text, once with each backend of the expert matmuls.

    python -m benchmarks.loss_curves [--steps 200] [--record]

Two bf16 backends show how far equally good runs drift apart, by rounding alone. The text is the quickstart's, the
source of SymPy, byte by byte. On a GPU there are three runs, and each is ended after three minutes.
Without a GPU, it trains a tiny model for a few steps, only to test the code. `--record` writes the table to
benchmarks/results/loss_curves.md, and needs a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.processes import why_it_ended
from benchmarks.provenance import REPO, provenance, versions
from data_tools.indexed import IndexedWriter
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.monitor.jsonl import read_metrics
from scripts.quickstart_corpus import folder_of_sympy, is_held_out, sources

RESULT = REPO / "benchmarks/results/loss_curves.md"
GPU = {"num_layers": 8, "hidden_size": 1024, "num_kv_heads": 8, "kv_channels": 128, "ffn_hidden_size": 2816}
TINY = {"num_layers": 1, "hidden_size": 32, "num_kv_heads": 2, "kv_channels": 8, "ffn_hidden_size": 48}
END = 256  # the end-of-document id, after those of the 256 bytes
VOCAB = 320
PARTS = 10  # of a run, in the table
LIMIT = 180  # seconds of one run

Metrics = list[dict[str, Any]]


def main() -> int:
    arguments = parse_arguments()
    on_gpu = torch.cuda.is_available()
    if arguments.record and not on_gpu:
        raise SystemExit("--record needs a GPU, and there is none")
    backends = ("torch", "te", "te_fp8") if on_gpu else ("torch", "loop")
    results: dict[str, Metrics | str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(run_tree(folder, arguments.steps, on_gpu)))
        for backend in backends:
            print(f"{backend} ...", file=sys.stderr, flush=True)
            results[backend] = train(folder, backend)
    text = report(results, on_gpu)
    print(text)
    if arguments.record:
        RESULT.write_text(text)
    return int(isinstance(results["torch"], str))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200 if torch.cuda.is_available() else 10)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    if arguments.steps < PARTS:
        parser.error(f"--steps {arguments.steps}: at least {PARTS}")
    return arguments


def write_text(folder: Path) -> None:
    """The library's files as documents of bytes."""
    with (
        IndexedWriter(folder / "train", np.uint16) as train,
        IndexedWriter(folder / "held_out", np.uint16) as held_out,
    ):
        for name, code in sources(folder_of_sympy()):
            text = np.frombuffer(code.encode(), np.uint8).astype(np.uint16)
            (held_out if is_held_out(name) else train).add_document(np.append(text, np.uint16(END)))


def run_tree(folder: Path, steps: int, on_gpu: bool) -> dict[str, Any]:
    length, sequences, micro = (1024, 64, 16) if on_gpu else (64, 4, 4)
    tokens = length * sequences
    return {
        "name": "loss_curves",
        "output_dir": "set for each backend",
        "model": {**(GPU if on_gpu else TINY), "vocab_size": VOCAB},
        "precision": "bf16",
        "batch": {"sequence_length": length, "global_tokens": tokens, "micro_sequences": micro},
        "optimizer": {"max_lr": 1e-3},
        "schedule": {"warmup_tokens": steps * tokens // 20},
        "evaluation": {"sequences": 64, "data": [{"name": "held_out", "path": str(folder / "held_out")}]},
        "phases": [
            {
                "name": "only",
                "tokens": steps * tokens,
                "learning_rate": "constant",
                "data": [{"name": "text", "path": str(folder / "train"), "weight": 1}],
            }
        ],
    }


def train(folder: Path, backend: str) -> Metrics | str:
    """The records of all steps, or why there are none."""
    run = folder / backend
    command = [sys.executable, "pretrain_jetmoe.py", str(folder / "run.yaml")]
    changes = [f"output_dir={run}", f"model.expert_backend={backend}"]
    try:
        ended = subprocess.run(command + changes, cwd=REPO, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"took longer than {LIMIT} s"
    if ended.returncode != 0:
        return why_it_ended(ended)
    records = read_metrics(RunFolder(run).metrics)
    shutil.rmtree(run)  # its checkpoint has gigabytes
    return records


def report(results: dict[str, Metrics | str], on_gpu: bool) -> str:
    measured = {backend: records for backend, records in results.items() if not isinstance(records, str)}
    device = torch.cuda.get_device_name() if on_gpu else "no GPU: a tiny model, figures of no interest"
    shape = ", ".join(f"{key} {value}" for key, value in (GPU if on_gpu else TINY).items())
    head = [
        "# The loss by backend\n",
        f"`{' '.join(['python -m benchmarks.loss_curves', *sys.argv[1:]])}`, {provenance()}, {device}, {versions()}.\n",
        f"{shape}, 8 experts, top 2, bytes of SymPy's source. Nats per byte, the mean of the steps, and in\n"
        "brackets the difference to the first column.\n",
    ]
    missing = [f"\n{backend}: not measured: {why}" for backend, why in results.items() if isinstance(why, str)]
    return "\n".join([*head, *(_table(measured) if measured else []), *missing]) + "\n"


def _table(measured: dict[str, Metrics]) -> list[str]:
    rows = [
        "| steps | " + " | ".join(measured) + " |",
        "|---" * (1 + len(measured)) + "|",
    ]
    steps = min(len(records) for records in measured.values())
    for part in range(PARTS):
        start, end = steps * part // PARTS, steps * (part + 1) // PARTS
        means = [statistics.fmean(r["lm_loss"] for r in records[start:end]) for records in measured.values()]
        rows.append(f"| {start + 1} to {end} | {_cells(means)} |")
    rows.append(f"| held out | {_cells([records[-1]['held_out_loss'] for records in measured.values()])} |")
    rates = [statistics.median(r["tokens_per_second"] for r in records[1:]) for records in measured.values()]
    rows.append("| tokens/s, median | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
    return rows


def _cells(values: list[float]) -> str:
    """The first value, and each other value with its difference to the first."""
    return " | ".join([f"{values[0]:.4f}", *(f"{value:.4f} ({value - values[0]:+.4f})" for value in values[1:])])


if __name__ == "__main__":
    sys.exit(main())
