"""`jetmoe plan` as a user calls it."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import yaml

from jetmoe_megatron.config import load_run
from jetmoe_megatron.plan.compare import overrides
from jetmoe_megatron.plan.rehearsal import Rehearsal
from jetmoe_megatron.plan.settings import Settings
from tests.plan.small_plans import hardware, run_tree
from tests.support import REPO, command

JETMOE = [sys.executable, "-m", "jetmoe_megatron.cli", "plan"]
HUGE = "model.num_layers=1000", "model.hidden_size=65536", "model.ffn_hidden_size=262144"
SHIPPED = {
    "configs/jetmoe_8b/run.yaml": "96",
    "configs/jetmoe_8b/run_planned.yaml": "96",
    "configs/quickstart/run.yaml": "2",
    "configs/my_run.yaml": "2",
}


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_tree()))
    return str(file)


@pytest.fixture
def gpu(tmp_path: Path) -> str:
    file = tmp_path / "gpu.yaml"
    file.write_text(yaml.safe_dump(hardware().model_dump()))
    return str(file)


@pytest.mark.parametrize(("shipped", "gpus"), SHIPPED.items())
def test_shipped_runs_are_planned(shipped: str, gpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variables that a start of them needs: a plan opens no data."""
    for name in ("OUTPUT", "DATA"):
        monkeypatch.delenv(name, raising=False)
    result = command(*JETMOE, str(REPO / shipped), "--gpus", gpus, "--hardware", "h100", timeout=240)
    assert result.returncode == 0, result.stderr
    assert "Memory: fits." in result.stdout and "None is a measurement." in result.stdout
    assert "the whole run" in result.stdout and "NaN" not in result.stdout


def test_all_yaml_files_of_runs_are_planned() -> None:
    runs = {
        str(path.relative_to(REPO))
        for path in (REPO / "configs").rglob("*.yaml")
        if "phases" in (yaml.safe_load(path.read_text()) or {})
    }
    assert runs == SHIPPED.keys()


def test_the_planned_run_is_the_published_one_in_another_layout() -> None:
    published, planned = (
        load_run(REPO / "configs/jetmoe_8b" / name, need_variables=False) for name in ("run.yaml", "run_planned.yaml")
    )
    divided = Settings.of(planned).apply(published)
    assert overrides(divided, published) == "batch.micro_sequences=2"
    assert divided.model_copy(update={"name": planned.name, "output_dir": planned.output_dir}) == planned


def test_json_holds_all_that_was_found(run_file: str, gpu: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = command(*JETMOE, run_file, "parallel.pipeline=2", "--gpus", "2", "--hardware", gpu, "--json", str(file))
    assert result.returncode == 0, result.stderr
    tree = json.loads(file.read_text())
    assert tree["verdict"] == "fits" and tree["layout"]["pipeline"] == 2 and tree["estimate"]["step_seconds"] > 0
    ranks = [Rehearsal.load(json.dumps(rank)) for rank in tree["ranks"]]
    assert [rank.rank for rank in ranks] == [0, 1]
    assert f"written: {file}" in result.stdout


def test_a_range_of_gpus(run_file: str, gpu: str) -> None:
    result = command(*JETMOE, run_file, "--gpus", "1..3", "--hardware", gpu)
    assert result.returncode == 0, result.stderr
    assert "| 1 GPUs " in result.stdout and "| 2 GPUs " in result.stdout
    assert "3 GPUs: batch: 8 sequences per step (global_tokens / sequence_length) do not divide" in result.stdout


def test_two_runs_beside_each_other(run_file: str, gpu: str, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(run_tree(recompute="full")))
    result = command(*JETMOE, run_file, "--compare", str(other), "--gpus", "1", "--hardware", gpu)
    assert result.returncode == 0, result.stderr
    assert "| recompute | none" in result.stdout
    assert f"{other} beside {run_file}: " in result.stdout and "% more time: computing +" in result.stdout


@pytest.mark.parametrize("option", ["--search", "--fit"])
def test_a_search_and_the_largest_models(run_file: str, gpu: str, option: str) -> None:
    result = command(*JETMOE, run_file, option, "--gpus", "1", "--hardware", gpu, timeout=240)
    assert result.returncode == 0 and "None is a measurement." in result.stdout, result.stderr
    assert "\r" not in result.stderr  # no bar where there is no terminal; slow work says a line now and then


def test_the_largest_models_on_each_number_of_gpus(run_file: str, gpu: str) -> None:
    result = command(*JETMOE, run_file, "--fit", "--gpus", "2..3", "--hardware", gpu, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "The deepest models of each width that fit on 2 Small 1, bf16:" in result.stdout
    assert "3 GPUs: batch: 8 sequences per step" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "0", "--hardware", "h100"], "--gpus: must be from 1 to 1,000,000, not 0"),
        (["--gpus", "1000001", "--hardware", "h100"], "--gpus: must be from 1 to 1,000,000, not 1000001"),
        (["--gpus", "8..1", "--hardware", "h100"], "--gpus: must be from 1 to 1,000,000, not 8..1"),
        (["--gpus", "1..99", "--hardware", "h100"], "--gpus: a range may have 64 numbers, not 99"),
        (["--gpus", "many", "--hardware", "h100"], "--gpus: write a number, or two as 1..8, not 'many'"),
        (["--gpus", "1", "--hardware", "v100"], "--hardware: 'v100' is not known: a100, b200, h100, h200"),
        (["--gpus", "1", "--hardware", "missing.yaml"], "missing.yaml: No such file or directory"),
        (["--gpus", "1", "--hardware", "h100", "--imbalance", "0.5"], "imbalance: must be from 1 to 2"),
        (["--gpus", "1", "--hardware", "h100", "--imbalance", "3"], "(num_experts / top_k), not 3"),
        (["--gpus", "1..2", "--hardware", "h100", "--search"], "--gpus: name one number with --search, --compare"),
        (["--gpus", "3", "--hardware", "h100", "parallel.tensor=2"], "does not divide the world of 3 ranks"),
        (["--gpus", "7", "--hardware", "h100", "--search"], "no layout of this run's model and batch divides 7 GPUs"),
        (["--gpus", "1", "--hardware", "h100", "parallel.context=2"], "parallel.context: "),
        (["--gpus", "1", "--hardware", "h100", "--measured", "missing.json"], "missing.json: No such file"),
        (["--gpus", "1", "--hardware", "h100", "--json", "/proc/plan.json"], "cannot write /proc/plan.json"),
        (
            ["--gpus", "8", "--hardware", "h100", *HUGE],
            "of weights for each of 8 GPUs, however they are divided",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(run_file: str, arguments: list[str], words: str) -> None:
    result = command(*JETMOE, run_file, *arguments, timeout=240)
    assert result.returncode == 2, result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr


def test_an_output_takes_the_place_of_nothing_else(run_file: str, tmp_path: Path) -> None:
    """It is refused before anything is computed, and what is there stays."""
    pipe, link, same = tmp_path / "pipe", tmp_path / "link", tmp_path / "same"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "new")
    before = Path(run_file).read_text()
    for outputs, words in (
        (["--json", str(pipe)], f"--json: {pipe} is no plain file: name another"),
        (["--html", str(link)], f"--html: {link} is no plain file: name another"),
        (["--json", "/"], "--json: / is no plain file: name another"),
        (["--json", ""], "--json: . is no plain file: name another"),
        (["--html", str(tmp_path / "missing/x")], f"--html: {tmp_path / 'missing'} is no folder"),
        (["--html", run_file], f"--html: {run_file} is what RUN.yaml names: name another"),
        (["--json", str(same), "--html", str(same)], f"--html: {same} is what --json names: name another"),
    ):
        result = command(*JETMOE, run_file, "--gpus", "1", "--hardware", "h100", *outputs)
        assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {words}\n")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and not same.exists() and Path(run_file).read_text() == before
