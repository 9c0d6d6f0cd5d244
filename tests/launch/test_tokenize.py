"""What `jetmoe launch tokenize` prints and refuses before anything is submitted. On a real SLURM:
`test_tokenize_on_slurm.py`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedWriter
from data_tools.tokenizer import train_bpe
from tests.support import command


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jsonl").write_text(json.dumps({"text": f"some words {number}"}) + "\n")
    train_bpe([folder], 270, tmp_path / "tokenizer")
    (tmp_path / "site.yaml").write_text("cpus_per_node: 7\nexclusive: false\npartition: cpu\nsetup: [module load x]\n")
    return folder


def launch(inputs: Path, *options: object) -> tuple[int, str, str]:
    folder = inputs.parent
    arguments = [
        inputs,
        "--output",
        folder / "web",
        "--tokenizer",
        folder / "tokenizer",
        "--site",
        folder / "site.yaml",
    ]
    done = command("jetmoe", "launch", "tokenize", *arguments, *options)
    return done.returncode, done.stdout, done.stderr


def test_print_writes_nothing(inputs: Path) -> None:
    before = sorted(inputs.parent.rglob("*"))
    status, script, error = launch(inputs, "--parts", 3, "--print", "--on-error", "skip")
    assert (status, error) == (0, "") and sorted(inputs.parent.rglob("*")) == before
    for line in ("#SBATCH --cpus-per-task=7", "#SBATCH --partition=cpu", "module load x"):
        assert f"\n{line}\n" in script
    assert (
        "--gpus" not in script and f"set -- 3 {inputs.parent}/web {inputs} " in script and "--on-error skip" in script
    )
    assert "--array=1-3 " in script and 'afterok:$array" --kill-on-invalid-dep=yes' in script


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parts", 4], "4 parts of 3 input files: a part has whole files; use 1 to 3 parts, or split the files"),
        (["--parts", 0], "0 parts of 3 input files: "),
        (["--parts", 2, "--tokenizer", "/no/such"], "/no/such/tokenizer.json: no such file"),
        (["--parts", 2, "--site", "/no/such.yaml"], "/no/such.yaml: No such file or directory"),
        (["--parts", 2, "--output", "/tmp/"], "the output '/tmp/' names no file; give a prefix such as data/web"),
        (["--parts", 2, "/no/such.jsonl"], "unrecognized arguments: /no/such.jsonl"),
    ],
)
def test_bad_input_submits_nothing(inputs: Path, options: list[object], said: str) -> None:
    before = sorted(inputs.parent.rglob("*"))
    status, output, error = launch(inputs, *options)
    assert (status, output) == (2, "") and f"error: {said}" in error and error.splitlines()[-1].count("error: ") == 1
    assert sorted(inputs.parent.rglob("*")) == before


def test_an_existing_dataset_is_kept(inputs: Path) -> None:
    with IndexedWriter(inputs.parent / "web", np.uint16):
        pass
    status, _, error = launch(inputs, "--parts", 2, "--print")
    assert status == 2 and "web.bin exists; choose another output or pass --overwrite" in error
    status, script, _ = launch(inputs, "--parts", 2, "--print", "--overwrite")
    assert status == 0 and '--output "$prefix" --overwrite' in script


def test_without_slurm(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(inputs))
    status, output, error = launch(inputs, "--parts", 2)
    said = "error: there is no sbatch here: run this where jobs are submitted to SLURM, or add --print\n"
    assert (status, output, error) == (2, "", said)
    assert not (inputs.parent / "web.tokenize").exists()


SBATCH = """#!/usr/bin/env bash
[[ $* != *dependency* ]] || { echo "sbatch: error: no more jobs" >&2; exit 1; }
echo 77
"""


def test_an_array_without_its_merge_is_not_left(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM takes the array, and refuses the second job."""
    folder = inputs.parent / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", f'#!/usr/bin/env bash\necho "$@" > {folder}/cancelled\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    status, output, error = launch(inputs, "--parts", 2)
    assert (status, output) == (2, "") and "sbatch: error: no more jobs" in error
    assert (folder / "cancelled").read_text() == "77\n"


SCONTROL = """#!/usr/bin/env bash
echo "  JobState=RUNNING Restarts=${RESTARTS:-0} BatchFlag=1"
"""


def test_a_merge_that_was_ended_goes_on(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the data was written, or while the parts were removed."""
    folder = inputs.parent
    (folder / "bin").mkdir()
    (folder / "bin/scontrol").write_text(SCONTROL)
    (folder / "bin/scontrol").chmod(0o755)
    _, script, _ = launch(inputs, "--parts", 2, "--print")
    (folder / "job.sh").write_text(script.replace("module load x\n", ""))
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "1",
        "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def make_parts() -> None:
        for part in (1, 2):
            options = ("--tokenizer", folder / "tokenizer", "--part", f"{part}/2")
            done = command("jetmoe", "data", "tokenize", inputs, "--output", folder / "web", *options)
            assert done.returncode == 0, done.stderr

    def merge(restarts: int) -> int:
        monkeypatch.setenv("RESTARTS", str(restarts))
        return command("bash", folder / "job.sh").returncode

    make_parts()
    assert merge(0) == 0
    data, left = (folder / "web.bin").read_bytes(), {path.name for path in folder.glob("web*")}
    assert left == {"web.bin", "web.idx"}
    for path in folder.glob("web.*"):
        path.rename(folder / f"first{path.suffix}")
    make_parts()
    for suffix in (".bin", ".idx"):
        (folder / f"first{suffix}").rename(folder / f"web{suffix}")
    assert merge(1) == 2  # it is not known to be ours
    (folder / "web.merging").write_text("6 has merged\n")  # another job
    assert merge(1) == 2
    (folder / "web.merging").write_text("7 merges\n")
    assert merge(1) == 0
    assert (folder / "web.bin").read_bytes() == data and {path.name for path in folder.glob("web*")} == left
    (folder / "web.merging").write_text("7 has merged\n")
    (folder / "web.part-2-of-2.idx").touch()
    assert merge(1) == 0
    assert (folder / "web.bin").read_bytes() == data and {path.name for path in folder.glob("web*")} == left
