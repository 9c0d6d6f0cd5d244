"""What is left of each phase, by the decisions of the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

from data_tools.text_table import table
from data_tools.units import shown
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.convert.export import is_due
from jetmoe_megatron.training.held_out_loss import times_due
from jetmoe_megatron.training.learning_rate import LearningRate
from jetmoe_megatron.training.save_points import SavePoints

_MOST = 10**6  # saves that are counted
_PLACES = 4  # steps of saves that are shown


@dataclass(frozen=True)
class PhaseLeft:
    name: str
    done: int  # steps of the run before
    until: int  # its last step
    first_lr: float
    last_lr: float
    saves: list[int]  # after so many steps; `_MOST` + 1 stand for more
    exports: int
    evaluations: int


def phases_left(run: Run, layout: Layout, done: int, last: int, exported: int) -> list[PhaseLeft]:
    """
    Args:
        done, last: of `steps_left`; there are some.
        exported: tokens of the newest export.
    """
    per_step, lr = run.batch.global_tokens, LearningRate.of(run, layout)
    found = []
    for phase, end in zip(run.phases, accumulate(layout.phase_steps), strict=True):
        until = min(end, last)
        if done < until:
            saves = list(islice(_saves(run, layout, done, until, last), _MOST + 1))
            exports = 0
            for step in saves:
                if is_due(run.checkpoint.export_every_tokens, step * per_step, exported):
                    exports, exported = exports + 1, step * per_step
            rates = lr(done * per_step), lr((until - 1) * per_step)
            found.append(PhaseLeft(phase.name, done, until, *rates, saves, exports, times_due(run, done, until, last)))
            done = until
    return found


def _saves(run: Run, layout: Layout, done: int, until: int, last: int) -> Iterator[int]:
    points, step = SavePoints(run, layout), done
    while (step := points.after(step)) < until:
        yield step
    if step == until or until == last:  # a run saves at its end, wherever that is
        yield until


def schedule(phases: list[PhaseLeft], tokens_per_step: int) -> Iterator[str]:
    yield "what is left, by phase:"
    rows = [
        [
            phase.name,
            f"{phase.until - phase.done:,}",
            shown((phase.until - phase.done) * tokens_per_step, ""),
            f"{phase.first_lr:.3g} to {phase.last_lr:.3g}",
            _number(phase.saves),
            str(phase.exports or ""),
            f"{phase.evaluations:,}" if phase.evaluations else "",
        ]
        for phase in phases
    ]
    yield from table(["phase", "steps", "tokens", "learning rate", "saves", "exports", "evaluations"], rows)
    for phase in phases:
        yield f"  {phase.name}: steps {phase.done + 1:,} to {phase.until:,}; saves after {_places(phase.saves)}"
    yield ""


def _number(saves: list[int]) -> str:
    return f"over {_MOST:,}" if len(saves) > _MOST else f"{len(saves):,}"


def _places(saves: list[int]) -> str:
    if len(saves) <= _PLACES:
        return ", ".join(f"{step:,}" for step in saves) or "none of them"
    first = ", ".join(f"{step:,}" for step in saves[: _PLACES - 1])
    return f"{first}, ..." if len(saves) > _MOST else f"{first}, ..., {saves[-1]:,}"
