"""Print which packages for a GPU are here and work: python scripts/gpu_packages.py"""

from __future__ import annotations

import importlib
import shutil
import warnings

import torch

PACKAGES = {
    "triton": "fused elementwise kernels",
    "megatron.core": "everything",
    "transformer_engine.pytorch": "expert_backend te and te_fp8, context parallelism, FusedAdam",
    "grouped_gemm": "expert_backend megablocks",
    "megablocks.ops": "expert_backend megablocks",
    "amp_C": "NVIDIA's Apex: used where Transformer Engine is missing, never needed",
}


def main() -> None:
    warnings.filterwarnings("ignore")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = {"torch": f"{torch.__version__}, CUDA {torch.version.cuda}", "GPU": gpu}
    rows["C compiler"] = shutil.which("cc") or shutil.which("gcc") or "none: elementwise kernels are not fused"
    for name, use in PACKAGES.items():
        try:
            module = importlib.import_module(name)
            rows[name] = f"{getattr(module, '__version__', 'here')}    for {use}"
        except (ImportError, OSError) as error:
            rows[name] = f"not usable ({str(error).splitlines()[0]})    for {use}"
    for name, value in rows.items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
