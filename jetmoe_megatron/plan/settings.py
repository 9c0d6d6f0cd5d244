"""The settings of a run that decide how it is divided, and those that are one change away from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any, Literal

from jetmoe_megatron.config.layout import Layout, resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError

Way = Literal["up", "down"]
_Step = tuple[str, Way]
_WAYS: tuple[Way, Way] = ("up", "down")


@dataclass(frozen=True)
class Settings:
    """Their values are those of the run file."""

    tensor: int
    pipeline: int
    virtual_pipeline: int
    expert: int
    expert_tensor: int
    attention_experts: str
    micro_sequences: int
    recompute: str

    @classmethod
    def of(cls, run: Run) -> Settings:
        own = {**run.parallel.model_dump(), **run.batch.model_dump(), "recompute": run.recompute}
        return cls(**{field.name: own[field.name] for field in fields(cls)})

    def apply(self, run: Run) -> Run:
        """The run with these settings. Its own stages are kept if their number is."""
        new = asdict(self)
        recompute, micro_sequences = new.pop("recompute"), new.pop("micro_sequences")
        own = run.parallel
        if (self.pipeline, self.virtual_pipeline) != (own.pipeline, own.virtual_pipeline):
            new["layers_per_stage"] = None
        parallel = own.model_copy(update=new)
        batch = run.batch.model_copy(update={"micro_sequences": micro_sequences})
        return run.model_copy(update={"parallel": parallel, "batch": batch, "recompute": recompute})

    @property
    def is_distinct(self) -> bool:
        """Experts that are not divided can be neither replicated nor sharded."""
        return self.expert > 1 or self.attention_experts == "replicated"


# Values of each, from what needs most memory to what needs least; those of micro_sequences the other way round.
_VALUES: dict[str, tuple[Any, ...]] = {
    "tensor": (1, 2, 4, 8),
    "pipeline": tuple(range(1, 65)),
    "virtual_pipeline": tuple(range(1, 17)),
    "expert": (1, 2, 4, 8, 16, 32, 64),
    "expert_tensor": (1, 2, 4, 8),
    "attention_experts": ("replicated", "sharded"),
    "micro_sequences": (1, 2, 4, 8, 16, 32),
    "recompute": ("none", "selective", "full"),
}
_LESS_MEMORY: dict[str, Way] = {
    name: "down" if name in ("micro_sequences", "virtual_pipeline") else "up" for name in _VALUES
}
_TOGETHER = (
    ("pipeline", "tensor"),
    ("pipeline", "virtual_pipeline"),
    ("tensor", "expert_tensor"),
    ("expert", "expert_tensor"),
    ("micro_sequences", "virtual_pipeline"),
    ("micro_sequences", "recompute"),
)


def legal(run: Run, settings: Settings, gpus: int) -> Layout | None:
    """The layout of the run with these settings; None if they do not fit each other, the model or the GPUs."""
    try:
        return resolve_layout(settings.apply(run), gpus)
    except UserError:
        return None


def neighbours(run: Run, settings: Settings, gpus: int) -> Iterator[Settings]:
    """Legal ones, with the next legal value of one setting; then of two, of which one alone is not legal."""
    steps: list[_Step] = [(name, way) for name in _VALUES for way in _WAYS]
    alone = {step: _next(run, settings, gpus, step) for step in steps}
    yield from (found for found in alone.values() if found is not None)
    for name, other in _TOGETHER:
        for one in ((name, way) for way in _WAYS):
            for another in ((other, way) for way in _WAYS):
                if alone[one] is None or alone[another] is None:
                    found = _next(run, settings, gpus, one, another)
                    if found is not None:
                        yield found


def needs_more(settings: Settings, than: Settings) -> bool:
    """Whether each value that differs is one that needs more memory."""
    return settings != than and not any(
        getattr(settings, name) in _beyond(than, name, way) for name, way in _LESS_MEMORY.items()
    )


def saving(run: Run, settings: Settings, gpus: int) -> Iterator[Settings]:
    """Those one change away that need less memory."""
    found = (_next(run, settings, gpus, step) for step in _LESS_MEMORY.items())
    return (one for one in found if one is not None)


def spending(run: Run, settings: Settings, gpus: int) -> Iterator[Settings]:
    """Those one change away that need more memory, and may take less time."""
    ways: dict[str, Way] = {name: "up" if way == "down" else "down" for name, way in _LESS_MEMORY.items()}
    found = (_next(run, settings, gpus, step) for step in ways.items())
    return (one for one in found if one is not None)


def _next(run: Run, settings: Settings, gpus: int, *steps: _Step) -> Settings | None:
    """The nearest legal one with other values of these settings."""
    for values in product(*(_beyond(settings, *step) for step in steps)):
        changed = replace(settings, **{name: value for (name, _), value in zip(steps, values, strict=True)})
        if changed.is_distinct and legal(run, changed, gpus):
            return changed
    return None


def _beyond(settings: Settings, name: str, way: Way) -> tuple[Any, ...]:
    """Values from the next one on."""
    values, own = _VALUES[name], getattr(settings, name)
    if isinstance(own, int):
        return tuple(x for x in values if x > own) if way == "up" else tuple(x for x in reversed(values) if x < own)
    place = values.index(own)
    return values[place + 1 :] if way == "up" else values[:place][::-1]
