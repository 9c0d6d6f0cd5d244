"""The ways to compute the expert matmuls: the name, the file and the needs of each.

To add one, add a row here and a file in `model/experts/`.
"""

from __future__ import annotations

from dataclasses import dataclass

HOPPER = (9, 0)


@dataclass(frozen=True)
class ExpertBackend:
    """
    module: its file in `model/experts/`, with `grouped_linear`, and `gather` and `scatter` if it has its own.
    width_multiple: for each precision that it supports, the number that must divide every width of a rank's matmuls.
    counts_on_host: whether the host reads how many rows each expert has, which costs a wait in each routed layer.
    capability: the smallest compute capability of a GPU that it runs on; None: it runs on CPUs too.
    packages: modules that must be importable.
    install: the option of scripts/install_gpu.sh that installs them.
    delays_weight_gradient: whether the gradients of rows and of weights can be computed one after the other.
    """

    module: str
    width_multiple: dict[str, int]
    counts_on_host: bool = True
    capability: tuple[int, int] | None = None
    packages: tuple[str, ...] = ()
    install: str = ""
    delays_weight_gradient: bool = False


_TE, _MEGABLOCKS = ("transformer_engine.pytorch",), ("megablocks.ops", "grouped_gemm")
EXPERT_BACKENDS = {
    "loop": ExpertBackend("loop", {"bf16": 1, "fp32": 1}, delays_weight_gradient=True),
    # Strides of 16 bytes (torch/aten/src/ATen/native/GroupedMMUtils.h).
    "torch": ExpertBackend("torch_grouped", {"bf16": 8, "fp32": 4}, counts_on_host=False, delays_weight_gradient=True),
    # Its matmul takes only bf16 (grouped_gemm.cu).
    "megablocks": ExpertBackend("megablocks", {"bf16": 8}, True, (0, 0), _MEGABLOCKS, "--megablocks"),
    # Transformer Engine computes fp32 as TF32.
    "te": ExpertBackend("te", {"bf16": 8}, True, (0, 0), _TE, "--te"),
    # fp8 matmuls take 16 columns at a time.
    "te_fp8": ExpertBackend("te_fp8", {"bf16": 16}, True, HOPPER, _TE, "--te"),
}
