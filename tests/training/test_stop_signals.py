"""Requests to stop, counted in a separate process. What a run does with them: test_pretrain.py."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.support import REPO

WAITS = """
import time
from jetmoe_megatron.training import stop_signals
stop_signals.STOP_SIGNALS = dict.fromkeys(stop_signals.STOP_SIGNALS, 0.5)
with stop_signals.StopSignals() as stop:
    print("ready", flush=True)
    end = time.monotonic() + 60
    while not stop.received and time.monotonic() < end:
        time.sleep(0.01)
    print(stop.received.name, flush=True)
    time.sleep(4)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_second_request_ends_it_at_once_and_an_echo_does_not(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.05)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(2) == 128 + number


def test_another_signal_is_not_a_second_request() -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    time.sleep(0.6)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_signal_after_an_error() -> None:
    """From a launcher that has seen another rank end: this one has yet to say which it lost."""
    program = """
import os, signal
from jetmoe_megatron.training.stop_signals import StopSignals
try:
    with StopSignals():
        raise RuntimeError("lost")
except RuntimeError:
    os.kill(os.getpid(), signal.SIGTERM)
    print("named")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "named\n")
