"""The expert matmuls: one interface, one file per backend.

A backend computes `y = x @ w[e].T` for rows sorted by expert. It also sorts the rows and puts them back. `loop.py` is
the reference that the tests compare the others with. `config/expert_backends.py` lists the backends, and
`choose_backend.py` chooses one for `auto`.

Letters: T tokens, K top-k, N = T * K rows, D input width, F output width, E local experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from jetmoe_megatron.config.expert_backends import EXPERT_BACKENDS
from jetmoe_megatron.model import permutation
from jetmoe_megatron.model.experts import loop
from jetmoe_megatron.model.permutation import Permutation


@dataclass(frozen=True)
class Backend:
    """
    grouped_linear: `(x_ND, w_EFD, count_E) -> y_NF`; expert e owns the next `count_E[e]` rows; N >= 1.
    gather: `(x_TD, permutation, slots) -> x_ND`, see `permutation.gather`.
    scatter: `(y_ND, gate_TK or None, permutation, slots) -> y_TD`, see `permutation.scatter`.
    counts_on_host: whether grouped_linear reads `count_E` on the host: one wait for the device per routed layer.
    """

    grouped_linear: Callable[[Tensor, Tensor, Tensor], Tensor]
    gather: Callable[[Tensor, Permutation, int], Tensor] = permutation.gather
    scatter: Callable[[Tensor, Tensor | None, Permutation, int], Tensor] = permutation.scatter
    counts_on_host: bool = False

    def linear(self, x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
        """`grouped_linear`. Without rows, an empty result in the graph, because not every kernel accepts zero rows."""
        return (self.grouped_linear if x_ND.shape[0] else loop.grouped_linear)(x_ND, w_EFD, count_E)


def open_backend(name: str) -> Backend:
    """The backend of that name in the table, `config/expert_backends.py`. Its package is imported here, not before."""
    entry = EXPERT_BACKENDS[name]
    module = importlib.import_module(f"{__name__}.{entry.module}")
    own = {what: getattr(module, what) for what in ("gather", "scatter") if hasattr(module, what)}
    return Backend(module.grouped_linear, counts_on_host=entry.counts_on_host, **own)
