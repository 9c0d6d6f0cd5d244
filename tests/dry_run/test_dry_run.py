"""What a dry run says, beside what the run then does."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.locks import open_locked
from jetmoe_megatron.checkpoint.checksums import METADATA, write_checksums
from jetmoe_megatron.checkpoint.folder import published
from jetmoe_megatron.config import load_run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.dry_run.schedule import phases_left, schedule
from tests.support import REPO, environment, launched, metrics, pretrain, small_run, training, write_dataset, write_run
from tests.warm import Command

BIG = {"model__vocab_size": 8192}  # so that files of a checkpoint are too large for a quick check


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def dry(run_file: Path, *arguments: str) -> str:
    """What it says. It changes nothing."""
    before = snapshot(run_file.parent)
    result = pretrain(1, run_file, "--dry-run", *arguments)
    assert result.returncode == 0, result.stderr
    assert snapshot(run_file.parent) == before
    return result.stdout


def refused(run_file: Path, *arguments: str) -> str:
    """Its last line on stderr."""
    before = snapshot(run_file.parent)
    result = pretrain(1, run_file, "--dry-run", *arguments)
    assert result.returncode == 2, result.stdout
    assert snapshot(run_file.parent) == before
    return result.stderr.splitlines()[-1]


TRUE: dict[str, dict[str, Any]] = {
    "plain": {},
    "saves that are no whole steps apart": {"checkpoint__every_tokens": 300},
    "an end before the end": {"debug__max_steps": 7, "checkpoint__every_tokens": 512},
    "a step that is both": {"checkpoint__every_tokens": 1280, "evaluation__every_steps": 4},
    "evaluations": {"evaluation__every_steps": 3},
    "more saves than steps": {"checkpoint__every_tokens": 10, "evaluation__every_steps": 1},
}


@pytest.mark.parametrize("changes", TRUE.values(), ids=TRUE.keys())
def test_the_run_does_what_was_said(changes: dict[str, Any], tmp_path: Path, data: dict[str, str]) -> None:
    tree = small_run(tmp_path, data, evaluation={"sequences": 2, "data": [{"name": "v", "path": data["held_out"]}]})
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        tree.setdefault(section, {})[key] = value
    run_file = write_run(tmp_path, tree)
    run, last = load_run(run_file, []), tree.get("debug", {}).get("max_steps", 8)
    layout = resolve_layout(run, 1)
    whole, left = (phases_left(run, layout, done, last, 0) for done in (0, 3))
    assert pretrain(1, run_file, "debug.max_steps=3", "evaluation.data=[]").returncode == 0
    before = set(published(tmp_path / "run/checkpoints"))
    assert pretrain(1, run_file).returncode == 0
    records = [record for record in metrics(tmp_path / "run") if record["step"] > 3]
    saved = {int(path.name.removeprefix("tokens_")) for path in {*published(tmp_path / "run/checkpoints")} - before}
    assert [phase.name for phase in left] == ["stable", "decay"]
    for phase in left:
        steps = [record for record in records if record["phase"] == phase.name]
        assert list(range(phase.done + 1, phase.until + 1)) == [record["step"] for record in steps]
        assert (phase.first_lr, phase.last_lr) == (steps[0]["lr"], steps[-1]["lr"])
        assert phase.evaluations == sum("held_out_loss" in record for record in steps)
        assert phase.saves == [record["step"] for record in steps if record["tokens"] in saved]
    assert whole[1] == left[1]
    assert (whole[0].done, whole[0].until) == (0, 5)


def test_a_phase_with_more_saves_than_can_be_counted(tmp_path: Path, data: dict[str, str]) -> None:
    tree = small_run(tmp_path, data, phases__0__tokens=2**50, checkpoint__every_tokens=1)
    run = Run.model_validate(tree)
    phases = phases_left(run, resolve_layout(run, 1), 0, 2**42 + 3, 0)
    text = "\n".join(schedule(phases, 256))
    assert "| over 1,000,000 |" in text and "saves after 1, 2, 3, ...\n" in text
    assert "  decay: steps 4,398,046,511,105 to 4,398,046,511,107; saves after 4,398,046,511,105, " in text


def test_the_table(tmp_path: Path, data: dict[str, str]) -> None:
    evaluation = {"every_steps": 4, "sequences": 2, "data": [{"name": "v", "path": data["held_out"]}]}
    run_file = write_run(tmp_path, small_run(tmp_path, data, checkpoint__every_tokens=300, evaluation=evaluation))
    assert """what is left, by phase:
| phase  | steps | tokens | learning rate   | saves | evaluations |
|--------|-------|--------|-----------------|-------|-------------|
| stable | 5     | 1.28 k | 0.001 to 0.01   | 4     | 1           |
| decay  | 3     | 768    | 0.01 to 0.00215 | 2     | 1           |

  stable: steps 1 to 5; saves after 2, 3, 4, 5
  decay: steps 6 to 8; saves after 6, 8
""" in dry(run_file)


def test_exports(tmp_path: Path, data: dict[str, str]) -> None:
    options = {"every_tokens": 256, "export_every_tokens": 600}
    run_file = write_run(tmp_path, small_run(tmp_path, data, checkpoint=options))
    run = load_run(run_file, [])
    layout = resolve_layout(run, 1)
    assert [phase.exports for phase in phases_left(run, layout, 0, 8, 0)] == [2, 1]  # at 768, 1280 and 2048 tokens
    assert pretrain(1, run_file, "debug.max_steps=4").returncode == 0
    assert [path.name for path in (tmp_path / "run/hf").iterdir()] == ["tokens_768"]
    (tmp_path / "run/hf/tokens_2048.partial").mkdir()  # a start removes it
    rows = [line.split("|")[6].strip() for line in dry(run_file).splitlines() if re.match(r"\| (stable|decay) ", line)]
    assert rows == ["1", "1"]


def test_where_the_data_go_on(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    said = dry(run_file)
    assert "indices: 4 are missing in " in said and "read so far" not in said
    assert "the first batch, of step 1: 8 sequences (code 6, prose 2)" in said
    assert pretrain(1, run_file, "debug.max_steps=3").returncode == 0
    said = dry(run_file)
    last = metrics(tmp_path / "run")[-1]
    assert f"indices: all are in {tmp_path}/run/data_index\n" in said
    epochs = {name: f"({last[f'dataset_epochs/{name}']:.3g} epochs)" for name in ("code", "prose")}
    assert f"read so far: code 576 tokens {epochs['code']}, prose 192 tokens {epochs['prose']}\n" in said
    assert "the first batch, of step 4: 8 sequences (code 6, prose 2)" in said


def test_the_first_batch_is_what_is_trained_on(tmp_path: Path, data: dict[str, str]) -> None:
    """The data sets and the first ids, beside the samples that the loop would take."""
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples

    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run_file, "debug.max_steps=3").returncode == 0
    samples = RunSamples(load_run(run_file, []), IndexCache(tmp_path / "run/data_index"))
    for ranks, numbers in ((1, [24, 25, 26, 27]), (2, [24, 25, 28, 29]), (4, [24, 25, 26, 27])):
        said = dry(run_file, "--world", str(ranks))
        table = said[said.index("| data set ") :].splitlines()[2:6]
        for line, number in zip(table, numbers, strict=True):
            _, name, tokens, text, _ = (cell.strip() for cell in line.split("|"))
            ids = samples[number]["tokens"].tolist()
            assert (name, tokens) == (samples.source(number)[0], "32")
            assert " ".join(map(str, ids)).startswith(text.removesuffix("...")) and len(text) > 20


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 ids, and a set that it has made of two documents with control characters."""
    import json

    from data_tools.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": f"{letter} \x1b[31m quick\nbrown fox" * 4}) + "\n" for letter in "ab" * 40]
    (folder / "texts.jsonl").write_text("".join(lines))
    train_bpe([folder / "texts.jsonl"], 300, folder / "tokenizer")
    line = ["jetmoe", "data", "tokenize", folder / "texts.jsonl", "--output", folder / "set"]
    assert Command([*line, "--tokenizer", folder / "tokenizer"], environment(), REPO).run().returncode == 0
    return folder


def test_text_of_the_first_batch(tmp_path: Path, data: dict[str, str], texts: Path) -> None:
    paths = {"code": str(texts / "set"), "prose": data["prose"]}
    tree = small_run(tmp_path, paths, tokenizer=str(texts / "tokenizer"), model__vocab_size=300)
    said = dry(write_run(tmp_path, tree))
    rows = [line for line in said.splitlines() if line.startswith("| code ")]
    assert rows and all(r"quick\nbrown fox" in row or r"\x1b" in row for row in rows)
    assert "| data set | tokens | documents | begins with " in said and "\x1b" not in said
    assert max(map(len, (line for line in said.splitlines() if line.startswith("|")))) <= 80


def test_another_tokenizer_is_noticed(tmp_path: Path, texts: Path) -> None:
    paths = {name: write_dataset(tmp_path / name, 60, seed, 4000) for seed, name in enumerate(("code", "prose"))}
    tree = small_run(tmp_path, paths, tokenizer=str(texts / "tokenizer"), model__vocab_size=4000)
    said = refused(write_run(tmp_path, tree))
    assert re.match(r"error: tokenizer: data set '\w+' has token id \d+, and \S+ has \d+ tokens: was it made", said)


def test_a_damaged_checkpoint_is_passed_over_and_not_set_aside(tmp_path: Path, data: dict[str, str]) -> None:
    """Its damage is in a file that a quick check does not read."""
    run_file = write_run(tmp_path, small_run(tmp_path, data, checkpoint__every_tokens=256, **BIG))
    assert pretrain(1, run_file, "debug.max_steps=2").returncode == 0
    older, newer = published(tmp_path / "run/checkpoints")
    flip(newer)
    before = snapshot(tmp_path)
    result = pretrain(1, run_file, "--dry-run")
    assert result.returncode == 0 and "start: continues at step 2 of 8" in result.stdout, result.stderr
    (warning,) = result.stderr.splitlines()
    assert re.match(
        rf"warning: {newer} is damaged: \S+ is not what was written .*; a start would set it aside", warning
    )
    assert snapshot(tmp_path) == before
    flip(older)
    assert refused(run_file).startswith(f"error: {newer}: is damaged, and no whole checkpoint is left: restore one, or")


def flip(checkpoint: Path) -> None:
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_has_exactly_the_tensors_that_are_looked_for(
    precision: str, tmp_path: Path, data: dict[str, str]
) -> None:
    from jetmoe_megatron.checkpoint.metadata import read_metadata
    from jetmoe_megatron.config import load_run
    from jetmoe_megatron.dry_run.start import _shapes

    run_file = write_run(tmp_path, small_run(tmp_path, data, precision=precision))
    assert pretrain(1, run_file, "debug.max_steps=1").returncode == 0
    (checkpoint,) = published(tmp_path / "run/checkpoints")
    entries: dict[str, Any] = read_metadata(checkpoint).state_dict_metadata
    found = {name: tuple(entry.size) for name, entry in entries.items()}
    assert found == _shapes(load_run(run_file, []), weights_only=False)


def test_a_checkpoint_without_the_tensors_of_its_run(tmp_path: Path, data: dict[str, str]) -> None:
    """Its checksums fit."""
    wide = write_run(tmp_path / "wide", small_run(tmp_path / "wide", data, model__ffn_hidden_size=64))
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    for file in (wide, run_file):
        assert pretrain(1, file, "debug.max_steps=1").returncode == 0
    (checkpoint,) = published(tmp_path / "run/checkpoints")
    (other,) = published(tmp_path / "wide/run/checkpoints")
    for name in (METADATA, "__0_0.distcp"):
        shutil.copy(other / name, checkpoint / name)
    write_checksums(checkpoint)
    said = refused(run_file)
    assert said.startswith(f"error: {checkpoint}: cannot be loaded: 'decoder.layers.mlp.experts.linear_in.weight' has")


def test_a_run_that_is_done(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run_file).returncode == 0
    assert dry(run_file).endswith(f"{tmp_path}/run: all 8 steps are done, nothing left to do\n")
    assert dry(run_file, "debug.max_steps=4").endswith(
        "run: debug.max_steps: 4 of 8 steps are done, nothing left to do\n"
    )
    said = refused(run_file, "phases.1.tokens=256", "checkpoint.may_change=[phases]", "data.new_blend=true")
    assert "is after the last of the 6 steps of all phases" in said


def test_a_run_that_is_training(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    (tmp_path / "run").mkdir()
    lock = open_locked(tmp_path / "run/.lock")
    assert lock is not None
    with lock:
        said = refused(run_file)
    assert said.startswith(f"error: output_dir: another process is training into {tmp_path}/run: ")
    assert "start: begins at step 1 of 8" in dry(run_file)


def test_weights_of_another_model_to_start_from(tmp_path: Path, data: dict[str, str]) -> None:
    first = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, first, "debug.max_steps=3").returncode == 0
    jetmoe = lambda *line: Command(["jetmoe", *line], environment(), REPO).run()  # noqa: E731
    assert jetmoe("convert", "to-hf", tmp_path / "run", tmp_path / "hf").returncode == 0
    assert jetmoe("convert", "from-hf", tmp_path / "hf", tmp_path / "weights").returncode == 0
    overrides = [f"start_from={tmp_path}/weights", f"output_dir={tmp_path}/other"]
    said = dry(first, *overrides)
    assert f"start: begins at step 1 of 8, in phase stable, with the weights of {tmp_path}/weights, which load" in said
    overrides[0] = f"start_from={tmp_path}/run"
    said = dry(first, *overrides)
    assert "start: continues at step 4 of 8, in phase stable, after 768 tokens, from" in said


OF_2 = r"the fullest rank \(0 of 2\)"
MEMORY: dict[str, tuple[list[str], str]] = {
    "here": ([], r"fits: the rank needs \S+ MB of \S+ GB \(available here\); \d+% are left"),
    "on other machines": (["--world", "2"], rf"{OF_2} holds at most \S+ [kM]B in tensors; --hardware NAME says"),
    "on CPUs": (["--world", "2", "device=cpu"], rf"fits: {OF_2} needs .*\(available here for each of 2 ranks\); \d+%"),
    "on a GPU": (["--hardware", "h100"], r"fits: the rank needs 2 GB of 80 GB \(H100 SXM\); 97% are left"),
    "on a small one": (
        ["--hardware", "SMALL"],
        r"does not fit: the rank needs 2 GB of 2 GB \(tiny\); \S+ MB are missing",
    ),
}


@pytest.mark.parametrize(("arguments", "said"), MEMORY.values(), ids=MEMORY.keys())
def test_memory(arguments: list[str], said: str, tmp_path: Path, data: dict[str, str]) -> None:
    hardware = yaml.safe_load((REPO / "configs/hardware/h100.yaml").read_text())
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**hardware, "gpu": "tiny", "memory_gb": 2}))
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    arguments = [argument.replace("SMALL", str(tmp_path / "small.yaml")) for argument in arguments]
    assert re.search(f"^memory: {said}", found := dry(run_file, *arguments), re.MULTILINE), found


def test_what_cannot_be_rehearsed_is_said(tmp_path: Path, data: dict[str, str]) -> None:
    from jetmoe_megatron.config.layout import resolve_layout
    from jetmoe_megatron.config.schema import Run
    from jetmoe_megatron.dry_run.memory import memory

    run = Run.model_validate(small_run(tmp_path, data, parallel={"context": 2}))
    (said,) = memory(run, resolve_layout(run, 2), None, elsewhere=True)
    assert said.startswith("memory: not rehearsed: parallel.context: ")
    run = Run.model_validate(small_run(tmp_path, data, batch__global_tokens=2**19 * 64))
    (said,) = memory(run, resolve_layout(run, 2**19), None, elsewhere=True)
    assert "524288 ranks are too many to rehearse" in said


def test_unknown_hardware(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    assert refused(run_file, "--hardware", "h1000").startswith(
        "error: --hardware: 'h1000' is not known: a100, b200, h100,"
    )
    assert "no/such.yaml: No such file" in refused(run_file, "--hardware", "no/such.yaml")
    alone = pretrain(1, run_file, "--hardware", "h100")
    assert alone.returncode == 2 and alone.stderr.startswith("error: --hardware goes with --dry-run")


def test_a_missing_key_of_weights_and_biases(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data, logging={"wandb": "online"}))
    env = {key: value for key, value in environment().items() if not key.startswith("WANDB_") and key != "NETRC"}
    result = Command(["pretrain", run_file, "--dry-run"], {**env, "HOME": str(tmp_path)}, REPO).run()
    assert result.returncode == 2 and result.stderr.startswith("error: logging.wandb: online, but no key is found: ")
    assert result.stderr.count("\n") == 1


def test_two_ranks_say_it_once(tmp_path: Path, data: dict[str, str]) -> None:
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    result = launched(2, run_file, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("memory: fits") == result.stdout.count("| stable ") == 1
    assert "ranks    2 (data 2)" in result.stdout and not (tmp_path / "run").exists()


def test_two_ranks_end_alike(tmp_path: Path, data: dict[str, str]) -> None:
    """Also where the store of their meeting ends with rank 0, and what only that finds."""
    run_file = write_run(tmp_path, small_run(tmp_path, data))
    sound = training(run_file, "--dry-run").to_their_ends(2)
    assert [(end.returncode, end.stderr) for end in sound] == [(0, "")] * 2
    assert ["memory: fits" in end.stdout for end in sound] == [True, False]
    (tmp_path / "run").mkdir()
    lock = open_locked(tmp_path / "run/.lock")
    assert lock is not None
    with lock:
        ends = training(run_file, "--dry-run").to_their_ends(2)
    for end in ends:
        assert end.returncode == 2 and "error: output_dir: another process is training into " in end.stderr
        assert end.stderr.count("\n") == 1
