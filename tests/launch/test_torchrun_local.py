"""scripts/torchrun_local.sh with a stand-in for python that records how it was called."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "torchrun_local.sh"
STAND_IN = '#!/bin/sh\nprintf "%s\\n" "$OMP_NUM_THREADS" "$PYTHONPATH" "$@"\nexit 75\n'


def run(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHON")}
    return subprocess.run(
        [SCRIPT, *arguments], cwd=cwd, env={**inherited, **env}, capture_output=True, text=True, timeout=30
    )


def stand_in(path: Path) -> str:
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


def test_starts_the_launcher_from_any_directory(tmp_path: Path) -> None:
    python = stand_in(tmp_path / "my-python")
    ended = run("3", "run.yaml", "name=a b", "debug.max_steps=2", cwd=tmp_path, PYTHON=python, OMP_NUM_THREADS="5")
    threads, path, *arguments = ended.stdout.splitlines()
    assert ended.returncode == 75
    assert threads == "5"
    assert path.split(":")[0] == str(ROOT)
    assert arguments == [
        *("-m", "jetmoe_megatron.launch.elastic", "--standalone", "--nproc-per-node", "3"),
        *(str(ROOT / "pretrain_jetmoe.py"), "run.yaml", "name=a b", "debug.max_steps=2"),
    ]


def test_python_of_the_path_and_a_share_of_the_cores(tmp_path: Path) -> None:
    stand_in(tmp_path / "python")
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert run("1", "run.yaml", cwd=tmp_path, PATH=path).stdout.split()[0] == str(len(os.sched_getaffinity(0)))
    assert run("1000", "run.yaml", cwd=tmp_path, PATH=path).stdout.split()[0] == "1"


@pytest.mark.parametrize("arguments", [(), ("2",), ("run.yaml", "2"), ("0", "run.yaml"), ("2", "seed=1")])
def test_wrong_arguments(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ended = run(*arguments, cwd=tmp_path, PYTHON=stand_in(tmp_path / "python"))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "usage: scripts/torchrun_local.sh NPROC RUN.yaml [section.key=value ...]\n"


def test_a_run_file_with_an_equals_sign_in_its_path(tmp_path: Path) -> None:
    (tmp_path / "lr=3e-4").mkdir()
    (tmp_path / "lr=3e-4/run.yaml").touch()
    ended = run("2", "lr=3e-4/run.yaml", cwd=tmp_path, PYTHON=stand_in(tmp_path / "python"))
    assert ended.returncode == 75 and ended.stdout.splitlines()[-1] == "lr=3e-4/run.yaml"
