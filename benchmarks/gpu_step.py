"""A training step of JetMoE-8B's layers on one GPU: every expert backend, and `transformers` and Megatron-Core.

    python -m benchmarks.gpu_step [--layers N] [--sequences 2] [--micro-batches 4] [--record] [--json FILE]

Takes a few minutes. Each model has a separate process. Without a GPU, it runs tiny shapes, only to test the code.
`--record` writes the tables to benchmarks/results/gpu_step.md and what `jetmoe plan --measured` reads beside it, and
needs a GPU. `--json` writes the latter to another file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.attention_kernels import attention_step, kernel_names
from benchmarks.contestants import Step, hugging_face_step, our_step, run_of, world_of_one
from benchmarks.kernels import breakdown
from benchmarks.moe_layers import OURS, layer_names, layer_step
from benchmarks.processes import why_it_ended
from benchmarks.provenance import REPO, provenance, versions
from jetmoe_megatron.config.describe import count_parameters
from jetmoe_megatron.config.flops import FORMULA, peak_tflops, step_flops
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Model, Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.model.experts.choose_backend import choose_backend

RESULT = REPO / "benchmarks/results/gpu_step.md"
MODEL = REPO / "configs/models/jetmoe_8b.yaml"
TINY = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_kv_heads": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "vocab_size": 64,
}
BACKENDS = ("torch", "te", "te_fp8", "megablocks", "loop")
TRANSFORMERS, LAYER, ATTENTION = "transformers", "MoE layer", "attention"
# fp32 weights, gradients and both moments, bf16 weights; and what a layer keeps per token for the backward pass.
BYTES_PER_WEIGHT, BYTES_PER_TOKEN_AND_LAYER = 18, 200_000
LIMIT = 120  # seconds of one process


def main() -> int:
    arguments = parse_arguments()
    warnings.filterwarnings("ignore")
    if arguments.record and not torch.cuda.is_available():
        raise SystemExit("--record needs a GPU, and there is none")
    if arguments.only:
        with world_of_one():
            print(json.dumps(measure(arguments.only, arguments)))
        return 0
    names = ["torch", "te", "megablocks", TRANSFORMERS, LAYER, ATTENTION, "te_fp8", "loop"]
    if torch.cuda.is_available():
        end = time.monotonic() + 60 * arguments.minutes
        results = {name: in_own_process(name, end - time.monotonic()) for name in names}
    else:
        with world_of_one():
            results = {name: measure(name, arguments) for name in names}
    text = report(results, arguments)
    print(text)
    if arguments.record:
        RESULT.write_text(text)
        arguments.json = arguments.json or RESULT.with_suffix(".json")
    if arguments.json and "failed" not in results["torch"]:
        arguments.json.write_text(json.dumps(measured_step(results["torch"], arguments), indent=1) + "\n")
    return int("failed" in results["torch"])  # the one that needs no package


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="default: as many as fit")
    parser.add_argument("--sequences", type=int, default=2, help="of 4096 tokens in a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="for each optimizer step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9, help="what has not started by then is not measured")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the step for `jetmoe plan --measured`")
    parser.add_argument("--only", metavar="NAME", help="one of the processes: prints its figures as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        arguments.sequences, arguments.rounds, arguments.micro_batches = 2, 1, 2
    arguments.layers = arguments.layers or layers_that_fit(arguments)
    return arguments


def layers_that_fit(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        return 1
    shape = yaml.safe_load(MODEL.read_text())
    one, two = (count_parameters(Model.model_validate({**shape, "num_layers": n}))[0] for n in (1, 2))
    tokens = arguments.sequences * 4096
    each = BYTES_PER_WEIGHT * (two - one) + BYTES_PER_TOKEN_AND_LAYER * tokens
    outside = BYTES_PER_WEIGHT * (2 * one - two) + 12 * shape["vocab_size"] * tokens  # the logits, three times fp32
    free = torch.cuda.get_device_properties(0).total_memory * 0.85 - outside
    return max(1, min(shape["num_layers"], int(free / each)))


def run_for(arguments: argparse.Namespace, backend: str = "auto") -> Run:
    on_gpu = torch.cuda.is_available()
    shape = {**(yaml.safe_load(MODEL.read_text()) if on_gpu else TINY), "num_layers": arguments.layers}
    length = 4096 if on_gpu else 32
    return run_of({**shape, "expert_backend": backend}, "bf16", length, arguments.sequences)


def in_own_process(name: str, left: float) -> dict[str, Any]:
    """A crash or a lack of memory then does not affect the others."""
    if left <= 0:
        return {"failed": "no time was left"}
    command, limit = [sys.executable, "-m", "benchmarks.gpu_step", *sys.argv[1:], "--only", name], min(LIMIT, left)
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=REPO)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:.0f} s"}
    told = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode != 0:
        reason = why_it_ended(result)
        # What was measured before, with the reason for the rest.
        return {**json.loads(told[-1]), "after that": reason} if told else {"failed": reason}
    return json.loads(told[-1])


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    if name == LAYER:
        return each(layer_step, layer_names(), arguments)
    if name == ATTENTION:
        return each(attention_step, kernel_names(), arguments)
    run = run_for(arguments, "auto" if name == TRANSFORMERS else name)
    if name == TRANSFORMERS:
        step = hugging_face_step(run, arguments.micro_batches)
    else:
        try:
            choose_backend(run, resolve_layout(run, 1))
        except UserError as error:
            return {"failed": str(error)}
        step = our_step(run, arguments.micro_batches)
    seconds = timed(step, arguments.rounds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"seconds": seconds, "peak": peak, "groups": breakdown(step)}


def each(make: Callable[[str, Run], Step], names: list[str], arguments: argparse.Namespace) -> dict[str, float | str]:
    """The seconds of each, or why there are none. If one fails, the others are measured."""
    result: dict[str, float | str] = {}
    for name in names:
        try:
            result[name] = timed(make(name, run_for(arguments)), arguments.rounds)
        except Exception as error:  # whatever another library raises
            result[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        if arguments.only:
            print(json.dumps(result), flush=True)  # the next may crash
    return result


def timed(step: Step, rounds: int) -> float:
    """Median seconds of a step, after two steps to warm up."""
    seconds = []
    for number in range(rounds + 2):
        _wait()
        started = time.perf_counter()
        step()
        _wait()
        if number >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measured_step(result: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Of `jetmoe_megatron/plan/measured.py`, `MeasuredStep`."""
    peak = result.get("peak")
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "origin": f"{_command()}, {provenance()}, {versions()}",
        "run": run_for(arguments, "torch").model_dump(mode="json"),
        "micro_batches": arguments.micro_batches,
        "seconds": result["seconds"],
        "peak_bytes": int(peak * 2**30) if peak else None,
    }


def _command() -> str:
    return " ".join(["python -m benchmarks.gpu_step", *sys.argv[1:]])


def report(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> str:
    run = run_for(arguments)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: tiny shapes, figures of no interest"
    shape = ", ".join(f"{key} {value}" for key, value in run.model.model_dump().items() if isinstance(value, int))
    head = [
        "# A training step on one GPU\n",
        f"`{_command()}`, {provenance()}, {gpu}, {versions()}.\n",
        f"{shape}; micro-batches of {arguments.sequences} sequences of {run.batch.sequence_length}, "
        f"{arguments.micro_batches} for each optimizer step, bf16, fp32 main weights and gradients; routing as the "
        "fresh routers have it, no token dropped. Median of "
        f"{arguments.rounds}. `transformers` has its weights and optimizer in bf16 alone.\n",
        FORMULA,
    ]
    models = {name: results[name] for name in (*BACKENDS, TRANSFORMERS)}
    parts = [*head, steps_table(models, run, arguments), groups_tables(models)]
    parts.append(layer_table(results[LAYER], run))
    parts.append(attention_table(results[ATTENTION], run))
    return "\n".join(parts) + "\n"


def steps_table(models: dict[str, dict[str, Any]], run: Run, arguments: argparse.Namespace) -> str:
    tokens = run.batch.global_tokens * arguments.micro_batches
    flops = step_flops(run.model, run.batch.sequence_length, tokens)
    peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    rows = [
        "\n## The step\n",
        "| | seconds | tokens/s | TFLOP/s, with attention | MFU | TFLOP/s, 6N | MFU | peak memory, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in models.items():
        if "failed" in result:
            rows.append(f"| {name} | not measured: {result['failed']} | | | | | | |")
            continue
        rates = [count / result["seconds"] / 1e12 for count in (flops.with_attention, flops.weights_only)]
        shares = [f"{rate:.4g} | {rate / peak:.1%}" if peak else f"{rate:.4g} | -" for rate in rates]
        memory = f"{result['peak']:.1f}" if result["peak"] else "-"
        seconds = result["seconds"]
        rows.append(f"| {name} | {seconds:.4f} | {tokens / seconds:,.0f} | {shares[0]} | {shares[1]} | {memory} |")
    return "\n".join(rows)


def groups_tables(models: dict[str, dict[str, Any]]) -> str:
    rows = ["\n## Where the time goes, ms of one step\n"]
    for name, result in models.items():
        if "groups" in result:
            total = sum(time_ for _, time_ in result["groups"])
            parts = ", ".join(f"{group} {time_:.1f} ({time_ / total:.0%})" for group, time_ in result["groups"])
            rows.append(f"- **{name}**, {total:.1f} in kernels of {result['seconds'] * 1e3:.1f} in all: {parts}")
    return "\n".join(rows)


def layer_table(result: dict[str, Any], run: Run) -> str:
    """The FLOPs are those of the matmuls of the experts and the router."""
    model = run.model
    weights = model.top_k * 3 * model.ffn_hidden_size * model.hidden_size + model.num_experts * model.hidden_size
    return _table(
        "The MoE MLP layer alone, forward and backward",
        f"`{OURS}` with the backend that `auto` takes; the rest is Megatron-Core's layer with its own expert classes.",
        result,
        6 * weights * run.batch.global_tokens,
    )


def attention_table(result: dict[str, Any], run: Run) -> str:
    model = run.model
    heads = model.top_k * model.num_kv_heads
    flops = 6 * run.batch.sequence_length * heads * model.kv_channels * run.batch.global_tokens
    return _table("Attention alone, forward and backward", "Causal; keys and values are not copied.", result, flops)


def _table(title: str, text: str, result: dict[str, Any], flops: float) -> str:
    rows = [f"\n## {title}\n", text, "", "| | ms | TFLOP/s |", "|---|---|---|"]
    if "failed" in result:
        return "\n".join([*rows, f"| not measured: {result['failed']} | | |"])
    for name, time_ in result.items():
        measured = isinstance(time_, float)
        figures = f"{time_ * 1e3:.2f} | {flops / time_ / 1e12:.4g}" if measured else f"not measured: {time_} |"
        rows.append(f"| {name} | {figures} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
