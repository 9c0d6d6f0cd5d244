"""What it costs to build, and to open, the order of JetMoE-8B's whole run: 1.25T tokens in sequences of 4096.

    python -m benchmarks.data_order [--tokens-per-document 700] [--folder DIR]

Makes data sets of the real sizes, whose tokens are holes in sparse files. Builds all indices as `jetmoe data prepare`
does, and opens them in a new process as training does. Needs about 55 GB on disk, removed at the end, and 11 GiB of
memory; less with longer documents.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from benchmarks.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "data_order.md"
TOKENS = {"refinedweb": 600e9, "starcoder": 250e9, "pile": 90e9}  # others: 20e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-document", type=int, default=700, help="700 is about one web page")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--child", choices=["build", "start"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.folder, arguments.child)
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        documents = make(folder, arguments.tokens_per_document)
        lines = [child(folder, "build"), child(folder, "start")]
        size = sum(f.stat().st_size for f in (folder / "cache").rglob("*.npy"))
        write(documents, lines, size, arguments)
    finally:
        shutil.rmtree(folder)


def make(folder: Path, tokens_per_document: int) -> int:
    """The run file and its data sets. Returns the number of documents."""
    os.environ.update(DATA=str(folder), OUTPUT=str(folder))
    from jetmoe_megatron.config import dump_run, load_run

    run = load_run(ROOT / "configs" / "jetmoe_8b" / "run.yaml", [f"data.cache={folder}/cache", "tokenizer=null"])
    paths = {d.name: Path(d.path) for phase in run.phases for d in phase.data}
    total = 0
    for number, (name, path) in enumerate(paths.items()):
        path.parent.mkdir()
        count = int(TOKENS.get(name, 20e9)) // tokens_per_document + number  # no two have the same size
        total += count
        lengths = np.full(count, tokens_per_document, np.int32)
        with open(f"{path}.idx", "wb") as file:  # uint16, one sequence per document
            file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, count, count + 1))
            lengths.tofile(file)
            (np.arange(count, dtype=np.int64) * 2 * tokens_per_document).tofile(file)
            np.arange(count + 1, dtype=np.int64).tofile(file)
        with open(f"{path}.bin", "wb") as file:
            file.truncate(2 * count * tokens_per_document)
    (folder / "run.yaml").write_text(dump_run(run))
    return total


def child(folder: Path, what: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data_order", "--folder", str(folder), "--child", what]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if ended.returncode:
        sys.exit(ended.stderr)
    return yaml.safe_load(ended.stdout.splitlines()[-1])


def run_child(folder: Path, what: str) -> None:
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.data.checks import check_data
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import Position, RunSamples, orders
    from jetmoe_megatron.data.prepare import prepare

    run, cache = load_run(folder / "run.yaml"), IndexCache(folder / "cache")
    started = time.perf_counter()
    result: dict[str, float] = {}
    if what == "build":
        for _, order in orders(run, cache):
            order.build()
        result["order_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        prepare(run, cache, Position())
        result["epochs_seconds"] = time.perf_counter() - started
    else:
        check_data(run)
        result["check_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        samples = RunSamples(run, cache)
        result["samples"] = len(samples)
        result["open_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        for number in np.linspace(0, len(samples) - 1, 256, dtype=np.int64):
            samples[int(number)]
        result["sample_milliseconds"] = (time.perf_counter() - started) / 256 * 1000
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(yaml.safe_dump(result, default_flow_style=True, width=1000).strip())


def write(documents: int, lines: list[dict[str, float]], size: int, arguments: argparse.Namespace) -> None:
    build, start = lines
    samples = int(start["samples"])

    def cost(key: str) -> str:
        return f"{build[key]:.1f} s, {build[key] / samples * 1e9:.0f} ns per sequence"

    text = f"""# The order of 1.25T tokens

`python -m benchmarks.data_order --tokens-per-document {arguments.tokens_per_document}`, {provenance()},
numpy {np.__version__}; tokens are holes in sparse files.

| | |
|---|---|
| sequences of 4096 in the run | {samples:,} |
| documents in 13 data sets | {documents:,} |
| which data set each sequence comes from (both phases) | {cost("order_seconds")} |
| order within the data sets (all epochs) | {cost("epochs_seconds")} |
| peak memory while building | {build["peak_gib"]:.1f} GiB |
| cache on disk | {size / 2**30:.1f} GiB |
| start: data files checked, token ids of each looked at | {start["check_seconds"]:.2f} s |
| start: indices of the cache opened, ready for the first sequence | {start["open_seconds"]:.2f} s |
| one sequence read, at random places, first time | {start["sample_milliseconds"]:.2f} ms |
"""
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
