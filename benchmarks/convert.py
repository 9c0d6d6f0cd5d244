"""How fast and in how little memory `jetmoe convert to-hf` writes a model of JetMoE-8B's size, beside `cp`.

    python -m benchmarks.convert [--model configs/models/jetmoe_8b.yaml] [--folder /tmp] [--repeat 3] [--record]

Writes a checkpoint with that many random weights, 17 GB for the 8B, and needs twice that of free disk; all of it is
deleted at the end. Each round copies the checkpoint's tensors with `cp` and converts them with the command, both in
processes of their own, from a cold file cache. `--record` writes the table to benchmarks/results/convert.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import safe_open

from benchmarks.provenance import REPO, provenance
from jetmoe_megatron.config.schema import Model
from jetmoe_megatron.convert.from_hf import write_weights_only
from jetmoe_megatron.convert.hf_config import hf_config
from jetmoe_megatron.convert.hf_names import Weight, weights
from jetmoe_megatron.convert.safetensors_file import nbytes
from jetmoe_megatron.convert.streaming import BLOCK

# Of the released model (Hugging Face commit e289db5).
RELEASED_SIZES = [4_879_573_992, 4_933_084_288, 4_933_084_344, 2_298_765_576]


@dataclass
class Measured:
    seconds: float
    processor: float  # seconds
    peak_gb: float  # resident
    load: float  # of the machine, at the end: processes that run or wait for a core or the disk


class RandomWeights:
    """The same numbers in another order for each tensor: drawing billions of them would take longer than the rest."""

    dtype: torch.dtype | None = torch.bfloat16

    def __init__(self, model: Model) -> None:
        self.model, self.weights = model, weights(model)
        self._numbers = torch.empty(BLOCK).normal_(0, 0.01, generator=torch.Generator().manual_seed(0)).bfloat16()

    def blocks(self, weight: Weight) -> Iterator[torch.Tensor]:
        left = torch.Size(weight.shape).numel()
        numbers = self._numbers.roll(zlib.crc32(weight.hugging_face.encode()) % BLOCK)
        while left:
            yield numbers[: min(left, BLOCK)]
            left -= min(left, BLOCK)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPO / "configs/models/jetmoe_8b.yaml")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    model = Model.model_validate(yaml.safe_load(arguments.model.read_text()))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rounds = measure(model, Path(folder), arguments.repeat)
        table = table_of(model, rounds) + "\n" + table_of_return(model, measure_return(Path(folder)))
    print(table)
    if arguments.record:
        (REPO / "benchmarks/results/convert.md").write_text(record(table))
    return 0


def measure(model: Model, folder: Path, repeat: int) -> list[tuple[Measured, Measured]]:
    """`cp` and `to-hf`, in turn."""
    checkpoint, out = folder / "checkpoint", folder / "out"
    needed = 2.1 * total_bytes(model)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(f"{folder}: needs {needed / 1e9:.0f} GB of free disk, has {free / 1e9:.0f}")
    (folder / "config.json").write_text(json.dumps(hf_config(model, 4096, "bfloat16", {})))
    write_weights_only(checkpoint, RandomWeights(model), torch.bfloat16, folder)
    rounds = []
    for _ in range(repeat):
        forget(checkpoint)
        cp = run(["cp", str(checkpoint / "__0_0.distcp"), str(out)])
        out.unlink()
        forget(checkpoint)
        ours = run([sys.executable, "-m", "jetmoe_megatron.cli", "convert", "to-hf", str(checkpoint), str(out)])
        check(out, model)
        rounds.append((cp, ours))
        if len(rounds) < repeat:
            shutil.rmtree(out)
    return rounds


def measure_return(folder: Path) -> dict[str, Measured]:
    """`from-hf` of what `to-hf` has written last, and `verify` of the two, each once."""
    shutil.rmtree(folder / "checkpoint")
    out, back = str(folder / "out"), str(folder / "back")
    convert = [sys.executable, "-m", "jetmoe_megatron.cli", "convert"]
    return {"from-hf": run([*convert, "from-hf", out, back]), "verify": run([*convert, "verify", out, back])}


def total_bytes(model: Model) -> int:
    return sum(nbytes(weight, torch.bfloat16) for weight in weights(model))


def table_of(model: Model, rounds: Sequence[tuple[Measured, Measured]]) -> str:
    gigabytes = total_bytes(model) / 1e9
    lines = [
        f"{total_bytes(model):,} bytes of tensors in bf16.",
        "",
        "| round | cp, GB/s | to-hf, GB/s | to-hf / cp | cp, processor s | to-hf, processor s | "
        "to-hf, peak resident GB | load of the machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for i, (cp, ours) in enumerate(rounds, 1):
        lines.append(
            f"| {i} | {gigabytes / cp.seconds:.2f} | {gigabytes / ours.seconds:.2f} | "
            f"{cp.seconds / ours.seconds:.2f} | {cp.processor:.0f} | {ours.processor:.0f} | {ours.peak_gb:.2f} | "
            f"{cp.load:.1f}, {ours.load:.1f} |"
        )
    return "\n".join(lines) + "\n"


def table_of_return(model: Model, measured: dict[str, Measured]) -> str:
    lines = ["| once | GB/s | processor s | peak resident GB | load of the machine |", "|---|---|---|---|---|"]
    for name, it in measured.items():
        rate = total_bytes(model) / 1e9 / it.seconds
        lines.append(f"| {name} | {rate:.2f} | {it.processor:.0f} | {it.peak_gb:.2f} | {it.load:.1f} |")
    return "\n".join(lines) + "\n"


def run(command: Sequence[str]) -> Measured:
    """To the end, from the start of the process: imports count."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPO)
    peak = 0
    while (waited := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        peak = max(peak, peak_of(process.pid))  # wait4's own would be that of this process, if it is larger
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(waited[1])
    if process.returncode != 0:
        raise SystemExit(f"{command[0]} failed")
    return Measured(seconds, waited[2].ru_utime + waited[2].ru_stime, peak / 1e9, os.getloadavg()[0])


def peak_of(pid: int) -> int:
    """The most memory the process has had resident, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def forget(folder: Path) -> None:
    """Write out what is dirty and drop the files from the file cache."""
    os.sync()
    for file in folder.iterdir():
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def check(out: Path, model: Model) -> None:
    """The names, and for the 8B the sizes of the released files."""
    files = sorted(out.glob("*.safetensors"))
    names: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    assert names == {weight.hugging_face for weight in weights(model)}
    if len(names) == 266:
        assert [file.stat().st_size for file in files] == RELEASED_SIZES
        assert len(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == 266


def record(table: str) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        "# Conversion of a model of JetMoE-8B's size\n\n"
        f"`python -m benchmarks.convert`, {provenance()}, {memory:.0f} GiB of memory.\n"
        "The rate is that of the whole command, imports included, from a cold file cache. All 266 names and the four "
        f"file sizes were those of the released model in every round.\n\n{table}"
    )


if __name__ == "__main__":
    sys.exit(main())
