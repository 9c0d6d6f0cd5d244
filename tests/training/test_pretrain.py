"""The training command as a user runs it: real processes on gloo."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest

from jetmoe_megatron.checkpoint.folder import published
from jetmoe_megatron.monitor.jsonl import read_metrics
from tests.injected_faults import ELASTIC
from tests.support import (
    REPO,
    TORCHRUN,
    command,
    environment,
    launched,
    losses,
    metrics,
    pretrain,
    small_run,
    training,
    write_dataset,
    write_run,
)
from tests.warm import Command


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """The folder of a run on two ranks that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tree = small_run(folder, data, checkpoint__every_tokens=512, logging={"router_every_steps": 3})
    tree["evaluation"] = {"every_steps": 4, "sequences": 5, "data": [{"name": "v", "path": data["held_out"]}]}
    result = launched(2, write_run(folder, tree))
    assert result.returncode == 0, result.stderr
    assert "step 8/8 | decay" in result.stdout
    return folder / "run"


def test_run_folder(whole: Path, data: dict[str, str]) -> None:
    records = metrics(whole)
    assert [r["step"] for r in records] == list(range(1, 9))
    assert [r["phase"] for r in records] == ["stable"] * 5 + ["decay"] * 3
    assert [r["tokens"] for r in records] == [256 * step for step in range(1, 9)]
    expected = {"lm_loss", "moa_balance_loss", "moe_balance_loss", "moa_z_loss", "moe_z_loss", "grad_norm"}
    expected |= {"moa_load_imbalance", "moe_load_imbalance", "tflops_per_rank", "host_memory_gb"}
    expected |= {"time", "step", "phase", "tokens", "lr", "tokens_per_second", "data_wait_seconds"}
    expected |= {"start_seconds", "step_seconds", "other_seconds", "wall_seconds", "run_seconds", "goodput"}
    expected |= {"rank_hours"}
    assert expected | {f"dataset_{unit}/{name}" for unit in ("tokens", "epochs") for name in ("code", "prose")} == set(
        records[0]
    )
    for record in records[1:]:
        parts = [record[f"{part}_seconds"] for part in ("forward_backward", "gradient_reduction", "optimizer")]
        assert min(parts) > 0
    assert [r["step"] for r in records if "held_out_loss" in r] == [4, 8]
    assert records[4]["dataset_tokens/code"] == 3 * 5 * 64
    assert records[0]["lr"] == pytest.approx(1e-3) and records[2]["lr"] == 1e-2
    assert records[6]["lr"] == pytest.approx(1e-2 * 0.1 ** (1 / 3))
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 0.5
    for kind in ("moa", "moe"):
        assert 0.9 < records[0][f"{kind}_balance_loss"] < 1.5
        assert 1.0 <= records[0][f"{kind}_load_imbalance"] <= 4 / 2  # of four experts two are chosen
    assert [p.name for p in published(whole / "checkpoints")] == [
        "tokens_512",
        "tokens_1024",
        "tokens_1280",  # the end of the first phase
        "tokens_1536",
        "tokens_2048",
    ]
    assert (whole / "config.yaml").is_file()
    routers = read_metrics(whole / "routers.jsonl")
    assert [(r["step"], r["tokens"], r["steps"]) for r in routers] == [(3, 768, 3), (6, 1536, 3), (8, 2048, 2)]
    assert [r["step"] for r in records if "routers/moe/load_max" in r] == [3, 6, 8]
    for record in routers:
        for kind in ("moa", "moe"):
            steps = records[
                record["step"] - record["steps"] : record["step"]
            ]  # of which each has as many micro-batches
            for name in ("balance_loss", "z_loss"):
                of_layers = record[f"{kind}_{name}"]
                of_steps = [step[f"{kind}_{name}"] for step in steps]
                assert sum(of_layers) / len(of_layers) == pytest.approx(sum(of_steps) / len(of_steps), rel=1e-4)
            for load in record[f"{kind}_load"]:
                assert sum(load) / len(load) == pytest.approx(1, abs=1e-5)


def test_one_rank_and_two_ranks_agree(whole: Path, tmp_path: Path, data: dict[str, str]) -> None:
    assert pretrain(1, write_run(tmp_path, small_run(tmp_path, data))).returncode == 0
    for one, two in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_resume_is_bit_identical_on_both_sides_of_the_switch(whole: Path, tmp_path: Path, data: dict) -> None:
    """Stopped in the first phase, at the switch and in the second: the same numbers, to the last bit."""
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    for steps in (3, 5, 7, 8):
        assert pretrain(2, run_file, f"debug.max_steps={steps}").returncode == 0
        assert len(metrics(tmp_path / "run")) == steps
    assert losses(tmp_path / "run") == losses(whole)


def test_a_kill_loses_only_what_came_after_the_last_checkpoint(whole: Path, tmp_path: Path, data: dict) -> None:
    tree = small_run(tmp_path, data, checkpoint__every_tokens=512, logging={"router_every_steps": 3})
    run_file = write_run(tmp_path, tree)
    assert pretrain(2, run_file, "debug.max_steps=4").returncode == 0
    for name in ("metrics", "routers"):
        with open(tmp_path / f"run/{name}.jsonl", "a") as file:  # as if killed in step 6, in the middle of a line
            file.write('{"step": 5, "lm_loss": 99.0}\n{"step": 6, "lm_lo')
    (tmp_path / "run/checkpoints/tokens_1280.partial-0a0b").mkdir()
    assert pretrain(2, run_file).returncode == 0
    assert losses(tmp_path / "run") == losses(whole)
    steps = [(r["step"], r["steps"]) for r in read_metrics(tmp_path / "run/routers.jsonl")]
    assert steps == [(3, 3), (4, 1), (6, 2), (8, 2)]
    assert not list((tmp_path / "run/checkpoints").glob("*.partial*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP], ids=str)
def test_signal_saves_and_asks_to_be_run_again(number: int, tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data, phases__0__tokens=256 * 2000))
    with training(run_file, "logging.every_steps=1").following() as process:
        process.wait_for("step")
        process.send_signal(number)
        status, _, error = process.ended()
    assert status == 75, error
    assert "Traceback" not in error
    steps = len(metrics(tmp_path / "run"))
    assert [p.name for p in published(tmp_path / "run/checkpoints")] == [f"tokens_{256 * steps}"]
    assert pretrain(1, run_file, f"debug.max_steps={steps + 2}").returncode == 0
    assert [r["step"] for r in metrics(tmp_path / "run")] == list(range(1, steps + 3))


def test_signal_to_torchrun_saves_on_all_ranks(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data, phases__0__tokens=256 * 2000))
    launcher: list[str | Path] = [
        *TORCHRUN,
        "--nproc-per-node=2",
        "pretrain_jetmoe.py",
        str(run_file),
        "logging.every_steps=1",
    ]
    process = subprocess.Popen(launcher, cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    steps = len(metrics(tmp_path / "run"))
    assert [p.name for p in published(tmp_path / "run/checkpoints")] == [f"tokens_{256 * steps}"]


def test_ranks_whose_launcher_is_killed_save_and_end(tmp_path: Path, data: dict) -> None:
    tree = small_run(tmp_path, data, phases__0__tokens=10**6 // 256 * 256)
    launcher: list[str | Path] = [*TORCHRUN, "--nproc-per-node=2", "pretrain_jetmoe.py", write_run(tmp_path, tree)]
    process = subprocess.Popen(launcher, cwd=REPO, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step"))
    process.kill()
    list(process.stdout)  # to its end: no rank writes any more
    process.wait(60)
    assert len(published(tmp_path / "run" / "checkpoints")) == 1


def test_killed_ranks_leave_no_temporary_folders(tmp_path: Path, data: dict) -> None:
    """Megatron's import of wandb would make two for each, torch's launcher one."""
    run_file = write_run(tmp_path, small_run(tmp_path, data, phases__0__tokens=256 * 2000))
    (tmp_path / "temporary").mkdir()
    process = subprocess.Popen(
        [sys.executable, *ELASTIC, "--nproc-per-node=2", "pretrain_jetmoe.py", run_file, "logging.every_steps=1"],
        cwd=REPO,
        env={**environment(), "TMPDIR": str(tmp_path / "temporary")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("step"))
    for rank in psutil.Process(process.pid).children():
        rank.kill()
    process.communicate(timeout=60)
    assert process.returncode == 137
    left = {path.name for path in (tmp_path / "temporary").iterdir()}
    assert all(name.startswith("torchinductor_") for name in left)  # torch's cache, one for each user


def test_a_run_past_its_last_phase_is_refused(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run_file, "debug.max_steps=4").returncode == 0
    changes = ["phases.0.tokens=512", "phases.1.tokens=256", "checkpoint.may_change=[phases]", "data.new_blend=true"]
    refused = pretrain(1, run_file, *changes)
    assert refused.returncode == 2
    assert "is after the last of the 3 steps of all phases" in refused.stderr


def test_held_out_loss_with_interleaved_stages(tmp_path: Path, data: dict) -> None:
    """They want as many micro-batches as there are stages, and a held-out set of one is filled up."""
    held_out = {"every_steps": 4, "sequences": 3, "data": [{"name": "v", "path": data["held_out"]}]}
    values = []
    for name, parallel in (("one", {}), ("vpp", {"pipeline": 2, "virtual_pipeline": 2})):
        changes = {"model__num_layers": 4, "evaluation": held_out, "parallel": parallel, "debug": {"max_steps": 4}}
        ended = pretrain(len(parallel) or 1, write_run(tmp_path / name, small_run(tmp_path / name, data, **changes)))
        assert ended.returncode == 0, ended.stderr
        values.append(metrics(tmp_path / name / "run")[-1]["held_out_loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (whole / "checkpoints").rglob("*")}
    result = pretrain(2, whole / "config.yaml")
    assert result.returncode == 0
    assert "nothing left to do" in result.stdout
    assert {p: p.stat().st_mtime_ns for p in (whole / "checkpoints").rglob("*")} == before
    assert len(metrics(whole)) == 8


def test_keep_last(whole: Path, tmp_path: Path, data: dict) -> None:
    tree = small_run(tmp_path, data, checkpoint={"every_tokens": 256, "keep_last": 2})
    assert pretrain(1, write_run(tmp_path, tree), "debug.max_steps=4").returncode == 0
    assert [p.name for p in published(tmp_path / "run/checkpoints")] == ["tokens_768", "tokens_1024"]


def test_bf16_trains(tmp_path: Path, data: dict) -> None:
    result = pretrain(1, write_run(tmp_path, small_run(tmp_path, data, precision="bf16")))
    assert result.returncode == 0, result.stderr
    records = metrics(tmp_path / "run")
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 0.5


BAD: dict[str, tuple[list[str], str]] = {
    "unknown key": (["model.num_lairs=3"], "did you mean 'num_layers'?"),
    "wrong type": (["model.num_layers=many"], "model.num_layers: must be a valid integer"),
    "layout and world": (["parallel.tensor=2"], "does not divide the world of 1 ranks"),
    "batch": (["batch.micro_sequences=3"], "do not divide into 1 data-parallel ranks x 3 micro_sequences"),
    "missing data": (["phases.0.data.0.path=no/such", "phases.1.data.0.path=no/such"], "no/such.idx"),
    "vocabulary": (["model.vocab_size=64"], "is outside the model's vocabulary of 64"),
    "weights without a sum": (
        ["phases.0.data.0.weight=1e308", "phases.0.data.1.weight=1e308"],
        "the sum of the weights is not finite",
    ),
    "override after an option": (
        ["--dry-run", "phases.0.tokens=-1"],
        "phases.0.tokens: must be greater than or equal to 1",
    ),
    "sequence too long": (
        ["batch.sequence_length=65536", "batch.global_tokens=131072", "schedule.warmup_tokens=0"],
        "too few for one sequence",
    ),
    "tokenizer": (["tokenizer=no/such/folder"], "tokenizer: no/such/folder is not a folder"),
    "backend": (["model.expert_backend=torch", "model.ffn_hidden_size=50"], "ffn_hidden_size (50) is not"),
    "layout without its package": (
        ["parallel.context=2", "--dry-run", "--world=2"],
        "parallel.context: context parallelism needs Transformer Engine, which is not installed",
    ),
    "profile after the end": (["profile.steps=[4,9]"], "profile.steps: 9 is after the last step of the run, 8"),
    "profile of no rank": (["profile.steps=[1,2]", "profile.ranks=[0,1]"], "profile.ranks: there is no rank 1 among 1"),
    "output": (["output_dir=setup.py/run"], "output_dir: setup.py is a file"),
    "never resume": (["checkpoint.resume=never", "output_dir=OTHER"], "checkpoint.resume: never, but"),
    "another model": (
        ["model.num_layers=4", "output_dir=OTHER"],
        "differs from the saved run in model.num_layers (saved 2, now 4). Set it back, or train this other model",
    ),
    "another mixture": (
        ["phases.0.data.0.weight=9", "output_dir=OTHER"],
        "was trained on other data: phases.stable.share.code 0.75 -> 0.9; phases.stable.share.prose 0.25 -> 0.1. Set",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2(
    overrides: list[str], message: str, whole: Path, tmp_path: Path, data: dict
) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    overrides = [text.replace("OTHER", str(whole)) for text in overrides]
    before = sorted(tmp_path.rglob("*"))
    result = pretrain(1, run_file, *overrides)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_on_two_ranks_is_said_once(tmp_path: Path, data: dict) -> None:
    result = launched(2, write_run(tmp_path, small_run(tmp_path, data)), "parallel.pipeline=4")
    assert result.returncode != 0
    assert result.stderr.count("error: parallel: tensor 1 x pipeline 4 = 4 does not divide the world of 2 ranks") == 1
    assert result.stderr.count("does not divide") == 1


def test_nothing_but_errors_goes_to_stderr(tmp_path: Path, data: dict) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    environment_of_a_user = {key: value for key, value in environment().items() if key != "PYTHONWARNINGS"}
    line: list[str | Path] = [sys.executable, "pretrain_jetmoe.py", run_file]
    ended = subprocess.run(line, cwd=REPO, env=environment_of_a_user, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0 and ended.stderr == ""


def test_dry_run_plans_without_training(tmp_path: Path, data: dict) -> None:
    result = pretrain(1, write_run(tmp_path, small_run(tmp_path, data)), "--dry-run", "--world", "4")
    assert result.returncode == 0, result.stderr
    assert "ranks    4 (data 4)" in result.stdout
    assert "phase    decay: 3 steps, 768 tokens, exponential; code 50.0%, prose 50.0%" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "--nonsense"], ["a.yaml", "--world", "2"], ["no.yaml"]])
def test_bad_usage(arguments: list[str]) -> None:
    result = Command(["pretrain", *arguments], environment(), REPO).run()
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "launcher", [TORCHRUN, [sys.executable, "-m", "jetmoe_megatron.launch.elastic", "--standalone"]]
)
def test_bad_usage_is_said_once_for_all_ranks(launcher: list[str]) -> None:
    result = command(*launcher, "--nproc-per-node=2", "pretrain_jetmoe.py", "a.yaml", "--nonsense")
    said = "error: unrecognized arguments: --nonsense (see pretrain_jetmoe.py --help)\n"
    assert result.returncode == (1 if launcher is TORCHRUN else 2)
    assert result.stderr.startswith(said) and result.stderr.count("--nonsense") == 1, result.stderr


def test_a_token_beyond_the_vocabulary_that_no_check_saw(tmp_path: Path, data: dict) -> None:
    """The check of every batch, on its own: the file changes after the start."""
    tree = small_run(tmp_path, data, phases__0__tokens=256 * 3000)
    tree["phases"][0]["data"][0]["path"] = write_dataset(tmp_path / "own", 120, 0)
    tree["phases"][1]["data"] = tree["phases"][1]["data"][1:]
    with training(write_run(tmp_path, tree), "logging.every_steps=1").following() as process:
        process.wait_for("step")
        with open(tmp_path / "own.bin", "r+b") as file:
            file.write(b"\xff\xff" * 2000)
        status, _, error = process.ended(timeout=120)
    assert status == 2
    assert "data set 'code': token id 65535 is outside the model's vocabulary of 96" in error
    assert "Traceback" not in error


def refuse_to_draw() -> None:
    from jetmoe_megatron.model import build

    patch.object(build, "initialize_weights", side_effect=AssertionError("drawn")).start()


def test_a_resume_draws_no_weights(tmp_path: Path, data: dict[str, str]) -> None:
    """To draw a large model takes long, and a checkpoint overwrites it."""
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert "drawn" in training(run_file, before=refuse_to_draw).run().stderr
    assert pretrain(1, run_file, "debug.max_steps=2").returncode == 0
    assert training(run_file, before=refuse_to_draw).run().returncode == 0
    changed = [f"start_from={tmp_path}/run/checkpoints/tokens_512", f"output_dir={tmp_path}/other"]
    assert training(run_file, *changed, before=refuse_to_draw).run().returncode == 0
