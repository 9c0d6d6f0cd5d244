"""`jetmoe config show`: the resolved run, and where each of its values was written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from jetmoe_megatron.config import dump_run, load_run
from jetmoe_megatron.config.origin import show
from tests.support import REPO, jetmoe, small_run, write_run

DATA = {"code": "data/code", "prose": "data/prose"}
CONFIGS = sorted((REPO / "configs").rglob("*run*.yaml"))


@pytest.fixture(autouse=True)
def environment_of_the_shipped_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("OUTPUT", "/output")


def values(text: str) -> list[tuple[str, str, str]]:
    """(key, value, comment) of each line of `show` that has a value."""
    lines = [line.rpartition("  # ") for line in text.splitlines() if "  # " in line]
    pairs = [(*before.lstrip("- ").partition(": "), origin) for before, _, origin in lines]
    return [(key.strip(), value.strip(), origin) for key, _, value, origin in pairs]


def origin_of(text: str, key: str) -> str:
    (origin,) = {origin for found, _, origin in values(text) if found == key}
    return origin


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
class TestShippedRuns:
    def test_what_is_shown_is_the_same_run(self, path: Path, tmp_path: Path) -> None:
        overrides = ["optimizer.max_lr=1e-3", "phases.1.data.0.weight=7"]
        (tmp_path / "shown.yaml").write_text(show(path, overrides))
        assert load_run(tmp_path / "shown.yaml") == load_run(path, overrides)

    def test_every_value_names_its_source(self, path: Path) -> None:
        lines = show(path).splitlines()
        bare = [line for line in lines if "  # " not in line]
        assert all(line.endswith(":") for line in bare)  # the heads of sections and lists
        assert len(lines) == len(dump_run(load_run(path)).splitlines())

    def test_the_line_that_is_named_has_the_key(self, path: Path) -> None:
        named = 0
        for key, _, origin in values(show(path)):
            if origin != "default":
                file, _, number = origin.rpartition(":")
                line = Path(file).read_text().splitlines()[int(number) - 1]
                assert key in line
                named += 1
        assert named > 20


def test_run_file_model_file_phase_file_and_default() -> None:
    run = REPO / "configs/jetmoe_8b/run.yaml"
    text = show(run)
    lines = run.read_text().splitlines()
    folder = run.parent
    assert origin_of(text, "seed") == f"{run}:{next(n for n, line in enumerate(lines, 1) if line.startswith('seed'))}"
    assert origin_of(text, "hidden_size").rpartition(":")[0] == f"{folder}/../models/jetmoe_8b.yaml"
    assert [origin.rpartition(":")[0] for key, _, origin in values(text) if key == "tokens"] == [
        f"{folder}/phase1.yaml",
        f"{folder}/phase2.yaml",
    ]
    assert origin_of(text, "expert_backend") == "default"
    assert origin_of(text, "on_bad_step") == "default"


def test_overrides(tmp_path: Path) -> None:
    path = write_run(tmp_path, small_run(tmp_path, DATA))
    text = show(path, ["guard.budget=3", "optimizer.betas=[0.8, 0.9]", "phases.0.data=[{name: a, path: b, weight: 1}]"])
    shown = {key: (value, origin) for key, value, origin in values(text)}
    assert shown["budget"] == ("3", "override")
    assert ("0.8", "", "override") in values(text) and ("0.9", "", "override") in values(text)
    assert ("name", "a", "override") in values(text)
    assert shown["spike_factor"] == ("10.0", "default")


def test_an_override_of_a_section_takes_all_of_it_away_from_the_file(tmp_path: Path) -> None:
    path = write_run(tmp_path, small_run(tmp_path, DATA, losses={"balance": 0.5, "z": 0.5}))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({**small_run(tmp_path, DATA)["model"], "num_layers": 7}))
    text = show(path, ["losses.z=0.25", "losses={balance: 0.125}", "model=model.yaml", "model.top_k=1"])
    assert ("z", "0.25", "override") in values(text) and ("balance", "0.125", "override") in values(text)
    assert origin_of(text, "num_layers").startswith(f"{tmp_path}/model.yaml:")
    assert origin_of(text, "top_k") == "override"
    text = show(path, ["losses={balance: 0.125}"])
    assert ("z", "0.001", "default") in values(text)


def test_merged_and_repeated_parts_name_the_line_that_is_read(tmp_path: Path) -> None:
    tree = small_run(tmp_path, DATA)
    del tree["optimizer"], tree["schedule"]
    text = yaml.safe_dump(tree, sort_keys=False)
    before = len(text.splitlines())
    text += "optimizer: &o\n  max_lr: 0.25\n  eps: 0.125\nschedule: {warmup_tokens: 512}\n"
    text = text.replace("losses:", "losses_:")
    (tmp_path / "run.yaml").write_text(text)
    shown = show(tmp_path / "run.yaml")
    assert origin_of(shown, "max_lr") == f"{tmp_path}/run.yaml:{before + 2}"
    merged = text.replace(
        "optimizer: &o\n  max_lr: 0.25\n", "optimizer:\n  <<: {max_lr: 0.5, clip_grad: 2.0}\n  max_lr: 0.25\n"
    )
    (tmp_path / "run.yaml").write_text(merged)
    shown = show(tmp_path / "run.yaml")
    assert ("max_lr", "0.25", f"{tmp_path}/run.yaml:{before + 3}") in values(shown)
    assert ("clip_grad", "2.0", f"{tmp_path}/run.yaml:{before + 2}") in values(shown)


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "5e-4",
        "0o17",
        "0x1f",
        "1:30",
        "off",
        "null",
        "2026-01-01",
        "a # b",
        "a: b",
        "- a",
        "'",
        '"',
        "ü",
        "x " * 200,
    ],
)
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    """Also one that YAML would take for a number or a comment, or fold."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(small_run(tmp_path, DATA, name=text, logging={"wandb_project": text})))  # all quoted
    for name, resolved in (("shown.yaml", show(path)), ("dumped.yaml", dump_run(load_run(path)))):
        (tmp_path / name).write_text(resolved)
        assert load_run(tmp_path / name) == load_run(path)


def test_the_command(tmp_path: Path) -> None:
    path = write_run(tmp_path, small_run(tmp_path, DATA))
    result = jetmoe("config", "show", path, "guard.budget=3")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == show(path, ["guard.budget=3"])


def test_a_name_of_a_file_cannot_reach_the_terminal(tmp_path: Path) -> None:
    tree: dict[str, Any] = small_run(tmp_path, DATA)
    phase = tree["phases"][0]
    hostile = "a\x1b[2J\nseed: 7\u202e.yaml"
    (tmp_path / hostile).write_text(yaml.safe_dump(phase))
    path = write_run(tmp_path, {**tree, "phases": [hostile, tree["phases"][1]]})
    result = jetmoe("config", "show", path)
    assert result.returncode == 0
    assert not {"\x1b", "\u202e"} & set(result.stdout)
    (tmp_path / "shown.yaml").write_text(result.stdout)
    assert load_run(tmp_path / "shown.yaml") == load_run(path)


def test_a_run_that_training_refuses_is_refused_alike(tmp_path: Path) -> None:
    path = write_run(tmp_path, small_run(tmp_path, DATA, batch__global_tokens=250))
    result = jetmoe("config", "show", path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: {path}: batch.global_tokens: 250 is not a multiple of batch.sequence_length (32)\n"
    )
    assert os.listdir(tmp_path) == ["run.yaml"]
