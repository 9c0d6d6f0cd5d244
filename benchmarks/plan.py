"""How long `jetmoe plan` takes, and what it says of two runs whose figures were published.

    python -m benchmarks.plan [--record]

Takes a few minutes on two cores. Nothing in it is measured on a GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.contestants import run_of
from benchmarks.provenance import REPO, provenance
from jetmoe_megatron.config import load_run
from jetmoe_megatron.config.hardware import find_hardware
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.plan import make_plan

RESULT = REPO / "benchmarks/results/plan.md"
JETMOE = "configs/jetmoe_8b/run.yaml"
COMMANDS = {
    "JetMoE-8B, 96 GPUs": f"{JETMOE} --gpus 96 --hardware h100",
    "the same, imbalance 1.5": f"{JETMOE} --gpus 96 --hardware h100 --imbalance 1.5",
    "JetMoE-8B, 1,024 GPUs": f"{JETMOE} parallel.pipeline=4 parallel.expert=2 --gpus 1024 --hardware h100",
    "a search, 96 GPUs": f"{JETMOE} --gpus 96 --hardware h100 --search",
    "the largest models, 1 GPU": f"{JETMOE} parallel.pipeline=1 --gpus 1 --hardware h100 --fit",
}
# arXiv 2404.07413, sections 1 and 4: 30,000 H100-hours; 96 GPUs for 13 days are this share of the peak.
PUBLISHED_HOURS, PUBLISHED_MFU = 30_000, 0.164
# Megatron-Bridge, examples/model_verification_cards/qwen3-30b-a3b/card.yaml: bf16, 16 H100.
QWEN = {
    "num_layers": 48,
    "hidden_size": 2048,
    "num_kv_heads": 4,
    "kv_channels": 128,
    "ffn_hidden_size": 768,
    "num_experts": 128,
    "top_k": 8,
    "vocab_size": 151936,
}
QWEN_PEAK, QWEN_SECONDS = 62.2, 20.147  # GiB; of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.relative_to(REPO)}")
    arguments = parser.parse_args()
    text = "\n".join([*head(), *times(), *jetmoe(), *qwen()]) + "\n"
    print(text)
    if arguments.record:
        RESULT.write_text(text)


def head() -> list[str]:
    return [
        "# Plans",
        "",
        f"`python -m benchmarks.plan`, {provenance()}, load {os.getloadavg()[0]:.1f} at the start.",
        "",
    ]


def times() -> list[str]:
    rows = ["## How long a plan takes", "", "| what | `jetmoe plan ...` | seconds |", "|---|---|---|"]
    for name, command in COMMANDS.items():
        started = time.perf_counter()
        subprocess.run(
            [Path(sys.executable).parent / "jetmoe", "plan", *shlex.split(command)],
            cwd=REPO,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows.append(f"| {name} | `{command}` | {time.perf_counter() - started:.0f} |")
    return rows


def jetmoe() -> list[str]:
    plan = make_plan(load_run(REPO / JETMOE, need_variables=False), 96, find_hardware("h100"))
    hours = plan.layout.steps * plan.estimate.step_seconds * 96 / 3600
    at_published = hours * plan.estimate.mfu / PUBLISHED_MFU
    beside, assumed = at_published / PUBLISHED_HOURS - 1, hours / PUBLISHED_HOURS - 1
    return [
        "",
        "## JetMoE-8B, as published",
        "",
        "The paper gives 30,000 H100-hours for 1.25T tokens on 96 H100; that is 16.4% MFU by 6N.",
        "",
        "| | H100-hours | MFU by 6N |",
        "|---|---|---|",
        f"| published | {PUBLISHED_HOURS:,} | {PUBLISHED_MFU:.1%} |",
        f"| the plan, at the published MFU | {at_published:,.0f} | {PUBLISHED_MFU:.1%} |",
        f"| the plan, as `configs/hardware/h100.yaml` assumes | {hours:,.0f} | {plan.estimate.mfu:.1%} |",
        "",
        f"At the published share of the peak, the plan's hours differ by {beside:+.1%}. At the assumed shares they",
        f"differ by {assumed:+.0%}. Nobody has measured those with this program; the published hours may hold stops",
        "and restarts, which a plan leaves out.",
    ]


def qwen() -> list[str]:
    tree = run_of(QWEN, "bf16", 4096, 1).model_dump(mode="json")
    tree["parallel"] = {
        "expert": 16,
        "attention_experts": "sharded",
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
    tree["batch"]["global_tokens"] = 1024 * 4096
    plan = make_plan(Run.model_validate(tree), 16, find_hardware("h100"))
    peak = {kind: size / 2**30 for kind, size in plan.fullest.memory.peak.items()}
    gradients, masters = peak["gradients"] / 2, peak["main weights"] / 2
    rest = sum(peak.values()) - gradients - masters - QWEN_PEAK
    return [
        "",
        "## Qwen3-30B-A3B, by a model of the nearest shape",
        "",
        f"Megatron-Bridge publishes {QWEN_PEAK} GiB and {QWEN_SECONDS} s a step for 16 H100: expert parallel 16,",
        "micro-batches of one sequence of 4,096 tokens, 1,024 sequences a step, nothing recomputed. The nearest JetMoE",
        "has the same layers, widths, experts, query and key-value heads. But its attention is a mixture too: rows for",
        "8 of 128 attention experts are exchanged and kept in every layer.",
        "",
        "| held at the peak | GiB |",
        "|---|---|",
        *(f"| {kind} | {size:.1f} |" for kind, size in peak.items()),
        f"| all tensors | {sum(peak.values()):.1f} |",
        "",
        f"The publisher's recipe reduces gradients in bf16 ({gradients:.1f} GiB less), and its precision-aware",
        f"optimizer keeps the 16 bits that the weights lack ({masters:.1f} GiB less than main weights). Of the",
        f"difference {rest:.1f} GiB remain, {rest * 1024 / 48:.0f} MiB in each layer. One copy of the rows for the",
        f"attention's experts, 8 for each of 4,096 tokens, is {8 * 4096 * 2048 * 2 / 2**20:.0f} MiB.",
    ]


if __name__ == "__main__":
    main()
