"""Every script that can be rendered is sound bash, and the shipped ones are what the templates give."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.config.site import Site
from jetmoe_megatron.launch.render import host_scripts, shipped_scripts, slurm_script, tokenize_script
from tests.support import REPO

NASTY = 'it\'s $HOME; `rm x` "&&" #'
SITES: list[dict[str, Any]] = [
    {"tasks": tasks, "container": container, "gpus_per_node": gpus, "ranks_per_node": None if gpus else 2, **more}
    for tasks, container, gpus, more in itertools.product(
        ("node", "rank"),
        (
            None,
            {"runtime": "pyxis", "image": "a b.sqsh", "mounts": ["/data", "/a:/b"]},
            {"runtime": "apptainer", "image": "x.sif"},
        ),
        (0, 8),
        (
            {},
            {
                "setup": ["module load cuda"],
                "environment": ["NCCL_IB_HCA=mlx5_0,mlx5_1", f"NASTY={NASTY}"],
                "numa_binding": "node",
                "python": "/a folder/python",
                "account": "me",
                "partition": "gpu",
                "sbatch": ["--qos=long"],
            },
        ),
    )
]  # fmt: skip


def rendered() -> dict[str, str]:
    scripts = {Path(name).name: text for name, text in shipped_scripts().items()}
    for number, values in enumerate(SITES):
        site = Site.model_validate({"nodes": 2, "hosts": ["a", "b", "c"], **values})
        scripts[f"{number}-slurm"] = slurm_script(site, NASTY, Path("/a b/run.yaml"), "/a b/%j.out", "job.sbatch")
        arguments = ["3", "/a b/web", NASTY, "--tokenizer", NASTY]
        usage = ["sbatch --array=1-3 '/a b/job.sbatch'"]
        scripts[f"{number}-tokenize"] = tokenize_script(site, NASTY, "/a b/%a.out", usage, arguments, overwrite=True)
        for ssh in (False, True):
            scripts |= {f"{number}-{ssh}-{k}": v for k, v in host_scripts(site, NASTY, ssh, "/a b/job.sh").items()}
    return scripts


def test_all_are_sound(tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert shellcheck, "install the extra `dev`"
    scripts = rendered()
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        assert "{%" not in text and "{{" not in text and "\n\n\n" not in text
    check = [shellcheck, "--exclude=SC2016", *scripts]  # that $HOME in a value is not expanded is meant
    checked = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("name", shipped_scripts())
def test_the_shipped_scripts(name: str) -> None:
    shipped = (REPO / name).read_text()
    assert shipped == shipped_scripts()[name], f"run: python -m jetmoe_megatron.launch.render {name} > {name}"


@pytest.mark.parametrize("ssh", [False, True])
def test_values_are_no_code(tmp_path: Path, ssh: bool) -> None:
    """A value of the site file is a value, whatever characters it has."""
    site = Site(nodes=1, hosts=["a"], gpus_per_node=0, ranks_per_node=1, environment=[f"NASTY={NASTY}"])
    script = host_scripts(site, NASTY, ssh, "/x/job.sh")["host.sh"]
    line = next(line for line in script.splitlines() if line.startswith("export NASTY="))
    shown = subprocess.run(["bash", "-c", f'{line}; printf %s "$NASTY"'], capture_output=True, text=True, timeout=30)
    assert shown.stdout == NASTY
