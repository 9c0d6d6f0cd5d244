from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two training sets and a held-out one, as prefixes."""
    from tests.support import write_dataset

    folder = tmp_path_factory.mktemp("data")
    sizes = {"code": 120, "prose": 60, "held_out": 12}
    return {name: write_dataset(folder / name, size, seed) for seed, (name, size) in enumerate(sizes.items())}


@pytest.fixture(scope="session")
def world_of_one() -> Iterator[None]:
    """Megatron's process groups in this process, for tests of the model and the data."""
    from jetmoe_megatron.runtime.device import process_group

    with process_group():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1)
        yield
        parallel_state.destroy_model_parallel()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
