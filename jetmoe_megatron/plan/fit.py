"""The largest models of a family that train on some GPUs: for each width, as many layers as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from data_tools.parallel import WorkerProcesses
from data_tools.text_table import table
from data_tools.units import shown
from jetmoe_megatron.config.describe import count_parameters
from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.estimate import bytes_needed
from jetmoe_megatron.plan.plan import TIGHT, Plan, plan_ends

MOST_LAYERS = 96
_WIDTHS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the run's model


def largest_models(
    run: Run,
    gpus: int,
    hardware: Hardware,
    imbalance: float,
    processes: WorkerProcesses,
    progress: Callable[[int, int], None],
) -> list[Plan]:
    """For each width the plan with most layers, at most `MOST_LAYERS`, that fits. Narrowest first.

    Memory grows by the same amount with each layer: two plans show it, and further ones check what it foretells.

    Raises:
        UserError: the layout does not fit the number of GPUs.
    """
    resolve_layout(with_shape(run, 1.0, _unit(run)), gpus)
    widths = [width for width in _WIDTHS if _is_whole(run, width) and _divides(run, width, gpus)]
    found: list[Plan] = []
    for number, width in enumerate(widths):
        found += _deepest(run, width, gpus, hardware, imbalance, processes)
        progress(number + 1, len(widths))
    return found


def with_shape(run: Run, width: float, layers: int) -> Run:
    """Its model with other heads, hidden and expert sizes, all in proportion, and so many layers in equal stages."""
    own = run.model
    shape = {
        "num_layers": layers,
        "hidden_size": int(own.hidden_size * width),
        "ffn_hidden_size": int(own.ffn_hidden_size * width),
        "num_kv_heads": int(own.num_kv_heads * width),
    }
    parallel = run.parallel.model_copy(update={"layers_per_stage": None})
    return run.model_copy(update={"model": own.model_copy(update=shape), "parallel": parallel})


def _deepest(
    run: Run, width: float, gpus: int, hardware: Hardware, imbalance: float, processes: WorkerProcesses
) -> Iterator[Plan]:
    unit, most = _unit(run), MOST_LAYERS // _unit(run)

    def planned(numbers: Sequence[int]) -> list[Plan]:
        runs = [with_shape(run, width, number * unit) for number in numbers]
        cases = [(one, resolve_layout(one, gpus)) for one in runs]
        return list(plan_ends(cases, hardware, imbalance, processes))

    one, two = planned([1, 2])
    a, b = (bytes_needed(hardware, plan.fullest) for plan in (one, two))
    room = hardware.memory_gb * 1e9 * (1 - TIGHT)
    number = max(1, min(most, int((room - a) / max(b - a, 1)) + 1))
    (best,) = planned([number])
    while best.verdict != "fits" and number > 1:
        number -= 1
        (best,) = planned([number])
    if best.verdict == "fits":
        yield best


def _unit(run: Run) -> int:
    """Layers must be a multiple of it."""
    return run.parallel.pipeline * run.parallel.virtual_pipeline


def _is_whole(run: Run, width: float) -> bool:
    own = run.model
    return all(size * width == int(size * width) for size in (own.hidden_size, own.ffn_hidden_size, own.num_kv_heads))


def _divides(run: Run, width: float, gpus: int) -> bool:
    try:
        resolve_layout(with_shape(run, width, _unit(run)), gpus)
    except UserError:
        return False
    return True


def fit_table(plans: Sequence[Plan]) -> Iterator[str]:
    rows = []
    for plan in plans:
        model = plan.run.model
        total, active = count_parameters(model)
        layers = f"{model.num_layers}{' or more' if model.num_layers + _unit(plan.run) > MOST_LAYERS else ''}"
        rows.append(
            [
                f"{model.hidden_size:,}",
                layers,
                f"{total / 1e9:.2f}B",
                f"{active / 1e9:.2f}B",
                shown(bytes_needed(plan.hardware, plan.fullest), "B"),
                f"{plan.estimate.tokens_per_second * 86400 / 1e9:,.2f} billion",
                f"{plan.estimate.mfu:.1%}",
            ]
        )
    yield from table(["hidden size", "layers", "parameters", "active", "needed", "tokens per day", "MFU by 6N"], rows)
