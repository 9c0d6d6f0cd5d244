"""A run that begins at a checkpoint of another run, and what a resumed run may change."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.checkpoint.saved_run import SavedRun
from jetmoe_megatron.config import Run, load_run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.errors import UserError
from tests.injected_faults import Fault, pretrain_with, sequences_read
from tests.support import losses, metrics, pretrain, small_run, write_run


@pytest.fixture(scope="module")
def plateau(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Path:
    """A run that has done all its 8 steps, with every checkpoint kept: the phase switch is after step 5."""
    folder = tmp_path_factory.mktemp("plateau")
    tree = small_run(folder, data, checkpoint={"every_tokens": 256, "keep_last": 20})
    ended = pretrain(1, write_run(folder, tree))
    assert ended.returncode == 0, ended.stderr
    return folder


def branch(folder: Path, data: dict, source: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    run = write_run(folder, small_run(folder, data, start_from=str(source)))
    return pretrain(1, run, *overrides)


def test_a_decay_from_any_plateau_checkpoint(plateau: Path, tmp_path: Path, data: dict) -> None:
    before = {p: p.stat().st_mtime_ns for p in plateau.rglob("*")}
    source = plateau / "run" / "checkpoints" / "tokens_768"
    ended = branch(tmp_path, data, source, "phase=2")
    assert ended.returncode == 0, ended.stderr
    records = metrics(tmp_path / "run")
    assert [(r["step"], r["phase"]) for r in records] == [(4, "decay"), (5, "decay"), (6, "decay")]
    assert [r["lr"] for r in records] == pytest.approx([1e-2 * 0.1 ** (i / 3) for i in range(3)])
    assert records[0]["dataset_tokens/code"] == 3 * 192 + 128  # read on from where the plateau was
    assert {p: p.stat().st_mtime_ns for p in plateau.rglob("*")} == before
    progress = json.loads((tmp_path / "run" / "checkpoints" / "tokens_1536" / "progress.json").read_text())
    assert progress["branched_at"] == 768


def test_a_branch_resumes_as_if_it_had_not_stopped(plateau: Path, tmp_path: Path, data: dict) -> None:
    source = plateau / "run" / "checkpoints" / "tokens_768"
    assert branch(tmp_path / "a", data, source, "phase=2").returncode == 0
    assert branch(tmp_path / "b", data, source, "phase=2", "debug.max_steps=5").returncode == 0
    ended = branch(tmp_path / "b", data, source, "phase=2")
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "b" / "run") == losses(tmp_path / "a" / "run")


def test_the_switch_itself_is_a_branch(plateau: Path, tmp_path: Path, data: dict) -> None:
    """From the checkpoint at the end of phase 1 it is the same run."""
    ended = branch(tmp_path, data, plateau / "run" / "checkpoints" / "tokens_1280", "phase=2")
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "run") == losses(plateau / "run")[5:]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["phase=2", "start_from=no/such"], "start_from: no/such: no such folder"),
        (["phase=3"], "phase: 3 is not a phase after the first one of 2"),
        (["phase=1"], "phase: 1 is not a phase after the first one of 2"),
        (["phase=2", "start_from=null"], "phase: needs start_from"),
        (
            ["phase=2", "batch.global_tokens=512"],
            "no multiple of batch.global_tokens (512): the nearest that fit are 384",
        ),
        (
            ["model.num_layers=4"],
            "in model.num_layers (saved 2, now 4). Set it back, or train this other model from its",
        ),
        (["precision=bf16"], "in precision (saved 'fp32', now 'bf16'). Set it back, or begin another run with the"),
    ],
)
def test_what_cannot_be_branched(plateau: Path, tmp_path: Path, data: dict, overrides: list, said: str) -> None:
    ended = branch(tmp_path, data, plateau / "run" / "checkpoints" / "tokens_768", *overrides)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert said in ended.stderr
    assert not (tmp_path / "run").exists()


def test_what_a_resumed_run_may_change(tmp_path: Path, data: dict) -> None:
    run = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run, "debug.max_steps=3").returncode == 0
    other = ["optimizer.max_lr=0.02", "losses.balance=0.5"]
    refused = pretrain(1, run, *other)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "losses.balance (saved 0.01, now 0.5); optimizer.max_lr (saved 0.01, now 0.02)" in refused.stderr
    assert "checkpoint.may_change=[losses.balance,optimizer.max_lr]" in refused.stderr
    assert pretrain(1, run, *other, "checkpoint.may_change=[losses,optimizer.max_lr]").returncode == 0
    assert metrics(tmp_path / "run")[3]["lr"] == 0.02


def test_all_that_is_refused_is_said_at_once(tmp_path: Path, data: dict) -> None:
    run = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run, "debug.max_steps=3").returncode == 0
    longer = "phases.0.tokens=2560"
    refused = pretrain(1, run, longer)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "permit it with checkpoint.may_change=[phases.0.tokens]" in refused.stderr
    assert "data.new_blend=true" in refused.stderr
    ended = pretrain(1, run, longer, "checkpoint.may_change=[phases.0.tokens]", "data.new_blend=true")
    assert ended.returncode == 0, ended.stderr
    assert len(metrics(tmp_path / "run")) == 10 + 3


def test_a_phase_more_is_shown_in_short(tmp_path: Path, data: dict) -> None:
    tree = small_run(tmp_path, data)
    assert pretrain(1, write_run(tmp_path, tree), "debug.max_steps=3").returncode == 0
    tree["phases"].append({**tree["phases"][1], "name": "more"})
    refused = pretrain(1, write_run(tmp_path, tree))
    assert "in phases (saved 2 of them, now 3). Set it back" in refused.stderr


def test_a_checkpoint_of_a_version_with_another_option(tmp_path: Path, data: dict) -> None:
    """What is gone is not missed, unless the losses depended on it."""
    from jetmoe_megatron.checkpoint.checksums import CHECKSUMS, checksum

    run = write_run(tmp_path, small_run(tmp_path, data))
    assert pretrain(1, run, "debug.max_steps=3").returncode == 0
    saved = tmp_path / "run/checkpoints/tokens_768/run.yaml"
    written = saved.read_text()
    for section, status in (("parallel", 0), ("data", 0), ("losses", 2)):
        saved.write_text(written.replace(f"\n{section}:\n", f"\n{section}:\n  of_last_month: 3\n"))
        sums = json.loads((saved.parent / CHECKSUMS).read_text())
        (saved.parent / CHECKSUMS).write_text(json.dumps({**sums, "run.yaml": checksum(saved)}))
        ended = pretrain(1, run, "debug.max_steps=3")
        assert ended.returncode == status, ended.stderr
    assert "losses.of_last_month: unknown key" in ended.stderr


def test_retention(tmp_path: Path, data: dict) -> None:
    """Those at multiples of keep_every_tokens, that of each phase's end, and besides those the last one."""
    checkpoint = {"every_tokens": 256, "keep_last": 1, "keep_every_tokens": 768}
    assert pretrain(1, write_run(tmp_path, small_run(tmp_path, data, checkpoint=checkpoint))).returncode == 0
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {f"tokens_{n * 256}" for n in (3, 5, 6, 7, 8)}
    first, *others = metrics(tmp_path / "run")  # each has what the save after the step before took
    assert "save_stall_seconds" not in first and all("save_stall_seconds" in r for r in others)


def test_another_batch_that_cannot_count_the_steps(plateau: Path, tmp_path: Path, data: dict) -> None:
    ended = branch(tmp_path, data, plateau / "run/checkpoints/tokens_1024", "batch.global_tokens=384")
    assert ended.returncode == 2
    said = "is at 1024 tokens, which is no multiple of batch.global_tokens (384): the nearest that fit are 256 and 512"
    assert said in ended.stderr
    ended = branch(tmp_path, data, plateau / "run/checkpoints/tokens_1024", "batch.global_tokens=512")
    assert ended.returncode == 0, ended.stderr
    assert [(r["step"], r["tokens"]) for r in metrics(tmp_path / "run")] == [(3, 1536), (4, 2048), (5, 2560)]
    past = json.loads((tmp_path / "run/checkpoints/tokens_2560/progress.json").read_text())["data"]["past"]
    assert len(past) == 1  # a blend of its own: its phases are rounded up to other ends


def test_the_source_is_decided_once(plateau: Path, tmp_path: Path, data: dict) -> None:
    """The other run goes on, and saves, before this one has a checkpoint of its own."""
    from jetmoe_megatron.config import dump_run
    from jetmoe_megatron.resume.start_from import apply_start_from

    source, own = tmp_path / "source", tmp_path / "run"
    for tokens in (512, 768):
        shutil.copytree(plateau / f"run/checkpoints/tokens_{tokens}", source / f"aside/tokens_{tokens}")
    (source / "checkpoints").mkdir()
    (source / "aside/tokens_512").rename(source / "checkpoints/tokens_512")
    run = Run.model_validate(small_run(tmp_path, data, start_from=str(source), phase=2))
    first = apply_start_from(run)
    assert first.start_from == str(source / "checkpoints/tokens_512") and first.phases[0].tokens == 512
    own.mkdir()
    (own / "config.yaml").write_text(dump_run(first))  # as training begins
    (source / "aside/tokens_768").rename(source / "checkpoints/tokens_768")
    assert apply_start_from(run) == first
    assert apply_start_from(first) == first  # what a rollback sees
    for junk in ("", "start_from: 3", "[]", "start_from: [", f"start_from: {source}/checkpoints/gone"):
        (own / "config.yaml").write_text(junk)
        assert apply_start_from(run).start_from == str(source / "checkpoints/tokens_768")


def test_what_it_began_at_is_remembered(plateau: Path, tmp_path: Path, data: dict) -> None:
    source = plateau / "run"
    assert branch(tmp_path, data, source, "phase=2", "phases.0.tokens=2304", "debug.max_steps=9").returncode == 0
    again = branch(tmp_path, data, source, "phase=2", "phases.0.tokens=2304", "debug.max_steps=10")
    assert again.returncode == 0, again.stderr
    assert load_run(tmp_path / "run/config.yaml").start_from == str(source / "checkpoints/tokens_2048")


def test_the_newest_whole_checkpoint_is_taken_with_a_warning(plateau: Path, tmp_path: Path, data: dict) -> None:
    source = tmp_path / "source"
    shutil.copytree(plateau / "run/checkpoints", source / "checkpoints")
    (source / "checkpoints/tokens_2048/progress.json").write_text("{}")
    ended = branch(tmp_path, data, source, "debug.max_steps=8")
    assert ended.returncode == 0, ended.stderr
    assert [r["step"] for r in metrics(tmp_path / "run")] == [8]
    assert "tokens_2048 is damaged" in ended.stderr and "taking tokens_1792" in ended.stderr
    for checkpoint in (source / "checkpoints").iterdir():
        (checkpoint / "progress.json").write_text("{}")
    refused = branch(tmp_path / "other", data, source)
    assert refused.returncode == 2 and "no whole checkpoint is left" in refused.stderr


OTHER_ORDERS = {
    "seed": {"seed": 7},
    "sequences": {"batch": {"sequence_length": 64, "global_tokens": 256, "micro_sequences": 1}},
    "both, and another batch": {
        "seed": 7,
        "batch": {"sequence_length": 16, "global_tokens": 512, "micro_sequences": 4},
    },
}


@pytest.mark.parametrize("changes", OTHER_ORDERS.values(), ids=OTHER_ORDERS.keys())
def test_a_branch_with_data_in_another_order(plateau: Path, tmp_path: Path, data: dict, changes: dict) -> None:
    """It begins the data again and says so once; a resume of it is exact, a rollback too."""
    source = plateau / "run/checkpoints/tokens_1024"

    def run_file(folder: Path) -> Path:
        return write_run(tmp_path / folder, small_run(tmp_path / folder, data, start_from=str(source), **changes))

    whole, halted, said = run_file(Path("whole")), run_file(Path("halted")), []
    step = 1024 // small_run(tmp_path, data, **changes)["batch"]["global_tokens"]
    for file, overrides in ((whole, []), (halted, [f"debug.max_steps={step + 1}"]), (halted, [])):
        ended = pretrain(1, file, *overrides)
        assert ended.returncode == 0, ended.stderr
        said.append(ended.stdout.count("every data set is read from its beginning again"))
    assert said == [1, 1, 0]
    assert losses(tmp_path / "halted/run") == losses(tmp_path / "whole/run")
    first = metrics(tmp_path / "whole/run")[0]
    assert first["lm_loss"] == pytest.approx(loss_of_first_step(source, load_run(whole), tmp_path), rel=1e-5)
    assert first["lr"] == 1e-2 and first["tokens"] == 1024 + changes.get("batch", {}).get("global_tokens", 256)
    saved = json.loads((plateau / "run/checkpoints/tokens_1024/progress.json").read_text())["data"]
    (newest,) = (tmp_path / "whole/run/checkpoints").glob("tokens_2*")
    now = json.loads((newest / "progress.json").read_text())["data"]
    assert now["past"] == [{key: value for key, value in saved.items() if key != "past"}]
    assert now["began"] == {"sample": 1024 // load_run(whole).batch.sequence_length, "sequences": {}}


def loss_of_first_step(checkpoint: Path, run: Run, folder: Path) -> float:
    """By transformers, over the first sequences of each data set in the order that the blend gives them."""
    import torch
    from transformers import JetMoeForCausalLM

    from jetmoe_megatron.convert.to_hf import convert_to_hf
    from jetmoe_megatron.data.index_cache import IndexCache
    from jetmoe_megatron.data.mixture import RunSamples, orders

    convert_to_hf(checkpoint, folder / "hf")
    model = JetMoeForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    cache, began = IndexCache(folder / "indices"), 1024 // run.batch.sequence_length
    sequences = RunSamples(run, cache).sequences
    _, order = next(orders(run, cache, began))
    order.build()
    order.open()
    total, count = 0.0, run.batch.global_tokens // run.batch.sequence_length
    for row in range(count):
        item = sequences[order.names[order.data_set[row]]][int(order.place[row])]
        logits = model(item["tokens"][None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, item["labels"]).item() / count
    return total


def test_a_rollback_of_a_branch_with_another_seed(plateau: Path, tmp_path: Path, data: dict) -> None:
    """Before its first checkpoint: back to the one that it began at."""
    source = plateau / "run/checkpoints/tokens_1024"
    run = write_run(tmp_path, small_run(tmp_path, data, start_from=str(source), seed=7))
    ended = pretrain_with([Fault("loss", 5)], 1, run, "guard.on_bad_step=rollback", reads=tmp_path / "reads")
    assert ended.returncode == 0, ended.stderr
    assert "warning: rolled back to 1,024 tokens" in ended.stderr
    assert [r["step"] for r in metrics(tmp_path / "run")] == [5, 6, 7, 8]
    read = sequences_read(tmp_path / "reads")
    assert len(read) == len(set(read)) == (4 + 1) * 8
    saved = json.loads((tmp_path / "run/checkpoints/tokens_2048/progress.json").read_text())["data"]
    assert [entry["blend"]["seed"] for entry in saved["past"]] == [1234, 7]
    assert sum(saved["read"]["sequences"].values()) == len(read)


def leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield from leaves(dict(enumerate(value)), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def another(key: str, value: Any) -> Any:
    words = {"precision": "bf16", "losses.scope": "global_batch", "model.expert_backend": "loop"}
    shapes = {"constant": "exponential", "exponential": "constant"}
    if isinstance(value, list):
        return [value[0], value[1] / 2]
    if isinstance(value, str):
        return words.get(key) or shapes.get(value, f"{value} too")
    return value * 2 if value else 1


def changed(run: Run, key: str, value: Any) -> Run:
    tree = run.model_dump()
    node: Any = tree
    *path, last = key.split(".")
    for part in path:
        node = node[int(part) if isinstance(node, list) else part]
    node[last] = value
    return Run.model_validate(tree)


@pytest.fixture(scope="module")
def weights(plateau: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from jetmoe_megatron.convert.from_hf import convert_from_hf
    from jetmoe_megatron.convert.to_hf import convert_to_hf

    folder = tmp_path_factory.mktemp("weights")
    convert_to_hf(plateau / "run/checkpoints/tokens_2048", folder / "hf")
    convert_from_hf(folder / "hf", folder / "weights")
    return folder / "weights"


SAMPLE = Run.model_validate(small_run(Path("unused"), {"code": "a", "prose": "b"}))
SAVED = [key for key, _ in leaves(SAMPLE.model_dump(include=set(SavedRun.model_fields))) if ".data." not in key]


@pytest.mark.parametrize("key", SAVED)
def test_what_a_refusal_advises_is_accepted(plateau: Path, weights: Path, tmp_path: Path, data: dict, key: str) -> None:
    """Each key that a checkpoint holds, changed on resume, and again on the way that the message names."""
    from jetmoe_megatron.resume.start_from import apply_start_from
    from jetmoe_megatron.resume.start_point import StartPoint, find_start_point

    def start(run: Run) -> StartPoint:
        return find_start_point(apply_start_from(run), resolve_layout(run, 1))

    run = Run.model_validate(small_run(plateau, data))
    run = changed(run, key, another(key, dict(leaves(run.model_dump()))[key]))
    ways = []
    for attempt in range(2):
        if attempt:  # what was refused on resume is refused in a branch with the same words, or accepted there
            run = changed(run.model_copy(update={"start_from": str(plateau / "run")}), "output_dir", str(tmp_path))
        try:
            start(run)
            continue
        except UserError as error:
            said = str(error)
        assert said.count("Set it back") <= (2 if key.startswith("phases") else 1), said
        ways.append(said)
        if permitted := re.search(r"may_change=\[(.*?)\]", said):
            run = changed(run, "checkpoint.may_change", permitted[1].split(","))
        if "data.new_blend=true" in said:
            run = changed(run, "data.new_blend", True)
        if beginning := re.search(r"start_from=(\S+) with its own", said):
            assert beginning[1] == str(plateau / "run/checkpoints/tokens_2048")
            run = changed(changed(run, "start_from", beginning[1]), "output_dir", str(tmp_path))
        elif "start_from=WEIGHTS" in said:
            assert f"`jetmoe convert to-hf {plateau / 'run/checkpoints/tokens_2048'} HF`" in said
            run = changed(changed(run, "start_from", str(weights)), "output_dir", str(tmp_path))
        elif "train this other model from its beginning" in said:
            run = changed(changed(run, "start_from", None), "output_dir", str(tmp_path))
        start(run)
    assert len(ways) == {"model.init_std": 0, "model.expert_backend": 0, "batch.micro_sequences": 0}.get(
        key, 2 if key.split(".")[0] in ("model", "precision") else 1
    )


def test_a_branch_of_a_branch_stays_in_its_phase(plateau: Path, tmp_path: Path, data: dict) -> None:
    """The decay that has begun goes on, when a refused resume is followed."""
    source = plateau / "run/checkpoints/tokens_768"
    assert branch(tmp_path, data, source, "phase=2", "debug.max_steps=5").returncode == 0
    refused = branch(tmp_path, data, source, "phase=2", "seed=7")
    assert refused.returncode == 2
    way = re.search(r"(start_from=\S+ phase=null phases.0.tokens=768) with its own output_dir", refused.stderr)
    assert way, refused.stderr
    ended = branch(tmp_path, data, source, "seed=7", *way[1].split(), f"output_dir={tmp_path / 'other'}")
    assert ended.returncode == 0, ended.stderr
    (last,) = metrics(tmp_path / "other")
    assert (last["step"], last["phase"]) == (6, "decay") and last["lr"] == pytest.approx(1e-2 * 0.1 ** (2 / 3))


@pytest.mark.parametrize("change", ["precision=bf16", "model.norm_eps=1e-3", "model.top_k=1", "model.rope_theta=500"])
def test_another_model_from_the_weights_alone(weights: Path, tmp_path: Path, data: dict, change: str) -> None:
    ended = branch(tmp_path, data, weights, change, "debug.max_steps=1", "schedule.warmup_tokens=0")
    assert ended.returncode == 0, ended.stderr
    (first,) = metrics(tmp_path / "run")
    assert (first["step"], first["tokens"]) == (1, 256) and first["lm_loss"] < 4  # ln 96 is 4.6


def test_a_seed_and_a_batch_are_named_once(plateau: Path, data: dict) -> None:
    ended = pretrain(1, write_run(plateau / "again", small_run(plateau, data)), "seed=7", "batch.global_tokens=512")
    assert ended.returncode == 2
    for words in ("seed", "global_tokens", "Set it back"):
        assert ended.stderr.count(words) == 1, ended.stderr
