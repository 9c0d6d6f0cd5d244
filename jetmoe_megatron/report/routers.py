"""What `routers.jsonl` says: each layer's load of its experts, how even it is, and how sure its router is.

Letters of axes: L: layers, E: experts.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jetmoe_megatron.report.curves import Curves
from jetmoe_megatron.report.lines import Line, number, steps_of

KINDS = {"moa": "attention", "moe": "MLP"}
AS_WRITTEN = ("gate_entropy", "top1_margin", "balance_loss", "z_loss")  # of each layer, in a record
_MOST_BINS = 600
_MOST_CELLS = 200_000  # of one heatmap
_RANGE = 3.0  # loads from 2**-3 to 2**3 have the codes from LEAST to MOST, on a logarithmic scale
DEAD, LEAST, MOST, NO_NUMBER = 0, 1, 253, 255  # 42 codes for a factor of 2

Array = NDArray[np.float64]


class _Column(NamedTuple):
    """Sums over one or more records."""

    load_LE: Array  # times the steps of a record
    steps: float
    dead_LE: NDArray[np.bool_]  # no assignment in one of them

    def joined(self, other: _Column) -> _Column:
        return _Column(self.load_LE + other.load_LE, self.steps + other.steps, self.dead_LE | other.dead_LE)


class Heatmap:
    """The loads of one kind of routers: a column is one record, or the mean of several."""

    def __init__(self, load_LE: Array, most_cells: int) -> None:
        self.shape = load_LE.shape
        self.last_LE = load_LE
        self.tokens: list[int] = []  # at the end of each column
        self.width = 1  # records of a column
        self._most = max(2, min(_MOST_BINS, most_cells // load_LE.size) // 2 * 2)
        self._columns: list[_Column] = []
        self._records = 0

    def add(self, tokens: int, load_LE: Array, steps: float) -> None:
        if self._records == self._most * self.width:
            self.width *= 2
            self.tokens = self.tokens[1::2]
            pairs = zip(self._columns[::2], self._columns[1::2], strict=True)
            self._columns = [one.joined(other) for one, other in pairs]
        column = _Column(load_LE * steps, steps, load_LE <= 0)
        if self._records % self.width:
            self._columns[-1] = self._columns[-1].joined(column)
            self.tokens[-1] = tokens
        else:
            self._columns.append(column)
            self.tokens.append(tokens)
        self._records += 1
        self.last_LE = load_LE

    def codes(self) -> str:
        """One byte for each cell, the experts of a layer and then the next layer, columns last; in base64."""
        with np.errstate(invalid="ignore"):
            columns = [codes_of(load / steps, dead).ravel() for load, steps, dead in self._columns]
        return base64.b64encode(np.stack(columns, axis=1).tobytes()).decode()


def codes_of(load: Array, dead: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """dead: where no assignment went, at some record of the column."""
    with np.errstate(divide="ignore", invalid="ignore"):
        position = (np.clip(np.log2(load), -_RANGE, _RANGE) + _RANGE) / (2 * _RANGE)
    codes = np.where(np.isfinite(position), LEAST + np.rint(np.nan_to_num(position) * (MOST - LEAST)), NO_NUMBER)
    return np.where(dead, DEAD, codes).astype(np.uint8)


def load_of(code: int) -> float:
    return float(2 ** ((code - LEAST) / (MOST - LEAST) * 2 * _RANGE - _RANGE))


class Routers:
    def __init__(self, share: int) -> None:
        self.curves = Curves(_MOST_BINS // share)
        self.heatmaps: dict[str, Heatmap] = {}  # of each kind that has records
        self._most_cells = _MOST_CELLS // share

    @classmethod
    def read(cls, path: Path, share: int = 1) -> Routers | None:
        """None if there are no records. One with other numbers of layers or experts than the first is left out.

        share: runs that share a page; each gets a part of the numbers that a page may have.
        """
        routers = cls(share)
        for record in steps_of(path):
            routers.curves.next_line(record["step"], record["tokens"])
            for kind in KINDS:
                routers._add(kind, record)
        return routers if routers.heatmaps else None

    def _add(self, kind: str, record: Line) -> None:
        for name in AS_WRITTEN:
            if (values_L := numbers(record.get(f"{kind}_{name}"), 1)) is not None:
                self._over_layers(f"{kind}_{name}", values_L)
        load_LE = numbers(record.get(f"{kind}_load"), 2)
        if load_LE is None:
            return
        heatmap = self.heatmaps.setdefault(kind, Heatmap(load_LE, self._most_cells))
        if heatmap.shape == load_LE.shape:
            steps = number(record, "steps") or 1.0
            heatmap.add(record["tokens"], load_LE, steps if steps > 0 else 1.0)
            for name, values_L in evenness(load_LE).items():
                self._over_layers(f"{kind}_{name}", values_L)

    def _over_layers(self, key: str, values_L: Array) -> None:
        self.curves.add(key, float(values_L.min()), float(values_L.mean()), float(values_L.max()))


def evenness(load_LE: Array) -> dict[str, Array]:
    """Of each layer. All are 1 if the load is even, except the coefficient of variation, which is 0."""
    experts = load_LE.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        share_LE = load_LE / load_LE.sum(1, keepdims=True)
        nats_LE = np.where(share_LE > 0, -share_LE * np.log(share_LE), share_LE * 0)
    return {
        "load_entropy": nats_LE.sum(1) / np.log(experts) if experts > 1 else np.ones(len(load_LE)),
        "max_load": share_LE.max(1) * experts,
        "min_load": share_LE.min(1) * experts,
        "load_variation": share_LE.std(1) * experts,
    }


def numbers(value: Any, axes: int) -> Array | None:
    """None if the value is no array of numbers with so many axes."""
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if found.ndim == axes and found.size else None
