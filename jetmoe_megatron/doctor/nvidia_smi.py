"""Clocks, memory errors and throttling of a node's GPUs, as `nvidia-smi` tells them. It was never run on a GPU."""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import dataclass

# Newer drivers also call the reasons `clocks_event_reasons`; these names are known to old and new ones.
_REASONS = ("hw_thermal_slowdown", "hw_power_brake_slowdown", "hw_slowdown", "sw_thermal_slowdown")
_FIELDS = (
    "index",
    "uuid",
    "serial",
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    *(f"clocks_throttle_reasons.{reason}" for reason in _REASONS),
)
_SECONDS = 60.0  # after which it hangs, as it does if a driver does


@dataclass(frozen=True)
class GPU:
    """What is not known is empty.

    Attributes:
        clock, highest_clock: MHz of the multiprocessors.
        memory_errors: that could not be corrected, since the driver was loaded.
        slowed_by: why the hardware or the driver holds the clocks down for heat or power.
    """

    index: str
    uuid: str
    serial: str
    clock: str
    highest_clock: str
    temperature: str
    memory_errors: str
    slowed_by: tuple[str, ...]

    def problems(self) -> list[str]:
        found = [f"nvidia-smi: {reason} holds the clock at {self.clock} MHz" for reason in self.slowed_by]
        if self.memory_errors not in ("", "0"):
            found.append(f"nvidia-smi: {self.memory_errors} uncorrected memory (ECC) errors")
        return found


def start() -> subprocess.Popen[str] | None:
    """Ask while the GPUs of this node work: idle ones have low clocks. None: it is not there."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


def answer(asked: subprocess.Popen[str] | None) -> tuple[list[GPU], str]:
    """The GPUs of the node, and why they are not known, if they are not."""
    if asked is None:
        return [], ""
    try:
        text, _ = asked.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        asked.kill()
        return [], f"nvidia-smi did not answer in {_SECONDS:.0f} s"
    if asked.returncode:
        return [], f"nvidia-smi ended with status {asked.returncode}: {next(iter(text.splitlines()), '')}"
    return parse(text)


def parse(text: str) -> tuple[list[GPU], str]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    if odd := next((row for row in rows if len(row) != len(_FIELDS)), None):
        return [], f"nvidia-smi gave {len(odd)} values for {len(_FIELDS)}: {', '.join(odd)}"
    gpus = []
    for row in rows:
        told = {name: "" if value.startswith("[") else value for name, value in zip(_FIELDS, row, strict=True)}
        reasons = tuple(reason for reason in _REASONS if told[f"clocks_throttle_reasons.{reason}"] == "Active")
        gpus.append(
            GPU(
                told["index"],
                told["uuid"],
                told["serial"],
                told["clocks.sm"],
                told["clocks.max.sm"],
                told["temperature.gpu"],
                told["ecc.errors.uncorrected.volatile.total"],
                reasons,
            )
        )
    return gpus, ""
