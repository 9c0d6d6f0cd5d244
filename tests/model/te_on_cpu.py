"""Transformer Engine's Python on a CPU, with its grouped matmul written out: run as a program.

It tests how `experts/te.py` lends one parameter to Transformer Engine's module as a weight for each expert, and that
gradients come back through it. Exit status 0: equal to the loop; 3: Transformer Engine is not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def grouped_gemm(a: list[Tensor], b: list[Tensor], out: list[Tensor], *unused: Any, **named: Any) -> tuple:
    """cuBLAS' column-major view: TN is the forward pass, NN the input's gradient, NT the weights'."""
    layout = named.get("layout", "TN")
    if layout == "NT":
        for w, x, g in zip(out, a, b, strict=True):
            w.copy_(g.T @ x)
    else:
        assert named["single_output"] and [len(x) for x in b] == named["m_splits"]
        out[0].copy_(torch.cat([x @ (w.T if layout == "TN" else w) for w, x in zip(a, b, strict=True)]))
    return out, [None] * len(a), None


@contextlib.contextmanager
def without_cuda_check(module: Any, x: Tensor, num_gemms: int = 1) -> Iterator[Tensor]:
    module.allow_different_data_and_param_types = False
    module.set_activation_dtype(x)
    module.init_fp8_metadata(num_gemms=num_gemms)
    yield x


def main() -> int:
    if importlib.util.find_spec("transformer_engine") is None:
        print("transformer_engine is not installed")
        return 3
    from transformer_engine.pytorch.module import base, grouped_linear

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.Tensor.cuda = lambda self: self  # type: ignore[assignment, method-assign, misc]
    base.TransformerEngineBaseModule.prepare_forward = without_cuda_check
    grouped_linear.general_grouped_gemm = grouped_gemm

    from jetmoe_megatron.model.experts import Backend, open_backend
    from jetmoe_megatron.model.experts import te as ours
    from tests.model.experts_oracle import check

    te = open_backend("te")
    for dtype in (torch.float32, torch.bfloat16):
        # `gather` and `scatter` as on a CPU: what is fused there asks whether a GPU is present.
        check(Backend(te.grouped_linear, counts_on_host=True), dtype, "cpu", tokens=12)
    te.grouped_linear(torch.randn(4, 16), torch.randn(2, 16, 16), torch.tensor([1, 3]))
    module = ours._module(2, 16, 16, torch.float32)
    assert module.weight0 is None and module.weight1 is None  # they would hold the model after a rollback
    print("Transformer Engine equals the loop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
