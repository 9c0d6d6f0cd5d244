"""The installer's commands, and the script that runs all GPU checks, as far as they run without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pip
import pytest

from tests.support import REPO, environment

INSTALL = REPO / "scripts/install_gpu.sh"
CONSTRAINTS = (REPO / "constraints.txt").read_text().splitlines()


def install(*arguments: str, python: str = sys.executable, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(INSTALL), *arguments],
        env={**environment(), "PYTHON": python, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def without_pip(folder: Path) -> str:
    """A Python whose pip installs nothing and succeeds. `held` in the folder is the file that it got as constraints."""
    python = folder / "python"
    python.write_text(
        f"#!/bin/bash\n[[ $3 == install && $4 == -c ]] && cp $5 {folder}/held\n"
        f'[[ $2 == pip ]] && exit 0\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return str(python)


def commands(*arguments: str) -> str:
    result = install("--dry-run", *arguments)
    assert result.returncode == 0, result.stderr
    assert all(line.startswith("+ ") for line in result.stdout.splitlines())
    return result.stdout


@pytest.fixture(scope="module")
def everything() -> str:
    return commands("--all")


def test_nothing_but_the_package_itself() -> None:
    text = commands()
    assert re.search(r"pip install -c \S+ --no-build-isolation \.$", text, re.MULTILINE)  # torch is held
    assert "torch==" not in text and "transformer" not in text and "megablocks==" not in text


def test_megablocks_is_built_around_its_traps(everything: str) -> None:
    lines = everything.splitlines()
    built = [line for line in lines if "grouped_gemm==" in line or ("megablocks" in line and "pip" in line)]
    assert len(built) == 3
    for line in built:
        assert "--no-deps --no-build-isolation --no-cache-dir" in line
    (patch,) = [line for line in lines if "cumsum.h" in line and "sed" in line]
    assert "debug_synchronous" in patch
    assert lines.index(patch) < lines.index(built[2])


def test_transformer_engine_finds_the_headers_of_torchs_packages(tmp_path: Path) -> None:
    headers = tmp_path / "nvidia/cudnn/include"
    headers.mkdir(parents=True)
    result = install("--dry-run", "--te", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if "CPATH" in line]
    assert str(headers) in line


def test_transformer_engine_in_the_versions_that_the_package_allows(everything: str) -> None:
    """They depend on the Python: setup.py says which."""
    (line,) = [line for line in everything.splitlines() if "gpu\\]" in line]
    assert re.search(r"pip install -c \S+ --no-build-isolation \.\\\[gpu\\\] pybind11 ninja$", line)
    assert "transformer-engine" not in everything


def fake_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir(parents=True)
    text = "class version:\n    cuda = '13.0'\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"
    (folder / "torch/__init__.py").write_text(text)
    fake_distribution(folder, "torch", version)


def fake_distribution(folder: Path, name: str, version: str) -> None:
    (folder / f"{name}-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (folder / f"{name}-{version}.dist-info/METADATA").write_text(metadata)


@pytest.mark.parametrize("version", ["2.9.1", "2.10.0a0+b5.nv25.11", "9.0.0"])
def test_a_torch_that_the_package_does_not_support_is_refused_at_once(tmp_path: Path, version: str) -> None:
    """pip would say only that its constraints contradict each other."""
    fake_torch(tmp_path, version)
    refused = install("--all", python=without_pip(tmp_path), PYTHONPATH=str(tmp_path))
    assert refused.returncode == 2 and not refused.stdout
    assert re.fullmatch(rf"error: torch {re.escape(version)} is installed, but .*torch>=2\.10.*\n", refused.stderr)


def test_a_container_keeps_its_torch_and_transformer_engine(tmp_path: Path) -> None:
    """Also if Transformer Engine cannot be imported, for example because a library of the driver is missing."""
    fake_torch(tmp_path, "2.11.0a0+eb65b36914.nv26.02")
    fake_distribution(tmp_path, "transformer_engine", "2.12.0+5671fd36")
    (tmp_path / "transformer_engine/pytorch").mkdir(parents=True)
    (tmp_path / "transformer_engine/pytorch/__init__.py").write_text("raise OSError('libcuda.so.1: no such file')")
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/bash\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    install("--te", python=without_pip(tmp_path), PYTHONPATH=str(tmp_path), CUDA_HOME=str(tmp_path / "cuda"))
    held = (tmp_path / "held").read_text().split()
    assert held == ["torch==2.11.0a0+eb65b36914.nv26.02", "transformer-engine==2.12.0+5671fd36"]


def test_pinned_is_what_is_not_installed(tmp_path: Path) -> None:
    """An image stays as it is, and the rest has the versions that CI runs with."""
    site = tmp_path / "site"
    fake_torch(site, "2.11.0")
    fake_distribution(site, "transformers", "4.57.0")
    (site / "pip").symlink_to(Path(pip.__file__).parent)
    python = without_pip(tmp_path).replace("python", "without_site")
    Path(python).write_text((tmp_path / "python").read_text().replace(sys.executable, f"{sys.executable} -S"))
    Path(python).chmod(0o755)
    for options, pinned in (([], False), (["--pinned"], True)):
        install(*options, python=python, PYTHONPATH=str(site))
        held = (tmp_path / "held").read_text().splitlines()
        wanted = [line for line in CONSTRAINTS if not line.startswith("transformers==")]
        assert held == ["torch==2.11.0", *(wanted if pinned else [])]


def test_apex_is_never_asked_for(everything: str) -> None:
    assert "apex" not in everything.lower()


def test_wheels_of_a_folder(tmp_path: Path) -> None:
    lines = [line for line in commands("--all", "--wheels", str(tmp_path)).splitlines() if " pip " in line]
    assert len(lines) >= 4
    assert all(f"--no-index --find-links {tmp_path}" in line for line in lines)
    for wrong in ([str(tmp_path / "none")], []):
        refused = install("--wheels", *wrong)
        assert refused.returncode == 2 and "is not a folder" in refused.stderr


def test_torch_without_cuda_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    result = install("--megablocks", python=without_pip(tmp_path))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: this torch is built without CUDA")
    assert "grouped_gemm" not in result.stdout


def test_unknown_option() -> None:
    result = install("--cuda")
    assert result.returncode == 2 and "usage:" in result.stderr


@pytest.mark.parametrize("script", ["install_gpu.sh", "gpu_check.sh", "newer_python.sh"])
def test_shellcheck(script: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    assert shellcheck.exists(), "install the extra `dev`"
    checked = subprocess.run([shellcheck, REPO / "scripts" / script], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    command = ["bash", str(REPO / "scripts/gpu_check.sh"), str(tmp_path / "out")]
    result = subprocess.run(
        command, env={**environment(), "PYTHON": sys.executable}, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("gpu_check: there is no GPU that torch can use")
    assert "needs a CUDA GPU" in (tmp_path / "out/tests.txt").read_text()
    assert "figures of no interest" in (tmp_path / "out/gpu_step.md").read_text()
    assert "not installed: no expert_backend megablocks" in (tmp_path / "out/doctor.txt").read_text()
