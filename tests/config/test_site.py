"""Site files: how runs are started on a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from jetmoe_megatron.config.reference import reference
from jetmoe_megatron.config.site import Site, load_site
from jetmoe_megatron.errors import UserError
from tests.support import REPO


def test_the_shipped_one() -> None:
    site = load_site(REPO / "configs/site.yaml")
    assert (site.nodes, site.gpus_per_node, site.ranks, site.time) == (12, 8, 8, "24:00:00")


@pytest.mark.parametrize("text", ["time: 0:10:01", "{time: 0-18:00:01, warning_seconds: 64800}", "time: 0:00:00"])
def test_a_time_that_leaves_room_for_the_warning(tmp_path: Path, text: str) -> None:
    """A time of zero is SLURM's for no limit."""
    file = tmp_path / "site.yaml"
    file.write_text(text)
    load_site(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nods: 2", "nods: unknown key; did you mean 'nodes'?"),
        ("container: {runtim: pyxis}", "container.runtim: unknown key; did you mean 'runtime'?"),
        ("container: {runtime: docker, image: x}", "container.runtime: must be 'pyxis' or 'apptainer', not 'docker'"),
        ("nodes: 0", "nodes: must be greater than or equal to 1, not 0"),
        ("time: tomorrow", "time: must be hours:minutes:seconds or days-hours:minutes:seconds, not 'tomorrow'"),
        ("time: 24:00", "time: must be hours:minutes:seconds or days-hours:minutes:seconds, not '24:00'"),
        ("time: 0:10:00", "warning_seconds: 600 are not less than time (0:10:00)"),
        ("{time: 0-02:00:00, warning_seconds: 7200}", "warning_seconds: 7200 are not less than time (0-02:00:00)"),
        ("warning_seconds: 70000", "warning_seconds: must be less than or equal to 65535, not 70000"),
        ("sbatch: [qos=long]", "sbatch.0: must be one option, as --qos=long, and not --array, not 'qos=long'"),
        ("sbatch: [--array=1-2]", "sbatch.0: must be one option, as --qos=long, and not --array, not '--array=1-2'"),
        ("account: two words", "account: must be one word, not 'two words'"),
        ("environment: [NCCL DEBUG=INFO]", "environment.0: must be NAME=value, not 'NCCL DEBUG=INFO'"),
        ('partition: "a\\nb"', "partition: 'a\\nb' holds a control character"),
        ("- a", "expected `key: value` lines"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_site(file)
    assert str(error.value).startswith(f"{file}: {said}") and "\n" not in str(error.value)


def test_the_page_has_the_table() -> None:
    assert reference("site") in (REPO / "docs/launch.md").read_text(), "run: jetmoe config reference site"


def test_every_key_has_a_meaning() -> None:
    assert all(field.description for field in Site.model_fields.values())
