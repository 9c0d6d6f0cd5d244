"""Everything that can be found wrong with a run before any rank waits for other ranks."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
from pathlib import Path

from jetmoe_megatron.checkpoint.checksums import newest_whole
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder, data_cache
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.checks import check_data
from jetmoe_megatron.data.mixture_report import shares, warnings
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.monitor.trackers import switched_on
from jetmoe_megatron.resume.start_point import find_start_point
from jetmoe_megatron.runtime.device import has_gpu
from jetmoe_megatron.runtime.matmul import bf16_is_slow


def check_run_can_start(run: Run, layout: Layout, rank: int) -> None:
    """Raises UserError or data_tools.errors.InputError with one line that says what to change."""
    from jetmoe_megatron.model.exchange_options import check_exchange
    from jetmoe_megatron.model.experts.choose_backend import choose_backend

    check_exchange(run, choose_backend(run, layout).name)
    if rank == 0:
        _check_trackers(run)
    if layout.context > 1 and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            "parallel.context: context parallelism needs Transformer Engine, which is not installed: "
            "bash scripts/install_gpu.sh --te, or set it to 1"
        )
    check_data(run, look_inside=rank == 0)
    _check_profile(run, layout)
    folder = RunFolder.of(run)
    check_output(run)
    if run.checkpoint.resume == "never" and (own := newest_whole(folder.checkpoints)):
        raise UserError(f"checkpoint.resume: never, but {own} exists: choose another output_dir or resume: auto")
    start = find_start_point(run, layout)
    if rank == 0:
        if again := start.ledger.reads_again:
            print(
                f"warning: {start.checkpoint}: the order of the data has changed ({'; '.join(again)}), so every data "
                "set is read from its beginning again",
                flush=True,
            )
        for line in warnings(run, shares(run, data_cache(run))):
            print(line, flush=True)
        if run.precision == "bf16" and not has_gpu() and bf16_is_slow():
            print(
                "warning: precision: this CPU has no kernel for bf16 matmuls, which will take many times as long as "
                "fp32 ones: set it to fp32",
                flush=True,
            )


def _check_profile(run: Run, layout: Layout) -> None:
    steps, last = run.profile.steps, min(layout.steps, run.debug.max_steps or layout.steps)
    if steps and steps[1] > last:
        raise UserError(f"profile.steps: {steps[1]} is after the last step of the run, {last}")
    if steps and max(run.profile.ranks) >= layout.world:
        raise UserError(f"profile.ranks: there is no rank {max(run.profile.ranks)} among {layout.world} ranks")


def _check_trackers(run: Run) -> None:
    for package in switched_on(run):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"logging.{package}: the package is missing: pip install {package}")


def check_output(run: Run) -> None:
    """Raises UserError if the run's folders cannot be written. An existing data cache may be read-only: others may have
    made it."""
    folder, cache = RunFolder.of(run), data_cache(run)
    _check_can_write(folder.root, "output_dir")
    _check_can_write(folder.checkpoints, "output_dir")
    if _where_it_would_be(cache, "data.cache") != cache:
        _check_can_write(cache, "data.cache")
    for file in (folder.config, folder.metrics, folder.routers, folder.bad_steps):
        if file.exists() and not file.is_file():  # opening a pipe would block
            raise UserError(f"output_dir: {file} is {'a folder' if file.is_dir() else 'no file'}")


def _check_can_write(path: Path, key: str) -> None:
    """Creates the missing folders of the path, under a name that only this rank uses, and removes them."""
    root = _where_it_would_be(path, key)
    aside = root / f".check-{secrets.token_hex(4)}"
    try:
        (aside / path.relative_to(root)).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be made in {root}: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _where_it_would_be(path: Path, key: str) -> Path:
    """The folder, or the nearest folder above it that exists."""
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise UserError(f"{key}: {path} is a {'file' if path.exists() else 'link to nothing'}")
    return path
