"""What a resume takes: memory beside the state itself, and bytes read, of each rank, for a model of 1.1B parameters.

    python -m benchmarks.resume [--against COMMIT] [--folder DIR] [--record]

Each layout writes a checkpoint of its own and loads it in new processes over gloo, with this code and with that of
COMMIT. Every tensor is filled with one number, which the processes look for after the load. Needs 16 GB on disk,
removed at the end, and 22 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.processes import why_it_ended

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "resume.md"
MODEL = {"num_layers": 12, "hidden_size": 1024, "num_kv_heads": 8, "kv_channels": 128, "ffn_hidden_size": 2816}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "pipeline 2, data 2": (4, {"pipeline": 2}),
    "expert 4, data 4": (4, {"expert": 4}),
    "pipeline 4, data 2": (8, {"pipeline": 4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="measure the code of this commit too")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, layout = arguments.child
        sys.exit(fork_ranks(what, layout, arguments.folder))
    rows = list(HEADER)
    print("\n".join(HEADER), flush=True)
    with code_of(arguments.against) as trees:
        for layout in arguments.layouts:
            folder = Path(tempfile.mkdtemp(dir=arguments.folder))
            try:
                run_ranks(ROOT, "write", layout, folder)
                size = sum(path.stat().st_size for path in folder.iterdir())
                for name, tree in trees:
                    rows.append(row(layout, name, run_ranks(tree, "load", layout, folder), size))
                    print(rows[-1], flush=True)
            finally:
                shutil.rmtree(folder)
    if arguments.record:
        from benchmarks.provenance import provenance

        RESULT.write_text(REPORT.format(provenance=provenance(), command=" ".join(sys.argv[1:]), table="\n".join(rows)))


HEADER = (
    "| layout | code | memory beside the state | bytes read, one rank | bytes read, all ranks | time |",
    "|---|---|---|---|---|---|",
)
REPORT = """# What a resume takes

`python -m benchmarks.resume {command}`: {provenance}

A model of 1.1B parameters in bf16 with fp32 weights and moments, loaded by ranks over gloo on one machine. Memory is
the highest resident size during `load_checkpoint`, minus that after it; the state was in memory before. Bytes read are
what the processes read from files (`rchar` of /proc/self/io), as a multiple of the checkpoint's size. Memory and bytes
of one rank are the most of any rank. The check of the checksums, which comes before a load, reads each byte once more,
shared out among all ranks. The disk's cache was not emptied, so the times say little.

{table}
"""


def row(layout: str, name: str, ranks: list[dict[str, float]], size: int) -> str:
    most = max(rank["beside"] for rank in ranks) / 2**20
    read = [rank["read"] / size for rank in ranks]
    seconds = max(rank["seconds"] for rank in ranks)
    return f"| {layout} | {name} | {most:,.0f} MiB | {max(read):.3f} | {sum(read):.3f} | {seconds:.0f} s |"


@contextmanager
def code_of(commit: str | None) -> Iterator[list[tuple[str, Path]]]:
    """(name, folder with the code) of what is measured."""
    if commit is None:
        yield [("this", ROOT)]
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "code"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", tree, commit], cwd=ROOT, check=True, timeout=60)
        try:
            yield [(commit, tree), ("this", ROOT)]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True, timeout=60)


def run_ranks(tree: Path, what: str, layout: str, folder: Path) -> list[dict[str, float]]:
    """What each rank returns. tree: the code that they run."""
    command = [sys.executable, __file__, "--folder", str(folder), "--child", what, layout]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if ended.returncode:
        sys.exit(f"{layout}: {why_it_ended(ended)}")
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def fork_ranks(what: str, layout: str, folder: Path) -> int:
    """Ranks that share the memory of what is imported here. Each prints a line. Returns the worst exit status."""
    import megatron.core.optimizer  # noqa: F401

    world, _ = LAYOUTS[layout]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            line = json.dumps({"write": write, "load": load}[what](layout, folder))
            os.write(1, f"{line}\n".encode())  # in one piece, beside those of the other ranks
            os._exit(0)
        ranks.append(pid)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in ranks)


@contextmanager
def training(layout: str) -> Iterator[tuple[Any, Any]]:
    """Model and optimizer with all their memory in use, of this rank."""
    from jetmoe_megatron.config.layout import resolve_layout
    from jetmoe_megatron.config.schema import Run
    from jetmoe_megatron.model import build
    from jetmoe_megatron.runtime import device
    from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel
    from jetmoe_megatron.training.ranks.process_groups import parallel_groups

    world, parallel = LAYOUTS[layout]
    run = Run.model_validate(
        {
            "name": "resume",
            "output_dir": "unused",
            "model": {**MODEL, "vocab_size": 32000},
            "parallel": parallel,
            "batch": {"sequence_length": 64, "global_tokens": 64 * world},
            "phases": [
                {
                    "name": "only",
                    "tokens": 1,
                    "learning_rate": "constant",
                    "data": [{"name": "none", "path": "unused", "weight": 1}],
                }
            ],
        }
    )
    planned = resolve_layout(run, world)
    # Memory that comes from the kernel and is not cleared takes none before it is used, and a load uses no gradients.
    # They would take 9 GB.
    from_the_kernel = patch.object(device, "keep_freed_memory")
    with from_the_kernel, parallel_groups(run, planned):
        with patch.object(torch, "zeros", torch.empty), patch.object(build, "initialize_weights"):
            model = wrap_for_data_parallel(run, build.build_model(run, planned))
        yield model, build_optimizer(run, model)


def number_of(name: str) -> int:
    """What a tensor is filled with: exact in bf16."""
    return zlib.crc32(name.encode()) % 199 + 1


def write(layout: str, folder: Path) -> dict[str, float]:
    """The checkpoint that `Saver` would write, but only one tensor is in memory at a time."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from jetmoe_megatron.checkpoint.common_state import write_common
    from jetmoe_megatron.checkpoint.model_state import sharded_model
    from jetmoe_megatron.checkpoint.optimizer_state import own_state, sharded
    from jetmoe_megatron.checkpoint.saver import _share_out, _tensors
    from jetmoe_megatron.checkpoint.tensors_file import TensorsFile
    from jetmoe_megatron.checkpoint.write_metadata import write_metadata

    with training(layout) as (model, optimizer):
        state = sharded_model(model)
        state["optimizer"] = sharded(own_state(optimizer), state)
        _share_out(state)
        rank = torch.distributed.get_rank()
        with TensorsFile(folder, rank) as file:
            for part in filter(lambda part: is_main_replica(part.replica_id), _tensors(state)):
                shape = (*[1] * part.prepend_axis_num, *part.local_shape)
                tensor = torch.full(shape, number_of(part.key), dtype=part.dtype)
                file.add(part.key, part.global_shape, part.global_offset, tensor)
        files: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(files, (file.name, file.pieces))
        if rank == 0:
            write_metadata(folder, files)
            write_common(folder, 1)
    return {}


def load(layout: str, folder: Path) -> dict[str, float]:
    from jetmoe_megatron.checkpoint.load import load_checkpoint
    from jetmoe_megatron.checkpoint.model_state import sharded_model
    from jetmoe_megatron.checkpoint.optimizer_state import own_state
    from jetmoe_megatron.checkpoint.saver import _tensors

    with training(layout) as (model, optimizer):
        own_state(optimizer)  # allocates it
        tensors = {part.key: part.data for part in _tensors(sharded_model(model))}
        for tensor in tensors.values():
            tensor.detach().fill_(0)
        torch.distributed.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
        read, started = _read(), time.perf_counter()
        load_checkpoint(folder, model, optimizer)
        seconds, read = time.perf_counter() - started, _read() - read
        beside = _status("VmHWM") - _status("VmRSS")
        for name, tensor in tensors.items():
            assert (tensor == number_of(name)).all(), f"{name} was not loaded"
    return {"beside": beside, "read": read, "seconds": seconds}


def _read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _status(name: str) -> int:
    """Bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
