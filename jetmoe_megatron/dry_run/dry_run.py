"""All that a start would read and decide, printed. Nothing is changed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.errors import InputError, one_line
from data_tools.printing import say
from data_tools.progress import above
from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder, data_cache
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.convert.export import newest_of
from jetmoe_megatron.data.mixture import RunSamples
from jetmoe_megatron.data.step_batches import HeldOutSamples
from jetmoe_megatron.dry_run.borrowed_cache import BorrowedCache
from jetmoe_megatron.dry_run.first_batch import first_batch
from jetmoe_megatron.dry_run.memory import memory
from jetmoe_megatron.dry_run.schedule import phases_left, schedule
from jetmoe_megatron.dry_run.start import find_start
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.monitor.wandb import check_credentials
from jetmoe_megatron.resume.start_point import StartPoint
from jetmoe_megatron.runtime.machine import first_difference
from jetmoe_megatron.runtime.meeting import meet, wait_until_all_know
from jetmoe_megatron.training.held_out_loss import is_owed
from jetmoe_megatron.training.ranks.run_lock import check_unclaimed
from jetmoe_megatron.training.steps_left import nothing_left, steps_left


def dry_run_of_all_ranks(run: Run, layout: Layout, hardware: Hardware | None, elsewhere: bool) -> None:
    """Rank 0 of those that were started does it, and the others wait for what it finds. The run has been checked by
    `check_run_can_start`.

    Args:
        hardware: as in `memory`.
        elsewhere: as in `memory`.

    Raises:
        UserError, data_tools.errors.InputError, OSError: a start would be refused.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        dry_run(run, layout, hardware, elsewhere)
        return

    def refusal() -> str | None:
        try:
            dry_run(run, layout, hardware, elsewhere)
        except (InputError, OSError) as error:
            return one_line(error)
        return None

    limit = run.parallel.start_timeout_minutes
    store, _, world = meet(limit, judge=lambda machines: first_difference(machines) or refusal())
    wait_until_all_know(store, world)


def dry_run(run: Run, layout: Layout, hardware: Hardware | None, elsewhere: bool) -> None:
    """In one process. Arguments and errors as above."""
    folder = RunFolder.of(run)
    if run.logging.wandb == "online":
        check_credentials()
    check_unclaimed(folder.root)
    start = find_start(run, layout)
    done, last = steps_left(run, layout, start)
    if owed := is_owed(run, done, last=done == last):
        say(f"to be measured first: the held-out loss of step {done:,}, for which a stop left no time")
    if done >= last:
        if not owed:
            say(nothing_left(run, layout, last))
        return
    say(_beginning(run, layout, start, done))
    exports = (path for path in folder.exports.glob("tokens_*") if path.suffix != ".partial")
    _say_all(schedule(phases_left(run, layout, done, last, newest_of(exports)), run.batch.global_tokens))
    with _borrowed_cache(data_cache(run)) as cache:
        samples = start.samples(run, cache)
        for held_out in run.evaluation.data:
            HeldOutSamples(held_out, run, layout, cache)[0]
        say(f"indices: {_indices(cache)}")
        _say_all(_read_so_far(start, samples))
        _say_all(first_batch(run, layout, samples, start.ledger, done))
    _say_all(memory(run, layout, hardware, elsewhere))


def _beginning(run: Run, layout: Layout, start: StartPoint, done: int) -> str:
    where = f"step {done + 1:,} of {layout.steps:,}, in phase {run.phases[layout.phase_at(done)].name}"
    if start.checkpoint is None:
        return f"start: begins at {where}"
    if start.weights_only:
        return f"start: begins at {where}, with the weights of {start.checkpoint}, which load"
    tokens = start.progress["tokens"]
    return f"start: continues at {where}, after {tokens:,} tokens, from {start.checkpoint}, which loads"


def _read_so_far(start: StartPoint, samples: RunSamples) -> Iterator[str]:
    if not any(start.ledger.read.sequences.values()):
        return
    read = samples.tokens_read(start.ledger.read)
    parts = [
        f"{name} {read[f'dataset_tokens/{name}']:,} tokens ({read[f'dataset_epochs/{name}']:.3g} epochs)"
        for name in samples.sequences
    ]
    yield f"read so far: {', '.join(parts)}"


@contextmanager
def _borrowed_cache(root: Path) -> Iterator[BorrowedCache]:
    """Missing indices are built in a temporary folder."""
    try:
        scratch = tempfile.TemporaryDirectory(prefix="jetmoe-dry-run-")
    except OSError as error:
        raise UserError(f"TMPDIR: no temporary folder can be made: {error.strerror}") from error
    with scratch as folder:
        yield BorrowedCache(root, Path(folder), report=above)


def _indices(cache: BorrowedCache) -> str:
    if not cache.missing:
        return f"all are in {cache.root}"
    return (
        f"{cache.missing} are missing in {cache.root}. A start builds them, as this dry run did in a temporary folder; "
        "`jetmoe data prepare` does it before"
    )


def _say_all(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)
