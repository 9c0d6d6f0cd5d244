"""The state of the routers over some steps: routers.jsonl has it for each layer and expert, trackers a summary.

Letters: L layers of the model, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jetmoe_megatron.monitor.monitor import Record

KINDS = ("moa", "moe")  # of routers: the attention's and the MLP's
_DIGITS = 6


@dataclass(frozen=True)
class RouterMetrics:
    """The routers of one kind, layer by layer from the first."""

    steps: int  # that are counted
    load_LE: list[list[float]]  # an expert's share of the assignments, times E: 1 is an even share, 0 a dead expert
    gate_entropy_L: list[float]  # mean over tokens of the entropy of the softmax over experts; 1: undecided, 0: sure
    top1_margin_L: list[float]  # mean over tokens: the largest probability minus the second largest
    balance_loss_L: list[float]  # means over micro-batches, without coefficients
    z_loss_L: list[float]

    @classmethod
    def of(
        cls,
        steps: int,
        top_k: int,
        count_LE: list[list[float]],
        gate_entropy_L: Sequence[float],
        top1_margin_L: Sequence[float],
        balance_loss_L: Sequence[float],
        z_loss_L: Sequence[float],
        micro_batches_L: Sequence[float],
    ) -> RouterMetrics:
        """From sums over tokens and micro-batches. count_LE: assignments, `top_k` for each token."""
        experts = len(count_LE[0])
        assignments_L = [sum(count_E) for count_E in count_LE]
        tokens_L = [assignments / top_k for assignments in assignments_L]
        undecided = math.log(experts) or 1.0
        return cls(
            steps=steps,
            load_LE=[
                [_ratio(count * experts, assignments) for count in count_E]
                for count_E, assignments in zip(count_LE, assignments_L, strict=True)
            ],
            gate_entropy_L=_ratios(gate_entropy_L, [tokens * undecided for tokens in tokens_L]),
            top1_margin_L=_ratios(top1_margin_L, tokens_L),
            balance_loss_L=_ratios(balance_loss_L, micro_batches_L),
            z_loss_L=_ratios(z_loss_L, micro_batches_L),
        )

    def line(self, kind: str) -> dict[str, Any]:
        """Its part of a line of routers.jsonl."""
        return {
            f"{kind}_load": [_rounded(load_E) for load_E in self.load_LE],
            f"{kind}_gate_entropy": _rounded(self.gate_entropy_L),
            f"{kind}_top1_margin": _rounded(self.top1_margin_L),
            f"{kind}_balance_loss": _rounded(self.balance_loss_L),
            f"{kind}_z_loss": _rounded(self.z_loss_L),
        }

    def summary(self, kind: str) -> Record:
        """The worst layer of each, but the mean over layers of `gate_entropy` and `top1_margin`."""
        numbers = {
            "load_max": max(max(load_E) for load_E in self.load_LE),
            "load_min": min(min(load_E) for load_E in self.load_LE),
            "load_cv": max(_variation(load_E) for load_E in self.load_LE),
            "load_entropy": min(_entropy(load_E) for load_E in self.load_LE),
            "dead_experts": sum(load == 0 for load_E in self.load_LE for load in load_E),
            "gate_entropy": sum(self.gate_entropy_L) / len(self.gate_entropy_L),
            "top1_margin": sum(self.top1_margin_L) / len(self.top1_margin_L),
        }
        return {f"routers/{kind}/{name}": value for name, value in numbers.items()}


def line(step: int, tokens: int, metrics: dict[str, RouterMetrics]) -> dict[str, Any]:
    """Of routers.jsonl, after `step` steps."""
    whole: dict[str, Any] = {"step": step, "tokens": tokens, "steps": metrics[KINDS[0]].steps}
    for kind, of_kind in metrics.items():
        whole |= of_kind.line(kind)
    return whole


def summary(metrics: dict[str, RouterMetrics]) -> Record:
    return {name: value for kind, of_kind in metrics.items() for name, value in of_kind.summary(kind).items()}


def _variation(load_E: list[float]) -> float:
    """Standard deviation over mean, which is 1."""
    return math.sqrt(sum((load - 1) ** 2 for load in load_E) / len(load_E))


def _entropy(load_E: list[float]) -> float:
    """Of the shares, over that of even ones."""
    experts = len(load_E)
    shares = [load / experts for load in load_E if load > 0]
    return -sum(share * math.log(share) for share in shares) / math.log(experts) if experts > 1 else 1.0


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _ratios(a_L: Sequence[float], b_L: Sequence[float]) -> list[float]:
    return [_ratio(a, b) for a, b in zip(a_L, b_L, strict=True)]


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]
