"""Context parallelism around the attention kernel: which part of the sequence each rank has, positions, losses, groups.

The kernel itself is Transformer Engine's and needs a GPU; here each rank gathers all keys and values instead.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel import oracle
from tests.parallel.test_equal_to_one_process import GLOBAL, one_process, run_tree
from tests.ranks import run_ranks


def gather_and_attend(config: Any, layer_number: int, groups: Any) -> Any:
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    def attend(q: Tensor, k: Tensor, v: Tensor, _mask: None) -> Tensor:
        ranks, rank, local = groups.cp.size(), groups.cp.rank(), q.shape[0]
        chunks = torch.arange(ranks * local).view(2 * ranks, -1)  # rank r has chunks r and 2 * ranks - 1 - r
        positions = torch.cat([torch.cat([chunks[r], chunks[2 * ranks - 1 - r]]) for r in range(ranks)])
        k, v = (gather_from_sequence_parallel_region(t, group=groups.cp) for t in (k, v))
        seen = positions[None, :] <= positions[rank * local : (rank + 1) * local, None]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return a.permute(2, 0, 1, 3).flatten(2)

    return attend


def train(tree: dict[str, Any], steps: int) -> Any:
    from jetmoe_megatron.runtime import cpu

    cpu.install()
    from megatron.core.models.common.embeddings import rope_utils

    from jetmoe_megatron.model import attention

    # rope_utils.py, `get_pos_emb_on_this_cp_rank`, asks for pinned memory. The adapter has no answer: nobody runs
    # context parallelism on a CPU.
    rope_utils.torch = cpu._Overlay(torch, tensor=lambda values, **_: torch.tensor(values))

    attention._core_attention = gather_and_attend
    return oracle.train(tree, steps)


@pytest.mark.parametrize(
    ("ranks", "parallel", "changes"),
    [
        pytest.param(2, {"context": 2}, {}, id="cp2"),
        pytest.param(4, {"context": 2, "tensor": 2}, GLOBAL, id="cp2 tp2, global batch"),
        pytest.param(4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}, {}, id="cp2 pp2 vpp2"),
        pytest.param(4, {"context": 2, "expert": 2}, {}, id="cp2 ep2 dp2"),
    ],
)
def test_context_parallel(ranks: int, parallel: dict[str, Any], changes: dict[str, Any]) -> None:
    truth = one_process(changes)
    split = oracle.joined(run_ranks(ranks, train, run_tree(parallel=parallel, **changes), 3))
    for step, (ours, loss) in enumerate(zip(split.losses, truth.losses, strict=True)):
        assert ours == pytest.approx(loss, rel=1e-5), f"step {step + 1}"
    for name, expected in truth.gradients.items():
        error = oracle.relative_error(split.gradients[name], expected)
        assert error < 1e-5, f"gradient of {name}: relative error {error:.1e}"
