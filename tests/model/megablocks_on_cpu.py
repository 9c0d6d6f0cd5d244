"""MegaBlocks' Python and Triton code on a CPU: run as a program, with Triton's interpreter switched on before anything
imports Triton. Exit status 0: equal to the loop; 3: a package is missing.

What only a GPU has is replaced here: the matmul of `grouped_gemm`, the extension `megablocks_ops`, of which the
dropless path calls nothing, and Triton's autotuner, which would time its candidates on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"


def stand_ins() -> None:
    import torch
    from triton.runtime import autotuner

    def gmm(a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False) -> torch.Tensor:
        assert batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64 and a.is_contiguous()
        parts = zip(a.split(batch_sizes.tolist()), b.unbind(0), strict=True)
        return torch.cat([x @ (w.T if trans_b else w) for x, w in parts])

    matmul = types.ModuleType("grouped_gemm")
    matmul.ops = types.SimpleNamespace(gmm=gmm)  # type: ignore[attr-defined]
    matmul.backend = None  # type: ignore[attr-defined]
    sys.modules["grouped_gemm"] = matmul
    sys.modules["megablocks_ops"] = types.ModuleType("megablocks_ops")
    first_only = autotuner.Autotuner.__init__

    def one_candidate(
        self: autotuner.Autotuner, function: object, names: object, configs: list, *more: object, **named: object
    ) -> None:
        first_only(self, function, names, configs[:1], *more, **named)

    autotuner.Autotuner.__init__ = one_candidate


def main() -> int:
    for package in ("triton", "stk", "megablocks"):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed")
            return 3
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        print(f"the interpreter of triton {triton.__version__} does not work with numpy 2.4: 3.9 does")
        return 3
    stand_ins()
    import torch

    from tests.model.experts_oracle import check

    for dtype in (torch.float32, torch.bfloat16):
        check("megablocks", dtype, "cpu", tokens=12)
    print("megablocks equals the loop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
