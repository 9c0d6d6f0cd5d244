"""Checks of several fields together: do the parts of a run fit each other? World-size checks are in `layout.py`."""

from __future__ import annotations

import math
import os
from typing import Any

from jetmoe_megatron.config.describe import count_parameters
from jetmoe_megatron.config.schema import Model, Run, Section
from jetmoe_megatron.errors import UserError


def check_run(run: Run) -> None:
    """Raises UserError with one line that names the keys to change."""
    check_model(run.model)
    _check_batch(run)
    _check_mixtures(run)
    _check_documents(run)
    _check_checkpoints(run)
    _check_may_change(run)
    _check_schedule(run)
    _check_profile(run)
    for name in ("losses", "parallel", "optimizer", "schedule", "guard"):
        _check_finite(name, getattr(run, name))


def check_model(model: Model) -> None:
    """Raises UserError with one line that names the keys to change."""
    _check_finite("model", model)
    if model.top_k > model.num_experts:
        raise UserError(f"model.top_k: {model.top_k} is more than model.num_experts ({model.num_experts})")
    if model.kv_channels % 2:
        raise UserError(f"model.kv_channels: {model.kv_channels} is odd; rotary embeddings turn pairs of channels")
    if (parameters := count_parameters(model)[0]) > 10**15:
        raise UserError(f"model: {parameters:.1e} parameters are more than any machine holds: which size is wrong?")


def _check_finite(name: str, section: Section) -> None:
    for key, value in section.model_dump().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}.{key}: must be a finite number, not {value}")


def _check_batch(run: Run) -> None:
    batch = run.batch
    if batch.global_tokens % batch.sequence_length:
        raise UserError(
            f"batch.global_tokens: {batch.global_tokens} is not a multiple of batch.sequence_length "
            f"({batch.sequence_length})"
        )


def _check_mixtures(run: Run) -> None:
    names = [phase.name for phase in run.phases]
    if len(set(names)) < len(names):
        raise UserError(f"phases: two phases have the same name ({', '.join(names)})")
    path_of: dict[str, str] = {}
    name_of: dict[str, str] = {}
    for phase in run.phases:
        if not any(dataset.weight > 0 for dataset in phase.data):
            raise UserError(f"phase {phase.name!r}: data: every weight is 0")
        seen = [dataset.name for dataset in phase.data]
        if len(set(seen)) < len(seen):
            raise UserError(f"phase {phase.name!r}: data: two entries have the same name ({', '.join(seen)})")
        for dataset in phase.data:
            if not math.isfinite(dataset.weight):
                raise UserError(f"phase {phase.name!r}: data: the weight of {dataset.name!r} is {dataset.weight}")
            if path_of.setdefault(dataset.name, dataset.path) != dataset.path:
                raise UserError(f"phase {phase.name!r}: data: {dataset.name!r} has another path in an earlier phase")
            if (name := name_of.setdefault(os.path.realpath(dataset.path), dataset.name)) != dataset.name:
                raise UserError(
                    f"phase {phase.name!r}: data: {dataset.name!r} has the path of {name!r}, whose sequences it would "
                    "read again: give both the same name"
                )
        if not math.isfinite(sum(dataset.weight for dataset in phase.data)):
            raise UserError(f"phase {phase.name!r}: data: the sum of the weights is not finite")
    held_out = [dataset.name for dataset in run.evaluation.data]
    if len(set(held_out)) < len(held_out):
        raise UserError(f"evaluation.data: two entries have the same name ({', '.join(held_out)})")


def _check_checkpoints(run: Run) -> None:
    options = run.checkpoint
    if options.keep_every_tokens and (not options.every_tokens or options.keep_every_tokens % options.every_tokens):
        raise UserError(
            f"checkpoint.keep_every_tokens: {options.keep_every_tokens} is not a multiple of checkpoint.every_tokens "
            f"({options.every_tokens})"
        )


def _check_may_change(run: Run) -> None:
    sections: dict[str, Any] = {name: getattr(run, name).model_dump() for name in ("losses", "optimizer", "schedule")}
    sections["phases"] = {str(number): phase.model_dump() for number, phase in enumerate(run.phases)}
    for key in run.checkpoint.may_change:
        if not _has(sections, key.split(".")):
            raise UserError(
                f"checkpoint.may_change: {key!r} is none of losses, optimizer, schedule and phases, nor a key in them"
            )


def _has(tree: Any, path: list[str]) -> bool:
    return not path or (isinstance(tree, dict) and path[0] in tree and _has(tree[path[0]], path[1:]))


def _check_documents(run: Run) -> None:
    if run.data.keeps_documents_apart and not run.tokenizer:
        raise UserError(
            "tokenizer: data.reset_positions, mask_attention and mask_loss need it, to know where documents end"
        )
    if run.parallel.context > 1 and (run.data.reset_positions or run.data.mask_attention):
        raise UserError("parallel.context: cannot split sequences with data.reset_positions or data.mask_attention")


def _check_schedule(run: Run) -> None:
    constant_tokens = 0
    for phase in run.phases:
        if phase.learning_rate != "constant":
            break
        constant_tokens += phase.tokens
    if run.schedule.warmup_tokens > constant_tokens:
        raise UserError(
            f"schedule.warmup_tokens: {run.schedule.warmup_tokens} is more than the {constant_tokens} tokens of the "
            "constant phases that the run begins with"
        )


def _check_profile(run: Run) -> None:
    if run.profile.steps and (steps := run.profile.steps)[0] > steps[1]:
        raise UserError(f"profile.steps: the last step ({steps[1]}) is before the first ({steps[0]})")
