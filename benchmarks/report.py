"""How long `jetmoe report --html` takes for a run of the 8B's size, how much memory, and how large the page is.

    python -m benchmarks.report [--steps N] [--record]

Writes 300,000 lines of metrics and 15,000 records of routers (24 layers, 8 experts, both kinds) to a temporary folder:
half a gigabyte. Takes a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import REPO, provenance
from jetmoe_megatron.config.run_folder import RunFolder

RESULT = REPO / "benchmarks/results/report.md"
STEPS, EVERY, LAYERS, EXPERTS = 300_000, 20, 24, 8
TOKENS = 4_194_304  # of a step
KINDS = ("moa", "moe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS:,}")
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.relative_to(REPO)}")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = [write(RunFolder(folder).metrics, lines(arguments.steps))]
        sizes.append(write(RunFolder(folder).routers, records(arguments.steps)))
        rows = [measure(folder), measure(folder, "--html", str(folder / "page.html"))]
        page = (folder / "page.html").stat().st_size
    text = REPORT.format(
        provenance=provenance(),
        load=load,
        steps=arguments.steps,
        records=arguments.steps // EVERY,
        metrics=sizes[0] / 1e6,
        routers=sizes[1] / 1e6,
        rows="\n".join(rows),
        page=page / 1e6,
    )
    print(text, end="")
    if arguments.record:
        RESULT.write_text(text)


REPORT = """# Reports

`python -m benchmarks.report`, {provenance}, load {load:.1f} at the start.

{steps:,} lines of metrics ({metrics:.0f} MB) and {records:,} records of routers ({routers:.0f} MB).

| command | seconds | peak memory, MB |
|---|---|---|
{rows}

The page has {page:.2f} MB.
"""


def lines(steps: int) -> Iterator[dict[str, Any]]:
    """As a run writes them. A bad step, a NaN, saves and evaluations are among them."""
    noise = np.random.default_rng(0)
    for step in range(1, steps + 1):
        a, b, c, d = noise.random(4).tolist()
        seconds = 14 + a
        line = {"step": step, "phase": "stable" if step < 0.8 * steps else "decay", "tokens": step * TOKENS, "lr": 5e-4}
        line |= {"lm_loss": 2 + 6 / (1 + step / 500) + 0.1 * b, "grad_norm": 0.3 + 0.1 * c, "data_wait_seconds": d / 99}
        for kind in KINDS:
            line |= {f"{kind}_balance_loss": 1 + a / 9, f"{kind}_z_loss": 3 + b, f"{kind}_load_imbalance": 1.3 + c / 9}
        if step % EVERY == 0:
            line |= {f"grad_norm/{part}": 0.1 + 0.1 * d for part in ("embedding", "moa", "moe", "routers", "norms")}
            line |= {"param_norm": 900 + a, "update_norm": 0.1 + b}
            for kind in KINDS:
                line |= {f"routers/{kind}/{name}": c for name in ("load_max", "load_min", "load_cv", "gate_entropy")}
        line |= {"slowest_rank": int(96 * a), "slowest_rank_ratio": 1 + b / 9, "mfu": 0.4 + c / 99}
        line |= {"forward_backward_seconds": 13 + a, "gradient_reduction_seconds": b / 9, "optimizer_seconds": c / 9}
        line |= {"host_memory_gb": 20 + d / 9, "device_memory_gb": 50 + a, "peak_memory_gb": 61.2}
        line |= {"tokens_per_second": TOKENS / seconds, "tflops_per_rank": 390 + b}
        for name, share in (("web", 0.7), ("code", 0.2), ("books", 0.1)):
            line |= {f"dataset_tokens/{name}": int(step * TOKENS * share), f"dataset_epochs/{name}": step / steps}
        if step % 1000 == 0:
            line |= {
                "held_out_loss": 2.1 + a / 99,
                "held_out_loss/web": 2.2,
                "bits_per_byte/web": 0.9,
                "evaluation_seconds": 60.0,
            }
        if step == steps // 2:
            line |= {"lm_loss": float("nan"), "skipped": "loss is nan"}
        line |= {"time": "2026-01-01T00:00:00.000000Z", "save_stall_seconds": 0.01, "other_seconds": 0.02}
        line |= {"step_seconds": seconds, "wall_seconds": seconds + 0.03, "run_seconds": 15.0 * step}
        yield line | {"goodput": 0.99, "rank_hours": 0.4 * step, "dollars": 0.8 * step}


def records(steps: int) -> Iterator[dict[str, Any]]:
    noise = np.random.default_rng(1)
    for step in range(EVERY, steps + 1, EVERY):
        record: dict[str, Any] = {"step": step, "tokens": step * TOKENS, "steps": EVERY}
        for kind in KINDS:
            record[f"{kind}_load"] = noise.dirichlet(np.full(EXPERTS, 50.0), LAYERS).dot(EXPERTS).tolist()
            for name in ("gate_entropy", "top1_margin", "balance_loss", "z_loss"):
                record[f"{kind}_{name}"] = noise.random(LAYERS).tolist()
        yield record


def write(path: Path, each: Iterator[dict[str, Any]]) -> int:
    with open(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in each)
    return path.stat().st_size


def measure(folder: Path, *options: str) -> str:
    """A row."""
    started = time.perf_counter()
    command = [str(Path(sys.executable).parent / "jetmoe"), "report", str(folder), *options]
    ended = subprocess.run([sys.executable, "-c", _IN_BETWEEN, *command], cwd=REPO, check=True, stdout=subprocess.PIPE)
    seconds, peak = time.perf_counter() - started, int(ended.stdout) * 1024 / 1e6
    return f"| `jetmoe report RUN_FOLDER{' --html' if options else ''}` | {seconds:.1f} | {peak:.0f} |"


# A small process: between fork and exec, a child counts the memory of its parent, which here has imported torch.
_IN_BETWEEN = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


if __name__ == "__main__":
    main()
