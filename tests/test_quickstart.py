"""The quickstart and every command of the README, in a copy of the repository, with fewer steps."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import REPO, command, environment, metrics

# Commands that install, that take the whole of CI's time, or that need a cluster: their targets are tested elsewhere.
NOT_RUN_HERE = ("make ", "source ", "jetmoe launch slurm ", "jetmoe status $OUTPUT")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files with 40 steps of training instead of 500, after `scripts/quickstart.sh`."""
    root = tmp_path_factory.mktemp("clone") / "repository"
    listed = command("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines()
    for name in listed:
        if (REPO / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, root / name)
    for phase, tokens in (("phase1", 122_880), ("phase2", 40_960)):
        path = root / f"configs/quickstart/{phase}.yaml"
        path.write_text(re.sub(r"tokens: \d+", f"tokens: {tokens}", path.read_text()))
    run_file = root / "configs/quickstart/run.yaml"
    run_file.write_text(run_file.read_text().replace("warmup_tokens: 1e6", "warmup_tokens: 60e3"))
    # With the warnings that a user would see.
    result = command("env", "-u", "PYTHONWARNINGS", "bash", "scripts/quickstart.sh", cwd=root, timeout=400)
    (root / "output.txt").write_text(result.stdout)
    (root / "errors.txt").write_text(result.stderr)
    assert result.returncode == 0, result.stderr[-2000:]
    return root


def test_quickstart(copy: Path) -> None:
    output = (copy / "output.txt").read_text()
    records = metrics(copy / "runs/quickstart")
    assert [r["phase"] for r in records] == ["stable"] * 30 + ["decay"] * 10
    assert records[-1]["held_out_loss"] < records[0]["lm_loss"] - 1.0
    for line in ("steps", "from code", "from prose", "first loss", "held-out loss", "Hugging Face"):
        assert line in output
    assert "\ndef read_file(path):" in output  # the sample begins with its prompt
    assert "built " not in output and (copy / "errors.txt").read_text() == ""  # nothing that nobody asked for
    assert (copy / "runs/quickstart/hf/tokens_163840/tokenizer.json").is_file()


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (REPO / "README.md").read_text(), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return [line for line in commands if not line.startswith(NOT_RUN_HERE)]


def test_readme_commands(copy: Path) -> None:
    """In their order, word for word, in the folder where the quickstart has run."""
    commands = readme_commands()
    assert len(commands) >= 5
    for line in commands:
        result = subprocess.run(
            ["bash", "-c", line], cwd=copy, env=environment(), capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{line}\n{result.stderr[-2000:]}"


def test_a_typing_error_in_a_readme_command_is_one_line() -> None:
    """What a user is shown must not answer with a launcher's traceback."""
    commands = [line for line in readme_commands() if "configs/quickstart/run.yaml" in line and "data" not in line]
    assert len(commands) >= 3
    for line in commands:
        result = command("bash", "-c", f"{line} optimizer.max_lrr=1")
        assert result.returncode == 2, line
        assert result.stderr.endswith("optimizer.max_lrr: unknown key; did you mean 'max_lr'?\n"), line
        assert result.stderr.count("\n") == 1, line


@pytest.mark.parametrize("target", ["quickstart", "test", "test-all", "check"])
def test_make_targets(target: str) -> None:
    plan = command("make", "-n", target)
    assert plan.returncode == 0, plan.stderr
    assert {"quickstart": "scripts/quickstart.sh", "check": "ruff"}.get(target, "pytest") in plan.stdout


def test_readme_names_only_files_that_exist() -> None:
    text = (REPO / "README.md").read_text()
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (REPO / name).exists(), name
