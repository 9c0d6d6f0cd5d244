"""What one rank measures, step by step, at the same time as all others."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from torch.distributed import PrefixStore, ProcessGroup

from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.doctor import nvidia_smi
from jetmoe_megatron.doctor.clocks import clock_offset
from jetmoe_megatron.doctor.disk import checkpoint_bytes, measure_disk
from jetmoe_megatron.doctor.facts import RankFacts, gpu_of_rank, named_gpus
from jetmoe_megatron.doctor.findings import Finding
from jetmoe_megatron.doctor.group_rates import group_rates
from jetmoe_megatron.doctor.own_rates import own_rates
from jetmoe_megatron.doctor.pair_rates import chains, pair_rates
from jetmoe_megatron.doctor.sick_nodes import record_sick_nodes
from jetmoe_megatron.model.config import DTYPE
from jetmoe_megatron.runtime.device import has_gpu
from jetmoe_megatron.runtime.failed_nodes import this_node
from jetmoe_megatron.runtime.machine import Machine, spelled, this_machine
from jetmoe_megatron.runtime.roll_call import roll_call
from jetmoe_megatron.stopping import ExitStatus
from jetmoe_megatron.training.ranks.same_run import code_digest, run_digest


def precision_of(run: Run | None) -> Literal["bf16", "fp32"]:
    """Without a run: the one that training would have on this device."""
    return run.precision if run else "bf16" if has_gpu() else "fp32"


def runs_on(machine: Machine) -> dict[str, str]:
    """`RankFacts.runs_on`, as far as the ranks tell one another while they meet."""
    return {spelled(name): value for name, value in asdict(machine).items()}


class Examination:
    """Of this rank, by `all_steps`."""

    def __init__(self, run: Run | None, groups: Mapping[str, ProcessGroup | None], disk_bytes: int) -> None:
        """
        Args:
            run: whose disk is measured.
            groups: by name; None: this rank is not in that one.
            disk_bytes: most that a node writes.
        """
        self._run, self._groups, self._disk_bytes = run, groups, disk_bytes
        self._rank, self._nodes = torch.distributed.get_rank(), _of_all_ranks(this_node())
        self._is_first = self._nodes.index(this_node()) == self._rank  # of its node
        self._restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # by the launcher, with the same store
        self._nvidia_smi: subprocess.Popen[str] | None = None
        gpu, uuid = gpu_of_rank()
        versions = {
            **runs_on(this_machine()),
            "Python": platform.python_version(),
            "code": code_digest()[:12],
            "run file": run_digest(run)[:12] if run else "",
        }
        self._facts = RankFacts(self._rank, this_node(), gpu, uuid, versions)

    def all_steps(self, minutes: float) -> list[RankFacts]:
        """All ranks call it. Returns what all ranks found out.

        Raises:
            SystemExit: with status 5, if this rank fails where it needs no other. After so many minutes the process
                ends with status 4, after the ranks that are behind were named.
        """
        steps = self._steps()
        with roll_call("examining the ranks", list(steps), minutes) as arrive:
            for name, step in steps.items():
                arrive(name)
                torch.distributed.barrier()
                step()
        return named_gpus(_of_all_ranks(self._facts))

    def _steps(self) -> dict[str, Callable[[], None]]:
        """The same names in the same order on all ranks."""
        steps: dict[str, Callable[[], None]] = {"clocks": self._compare_clocks, "nvidia-smi": self._ask_nvidia_smi}
        for name, measure in own_rates(DTYPE[precision_of(self._run)]).items():
            steps[name] = partial(self._measure_alone, name, measure)
        steps["answer of nvidia-smi"] = self._hear_nvidia_smi
        for name, measure_group in group_rates(self._groups).items():
            steps[name] = partial(self._measure_group, name, measure_group)
        for kind, its_chains in chains(self._nodes).items():
            steps[kind] = partial(self._measure_pairs, kind, its_chains)
        if (stages := self._groups.get("pipeline")) is not None and stages.size() > 1:
            chain = torch.distributed.get_process_group_ranks(stages)
            steps["pairs of stages"] = partial(self._measure_pairs, "pairs of stages", [chain], stages)
        return {**steps, "disk": self._measure_disk}

    def _compare_clocks(self) -> None:
        default: Any = torch.distributed.distributed_c10d._get_default_store()
        store = PrefixStore(f"clocks {self._restart}", default)
        self._facts.clock = clock_offset(store, self._rank, len(self._nodes))

    def _ask_nvidia_smi(self) -> None:
        self._nvidia_smi = nvidia_smi.start() if self._is_first and has_gpu() else None

    def _hear_nvidia_smi(self) -> None:
        self._facts.gpus, self._facts.no_gpus = nvidia_smi.answer(self._nvidia_smi)

    def _measure_alone(self, name: str, measure: Callable[[], float]) -> None:
        """A failure is this rank's own. After it, a GPU cannot be used any more, so that no other can be told."""
        try:
            self._facts.rates[name] = measure()
        except RuntimeError as error:
            finding = Finding(str(self._facts), f"{name}: {str(error).splitlines()[0]}", self._facts.node)
            print(finding, file=sys.stderr, flush=True)
            record_sick_nodes([finding])
            raise SystemExit(ExitStatus.SICK_RANK) from None

    def _measure_group(self, name: str, measure: Callable[[], tuple[tuple[int, ...], float] | None]) -> None:
        if (result := measure()) is not None:
            self._facts.groups[name] = result

    def _measure_pairs(self, kind: str, its_chains: Sequence[Sequence[int]], group: ProcessGroup | None = None) -> None:
        self._facts.pairs[kind] = list(pair_rates(its_chains, group).items())

    def _measure_disk(self) -> None:
        if self._run and self._is_first:
            size = checkpoint_bytes(self._run) // len(set(self._nodes))
            self._facts.disk = measure_disk(RunFolder.of(self._run).root, min(self._disk_bytes, size))


def _of_all_ranks(value: Any) -> list[Any]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
