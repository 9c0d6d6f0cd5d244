"""What a run file may say, and the one line that says what is wrong with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jetmoe_megatron.config import dump_run, load_run
from jetmoe_megatron.config.expert_backends import EXPERT_BACKENDS
from jetmoe_megatron.errors import UserError
from tests.support import REPO, small_run, write_run

DATA = {"code": "data/code", "prose": "data/prose"}
CONFIGS = sorted((REPO / "configs").rglob("*run*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_run_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("OUTPUT", "/output")
    assert load_run(path).phases


def test_every_shipped_yaml_is_part_of_a_run() -> None:
    named: set[Path] = set(CONFIGS)
    for path in CONFIGS:
        tree = yaml.safe_load(path.read_text())
        references = [*tree["phases"], tree["model"]]
        named |= {(path.parent / name).resolve() for name in references if isinstance(name, str)}
    assert named == {
        path.resolve()
        for path in (REPO / "configs").rglob("*.yaml")
        if path.name != "site.yaml" and path.parent.name != "hardware"
    }


def test_published_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from jetmoe_megatron.config.describe import count_parameters

    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("OUTPUT", "/output")
    run = load_run(REPO / "configs/jetmoe_8b/run.yaml")
    assert count_parameters(run.model) == (8_522_237_952, 2_331_445_248)
    assert [phase.tokens for phase in run.phases] == [10**12, 250 * 10**9]
    assert run.phases[0].shares["refinedweb"] == pytest.approx(0.64)
    assert run.phases[1].shares["refinedweb"] == pytest.approx(0.398 / 0.997)
    assert run.schedule.warmup_tokens == 10 * 10**9
    assert run.phases[0].data[0].path == "/data/refinedweb/refinedweb"
    trained_on = {dataset.path for phase in run.phases for dataset in phase.data}
    assert run.evaluation.every_steps and len(run.evaluation.data) == 3
    assert not trained_on & {held_out.path for held_out in run.evaluation.data}
    assert run.checkpoint.keep_every_tokens == run.checkpoint.export_every_tokens == 100 * 10**9
    assert run.logging.wandb_project == "jetmoe-8b"


def test_resolved_config_loads_as_the_same_run(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, small_run(tmp_path, DATA)))
    (tmp_path / "config.yaml").write_text(dump_run(run))
    assert load_run(tmp_path / "config.yaml") == run


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = write_run(tmp_path, small_run(tmp_path, DATA))
    overrides = ["phases.0.tokens=1e6", "optimizer.max_lr=5e-4", "checkpoint.every_tokens=4E3", "logging.wandb=off"]
    run = load_run(path, overrides)
    assert (run.phases[0].tokens, run.optimizer.max_lr, run.checkpoint.every_tokens) == (10**6, 5e-4, 4000)
    assert run.logging.wandb == "off"
    assert load_run(path, ["logging.wandb=on"]).logging.wandb == "online"


@pytest.mark.parametrize(
    ("text", "value"), [("0123", 123), ("1_000", 1000), ("0x10", 16), ("0o17", 15), ("+7", 7), ("1e3", 1000)]
)
def test_whole_numbers_of_yaml_1_2(tmp_path: Path, text: str, value: int) -> None:
    assert load_run(write_run(tmp_path, small_run(tmp_path, DATA)), [f"seed={text}"]).seed == value


def test_the_home_folder(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, small_run(tmp_path, DATA)), ["output_dir=~/runs", "name=~me"])
    assert (run.output_dir, run.name) == (str(Path.home() / "runs"), "~me")


def test_override_can_name_other_files(tmp_path: Path) -> None:
    path = write_run(tmp_path, small_run(tmp_path, DATA))
    model = small_run(tmp_path, DATA)["model"] | {"num_layers": 7}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    assert load_run(path, ["model=model.yaml"]).model.num_layers == 7
    assert load_run(path, ["model.num_layers=9", "model=model.yaml"]).model.num_layers == 9


BAD_VALUES: list[tuple[str, Any, str]] = [
    ("model__num_layer", 2, "model.num_layer: unknown key; did you mean 'num_layers'?"),
    ("optimiser", {}, "optimiser: unknown key; did you mean 'optimizer'?"),
    ("phases__0__data__0__wieght", 2, "phases.0.data.0.wieght: unknown key; did you mean 'weight'?"),
    ("losses__zzzz", 2, "losses.zzzz: unknown key; known keys are balance, z, scope"),
    ("model__num_layers", "two", "model.num_layers: must be a valid integer, not 'two'"),
    ("model__num_layers", True, "model.num_layers: must be a valid integer, not True"),
    ("model__num_layers", 2.5, "model.num_layers: must be a valid integer, not 2.5"),
    ("model__num_layers", 0, "model.num_layers: must be greater than or equal to 1, not 0"),
    ("model__num_layers", None, "model.num_layers: must be a valid integer, not None"),
    ("model__top_k", 5, "model.top_k: 5 is more than model.num_experts (4)"),
    ("model__kv_channels", 7, "model.kv_channels: 7 is odd"),
    (
        "model__expert_backend",
        "cuda",
        "model.expert_backend: must be 'auto', 'loop', 'torch', 'megablocks', 'te' or 'te_fp8', not 'cuda'",
    ),
    ("optimizer__max_lr", -1.0, "optimizer.max_lr: must be greater than 0, not -1.0"),
    ("optimizer__max_lr", float("nan"), "max_lr: must be"),
    ("optimizer__max_lr", float("inf"), "max_lr: must be"),
    ("optimizer__betas", [0.9], "optimizer.betas: must have at least 2 items"),
    ("optimizer__betas", [0.9, 1.0], "optimizer.betas.1: must be less than 1"),
    ("batch__global_tokens", 250, "batch.global_tokens: 250 is not a multiple of batch.sequence_length (32)"),
    ("schedule__warmup_tokens", 10**6, "schedule.warmup_tokens: 1000000 is more than the 1280 tokens"),
    ("schedule__final_lr_ratio", 0, "schedule.final_lr_ratio: must be greater than 0"),
    ("precision", "fp8", "precision: must be 'bf16' or 'fp32', not 'fp8'"),
    ("phases", [], "phases: must have at least 1 item"),
    ("phases", "phase1.yaml", "phases: must be a valid list"),
    ("phases__0__data", [], "phases.0.data: must have at least 1 item"),
    ("phases__0__data__0__weight", -1, "phases.0.data.0.weight: must be greater than or equal to 0, not -1"),
    ("phases__1__name", "stable", "phases: two phases have the same name"),
    ("phases__0__data__1__name", "code", "phase 'stable': data: two entries have the same name"),
    ("phases__1__data__0__path", "elsewhere", "phase 'decay': data: 'code' has another path in an earlier phase"),
    ("phases__0__learning_rate", "cosine", "phases.0.learning_rate: must be 'constant' or 'exponential'"),
    ("model", ["x"], "model: must be a valid dictionary"),
    ("model", "missing.yaml", "missing.yaml (named in"),
    ("output_dir", "${NOT_SET_ANYWHERE}/x", "output_dir: the environment variable NOT_SET_ANYWHERE is not set"),
    ("parallel__sequence", "sometimes", "parallel.sequence: must be"),
    ("logging__wandb", "maybe", "logging.wandb: must be 'off', 'offline' or 'online', not 'maybe'"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD_VALUES, ids=[f"{k}={v}"[:40] for k, v, _ in BAD_VALUES])
def test_bad_value(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = write_run(tmp_path, small_run(tmp_path, DATA, **{key: value}))
    with pytest.raises(UserError) as caught:
        load_run(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value) or "missing.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key(tmp_path: Path) -> None:
    tree = small_run(tmp_path, DATA)
    del tree["model"]["vocab_size"]
    with pytest.raises(UserError, match="model.vocab_size: required key is missing"):
        load_run(write_run(tmp_path, tree))


def test_all_weights_zero(tmp_path: Path) -> None:
    tree = small_run(tmp_path, DATA, phases__0__data__0__weight=0, phases__0__data__1__weight=0.0)
    with pytest.raises(UserError, match="phase 'stable': data: every weight is 0"):
        load_run(write_run(tmp_path, tree))


def test_a_path_under_two_names(tmp_path: Path) -> None:
    """Each name would be read from its own beginning. A link is the same file."""
    (tmp_path / "link").symlink_to(tmp_path)
    same = {"code": str(tmp_path / "a"), "prose": str(tmp_path / "link/a")}
    with pytest.raises(UserError, match="phase 'stable': data: 'prose' has the path of 'code', whose sequences"):
        load_run(write_run(tmp_path, small_run(tmp_path, same)))


BAD_FILES = {
    "empty": (b"", "found nothing"),
    "list": (b"- a\n- b\n", "found a list"),
    "text": (b"hello", "found text"),
    "broken": (b"a: [1, 2\nb: 3", "line 2: not valid YAML"),
    "tab": (b"a:\n\tb: 1", "not valid YAML"),
    "binary": (bytes(range(256)), "not a UTF-8 text file"),
    "python tag": (b"a: !!python/object/apply:os.system ['echo hi']", "not valid YAML"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_run(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("phases.7.tokens=1", "there is no 'phases.7' to set"),
        ("phases.².tokens=1", "there is no 'phases.²' to set"),
        ("phases.².tokens.²=1", "there is no 'phases.²' to set"),
        ("phases.0.tokens=20:00:00", "phases.0.tokens: must be a valid"),
        ("optimizer.max_lr=1:30", "optimizer.max_lr: must be a valid number"),
        ("name.x=1", "'name' has no key 'x'"),
        ("model.num_layers=[1", "the value is not valid YAML"),
        ("model.num_lairs=3", "model.num_lairs: unknown key; did you mean 'num_layers'?"),
    ],
)
def test_bad_override(tmp_path: Path, override: str, message: str) -> None:
    path = write_run(tmp_path, small_run(tmp_path, DATA))
    with pytest.raises(UserError) as caught:
        load_run(path, [override])
    assert message in str(caught.value)


def test_folder_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        load_run(tmp_path)


def test_the_page_of_speed_names_the_expert_backends() -> None:
    text = (REPO / "docs/performance.md").read_text()
    assert not [name for name in EXPERT_BACKENDS if not re.search(rf"\b{name}\b", text)]


def test_an_override_leaves_other_aliases_alone(tmp_path: Path) -> None:
    """`*mix` is what `&mix` is in the file, but a mixture of its own."""
    tree = small_run(tmp_path, DATA)
    tree["phases"][1]["data"] = tree["phases"][0]["data"]
    path = write_run(tmp_path, tree)
    assert "data: *" in path.read_text()
    run = load_run(path, ["phases.0.data.0.weight=7"])
    assert [[dataset.weight for dataset in phase.data] for phase in run.phases] == [[7, 1], [3, 1]]
